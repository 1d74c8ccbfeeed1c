// A cluster of blocks a row: each block has a slice of both rows in its shared memory, so that each logit is read
// once, whatever the kind; and the gradient is written once.  Where a slice does not fit it is read again.
//
// A thread comes back to the columns that it copied, so only sums need barriers: the normalisers, and for a kind
// whose psi does not add to 0 the sums of phi and psi.  These are sums of the plain formulas where they have digits
// to spare, which few rows lack: 15 to 20 instructions a logit instead of 50 to 90.
#include "../distillation.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.h"
#include "kinds.h"

namespace feddistill {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;  // to a multiprocessor: so many registers are left to each
constexpr int kWordBits = 32;
constexpr int kFirstBit = 8;   // of the first pack's; those before it have the others
constexpr float kRoom = 26;    // binary digits that a term may be above its sum's base
constexpr int kSingle = -1;
constexpr float kPlain = 1.0f / 16;  // nats from which on the plain sum has digits to spare

enum class Mode { forward, general, truncated };

struct Task {
    const void *student, *teacher, *ids, *log_tail;
    const std::int64_t* labels;
    const float* scale;
    void* gradient;
    float* loss;
    std::int64_t student_stride, teacher_stride, ids_stride, gradient_stride;
    int vocab, width, kept, slice;
    DType teacher_dtype, tail_dtype;
    bool staged;
    Kind kind;
    float beta, binary, inverse, kd, ce, kd_slope;  // binary: log2(e) / T; inverse: 1 / T
};

// What a slice knows, and then the row.
struct Statistics {
    float s_base, s_sum, s_one;  // sum of exp((z - base) / T), and of exp(z - base) for the labels
    float t_base, t_sum;
    float cross;    // sum of exp((t - t_base) / T) (t - z)
    float rest;     // of s_sum, what the teacher does not keep
    float label;    // the label's logit
    float ruled_out;  // 1 where the student rules out what the teacher does not
};
constexpr int kNumbers = sizeof(Statistics) / sizeof(float);

struct Sums {
    float phi, psi, psi_tail;
};
struct Slots {
    Statistics statistics;
    Sums sums[2];  // of the plain formulas, and of the exact ones: a block may be at these while another reads those
};
constexpr int kSlotBytes = 64;
static_assert(sizeof(Slots) <= kSlotBytes);

// A sum of exp2((x - base) c), whose base is raised where terms outgrow it.
struct Online {
    float base = 0, limit = -kInfinity;

    // What the sums so far are to be multiplied by, c being the largest factor in use.
    __device__ bool outgrown(float top) const { return top > limit; }
    __device__ float raise(float top, float c) {
        const float old = base;
        base = top;
        limit = top + kRoom / c;
        return old - top;
    }
    __device__ float seen() const { return limit == -kInfinity ? -kInfinity : base; }
};

__device__ inline float rescaled(float sum, float distance, float c) {
    return sum == 0 ? 0 : sum * exp2_fast(distance * c);
}

template <DType kDType, Mode kMode>
class Row {
    static constexpr int kLane = kLanes<kDType>;
    using Element = Storage<kDType>;
    static constexpr bool kDense = kMode != Mode::truncated;

  public:
    __device__ Row(const Task& task, std::int64_t row, unsigned char* memory) : task_(task), row_(row), memory_(memory) {
        student_ = static_cast<const Element*>(task.student) + row * task.student_stride;
        gradient_ = static_cast<Element*>(task.gradient) + row * task.gradient_stride;
        const int rank = cluster_rank(), head = min(task.vocab, elements_to_alignment(student_));
        first_ = min(task.vocab, head + rank * task.slice);
        begin_ = rank == 0 ? 0 : first_;
        end_ = rank == cluster_size() - 1 ? task.vocab : min(task.vocab, first_ + task.slice);
        packs_ = (end_ - first_) / kLane;
        singles_ = (first_ - begin_) + (end_ - first_ - packs_ * kLane);
        const auto size = static_cast<int>(sizeof(Element));
        teacher_ = static_cast<const unsigned char*>(task.teacher) +
                   row * task.teacher_stride * size_of(task.teacher_dtype);
        paired_ = kDense && task.kd != 0 && task.teacher_dtype == kDType &&
                  elements_to_alignment(reinterpret_cast<const Element*>(teacher_) + first_) == 0;
        writes_packs_ = task.gradient && elements_to_alignment(gradient_ + first_) == 0;
        const int slice_bytes = (task.slice + kLane) * size;
        staged_student_ = memory + kSlotBytes;
        staged_teacher_ = staged_student_ + (task.staged ? slice_bytes : 0);
        bits_ = reinterpret_cast<unsigned*>(staged_student_ + (task.staged ? slice_bytes : 0));
        kept_ = reinterpret_cast<float*>(bits_ + words());
        label_ = task.labels ? task.labels[row] : -1;
    }

