// The rules on the clients' inner products, and who reads which piece of the clients when.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "distances_isa.h"
#include "threads.h"

namespace feddistill {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kReach = std::numeric_limits<float>::max();  // of a squared distance; beyond, a client is lost
constexpr double kSmoothing = 1e-3;     // of the radius that holds a majority; what Weiszfeld's distances are smoothed by
constexpr double kKinkMargin = 1e-5;    // by how much a client has to be the minimum to be taken without iterating
constexpr std::int64_t kShare = 1 << 16;  // columns of all clients handed to a thread at once

// Inner products of the clients' centred rows about the anchor's, and what is made of them.
struct Geometry {
    int count;
    std::vector<double> gram, mean, squares;  // [C][C], [C], [C][C]
    std::vector<double> radii;                // [C], squared: of the ball around it that holds most of those left
    std::vector<char> lost;                   // infinitely far from everybody

    explicit Geometry(int c)
        : count(c), gram(c * c), mean(c), squares(c * c), radii(c), lost(c), keys_(c) {}

    double square(int i, int j) const { return squares[i * count + j]; }
    int left() const { return static_cast<int>(std::count(lost.begin(), lost.end(), 0)); }

    void measure() {
        const auto g = [&](int i, int j) { return gram[i * count + j]; };
        for (int i = 0; i < count; ++i) lost[i] = !(g(i, i) <= kReach);
        for (int i = 0; i < count; ++i)
            for (int j = 0; j < count; ++j)
                squares[i * count + j] =
                    lost[i] || lost[j] ? kInf : std::max(0.0, g(i, i) + g(j, j) - 2 * g(i, j));
        const int rank = left() / 2;
        for (int i = 0; i < count; ++i) {
            std::copy_n(squares.begin() + i * count, count, keys_.begin());
            std::nth_element(keys_.begin(), keys_.begin() + rank, keys_.end());
            radii[i] = keys_[rank];
        }
    }

    // Calls gram_about(anchor), which fills gram and mean, for an anchor near most clients: about a far one the
    // others' differences would lose their digits, about a lost one all.
    template <class GramAbout>
    void settle(const GramAbout& gram_about) {
        const auto about = [&](int anchor) {
            gram_about(anchor);
            measure();
        };
        int anchor = 0, most = 0;
        for (int i = 0; i < count; ++i) {
            about(i);
            if (left() > most) {
                most = left();
                anchor = i;
            }
            if (2 * most > count) break;
            if (i + 1 == count && anchor != i) about(anchor);
        }
        if (most == 0) return;
        const auto least = std::min_element(radii.begin(), radii.end());
        const auto center = static_cast<int>(least - radii.begin());
        if (square(center, anchor) > 16 * *least) about(center);
    }

  private:
    std::vector<double> keys_;
};

// Weights of the geometric median as documented in feddistill_kernels/distances/__init__.py.
class Weiszfeld {
  public:
    Weiszfeld(int count, double tolerance, int max_iterations)
        : tolerance_(tolerance), max_iterations_(max_iterations), weights_(count), products_(count), far_(count) {
        kept_.reserve(count);
        gram_.resize(count * count);
    }

    void run(const Geometry& of, float* weights) {
        kept_.clear();
        for (int i = 0; i < of.count; ++i)
            if (!of.lost[i]) kept_.push_back(i);
        const int n = static_cast<int>(kept_.size());
        std::fill_n(weights, of.count, n ? 0.0f : std::numeric_limits<float>::quiet_NaN());
        if (n == 0) return;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) gram_[i * n + j] = of.gram[kept_[i] * of.count + kept_[j]];
        const double radius = *std::min_element(of.radii.begin(), of.radii.end());
        // If a client is the minimum, it is the one that is so among the clients.
        int middle = 0;
        double least = kInf;
        for (int i = 0; i < n; ++i) {
            double total = 0;
            for (int j = 0; j < n; ++j) total += std::sqrt(of.square(kept_[i], kept_[j]));
            if (total < least) {
                least = total;
                middle = i;
            }
        }
        for (int i = 0; i < n; ++i) far_[i] = of.square(kept_[middle], kept_[i]);
        const double floor = kSmoothing * kSmoothing * radius;
        if (!is_minimum(middle, floor, n)) {
            for (int i = 0; i < n; ++i) far_[i] = of.radii[kept_[i]];
            iterate(floor, n);
        }
        for (int i = 0; i < n; ++i) weights[kept_[i]] = static_cast<float>(weights_[i]);
    }

