// Element types as they cross from Python.
#pragma once

namespace feddistill {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };  // feddistill_kernels/_native.py: DTYPES

}  // namespace feddistill