    __device__ void run() {
        const float weight = task_.scale[row_];
        if (weight == 0) return skip();
        stage();
        if constexpr (!kDense) mark();
        if (threadIdx.x == 0) own().statistics.label = has_label() ? to_float<kDType>(student_[label_]) : -kInfinity;
        copies_arrived();
        sum_up();
        float value = 0, psi = 0, tail_slope = 0;
        bool plain = false;
        if constexpr (kMode == Mode::forward) {
            value = plain_sum();
            plain = value >= kPlain;
        } else if constexpr (kMode == Mode::general) {
            exchange_sums<Plain>(0, value, psi, tail_slope);
            plain = has_choice() && value >= kPlain && value < kInfinity;
        }
        if (kMode == Mode::forward && !plain && task_.gradient) {
            // The last sweep: only the loss needs its sum.
            value = slopes<Exact, true>(weight, 0, 0);
            own_sum(value);
        } else {
            if (!plain) exchange_sums<Exact>(1, value, psi, tail_slope);
            if (task_.gradient) {
                if constexpr (kMode == Mode::general) {
                    if (plain) slopes<Plain, false>(weight, psi, tail_slope);
                }
                if (kMode != Mode::general || !plain) slopes<Exact, false>(weight, psi, tail_slope);
            }
        }
        finish(weight, value);
    }

  private:
    __device__ Slots& own() const { return *reinterpret_cast<Slots*>(memory_); }
    __device__ int words() const { return kDense ? 0 : (task_.slice + 3 * kFirstBit) / kWordBits + 1; }
    __device__ bool has_label() const { return label_ >= begin_ && label_ < end_; }
    __device__ bool label_is_wrong() const { return task_.labels && (label_ < 0 || label_ >= task_.vocab); }

    __device__ void skip() {
        if (task_.gradient) {
            for (int i = begin_ + static_cast<int>(threadIdx.x); i < end_; i += kThreads)
                gradient_[i] = from_float<kDType>(0);
            pad();
        }
        if (cluster_rank() == 0 && threadIdx.x == 0) task_.loss[row_] = 0;
    }

    __device__ void pad() {
        if (cluster_rank() == 0)
            for (int i = task_.vocab + static_cast<int>(threadIdx.x); i < task_.width; i += kThreads)
                gradient_[i] = from_float<kDType>(0);
    }

    __device__ void stage() {
        if (!task_.staged) return;
        for (int i = threadIdx.x; i < packs_; i += kThreads) {
            copy_async(staged_student_ + i * kPackBytes, student_ + first_ + i * kLane);
            if (kDense && paired_)
                copy_async(staged_teacher_ + i * kPackBytes,
                           reinterpret_cast<const Element*>(teacher_) + first_ + i * kLane);
        }
    }

    // The ids that the teacher keeps in this slice.
    __device__ void mark() {
        for (int i = threadIdx.x; i < words(); i += kThreads) bits_[i] = 0;
        barrier();
        const auto* const ids = static_cast<const std::int32_t*>(task_.ids) + row_ * task_.ids_stride;
        bool outside = false;
        for (int k = threadIdx.x; k < task_.kept; k += kThreads) {
            const int id = ids[k];
            outside |= id < kNoId || id >= task_.vocab;
            if (id < begin_ || id >= end_) continue;
            const int bit = id - first_ + kFirstBit;
            atomic_or(&bits_[bit / kWordBits], 1u << bit % kWordBits);
            kept_[k] = to_float<kDType>(student_[id]);
        }
        id_is_wrong_ = barrier_or(outside);
    }

