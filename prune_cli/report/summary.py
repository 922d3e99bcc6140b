"""Several runs of one experiment as one table: n, mean and standard deviation over the seeds."""

import statistics
from collections.abc import Callable, Sequence

from prune_cli.record import Record, StageResult
from prune_cli.report.stages import LABELS, ORDER, measured_speedup, theoretical_speedup


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """`mean ± standard deviation` of a sample; a single value stands alone."""
    mean = f"{statistics.mean(values):.{digits}f}{unit}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def summary_markdown(records: Sequence[Record]) -> str:
    """The stages of runs that differ in their seed only, as a Markdown table."""
    stages = [stage for stage in ORDER if records[0].stage(stage)]
    batches = [latency.batch for latency in records[0].stage("dense").latency]
    header = ["stage", "n", "top-1 %", "drop, points", "MACs removed %", "params removed %", "speedup, theory"]
    header += [f"speedup, batch {batch}" for batch in batches]
    lines = [header, ["---", *("---:" for _ in header[1:])]]
    for stage in stages:
        pairs = [(record, record.stage(stage), record.stage("dense")) for record in records]

        def over_seeds(figure: Callable[[Record, StageResult, StageResult], float | None], unit="", pairs=pairs) -> str:
            values = [figure(*pair) for pair in pairs]
            return "–" if None in values else spread(values, unit=unit)

        line = [LABELS.get(stage, stage).replace("\n", " "), str(len(records))]
        line.append(over_seeds(lambda _, result, dense: 100 * result.accuracy))
        line.append(over_seeds(lambda _, result, dense: 100 * (dense.accuracy - result.accuracy)))
        line.append(over_seeds(lambda _, result, dense: 100 * (1 - result.macs / dense.macs)))
        line.append(over_seeds(lambda _, result, dense: 100 * (1 - result.parameters / dense.parameters)))
        line.append(over_seeds(lambda record, result, _: theoretical_speedup(record, result), "x"))
        line += [over_seeds(lambda r, s, _, b=batch: measured_speedup(r, s, b), "x") for batch in batches]
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
