// Chooses the instruction set once, and shares columns among threads.
#include <algorithm>
#include <vector>

#include "order_statistics_isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace feddistill {
namespace {

struct Variant {
    const char* name;
    TrimmedColumns* trimmed_columns;
};

std::vector<Variant> look() {
    std::vector<Variant> found;
#ifdef FEDDISTILL_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) found.push_back({"x86-64-v4", x86_64_v4::trimmed_columns});
    if (__builtin_cpu_supports("x86-64-v3")) found.push_back({"x86-64-v3", x86_64_v3::trimmed_columns});
#endif
    found.push_back({"generic", generic::trimmed_columns});
    return found;
}

const std::vector<Variant>& variants() {
    static const std::vector<Variant> found = look();
    return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) names.emplace_back(variant.name);
    return names;
}

void trimmed_mean_cpu(const TrimmedMean& task, int threads, int set) {
    constexpr std::int64_t kShare = 1 << 12;          // columns handed to a thread at once
    constexpr std::int64_t kWorthAThread = 1 << 16;   // values: some 20 us, what waking a thread costs
    const std::int64_t shares = (task.n + kShare - 1) / kShare;
    const std::int64_t worth = task.n * task.count / kWorthAThread;
    threads = static_cast<int>(std::clamp<std::int64_t>(worth, 1, std::max(1, threads)));
#ifndef _OPENMP
    threads = 1;
#endif
    std::vector<Comparator> steps;
    std::vector<float> scratch;
    const std::int64_t scratch_size = std::int64_t{task.count} * kWideColumns;
    if (task.count > kMostRegisters) {
        steps = network(task.count, task.trim, task.count - task.trim);
        scratch.resize(scratch_size * threads);  // here, for an exception cannot leave a parallel region
    }
    TrimmedColumns* const run = variants().at(set).trimmed_columns;
    const auto share = [&](std::int64_t s, int thread) {
        run(task, s * kShare, std::min(task.n, (s + 1) * kShare),
            scratch.empty() ? nullptr : scratch.data() + scratch_size * thread, steps.data(),
            static_cast<std::int64_t>(steps.size()));
    };
    if (threads == 1) {  // a parallel region of one still costs a wake-up
        for (std::int64_t s = 0; s < shares; ++s) share(s, 0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t s = 0; s < shares; ++s) share(s, omp_get_thread_num());
#endif
}

}  // namespace feddistill
