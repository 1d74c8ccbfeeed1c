// csrc/cuda/order_statistics.cu in the emulator, with a C face for ctypes.
#include "../../csrc/cuda/order_statistics.cu"

using namespace feddistill;

extern "C" const char* trimmed(const void* const* clients, int count, std::int64_t n, int dtype, int trim, int nearest,
                               void* out) {
    return emulator::guarded([&] {
        trimmed_mean_cuda({clients, count, n, static_cast<DType>(dtype), trim, out, nearest}, nullptr);
    });
}
