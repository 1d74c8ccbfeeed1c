#include "aggregation_isa.h"

#include "order_statistics_isa.h"
#include "vector.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;

static_assert(kBlock % kLanes == 0 && kBlock % kWideColumns == 0);

FEDDISTILL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FEDDISTILL_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
FEDDISTILL_INLINE Floats at(const float* row, int64_t j) { return load<DType::f32>(row + j); }
FEDDISTILL_INLINE void put(float* row, int64_t j, Floats v) { store<DType::f32>(row + j, v); }
FEDDISTILL_INLINE float log_of(double x) { return static_cast<float>(__builtin_log(x)); }

template <DType kDType>
FEDDISTILL_INLINE void widen(const void* row, int64_t n, float* to) {
    const auto* from = static_cast<const Element<kDType>*>(row);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) put(to, j, load<kDType>(from + j));
    if (j < n) put(to, j, load_part<kDType>(from + j, static_cast<int>(n - j), 0));
}

// n elements from row `row`, converted; writes up to kLanes - 1 more.
void widen(const CompressedClient& client, int64_t row, float* to) {
    const int64_t begin = row * client.log_probs_stride;
    switch (client.dtype) {
        case DType::f32: return widen<DType::f32>(static_cast<const float*>(client.log_probs) + begin, client.kept, to);
        case DType::f16:
            return widen<DType::f16>(static_cast<const std::uint16_t*>(client.log_probs) + begin, client.kept, to);
        case DType::bf16:
            return widen<DType::bf16>(static_cast<const std::uint16_t*>(client.log_probs) + begin, client.kept, to);
    }
}

// Stable, by the lowest `bits` bits of the upper half; a radix sort mispredicts nothing.  `other` is scratch; returns
// whichever of the two holds the result.
uint64_t* sort(uint64_t* items, uint64_t* other, int64_t n, int bits) {
    constexpr int kMostBits = 11;
    uint32_t starts[1 << kMostBits];
    const int passes = (bits + kMostBits - 1) / kMostBits, digit = (bits + passes - 1) / passes;
    const uint64_t mask = (uint64_t{1} << digit) - 1;
    for (int shift = 32; shift < 32 + passes * digit; shift += digit) {
        for (uint64_t d = 0; d <= mask; ++d) starts[d] = 0;
        for (int64_t i = 0; i < n; ++i) ++starts[(items[i] >> shift) & mask];
        uint32_t before = 0;
        for (uint64_t d = 0; d <= mask; ++d) {
            const uint32_t here = starts[d];
            starts[d] = before;
            before += here;
        }
        for (int64_t i = 0; i < n; ++i) other[starts[(items[i] >> shift) & mask]++] = items[i];
        uint64_t* const sorted = other;
        other = items;
        items = sorted;
    }
    return items;
}

template <int kVectors>
FEDDISTILL_INLINE int64_t mean_of(const float* x, int64_t j, int64_t n, int count, const float* shares, float* y) {
    for (; j + (kVectors - 1) * kLanes < n; j += kVectors * kLanes) {
        Floats sums[kVectors]{};
        for (int c = 0; c < count; ++c) {
            if (shares[c] == 0) continue;  // no veto: 0 * -inf is NaN
            for (int i = 0; i < kVectors; ++i) sums[i] = fma(at(x + c * kApart, j + i * kLanes), shares[c], sums[i]);
        }
        for (int i = 0; i < kVectors; ++i) put(y, j + i * kLanes, sums[i]);
    }
    return j;
}

void mean(const float* x, int64_t n, int count, const float* shares, float* y) {
    const int64_t j = mean_of<8>(x, 0, n, count, shares, y);
    mean_of<1>(x, j, n, count, shares, y);
}

// One row of all clients.
struct Row {
    const Answers& answers;
    const RowPlan& plan;
    const RowScratch& s;
    int64_t number;
    int64_t kept = 0;                   // U: distinct ids, s.union_ids
    const uint64_t* entries = nullptr;  // slot << 32 | entry, by slot
    int64_t found = 0;                  // of them: those with an id
    bool has_wrong_ids = false;         // one outside the vocabulary, or a client's twice

    int count() const { return answers.count; }
    int64_t others() const { return answers.vocab - kept; }  // ids that nobody kept

