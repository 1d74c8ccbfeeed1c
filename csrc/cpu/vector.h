// Vectors of floats for files named *_isa.cpp: a loop that keeps sums, selects and polynomials in registers is left
// scalar by the vectoriser more often than not, so say it.  Everything is local to the file that includes this: an
// inline function that the linker shares would carry one file's instructions into another's.
#pragma once
#include <bit>
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../dtype.h"
#include "half.h"

#define FEDDISTILL_INLINE [[gnu::always_inline]] inline

namespace feddistill::FEDDISTILL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));  // a comparison's lanes are -1 or 0
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

template <DType>
struct Stored;
template <>
struct Stored<DType::f32> { using Type = float; };
template <>
struct Stored<DType::f16> { using Type = std::uint16_t; };
template <>
struct Stored<DType::bf16> { using Type = std::uint16_t; };
template <DType kDType>
using Element = typename Stored<kDType>::Type;

template <class To, class From>
FEDDISTILL_INLINE To as(From x) {
    return std::bit_cast<To>(x);
}

FEDDISTILL_INLINE Floats all(float x) { return Floats{} + x; }

// Together a permutation of (a, b), signed zeros included, in one instruction each.  Where either is NaN, smaller
// gives b and larger a.
FEDDISTILL_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}
FEDDISTILL_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(__AVX__)
    return (Floats)_mm256_max_ps((__m256)b, (__m256)a);
#else
    return a < b ? b : a;
#endif
}
FEDDISTILL_INLINE Floats magnitude(Floats x) { return as<Floats>(as<Ints>(x) & 0x7fffffff); }

FEDDISTILL_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
FEDDISTILL_INLINE Floats fma(Floats a, Floats b, float c) { return fma(a, b, all(c)); }
FEDDISTILL_INLINE Floats fma(Floats a, float b, Floats c) { return fma(a, all(b), c); }

// c0 + c1 x + c2 x^2 + ...
FEDDISTILL_INLINE Floats polynomial(Floats x, float c0, float c1) { return fma(x, c1, all(c0)); }
template <class... Rest>
FEDDISTILL_INLINE Floats polynomial(Floats x, float c0, float c1, Rest... rest) {
    return fma(x, polynomial(x, c1, rest...), c0);
}

// 2^y for y < 127; 0 below 2^-126 (v4: below 2^-149) and at -inf; NaN stays.
FEDDISTILL_INLINE Floats exp2(Floats y) {
    constexpr auto mantissa = [](Floats f) __attribute__((always_inline)) {  // on [-1/2, 1/2], 9e-8 relative
        return polynomial(f, 1.0f, 0.6931469775989926f, 0.24022242085262402f, 0.055507337434971826f,
                          0.00967151264482017f, 0.0013264727123524916f);
    };
#if defined(__AVX512F__)
    const Floats n = (Floats)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (Floats)_mm512_scalef_ps((__m512)mantissa(y - n), (__m512)n);  // NaN times 2^-inf is 0 to it
#else
    const Ints possible = ~(y < -126.0f);
    const Floats least = larger(y, all(-126.0f));
    constexpr float kRound = 0x1.8p23f;  // what is added to it is rounded to an integer, in its lowest bits
    const Floats shifted = least + kRound;
    const Floats n = shifted - kRound;
    const Floats m = mantissa(least - n);
    return as<Floats>((as<Ints>(m) + (as<Ints>(shifted) << 23)) & possible);
#endif
}

constexpr float kLog2e = 1.4426950408889634f;

FEDDISTILL_INLINE Floats exp(Floats x) { return exp2(x * kLog2e); }

// (e^x - 1) / x for -1/2 <= x <= 0, 1e-9 relative.
FEDDISTILL_INLINE Floats expm1_over(Floats x) {
    return polynomial(x, 0.9999999986263927f, 0.4999998074605449f, 0.16666224081888345f, 0.04162908909480141f,
                      0.00818738589683897f, 0.001121634840145323f);
}

// e^x - 1 for x <= 0.
FEDDISTILL_INLINE Floats expm1_negative(Floats x) {
    const Floats near = x * expm1_over(x);
    const Floats far = exp(x) - 1.0f;
    return x < -0.5f ? far : near;
}

// log(1 + x) for -1 < x <= 0.
FEDDISTILL_INLINE Floats log1p_negative(Floats x) {
    const Floats u = x + 1.0f;
    // u = 2^e m with m in [sqrt(1/2), sqrt(2)); where u is there already, x itself has more digits than u - 1.
    const Ints e = (as<Ints>(u) - 0x3f3504f3) >> 23;
    const Floats m = as<Floats>(as<Ints>(u) - (e << 23));
    const Floats y = e == 0 ? x : m - 1.0f;
    const Floats ratio =
        polynomial(y, 0.9999999999590771f, -0.499999882897008f, 0.3333332599280242f, -0.2500158655787477f,
                   0.2000196853850237f, -0.16609012751364055f, 0.14181834502454474f, -0.13243461339197307f,
                   0.12904663705800587f, -0.07621119773998632f);
    return fma(__builtin_convertvector(e, Floats), 0.6931471805599453f, y * ratio);
}

