r"""Every check and benchmark of the CUDA kernel in one call, for a machine with a GPU.

    python scripts/gpu_checks.py --output OUT [--run RUN_DIR] [--masks masks.safetensors]

In this order, the results written to OUT/gpu_checks.json after every step, so that a call that is cut
short has lost nothing but its rest:

    compile      all configurations of the kernel, in parallel, with their registers and spills
    tests        tests/test_cuda_device.py: the correctness grid, streams, CUDA graphs, torch.compile
    networks     VGG-16 with a random 7 % of its stripes (the paper's sparsity), and RUN_DIR's, end to end
    layers       3x3 layers of VGG-16 and ResNet-50 against cuDNN's dense convolution

Needs torch, CuPy, pytest and hypothesis, not hydra. `tree` is the hash that `git rev-parse
HEAD:prune_cli` prints for the source that was measured, whether or not git is there. On another
machine's wheels (10 minutes, one call):

    python3 -m pip install -q --no-index --no-deps --target /tmp/site wheels/*.whl; \
    PYTHONPATH=/tmp/site:$PWD python3 scripts/gpu_checks.py --output $OUT
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from hashlib import sha1
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from xml.etree import ElementTree

import torch

from prune_cli.commands import measure
from prune_cli.environment import gpu_state, machine, versions
from prune_cli.kernels.cuda.layout import MATHS
from prune_cli.kernels.cuda.source import defines
from prune_cli.kernels.cupy_backend import LARGE, SMALL, compiled
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.metrics.latency import measure as latencies
from prune_cli.metrics.macs import count_macs
from prune_cli.models.vgg import VGG

ROOT = Path(__file__).resolve().parents[1]
SPARSITY = 0.93  # of VGG-16's parameters in "Pruning Filter in Filter", table 1
GOALS = {0.5: 1.3, 0.75: 2.0, 0.9: 4.0}  # stripes removed -> geometric mean of the speedups


class Report:
    """What is known so far, in one file."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path, self.start = path, time.monotonic()
        self.found: dict[str, Any] = {
            "tree": tree_hash(ROOT / "prune_cli"), "versions": versions(), "machine": machine(options.device),
            "device": options.device, "clocks": {"start": gpu_state()}, "steps": {},
        }  # fmt: skip

    def step(self, name: str, work: Callable[[], Any]) -> None:
        """Do it, keep its result or its failure, and go on."""
        begin = time.monotonic()
        try:
            result = work()
        except Exception as problem:
            result = {"failed": f"{type(problem).__name__}: {problem}"[:2000]}
        self.found["steps"][name] = {"seconds": round(time.monotonic() - begin, 1), "result": result}
        self.found["clocks"][name] = gpu_state()
        self.write()
        print(f"{name}: {self.found['steps'][name]['seconds']} s", "failed" if "failed" in result else "", flush=True)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    report = Report(options.output / "gpu_checks.json", options)
    if options.device == "cuda":
        report.step("compile", compile_all)
    report.step("tests", lambda: tests(options))
    for dtype in options.dtypes:
        report.step(f"networks {dtype}", lambda dtype=dtype: networks(options, dtype))
    for dtype, memory_format, batch, network in _benchmarks(options):
        if report.spent > options.budget:
            break
        name = f"layers {network} {dtype} {memory_format} batch {batch}"
        report.step(name, lambda c=(network, dtype, memory_format, batch): layers(options, *c))
    report.found["summary"] = summary(report.found["steps"])
    report.write()
    print(json.dumps(report.found["summary"], indent=1))
    return 0


def compile_all() -> dict[str, Any]:
    """Every configuration, kept on disk by CuPy for the steps that follow. Also what the registers are."""
    tunings = dict.fromkeys((*LARGE, *SMALL))
    wanted = [tuple(defines(math, tuning, vector)) for math in MATHS for tuning in tunings for vector in (False, True)]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        return dict(pool.map(_resources, wanted))


def _resources(options: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    attributes = compiled(options, 0).attributes
    return " ".join(options), {"registers": attributes["num_regs"], "spilled": attributes["local_size_bytes"]}


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Outcomes of the GPU's tests by number, and the messages of those that failed."""
    outcome = options.output / "tests.xml"
    options.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={outcome}", "tests/test_cuda_device.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=options.test_seconds)
    suite = ElementTree.parse(outcome).getroot()[0]
    failures = [case.get("name") + ": " + case.find("failure").get("message", "")[:500] for case in suite if case.find("failure") is not None]
    counts = {word: int(suite.get(word)) for word in ("tests", "failures", "errors", "skipped")}
    return {**counts, "failed_tests": failures, "last_line": done.stdout.strip().splitlines()[-1:]}


