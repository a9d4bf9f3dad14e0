"""Learning curves of one or more runs: reward by images rewarded and by seconds.

    python bench/plot.py runs/NAME                            # writes plot.png
    python bench/plot.py runs/A-0 runs/A-1 runs/B-0 runs/B-1 --out a-and-b.png

Runs that differ only in their seed are one line: the mean of `reward_mean` in their metrics.csv. The band is
one standard deviation over the seeds or, for a single run, over the images of an epoch: `reward_std`.
A line's label is the settings in which the lines differ.
"""
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import rlcm
from bench.common import Parser, read_rows

COLUMNS = "images", "seconds", "reward_mean", "reward_std"
NO_SETTING = "seed", "out", "save_every", "log_with"  # runs on one line may differ in these


def read_metrics(run):
    """COLUMNS of a run's metrics.csv as an array (4, epochs). Raises BadInput."""
    rows = read_rows(Path(run) / "metrics.csv")
    with rlcm.explained(f"the metrics.csv of {run} is not of this version"):
        return np.array([[row[name] for row in rows] for name in COLUMNS], float)


@matplotlib.rc_context({"text.parse_math": False})  # a $ in a prompt is not a formula
def curves(runs, path):
    """Draw the curves of runs into one file. Raises BadInput."""
    # Runs with the same settings share a line.
    groups = {}
    for run in runs:
        settings = asdict(rlcm.read_config(run))
        for name in NO_SETTING:
            del settings[name]
        groups.setdefault(str(settings), (settings, []))[1].append(read_metrics(run))
    lines = list(groups.values())

    # The method alone labels a line if that is enough.
    names = [name for name in lines[0][0] if len({str(settings[name]) for settings, _ in lines}) > 1]
    if len({settings["method"] for settings, _ in lines}) == len(lines):
        names = ["method"]

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    fits = Path(path).suffix[1:] in figure.canvas.get_supported_filetypes()
    rlcm.require(fits, f"--out {path}: end it in .png, .pdf or .svg")
    axes = figure.subplots(1, 2, sharey=True)
    for settings, members in lines:
        label = ", ".join(f"{name} {settings[name]}" for name in names)
        epochs = min(len(m[0]) for m in members)
        if epochs < max(len(m[0]) for m in members):
            print(f"{label or 'the line'} ends after {epochs} epochs, where the shortest of its runs ends")
        columns = np.stack([m[:, :epochs] for m in members])  # (runs, 4, epochs)
        images, seconds, reward, std = columns.mean(0)
        if len(members) > 1:
            std = columns[:, 2].std(0)
        for axis, x in zip(axes, (images, seconds)):
            (line,) = axis.plot(x, reward, label=label)
            axis.fill_between(x, reward - std, reward + std, alpha=0.2, color=line.get_color(), linewidth=0)
    rewards = sorted({settings["reward"] for settings, _ in lines})
    axes[0].set(xlabel="images rewarded", ylabel=f"reward: {', '.join(rewards)}")
    axes[1].set_xlabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main(argv=None):
    p = Parser("plot", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="runs' folders")
    p.add_argument("--out", default="plot.png", metavar="FILE", help="default: plot.png")
    return p.run(lambda args: curves(args.runs, args.out), argv)


if __name__ == "__main__":
    sys.exit(main())