    // Calls use(z, column, bits, pack) for each of this thread's packs, and, with one logit and pack kSingle, for each
    // single column.
    template <typename Use>
    __device__ void each(Use use) const {
        for (int i = threadIdx.x; i < packs_; i += kThreads) {
            const int column = first_ + i * kLane;
            float z[kLane];
            unpack<kDType>(task_.staged ? load_pack(staged_student_ + i * kPackBytes) : load_pack(student_ + column), z);
            use(z, column, kept_from(column), i);
        }
        for (int i = threadIdx.x; i < singles_; i += kThreads) {
            const int before = first_ - begin_;
            const int column = i < before ? begin_ + i : first_ + packs_ * kLane + i - before;
            const float z[1] = {to_float<kDType>(student_[column])};
            use(z, column, kept_from(column), kSingle);
        }
    }

    // A bit for each column from this one to its pack's last: whether the teacher keeps it.
    __device__ unsigned kept_from(int column) const {
        if constexpr (kDense) return 0;
        const int bit = column - first_ + kFirstBit;
        return bits_[bit / kWordBits] >> bit % kWordBits;
    }

    // The teacher's logits beside them.
    template <int kCount>
    __device__ void load_teacher(float (&t)[kCount], int column, int pack) const {
        if constexpr (kCount == kLane) {
            if (paired_) {
                unpack<kDType>(task_.staged ? load_pack(staged_teacher_ + pack * kPackBytes)
                                            : load_pack(reinterpret_cast<const Element*>(teacher_) + column),
                               t);
                return;
            }
        }
#pragma unroll
        for (int e = 0; e < kCount; ++e) t[e] = load_as(teacher_, column + e, task_.teacher_dtype);
    }

    template <int kCount>
    __device__ static float largest(const float (&x)[kCount]) {
        float top = x[0];
#pragma unroll
        for (int e = 1; e < kCount; ++e) top = fmaxf(top, x[e]);
        return top;
    }

    // The row's statistics, in every thread.
    __device__ void sum_up() {
        const bool warm = task_.inverse != 1, has_labels = task_.ce != 0, distils = task_.kd != 0;
        const float most = fmaxf(task_.binary, has_labels ? kLog2e : 0);
        Online s, t;
        Statistics mine{};
        each([&]<int kCount>(const float(&z)[kCount], int column, unsigned kept, int pack) {
            const float top = largest(z);
            if (s.outgrown(top)) {
                const float moved = s.raise(top, most);
                mine.s_sum = rescaled(mine.s_sum, moved, task_.binary);
                mine.s_one = rescaled(mine.s_one, moved, kLog2e);
                mine.rest = rescaled(mine.rest, moved, task_.binary);
            }
            float x[kCount], sum = 0;
#pragma unroll
            for (int e = 0; e < kCount; ++e) sum += x[e] = exp2_fast((z[e] - s.base) * task_.binary);
            mine.s_sum += sum;
            if constexpr (!kDense) {
                if (kept % (1u << kCount) != 0) {
                    sum = 0;
#pragma unroll
                    for (int e = 0; e < kCount; ++e) sum += kept >> e & 1 ? 0 : x[e];
                }
                mine.rest += sum;
            }
            if (has_labels && warm)
#pragma unroll
                for (int e = 0; e < kCount; ++e) mine.s_one += exp2_fast((z[e] - s.base) * kLog2e);
            if (!kDense || !distils) return;
            float y[kCount];
            load_teacher(y, column, pack);
            const float above = largest(y);
            if (t.outgrown(above)) {
                const float moved = t.raise(above, task_.binary);
                mine.t_sum = rescaled(mine.t_sum, moved, task_.binary);
                mine.cross = rescaled(mine.cross, moved, task_.binary);
            }
            sum = 0;
#pragma unroll
            for (int e = 0; e < kCount; ++e) sum += x[e] = exp2_fast((y[e] - t.base) * task_.binary);
            mine.t_sum += sum;
            if constexpr (kMode == Mode::forward) {
                float d[kCount], all = 0;
#pragma unroll
                for (int e = 0; e < kCount; ++e) all += d[e] = y[e] - z[e];
                if (!(fabsf(all) < kInfinity)) {
                    // Finite, for 0 times infinity is NaN; NaN of two that are ruled out becomes a number too.
                    constexpr float kMost = 0x1p126f;
#pragma unroll
                    for (int e = 0; e < kCount; ++e) {
                        if (d[e] == kInfinity) mine.ruled_out = 1;
                        d[e] = fminf(fmaxf(d[e], -kMost), kMost);
                    }
                }
#pragma unroll
                for (int e = 0; e < kCount; ++e) mine.cross += x[e] * d[e];
            }
        });
        if (!warm) mine.s_one = mine.s_sum;
        combine(mine, s.seen(), t.seen());
    }

