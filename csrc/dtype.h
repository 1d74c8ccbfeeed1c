// Tensors as they cross from Python.
#pragma once
#include <cstdint>

namespace feddistill {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };  // feddistill_kernels/_native.py: DTYPES

constexpr std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Matrix {
    void* at;
    std::int64_t stride;  // elements from row to row; elements of a row are neighbours
    DType dtype;
};

}  // namespace feddistill
