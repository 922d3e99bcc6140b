"""The wheel carries all that a job needs: it runs from an environment that has never seen the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`prune-cli` from the wheel in an empty environment, which borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "env")})
    # A .pth in a folder that a .pth names is not read: an editable install here stays out of sight.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env/bin/prune-cli"


def run(*command, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120, env=environment, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_answers(installed, tmp_path):
    assert "method=stripe" in run(installed, "--help", cwd=tmp_path)
    assert "ratio: 0.3" in run(installed, "--cfg", "job", "ratio=0.3", cwd=tmp_path)
    python = installed.with_name("python")
    imported = run(python, "-c", "import prune_cli; print(prune_cli.__file__)", cwd=tmp_path)
    assert imported.startswith(str(installed.parents[1]))


def test_the_wheel_runs_a_job(installed, tmp_path):
    python = installed.with_name("python")
    run(python, "-W", "error", "-m", "prune_cli", "debug=default", "model=lenet_300_100", "method=fp", cwd=tmp_path)
    (record,) = tmp_path.glob("outputs/runs/fp-lenet_300_100-digits-0.5/*/record.json")
    assert '"status": "complete"' in record.read_text()
