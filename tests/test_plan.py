"""`prune-cli plan`: what would be removed, before any training."""

import pytest

from prune_cli.build import build
from prune_cli.commands.plan import lines, main
from prune_cli.errors import UserError


def test_the_plan_is_what_a_run_does(compose):
    experiment = build(compose("method=fp", "ratio=0.5", "dataset=cifar10", "model=resnet20"))  # without its data
    plan = {line.layer: line for line in lines(experiment)}
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
    plan = lines(build(compose(f"method={method}", "model=resnet20")))
    assert plan[-1].units[0] == pytest.approx(0.5 * plan[-1].units[1], abs=30)
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