    // Combines the statistics of the threads, then of the blocks.
    __device__ void combine(Statistics& mine, float s_seen, float t_seen) {
        float* const parts = block_scratch<float>();
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        float* const of_warp = parts + warp * kNumbers;
        Statistics warps = fold(mine, s_seen, t_seen);
        if (lane() == 0) write(of_warp, warps);
        barrier();
        if (warp == 0) {
            Statistics slice{};
            slice.s_base = slice.t_base = -kInfinity;
            if (lane() < kThreads / kWarp) slice = read(parts + lane() * kNumbers);
            slice = fold(slice, slice.s_base, slice.t_base);
            slice.label = own().statistics.label;
            if (lane() == 0) own().statistics = slice;
        }
        cluster_barrier();
        if (warp == 0) {
            Statistics all{};
            all.s_base = all.t_base = all.label = -kInfinity;
            if (lane() < cluster_size()) all = in_block(&own(), lane())->statistics;
            all.label = warp_max(all.label);
            all = fold(all, all.s_base, all.t_base);
            if (lane() == 0) write(parts, all);
        }
        barrier();
        row_statistics_ = read(parts);
        log_s_ = logf(row_statistics_.s_sum);
        log_t_ = logf(row_statistics_.t_sum);
        bits_s_ = log2f(row_statistics_.s_sum);
        bits_t_ = log2f(row_statistics_.t_sum);
    }

    __device__ static void write(float* to, const Statistics& x) { *reinterpret_cast<Statistics*>(to) = x; }
    __device__ static Statistics read(const float* from) { return *reinterpret_cast<const Statistics*>(from); }

    // The warp's, with one base; `label` stays.
    __device__ Statistics fold(Statistics x, float s_seen, float t_seen) const {
        const float s_top = warp_max(s_seen), t_top = warp_max(t_seen), c = task_.binary;
        const float s_moved = s_seen == -kInfinity ? 0 : s_seen - s_top, t_moved = t_seen == -kInfinity ? 0 : t_seen - t_top;
        x.s_base = s_top;
        x.t_base = t_top;
        x.s_sum = warp_sum(rescaled(x.s_sum, s_moved, c));
        x.s_one = warp_sum(rescaled(x.s_one, s_moved, kLog2e));
        x.rest = warp_sum(rescaled(x.rest, s_moved, c));
        x.t_sum = warp_sum(rescaled(x.t_sum, t_moved, c));
        x.cross = warp_sum(rescaled(x.cross, t_moved, c));
        x.ruled_out = warp_max(x.ruled_out);
        return x;
    }

    // Something is left to choose from, and nothing is NaN.
    __device__ bool has_choice() const { return row_statistics_.s_sum > 0 && row_statistics_.t_sum > 0; }

    __device__ float plain_sum() const {
        const Statistics& x = row_statistics_;
        if (task_.kd == 0) return kPlain;
        if (!has_choice()) return kNaN;
        if (x.ruled_out != 0) return kInfinity;
        const float shift = x.t_base - x.s_base;
        return (x.cross / x.t_sum - shift) * task_.inverse - (log_t_ - log_s_);
    }

