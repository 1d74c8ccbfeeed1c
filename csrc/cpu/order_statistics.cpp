// Shares columns among threads.
#include <algorithm>
#include <vector>

#include "order_statistics_isa.h"
#include "threads.h"

namespace feddistill {

void trimmed_mean_cpu(const TrimmedMean& task, int threads, int set) {
    constexpr std::int64_t kShare = 1 << 12;  // columns handed to a thread at once
    const std::int64_t shares = (task.n + kShare - 1) / kShare;
    threads = worth(task.n * task.count, threads);
    std::vector<Comparator> steps;
    std::vector<float> scratch;
    const std::int64_t scratch_size = std::int64_t{task.count} * kWideColumns;
    if (task.count > kMostRegisters) {
        steps = network(task.count, task.trim, task.count - task.trim);
        scratch.resize(scratch_size * threads);  // here, for an exception cannot leave a parallel region
    }
    TrimmedColumns* const run = FEDDISTILL_CHOOSE(set, trimmed_columns);
    in_parallel(shares, threads, [&](std::int64_t s, int thread) {
        run(task, s * kShare, std::min(task.n, (s + 1) * kShare),
            scratch.empty() ? nullptr : scratch.data() + scratch_size * thread, steps.data(),
            static_cast<std::int64_t>(steps.size()));
    });
}

}  // namespace feddistill
