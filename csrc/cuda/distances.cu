// The clients' inner products in one read, what the rules make of them in a warp, a weighted mean in another read.
#include "../distances.h"

#include <algorithm>
#include <utility>

#include "../network.h"
#include "device.h"

namespace feddistill {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kLevelColumns = kWarp;
constexpr int kMostPieces = 512;  // of a task of one group: what one block adds up
constexpr double kReach = 3.4028234663852886e38;  // of a squared distance; beyond, a client is lost
constexpr double kSmoothing = 1e-3;   // of the radius that holds a majority; what Weiszfeld's distances are smoothed by
constexpr double kKinkMargin = 1e-5;  // by how much a client has to be the minimum to be taken without iterating

// A kernel parameter: no copy to the device.
struct Given {
    const void* data[kMostCudaClients];
    std::int64_t strides[kMostCudaClients];
    int count;
    std::int64_t n, v;
};

// Several whole rows, or a part of one.
struct Cut {
    std::int64_t rows, columns;  // of a piece
    std::int64_t across;         // pieces to a row
    std::int64_t pieces;
};

// Numbers that a piece has: products [C][C], then the rows' sums [C].
constexpr int numbers(int count) { return count * count + count; }

template <int kWires>
constexpr int kWords = kWires > 8 ? 1 : 2;  // of registers that a thread loads from a client at once
template <int kWires>
using Columns = Words<kWords<kWires>>;
template <DType kDType, int kWires>
constexpr int kColumns = kWords<kWires> * kPerWord<kDType>;

// `left` columns, or all where there are as many.
template <DType kDType, int kWires>
__device__ Columns<kWires> load_columns(const Storage<kDType>* from, std::int64_t left, bool aligned) {
    if (aligned && left >= kColumns<kDType, kWires>) return *reinterpret_cast<const Columns<kWires>*>(from);
    Columns<kWires> pack{};
#pragma unroll
    for (int e = 0; e < kColumns<kDType, kWires>; ++e)
        if (e < left)
            pack.word[e / kPerWord<kDType>] |= bits_of_storage<kDType>(from[e]) << e % kPerWord<kDType> * 16;
    return pack;
}

template <DType kDType, int kWires>
__device__ void store_columns(Storage<kDType>* to, Columns<kWires> pack, std::int64_t left, bool aligned) {
    if (aligned && left >= kColumns<kDType, kWires>) {
        *reinterpret_cast<Columns<kWires>*>(to) = pack;
        return;
    }
#pragma unroll
    for (int e = 0; e < kColumns<kDType, kWires>; ++e)
        if (e < left)
            to[e] = storage_of_bits<kDType>(pack.word[e / kPerWord<kDType>] >> e % kPerWord<kDType> * 16);
}

// Whether a row of every client begins at a whole vector.
template <DType kDType, int kWires>
__device__ bool is_aligned(const Given& given, std::int64_t row) {
    std::uintptr_t addresses = 0;
    for (int c = 0; c < given.count; ++c)
        addresses |= reinterpret_cast<std::uintptr_t>(static_cast<const Storage<kDType>*>(given.data[c]) +
                                                      row * given.strides[c]);
    return addresses % sizeof(Columns<kWires>) == 0;
}

// An origin near most clients, so that a far one does not take the digits of the others: the median of each column's
// values, or its neighbour.  NaN gives way to others.
template <int kWires>
struct Middle {
    static constexpr int kWire = (kWires - 1) / 2;
    static constexpr auto kSteps = network<kWires>(kWire, kWire + 1);

    template <std::size_t I>
    __device__ static void step(float (&x)[kWires]) {
        constexpr Comparator s = kSteps[I];
        const float a = x[s.low], b = x[s.high];
        if constexpr (s.needs_low) x[s.low] = fminf(a, b);
        if constexpr (s.needs_high) x[s.high] = fmaxf(a, b);
    }

    template <std::size_t... I>
    __device__ static void sort(float (&x)[kWires], std::index_sequence<I...>) {
        (step<I>(x), ...);
    }

