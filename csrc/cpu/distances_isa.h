// What reads the clients, once for each level.
#pragma once
#include "../distances.h"
#include "instruction_sets.h"

namespace feddistill {

constexpr int kBlock = 512;  // columns worked on at once: 8 clients take 16 KiB as floats

// Rows [first, last) of columns [begin, end).
struct Piece {
    std::int64_t first, last, begin, end;
};

// Numbers of scratch that moments needs, whatever the level.
struct MomentsScratch {
    static constexpr int kPad = 4, kMostLanes = 16;
    static std::int64_t padded(int count) { return count + kPad; }
    static std::int64_t floats(int count) { return padded(count) * (kBlock + kMostLanes); }
    static std::int64_t doubles(int count) {
        return padded(count) * padded(count) * kMostLanes + 2 * padded(count);
    }
    float* f;
    double* d;
};

// Differences y_i = x_i - x_anchor: their rows' means over the piece's columns into mean [C] (the last row's), and
// sum_rows sum_columns (y_i - mean_i) (y_j - mean_j) into gram [C][C].  Where a client holds NaN or infinity its
// row and column of gram are NaN; where the anchor does, all are.
using Moments = void(const Clients&, int anchor, const Piece&, const MomentsScratch&, double* gram, double* mean);

// [C] each.
struct CombineScratch {
    int* chosen;
    const void** rows;
};

// out = sum_i weights[i] x_i for each of `results` outs and rows of weights [results][C]; those of weight 0 are not
// read, and where all are NaN, so is out.
using Combine = void(const Clients&, const Piece&, const float* weights, void* const* outs, int results,
                     const CombineScratch&);

FEDDISTILL_DECLARE(Moments moments; Combine combine;)

}  // namespace feddistill
