"""A simulated CUDA device: tensors on it have a shape, a dtype and a layout, but no numbers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.cpp_extension import include_paths

# torch for CPUs cannot enter a CUDA device, but has to before it copies or indexes; this guard does nothing.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""


class NoDevice(FakeTensorMode):  # type: ignore[no-untyped-call]  # its base class has no types
    """A mode in which tensors have no numbers, and constants need no device."""

    avoid_device_init = True


def register_guard() -> None:
    """Enable this process to enter the simulated CUDA device.

    Raises: RuntimeError if torch is built for a GPU, or without a C++ compiler.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        raise RuntimeError("this torch is built for a GPU, where a torch for CPUs is needed")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler")
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        includes = [f"-I{path}" for path in include_paths()]
        linked = ["-L", str(Path(torch.__file__).parent / "lib"), "-lc10"]
        command = [compiler, "-std=c++20", "-shared", "-fPIC", *includes, str(source), *linked, "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise RuntimeError(f"the C++ compiler fails: {built.stderr[-300:]}")
        ctypes.CDLL(str(library))