    void gather() {
        int64_t entry = 0;
        uint32_t last = 0;  // id + 1, 0 for none
        for (int c = 0; c < count(); ++c) {
            const CompressedClient& client = answers.clients[c];
            const int32_t* ids = client.ids + number * client.ids_stride;
            for (int64_t j = 0; j < client.kept; ++j) {
                const auto id = static_cast<uint32_t>(ids[j]);
                s.items[found] = uint64_t{id} << 32 | static_cast<uint64_t>(entry + j);
                found += ids[j] != kNoId;
                last = last > id + 1 ? last : id + 1;
            }
            widen(client, number, s.values + entry);
            entry += client.kept;
            s.missing[c] = client.missing[number];
        }
        const int bits = answers.vocab > 1 ? 64 - __builtin_clzll(static_cast<uint64_t>(answers.vocab - 1)) : 1;
        uint64_t* const sorted = sort(s.items, s.sorted, found, bits);
        int64_t slot = -1;
        uint64_t before = ~uint64_t{0};
        int32_t client = -1;
        has_wrong_ids = last > answers.vocab;
        for (int64_t i = 0; i < found; ++i) {
            const uint64_t id = sorted[i] >> 32;
            const int32_t home = plan.home[sorted[i] & 0xffffffffu];
            has_wrong_ids |= (id == before) & (home == client);  // a stable sort: a client's are neighbours
            client = home;
            slot += id != before;
            before = id;
            s.union_ids[slot] = static_cast<int32_t>(id);
            sorted[i] = static_cast<uint64_t>(slot) << 32 | (sorted[i] & 0xffffffffu);
        }
        entries = sorted;
        kept = least(slot + 1, answers.vocab);  // more only if ids are out of range
        if (!answers.mixing) return;
        for (int c = 0; c < count(); ++c) {
            s.missing[c] = 0;
            for (int i = 0; i < count(); ++i) {
                const float share = answers.mixing[c * count() + i];
                if (share != 0) s.missing[c] += share * answers.clients[i].missing[number];
            }
        }
    }

    // Calls visit(x, first, n): columns [first, first + n) of the union, client c's values in x + c kApart, padded to
    // full vectors with anything.  The last column of all, U, is an id that nobody kept.
    template <class Visit>
    FEDDISTILL_INLINE void blocks(Visit visit) const {
        int64_t next = 0;
        for (int64_t first = 0; first <= kept; first += kBlock) {
            const int64_t n = least(kBlock, kept + 1 - first);
            for (int c = 0; c < count(); ++c) {
                const Floats fill = all(answers.clients[c].missing[number]);
                for (int64_t j = 0; j < n; j += kLanes) put(s.block + c * kApart, j, fill);
            }
            const int64_t end = least(first + kBlock, kept);
            for (; next < found && static_cast<int64_t>(entries[next] >> 32) < end; ++next) {
                const uint64_t entry = entries[next] & 0xffffffffu;
                s.block[plan.home[entry] + static_cast<int64_t>(entries[next] >> 32) - first] = s.values[entry];
            }
            for (int c = 0; answers.mixing && c < count(); ++c)
                mean(s.block, n, count(), answers.mixing + c * count(), s.mixed + c * kApart);
            visit(answers.mixing ? s.mixed : s.block, first, n);
        }
    }
};

// max + log(sum) is the logsumexp; sum is 0 where all is -inf, and NaN where anything is.
struct LogSum {
    double sum = 0;
    float max = -kInf;

    // n is a multiple of kLanes.
    void add(const float* x, int64_t n) {
        Floats top = all(-kInf);
        for (int64_t j = 0; j < n; j += kLanes) top = larger(top, at(x, j));
        const float most = maximum(top), shift = most > -kInf ? most : 0.0f;
        Floats total{};
        for (int64_t j = 0; j < n; j += kLanes) total += exp(at(x, j) - shift);
        const double here = FEDDISTILL_ISA::sum(total);
        if (most > max) {
            sum = sum * __builtin_exp(static_cast<double>(max) - most) + here;
            max = most;
        } else {
            sum += max > -kInf ? here * __builtin_exp(static_cast<double>(most) - max) : here;
        }
    }

