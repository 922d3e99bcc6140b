"""The text of the CUDA kernel and the macros of one configuration of it."""

import re
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path

from prune_cli.kernels.cuda.layout import MATHS, Tuning

FOLDER = Path(__file__).parent


@cache
def source() -> str:
    """Both files in one text, which needs no header: what compiles it is NVRTC, nvcc or any C++ compiler."""
    return (FOLDER / "intrinsics.cuh").read_text() + kernel()


def kernel() -> str:
    """The kernel without the instructions that only a GPU has."""
    return (FOLDER / "stripe_conv.cu").read_text()


def source_hash() -> str:
    """Plans measured with another source are not plans of this one."""
    return sha256(source().encode()).hexdigest()[:16]


def defines(math: str, tuning: Tuning, vector: bool) -> list[str]:
    """Compiler options for one configuration; `math` is one of MATHS."""
    macros = {
        "MATH": list(MATHS).index(math), "WARPS": tuning.warps, "M_TILES": tuning.m_tiles,
        "STRIPES": tuning.stripes, "VECTOR": int(vector),
    }  # fmt: skip
    return [f"-D{name}={value}" for name, value in macros.items()]


def resources(math: str, tuning: Tuning, vector: bool, architecture: str, folder: Path) -> tuple[int, int]:
    """(registers per thread, spilled bytes) as nvcc reports them for one configuration; works in `folder`.

    Raises FileNotFoundError where there is no nvcc, CalledProcessError where it refuses the source.
    """
    path = Path(folder) / "kernel.cu"
    path.write_text(source())
    command = ["nvcc", f"-arch={architecture}", "-std=c++17", *defines(math, tuning, vector), "-Xptxas=-v", "-cubin"]
    done = subprocess.run([*command, "-o", f"{path}.cubin", path], capture_output=True, text=True, check=True)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), spilled
