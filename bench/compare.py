"""The RLCM paper's comparison on the embedded model: its methods on a reward, over several seeds.

    python bench/compare.py                                   # compress; rlcm, ddpo, score; seeds 0 1 2
    python bench/compare.py --rewards compress incompress --methods rlcm ddpo --seeds 0 1
    python bench/compare.py --jobs 2 --epochs 20              # two runs at a time; other flags go to rlcm.py

Runs are written to runs/compare/REWARD-METHOD-SEED. A stopped run is resumed, and so is a finished one when
--epochs asks for more; a run with other settings is refused. Every --save-every epochs a run draws 200 fixed
captions from fixed noise, as a plain pipeline does, and adds a row to its judged.csv. This is not
counted in its seconds.

reward      mean over the 200 images
accuracy    share of them whose nearest training image (pixel L2) has the same caption: how recognisable they
            still are, since degrading images can raise a reward
retrieval   share of them whose own caption tiny/clip ranks first among all
gain        reward of the last three epochs minus that of the first three, in standard deviations of the first
            epoch's rewards, from metrics.csv
IQM         interquartile mean and its 95 % interval by bootstrap, stratified by reward (rliable, arXiv
            2108.13264): a quarter of the runs, rounded down, is dropped at each end, so none of three
seconds     of training so far; with --jobs 2 on one core
images      rewarded so far
passes      of the network so far: a forward pass of 32 rows is one; an image with classifier-free guidance
            has two rows; a backward pass counts as two

The table shows a run's beginning and end, the point where its accuracy has fallen to 0.85, which compares
rewards at equal accuracy, and the point where its reward reaches --target. Between rows of judged.csv it
interpolates. Cells hold the mean and, in brackets, each seed. The figure shows bench/plot.py's curves.
"""
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import rlcm
from bench.evaluate import write_rows
from bench.plot import curves, read_metrics, read_rows
from bench.sample import Parser
from rewards import get_reward
from tiny import make_tiny

TARGETS = {"compress": -2.25}  # a reward that most runs reach
ACCURACY = 0.85
MEANS = "reward", "accuracy", "retrieval"
COSTS = "seconds", "images", "passes"
RECOGNISED = "reward", "retrieval", "passes"


# ---- One run, judged along the way
def judge(model, cfg):
    """Reward, accuracy and retrieval of the 200 fixed captions."""
    train, labels = make_tiny.training_pictures()
    captions = make_tiny.fixed_captions(labels)
    images = rlcm.generate(model, cfg, captions)
    r = get_reward(cfg.reward, cfg.model)(images, captions, cfg.micro_batch)
    images = images.cpu()
    return {
        "reward": r.mean().item(),
        "accuracy": make_tiny.nearest_accuracy(images, captions, train, labels),
        "retrieval": make_tiny.retrieval(images, captions, labels),
    }


def train_judged(cfg):
    """Train or resume a run. Returns a line about it. Raises BadInput."""
    path = Path(cfg.out) / "judged.csv"

    # It is judged before its checkpoint is saved, so a resumed run has all rows until then.
    def on_epoch(epoch, model, row):
        if epoch % cfg.save_every and epoch < cfg.epochs:
            return
        rows = []
        if epoch:
            rows = [earlier for earlier in read_rows(path) if earlier["epoch"] < epoch]
        actions = len(model.schedule(cfg.steps).actions)
        forwards = cfg.steps + actions * (4 if cfg.kl else 3)
        images = epoch * cfg.batch_size
        new = {"epoch": epoch, "seconds": row.get("seconds", 0), "images": images}
        new["passes"] = images * (1 + model.guided) / 32 * forwards
        write_rows([*rows, new | judge(model, cfg)], path)

    rlcm.quiet()
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        rlcm.train(cfg, path.exists(), on_epoch)
    _, seconds, reward, _ = read_metrics(cfg.out)
    return f"{cfg.out}: reward {reward[0]:.3f} -> {reward[-1]:.3f}, {seconds[-1]:.0f} s"


# ---- Many runs
def settings(out, flags):
    """The settings of a run on the embedded model. Raises BadInput."""
    cfg, resume = rlcm.parse(["--model", "tiny", "--out", str(out), *map(str, flags)])
    rlcm.require(not resume and cfg.model == "tiny", "--resume and --model are not for bench/: it uses tiny")
    return cfg


def finished(cfg):
    """Is the run complete? Raises BadInput if it has other settings or stopped too early to be resumed."""
    out = Path(cfg.out)
    if not any(out.glob("*")):
        return False
    early = f"{out} stopped before its first checkpoint: remove it to start again"
    rlcm.require((out / "checkpoint.pt").exists() and (out / "judged.csv").exists(), early)
    epochs = len(read_rows(out / "metrics.csv"))
    old = asdict(rlcm.read_config(out)) | {"out": cfg.out, "epochs": max(epochs, cfg.epochs)}
    new = asdict(cfg)
    other = [f"{name} {old[name]}, not {new[name]}" for name in new if old[name] != new[name]]
    rlcm.require(not other, f"{out} has {'; '.join(other)}: remove it, or give another --out")
    return epochs == cfg.epochs


