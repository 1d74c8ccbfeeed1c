// The only file that includes pybind11.  It translates; it does not compute.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <new>
#include <tuple>

#include "aggregation.h"
#include "cpu/instruction_sets.h"
#include "cpu/pages.h"
#include "distances.h"
#include "distillation.h"
#include "order_statistics.h"
#include "topk.h"

namespace py = pybind11;

namespace {

feddistill::TrimmedMean trimmed_mean_task(const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype,
                                          int trim, std::uintptr_t out, int nearest = 0) {
    static_assert(sizeof(std::uintptr_t) == sizeof(const void*));
    return {reinterpret_cast<const void* const*>(clients.data()),
            static_cast<int>(clients.size()),
            n,
            static_cast<feddistill::DType>(dtype),
            trim,
            reinterpret_cast<void*>(out),
            nearest};
}

// (address or 0, elements from row to row, dtype)
using MatrixOf = std::tuple<std::uintptr_t, std::int64_t, int>;

feddistill::Matrix matrix(const MatrixOf& m) {
    return {reinterpret_cast<void*>(std::get<0>(m)), std::get<1>(m), static_cast<feddistill::DType>(std::get<2>(m))};
}

// Addresses of ids, log_probs and missing; strides of the first two; K; dtype.
using Client = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t, std::int64_t,
                          int>;

std::vector<feddistill::CompressedClient> compressed(const std::vector<Client>& clients) {
    std::vector<feddistill::CompressedClient> list;
    for (const auto& [ids, log_probs, missing, ids_stride, log_probs_stride, kept, dtype] : clients)
        list.push_back({reinterpret_cast<const std::int32_t*>(ids), reinterpret_cast<const void*>(log_probs),
                        reinterpret_cast<const float*>(missing), ids_stride, log_probs_stride, kept,
                        static_cast<feddistill::DType>(dtype)});
    return list;
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

#ifdef FEDDISTILL_WITH_CUDA
void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void bind_cuda(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def(
        "trimmed_mean_cuda",
        [](const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype, int trim, std::uintptr_t out,
           std::uintptr_t stream) {
            feddistill::trimmed_mean_cuda(trimmed_mean_task(clients, n, dtype, trim, out), pointer(stream));
        },
        no_gil);
    m.def(
        "around_median_cuda",
        [](const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype, int keep, std::uintptr_t out,
           std::uintptr_t stream) {
            feddistill::trimmed_mean_cuda(trimmed_mean_task(clients, n, dtype, 0, out, keep), pointer(stream));
        },
        no_gil);
    m.def(
        "topk_cuda",
        [](std::int64_t rows, std::int64_t vocab, std::int64_t k, const MatrixOf& logits, double temperature,
           bool id_order, std::uintptr_t ids, std::uintptr_t log_probs, std::uintptr_t log_tail,
           std::uintptr_t stream) {
            feddistill::topk_cuda(
                {rows, vocab, k, matrix(logits), temperature, id_order, reinterpret_cast<std::int32_t*>(ids),
                 reinterpret_cast<float*>(log_probs), reinterpret_cast<float*>(log_tail)},
                pointer(stream));
        },
        no_gil);
    m.def("distances_workspace_cuda", [](const Clients& clients, bool per_row) {
        return feddistill::distances_workspace_cuda(clients.view(), per_row);
    });
    m.def(
        "geometric_median_cuda",
        [](const Clients& clients, bool per_row, double tolerance, int max_iterations, std::uintptr_t out,
           std::uintptr_t workspace, std::uintptr_t stream) {
            feddistill::geometric_median_cuda(clients.view(), per_row, tolerance, max_iterations, pointer(out),
                                              pointer(workspace), pointer(stream));
        },
        no_gil);
    m.def(
        "krum_cuda",
        [](const Clients& clients, int byzantine, int keep, std::uintptr_t out, std::uintptr_t workspace,
           std::uintptr_t stream) {
            feddistill::krum_cuda(clients.view(), byzantine, keep, pointer(out), pointer(workspace), pointer(stream));
        },
        no_gil);
    m.def(
        "nearest_neighbour_mixing_cuda",
        [](const Clients& clients, int byzantine, const std::vector<std::uintptr_t>& outs, std::uintptr_t workspace,
           std::uintptr_t stream) {
            feddistill::nearest_neighbour_mixing_cuda(clients.view(), byzantine,
                                                      reinterpret_cast<void* const*>(outs.data()), pointer(workspace),
                                                      pointer(stream));
        },
        no_gil);
}
#endif

}  // namespace

// Callers are feddistill_kernels/*/_native.py, which check what they pass.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.attr("keeps_pages") = feddistill::Pages::possible();
    m.def("drop_pages", feddistill::Pages::drop);
    py::class_<feddistill::Pages>(m, "Pages", py::buffer_protocol())
        .def(py::init([](std::int64_t bytes) {
            auto pages = std::make_unique<feddistill::Pages>(bytes);
            if (!pages->at()) throw std::bad_alloc();
            return pages;
        }))
        .def_buffer([](feddistill::Pages& pages) {
            return py::buffer_info(static_cast<std::uint8_t*>(pages.at()), pages.bytes());
        });
    m.def(
        "trimmed_mean_cpu",
        [](const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype, int trim, std::uintptr_t out,
           int threads, int set) {
            feddistill::trimmed_mean_cpu(trimmed_mean_task(clients, n, dtype, trim, out), threads, set);
        },
        py::arg("clients"), py::arg("n"), py::arg("dtype"), py::arg("trim"), py::arg("out"), py::arg("threads"),
        py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    py::list kinds;
    for (const char* name : feddistill::kKindNames) kinds.append(name);
    m.attr("kinds") = py::tuple(kinds);  // a kind's place is its number
    m.def(
        "distillation_cpu",
        [](std::int64_t rows, std::int64_t vocab, std::int64_t width, const MatrixOf& student, const MatrixOf& teacher,
           const MatrixOf& ids, const MatrixOf& log_tail, std::int64_t kept, std::uintptr_t labels,
           std::uintptr_t scale, const MatrixOf& gradient, std::uintptr_t loss, int kind, double beta,
           double temperature, double kd, double ce, int threads, int set) {
            const feddistill::Refusal refusal = feddistill::distillation_cpu(
                {rows, vocab, width, matrix(student), matrix(teacher), matrix(ids), matrix(log_tail), kept,
                 reinterpret_cast<const std::int64_t*>(labels), reinterpret_cast<const float*>(scale),
                 matrix(gradient), reinterpret_cast<float*>(loss), static_cast<feddistill::Kind>(kind), beta,
                 temperature, kd, ce},
                threads, set);
            return std::pair(refusal.row, static_cast<int>(refusal.reason));
        },
        py::arg("rows"), py::arg("vocab"), py::arg("width"), py::arg("student"), py::arg("teacher"), py::arg("ids"),
        py::arg("log_tail"), py::arg("kept"), py::arg("labels"), py::arg("scale"), py::arg("gradient"),
        py::arg("loss"), py::arg("kind"), py::arg("beta"), py::arg("temperature"), py::arg("kd"), py::arg("ce"),
        py::arg("threads"), py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    m.def(
        "scale_cpu",
        [](std::uintptr_t gradient, std::int64_t n, int dtype, float factor, std::uintptr_t out, int threads,
           int set) {
            feddistill::scale_cpu(reinterpret_cast<const void*>(gradient), n, static_cast<feddistill::DType>(dtype),
                                  factor, reinterpret_cast<void*>(out), threads, set);
        },
        py::arg("gradient"), py::arg("n"), py::arg("dtype"), py::arg("factor"), py::arg("out"), py::arg("threads"),
        py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    m.def(
        "topk_cpu",
        [](std::int64_t rows, std::int64_t vocab, std::int64_t k, const MatrixOf& logits, double temperature,
           bool id_order, std::uintptr_t ids, std::uintptr_t log_probs, std::uintptr_t log_tail, int threads,
           int set) {
            return feddistill::topk_cpu(
                {rows, vocab, k, matrix(logits), temperature, id_order, reinterpret_cast<std::int32_t*>(ids),
                 reinterpret_cast<float*>(log_probs), reinterpret_cast<float*>(log_tail)},
                threads, set);
        },
        py::arg("rows"), py::arg("vocab"), py::arg("k"), py::arg("logits"), py::arg("temperature"),
        py::arg("id_order"), py::arg("ids"), py::arg("log_probs"), py::arg("log_tail"), py::arg("threads"),
        py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    m.def(
        "aggregate_cpu",
        [](const std::vector<Client>& clients, std::int64_t rows, std::int64_t vocab, std::uintptr_t mixing, int rule,
           std::uintptr_t shares, std::int64_t shares_stride, std::int64_t shares_step, int trim, int keep,
           double tolerance, int max_iterations, std::int64_t k, std::uintptr_t ids, std::uintptr_t log_probs,
           std::uintptr_t log_tail, int threads, int set) {
            const auto list = compressed(clients);
            const feddistill::NoResult missing = feddistill::aggregate_cpu(
                {list.data(), static_cast<int>(list.size()), rows, vocab, reinterpret_cast<const float*>(mixing)},
                {static_cast<feddistill::Rule>(rule), reinterpret_cast<const float*>(shares), shares_stride,
                 shares_step, trim, keep, tolerance, max_iterations, k, reinterpret_cast<std::int32_t*>(ids),
                 reinterpret_cast<float*>(log_probs), reinterpret_cast<float*>(log_tail)},
                threads, set);
            return std::pair(missing.row, static_cast<int>(missing.reason));
        },
        py::arg("clients"), py::arg("rows"), py::arg("vocab"), py::arg("mixing"), py::arg("rule"), py::arg("shares"),
        py::arg("shares_stride"), py::arg("shares_step"), py::arg("trim"), py::arg("keep"), py::arg("tolerance"),
        py::arg("max_iterations"), py::arg("k"), py::arg("ids"), py::arg("log_probs"), py::arg("log_tail"),
        py::arg("threads"), py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    m.def(
        "answer_distances_cpu",
        [](const std::vector<Client>& clients, std::int64_t rows, std::int64_t vocab, std::uintptr_t mixing,
           std::uintptr_t distances, int threads, int set) {
            const auto list = compressed(clients);
            feddistill::answer_distances_cpu(
                {list.data(), static_cast<int>(list.size()), rows, vocab, reinterpret_cast<const float*>(mixing)},
                reinterpret_cast<double*>(distances), threads, set);
        },
        py::arg("clients"), py::arg("rows"), py::arg("vocab"), py::arg("mixing"), py::arg("distances"),
        py::arg("threads"), py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    m.def(
        "around_median_cpu",
        [](const std::vector<std::uintptr_t>& clients, std::int64_t n, int dtype, int keep, std::uintptr_t out,
           int threads, int set) {
            feddistill::trimmed_mean_cpu(trimmed_mean_task(clients, n, dtype, 0, out, keep), threads, set);
        },
        py::arg("clients"), py::arg("n"), py::arg("dtype"), py::arg("keep"), py::arg("out"), py::arg("threads"),
        py::arg("set") = 0, py::call_guard<py::gil_scoped_release>());
    bind_distances(m);
    m.def("instruction_sets", feddistill::instruction_sets);
#ifdef FEDDISTILL_WITH_CUDA
    m.def(
        "distillation_cuda",
        [](std::int64_t rows, std::int64_t vocab, std::int64_t width, const MatrixOf& student, const MatrixOf& teacher,
           const MatrixOf& ids, const MatrixOf& log_tail, std::int64_t kept, std::uintptr_t labels,
           std::uintptr_t scale, const MatrixOf& gradient, std::uintptr_t loss, int kind, double beta,
           double temperature, double kd, double ce, std::uintptr_t stream) {
            feddistill::distillation_cuda(
                {rows, vocab, width, matrix(student), matrix(teacher), matrix(ids), matrix(log_tail), kept,
                 reinterpret_cast<const std::int64_t*>(labels), reinterpret_cast<const float*>(scale),
                 matrix(gradient), reinterpret_cast<float*>(loss), static_cast<feddistill::Kind>(kind), beta,
                 temperature, kd, ce},
                reinterpret_cast<void*>(stream));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "scale_cuda",
        [](std::uintptr_t gradient, std::int64_t n, int dtype, std::uintptr_t factor, std::uintptr_t out,
           std::uintptr_t stream) {
            feddistill::scale_cuda(reinterpret_cast<const void*>(gradient), n, static_cast<feddistill::DType>(dtype),
                                   reinterpret_cast<const float*>(factor), reinterpret_cast<void*>(out),
                                   reinterpret_cast<void*>(stream));
        },
        py::call_guard<py::gil_scoped_release>());
    bind_cuda(m);
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
