"""Networks as people write them, through every method: pruned losslessly, or whole for a reason."""

from dataclasses import replace

import pytest
import torch
from tiny import randomise
from written import blocks, gates, heads, odd  # noqa: F401, they fill the list
from written.parts import NETWORKS

from prune_cli import surgery
from prune_cli.checkpoint import load_model, save_model
from prune_cli.compose import CONF
from prune_cli.build import build
from prune_cli.errors import UserError
from prune_cli.evaluation import random_images
from prune_cli.inference import for_inference
from prune_cli.methods.fp import FilterPruning
from prune_cli.models.spec import ModelSpec

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SETTINGS = {"fp": [{"coupled": "joint", "constant": "fold"}], "slimming": [{"residual": True}], "sfp": [{"exclude": ()}]}


def spec(network) -> ModelSpec:
    return ModelSpec(network.__name__, f"{network.__module__}.{network.__name__}")


def built(network):
    torch.manual_seed(0)
    return randomise(spec(network).build(3, 8, 4))


@pytest.fixture(scope="module")
def methods(compose_once):
    """Every method, and those settings of theirs that reach other layers."""
    found = []
    for name in METHODS:
        method = build(compose_once(f"method={name}", "dataset=digits")).method
        found += [method, *(replace(method, **settings) for settings in SETTINGS.get(name, ()))]
    return found


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_layers_that_are_pruned(network):
    model = built(network)
    try:
        prunable = FilterPruning(coupled="joint").prunable(model)
    except UserError:
        assert network.pruned == ""
        return
    assert set(prunable.layers) == set(network.pruned.split()), prunable.skipped


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_every_method_prunes_losslessly_or_not_at_all(network, methods, tmp_path, monkeypatch):
    monkeypatch.setattr("prune_cli.kernels.plan.SCREENING", 0)
    monkeypatch.setattr("prune_cli.kernels.plan.FINAL", 0)
    model = built(network)
    for method in methods:
        try:
            method.prunable(model)
        except UserError as problem:
            assert "the model has nothing that it could prune; " in str(problem)
            continue
        _check(network, method, randomise(method.prepare(model), seed=1), tmp_path / "model.safetensors")


def _check(network, method, model, path) -> None:
    masks = method.prune(model, 0.5)
    try:
        compensated = method.compensate(model, masks)
    except UserError as problem:
        assert "nothing to merge into" in str(problem)
        return
    masked, small = surgery.masked_and_cut(compensated, masks, method.constant)
    surgery.verify(masked, small)
    x = random_images(masked)
    with torch.no_grad():
        expected = masked.eval()(x)
        torch.testing.assert_close(small.model.eval()(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        save_model(path, small.model, spec(network), 4)
        torch.testing.assert_close(load_model(path)(x), small.model(x))
        torch.testing.assert_close(
            for_inference(small.model, "torch")(x), small.model(x), rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
    small.model.train()(x).sum().backward()
