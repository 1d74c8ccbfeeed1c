// A kind of divergence is two scalar functions, phi and psi, of p, q and d = log(q / p); see
// feddistill_kernels/_kinds.py.  For files named *_isa.cpp.
// kCareful: some log-probability of the row may be -inf, and d with it.
#pragma once
#include "../distillation.h"
#include "vector.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

constexpr float kSkew = 0.1f;  // _kinds.py: SKEW

struct Slope {
    Floats phi, psi;
};

// q (e^-d - 1 + d) with p = q e^-d.
template <bool kCareful>
FEDDISTILL_INLINE Floats bregman(Floats q, Floats p, Floats d) {
    // (e^-d - 1 + d) / d^2 for |d| < 1/2, 5e-8 relative
    const Floats ratio = polynomial(d, 0.5000000120139753f, -0.1666666545583386f, 0.04166579594171024f,
                                    -0.00833345217296455f, 0.0013981997364460388f, -0.0001987562907926877f);
    const Floats first = q * d;
    const Floats far = first + (p - q);
    const Floats phi = magnitude(d) < 0.5f ? first * (d * ratio) : far;
    if constexpr (kCareful) return q == 0.0f ? p : phi;
    return phi;
}

// p h, where h may be infinite and p 0.
template <bool kCareful>
FEDDISTILL_INLINE Floats times(Floats p, Floats h) {
    if constexpr (kCareful) return p == 0.0f ? p : p * h;
    return p * h;
}

template <bool kCareful>
FEDDISTILL_INLINE Floats kl(Floats q, Floats p, Floats d) {
    const Floats phi = bregman<kCareful>(q, p, d);
    if constexpr (kCareful) return d == kInf ? all(kInf) : phi;
    return phi;
}

struct Mixture {
    Floats p_over, q_over;  // log(p / m), log(q / m)
};

// m = beta q + (1 - beta) p.
FEDDISTILL_INLINE Mixture over_mixture(Floats d, float beta) {
    const Ints q_is_larger = d > 0.0f;
    const Floats share = q_is_larger ? all(1 - beta) : all(beta);  // of the smaller one
    const Floats larger = -log1p_negative(share * expm1_negative(-magnitude(d)));
    const Floats smaller = larger - magnitude(d);
    return {q_is_larger ? smaller : larger, q_is_larger ? larger : smaller};
}

FEDDISTILL_INLINE Floats expm1(Floats x) { return x > 0.0f ? exp(x) - 1.0f : expm1_negative(x); }

// One specialisation for each kind of the table in distillation.h.
template <Kind kKind>
struct Functions;

template <>
struct Functions<Kind::forward_kl> {
    static constexpr bool kBalanced = true;  // psi adds to 0
    template <bool kCareful>
    FEDDISTILL_INLINE static Slope at(Floats p, Floats q, Floats d, float) {
        return {kl<kCareful>(q, p, d), p - q};
    }
};

template <>
struct Functions<Kind::reverse_kl> {
    static constexpr bool kBalanced = false;
    template <bool kCareful>
    FEDDISTILL_INLINE static Slope at(Floats p, Floats q, Floats d, float) {
        return {kl<kCareful>(p, q, -d), times<kCareful>(p, -d)};
    }
};

template <>
struct Functions<Kind::jsd> {
    static constexpr bool kBalanced = false;
    template <bool kCareful>
    FEDDISTILL_INLINE static Slope at(Floats p, Floats q, Floats d, float beta) {
        const Floats m = fma(q, beta, p * (1 - beta));
        const Mixture log = over_mixture(d, beta);
        const Floats phi =
            bregman<kCareful>(q, m, log.q_over) * beta + bregman<kCareful>(p, m, log.p_over) * (1 - beta);
        return {phi, times<kCareful>(p, log.p_over) * (1 - beta)};
    }
};

template <>
struct Functions<Kind::tvd> {
    static constexpr bool kBalanced = false;
    template <bool kCareful>
    FEDDISTILL_INLINE static Slope at(Floats p, Floats q, Floats d, float) {
        const Floats size = magnitude(d);
        const Floats near = larger(p, q) * size * expm1_over(-size);
        const Floats phi = (size < 0.5f ? near : magnitude(p - q)) * 0.5f;
        const Floats half = p * 0.5f;
        return {phi, d < 0.0f ? half : d > 0.0f ? -half : half * d};  // half * 0 is 0, half * NaN NaN
    }
};

template <>
struct Functions<Kind::skew_forward_kl> {
    static constexpr bool kBalanced = false;
    template <bool kCareful>
    FEDDISTILL_INLINE static Slope at(Floats p, Floats q, Floats d, float) {
        const Floats m = fma(q, kSkew, p * (1 - kSkew));
        const Floats q_over = over_mixture(d, kSkew).q_over;
        return {bregman<kCareful>(q, m, q_over), times<kCareful>(p, expm1(q_over)) * (kSkew - 1)};
    }
};

template <>
struct Functions<Kind::skew_reverse_kl> {
    static constexpr bool kBalanced = false;
    template <bool kCareful>
    FEDDISTILL_INLINE static Slope at(Floats p, Floats q, Floats d, float) {
        const Floats m = fma(p, kSkew, q * (1 - kSkew));
        const Floats p_over = over_mixture(d, 1 - kSkew).p_over;
        return {bregman<kCareful>(p, m, p_over), times<kCareful>(p, p_over - kSkew * expm1(p_over))};
    }
};

}  // namespace
}  // namespace feddistill::FEDDISTILL_ISA