    float log() const { return sum == 0 ? -kInf : static_cast<float>(max + __builtin_log(sum)); }
};

// Log-normaliser of each mixed client, in s.norms.  False where one has no id left.
bool normalise(const Row& row) {
    const RowScratch& s = row.s;
    for (int c = 0; c < row.count(); ++c) s.sums[c] = 0, s.norms[c] = -kInf;
    row.blocks([&](float* x, int64_t first, int64_t n) __attribute__((always_inline)) {
        const bool is_last = first + n == row.kept + 1;
        for (int c = 0; c < row.count(); ++c) {
            float* v = x + c * kApart;
            if (is_last) v[n - 1] = row.others() > 0 ? v[n - 1] + log_of(static_cast<double>(row.others())) : -kInf;
            for (int64_t j = n; j < padded(n); ++j) v[j] = -kInf;
            LogSum total{s.sums[c], s.norms[c]};
            total.add(v, padded(n));
            s.sums[c] = total.sum, s.norms[c] = total.max;
        }
    });
    bool possible = true;
    for (int c = 0; c < row.count(); ++c) {
        possible &= s.sums[c] != 0;
        s.norms[c] = LogSum{s.sums[c], s.norms[c]}.log();
    }
    return possible;
}

// y = log sum_c exp(scale x_c + log_shares_c), times 1 / scale.
FEDDISTILL_INLINE void log_mean_exp(const float* x, int64_t n, int count, float scale, const float* log_shares,
                                    float* y) {
    for (int64_t j = 0; j < n; j += kLanes) {
        Floats top = all(-kInf);
        for (int c = 0; c < count; ++c) top = larger(top, fma(at(x + c * kApart, j), scale, all(log_shares[c])));
        const Floats shift = top > -kInf ? top : Floats{};
        Floats sum{};
        for (int c = 0; c < count; ++c) sum += exp(fma(at(x + c * kApart, j), scale, all(log_shares[c])) - shift);
        // sum is in [1, C]: log1p_negative has as many digits there as below 1.
        Floats log = (shift + log1p_negative(sum - 1.0f)) * (1 / scale);
        log = sum == 0.0f ? all(-kInf) : log;
        put(y, j, sum != sum ? all(kNaN) : log);
    }
}

// Sorts the columns of x on the way.
void mean_around_median(float* x, int64_t n, int count, int keep, const RowPlan& plan, float* y) {
    const float inverse = 1.0f / static_cast<float>(keep);
    for (int64_t begin = 0; begin < n; begin += kWideColumns) {
        const int64_t end = least(begin + kWideColumns, padded(n));
        for (int64_t j = begin; j < end; j += kLanes) {
            Ints has_nan{};
            for (int c = 0; c < count; ++c) has_nan |= at(x + c * kApart, j) != at(x + c * kApart, j);
            put(y, j, has_nan ? all(kNaN) : Floats{});
        }
        for (int64_t i = 0; i < plan.step_count; ++i) {
            float *const low = x + plan.steps[i].low * kApart, *const high = x + plan.steps[i].high * kApart;
            for (int64_t j = begin; j < end; j += kLanes) {
                const Floats a = at(low, j), b = at(high, j);
                put(low, j, smaller(a, b));
                put(high, j, larger(a, b));
            }
        }
        for (int64_t j = begin; j < end; j += kLanes) {
            const auto value = [&](int c) __attribute__((always_inline)) { return at(x + c * kApart, j); };
            // As in the reference: the window moves up while the value it loses is the farther one.
            const Floats twice_median = value((count - 1) / 2) + value(count / 2);
            Ints first{};
            for (int c = 0; c < count - keep; ++c) first -= value(c) + value(c + keep) < twice_median;
            Floats sum{};
            for (int c = 0; c < count; ++c) sum += (first <= c) & (first > c - keep) ? value(c) : Floats{};
            put(y, j, sum * inverse + at(y, j));
        }
    }
}

