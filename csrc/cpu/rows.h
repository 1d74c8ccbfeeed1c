// Rows of any dtype, swept a vector at a time, and the normaliser of their softmax; for files named *_isa.cpp.
#pragma once
#include <algorithm>
#include <cmath>

#include "vector.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

constexpr std::int64_t kBlock = 1024;  // columns whose sums stay in float
constexpr double kLn2 = 0.6931471805599453;

// Calls each(column, lanes, z) over columns [begin, end); at most once lanes < kLanes, the others then -inf.
template <DType kDType, class Each>
FEDDISTILL_INLINE void over(const Element<kDType>* z, std::int64_t begin, std::int64_t end, const Each& each) {
    std::int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) each(j, kLanes, load<kDType>(z + j));
    if (j < end) {
        const int lanes = static_cast<int>(end - j);
        each(j, lanes, load_part<kDType>(z + j, lanes, -kInf));
    }
}

template <DType kDType>
FEDDISTILL_INLINE Floats get(const Element<kDType>* from, int lanes) {
    return lanes == kLanes ? load<kDType>(from) : load_part<kDType>(from, lanes, -kInf);
}

template <DType kDType>
FEDDISTILL_INLINE void put(Element<kDType>* to, Floats v, int lanes) {
    lanes == kLanes ? store<kDType>(to, v) : store_part<kDType>(to, v, lanes);
}

FEDDISTILL_INLINE Floats keep_lanes(Floats v, int lanes, float others) {
    for (int i = lanes; i < kLanes; ++i) v[i] = others;
    return v;
}

// g = each(place, lanes, s, t) over columns [begin, end), lanes as for `over`.  Neighbours may come in any order; a
// place is where a vector may be kept, for a later sweep over the same columns to find.  g may be s, or nothing; t too.
template <DType kDType, bool kNumbers, class Each>
FEDDISTILL_INLINE void map(const Element<kDType>* s, const Element<kDType>* t, Element<kDType>* g, std::int64_t begin,
                           std::int64_t end, const Each& each) {
    std::int64_t j = begin;
    for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
        const Two x = load_two<kDType>(s + j), y = t ? load_two<kDType>(t + j) : x;
        const Floats first = each(j, kLanes, x.first, y.first);
        const Floats second = each(j + kLanes, kLanes, x.second, y.second);
        if (g) store_two<kDType, kNumbers>(g + j, {first, second});
    }
    over<kDType>(s, j, end, [&](std::int64_t place, int lanes, Floats x) __attribute__((always_inline)) {
        const Floats slope = each(place, lanes, x, t ? get<kDType>(t + place, lanes) : x);
        if (g) put<kDType>(g + place, slope, lanes);
    });
}

// each(lanes, s, t), and nothing written.
template <DType kDType, class Each>
FEDDISTILL_INLINE void sweep(const Element<kDType>* s, const Element<kDType>* t, std::int64_t n, const Each& each) {
    map<kDType, true>(s, t, static_cast<Element<kDType>*>(nullptr), 0, n,
                      [&](std::int64_t, int lanes, Floats x, Floats y) __attribute__((always_inline)) {
                          each(lanes, x, y);
                          return x;
                      });
}

template <DType kDType, class Each>
FEDDISTILL_INLINE void sweep(const Element<kDType>* s, std::int64_t n, const Each& each) {
    sweep<kDType>(s, static_cast<const Element<kDType>*>(nullptr), n, each);
}

template <DType kDType>
float element(const Element<kDType>* row, std::int64_t j) {
    if constexpr (kDType == DType::f32) return row[j];
    return kDType == DType::f16 ? from_f16(static_cast<std::uint16_t>(row[j]))
                                : from_bf16(static_cast<std::uint16_t>(row[j]));
}

template <DType kDType>
void put_element(Element<kDType>* row, std::int64_t j, float x) {
    store_part<kDType>(row + j, all(x), 1);
}

template <class Run>
FEDDISTILL_INLINE auto with_dtype(DType dtype, const Run& run) {
    switch (dtype) {
        case DType::f16: return run.template operator()<DType::f16>();
        case DType::bf16: return run.template operator()<DType::bf16>();
        default: return run.template operator()<DType::f32>();
    }
}

template <DType kDType>
void fill(Element<kDType>* row, std::int64_t begin, std::int64_t end, float x) {
    Element<kDType> lanes[kLanes];
    store<kDType>(lanes, all(x));
    std::fill(row + begin, row + end, lanes[0]);
}

template <DType kDType>
Element<kDType>* row_of(const Matrix& m, std::int64_t row) {
    return m.at ? static_cast<Element<kDType>*>(m.at) + row * m.stride : nullptr;
}

void widen(const Matrix& m, std::int64_t row, std::int64_t n, float* to) {
    with_dtype(m.dtype, [&]<DType kDType>() {
        over<kDType>(row_of<kDType>(m, row), 0, n,
                     [&](std::int64_t j, int lanes, Floats v) { put<DType::f32>(to + j, v, lanes); });
    });
}

// 2^(z factor - offset) adds to sum; log2 of the normaliser is offset + log2(sum).
struct Normaliser {
    float factor, offset = -kInf;
    double sum = 0;

