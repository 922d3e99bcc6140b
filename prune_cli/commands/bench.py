"""`prune-cli bench kernel` and `prune-cli bench model RUN_DIR`: what the stripe-wise kernels are worth here.

The command line only; what measures is imported when the arguments are known to be right.
"""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, get_args

from prune_cli.errors import UserError
from prune_cli.settings import Kernel, Ratio, checked

OUTPUT = Path("outputs/bench")


def main(arguments: Sequence[str]) -> int:
    """Run `prune-cli bench ARGUMENTS` and return the exit code. Raises UserError."""
    options = _parser().parse_args(arguments)
    folder = options.output or OUTPUT / f"{options.what}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if options.what == "model" and not options.run.is_dir():
        raise UserError(f"{options.run}: no such folder; give the folder of a finished run, outputs/runs/...")

    from prune_cli.commands import measure, tables  # torch and matplotlib take seconds

    if options.threads:
        measure.torch.set_num_threads(options.threads)
    rows = measure.kernel(options) if options.what == "kernel" else measure.model(options)
    tables.show(rows, options)
    tables.write(rows, options, folder)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"bench: {message}; prune-cli bench --help lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prune-cli bench", description="Stripe-wise convolutions against dense ones, on this machine.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="kernel|model")
    kernel = commands.add_parser("kernel", help="the 3x3 layers of known networks with random patterns")
    kernel.add_argument(
        "--networks", type=_choices("vgg16", "resnet56", "resnet50"), default=("vgg16", "resnet56"), metavar="NAMES",
        help="whose layers: vgg16, resnet56 or resnet50 (default: vgg16,resnet56)",
    )
    kernel.add_argument(
        "--ratios", type=_listed(_ratio), default=(0.5, 0.75, 0.9),
        metavar="R,R,...", help="fractions of the stripes that are removed (default: 0.5,0.75,0.9)",
    )
    kernel.add_argument(
        "--masks", type=Path, metavar="FILE", help="also the networks' layers with the patterns of a masks.safetensors"
    )
    kernel.set_defaults(batches=(64,))
    model = commands.add_parser("model", help="a finished run: its dense network against its pruned one")
    model.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run, outputs/runs/NAME/DATE")
    model.set_defaults(batches=(1, 128))
    for command in (kernel, model):
        default = ",".join(map(str, command.get_default("batches")))
        command.add_argument("--batches", type=_listed(_count), metavar="N,N,...", help=f"batch sizes (default: {default})")
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
        command.add_argument(
            "--dtype", choices=("float32", "tf32", "bfloat16", "float16"), default="float32", help="(default: float32)"
        )
        command.add_argument(
            "--memory-format", choices=("nchw", "channels_last"), metavar="FORMAT",
            help="nchw or channels_last, of ours (default: channels_last on a GPU, else nchw)",
        )
        command.add_argument("--seconds", type=float, default=0.3, help="for each time that is measured (default: 0.3)")
        command.add_argument("--threads", type=_count, help="CPU threads (default: torch's choice)")
        command.add_argument("--kernel", choices=get_args(Kernel), default="auto", help="backends allowed (default: auto)")
        command.add_argument("--output", type=Path, metavar="FOLDER", help=f"of CSV and plot (default: {OUTPUT}/...)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def _ratio(text: str) -> float:
    try:
        return checked(float(text), Ratio, "ratio")
    except (ValueError, UserError) as problem:
        raise argparse.ArgumentTypeError(f"{text}: must be a number, at least 0 and below 1") from problem


def _listed(one: Any) -> Any:
    return lambda text: tuple(one(part) for part in text.split(","))


def _choices(*names: str) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        if unknown := set(text.split(",")) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(names)}")
        return tuple(text.split(","))

    return parse
