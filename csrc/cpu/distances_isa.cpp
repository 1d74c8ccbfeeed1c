#include "distances_isa.h"

#include <cstring>

#include "vector.h"

namespace feddistill::FEDDISTILL_ISA {
namespace {

// Clients to a tile of the Gram matrix: its accumulators and operands fit the registers.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 3;
#endif
static_assert(kTile <= MomentsScratch::kPad && kLanes <= MomentsScratch::kMostLanes && kBlock % kLanes == 0);
constexpr int kStride = kBlock + kLanes;  // a row of y; a vector may be stored at its last element

typedef double Doubles __attribute__((vector_size(8 * kLanes)));

struct Tiles {
    int count, side;
    explicit Tiles(int clients) : count((clients + kTile - 1) / kTile), side(count * kTile) {}
    std::int64_t doubles() const { return std::int64_t{count} * (count + 1) / 2 * kTile * kTile * kLanes; }
};

// As centred_difference, where the mean is so large that differences to it have lost their digits: what each
// subtraction rounded off is added again (Knuth's two-sum).  A client far off by a constant a row is then what it
// is without it, and not a copy of whoever it is compared with.
template <DType kDType>
double careful_difference(const Element<kDType>* x, const Element<kDType>* anchor, int n, float* to) {
    const float first = load_part<kDType>(x, 1, 0)[0], of_anchor = load_part<kDType>(anchor, 1, 0)[0];
    const float level = first - of_anchor;
    Floats total{};
    for (int j = 0; j < n; j += kLanes) {
        const int left = n - j < kLanes ? n - j : kLanes;
        const Floats a = load_part<kDType>(x + j, left, first);
        const Floats b = load_part<kDType>(anchor + j, left, of_anchor);
        const Floats d = a - b, back = d - a;
        const Floats lost = (a - (d - back)) - (b + back);
        Floats centred = (d - level) + lost;
        for (int i = left; i < kLanes; ++i) centred[i] = 0;
        total += centred;
        store<DType::f32>(to + j, centred);
    }
    const float mean = sum(total) / static_cast<float>(n);
    for (int j = 0; j < n; j += kLanes) store<DType::f32>(to + j, load<DType::f32>(to + j) - mean);
    return double{level} + mean;
}

// to[0, n) = x - anchor less its mean, which is returned.
template <DType kDType>
double centred_difference(const Element<kDType>* x, const Element<kDType>* anchor, int n, float* to) {
    Floats total{};
    const int whole = n / kLanes * kLanes;
    const auto difference = [&](Floats d, int j) __attribute__((always_inline)) {
        total += d;
        store<DType::f32>(to + j, d);
    };
    for (int j = 0; j < whole; j += kLanes) difference(load<kDType>(x + j) - load<kDType>(anchor + j), j);
    if (whole < n)
        difference(load_part<kDType>(x + whole, n - whole, 0.0f) - load_part<kDType>(anchor + whole, n - whole, 0.0f),
                   whole);
    const float mean = sum(total) / static_cast<float>(n);
    Floats squares{};
    for (int j = 0; j < n; j += kLanes) {
        const Floats centred = load<DType::f32>(to + j) - mean;
        squares = fma(centred, j + kLanes <= n ? centred : Floats{}, squares);
        store<DType::f32>(to + j, centred);
    }
    constexpr float kFar = 1024;  // times what is left without the mean
    if (mean * mean * static_cast<float>(n) > kFar * kFar * sum(squares))
        return careful_difference<kDType>(x, anchor, n, to);
    return mean;
}

double centred_difference(const Clients& c, int client, int anchor, std::int64_t row, std::int64_t at, int n,
                          float* to) {
    const auto run = [&]<DType kDType>() {
        const auto from = [&](int i) {
            return static_cast<const Element<kDType>*>(c.data[i]) + row * c.strides[i] + at;
        };
        return centred_difference<kDType>(from(client), from(anchor), n, to);
    };
    switch (c.dtype) {
        case DType::f32: return run.template operator()<DType::f32>();
        case DType::f16: return run.template operator()<DType::f16>();
        case DType::bf16: return run.template operator()<DType::bf16>();
    }
    return 0;
}

// The inner products of kTile rows with kTile, each lane's added to sums in double.
FEDDISTILL_INLINE void tile(const float* a, const float* b, int columns, double* sums) {
    Floats products[kTile][kTile] = {};
    for (int j = 0; j < columns; j += kLanes) {
        Floats u[kTile], v[kTile];
        for (int i = 0; i < kTile; ++i) u[i] = load<DType::f32>(a + i * kStride + j);
        for (int i = 0; i < kTile; ++i) v[i] = load<DType::f32>(b + i * kStride + j);
        for (int i = 0; i < kTile; ++i)
            for (int k = 0; k < kTile; ++k) products[i][k] = fma(u[i], v[k], products[i][k]);
    }
    for (int i = 0; i < kTile; ++i)
        for (int k = 0; k < kTile; ++k) {
            double* const to = sums + (i * kTile + k) * kLanes;
            Doubles so_far;
            std::memcpy(&so_far, to, sizeof so_far);
            so_far += __builtin_convertvector(products[i][k], Doubles);
            std::memcpy(to, &so_far, sizeof so_far);
        }
}

void multiply(float* y, const Tiles& tiles, int columns, double* sums) {
    const int padded = (columns + kLanes - 1) / kLanes * kLanes;
    for (int i = 0; i < tiles.side; ++i)
        for (int j = columns; j < padded; ++j) y[i * kStride + j] = 0;
    for (int p = 0; p < tiles.count; ++p)
        for (int q = p; q < tiles.count; ++q, sums += kTile * kTile * kLanes)
            tile(y + p * kTile * kStride, y + q * kTile * kStride, padded, sums);
}

FEDDISTILL_INLINE double fold(const double* from) {
    double lane[kLanes];
    std::memcpy(lane, from, sizeof lane);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

}  // namespace

void moments(const Clients& c, int anchor, const Piece& piece, const MomentsScratch& scratch, double* gram,
             double* mean) {
    const Tiles tiles(c.count);
    float* const y = scratch.f;  // [tiles.side][kStride]
    double* const sums = scratch.d;
    double* const change = sums + tiles.doubles();
    std::memset(y + std::int64_t{c.count} * kStride, 0, sizeof(float) * (tiles.side - c.count) * kStride);
    std::memset(sums, 0, sizeof(double) * tiles.doubles());
    std::memset(gram, 0, sizeof(double) * c.count * c.count);
    int filled = 0;
    for (std::int64_t row = piece.first; row < piece.last; ++row) {
        for (std::int64_t at = piece.begin; at < piece.end; at += kBlock) {
            const int n = static_cast<int>(piece.end - at < kBlock ? piece.end - at : kBlock);
            if (filled + n > kBlock) {
                multiply(y, tiles, filled, sums);
                filled = 0;
            }
            for (int i = 0; i < c.count; ++i)
                change[i] = centred_difference(c, i, anchor, row, at, n, y + i * kStride + filled);
            filled += n;
            if (at == piece.begin) {
                std::memcpy(mean, change, sizeof(double) * c.count);
                continue;
            }
            // Each block is centred by itself.  What its mean differs from that of the row so far is added as by
            // Chan, Golub and LeVeque, 1979: only sums of squares, nothing cancels.
            const auto before = static_cast<double>(at - piece.begin);
            const double share = static_cast<double>(n) / (before + n), factor = before * share;
            for (int i = 0; i < c.count; ++i) change[i] -= mean[i];
            for (int i = 0; i < c.count; ++i)
                for (int j = 0; j < c.count; ++j) gram[i * c.count + j] += factor * change[i] * change[j];
            for (int i = 0; i < c.count; ++i) mean[i] += share * change[i];
        }
    }
    multiply(y, tiles, filled, sums);
    const double* from = sums;
    for (int p = 0; p < tiles.count; ++p)
        for (int q = p; q < tiles.count; ++q, from += kTile * kTile * kLanes)
            for (int i = p * kTile; i < (p + 1) * kTile && i < c.count; ++i)
                for (int j = q * kTile; j < (q + 1) * kTile && j < c.count; ++j) {
                    const double total = fold(from + ((i - p * kTile) * kTile + j - q * kTile) * kLanes);
                    gram[i * c.count + j] += total;
                    if (p != q) gram[j * c.count + i] += total;
                }
}

namespace {

// A weighted mean as differences to the heaviest: equal clients give themselves, to the last bit.
template <DType kDType>
void weighted(const void* const* rows, const float* weights, const int* chosen, int count, int n,
              Element<kDType>* out) {
    constexpr int kUnroll = 4;
    const auto row = [&](int i) __attribute__((always_inline)) {
        return static_cast<const Element<kDType>*>(rows[chosen[i]]);
    };
    int j = 0;
    for (; j + kUnroll * kLanes <= n; j += kUnroll * kLanes) {
        Floats origin[kUnroll], moved[kUnroll] = {};
        for (int u = 0; u < kUnroll; ++u) origin[u] = load<kDType>(row(0) + j + u * kLanes);
        for (int i = 1; i < count; ++i)
            for (int u = 0; u < kUnroll; ++u)
                moved[u] = fma(load<kDType>(row(i) + j + u * kLanes) - origin[u], weights[chosen[i]],
                               moved[u]);
        for (int u = 0; u < kUnroll; ++u)
            store<kDType>(out + j + u * kLanes, count > 1 ? origin[u] + moved[u] : origin[u]);
    }
    for (; j < n; j += kLanes) {
        const int left = n - j < kLanes ? n - j : kLanes;
        const Floats origin = load_part<kDType>(row(0) + j, left, 0.0f);
        Floats moved{};
        for (int i = 1; i < count; ++i)
            moved = fma(load_part<kDType>(row(i) + j, left, 0.0f) - origin, weights[chosen[i]], moved);
        store_part<kDType>(out + j, count > 1 ? origin + moved : origin, left);
    }
}

template <DType kDType>
void combine_as(const Clients& c, const Piece& piece, const float* weights, void* const* outs, int results,
                const CombineScratch& scratch) {
    int* const chosen = scratch.chosen;
    const void** const rows = scratch.rows;
    for (std::int64_t row = piece.first; row < piece.last; ++row)
        for (std::int64_t at = piece.begin; at < piece.end; at += kBlock) {
            const int n = static_cast<int>(piece.end - at < kBlock ? piece.end - at : kBlock);
            for (int i = 0; i < c.count; ++i)
                rows[i] = static_cast<const Element<kDType>*>(c.data[i]) + row * c.strides[i] + at;
            for (int r = 0; r < results; ++r) {
                const float* const w = weights + std::int64_t{r} * c.count;
                auto* const out = static_cast<Element<kDType>*>(outs[r]) + row * c.v + at;
                int count = 0, heaviest = 0;
                for (int i = 0; i < c.count; ++i) {
                    if (!(w[i] > 0)) continue;
                    chosen[count] = i;
                    if (w[i] > w[chosen[heaviest]]) heaviest = count;
                    ++count;
                }
                if (count == 0) {
                    for (int j = 0; j < n; j += kLanes)
                        store_part<kDType>(out + j, all(kNaN), n - j < kLanes ? n - j : kLanes);
                    continue;
                }
                const int first = chosen[0];
                chosen[0] = chosen[heaviest];
                chosen[heaviest] = first;
                weighted<kDType>(rows, w, chosen, count, n, out);
            }
        }
}

}  // namespace

void combine(const Clients& c, const Piece& piece, const float* weights, void* const* outs, int results,
             const CombineScratch& scratch) {
    const auto run = [&]<DType kDType>() {
        combine_as<kDType>(c, piece, weights, outs, results, scratch);
    };
    switch (c.dtype) {
        case DType::f32: return run.template operator()<DType::f32>();
        case DType::f16: return run.template operator()<DType::f16>();
        case DType::bf16: return run.template operator()<DType::bf16>();
    }
}

}  // namespace feddistill::FEDDISTILL_ISA
