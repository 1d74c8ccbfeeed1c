// One thread a pack of columns, the clients' values sorted in registers by the same network as on the CPU.
#include "../order_statistics.h"

#include <algorithm>
#include <utility>

#include "../network.h"
#include "device.h"

namespace feddistill {
namespace {

constexpr int kThreads = 128;

struct Task {
    const void* clients[kMostRegisters];  // a kernel parameter: no copy to the device, no stacked input
    void* out;
    std::int64_t n, packs;  // columns, and packs of columns; none where a pointer is not aligned
    DType dtype;
    int trim, nearest;
    float share;
};

// A word of registers holds one column of float32, or two of half precision, which stay so: the smaller and the larger
// of two are exact.  Where one is NaN both are, and every output of a network hangs on every input.
template <DType kDType, int C>
struct Sorter {
    static constexpr auto kSteps = network<C>(0, C);

    template <std::size_t I>
    __device__ static void step(unsigned (&x)[C]) {
        constexpr int low = kSteps[I].low, high = kSteps[I].high;
        const unsigned a = x[low], b = x[high];
        x[low] = smaller<kDType>(a, b);
        x[high] = larger<kDType>(a, b);
    }

    template <std::size_t... I>
    __device__ static void run([[maybe_unused]] unsigned (&x)[C], std::index_sequence<I...>) {
        (step<I>(x), ...);
    }

    __device__ static void run(unsigned (&x)[C]) { run(x, std::make_index_sequence<kSteps.size()>{}); }
};

template <DType kDType, int C>
__device__ unsigned trimmed(const Task& task, unsigned (&x)[C]) {
    constexpr int kEach = kPerWord<kDType>;
    Sorter<kDType, C>::run(x);
    float sum[kEach] = {};
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if (c < task.trim || c >= C - task.trim) continue;
        float value[kEach];
        unpack_word<kDType>(x[c], value);
#pragma unroll
        for (int e = 0; e < kEach; ++e) sum[e] += value[e];
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) sum[e] *= task.share;
    return pack_word<kDType>(sum);
}

template <int C>
constexpr int kWords = C > 16 ? 2 : 4;  // of registers that a thread loads from a client at once

template <DType kDType, int C>
__global__ void __launch_bounds__(kThreads) trimmed_mean_kernel(const Task task) {
    using T = Storage<kDType>;
    using Loaded = Words<kWords<C>>;
    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
    const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (std::int64_t i = thread; i < task.packs; i += stride) {
        Loaded packs[C], result;
#pragma unroll
        for (int c = 0; c < C; ++c) packs[c] = static_cast<const Loaded*>(task.clients[c])[i];
#pragma unroll
        for (int w = 0; w < kWords<C>; ++w) {
            unsigned x[C];
#pragma unroll
            for (int c = 0; c < C; ++c) x[c] = packs[c].word[w];
            result.word[w] = trimmed<kDType, C>(task, x);
        }
        static_cast<Loaded*>(task.out)[i] = result;
    }
    const std::int64_t rest = task.packs * static_cast<std::int64_t>(sizeof(Loaded) / sizeof(T));
    for (std::int64_t i = rest + thread; i < task.n; i += stride) {
        unsigned x[C];
#pragma unroll
        for (int c = 0; c < C; ++c) x[c] = bits_of_storage<kDType>(static_cast<const T*>(task.clients[c])[i]);
        static_cast<T*>(task.out)[i] = storage_of_bits<kDType>(trimmed<kDType, C>(task, x));
    }
}

// One column a thread.  The nearest are neighbours.  Their window moves up while the value it loses is farther from the
// median than the one it gains: m - x[i] > x[i + nearest] - m, here without a difference to round.
template <int C>
__global__ void __launch_bounds__(kThreads) mean_around_median_kernel(const Task task) {
    float* const mine = dynamic_shared<float>() + threadIdx.x;  // [C][kThreads]: registers have no index
    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
    for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < task.n; i += stride) {
        unsigned x[C];
#pragma unroll
        for (int c = 0; c < C; ++c) x[c] = bits_of(load_as(task.clients[c], i, task.dtype));
        Sorter<DType::f32, C>::run(x);
#pragma unroll
        for (int c = 0; c < C; ++c) mine[c * kThreads] = float_of_bits(x[c]);
        const float twice_median = mine[(C - 1) / 2 * kThreads] + mine[C / 2 * kThreads];
        int first = 0;
        float sum = 0;
        for (int c = 0; c < C - task.nearest; ++c)
            first += mine[c * kThreads] + mine[(c + task.nearest) * kThreads] < twice_median;
        for (int c = first; c < first + task.nearest; ++c) sum += mine[c * kThreads];
        store_as(task.out, i, task.dtype, sum * task.share);
    }
}

using Kernel = void (*)(Task);

template <DType kDType, std::size_t... I>
Kernel trimmed_mean_of(int clients, std::index_sequence<I...>) {
    static constexpr Kernel table[] = {trimmed_mean_kernel<kDType, int(I) + 1>...};
    return table[clients - 1];
}

template <std::size_t... I>
Kernel mean_around_median_of(int clients, std::index_sequence<I...>) {
    static constexpr Kernel table[] = {mean_around_median_kernel<int(I) + 1>...};
    return table[clients - 1];
}

Kernel trimmed_mean_of(DType dtype, int clients) {
    constexpr auto networks = std::make_index_sequence<kMostRegisters>{};
    switch (dtype) {
        case DType::f32: return trimmed_mean_of<DType::f32>(clients, networks);
        case DType::f16: return trimmed_mean_of<DType::f16>(clients, networks);
        case DType::bf16: return trimmed_mean_of<DType::bf16>(clients, networks);
    }
    return nullptr;
}

}  // namespace

void trimmed_mean_cuda(const TrimmedMean& task, void* stream) {
    if (task.n == 0) return;
    Task given{};
    for (int c = 0; c < task.count; ++c) given.clients[c] = task.clients[c];
    given.out = task.out;
    given.n = task.n;
    given.dtype = task.dtype;
    given.trim = task.trim;
    given.nearest = task.nearest;
    given.share = 1.0f / static_cast<float>(task.nearest ? task.nearest : task.kept());
    const std::int64_t bytes = task.nearest ? 0 : task.count > 16 ? sizeof(Words<2>) : sizeof(Words<4>);
    auto addresses = reinterpret_cast<std::uintptr_t>(task.out);
    for (int c = 0; c < task.count; ++c) addresses |= reinterpret_cast<std::uintptr_t>(task.clients[c]);
    if (bytes && addresses % bytes == 0) given.packs = task.n * size_of(task.dtype) / bytes;
    const std::int64_t turns = given.packs ? given.packs : task.n;
    const std::int64_t blocks = std::min<std::int64_t>((turns + kThreads - 1) / kThreads, 1 << 16);
    const std::size_t shared = task.nearest ? sizeof(float) * kThreads * task.count : 0;
    const Kernel kernel = task.nearest
                              ? mean_around_median_of(task.count, std::make_index_sequence<kMostRegisters>{})
                              : trimmed_mean_of(task.dtype, task.count);
    launch(kernel, static_cast<int>(blocks), kThreads, shared, stream, given);
}

}  // namespace feddistill
