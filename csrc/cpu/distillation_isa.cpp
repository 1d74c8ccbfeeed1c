#include "distillation_isa.h"

#include <cstdlib>

#include "kinds.h"
#include "rows.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

// Both of a row at once, with sum_v q_v (b_v - a_v) in nats: KL(q || p) but for the digits that cancel where it is
// small.  cross is not finite if anything is not.
struct Pair {
    Normaliser student, teacher;
    double cross = 0;  // sum over the teacher's terms, times its exponent less the student's

    double plain() const {
        return (cross / teacher.sum + student.log2_sum() - teacher.log2_sum()) * kLn2;
    }
    void raise(float s, float t) {
        const float before_s = student.offset, before_t = teacher.offset;
        const double sum = teacher.sum;
        student.raise(s), teacher.raise(t);
        if (sum == 0) return;
        cross += sum * (double{student.offset} - before_s - (double{teacher.offset} - before_t));
        cross *= teacher.sum / sum;
    }
};

// Whether a row is so short that a cache of 1 MiB holds it, the teacher's, the gradient's and the next two.
template <DType kDType>
bool leaves_room(std::int64_t n) {
    return n * std::int64_t{sizeof(Element<kDType>)} < 3 << 16;
}

// g: where the gradient will be written, fetched meanwhile; may be nothing.
template <DType kDType>
Pair normalise_both(const Element<kDType>* s, const Element<kDType>* t, std::int64_t n, float factor,
                    const Element<kDType>* g) {
    struct Part {
        float student, teacher, cross;
    };
    Pair by{{factor}, {factor}};
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        const std::int64_t columns = std::min(kBlock, n - begin);
        const auto part = [&]() -> Part {
            const Pair fixed = by;
            Floats students{}, teachers{}, cross{};
            const Element<kDType>* to = g ? g + begin : nullptr;
            sweep<kDType>(s + begin, t + begin, columns,
                          [&](int lanes, Floats zs, Floats zt) __attribute__((always_inline)) {
                if (to) __builtin_prefetch(to, 1, 2), to += kLanes;
                const Floats x = fixed.student.exponent(zs), y = fixed.teacher.exponent(zt);
                const Floats term = keep_lanes(exp2(y), lanes, 0);
                students += keep_lanes(exp2(x), lanes, 0);
                teachers += term;
                cross = fma(term, keep_lanes(y - x, lanes, 0), cross);
            });
            return {sum(students), sum(teachers), sum(cross)};
        };
        const auto raise = [&] {
            by.raise(std::max(largest_of<kDType>(s + begin, columns), by.student.offset / factor),
                     std::max(largest_of<kDType>(t + begin, columns), by.teacher.offset / factor));
        };
        if (begin == 0) raise();
        Part added = part();
        if (!(added.student < kTooMuch && added.teacher < kTooMuch)) {
            raise();
            added = part();
        }
        by.student.sum += added.student, by.teacher.sum += added.teacher, by.cross += added.cross;
        if (std::isnan(by.student.sum + by.teacher.sum)) break;
    }
    return by;
}

// What a row's slopes are made of.
struct Frame {
    Normaliser student, teacher, hard;   // hard: of the student at T = 1
    float p_scale, q_scale, hard_scale;  // of a term, to make a probability
    float shift;                         // log2 of the student's sum less the teacher's
    float soft, ce;                      // what multiplies the slope, and the hard softmax
    bool second;                         // hard is not student
    float beta;
    std::int64_t label;                  // -1 for none
    std::int64_t next, next_teacher;     // where the next row begins, in elements from this; 0 where there is none

    // p: the student's probability where T is 1
    FEDDISTILL_INLINE Floats add_hard(Floats slope, Floats z, Floats p) const {
        return ce == 0 ? slope : fma(second ? hard.term(z) * hard_scale : p, ce, slope);
    }
};

struct Point {
    Floats p, q, d;
};

template <bool kCareful>
FEDDISTILL_INLINE Point point(const Frame& f, Floats s, Floats t) {
    const Floats x = f.student.exponent(s), y = f.teacher.exponent(t);
    Floats d = ((y - x) + f.shift) * static_cast<float>(kLn2);
    if constexpr (kCareful) d = (s == -kInf) & (t == -kInf) ? Floats{} : d;
    return {exp2(x) * f.p_scale, exp2(y) * f.q_scale, d};
}

