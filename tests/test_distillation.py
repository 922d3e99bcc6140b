"""Distillation: the formula, what reaches the gradient, and what does not happen."""

from dataclasses import replace

import pytest
import torch
from fitting import SETTINGS, Waits, noise_splits, run_fit, same_state, state_of, untrained
from tiny import TinyVGG
from torch import nn

from prune_cli.build import build
from prune_cli.distillation import Distillation
from prune_cli.hooks import Progress
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run

NOW = Progress(epoch=0, epochs=1, step=0, steps=10, travel=100.0, weight_decay=1e-4)


class Says(nn.Module):
    """Answers with the same logits whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_term_is_the_divergence_of_the_softened_answers(temperature):
    teacher, student = torch.randn(5, 3), torch.randn(5, 3)
    p, q = ((logits / temperature).softmax(1) for logits in (teacher, student))
    expected = 0.7 * temperature**2 * (p * (p / q).log()).sum(1).mean()
    hook = Distillation(Says(teacher), temperature, 0.7)
    terms = hook.batch_loss(nn.Identity(), NOW, torch.zeros(5, 1, 2, 2), student)
    torch.testing.assert_close(terms, {"distillation": expected})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_student_learns_the_teacher_and_the_teacher_nothing(precision):
    teacher = untrained(TinyVGG).eval()
    run_fit(teacher, replace(SETTINGS, epochs=6), splits=noise_splits(64))
    teacher.eval().zero_grad()
    before = state_of(teacher)
    settings = replace(SETTINGS, epochs=8, lr=0.05)
    history = run_fit(untrained(), settings, Distillation(teacher, 4.0, 2.0), precision=precision, splits=noise_splits(64))
    assert history[-1]["distillation"] < 0.5 * history[0]["distillation"]
    assert same_state(state_of(teacher), before) and not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_no_batch_waits_for_the_teacher():
    counts = []
    for images in (16, 80):
        hook = Distillation(untrained(TinyVGG).eval(), 4.0, 1.0)
        with Waits() as waits:
            run_fit(untrained(TinyVGG), replace(SETTINGS, epochs=2), hook, splits=noise_splits(images, None))
        counts.append(waits.counts)
    assert counts[0] == counts[1]


def test_finetuning_with_a_teacher_is_another_stage(compose, tmp_path):
    def record(*overrides):
        config = compose("method=fp", "debug=default", "dataset=digits", "runtime.latency_seconds=0", *overrides)
        experiment = replace(build(config), model=ModelSpec("TinyResNet", "tiny.TinyResNet"))
        return run(experiment, tmp_path / str(len(overrides)), command="test")

    plain, taught = record(), record("recipe.finetune.distillation=1", "recipe.finetune.temperature=2")
    assert taught.stage("pruned").cached and taught.stage("finetuned").key != plain.stage("finetuned").key
    metrics = (tmp_path / "2/metrics.csv").read_text()
    assert "finetuned,1,distillation" in metrics and "distillation" not in (tmp_path / "0/metrics.csv").read_text()
