#include "order_statistics_isa.h"

#include <cstring>
#include <utility>

#include "vector.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

typedef std::int16_t Shorts __attribute__((vector_size(4 * kLanes)));  // as many bytes as Floats

// Half precision is sorted as 16-bit integers: twice the lanes, and the smaller and larger of two are exact in any
// encoding that keeps the order.
template <DType kDType>
using Sorted = std::conditional_t<kDType == DType::f32, Floats, Shorts>;
template <DType kDType>
constexpr int kWidth = sizeof(Sorted<kDType>) / sizeof(Element<kDType>);
static_assert(kColumns % kWidth<DType::bf16> == 0 && kWideColumns % kLanes == 0);

FEDDISTILL_INLINE Shorts smaller(Shorts a, Shorts b) { return a < b ? a : b; }
FEDDISTILL_INLINE Shorts larger(Shorts a, Shorts b) { return a < b ? b : a; }

// A float's bits are a sign and a magnitude; this makes them an integer of the same order.  Its own inverse.
FEDDISTILL_INLINE Floats ordered(Floats x) { return x; }
FEDDISTILL_INLINE Shorts ordered(Shorts bits) { return bits ^ ((bits >> 15) & 0x7fff); }

// Where any of the inputs seen is NaN.
template <DType kDType>
struct NaNs {
    static constexpr std::int16_t kInfinity = kDType == DType::f16 ? 0x7c00 : 0x7f80;
    static constexpr std::int16_t kQuiet = kDType == DType::f16 ? 0x7e00 : 0x7fc0;
    Shorts largest{};  // magnitude

    FEDDISTILL_INLINE void see(Shorts bits) { largest = larger(largest, bits & 0x7fff); }
    FEDDISTILL_INLINE Shorts mark(Shorts bits) const { return largest > kInfinity ? Shorts{} + kQuiet : bits; }
};
template <>
struct NaNs<DType::f32> {
    Ints found{};

    FEDDISTILL_INLINE void see(Floats x) { found |= x != x; }
    FEDDISTILL_INLINE Floats mark(Floats x) const { return found ? all(kNaN) : x; }
};

template <DType kDType, int C, bool kMedian>
struct Sorter {
    using Vector = Sorted<kDType>;
    static constexpr int kFirst = kMedian ? (C - 1) / 2 : 0, kLast = kMedian ? C / 2 + 1 : C;
    static constexpr auto kSteps = network<C>(kFirst, kLast);

    template <std::size_t I>
    FEDDISTILL_INLINE static void step(Vector* v) {
        constexpr Comparator s = kSteps[I];
        const Vector a = v[s.low], b = v[s.high];
        if constexpr (s.needs_low) v[s.low] = smaller(a, b);
        if constexpr (s.needs_high) v[s.high] = larger(a, b);
    }

    template <std::size_t... I>
    FEDDISTILL_INLINE static void sort([[maybe_unused]] Vector* v, std::index_sequence<I...>) {
        (step<I>(v), ...);
    }

    template <std::size_t... I>
    FEDDISTILL_INLINE static void run(const void* const* rows, int columns, int trim, void* const* kept,
                                      std::index_sequence<I...>) {
        const auto at = [](auto* row, int j) __attribute__((always_inline)) {
            return static_cast<const char*>(row) + j * sizeof(Element<kDType>);
        };
        for (int j = 0; j < columns; j += kWidth<kDType>) {
            Vector v[C];
            (std::memcpy(&v[I], at(rows[I], j), sizeof(Vector)), ...);
            NaNs<kDType> nans;
            (nans.see(v[I]), ...);
            ((v[I] = ordered(v[I])), ...);
            sort(v, std::make_index_sequence<kSteps.size()>{});
            const auto keep = [&](int i, Vector x) __attribute__((always_inline)) {
                if (i < trim || i >= C - trim) return;
                x = ordered(x);
                if (i == trim) x = nans.mark(x);
                std::memcpy(const_cast<char*>(at(kept[i - trim], j)), &x, sizeof x);
            };
            (keep(int(I), v[I]), ...);
        }
    }
};

// Sorts the clients' values at each of `columns` columns, a multiple of kWidth, and writes those that are kept.  The
// first of them is NaN where any client's value is.
template <DType kDType, int C, bool kMedian>
void sort(const void* const* rows, int columns, int trim, void* const* kept) {
    Sorter<kDType, C, kMedian>::run(rows, columns, trim, kept, std::make_index_sequence<C>{});
}

using Sort = void (*)(const void* const*, int, int, void* const*);

template <DType kDType, bool kMedian, std::size_t... I>
Sort choose(int clients, std::index_sequence<I...>) {
    static constexpr Sort table[] = {sort<kDType, int(I) + 1, kMedian>...};
    return table[clients - 1];
}

// Mean of `count` ascending rows.
template <DType kDType>
void average(const Element<kDType>* const* rows, int count, int columns, Element<kDType>* out) {
    const float inverse = 1.0f / static_cast<float>(count);
    for (int j = 0; j < columns; j += kLanes) {
        Floats total = load<kDType>(rows[0] + j);
        for (int i = 1; i < count; ++i) total += load<kDType>(rows[i] + j);
        store<kDType>(out + j, total * inverse);
    }
}