    // z and t less their bases.
    __device__ Pair pair(float z, float t) const {
        const bool neither = z == -kInfinity && t == -kInfinity;
        return {fmaf(z, task_.binary, -bits_s_), fmaf(t, task_.binary, -bits_t_),
                neither ? 0 : (t - z) * task_.inverse - (log_t_ - log_s_)};
    }
    template <typename Functions>
    __device__ Slope slope_of(Functions, float z, float t, float& p) const {
        const Pair x = pair(z - row_statistics_.s_base, t - row_statistics_.t_base);
        p = exp2_fast(x.a);
        return Functions::at(p, exp2_fast(x.b), x, task_.beta);
    }
    // What the student gives a logit.
    __device__ float share(float z) const {
        return exp2_fast(fmaf(z - row_statistics_.s_base, task_.binary, -bits_s_));
    }

    // Sums of phi and psi over the row, by way of the given slot.
    template <template <Kind> typename Functions>
    __device__ void exchange_sums(int slot, float& value, float& psi, float& tail_slope) {
        float phi_sum = 0, psi_sum = 0, psi_tail = 0;
        if constexpr (kDense) {
            with_kind<Functions>(kMode == Mode::forward ? Kind::forward_kl : task_.kind, [&](auto kind) {
                each([&]<int kCount>(const float(&z)[kCount], int column, unsigned, int pack) {
                    float t[kCount];
                    load_teacher(t, column, pack);
#pragma unroll
                    for (int e = 0; e < kCount; ++e) {
                        float p;
                        const Slope s = slope_of(kind, z[e], t[e], p);
                        phi_sum += s.phi;
                        psi_sum += s.psi;
                    }
                });
                phi_sum *= kind.kUnit;
                psi_sum *= kind.kUnit;
            });
        } else {
            with_kind<Functions>(task_.kind, [&](auto kind) {
                for (int k = threadIdx.x; k <= task_.kept; k += kThreads) {
                    const bool is_tail = k == task_.kept;
                    if (is_tail ? cluster_rank() != 0 : !keeps(k)) continue;
                    const Slope s = event(kind, k);
                    phi_sum += s.phi;
                    psi_sum += s.psi;
                    if (is_tail) psi_tail = s.psi;
                }
            });
        }
        float* const parts = block_scratch<float>();
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        float sums[3] = {warp_sum(phi_sum), warp_sum(psi_sum), warp_sum(psi_tail)};
        barrier();
        if (lane() == 0)
            for (int i = 0; i < 3; ++i) parts[3 * warp + i] = sums[i];
        barrier();
        if (threadIdx.x == 0) {
            float totals[3] = {};
            for (int w = 0; w < kThreads / kWarp; ++w)
                for (int i = 0; i < 3; ++i) totals[i] += parts[3 * w + i];
            own().sums[slot] = {totals[0], totals[1], totals[2]};
        }
        cluster_barrier();
        if (warp == 0) {
            const Sums* const other = lane() < cluster_size() ? &in_block(&own(), lane())->sums[slot] : nullptr;
            const float phi = warp_sum(other ? other->phi : 0), all = warp_sum(other ? other->psi : 0);
            const float tail = warp_sum(other ? other->psi_tail : 0);
            if (lane() == 0) parts[0] = phi, parts[1] = all, parts[2] = tail;
        }
        barrier();
        const float totals[3] = {parts[0], parts[1], parts[2]};
        value = id_is_wrong_ ? kNaN : totals[0];
        psi = id_is_wrong_ ? kNaN : totals[1];
        if constexpr (!kDense) {
            // An entry of the tail has dz = psi_tail r - p sum(psi) with r = p s_sum / rest
            const Statistics& x = row_statistics_;
            tail_slope = (x.rest == 0 ? 0 : totals[2] * (x.s_sum / x.rest)) - psi;
        }
    }

    __device__ int id_of(int k) const {
        return static_cast<const std::int32_t*>(task_.ids)[row_ * task_.ids_stride + k];
    }
    __device__ bool keeps(int k) const { return id_of(k) >= begin_ && id_of(k) < end_; }

