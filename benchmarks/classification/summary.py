"""From finished runs to tables and a plot: means, 95 % intervals, and differences between methods paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .intervals import Mean, mean_interval, paired_difference
from .methods import CLASSIC

Accuracies = dict[str, dict[int, float]]
"""Method -> seed -> accuracy in percent."""

GAIN = 1.72
"""Points over the best classic augmentation that the SGID paper reports for a ResNet-50 from scratch."""


def by_n(rows: Sequence[Mapping[str, str]]) -> dict[str, Accuracies]:
    """Accuracies of each ``n``, in the order in which they first appear, methods likewise."""
    tables: dict[str, Accuracies] = {}
    for row in rows:
        tables.setdefault(row["n"], {}).setdefault(row["method"], {})[int(row["seed"])] = float(row["accuracy"])
    return tables


def best_classic(table: Accuracies) -> str | None:
    """The classic method with the highest mean over the seeds that all classic ones have, or ``None``."""
    classic = {name: seeds for name, seeds in table.items() if name in CLASSIC}
    if not classic:
        return None
    shared = set.intersection(*(set(seeds) for seeds in classic.values()))
    if not shared:
        return None
    return max(classic, key=lambda name: math.fsum(classic[name][seed] for seed in shared))


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table for each ``n``, and what is claimed about SGID: its gain over the best classic method, alone and with it.

    Where no classic method was run, as for ablations, differences are those to ``sgid``.
    """
    parts = []
    for n, table in by_n(rows).items():
        best = best_classic(table)
        parts.append(f"## {n} images per class\n\n{_table(table, best)}")
        if best is not None:
            parts += _claims(table, best)
    return "\n\n".join(parts) + "\n"


def _table(table: Accuracies, best: str | None) -> str:
    reference = best or ("sgid" if "sgid" in table else None)
    lines = [
        f"| method | seeds | accuracy, % | minus {'best classic' if best or not reference else reference}, points |",
        "| --- | --- | --- | --- |",
    ]
    order = sorted(table, key=lambda name: -mean_interval(list(table[name].values())).mean)
    for name in order:
        difference = None if reference is None or reference == name else paired_difference(table[name], table[reference])
        shown = "" if difference is None else format_mean(difference, signed=True)
        marked = f"**{name}** (best classic)" if name == best else name
        mean = mean_interval(list(table[name].values()))
        lines.append(f"| {marked} | {mean.n} | {format_mean(mean)} | {shown} |")
    return "\n".join(lines)


def _claims(table: Accuracies, best: str) -> list[str]:
    lines = []
    both = f"sgid+{best}"
    for first, second, wanted in (("sgid", best, GAIN), (both, best, 0.0), (both, "sgid", 0.0)):
        if first not in table or second not in table:
            continue
        difference = paired_difference(table[first], table[second])
        if difference is not None:
            holds = difference.mean >= wanted and difference.low > 0
            lines.append(
                f"- `{first}` minus `{second}`: {format_mean(difference, signed=True)} points over {difference.n} seeds; "
                f"at least {wanted:g} with the interval above 0: {'yes' if holds else 'no'}"
            )
    return ["\n".join(lines)] if lines else []


def views_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of what the judge said of variants, for each ``n`` and method: means and 95 % intervals over the seeds.

    Args:
        rows: of ``views.csv``.
    """
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["n"], row["method"]), []).append(row)
    lines = [
        "## Do variants keep their label, and how different are they",
        "",
        "| n | variants of | seeds | label kept, relative to the originals | distance | RandAugment's distance |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (n, method), found in groups.items():
        kept = mean_interval([_relative_agreement(row) for row in found])
        own, classic = (mean_interval([float(row[f"distance_{of}"]) for row in found]) for of in ("variants", "randaugment"))
        lines.append(
            f"| {n} | {method} | {kept.n} | {format_mean(kept)} % | {format_mean(own, digits=3)} | "
            f"{format_mean(classic, digits=3)} |"
        )
    return "\n".join(lines) + "\n"


def _relative_agreement(row: Mapping[str, str]) -> float:
    originals = float(row["agreement_originals"])
    return 100 * float(row["agreement_variants"]) / originals if originals else math.nan


def format_mean(mean: Mean, *, signed: bool = False, digits: int = 2) -> str:
    """``57.21 ± 0.80``; without a margin for a single value."""
    value = f"{mean.mean:{'+' if signed else ''}.{digits}f}"
    return value if math.isinf(mean.margin) else f"{value} ± {mean.margin:.{digits}f}"


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Means and 95 % intervals of all methods, one panel for each ``n``."""
    from matplotlib.figure import Figure

    tables = by_n(rows)
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    figure = Figure(figsize=(4.2 * len(tables), 1.2 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for panel, (n, table) in zip(panels, tables.items(), strict=True):
        best = best_classic(table)
        for place, name in enumerate(names):
            if name not in table:
                continue
            values = list(table[name].values())
            mean = mean_interval(values)
            colour = "C1" if name.startswith("sgid") else "C2" if name.startswith("real") else "C0"
            margin = None if math.isinf(mean.margin) else mean.margin
            panel.errorbar(mean.mean, place, xerr=margin, fmt="o", color=colour, capsize=3)
            panel.plot(values, [place] * len(values), "|", color=colour, alpha=0.5)
        if best is not None:
            panel.axvline(mean_interval(list(table[best].values())).mean, color="0.7", linewidth=1, zorder=0)
        panel.set_title(f"{n} images per class")
        panel.set_xlabel("accuracy, %")
    figure.supxlabel("means and 95 % intervals; grey line: best classic method", fontsize="small")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
