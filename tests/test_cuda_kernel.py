"""The CUDA kernel without a GPU: its own source is compiled for the CPU and executed, every thread of it.

tests/cuda/on_cpu.h replaces the tensor core and copy instructions, and nothing else.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inference import pruned
from test_kernels import operation_of, small_operation
from tiny import TinyVGG
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from prune_cli.errors import UserError
from prune_cli.inference import for_inference
from prune_cli.kernels import plan
from prune_cli.kernels.cuda import layout
from prune_cli.kernels.cuda.layout import MATHS, Tuning
from prune_cli.kernels.cuda.source import defines, resources
from prune_cli.kernels.cuda.source import kernel as cuda_kernel
from prune_cli.kernels.cupy_backend import Layer, shaped
from prune_cli.kernels.operation import Operation, memory_format
from prune_cli.kernels.reference import stripe_conv2d

ON_CPU = Path(__file__).parent / "cuda"
ERRORS = {"float32": 1e-5, "tf32": 2e-3, "float16": 3e-3, "bfloat16": 2e-2}  # largest, relative to sums of magnitudes
CASES = [
    ("float32", Tuning(1, 2, 32)), ("tf32", Tuning(1, 1, 16)), ("tf32", Tuning(2, 1, 64)), ("float16", Tuning(2, 2, 32)),
    ("bfloat16", Tuning(1, 2, 64)), ("bfloat16", Tuning(4, 2, 64)),
]  # fmt: skip


@st.composite
def layers(draw):
    """(input, dense weight, pattern, bias, stride, padding): odd sizes, more channels than the pipeline
    holds, empty stripes, filters and layers."""
    step = st.integers(1, 3)
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (1, 1), (5, 5), (2, 2), (1, 3), (4, 2)]))
    stride, padding = (draw(step), draw(step)), (draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    channels, filters = draw(st.sampled_from([1, 3, 8, 17, 72, 104, 168])), draw(st.integers(1, 20))
    height, width = (draw(st.integers(max(1, k - 2 * p), 11)) for k, p in zip(kernel, padding, strict=True))
    images = draw(st.sampled_from([1, 1, 2, 5]))
    kept, dead = draw(st.sampled_from([0, 0.1, 0.5, 0.5, 1])), draw(st.sampled_from([0, 0.3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pattern = torch.rand(filters, *kernel, generator=generator) < kept
    pattern &= torch.rand(filters, 1, 1, generator=generator) >= dead
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(filters, channels, *kernel, generator=generator)
    return x, weight, pattern, torch.randn(filters, generator=generator), stride, padding


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """(math, tuning, vector) to the compiled kernel, all in one library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("on_cpu")
    (folder / "kernel.cu").write_text(cuda_kernel())
    names = {(*case, vector): f"configuration_{2 * k + vector}" for k, case in enumerate(CASES) for vector in (False, True)}
    parts = ['#include "on_cpu.h"', '#define KERNEL "kernel.cu"']
    for (math, tuning, vector), name in names.items():
        macros = [option.removeprefix("-D").split("=") for option in defines(math, tuning, vector)]
        macros += [("NAME", name), ("stripe_conv", f"stripe_conv_{name}")]
        parts += [f"#define {macro} {value}" for macro, value in macros]
        parts += [f"namespace {name}_parts {{", '#include "configuration.h"', "}"]
        parts += [f"#undef {macro}" for macro, _ in macros]
    (folder / "all.cpp").write_text("\n".join(parts) + "\n")
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", f"-I{ON_CPU}", f"-I{folder}"]
    subprocess.run([compiler, *flags, str(folder / "all.cpp"), "-o", str(folder / "all.so")], check=True)
    library = ctypes.CDLL(str(folder / "all.so"))
    return lambda *case: library[names[case]]


