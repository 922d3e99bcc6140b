"""prune-cli: train, sparsify, prune and finetune convolutional networks, and measure what is left.

    model = prune_cli.load(path)              the network in a `.safetensors` file that a run wrote
    fast = prune_cli.for_inference(model)     a copy that computes the same, faster, on this machine
"""


def load(path):
    """The network stored at `path` (a run's `checkpoints/*.safetensors`), in evaluation mode."""
    from prune_cli.checkpoint import load_model  # torch is imported when it is needed

    return load_model(path)


def for_inference(model, kernel="auto"):
    """A copy of the network with batch norm folded and its stripes on the fastest kernel; not to be saved.

    kernel   `auto`, `torch` or `cpp`: what may compute the stripes
    """
    from prune_cli.inference import for_inference

    return for_inference(model, kernel)
