// The top-k of one row, once for each level.
#pragma once
#include <algorithm>

#include "../topk.h"
#include "instruction_sets.h"

namespace feddistill {

// What a thread needs.  Past an end there is room for vectors that are written or read whole.
struct TopKScratch {
    std::int64_t room;    // of candidates
    float* values;        // [room], at least [k]
    std::int32_t* ids;    // [room], at least [2 k]
    float* group_maxima;  // [vocab / 64], at least a block
};

struct TopKSizes {
    std::int64_t room, values, ids, group_maxima;
};

constexpr TopKSizes topk_sizes(const TopK& task) {
    constexpr std::int64_t kSlack = 64, kFew = 4096, kBlock = 1024;
    const std::int64_t few = std::max(4 * task.k, kFew);
    const std::int64_t room = std::min(few, task.vocab + kSlack);
    return {room, room + kSlack, std::max(room, 2 * task.k) + kSlack, std::max(task.vocab / 64, kBlock) + kSlack};
}

// False for a row of nothing but -inf.
using TopKRow = bool(const TopK&, std::int64_t row, const TopKScratch&);

FEDDISTILL_DECLARE(TopKRow topk_row;)

}  // namespace feddistill