  private:
    // The others pull at a client with unit vectors; it is the minimum if it and those near it outweigh their sum.
    bool is_minimum(int middle, double floor, int n) {
        double total = 0, square = 0;
        int near = 0;
        for (int i = 0; i < n; ++i) {
            const bool is_near = far_[i] <= floor;
            near += is_near;
            weights_[i] = is_near ? 0 : 1 / std::sqrt(far_[i]);
            total += weights_[i];
        }
        multiply(n);
        for (int i = 0; i < n; ++i) square += weights_[i] * (products_[i] - 2 * total * gram_[middle * n + i]);
        square += total * total * gram_[middle * n + middle];
        if (std::sqrt(std::max(0.0, square)) >= near * (1 - kKinkMargin)) return false;
        for (int i = 0; i < n; ++i) weights_[i] = far_[i] <= floor ? 1.0 / near : 0;
        return true;
    }

    // From far_ as distances to begin with.  The radii are: outliers weigh little from the start.
    void iterate(double floor, int n) {
        reweigh(0, n);
        for (int step = 0; step < max_iterations_; ++step) {
            multiply(n);
            double square = 0;
            for (int i = 0; i < n; ++i) square += weights_[i] * products_[i];
            for (int i = 0; i < n; ++i) far_[i] = std::max(0.0, gram_[i * n + i] - 2 * products_[i] + square);
            if (reweigh(floor, n) <= tolerance_) break;
        }
    }

    void multiply(int n) {
        for (int i = 0; i < n; ++i) {
            double total = 0;
            for (int j = 0; j < n; ++j) total += gram_[i * n + j] * weights_[j];
            products_[i] = total;
        }
    }

    double reweigh(double floor, int n) {
        double total = 0, change = 0;
        for (int i = 0; i < n; ++i) total += far_[i] = 1 / std::sqrt(far_[i] + floor);
        for (int i = 0; i < n; ++i) {
            const double now = far_[i] / total;
            change = std::max(change, std::abs(now - weights_[i]));
            weights_[i] = now;
        }
        return change;
    }

    double tolerance_;
    int max_iterations_;
    std::vector<double> gram_, weights_, products_, far_;
    std::vector<int> kept_;
};

struct Scratch {
    std::vector<float> floats;
    std::vector<double> doubles;
    std::vector<int> chosen;
    std::vector<const void*> rows;

    explicit Scratch(int count)
        : floats(MomentsScratch::floats(count)),
          doubles(MomentsScratch::doubles(count)),
          chosen(count),
          rows(count) {}
    MomentsScratch of_moments() { return {floats.data(), doubles.data()}; }
    CombineScratch of_combine() { return {chosen.data(), rows.data()}; }
};

// A task cut into pieces that do not depend on threads: several whole rows, or a part of one.
class Reader {
  public:
    Reader(const Clients& clients, int threads, int set)
        : clients_(clients),
          moments_(FEDDISTILL_CHOOSE(set, moments)),
          combine_(FEDDISTILL_CHOOSE(set, combine)),
          columns_(std::min(clients.v, kShare)),
          rows_(std::max<std::int64_t>(1, kShare / clients.v)),
          across_((clients.v + columns_ - 1) / columns_),
          pieces_((clients.n + rows_ - 1) / rows_ * across_),
          threads_(worth(clients.n * clients.v * clients.count, threads)),
          scratch_(threads_, Scratch(clients.count)) {}

    void gram(Geometry& geometry) {
        const int c = clients_.count;
        std::vector<double> grams(pieces_ * c * c), means(pieces_ * c);
        geometry.settle([&](int anchor) {
            in_parallel(pieces_, threads_, [&](std::int64_t p, int thread) {
                moments_(clients_, anchor, piece(p), scratch_[thread].of_moments(), &grams[p * c * c], &means[p * c]);
            });
            std::fill(geometry.gram.begin(), geometry.gram.end(), 0.0);
            for (std::int64_t p = 0; p < pieces_; ++p) join(geometry, piece(p), &grams[p * c * c], &means[p * c]);
        });
    }

    // weights: [results][C].
    void combine(const float* weights, void* const* outs, int results) {
        in_parallel(pieces_, threads_, [&](std::int64_t p, int thread) {
            combine_(clients_, piece(p), weights, outs, results, scratch_[thread].of_combine());
        });
    }

  private:
    Piece piece(std::int64_t p) const {
        const std::int64_t first = p / across_ * rows_, begin = p % across_ * columns_;
        return {first, std::min(clients_.n, first + rows_), begin, std::min(clients_.v, begin + columns_)};
    }

    // As the blocks of a row are joined in distances_isa.cpp.
    void join(Geometry& to, const Piece& piece, const double* gram, const double* mean) const {
        const int c = clients_.count;
        for (int i = 0; i < c * c; ++i) to.gram[i] += gram[i];
        if (piece.begin == 0) {
            std::copy_n(mean, c, to.mean.begin());
            return;
        }
        const auto before = static_cast<double>(piece.begin), n = static_cast<double>(piece.end - piece.begin);
        const double share = n / (before + n);
        for (int i = 0; i < c; ++i)
            for (int j = 0; j < c; ++j)
                to.gram[i * c + j] += before * share * (mean[i] - to.mean[i]) * (mean[j] - to.mean[j]);
        for (int i = 0; i < c; ++i) to.mean[i] += share * (mean[i] - to.mean[i]);
    }

