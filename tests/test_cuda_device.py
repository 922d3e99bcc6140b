"""The CUDA kernel on a GPU. Without one, test_cuda_kernel executes the same source on the CPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_kernel import ERRORS, layers
from test_inference import NETWORKS, pruned
from test_kernels import operation_of, small_operation
from torch.nn import functional as F

from prune_cli.inference import for_inference
from prune_cli.kernels import cupy_backend, plan
from prune_cli.kernels.cuda import layout
from prune_cli.kernels.cupy_backend import LARGE, SMALL, Layer
from prune_cli.kernels.operation import memory_format
from prune_cli.timing import captured

try:
    cupy_backend.check()
    MISSING = ""
except cupy_backend.CannotBuild as problem:
    MISSING = str(problem)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
CUDA = torch.device("cuda")
TUNINGS = list(dict.fromkeys((*LARGE, *SMALL)))


@pytest.fixture(params=["tf32", "ieee"])
def precision(request):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def poison(shape: torch.Size, dtype: torch.dtype) -> None:
    """Leave memory full of NaN to the next allocation of this size."""
    torch.full(shape, float("nan"), dtype=dtype, device=CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layers(), st.sampled_from([torch.contiguous_format, torch.channels_last]), st.booleans(), st.sampled_from(TUNINGS),
    st.booleans(),
)
def test_the_kernel_computes_the_masked_convolution(precision, dtype, layer, memory, relu, tuning, convert):
    x, weight, pattern, bias, stride, padding = layer
    operation = operation_of(weight, pattern, bias, stride, padding, relu)
    tuning = replace(tuning, convert=convert)
    if not layout.fits(operation, tuning):
        return
    expected = F.conv2d(x.double(), (weight * pattern.unsqueeze(1)).double(), bias.double(), stride, padding)
    expected = expected.relu() if relu else expected
    x = x.to(CUDA, dtype).contiguous(memory_format=memory)
    run = Layer(operation.to(CUDA), tuning)
    poison(expected.shape, dtype)
    y = run(x)
    scale = F.conv2d(x.cpu().float().abs(), (weight * pattern.unsqueeze(1)).abs(), bias.abs(), stride, padding).max()
    assert y.shape == expected.shape and y.is_contiguous(memory_format=memory_format(x))
    assert (y.cpu().double() - expected).abs().max() <= ERRORS[cupy_backend.math_of(dtype)] * scale
    assert torch.equal(run(x), y)  # the sums have one order


def large(dtype: torch.dtype = torch.float32):
    """A layer of many blocks, its input, and what a dense convolution makes of it."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(96, 3, 3, generator=generator) < 0.4
    weight = torch.randn(96, 72, 3, 3, generator=generator) / 16
    operation = operation_of(weight, pattern, torch.randn(96, generator=generator)).to(CUDA)
    x = torch.randn(33, 72, 29, 31, generator=generator)
    expected = F.conv2d(x.double(), (weight * pattern.unsqueeze(1)).double(), operation.bias.cpu().double(), 1, 1)
    return operation, x.to(CUDA, dtype), expected


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_many_blocks(tuning, precision):
    operation, x, expected = large()
    y = Layer(operation, tuning)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2, atol=2e-2 if precision == "tf32" else 1e-4)


def test_it_runs_on_the_current_stream_without_waiting():
    operation, x, expected = large()
    run, aside = Layer(operation, TUNINGS[3]), torch.cuda.Stream()
    run(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(aside):
            torch.cuda._sleep(50_000_000)  # what is written after it must be what is read
            late = torch.zeros_like(x)
            late.copy_(x)
            y = run(late)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    aside.synchronize()
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2, atol=2e-2)


def test_a_view_that_begins_anywhere():
    operation, x, expected = large(torch.bfloat16)
    held = torch.empty(x.numel() + 1, dtype=x.dtype, device=CUDA)[1:].view(x.shape).copy_(x)
    y = Layer(operation, TUNINGS[1])(held)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=5e-2, atol=1e-1)


def test_a_cuda_graph_holds_it():
    operation, x, expected = large()
    run, outputs, still = Layer(operation, TUNINGS[0]), [], torch.zeros_like(x)
    replay = captured(lambda: outputs.append(run(still)), repeat=1)
    still.copy_(x)
    replay()
    torch.testing.assert_close(outputs[-1].cpu().double(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("network", ["vgg", "resnet"])
def test_a_network_computes_the_same_also_compiled(network, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNE_CACHE", str(tmp_path))
    model = pruned(NETWORKS[network]()).to(CUDA)
    fast, x = for_inference(model, "cupy"), torch.randn(16, 3, 8, 8, device=CUDA)
    with torch.inference_mode():
        expected = model.double()(x.double()).float()
        torch.testing.assert_close(fast(x), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(torch.compile(fast, fullgraph=True)(x), expected, rtol=1e-2, atol=1e-2)


def test_a_plan_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNE_CACHE", str(tmp_path))
    operation, x = small_operation().to(CUDA), torch.randn(2, 8, 5, 5, device=CUDA)
    name, run = plan.choose(operation, x, "cupy")
    assert name.startswith("cupy:") and run(x).shape == (2, 6, 5, 5)
    monkeypatch.setattr(plan, "measure", None)
    assert plan.choose(operation, x, "cupy")[0] == name