// Adds to the upper triangle of squared [C, C] the squared distances of n columns; two -inf are 0 apart.
template <bool kInfinite>
FEDDISTILL_INLINE void add_distances(const float* x, int64_t n, int count, double* squared) {
    constexpr int kTogether = 4;  // one sum at a time would wait for itself
    for (int c = 0; c < count; ++c)
        for (int d = c + 1; d < count; d += kTogether) {
            const float* others[kTogether];
            Floats sums[kTogether]{};
            for (int i = 0; i < kTogether; ++i) others[i] = x + least(d + i, count - 1) * kApart;
            for (int64_t j = 0; j < n; j += kLanes) {
                const Floats a = at(x + c * kApart, j);
                for (int i = 0; i < kTogether; ++i) {
                    const Floats b = at(others[i], j);
                    Floats gap = a - b;
                    if constexpr (kInfinite) gap = a == b ? Floats{} : gap;
                    sums[i] = fma(gap, gap, sums[i]);
                }
            }
            for (int i = 0; i < kTogether && d + i < count; ++i)
                squared[c * count + d + i] += FEDDISTILL_ISA::sum(sums[i]);
        }
}

// Weights of the clients' square roots in their geometric median: weiszfeld() of the reference, of -squared / 2.
void weiszfeld(const RowScratch& s, int count, double tolerance, int max_iterations) {
    constexpr double kSmoothing = 1e-4;  // _reference.py: SMOOTHING
    for (int c = 0; c < count; ++c) s.a[c] = 1.0 / count;
    for (int step = 0; step < max_iterations; ++step) {
        double spread = 0, total = 0, moved = 0;
        for (int c = 0; c < count; ++c) s.inner[c] = 0;
        for (int i = 0; i < count; ++i)
            for (int c = 0; c < count; ++c) s.inner[c] += s.a[i] * s.squared[i * count + c];
        for (int c = 0; c < count; ++c) spread += s.a[c] * s.inner[c];
        for (int c = 0; c < count; ++c) {
            const double d = s.inner[c] - 0.5 * spread;  // squared, from the mean
            s.inner[c] = 1 / __builtin_sqrt(d < kSmoothing * kSmoothing ? kSmoothing * kSmoothing : d);
            total += s.inner[c];
        }
        for (int c = 0; c < count; ++c) {
            const double next = s.inner[c] / total, gap = __builtin_fabs(next - s.a[c]);
            moved = gap > moved ? gap : moved;
            s.a[c] = next;
        }
        if (!(moved > tolerance)) break;
    }
}

// Log-weights of the geometric median, in s.weights.
void geometric_weights(const Row& row, const Combination& to) {
    const RowScratch& s = row.s;
    const int count = row.count();
    for (int i = 0; i < count * count; ++i) s.squared[i] = 0;
    row.blocks([&](float* x, int64_t first, int64_t n) __attribute__((always_inline)) {
        const int64_t end = least(n, row.kept - first);  // without the id that nobody kept
        for (int c = 0; c < count; ++c) {
            float* v = x + c * kApart;
            const float norm = row.answers.mixing ? s.norms[c] : 0.0f;
            for (int64_t j = 0; j < n; j += kLanes) put(v, j, exp((at(v, j) - norm) * 0.5f));
            for (int64_t j = end; j < padded(n); ++j) v[j] = 0;
        }
        add_distances<false>(x, padded(n), count, s.squared);
    });
    for (int c = 0; c < count; ++c) {
        const double norm = row.answers.mixing ? s.norms[c] : 0.0;
        s.sums[c] = __builtin_exp((s.missing[c] - norm) * 0.5);
    }
    for (int c = 0; c < count; ++c)
        for (int d = c + 1; d < count; ++d) {
            const double gap = s.sums[c] - s.sums[d];
            if (row.others() > 0) s.squared[c * count + d] += static_cast<double>(row.others()) * gap * gap;
            s.squared[d * count + c] = s.squared[c * count + d];
        }
    weiszfeld(s, count, to.tolerance, to.max_iterations);
    for (int c = 0; c < count; ++c) s.weights[c] = log_of(s.a[c]);
}

