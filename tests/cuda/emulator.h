// csrc/cuda/machine.h on a CPU: every thread of a cluster is a coroutine, and what waits is checked.
//
// Between two barriers the threads run one after the other in an order drawn anew each time, and one block of the
// cluster, drawn too, runs only when the others cannot go on: so what needs a barrier and has none goes wrong.  A
// barrier that not all arrive at, shared memory written past its end, and that of a block at its own end, end the
// launch with an error that says so.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace feddistill {

using std::max;
using std::min;

constexpr int kWarp = 32;
constexpr int kScratchBytes = 1024;

namespace emulator {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0x7f, kFresh = 0xff;  // as floats, huge and NaN

// Opens when `size` have arrived.
struct Gate {
    int size = 0, arrived = 0;
    std::uint64_t opened = 0;
};

struct Warp {
    Gate gate;
    unsigned char values[2][kWarp][8];  // of the last exchange and of the one before, which some still read
};

struct Block {
    int index = 0, rank = 0, threads = 0, done = 0;
    Gate gate;
    bool any[2] = {};
    std::vector<Warp> warps;
    std::vector<unsigned char> shared, scratch;
    unsigned char* base() { return shared.data() + kGuardBytes; }
};

struct Thread {
    ucontext_t start;  // where it begins; where it goes on is `at`, for swapcontext makes two system calls
    jmp_buf at;
    bool begun = false;
    std::unique_ptr<unsigned char[]> stack;
    Block* block = nullptr;
    int index = 0;
    bool done = false;
    const Gate* waits_at = nullptr;
    std::uint64_t until = 0;
    std::uint64_t exchanges = 0, votes = 0, arrival = 0;
    const char* where = "its end";
};

struct Cluster {
    std::vector<Block> blocks;
    Gate gate;
    std::vector<Thread> threads;
    jmp_buf scheduler;
    const std::function<void()>* kernel = nullptr;
    std::exception_ptr failure;
};

inline Cluster* cluster = nullptr;
inline Thread* self = nullptr;
inline int grid = 0;
inline int shared_limit = 227 * 1024, most_in_cluster = 8, processor_count = 4, capability = 90;  // see Machine
inline std::mt19937 order;

// Returns how often the gate must have opened before this thread may pass.
inline std::uint64_t arrive(Gate& gate) {
    const std::uint64_t until = gate.opened + 1;
    if (++gate.arrived == gate.size) {
        gate.arrived = 0;
        ++gate.opened;
    }
    return until;
}

// Runs a thread until it waits or is at its end.
[[gnu::noinline]] inline void resume(Thread& thread) {
    self = &thread;
    if (_setjmp(cluster->scheduler)) return;
    if (thread.begun) _longjmp(thread.at, 1);
    thread.begun = true;
    setcontext(&thread.start);
}

[[gnu::noinline]] inline void suspend() {
    if (!_setjmp(self->at)) _longjmp(cluster->scheduler, 1);
}

inline void pass(const Gate& gate, std::uint64_t until, const char* where) {
    if (gate.opened >= until) return;
    self->where = where;
    self->waits_at = &gate;
    self->until = until;
    suspend();
}

inline void wait(Gate& gate, const char* where) { pass(gate, arrive(gate), where); }

inline void enter() {
    try {
        (*cluster->kernel)();
    } catch (...) {
        cluster->failure = std::current_exception();
    }
    self->done = true;
    ++self->block->done;
    suspend();
}

inline void check_guards(const Block& block) {
    const auto end = block.shared.size();
    for (std::size_t i = 0; i < kGuardBytes; ++i)
        if (block.shared[i] != kGuard || block.shared[end - 1 - i] != kGuard)
            throw std::runtime_error("block " + std::to_string(block.index) + " wrote outside its shared memory");
}

inline void run_cluster(Cluster& all) {
    std::vector<Thread*> waiting;
    for (Thread& thread : all.threads) waiting.push_back(&thread);
    const auto blocks = static_cast<unsigned>(all.blocks.size());
    const Block* behind = nullptr;
    while (!waiting.empty()) {
        std::shuffle(waiting.begin(), waiting.end(), order);
        bool moved = false;
        for (Thread* thread : waiting) {
            if (thread->block == behind) continue;
            if (thread->waits_at && thread->waits_at->opened < thread->until) continue;
            thread->waits_at = nullptr;
            moved = true;
            resume(*thread);
            if (all.failure) std::rethrow_exception(all.failure);
        }
        std::erase_if(waiting, [](const Thread* thread) { return thread->done; });
        if (!moved && !behind) break;
        if (!moved) behind = nullptr;
        else if (!behind && blocks > 1) behind = &all.blocks[order() % blocks];
    }
    if (!waiting.empty()) {
        const Thread& stuck = *waiting.front();
        throw std::runtime_error("deadlock: thread " + std::to_string(stuck.index) + " of block " +
                                 std::to_string(stuck.block->index) + " waits at " + stuck.where + " with " +
                                 std::to_string(waiting.size()) + " of " + std::to_string(all.threads.size()) +
                                 " threads not at their end");
    }
    for (const Block& block : all.blocks) check_guards(block);
}

inline void run(const std::function<void()>& kernel, int blocks, int threads, int in_cluster, std::size_t shared) {
    if (threads % kWarp || threads > 1024) throw std::runtime_error("a block of " + std::to_string(threads));
    if (blocks % in_cluster) throw std::runtime_error("the grid is no multiple of its clusters");
    if (in_cluster > most_in_cluster) throw std::runtime_error("a cluster of " + std::to_string(in_cluster));
    if (shared + kScratchBytes > static_cast<std::size_t>(shared_limit))
        throw std::runtime_error("a block of " + std::to_string(shared) + " bytes of shared memory");
    grid = blocks;
    for (int first = 0; first < blocks; first += in_cluster) {
        Cluster all;
        all.kernel = &kernel;
        all.gate.size = in_cluster * threads;
        all.blocks.resize(in_cluster);
        all.threads.resize(static_cast<std::size_t>(in_cluster) * threads);
        for (int rank = 0; rank < in_cluster; ++rank) {
            Block& block = all.blocks[rank];
            block.index = first + rank;
            block.rank = rank;
            block.threads = block.gate.size = threads;
            block.warps.resize(threads / kWarp);
            for (Warp& warp : block.warps) warp.gate.size = kWarp;
            block.shared.assign(shared + 2 * kGuardBytes, kGuard);
            std::fill_n(block.base(), shared, kFresh);
            block.scratch.assign(kScratchBytes, kFresh);
            for (int i = 0; i < threads; ++i) {
                Thread& thread = all.threads[static_cast<std::size_t>(rank) * threads + i];
                thread.block = &block;
                thread.index = i;
                thread.stack = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
                getcontext(&thread.start);
                thread.start.uc_stack.ss_sp = thread.stack.get();
                thread.start.uc_stack.ss_size = kStackBytes;
                thread.start.uc_link = nullptr;
                makecontext(&thread.start, enter, 0);
            }
        }
        cluster = &all;
        run_cluster(all);
        cluster = nullptr;
    }
}

// What is launched while this lives runs on such a machine.  Libraries of one process have one emulator: what is set
// here and left would be the others' machine too.
class Machine {
  public:
    Machine(int shared, int processors, int version)
        : shared_(std::exchange(shared_limit, shared)),
          processors_(std::exchange(processor_count, processors)),
          capability_(std::exchange(capability, version)) {}
    ~Machine() { shared_limit = shared_, processor_count = processors_, capability = capability_; }
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;

