// One block a row, and each logit is read once: what cannot be among the k largest is added to the tail as it passes,
// and the others wait in shared memory until they are pruned to the k largest of the row so far.  Which are kept does
// not hang on the order in which threads arrive; the last bits of the sums do.
#include "../topk.h"

#include <algorithm>
#include <bit>

#include "device.h"

namespace feddistill {
namespace {

using Word = std::uint64_t;  // a candidate: its logit's order above, its id's complement below

constexpr int kThreads = 256;
constexpr int kPacks = 4;                   // a thread's, in flight while as many others are looked at
constexpr int kDigit = 8, kBins = 1 << kDigit, kBinSets = 3;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLeastRoom = 1024;  // candidates; 8 KiB
static_assert(kBins == kThreads);

struct Task {
    const void* logits;
    std::int64_t stride;
    int vocab, k, room, id_bits;
    float factor;  // logits to binary logarithms
    bool id_order;
    std::int32_t* ids;
    float *log_probs, *log_tail;
};

struct Shared {
    int counts[2];  // candidates, before and after a pruning in turns
    int bins[kBinSets * kBins];
    float scratch[kWarps];
};

template <DType kDType>
class Row {
  public:
    static constexpr int kEach = kLanes<kDType>;         // logits to a pack
    static constexpr int kStep = kThreads * kPacks;                      // packs looked at together
    // The bits of a float that a logit of this type can have set.
    static constexpr int kKeyBits = kDType == DType::f32 ? 32 : kDType == DType::f16 ? 19 : 16;
    static constexpr int kBlocks = kDType == DType::f32 ? 2 : 3;  // to an SM: so many registers are left to each

    __device__ Row(const Task& task, Shared& shared, Word* candidates)
        : task_(task), shared_(shared), candidates_(candidates) {
        row_ = static_cast<const Storage<kDType>*>(task.logits) + blockIdx.x * task.stride;
    }

    __device__ void run() {
        for (int i = thread(); i < kBinSets * kBins; i += kThreads) shared_.bins[i] = 0;
        if (thread() < 2) shared_.counts[thread()] = 0;
        barrier();
        read();
        finish();
    }

  private:
    __device__ static int thread() { return static_cast<int>(threadIdx.x); }

    // Among equal logits the lower id makes the larger word.  -0 is 0.
    __device__ Word word_of(float x, int id) const {
        const unsigned bits = bits_of(x + 0.0f);
        const unsigned key = (bits ^ (bits >> 31 ? ~0u : 1u << 31)) >> (32 - kKeyBits);
        return Word{key} << task_.id_bits | static_cast<Word>(last_id() - id);
    }
    __device__ int last_id() const { return static_cast<int>((1u << task_.id_bits) - 1); }
    __device__ int id_of(Word word) const { return last_id() - static_cast<int>(word & last_id()); }
    __device__ float value_of(Word word) const {
        const unsigned key = static_cast<unsigned>(word >> task_.id_bits) << (32 - kKeyBits);
        constexpr unsigned kLower = kKeyBits == 32 ? 0 : (1u << (32 - kKeyBits)) - 1;
        return float_of_bits(key >> 31 ? key ^ 1u << 31 : ~(key | kLower));
    }

    __device__ float term(float x) const { return exp2_fast((x - offset_) * task_.factor); }

    // Rows begin where they like; packs are aligned.  Ids ascend from step to step: first the few before the first
    // pack, then the packs, then the few after the last.
    __device__ void read() {
        const int head = min(task_.vocab, elements_to_alignment(row_));
        const int packs = (task_.vocab - head) / kEach, tail = task_.vocab - head - packs * kEach;
        const int steps = (packs + kStep - 1) / kStep;
        Pack next[kPacks];
        load(next, head, packs, 0);
        for (int step = head ? -1 : 0; step < steps + (tail ? 1 : 0); ++step) {
            Pack now[kPacks];
            unsigned waits = 0;
            int first = 0;
            if (step < 0 || step == steps) {
                const bool is_mine = thread() < (step < 0 ? head : tail);
                first = step < 0 ? thread() : task_.vocab - tail + thread();
                for (Pack& pack : now) pack = ruled_out();
                if (is_mine) set_first<kDType>(now[0], row_[first]);
                waits = is_mine;
            } else {
                first = head + (step * kStep + thread()) * kEach;
#pragma unroll
                for (int p = 0; p < kPacks; ++p) {
                    now[p] = next[p];
                    if (step * kStep + p * kThreads + thread() < packs) waits |= ((1u << kEach) - 1) << p * kEach;
                }
                load(next, head, packs, step + 1);
            }
            look(now, waits, first);
            // The bound is the better the more was seen; what it lets through is the fewer.
            if ((step & (step + 1)) == 0 && step + 1 < steps) {
                const int count = shared_.counts[turn_];
                barrier();
                if (count > task_.k + task_.k / 2) prune(task_.k + task_.k / 8);
            }
        }
        barrier();
    }