    // phi and psi of the k-th kept id, or of all that are not kept.
    template <typename KindAt>
    __device__ Slope event(KindAt kind, int k) const {
        const Statistics& x = row_statistics_;
        float a, b, p;
        if (k == task_.kept) {
            a = logf(x.rest) - log_s_;  // in logs, for a mass that rounds to 0 may be none
            b = load_as(task_.log_tail, row_, task_.tail_dtype);
            p = x.rest / x.s_sum;
        } else {
            const float z = kept_[k] - x.s_base;
            a = z * task_.inverse - log_s_;
            b = load_as(teacher_, k, task_.teacher_dtype);
            p = share(kept_[k]);
        }
        const float d = a == -kInfinity && b == -kInfinity ? 0 : b - a;
        return kind.at(p, exp2_fast(b * kLog2e), {0, 0, d}, task_.beta);
    }

    // Write the gradient of the slice; of forward KL, with kPhi, return this thread's sum of phi.
    template <template <Kind> typename Functions, bool kPhi>
    __device__ float slopes(float weight, float psi_sum, float tail_slope) {
        const Statistics& row = row_statistics_;
        const float kd = weight * task_.kd_slope, ce = weight * task_.ce, tail = kd * tail_slope;
        const float bits_one = label_is_wrong() ? kNaN : log2f(row.s_one);
        const int label = label_is_wrong() ? -1 : static_cast<int>(label_);
        float phi_sum = 0;
        if constexpr (!kDense) keep_slopes(kd, ce, psi_sum, bits_one);
        const auto sweep = [&](auto kind) {
            each([&]<int kCount>(const float(&z)[kCount], int column, unsigned, int pack) {
                float g[kCount] = {};
                [[maybe_unused]] float t[kCount];
                if (kMode != Mode::forward || task_.kd != 0) {
                    if constexpr (kDense) load_teacher(t, column, pack);
#pragma unroll
                    for (int e = 0; e < kCount; ++e) {
                        if constexpr (kMode == Mode::truncated) {
                            g[e] = tail * share(z[e]);
                        } else if constexpr (kMode == Mode::forward && !kPhi) {
                            const Pair x = pair(z[e] - row.s_base, t[e] - row.t_base);
                            g[e] = kd * (exp2_fast(x.a) - exp2_fast(x.b));
                        } else {
                            float p;
                            const Slope s = slope_of(kind, z[e], t[e], p);
                            phi_sum += s.phi;
                            g[e] = kd * fmaf(s.psi, kind.kUnit, -p * psi_sum);
                        }
                    }
                }
                if (task_.ce != 0)
#pragma unroll
                    for (int e = 0; e < kCount; ++e) {
                        const float p = exp2_fast(fmaf(z[e] - row.s_base, kLog2e, -bits_one));
                        g[e] += ce * (column + e == label ? p - 1 : p);
                    }
                if constexpr (kCount == kLane) {
                    if (writes_packs_) return store_pack(gradient_ + column, packed<kDType>(g));
                }
#pragma unroll
                for (int e = 0; e < kCount; ++e) gradient_[column + e] = from_float<kDType>(g[e]);
            });
        };
        if constexpr (kMode == Mode::general)
            with_kind<Functions>(task_.kind, sweep);
        else
            sweep(Functions<Kind::forward_kl>{});
        pad();
        if constexpr (!kDense) {
            barrier();  // over what the sweep wrote there
            for (int k = threadIdx.x; k < task_.kept; k += kThreads)
                if (keeps(k)) gradient_[id_of(k)] = from_float<kDType>(kept_[k]);
        }
        return phi_sum;
    }

    // The slopes of the kept ids take the place of their logits, before the sweep may write over these.
    __device__ void keep_slopes(float kd, float ce, float psi_sum, float bits_one) {
        with_kind<Exact>(task_.kind, [&](auto kind) {
            for (int k = threadIdx.x; k < task_.kept; k += kThreads) {
                if (!keeps(k)) continue;
                const float p = share(kept_[k]);
                float g = kd * (event(kind, k).psi - p * psi_sum);
                if (task_.ce != 0) {
                    const float one = exp2_fast(fmaf(kept_[k] - row_statistics_.s_base, kLog2e, -bits_one));
                    g += ce * (id_of(k) == label_ ? one - 1 : one);
                }
                kept_[k] = g;
            }
        });
        barrier();
    }

