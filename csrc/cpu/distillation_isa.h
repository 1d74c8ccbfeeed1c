// The loss of one row, once for each level.
#pragma once
#include "../distillation.h"
#include "instruction_sets.h"

namespace feddistill {

// Floats that a thread needs beside the row: a slope a column, three widened rows where dtypes differ, and
// eight numbers an event of a truncated teacher.
std::int64_t distillation_scratch(const Distillation& task);

using DistillationRow = Refusal::Reason(const Distillation&, std::int64_t row, float* scratch);
using ScaleSpan = void(const void* from, std::int64_t begin, std::int64_t end, DType, float factor, void* to);

FEDDISTILL_DECLARE(DistillationRow distillation_row; ScaleSpan scale_span;)

}  // namespace feddistill