    __device__ void load(Pack (&packs)[kPacks], int head, int count, int step) const {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
            const int i = step * kStep + p * kThreads + thread();
            packs[p] = i < count ? load_pack(row_ + head + std::int64_t{i} * kEach) : ruled_out();
        }
    }

    __device__ static Pack ruled_out() {
        constexpr unsigned kBits =
            kDType == DType::f32 ? 0xff800000 : kDType == DType::f16 ? 0xfc00fc00 : 0xff80ff80;
        return {{kBits, kBits, kBits, kBits}};
    }

    // Each logit that waits is put among the candidates or added to the tail.  Where they are too many, they are pruned
    // and those left over looked at again.
    __device__ void look(const Pack (&packs)[kPacks], unsigned waits, int first) {
        for (bool again = false;; again = true) {
#pragma unroll
            for (int p = 0; p < kPacks; ++p) {
                float x[kEach];
                unpack<kDType>(packs[p], x);
                float top = x[0];
#pragma unroll
                for (int e = 1; e < kEach; ++e) top = fmaxf(top, x[e]);
                // Lower ids are among the candidates already, so of equal ones none comes in.
                if (warp_any(again || !(top <= bound_))) {
                    choose(x, waits, p * kEach, first + p * kThreads * kEach);
                } else {
                    waits &= ~(((1u << kEach) - 1) << p * kEach);
                }
#pragma unroll
                for (int e = 0; e < kEach; ++e) x[e] = term(x[e]);
#pragma unroll
                for (int width = kEach / 2; width > 0; width /= 2)
#pragma unroll
                    for (int e = 0; e < width; ++e) x[e] += x[e + width];
                tail_ += x[0];
            }
            if (!barrier_or(waits != 0)) return;
            prune(task_.k + task_.k / 8);
        }
    }

