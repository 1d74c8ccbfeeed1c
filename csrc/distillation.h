// Divergence of softmaxes and the distillation loss, with its gradient, a row at a time.
#pragma once
#include <cstdint>
#include <iterator>

#include "dtype.h"
#include "no_id.h"

namespace feddistill {

// The kinds of divergence that are compiled, by their names in feddistill_kernels/_kinds.py.  The enumeration, the
// names that Python reads and every switch over kinds derive from this table: a kind without its two functions in
// cpu/kinds.h and cuda/kinds.h does not compile, and a kind that is not listed runs in the reference.
#define FEDDISTILL_KINDS(X) X(forward_kl) X(reverse_kl) X(jsd) X(tvd) X(skew_forward_kl) X(skew_reverse_kl)

enum class Kind : int {
#define FEDDISTILL_KIND(name) name,
    FEDDISTILL_KINDS(FEDDISTILL_KIND)
#undef FEDDISTILL_KIND
};

// By number.
inline constexpr const char* kKindNames[] = {
#define FEDDISTILL_KIND(name) #name,
    FEDDISTILL_KINDS(FEDDISTILL_KIND)
#undef FEDDISTILL_KIND
};

constexpr bool is_known(Kind kind) {
    return static_cast<int>(kind) >= 0 && static_cast<int>(kind) < static_cast<int>(std::size(kKindNames));
}

// Row n: loss[n] = scale[n] (kd D + ce CE), and its gradient times scale[n].  scale 0: nothing is looked at.
struct Distillation {
    std::int64_t rows, vocab, width;  // the student has width >= vocab columns, of which the last are a pad
    Matrix student;
    Matrix teacher;              // [rows, vocab] logits; [rows, kept] log-probabilities where there are ids
    Matrix ids;                  // int32 [rows, kept], distinct in a row but for kNoId; or at == nullptr
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
    enum Reason { none, empty_student, empty_teacher, label, ids };  // ids: one is outside or there twice
    std::int64_t row = -1;
    Reason reason = none;
};

// Returns the refusal of the first row that has one.  The result does not depend on threads.  Throws
// std::invalid_argument for an unknown kind, as distillation_cuda does.
Refusal distillation_cpu(const Distillation& task, int threads, int set = 0);

// out = gradient * factor, for n elements.
void scale_cpu(const void* gradient, std::int64_t n, DType dtype, float factor, void* out, int threads, int set = 0);

#ifdef FEDDISTILL_WITH_CUDA
// Pointers are the device's; stream is a cudaStream_t, and nothing waits for it.  A row without a loss, see Refusal,
// gets NaN; one that keeps an id twice gets anything.  factor points to one number on the device.
void distillation_cuda(const Distillation& task, void* stream);
void scale_cuda(const void* gradient, std::int64_t n, DType dtype, const float* factor, void* out, void* stream);
#endif

}  // namespace feddistill
