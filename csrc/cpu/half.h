// Half precision without the compiler's or the CPU's help.
#pragma once
#include <bit>
#include <cstdint>

// static: each file has its own, compiled with its own instructions.
namespace feddistill {

static inline float from_bf16(std::uint16_t h) { return std::bit_cast<float>(std::uint32_t{h} << 16); }

static inline std::uint16_t to_bf16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
    return static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Branch-free, so that the compiler vectorises them.  Both let the floating-point unit do the shifting:
// a half's exponent is moved by multiplying, its subnormals by subtracting 0.5, its rounding by adding.
static inline float from_f16(std::uint16_t h) {
    const std::uint32_t w = std::uint32_t{h} << 16, sign = w & 0x80000000u, magnitude = w + w;
    const float normal = std::bit_cast<float>((magnitude >> 4) + (0xe0u << 23)) * 0x1p-112f;
    const float subnormal = std::bit_cast<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude < (1u << 27) ? subnormal : normal));
}

static inline std::uint16_t to_f16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = bits & 0x80000000u, magnitude = bits + bits;
    const float absolute = std::bit_cast<float>(bits & 0x7fffffffu);
    const std::uint32_t exponent = magnitude & 0xff000000u, bias = exponent < 0x71000000u ? 0x71000000u : exponent;
    const float rounded = std::bit_cast<float>((bias >> 1) + 0x07800000u) + (absolute * 0x1p112f) * 0x1p-110f;
    const auto r = std::bit_cast<std::uint32_t>(rounded);
    const std::uint32_t half = ((r >> 13) & 0x7c00u) + (r & 0x0fffu);
    return static_cast<std::uint16_t>((sign >> 16) | (magnitude > 0xff000000u ? 0x7e00u : half));
}

}  // namespace feddistill
