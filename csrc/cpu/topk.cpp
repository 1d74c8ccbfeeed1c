// Shares rows among threads.
#include <memory>
#include <vector>

#include "threads.h"
#include "topk_isa.h"

namespace feddistill {

std::int64_t topk_cpu(const TopK& task, int threads, int set) {
    constexpr std::int64_t kOperations = 2, kRow = 4096;  // an element's and a row's, in those of kWorthAThread
    threads = worth(task.rows * (task.vocab * kOperations + kRow), threads);
    const TopKSizes sizes = topk_sizes(task);
    const std::int64_t floats = sizes.values + sizes.group_maxima;
    const auto memory = std::make_unique_for_overwrite<float[]>(floats * threads);
    const auto ids = std::make_unique_for_overwrite<std::int32_t[]>(sizes.ids * threads);
    std::vector<std::int64_t> first_empty(threads, -1);
    TopKRow* const run = FEDDISTILL_CHOOSE(set, topk_row);
    in_parallel(task.rows, threads, [&](std::int64_t row, int thread) {
        float* const values = memory.get() + floats * thread;
        const TopKScratch scratch{sizes.room, values, ids.get() + sizes.ids * thread, values + sizes.values};
        std::int64_t& first = first_empty[thread];
        if (!run(task, row, scratch) && (first < 0 || row < first)) first = row;
    });
    std::int64_t first = -1;
    for (const std::int64_t row : first_empty)
        if (row >= 0 && (first < 0 || row < first)) first = row;
    return first;
}

}  // namespace feddistill
