"""Runs the decode kernels in CUDA C++ on a CPU: compiled by g++ with emulator.h, block after block."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hashattn.core.files import default_cache_dir, keep, kept, private_folder
from hashattn.ops.decode.cuda import compiler, decode

HERE = Path(__file__).parent
KERNEL = """
#include "{name}.cu"
extern "C" void run(const void *argument, int x, int y, int z, int threads, int backwards) {{
  emulator::argument = argument, emulator::grid = {{x, y, z}}, emulator::backwards = backwards;
  emulator::body = [](const void *s) {{ {name}(*static_cast<const {argument} *>(s)); }};
  for (int c = 0; c < z; c++)
    for (int b = 0; b < y; b++)
      for (int a = 0; a < x; a++) {{
        emulator::block = {{a, b, c}};
        if (backwards) emulator::block = {{x - 1 - a, y - 1 - b, z - 1 - c}};
        emulator::run_block(threads);
      }}
}}
"""
ARGUMENTS = {"encode": "Encode", "encode_many": "EncodeMany"}


@functools.cache
def kernel(name: str, defines: compiler.Defines) -> ctypes.CDLL:
    """The library whose run() launches a kernel."""
    sources = b"".join(p.read_bytes() for p in (*sorted(compiler.SOURCES.glob("*.cu*")), HERE / "emulator.h"))
    stem = f"{name}-{hashlib.sha256(sources + repr((name, defines)).encode()).hexdigest()[:24]}"
    folder = private_folder(default_cache_dir() / "emulated")
    path = kept(folder, stem, ".so")
    if path is None:
        with tempfile.TemporaryDirectory() as scratch:
            source, made = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
            source.write_text(KERNEL.format(name=name, argument=ARGUMENTS.get(name, "Step")))
            options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-fvisibility-inlines-hidden", "-fno-gnu-unique"]
            options += [f"-D{key}={value}" for key, value in defines]
            files = ["-include", HERE / "emulator.h", "-I", compiler.SOURCES, source, "-o", made]
            subprocess.run(["g++", *options, *files], check=True)
            path = keep(folder, stem, ".so", made.read_bytes())
    return ctypes.CDLL(str(path))


class Launcher:
    """As compiler.Launcher; backwards: the last block and its last thread run first."""

    backwards = False

    def __init__(
        self, own: ctypes.CDLL, grid: compiler.Grid, threads: int, argument: ctypes.Structure, **_: bool
    ) -> None:
        self.own, self.grid, self.threads, self.argument = own, grid, threads, argument

    def __call__(self, stream: int) -> None:
        self.own.run(ctypes.byref(self.argument), *self.grid, self.threads, self.backwards)


class Backwards(Launcher):
    backwards = True


def emulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """decode.decode, which like encode.encode runs on the CPU as long as the patch lasts."""
    monkeypatch.setattr(compiler, "kernel", lambda name, defines, _: kernel(name, defines))
    monkeypatch.setattr(compiler, "Launcher", Launcher)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=1))
    return decode.decode
