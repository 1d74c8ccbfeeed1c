// The row kernels, once for each level.
#pragma once
#include "../aggregation.h"
#include "../network.h"
#include "instruction_sets.h"

namespace feddistill {

constexpr int kBlock = 512;           // columns of the union worked on at once: 10 clients take 20 KiB
constexpr int kApart = kBlock + 16;  // from client to client: 32 at a multiple of 2 KiB fall out of the L1 cache

// One thread's memory.  T is the sum of K, W = min(T, V), C the clients; sizes in elements.
struct RowScratch {
    std::uint64_t *items, *sorted;         // [T] id << 32 | entry, by client; then slot << 32 | entry, by slot
    float* values;                         // [T + 16] the entries' log-probabilities
    std::int32_t* union_ids;               // [T] distinct and ascending
    float* y;                              // [T + 1 + 16] the result for them, and for an id that nobody kept
    std::int32_t* merged_ids;              // [W]
    float* merged;                         // [W + 1 + 16]
    float *block, *mixed;                  // [C, kApart]
    float* wide;                           // [C, kWideColumns], for trimmed_columns
    const float** kept;                    // [C], for trimmed_columns
    const void** pointers;                 // [C], for trimmed_columns
    float *missing, *weights, *norms;      // [C]
    double* squared;                       // [C, C]
    double *sums, *ruled_out, *a, *inner;  // [C]
};

struct RowPlan {
    const std::int32_t* home;  // [T] where the entry's client begins in block
    std::int64_t entries;      // T
    const Comparator* steps;   // for trimmed_mean of many clients and mean_around_median
    std::int64_t step_count;
};

// Returns the first row of [begin, end) without a result.
using AggregateRows = NoResult(const Answers&, const Combination&, const RowPlan&, std::int64_t begin,
                               std::int64_t end, const RowScratch&);
// Adds to the upper triangle of distances.
using MeasureRows = void(const Answers&, const RowPlan&, std::int64_t begin, std::int64_t end, const RowScratch&,
                         double* distances);

FEDDISTILL_DECLARE(AggregateRows aggregate_rows; MeasureRows measure_rows;)

}  // namespace feddistill