    static Normaliser of(float factor, double log2) {
        const auto offset = static_cast<float>(log2);
        return {factor, offset, std::exp2(log2 - offset)};
    }
    bool empty() const { return sum == 0; }  // every z is -inf
    double log2_sum() const { return std::log2(sum); }
    double log2() const { return empty() ? -kInf : offset + log2_sum(); }
    float scale() const { return static_cast<float>(1 / sum); }
    // -log of the probability of z
    double cost(float z) const {
        const double nats = (log2_sum() - (double{z} * factor - offset)) * kLn2;
        return nats < 0 ? 0 : nats;  // by rounding, of a probability of 1
    }
    FEDDISTILL_INLINE Floats exponent(Floats z) const { return fma(z, factor, all(-offset)); }
    FEDDISTILL_INLINE Floats term(Floats z) const { return exp2(exponent(z)); }
    // Make `largest` the value whose term is 1.
    void raise(float largest) {
        const float to = largest * factor;
        if (sum != 0) sum *= std::exp2(double{offset} - to);
        offset = to;
    }
};

// NaN does not count.
template <DType kDType>
float largest_of(const Element<kDType>* z, std::int64_t n) {
    Floats largest = all(-kInf);
    over<kDType>(z, 0, n,
                 [&](std::int64_t, int, Floats v) __attribute__((always_inline)) { largest = larger(largest, v); });
    return maximum(largest);
}

template <DType kDType, class Is>
bool holds(const Element<kDType>* z, std::int64_t n, const Is& is) {
    Ints found{};
    over<kDType>(z, 0, n, [&](std::int64_t, int lanes, Floats v) { found |= is(keep_lanes(v, lanes, 0)); });
    return any(found);
}

// A block's sum where a term of 1 is the largest that was looked for: past it exponents lose digits.
constexpr float kTooMuch = 0x1p26f;

// The sum against the largest value of the first block, or of a later one that outgrows it by far: one read.
// kFinite: the sum is NaN if any z is infinite.  block(j, n) points to columns [j, j + n).
// kMaxima: each block's largest values, one a lane, are left at maxima, which moves on.
template <DType kDType, bool kFinite, bool kMaxima = false, class Block>
FEDDISTILL_INLINE Normaliser normalise(std::int64_t n, float factor, const Block& block, float** maxima = nullptr) {
    Normaliser by{factor};
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        const std::int64_t columns = std::min(kBlock, n - begin);
        const Element<kDType>* const z = block(begin, columns);
        Floats largest;
        const auto part = [&] {
            const Normaliser fixed = by;
            Floats even{}, odd{}, seen = all(-kInf);  // two sums: one addition need not wait for another
            const auto term = [&](Floats v) __attribute__((always_inline)) {
                if constexpr (kMaxima) seen = larger(seen, v);
                const Floats y = fixed.exponent(v);
                return kFinite ? fma(y, 0.0f, exp2(y)) : exp2(y);
            };
            std::int64_t j = 0;
            for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
                const Two v = load_two<kDType>(z + j);
                even += term(v.first);
                odd += term(v.second);
            }
            over<kDType>(z, j, columns, [&](std::int64_t, int lanes, Floats v) __attribute__((always_inline)) {
                even += keep_lanes(term(v), lanes, 0);
            });
            largest = seen;
            return sum(even + odd);
        };
        if (by.offset == -kInf) {
            by.raise(largest_of<kDType>(z, columns));
            if (by.offset == -kInf) {
                if (kFinite || holds<kDType>(z, columns, [](Floats v) { return v != v; })) by.sum = kNaN;
                continue;
            }
        }
        float added = part();
        if (!(added < kTooMuch)) {
            by.raise(std::max(largest_of<kDType>(z, columns), by.offset / factor));
            added = part();
        }
        by.sum += added;
        if constexpr (kMaxima) {
            store<DType::f32>(*maxima, largest);
            *maxima += kLanes;
        }
        if (std::isnan(by.sum)) break;
    }
    return by;
}

template <DType kDType, bool kFinite>
Normaliser normalise_row(const Element<kDType>* z, std::int64_t n, float factor) {
    return normalise<kDType, kFinite>(n, factor, [z](std::int64_t j, std::int64_t) { return z + j; });
}

// The normaliser of all columns but the ascending ids, summed term by term: 1 - theirs has no digits if it is small.
template <DType kDType>
Normaliser normalise_others(const Element<kDType>* z, std::int64_t n, float factor, const std::int32_t* ids,
                            std::int64_t count, float* block) {
    const std::int32_t *next = ids, *const last = ids + count;
    return normalise<DType::f32, false>(n, factor, [&](std::int64_t begin, std::int64_t columns) {
        over<kDType>(z + begin, 0, columns, [&](std::int64_t j, int lanes, Floats v) __attribute__((always_inline)) {
            put<DType::f32>(block + j, v, lanes);
        });
        for (; next < last && *next < begin + columns; ++next) block[*next - begin] = -kInf;
        return block;
    });
}

// log2(2^a + 2^b)
inline double log2_add(double a, double b) {
    const double most = std::max(a, b);
    return most == -kInf ? most : most + std::log2(std::exp2(a - most) + std::exp2(b - most));
}

}  // namespace
}  // namespace feddistill::FEDDISTILL_ISA
