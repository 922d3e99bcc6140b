"""A training that was stopped, and one that starts late: bit for bit what it would have been."""

from dataclasses import replace

import pytest
import torch
from fitting import SETTINGS, Dropout, Memory, Stops, run_fit, same_state, state_of, untrained
from tiny import TinyResNet, TinyVGG

from prune_cli.hooks import TrainingHooks
from prune_cli.methods.stripe import StripePruning
from prune_cli.store import Partial
from prune_cli.trainer import steps_per_epoch

CASES = {
    "float32": (TinyResNet, {}, "float32"),
    "bfloat16": (TinyResNet, {}, "bfloat16"),
    "nesterov": (TinyVGG, {"nesterov": True}, "bfloat16"),
    "no momentum": (TinyVGG, {"momentum": 0.0}, "float32"),
    "adam": (TinyResNet, {"optimizer": "adam", "lr": 0.01}, "bfloat16"),
    "adam, step": (TinyVGG, {"optimizer": "adam", "lr": 0.01, "schedule": "step", "milestones": (0.5,)}, "float32"),
    "dropout": (Dropout, {}, "float32"),
    "dropout, adam": (Dropout, {"optimizer": "adam"}, "bfloat16"),
    "last batch of one": (TinyVGG, {"batch_size": 31}, "bfloat16"),
}


@pytest.mark.parametrize(("case", "stripes"), [(c, s) for c in CASES for s in (False, True) if not s or CASES[c][0] is not Dropout])
def test_resuming_is_exact(case, stripes, tmp_path):
    kind, changes, precision = CASES[case]
    settings = replace(SETTINGS, **changes)
    hooks = StripePruning(alpha=0.02) if stripes else TrainingHooks()

    def start():
        return hooks.prepare(untrained(kind)) if stripes else untrained(kind)

    whole = start()
    history = run_fit(whole, settings, hooks, precision=precision)
    steps = steps_per_epoch(32, settings.batch_size)
    assert state_of(whole).keys() and not same_state(state_of(whole), state_of(start()))
    for stop in {1, steps, steps + 1, 2 * steps + 1, 3 * steps}:  # within, and at the end of, every epoch
        partial = Partial(tmp_path / f"{stop}.partial")
        with pytest.raises(KeyboardInterrupt):
            run_fit(start(), settings, hooks, precision=precision, checkpoint=partial, monitor=Stops(stop))
        resumed, memory = start(), Memory()
        assert run_fit(resumed, settings, hooks, precision=precision, checkpoint=partial, monitor=memory) == history
        assert ("resumed" in memory.events) == (stop > steps)
        assert len(memory.epochs) == 3 - (stop - 1) // steps
        assert same_state(state_of(whole), state_of(resumed)), stop
        for a, b in zip(whole.parameters(), resumed.parameters()):
            assert a.stride() == b.stride()


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_stops_at_an_epoch_goes_on_from_there(case, tmp_path):
    """The first half is a run of its own; with it the second one ends where a run without a stop ends."""
    kind, changes, precision = CASES[case]
    settings = replace(SETTINGS, **changes)
    whole, halves, stop = untrained(kind), untrained(kind), 2 * steps_per_epoch(32, settings.batch_size)
    history = run_fit(whole, settings, precision=precision)
    assert run_fit(halves, settings, precision=precision, checkpoint=Partial(tmp_path / "p"), stop=stop) == history[:2]
    assert not same_state(state_of(whole), state_of(halves))
    assert run_fit(untrained(kind), settings, precision=precision, stop=stop) == history[:2]
    continued = untrained(kind)
    assert run_fit(continued, settings, precision=precision, checkpoint=Partial(tmp_path / "p")) == history
    assert same_state(state_of(whole), state_of(continued))


