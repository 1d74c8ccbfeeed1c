// The column kernels, once for each level.
#pragma once
#include "../network.h"
#include "../order_statistics.h"
#include "instruction_sets.h"

namespace feddistill {

constexpr int kColumns = 256;      // worked on at once in registers: sorted, 8 clients take 8 KiB as floats
constexpr int kWideColumns = 64;   // worked on at once where C values do not fit the registers

// For count > kMostRegisters.
struct WideScratch {
    float* values;           // [count][kWideColumns]
    const float** kept;      // [count]
    const Comparator* steps; // the network for the kept outputs
    std::int64_t step_count;
};

// Columns [begin, end).
using TrimmedColumns = void(const TrimmedMean&, std::int64_t begin, std::int64_t end, const WideScratch&);

FEDDISTILL_DECLARE(TrimmedColumns trimmed_columns;)

}  // namespace feddistill
