"""What a network cannot do without is found by trying it, and says what stands in the way."""

import pytest
import torch
from torch import nn
from written import blocks, heads, odd

from prune_cli import surgery
from prune_cli.checkpoint import load_model, save_model
from prune_cli.methods.fp import FilterPruning
from prune_cli.methods.fpgm import GeometricMedian
from prune_cli.methods.group import GroupPruning
from prune_cli.methods.sfp import SoftFilterPruning
from prune_cli.methods.stripe import StripePruning
from prune_cli.methods.weight import WeightPruning
from prune_cli.models.spec import ModelSpec


def built(network: type) -> nn.Module:
    torch.manual_seed(0)
    return ModelSpec("net", f"{network.__module__}.{network.__name__}").build(3, 8, 4)


@pytest.mark.parametrize(
    ("network", "layer", "reason"),
    [
        (heads.FixedView, "second.0", r"does not run (heads.py, line {}, return self.head(F.relu(self.fc("),
        (heads.DeepSupervision, "stem.0", r"does not train (heads.py, line {}, return scores + 0.3 * self.early("),
        (heads.Pyramid, "second.0", "computes something else: head is off by"),
        (odd.Asserting, "first", ": twelve channels are expected here)"),
        (odd.Tied, "zeroth.0", "first shares its weight with again"),
        (odd.WeightNormed, "first", "its weight is computed from other tensors"),
        (odd.Frozen, "first", "they meet a tensor that belongs to no known layer (odd.py, line "),
        (odd.WrittenIntoSlices, "first", "they are written into a part of a tensor (odd.py, line "),
        (odd.WeightStandardised, "stem.0", "(odd.py, line "),
        (odd.NeverCalled, "unused", "the network never calls it"),
    ],
)  # fmt: skip
def test_filters_stay_whole_with_the_reason(network, layer, reason):
    skipped = FilterPruning(coupled="joint").prunable(built(network)).skipped
    before, _, behind = reason.partition("{}")
    assert before in skipped[layer] and behind in skipped[layer], skipped[layer]


@pytest.mark.parametrize(
    ("network", "layer", "reason"),
    [
        (odd.WeightStandardised, "first", "StandardisedConv2d computes something of its own"),
        (odd.SamePadded, "first", "SamePaddedConv2d computes something of its own"),
        (odd.Hooked, "first", "a hook is attached to it"),
        (odd.WeightNormed, "first", "its weight is computed from other tensors"),
        (odd.Tied, "again", "shares its weight with first"),
        (odd.NeverCalled, "unused", "the network never calls it"),
    ],
)
@pytest.mark.parametrize("method", [StripePruning(), GroupPruning(), GeometricMedian(ratio=0.5)], ids=lambda m: type(m).__name__)
def test_a_layer_of_its_own_making_is_not_replaced(network, layer, reason, method):
    assert reason in method.prunable(built(network)).skipped[layer]


def test_weights_that_are_shared_or_computed_are_left_alone():
    for network, layer in ((odd.Tied, "again"), (odd.SpectralNormed, "first")):
        assert layer in WeightPruning().prunable(built(network)).skipped


def test_filters_that_are_put_back_are_tried_as_well():
    """A transformer reads the weights of its layers itself, so that nothing can stand in their place."""
    skipped = SoftFilterPruning(ratio=0.5).prunable(built(heads.Transformer)).skipped
    assert "does not run" in skipped["encoder.linear2"] and "weight" in skipped["encoder.linear2"]


def test_what_is_tried_once_is_known(monkeypatch):
    """Also of another network of the same structure, and where a method has put its layers in."""
    from prune_cli import trial

    model = built(blocks.RepVGG)
    FilterPruning().prunable(model)
    monkeypatch.setattr(trial, "_problem", None)
    FilterPruning(coupled="joint").prunable(built(blocks.RepVGG))
    assert trial.channel_graph(model).of("stem.0").removable


def test_shared_modules_and_weights_are_cut_saved_once_and_come_back_shared(tmp_path):
    for network, names in ((odd.TwoNames, ("conv1.weight", "stem.0.weight")), (odd.Tied, ("first.weight", "again.weight"))):
        model = built(network)
        method = FilterPruning(coupled="joint")
        masks = method.prune(model, 0.5)
        masked, small = surgery.masked_and_cut(model, masks)
        surgery.verify(masked, small)
        path = tmp_path / f"{network.__name__}.safetensors"
        save_model(path, small.model, ModelSpec("net", f"{network.__module__}.{network.__name__}"), 4)
        for cut in (small.model, load_model(path)):
            one, other = (cut.state_dict(keep_vars=True)[name] for name in names)
            assert one is other
        single = sum(p.numel() for p in small.model.parameters()) + sum(b.numel() for b in small.model.buffers())
        assert path.stat().st_size < 4 * single + 4000


def test_what_is_computed_of_a_weight_is_not_disturbed_by_looking():
    """spectral_norm's estimate moves whenever its weight is asked for in training mode."""
    model = built(odd.SpectralNormed).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in (FilterPruning(), StripePruning(), WeightPruning()):
        method.prunable(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