  private:
    int shared_, processors_, capability_;
};

// What a call says goes wrong, for Python to raise; null where nothing does.
template <typename Call>
const char* guarded(Call call) {
    static std::string text;
    try {
        call();
        return nullptr;
    } catch (const std::exception& error) {
        text = error.what();
        return text.c_str();
    }
}

// threadIdx and its like: only .x is known.
struct Index {
    int (*of)();
    struct X {
        int (*of)();
        operator unsigned() const { return static_cast<unsigned>(of()); }
    } x{of};
};

template <typename T>
T exchange(T x, int from, const char* where) {
    static_assert(sizeof(T) <= 8);
    Warp& warp = self->block->warps[self->index / kWarp];
    auto& values = warp.values[self->exchanges++ % 2];
    std::memcpy(values[self->index % kWarp], &x, sizeof(T));
    wait(warp.gate, where);
    std::memcpy(&x, values[from], sizeof(T));
    return x;
}

}  // namespace emulator

inline const emulator::Index threadIdx{[] { return emulator::self->index; }};
inline const emulator::Index blockIdx{[] { return emulator::self->block->index; }};
inline const emulator::Index blockDim{[] { return emulator::self->block->threads; }};
inline const emulator::Index gridDim{[] { return emulator::grid; }};

inline int lane() { return emulator::self->index % kWarp; }
inline void barrier() { emulator::wait(emulator::self->block->gate, "a barrier"); }
inline bool barrier_or(bool x) {
    emulator::Block& block = *emulator::self->block;
    bool& any = block.any[emulator::self->votes % 2];
    block.any[++emulator::self->votes % 2] = false;  // of the next vote, in which nobody is yet
    any |= x;
    barrier();
    const bool result = any;
    barrier();
    return result;
}
inline void warp_barrier() { emulator::exchange(0, 0, "a warp's barrier"); }
template <typename T>
T warp_broadcast(T x, int from) {
    return emulator::exchange(x, from & (kWarp - 1), "a broadcast");
}
template <typename T>
T warp_up(T x, int distance) {
    return emulator::exchange(x, lane() < distance ? lane() : lane() - distance, "a shift");
}
template <typename T>
T warp_xor(T x, int mask) {
    return emulator::exchange(x, lane() ^ mask, "an exchange");
}
inline unsigned warp_ballot(bool x) {
    emulator::Thread& me = *emulator::self;
    emulator::Warp& warp = me.block->warps[me.index / kWarp];
    auto& values = warp.values[me.exchanges % 2];
    emulator::exchange(x, 0, "a ballot");
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) votes |= static_cast<unsigned>(values[i][0] != 0) << i;
    return votes;
}
inline bool warp_any(bool x) { return warp_ballot(x) != 0; }

