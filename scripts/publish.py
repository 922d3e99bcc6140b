"""Publish measured results: copy records of finished runs, and write README's tables from them.

    python scripts/publish.py add TABLE RUN_DIR...   copy their record.json to outputs/published/TABLE/
    python scripts/publish.py readme [--check]       write README's generated parts, or fail if they differ

Every measured number in README stands between `<!-- NAME -->` and `<!-- /NAME -->` and comes from
outputs/published/NAME: nobody types it.
"""

import argparse
import csv
import io
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from prune_cli.record import Record
from prune_cli.report.stages import render
from prune_cli.report.summary import spread, summary_markdown

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "outputs/published"
README = ROOT / "README.md"


def add(table: str, run_dirs: Sequence[Path]) -> None:
    """Copy the records, one file per seed and setting."""
    folder = PUBLISHED / table
    for run_dir in run_dirs:
        record = Record.read(run_dir / "record.json")
        if record.status != "complete":
            sys.exit(f"{run_dir}: {record.status}, not published")
        overrides = "_".join(word for word in record.command.split()[1:] if not word.startswith("runtime."))
        name = re.sub(r"[^\w.=,-]+", "-", overrides) or "default"
        record.write(folder / f"{name}.json")
        print(folder / f"{name}.json")


def records(table: str) -> list[Record]:
    """The published records of a table, by seed."""
    found = [Record.read(path) for path in sorted((PUBLISHED / table).glob("*.json"))]
    return sorted(found, key=lambda record: record.seed)


def one_run(table: str) -> str:
    """What the first seed's run printed at its end."""
    text = io.StringIO()
    render(records(table)[0], Console(file=text, width=140))
    lines = (line.rstrip() for line in text.getvalue().strip("\n").splitlines())
    return "```\n" + "\n".join(lines) + "\n```\n"


def stages_over_seeds(table: str) -> str:
    """Mean and standard deviation per stage."""
    found = records(table)
    return summary_markdown(found) + f"\nSeeds {', '.join(str(r.seed) for r in found)}; {_where(found[0].machine)}.\n"


def tuning(table: str) -> str:
    """The penalty strength against the validation split: no test accuracy enters."""
    groups: dict[float, list[Record]] = defaultdict(list)
    for record in records(table):
        groups[record.config["method"]["strength"]].append(record)
    lines = ["| strength | n | dense, validation % | pruned, validation % | stripes removed % | skeleton separated |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for strength, group in sorted(groups.items()):
        dense = spread([100 * r.stage("dense").validation for r in group])
        pruned = spread([100 * r.stage("pruned").validation for r in group])
        removed = spread([100 * r.obtained for r in group])
        separated = sum(not any("separated" in note for note in r.notes) for r in group)
        lines.append(f"| {strength:g} | {len(group)} | {dense} | {pruned} | {removed} | {separated} of {len(group)} |")
    return "\n".join(lines) + "\n"


def benchmark(table: str) -> str:
    """Ratios of a benchmark, each measured in one run."""
    content = json.loads((PUBLISHED / f"{table}.json").read_text())
    lines = ["| case | ours, images/s | reference, images/s | ratio [lowest–highest turn] |", "| --- | ---: | ---: | ---: |"]
    for row in content["rows"]:
        speeds = row["images_per_second"]
        ratio = f"{row['ratio']:.2f}x [{row['ratio_low']:.2f}–{row['ratio_high']:.2f}]"
        lines.append(f"| {row['case']} | {speeds[row['ours']]:,.0f} | {speeds[row['reference']]:,.0f} | {ratio} |")
    return "\n".join(lines) + f"\n\n{_where(content['machine'])}, torch {content['versions']['torch']}.\n"


def merging(table: str) -> str:
    """One sentence about the speed of neuron merging."""
    content = json.loads((PUBLISHED / f"{table}.json").read_text())
    ours, loop = content["seconds"]["ours"], content["seconds"]["loop"]
    return (
        f"Merging the {content['pruned']:,} pruned filters of a VGG-16 takes {ours:.2f} s, a Python loop over them that "
        f"does the same work {loop:.2f} s: {content['ratio']:.1f}x [{content['ratio_low']:.1f}–{content['ratio_high']:.1f}] "
        f"(`python scripts/benchmark_merging.py`; {_where(content['machine'])}).\n"
    )


def kernels(table: str) -> str:
    """`prune-cli bench kernel`: geometric means over the layers, and the slowest one."""
    groups: dict[float, list[dict[str, str]]] = defaultdict(list)
    with (PUBLISHED / table / "table.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups[float(row["ratio"])].append(row)
    lines = ["| stripes removed | layers | dense plans | speedup, geometric mean | slowest layer | fastest layer |"]
    lines.append("| ---: | ---: | ---: | ---: | --- | --- |")
    for ratio, rows in sorted(groups.items()):
        speedups = {row["layer"]: float(row["speedup"]) for row in rows}
        slowest, fastest = min(speedups, key=speedups.get), max(speedups, key=speedups.get)
        dense = sum(row["plan"].startswith("dense") for row in rows)
        lines.append(
            f"| {ratio:.0%} | {len(rows)} | {dense} | {statistics.geometric_mean(speedups.values()):.2f}x "
            f"| {speedups[slowest]:.2f}x ({slowest}) | {speedups[fastest]:.2f}x ({fastest}) |"
        )
    environment = json.loads((PUBLISHED / table / "env.json").read_text())
    where = f"{_where(environment['machine'])}, torch {environment['versions']['torch']}"
    return "\n".join(lines) + f"\n\nfloat32, batch {groups[min(groups)][0]['batch']}, {where}.\n"


def _where(machine: dict) -> str:
    return f"{machine['cpu']}, {machine['threads']} threads"


# What stands in README under which name, and who writes it.
PARTS: dict[str, tuple[Callable[[str], str], str]] = {
    "stripe-digits-run": (one_run, "stripe_digits"),
    "stripe-digits": (stages_over_seeds, "stripe_digits"),
    "stripe-digits-tuning": (tuning, "stripe_digits_tuning"),
    "fp-digits": (stages_over_seeds, "fp_digits"),
    "training-speed": (benchmark, "training_speed"),
    "kernel-speed": (kernels, "bench_kernel"),
    "merging-speed": (merging, "merging_speed"),
}


def generated(readme: str) -> str:
    """The text of README with every generated part written anew."""
    for name, (write, table) in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            sys.exit(f"README.md: the part <!-- {name} --> is missing")
        part = write(table)
        readme = pattern.sub(lambda match, part=part: match[1] + part + match[2], readme)
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("table")
    adding.add_argument("run_dirs", nargs="+", type=Path)
    writing = commands.add_parser("readme")
    writing.add_argument("--check", action="store_true", help="write nothing, exit with 1 where README differs")
    arguments = parser.parse_args()
    if arguments.command == "add":
        return add(arguments.table, arguments.run_dirs)
    old = README.read_text(encoding="utf-8")
    new = generated(old)
    if arguments.check:
        sys.exit(0 if new == old else "README.md differs from outputs/published: run scripts/publish.py readme")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