def test_a_run_that_starts_later_takes_the_rest_of_the_schedule(tmp_path):
    seen, memory = [], Memory()

    class Watch(TrainingHooks):
        def before_fit(self, model, progress):
            seen.append((progress.epoch, progress.step))

        def after_step(self, model, progress):
            seen.append((progress.epoch, progress.step))

    history = run_fit(untrained(), hooks=Watch(), start=4, monitor=memory)
    assert seen == [(1, 4), *((step // 4, step) for step in range(4, 12))]
    whole = run_fit(untrained())
    assert [row["learning_rate"] for row in history] == [row["learning_rate"] for row in whole[1:]]
    assert [epoch for epoch, *_ in memory.epochs] == [2, 3]
    with pytest.raises(KeyboardInterrupt):
        run_fit(untrained(), start=4, checkpoint=Partial(tmp_path / "p"), monitor=Stops(6))
    model = untrained()
    assert run_fit(model, start=4, checkpoint=Partial(tmp_path / "p")) == history
    other = untrained()
    run_fit(other, start=4)
    assert same_state(state_of(model), state_of(other))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole_epochs", [0, 1])
def test_a_run_that_stops_within_an_epoch_has_the_weights_of_one_that_does_not(case, whole_epochs, tmp_path):
    """And its checkpoint is that of the last whole epoch, from which the longer run goes on."""
    kind, changes, precision = CASES[case]
    settings, passed = replace(SETTINGS, **{**changes, "batch_size": 8}), []
    stop = 4 * whole_epochs + 2

    class Look(TrainingHooks):
        def after_step(self, model, progress):
            if progress.step == stop - 1:
                passed.append(state_of(model))

    history = run_fit(whole := untrained(kind), settings, Look(), precision=precision)
    part, continued = untrained(kind), untrained(kind)
    assert run_fit(part, settings, precision=precision, checkpoint=Partial(tmp_path / "p"), stop=stop)[:-1] == history[:whole_epochs]
    assert same_state(state_of(part), passed[0])
    assert (Partial(tmp_path / "p").load() is None) == (not whole_epochs)
    again = untrained(kind)
    run_fit(again, settings, precision=precision, checkpoint=Partial(tmp_path / "p"), stop=stop)  # killed before it was kept
    assert same_state(state_of(again), passed[0])
    assert run_fit(continued, settings, precision=precision, checkpoint=Partial(tmp_path / "p")) == history
    assert same_state(state_of(whole), state_of(continued))


def test_a_run_that_starts_within_an_epoch_takes_the_rest_of_it_first(tmp_path):
    class Watch(TrainingHooks):
        def __init__(self):
            self.seen = {}

        def batch_loss(self, model, progress, x, logits):
            self.seen[progress.epoch, progress.step] = x
            return {}

    memory, late, all_ = Memory(), Watch(), Watch()
    history, whole = run_fit(untrained(), hooks=late, start=6, monitor=memory), run_fit(untrained(), hooks=all_)
    assert list(late.seen) == [(step // 4, step) for step in range(6, 12)]
    assert all(torch.equal(x, all_.seen[step]) for step, x in late.seen.items())
    assert [row["learning_rate"] for row in history] == [row["learning_rate"] for row in whole[1:]]
    assert [epoch for epoch, *_ in memory.epochs] == [2, 3]
    with pytest.raises(KeyboardInterrupt):
        run_fit(untrained(), start=6, checkpoint=Partial(tmp_path / "p"), monitor=Stops(4))
    resumed, uninterrupted = untrained(), untrained()
    assert run_fit(resumed, start=6, checkpoint=Partial(tmp_path / "p")) == history
    run_fit(uninterrupted, start=6)
    assert same_state(state_of(resumed), state_of(uninterrupted))


def test_a_run_that_was_killed_when_all_was_trained_trains_nothing(tmp_path):
    model = untrained()
    history = run_fit(model, checkpoint=Partial(tmp_path / "p"))
    again, memory = untrained(), Memory()
    assert run_fit(again, checkpoint=Partial(tmp_path / "p"), monitor=memory) == history
    assert memory.events == ["resumed"] and same_state(state_of(model), state_of(again))


def test_resuming_takes_back_the_number_of_threads(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_fit(untrained(), checkpoint=Partial(tmp_path / "p"), monitor=Stops(5))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        run_fit(untrained(), checkpoint=Partial(tmp_path / "p"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
