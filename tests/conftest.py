"""What all tests share. One thread: the networks are tiny, and tests fork."""

import copy
import logging
import os
import signal
import sys
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test shows may be no text, as a file's name may be: parallel workers can only send text."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def composer():
    """What composes a config from the overrides of a command line."""
    from hydra import version

    from prune_cli.compose import Composer, loader

    version.setbase("1.3")
    return Composer(loader(), "config")


@pytest.fixture(scope="session")
def _composed(composer):
    return cache(lambda *overrides: composer.compose(overrides))  # many tests want the same one


@pytest.fixture(scope="session")
def compose_once(_composed):
    """Compose a config as the command line does, for tests that neither change it nor run it."""
    return _composed


@pytest.fixture
def compose(_composed, tmp_path):
    """Compose a config as the command line does, with the store and the data in a temporary folder."""

    def composed(*overrides: str) -> dict:
        config = copy.deepcopy(_composed("runtime.store=STORE", "runtime.data_root=DATA", *overrides))
        folders = {"STORE": f"{tmp_path}/store", "DATA": f"{tmp_path}/data"}
        config["runtime"] = {name: folders.get(value, value) for name, value in config["runtime"].items()}
        return config

    return composed


@pytest.fixture
def command(monkeypatch, capsys):
    """`prune-cli` with these arguments, in this process: (exit code, stdout, stderr). The handlers that it and
    Hydra set are taken back."""
    from prune_cli import cli

    terminate, handlers, level = signal.getsignal(signal.SIGTERM), logging.root.handlers[:], logging.root.level

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prune-cli", *arguments])
        try:
            code = cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    yield called
    signal.signal(signal.SIGTERM, terminate)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def folder(tmp_path):
    """A data root with a folder of images, see `folders.mixed`."""
    from folders import mixed

    return mixed(tmp_path)


@pytest.fixture
def my_net(tmp_path, monkeypatch):
    """The folder of README's worked example of a user's own network, which is the current one."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    body = readme.partition("```python\nfrom torch import nn")[2].partition("```")[0]
    assert "class MyNet(nn.Module)" in body
    (tmp_path / "my_net.py").write_text(f"from torch import nn{body}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_net", None)