    // The middle of the first `count` values.
    __device__ static float of(const float (&values)[kWires], int count) {
        float x[kWires];
#pragma unroll
        for (int c = 0; c < kWires; ++c)
            x[c] = c < count ? values[c] : c - count < kWire - (count - 1) / 2 ? -kInfinity : kInfinity;
        sort(x, std::make_index_sequence<kSteps.size()>{});
        return fabsf(x[kWire]) < kInfinity ? x[kWire] : 0;
    }
};

// One thread's share of the products of y_i = x_i - level_i - origin: of two clients, and of one with 1.
template <int kWires>
struct Products {
    float of[kWires * (kWires + 1) / 2], sum[kWires];

    __device__ void clear() {
#pragma unroll
        for (float& x : of) x = 0;
#pragma unroll
        for (float& x : sum) x = 0;
    }

    __device__ void add(float (&x)[kWires], const float (&level)[kWires], int count) {
#pragma unroll
        for (int c = 0; c < kWires; ++c) x[c] -= level[c];
        const float origin = Middle<kWires>::of(x, count);
#pragma unroll
        for (int c = 0; c < kWires; ++c) {
            x[c] = c < count ? x[c] - origin : 0;
            sum[c] += x[c];
        }
#pragma unroll
        for (int i = 0, at = 0; i < kWires; ++i)
#pragma unroll
            for (int j = i; j < kWires; ++j, ++at) of[at] = fmaf(x[i], x[j], of[at]);
    }

    // The block's sums [C]; those of the next row begin at 0.
    __device__ void reduce_sums(int count, float* shared, double* to) {
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        barrier();
#pragma unroll
        for (int i = 0; i < kWires; ++i) {
            const float x = i < count ? warp_sum(sum[i]) : 0;
            if (lane() == 0) shared[warp * kWires + i] = x;
            sum[i] = 0;
        }
        barrier();
        for (int i = threadIdx.x; i < count; i += kThreads) to[i] = total(shared, kWires, i);
        barrier();
    }

    // The block's products [C][C].
    __device__ void reduce(int count, float* shared, double* to) const {
        constexpr int kNumbers = kWires * (kWires + 1) / 2;
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        barrier();
#pragma unroll
        for (int i = 0, at = 0; i < kWires; ++i)
#pragma unroll
            for (int j = i; j < kWires; ++j, ++at) {
                const float x = j < count ? warp_sum(of[at]) : 0;
                if (lane() == 0) shared[warp * kNumbers + at] = x;
            }
        barrier();
        for (int at = threadIdx.x; at < count * count; at += kThreads) {
            const int low = min(at / count, at % count), high = max(at / count, at % count);
            to[at] = total(shared, kNumbers, low * kWires + high - low * (low + 1) / 2);
        }
        barrier();
    }

  private:
    __device__ static double total(const float* shared, int pitch, int at) {
        double sum = 0;
        for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp * pitch + at];
        return sum;
    }
};

// Means of a row's first columns: what the clients' levels differ by is not left to the products' digits.  What they
// are off by the sums correct.
template <DType kDType, int kWires>
__device__ void levels_of(const Given& given, std::int64_t row, float (&level)[kWires]) {
    const int columns = static_cast<int>(min(given.v, std::int64_t{kLevelColumns}));
#pragma unroll
    for (int c = 0; c < kWires; ++c) {
        level[c] = 0;
        if (c >= given.count) continue;
        const auto* const from = static_cast<const Storage<kDType>*>(given.data[c]) + row * given.strides[c];
        level[c] = warp_sum(lane() < columns ? to_float<kDType>(from[lane()]) : 0.0f) / static_cast<float>(columns);
    }
}