// Mean of those `keep` of `count` ascending rows that are nearest to their median.  They are neighbours; their window
// moves up while the value it loses is farther from the median than the one it gains: m - x_i > x_(i+keep) - m,
// here without a difference to round.
template <DType kDType>
void average_near(const Element<kDType>* const* rows, int count, int keep, int columns, Element<kDType>* out) {
    const float inverse = 1.0f / static_cast<float>(keep);
    for (int j = 0; j < columns; j += kLanes) {
        const auto value = [&](int i) __attribute__((always_inline)) { return load<kDType>(rows[i] + j); };
        const Floats twice_median = value((count - 1) / 2) + value(count / 2);
        Floats total{};
        for (int i = 0; i < count; ++i) {
            const Floats x = value(i);
            Ints inside = ~Ints{};
            if (i >= keep) inside = value(i - keep) + x < twice_median;
            if (i + keep < count) inside &= ~(x + value(i + keep) < twice_median);
            total += as<Floats>(as<Ints>(x) & inside);
        }
        store<kDType>(out + j, total * inverse);
    }
}

template <DType kDType>
void in_registers(const TrimmedMean& task, std::int64_t begin, std::int64_t end) {
    using T = Element<kDType>;
    constexpr auto networks = std::make_index_sequence<kMostRegisters>{};
    const Sort sort =
        task.is_median() ? choose<kDType, true>(task.count, networks) : choose<kDType, false>(task.count, networks);
    const bool averaged = task.kept() > 1 || task.nearest;
    alignas(64) T padded[kMostRegisters][kColumns], sorted[kMostRegisters][kColumns], result[kColumns];
    const void* rows[kMostRegisters];
    void* kept[kMostRegisters];
    const T* values[kMostRegisters];
    for (int i = 0; i < task.kept(); ++i) values[i] = sorted[i], kept[i] = sorted[i];
    for (std::int64_t at = begin; at < end; at += kColumns) {
        const int n = static_cast<int>(end - at < kColumns ? end - at : kColumns);
        const int columns = (n + kWidth<kDType> - 1) / kWidth<kDType> * kWidth<kDType>;
        T* const out = n == columns ? static_cast<T*>(task.out) + at : result;
        for (int i = 0; i < task.count; ++i) {
            const T* const row = static_cast<const T*>(task.clients[i]) + at;
            rows[i] = row;
            if (n == columns) continue;
            std::memcpy(padded[i], row, n * sizeof(T));
            std::memset(padded[i] + n, 0, (columns - n) * sizeof(T));
            rows[i] = padded[i];
        }
        if (!averaged) kept[0] = out;
        sort(rows, columns, task.trim, kept);
        if (task.nearest)
            average_near<kDType>(values, task.count, task.nearest, columns, out);
        else if (averaged)
            average<kDType>(values, task.kept(), columns, out);
        if (n != columns) std::memcpy(static_cast<T*>(task.out) + at, result, n * sizeof(T));
    }
}

// One comparator on kWideColumns columns, whose values lie in cache.
FEDDISTILL_INLINE void exchange(float* low, float* high) {
    for (int j = 0; j < kWideColumns; j += kLanes) {
        const Floats a = load<DType::f32>(low + j), b = load<DType::f32>(high + j);
        store<DType::f32>(low + j, smaller(a, b));
        store<DType::f32>(high + j, larger(a, b));
    }
}

template <DType kDType>
void in_cache(const TrimmedMean& task, std::int64_t begin, std::int64_t end, const WideScratch& scratch) {
    using T = Element<kDType>;
    const auto row = [&](int i) { return scratch.values + std::int64_t{i} * kWideColumns; };
    for (int i = 0; i < task.kept(); ++i) scratch.kept[i] = row(task.trim + i);
    for (std::int64_t at = begin; at < end; at += kWideColumns) {
        const int n = static_cast<int>(end - at < kWideColumns ? end - at : kWideColumns);
        alignas(64) float mean[kWideColumns];
        Ints has_nan[kWideColumns / kLanes] = {};
        for (int i = 0; i < task.count; ++i) {
            const T* const from = static_cast<const T*>(task.clients[i]) + at;
            for (int j = 0; j < kWideColumns; j += kLanes) {
                const Floats x = j + kLanes <= n ? load<kDType>(from + j)
                                 : j < n         ? load_part<kDType>(from + j, n - j, 0.0f)
                                                 : Floats{};
                has_nan[j / kLanes] |= x != x;
                store<DType::f32>(row(i) + j, x);
            }
        }
        for (std::int64_t s = 0; s < scratch.step_count; ++s)
            exchange(row(scratch.steps[s].low), row(scratch.steps[s].high));
        if (task.nearest)
            average_near<DType::f32>(scratch.kept, task.count, task.nearest, kWideColumns, mean);
        else
            average<DType::f32>(scratch.kept, task.kept(), kWideColumns, mean);
        T* const out = static_cast<T*>(task.out) + at;
        for (int j = 0; j < n; j += kLanes) {
            const Floats x = has_nan[j / kLanes] ? all(kNaN) : load<DType::f32>(mean + j);
            store_part<kDType>(out + j, x, n - j < kLanes ? n - j : kLanes);
        }
    }
}

template <DType kDType>
void run(const TrimmedMean& task, std::int64_t begin, std::int64_t end, const WideScratch& scratch) {
    if (task.count <= kMostRegisters)
        in_registers<kDType>(task, begin, end);
    else
        in_cache<kDType>(task, begin, end, scratch);
}

}  // namespace

void trimmed_columns(const TrimmedMean& task, std::int64_t begin, std::int64_t end, const WideScratch& scratch) {
    switch (task.dtype) {
        case DType::f32: return run<DType::f32>(task, begin, end, scratch);
        case DType::f16: return run<DType::f16>(task, begin, end, scratch);
        case DType::bf16: return run<DType::bf16>(task, begin, end, scratch);
    }
}

}  // namespace feddistill::FEDDISTILL_ISA
