"""Everything a run shows and logs while it goes: terminal, run.log, metrics.csv, TensorBoard.

`Journal` is the only writer of these files and the only place that configures `logging`. Nothing
here decides a result, and with `run_dir=None` nothing here touches the disk.
"""

from __future__ import annotations

import csv
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from prune_cli.pictures import skeleton_picture

if TYPE_CHECKING:  # torch is slow to import, and plain lines do not need it
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("prune_cli")
log.addHandler(logging.NullHandler())  # without a run.log, messages are only shown, and once

COLUMNS = ("stage", "epoch", "name", "value")  # long form: every stage has its own penalties
LARGEST = 1e20  # where the bins of a histogram end: TensorBoard raises an error for values beyond them only
REFRESH = 0.1  # seconds between two movements of the progress bar


class Journal:
    """The journal of one run; a context manager.

    run_dir   receives run.log, metrics.csv and tensorboard/<stage>/; None logs nothing to disk
    console   shows a live progress bar where it is a terminal, one plain line per epoch elsewhere
    """

    def __init__(self, run_dir: Path | None, console: Console) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.console = console
        self._writers: dict[str, SummaryWriter] = {}
        self._open = ExitStack()
        self._csv = None

    def __enter__(self) -> Self:
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._open.callback(log.setLevel, log.level)
            log.setLevel(logging.INFO)
            self._open.enter_context(_handled(logging.getLogger(), _log_file(self.run_dir / "run.log")))
            path = self.run_dir / "metrics.csv"
            self._csv = self._open.enter_context(path.open("a", newline="", encoding="utf-8"))
            if self._csv.tell() == 0:
                csv.writer(self._csv).writerow(COLUMNS)
                self._csv.flush()
        self._open.enter_context(_handled(log, _Shown(self)))
        return self

    def __exit__(self, kind, problem, traceback) -> None:
        if problem is not None:
            log.error("the run stopped", exc_info=(kind, problem, traceback))
        self._open.close()
        self._writers.clear()
        self._csv = None

    @contextmanager
    def stage(self, name: str, epochs: int, steps_per_epoch: int) -> Iterator[StageJournal]:
        """The journal of one training run of `epochs` epochs."""
        with _progress_bar(self.console) as bar:
            stage = StageJournal(self, name, epochs, steps_per_epoch, bar)
            try:
                yield stage
            finally:
                if bar is not None and stage.line:  # what a terminal keeps of the stage
                    self._print(stage.line)

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Shows on a terminal what takes a while, until it is done. Not around what is timed: the line moves."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(Text(doing)):
            yield

    def replay(self, stage: str, history: Sequence[Mapping[str, float]]) -> None:
        """Log a stage that came from the store as if it had been trained now."""
        self._values(stage, history)
        self._say(f"{stage}: found in the store, nothing to train")

    def histograms(self, stage: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Histograms of the values of each tensor that TensorBoard has bins for, after epoch `step`."""
        if writer := self._writer(stage):
            for name, tensor in tensors.items():
                values = tensor.detach().float()
                values = values[values.abs() < LARGEST]  # without what is not finite, too
                if values.numel():
                    writer.add_histogram(name, values.cpu(), step)

    def skeletons(self, stage: str, skeletons: Mapping[str, Tensor], step: int = 0) -> None:
        """A picture of each layer's filter skeletons (O, K, K): strengths, or booleans = kept."""
        if writer := self._writer(stage):
            for layer, skeleton in skeletons.items():
                picture = skeleton_picture(skeleton.detach().float().cpu().numpy())
                writer.add_image(f"skeleton/{layer}", picture, step, dataformats="HWC")

    def layer_sparsity(self, stage: str, sparsity: Mapping[str, float], step: int = 0) -> None:
        """Fraction of zeros of each layer."""
        if writer := self._writer(stage):
            for layer, fraction in sparsity.items():
                writer.add_scalar(f"sparsity/{layer}", fraction, step)

    def hyperparameters(self, hparams: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """One row of the HParams tab: settings (may be nested) with the run's final metrics."""
        if writer := self._writer("hparams"):
            from torch.utils.tensorboard.summary import hparams as summaries

            # Without the first summary, the list of columns, TensorBoard collects the columns of
            # all runs; with it, the first run's columns are everyone's.
            _, start, end = summaries(dict(_flat(hparams)), dict(metrics))
            writer.file_writer.add_summary(start)
            writer.file_writer.add_summary(end)
            for name, value in metrics.items():
                writer.add_scalar(name, value, 0)
            writer.flush()

    def note(self, sentence: str) -> None:
        """Show and log what is good to know."""
        self._say(sentence)

    def warn(self, sentence: str) -> None:
        """Show and log what puts the result in doubt."""
        log.warning(sentence)

    def _say(self, sentence: str) -> None:
        log.info(sentence)
        self._print(sentence)

    def _print(self, line: str, style: str = "") -> None:
        # As Text: brackets in a sentence are no markup. Unwrapped: paths can be copied. These may be any bytes.
        line = line.encode(errors="backslashreplace").decode()
        self.console.print(Text(line, style=style), soft_wrap=True)

    def _values(self, stage: str, epochs: Sequence[Mapping[str, float]], first: int = 1) -> None:
        """Rows of metrics.csv and scalars of TensorBoard for consecutive epochs from `first`."""
        if self._csv is None or not epochs:
            return
        rows, writer = csv.writer(self._csv), self._writer(stage)
        for epoch, values in enumerate(epochs, first):
            for name, value in values.items():
                rows.writerow((stage, epoch, name, float(value)))
                writer.add_scalar(name, float(value), epoch)
        self._csv.flush()

    def _writer(self, stage: str) -> SummaryWriter | None:
        """The TensorBoard writer of a stage, None where nothing is logged."""
        if self._csv is None:
            return None
        if stage not in self._writers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside tensorboard are not ours
                from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(self.run_dir / "tensorboard" / stage), flush_secs=5)
            self._open.callback(writer.close)
            self._writers[stage] = writer
        return self._writers[stage]


class StageJournal:
    """What a training loop tells the journal. `line` is the last finished epoch in words."""

    def __init__(self, journal: Journal, name: str, epochs: int, steps_per_epoch: int, bar: Progress | None) -> None:
        self.line = ""
        self._journal, self._name, self._epochs, self._bar = journal, name, epochs, bar
        self._steps, self._steps_per_epoch = 0, steps_per_epoch
        self._shown = self._began = time.monotonic()
        if bar is not None:
            self._task = bar.add_task(name, total=epochs * steps_per_epoch, epoch=f"0/{epochs}", values="")

    def resumed(self, history: Sequence[Mapping[str, float]]) -> None:
        """The run goes on after the epochs of `history`, which are logged again: this run's files
        are whole."""
        self._journal._values(self._name, history)
        self._journal._say(f"{self._name}: resumed after epoch {len(history)} of {self._epochs}")
        self._steps = len(history) * self._steps_per_epoch
        if self._bar is not None:
            self._bar.update(self._task, completed=self._steps, epoch=f"{len(history)}/{self._epochs}")

    def step(self) -> None:
        """One optimizer step was taken. Costs a microsecond and waits for no device."""
        self._steps += 1
        if self._bar is not None and (now := time.monotonic()) - self._shown > REFRESH:
            self._shown = now
            self._bar.update(self._task, completed=self._steps)

    def epoch(self, epoch: int, values: Mapping[str, float], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Epoch number `epoch` (the first is 1) is finished.

        values    all are logged; names without a slash are shown, `accuracy` and `validation`,
                  fractions, as percentages
        tensors   logged as histograms
        """
        seconds, self._began = time.monotonic() - self._began, time.monotonic()
        self._steps = epoch * self._steps_per_epoch
        shown = "  ".join(_words(name, value) for name, value in values.items() if "/" not in name)
        self.line = f"{self._name}  epoch {epoch}/{self._epochs}  {shown}  {seconds:.1f} s"
        if self._bar is None:
            self._journal._say(self.line)
        else:
            log.info(self.line)
            self._bar.update(self._task, completed=self._steps, epoch=f"{epoch}/{self._epochs}", values=shown)
        self._journal._values(self._name, [values], first=epoch)
        self._journal.histograms(self._name, epoch, tensors or {})


def _log_file(path: Path) -> logging.Handler:
    """Where our messages, and the warnings of all libraries, are written."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


@contextmanager
def _handled(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class _Shown(logging.Handler):
    """Shows the package's warnings, whichever module they come from."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self.journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:  # an error ends the run, which says so itself
            self.journal._print(f"Warning: {record.getMessage()}", style="yellow")


@contextmanager
def _progress_bar(console: Console) -> Iterator[Progress | None]:
    """A live bar that disappears at the end; None where the console is no terminal."""
    if not console.is_terminal:
        yield None
        return
    plain = {"markup": False}
    with Progress(
        TextColumn("{task.description}", **plain),
        BarColumn(bar_width=12),
        TextColumn("epoch {task.fields[epoch]}", **plain),
        TextColumn("{task.fields[values]}", **plain, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,  # the values get what the other columns leave
    ) as bar:
        yield bar


def _words(name: str, value: float) -> str:
    if name in ("accuracy", "validation") or name.endswith("accuracy"):
        return f"{name} {100 * value:.2f}%"
    return f"{name} {value:.4g}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Nested settings under dotted names, with values that TensorBoard accepts."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value if type(value) in (int, float, str) else str(value)
