// What all kernels use: elements by dtype, 16 bytes of them at once, reductions.
#pragma once
#include <cstdint>
#include <cstring>

#include "../dtype.h"
#include "machine.h"

namespace feddistill {

constexpr int kPackBytes = 16;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.44269504088896341f;

struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

template <DType kDType>
struct StorageOf {
    using type = float;
};
template <>
struct StorageOf<DType::f16> {
    using type = Half;
};
template <>
struct StorageOf<DType::bf16> {
    using type = BFloat16;
};
template <DType kDType>
using Storage = typename StorageOf<kDType>::type;

template <DType kDType>
constexpr int kLanes = kPackBytes / static_cast<int>(sizeof(Storage<kDType>));  // elements to a pack

template <DType kDType>
__device__ inline float to_float(Storage<kDType> x) {
    if constexpr (kDType == DType::f32) return x;
    if constexpr (kDType == DType::f16) return half_to_float(x.bits);
    if constexpr (kDType == DType::bf16) return float_of_bits(static_cast<unsigned>(x.bits) << 16);
}

template <DType kDType>
__device__ inline Storage<kDType> from_float(float x) {
    if constexpr (kDType == DType::f32) return x;
    if constexpr (kDType == DType::f16) return {float_to_half(x)};
    if constexpr (kDType == DType::bf16) return {float_to_bf16(x)};
}

template <DType kDType>
__device__ inline unsigned bits_of_storage(Storage<kDType> x) {
    if constexpr (kDType == DType::f32)
        return bits_of(x);
    else
        return x.bits;
}

template <DType kDType>
__device__ inline Storage<kDType> storage_of_bits(unsigned bits) {
    if constexpr (kDType == DType::f32)
        return float_of_bits(bits);
    else
        return {static_cast<std::uint16_t>(bits)};
}

// One float, or two halves, the first below.
template <DType kDType>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(Storage<kDType>));

template <DType kDType>
__device__ inline void unpack_word(unsigned word, float (&x)[kPerWord<kDType>]) {
    if constexpr (kDType == DType::f32) {
        x[0] = float_of_bits(word);
    } else if constexpr (kDType == DType::bf16) {
        x[0] = float_of_bits(word << 16);
        x[1] = float_of_bits(word & 0xffff0000u);
    } else {
        x[0] = half_to_float(static_cast<std::uint16_t>(word));
        x[1] = half_to_float(static_cast<std::uint16_t>(word >> 16));
    }
}

template <DType kDType>
__device__ inline unsigned pack_word(const float (&x)[kPerWord<kDType>]) {
    if constexpr (kDType == DType::f32)
        return bits_of(x[0]);
    else
        return from_float<kDType>(x[0]).bits | static_cast<unsigned>(from_float<kDType>(x[1]).bits) << 16;
}

// NaN where either is; of two halves each.
template <DType kDType>
__device__ inline unsigned smaller(unsigned a, unsigned b) {
    if constexpr (kDType == DType::f32) return smaller_f32(a, b);
    if constexpr (kDType == DType::f16) return smaller_f16(a, b);
    if constexpr (kDType == DType::bf16) return smaller_bf16(a, b);
}
template <DType kDType>
__device__ inline unsigned larger(unsigned a, unsigned b) {
    if constexpr (kDType == DType::f32) return larger_f32(a, b);
    if constexpr (kDType == DType::f16) return larger_f16(a, b);
    if constexpr (kDType == DType::bf16) return larger_bf16(a, b);
}

template <int kCount>
struct alignas(4 * kCount) Words {
    unsigned word[kCount];
};
using Pack = Words<4>;  // 16 bytes

template <typename T>
__device__ inline Pack load_pack(const T* from) {
    return *reinterpret_cast<const Pack*>(from);
}
template <typename T>
__device__ inline void store_pack(T* to, const Pack& pack) {
    *reinterpret_cast<Pack*>(to) = pack;
}

// Elements until the first at a multiple of 16 bytes.
template <typename T>
__device__ inline int elements_to_alignment(const T* at) {
    return static_cast<int>((0 - reinterpret_cast<std::uintptr_t>(at)) % kPackBytes / sizeof(T));
}

template <DType kDType>
__device__ inline void unpack(const Pack& pack, float (&x)[kLanes<kDType>]) {
    constexpr int kEach = kPerWord<kDType>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float y[kEach];
        unpack_word<kDType>(pack.word[i], y);
#pragma unroll
        for (int j = 0; j < kEach; ++j) x[i * kEach + j] = y[j];
    }
}

template <DType kDType>
__device__ inline Pack packed(const float (&x)[kLanes<kDType>]) {
    constexpr int kEach = kPerWord<kDType>;
    Pack pack;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float y[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) y[j] = x[i * kEach + j];
        pack.word[i] = pack_word<kDType>(y);
    }
    return pack;
}

template <DType kDType>
__device__ inline void set_first(Pack& pack, Storage<kDType> x) {
    if constexpr (kDType == DType::f32)
        pack.word[0] = bits_of(x);
    else
        pack.word[0] = (pack.word[0] & 0xffff0000u) | x.bits;
}

// Where the dtype is known only when the kernel runs.
__device__ inline float load_as(const void* from, std::int64_t i, DType dtype) {
    switch (dtype) {
        case DType::f32: return static_cast<const float*>(from)[i];
        case DType::f16: return to_float<DType::f16>(static_cast<const Half*>(from)[i]);
        case DType::bf16: return to_float<DType::bf16>(static_cast<const BFloat16*>(from)[i]);
    }
    return 0;
}
__device__ inline void store_as(void* to, std::int64_t i, DType dtype, float x) {
    switch (dtype) {
        case DType::f32: static_cast<float*>(to)[i] = x; break;
        case DType::f16: static_cast<Half*>(to)[i] = from_float<DType::f16>(x); break;
        case DType::bf16: static_cast<BFloat16*>(to)[i] = from_float<DType::bf16>(x); break;
    }
}

template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += warp_xor(x, mask);
    return x;
}
// The maximum of numbers; NaN may get lost.
template <typename T>
__device__ inline T warp_max(T x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const T other = warp_xor(x, mask);
        x = x < other ? other : x;
    }
    return x;
}

// Combines a value of each thread of the block, whose size is a multiple of a warp; every thread gets the result.
template <typename T, typename Combine>
__device__ inline T block_reduced(T x, Combine combine) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    T* const parts = block_scratch<T>();
    barrier();  // the last reduction's parts have been read
    if (lane() == 0) parts[threadIdx.x / kWarp] = x;
    barrier();
    T total = parts[0];
    for (int warp = 1; warp < warps; ++warp) total = combine(total, parts[warp]);
    return total;
}
__device__ inline float block_sum(float x) {
    return block_reduced(warp_sum(x), [](float a, float b) { return a + b; });
}
__device__ inline float block_max(float x) {
    return block_reduced(warp_max(x), [](float a, float b) { return a < b ? b : a; });
}

}  // namespace feddistill
