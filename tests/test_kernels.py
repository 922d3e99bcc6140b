"""Every backend of the stripe-wise convolution against a dense convolution with masked weights."""

import ctypes
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from prune_cli.kernels import compiled, compiler, plan, torch_plans
from prune_cli.kernels.operation import Operation, memory_format
from prune_cli.kernels.reference import reference

LAYOUTS = (torch.contiguous_format, torch.channels_last)
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # largest relative error
TUNINGS = [
    compiled.Tuning(0, 0, 16, 64, 1), compiled.Tuning(0, 1, 64, 3, 2), compiled.Tuning(0, 1, 128, 64, 1),
    compiled.Tuning(0, 2, 256, 16, 1), compiled.Tuning(1, 0, 16, 64, 1), compiled.Tuning(1, 1, 16, 64, 1),
    compiled.Tuning(1, 2, 5, 3, 3), compiled.Tuning(0, 3, 256, 64, 1), compiled.Tuning(0, 3, 32, 3, 2),
]  # fmt: skip
IN_TILES = [
    compiled.Tuning(2, 0, 64, 64, 1), compiled.Tuning(2, 0, 256, 64, 3), compiled.Tuning(2, 3, 128, 64, 1),
    compiled.Tuning(3, 0, 4, 64, 1), compiled.Tuning(3, 3, 16, 64, 2),
]  # fmt: skip
VARIANTS = [name for name, (needed, _) in compiler.VARIANTS.items() if needed <= compiler.processor_flags()]
BACKENDS = {
    "reference": lambda operation, tuning: reference(operation),
    **{name: lambda operation, tuning, make=make: make(operation) for name, make in plan.TORCH_PLANS.items()},
    **{
        name: lambda operation, tuning, name=name: compiled.compiled(operation, tuning, name) for name in VARIANTS
    },
}


@pytest.fixture(scope="module")
def tiles():
    if not compiler.library().has_tiles():
        pytest.skip("this processor has no matrix tiles")


@pytest.fixture
def no_memory():
    """A process that has not looked for a compiler yet."""
    for remembered in (plan.can_compile, compiler.library):
        remembered.cache_clear()
    yield
    for remembered in (plan.can_compile, compiler.library):
        remembered.cache_clear()


@pytest.fixture
def cache(monkeypatch, tmp_path, no_memory):
    monkeypatch.setenv("PRUNE_CACHE", str(tmp_path))
    return tmp_path


