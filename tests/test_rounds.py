"""Pruning what was pruned: several rounds, a base, rewinding, and the controls beside fine-tuning."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fitting import same_state, workshop_of
from safetensors.torch import load_file
from toys import network, random_masks

from prune_cli import load, pictures, stages, surgery
from prune_cli.build import build
from prune_cli.errors import UserError
from prune_cli.hooks import TrainingHooks
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.methods.weight import WeightPruning
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run
from prune_cli.record import Record
from prune_cli.repeated import lifted, packed, packing, unpacked, zeros
from prune_cli.report.stages import sentences

QUICK = "debug=default", "dataset=digits", "runtime.latency_seconds=0"


@pytest.fixture
def experiment(compose):
    """An experiment on a tiny ResNet."""

    def made(*overrides: str, model: str = "TinyResNet"):
        return replace(build(compose(*QUICK, *overrides)), model=ModelSpec(model, f"tiny.{model}"))

    return made


def _weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{stage}.safetensors")


# Several selections as one


@pytest.mark.parametrize("unit", ["filter", "stripe", "group", "weight"])
@pytest.mark.parametrize("target", ["tiny.TinyVGG", "tiny.TinyResNet"])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_cuts_are_one_cut_by_the_lifted_masks(unit, target, seed):
    model = network(target)
    first = random_masks(model, unit, 0.6, seed)
    once = surgery.cut(model, first)
    middle = unpacked(once.model)
    second = random_masks(middle, unit, 0.6, seed + 10)
    second = replace(second, keep={n: k & _alive(middle, n, unit) for n, k in second.keep.items()})
    second = replace(second, keep={n: k for n, k in second.keep.items() if k.any()})
    twice = packed(surgery.cut(middle, second), packing(once.model))
    surgery.verify(surgery.mask(middle, second), twice)
    both = lifted(second, once, first)
    assert all(not (keep & ~first.keep[name]).any() for name, keep in both.keep.items())
    x = torch.randn(4, *model.input_shape)
    with torch.no_grad():
        expected, found = surgery.cut(model, both).model.eval()(x), twice.model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _alive(model, name: str, unit: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight != 0
    return {"filter": weight.flatten(1).any(1), "stripe": weight.any(1), "group": weight.any(0), "weight": weight}[unit]


@pytest.mark.parametrize("unit", ["stripe", "group"])
def test_unpacking_and_packing_change_nothing_that_is_computed(unit):
    model = network("tiny.TinyResNet")
    small = surgery.cut(model, random_masks(model, unit, 0.5))
    units = packing(small.model)
    assert units and set(units.values()) == {unit}
    wide = unpacked(small.model)
    assert not packing(wide) and zeros(wide).keep
    x = torch.randn(3, *model.input_shape)
    again = packed(replace(small, model=wide, renamed={}), units).model
    with torch.no_grad():
        expected = small.model(x)
        torch.testing.assert_close(wide(x), expected)
        assert torch.equal(again(x), expected)
    assert packing(again) == units
    assert same_state(again.state_dict(), small.model.state_dict())


def test_each_round_takes_its_rate_of_what_is_left():
    """Lottery ticket, figure 2: 20 % of the remaining weights a round, the last layer half of that."""
    model = network("prune_cli.models.lenet.LeNet300100", channels=1)
    method, layers = WeightPruning(scope="local", last_rate=0.5), ("fc1", "fc2", "fc3")
    for number in (1, 2, 3):
        masks = method.prune(model, 0.2)
        model = surgery.mask(model, masks)
        left = {name: float((model.get_submodule(name).weight != 0).float().mean()) for name in layers}
        expected = {"fc1": 0.8**number, "fc2": 0.8**number, "fc3": 0.9**number}
        assert left == pytest.approx(expected, abs=0.01)


# Rewinding


def test_a_rewind_point_lies_on_the_way_of_the_dense_network(experiment, tmp_path):
    """Trained to epoch 1, kept, and trained on is bit for bit what is trained in one go."""
    plain = experiment("method=weight", "recipe.pretrain.epochs=3")
    rewinding = experiment(
        "method=weight", "recipe.pretrain.epochs=3", "recipe.finetune.start=rewind", "recipe.finetune.rewind_epoch=1",
        f"runtime.store={tmp_path}/elsewhere",
    )  # fmt: skip
    whole = run(plain, tmp_path / "whole", command="test")
    record = run(rewinding, tmp_path / "rewound", command="test")
    assert record.stage("dense").key == whole.stage("dense").key
    assert "dense: resumed after epoch 1 of 3" in (tmp_path / "rewound/run.log").read_text()
    assert same_state(_weights(tmp_path / "whole", "dense"), _weights(tmp_path / "rewound", "dense"))
    assert record.stage("finetuned").epochs == 2  # the rest of pretrain's three
    # And the point itself is the same whether the dense network was there before or not.
    late = replace(rewinding, runtime=plain.runtime)
    run(late, tmp_path / "late", command="test")
    points = [next(Path(e.runtime.store).glob("rewind/*/model.safetensors")) for e in (rewinding, late)]
    assert same_state(load_file(points[0]), load_file(points[1]))
    assert same_state(_weights(tmp_path / "late", "finetuned"), _weights(tmp_path / "rewound", "finetuned"))


@pytest.mark.parametrize("where", ["rewind_epoch=0", "rewind_epoch=1", "rewind_step=0", "rewind_step=5"])
def test_survivors_go_back_to_what_they_were_with_their_statistics(experiment, where):
    shop = workshop_of(experiment(
        "method=weight", "method.layers=all", "ratio=0.6", "rounds=2", "recipe.pretrain.epochs=2",
        "recipe.finetune.start=rewind", f"recipe.finetune.{where}",
    ))  # fmt: skip
    dense = stages.train_dense(shop)
    early = shop.untrained() if where.endswith("=0") else shop.trained(stages.rewind_point(shop))
    cuts, network = [], dense
    for number in (1, 2):
        cuts.append(stages.prune(shop, network, number))
        begun = stages._begin(shop, cuts, "rewind")
        both = stages.selected(shop, cuts)
        expected = surgery.cut(early, both).model.state_dict()
        assert same_state({n: t.cpu() for n, t in begun.state_dict().items()}, {n: t.cpu() for n, t in expected.items()})
        assert any("running_mean" in name for name in expected)
        network = stages.finetune(shop, cuts, dense, "rewind")
        tuned = load(network.artifact.file("model.safetensors"))
        assert zeros(tuned).keep.keys() == zeros(begun).keep.keys()
        assert all(torch.equal(keep, zeros(begun).keep[name]) for name, keep in zeros(tuned).keep.items())
    assert both.obtained == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("step", [2, 4, 5])  # an epoch has four
def test_a_step_to_go_back_to_is_one_that_the_dense_network_takes(step, experiment, tmp_path, monkeypatch):
    passed = {}

    def look(self, model, progress):
        if type(self) is TrainingHooks:  # of the dense network
            passed[progress.step + 1] = {n: t.clone() for n, t in model.state_dict().items()}

    settings = "method=weight", "recipe.pretrain.epochs=3", "recipe.finetune.start=rewind", "recipe.controls=[learning_rate]"
    plain = experiment("method=weight", "recipe.pretrain.epochs=3", f"runtime.store={tmp_path}/elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingHooks, "after_step", look)
        whole = run(plain, tmp_path / "whole", command="test")
    rewinding = experiment(*settings, f"recipe.finetune.rewind_step={step}")
    record = run(rewinding, tmp_path / "rewound", command="test")
    assert record.stage("dense").key == whole.stage("dense").key
    assert same_state(_weights(tmp_path / "whole", "dense"), _weights(tmp_path / "rewound", "dense"))
    assert ("dense: resumed after epoch 1 of 3" in (tmp_path / "rewound/run.log").read_text()) == (step >= 4)
    (point,) = Path(rewinding.runtime.store).glob("rewind/*/model.safetensors")
    assert same_state(load_file(point), passed[step])
    epochs = 3 - step // 4  # the rest of the epoch that the step lies in is one as well
    assert record.stage("finetuned").epochs == record.stage("learning_rate").epochs == epochs
    keys = {record.stage("finetuned").key}
    for other in ("recipe.finetune.rewind_epoch=1", f"recipe.finetune.rewind_step={step + 1}"):
        keys.add(run(experiment(*settings, other), tmp_path / other, command="test").stage("finetuned").key)
    assert len(keys) == 3


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("method", "axis"), [("stripe", 0), ("group", 1)])
def test_a_record_keeps_the_skeleton_of_every_filter(rounds, method, axis, experiment, tmp_path):
    """Of all rounds together: where the filters of the cut network, or the channels they read, are not zero."""
    one = experiment(f"method={method}", "ratio=0.5", f"rounds={rounds}", model="TinyVGG")
    layers = {layer.name: layer for layer in run(one, tmp_path, command="test").layers}
    small = unpacked(load(tmp_path / "checkpoints/pruned.safetensors"))
    for name in ("features.0", "features.3", "features.6"):
        units = layers[name].units
        kept = torch.from_numpy(pictures.unpacked(units))
        assert kept.sum() == units["kept"] and 0 < kept.float().mean() < 1
        assert torch.equal(kept.float().mean(0), torch.tensor(units["positions"]))
        alive = (small.get_submodule(name).weight != 0).any(1 - axis)
        assert torch.equal(alive[alive.any((1, 2))], kept[kept.any((1, 2))])


def test_what_was_not_trained_here_is_not_rewound(experiment, tmp_path):
    def refused(sentence: str, *overrides: str, start: str = "rewind"):
        with pytest.raises(UserError, match=sentence):
            run(experiment("method=weight", f"recipe.finetune.start={start}", *overrides), tmp_path, command="")

    too_far = "recipe.finetune.rewind_epoch=5"
    refused(r"^recipe\.finetune\.rewind_epoch=5: pretrain has 1 epochs", too_far)
    refused(r"^recipe\.finetune\.rewind_epoch=5: pretrain has 1 epochs", too_far, start="learning_rate")
    step = "recipe.finetune.rewind_step=5"
    refused(r"^recipe\.finetune\.rewind_step=5: pretrain has 4 steps, 4 in each of its epochs", step)
    refused(r"rewind_step=5: recipe\.finetune\.rewind_epoch=1 says where to go back to as well", step, "recipe.finetune.rewind_epoch=1")


# Controls


def test_controls_stand_beside_finetuning(experiment, tmp_path):
    chosen = "recipe.controls=[learning_rate,rewind,scratch_e,scratch_b,random]"
    one = experiment("method=fp", "recipe.pretrain.epochs=2", chosen, "recipe.finetune.distillation=0.5")
    record = run(one, tmp_path / "run", command="test")
    names = ["dense", "pruned", "finetuned", "random", "learning_rate", "rewind", "scratch_e", "scratch_b", "random_finetuned"]
    assert [s.stage for s in record.stages] == names
    macs = record.stage("dense").macs / record.stage("pruned").macs
    assert {s.stage: s.epochs for s in record.stages} == {
        "dense": 2, "pruned": None, "finetuned": 1, "random": None, "learning_rate": 2, "rewind": 2, "scratch_e": 2,
        "scratch_b": round(2 * macs), "random_finetuned": 1,
    }  # fmt: skip
    assert macs > 1.5
    shapes = {n: t.shape for n, t in _weights(tmp_path / "run", "pruned").items()}
    for control in names[4:8]:
        assert {n: t.shape for n, t in _weights(tmp_path / "run", control).items()} == shapes
    assert len({float(_weights(tmp_path / "run", c)["stem.0.weight"].sum()) for c in names[4:8]}) == 4
    assert all(s.cached for s in run(one, tmp_path / "again", command="test").stages)
    without = run(replace(one, recipe=replace(one.recipe, controls=())), tmp_path / "without", command="test")
    assert without.stages == tuple(replace(s, cached=True) for s in record.stages[:4])


def test_scratch_begins_with_weights_of_its_own(experiment):
    shop = workshop_of(experiment("method=fp"))
    dense = stages.train_dense(shop)
    cuts = [stages.prune(shop, dense, 1)]
    fresh, early, small = (stages._begin(shop, cuts, start) for start in ("scratch_e", "rewind", "trained"))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (fresh, early, small)]
    assert shapes[0] == shapes[1] == shapes[2]
    for a, b in ((fresh, early), (fresh, small), (early, small)):
        assert not torch.equal(a.stem[0].weight, b.stem[0].weight)


# A base


@pytest.fixture
def finished(experiment, tmp_path):
    """Run something and give its folder."""

    def made(*overrides: str) -> Path:
        folder = tmp_path / "-".join(word.partition("=")[2] for word in overrides)
        run(experiment(*overrides), folder, command="test")
        return folder

    return made


@pytest.mark.parametrize(
    ("first", "second"),
    [("fp", "stripe"), ("slimming", "neuron_merging"), ("sfp", "neuron_merging"), ("stripe", "fp"), ("group", "fp"),
     ("weight", "fp"), ("stripe", "stripe"), ("fp", "group"), ("weight", "slimming")],
)  # fmt: skip
def test_a_method_goes_on_where_another_ended(first, second, finished, experiment, tmp_path):
    folder = finished(f"method={first}")
    base = experiment(f"method={second}", f"base={folder}", "method.finetune=true", "recipe.controls=[random]")
    record = run(base, tmp_path / "on", command="test")
    before = Record.read(folder / "record.json")
    assert [s.stage for s in record.stages][:2] == ["dense", "base"]
    start = before.stage("finetuned") or before.stage("pruned")
    for figure in ("accuracy", "macs", "parameters", "nonzero"):
        assert getattr(record.stage("dense"), figure) == getattr(before.stage("dense"), figure)
        assert getattr(record.stage("base"), figure) == getattr(start, figure)
    dense, on, tuned = (record.stage(stage) for stage in ("dense", "base", "finetuned"))
    assert tuned.nonzero < 1.01 * on.nonzero < dense.nonzero and tuned.macs <= on.macs <= dense.macs
    assert tuned.nonzero < on.nonzero or tuned.macs < on.macs
    assert any(sentence.startswith(f"Goes on from {folder}; ") for sentence in sentences(record))
    # What an earlier method left at zero is still zero, and the file makes the same network again.
    tuned_file, pruned_file = (load(tmp_path / f"on/checkpoints/{s}.safetensors") for s in ("finetuned", "pruned"))
    for name, keep in zeros(unpacked(pruned_file)).keep.items():
        assert not unpacked(tuned_file).get_submodule(name).weight[~keep].any(), name
    assert tuned_file(torch.randn(2, *tuned_file.input_shape)).isfinite().all()
    assert all(s.cached for s in run(base, tmp_path / "again", command="test").stages)


def test_stripes_stay_packed_when_filters_go(finished, experiment, tmp_path):
    folder = finished("method=stripe")
    striped = load(folder / "checkpoints/pruned.safetensors")
    run(experiment("method=fp", f"base={folder / 'checkpoints/pruned.safetensors'}"), tmp_path / "on", command="test")
    small = load(tmp_path / "on/checkpoints/finetuned.safetensors")
    kinds = [{n for n, m in model.named_modules() if isinstance(m, StripeConv2d)} for model in (striped, small)]
    assert kinds[1] and kinds[1] <= kinds[0]


def test_a_base_that_does_not_fit_the_command_is_refused(finished, experiment, tmp_path):
    folder = finished("method=fp")

    def refused(match: str, *overrides: str, model: str = "TinyResNet", base: Path = folder):
        with pytest.raises(UserError, match=match):
            run(experiment(f"base={base}", *overrides, model=model), tmp_path / "refused", command="test")

    refused(r"is a TinyResNet \(no arguments\), this command says model=TinyVGG", "method=stripe", model="TinyVGG")
    refused("was trained on digits, this command says dataset=synthetic", "method=stripe", "dataset=synthetic")
    refused("target=macs: a run with base", "method=stripe", "target=macs")
    refused("no record can be read there", "method=stripe", base=tmp_path)
    refused("no such file", "method=stripe", base=tmp_path / "nothing.safetensors")
    refused(r"recipe\.finetune\.start=rewind: goes back to the dense network", "method=weight", "recipe.finetune.start=rewind")
    refused(r"recipe\.controls=scratch_b: goes back", "method=weight", "recipe.controls=[random,scratch_b]")
    striped, single = finished("method=stripe"), "holds the surviving stripes only, in which a selection of"
    refused(f"{single} groups cannot be held", "method=group", base=striped)
    refused(f"{single} weights cannot be held", "method=weight", base=striped)
