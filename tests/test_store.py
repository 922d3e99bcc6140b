"""The store: keys, artifacts that exist whole or not at all, and what is left when a job dies."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from prune_cli import stages
from prune_cli.build import build
from prune_cli.errors import StageError, UserError
from prune_cli.journal import Journal
from prune_cli.pipeline import run
from prune_cli.store import Partial, Store, full_disk_explained, key_of
from prune_cli.workshop import Workshop

# The keys of `prune-cli method=... recipe.precision=float32`, all else at its default. They change
# when, and only when, the same command computes something else than before: a default in conf/ got
# another value, or a number in workshop.VERSIONS was raised because a stage's code did. Then put the
# new ones here (the failing test prints them). When they change for any other reason, everybody
# would train everything again: repair that instead. A new option defaults to None.
GOLDEN = {
    "stripe": {
        "dense": "145f8411e260fe0b9f81b3c6",
        "sparse": "84e6e19fbb1d564a15d0e2fe",
        "pruned": "4c56d600631adf22d6d1b448",
        "random": "5c5457389dbb1d99af8653cf",
    },
    "fp": {
        "dense": "145f8411e260fe0b9f81b3c6",
        "pruned": "dfe72077b00e5299c6f3ed14",
        "random": "64a41f1f6b0aa558d1848efb",
        "finetuned": "d6ac84035aad7b2cbe6d0d4c",
    },
}

KEY = "0123456789abcdef01234567"
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
SETTINGS = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8
)  # fmt: skip
SLOW = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def _make(folder, partial):
    save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
    return {"accuracy": 0.5}


def _produce(store, make=_make, key=KEY):
    return store.produce("dense", key, {"a": 1}, make)


def _held(store) -> set[str]:
    """What lies in the stage's folder, besides locks."""
    folder = store.root / "dense"
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"} if folder.exists() else set()


# Keys


@given(st.dictionaries(st.text(max_size=3), SETTINGS, max_size=4), st.randoms())
def test_a_key_does_not_depend_on_order_nor_on_options_that_are_none(values, random):
    key = key_of("dense", 1, values)
    names = list(values)
    random.shuffle(names)
    assert key_of("dense", 1, {name: values[name] for name in names}) == key
    assert key_of("dense", 1, values | {"a new option": None}) == key
    assert key_of("dense", 1, {"inner": values | {"new": None}}) == key_of("dense", 1, {"inner": values})


@given(st.dictionaries(st.text(max_size=3), st.integers(), max_size=4), st.text(max_size=3), st.integers())
def test_a_key_depends_on_every_value(values, name, value):
    same = values.get(name) == value
    assert (key_of("dense", 1, values) == key_of("dense", 1, values | {name: value})) == same


def test_keys_chain_and_name_their_stage_and_version():
    keys = [
        key_of("dense", 1, {"a": 1}), key_of("dense", 2, {"a": 1}), key_of("sparse", 1, {"a": 1}),
        key_of("dense", 1, {"a": 1}, "p"), key_of("dense", 1, {"a": 1}, "q"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_dataclasses_tuples_and_their_plain_forms_are_one():
    @dataclass(frozen=True)
    class Fit:
        milestones: tuple[float, ...] = (0.5,)
        clip: float | None = None

    assert key_of("dense", 1, {"fit": Fit()}) == key_of("dense", 1, {"fit": {"milestones": [0.5]}})


@pytest.mark.parametrize("method", GOLDEN)
def test_golden_keys(method, compose, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "fit", lambda *args, **more: [])  # the keys do not wait for training
    overrides = f"method={method}", "recipe.precision=float32", "runtime.latency_seconds=0"
    record = run(build(compose(*overrides)), tmp_path / "run", command="test")
    assert {result.stage: result.key for result in record.stages} == GOLDEN[method]


def test_keys_leave_out_where_and_how_fast_it_is_computed(compose, tmp_path):
    def common(*overrides):
        experiment = build(compose(*overrides))
        return Workshop(experiment, Store(tmp_path / "s"), Journal(None, Console(quiet=True))).common

    here = common("recipe.precision=float32", "dataset=synthetic")
    there = common(
        "recipe.precision=float32", "dataset=synthetic", f"runtime.data_root={tmp_path}/elsewhere", "runtime.workers=1",
        "runtime.threads=1", "runtime.device=cpu", "runtime.latency_seconds=3",
    )  # fmt: skip
    assert here == there != common("recipe.precision=float32", "dataset=synthetic", "dataset.noise=2")


def test_a_folder_of_images_may_be_moved(tmp_path, compose):
    for dataset in ("folder", "imagenet"):
        settings_ = [
            build(compose(f"dataset={dataset}", f"dataset.path={path}")).dataset.settings() for path in ("a", "b")
        ]
        assert settings_[0] == settings_[1] and "flip" in settings_[0]


# Whole or not at all


def test_made_once_then_found(store):
    artifact, cached = _produce(store)
    assert not cached and artifact.result == {"accuracy": 0.5} and artifact.file("model.safetensors").exists()
    again, cached = _produce(store, make=None)
    assert cached and again == artifact
    assert store.find("dense", KEY) == artifact and store.find("sparse", KEY) is None
    assert _held(store) == {KEY}
    manifest = json.loads(artifact.file("manifest.json").read_text())
    assert manifest["settings"] == {"a": 1} and set(manifest["files"]) == {"model.safetensors", "result.json"}


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, SystemExit, StageError, OSError(errno.ENOSPC, "full")])
def test_a_make_that_raises_leaves_its_partial_only(store, problem):
    def make(folder, partial):
        partial.save({"epoch": 3})
        _make(folder, partial)
        raise problem

    with pytest.raises(problem if isinstance(problem, type) else type(problem)):
        _produce(store, make)
    assert _held(store) == {f"{KEY}.partial"}

    def resume(folder, partial):
        assert partial.load() == {"epoch": 3}
        return _make(folder, partial)

    assert _produce(store, resume)[1] is False  # the lock is free
    assert _held(store) == {KEY}


