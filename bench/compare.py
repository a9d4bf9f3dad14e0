"""The methods compared at equal accuracy, each at several learning rates, on the embedded model.

    python bench/compare.py                                     # compress; rlcm, ddpo, score; seeds 0 1 2
    python bench/compare.py --rewards compress incompress --methods rlcm ddpo --seeds 0
    python bench/compare.py --rates 1.8e-3 --methods rlcm --seeds 5 6 7
    python bench/compare.py --methods ddpo --steps 50 --rates 8e-3 --seeds 0 --out runs/ddpo-50
    python bench/compare.py --defaults --jobs 2                 # the default settings, trained to their end

Degrading the images can raise a reward, so rewards are compared at an equal accuracy: the share of 200 images
of fixed captions, drawn from fixed noise as a plain pipeline draws them, whose nearest training image (pixel
L2) has their caption. A run ends when its accuracy has fallen to 0.85. It is judged after every second epoch
of rlcm and after every epoch of the others, so every 52 to 84 passes; between two judgements the table
interpolates linearly, and has rows for an accuracy of 0.9 and a retrieval of 0.75, too. Other flags go to
rlcm.py.

reward      mean over the 200 images
retrieval   share of them whose own caption tiny/clip ranks first among all
passes      of the network so far: a forward pass of 32 rows is one; an image with classifier-free guidance
            has two rows; a backward pass counts as two
seconds     of training so far; with --jobs 2 on one core
gain        with --defaults: reward of the last three epochs minus that of the first three, in standard
            deviations of the first epoch's rewards, from metrics.csv

Runs are written to OUT/REWARD-METHOD-RATE-SEED; a stopped run is resumed, and one with other settings is
refused. OUT/results.csv has these rows for every run, OUT/frontier.png a dot per run and a line per method
through the means of its rates. The best rate is marked. The rule was fixed before seeds 5 to 7 were run: of
the rates whose mean reward is within 0.02 of the method's best, the one with the fewest passes.
"""
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from matplotlib.figure import Figure

import rlcm
from bench.common import Parser, read_rows
from rewards import get_reward
from tiny import make_tiny

RATES = {"rlcm": [4.5e-4, 9e-4, 1.8e-3, 3.6e-3], "ddpo": [2e-3, 4e-3, 8e-3]}
RATES["score"] = RATES["ddpo"]
ACCURACY = 0.85
MARGIN = 0.02
MOMENTS = "accuracy 0.9", f"accuracy {ACCURACY}", "retrieval 0.75"
SETTINGS = "method", "lr", "steps", "guidance_scale", "batch_size", "kl", "seed"
COLUMNS = dict(accuracy=3, passes=0, images=0, seconds=0, reward=3, retrieval=3, gain=2)


class Fallen(Exception):
    """The accuracy of a run has fallen to ACCURACY."""


# ---- One run, judged along the way
def judge(epoch, model, cfg):
    """The images and passes so far, and reward, accuracy and retrieval of the 200 fixed captions."""
    actions = len(model.schedule(cfg.steps).actions)
    forwards = cfg.steps + actions * (4 if cfg.kl else 3)
    count = epoch * cfg.batch_size
    train, labels = make_tiny.training_pictures()
    captions = make_tiny.fixed_captions(labels)
    images = rlcm.generate(model, cfg, captions)
    r = get_reward(cfg.reward, cfg.model)(images, captions, cfg.micro_batch)
    images = images.cpu()
    return {
        "images": count,
        "passes": count * (1 + model.guided) / 32 * forwards,
        "reward": r.mean().item(),
        "accuracy": make_tiny.nearest_accuracy(images, captions, train, labels),
        "retrieval": make_tiny.retrieval(images, captions, labels),
    }