// Divergence of a row and, where g is given, its gradient.  g may be s.
template <DType kDType, class Kind, bool kCareful>
double dense_row(const Frame& frame, const Element<kDType>* s, const Element<kDType>* t, std::int64_t n,
                 Element<kDType>* g, float* psi) {
    const Frame f = frame;  // whose address nobody has: a store to g cannot change it
    const float s_label = f.label < 0 ? 0 : element<kDType>(s, f.label);
    const float t_label = f.label < 0 ? 0 : element<kDType>(t, f.label);
    Element<kDType>* const now = Kind::kBalanced ? g : nullptr;
    double divergence = 0, psi_sum = 0;
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        Floats phi_part{}, psi_part{};
        map<kDType, !kCareful>(s, t, now, begin, std::min(n, begin + kBlock),
                               [&](std::int64_t place, int lanes, Floats zs, Floats zt) __attribute__((always_inline)) {
            const Point at = point<kCareful>(f, zs, zt);
            const Slope value = Kind::template at<kCareful>(at.p, at.q, at.d, f.beta);
            phi_part += keep_lanes(value.phi, lanes, 0);
            if constexpr (Kind::kBalanced) return f.add_hard(value.psi * f.soft, zs, at.p);
            psi_part += keep_lanes(value.psi, lanes, 0);
            if (g) put<DType::f32>(psi + place, value.psi, lanes);
            return zs;
        });
        divergence += sum(phi_part);
        psi_sum += sum(psi_part);
    }
    if (!g) return divergence;
    const float total = Kind::kBalanced ? 0 : static_cast<float>(psi_sum);
    if constexpr (!Kind::kBalanced)
        map<kDType, !kCareful>(s, s, g, 0, n,
                               [&](std::int64_t place, int lanes, Floats z, Floats) __attribute__((always_inline)) {
            const Floats p = f.student.term(z) * f.p_scale;
            return f.add_hard((get<DType::f32>(psi + place, lanes) - p * total) * f.soft, z, p);
        });
    if (f.label >= 0) {
        const Point at = point<kCareful>(f, all(s_label), all(t_label));
        const Floats soft = Kind::template at<kCareful>(at.p, at.q, at.d, f.beta).psi - at.p * total;
        put_element<kDType>(g, f.label, f.add_hard(soft * f.soft, all(s_label), at.p)[0] - f.ce);
    }
    return divergence;
}

// The gradient alone, of the forward KL.  It computes on what is in cache, and so has time to fetch the next row.
template <DType kDType>
void forward_kl_slope(const Frame& frame, const Element<kDType>* s, const Element<kDType>* t, std::int64_t n,
                      Element<kDType>* g) {
    const Frame f = frame;
    const std::int64_t ahead = leaves_room<kDType>(n) ? f.next : 0;
    const float p_share = f.soft * f.p_scale, q_share = -f.soft * f.q_scale;
    const auto slope = [&](Floats zs, Floats zt) __attribute__((always_inline)) {
        const Floats term = f.student.term(zs);
        return f.add_hard(fma(term, p_share, f.teacher.term(zt) * q_share), zs, term * f.p_scale);
    };
    const float of_label =
        f.label < 0 ? 0 : slope(all(element<kDType>(s, f.label)), all(element<kDType>(t, f.label)))[0] - f.ce;
    map<kDType, true>(s, t, g, 0, n, [&](std::int64_t place, int, Floats zs, Floats zt) __attribute__((always_inline)) {
        if (ahead) {
            __builtin_prefetch(s + place + ahead, 0, 2);
            __builtin_prefetch(t + place + f.next_teacher, 0, 2);
        }
        return slope(zs, zt);
    });
    if (f.label >= 0) put_element<kDType>(g, f.label, of_label);
}

// The gradient where the divergence has no share.
template <DType kDType>
void hard_row(const Frame& frame, const Element<kDType>* s, std::int64_t n, Element<kDType>* g) {
    const Frame f = frame;
    const float share = f.hard_scale * f.ce;
    const float of_label = f.hard.term(all(element<kDType>(s, f.label)))[0] * share - f.ce;
    map<kDType, true>(s, s, g, 0, n, [&](std::int64_t, int, Floats z, Floats) __attribute__((always_inline)) {
        return f.hard.term(z) * share;
    });
    put_element<kDType>(g, f.label, of_label);
}

