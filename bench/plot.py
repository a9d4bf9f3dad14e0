"""Learning curves of one run or several: reward against pictures scored and against seconds.

    python bench/plot.py runs/NAME                            # writes plot.png
    python bench/plot.py runs/A-0 runs/A-1 runs/B-0 runs/B-1 --out a-and-b.png

Runs that differ only in their seed are one line: the mean of `reward_mean` of their metrics.csv. The band is
one standard deviation over the seeds or, where there is one run, over the pictures of an epoch: `reward_std`.
A line is labelled by the settings that differ between lines.
"""

import argparse
import csv
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import rlcm
from rewards import BadInput

COLUMNS = "reward_queries", "seconds", "reward_mean", "reward_std"
NO_SETTING = "seed", "out", "save_every"  # what runs of one line may differ in


def read_metrics(run):
    """Array (4, epochs) of COLUMNS of a run's metrics.csv. Raises BadInput."""
    try:
        with open(Path(run) / "metrics.csv") as f:
            return np.array([[float(row[name]) for name in COLUMNS] for row in csv.DictReader(f)]).T
    except (OSError, KeyError, ValueError) as e:
        raise BadInput(f"{run} has no readable metrics.csv ({type(e).__name__}): train it first") from e


def curves(runs, path):
    """Draw the curves of runs' folders into one file -> the figure. Raises BadInput."""
    from matplotlib.figure import Figure

    groups = []  # (settings, arrays of its runs)
    for run in runs:
        config, columns = asdict(rlcm.read_config(run)), read_metrics(run)
        settings = {name: value for name, value in config.items() if name not in NO_SETTING}
        for other, members in groups:
            if other == settings:
                members.append(columns)
                break
        else:
            groups.append((settings, [columns]))
    names = [name for name in groups[0][0] if len({str(settings[name]) for settings, _ in groups}) > 1]
    if len({settings["method"] for settings, _ in groups}) == len(groups):
        names = []  # the method says it all

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    if Path(path).suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise BadInput(f"--out {path}: end it in .png, .pdf or .svg")
    axes = figure.subplots(1, 2, sharey=True)
    for settings, members in groups:
        label = ", ".join(f"{name} {settings[name]}" for name in names) or settings["method"]
        for axis, x in zip(axes, (0, 1)):
            grid = np.linspace(max(m[x, 0] for m in members), min(m[x, -1] for m in members), 200)
            rewards = np.array([np.interp(grid, m[x], m[2]) for m in members])  # (runs, 200)
            mean, std = rewards.mean(0), rewards.std(0)
            if len(members) == 1:
                std = np.interp(grid, members[0][x], members[0][3])
            (line,) = axis.plot(grid, mean, label=label)
            axis.fill_between(grid, mean - std, mean + std, alpha=0.2, color=line.get_color(), linewidth=0)
    rewards = ", ".join(sorted({settings["reward"] for settings, _ in groups}))
    axes[0].set(xlabel="pictures scored", ylabel=f"reward: {rewards}")
    axes[1].set(xlabel="seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    return figure


def main(argv=None):
    """The program -> exit status: 0, or 2 for bad input."""

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="plot.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.error = refuse
    p.add_argument("runs", nargs="+", metavar="RUN", help="runs' folders")
    p.add_argument("--out", default="plot.png", help="the picture's file, default plot.png")
    try:
        args = p.parse_args(argv)
        curves(args.runs, args.out)
    except (BadInput, OSError) as e:
        print(f"plot.py: {e}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
