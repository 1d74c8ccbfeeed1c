// Trimmed mean over clients of each coordinate (the median trims all it can), and mean around the median.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace feddistill {

struct TrimmedMean {
    const void* const* clients;  // pointers to n contiguous elements each
    int count;                   // C
    std::int64_t n;
    DType dtype;
    int trim;  // 0 <= 2 trim < C
    void* out;
    int nearest = 0;  // if not 0: trim is 0, and of all values only so many about the median are averaged

    int kept() const { return count - 2 * trim; }
    bool is_median() const { return kept() <= 2 && nearest == 0; }
};

// The result does not depend on threads.  set: see cpu/instruction_sets.h; tests look at all of them.
void trimmed_mean_cpu(const TrimmedMean& task, int threads, int set = 0);

constexpr int kMostRegisters = 32;  // C up to which a column's values stay in registers

#ifdef FEDDISTILL_WITH_CUDA
// count <= kMostRegisters; pointers, but for the list of clients, are the device's; stream is a cudaStream_t.
void trimmed_mean_cuda(const TrimmedMean& task, void* stream);
#endif

}  // namespace feddistill
