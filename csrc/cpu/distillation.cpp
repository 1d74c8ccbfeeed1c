// Shares rows among threads.
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "distillation_isa.h"
#include "pages.h"
#include "threads.h"

namespace feddistill {

std::int64_t distillation_scratch(const Distillation& task) {
    constexpr std::int64_t kEvents = 8, kRoom = 1 + 16, kBlock = 1024;
    if (task.ids.at) return kEvents * (task.kept + kRoom) + kBlock;
    const bool widened = task.student.dtype != task.teacher.dtype;
    return task.gradient.at || widened ? task.vocab * (widened ? 4 : 1) : 0;
}

Refusal distillation_cpu(const Distillation& task, int threads, int set) {
    if (!is_known(task.kind))
        throw std::invalid_argument("distillation_cpu: no kind of divergence has number " +
                                    std::to_string(static_cast<int>(task.kind)));
    constexpr std::int64_t kOperations = 4;  // an element's, in those of kWorthAThread
    threads = worth(task.rows * task.vocab * kOperations, threads);
    const std::int64_t scratch_size = distillation_scratch(task);
    const auto scratch = std::make_unique_for_overwrite<float[]>(scratch_size * threads);
    std::vector<Refusal> refusals(threads);
    DistillationRow* const run = FEDDISTILL_CHOOSE(set, distillation_row);
    if (task.gradient.at && task.gradient.at != task.student.at)
        fresh(task.gradient.at, task.rows * task.gradient.stride * size_of(task.gradient.dtype));
    in_parallel(task.rows, threads, [&](std::int64_t row, int thread) {
        const Refusal::Reason reason = run(task, row, scratch.get() + scratch_size * thread);
        Refusal& first = refusals[thread];
        if (reason != Refusal::none && (first.row < 0 || row < first.row)) first = {row, reason};
    });
    Refusal first;
    for (const Refusal& each : refusals)
        if (each.row >= 0 && (first.row < 0 || each.row < first.row)) first = each;
    return first;
}

void scale_cpu(const void* gradient, std::int64_t n, DType dtype, float factor, void* out, int threads, int set) {
    constexpr std::int64_t kShare = 1 << 14;
    ScaleSpan* const run = FEDDISTILL_CHOOSE(set, scale_span);
    if (out != gradient) fresh(out, n * size_of(dtype));
    in_parallel((n + kShare - 1) / kShare, worth(n, threads), [&](std::int64_t share, int) {
        run(gradient, share * kShare, std::min(n, (share + 1) * kShare), dtype, factor, out);
    });
}

}  // namespace feddistill