def train_judged(job):
    """Train or resume a run within the context variant(). Returns a line about it. Raises BadInput."""
    cfg, to_the_end, variant = job
    path = Path(cfg.out) / "judged.csv"

    # It is judged before its checkpoint is saved, so a resumed run has all rows until then.
    def on_epoch(epoch, model, row):
        if epoch % cfg.save_every and epoch < cfg.epochs:
            return
        rows = [earlier for earlier in read_rows(path) if earlier["epoch"] < epoch] if epoch else []
        rows.append({"epoch": epoch, "seconds": row.get("seconds", 0)} | judge(epoch, model, cfg))
        rlcm.write_rows(rows, path)
        if rows[-1]["accuracy"] <= ACCURACY and epoch > 1 and not to_the_end:  # epoch 1 has no checkpoint yet
            raise Fallen

    rlcm.quiet()
    silence = io.StringIO()
    with variant(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        with contextlib.suppress(Fallen):
            rlcm.train(cfg, (path.parent / "checkpoint.pt").exists(), on_epoch)
    last = read_rows(path)[-1]
    return f"{cfg.out}: {last['passes']:.0f} passes, reward {last['reward']:.3f}"


# ---- Many runs
def settings(out, flags):
    """The settings of a run on the embedded model. Raises BadInput."""
    cfg, resume = rlcm.parse(["--out", str(out), *map(str, flags)])
    rlcm.require(not resume and cfg.model == "tiny", "--resume and --model are not for bench/: it uses tiny")
    return cfg


def finished(cfg, to_the_end):
    """Is the run complete? Raises BadInput if it has other settings."""
    out = Path(cfg.out)
    if not (out / "checkpoint.pt").exists():
        return False
    same = replace(rlcm.read_config(out), out=cfg.out) == cfg
    rlcm.require(same, f"{out}/config.json has other settings: remove the run, or give another --out")
    last = read_rows(out / "judged.csv")[-1]
    return last["epoch"] == cfg.epochs or (last["accuracy"] <= ACCURACY and not to_the_end)


def add_flags(p, out):
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; if more than one, each on one core")
    p.add_argument("--out", type=Path, default=Path(out), help=f"folder of the runs; default {out}")


def train_all(args, parts, to_the_end=False, variants={}):
    """Train {name: flags of rlcm.py} with every seed. Returns {name: folders of its runs}."""
    missing = []
    groups = {}
    for name, flags in parts.items():
        groups[name] = [args.out / f"{name}-{seed}" for seed in args.seeds]
        for out, seed in zip(groups[name], args.seeds):
            cfg = settings(out, [*flags, "--seed", seed, *args.flags])
            if not finished(cfg, to_the_end):
                missing.append((cfg, to_the_end, variants.get(name, contextlib.nullcontext)))

    # Each of --jobs processes trains one run after another.
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(train_judged, missing):
            print(line, flush=True)
    return groups


# ---- The table
def crossing(rows, judge, value):
    """The row where accuracy or retrieval first falls to a value, interpolated; nan if it never does."""
    for a, b in zip(rows, rows[1:]):
        if a[judge] > value >= b[judge]:
            share = (value - a[judge]) / (b[judge] - a[judge])
            return {name: a[name] + share * (b[name] - a[name]) for name in b}
    return dict.fromkeys(rows[-1], np.nan)


def measured(run, moment):
    """A run's settings, and COLUMNS at a moment: "accuracy 0.85", or the end, which has a gain, too."""
    rows = read_rows(run / "judged.csv")
    if moment == "end":
        metrics = read_rows(run / "metrics.csv")
        rewards = [row["reward_mean"] for row in metrics]
        at = rows[-1] | {"gain": (np.mean(rewards[-3:]) - np.mean(rewards[:3])) / metrics[0]["reward_std"]}
    else:
        judge, value = moment.split()
        at = crossing(rows, judge, float(value))
    settings = asdict(rlcm.read_config(run))
    row = {"run": run.name, "task": settings["reward"]} | {name: settings[name] for name in SETTINGS}
    columns = {column: round(at[column], digits) for column, digits in COLUMNS.items() if column in at}
    return row | {"at": moment} | columns


def cell(values, digits):
    """Mean and, in brackets, each seed if they differ; - for what was not reached."""
    mean, *each = [f"{value:.{digits}f}".replace("nan", "-") for value in (np.mean(values), *values)]
    return f"{mean} ({' '.join(each)})" if len(set(each)) > 1 else mean


def report(args, groups, moments=MOMENTS):
    """groups: {name: folders of its runs}. Print a table, write OUT/results.csv, and return its rows."""
    rows = []
    for moment, (name, runs) in itertools.product(moments, groups.items()):
        found = [measured(run, moment) for run in runs]
        columns = [column for column in found[0] if column in COLUMNS]
        if not rows:
            print(f"{'':24}" + "".join(f"{column:30}" for column in columns))
        cells = [cell([row[column] for row in found], COLUMNS[column]) for column in columns]
        print(f"{name:24}" + "".join(f"{text:30}" for text in cells))
        rows += found
    rlcm.write_rows(rows, args.out / "results.csv")
    print(f"wrote {args.out}/results.csv")
    return rows


def best(means):
    """The rule of the docstring; means: {rate: (passes, reward)}."""
    highest = max(reward for _, reward in means.values())
    good = {rate: passes for rate, (passes, reward) in means.items() if reward >= highest - MARGIN}
    return min(good, key=good.get)


def frontier(rows, path):
    """Print each method's best rate, and draw reward by passes; rows: those at ACCURACY."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            means = {}
            for lr in dict.fromkeys(row["lr"] for row in own):
                points = [(row["passes"], row["reward"]) for row in own if row["lr"] == lr]
                means[lr] = tuple(np.mean(points, 0))
                axis.plot(*zip(*points), ".", color=f"C{number}", alpha=0.5)
            chosen = best(means)
            axis.plot(*zip(*means.values()), color=f"C{number}", label=method)
            axis.plot(*means[chosen], "o", color=f"C{number}")
            print(f"{task}, {method}: learning rate {chosen:g}")
        axis.set(xlabel="passes of the network", ylabel="reward", title=f"{task}, at accuracy {ACCURACY}")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def compare(args):
    """Train the runs, print a table and, unless they have the defaults, draw the frontiers."""
    parts = {}
    for reward, method in itertools.product(args.rewards, args.methods):
        name = f"{re.sub('[^a-zA-Z0-9]+', '-', reward)}-{method}"
        flags = ["--reward", reward, "--method", method]
        if args.defaults:
            parts[name] = flags
            continue
        every = 2 if method == "rlcm" else 1
        for lr in args.rates or RATES[method]:
            parts[f"{name}-{lr:g}"] = [*flags, "--lr", lr, "--save-every", every, "--epochs", 80]
    groups = train_all(args, parts, args.defaults)
    if args.defaults:
        report(args, groups, ["end"])
    else:
        rows = report(args, groups)
        frontier([row for row in rows if row["at"] == MOMENTS[1]], args.out / "frontier.png")


def main(argv=None):
    p = Parser("compare", __doc__)
    p.add_argument("--rewards", nargs="+", default=["compress"], metavar="REWARD")
    p.add_argument("--methods", nargs="+", default=list(rlcm.METHODS), choices=rlcm.METHODS)
    p.add_argument("--rates", nargs="+", type=float, metavar="RATE", help="default: four for each method")
    p.add_argument("--defaults", action="store_true", help="the default settings, to their end")
    add_flags(p, "runs/compare")
    return p.run(compare, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
