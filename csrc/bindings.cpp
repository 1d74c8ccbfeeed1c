// The only file that includes pybind11.  It translates; it does not compute.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.def("build_info", [] {
        py::dict info;
        info["compiler"] = FEDDISTILL_COMPILER;
        info["openmp"] = FEDDISTILL_OPENMP;
        info["cuda"] = FEDDISTILL_CUDA_STATE;
        return info;
    });
}
