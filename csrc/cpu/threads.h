// Work shared among threads.  What is done in one share never depends on how many there are.
#pragma once
#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace feddistill {

constexpr std::int64_t kWorthAThread = 1 << 16;  // simple operations: some 20 us, what waking a thread costs

// As many of `threads` as `operations` are worth; never fewer than one.
inline int worth(std::int64_t operations, int threads) {
#ifdef _OPENMP
    return static_cast<int>(std::clamp<std::int64_t>(operations / kWorthAThread, 1, std::max(1, threads)));
#else
    return 1;
#endif
}

// Calls work(share, thread) for each share in [0, shares).  work must not throw.
template <class Work>
void in_parallel(std::int64_t shares, int threads, const Work& work) {
    if (threads == 1 || shares == 1) {  // a parallel region of one still costs a wake-up
        for (std::int64_t s = 0; s < shares; ++s) work(s, 0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t s = 0; s < shares; ++s) work(s, omp_get_thread_num());
#endif
}

}  // namespace feddistill