void combine(const Row& row, const Combination& to) {
    const RowScratch& s = row.s;
    const int count = row.count();
    const bool is_mean = to.rule == Rule::mean_probs || to.rule == Rule::mean_logits;
    for (int c = 0; is_mean && c < count; ++c) {
        const float share = to.shares[c * to.shares_stride + row.number * to.shares_step];
        s.weights[c] = to.rule == Rule::mean_probs ? log_of(share) : share;
    }
    if (to.rule == Rule::geometric_median) geometric_weights(row, to);
    row.blocks([&](float* x, int64_t first, int64_t n) __attribute__((always_inline)) {
        if (row.answers.mixing)
            for (int c = 0; c < count; ++c)
                for (int64_t j = c * kApart; j < c * kApart + n; ++j) x[j] -= s.norms[c];
        float* const y = s.y + first;
        switch (to.rule) {
            case Rule::mean_probs: return log_mean_exp(x, n, count, 1.0f, s.weights, y);
            case Rule::geometric_median: return log_mean_exp(x, n, count, 0.5f, s.weights, y);
            case Rule::mean_logits: return mean(x, n, count, s.weights, y);
            case Rule::mean_around_median: return mean_around_median(x, n, count, to.keep, row.plan, y);
            case Rule::trimmed_mean: {
                for (int c = 0; c < count; ++c) s.pointers[c] = x + c * kApart;
                const TrimmedMean task{s.pointers, count, padded(n), DType::f32, to.trim, y};
                return trimmed_columns(task, 0, padded(n), {s.wide, s.kept, row.plan.steps, row.plan.step_count});
            }
        }
    });
}

