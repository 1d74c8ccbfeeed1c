// Shares columns among threads.
#include <algorithm>
#include <vector>

#include "order_statistics_isa.h"
#include "pages.h"
#include "threads.h"

namespace feddistill {

void trimmed_mean_cpu(const TrimmedMean& task, int threads, int set) {
    constexpr std::int64_t kShare = 1 << 12;  // columns handed to a thread at once
    const std::int64_t shares = (task.n + kShare - 1) / kShare;
    threads = worth(task.n * task.count, threads);
    const bool wide = task.count > kMostRegisters;
    std::vector<Comparator> steps;
    std::vector<float> values;  // allocated here, for an exception cannot leave a parallel region
    std::vector<const float*> kept;
    if (wide) {
        steps = network(task.count, task.trim, task.count - task.trim);
        values.resize(std::size_t(task.count) * kWideColumns * threads);
        kept.resize(std::size_t(task.count) * threads);
    }
    fresh(task.out, task.n * size_of(task.dtype));
    TrimmedColumns* const run = FEDDISTILL_CHOOSE(set, trimmed_columns);
    in_parallel(shares, threads, [&](std::int64_t s, int thread) {
        WideScratch scratch{};
        if (wide) {
            const std::int64_t first = std::int64_t{thread} * task.count;
            scratch = {values.data() + first * kWideColumns, kept.data() + first, steps.data(),
                       static_cast<std::int64_t>(steps.size())};
        }
        run(task, s * kShare, std::min(task.n, (s + 1) * kShare), scratch);
    });
}

}  // namespace feddistill
