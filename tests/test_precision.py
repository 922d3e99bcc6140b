"""Training in bfloat16 where it is faster, and only where it is right."""

import pytest
import torch
from fitting import noise_splits, run_fit, untrained
from torch import nn

from prune_cli.errors import UserError
from prune_cli.metrics.accuracy import accuracy
from prune_cli.precision import resolved_precision

CPU = torch.device("cpu")


def network(*layers: nn.Module, shape: tuple[int, int, int] = (3, 8, 8)) -> nn.Module:
    model = nn.Sequential(*layers)
    model.input_shape = shape
    return model


@pytest.fixture(params=[True, False], ids=["with bfloat16", "without"])
def processor(request, monkeypatch):
    """Whether the processor multiplies bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return request.param


def test_auto_takes_bfloat16_for_convolutions_where_the_processor_multiplies_it(processor):
    convolution, linear = network(nn.Conv2d(3, 4, 3)), network(nn.Flatten(), nn.Linear(192, 4))
    assert resolved_precision("auto", CPU, convolution, 64) == ("bfloat16" if processor else "float32")
    assert resolved_precision("auto", CPU, linear, 64) == "float32"
    for model in (convolution, linear):
        assert resolved_precision("float32", CPU, model, 64) == "float32"
        assert resolved_precision("bfloat16", CPU, model, 64) == "bfloat16"


@pytest.mark.parametrize(("tiles", "batch_size", "expected"), [(True, 511, "float32"), (True, 512, "bfloat16"), (False, 512, "float32")])
def test_auto_takes_bfloat16_for_large_batches_where_the_processor_has_matrix_tiles(tiles, batch_size, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert resolved_precision("auto", CPU, network(nn.Flatten(), nn.Linear(192, 4)), batch_size) == expected


@pytest.mark.parametrize(
    ("layer", "size", "right"),
    [
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), 1, False),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), 2, True),
        (nn.Conv2d(3, 4, 5, stride=3, padding=2), 2, False),
        (nn.Conv2d(3, 4, 3, padding=1), 1, True),
        (nn.Conv2d(3, 4, 1, stride=2), 1, True),
    ],
)
def test_a_step_wider_than_the_input_is_trained_in_float32(layer, size, right, processor):
    model = network(layer, shape=(3, size, size))
    assert resolved_precision("auto", CPU, model, 64) == ("bfloat16" if right and processor else "float32")
    if not right:
        with pytest.raises(UserError, match="recipe.precision=bfloat16: 0 takes steps that are wider than its input"):
            resolved_precision("bfloat16", CPU, model, 64)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_are_right_in_the_precision_that_auto_takes(size, stride):
    """Whatever memory held before: every tensor of it is NaN when torch gets it."""
    torch.manual_seed(0)
    model = network(nn.Conv2d(32, 64, 3, stride, padding=1, bias=False), shape=(32, size, size))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(8, *model.input_shape).contiguous(memory_format=torch.channels_last)
    precision = resolved_precision("auto", CPU, model, 64)

    def gradient(enabled: bool) -> torch.Tensor:
        model.zero_grad()
        held = [torch.full((size,), torch.nan) for size in (100, 1000, 10_000, 100_000) for _ in range(4)]
        del held
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = model(x)
        y.float().square().sum().backward()
        return model[0].weight.grad.clone()

    expected = gradient(False)
    for _ in range(5):
        assert float((gradient(precision == "bfloat16") - expected).norm()) <= 0.02 * float(expected.norm())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    model, seen = untrained(), set()
    model.stem[0].register_forward_hook(lambda *arguments: seen.add(arguments[-1].dtype))
    splits = noise_splits(32, None)
    run_fit(model, precision="bfloat16", splits=splits)
    assert seen == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    seen.clear()
    accuracy(model, splits.test)
    assert seen == {torch.float32}