inline int popcount(unsigned x) { return std::popcount(x); }
inline int first_lane(unsigned x) { return x ? std::countr_zero(x) : -1; }
inline int atomic_add(int* at, int x) { return std::exchange(*at, *at + x); }
inline unsigned atomic_or(unsigned* at, unsigned x) { return std::exchange(*at, *at | x); }

inline unsigned bits_of(float x) { return std::bit_cast<unsigned>(x); }
inline float float_of_bits(unsigned x) { return std::bit_cast<float>(x); }
inline float half_to_float(std::uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline std::uint16_t float_to_half(float x) { return std::bit_cast<std::uint16_t>(static_cast<_Float16>(x)); }
inline std::uint16_t float_to_bf16(float x) {
    const unsigned bits = bits_of(x);
    if (x != x) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float without_subnormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_fast(float x) { return without_subnormals(std::exp2(without_subnormals(x))); }
inline float log2_fast(float x) { return std::log2(without_subnormals(x)); }
inline float reciprocal(float x) { return without_subnormals(1 / without_subnormals(x)); }

namespace emulator {
template <typename Choose>
unsigned of_halves(unsigned a, unsigned b, float (*widen)(std::uint16_t), Choose choose) {
    unsigned result = 0;
    for (int shift : {0, 16}) {
        const auto x = static_cast<std::uint16_t>(a >> shift), y = static_cast<std::uint16_t>(b >> shift);
        const float u = widen(x), v = widen(y);
        const std::uint16_t chosen = u != u || v != v ? 0x7fff : choose(u, v) ? x : y;
        result |= static_cast<unsigned>(chosen) << shift;
    }
    return result;
}
inline float widen_bf16(std::uint16_t bits) { return float_of_bits(static_cast<unsigned>(bits) << 16); }
inline bool less(float a, float b) { return a < b || (a == b && std::signbit(a)); }
inline bool more(float a, float b) { return less(b, a); }
}  // namespace emulator

inline unsigned smaller_f32(unsigned a, unsigned b) {
    const float x = float_of_bits(a), y = float_of_bits(b);
    return x != x || y != y ? 0x7fffffff : emulator::less(x, y) ? a : b;
}
inline unsigned larger_f32(unsigned a, unsigned b) {
    const float x = float_of_bits(a), y = float_of_bits(b);
    return x != x || y != y ? 0x7fffffff : emulator::more(x, y) ? a : b;
}
inline unsigned smaller_f16(unsigned a, unsigned b) {
    return emulator::of_halves(a, b, half_to_float, emulator::less);
}
inline unsigned larger_f16(unsigned a, unsigned b) { return emulator::of_halves(a, b, half_to_float, emulator::more); }
inline unsigned smaller_bf16(unsigned a, unsigned b) {
    return emulator::of_halves(a, b, emulator::widen_bf16, emulator::less);
}
inline unsigned larger_bf16(unsigned a, unsigned b) {
    return emulator::of_halves(a, b, emulator::widen_bf16, emulator::more);
}

inline void copy_async(void* to, const void* from) {
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16)
        throw std::runtime_error("a copy of 16 bytes that are not aligned");
    std::memcpy(to, from, 16);
}
inline void copies_arrived() {}

template <typename T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(emulator::self->block->base());
}
template <typename T>
T* block_scratch() {
    return reinterpret_cast<T*>(emulator::self->block->scratch.data());
}

inline int cluster_rank() { return emulator::self->block->rank; }
inline int cluster_size() { return static_cast<int>(emulator::cluster->blocks.size()); }
inline void cluster_barrier() { emulator::wait(emulator::cluster->gate, "a barrier of the cluster"); }
inline void cluster_arrive() { emulator::self->arrival = emulator::arrive(emulator::cluster->gate); }
inline void cluster_wait() {
    emulator::pass(emulator::cluster->gate, emulator::self->arrival, "the other half of a barrier of the cluster");
}
template <typename T>
T* in_block(T* at, int rank) {
    auto& blocks = emulator::cluster->blocks;
    if (blocks[static_cast<std::size_t>(rank)].done == blocks[static_cast<std::size_t>(rank)].threads)
        throw std::runtime_error("the shared memory of a block that is at its end");
    const auto offset = reinterpret_cast<unsigned char*>(at) - emulator::self->block->base();
    return reinterpret_cast<T*>(blocks[static_cast<std::size_t>(rank)].base() + offset);
}

struct Machine {
    int shared_bytes, processors, capability;
};
inline Machine machine() {
    return {emulator::shared_limit, emulator::processor_count, emulator::capability};
}

template <typename... P, typename... A>
void launch_clusters(void (*kernel)(P...), int grid, int threads, int cluster, std::size_t shared, void*,
                     const A&... arguments) {
    emulator::run([&] { kernel(arguments...); }, grid, threads, cluster, shared);
}

}  // namespace feddistill