    // Leaves in x what the tail gains.
    __device__ void choose(float (&x)[kEach], unsigned& waits, int first_bit, int first_id) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            const unsigned bit = 1u << (first_bit + e);
            const bool is_new = waits & bit;
            bool stays = false;
            if (warp_any(is_new && !(x[e] < bound_))) {
                const Word word = word_of(x[e], first_id + e);
                stays = is_new && x[e] == x[e] && word >= least_;
                const int at = append(stays, shared_.counts[turn_]);
                if (stays && at < task_.room) {
                    candidates_[at] = word;
                    waits &= ~bit;
                }
            }
            if (!stays) waits &= ~bit;
            if (stays || !is_new) x[e] = -kInfinity;
        }
    }

    // A place for each lane that wants one, counted on from count.
    __device__ static int append(bool wants, int& count) {
        const unsigned lanes = warp_ballot(wants);
        int first = 0;
        if (lanes && lane() == 0) first = atomic_add(&count, popcount(lanes));
        return warp_broadcast(first, 0) + popcount(lanes & ((1u << lane()) - 1));
    }

    // Leaves the k largest of at least k candidates, and perhaps others, but `most` at most.
    __device__ void prune(int most) {
        const int count = min(shared_.counts[turn_], task_.room);
        turn_ ^= 1;
        if (thread() == 0) shared_.counts[turn_] = 0;
        least_ = select(count, most);
        const float bound = value_of(least_);
        const float offset = bound == -kInfinity ? 0 : bound;
        tail_ = tail_ == 0 ? 0 : tail_ * exp2_fast((offset_ - offset) * task_.factor);
        bound_ = bound;
        offset_ = offset;
        for (int tile = 0; tile < count; tile += kThreads) {
            const int i = tile + thread();
            const Word word = i < count ? candidates_[i] : 0;
            barrier();  // no tile's places end behind it
            const bool stays = i < count && word >= least_;
            const int at = append(stays, shared_.counts[turn_]);
            if (stays)
                candidates_[at] = word;
            else if (i < count)
                tail_ += term(value_of(word));
        }
        barrier();
    }

    // A word from which on there are k of so many candidates, or more, but `most` at most.  Digit by digit, the first
    // ones first.
    __device__ Word select(int count, int most) {
        Word prefix = 0;
        int wanted = task_.k, high = kKeyBits + task_.id_bits;
        for (;;) {
            const int low = max(0, high - kDigit);
            const Word mask = (Word{1} << (high - low)) - 1;
            int* const bins = shared_.bins + bin_set_ * kBins;
            for (int i = thread(); i < count; i += kThreads) {
                const Word word = candidates_[i];
                if (word >> high == prefix) atomic_add(&bins[static_cast<int>(word >> low & mask)], 1);
            }
            barrier();
            // Each warp for itself.  The bins of the step before are done with, and will be used in two steps.
            shared_.bins[(bin_set_ + 2) % kBinSets * kBins + thread()] = 0;
            bin_set_ = (bin_set_ + 1) % kBinSets;
            constexpr int kMine = kBins / kWarp;
            const int* const mine = bins + (kWarp - 1 - lane()) * kMine;  // lane 0 has the largest digits
            int sum = 0;
#pragma unroll
            for (int i = 0; i < kMine; ++i) sum += mine[i];
            int upto = sum;
#pragma unroll
            for (int distance = 1; distance < kWarp; distance *= 2) {
                const int below = warp_up(upto, distance);
                if (lane() >= distance) upto += below;
            }
            const int owner = first_lane(warp_ballot(upto >= wanted));
            int above = upto - sum, digit = kMine - 1;
            while (digit > 0 && above + mine[digit] < wanted) above += mine[digit--];
            const int inside = warp_broadcast(mine[digit], owner);
            above = warp_broadcast(above, owner);
            digit = warp_broadcast(digit, owner) + (kWarp - 1 - owner) * kMine;
            prefix = prefix << (high - low) | static_cast<Word>(digit);
            if (task_.k - wanted + above + inside <= most || low == 0) return prefix << low;
            wanted -= above;
            high = low;
        }
    }

    __device__ void finish() {
        const int k = task_.k;
        if (min(shared_.counts[turn_], task_.room) >= k) prune(k);
        const int count = shared_.counts[turn_];
        const float rest = block_sum(tail_);
        float largest = -kInfinity;
        for (int i = thread(); i < count; i += kThreads) largest = fmaxf(largest, value_of(candidates_[i]));
        largest = block_max(largest);
        std::int32_t* const ids = task_.ids + std::int64_t{blockIdx.x} * k;
        float* const log_probs = task_.log_probs + std::int64_t{blockIdx.x} * k;
        if (rest != rest || !(fabsf(largest) < kInfinity)) {
            for (int i = thread(); i < k; i += kThreads) ids[i] = i, log_probs[i] = kNaN;
            if (thread() == 0) task_.log_tail[blockIdx.x] = kNaN;
            return;
        }
        float kept = 0;
        for (int i = thread(); i < k; i += kThreads)
            kept += exp2_fast((value_of(candidates_[i]) - largest) * task_.factor);
        kept = block_sum(kept);
        float log_rest = (offset_ - largest) * task_.factor + log2f(rest);  // relative to the largest
        constexpr float kDigitsLeft = 0x1p-80f;  // terms that vanished do not show
        if (rest < kDigitsLeft && k < task_.vocab) log_rest = look_back(largest);
        const float log_whole = log2f(kept + exp2_fast(log_rest));
        if (thread() == 0) task_.log_tail[blockIdx.x] = (log_rest - log_whole) * kLn2;

        const Word lower = (Word{1} << task_.id_bits) - 1;
        int padded = 1;
        while (padded < k) padded *= 2;
        barrier();
        for (int i = thread(); i < padded; i += kThreads) {
            Word& word = candidates_[i];
            if (i >= k)
                word = ~Word{0};
            else if (task_.id_order)
                word = (lower - (word & lower)) << kKeyBits | word >> task_.id_bits;
            else
                word = ~word;
        }
        barrier();
        sort(padded);
        for (int i = thread(); i < k; i += kThreads) {
            Word word = candidates_[i];
            if (task_.id_order)
                word = (word & ((Word{1} << kKeyBits) - 1)) << task_.id_bits | (lower - (word >> kKeyBits));
            else
                word = ~word;
            ids[i] = id_of(word);
            log_probs[i] = ((value_of(word) - largest) * task_.factor - log_whole) * kLn2;
        }
    }

    // Where all of the tail lies so far below the candidates that float32 does not hold it beside them.
    __device__ float look_back(float largest) {
        Word last = candidates_[0];
        for (int i = 1; i < task_.k; ++i) last = min(last, candidates_[i]);
        float top = -kInfinity, sum = 0;
        const auto each = [&](auto take) {
            for (int id = thread(); id < task_.vocab; id += kThreads) {
                const float x = to_float<kDType>(row_[id]);
                if (word_of(x, id) < last) take(x);
            }
        };
        each([&](float x) { top = fmaxf(top, x); });
        top = block_max(top);
        if (top == -kInfinity) return top;
        each([&](float x) { sum += exp2_fast((x - top) * task_.factor); });
        return (top - largest) * task_.factor + log2f(block_sum(sum));
    }

    // Ascending; bitonic.
    __device__ void sort(int count) {
        for (int size = 2; size <= count; size *= 2)
            for (int stride = size / 2; stride > 0; stride /= 2) {
                for (int i = thread(); i < count / 2; i += kThreads) {
                    const int a = 2 * i - (i & (stride - 1)), b = a + stride;
                    const Word low = candidates_[a], high = candidates_[b];
                    if ((low > high) == ((a & size) == 0)) {
                        candidates_[a] = high;
                        candidates_[b] = low;
                    }
                }
                barrier();
            }
    }

    const Task& task_;
    Shared& shared_;
    Word* const candidates_;
    const Storage<kDType>* row_;
    int turn_ = 0, bin_set_ = 0;
    Word least_ = 0;       // of a candidate
    float bound_ = kNaN;   // its logit; nothing is at most NaN, so at first all are candidates
    float offset_ = 0;     // the bound where it is finite: what is added to the tail is at most that
    float tail_ = 0;       // this thread's share, relative to the offset
};

