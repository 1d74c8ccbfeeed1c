// csrc/cuda/topk.cu in the emulator, with a C face for ctypes.
#include "../../csrc/cuda/topk.cu"

using namespace feddistill;

extern "C" const char* compress(std::int64_t rows, std::int64_t vocab, std::int64_t k, void* logits,
                                std::int64_t stride, int dtype, double temperature, int id_order, std::int32_t* ids,
                                float* log_probs, float* log_tail) {
    return emulator::guarded([&] {
        topk_cuda({rows, vocab, k, {logits, stride, static_cast<DType>(dtype)}, temperature, id_order != 0, ids,
                   log_probs, log_tail},
                  nullptr);
    });
}