def guarded(tensor: Tensor) -> Tensor:
    """A copy at 16 bytes' alignment between numbers that are none: reading beside it is seen."""
    pad = 64
    around = torch.full((tensor.numel() + 2 * pad,), float("nan")).to(tensor.dtype)
    start = pad + (-(around.data_ptr() // tensor.element_size()) % (16 // tensor.element_size()))
    last = tensor.ndim == 4 and memory_format(tensor) == torch.channels_last
    around[start : start + tensor.numel()] = (tensor.permute(0, 2, 3, 1) if last else tensor).flatten()
    return around[start : start + tensor.numel()]


def executed(library, operation: Operation, math: str, tuning: Tuning, x: Tensor, seed: int = 0) -> Tensor:
    """What cupy_backend.Layer does, with the threads of the CPU."""
    packed = layout.pack(operation, tuning, math)
    memory, vector, g = shaped(operation, packed, tuning, x)
    inputs, weights = guarded(x.contiguous(memory_format=memory)), guarded(packed.weights)
    y = torch.full((len(x), operation.filters, g.out_height, g.out_width), float("nan"), dtype=x.dtype)
    y = y.contiguous(memory_format=memory_format(x))
    tensors = (inputs, y, weights, packed.bias, packed.tables)
    pointers = (ctypes.c_void_p * 5)(*(t.data_ptr() for t in tensors))
    geometry = (ctypes.c_int * len(g.arguments))(*g.arguments)
    library(math, tuning, vector)(g.blocks, tuning.threads, g.shared_bytes, pointers, geometry, seed)
    return y


@pytest.mark.parametrize(("math", "tuning"), CASES, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(), st.sampled_from([torch.contiguous_format, torch.channels_last]), st.booleans(), st.integers(0, 99))
def test_the_kernel_computes_the_masked_convolution(on_cpu, math, tuning, layer, memory, relu, seed):
    x, weight, pattern, bias, stride, padding = layer
    operation = operation_of(weight, pattern, bias, stride, padding, relu)
    if not layout.fits(operation, tuning):
        return
    expected = F.conv2d(x.double(), (weight * pattern.unsqueeze(1)).double(), bias.double(), stride, padding)
    expected = expected.relu() if relu else expected
    y = executed(on_cpu, operation, math, tuning, x.to(MATHS[math]).contiguous(memory_format=memory), seed)
    scale = F.conv2d(x.abs(), (weight * pattern.unsqueeze(1)).abs(), bias.abs(), stride, padding).max()
    assert y.shape == expected.shape and (y.double() - expected).abs().max() <= ERRORS[math] * scale


@pytest.mark.parametrize(
    ("math", "tuning", "vector", "architecture"),
    [
        ("float32", Tuning(8, 2, 128), True, "sm_90"), ("tf32", Tuning(8, 2, 128), False, "sm_80"),
        ("float16", Tuning(8, 2, 128), False, "sm_90"), ("bfloat16", Tuning(4, 2, 128), True, "sm_80"),
    ],
    ids=str,
)  # fmt: skip
def test_it_compiles_for_the_gpu_and_spills_no_register(math, tuning, vector, architecture, tmp_path):
    """The largest configurations; scripts/gpu_checks.py compiles all of them."""
    try:
        registers, spilled = resources(math, tuning, vector, architecture, tmp_path)
    except FileNotFoundError:
        pytest.skip("there is no nvcc")
    assert spilled == 0 and registers * tuning.threads <= 65536
    print(f"{math} {tuning}: {registers} registers")


def test_groups_hold_whole_filters_and_begin_at_fours():
    found = layout._groups([9] * 16, 64)
    assert found == [(0, 4), (4, 8), (8, 12), (12, 16)]  # a fifth filter would fit, but not be written at once
    assert layout._groups([30, 40, 1, 0, 5], 64) == [(0, 1), (1, 5)]
    assert layout._groups([0] * 300, 64) == [(0, 128), (128, 256), (256, 300)]


@given(st.integers(1, 300), st.integers(1, 9), st.integers(-3, 0), st.integers(0, 3), st.integers(1, 300))
def test_tiles_of_an_axis_cover_it_and_hold_what_their_outputs_read(rows, size, first, last, outputs):
    axis = layout._axis(size, rows, first, last)
    if axis is None:
        assert size <= last - first
        return
    step = axis.size - (last - first)
    assert (axis.count - 1) * step + axis.size >= rows
    ends = [min(outputs, max(0, k * step - first)) for k in range(1, axis.count)] + [outputs]
    assert axis.most_outputs(outputs) == max(b - a for a, b in zip([0, *ends], ends, strict=False))


def test_a_network_is_one_graph_for_torch_compile(monkeypatch):
    """The plan of every layer a CUDA kernel, computed by the reference here."""
    monkeypatch.setattr(Layer, "launch", lambda layer, x: stripe_conv2d(layer.operation, x))
    monkeypatch.setattr("prune_cli.inference.choose", lambda operation, *_: ("cupy", Layer(operation, Tuning(4, 2, 64))))
    fast, x = for_inference(pruned(TinyVGG(3, 8, 10))), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = fast(x)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_fake_implementation_knows_the_result(memory):
    layer = Layer(small_operation(), Tuning(4, 2, 64))
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 7, dtype=torch.bfloat16, memory_format=memory)
        y = torch.ops.prune_cli.stripe_conv(x, layer.handle)
    assert y.shape == (2, 6, 5, 7) and y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=memory)


def test_without_a_gpu_the_backend_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan.can_launch.cache_clear()
    with pytest.raises(UserError, match="^runtime.kernel=cupy: torch finds no CUDA device; kernel=auto"):
        plan.require("cupy", torch.device("cpu"))
    plan.can_launch.cache_clear()
