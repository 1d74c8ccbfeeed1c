// csrc/cuda/distillation.cu in the emulator, with a C face for ctypes.
#include "../../csrc/cuda/distillation.cu"

#include <cstdio>

using namespace feddistill;

struct Settings {
    std::int64_t rows, vocab, width, kept;
    int kind;
    double beta, temperature, kd, ce;
    int shared_limit, processors, capability;
};

// Returns 0, or 1 with what went wrong in `message`.
extern "C" int run(const Settings& x, const Matrix& student, const Matrix& teacher, const Matrix& ids,
                   const Matrix& log_tail, const std::int64_t* labels, const float* scale, const Matrix& gradient,
                   float* loss, char* message, std::size_t room) {
    const emulator::Machine machine(x.shared_limit, x.processors, x.capability);
    try {
        distillation_cuda({x.rows, x.vocab, x.width, student, teacher, ids, log_tail, x.kept, labels, scale, gradient,
                           loss, static_cast<Kind>(x.kind), x.beta, x.temperature, x.kd, x.ce},
                          nullptr);
        return 0;
    } catch (const std::exception& error) {
        std::snprintf(message, room, "%s", error.what());
        return 1;
    }
}

// nullptr for a number that no kind has.
extern "C" const char* kind_name(int number) {
    return is_known(static_cast<Kind>(number)) ? kKindNames[number] : nullptr;
}

extern "C" const char* scale(const void* gradient, std::int64_t n, int dtype, const float* factor, void* out) {
    return emulator::guarded(
        [&] { scale_cuda(gradient, n, static_cast<DType>(dtype), factor, out, nullptr); });
}
