"""The learning rate of every step, and that it is the one that the optimizer uses."""

from dataclasses import replace

import pytest
from fitting import SETTINGS, Dropout, run_fit, untrained
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.hooks import TrainingHooks
from prune_cli.trainer import learning_rate

SCHEDULES = st.builds(
    lambda **changes: replace(SETTINGS, **changes),
    schedule=st.sampled_from(["constant", "step", "one_cycle"]), lr=st.floats(1e-4, 10), gamma=st.floats(0.01, 1),
    milestones=st.lists(st.floats(0, 1), max_size=3).map(lambda values: tuple(sorted(values))),
)  # fmt: skip


@given(SCHEDULES, st.integers(1, 300))
def test_the_learning_rate_is_positive_and_never_above_its_peak(settings, steps):
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    assert all(0 < rate <= settings.lr for rate in rates)
    if settings.schedule == "constant":
        assert set(rates) == {settings.lr}


@given(st.integers(10, 2000), st.floats(1e-3, 10))
def test_one_cycle_rises_for_a_fifth_to_its_peak_and_falls_to_nothing(steps, lr):
    settings = replace(SETTINGS, lr=lr)
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert abs(peak - steps / 5) <= 1 and max(rates) > 0.95 * lr
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] < 0.5 * lr and rates[-1] < 0.05 * lr


@given(st.integers(1, 40), st.lists(st.integers(1, 9), unique=True, max_size=3), st.floats(0.1, 0.9))
def test_step_falls_exactly_at_its_milestones(tens, tenths, gamma):
    settings = replace(SETTINGS, schedule="step", milestones=tuple(n / 10 for n in tenths), gamma=gamma)
    for step in range(10 * tens):
        passed = sum(step >= n * tens for n in tenths)
        assert learning_rate(settings, step, 10 * tens) == pytest.approx(settings.lr * gamma**passed)


def test_the_learning_rate_is_what_the_optimizer_uses():
    model, rates = untrained(Dropout), []

    class Watch(TrainingHooks):
        def after_backward(self, model, progress):
            parameter = list(model.parameters())[-1]
            self.before, self.gradient = parameter.detach().clone(), parameter.grad.clone()

        def after_step(self, model, progress):
            moved = (self.before - list(model.parameters())[-1].detach()).norm() / self.gradient.norm()
            rates.append((float(moved), learning_rate(settings, progress.step, progress.steps)))

    settings = replace(SETTINGS, momentum=0.0, weight_decay=0.0)
    run_fit(model, settings, Watch())
    assert all(moved == pytest.approx(rate, rel=1e-3) for moved, rate in rates) and len(rates) == 12