@st.composite
def layers(draw, most=20, longest=19):
    """(input, dense weight, pattern, bias, stride, padding): odd sizes, empty stripes and filters."""
    size = st.integers(1, 3)
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (2, 2), (1, 3), (3, 2)]))
    stride, padding = (draw(size), draw(size)), (draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    channels, filters = draw(st.integers(1, most)), draw(st.integers(1, most))
    height, width = (draw(st.integers(max(1, k - 2 * p), longest)) for k, p in zip(kernel, padding, strict=True))
    images = draw(st.sampled_from([1, 2, 5, 17, 70]))
    kept, dead = draw(st.sampled_from([0, 0.1, 0.5, 1])), draw(st.sampled_from([0, 0.3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pattern = torch.rand(filters, *kernel, generator=generator) < kept
    pattern &= torch.rand(filters, 1, 1, generator=generator) >= dead
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(filters, channels, *kernel, generator=generator)
    return x, weight, pattern, torch.randn(filters, generator=generator), stride, padding


def operation_of(weight, pattern, bias, stride=(1, 1), padding=(1, 1), relu=False) -> Operation:
    stripes = weight.permute(2, 3, 0, 1)[pattern.permute(1, 2, 0)]
    return Operation(pattern, stripes, bias, stride, padding, relu)


def small_operation(seed: int = 0, channels: int = 8, filters: int = 6) -> Operation:
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(filters, 3, 3, generator=generator) < 0.5
    weight = torch.randn(filters, channels, 3, 3, generator=generator)
    return operation_of(weight, pattern, torch.randn(filters, generator=generator))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers(), st.sampled_from(LAYOUTS), st.sampled_from(list(TYPES)), st.booleans(), st.sampled_from(TUNINGS))
def test_a_backend_computes_the_masked_convolution(backend, layer, layout, dtype, relu, tuning):
    x, weight, pattern, bias, stride, padding = layer
    expected = F.conv2d(x.double(), (weight * pattern.unsqueeze(1)).double(), bias.double(), stride, padding)
    expected = expected.relu() if relu else expected
    run = BACKENDS[backend](operation_of(weight, pattern, bias, stride, padding, relu), tuning)
    x = x.to(dtype).contiguous(memory_format=layout)
    y = run(x)
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous(memory_format=memory_format(x))
    # Relative to the largest sum of magnitudes, which is what rounding is proportional to.
    scale = F.conv2d(x.abs().float(), (weight * pattern.unsqueeze(1)).abs(), bias.abs(), stride, padding).max()
    assert (y.double() - expected).abs().max() <= TYPES[dtype] * scale


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layers(most=80, longest=34), st.sampled_from(LAYOUTS), st.booleans(), st.sampled_from(IN_TILES))
def test_matrix_tiles_multiply_bfloat16_and_sum_float32(tiles, layer, layout, relu, tuning):
    x, weight, pattern, bias, stride, padding = layer
    x, weight = x.bfloat16().contiguous(memory_format=layout), weight.bfloat16().float()
    operation = operation_of(weight, pattern, bias, stride, padding, relu)
    y, expected = compiled.compiled(operation, tuning)(x), reference(operation)(x.float())
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=memory_format(x))
    # Half a step of the output's eight bits; the order of a sum is free.
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("tuning", IN_TILES)
def test_in_tiles_what_is_not_finite_spreads_as_far_as_the_kernel_reaches(tiles, tuning):
    weight, x = torch.randn(5, 3, 3, 3), torch.randn(2, 3, 6, 6, dtype=torch.bfloat16)
    x[0, 1, 0, 5], x[1, 2, 3, 0] = torch.inf, torch.nan
    operation = operation_of(weight, torch.ones(5, 3, 3, dtype=torch.bool), torch.zeros(5))
    for layout in LAYOUTS:
        y = compiled.compiled(operation, tuning)(x.contiguous(memory_format=layout))
        assert torch.equal(y.isfinite(), reference(operation)(x).isfinite())


TILE_SHAPES = """
extern "C" void set(const char (&shapes)[64]) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
extern "C" void get(char (&shapes)[64]) { __asm__ volatile("sttilecfg %0" : "=m"(shapes)); }
"""


def test_tiles_leave_those_of_other_libraries_alone(tiles, tmp_path):
    """A library may remember which tiles it has set up on a thread."""
    (tmp_path / "shapes.cpp").write_text(TILE_SHAPES)
    command = [compiler._compiler(), "-shared", "-fPIC", str(tmp_path / "shapes.cpp"), "-o", str(tmp_path / "shapes.so")]
    subprocess.run(command, check=True)
    registers, now = ctypes.CDLL(str(tmp_path / "shapes.so")), ctypes.create_string_buffer(64)
    some = bytes([1, *[0] * 15, *[48, 0] * 3, *[0] * 26, 7, 7, 12, *[0] * 13])  # three tiles
    x = torch.randn(3, 8, 7, 7).bfloat16()
    for shapes in (some, bytes(64)):
        for tuning in IN_TILES:
            run = compiled.compiled(small_operation(), tuning)
            registers.set(shapes)
            run(x)
            registers.get(now)
            assert now.raw == shapes


def test_tiles_and_dense_layers_in_bfloat16_take_turns(tiles):
    torch.manual_seed(0)
    numbers = [torch.randn(shape).bfloat16() for shape in [(4, 48, 9, 9), (40, 48, 3, 3), (100, 80), (56, 80)]]
    others = [lambda: F.conv2d(*numbers[:2]), lambda: F.linear(*numbers[2:])]
    results = [other() for other in others]
    runs = [compiled.compiled(small_operation(channels=44), tuning) for tuning in IN_TILES]
    x = torch.randn(3, 44, 7, 7).bfloat16()
    expected = [run(x) for run in runs]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for (run, y), (other, result) in product(zip(runs, expected, strict=True), zip(others, results, strict=True)):
                for _ in range(2):  # the second time it finds what it has set up
                    assert torch.equal(other(), result) and torch.equal(run(x), y)
    finally:
        torch.set_num_threads(1)


def test_tiles_are_for_bfloat16_only(tiles):
    operation, x = small_operation(), torch.randn(2, 8, 5, 5)
    for dtype in TYPES:
        offered = {plan.make(name, operation) and name for name in plan.candidates(operation, x.to(dtype), "cpp")}
        assert any(name.startswith(("cpp:2", "cpp:3")) for name in offered) == (dtype == torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16, not torch.float32"):
        compiled.compiled(operation, IN_TILES[0])(x)


def test_without_tiles_none_are_offered(monkeypatch):
    operation, x = small_operation(), torch.randn(2, 8, 5, 5, dtype=torch.bfloat16)
    plain = [name for name in plan.candidates(operation, x.float(), "cpp")]
    without = SimpleNamespace(has_tiles=lambda: 0)
    monkeypatch.setattr(plan, "library", lambda: without)
    assert plan.candidates(operation, x, "cpp") == plain
    monkeypatch.setattr(compiled, "library", lambda variant: without)
    with pytest.raises(compiler.CannotBuild, match="no matrix tiles"):
        compiled.compiled(operation, IN_TILES[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_number_of_threads_changes_nothing(tuning, threads):
    operation, x = small_operation(), torch.randn(5, 8, 9, 7)
    expected = compiled.compiled(operation, tuning)(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(compiled.compiled(operation, tuning)(x), expected)
    finally:
        torch.set_num_threads(1)


def test_boxes_follow_the_patterns():
    pattern = torch.zeros(6, 3, 3, dtype=torch.bool)
    pattern[:2, 0, :] = pattern[2:4, :, 1] = pattern[4, 1:, 1:] = True
    clusters = {box: filters.tolist() for box, filters in torch_plans._clusters(pattern)}
    assert clusters == {(0, 1, 0, 3): [0, 1], (0, 3, 1, 2): [2, 3], (1, 3, 1, 3): [4]}


def test_without_a_compiler_torch_computes_and_says_so_once(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(cache))
    with caplog.at_level(logging.WARNING):
        for seed in (0, 1):
            name, run = plan.choose(small_operation(seed), torch.randn(2, 8, 5, 5))
            assert name in plan.TORCH_PLANS and run(torch.randn(2, 8, 5, 5)).shape == (2, 6, 5, 5)
    assert [r.getMessage() for r in caplog.records] == [
        "The stripe-wise convolution is computed by torch: there is no C++ compiler"
    ]
    with pytest.raises(plan.UserError, match="runtime.kernel=cpp: there is no C"):
        plan.choose(small_operation(), torch.randn(1, 8, 5, 5), "cpp")


@pytest.mark.parametrize(
    ("script", "words"),
    [("exit 1", "fails: no library"), ("echo 'x.cpp:1: error: bad' >&2; exit 1", "fails: x.cpp:1: error: bad"), (":", "no library")],
)
def test_a_broken_compiler_is_named(cache, monkeypatch, script, words):
    broken = cache / "broken-c++"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(compiler.CannotBuild, match=words):
        compiler.library()
    assert not list(cache.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_no_failure(monkeypatch, tmp_path, no_memory):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRUNE_CACHE", str(tmp_path / "file"))
    name, _ = plan.choose(small_operation(), torch.randn(1, 8, 5, 5))
    assert name in plan.TORCH_PLANS


def test_two_processes_build_once_and_a_damaged_library_is_built_again(cache, monkeypatch):
    quick = cache / "quick-c++"  # the real one, which takes a third of the time without optimising
    quick.write_text(f'#!/bin/sh\nexec {compiler._compiler()} "$@" -O0\n')
    quick.chmod(0o755)
    monkeypatch.setenv("CXX", str(quick))
    code = "from prune_cli.kernels.compiler import library; print(library().lanes())"
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    assert len({process.communicate(timeout=300)[0] for process in processes}) == 1
    (built,) = cache.rglob("*.so")
    first = built.stat().st_mtime_ns
    compiler.library()
    assert built.stat().st_mtime_ns == first
    compiler.library.cache_clear()
    whole = built.read_bytes()
    built.unlink()  # it is mapped by this process
    built.write_bytes(whole[: len(whole) // 2])
    assert compiler.library().lanes() in (4, 8, 16) and built.stat().st_size > len(whole) // 2


def test_a_plan_is_measured_once(cache, monkeypatch):
    operation, x = small_operation(), torch.randn(2, 8, 5, 5)
    name, _ = plan.choose(operation, x, "torch")
    monkeypatch.setattr(plan, "measure", None)
    assert plan.choose(small_operation(), torch.randn(2, 8, 5, 5), "torch")[0] == name
    with pytest.raises(TypeError):
        plan.choose(operation, torch.randn(3, 8, 5, 5), "torch")


def test_plans_that_are_close_run_again(monkeypatch):
    """A first heat that was disturbed decides nothing between plans that are nearly equal."""
    heats = iter([{"a": [1.0], "b": [1.04], "c": [1.2], "d": [2.0]}, {"a": [1.1], "b": [1.02], "c": [1.2]}, {"a": [1.0], "b": [0.9]}])
    ran = []

    def measured(runs, *arguments, **options):
        ran.append(set(runs))
        found = next(heats, None) or {name: [3.0] for name in runs}
        return {name: found[name] for name in runs}

    monkeypatch.setattr(plan, "make", lambda name, operation: lambda x: x)
    monkeypatch.setattr(plan, "alternate", measured)
    assert plan.measure(small_operation(), torch.randn(1, 8, 5, 5), list("abcd")) == {"a": 1.0, "b": 0.9, "c": 1.2, "d": 2.0}
    assert ran == [set("abcd"), set("abc"), set("ab")]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": "cpp:no"}', '{"plan": null}'])
def test_a_damaged_plan_is_measured_again(cache, content):
    operation, x = small_operation(), torch.randn(2, 8, 5, 5)
    plan.choose(operation, x, "torch")
    (kept,) = (cache / "plans").rglob("*.json")
    kept.write_text(content)
    assert plan.choose(operation, x, "torch")[0] in plan.TORCH_PLANS
    assert "ms" in kept.read_text()


def test_importing_the_package_starts_nothing(tmp_path):
    code = (
        "import sys, prune_cli.inference, prune_cli.kernels.plan, torch\n"
        "assert not torch.cuda.is_initialized() and 'cupy' not in sys.modules"
    )
    environment = {**os.environ, "PATH": "", "PRUNE_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment, cwd=Path(__file__).parents[1])
    assert not (tmp_path / "cache").exists()


def test_sources_are_in_the_package():
    assert {path.name for path in compiler.SOURCES.iterdir()} >= {"stripe_conv.cpp", "micro.h", "layer.h"}
