"""Reading a data set in tests, and what an error of one looks like."""

from pathlib import Path

import torch

CPU = torch.device("cpu")
GREY = dict(mean=(0.5,), std=(0.5,))


def load(dataset, root, validation=0.0, limit=None, workers=0):
    return dataset.load(Path(root), CPU, validation=validation, limit=limit, workers=workers)


def epoch(split, batch_size=16, seed=None):
    """All images and labels of one epoch."""
    images, labels = zip(*split.batches(batch_size, seed))
    return torch.cat(images), torch.cat(labels)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def sentence(problem, *words):
    """The error is one line and says all of `words`."""
    text = str(problem.value)
    assert "\n" not in text and all(word in text for word in words), text