template <bool kCareful, class Run>
double for_kind(Kind kind, const Run& run) {
    switch (kind) {
#define FEDDISTILL_KIND(name) \
    case Kind::name: return run.template operator()<Functions<Kind::name>, kCareful>();
        FEDDISTILL_KINDS(FEDDISTILL_KIND)
#undef FEDDISTILL_KIND
    }
    std::abort();  // distillation_cpu has checked the kind
}

// ---- One row

struct Outcome {
    double loss = 0;
    Refusal::Reason refused = Refusal::none;
};

Kind kind_of(const Distillation& task) {
    if (task.kind != Kind::jsd) return task.kind;
    return task.beta == 0 ? Kind::forward_kl : task.beta == 1 ? Kind::reverse_kl : Kind::jsd;
}

float factor_of(const Distillation& task) { return static_cast<float>(1 / (task.temperature * kLn2)); }

template <DType kDType>
Outcome dense(const Distillation& task, Frame f, const Element<kDType>* s, const Element<kDType>* t,
              Element<kDType>* g, float* psi) {
    constexpr double kDigitsLeft = 1.0 / 16;  // of a KL in nats, taken as a plain sum
    const std::int64_t n = task.vocab;
    const float factor = factor_of(task);
    const bool soft = task.kd != 0, hard = f.label >= 0;
    const Kind kind = kind_of(task);
    bool careful = false;
    double divergence = kNaN;
    if (soft) {
        if (kind == Kind::forward_kl) {
            const Pair both = normalise_both<kDType>(s, t, n, factor, leaves_room<kDType>(n) ? g : nullptr);
            f.student = both.student, f.teacher = both.teacher;
            divergence = both.plain();
            careful = !std::isfinite(both.cross);
        } else {
            f.student = normalise_row<kDType, true>(s, n, factor);
            f.teacher = normalise_row<kDType, true>(t, n, factor);
            careful = std::isnan(f.student.sum + f.teacher.sum);
        }
        if (careful) {
            f.student = normalise_row<kDType, false>(s, n, factor);
            if (f.student.empty()) return {0, Refusal::empty_student};
            f.teacher = normalise_row<kDType, false>(t, n, factor);
            if (f.teacher.empty()) return {0, Refusal::empty_teacher};
        }
        f.p_scale = f.student.scale();
        f.q_scale = f.teacher.scale();
        f.shift = static_cast<float>(f.student.log2_sum() - f.teacher.log2_sum());
    }
    double cost = 0;
    if (hard) {
        f.hard = soft && !f.second ? f.student : normalise_row<kDType, false>(s, n, kLog2e);
        if (f.hard.empty()) return {0, Refusal::empty_student};
        f.hard_scale = f.hard.scale();
        cost += task.ce * f.hard.cost(element<kDType>(s, f.label));
    }
    if ((soft && std::isnan(f.student.sum + f.teacher.sum)) || (hard && std::isnan(f.hard.sum))) {
        if (g) fill<kDType>(g, 0, n, kNaN);
        return {kNaN};
    }
    if (soft && !careful && divergence > kDigitsLeft) {
        cost += task.kd * divergence;
        if (g) forward_kl_slope<kDType>(f, s, t, n, g);
    } else if (soft) {
        const auto run = [&]<class Kind, bool kCareful>() {
            return dense_row<kDType, Kind, kCareful>(f, s, t, n, g, psi);
        };
        cost += task.kd * (careful ? for_kind<true>(kind, run) : for_kind<false>(kind, run));
    } else if (g && hard) {
        hard_row<kDType>(f, s, n, g);
    } else if (g) {
        fill<kDType>(g, 0, n, 0);
    }
    return {cost};
}

// A truncated teacher's up to K + 1 events, the tail last: the student's logits of the kept, natural logarithms.
struct Events {
    std::int64_t count;
    float *z, *p, *q, *d, *psi, *block;
    std::int32_t *ids, *order;  // as they are given, and ascending
};

bool ascend(const std::int32_t* ids, std::int64_t n) {
    for (std::int64_t k = 1; k < n; ++k)
        if (ids[k - 1] >= ids[k]) return false;
    return true;
}

