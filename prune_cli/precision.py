"""In which precision a network is trained."""

import torch
from torch import Tensor, nn

from prune_cli.errors import UserError
from prune_cli.evaluation import blank_image, observe
from prune_cli.settings import Precision

LARGE_BATCH = 512  # images from which on fully connected networks gain by bfloat16 (scripts/benchmark_training.py)


def resolved_precision(precision: Precision, device: torch.device, model: nn.Module, batch_size: int) -> Precision:
    """What `auto` means for this network, trained with such batches on this device; other values stand
    for themselves.

    bfloat16 where the hardware multiplies it and the network has convolutions. In a fully connected
    network of this size the casts cost as much as they save, but for large batches on a processor
    with matrix tiles.

    Raises UserError: bfloat16 is asked for where the processor would compute it wrongly.
    """
    wrong = _wrong_in_bfloat16(model) if device.type == "cpu" and precision != "float32" else None
    if precision == "bfloat16" and wrong is not None:
        raise UserError(
            f"recipe.precision=bfloat16: {wrong} takes steps that are wider than its input, for which this processor's "
            "library computes wrong gradients in bfloat16; auto and float32 train it, and so does a larger resolution"
        )
    if precision != "auto":
        return precision
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if device.type == "cuda":
        faster = convolves and torch.cuda.is_bf16_supported(including_emulation=False)
    elif convolves:
        faster = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        faster = batch_size >= LARGE_BATCH and torch.cpu._is_amx_tile_supported()
    return "bfloat16" if faster and wrong is None else "float32"


def _wrong_in_bfloat16(model: nn.Module) -> str | None:
    """The first convolution whose bfloat16 gradients oneDNN gets wrong, or None.

    Padded, and with a stride wider than its input: torch 2.13 on a processor with AMX then reads memory
    that nobody wrote (the gradient of a 3x3 kernel with stride 2 and padding 1 on maps of one pixel is
    another one each time, and not finite after memory was used by NaNs). float32 is right.
    """
    convolutions = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    found: list[str] = []

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if inputs[0].shape[-1] < layer.stride[1] and layer.padding not in ((0, 0), "valid"):
            found.append(convolutions[layer])

    if convolutions:
        observe(model, blank_image(model, model.input_shape), convolutions, note)
    return found[0] if found else None