def test_a_result_that_is_no_json_leaves_nothing(store):
    with pytest.raises(TypeError):
        _produce(store, lambda folder, partial: {"accuracy": torch.ones(1)})
    assert _held(store) == set()


def test_seconds_add_up_over_attempts(store):
    def killed(folder, partial):
        time.sleep(0.2)
        partial.save({"epoch": 1})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _produce(store, killed)
    seconds = []

    def resumed(folder, partial):
        partial.load()
        seconds.append(partial.seconds)
        return {}

    _produce(store, resumed)
    assert 0.2 <= seconds[0] < 5


# Damage


def _edit(name, change):
    def damage(path):
        file = path / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def _folder_to_file(path):
    shutil.rmtree(path)
    path.write_text("not a folder")


DAMAGE = {
    "truncated model": (_edit("model.safetensors", lambda b: b[:-1]), "model.safetensors has changed"),
    "empty model": (_edit("model.safetensors", lambda b: b""), "model.safetensors has changed"),
    "edited result": (_edit("result.json", lambda b: b.replace(b"0.5", b"0.9")), "result.json has changed"),
    "missing model": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "missing result": (lambda path: (path / "result.json").unlink(), "result.json is missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest cannot be read"),
    "empty manifest": (_edit("manifest.json", lambda b: b""), "manifest cannot be read"),
    "binary manifest": (_edit("manifest.json", lambda b: b"\xff\xfe\x00"), "manifest cannot be read"),
    "a list as manifest": (_edit("manifest.json", lambda b: b"[1, 2]"), "manifest cannot be read"),
    "a manifest of nothing": (
        _edit("manifest.json", lambda b: json.dumps(json.loads(b) | {"files": {}}).encode()), "does not list result.json",
    ),
    "a manifest of garbage": (
        _edit("manifest.json", lambda b: json.dumps(json.loads(b) | {"files": 7}).encode()), "manifest cannot be read",
    ),
    "foreign key": (_edit("manifest.json", lambda b: b.replace(KEY.encode(), b"f" * 24)), "foreign"),
    "foreign stage": (_edit("manifest.json", lambda b: b.replace(b'"dense"', b'"sparse"')), "foreign"),
    "a file": (_folder_to_file, "manifest cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_artifact_is_named_set_aside_and_made_again(store, caplog, kind):
    damage, said = DAMAGE[kind]
    path = _produce(store)[0].path
    for time_ in (1, 2):
        damage(path)
        caplog.clear()
        assert store.find("dense", KEY) is None
        artifact, cached = _produce(store)
        assert not cached and artifact.result == {"accuracy": 0.5}
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert str(path) in record.message and said in record.message and f"{KEY}.damaged-{time_}" in record.message
    assert _held(store) == {KEY, f"{KEY}.damaged-1", f"{KEY}.damaged-2"}
    assert _produce(store, make=None)[1]


def test_looking_for_an_artifact_changes_nothing(store):
    path = _produce(store)[0].path
    (path / "result.json").write_text("{}")
    assert store.find("dense", KEY) is None
    assert _held(store) == {KEY}


def test_a_store_that_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runtime\.store=.*file/store"):
        Store(tmp_path / "file/store")


# Several jobs

FORK = multiprocessing.get_context("fork")


def _job(store, made, entered, go):
    def make(folder, partial):
        with made.get_lock():
            made.value += 1
        entered.set()
        go.wait(10)
        return _make(folder, partial)

    artifact, _ = _produce(store, make)
    assert artifact.result == {"accuracy": 0.5}


def test_two_jobs_make_an_artifact_once(store):
    made, entered, go = FORK.Value("i", 0), FORK.Event(), FORK.Event()
    jobs = [FORK.Process(target=_job, args=(store, made, entered, go)) for _ in range(3)]
    for job in jobs:
        job.start()
    assert entered.wait(10)
    time.sleep(0.2)  # the others have come to the lock
    go.set()
    for job in jobs:
        job.join(20)
    assert [job.exitcode for job in jobs] == [0, 0, 0] and made.value == 1
    assert _held(store) == {KEY}


def test_waiting_is_said(store, caplog):
    made, entered, go = FORK.Value("i", 0), FORK.Event(), FORK.Event()
    job = FORK.Process(target=_job, args=(store, made, entered, go))
    job.start()
    assert entered.wait(10)
    opener = FORK.Process(target=lambda: (time.sleep(0.3), go.set()))
    opener.start()
    assert _produce(store, make=None)[1]
    assert [r.getMessage() for r in caplog.records] == ["dense is being made by another job; waiting for it"]
    job.join(10)
    opener.join(10)


def test_a_killed_job_frees_the_lock_and_its_leftovers_do_no_harm(store):
    made, entered, go = FORK.Value("i", 0), FORK.Event(), FORK.Event()
    job = FORK.Process(target=_job, args=(store, made, entered, go))
    job.start()
    assert entered.wait(10)
    os.kill(job.pid, signal.SIGKILL)
    job.join(10)
    assert store.find("dense", KEY) is None and _held(store)
    folders = []

    def make(folder, partial):
        assert not any(folder.iterdir())
        folders.append(folder)
        return _make(folder, partial)

    assert _produce(store, make)[1] is False
    assert _held(store) == {KEY}


# The state of an unfinished run

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip
TENSORS = st.builds(
    lambda shape, dtype: (torch.arange(torch.Size(shape).numel()).reshape(shape) % 2).to(dtype),
    st.lists(st.integers(0, 3), max_size=4), st.sampled_from(DTYPES),
)  # fmt: skip
STATES = st.dictionaries(
    st.text(max_size=4) | st.integers(),
    st.recursive(
        PLAIN | TENSORS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)  # fmt: skip


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


@settings(**SLOW)
@given(STATES)
def test_a_state_comes_back_as_it_was(tmp_path, state):
    partial = Partial(tmp_path / "p.partial")
    partial.save(state)
    assert _equal(state, Partial(partial.path).load())


def test_a_state_is_replaced_as_a_whole_and_forgotten(tmp_path):
    partial = Partial(tmp_path / "p.partial")
    assert partial.load() is None
    shared = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    partial.save({"a": shared, "b": shared, "c": shared[1:, :, 0]})
    assert torch.equal(partial.load()["c"], shared[1:, :, 0])
    partial.save({"a": 2})
    assert partial.load() == {"a": 2}
    (tmp_path / "p.partial.new").write_text("of a job that was killed while it saved")
    partial.remove()
    assert partial.load() is None and not any(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:10], lambda b: b"", lambda b: b"x" * 99])
def test_a_truncated_state_starts_again_and_says_so(tmp_path, caplog, change):
    partial = Partial(tmp_path / "p.partial")
    partial.save({"w": torch.ones(100)})
    partial.path.write_bytes(change(partial.path.read_bytes()))
    assert partial.load() is None
    (record,) = caplog.records
    assert str(partial.path) in record.message and "starts again" in record.message
    assert not partial.path.exists()


def test_a_state_of_something_else_starts_again(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "p.partial")
    assert Partial(tmp_path / "p.partial").load() is None


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A store on a disk of 400 kB: a real one where mounting is allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield Store(folder)
    subprocess.run(["umount", str(folder)], check=True)


def _sized(kilobytes: int) -> torch.Tensor:
    return torch.ones(kilobytes * 256)


def test_a_full_disk_keeps_the_checkpoint_before(small_disk):
    def make(folder, partial):
        partial.save({"epoch": 1, "w": _sized(100)})
        partial.save({"epoch": 2, "w": _sized(350)})

    with pytest.raises(StageError, match="no space left to write to .*the same command resumes"):
        with full_disk_explained(small_disk.root):
            _produce(small_disk, make)
    assert _held(small_disk) == {f"{KEY}.partial"}
    state = Partial(small_disk.root / "dense" / f"{KEY}.partial").load()
    assert state["epoch"] == 1 and torch.equal(state["w"], _sized(100))


@pytest.mark.parametrize("size", [350, 388, 392, 396, 399])
def test_a_full_disk_never_holds_half_an_artifact(small_disk, size):
    def make(folder, partial):
        (folder / "model.safetensors").write_bytes(b"x" * size * 1024)
        return {"accuracy": 0.5, "history": ["x" * 1000] * 8}

    try:
        with full_disk_explained(small_disk.root):
            _produce(small_disk, make)
    except StageError:
        assert _held(small_disk) == set()
    assert (small_disk.find("dense", KEY) is not None) == (_held(small_disk) == {KEY})
    assert _produce(small_disk)[0].result["accuracy"] == 0.5  # there is room for a small one


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_only_a_full_disk_is_explained(number, tmp_path):
    with pytest.raises(StageError, match="no space left"), full_disk_explained(tmp_path):
        raise OSError(number, os.strerror(number), "somewhere")
    with pytest.raises(OSError, match="denied"), full_disk_explained(tmp_path):
        raise OSError(errno.EACCES, "denied")
