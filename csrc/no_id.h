// Rows of compressed answers that keep fewer entries than others.
#pragma once
#include <cstdint>

namespace feddistill {

constexpr std::int32_t kNoId = -1;  // feddistill_kernels/_check.py: NO_ID.  What is beside it is not looked at.

}  // namespace feddistill
