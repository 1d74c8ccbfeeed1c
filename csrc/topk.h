// The k largest entries of each row as log-probabilities, and the mass of the others.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace feddistill {

struct TopK {
    std::int64_t rows, vocab, k;
    Matrix logits;
    double temperature;
    bool id_order;         // else by descending probability, equal ones by ascending id
    std::int32_t* ids;     // [rows, k], of equal entries the lowest
    float* log_probs;      // [rows, k]
    float* log_tail;       // [rows]
};

// Returns the first row of nothing but -inf, or -1.  The result does not depend on threads.
std::int64_t topk_cpu(const TopK& task, int threads, int set = 0);

#ifdef FEDDISTILL_WITH_CUDA
constexpr std::int64_t kMostCudaKept = 2048;  // whose candidates 64 KiB of shared memory hold

// k <= kMostCudaKept, vocab < 2^31; pointers are the device's; stream is a cudaStream_t.  A row of nothing but -inf
// gives NaN, as one with NaN does.
void topk_cuda(const TopK& task, void* stream);
#endif

}  // namespace feddistill
