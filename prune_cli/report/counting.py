"""What was removed, counted as the papers count it.

Our own way is that of PFEC (Li et al., ICLR 2017, Table 2): multiply-adds of convolutions and
linear layers. Others count more, or idealise.
"""

import re
from collections.abc import Callable

from prune_cli.published import Counting
from prune_cli.record import Record, StageResult

NAMES: dict[Counting, str] = {
    "macs": "multiply-adds of convolutions and linear layers",
    "flops": "2 x multiply-adds + 2 x BN + ReLU + pooling",
    "flops_without_relu": "2 x multiply-adds + 2 x BN",
    "ideal": "multiply-adds of convolutions outside shortcuts, ratio x width not rounded",
}


def last(record: Record) -> StageResult | None:
    """The smaller network that a user would take."""
    return record.stage("finetuned") or record.stage("pruned")


def macs_removed(record: Record, counting: Counting = "macs") -> float | None:
    """The fraction that the cut removed, counted in this way; None where the record does not say."""
    if counting == "ideal":
        return _ideal(record)
    dense, small = record.stage("dense"), last(record)
    if dense is None or small is None:
        return None
    before, after = (_OPERATIONS[counting](result) for result in (dense, small))
    return None if before is None or after is None else 1 - after / before


def parameters_removed(record: Record, skeleton: bool = False) -> float | None:
    """The fraction of the parameters that is gone; `skeleton`: filters x kernel positions of every
    convolution are parameters too, as in stripe-wise pruning's own count."""
    dense, small = record.stage("dense"), last(record)
    if dense is None or small is None or (skeleton and not record.layers):
        return None
    before, after = (sum(layer.stripes[i] for layer in record.layers) if skeleton else 0 for i in (0, 1))
    return 1 - (small.parameters + after) / (dense.parameters + before)


def _flops(result: StageResult, relu: bool) -> int | None:
    counts = result.elementwise
    if counts is None:
        return None
    return 2 * result.macs + 2 * counts["batch_norm"] + (counts["relu"] + counts["pool"] if relu else 0)


_OPERATIONS: dict[Counting, Callable[[StageResult], int | None]] = {
    "macs": lambda result: result.macs,
    "flops": lambda result: _flops(result, relu=True),
    "flops_without_relu": lambda result: _flops(result, relu=False),
}


def _ideal(record: Record) -> float | None:
    """The closed form behind the tables of SFP (IJCAI 2018) and FPGM (CVPR 2019) for ResNets.

    A fraction `keep` of the filters of every convolution stays. The first convolution of a block
    reads the residual stream, which is whole except before the very first block; the others read
    what the one before them left.
    """
    if record.requested is None or not record.layers:
        return None
    keep, before, after = 1 - record.requested, 0, 0.0
    for layer in record.layers:
        if not layer.stripes[0] or re.search(r"shortcut|downsample", layer.name):
            continue
        stream = layer.name.endswith("conv1") and layer.name != "layer1.0.conv1"
        before += layer.macs[0]
        after += layer.macs[0] * (keep if stream else keep**2)
    return 1 - after / before if before else None