template <DType kDType, int kWires>
__global__ void __launch_bounds__(kThreads, kWires > 8 ? 1 : 2)
    products_kernel(const Given given, const Cut cut, double* partials) {
    using T = Storage<kDType>;
    double* const sums = dynamic_shared<double>();     // [C], of a row
    double* const products_of_sums = sums + kWires;    // [C][C], of all rows: what their levels were off by
    double* const total = products_of_sums + kWires * kWires;
    auto* const scratch = reinterpret_cast<float*>(total + kWires * kWires);
    const std::int64_t piece = blockIdx.x;
    const int count = given.count;
    const std::int64_t first = piece / cut.across * cut.rows, last = min(given.n, first + cut.rows);
    const std::int64_t begin = piece % cut.across * cut.columns, end = min(given.v, begin + cut.columns);
    double* const to = partials + piece * numbers(count);
    for (int at = threadIdx.x; at < count * count; at += kThreads) products_of_sums[at] = 0;
    Products<kWires> products;
    products.clear();
    for (std::int64_t row = first; row < last; ++row) {
        float level[kWires];
        levels_of<kDType>(given, row, level);
        const bool aligned = is_aligned<kDType, kWires>(given, row) && begin % kColumns<kDType, kWires> == 0;
        for (std::int64_t at = begin + std::int64_t{threadIdx.x} * kColumns<kDType, kWires>; at < end;
             at += kThreads * kColumns<kDType, kWires>) {
            Columns<kWires> packs[kWires];
#pragma unroll
            for (int c = 0; c < kWires; ++c) {
                packs[c] = Columns<kWires>{};
                if (c >= count) continue;
                const T* const from = static_cast<const T*>(given.data[c]) + row * given.strides[c] + at;
                packs[c] = load_columns<kDType, kWires>(from, end - at, aligned);
            }
#pragma unroll
            for (int w = 0; w < kWords<kWires>; ++w) {
                float x[kWires][kPerWord<kDType>];
#pragma unroll
                for (int c = 0; c < kWires; ++c) unpack_word<kDType>(packs[c].word[w], x[c]);
#pragma unroll
                for (int e = 0; e < kPerWord<kDType>; ++e) {
                    if (at + w * kPerWord<kDType> + e >= end) continue;
                    float column[kWires];
#pragma unroll
                    for (int c = 0; c < kWires; ++c) column[c] = x[c][e];
                    products.add(column, level, count);
                }
            }
        }
        products.reduce_sums(count, scratch, sums);
        for (int at = threadIdx.x; at < count * count; at += kThreads)
            products_of_sums[at] += sums[at / count] * sums[at % count];
    }
    products.reduce(count, scratch, total);
    // A row that is cut is corrected when its sums are known.
    for (int at = threadIdx.x; at < count * count; at += kThreads)
        to[at] = cut.across > 1 ? total[at] : total[at] - products_of_sums[at] / static_cast<double>(given.v);
    for (int i = threadIdx.x; i < count; i += kThreads) to[count * count + i] = sums[i];
}

enum class Rule { geometric_median, krum, mixing };

struct Choice {
    Rule rule;
    int byzantine, keep, max_iterations;
    double tolerance;
};

// A row of weights: [C] and the number of the heaviest, or -1 where none is left.
constexpr int pitch(int count) { return count + 1; }

// The rules on the clients' inner products, by a warp: each lane is a client.
class Geometry {
  public:
    // gram, sorted: [C][C + 1], shared.
    __device__ Geometry(double* gram, double* sorted, int count)
        : gram_(gram), sorted_(sorted), count_(count), is_client_(lane() < count) {
        lost_ = warp_ballot(is_client_ && !(g(mine(), mine()) <= kReach));
        left_ = count - popcount(lost_);
        if (is_client_)
            for (int j = 0; j < count; ++j)
                if (is_lost(mine()) || is_lost(j)) g(mine(), j) = 0;
        warp_barrier();
        if (is_client_)
            for (int j = 0; j < count; ++j) insert(j, square(mine(), j));
    }

    __device__ void weigh(const Choice& choice, float* weights) {
        switch (choice.rule) {
            case Rule::geometric_median: return put(weiszfeld(choice), weights);
            case Rule::krum: {
                double score = 0;
                if (is_client_)
                    for (int j = 1; j < count_ - choice.byzantine - 1; ++j) score += near(j);
                return put(first(score, choice.keep), weights);
            }
            case Rule::mixing:
                for (int client = 0; client < count_; ++client) {
                    const double key = client == lane() && !is_lost(client) ? -1 : square(client, mine());
                    put(first(key, count_ - choice.byzantine), weights + client * pitch(count_));
                }
        }
    }

  private:
    __device__ int mine() const { return is_client_ ? lane() : 0; }
    __device__ double& g(int i, int j) const { return gram_[i * (count_ + 1) + j]; }
    __device__ double& near(int rank) const { return sorted_[mine() * (count_ + 1) + rank]; }  // itself first
    __device__ bool is_lost(int i) const { return lost_ >> i & 1; }

