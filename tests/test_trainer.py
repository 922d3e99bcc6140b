"""The training loop: the order of its hooks, its batches, and when it gives up."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from fitting import CLASSES, SETTINGS, Dropout, Memory, Stops, Waits, noise_splits, run_fit, same_state, state_of, untrained
from tiny import TinyVGG

from prune_cli.errors import StageError
from prune_cli.hooks import Together, TrainingHooks
from prune_cli.layers.skeleton import SkeletonConv2d
from prune_cli.methods.stripe import StripePruning
from prune_cli.store import Partial
from prune_cli.trainer import steps_per_epoch

# Hooks


class Spy(TrainingHooks):
    """Writes down what happens, and checks what every hook may rely on."""

    def __init__(self, model, events, autocast):
        self.model, self.events, self.weight = model, events, next(model.parameters())
        self.autocast = autocast
        self.steps = []
        model.register_forward_hook(lambda m, *_: events.append("forward" if m.training else "evaluated"))

    def before_fit(self, model, progress):
        self.events.append("before_fit")
        assert (progress.epoch, progress.step) == (0, 0)
        assert progress.travel > 0 and progress.weight_decay == SETTINGS.weight_decay

    def batch_loss(self, model, progress, x, logits):
        self.events.append("batch_loss")
        assert torch.is_autocast_enabled("cpu") == self.autocast and logits.requires_grad
        assert x.shape == (8, 2, 8, 8) and logits.shape == (8, CLASSES)
        return {"logits": 0.1 * logits.float().square().mean()}

    def penalty(self, model, progress):
        self.events.append("penalty")
        self.steps.append((progress.epoch, progress.step))
        self.before = self.weight.detach().clone()
        self.at_penalty = self.weight.square().sum()
        assert not torch.is_autocast_enabled("cpu") and self.at_penalty.dtype == torch.float32
        return {"ridge": 0.5 * self.at_penalty, "constant": torch.ones(())}

    def after_backward(self, model, progress):
        self.events.append("after_backward")
        assert torch.equal(self.weight, self.before) and self.weight.grad.abs().sum() > 0

    def after_step(self, model, progress):
        self.events.append("after_step")
        assert not torch.equal(self.weight, self.before)

    def after_epoch(self, model, progress):
        self.events.append("after_epoch")
        assert progress.step == (progress.epoch + 1) * 4 and progress.steps == 12 and progress.epochs == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_hooks_come_in_the_order_that_is_drawn(precision):
    model, memory = untrained(), Memory()
    spy = Spy(model, memory.events, autocast=precision == "bfloat16")
    history = run_fit(model, hooks=spy, checkpoint=memory, monitor=memory, precision=precision)
    batch = ["forward", "batch_loss", "penalty", "after_backward", "after_step"]
    epoch = [*batch * 4, "after_epoch", "evaluated", "save", "epoch"]
    assert memory.events == ["before_fit", *epoch * 3]
    assert spy.steps == [(step // 4, step) for step in range(12)]
    assert [figures["constant"] for figures in history] == [1, 1, 1]
    assert all({"loss", "ridge", "logits", "accuracy", "validation", "learning_rate"} <= set(figures) for figures in history)
    assert [(number, values) for number, values, _ in memory.epochs] == list(enumerate(history, 1))


def test_a_penalty_reaches_the_gradient_and_is_no_part_of_the_loss_that_is_shown():
    class Heavy(TrainingHooks):
        def penalty(self, model, progress):
            return {"heavy": 100 * next(model.parameters()).square().sum()}

        def after_backward(self, model, progress):
            weight = next(model.parameters())
            assert torch.allclose(weight.grad, 200 * weight.detach(), rtol=0.2, atol=1)

    one = replace(SETTINGS, epochs=1, batch_size=32, lr=1e-6)
    (with_,), (without,) = run_fit(untrained(), one, Heavy()), run_fit(untrained(), one)
    assert with_["heavy"] > 10 and with_["loss"] == without["loss"]


def test_hooks_draw_the_same_random_numbers_however_the_run_got_there(tmp_path):
    class Noisy(TrainingHooks):
        def before_fit(self, model, progress):
            self._shake(model)

        after_epoch = after_step = before_fit

        def _shake(self, model):
            with torch.no_grad():
                next(model.parameters()).add_(0.01 * torch.randn(()))

    def final(stop):
        torch.manual_seed(stop)
        model = untrained()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                run_fit(untrained(), hooks=Noisy(), checkpoint=Partial(tmp_path / "p"), monitor=Stops(stop))
            torch.manual_seed(100 + stop)
        run_fit(model, hooks=Noisy(), checkpoint=Partial(tmp_path / "p") if stop else None)
        return state_of(model)

    state = torch.get_rng_state()
    assert same_state(final(0), final(6))
    torch.set_rng_state(state)
    run_fit(untrained())
    assert torch.equal(torch.get_rng_state(), state)  # and nobody outside notices


def test_frozen_parameters_stay():
    model = untrained()
    frozen = [p for name, p in model.named_parameters() if "conv" in name]
    for parameter in frozen:
        parameter.requires_grad = False
    before = [p.clone() for p in model.parameters()]
    run_fit(model)
    moved = {id(p): not torch.equal(p, old) for p, old in zip(model.parameters(), before)}
    assert {id(p) for p in frozen} == {number for number, has in moved.items() if not has}


def test_what_a_method_watches_reaches_the_monitor():
    memory = Memory()
    run_fit(untrained(), monitor=memory, watch=lambda model: {"w": next(model.parameters())})
    assert [set(tensors) for *_, tensors in memory.epochs] == [{"w"}] * 3


def test_two_hooks_work_as_one():
    class Term(TrainingHooks):
        def __init__(self, name):
            self.name, self.calls = name, Counter()

        def __getattribute__(self, name):
            if name in vars(TrainingHooks) and not name.startswith("_"):
                self.calls[name] += 1
            return super().__getattribute__(name)

        def penalty(self, model, progress):
            return {f"{self.name} penalty": next(model.parameters()).sum()}

        def batch_loss(self, model, progress, x, logits):
            return {f"{self.name} batch": logits.mean()}

    one, two = Term("one"), Term("two")
    history = run_fit(untrained(), hooks=Together((one, two)))
    assert one.calls == two.calls and set(one.calls) == {n for n in vars(TrainingHooks) if not n.startswith("_")}
    assert {"one penalty", "two penalty", "one batch", "two batch"} <= set(history[0])


def test_convolutions_are_trained_in_channels_last():
    model, layouts = StripePruning(alpha=0.02).prepare(untrained(TinyVGG)), []
    layer = next(m for m in model.modules() if isinstance(m, SkeletonConv2d))
    layer.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    run_fit(model, replace(SETTINGS, epochs=1))
    assert all(layouts) and layer.weight.is_contiguous(memory_format=torch.channels_last)


# Batches


@pytest.mark.parametrize(("images", "batch_size", "steps"), [(33, 8, 4), (34, 8, 5), (32, 8, 4), (3, 8, 1), (5, 1, 5), (1, 8, 1), (2, 1, 2)])
def test_a_last_batch_of_one_image_is_left_out(images, batch_size, steps):
    seen = []

    class Count(TrainingHooks):
        def after_step(self, model, progress):
            seen.append(progress.step)
            assert progress.step < progress.steps

    kind = Dropout if 1 in (images, batch_size) else TinyVGG
    run_fit(untrained(kind), replace(SETTINGS, epochs=2, batch_size=batch_size), Count(), splits=noise_splits(images, None))
    assert len(seen) == 2 * steps == 2 * steps_per_epoch(images, batch_size)


def test_no_epochs_change_nothing():
    model = untrained()
    before = state_of(model)
    assert run_fit(model, replace(SETTINGS, epochs=0)) == [] and same_state(before, state_of(model))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stripes", [False, True])
def test_no_batch_waits_for_the_device(stripes, optimizer):
    counts = []
    for images in (16, 80):
        hooks = StripePruning(alpha=0.02) if stripes else TrainingHooks()
        model = hooks.prepare(untrained(TinyVGG)) if stripes else untrained(TinyVGG)
        with Waits() as waits:
            run_fit(model, replace(SETTINGS, optimizer=optimizer, epochs=2), hooks, splits=noise_splits(images, None))
        counts.append(waits.counts)
    assert counts[0] == counts[1] and counts[0]


# What cannot end well


class Breaks(TrainingHooks):
    """Does something to the network after an epoch, or after the last step of it."""

    def __init__(self, epoch, action, event="after_step"):
        self.epoch, self.action = epoch, action
        setattr(self, event, self.act)

    @torch.no_grad()
    def act(self, model, progress):
        if progress.epoch == self.epoch and progress.step >= 4 * self.epoch + 3:
            self.action(model)


def _nan(model):
    model.block1.conv2.weight[0] = float("nan")


@pytest.mark.parametrize("event", ["after_step", "after_epoch"])
@pytest.mark.parametrize("epoch", [0, 2])  # 2 is the last: no later loss would tell
def test_weights_that_are_not_finite_end_the_stage(epoch, event, tmp_path):
    partial = Partial(tmp_path / "p")
    with pytest.raises(StageError, match=rf"dense, epoch {epoch + 1}: .*block1\.conv2\.weight"):
        run_fit(untrained(), hooks=Breaks(epoch, _nan, event), checkpoint=partial)
    saved = partial.load()
    assert (saved is None) if epoch == 0 else len(saved["history"]) == epoch  # the sound epochs stay


def test_a_loss_that_is_not_finite_ends_the_stage():
    class Infinite(TrainingHooks):
        def penalty(self, model, progress):
            return {"p": next(model.parameters()).sum() * float("inf")}

    with pytest.raises(StageError, match="dense, epoch 1: the loss is nan; .*not finite is "):
        run_fit(untrained(), hooks=Infinite())
    with pytest.raises(StageError, match="dense, epoch 1: the loss is "):
        run_fit(untrained(), replace(SETTINGS, lr=1e30, schedule="constant"))


def test_a_collapse_to_chance_ends_the_stage():
    class Kills(TrainingHooks):
        @torch.no_grad()
        def after_step(self, model, progress):
            if progress.epoch >= 4:
                model.head[2].weight.zero_()
                model.head[2].bias.zero_()

    settings = replace(SETTINGS, epochs=12, lr=0.1, schedule="constant")
    splits = noise_splits(64)
    history = run_fit(untrained(), settings, splits=splits)
    assert max(figures["accuracy"] for figures in history) > 0.7  # as it should be
    with pytest.raises(StageError, match=r"dense, epoch \d+: the accuracy collapsed from .* to chance .*head\.2\."):
        run_fit(untrained(), settings, Kills(), splits=splits)


def test_a_network_that_never_learns_is_not_stopped():
    history = run_fit(untrained(), replace(SETTINGS, lr=1e-9, epochs=4))
    assert len(history) == 4
