"""Latency and the description of the machine. Nothing here asserts a speed."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from prune_cli import environment
from prune_cli.metrics.latency import measure
from prune_cli.timing import ROUNDS


class Spy(nn.Module):
    """A convolution that notes what it is given."""

    def __init__(self, name: str, calls: list):
        super().__init__()
        self.name, self.conv, self.calls = name, nn.Conv2d(3, 4, 3), calls

    def __deepcopy__(self, memo):  # copies share the list of calls
        other = Spy(self.name, self.calls)
        other.conv.load_state_dict(self.conv.state_dict())
        other.conv.to(memory_format=torch.channels_last if self.name == "last" else torch.contiguous_format)
        return other

    def forward(self, x):
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        modes = (self.training, torch.is_inference_mode_enabled())
        self.calls.append((self.name, tuple(x.shape), x.dtype, channels_last, *modes))
        return self.conv(x)


def test_a_few_runs_even_in_no_time():
    calls = []
    results = measure({"a": Spy("a", calls), "b": Spy("b", calls)}, (3, 6, 5), batches=(1, 4), seconds=0)
    assert list(results) == ["a", "b"]
    for latencies in results.values():
        assert [latency.batch for latency in latencies] == [1, 4]
        for latency in latencies:
            assert latency.runs == ROUNDS
            assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
    timed = [name for name, shape, *_ in calls if shape == (4, 3, 6, 5)][-2 * ROUNDS :]
    assert timed == ["a", "b"] * ROUNDS  # in alternation


def test_time_is_spent_in_turns():
    calls = []
    (latency,) = measure({"a": Spy("a", calls)}, (3, 6, 6), batches=(2,), seconds=0.05)["a"]
    assert latency.runs > ROUNDS


def test_inputs_and_modes():
    calls = []
    first, last = Spy("first", calls), Spy("last", calls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measure({"first": first, "last": last}, (3, 6, 6), batches=(2,), seconds=0)
    assert {call[2] for call in calls} == {torch.float32}
    assert all((name == "last") == channels_last for name, _, _, channels_last, *_ in calls)
    assert not any(training for *_, training, _ in calls)
    assert all(inference for *_, inference in calls)


def test_models_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = measure({"m": model}, (3, 6, 6), batches=(2,), seconds=0)
    assert results["m"][0].batch == 2
    assert model.training and model[1].training and not model[0].training
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    model = nn.Conv2d(3, 4, 3)
    assert measure({"m": model}, (3, 6, 6), batches=(2,), seconds=0, device="cuda")["m"][0].runs == ROUNDS
    assert model.weight.device.type == "cpu"


def test_fingerprint_covers_what_changes_a_time():
    machine = environment.machine()
    same = environment.fingerprint(machine)
    assert environment.fingerprint(machine | {"memory_gb": 1.0, "gpu": "another, unused"}) == same
    for change in ({"threads": 99}, {"cpu": "another"}, {"flags": []}, {"cores": 99}, {"device": "cuda", "gpu": "one"}):
        assert environment.fingerprint(machine | change) != same
    assert environment.fingerprint(machine, torch_version="1.0") != same
    cuda = machine | {"device": "cuda", "gpu": "one"}
    assert environment.fingerprint(cuda) != environment.fingerprint(cuda | {"gpu": "two"})


def test_env_json(tmp_path):
    environment.write_env(tmp_path / "env.json")
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["machine"]["threads"] == torch.get_num_threads() and env["machine"]["cores"] >= 1
    assert env["versions"]["torch"] == torch.__version__
    assert (env["versions"]["git_commit"] is None) == (env["versions"]["git_dirty"] is None)


def test_commit_of_a_foreign_repository_is_not_ours(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    installed = tmp_path / ".venv" / "prune_cli" / "__init__.py"
    monkeypatch.setattr(environment.prune_cli, "__file__", str(installed))
    assert environment.versions()["git_commit"] is None


def test_records_and_reports_need_no_torch():
    code = "import sys, prune_cli.record, prune_cli.environment, prune_cli.report.stages, prune_cli.journal; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
