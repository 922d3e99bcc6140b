r"""The papers' full schedules on cifar10-jpeg, unattended, several networks side by side on one GPU.

    python scripts/paper_schedules.py --output OUT [--minutes 9] [--processes 6] [--resume PART...]

Runs JOBS in their order, as many `prune-cli` processes at once as --processes says, and stops them
after --minutes as Ctrl-C does: every run goes on from its last finished epoch when the script is
called again. What belongs together shares its dense network through the store, whose lock makes the
others wait. OUT then has schedules.json (the state of every job), results.tar (records, masks and
logs) and store-N.tar: finished artifacts and checkpoints, smallest first, in parts small enough to be
carried away; --resume puts them back on another machine.

On a machine that keeps its disk between calls, --work (default /tmp/paper) is enough. One call there,
with this project's wheels and cifar10-jpeg.tar.xz carried along:

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .carry/*.whl && \
    export PYTHONPATH=/tmp/site:$PWD PRUNE_DATA=/tmp/data && mkdir -p /tmp/data && \
    { test -d /tmp/data/cifar10-jpeg || tar -xJf .carry/cifar10-jpeg.tar.xz -C /tmp/data; } && \
    python3 scripts/paper_schedules.py --output $OUT --minutes 8 --resume .carry/store-*.tar
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

COMMON = "dataset=cifar10_jpeg runtime.device=cuda runtime.latency_seconds=0.2"
JOBS = {  # in the order in which they matter
    "stripe vgg16": "experiment=stripe/vgg16_cifar10 row=swp",
    "stripe resnet56, 0.05": "experiment=stripe/resnet56_cifar10 row=swp",
    "stripe resnet56, 0.01": "experiment=stripe/resnet56_cifar10 row=swp method.threshold=0.01",
    "stripe vgg16, 0.05": "experiment=stripe/vgg16_cifar10 row=swp method.threshold=0.05",
    "slimming vgg19": "experiment=slimming/cifar10 row=vgg19_70",
    "pfec vgg16": "experiment=pfec/cifar10 row=vgg16_a",
    "pfec resnet56": "experiment=pfec/cifar10 row=resnet56_b",
    "sfp resnet56": "experiment=sfp/cifar10 row=resnet56_40",
    "fpgm resnet56": "experiment=fpgm/cifar10 row=resnet56_only_40",
    "neuron merging vgg16": "experiment=neuron_merging/vgg16_cifar10 row=merge_l1",
    "neuron merging resnet56": "experiment=neuron_merging/resnet56_cifar10 row=merge_40",
    "skeleton only": "experiment=stripe/skeleton_only",
    "weights, rewound": "method=weight model=resnet56 recipe=paper ratio=0.8 recipe.finetune.start=rewind",
}
PART_BYTES, PARTS = 15 * 2**20, 4  # of the store that is carried away
GRACE = 60  # seconds in which an interrupted run writes its checkpoint


def command(job: str) -> list[str]:
    """The words behind `prune-cli`; what stands in JOBS is said last."""
    return [*shlex.split(COMMON), *shlex.split(JOBS[job])]


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    store = options.work / "store"
    for part in options.resume:
        with tarfile.open(part) as archive:
            archive.extractall(store, filter="data")
    state = run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "schedules.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    keep(options.output / "results.tar", options.work, results(options.work))
    for number, files in enumerate(parts(store)):
        keep(options.output / f"store-{number}.tar", store, files)
    print(json.dumps({job: found["state"] for job, found in state.items()}, indent=1))
    return 0


def run(options: argparse.Namespace) -> dict[str, dict]:
    """Start jobs in order, as many as fit, until all have ended or the time is over."""
    end = time.monotonic() + 60 * options.minutes
    waiting, running = list(options.jobs), {}
    state = {job: {"state": "not begun", "command": shlex.join(["prune-cli", *options.command(job)])} for job in waiting}
    (options.work / "logs").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PRUNE_STORE": str(options.work / "store")}
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < options.processes:
                job = waiting.pop(0)
                with open(options.work / "logs" / f"{job.replace(' ', '_')}.log", "a") as log:
                    running[job] = subprocess.Popen(
                        [sys.executable, "-m", "prune_cli", *options.command(job)], cwd=options.work, env=environment,
                        stdout=log, stderr=subprocess.STDOUT,
                        # A shell starts what runs behind it with Ctrl-C ignored, and jobs would inherit that.
                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                    )  # fmt: skip
                state[job]["state"] = "running"
            for job in [job for job, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                state[job]["state"] = "complete" if code == 0 else f"failed, exit code {code}"
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for job, process in running.items():
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            state[job]["state"] = "interrupted"
    return state


def results(work: Path) -> list[Path]:
    """Records, curves, logs, and the masks of every pruned network."""
    patterns = ("outputs/runs/**/record.json", "outputs/runs/**/metrics.csv", "outputs/runs/**/run.log", "logs/*.log",
                "store/pruned/*/masks.safetensors", "store/pruned/*/result.json")  # fmt: skip
    return [path for pattern in patterns for path in sorted(work.glob(pattern))]


def parts(store: Path) -> list[list[Path]]:
    """Whole artifacts and checkpoints of unfinished runs, smallest first, in lists of PART_BYTES at most."""
    units = [path for path in store.glob("*/*") if path.suffix not in (".lock", ".tmp")]
    sized = sorted((sum(f.stat().st_size for f in _files(unit)), unit) for unit in units)
    made: list[list[Path]] = [[]]
    held = 0
    for size, unit in sized:
        if size > PART_BYTES:
            break  # and all that follow are larger
        if held + size > PART_BYTES:
            made.append([])
            held = 0
        made[-1] += _files(unit)
        held += size
    return [files for files in made[:PARTS] if files]


def keep(archive: Path, root: Path, files: list[Path]) -> None:
    with tarfile.open(archive, "w") as kept:
        for path in files:
            kept.add(path, arcname=str(path.relative_to(root)))


def _files(unit: Path) -> list[Path]:
    return [unit] if unit.is_file() else [path for path in sorted(unit.rglob("*")) if path.is_file()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/paper"), help="store, runs and logs (default: /tmp/paper)")
    parser.add_argument("--minutes", type=float, default=9, help="after which everything is interrupted (default: 9)")
    parser.add_argument("--processes", type=int, default=6, help="trainings side by side (default: 6)")
    parser.add_argument("--resume", type=Path, nargs="*", default=[], metavar="PART", help="store-N.tar of an earlier call")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS, metavar="JOB", help="only these")
    parser.set_defaults(command=command)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