    __device__ double square(int i, int j) const {
        return is_lost(i) || is_lost(j) ? kFar : fmax(0.0, g(i, i) + g(j, j) - 2 * g(i, j));
    }

    __device__ void insert(int at, double x) {
        for (; at > 0 && near(at - 1) > x; --at) near(at) = near(at - 1);
        near(at) = x;
    }

    __device__ void put(double weight, float* weights) const {
        if (is_client_) weights[lane()] = static_cast<float>(weight);
        const double most = warp_max(is_client_ && weight > 0 ? weight : 0.0);
        const int heaviest = first_lane(warp_ballot(is_client_ && weight == most));
        if (lane() == 0) weights[count_] = most > 0 ? static_cast<float>(heaviest) : -1.0f;
    }

    // Equal weights for the first clients by ascending key, of equal keys the first, the lost last.
    __device__ double first(double key, int keep) const {
        int before = 0;
        for (int j = 0; j < count_; ++j) {
            const double other = warp_broadcast(key, j);
            const bool same = is_lost(j) == is_lost(mine());
            before += same ? other < key || (other == key && j < lane()) : is_lost(mine());
        }
        return is_client_ && before < keep ? 1.0 / keep : 0.0;
    }

    // As documented in feddistill_kernels/distances/__init__.py.
    __device__ double weiszfeld(const Choice& choice) const {
        if (left_ == 0) return kNaN;
        const bool counts = is_client_ && !is_lost(mine());
        const double radius_of_mine = near(left_ / 2);
        const double radius = -warp_max(counts ? -radius_of_mine : -kFar);
        const double floor = kSmoothing * kSmoothing * radius;
        double sum = 0;
        for (int j = 0; j < count_; ++j)
            if (!is_lost(j)) sum += sqrt(square(mine(), j));
        // If a client is the minimum, it is the one that is so among the clients.
        const double least = -warp_max(counts ? -sum : -kFar);
        const int middle = first_lane(warp_ballot(counts && sum == least));

        // The others pull at it with unit vectors; it is the minimum if it and those near it outweigh their sum.
        const double to_middle = square(middle, mine());
        const bool is_near = counts && to_middle <= floor;
        const int neighbours = popcount(warp_ballot(is_near));
        const double pull = is_near || !counts ? 0 : 1 / sqrt(to_middle);
        const double total = warp_sum(pull);
        double force = warp_sum(pull * (times(pull) - 2 * total * g(middle, mine())));
        force += total * total * g(middle, middle);
        if (sqrt(fmax(0.0, force)) < neighbours * (1 - kKinkMargin)) return is_near ? 1.0 / neighbours : 0.0;

        double weight = share(radius_of_mine, counts);  // outliers weigh little from the start
        for (int step = 0; step < choice.max_iterations; ++step) {
            const double product = times(weight);
            const double square = warp_sum(weight * product);
            const double now = share(fmax(0.0, g(mine(), mine()) - 2 * product + square) + floor, counts);
            const double change = warp_max(fabs(now - weight));
            weight = now;
            if (change <= choice.tolerance) break;
        }
        return weight;
    }

    // The thread's entry of the product of the Gram matrix and a vector.
    __device__ double times(double x) const {
        double sum = 0;
        for (int j = 0; j < count_; ++j) sum += g(mine(), j) * warp_broadcast(x, j);
        return is_client_ ? sum : 0;
    }

    __device__ double share(double square, bool counts) const {
        const double weight = counts ? 1 / sqrt(square) : 0;
        return weight / warp_sum(weight);
    }

    static constexpr double kFar = __builtin_huge_val();
    double *gram_, *sorted_;
    int count_, left_;
    bool is_client_;
    unsigned lost_;
};

