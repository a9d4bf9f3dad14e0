"""The RLCM paper's own ablations on the embedded model, reward compress.

    python bench/ablate.py horizon                  # rlcm trained with H = 2, 4, 8 steps
    python bench/ablate.py steps --seeds 0          # reward by steps and by seconds, base and tuned
    python bench/ablate.py unseen --seeds 0         # animals that were not trained on
    python bench/ablate.py longer --seeds 0         # 84 epochs, with and without --kl

Prints a table and writes a figure, runs/ablate/WORD.png (not for unseen). Runs are trained where they are
missing, judged on their way as in bench/compare.py, which explains the columns; other flags go to rlcm.py.
horizon and longer have their own runs in runs/ablate; steps and unseen share those of bench/compare.py.

steps      bench/evaluate.py of rlcm and ddpo: reward of the training prompts, seconds for one picture
unseen     reward, accuracy and retrieval for the animals of training and for 24 others (other-animals)
longer     a row every 12 epochs (--every): does the reward still rise, and what is left to recognise?
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from matplotlib.figure import Figure

import rlcm
from bench.compare import cell, judge, table, train_all
from bench.evaluate import evaluate
from bench.plot import read_rows
from bench.sample import Parser, load_lora, open_run
from rewards import get_prompts

HORIZONS = 2, 4, 8
PENALTIES = 0, 0.005, 0.02
COLUMNS = "reward", "accuracy", "retrieval"
COLOURS = "C0", "C1", "C2", "C3"


def trained(args, parts, folder):
    """Train {name: flags of rlcm.py} for every seed -> {name: folders of its seeds}."""
    runs, groups = {}, {name: [] for name in parts}
    for seed, (name, flags) in itertools.product(args.seeds, parts.items()):
        out = folder / f"{name}-{seed}"
        groups[name].append(out)
        runs[out] = ["--reward", "compress", "--seed", seed, *flags, *args.flags]
    train_all(runs, args.jobs)
    return groups


def compared(args):
    """bench/compare.py's runs of rlcm and ddpo."""
    parts = {f"compress-{method}": ["--method", method] for method in ("rlcm", "ddpo")}
    groups = trained(args, parts, args.compare)
    return {name.removeprefix("compress-"): runs for name, runs in groups.items()}


def show(title, rows=()):
    """A line of a table: mean and each seed. Without rows its heading."""
    cells = [cell([row[name] for row in rows], 3) if rows else name for name in COLUMNS]
    print(f"{title:28}" + "".join(f"{text:32}" for text in cells).rstrip(), flush=True)


def draw_judged(groups, x, path):
    """The runs' judged.csv: a panel for each column, a colour for each group, a line for each seed."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, len(COLUMNS))
    for axis, column in zip(axes, COLUMNS):
        for colour, (name, runs) in zip(COLOURS, groups.items()):
            for i, run in enumerate(runs):
                rows, label = read_rows(run / "judged.csv"), name if i == 0 else None
                axis.plot([row[x] for row in rows], [row[column] for row in rows], color=colour, label=label)
        axis.set(xlabel=x, ylabel=column)
    axes[0].legend(frameon=False)
    save(figure, path)


def save(figure, path):
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def horizon(args):
    groups = trained(args, {f"H-{H}": ["--steps", H] for H in HORIZONS}, args.out)
    table(groups, -2.25)
    draw_judged(groups, "passes", args.out / "horizon.png")


def longer(args):
    parts = {f"kl-{kl:g}": ["--kl", kl, "--epochs", 84, "--save-every", args.every] for kl in PENALTIES}
    groups = trained(args, parts, args.out)
    show("")
    for name, runs in groups.items():
        for same in zip(*(read_rows(run / "judged.csv") for run in runs)):
            show(f"{name}, epoch {same[0]['epoch']:.0f}", same)
    draw_judged(groups, "epoch", args.out / "longer.png")


def steps(args):
    """Base and tuned: reward against the number of steps and against the time that they take."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for colour, (method, runs) in zip(COLOURS, compared(args).items()):
        for i, run in enumerate(runs):
            print(f"\n{run}")
            rows = [row for row in evaluate(run, pictures=args.pictures) if row["prompts"] == "training"]
            for weights, style in (("base", "--"), ("tuned", "-")):
                line = [row for row in rows if row["weights"] == weights]
                label = f"{method}, {weights}" if i == 0 else None
                for axis, x in zip(axes, ("steps", "seconds")):
                    x, y = [row[x] for row in line], [row["reward"] for row in line]
                    axis.plot(x, y, style, marker="o", color=colour, label=label)
    axes[0].set(xlabel="evaluations of the network for one picture", ylabel="reward: compress", xscale="log")
    axes[1].set(xlabel="seconds for one picture", xscale="log")
    axes[1].tick_params(axis="x", which="minor", labelbottom=False)
    axes[0].legend(frameon=False)
    save(figure, args.out / "steps.png")


def unseen(args):
    """Base and tuned: the animals that were trained on, and others. A table only."""
    methods, sets = compared(args), ("animals", "other-animals")
    show("")
    for method, runs in methods.items():
        found = {}
        for run in runs:
            cfg, model = open_run(run)
            for weights, name in itertools.product(("base", "tuned"), sets):
                if (weights, name) == ("tuned", sets[0]):
                    load_lora(model, run)
                found.setdefault((weights, name), []).append(judge(model, cfg, get_prompts(name)))
        for (weights, name), rows in found.items():
            show(f"{method}, {weights}, {name}", rows)


WORDS = {"horizon": horizon, "steps": steps, "unseen": unseen, "longer": longer}


def main(argv=None):
    p = Parser("ablate", __doc__)
    p.add_argument("word", choices=list(WORDS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, a thread each")
    p.add_argument("--out", type=Path, default=Path("runs/ablate"), help="figures and runs")
    p.add_argument("--compare", type=Path, default=Path("runs/compare"), help="runs of bench/compare.py")
    p.add_argument("--pictures", type=int, default=64, help="steps: for each row of the table")
    p.add_argument("--every", type=int, default=12, help="longer: epochs between rows")

    def work(args):
        rlcm.require(args.every > 0 and args.jobs > 0, "--every and --jobs: at least 1")
        args.out.mkdir(parents=True, exist_ok=True)
        WORDS[args.word](args)

    return p.run(work, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