    const Clients& clients_;
    Moments* moments_;
    Combine* combine_;
    std::int64_t columns_, rows_, across_, pieces_;
    int threads_;
    std::vector<Scratch> scratch_;
};

void whole_median(const Clients& clients, Weiszfeld weiszfeld, void* out, int threads, int set) {
    Reader reader(clients, threads, set);
    Geometry geometry(clients.count);
    std::vector<float> weights(clients.count);
    reader.gram(geometry);
    weiszfeld.run(geometry, weights.data());
    reader.combine(weights.data(), &out, 1);
}


// A row's second read finds it in cache.
void median_by_rows(const Clients& clients, const Weiszfeld& weiszfeld, void* out, int threads, int set) {
    Moments* const moments = FEDDISTILL_CHOOSE(set, moments);
    Combine* const combine = FEDDISTILL_CHOOSE(set, combine);
    threads = worth(clients.n * clients.v * clients.count, threads);
    struct Worker {
        Scratch scratch;
        Geometry geometry;
        Weiszfeld weiszfeld;
        std::vector<float> weights;
    };
    const int c = clients.count;
    std::vector<Worker> workers(threads, {Scratch(c), Geometry(c), weiszfeld, std::vector<float>(c)});
    in_parallel(clients.n, threads, [&](std::int64_t row, int thread) {
        Worker& w = workers[thread];
        const Piece piece{row, row + 1, 0, clients.v};
        w.geometry.settle([&](int anchor) {
            moments(clients, anchor, piece, w.scratch.of_moments(), w.geometry.gram.data(), w.geometry.mean.data());
        });
        w.weiszfeld.run(w.geometry, w.weights.data());
        combine(clients, piece, w.weights.data(), &out, 1, w.scratch.of_combine());
    });
}

// Clients by ascending key, of equal keys the first, the lost last.
template <class Key>
std::vector<int> in_order(const Geometry& geometry, const Key& key) {
    std::vector<int> order(geometry.count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return std::pair(geometry.lost[a], key(a)) < std::pair(geometry.lost[b], key(b));
    });
    return order;
}

void choose(const std::vector<int>& order, int keep, float* weights) {
    for (int i = 0; i < keep; ++i) weights[order[i]] = 1.0f / static_cast<float>(keep);
}

}  // namespace

void geometric_median_cpu(const Clients& clients, bool per_row, double tolerance, int max_iterations, void* out,
                          int threads, int set) {
    constexpr std::int64_t kFewRows = 4, kLongRow = 4 * kShare;  // where threads share a row instead of the rows
    const Weiszfeld weiszfeld(clients.count, tolerance, max_iterations);
    if (!per_row) return whole_median(clients, weiszfeld, out, threads, set);
    if (clients.n >= kFewRows && clients.v < kLongRow) return median_by_rows(clients, weiszfeld, out, threads, set);
    std::vector<const void*> data(clients.data, clients.data + clients.count);
    const auto size = size_of(clients.dtype);
    for (std::int64_t row = 0; row < clients.n; ++row) {
        for (int i = 0; i < clients.count; ++i)
            data[i] = static_cast<const char*>(clients.data[i]) + row * clients.strides[i] * size;
        const Clients one{data.data(), clients.strides, clients.count, 1, clients.v, clients.dtype};
        whole_median(one, weiszfeld, static_cast<char*>(out) + row * clients.v * size, threads, set);
    }
}

void krum_cpu(const Clients& clients, int byzantine, int keep, void* out, int threads, int set) {
    const int c = clients.count;
    Reader reader(clients, threads, set);
    Geometry geometry(c);
    reader.gram(geometry);
    std::vector<double> scores(c), others;
    for (int i = 0; i < c; ++i) {
        others.clear();
        for (int j = 0; j < c; ++j)
            if (j != i) others.push_back(geometry.square(i, j));
        std::sort(others.begin(), others.end());
        scores[i] = std::accumulate(others.begin(), others.begin() + (c - byzantine - 2), 0.0);
    }
    std::vector<float> weights(c);
    choose(in_order(geometry, [&](int i) { return scores[i]; }), keep, weights.data());
    reader.combine(weights.data(), &out, 1);
}

void nearest_neighbour_mixing_cpu(const Clients& clients, int byzantine, void* const* outs, int threads, int set) {
    const int c = clients.count;
    Reader reader(clients, threads, set);
    Geometry geometry(c);
    reader.gram(geometry);
    std::vector<float> weights(std::size_t(c) * c);
    for (int i = 0; i < c; ++i) {
        const auto key = [&](int j) { return j == i && !geometry.lost[i] ? -1.0 : geometry.square(i, j); };
        choose(in_order(geometry, key), c - byzantine, weights.data() + i * c);
    }
    reader.combine(weights.data(), outs, c);
}

}  // namespace feddistill
