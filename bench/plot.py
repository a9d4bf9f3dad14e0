"""Learning curves of one run or several: reward against pictures scored and against seconds.

    python bench/plot.py runs/NAME                            # writes plot.png
    python bench/plot.py runs/A-0 runs/A-1 runs/B-0 runs/B-1 --out a-and-b.png

Runs that differ only in their seed are one line: the mean of `reward_mean` of their metrics.csv. The band is
one standard deviation over the seeds or, where there is one run, over the pictures of an epoch: `reward_std`.
A line is labelled by the settings in which the lines differ.
"""
import csv
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import rlcm
from bench.sample import Parser
from rewards import BadInput

COLUMNS = "pictures", "seconds", "reward_mean", "reward_std"
NO_SETTING = "seed", "out", "save_every", "log_with"  # runs of one line may differ in these


def read_rows(path):
    """Rows of a csv file, numbers as floats. Raises BadInput where there are none."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    try:
        with open(path) as f:
            rows = [{name: value(text) for name, text in row.items()} for row in csv.DictReader(f)]
    except OSError as e:
        raise BadInput(f"{path} cannot be read ({type(e).__name__}): train the run first") from e
    rlcm.require(rows, f"{path} is empty: train the run first")
    return rows


def read_metrics(run):
    """Array (4, epochs) of COLUMNS of a run's metrics.csv. Raises BadInput."""
    path = Path(run) / "metrics.csv"
    try:
        return np.array([[float(row[name]) for name in COLUMNS] for row in read_rows(path)]).T
    except (KeyError, TypeError, ValueError) as e:
        raise BadInput(f"{path} is not a run's ({type(e).__name__}: {e})") from e


def by_line(runs):
    """Runs' folders -> a list of (settings, metrics of the runs that have them)."""
    lines = []
    for run in runs:
        config, metrics = asdict(rlcm.read_config(run)), read_metrics(run)
        settings = {name: value for name, value in config.items() if name not in NO_SETTING}
        same = [members for other, members in lines if other == settings]
        if same:
            same[0].append(metrics)
        else:
            lines.append((settings, [metrics]))
    return lines


def curves(runs, path):
    """Draw the curves of runs' folders into one file -> the figure. Raises BadInput."""
    from matplotlib.figure import Figure

    lines = by_line(runs)
    names = [name for name in lines[0][0] if len({str(settings[name]) for settings, _ in lines}) > 1]
    if len({settings["method"] for settings, _ in lines}) == len(lines):
        names = []  # the method says it all

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    fits = Path(path).suffix[1:] in figure.canvas.get_supported_filetypes()
    rlcm.require(fits, f"--out {path}: end it in .png, .pdf or .svg")
    axes = figure.subplots(1, 2, sharey=True)
    for settings, members in lines:
        label = ", ".join(f"{name} {settings[name]}" for name in names) or settings["method"]
        for column, axis in enumerate(axes):
            grid = np.linspace(max(m[column, 0] for m in members), min(m[column, -1] for m in members), 200)
            rewards = np.array([np.interp(grid, m[column], m[2]) for m in members])  # (runs, 200)
            mean, std = rewards.mean(0), rewards.std(0)
            if len(members) == 1:
                std = np.interp(grid, members[0][column], members[0][3])
            (line,) = axis.plot(grid, mean, label=label)
            axis.fill_between(grid, mean - std, mean + std, alpha=0.2, color=line.get_color(), linewidth=0)
    rewards = ", ".join(sorted({settings["reward"] for settings, _ in lines}))
    axes[0].set(xlabel="pictures scored", ylabel=f"reward: {rewards}")
    axes[1].set(xlabel="seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    return figure


def main(argv=None):
    p = Parser("plot", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="runs' folders")
    p.add_argument("--out", default="plot.png", metavar="FILE", help="default: plot.png")

    def work(args):
        curves(args.runs, args.out)
        print(f"wrote {args.out}")

    return p.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
