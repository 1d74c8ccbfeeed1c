// A kind of divergence is two scalar functions, phi and psi, of p, q and d = log(q / p), which is 0 where both are:
// see feddistill_kernels/_kinds.py, and csrc/cpu/kinds.h, which has the same polynomials.
#pragma once
#include "../distillation.h"
#include "device.h"

namespace feddistill {

constexpr float kSkew = 0.1f;  // _kinds.py: SKEW

struct Slope {
    float phi, psi;
};

// c[0] + c[1] x + ...
template <int kCount>
__device__ inline float polynomial(float x, const float (&c)[kCount]) {
    float y = c[kCount - 1];
#pragma unroll
    for (int i = kCount - 2; i >= 0; --i) y = fmaf(y, x, c[i]);
    return y;
}

// (e^x - 1) / x for -1/2 <= x <= 0.
__device__ inline float expm1_over(float x) {
    constexpr float c[] = {0.9999999986263927f,  0.4999998074605449f,   0.16666224081888345f,
                           0.04162908909480141f, 0.00818738589683897f, 0.001121634840145323f};
    return polynomial(x, c);
}
__device__ inline float expm1_negative(float x) {
    return x < -0.5f ? exp2_fast(x * kLog2e) - 1 : x * expm1_over(x);
}
__device__ inline float expm1_any(float x) { return x > 0 ? exp2_fast(x * kLog2e) - 1 : expm1_negative(x); }

// log(1 + x) for -1 < x <= 0.
__device__ inline float log1p_negative(float x) {
    const float u = x + 1;
    // u = 2^e m with m in [sqrt(1/2), sqrt(2)); where u is there already, x itself has more digits than u - 1.
    const int bits = static_cast<int>(bits_of(u)), e = (bits - 0x3f3504f3) >> 23;
    const float m = float_of_bits(static_cast<unsigned>(bits - e * (1 << 23)));
    const float y = e == 0 ? x : m - 1;
    constexpr float c[] = {0.9999999999590771f,  -0.499999882897008f,   0.3333332599280242f, -0.2500158655787477f,
                           0.2000196853850237f,  -0.16609012751364055f, 0.14181834502454474f, -0.13243461339197307f,
                           0.12904663705800587f, -0.07621119773998632f};
    return x == x ? fmaf(static_cast<float>(e), kLn2, y * polynomial(y, c)) : x;  // NaN's bits are no number
}

// q (e^-d - 1 + d) with p = q e^-d.
__device__ inline float bregman(float q, float p, float d) {
    // (e^-d - 1 + d) / d^2 for |d| < 1/2, 5e-8 relative
    constexpr float c[] = {0.5000000120139753f,   -0.1666666545783386f,   0.04166579594171024f,
                           -0.00833345217296455f, 0.0013981997364460388f, -0.0001987562907926877f};
    const float first = q * d;
    const float phi = fabsf(d) < 0.5f ? first * (d * polynomial(d, c)) : first + (p - q);
    return q == 0 ? p : phi;
}

// Infinite where p rules out what q, finite in logs, does not.
__device__ inline float kl(float q, float p, float d) { return d == kInfinity ? kInfinity : bregman(q, p, d); }

// p h, where h may be infinite and p 0.
__device__ inline float times(float p, float h) { return p == 0 ? p : p * h; }

struct Mixture {
    float p_over, q_over;  // log(p / m), log(q / m)
};

// m = beta q + (1 - beta) p.
__device__ inline Mixture over_mixture(float d, float beta) {
    const float size = fabsf(d), share = d > 0 ? 1 - beta : beta;  // of the smaller one
    const float larger = -log1p_negative(share * expm1_negative(-size)), smaller = larger - size;
    return {d > 0 ? smaller : larger, d > 0 ? larger : smaller};
}

template <Kind kKind>
__device__ inline Slope slope(float p, float q, float d, float beta) {
    if constexpr (kKind == Kind::forward_kl) {
        return {kl(q, p, d), p - q};
    } else if constexpr (kKind == Kind::reverse_kl) {
        return {kl(p, q, -d), times(p, -d)};
    } else if constexpr (kKind == Kind::jsd) {
        const float m = fmaf(q, beta, p * (1 - beta));
        const Mixture log = over_mixture(d, beta);
        return {bregman(q, m, log.q_over) * beta + bregman(p, m, log.p_over) * (1 - beta),
                times(p, log.p_over) * (1 - beta)};
    } else if constexpr (kKind == Kind::tvd) {
        const float size = fabsf(d), near = (p < q ? q : p) * size * expm1_over(-size), half = p * 0.5f;
        const float phi = (size < 0.5f ? near : fabsf(p - q)) * 0.5f;
        return {phi, d < 0 ? half : d > 0 ? -half : half * d};  // half * 0 is 0, half * NaN NaN
    } else if constexpr (kKind == Kind::skew_forward_kl) {
        const float m = fmaf(q, kSkew, p * (1 - kSkew)), q_over = over_mixture(d, kSkew).q_over;
        return {bregman(q, m, q_over), times(p, expm1_any(q_over)) * (kSkew - 1)};
    } else {
        static_assert(kKind == Kind::skew_reverse_kl);
        const float m = fmaf(p, kSkew, q * (1 - kSkew)), p_over = over_mixture(d, 1 - kSkew).p_over;
        return {bregman(p, m, p_over), times(p, p_over - kSkew * expm1_any(p_over))};
    }
}

// An entry's binary logs: p = 2^a, q = 2^b; and d.
struct Pair {
    float a, b, d;
};

template <Kind kKind>
struct Exact {
    static constexpr float kUnit = 1;
    __device__ static Slope at(float p, float q, const Pair& x, float beta) { return slope<kKind>(p, q, x.d, beta); }
};

// The formulas as in a textbook, in units of kUnit: a third of the instructions of those above.  For rows with much
// of phi, whose sum has digits to spare; and where it is finite, for infinity may become NaN here.
template <Kind kKind>
struct Plain {
    static constexpr float kUnit = kKind == Kind::tvd ? 1 : kLn2;
    __device__ static Slope at(float p, float q, const Pair& x, float beta) {
        constexpr float kLeast = -0x1p14f;  // a log that 0 has here, so that 0 times it is 0
        const float a = fmaxf(x.a, kLeast), b = fmaxf(x.b, kLeast);
        if constexpr (kKind == Kind::forward_kl) {
            return {q * (x.b - x.a), (p - q) * kLog2e};
        } else if constexpr (kKind == Kind::reverse_kl) {
            const float y = p * (x.a - x.b);
            return {y, y};
        } else if constexpr (kKind == Kind::jsd) {
            const float log_m = log_of(fmaf(q, beta, p * (1 - beta))), y = p * (a - log_m) * (1 - beta);
            return {fmaf(q * (b - log_m), beta, y), y};
        } else if constexpr (kKind == Kind::tvd) {
            const float half = p * 0.5f;
            return {fabsf(p - q) * 0.5f, x.a < x.b ? -half : x.a > x.b ? half : 0};
        } else if constexpr (kKind == Kind::skew_forward_kl) {
            const float m = fmaf(q, kSkew, p * (1 - kSkew));
            return {q * (b - log_of(m)), p * (q * over(m) - 1) * ((kSkew - 1) * kLog2e)};
        } else {
            static_assert(kKind == Kind::skew_reverse_kl);
            const float m = fmaf(p, kSkew, q * (1 - kSkew)), y = a - log_of(m);
            return {p * y, p * fmaf(p * over(m) - 1, -kSkew * kLog2e, y)};
        }
    }

  private:
    static constexpr float kTiny = 0x1p-126f;
    __device__ static float log_of(float m) { return log2_fast(fmaxf(m, kTiny)); }
    __device__ static float over(float m) { return reciprocal(fmaxf(m, kTiny)); }
};

// Calls `use` with the functions of a kind that is known only when the kernel runs; distillation_cuda has checked it.
template <template <Kind> typename Functions, typename Use>
__device__ inline void with_kind(Kind kind, Use use) {
    switch (kind) {
#define FEDDISTILL_KIND(name) \
    case Kind::name: return use(Functions<Kind::name>{});
        FEDDISTILL_KINDS(FEDDISTILL_KIND)
#undef FEDDISTILL_KIND
    }
}

}  // namespace feddistill
