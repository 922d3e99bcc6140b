"""A stripe convolution is the dense convolution with a masked weight, in every form and shape."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from prune_cli.layers.skeleton import SkeletonConv2d
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.metrics.macs import count_macs

KERNELS = [(1, 1), (3, 3), (5, 5), (1, 3), (3, 1), (2, 2), (2, 5)]


@st.composite
def cases(draw):
    """A convolution, a pattern of stripes, and images for them."""
    kernel = draw(st.sampled_from(KERNELS))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, k)) for k in kernel)
    side = tuple(draw(st.integers(max(1, k - 2 * p), 11)) for k, p in zip(kernel, padding))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    inputs, filters, images = (draw(st.integers(1, 5)) for _ in range(3))
    conv = nn.Conv2d(inputs, filters, kernel, stride, padding, bias=draw(st.booleans()))
    pattern = torch.rand(filters, *kernel) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    if draw(st.booleans()):
        pattern[draw(st.integers(0, filters - 1))] = False  # an empty filter
    return conv, pattern, torch.randn(images, inputs, *side)


def masked(conv: nn.Conv2d, pattern: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The definition: a dense convolution whose removed stripes are zero."""
    return F.conv2d(x, conv.weight * pattern.unsqueeze(1), conv.bias, conv.stride, conv.padding)


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_all_paths_agree_with_the_masked_dense_convolution(case):
    conv, pattern, x = case
    expected = masked(conv, pattern, x)
    layer = StripeConv2d.from_conv(conv, pattern)
    with torch.no_grad():
        inference = layer.eval()(x)
        training = layer.train()(x)
    assert inference.dtype == x.dtype
    for found in (inference, training, layer.eval()(x), layer.train()(x)):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, conv.weight * pattern.unsqueeze(1))


