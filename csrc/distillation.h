// Divergence of softmaxes and the distillation loss, with its gradient, a row at a time.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace feddistill {

enum class Kind : int {  // feddistill_kernels/distillation/_kinds.py: the order of KINDS
    forward_kl,
    reverse_kl,
    jsd,
    tvd,
    skew_forward_kl,
    skew_reverse_kl,
};

// Row n: loss[n] = scale[n] (kd D + ce CE), and its gradient times scale[n].  scale 0: nothing is looked at.
struct Distillation {
    std::int64_t rows, vocab, width;  // the student has width >= vocab columns, of which the last are a pad
    Matrix student;
    Matrix teacher;              // [rows, vocab] logits; [rows, kept] log-probabilities where there are ids
    Matrix ids;                  // int32 [rows, kept], or at == nullptr
    Matrix log_tail;             // [rows, 1]
    std::int64_t kept;
    const std::int64_t* labels;  // or nullptr
    const float* scale;
    Matrix gradient;             // [rows, width] of the student's dtype, may be the student; or at == nullptr
    float* loss;
    Kind kind;
    double beta, temperature, kd, ce;
};

// Why a row has no loss.  The gradient of rows before and after it may have been written.
struct Refusal {
    enum Reason { none, empty_student, empty_teacher, label, id };
    std::int64_t row = -1;
    Reason reason = none;
};

// Returns the refusal of the first row that has one.  The result does not depend on threads.
Refusal distillation_cpu(const Distillation& task, int threads, int set = 0);

// out = gradient * factor, for n elements.
void scale_cpu(const void* gradient, std::int64_t n, DType dtype, float factor, void* out, int threads, int set = 0);

#ifdef FEDDISTILL_WITH_CUDA
// Pointers are the device's; stream is a cudaStream_t, and nothing waits for it.  A row without a loss, see Refusal,
// gets NaN.  factor points to one number on the device.
void distillation_cuda(const Distillation& task, void* stream);
void scale_cuda(const void* gradient, std::int64_t n, DType dtype, const float* factor, void* out, void* stream);
#endif

}  // namespace feddistill
