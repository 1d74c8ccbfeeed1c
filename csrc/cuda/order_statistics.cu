// One thread a column, its C values sorted in registers by the same network as on the CPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "../network.h"
#include "../order_statistics.h"

namespace feddistill {
namespace {

constexpr int kThreads = 256;

struct Pointers {
    const void* at[kMostRegisters];  // a kernel parameter: no copy to the device, no stacked input
};

__device__ float load(const void* from, std::int64_t i, DType dtype) {
    switch (dtype) {
        case DType::f32: return static_cast<const float*>(from)[i];
        case DType::f16: return __half2float(static_cast<const __half*>(from)[i]);
        case DType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    }
    return 0;
}

__device__ void store(void* to, std::int64_t i, DType dtype, float x) {
    switch (dtype) {
        case DType::f32: static_cast<float*>(to)[i] = x; break;
        case DType::f16: static_cast<__half*>(to)[i] = __float2half_rn(x); break;
        case DType::bf16: static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x); break;
    }
}

template <int C>
struct Sorter {
    static constexpr auto kSteps = network<C>(0, C);

    template <std::size_t I>
    __device__ static void step(float* v) {
        constexpr int low = kSteps[I].low, high = kSteps[I].high;
        const float a = v[low], b = v[high];
        v[low] = a < b ? a : b;
        v[high] = a < b ? b : a;
    }

    template <std::size_t... I>
    __device__ static void sort(float* v, std::index_sequence<I...>) {
        (step<I>(v), ...);
    }
};

template <int C>
__global__ void __launch_bounds__(kThreads)
    trimmed_mean_kernel(Pointers clients, std::int64_t n, DType dtype, int trim, void* out) {
    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
    for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) {
        float v[C];
        bool has_nan = false;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            v[c] = load(clients.at[c], i, dtype);
            has_nan |= v[c] != v[c];
        }
        Sorter<C>::sort(v, std::make_index_sequence<Sorter<C>::kSteps.size()>{});
        float sum = 0;
#pragma unroll
        for (int c = 0; c < C; ++c)
            if (c >= trim && c < C - trim) sum += v[c];
        store(out, i, dtype, has_nan ? __int_as_float(0x7fc00000) : sum / static_cast<float>(C - 2 * trim));
    }
}

template <int C>
void launch(const TrimmedMean& task, const Pointers& clients, cudaStream_t stream) {
    const std::int64_t blocks = (task.n + kThreads - 1) / kThreads;
    const int grid = static_cast<int>(blocks < 1 << 16 ? blocks : 1 << 16);
    trimmed_mean_kernel<C><<<grid, kThreads, 0, stream>>>(clients, task.n, task.dtype, task.trim, task.out);
}

using Launch = void (*)(const TrimmedMean&, const Pointers&, cudaStream_t);

template <std::size_t... I>
Launch choose(int clients, std::index_sequence<I...>) {
    static constexpr Launch table[] = {launch<int(I) + 1>...};
    return table[clients - 1];
}

}  // namespace

void trimmed_mean_cuda(const TrimmedMean& task, void* stream) {
    if (task.n == 0) return;
    Pointers clients{};
    for (int c = 0; c < task.count; ++c) clients.at[c] = task.clients[c];
    choose(task.count, std::make_index_sequence<kMostRegisters>{})(task, clients, static_cast<cudaStream_t>(stream));
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
        throw std::runtime_error(std::string("trimmed_mean_kernel: ") + cudaGetErrorString(error));
}

}  // namespace feddistill
