"""Whether a user's own network can be trained, measured and pruned at all: said before anything is trained."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli.errors import UserError, one_line
from prune_cli.evaluation import evaluating
from prune_cli.user_code import what_failed


def check(model: Any, where: str, channels: int, resolution: int, classes: int) -> None:
    """Try the network on two random images, in both modes, and leave it as it was.

    where  the setting that names it, for the sentence
    Raises UserError: it is no network, does not read such images, has other outputs, gives other answers each time,
    or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"{where}: makes a {type(model).__name__}, must make a torch.nn.Module")
    if not list(model.parameters()):
        raise UserError(f"{where}: has no parameters, there is nothing to train")
    images = torch.randn(2, channels, resolution, resolution, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad(), evaluating(model):
            scores = _answers(model, images, where)
            _check_scores(scores, classes, where)
            _check_repeated(scores, _answers(model, images, where), where)
        _check_training(_copied(model, where), images, classes, where)


def _check_training(model: nn.Module, images: Tensor, classes: int, where: str) -> None:
    with torch.enable_grad():
        scores = _answers(model.train(), images, where)
        _check_scores(scores, classes, f"{where}: in training mode")
        try:
            scores.sum().backward()
        except RuntimeError as problem:
            raise UserError(f"{where}: cannot be trained ({one_line(problem)})") from problem
    _copied(model, where)


def _answers(model: nn.Module, images: Tensor, where: str) -> Any:
    try:
        return model(images)
    except Exception as problem:  # of the user's code, whatever it is
        raise UserError(
            f"{where}: does not read images of shape {tuple(images.shape)} ({what_failed(problem)}); a "
            "parameter named channels or resolution is given the data set's"
        ) from problem


def _check_scores(scores: Any, classes: int, where: str) -> None:
    if not isinstance(scores, Tensor) or scores.shape != (2, classes):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(
            f"{where}: makes {found} of two images, must be (2, {classes}), a score per class; a parameter named "
            "classes is given their number"
        )


def _check_repeated(once: Tensor, again: Tensor, where: str) -> None:
    if not torch.equal(once.nan_to_num(), again.nan_to_num()):
        raise UserError(
            f"{where}: gives other answers to the same images each time, also in evaluation mode (dropout without "
            "training=self.training?), so no number that is measured of it would hold"
        )


def _copied(model: nn.Module, where: str) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as problem:  # of whatever the network holds
        raise UserError(
            f"{where}: cannot be copied ({one_line(problem)}); where that is weight_norm or spectral_norm of "
            "torch.nn.utils, take those of torch.nn.utils.parametrizations"
        ) from problem
