"""CUDA kernels without a GPU: the sources that nvcc compiles, built by the C++ compiler for an emulator."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GUARDED = {
    "distances": ("geometric_median", "krum", "nearest_neighbour_mixing"),
    "distillation": ("scale",),
    "order_statistics": ("trimmed",),
    "topk": ("compress",),
}
"""By library, functions that return what went wrong: a C++ exception would end this process."""
OPTIMISED = {"order_statistics": "-O0"}
"""Its networks for every number of clients take 11 s to optimise, and 3 s more to run if they are not."""


def _raise(said, function, arguments):
    if said is not None:
        raise RuntimeError(said.decode())


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Build ``NAME.cpp`` of this folder, once, and load it."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} to compile the kernels with")
    folder, loaded = tmp_path_factory.mktemp("emulated"), {}

    def load(name):
        if name not in loaded:
            library = folder / f"{name}.so"
            options = [
                "-std=c++20",
                OPTIMISED.get(name, "-O1"),
                "-U_FORTIFY_SOURCE",  # its longjmp stays on one stack
                "-fPIC",
                "-shared",
                "-DFEDDISTILL_EMULATED",
                "-DFEDDISTILL_WITH_CUDA",
            ]
            command = [compiler, *options, "-I", HERE, HERE / f"{name}.cpp", "-o", library]
            subprocess.run(command, check=True)
            loaded[name] = ctypes.CDLL(str(library))
            for function in GUARDED.get(name, ()):
                found = getattr(loaded[name], function)
                found.restype, found.errcheck = ctypes.c_char_p, _raise
        return loaded[name]

    return load
