"""The config tree: every key is explained, every file composes, every part of a run has a name."""

from pathlib import Path

import pytest
import yaml

from prune_cli.build import build
from prune_cli.compose import CONF

FILES = sorted(CONF.rglob("*.yaml"))
OPTIONS = [(file.parent.name, file.stem) for file in FILES if file.parent.parent == CONF]
NAMED = ("model", "dataset", "method", "recipe")


def keys(node: yaml.Node):
    """The key nodes of a document that start a line or follow `- ` on it."""
    for child in [pair for pair in getattr(node, "value", []) if isinstance(pair, tuple)]:
        yield child[0]
        if not (isinstance(child[1], yaml.CollectionNode) and child[1].flow_style):
            yield from keys(child[1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        for item in node.value:
            yield from keys(item)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONF)))
def test_every_key_has_a_trailing_comment(file: Path):
    text = file.read_text()
    lines = text.splitlines()
    assert not [f"{k.start_mark.line + 1}: {k.value}" for k in keys(yaml.compose(text)) if not _comment(lines, k)]


def _comment(lines: list[str], key: yaml.Node) -> str:
    return lines[key.start_mark.line].partition("#")[2].strip()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_builds(composer, group, option):
    needed = ["model.target=tiny.TinyVGG"] if option == "custom" else []
    config = composer.compose([f"{group}={option}", *needed])
    experiment = build(config)
    assert experiment.ratio == 0.5
    if group in NAMED:
        assert config[group]["name"], f"conf/{group}/{option}.yaml has no name"
    # torchvision's models have the names of their architectures, data sets those of their files' origin
    if group in ("model", "method", "recipe") and option != "torchvision":
        assert config[group]["name"] == option


def test_sparsify_follows_pretrain_and_each_key_can_be_set(composer):
    recipe = build(composer.compose(["recipe.pretrain.epochs=3", "recipe.sparsify.lr=0.5"])).recipe
    assert recipe.sparsify.epochs == 3 and recipe.sparsify.lr == 0.5 and recipe.pretrain.lr == 0.1


def test_experiment_and_debug_override_the_recipe(composer):
    config = composer.compose(["recipe=paper", "debug=default", "experiment=stripe/skeleton_only"])
    assert config["recipe"]["pretrain"]["epochs"] == config["recipe"]["finetune"]["epochs"] == 1
    assert config["method"]["train"] == "skeleton"


def test_folders_follow_the_environment(composer, monkeypatch):
    monkeypatch.delenv("PRUNE_DATA", raising=False)
    monkeypatch.setenv("PRUNE_STORE", "/elsewhere")
    runtime = build(composer.compose([])).runtime
    assert (runtime.data_root, runtime.store) == ("data", "/elsewhere")
