"""Every command that README shows can be given as it stands, and what it says of the options is true."""

import re
import shlex
from pathlib import Path

import pytest

from prune_cli.build import build
from prune_cli.compose import CONF

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`(?:PRUNE_DATA=\S+ )?prune-cli ([^`]+=[^`]*)`", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_readme_composes_and_builds(command, compose, my_net):
    words = shlex.split(command)
    if "-m" in words or words[0].startswith("experiment="):  # of a sweep, the first job
        words = [re.sub(r",.*", "", word) for word in words]
    experiment = build(compose(*(word for word in words if "=" in word)))
    assert 0 <= experiment.ratio < 1


def test_readme_has_commands_for_every_feature():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("path", sorted(CONF.glob("method/*.yaml")), ids=lambda p: p.stem)
def test_readme_names_every_method(path):
    assert f"`{path.stem}`" in README


@pytest.mark.parametrize("path", sorted(CONF.glob("dataset/*.yaml")), ids=lambda p: p.stem)
def test_readme_names_every_data_set(path):
    assert f"`{path.stem}`" in README