// One block a group: a row, or the whole.
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const double* partials, const Cut cut, std::int64_t rows, std::int64_t v, int count,
                   const Choice choice, float* weights) {
    double* const gram = dynamic_shared<double>();
    const double* const from = partials + blockIdx.x * rows * cut.across * numbers(count);
    for (int at = threadIdx.x; at < count * count; at += blockDim.x) {
        const int i = at / count, j = at % count;
        double total = 0;
        for (std::int64_t row = 0; row < rows; ++row) {
            double product = 0, first = 0, second = 0;
            for (std::int64_t part = 0; part < cut.across; ++part) {
                const double* const piece = from + (row * cut.across + part) * numbers(count);
                product += piece[at];
                first += piece[count * count + i];
                second += piece[count * count + j];
            }
            total += cut.across > 1 ? product - first * second / static_cast<double>(v) : product;
        }
        gram[i * (count + 1) + j] = total;
    }
    barrier();
    const int results = choice.rule == Rule::mixing ? count : 1;
    if (threadIdx.x < kWarp)
        Geometry(gram, gram + count * (count + 1), count)
            .weigh(choice, weights + std::int64_t{blockIdx.x} * results * pitch(count));
}

struct Results {
    void* outs[kMostCudaClients];
    int count;
};

// Weighted means as differences to the heaviest: equal clients give themselves, to the last bit.
template <DType kDType, int kWires>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const Given given, const float* weights, std::int64_t group_pitch, const Results results) {
    using T = Storage<kDType>;
    constexpr int kTile = kThreads * kColumns<kDType, kWires>;
    const std::int64_t tiles = (given.v + kTile - 1) / kTile;
    const std::int64_t row = blockIdx.x / tiles;
    const std::int64_t at = blockIdx.x % tiles * kTile + std::int64_t{threadIdx.x} * kColumns<kDType, kWires>;
    const std::int64_t left = given.v - at;
    if (left <= 0) return;
    weights += row * group_pitch;
    const int count = given.count;
    const bool aligned = is_aligned<kDType, kWires>(given, row);
    Columns<kWires> packs[kWires];
#pragma unroll
    for (int c = 0; c < kWires; ++c) {
        packs[c] = Columns<kWires>{};
        // What has no weight does not show.
        if (c >= count || (results.count == 1 && !(weights[c] > 0))) continue;
        const T* const from = static_cast<const T*>(given.data[c]) + row * given.strides[c] + at;
        packs[c] = load_columns<kDType, kWires>(from, left, aligned);
    }
    for (int r = 0; r < results.count; ++r) {
        const float* const mine = weights + r * pitch(count);
        const int heaviest = static_cast<int>(mine[count]);
        float weight[kWires];
#pragma unroll
        for (int c = 0; c < kWires; ++c) weight[c] = c < count ? mine[c] : 0;
        Columns<kWires> result;
#pragma unroll
        for (int w = 0; w < kWords<kWires>; ++w) {
            float origin[kPerWord<kDType>], moved[kPerWord<kDType>] = {};
            unsigned first = 0;
#pragma unroll
            for (int c = 0; c < kWires; ++c) first = c == heaviest ? packs[c].word[w] : first;
            unpack_word<kDType>(first, origin);
#pragma unroll
            for (int c = 0; c < kWires; ++c) {
                if (c == heaviest || !(weight[c] > 0)) continue;
                float x[kPerWord<kDType>];
                unpack_word<kDType>(packs[c].word[w], x);
#pragma unroll
                for (int e = 0; e < kPerWord<kDType>; ++e) moved[e] = fmaf(x[e] - origin[e], weight[c], moved[e]);
            }
#pragma unroll
            for (int e = 0; e < kPerWord<kDType>; ++e) moved[e] = heaviest < 0 ? kNaN : origin[e] + moved[e];
            result.word[w] = pack_word<kDType>(moved);
        }
        T* const to = static_cast<T*>(results.outs[r]) + row * given.v + at;
        const bool fits = reinterpret_cast<std::uintptr_t>(to) % sizeof(Columns<kWires>) == 0;
        store_columns<kDType, kWires>(to, result, left, fits);
    }
}

