"""Where a result was computed: the machine, and the versions of what computed it."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import prune_cli

# Instruction sets that decide which convolution kernels a CPU runs.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
# What changes a time; memory does not.
_DECISIVE = ("cpu", "cores", "flags", "threads", "device")


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine as plain data. `device` is the resolved device that the run computes on.

    cpu       model name            cores    usable by this process
    flags     instruction sets      memory_gb    of the host
    gpu       name or None          threads  of torch, as set when this is called
    """
    import torch  # slow to import

    cpu = _cpuinfo()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gb": _memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "device": device,
    }


def gpu_state() -> str | None:
    """Clocks, temperature and power of the GPU as they are now; None where nvidia-smi does not answer."""
    wanted = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    sm, memory, temperature, power = answer.splitlines()[0].split(", ")
    return f"SM {sm}, memory {memory}, {temperature} °C, {power}"


def fingerprint(machine: Mapping[str, Any], torch_version: str | None = None) -> str:
    """Short hash of everything that a time measured on `machine` depends on.

    Covers processor, cores, instruction sets, threads, device and torch's version (the installed
    one unless given); the GPU only when `machine["device"]` is one.
    """
    decisive = {name: machine[name] for name in _DECISIVE}
    decisive["torch"] = torch_version or _torch_version()
    if machine["device"] != "cpu":
        decisive["gpu"] = machine["gpu"]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def versions() -> dict[str, Any]:
    """Versions of what computes results, and the commit of the source tree.

    `git_commit` and `git_dirty` are None when prune_cli runs from an installed wheel.
    """
    source = Path(prune_cli.__file__).resolve().parents[1]
    commit = _git(source, "rev-parse", "HEAD")
    changes = _git(source, "status", "--porcelain") if commit else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform() if sys.platform != "linux" else f"Linux {platform.release()}",
        "torch": _torch_version(),
        "torchvision": _version("torchvision"),
        "hydra": _version("hydra-core"),
        "prune_cli": _version("prune-cli"),
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
    }


def write_env(path: Path, device: str = "cpu") -> None:
    """Write env.json: machine and versions."""
    text = json.dumps({"machine": machine(device), "versions": versions()}, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # unknown outside Linux
        return None


def _torch_version() -> str:
    """With the build (+cpu, +cu130), which the metadata of a wheel may leave out."""
    import torch

    return str(torch.__version__)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(source: Path, *arguments: str) -> str | None:
    """What git prints about the tree `source`; None when it is not the root of a repository."""
    # A wheel in a virtual environment may lie inside someone else's repository.
    if not (source / ".git").exists():
        return None
    # Never take the index lock: the user may be committing.
    command = ["git", "--no-optional-locks", "-C", str(source), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
