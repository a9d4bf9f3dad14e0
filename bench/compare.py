"""The RLCM paper's comparison on the embedded model: its methods on a reward, over several seeds.

    python bench/compare.py                                   # compress; rlcm, ddpo, score; seeds 0 1 2
    python bench/compare.py --rewards compress incompress --methods rlcm ddpo --seeds 0 1
    python bench/compare.py --jobs 2 --epochs 20              # two runs at a time; other flags go to rlcm.py

Runs land in runs/compare/REWARD-METHOD-SEED. One that was stopped goes on, and so does a finished one when
--epochs asks for more; one that was made with other settings is refused. Every --save-every epochs a run
draws 200 fixed captions from fixed noise, as a plain pipeline does, and adds a row to its judged.csv. That
time is not counted.

reward      mean over the 200 pictures
accuracy    share of them whose nearest training picture (pixel L2) has the same caption: how recognisable
            they still are, since spoiling pictures can raise a reward
retrieval   share whose caption is the nearest of all to tiny/clip
gain        reward of the last three epochs less that of the first three, in standard deviations of the first
            epoch's rewards, from metrics.csv
IQM         interquartile mean and its 95 % interval by bootstrap, stratified by reward (rliable, arXiv
            2108.13264): a quarter of the runs is dropped at each end, rounded down; of three it is their mean
seconds     of training until then; with --jobs 2 those of one core
pictures    that were scored until then
passes      of the network until then: a forward pass of 32 rows is one, classifier-free guidance has two rows
            for a picture, a backward pass counts two

Three tables in one: at the end of the runs; where the accuracy has come down to 0.85, which compares rewards
at equal recognition; where the reward has come to --target. Between rows of judged.csv they interpolate.
Cells hold the mean and, in brackets, each seed. The figure has the curves, the band is one std of the seeds.
"""
import functools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import rlcm
from bench.evaluate import measure, write_rows
from bench.plot import curves, read_metrics, read_rows
from bench.sample import Parser
from tiny import make_tiny

TARGETS = {"compress": -2.25}  # a reward that most runs reach
ACCURACY = 0.85


# ---- one run, which is judged on its way
@functools.cache
def training_data():
    """The embedded model's training pictures, their captions, and the 200 fixed ones."""
    pictures, labels = make_tiny.training_pictures()
    return pictures, labels, make_tiny.fixed_captions(labels)


def judge(model, cfg, captions=None):
    """Draw pictures of captions, by default the 200 fixed ones -> reward, accuracy, retrieval."""
    train, labels, fixed = training_data()
    captions = captions or fixed
    images, found = measure(model, cfg, captions)
    images = images.cpu()
    return {
        "reward": found["reward"],
        "accuracy": make_tiny.nearest_accuracy(images, captions, train, labels),
        "retrieval": make_tiny.retrieval(images, captions, labels),
    }


def passes(cfg, actions):
    """Passes of the network in an epoch."""
    rows = cfg.batch_size * (2 if cfg.method != "rlcm" and cfg.guidance > 1 else 1)
    return rows / 32 * (cfg.steps + len(actions) * (4 if cfg.kl else 3))


def train_judged(cfg):
    """Train, or go on, and write judged.csv: base model, every save_every epochs, last epoch."""
    optimize, record, path = rlcm.optimize, rlcm.record, Path(cfg.out) / "judged.csv"

    def look(run, epoch):
        began = time.time()
        rows = [row for row in read_rows(path) if row["epoch"] < epoch] if epoch else []
        row = {"epoch": epoch, "seconds": began - run.began, "pictures": epoch * cfg.batch_size}
        row["passes"] = epoch * passes(cfg, run.s.actions)
        write_rows([*rows, row | judge(run.model, cfg)], path)
        run.began += time.time() - began

    def optimize_judged(run):
        if not run.rows:
            look(run, 0)
        optimize(run)

    def record_judged(run, epoch, *log):
        if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
            look(run, epoch)  # before the checkpoint: what that vouches for is there
        record(run, epoch, *log)

    rlcm.optimize, rlcm.record = optimize_judged, record_judged
    try:
        rlcm.train(cfg, resume=path.exists())
    finally:
        rlcm.optimize, rlcm.record = optimize, record


# ---- many runs
def settings(out, flags):
    """The config of a run on the embedded model. Raises BadInput."""
    cfg, resume = rlcm.parse(["--model", "tiny", "--out", str(out), *map(str, flags)])
    rlcm.require(not resume and cfg.model == "tiny", "--resume and --model are not for bench/: it uses tiny")
    rlcm.check(cfg)
    return cfg


def finished(out, flags):
    """Is the run complete? Raises BadInput where it has other settings, or died too early to go on."""
    cfg, out = settings(out, flags), Path(out)
    if not any(out.glob("*")):
        return False
    early = f"{out} was stopped before its first checkpoint: remove it, it will be made anew"
    rlcm.require((out / "checkpoint.pt").exists() and (out / "judged.csv").exists(), early)
    old, new = asdict(rlcm.read_config(out)), asdict(cfg)
    other = [name for name in new if old[name] != new[name] and name not in ("out", "epochs")]
    other += ["epochs"] if old["epochs"] > new["epochs"] else []
    other = [f"{name} {old[name]}, not {new[name]}" for name in other]
    message = f"{out} has other settings ({'; '.join(other)}): remove it, or give another --out"
    rlcm.require(not other, message)
    return len(read_rows(out / "metrics.csv")) == cfg.epochs


