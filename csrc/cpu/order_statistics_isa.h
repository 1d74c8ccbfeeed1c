// The column kernels, once for each level.
#pragma once
#include "../network.h"
#include "../order_statistics.h"
#include "instruction_sets.h"

namespace feddistill {

constexpr int kColumns = 256;      // worked on at once in registers: 32 clients of half precision take 32 KiB
constexpr int kWideColumns = 64;   // worked on at once where C values do not fit the registers

// Columns [begin, end).  scratch and steps are for count > kMostRegisters: [count][kWideColumns] floats, and
// the network for the kept outputs.
using TrimmedColumns = void(const TrimmedMean&, std::int64_t begin, std::int64_t end, float* scratch,
                            const Comparator* steps, std::int64_t step_count);

FEDDISTILL_DECLARE(TrimmedColumns trimmed_columns;)

}  // namespace feddistill
