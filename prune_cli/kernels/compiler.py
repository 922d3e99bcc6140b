"""The C++ kernels, compiled on first use for this machine and kept in the cache.

No header of torch is included, so that a build takes seconds; the library is called with plain
pointers. It uses the OpenMP runtime that torch has loaded (same name, same threads).
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from prune_cli.kernels.cache import cache_folder, write_whole

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
# Instruction sets, best first: what the processor must have, and the compiler's options for it.
VARIANTS = {
    "avx512": ({"avx512f", "avx512bw", "avx512vl", "fma"}, ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")),
    "avx2": ({"avx2", "fma"}, ("-mavx2", "-mfma")),
    "portable": (set(), ()),
}
TIMEOUT = 300  # of a build, seconds


class CannotBuild(Exception):
    """Why there is no compiled kernel, as a clause."""


@cache
def library(variant: str | None = None) -> ctypes.CDLL:
    """The kernels for this processor (or for the named instruction set), built if need be.

    Raises CannotBuild.
    """
    variant = variant or best_variant()
    compiler = _compiler()
    flags = (*FLAGS, *VARIANTS[variant][1])
    key = _key(compiler, flags)
    path = cache_folder() / "kernels" / f"stripe_conv-{variant}-{key}.so"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _intact(path):
                _build(compiler, flags, path)
            return _load(path)
    except OSError as problem:
        raise CannotBuild(f"the compiled kernel cannot be kept or loaded ({problem})") from problem


def best_variant() -> str:
    """The first of VARIANTS that the processor can run."""
    flags = processor_flags()
    return next(name for name, (needed, _) in VARIANTS.items() if needed <= flags)


@cache
def processor_flags() -> frozenset[str]:
    """Instruction sets by their names in /proc/cpuinfo; empty where that does not exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


def source_hash() -> str:
    """Of the C++ sources: a plan or a build of other sources is not this one."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp"))
    return hashlib.sha256(sources).hexdigest()[:16]


def _compiler() -> str:
    """Path of the C++ compiler: the environment's CXX, else the system's."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise CannotBuild(f"CXX={wanted} is no program" if wanted else "there is no C++ compiler")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise CannotBuild(f"{compiler} does not start ({problem})") from problem
    parts = (source_hash(), compiler, answer.stdout, *flags, *sorted(processor_flags()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    log.info("Compiling the stripe-wise convolution with %s, once for this machine", compiler)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *flags, str(SOURCES / "stripe_conv.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            if done.returncode:  # perhaps a compiler without OpenMP: one thread is better than none
                command.remove("-fopenmp")
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise CannotBuild(f"{compiler} does not finish ({problem})") from problem
        if done.returncode or not made.is_file():
            said = next((line for line in done.stderr.splitlines() if "error" in line), "no library came out")
            raise CannotBuild(f"{compiler} fails: {said}")
        content = made.read_bytes()
    write_whole(_checksum(path), hashlib.sha256(content).hexdigest().encode())
    write_whole(path, content)


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _intact(path: Path) -> bool:
    """Whether the library is as it was built: loading a truncated one would kill the process."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _checksum(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _load(path: Path) -> ctypes.CDLL:
    pointer = ctypes.c_void_p
    loaded = ctypes.CDLL(str(path))
    loaded.prepare.argtypes, loaded.prepare.restype = [pointer] * 5, pointer
    loaded.arrange.argtypes, loaded.arrange.restype = [pointer] * 2, pointer
    loaded.run.argtypes, loaded.run.restype = [pointer] * 3, None
    for release in (loaded.release_layer, loaded.release_call):
        release.argtypes, release.restype = [pointer], None
    return loaded