def train_all(runs, jobs=1):
    """runs: {folder: flags of rlcm.py}. Train those that are not finished, `jobs` at a time."""
    missing = {out: flags for out, flags in runs.items() if not finished(out, flags)}
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})

    def train(out):
        command = [sys.executable, __file__, "--one", out, *missing[out]]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1] if done.returncode > 0 else "killed"
        rlcm.require(done.returncode == 0, f"{out}: {last}")
        said = [line for line in done.stdout.splitlines() if line.startswith("reward ")]
        print(f"{out}: {said[-1]}", flush=True)

    pool = ThreadPoolExecutor(jobs)
    try:
        for job in [pool.submit(train, out) for out in missing]:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- the table
def crossing(rows, name, value):
    """The row where a column first passes a value, by linear interpolation; nan where it does not."""
    for a, b in zip(rows, rows[1:]):
        if min(a[name], b[name]) <= value <= max(a[name], b[name]) and a[name] != b[name]:
            share = (value - a[name]) / (b[name] - a[name])
            return {key: a[key] + share * (b[key] - a[key]) for key in b}
    return dict.fromkeys(rows[-1], np.nan)


def gain(run):
    _, _, reward, std = read_metrics(run)
    return (reward[-3:].mean() - reward[:3].mean()) / std[0]


def iqm(tasks, draws=2000):
    """Interquartile mean over all runs and its interval, as text; one list of runs for each task."""
    g, tasks = np.random.default_rng(0), [np.array(values) for values in tasks]

    def mean(sample):  # (draws, runs)
        cut = sample.shape[1] // 4
        return np.sort(sample)[:, cut : sample.shape[1] - cut].mean(1)

    again = [values[g.integers(len(values), size=(draws, len(values)))] for values in tasks]  # by task
    low, high = np.percentile(mean(np.concatenate(again, 1)), [2.5, 97.5])
    return f"{mean(np.concatenate(tasks)[None])[0]:.2f} [{low:.2f}, {high:.2f}]"


def cell(values, digits):
    """Mean and, in brackets, each seed; - for what was not reached."""
    mean, *each = ["-" if np.isnan(v) else f"{v:.{digits}f}" for v in (np.mean(values), *values)]
    return f"{mean} ({' '.join(each)})" if len(each) > 1 else mean


def table(groups, target=None):
    """groups: {name: folders of its seeds}. Print a column for each group -> {name: gains}."""
    judged = {name: [read_rows(Path(run) / "judged.csv") for run in runs] for name, runs in groups.items()}
    gains = {name: [gain(run) for run in runs] for name, runs in groups.items()}
    lines = {"": list(groups)}  # title: a cell for each group

    def add(title, key, at, digits=3):
        lines[title] = [cell([at(rows)[key] for rows in members], digits) for members in judged.values()]

    for name in ("reward", "accuracy", "retrieval"):
        add(f"base model: {name}", name, lambda rows: rows[0])
    for name in ("reward", "accuracy", "retrieval"):
        add(f"at the end: {name}", name, lambda rows: rows[-1])
    for name in ("seconds", "pictures", "passes"):
        add(f"at the end: {name}", name, lambda rows: rows[-1], 0)
    shares = [[rows[-1]["accuracy"] / rows[0]["accuracy"] for rows in members] for members in judged.values()]
    lines["accuracy / base model's"] = [cell(values, 3) for values in shares]
    lines["gain"] = [cell(values, 2) for values in gains.values()]
    lines["IQM of gain"] = [iqm([values]) for values in gains.values()]
    for name, digits in (("reward", 3), ("retrieval", 3), ("passes", 0)):
        title = f"at accuracy {ACCURACY}: {name}"
        add(title, name, lambda rows: crossing(rows, "accuracy", ACCURACY), digits)
    for name in ("passes", "seconds") if target is not None else ():
        add(f"to a reward of {target}: {name}", name, lambda rows: crossing(rows, "reward", target), 0)

    width = 2 + max(len(text) for line in lines.values() for text in line)
    for title, line in lines.items():
        print(f"{title:32}" + "".join(f"{text:<{width}}" for text in line))
    return gains


def plain(reward):
    """compress:1,clip:0.5 -> compress-1-clip-0-5, for the name of a folder."""
    return "".join(c if c.isalnum() else "-" for c in reward)


def compare(args):
    def folder(reward, method, seed):
        return args.out / f"{plain(reward)}-{method}-{seed}"

    order = [(r, m, seed) for seed in args.seeds for m in args.methods for r in args.rewards]
    names = "--reward", "--method", "--seed"
    runs = {folder(*run): [*sum(zip(names, run), ()), *args.flags] for run in order}
    rlcm.require(args.jobs > 0, f"--jobs {args.jobs}: at least 1")
    train_all(runs, args.jobs)
    gains = []
    for reward in args.rewards:
        print(f"\n{reward}, seeds {' '.join(map(str, args.seeds))}")
        groups = {method: [folder(reward, method, seed) for seed in args.seeds] for method in args.methods}
        gains.append(table(groups, TARGETS.get(reward) if args.target is None else args.target))
        path = args.out / f"{plain(reward)}.png"
        curves(sum(groups.values(), []), path)
        print(f"wrote {path}")
    for method in args.methods if len(gains) > 1 else ():
        print(f"{method}: IQM of gain, all rewards {iqm([gain[method] for gain in gains])}")


def main(argv=None):
    p = Parser("compare", __doc__)
    p.add_argument("--rewards", nargs="+", default=["compress"], metavar="REWARD")
    p.add_argument("--methods", nargs="+", default=list(rlcm.METHODS), choices=list(rlcm.METHODS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, a thread each")
    p.add_argument("--target", type=float, metavar="REWARD", help="default: -2.25 for compress, else none")
    p.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    p.add_argument("--one", metavar="RUN", help="only train this folder, with the flags of rlcm.py")

    def work(args):
        if args.one:
            train_judged(settings(args.one, args.flags))
        else:
            compare(args)

    return p.run(work, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