template <class Kind>
double divergence_of(const Events& e, float beta) {
    double divergence = 0;
    over<DType::f32>(e.p, 0, e.count, [&](std::int64_t j, int lanes, Floats p) {
        const Slope value =
            Kind::template at<true>(p, get<DType::f32>(e.q + j, lanes), get<DType::f32>(e.d + j, lanes), beta);
        divergence += sum(keep_lanes(value.phi, lanes, 0));
        put<DType::f32>(e.psi + j, value.psi, lanes);
    });
    return divergence;
}

template <DType kDType>
Outcome truncated(const Distillation& task, Frame f, const Element<kDType>* s, const std::int32_t* ids, float* b,
                  float b_tail, Element<kDType>* g, Events e) {
    const std::int64_t n = task.vocab;
    std::int64_t kept = 0;
    for (std::int64_t k = 0; k < task.kept; ++k) {
        const std::int32_t id = ids[k];
        if (id == kNoId) continue;
        if (id < 0 || id >= n) return {0, Refusal::ids};
        e.ids[kept] = e.order[kept] = id;
        e.z[kept] = element<kDType>(s, id);
        b[kept++] = b[k];
    }
    e.count = kept + 1;
    if (!ascend(e.order, kept)) {
        std::sort(e.order, e.order + kept);
        if (!ascend(e.order, kept)) return {0, Refusal::ids};  // one is there twice
    }

    const float factor = factor_of(task);
    const Normaliser top = normalise_row<DType::f32, false>(e.z, kept, factor);
    const Normaliser tail = normalise_others<kDType>(s, n, factor, e.order, kept, e.block);
    const double log2_tail = tail.log2(), log2_all = log2_add(top.log2(), log2_tail);
    if (top.empty() && tail.empty()) return {0, Refusal::empty_student};

    const auto event = [&](std::int64_t k, double a, float log_q) {
        e.p[k] = static_cast<float>(a), e.q[k] = log_q;
        e.d[k] = a == -kInf && log_q == -kInf ? 0 : static_cast<float>(log_q - a);
    };
    for (std::int64_t k = 0; k < kept; ++k)
        event(k, (double{e.z[k]} * factor - log2_all) * kLn2, b[k]);
    event(kept, (log2_tail - log2_all) * kLn2, b_tail);
    for (float* log : {e.p, e.q})
        over<DType::f32>(log, 0, e.count, [&](std::int64_t j, int lanes, Floats x) { put<DType::f32>(log + j, exp(x), lanes); });

    double cost = task.kd * for_kind<true>(kind_of(task), [&]<class Kind, bool>() { return divergence_of<Kind>(e, f.beta); });
    if (f.label >= 0) {
        f.hard = f.second ? normalise_row<kDType, false>(s, n, kLog2e) : Normaliser::of(factor, log2_all);
        f.hard_scale = f.hard.scale();
        cost += task.ce * f.hard.cost(element<kDType>(s, f.label));
    }
    if (std::isnan(cost)) {  // some kinds' slopes of NaN are not NaN
        if (g) fill<kDType>(g, 0, n, kNaN);
        return {cost};
    }
    if (!g) return {cost};

    double psi_sum = 0;
    for (std::int64_t k = 0; k < e.count; ++k) psi_sum += e.psi[k];
    // Within the tail p_u = P r_u, so the slope psi r_u - p_u sum(psi) is a multiple of r_u.
    const double within = tail.empty() ? 0 : (e.psi[kept] - e.p[kept] * psi_sum) / tail.sum;
    const float share = static_cast<float>(within * f.soft);
    const float tail_scale = tail.empty() ? 0 : static_cast<float>(std::exp2(log2_tail - log2_all) / tail.sum);
    Normaliser within_tail = tail;
    if (tail.empty()) within_tail.offset = top.offset;  // of nothing: 0 times what is finite
    const auto slope = [&](Floats z) __attribute__((always_inline)) {
        const Floats term = exp2(within_tail.exponent(z));
        return f.add_hard(term * share, z, term * tail_scale);
    };
    const float of_label = f.label < 0 ? 0 : slope(all(element<kDType>(s, f.label)))[0] - f.ce;
    map<kDType, false>(s, s, g, 0, n,
                       [&](std::int64_t, int, Floats z, Floats) __attribute__((always_inline)) { return slope(z); });
    if (f.label >= 0) put_element<kDType>(g, f.label, of_label);
    for (std::int64_t k = 0; k < kept; ++k) {
        double slope = f.soft * (e.psi[k] - e.p[k] * psi_sum);
        if (f.ce != 0) {
            const double p = f.hard.term(all(e.z[k]))[0] * double{f.hard_scale};
            slope += f.ce * (p - (e.ids[k] == f.label));
        }
        put_element<kDType>(g, e.ids[k], static_cast<float>(slope));
    }
    return {cost};
}