def add_flags(p, out):
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; if more than one, each on one core")
    p.add_argument("--out", type=Path, default=Path(out), help=f"folder of the runs; default {out}")


def train_all(args, parts):
    """Train {name: flags of rlcm.py} with every seed. Returns {name: folders of its runs}."""
    missing = []
    groups = {}
    for name, flags in parts.items():
        groups[name] = [args.out / f"{name}-{seed}" for seed in args.seeds]
        for out, seed in zip(groups[name], args.seeds):
            cfg = settings(out, [*flags, "--seed", seed, *args.flags])
            if not finished(cfg):
                missing.append(cfg)

    # Each of --jobs processes trains one run after another.
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with rlcm.explained(f"--jobs {args.jobs}: a run failed"):
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            for line in pool.map(train_judged, missing):
                print(line, flush=True)
    return groups


# ---- The table
def crossing(rows, name, value):
    """The row where a column first passes a value, by linear interpolation; nan if it never does."""
    for a, b in zip(rows, rows[1:]):
        if min(a[name], b[name]) <= value <= max(a[name], b[name]) and a[name] != b[name]:
            share = (value - a[name]) / (b[name] - a[name])
            return {key: a[key] + share * (b[key] - a[key]) for key in b}
    return dict.fromkeys(rows[-1], np.nan)


def gain(run):
    _, _, reward, std = read_metrics(run)
    return (reward[-3:].mean() - reward[:3].mean()) / std[0]


def iqm(tasks):
    """Interquartile mean over all runs and its interval, as text; tasks: a list of gains for each reward."""
    generator = np.random.default_rng(0)

    def mean(sample):  # (..., runs)
        cut = sample.shape[-1] // 4
        return np.sort(sample)[..., cut : sample.shape[-1] - cut].mean(-1)

    again = [generator.choice(gains, (2000, len(gains))) for gains in tasks]
    low, high = np.percentile(mean(np.concatenate(again, 1)), [2.5, 97.5])
    return f"{mean(np.concatenate(tasks)):.2f} [{low:.2f}, {high:.2f}]"


def cell(values, digits=3):
    """Mean and, in brackets, each seed; - for what was not reached."""
    mean, *each = [f"{value:.{digits}f}".replace("nan", "-") for value in (np.mean(values), *values)]
    return f"{mean} ({' '.join(each)})" if len(each) > 1 else mean


def show(title, cells):
    print(f"{title:44}" + "".join(f"{text:32}" for text in cells), flush=True)


def table(groups, target=None):
    """groups: {name: folders of its runs}. Print a column for each. Returns a list of gains for each."""
    judged = [[read_rows(run / "judged.csv") for run in runs] for runs in groups.values()]
    gains = [[gain(run) for run in runs] for runs in groups.values()]
    moments = [
        ("base model", MEANS, lambda rows: rows[0]),
        ("at the end", MEANS + COSTS, lambda rows: rows[-1]),
        (f"at accuracy {ACCURACY}", RECOGNISED, lambda rows: crossing(rows, "accuracy", ACCURACY)),
    ]
    if target is not None:
        moments.append((f"to a reward of {target}", COSTS, lambda rows: crossing(rows, "reward", target)))

    show("", groups)
    for moment, names, at in moments:
        for name in names:
            digits = 3 if name in MEANS else 0
            cells = [cell([at(rows)[name] for rows in runs], digits) for runs in judged]
            show(f"{moment}: {name}", cells)
    show("gain", [cell(values, 2) for values in gains])
    show("IQM of gain", [iqm([values]) for values in gains])
    return gains


def compare(args):
    """Train the runs, then print a table and draw a figure for each reward."""
    parts = {}
    folder = {reward: re.sub(r"[^a-zA-Z0-9]+", "-", reward) for reward in args.rewards}
    for reward, method in itertools.product(args.rewards, args.methods):
        parts[f"{folder[reward]}-{method}"] = ["--reward", reward, "--method", method]
    runs = train_all(args, parts)

    gains = []
    for reward in args.rewards:
        print(f"\n{reward}, seeds {' '.join(map(str, args.seeds))}")
        groups = {method: runs[f"{folder[reward]}-{method}"] for method in args.methods}
        target = TARGETS.get(reward) if args.target is None else args.target
        gains.append(table(groups, target))
        path = args.out / f"{folder[reward]}.png"
        curves(sum(groups.values(), []), path)
        print(f"wrote {path}")
    for method, tasks in zip(args.methods, zip(*gains)):
        if len(tasks) > 1:
            print(f"{method}: IQM of gain over all rewards {iqm(tasks)}")


def main(argv=None):
    p = Parser("compare", __doc__)
    p.add_argument("--rewards", nargs="+", default=["compress"], metavar="REWARD")
    p.add_argument("--methods", nargs="+", default=list(rlcm.METHODS), choices=rlcm.METHODS)
    p.add_argument("--target", type=float, metavar="REWARD", help="default: -2.25 for compress, else none")
    add_flags(p, "runs/compare")
    return p.run(compare, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
