"""`prune-cli plan`: what would be removed, before any training."""

import pytest

from prune_cli.build import build
from prune_cli.commands.plan import main, plan_of
from prune_cli.errors import UserError


def test_the_plan_is_what_a_run_does(compose):
    experiment = build(compose("method=fp", "ratio=0.5", "dataset=cifar10", "model=resnet20"))  # without its data
    plan = {line.layer: line for line in plan_of(experiment).lines}
    inner, outer, last, whole = (plan[name] for name in ("layer1.0.conv1", "layer1.0.conv2", "fc", "network"))
    assert inner.units == (8, 16) and inner.parameters == (2304, 1152) and not inner.reason
    assert outer.units is None and outer.parameters == (2304, 1152)  # reads half as many channels
    assert outer.reason == "a residual sum shares its channels with conv1 and 2 more"
    assert outer.group == plan["conv1"].group != ""
    assert last.reason == "its channels are the network's output"
    assert whole.units == (168, 336)
    assert whole.macs[0] == sum(line.macs[0] for line in plan.values()) - whole.macs[0] == 40_813_184
    assert 0.4 < 1 - whole.macs[1] / whole.macs[0] < 0.5


@pytest.mark.parametrize("method", ["sfp", "stripe", "weight"])
def test_every_kind_of_method_has_a_plan(method, compose, capsys):
    whole = plan_of(build(compose(f"method={method}", "model=resnet20"))).lines[-1]
    assert whole.units[0] == pytest.approx(0.5 * whole.units[1], abs=30)
    assert main([f"method={method}", "model=vgg11", "model.width=0.25", "ratio=0.3"]) == 0
    assert "requested 30.00% of the units" in capsys.readouterr().out


def test_wrong_input_is_one_sentence():
    with pytest.raises(UserError, match="^method=strip: there is no such method"):
        main(["method=strip"])
    with pytest.raises(UserError, match="nothing that it could prune; conv1 and 2 more: no batch norm .*; fc2: its"):
        main(["method=slimming", "model=lenet5"])


def test_the_command_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("plan", "method=fp", "method.exclude=[conv]", "model=lenet5")
    assert code == 2 and err.count("\n") == 1 and "method.exclude: conv" in err
    assert "prune-cli plan [name=value ...]" in command("plan", "--help")[1]
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_it_cannot_know_and_where_a_floor_acted(command):
    network = "model=resnet20", "dataset=digits"
    assert "sparse training has yet to make" in command("plan", "method=slimming", *network)[1]
    assert "sparse training" not in command("plan", "method=sfp", *network)[1]
    code, out, _ = command("plan", "method=fp", "ratio=0.999", *network)
    assert code == 0 and "one filter is kept there" in out
    zeros = command("plan", "method=weight", "target=params", *network)[1]
    assert "requested 50.00% of the params, obtained 50.00%" in zeros
