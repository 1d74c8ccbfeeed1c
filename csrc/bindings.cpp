// The only file that includes pybind11.  It translates; it does not compute.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/instruction_sets.h"
#include "distances.h"
#include "order_statistics.h"

namespace py = pybind11;

namespace {

feddistill::TrimmedMean trimmed_mean_task(const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype,
                                          int trim, std::uintptr_t out) {
    static_assert(sizeof(std::uintptr_t) == sizeof(const void*));
    return {reinterpret_cast<const void* const*>(clients.data()),
            static_cast<int>(clients.size()),
            n,
            static_cast<feddistill::DType>(dtype),
            trim,
            reinterpret_cast<void*>(out)};
}

// Owns the arrays that a feddistill::Clients points to.
struct Clients {
    std::vector<std::uintptr_t> data;
    std::vector<std::int64_t> strides;
    std::int64_t n, v;
    int dtype;

    feddistill::Clients view() const {
        return {reinterpret_cast<const void* const*>(data.data()),
                strides.data(),
                static_cast<int>(data.size()),
                n,
                v,
                static_cast<feddistill::DType>(dtype)};
    }
};

void bind_distances(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> no_gil;
    py::class_<Clients>(m, "Clients")
        .def(py::init([](std::vector<std::uintptr_t> data, std::vector<std::int64_t> strides, std::int64_t n,
                         std::int64_t v, int dtype) {
            return Clients{std::move(data), std::move(strides), n, v, dtype};
        }));
    m.def(
        "geometric_median_cpu",
        [](const Clients& clients, bool per_row, double tolerance, int max_iterations, std::uintptr_t out, int threads,
           int set) {
            feddistill::geometric_median_cpu(clients.view(), per_row, tolerance, max_iterations,
                                             reinterpret_cast<void*>(out), threads, set);
        },
        py::arg("clients"), py::arg("per_row"), py::arg("tolerance"), py::arg("max_iterations"), py::arg("out"),
        py::arg("threads"), py::arg("set") = 0, no_gil);
    m.def(
        "krum_cpu",
        [](const Clients& clients, int byzantine, int keep, std::uintptr_t out, int threads, int set) {
            feddistill::krum_cpu(clients.view(), byzantine, keep, reinterpret_cast<void*>(out), threads, set);
        },
        py::arg("clients"), py::arg("byzantine"), py::arg("keep"), py::arg("out"), py::arg("threads"),
        py::arg("set") = 0, no_gil);
    m.def(
        "nearest_neighbour_mixing_cpu",
        [](const Clients& clients, int byzantine, const std::vector<std::uintptr_t>& outs, int threads, int set) {
            feddistill::nearest_neighbour_mixing_cpu(
                clients.view(), byzantine, reinterpret_cast<void* const*>(outs.data()), threads, set);
        },
        py::arg("clients"), py::arg("byzantine"), py::arg("outs"), py::arg("threads"), py::arg("set") = 0, no_gil);
}

}  // namespace

// Callers are feddistill_kernels/*/_native.py, which check what they pass.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.def(
        "trimmed_mean_cpu",
        [](const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype, int trim, std::uintptr_t out,
           int threads, int set) {
            feddistill::trimmed_mean_cpu(trimmed_mean_task(clients, n, dtype, trim, out), threads, set);
        },
        py::arg("clients"), py::arg("n"), py::arg("dtype"), py::arg("trim"), py::arg("out"), py::arg("threads"),
        py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    m.def(
        "around_median_cpu",
        [](const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype, int keep, std::uintptr_t out,
           int threads, int set) {
            feddistill::TrimmedMean task = trimmed_mean_task(clients, n, dtype, 0, out);
            task.nearest = keep;
            feddistill::trimmed_mean_cpu(task, threads, set);
        },
        py::arg("clients"), py::arg("n"), py::arg("dtype"), py::arg("keep"), py::arg("out"), py::arg("threads"),
        py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    bind_distances(m);
    m.def("instruction_sets", feddistill::instruction_sets);
#ifdef FEDDISTILL_WITH_CUDA
    m.def(
        "trimmed_mean_cuda",
        [](const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype, int trim, std::uintptr_t out,
           std::uintptr_t stream) {
            feddistill::trimmed_mean_cuda(trimmed_mean_task(clients, n, dtype, trim, out),
                                          reinterpret_cast<void*>(stream));
        },
        py::call_guard<py::gil_scoped_release>());
#endif
    m.def("build_info", [] {
        py::dict info;
        info["compiler"] = FEDDISTILL_COMPILER;
        info["instruction set"] = feddistill::instruction_sets().front();
        info["openmp"] = FEDDISTILL_OPENMP;
        info["cuda"] = FEDDISTILL_CUDA_STATE;
        return info;
    });
}
