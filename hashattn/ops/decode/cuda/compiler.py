"""Compiles the CUDA kernels for the GPU that is there, keeps what came out in the user's cache, and launches it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch

from hashattn.core.files import default_cache_dir, keep, kept, private_folder

RESERVED = 1024  # bytes of shared memory that a program takes beside its own
SOURCES = Path(__file__).parent
Defines = tuple[tuple[str, int], ...]
Grid = tuple[int, int, int]


@functools.cache
def why_not() -> str | None:
    """Why kernels cannot be compiled here, as the end of a sentence; None if they can."""
    try:
        from cuda.bindings import nvrtc

        _version(nvrtc)
    except ImportError:
        return 'CUDA C++ needs cuda-bindings: pip install "hashattn[gpu]"'
    except Exception as error:  # what is raised where the library is missing depends on the version
        return f"CUDA C++ needs NVRTC, which does not load: {_first_line(error)}"
    return None


@functools.cache
def why_not_on(device: int) -> str | None:
    """The same of a GPU, which is tried with a kernel that does nothing; kernels can be compiled here."""
    from cuda.bindings import nvrtc

    try:
        (major, minor), arch = _version(nvrtc), _arch(device)
        if arch not in _checked(nvrtc.nvrtcGetSupportedArchs()):
            return f"NVRTC {major}.{minor} does not know compute capability {arch // 10}.{arch % 10}"
        _loaded(_compiled(b'extern "C" __global__ void nothing() {}', "nothing", [], [], arch), "nothing", device)
    except Exception as error:  # of a driver that is too old, say
        return f"CUDA C++ does not run on this GPU with this driver: {_first_line(error)}"
    return None


def compile(name: str, defines: Defines, arch: int) -> bytes:
    """Machine code of name.cu for a GPU of compute capability arch / 10.

    Raises:
        RuntimeError: it does not compile; the compiler's messages are in the error.
    """

    headers = sorted(SOURCES.glob("*.cuh"))
    options = ["--std=c++17", *(f"-D{key}={value}" for key, value in defines)]
    return _compiled((SOURCES / f"{name}.cu").read_bytes(), f"{name}.cu", headers, options, arch)


def cached(name: str, defines: Defines, arch: int) -> bytes:
    """The same from the user's cache, where it is kept under what it was made of."""
    from cuda.bindings import nvrtc

    made_of = hashlib.sha256(repr((name, defines, arch, _version(nvrtc))).encode())
    for source in sorted(SOURCES.glob("*.cu*")):
        made_of.update(source.read_bytes())
    stem = f"{name}-{made_of.hexdigest()[:32]}"
    code: bytes | None = None
    try:
        folder = private_folder(default_cache_dir() / "kernels")
        if (path := kept(folder, stem, ".cubin")) is not None:
            return path.read_bytes()
        code = compile(name, defines, arch)
        keep(folder, stem, ".cubin", code)
    except OSError as error:
        warnings.warn(
            f"each process compiles CUDA kernels anew, which takes seconds: {error}; set HASHATTN_CACHE to a folder of "
            "yours",
            stacklevel=2,
        )
    return compile(name, defines, arch) if code is None else code


@functools.cache
def kernel(name: str, defines: Defines, device: int) -> Any:
    """The kernel `name` of name.cu, loaded on a device. The first call of its kind compiles, which takes seconds."""
    return _loaded(cached(name, defines, _arch(device)), name, device)


@functools.cache
def padding(kernel: Any, programs: int, device: int) -> int:
    """Bytes of shared memory to ask for beside the kernel's own, so that multiprocessors get equal numbers of programs.

    Programs that start while the kernel before ends go where it has ended, and would fill a few multiprocessors.
    """
    from cuda.bindings import driver

    attributes = driver.CUfunction_attribute
    own = _checked(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel))
    gpu = torch.cuda.get_device_properties(device)
    most = gpu.shared_memory_per_multiprocessor - RESERVED - own
    each = gpu.shared_memory_per_multiprocessor // -(-programs // gpu.multi_processor_count)
    wanted = max(0, each - RESERVED - own) // 1024 * 1024
    attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(kernel, attribute, most))
    return wanted


class Launcher:
    """Launches of a kernel of one argument, whose memory each launch reads anew.

    Args:
        kernel: on the current GPU.
        grid, threads: its programs and their threads.
        argument: kept, and given by its address.
        early: it may start while the kernel before it ends.
        even: multiprocessors get equal numbers of programs, also if it starts early.
    """

    def __init__(
        self, kernel: Any, grid: Grid, threads: int, argument: ctypes.Structure, *, early: bool, even: bool
    ) -> None:
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        if early and even:
            config.sharedMemBytes = padding(kernel, math.prod(grid), torch.cuda.current_device())
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        self._kernel, self._config, self._stream = kernel, config, -1
        self._given, self._address = (argument, pointers), ctypes.addressof(pointers)
        self._launch = driver.cuLaunchKernelEx

    def __call__(self, stream: int) -> None:
        """Launch it on a stream of the current GPU."""
        if stream != self._stream:
            self._config.hStream = self._stream = stream
        _checked(self._launch(self._config, self._kernel, self._address, 0))


def _compiled(source: bytes, name: str, headers: list[Path], options: list[str], arch: int) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source, name.encode(), len(headers), [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
        )
    )
    options = [f"--gpu-architecture=sm_{arch}", *options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile for sm_{arch} with {options}:\n{log.decode(errors='replace')}")
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _loaded(code: bytes, name: str, device: int) -> Any:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the device's context exists and is current
        module = _checked(driver.cuModuleLoadData(code))
    return _checked(driver.cuModuleGetFunction(module, name.encode()))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _arch(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _version(nvrtc: Any) -> tuple[int, int]:
    status, major, minor = nvrtc.nvrtcVersion()
    _checked((status,))
    return major, minor


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA says {status.name} ({int(status)})")
    return values[0] if values else None
