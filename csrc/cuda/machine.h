// What kernels ask of the machine, and no more, so that a test can be another one: with FEDDISTILL_EMULATED a CPU
// whose every CUDA thread is a coroutine (tests/cuda/emulator.h).
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef FEDDISTILL_EMULATED
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace feddistill {

constexpr int kWarp = 32;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// All threads of a block must arrive.
__device__ inline void barrier() { __syncthreads(); }
__device__ inline bool barrier_or(bool x) { return __syncthreads_or(x); }

// All threads of a warp must arrive.
__device__ inline void warp_barrier() { __syncwarp(); }
__device__ inline unsigned warp_ballot(bool x) { return __ballot_sync(~0u, x); }
__device__ inline bool warp_any(bool x) { return __any_sync(~0u, x); }
template <typename T>
__device__ T warp_broadcast(T x, int from) {
    return __shfl_sync(~0u, x, from);
}
template <typename T>
__device__ T warp_up(T x, int distance) {
    return __shfl_up_sync(~0u, x, distance);
}
template <typename T>
__device__ T warp_xor(T x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
}

__device__ inline int popcount(unsigned x) { return __popc(x); }
__device__ inline int first_lane(unsigned x) { return __ffs(x) - 1; }
__device__ inline int atomic_add(int* at, int x) { return atomicAdd(at, x); }
__device__ inline unsigned atomic_or(unsigned* at, unsigned x) { return atomicOr(at, x); }

__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of_bits(unsigned x) { return __uint_as_float(x); }
__device__ inline float half_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline std::uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline std::uint16_t float_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// 2^x to 2 ulp; 0 for what is less than the least normal number.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// log2(x) to 2^-22, or 2 ulp where that is more; of a subnormal number -infinity.
__device__ inline float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1/x to 1 ulp.
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Minimum and maximum of one float, or of two halves; NaN if either is.
#define FEDDISTILL_EXTREME(name, instruction)                                            \
    __device__ inline unsigned name(unsigned a, unsigned b) {                            \
        unsigned y;                                                                      \
        asm(instruction " %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));                      \
        return y;                                                                        \
    }
FEDDISTILL_EXTREME(smaller_f32, "min.NaN.f32")
FEDDISTILL_EXTREME(larger_f32, "max.NaN.f32")
FEDDISTILL_EXTREME(smaller_f16, "min.NaN.f16x2")
FEDDISTILL_EXTREME(larger_f16, "max.NaN.f16x2")
FEDDISTILL_EXTREME(smaller_bf16, "min.NaN.bf16x2")
FEDDISTILL_EXTREME(larger_bf16, "max.NaN.bf16x2")
#undef FEDDISTILL_EXTREME

// 16 bytes from global to shared memory, both aligned, while the thread goes on.
__device__ inline void copy_async(void* to, const void* from) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// Until this thread's copies have arrived; the others' need a barrier after it.
__device__ inline void copies_arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <typename T>
__device__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
}
// The block's memory for reductions, kScratchBytes.
constexpr int kScratchBytes = 1024;
template <typename T>
__device__ T* block_scratch() {
    __shared__ __align__(16) unsigned char bytes[kScratchBytes];
    return reinterpret_cast<T*>(bytes);
}

// The blocks of a cluster see each other's shared memory.  Before sm_90 every block is one by itself.
__device__ inline int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
    return 0;
#endif
}
__device__ inline int cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
    return 1;
#endif
}
__device__ inline void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
}
// In two halves: what the other threads wait for, and the wait.  A warp may come to them thread by thread.
__device__ inline void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// What stands at `at` in this block's shared memory, in that of another block of the cluster.
template <typename T>
__device__ T* in_block(T* at, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(at, rank);
#else
    return at;
#endif
}

inline void require(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// What a block may ask of shared memory, and whether there are clusters, on the current device.
struct Machine {
    int shared_bytes, processors, capability;
};
inline Machine machine() {
    Machine found{};
    int device = 0, minor = 0;
    require(cudaGetDevice(&device), "cudaGetDevice");
    require(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
    require(cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device), "device");
    require(cudaDeviceGetAttribute(&found.capability, cudaDevAttrComputeCapabilityMajor, device), "device");
    require(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
    found.capability = 10 * found.capability + minor;
    return found;
}

// `grid` blocks in clusters of `cluster`, on `stream`; a cluster attribute is set only if it has more than one.
template <typename... P, typename... A>
void launch_clusters(void (*kernel)(P...), int grid, int threads, int cluster, std::size_t shared, void* stream,
                     const A&... arguments) {
    constexpr std::size_t kAlwaysThere = 48 * 1024 - kScratchBytes;
    if (shared > kAlwaysThere)
        require(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
                "shared memory of a kernel");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    require(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), "launch of a kernel");
}

}  // namespace feddistill
#endif

namespace feddistill {

template <typename... P, typename... A>
void launch(void (*kernel)(P...), int grid, int threads, std::size_t shared, void* stream, const A&... arguments) {
    launch_clusters(kernel, grid, threads, 1, shared, stream, arguments...);
}

}  // namespace feddistill
