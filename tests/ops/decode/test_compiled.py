"""The kernels compile without a GPU, for A100s to RTX 5090s: no spilled registers, popcount in hardware."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize(("arch", "count"), [(80, 45), (90, 76), (100, 45), (120, 45)])
def test_kernels_compile_without_spills(arch, count):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, str(arch)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == count  # of those that need few registers one architecture will do
    assert all(k["popc"] for k in kernels if k["kernel"].startswith(("scan", "attend", "vote", "local search"))), (
        kernels
    )
    assert [k for k in kernels if k["stack"]] == []


@pytest.mark.parametrize(("arch", "count"), [(80, 13), (90, 26), (100, 13), (120, 13)])
def test_kernels_of_other_families_compile_without_spills(arch, count):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.decode.compile_families", str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[3])
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == count
    assert [k for k in kernels if k["stack"]] == []
