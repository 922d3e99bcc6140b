"""prune-cli: train, sparsify, prune and finetune convolutional networks, and measure what is left.

`prune_cli.load(path)` returns the network in a `.safetensors` file that a run wrote.
"""


def load(path):
    """The network stored at `path` (a run's `checkpoints/*.safetensors`), in evaluation mode."""
    from prune_cli.checkpoint import load_model  # torch is imported when it is needed

    return load_model(path)