template <DType kDType>
Outcome one_row(const Distillation& task, const Frame& f, std::int64_t row, float* scratch) {
    auto* const s = row_of<kDType>(task.student, row);
    auto* const g = row_of<kDType>(task.gradient, row);
    const std::int64_t n = task.vocab;
    if (task.ids.at && task.kd != 0) {
        const std::int64_t count = task.kept + 1, room = count + kLanes;
        float* at = scratch;
        const auto take = [&](std::int64_t size) { return (at += size) - size; };
        float* const b = take(room);
        Events e{count, take(room), take(room), take(room), take(room), take(room), take(kBlock), nullptr, nullptr};
        e.ids = reinterpret_cast<std::int32_t*>(take(room));
        e.order = reinterpret_cast<std::int32_t*>(take(room));
        widen(task.teacher, row, task.kept, b);
        float b_tail = 0;
        widen(task.log_tail, row, 1, &b_tail);
        const auto* const ids = static_cast<std::int32_t*>(task.ids.at) + row * task.ids.stride;
        return truncated<kDType>(task, f, s, ids, b, b_tail, g, e);
    }
    if (task.kd == 0 || task.teacher.dtype == kDType)
        return dense<kDType>(task, f, s, task.kd == 0 ? nullptr : row_of<kDType>(task.teacher, row), g, scratch);
    float *const wide_s = scratch + n, *const wide_t = wide_s + n, *const wide_g = wide_t + n;
    widen(task.student, row, n, wide_s);
    widen(task.teacher, row, n, wide_t);
    const Outcome outcome = dense<DType::f32>(task, f, wide_s, wide_t, g ? wide_g : nullptr, scratch);
    if (g)
        over<DType::f32>(wide_g, 0, n, [&](std::int64_t j, int lanes, Floats v) { put<kDType>(g + j, v, lanes); });
    return outcome;
}

}  // namespace

Refusal::Reason distillation_row(const Distillation& task, std::int64_t row, float* scratch) {
    return with_dtype(task.student.dtype, [&]<DType kDType>() {
        auto* const g = row_of<kDType>(task.gradient, row);
        const float scale = task.scale[row];
        if (g) fill<kDType>(g, scale == 0 ? 0 : task.vocab, task.width, 0);
        task.loss[row] = 0;
        if (scale == 0) return Refusal::none;
        Frame f{};
        f.soft = static_cast<float>(scale * task.kd / task.temperature);
        f.second = task.temperature != 1;
        f.beta = static_cast<float>(task.beta);
        f.label = -1;
        f.next = row + 1 < task.rows ? task.student.stride : 0;
        f.next_teacher = task.teacher.stride;
        if (task.ce != 0 && task.labels) {
            f.label = task.labels[row];
            if (f.label < 0 || f.label >= task.vocab) return Refusal::label;
            f.ce = static_cast<float>(scale * task.ce);
        }
        const Outcome outcome = one_row<kDType>(task, f, row, scratch);
        task.loss[row] = static_cast<float>(scale * outcome.loss);
        return outcome.refused;
    });
}

void scale_span(const void* from, std::int64_t begin, std::int64_t end, DType dtype, float factor, void* to) {
    with_dtype(dtype, [&]<DType kDType>() {
        auto* const out = static_cast<Element<kDType>*>(to);
        over<kDType>(static_cast<const Element<kDType>*>(from), begin, end,
                     [&](std::int64_t j, int lanes, Floats v) { put<kDType>(out + j, v * factor, lanes); });
    });
}

}  // namespace feddistill::FEDDISTILL_ISA
