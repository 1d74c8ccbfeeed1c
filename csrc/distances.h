// Rules that look at distances between whole clients: inner products of their centred rows, then a weighted mean.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace feddistill {

struct Clients {
    const void* const* data;      // pointers to n rows of v contiguous elements each
    const std::int64_t* strides;  // for each client, elements from one row to the next
    int count;                    // C >= 1
    std::int64_t n, v;            // >= 1
    DType dtype;
};

// Results are [n][v], contiguous, and do not depend on threads.  set: see cpu/instruction_sets.h.
void geometric_median_cpu(const Clients& clients, bool per_row, double tolerance, int max_iterations, void* out,
                          int threads, int set = 0);
// C >= 2 byzantine + 3, 1 <= keep <= C.
void krum_cpu(const Clients& clients, int byzantine, int keep, void* out, int threads, int set = 0);
// outs: C results; 0 <= byzantine < C.
void nearest_neighbour_mixing_cpu(const Clients& clients, int byzantine, void* const* outs, int threads, int set = 0);

#ifdef FEDDISTILL_WITH_CUDA
constexpr int kMostCudaClients = 16;

// Clients and results are the device's; count <= kMostCudaClients; stream is a cudaStream_t.  workspace: so many bytes
// on the device, of which nothing is kept.
std::int64_t distances_workspace_cuda(const Clients& clients, bool per_row);
void geometric_median_cuda(const Clients& clients, bool per_row, double tolerance, int max_iterations, void* out,
                           void* workspace, void* stream);
void krum_cuda(const Clients& clients, int byzantine, int keep, void* out, void* workspace, void* stream);
void nearest_neighbour_mixing_cuda(const Clients& clients, int byzantine, void* const* outs, void* workspace,
                                   void* stream);
#endif

}  // namespace feddistill
