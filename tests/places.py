"""A folder in which `prune-cli` runs as a user runs it, and what it leaves there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# A user's own small network. An epoch of SMALL takes long enough to die in its middle.
MODEL = "name: tiny\n_target_: tiny.TinyResNet\n"
SMALL = [
    "model=tiny", "recipe=smoke", "recipe.limit=400", "recipe.pretrain.batch_size=8", "recipe.pretrain.epochs=3",
    "runtime.latency_seconds=0.01",
]  # fmt: skip
QUICK = ["model=tiny", "debug=default"]


class Place:
    """A folder to run in, with a store. `run` and `stop` begin processes, as a user does."""

    def __init__(self, folder: Path, store: Path | None = None) -> None:
        self.folder, self.store = folder, store or folder / "store"
        (folder / "conf/model").mkdir(parents=True, exist_ok=True)
        (folder / "conf/model/tiny.yaml").write_text(MODEL)

    def start(self, *overrides: str) -> subprocess.Popen:
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PRUNE_STORE": str(self.store),
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "prune_cli", "--config-dir", "conf", *overrides], cwd=self.folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs the tests behind
        )  # fmt: skip

    def run(self, *overrides: str) -> str:
        """The output of a run that has to end well."""
        job = self.start(*overrides)
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        assert err == ""
        return out

    def stop(self, when: str, how: signal.Signals, *overrides: str) -> tuple[int, str, str]:
        """Send a signal in the middle of the epoch after the line that begins with `when`."""
        job = self.start(*overrides)
        seen = []
        for line in job.stdout:
            seen.append(line)
            if line.startswith(when):
                break
        time.sleep(0.05)
        assert job.poll() is None, job.stderr.read()
        job.send_signal(how)
        out, err = job.communicate(timeout=60)
        return job.returncode, "".join(seen) + out, err

    def run_here(self, command, monkeypatch, *overrides: str) -> str:
        """As `run`, but in this process."""
        monkeypatch.chdir(self.folder)
        monkeypatch.setenv("PRUNE_STORE", str(self.store))
        monkeypatch.setenv("COLUMNS", "200")
        code, out, err = command("--config-dir", "conf", *overrides)
        assert (code, err) == (0, "")
        return out

    def weights(self) -> dict[str, dict]:
        """By stage and key."""
        files = [file for file in self.store.glob("*/*/*.safetensors") if ".damaged-" not in file.parent.name]
        return {str(file.relative_to(self.store)): load_file(file) for file in files}

    def artifacts(self) -> dict[str, int]:
        return {str(f.relative_to(self.store)): f.stat().st_mtime_ns for f in self.store.glob("*/*/*")}

    def records(self) -> list[dict]:
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("outputs/runs/*/*/record.json"))]

    def leftovers(self) -> list[str]:
        return [f.name for f in self.store.glob("*/*") if f.suffix in (".partial", ".tmp", ".new")]


def same_files(a: dict, b: dict) -> bool:
    """Whether all tensors of two stores, as `Place.weights` gives them, are bit for bit the same."""
    return a.keys() == b.keys() and all(
        a[file].keys() == b[file].keys() and all(bool((a[file][n] == b[file][n]).all()) for n in a[file]) for file in a
    )


def table_in(out: str) -> str:
    """What is printed from the title of the table on, without the run's own folder."""
    return re.sub(r"\d{4}-\d\d-\d\d_[\d-]+(_\d+)?", "TIME", out[out.index("stripe-") :])