template <DType kDType>
__global__ void __launch_bounds__(kThreads, Row<kDType>::kBlocks) topk_kernel(const Task task) {
    auto* const candidates = dynamic_shared<Word>();
    Row<kDType>(task, *reinterpret_cast<Shared*>(candidates + task.room), candidates).run();
}
template <DType kDType>
void launch_as(const Task& task, std::int64_t rows, void* stream) {
    const std::size_t bytes = task.room * sizeof(Word) + sizeof(Shared);
    launch(topk_kernel<kDType>, static_cast<int>(rows), kThreads, bytes, stream, task);
}

}  // namespace

void topk_cuda(const TopK& task, void* stream) {
    if (task.rows == 0) return;
    Task given{};
    given.logits = task.logits.at;
    given.stride = task.logits.stride;
    given.vocab = static_cast<int>(task.vocab);
    given.k = static_cast<int>(task.k);
    // Room for a few times k: what a pruning leaves is a small part of what it looks at.
    given.room = std::max(kLeastRoom, 4 * static_cast<int>(std::bit_ceil(static_cast<unsigned>(task.k))));
    given.id_bits = std::max(1, static_cast<int>(std::bit_width(static_cast<unsigned>(task.vocab - 1))));
    given.factor = static_cast<float>(1 / (task.temperature * kLn2));
    given.id_order = task.id_order;
    given.ids = task.ids;
    given.log_probs = task.log_probs;
    given.log_tail = task.log_tail;
    switch (task.logits.dtype) {
        case DType::f32: return launch_as<DType::f32>(given, task.rows, stream);
        case DType::f16: return launch_as<DType::f16>(given, task.rows, stream);
        case DType::bf16: return launch_as<DType::bf16>(given, task.rows, stream);
    }
}

}  // namespace feddistill