    // The sum over the cluster of what each thread has, in rank 0.
    __device__ void own_sum(float& value) {
        const float sum = block_sum(value);
        if (threadIdx.x == 0) own().sums[1].phi = sum;
        cluster_barrier();
        value = 0;
        if (cluster_rank() == 0 && threadIdx.x == 0)
            for (int rank = 0; rank < cluster_size(); ++rank) value += in_block(&own(), rank)->sums[1].phi;
    }

    __device__ void finish(float weight, float value) {
        cluster_arrive();
        if (cluster_rank() == 0 && threadIdx.x == 0) {
            const Statistics& x = row_statistics_;
            float cost = 0;
            if (task_.ce != 0) cost = label_is_wrong() ? kNaN : logf(x.s_one) - (x.label - x.s_base);
            if (task_.kd == 0) value = 0;
            task_.loss[row_] = weight * (task_.kd * value + task_.ce * cost);
        }
        cluster_wait();  // until no block reads this block's memory
    }

    const Task& task_;
    const std::int64_t row_;
    unsigned char* const memory_;
    const Element* student_;
    Element* gradient_;
    const unsigned char* teacher_;
    unsigned char *staged_student_, *staged_teacher_;
    unsigned* bits_;
    float* kept_;
    std::int64_t label_;
    int begin_, first_, end_, packs_, singles_;
    bool paired_, writes_packs_, id_is_wrong_ = false;
    Statistics row_statistics_;
    float log_s_, log_t_, bits_s_, bits_t_;  // of the sums: natural and binary
};

template <DType kDType, Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocks) distillation_kernel(const Task task) {
    const std::int64_t row = blockIdx.x / cluster_size();
    Row<kDType, kMode>(task, row, dynamic_shared<unsigned char>()).run();
}

template <DType kDType, Mode kMode>
void launch_rows(Task task, std::int64_t rows, void* stream) {
    constexpr int kLane = kLanes<kDType>, kBig = 1024;
    const Machine on = machine();
    const auto bytes = [&](int cluster, bool staged) {
        const std::int64_t slice = (task.vocab + std::int64_t{cluster} * kLane - 1) / (cluster * kLane) * kLane;
        std::int64_t sum = kSlotBytes;
        if (staged) sum += (slice + kLane) * static_cast<int>(sizeof(Storage<kDType>)) * (kMode == Mode::truncated ? 1 : 2);
        if (kMode == Mode::truncated) sum += ((slice + 3 * kFirstBit) / kWordBits + 1 + task.kept) * 4;
        return std::pair(sum, static_cast<int>(slice));
    };
    const int most = on.capability >= 90 ? 8 : 1, limit = on.shared_bytes - kScratchBytes;
    int cluster = 1;
    // In a multiprocessor's memory each block also takes the scratch, and a kilobyte that CUDA reserves.
    const int share = (on.shared_bytes + 1024) / kBlocks - 1024 - kScratchBytes;
    while (cluster < most && bytes(cluster, true).first > share) cluster *= 2;
    while (cluster < most && rows * cluster * 2 <= on.processors && task.vocab / cluster >= 2 * kBig) cluster *= 2;
    task.staged = bytes(cluster, true).first <= limit;
    const auto [shared, slice] = bytes(cluster, task.staged);
    if (shared > limit) throw std::invalid_argument("distillation_cuda: a teacher that keeps " + std::to_string(task.kept) + " ids a row");
    if (rows * cluster > INT32_MAX) throw std::invalid_argument("distillation_cuda: " + std::to_string(rows) + " rows");
    task.slice = slice;
    launch_clusters(distillation_kernel<kDType, kMode>, static_cast<int>(rows * cluster), kThreads, cluster,
                    static_cast<std::size_t>(shared), stream, task);
}

template <DType kDType>
void launch_mode(const Task& task, Mode mode, std::int64_t rows, void* stream) {
    switch (mode) {
        case Mode::forward: return launch_rows<kDType, Mode::forward>(task, rows, stream);
        case Mode::general: return launch_rows<kDType, Mode::general>(task, rows, stream);
        case Mode::truncated: return launch_rows<kDType, Mode::truncated>(task, rows, stream);
    }
}

