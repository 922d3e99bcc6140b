"""What all tests share. One thread: the networks are tiny, and tests fork."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def compose(monkeypatch, tmp_path):
    """Compose a config as the command line does, with the store and the data in a temporary folder."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from prune_cli.compose import CONF

    def composed(*overrides: str) -> dict:
        here = [f"runtime.store={tmp_path}/store", f"runtime.data_root={tmp_path}/data"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose("config", overrides=[*here, *overrides])
        return OmegaConf.to_container(config, resolve=True)

    return composed
