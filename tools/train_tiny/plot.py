"""Draw the stages' training logs into one picture: loss over steps, and the held-out measure where a stage has one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGES = ("vae", "unet", "judge", "clip", "captioner")
MEASURES = ("test_accuracy", "zero_shot", "psnr")


def rows_of(log: Path) -> list[dict[str, Any]]:
    """Rows by step; where a resumed run wrote a step again, the later row counts."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--work", required=True, type=Path, help="folder of the stages' logs")
    p.add_argument("--out", required=True, type=Path, help="picture to write (.png or .svg)")
    args = p.parse_args()
    logs = {stage: args.work / f"{stage}.jsonl" for stage in STAGES if (args.work / f"{stage}.jsonl").exists()}
    if not logs:
        raise SystemExit(f"no training log (*.jsonl) in {args.work}; run a stage first")
    figure, axes = plt.subplots(1, len(logs), figsize=(4 * len(logs), 3), squeeze=False)
    for axis, (stage, log) in zip(axes[0], logs.items(), strict=True):
        rows = rows_of(log)
        axis.semilogy([row["step"] for row in rows], [row["loss"] for row in rows])
        axis.set(title=stage, xlabel="step", ylabel="training loss")
        for measure in MEASURES:
            if measured := [(row["step"], row[measure]) for row in rows if measure in row]:
                twin = axis.twinx()
                twin.plot(*zip(*measured, strict=True), "o-", color="tab:orange")
                twin.set_ylabel(measure, color="tab:orange")
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