template <DType kDType>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const Storage<kDType>* from, std::int64_t n, const float* factor, Storage<kDType>* to) {
    constexpr int kLane = kLanes<kDType>;
    const float by = *factor;
    const std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kLane;
    if (at >= n) return;
    if (at + kLane <= n && elements_to_alignment(from + at) == 0 && elements_to_alignment(to + at) == 0) {
        float x[kLane];
        unpack<kDType>(load_pack(from + at), x);
#pragma unroll
        for (float& each : x) each *= by;
        store_pack(to + at, packed<kDType>(x));
    } else {
        for (std::int64_t i = at; i < at + kLane && i < n; ++i)
            to[i] = from_float<kDType>(to_float<kDType>(from[i]) * by);
    }
}

template <DType kDType>
void launch_scale(const void* gradient, std::int64_t n, const float* factor, void* out, void* stream) {
    using Element = Storage<kDType>;
    const std::int64_t each = kThreads * kLanes<kDType>;
    launch(scale_kernel<kDType>, static_cast<int>((n + each - 1) / each), kThreads, 0, stream,
           static_cast<const Element*>(gradient), n, factor, static_cast<Element*>(out));
}

}  // namespace

void distillation_cuda(const Distillation& task, void* stream) {
    if (!is_known(task.kind))
        throw std::invalid_argument("distillation_cuda: no kind of divergence has number " +
                                    std::to_string(static_cast<int>(task.kind)));
    if (task.rows == 0) return;
    Kind kind = task.kind;
    if (kind == Kind::jsd && (task.beta == 0 || task.beta == 1))
        kind = task.beta == 0 ? Kind::forward_kl : Kind::reverse_kl;
    const bool is_truncated = task.ids.at != nullptr && task.kd != 0, has_labels = task.labels && task.ce != 0;
    Task given{};
    given.student = task.student.at;
    given.teacher = task.teacher.at;
    given.ids = task.ids.at;
    given.log_tail = task.log_tail.at;
    given.labels = has_labels ? task.labels : nullptr;
    given.scale = task.scale;
    given.gradient = task.gradient.at;
    given.loss = task.loss;
    given.student_stride = task.student.stride;
    given.teacher_stride = task.teacher.stride;
    given.ids_stride = task.ids.stride;
    given.gradient_stride = task.gradient.stride;
    given.vocab = static_cast<int>(task.vocab);
    given.width = static_cast<int>(task.width);
    given.kept = is_truncated ? static_cast<int>(task.kept) : 0;
    given.teacher_dtype = task.teacher.dtype;
    given.tail_dtype = task.log_tail.dtype;
    given.kind = kind;
    given.beta = static_cast<float>(task.beta);
    given.inverse = static_cast<float>(1 / task.temperature);
    given.binary = static_cast<float>(1 / (task.temperature * 0.6931471805599453));
    given.kd = static_cast<float>(task.kd);
    given.ce = has_labels ? static_cast<float>(task.ce) : 0;
    given.kd_slope = static_cast<float>(task.kd / task.temperature);
    const Mode mode = is_truncated ? Mode::truncated
                      : kind == Kind::forward_kl || task.kd == 0 ? Mode::forward
                                                                  : Mode::general;
    switch (task.student.dtype) {
        case DType::f32: return launch_mode<DType::f32>(given, mode, task.rows, stream);
        case DType::f16: return launch_mode<DType::f16>(given, mode, task.rows, stream);
        case DType::bf16: return launch_mode<DType::bf16>(given, mode, task.rows, stream);
    }
}

void scale_cuda(const void* gradient, std::int64_t n, DType dtype, const float* factor, void* out, void* stream) {
    if (n == 0) return;
    switch (dtype) {
        case DType::f32: return launch_scale<DType::f32>(gradient, n, factor, out, stream);
        case DType::f16: return launch_scale<DType::f16>(gradient, n, factor, out, stream);
        case DType::bf16: return launch_scale<DType::bf16>(gradient, n, factor, out, stream);
    }
}

}  // namespace feddistill
