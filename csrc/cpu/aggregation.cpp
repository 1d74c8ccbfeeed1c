// Shares rows among threads.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "aggregation_isa.h"
#include "order_statistics_isa.h"
#include "threads.h"

namespace feddistill {
namespace {

// Hands out pieces of one allocation, or, without one, counts what they take.
class Arena {
public:
    explicit Arena(std::byte* begin) : begin_(begin) {}

    template <class T>
    T* take(std::int64_t n) {
        T* const piece = reinterpret_cast<T*>(begin_ + used_);
        used_ += (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    std::size_t used() const { return used_; }

private:
    std::byte* begin_;
    std::size_t used_ = 0;
};

RowScratch carve(Arena& arena, const Answers& answers, std::int64_t entries) {
    constexpr int kSpare = 17;  // an id that nobody kept, and a vector's overhang
    const std::int64_t count = answers.count, width = std::min(entries, answers.vocab);
    RowScratch s;
    s.items = arena.take<std::uint64_t>(entries);
    s.sorted = arena.take<std::uint64_t>(entries);
    s.values = arena.take<float>(entries + kSpare);
    s.union_ids = arena.take<std::int32_t>(entries);
    s.y = arena.take<float>(entries + kSpare);
    s.merged_ids = arena.take<std::int32_t>(width);
    s.merged = arena.take<float>(width + kSpare);
    s.block = arena.take<float>(count * kApart);
    s.mixed = arena.take<float>(answers.mixing ? count * kApart : 0);
    s.wide = arena.take<float>(count > kMostRegisters ? count * kWideColumns : 0);
    s.kept = arena.take<const float*>(count);
    s.pointers = arena.take<const void*>(count);
    for (float** each : {&s.missing, &s.weights, &s.norms}) *each = arena.take<float>(count);
    s.squared = arena.take<double>(count * count);
    for (double** each : {&s.sums, &s.ruled_out, &s.a, &s.inner}) *each = arena.take<double>(count);
    return s;
}

// What all rows and threads need, made here, for an exception cannot leave a parallel region.
class Workplace {
public:
    Workplace(const Answers& answers, int threads) {
        for (int c = 0; c < answers.count; ++c) home_.resize(home_.size() + answers.clients[c].kept, c * kApart);
        const auto entries = static_cast<std::int64_t>(home_.size());
        // A row takes some 20 operations an entry for sorting, and one a client and column for the rule.
        threads_ = worth(answers.rows * entries * (20 + answers.count), threads);
        Arena sizes(nullptr);
        carve(sizes, answers, entries);
        const std::size_t each = sizes.used();
        memory_.resize(each * static_cast<std::size_t>(threads_) + 64);
        std::byte* begin = memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64);
        for (int t = 0; t < threads_; ++t) {
            Arena arena(begin + each * static_cast<std::size_t>(t));
            scratch_.push_back(carve(arena, answers, entries));
        }
    }

    int threads() const { return threads_; }
    const RowScratch& scratch(int thread) const { return scratch_[static_cast<std::size_t>(thread)]; }
    RowPlan plan(const std::vector<Comparator>& steps) const {
        return {home_.data(), static_cast<std::int64_t>(home_.size()), steps.data(),
                static_cast<std::int64_t>(steps.size())};
    }

private:
    std::vector<std::int32_t> home_;
    std::vector<std::byte> memory_;
    std::vector<RowScratch> scratch_;
    int threads_;
};

std::vector<Comparator> steps_of(const Combination& to, int count) {
    if (to.rule == Rule::mean_around_median) return network(count, 0, count);
    if (to.rule == Rule::trimmed_mean && count > kMostRegisters) return network(count, to.trim, count - to.trim);
    return {};
}

}  // namespace

NoResult aggregate_cpu(const Answers& answers, const Combination& to, int threads, int set) {
    constexpr std::int64_t kShare = 16;  // rows handed to a thread at once
    const Workplace place(answers, threads);
    const std::vector<Comparator> steps = steps_of(to, answers.count);
    const RowPlan plan = place.plan(steps);
    AggregateRows* const run = FEDDISTILL_CHOOSE(set, aggregate_rows);
    const std::int64_t shares = (answers.rows + kShare - 1) / kShare;
    std::vector<NoResult> missing(static_cast<std::size_t>(shares));
    in_parallel(shares, place.threads(), [&](std::int64_t s, int thread) {
        const std::int64_t end = std::min(answers.rows, (s + 1) * kShare);
        missing[static_cast<std::size_t>(s)] = run(answers, to, plan, s * kShare, end, place.scratch(thread));
    });
    const auto first = std::find_if(missing.begin(), missing.end(), [](const NoResult& each) { return each.row >= 0; });
    return first == missing.end() ? NoResult{} : *first;
}

void answer_distances_cpu(const Answers& answers, double* distances, int threads, int set) {
    constexpr std::int64_t kMostShares = 256;  // each has a sum of its own, and they are added in one order
    const Workplace place(answers, threads);
    const RowPlan plan = place.plan({});
    MeasureRows* const run = FEDDISTILL_CHOOSE(set, measure_rows);
    const std::int64_t rows = std::max<std::int64_t>(1, (answers.rows + kMostShares - 1) / kMostShares);
    const std::int64_t shares = (answers.rows + rows - 1) / rows;
    const auto count = static_cast<std::size_t>(answers.count);
    std::vector<double> sums(static_cast<std::size_t>(shares) * count * count, 0.0);
    in_parallel(shares, place.threads(), [&](std::int64_t s, int thread) {
        run(answers, plan, s * rows, std::min(answers.rows, (s + 1) * rows), place.scratch(thread),
            sums.data() + static_cast<std::size_t>(s) * count * count);
    });
    std::fill_n(distances, count * count, 0.0);
    for (std::size_t at = 0; at < sums.size(); ++at) distances[at % (count * count)] += sums[at];
    for (std::size_t c = 0; c < count; ++c)
        for (std::size_t d = 0; d < c; ++d) distances[c * count + d] = distances[d * count + c];
}

}  // namespace feddistill
