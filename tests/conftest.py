"""What all tests share. One thread: the networks are tiny, and tests fork."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def compose(monkeypatch, tmp_path):
    """Compose a config as the command line does, with the store and the data in a temporary folder."""
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    from prune_cli.compose import CONF, Composer

    version.setbase("1.3")
    composer = Composer(ConfigLoaderImpl(create_config_search_path(str(CONF))), "config")

    def composed(*overrides: str) -> dict:
        return composer.compose([f"runtime.store={tmp_path}/store", f"runtime.data_root={tmp_path}/data", *overrides])

    return composed


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