// An order of integers that is the order of floats.
FEDDISTILL_INLINE int32_t key_of(float x) {
    const auto bits = as<int32_t>(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th largest key of n, 0 < k <= n.
int32_t kth_largest(const float* y, int64_t n, int64_t k) {
    uint32_t key = 0x80000000u;  // bit by bit, for no branch of it depends on the data
    for (int bit = 31; bit >= 0; --bit) {
        const auto candidate = static_cast<int32_t>(key + (1u << bit));
        Ints reached{};
        int64_t j = 0, total = 0;
        for (; j + kLanes <= n; j += kLanes) {
            const Ints bits = as<Ints>(at(y, j));
            reached += (bits ^ ((bits >> 31) & 0x7fffffff)) >= candidate;
        }
        for (int i = 0; i < kLanes; ++i) total -= reached[i];
        for (; j < n; ++j) total += key_of(y[j]) >= candidate;
        if (total >= k) key = static_cast<uint32_t>(candidate);
    }
    return static_cast<int32_t>(key);
}

// Renormalises s.y, fills the ids up to W and cuts them to k.  False where no id is left.
bool finish(const Row& row, const Combination& to) {
    const RowScratch& s = row.s;
    const int64_t u = row.kept, vocab = row.answers.vocab, width = least(row.plan.entries, vocab), k = to.k;
    int32_t* const out_ids = to.ids + row.number * k;
    float* const out = to.log_probs + row.number * k;
    float* y = s.y;
    float rest = y[u];
    y[u] = vocab > u ? rest + log_of(static_cast<double>(vocab - u)) : -kInf;
    for (int64_t j = u + 1; j < padded(u + 1); ++j) y[j] = -kInf;
    LogSum whole;
    whole.add(y, padded(u + 1));
    if (whole.sum == 0) return false;
    const float log_whole = whole.log();
    for (int64_t j = 0; j < u; j += kLanes) put(y, j, at(y, j) - log_whole + 0.0f);  // no -0: keys tell it from 0
    rest -= log_whole;

    // The lowest ids that nobody kept fill up: 0, 1, 2, ... but for those that somebody did.
    const int32_t* ids = s.union_ids;
    const int64_t filled = width - u;
    if (filled > 0) {
        for (int64_t j = 0; j < width; ++j) s.merged_ids[j] = static_cast<int32_t>(j), s.merged[j] = rest;
        for (int64_t j = 0; j < u; ++j) {
            const auto place = least(static_cast<int64_t>(static_cast<uint32_t>(ids[j])), j + filled);
            s.merged_ids[place] = ids[j];
            s.merged[place] = y[j];
        }
        ids = s.merged_ids;
        y = s.merged;
    }
    const float log_others = vocab > width ? rest + log_of(static_cast<double>(vocab - width)) : -kInf;
    if (whole.sum != whole.sum) {
        for (int64_t j = 0; j < k; ++j) out_ids[j] = ids[j], out[j] = kNaN;
        to.log_tail[row.number] = kNaN;
        return true;
    }
    if (k == width) {
        __builtin_memcpy(out_ids, ids, sizeof(int32_t) * static_cast<std::size_t>(k));
        __builtin_memcpy(out, y, sizeof(float) * static_cast<std::size_t>(k));
        to.log_tail[row.number] = log_others;
        return true;
    }
    const int32_t last = kth_largest(y, width, k);
    int64_t above = 0, taken = 0;
    for (int64_t j = 0; j < width; ++j) above += key_of(y[j]) > last;
    int64_t ties = k - above;
    for (int64_t j = 0; taken < k; ++j) {
        const int32_t key = key_of(y[j]);
        const bool tie = key == last, take = key > last || (tie && ties > 0);
        ties -= tie;
        out_ids[taken] = ids[j];
        out[taken] = y[j];
        y[j] = take ? -kInf : y[j];
        taken += take;
    }
    y[width] = log_others;
    for (int64_t j = width + 1; j < padded(width + 1); ++j) y[j] = -kInf;
    LogSum tail;
    tail.add(y, padded(width + 1));
    to.log_tail[row.number] = tail.log();
    return true;
}

}  // namespace

NoResult aggregate_rows(const Answers& answers, const Combination& to, const RowPlan& plan, int64_t begin, int64_t end,
                        const RowScratch& scratch) {
    for (int64_t n = begin; n < end; ++n) {
        Row row{answers, plan, scratch, n};
        row.gather();
        if (row.has_wrong_ids) return {n, NoResult::ids};
        if (answers.mixing && !normalise(row)) return {n, NoResult::empty};
        combine(row, to);
        if (!finish(row, to)) return {n, NoResult::empty};
    }
    return {};
}

void measure_rows(const Answers& answers, const RowPlan& plan, int64_t begin, int64_t end, const RowScratch& s,
                  double* distances) {
    const int count = answers.count;
    for (int64_t n = begin; n < end; ++n) {
        Row row{answers, plan, s, n};
        row.gather();
        // A constant added to a row is centred away.  Less the value of what nobody kept, that is 0.
        for (int c = 0; c < count; ++c) {
            s.norms[c] = __builtin_isfinite(s.missing[c]) ? s.missing[c] : 0.0f;
            s.sums[c] = s.ruled_out[c] = 0;
        }
        for (int i = 0; i < count * count; ++i) s.squared[i] = 0;
        row.blocks([&](float* x, int64_t first, int64_t columns) __attribute__((always_inline)) {
            const int64_t end_kept = least(columns, row.kept - first);
            for (int c = 0; c < count; ++c) {
                float* v = x + c * kApart;
                Floats sum{};
                Ints ruled_out{};
                for (int64_t j = end_kept; j < padded(columns); ++j) v[j] = s.norms[c];
                for (int64_t j = 0; j < columns; j += kLanes) {
                    const Floats z = at(v, j) - s.norms[c];
                    const Ints impossible = z == -kInf;
                    sum += impossible ? Floats{} : z;
                    ruled_out -= impossible;
                    put(v, j, z);
                }
                s.sums[c] += FEDDISTILL_ISA::sum(sum);
                s.ruled_out[c] += FEDDISTILL_ISA::sum(__builtin_convertvector(ruled_out, Floats));
            }
            add_distances<true>(x, padded(columns), count, s.squared);
        });
        const auto others = static_cast<double>(row.others());
        for (int c = 0; c < count; ++c)
            for (int d = c + 1; d < count; ++d) {
                const bool apart = others > 0 && !((s.missing[c] == -kInf) == (s.missing[d] == -kInf) &&
                                                   s.missing[c] == s.missing[c] && s.missing[d] == s.missing[d]);
                const bool none_other = others > 0 && s.missing[c] == -kInf;
                const double allowed =
                    static_cast<double>(answers.vocab) - s.ruled_out[c] - (none_other ? others : 0);
                const double gap = s.sums[c] - s.sums[d], squared = s.squared[c * count + d];
                const double centred = squared - (allowed > 0 ? gap * gap / allowed : 0);
                const bool infinite = apart || !(squared < __builtin_inf());
                distances[c * count + d] += infinite ? __builtin_inf() : centred > 0 ? centred : 0;
            }
    }
}

}  // namespace feddistill::FEDDISTILL_ISA
