"""Publish measured results: copy records of finished runs, and write README's tables from them.

    python scripts/publish.py add TABLE RUN_DIR...   copy the records there to outputs/published/TABLE/
    python scripts/publish.py readme [--check]       write tables, plots and README's generated parts, or
                                                     fail if they differ
    python scripts/publish.py picture                photograph the report page of `lenet` (needs chromium)

Every measured number in README stands between `<!-- NAME -->` and `<!-- /NAME -->` and comes from
outputs/published/NAME: nobody types it. The tables in REPORTS have files of their own beside their
records: report.md, report.csv and plots.
"""

import argparse
import csv
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from prune_cli.record import Record
from prune_cli.report.collect import collect
from prune_cli.report.formats import to_csv, to_markdown
from prune_cli.report.page import to_html
from prune_cli.report.plots import plots
from prune_cli.report.rows import method_of
from prune_cli.report.stages import render
from prune_cli.report.summary import spread, summary_markdown
from prune_cli.report.table import ReportTable, tables

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "outputs/published"
README = ROOT / "README.md"


def add(table: str, run_dirs: Sequence[Path]) -> None:
    """Copy the records, one file per seed and setting."""
    folder = PUBLISHED / table
    for run in collect(run_dirs):
        record = run.record
        if not run.complete:
            sys.exit(f"{run.path}: {record.status}, not published")
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
    unit = records(table)[0].unit
    scores = "skeleton" if unit == "stripe" else "scores"
    lines = [f"| strength | n | dense, validation % | pruned, validation % | {unit}s removed % | {scores} separated |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for strength, group in sorted(groups.items()):
        dense = spread([100 * r.stage("dense").validation for r in group])
        pruned = spread([100 * r.stage("pruned").validation for r in group])
        removed = spread([100 * r.obtained for r in group])
        separated = sum(not any("separated" in note for note in r.notes) for r in group)
        lines.append(f"| {strength:g} | {len(group)} | {dense} | {pruned} | {removed} | {separated} of {len(group)} |")
    return "\n".join(lines) + "\n"


def soft_pruning(table: str) -> str:
    """SFP and FPGM on the validation split, and how many runs warn that what they removed was at work to the end."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records(table):
        method = record.config["method"]
        option = "growing rate" if method.get("asymptotic") else f"mix {method['norm_ratio']:g}" if method.get("norm_ratio") else ""
        groups[", ".join(filter(None, (method_of(record), option)))].append(record)
    lines = ["| method | n | dense, validation % | pruned, validation % | warn of it |", "| --- | ---: | ---: | ---: | ---: |"]
    for label, group in sorted(groups.items(), key=lambda item: (item[0].startswith("fpgm"), item[0])):
        dense, pruned = (spread([100 * r.stage(s).validation for r in group]) for s in ("dense", "pruned"))
        warn = sum(any("at work" in note for note in r.notes) for r in group)
        lines.append(f"| {label} | {len(group)} | {dense} | {pruned} | {warn} of {len(group)} |")
    return "\n".join(lines) + "\n"


def regrowth(table: str) -> str:
    """`scripts/explain_regrowth.py`: what becomes of filters at zero, by the batch norms' epsilon."""
    content = json.loads((PUBLISHED / f"{table}.json").read_text())
    groups: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for outcome in content["outcomes"]:
        groups[outcome["rate"], outcome["epsilon"]].append(outcome)
    lines = ["| rate | epsilon | n | before the last zeroing, validation % | after | their norm, at most | zeroed again % |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (rate, epsilon), group in groups.items():
        before, after, again = (spread([outcome[key] for outcome in group]) for key in ("before", "after", "again"))
        norm = max(outcome["norm"] for outcome in group)
        lines.append(f"| {rate} | {epsilon:g} | {len(group)} | {before} | {after} | {norm:.2f}x | {again} |")
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
    for row in _rows(PUBLISHED / table / "table.csv"):
        groups[float(row["ratio"])].append(row)
    lines = ["| stripes removed | layers | dense plans | speedup, geometric mean | without dense plans "]
    lines[0] += "| slowest layer | fastest layer |"
    lines.append("| ---: | ---: | ---: | ---: | ---: | --- | --- |")
    for ratio, rows in sorted(groups.items()):
        speedups = {row["layer"]: float(row["speedup"]) for row in rows}
        slowest, fastest = min(speedups, key=speedups.get), max(speedups, key=speedups.get)
        sparse = [float(row["speedup"]) for row in rows if not row["plan"].startswith("dense")]
        lines.append(
            f"| {ratio:.0%} | {len(rows)} | {len(rows) - len(sparse)} | {statistics.geometric_mean(speedups.values()):.2f}x "
            f"| {statistics.geometric_mean(sparse):.2f}x | {speedups[slowest]:.2f}x ({slowest}) | {speedups[fastest]:.2f}x ({fastest}) |"
        )
    environment = json.loads((PUBLISHED / table / "env.json").read_text())
    where = f"{_where(environment['machine'])}, torch {environment['versions']['torch']}"
    one = rows[0]
    return "\n".join(lines) + f"\n\n{one['dtype']}, {one['memory_format']}, batch {one['batch']}, {where}.\n"


def trained_network(table: str) -> str:
    """`prune-cli bench model`: the layers and the whole of one run's network, and what that run was."""
    rows = _rows(PUBLISHED / table / "table.csv")
    lines = ["| batch | stripe layers | dense plans | their speedup, geometric mean | slowest layer | whole network, ms | speedup |"]
    lines.append("| ---: | ---: | ---: | ---: | --- | --- | ---: |")
    for batch in dict.fromkeys(row["batch"] for row in rows):
        *layers, whole = (row for row in rows if row["batch"] == batch)  # the whole network comes last
        speedups = {row["layer"]: float(row["speedup"]) for row in layers}
        slowest, dense = min(speedups, key=speedups.get), sum(row["plan"].startswith("dense") for row in layers)
        lines.append(
            f"| {batch} | {len(layers)} | {dense} | {statistics.geometric_mean(speedups.values()):.2f}x "
            f"| {speedups[slowest]:.2f}x ({slowest}) | {float(whole['dense_ms']):.2f} → {float(whole['ours_ms']):.2f} "
            f"| {float(whole['speedup']):.2f}x |"
        )
    (record,) = (Record.read(path) for path in (PUBLISHED / table).glob("*.json") if path.name != "env.json")
    dense, pruned = record.stage("dense"), record.stage("pruned")
    recipe = record.config["recipe"]
    environment = json.loads((PUBLISHED / table / "env.json").read_text())
    said = (
        f"The masks come from a short training, {recipe['sparsify']['epochs']} epochs on {recipe['limit']:,} images of "
        f"{record.config['dataset']['name']}: {record.obtained:.0%} of the stripes and "
        f"{1 - pruned.parameters / dense.parameters:.0%} of the parameters are gone, accuracy {dense.accuracy:.1%} dense, "
        f"{pruned.accuracy:.1%} pruned, {record.objective:.1%} at the end. {rows[0]['dtype']}, {rows[0]['memory_format']}, {_where(environment['machine'])}, "
        f"torch {environment['versions']['torch']}."
    )
    warned = "".join(f" The run itself says: {note}" for note in record.notes)
    return "\n".join(lines) + f"\n\n{said}{warned}\n"


def compared(table: str) -> str:
    """`scripts/compare_lenets.py`: networks side by side."""
    networks = json.loads((PUBLISHED / f"{table}.json").read_text())["networks"]
    lines = ["| network | dense % | 80 % of layer 1 gone | of layer 2 | of both | neuron active, layer 1 | layer 2 "]
    lines[0] += "| neurons of layer 1 nearly zero | its weights' L2 norm |"
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for n in networks:
        left = " | ".join(f"{n['without'][layer]:.2f}" for layer in ("fc1", "fc2", "both"))
        active = " | ".join(f"{share:.0%}" for share in n["active"].values())
        lines.append(f"| {n['name']} | {n['dense']:.2f} | {left} | {active} | {n['gone']} | {n['norm']:.1f} |")
    return "\n".join(lines) + "\n"


def report(table: str) -> str:
    """The published table that the records reproduce, as `prune-cli report` shows it, and seed by seed
    the rows whose mean is worse than the paper's number by more than a point."""
    found = _report(table)
    worse = [row for row in found.rows if row.deviation and row.deviation[0] < -1]
    said = [f"{row.label}: {', '.join(f'{value:.2f}' for value in row.final)}" for row in worse]
    return to_markdown(found, level=0) + (f"\nSeed by seed, {'; '.join(said)} %.\n" if said else "")


def _report(table: str) -> ReportTable:
    (found,) = tables(collect([PUBLISHED / table]))
    return found


def report_files(table: str) -> dict[Path, str]:
    """The table's files, by path."""
    found, folder = _report(table), PUBLISHED / table
    plotted = {folder / f"{name}.svg": svg for name, svg in plots(found).items()}
    return {folder / "report.md": to_markdown(found), folder / "report.csv": to_csv([found]), **plotted}


def picture() -> None:
    """outputs/published/report.png: the report page of the records of `lenet`, first row opened."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(to_html([_report("lenet")]).replace("<details>", "<details open>", 1), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1480"]
        command = ["chromium", *options, f"--screenshot={PUBLISHED / 'report.png'}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def removal(table: str) -> str:
    """`scripts/prove_removal.py`: per method over torchvision's models."""
    rows = _rows(PUBLISHED / table / "rows.csv")
    lines = ["| method | models | lossless | nothing to prune | fails | channels removed % | MACs removed % | max difference |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method]
        holds = [row for row in found if not row["reason"]]
        without = sum("nothing that it could prune" in row["reason"] for row in found)
        gone = ([100 * float(row[key]) for row in holds] for key in ("channels", "macs"))
        channels, macs = (spread(fractions) if fractions else "–" for fractions in gone)
        off = [float(row["difference"]) for row in holds if row["difference"]]
        lossless = str(len(holds)) if off else f"{len(holds)} run"
        failed = len(found) - len(holds) - without
        worst = f"{max(off):.0e}" if off else "–"
        lines.append(f"| {method} | {len(found)} | {lossless} | {without} | {failed} | {channels} | {macs} | {worst} |")
    environment = json.loads((PUBLISHED / table / "env.json").read_text())
    models = len({row["model"] for row in rows})
    return "\n".join(lines) + f"\n\n{models} models, float32, torch {environment['versions']['torch']}.\n"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _where(machine: dict) -> str:
    return f"{machine['cpu']}, {machine['threads']} threads"


# What stands in README under which name, and who writes it.
PARTS: dict[str, tuple[Callable[[str], str], str]] = {
    "stripe-digits-run": (one_run, "stripe_digits"),
    "stripe-digits": (stages_over_seeds, "stripe_digits"),
    "stripe-digits-tuning": (tuning, "stripe_digits_tuning"),
    "slimming-digits-tuning": (tuning, "slimming_digits_tuning"),
    "group-digits-tuning": (tuning, "group_digits_tuning"),
    "soft-digits-tuning": (soft_pruning, "soft_digits_tuning"),
    "soft-regrowth": (regrowth, "soft_regrowth"),
    "fp-digits": (stages_over_seeds, "fp_digits"),
    "training-speed": (benchmark, "training_speed"),
    "removal-proof": (removal, "torchvision_proof"),
    "kernel-speed": (kernels, "bench_kernel"),
    "kernel-speed-channels-last": (kernels, "bench_kernel_channels_last"),
    "kernel-speed-bfloat16": (kernels, "bench_kernel_bfloat16"),
    "trained-vgg16": (trained_network, "bench_vgg16"),
    "merging-speed": (merging, "merging_speed"),
    "lenet-checkpoint": (report, "lenet_checkpoint"),
    "lenet": (report, "lenet"),
    "lenet-networks": (compared, "lenet_networks"),
    "comparison": (report, "comparison"),
}
REPORTS = ("lenet_checkpoint", "lenet", "comparison")


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
    commands.add_parser("picture")
    writing = commands.add_parser("readme")
    writing.add_argument("--check", action="store_true", help="write nothing, exit with 1 where README differs")
    arguments = parser.parse_args()
    if arguments.command == "add":
        return add(arguments.table, arguments.run_dirs)
    if arguments.command == "picture":
        return picture()
    new = {README: generated(README.read_text(encoding="utf-8"))}
    for table in REPORTS:
        new |= report_files(table)
    changed = [path for path, text in new.items() if not _stands(path, text)]
    if arguments.check and changed:
        sys.exit(f"{', '.join(p.name for p in changed)}: not what outputs/published says; run scripts/publish.py readme")
    for path in [] if arguments.check else changed:
        path.write_text(new[path], encoding="utf-8")


def _stands(path: Path, text: str) -> bool:
    """Whether the file has this text. A plot is compared where the same matplotlib would draw it."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if path.suffix == ".svg":
        drawn_by = re.compile(r"<dc:title>(.*?)</dc:title>")
        old_by, new_by = (match[1] if (match := drawn_by.search(svg)) else "" for svg in (old, text))
        return old == text or (old_by != "" and old_by != new_by)
    return old == text


if __name__ == "__main__":
    main()