template <DType kDType>
FEDDISTILL_INLINE Floats load(const Element<kDType>* from) {
    if constexpr (kDType == DType::f32) {
        Floats v;
        __builtin_memcpy(&v, from, sizeof v);
        return v;
    } else {
        Halves h;
        __builtin_memcpy(&h, from, sizeof h);
        if constexpr (kDType == DType::bf16) {
#if defined(__AVX512F__)
            return as<Floats>((Ints)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif defined(__AVX2__)
            return as<Floats>((Ints)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
            return as<Floats>(__builtin_convertvector(h, Ints) << 16);
#endif
        }
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps((__m128i)h);
#else
        Floats v;
        for (int i = 0; i < kLanes; ++i) v[i] = from_f16(h[i]);
        return v;
#endif
    }
}

// The bits of v with those past bf16 rounded away, ties to even.  kNumbers: no lane is NaN, and none looked for.
template <bool kNumbers>
FEDDISTILL_INLINE Words rounded_to_bf16(Floats v) {
    const Words bits = as<Words>(v);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    if constexpr (kNumbers) return rounded;
    return v != v ? Words{} + 0x7fc00000u : rounded;
}

template <DType kDType>
FEDDISTILL_INLINE void store(Element<kDType>* to, Floats v) {
    if constexpr (kDType == DType::f32) {
        __builtin_memcpy(to, &v, sizeof v);
    } else {
        Halves h;
        if constexpr (kDType == DType::bf16) {
            h = __builtin_convertvector(rounded_to_bf16<false>(v) >> 16, Halves);
        } else {
#if defined(__AVX512F__)
            h = (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
            h = (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
            for (int i = 0; i < kLanes; ++i) h[i] = to_f16(v[i]);
#endif
        }
        __builtin_memcpy(to, &h, sizeof h);
    }
}

// 2 kLanes neighbours, in an order that is only theirs: what is loaded so must be stored so.  Of bf16 one register
// holds the even and one the odd elements: an instruction each, where neighbours in order take twice as many.
struct Two {
    Floats first, second;
};

template <DType kDType>
FEDDISTILL_INLINE Two load_two(const Element<kDType>* from) {
    if constexpr (kDType == DType::bf16 && std::endian::native == std::endian::little) {
        Words pairs;
        __builtin_memcpy(&pairs, from, sizeof pairs);
        return {as<Floats>(pairs << 16), as<Floats>(pairs & 0xffff0000u)};
    } else {
        return {load<kDType>(from), load<kDType>(from + kLanes)};
    }
}

template <DType kDType, bool kNumbers>
FEDDISTILL_INLINE void store_two(Element<kDType>* to, Two v) {
    if constexpr (kDType == DType::bf16 && std::endian::native == std::endian::little) {
        const Words low = rounded_to_bf16<kNumbers>(v.first) >> 16;
        const Words high = rounded_to_bf16<kNumbers>(v.second) & 0xffff0000u;
        const Words pairs = low | high;
        __builtin_memcpy(to, &pairs, sizeof pairs);
    } else {
        store<kDType>(to, v.first);
        store<kDType>(to + kLanes, v.second);
    }
}

// The first n < kLanes elements; the other lanes are `fill`.
template <DType kDType>
FEDDISTILL_INLINE Floats load_part(const Element<kDType>* from, int n, float fill) {
    Element<kDType> part[kLanes] = {};
    for (int i = 0; i < n; ++i) part[i] = from[i];
    Floats v = load<kDType>(part);
    for (int i = n; i < kLanes; ++i) v[i] = fill;
    return v;
}

template <DType kDType>
FEDDISTILL_INLINE void store_part(Element<kDType>* to, Floats v, int n) {
    Element<kDType> part[kLanes];
    store<kDType>(part, v);
    for (int i = 0; i < n; ++i) to[i] = part[i];
}

// In one order on every machine with this many lanes: a tree.
FEDDISTILL_INLINE float sum(Floats v) {
#if defined(__AVX__)
#if defined(__AVX512F__)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    const __m256 eight = (__m256)v;
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float lane[kLanes];
    __builtin_memcpy(lane, &v, sizeof v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
#endif
}

FEDDISTILL_INLINE float maximum(Floats v) {
    float best = v[0];
    for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

FEDDISTILL_INLINE bool any(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    std::int32_t seen = 0;
    for (int i = 0; i < kLanes; ++i) seen |= mask[i];
    return seen != 0;
#endif
}

// Whether any lane is above the bound; NaN is not.
FEDDISTILL_INLINE bool any_above(Floats v, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)all(bound), _CMP_GT_OQ) != 0;
#else
    return any(v > bound);
#endif
}

}  // namespace
}  // namespace feddistill::FEDDISTILL_ISA
