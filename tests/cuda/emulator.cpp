// Kernels that are wrong, for the emulator to say so.
#include "../../csrc/cuda/device.h"

#include <cstdio>

using namespace feddistill;

namespace {

constexpr int kThreads = 64;

// Not all threads arrive at the barrier.
__global__ void some_wait(int*) {
    if (threadIdx.x < 40) barrier();
}

// A warp waits for the block, the other for its lanes.
__global__ void wait_apart(int*) {
    if (threadIdx.x < kWarp) barrier();
    else if (threadIdx.x != kWarp) warp_barrier();
}

// One block of the cluster leaves.
__global__ void one_leaves(int*) {
    if (cluster_rank() != 1) cluster_barrier();
}

// It may be at its end before the other has asked.
__global__ void leave_early(int* found) {
    cluster_barrier();
    for (int i = 0; i < 3; ++i) barrier();
    if (cluster_rank() == 0) atomic_add(found, *in_block(dynamic_shared<int>(), 1) != 0);
}

__global__ void write_past_end(int*) { dynamic_shared<float>()[kThreads + threadIdx.x] = 1; }

// Without a barrier between: not every thread finds what its neighbour wrote.
__global__ void miss_a_barrier(int* found) {
    int* const all = dynamic_shared<int>();
    all[threadIdx.x] = 7;
    atomic_add(found, all[(threadIdx.x + 1) % kThreads] == 7);
}

// A block writes again what another may not have read.
__global__ void miss_a_cluster_barrier(int* found) {
    int* const mine = dynamic_shared<int>();
    if (threadIdx.x == 0) *mine = 7;
    cluster_barrier();
    const int seen = *in_block(mine, 1 - cluster_rank());
    for (int i = 0; i < 3; ++i) barrier();
    if (threadIdx.x == 0) *mine = 8;
    atomic_add(found, seen == 7);
    cluster_barrier();
}

__global__ void right(int* found) {
    int* const all = dynamic_shared<int>();
    all[threadIdx.x] = 7;
    cluster_barrier();
    atomic_add(found, in_block(all, 1 - cluster_rank())[(threadIdx.x + 1) % kThreads] == 7);
    cluster_arrive();
    cluster_wait();
}

}  // namespace

// Returns how many threads found what they looked for, or -1 with what went wrong in `message`.
extern "C" int run(int which, char* message, std::size_t room) {
    void (*const kernels[])(int*) = {some_wait,      wait_apart, one_leaves, leave_early, write_past_end,
                                     miss_a_barrier, miss_a_cluster_barrier, right};
    int found = 0;
    try {
        launch_clusters(kernels[which], 2, kThreads, 2, kThreads * sizeof(float), nullptr, &found);
        return found;
    } catch (const std::exception& error) {
        std::snprintf(message, room, "%s", error.what());
        return -1;
    }
}