def networks(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """End to end: dense against stripe-wise, milliseconds and speedup by batch size."""
    result: dict[str, Any] = {}
    with measure.numbers(_bench_options(options, dtype, "channels_last")) as (device, number):
        dense, small = VGG(3, 32, 10, depth=16).eval(), sparse_vgg()
        found = latencies(
            {"dense": dense, "ours": small}, (3, 32, 32), options.network_batches, 4 * options.seconds, device,
            options.kernel, number, torch.channels_last,
        )  # fmt: skip
        counted = {name: sum(p.numel() for p in model.parameters()) for name, model in (("dense", dense), ("ours", small))}
        result["random"] = {"parameters": counted, "macs": {"dense": count_macs(dense, (3, 32, 32)), "ours": count_macs(small, (3, 32, 32))}}
        for dense_latency, ours in zip(*found.values(), strict=True):
            result["random"][f"batch {ours.batch}"] = {
                "dense_ms": dense_latency.median_ms, "ours_ms": ours.median_ms, "speedup": dense_latency.median_ms / ours.median_ms,
            }  # fmt: skip
    if options.run:
        bench = _bench_options(options, dtype, "channels_last", run=options.run, batches=options.network_batches)
        result["trained"] = [_row(row) for row in measure.model(bench)]
    return result


def sparse_vgg() -> torch.nn.Module:
    """VGG-16 of which a random 1 - SPARSITY of the stripes is left, of every layer as many."""
    generator = torch.Generator().manual_seed(0)
    model = VGG(3, 32, 10, depth=16).eval()
    for name, conv in list(model.named_modules()):
        if isinstance(conv, torch.nn.Conv2d):
            pattern = torch.rand(conv.out_channels, *conv.kernel_size, generator=generator) >= SPARSITY
            model.set_submodule(name, StripeConv2d.from_conv(conv, pattern))
    return model


def layers(options: argparse.Namespace, network: str, dtype: str, memory_format: str, batch: int) -> list[dict[str, Any]]:
    """One row per layer, ratio and pattern."""
    bench = _bench_options(
        options, dtype, memory_format, networks=(network,), batches=(batch,), ratios=options.ratios, masks=options.masks
    )
    return [_row(row) for row in measure.kernel(bench)]


def _row(row: measure.Row) -> dict[str, Any]:
    return {**asdict(row), "speedup": row.speedup}


def summary(steps: dict[str, Any]) -> dict[str, Any]:
    """Per benchmark and ratio: geometric means with and without dense plans, beside the goal."""
    said = {}
    for name, step in steps.items():
        if not name.startswith("layers") or "failed" in step["result"]:
            continue
        for ratio in sorted({row["ratio"] for row in step["result"] if row["pattern"] == "random"}):
            rows = [row for row in step["result"] if row["pattern"] == "random" and row["ratio"] == ratio]
            sparse = [row["speedup"] for row in rows if not row["plan"].startswith("dense")]
            said[f"{name}, {ratio:.0%} removed"] = {
                "geometric_mean": round(geometric_mean([row["speedup"] for row in rows]), 3),
                "without_dense_plans": round(geometric_mean(sparse), 3) if sparse else None,
                "dense_plans": f"{len(rows) - len(sparse)} of {len(rows)}", "goal": GOALS.get(ratio),
            }  # fmt: skip
    return said


def tree_hash(folder: Path) -> str:
    """The hash that git gives to the folder as it lies here, without what Python leaves in it."""
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__":
            continue
        content = path.read_bytes() if path.is_file() else b""
        blob = sha1(b"blob %d\0" % len(content) + content).hexdigest() if path.is_file() else tree_hash(path)
        mode = b"40000" if path.is_dir() else b"100755" if path.stat().st_mode & 0o100 else b"100644"
        order = path.name + ("/" if path.is_dir() else "")
        entries.append((order, mode + b" " + path.name.encode() + b"\0" + bytes.fromhex(blob)))
    body = b"".join(entry for _, entry in sorted(entries))
    return sha1(b"tree %d\0" % len(body) + body).hexdigest()


def _benchmarks(options: argparse.Namespace) -> list[tuple[str, str, int, str]]:
    """(dtype, memory format, batch, network), what matters most first."""
    first = [(d, "channels_last", b, n) for b in options.batches for d in options.dtypes for n in options.networks]
    other = [(d, "nchw", options.batches[0], n) for d in options.dtypes for n in options.networks]
    return first + other


def _bench_options(options: argparse.Namespace, dtype: str, memory_format: str, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(
        device=options.device, dtype=dtype, memory_format=memory_format, seconds=options.seconds, kernel=options.kernel, **more
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    listed = lambda kind: lambda text: tuple(kind(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script itself")
    parser.add_argument("--kernel", default="auto", help="backends allowed (default: auto)")
    parser.add_argument("--run", type=Path, help="a finished stripe run, also measured end to end")
    parser.add_argument("--masks", type=Path, help="masks.safetensors of a trained skeleton, also measured layer by layer")
    parser.add_argument("--networks", type=listed(str), default=("vgg16", "resnet50"))
    parser.add_argument("--dtypes", type=listed(str), default=("bfloat16", "tf32", "float16", "float32"))
    parser.add_argument("--batches", type=listed(int), default=(32, 256, 1))
    parser.add_argument("--network-batches", type=listed(int), default=(1, 256))
    parser.add_argument("--ratios", type=listed(float), default=(0.5, 0.75, 0.9))
    parser.add_argument("--seconds", type=float, default=0.03, help="for each time that is measured (default: 0.03)")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no benchmark begins (default: 500)")
    parser.add_argument("--test-seconds", type=float, default=200, help="that the tests may take (default: 200)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
