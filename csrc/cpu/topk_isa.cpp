#include "topk_isa.h"

#include "rows.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

// Floats in the order of their bits as integers, but for signed zeros, which are compared as floats.
std::int32_t key_of(float x) {
    const auto bits = as<std::int32_t>(x);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}
float float_of(std::int32_t key) { return as<float>(key < 0 ? key ^ 0x7fffffff : key); }

// How many of n values are at least `least`.
std::int64_t count_from(const float* values, std::int64_t n, float least) {
    std::int64_t count = 0;
    over<DType::f32>(values, 0, n, [&](std::int64_t, int lanes, Floats v) __attribute__((always_inline)) {
        const Ints from = lanes == kLanes ? v >= least : keep_lanes(v, lanes, kNaN) >= least;
#if defined(__AVX512F__)
        count += __builtin_popcount(_mm512_movepi32_mask((__m512i)from));
#elif defined(__AVX2__)
        count += __builtin_popcount(_mm256_movemask_ps((__m256)from));
#else
        for (int i = 0; i < kLanes; ++i) count -= from[i];
#endif
    });
    return count;
}

// The k-th largest of n values, or one below it with at most `most` values from it on.
float kth_largest(const float* values, std::int64_t n, std::int64_t k, std::int64_t most) {
    Floats low_lanes = all(values[0]), high_lanes = low_lanes;
    over<DType::f32>(values, 0, n, [&](std::int64_t, int lanes, Floats v) {
        low_lanes = smaller(low_lanes, keep_lanes(v, lanes, values[0]));
        high_lanes = larger(high_lanes, v);
    });
    const float lowest = -maximum(-low_lanes), highest = maximum(high_lanes);
    std::int64_t low = key_of(lowest), high = key_of(highest);  // the key is in [low, high]
    while (low < high) {
        const std::int64_t middle = low + (high - low + 1) / 2;
        const std::int64_t count = count_from(values, n, float_of(static_cast<std::int32_t>(middle)));
        if (count >= k) {
            low = middle;
            if (count <= most) break;
        } else {
            high = middle - 1;
        }
    }
    return float_of(static_cast<std::int32_t>(low));
}

// The place of each of n values in falling order, equal ones as they come: each is held against all others, which for
// few takes less than a sort's wrong guesses.
constexpr std::int64_t kFew = 512;
void rank(const float* values, std::int64_t n, std::int32_t* places) {
    over<DType::f32>(values, 0, n, [&](std::int64_t begin, int lanes, Floats v) __attribute__((always_inline)) {
        Ints before{}, lane;  // before: counted down
        for (int i = 0; i < kLanes; ++i) lane[i] = i;
        for (std::int64_t j = 0; j < begin; ++j) before += all(values[j]) >= v;
        for (int j = 0; j < lanes; ++j) before += (all(v[j]) > v) | ((all(v[j]) == v) & (lane > j));
        for (std::int64_t j = begin + lanes; j < n; ++j) before += all(values[j]) > v;
        for (int i = 0; i < lanes; ++i) places[begin + i] = -before[i];
    });
}

// Candidates in the order of their ids, of which the k best are sure to be among those of a row so far.
struct Candidates {
    std::int64_t count = 0, room, k;
    float* values;
    std::int32_t* ids;

    // Keep the k largest, of equal ones the first, in their order; returns the least of them.
    float prune() {
        const float least = kth_largest(values, count, k, k);
        std::int64_t ties = k;  // that have a place
        for (std::int64_t i = 0; i < count; ++i) ties -= values[i] > least;
        std::int64_t to = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            const bool stays = values[i] > least || (values[i] == least && ties-- > 0);
            values[to] = values[i], ids[to] = ids[i];
            to += stays;
        }
        count = to;
        return least;
    }

    // The same of a few, and their places in falling order.
    void keep(std::int32_t* places) {
        rank(values, count, places);
        std::int64_t to = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int32_t place = places[i];
            values[to] = values[i], ids[to] = ids[i], places[to] = place;
            to += place < k;
        }
        count = to;
    }
};

// Appends the lanes of v that the mask names.
FEDDISTILL_INLINE void append(Candidates& c, Floats v, Ints mask, std::int64_t j) {
#if defined(__AVX512F__)
    const __mmask16 chosen = _mm512_movepi32_mask((__m512i)mask);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_ps(c.values + c.count, _mm512_maskz_compress_ps(chosen, (__m512)v));
    _mm512_storeu_si512(c.ids + c.count, _mm512_maskz_compress_epi32(
                                             chosen, _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(j)))));
    c.count += __builtin_popcount(chosen);
#else
    for (int i = 0; i < kLanes; ++i) {
        c.values[c.count] = v[i];
        c.ids[c.count] = static_cast<std::int32_t>(j + i);
        c.count += mask[i] != 0;
    }
#endif
}

constexpr std::int64_t kGroup = 2 * kLanes, kSpan = 2048;  // columns

// Lists the groups that hold a value above.  They are few, and which they are is not to be foretold: no branch.
template <DType kDType>
[[gnu::noinline]] std::int64_t groups_above(const Element<kDType>* z, std::int64_t groups, float above,
                                            std::int32_t* found) {
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < groups * kGroup; j += kGroup) {
        const Two pair = load_two<kDType>(z + j);
        found[count] = static_cast<std::int32_t>(j);
        count += any_above(larger(pair.first, pair.second), above);
    }
    return count;
}

