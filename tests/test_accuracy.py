"""Accuracy: what it counts, and that it leaves the network as it was."""

import pytest
import torch
from fitting import Noise, same_state, state_of, untrained

from prune_cli.metrics.accuracy import accuracy


@pytest.mark.parametrize("images", [1, 12, 1001])
def test_accuracy_is_the_fraction_that_is_right_and_leaves_no_trace(images):
    model, split = untrained(), Noise(images)
    model.block1.eval()
    before, flags = state_of(model), [m.training for m in model.modules()]
    found = accuracy(model, split)
    assert flags == [m.training for m in model.modules()] and same_state(before, state_of(model))
    with torch.no_grad():
        expected = (model.eval()(split.x).argmax(1) == split.y).float().mean()
    assert found == pytest.approx(float(expected))
