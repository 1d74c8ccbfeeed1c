#include "order_statistics_isa.h"

#include <utility>

#include "vector.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

static_assert(kColumns % kLanes == 0 && kWideColumns % kLanes == 0);

template <int C, bool kMedian>
struct Sorter {
    static constexpr int kFirst = kMedian ? (C - 1) / 2 : 0, kLast = kMedian ? C / 2 + 1 : C;
    static constexpr auto kSteps = network<C>(kFirst, kLast);

    template <std::size_t I>
    FEDDISTILL_INLINE static void step(Floats* v) {
        constexpr Comparator s = kSteps[I];
        const Floats a = v[s.low], b = v[s.high];
        if constexpr (s.needs_low) v[s.low] = smaller(a, b);
        if constexpr (s.needs_high) v[s.high] = larger(a, b);
    }

    template <std::size_t... I>
    FEDDISTILL_INLINE static void sort([[maybe_unused]] Floats* v, std::index_sequence<I...>) {
        (step<I>(v), ...);
    }

    // keep[i] is all ones where output i counts, else 0.
    template <std::size_t... I>
    FEDDISTILL_INLINE static void reduce(const float* const* rows, int columns, const std::int32_t* keep,
                                         float inverse, float* __restrict out, std::index_sequence<I...>) {
        for (int j = 0; j < columns; j += kLanes) {
            Floats v[C] = {load<DType::f32>(rows[I] + j)...};
            const Ints has_nan = ((v[I] != v[I]) | ...);
            sort(v, std::make_index_sequence<kSteps.size()>{});
            Floats mean;
            if constexpr (kMedian) {
                mean = C % 2 ? v[kFirst] : (v[kFirst] + v[kLast - 1]) * 0.5f;
            } else {
                mean = Floats{};
                ((mean += as<Floats>(as<Ints>(v[I]) & keep[I])), ...);
                mean *= inverse;
            }
            store<DType::f32>(out + j, has_nan ? Floats{} + kNaN : mean);
        }
    }
};

// columns is a multiple of kLanes.
template <int C, bool kMedian>
void reduce(const float* const* rows, int columns, const std::int32_t* keep, float inverse, float* out) {
    Sorter<C, kMedian>::reduce(rows, columns, keep, inverse, out, std::make_index_sequence<C>{});
}

using Reduce = void (*)(const float* const*, int, const std::int32_t*, float, float*);

template <bool kMedian, std::size_t... I>
Reduce choose(int clients, std::index_sequence<I...>) {
    static constexpr Reduce table[] = {reduce<int(I) + 1, kMedian>...};
    return table[clients - 1];
}

void widen(const void* client, DType dtype, std::int64_t begin, int n, float* __restrict to) {
    const auto* half = static_cast<const std::uint16_t*>(client) + begin;
    switch (dtype) {
        case DType::f32: {
            const auto* from = static_cast<const float*>(client) + begin;
            for (int j = 0; j < n; ++j) to[j] = from[j];
            break;
        }
        case DType::f16:
            for (int j = 0; j < n; ++j) to[j] = from_f16(half[j]);
            break;
        case DType::bf16:
            for (int j = 0; j < n; ++j) to[j] = from_bf16(half[j]);
            break;
    }
}

void narrow(const float* __restrict from, int n, DType dtype, std::int64_t begin, void* out) {
    auto* half = static_cast<std::uint16_t*>(out) + begin;
    switch (dtype) {
        case DType::f32: {
            auto* to = static_cast<float*>(out) + begin;
            for (int j = 0; j < n; ++j) to[j] = from[j];
            break;
        }
        case DType::f16:
            for (int j = 0; j < n; ++j) half[j] = to_f16(from[j]);
            break;
        case DType::bf16:
            for (int j = 0; j < n; ++j) half[j] = to_bf16(from[j]);
            break;
    }
}

void in_registers(const TrimmedMean& task, std::int64_t begin, std::int64_t end) {
    constexpr auto all = std::make_index_sequence<kMostRegisters>{};
    const Reduce reduce = task.is_median() ? choose<true>(task.count, all) : choose<false>(task.count, all);
    std::int32_t keep[kMostRegisters];
    for (int i = 0; i < task.count; ++i) keep[i] = i >= task.trim && i < task.count - task.trim ? -1 : 0;
    const float inverse = 1.0f / static_cast<float>(task.kept());
    alignas(64) float widened[kMostRegisters][kColumns], result[kColumns];
    const float* rows[kMostRegisters];
    for (std::int64_t at = begin; at < end; at += kColumns) {
        const int n = static_cast<int>(end - at < kColumns ? end - at : kColumns);
        const int padded = (n + kLanes - 1) / kLanes * kLanes;
        const bool direct = task.dtype == DType::f32 && n == padded;
        for (int i = 0; i < task.count; ++i) {
            rows[i] = direct ? static_cast<const float*>(task.clients[i]) + at : widened[i];
            if (direct) continue;
            widen(task.clients[i], task.dtype, at, n, widened[i]);
            for (int j = n; j < padded; ++j) widened[i][j] = 0;
        }
        reduce(rows, padded, keep, inverse, direct ? static_cast<float*>(task.out) + at : result);
        if (!direct) narrow(result, n, task.dtype, at, task.out);
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

void in_cache(const TrimmedMean& task, std::int64_t begin, std::int64_t end, float* scratch, const Comparator* steps,
              std::int64_t step_count) {
    const auto row = [&](int i) { return scratch + std::int64_t{i} * kWideColumns; };
    const float inverse = 1.0f / static_cast<float>(task.kept());
    for (std::int64_t at = begin; at < end; at += kWideColumns) {
        const int n = static_cast<int>(end - at < kWideColumns ? end - at : kWideColumns);
        alignas(64) float mean[kWideColumns] = {};
        std::int32_t has_nan[kWideColumns] = {};
        for (int i = 0; i < task.count; ++i) {
            widen(task.clients[i], task.dtype, at, n, row(i));
            for (int j = 0; j < n; ++j) has_nan[j] |= row(i)[j] != row(i)[j];
        }
        for (std::int64_t s = 0; s < step_count; ++s) exchange(row(steps[s].low), row(steps[s].high));
        for (int i = task.trim; i < task.count - task.trim; ++i)
            for (int j = 0; j < n; ++j) mean[j] += row(i)[j];
        for (int j = 0; j < n; ++j) mean[j] = has_nan[j] ? kNaN : mean[j] * inverse;
        narrow(mean, n, task.dtype, at, task.out);
    }
}

}  // namespace

void trimmed_columns(const TrimmedMean& task, std::int64_t begin, std::int64_t end, float* scratch,
                     const Comparator* steps, std::int64_t step_count) {
    if (task.count <= kMostRegisters)
        in_registers(task, begin, end);
    else
        in_cache(task, begin, end, scratch, steps, step_count);
}

}  // namespace feddistill::FEDDISTILL_ISA
