// Aggregation of compressed answers: many clients' ids and log-probabilities to one's.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "no_id.h"

namespace feddistill {

enum class Rule : int {  // feddistill_kernels/aggregation/_native.py: RULES
    mean_probs = 0,
    mean_logits = 1,
    trimmed_mean = 2,
    mean_around_median = 3,
    geometric_median = 4,
};

struct CompressedClient {
    const std::int32_t* ids;  // [N, K]; kNoId is no entry
    const void* log_probs;    // [N, K]
    const float* missing;     // [N], the log-probability of each id that is not among ids
    std::int64_t ids_stride, log_probs_stride;  // from row to row
    std::int64_t kept;                          // K
    DType dtype;
};

struct Answers {
    const CompressedClient* clients;
    int count;  // C
    std::int64_t rows, vocab;
    const float* mixing;  // [C, C]: row c has the weights of the clients whose mean c becomes; null for no mixing
};

struct Combination {
    Rule rule;
    const float* shares;  // of client c in row n: [c * shares_stride + n * shares_step]; the mean rules only
    std::int64_t shares_stride, shares_step;
    int trim, keep;
    double tolerance;
    int max_iterations;
    std::int64_t k;       // entries of the result, <= min(sum of K, V)
    std::int32_t* ids;    // [N, k]
    float* log_probs;     // [N, k]
    float* log_tail;      // [N]
};

// Why a row has no result; it is not written.
struct NoResult {
    enum Reason { none, empty, ids };  // no id is left; a client has an id outside the vocabulary, or one twice
    std::int64_t row = -1;
    Reason reason = none;
};

// Returns the first row without a result.  Nothing depends on threads.
NoResult aggregate_cpu(const Answers& answers, const Combination& to, int threads, int set = 0);

// Squared distances [C, C] between centred answers, summed over rows; inf where they rule different ids out.  Ids are
// not checked: wrong ones give a wrong result, no wrong access.
void answer_distances_cpu(const Answers& answers, double* distances, int threads, int set = 0);

}  // namespace feddistill