@settings(deadline=None, max_examples=30)
@given(case=cases())
def test_gradients_are_those_of_the_masked_dense_convolution(case):
    conv, pattern, x = case
    layer = StripeConv2d.from_conv(conv, pattern).train()
    x_dense, x_stripes = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = masked(conv, pattern, x_dense), layer(x_stripes)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    found.backward(upstream)
    torch.testing.assert_close(x_stripes.grad, x_dense.grad, rtol=1e-4, atol=1e-4)
    rows = conv.weight.grad.permute(2, 3, 0, 1)[pattern.permute(1, 2, 0)]
    torch.testing.assert_close(layer.stripes.grad, rows, rtol=1e-4, atol=1e-4)
    if conv.bias is not None:
        torch.testing.assert_close(layer.bias.grad, conv.bias.grad, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(case=cases(), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_other_precisions(case, dtype):
    """Close to what double precision makes of the same rounded numbers."""
    conv, pattern, x = case
    conv, x = conv.to(dtype), x.to(dtype)
    layer = StripeConv2d.from_conv(conv, pattern).eval()
    with torch.no_grad():
        found, dense = layer(x), masked(conv, pattern, x)
        expected = masked(copy.deepcopy(conv).double(), pattern, x.double())
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-12}[dtype]
    # torch 2.13 itself is wrong on CPUs with AMX for some shapes: bfloat16, kernel 2x5, stride (1, 2), images 6x5.
    assume(torch.allclose(dense.double(), expected, rtol=tolerance, atol=tolerance))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_strided_input_is_read_in_place():
    """channels_last images, and images that are a window of larger ones."""
    conv, pattern = nn.Conv2d(4, 3, 3, 2, 1), torch.rand(3, 3, 3) < 0.5
    layer, x = StripeConv2d.from_conv(conv, pattern).eval(), torch.randn(2, 4, 9, 7)
    with torch.inference_mode():
        for view in (x.contiguous(memory_format=torch.channels_last), torch.cat([x, x])[2:], F.pad(x, (1, 0))[..., 1:]):
            assert torch.allclose(layer(view), layer(x), atol=1e-6)


def test_stripes_are_ordered_by_row_column_and_filter():
    conv = nn.Conv2d(2, 3, (2, 2), bias=False)
    conv.weight.data = torch.arange(24.0).reshape(3, 2, 2, 2)
    pattern = torch.zeros(3, 2, 2, dtype=torch.bool)
    for o, i, j in [(2, 0, 0), (0, 0, 0), (1, 1, 1), (1, 0, 1), (0, 1, 1)]:
        pattern[o, i, j] = True
    expected = [conv.weight[o, :, i, j] for o, i, j in [(0, 0, 0), (2, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]]
    assert torch.equal(StripeConv2d.from_conv(conv, pattern).stripes, torch.stack(expected))


def layer_and_input(kept: float = 0.5) -> tuple[StripeConv2d, torch.Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    return StripeConv2d.from_conv(conv, torch.rand(6, 3, 3) < kept).eval(), torch.randn(2, 4, 7, 7)


def test_a_copy_is_a_layer_of_its_own():
    layer, x = layer_and_input()
    with torch.no_grad():
        before = layer(x)  # the copy is taken after the kernel was prepared
        twin = copy.deepcopy(layer)
        twin.stripes.zero_()
        assert torch.equal(layer(x), before)
        assert torch.equal(twin(x), twin.bias.view(1, -1, 1, 1).expand_as(before))


def test_a_state_dict_round_trip_forgets_the_old_pattern():
    """A pattern with as many stripes elsewhere."""
    layer, x = layer_and_input()
    flipped = layer.pattern.flip(0, 1)
    other = StripeConv2d.from_conv(nn.Conv2d(4, 6, 3, stride=2, padding=1), flipped).eval()
    with torch.no_grad():
        assert not torch.equal(layer(x), other(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
    assert sorted(layer.state_dict()) == ["bias", "pattern", "stripes"]


def test_a_layer_changes_precision_after_use():
    layer, x = layer_and_input()
    with torch.no_grad():
        single, double = layer(x), layer.double()(x.double())
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), single, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_that_moves_to_the_gpu_and_back():
    layer, x = layer_and_input()
    with torch.no_grad():
        expected = layer(x)
        assert torch.allclose(layer.cuda()(x.cuda()).cpu(), expected, atol=1e-3)
        assert torch.equal(layer.cpu()(x), expected)


@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
def test_macs_count_the_stripes(kept):
    layer, x = layer_and_input(kept)
    assert count_macs(layer, (4, 7, 7)) == int(layer.pattern.sum()) * 4 * 4 * 4
    assert layer.stripes.shape == (int(layer.pattern.sum()), 4)


@pytest.mark.parametrize("padding", ["same", "valid", 0, (1, 0)])
def test_padding_as_a_convolution_takes_it(padding):
    conv, pattern = nn.Conv2d(2, 3, (3, 5), padding=padding), torch.rand(3, 3, 5) < 0.6
    x = torch.randn(2, 2, 6, 8)
    with torch.no_grad():
        found = StripeConv2d.from_conv(conv, pattern).eval()(x)
    assert torch.allclose(found, masked(conv, pattern, x), atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_a_skeleton_scales_stripes(case):
    """The training form, and what is left of it when the skeleton is merged into the weight."""
    conv, pattern, x = case
    original = copy.deepcopy(conv)
    layer = SkeletonConv2d.from_conv(conv)
    torch.testing.assert_close(layer(x), original(x))
    values = torch.randn(pattern.shape) * pattern
    layer.skeleton.data.copy_(values)
    expected = F.conv2d(x, original.weight * values.unsqueeze(1), original.bias, conv.stride, conv.padding)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    plain = layer.plain()
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert plain.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_keeps_the_precision(dtype):
    layer = SkeletonConv2d.from_conv(nn.Conv2d(2, 3, 3).to(dtype)).eval()
    assert layer.plain().weight.dtype == dtype
    assert not layer.plain().training
