"""What holds for each method alike, beyond the contract suite."""

import pytest
import torch
from toys import network

from prune_cli import stages, surgery
from prune_cli.build import build
from prune_cli.compose import CONF
from prune_cli.errors import UserError
from prune_cli.hooks import Progress
from prune_cli.layers.skeleton import SkeletonConv2d
from prune_cli.method import KeepPruned
from prune_cli.methods.fp import FilterPruning
from prune_cli.methods.stripe import StripePruning
from prune_cli.pipeline import run

NOW = Progress(epoch=0, epochs=1, step=0, steps=10, travel=100.0, weight_decay=1e-4)


@pytest.mark.parametrize("method", [StripePruning(), FilterPruning(), FilterPruning(scope="global")])
def test_methods_leave_the_network_as_it_was(method):
    model = network("tiny.TinyResNet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = method.prepare(model)
    inside = {name: tensor.clone() for name, tensor in ready.state_dict().items()}
    method.prune(ready, 0.5)
    assert all(module.training for module in ready.modules())
    assert not any(isinstance(module, SkeletonConv2d) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, inside[name]) for name, tensor in ready.state_dict().items())
    for parameter in ready.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("ratio", [0.0, 0.999999])
@pytest.mark.parametrize("method", [StripePruning(), FilterPruning(), FilterPruning(scope="global")])
def test_extreme_ratios_still_make_a_network(method, ratio):
    model = method.prepare(network("tiny.TinyResNet")).eval()
    masks = method.prune(model, ratio)
    small = surgery.cut(model, masks)
    surgery.verify(surgery.mask(model, masks), small)
    assert all(keep.any() for keep in masks.keep.values())
    assert all(keep.all() == (ratio == 0) for keep in masks.keep.values())
    assert small.model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_fine_tuning_holds_what_is_pruned():
    model = network("tiny.TinyResNet")
    masks = FilterPruning().prune(model, 0.5)
    constraint = FilterPruning().constraint(masks)
    assert isinstance(constraint, KeepPruned)
    constraint.after_step(model, NOW)
    assert not model.block1.conv1.weight[~masks.keep["block1.conv1"]].any()
    assert model.block1.conv1.weight[masks.keep["block1.conv1"]].any()


def test_what_only_selects_is_no_reason_to_train_again():
    trained = set(StripePruning().training_settings())
    assert {"start", "alpha", "strength", "threshold", "train"} <= trained
    assert not {"select", "finetune"} & trained
    assert not {"criterion", "scope", "ratios", "finetune"} & set(FilterPruning().training_settings())


def test_what_an_older_version_of_a_method_made_is_not_used_again(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "fit", lambda *args, **more: [])  # the keys do not wait for training
    experiment = build(compose("method=stripe", "debug=default", "dataset=digits", "runtime.latency_seconds=0"))
    before = run(experiment, tmp_path / "run", command="test")
    monkeypatch.setattr(StripePruning, "version", StripePruning.version + 1)
    after = run(experiment, tmp_path / "again", command="test")
    same = {old.stage: old.key == new.key for old, new in zip(before.stages, after.stages, strict=True)}
    assert same == {"dense": True, "sparse": False, "pruned": False, "random": False}


@pytest.mark.parametrize("path", sorted(CONF.glob("method/*.yaml")), ids=lambda p: p.stem)
def test_a_penalty_derived_from_the_schedule_is_refused_with_adam_before_training(path, compose, tmp_path, monkeypatch):
    """`Progress.travel` is how far sgd moves a weight; adam divides by the gradient."""
    config = compose(f"method={path.stem}", "recipe.sparsify.optimizer=adam", "debug=default")
    monkeypatch.setattr(stages, "fit", lambda *args, **more: pytest.fail("trained"))
    derived = "strength" in config["method"]
    expected = "^recipe.sparsify.optimizer=adam: method.strength derives" if derived else "^trained"
    with pytest.raises((UserError, pytest.fail.Exception), match=expected):
        run(build(config), tmp_path / "run", command="test")