// The candidates for the k largest of a row: what is above, where k columns are.
template <DType kDType>
void collect(const Element<kDType>* z, std::int64_t n, float above, Candidates& c) {
    const auto look = [&](std::int64_t j, int lanes, Floats v) __attribute__((always_inline)) {
        const Floats in_row = keep_lanes(v, lanes, -kInf);
        if (c.count + kLanes > c.room) above = c.prune();
        append(c, in_row, in_row > above, j);
    };
    std::int32_t found[kSpan / kGroup];
    std::int64_t j = 0;
    while (j + kGroup <= n) {
        const std::int64_t groups = std::min(n - j, kSpan) / kGroup;
        const std::int64_t count = groups_above<kDType>(z + j, groups, above, found);
        for (std::int64_t i = 0; i < count; ++i)
            for (std::int64_t at = j + found[i]; at < j + found[i] + kGroup; at += kLanes)
                look(at, kLanes, load<kDType>(z + at));
        j += groups * kGroup;
    }
    over<kDType>(z, j, n, look);
}

constexpr std::int64_t kShort = 4096;  // columns: as many candidates have room in any case

// The k-th largest of a short row, whose groups are too few to tell, or one below it that a few more columns reach.
template <DType kDType>
float kth_of_short(const Element<kDType>* z, std::int64_t n, std::int64_t k, float* room) {
    const std::int64_t most = k + k / 2;
    if constexpr (kDType == DType::f32) return kth_largest(z, n, k, most);
    over<kDType>(z, 0, n, [&](std::int64_t j, int lanes, Floats v) __attribute__((always_inline)) {
        put<DType::f32>(room + j, v, lanes);
    });
    return kth_largest(room, n, k, most);
}

template <DType kDType>
bool compress(const TopK& task, std::int64_t row, const TopKScratch& scratch) {
    const std::int64_t n = task.vocab, k = task.k;
    const auto* const z = static_cast<const Element<kDType>*>(task.logits.at) + row * task.logits.stride;
    std::int32_t* const ids = task.ids + row * k;
    float* const log_probs = task.log_probs + row * k;
    const auto factor = static_cast<float>(1 / (task.temperature * kLn2));

    float* maxima_end = scratch.group_maxima;
    const auto block = [z](std::int64_t j, std::int64_t) { return z + j; };
    const Normaliser whole = normalise<kDType, false, true>(n, factor, block, &maxima_end);
    const std::int64_t groups = maxima_end - scratch.group_maxima;
    if (whole.empty()) return false;
    if (std::isnan(whole.sum)) {
        for (std::int64_t i = 0; i < k; ++i) ids[i] = static_cast<std::int32_t>(i), log_probs[i] = kNaN;
        task.log_tail[row] = kNaN;
        return true;
    }

    Candidates c{0, scratch.room, k, scratch.values, scratch.ids};
    // k groups have their largest from here on, so k columns have.
    const float least = groups >= 2 * k            ? kth_largest(scratch.group_maxima, groups, k, k + k / 8)
                        : n <= kShort && 2 * k <= n ? kth_of_short<kDType>(z, n, k, scratch.values)
                                                    : -kInf;
    collect<kDType>(z, n, least == -kInf ? least : float_of(key_of(least == 0 ? -0.0f : least) - 1), c);
    std::int32_t places[kFew];
    bool ranked = false;
    if (c.count > kFew) c.prune();
    if (c.count > k) ranked = true, c.keep(places);
    if (c.count < k) {  // the rest are ruled out, and the lowest ids of those are as good as others
        std::int64_t at = 0, fill = k - c.count;
        for (std::int64_t j = 0, next = 0; at < k; ++j) {
            const bool is_candidate = next < c.count && c.ids[next] == j;
            if (!is_candidate && fill-- <= 0) continue;
            ids[at] = static_cast<std::int32_t>(j);
            log_probs[at++] = is_candidate ? c.values[next++] : -kInf;
        }
    } else {
        std::copy_n(c.ids, k, ids);
        std::copy_n(c.values, k, log_probs);
    }

    double kept = 0;
    over<DType::f32>(log_probs, 0, k, [&](std::int64_t, int lanes, Floats v) {
        kept += sum(keep_lanes(whole.term(v), lanes, 0));
    });
    constexpr double kDigitsLeft = 1.0 / 16;  // of the whole
    const double rest = whole.sum - kept;
    double log2_tail = whole.offset + std::log2(rest);
    if (!(rest > kDigitsLeft * whole.sum))
        log2_tail = normalise_others<kDType>(z, n, factor, ids, k, scratch.group_maxima).log2();
    const double log2_whole = whole.log2();
    task.log_tail[row] = static_cast<float>((log2_tail - log2_whole) * kLn2);
    if (!task.id_order) {
        std::copy_n(log_probs, k, scratch.values);
        std::copy_n(ids, k, scratch.ids);
        if (k <= kFew) {
            if (!ranked) rank(scratch.values, k, places);
            for (std::int64_t i = 0; i < k; ++i) {
                log_probs[places[i]] = scratch.values[i];
                ids[places[i]] = scratch.ids[i];
            }
        } else {
            std::int32_t* const order = scratch.ids + k;
            for (std::int64_t i = 0; i < k; ++i) order[i] = static_cast<std::int32_t>(i);
            std::sort(order, order + k, [&](std::int32_t x, std::int32_t y) {
                return scratch.values[x] > scratch.values[y] || (scratch.values[x] == scratch.values[y] && x < y);
            });
            for (std::int64_t i = 0; i < k; ++i) {
                log_probs[i] = scratch.values[order[i]];
                ids[i] = scratch.ids[order[i]];
            }
        }
    }
    for (std::int64_t i = 0; i < k; ++i)
        log_probs[i] = static_cast<float>((double{log_probs[i]} * factor - log2_whole) * kLn2);
    return true;
}

}  // namespace

bool topk_row(const TopK& task, std::int64_t row, const TopKScratch& scratch) {
    return with_dtype(task.logits.dtype, [&]<DType kDType>() { return compress<kDType>(task, row, scratch); });
}

}  // namespace feddistill::FEDDISTILL_ISA
