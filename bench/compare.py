"""The paper's comparison on the embedded model: every method on every reward, several seeds.

    python bench/compare.py                                  # compress, three methods, seeds 0 1 2
    python bench/compare.py --rewards incompress --methods rlcm ddpo
    python bench/compare.py --jobs 2                         # two runs at a time, one thread each
    python bench/compare.py --epochs 20                      # other flags go to rlcm.py

Runs land in runs/compare/REWARD-METHOD-SEED; one that is finished is not run again, one that was stopped goes
on. For each reward a figure (bench/plot.py) and a table, mean and standard deviation over the seeds:

first, last   mean reward of the first and of the last three epochs; as metrics.csv has it, of the pictures of
              training, on which rlcm has the noise of --last-noise (bench/evaluate.py draws without)
gain          last - first, in standard deviations of the base model's reward (those of the first epochs)
seconds       of the whole run; with --jobs 2 those of one core
pictures      reward queries of the whole run
to DDPO       seconds and pictures until the mean of three epochs reaches the mean `last` of the ddpo runs
IQM           interquartile mean over the seeds and its 95 % interval by stratified bootstrap, of gain and
              last, as in the RLCM paper's appendix (rliable, arXiv 2108.13264): a quarter of the runs is
              dropped at each end, rounded down; of three seeds it is their mean, of six that of four. With
              several rewards the last lines pool their gains.

The same reward can cost much or little recognition, and runs end at different rewards: bench/frontier.py
compares the methods at equal recognition, bench/recognise.py judges these runs.
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import rlcm
from bench.plot import curves, read_metrics

PROGRAM = Path(rlcm.__file__)


def run(reward, method, seed, out, jobs, extra):
    """Start a run or go on with it, unless it is finished."""
    if (out / "config.json").exists():
        rows = list(csv.DictReader(open(out / "metrics.csv"))) if (out / "metrics.csv").exists() else []
        cfg = rlcm.read_config(out)
        over = len(rows) >= cfg.epochs or rows and float(rows[-1]["likeness"] or 1) < cfg.min_likeness
        if over and (out / "checkpoint" / "state.pt").exists():
            return
        arguments = ["--resume", out]
    else:
        arguments = ["--model", "tiny", "--reward", reward, "--method", method, "--seed", seed, "--out", out]
        arguments += extra
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{out}: {done.stderr.splitlines()[-1]}")
    print(
        f"{out}: " + next(line for line in done.stdout.splitlines() if line.startswith("reward ")), flush=True
    )


def smooth(run):
    """Pictures, seconds and reward, the mean of three epochs: (3, epochs - 2); and the first epoch's std."""
    pictures, seconds, reward, std = read_metrics(run)
    return np.array([pictures[2:], seconds[2:], np.convolve(reward, np.ones(3) / 3, "valid")]), std[0]


def text(values, digits):
    return f"{np.mean(values):.{digits}f} +- {np.std(values):.{digits}f}"


def iqm(tasks, draws=2000):
    """Interquartile mean over all runs and its interval, as text; one array of runs for each task."""
    g = np.random.default_rng(0)

    def mean(sample):  # (draws, runs)
        cut = sample.shape[1] // 4
        return np.sort(sample)[:, cut : sample.shape[1] - cut].mean(1)

    again = [values[g.integers(len(values), size=(draws, len(values)))] for values in tasks]  # by task
    low, high = np.percentile(mean(np.concatenate(again, 1)), [2.5, 97.5])
    return f"{mean(np.concatenate(tasks)[None])[0]:.3f} ({low:.3f} to {high:.3f})"


def table(reward, methods, seeds, out):
    """Print the table of a reward -> {method: gains}."""
    runs = {method: [smooth(out / f"{reward}-{method}-{seed}") for seed in seeds] for method in methods}
    gains = {}
    print(f"\n{reward}, seeds {' '.join(map(str, seeds))}")
    print(f"{'':8}{'first':>16}{'last':>16}{'gain':>14}{'seconds':>14}{'pictures':>10}", end="")
    print(f"{'to DDPO: seconds':>22}{'pictures':>16}" if "ddpo" in runs else "")
    for method, members in runs.items():
        std = np.mean([std for _, std in members])
        first = np.array([columns[2, 0] for columns, _ in members])
        pictures, seconds, last = np.array([columns[:, -1] for columns, _ in members]).T
        gains[method] = (last - first) / std
        print(f"{method:8}{text(first, 3):>16}{text(last, 3):>16}{text(gains[method], 2):>14}", end="")
        print(f"{text(seconds, 0):>14}{pictures[0]:>10.0f}", end="")
        if "ddpo" not in runs:
            print()
            continue
        goal = np.mean([columns[2, -1] for columns, _ in runs["ddpo"]])
        reached = [columns[:2, columns[2] >= goal] for columns, _ in members]
        reached = [epochs[:, 0] for epochs in reached if epochs.size]  # the first that reaches it
        numbers = [text(values, 0) for values in np.array(reached).T] if reached else ["", "never"]
        print(f"{numbers[1]:>22}{numbers[0]:>16}   ({len(reached)} of {len(members)} runs)")
    for method, members in runs.items():
        last = np.array([columns[2, -1] for columns, _ in members])
        print(f"{method:8}IQM of gain {iqm([gains[method]])}, of last {iqm([last])}")
    return gains


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--rewards", nargs="+", default=["compress"])
    p.add_argument("--methods", nargs="+", default=list(rlcm.METHODS), choices=list(rlcm.METHODS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=Path("runs/compare"))
    p.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; with more than one, each has one thread"
    )
    args, extra = p.parse_known_args()

    def folder(*names):
        return args.out / "-".join(map(str, names))

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(run, reward, method, seed, folder(reward, method, seed), args.jobs, extra)
            for seed in args.seeds
            for method in args.methods
            for reward in args.rewards
        ]
        for job in jobs:
            job.result()
    gains = []
    for reward in args.rewards:
        gains.append(table(reward, args.methods, args.seeds, args.out))
        runs = [folder(reward, method, seed) for method in args.methods for seed in args.seeds]
        curves(runs, args.out / f"{reward}.png")
        print(f"wrote {args.out}/{reward}.png")
    for method in args.methods if len(gains) > 1 else ():
        print(f"{method:8}IQM of gain, all rewards {iqm([gain[method] for gain in gains])}")


if __name__ == "__main__":
    main()