// Does not depend on the device: neither does the result.
Cut cut_of(const Clients& clients, bool per_row) {
    constexpr std::int64_t kManyRows = kMostPieces / 2, kLeastColumns = 1 << 12;
    Cut cut{1, clients.v, 1, clients.n};
    if (clients.n < kManyRows) {
        const std::int64_t most = (clients.v + kLeastColumns - 1) / kLeastColumns;
        cut.across = std::min(most, (kMostPieces + clients.n - 1) / clients.n);
        cut.columns = (clients.v + cut.across - 1) / cut.across;
        cut.columns = (cut.columns + kWarp - 1) / kWarp * kWarp;
        cut.across = (clients.v + cut.columns - 1) / cut.columns;
    } else if (!per_row) {
        cut.rows = (clients.n + kMostPieces - 1) / kMostPieces;
    }
    cut.pieces = (clients.n + cut.rows - 1) / cut.rows * cut.across;
    return cut;
}

std::int64_t partials_bytes(const Clients& clients, const Cut& cut) {
    return cut.pieces * numbers(clients.count) * static_cast<std::int64_t>(sizeof(double));
}

template <DType kDType, int kWires>
void run(const Clients& clients, bool per_row, const Choice& choice, const Results& results, void* workspace,
         void* stream) {
    const int count = clients.count;
    Given given{};
    for (int c = 0; c < count; ++c) given.data[c] = clients.data[c], given.strides[c] = clients.strides[c];
    given.count = count;
    given.n = clients.n;
    given.v = clients.v;
    const Cut cut = cut_of(clients, per_row);
    auto* const partials = static_cast<double*>(workspace);
    auto* const weights = reinterpret_cast<float*>(static_cast<char*>(workspace) + partials_bytes(clients, cut));

    constexpr std::size_t kShared = (kWires + 2 * kWires * kWires) * sizeof(double) +
                                    kWarps * kWires * (kWires + 1) / 2 * sizeof(float);
    launch(products_kernel<kDType, kWires>, static_cast<int>(cut.pieces), kThreads,
           kShared, stream, given, cut, partials);

    const std::int64_t groups = per_row ? clients.n : 1, pieces = cut.pieces / cut.across;
    const int threads = std::min(kThreads, (count * count + kWarp - 1) / kWarp * kWarp);
    launch(weights_kernel, static_cast<int>(groups), threads, 2 * count * (count + 1) * sizeof(double), stream,
           partials, cut, pieces / groups, clients.v, count, choice, weights);

    constexpr int kTile = kThreads * kColumns<kDType, kWires>;
    launch(combine_kernel<kDType, kWires>, static_cast<int>(clients.n * ((clients.v + kTile - 1) / kTile)), kThreads, 0,
           stream, given, weights, std::int64_t{per_row ? pitch(count) : 0}, results);
}

void run(const Clients& clients, bool per_row, const Choice& choice, const Results& results, void* workspace,
         void* stream) {
    const auto with_wires = [&]<DType kDType>() {
        const auto of = clients.count <= 8 ? run<kDType, 8> : run<kDType, kMostCudaClients>;
        of(clients, per_row, choice, results, workspace, stream);
    };
    switch (clients.dtype) {
        case DType::f32: return with_wires.template operator()<DType::f32>();
        case DType::f16: return with_wires.template operator()<DType::f16>();
        case DType::bf16: return with_wires.template operator()<DType::bf16>();
    }
}

}  // namespace

std::int64_t distances_workspace_cuda(const Clients& clients, bool per_row) {
    const std::int64_t rows = per_row ? clients.n : clients.count;
    return partials_bytes(clients, cut_of(clients, per_row)) +
           rows * pitch(clients.count) * static_cast<std::int64_t>(sizeof(float));
}

void geometric_median_cuda(const Clients& clients, bool per_row, double tolerance, int max_iterations, void* out,
                           void* workspace, void* stream) {
    const Choice choice{Rule::geometric_median, 0, 0, max_iterations, tolerance};
    run(clients, per_row, choice, {{out}, 1}, workspace, stream);
}

void krum_cuda(const Clients& clients, int byzantine, int keep, void* out, void* workspace, void* stream) {
    run(clients, false, {Rule::krum, byzantine, keep, 0, 0}, {{out}, 1}, workspace, stream);
}

void nearest_neighbour_mixing_cuda(const Clients& clients, int byzantine, void* const* outs, void* workspace,
                                   void* stream) {
    Results results{{}, clients.count};
    std::copy_n(outs, clients.count, results.outs);
    run(clients, false, {Rule::mixing, byzantine, 0, 0, 0}, results, workspace, stream);
}

}  // namespace feddistill
