// csrc/cuda/distances.cu in the emulator, with a C face for ctypes.
#include "../../csrc/cuda/distances.cu"

using namespace feddistill;

extern "C" std::int64_t workspace(const Clients& clients, int per_row) {
    return distances_workspace_cuda(clients, per_row != 0);
}
extern "C" const char* geometric_median(const Clients& clients, int per_row, double tolerance, int max_iterations,
                                        void* out, void* workspace) {
    return emulator::guarded([&] {
        geometric_median_cuda(clients, per_row != 0, tolerance, max_iterations, out, workspace, nullptr);
    });
}
extern "C" const char* krum(const Clients& clients, int byzantine, int keep, void* out, void* workspace) {
    return emulator::guarded([&] { krum_cuda(clients, byzantine, keep, out, workspace, nullptr); });
}
extern "C" const char* nearest_neighbour_mixing(const Clients& clients, int byzantine, void* const* outs,
                                                void* workspace) {
    return emulator::guarded([&] { nearest_neighbour_mixing_cuda(clients, byzantine, outs, workspace, nullptr); });
}
