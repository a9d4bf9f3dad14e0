"""The paper's comparison on the embedded model: every method on every reward, several seeds, one table and one figure a reward.

    python bench/compare.py                                        # compress, three methods, seeds 0 1 2, default settings
    python bench/compare.py --rewards incompress --methods rlcm ddpo
    python bench/compare.py --jobs 2                               # two runs at a time, one thread each: seconds are then one core's

Runs land in runs/compare/REWARD-METHOD-SEED; one that is finished is not run again, one that was stopped goes on. The table, mean and
standard deviation over seeds:
first, last   mean reward of the first and of the last three epochs
gain          last - first, in standard deviations of the base model's reward (that of all first epochs of the method)
seconds       of the whole run; pictures: reward queries of it
to DDPO       seconds and pictures until the mean of three epochs reaches the mean `last` of the ddpo runs
"""
import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np

import rlcm
from bench.figures import curves


def run(reward, method, seed, out, threads, extra):
    """Start or go on with a run, unless it is finished."""
    if (out / "config.json").exists():
        done = sum(1 for _ in open(out / "metrics.csv")) - 1 if (out / "metrics.csv").exists() else 0
        if done >= rlcm.read_config(out).epochs and (out / "checkpoint" / "state.pt").exists():
            return
        arguments = ["--resume", out]
    else:
        arguments = ["--model", "tiny", "--reward", reward, "--method", method, "--seed", seed, "--out", out, *extra]
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run([sys.executable, ROOT / "rlcm.py", *map(str, arguments)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{out}: {done.stderr.splitlines()[-1]}")
    print(done.stdout.splitlines()[-2], flush=True)


def smooth(run):
    """Columns of metrics.csv: seconds, pictures, and reward as the mean of three epochs, (3, epochs - 2); and the first epoch's reward std."""
    rows = list(csv.DictReader(open(run / "metrics.csv")))
    seconds, pictures, reward, std = (np.array([float(row[name]) for row in rows]) for name in ("seconds", "reward_queries", "reward_mean", "reward_std"))
    return np.array([seconds[2:], pictures[2:], np.convolve(reward, np.ones(3) / 3, "valid")]), std[0]


def table(reward, methods, seeds, out):
    text = lambda v, digits: f"{np.mean(v):.{digits}f} +- {np.std(v):.{digits}f}"
    runs = {m: [smooth(out / f"{reward}-{m}-{seed}") for seed in seeds] for m in methods}
    goal = np.mean([r[2, -1] for r, _ in runs["ddpo"]]) if "ddpo" in runs else None
    print(f"\n{reward}, seeds {' '.join(map(str, seeds))}\n{'':8}{'first':>16}{'last':>16}{'gain':>14}{'seconds':>14}{'pictures':>10}{'to DDPO: seconds':>22}{'pictures':>16}")
    for m, members in runs.items():
        std = np.mean([s for _, s in members])
        first, last, seconds = ([r[i, j] for r, _ in members] for i, j in ((2, 0), (2, -1), (0, -1)))
        line = f"{m:8}{text(first, 3):>16}{text(last, 3):>16}{text((np.array(last) - first) / std, 2):>14}{text(seconds, 0):>14}{members[0][0][1, -1]:>10.0f}"
        if goal is not None:
            reached = [r[:2, np.argmax(r[2] >= goal)] for r, _ in members if (r[2] >= goal).any()]
            line += f"{text([v[0] for v in reached], 0):>22}{text([v[1] for v in reached], 0):>16}" if reached else f"{'never':>22}{'':>16}"
            line += f"   ({len(reached)} of {len(members)} runs)"
        print(line)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rewards", nargs="+", default=["compress"])
    p.add_argument("--methods", nargs="+", default=list(rlcm.METHODS), choices=list(rlcm.METHODS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=Path("runs/compare"))
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, each has one thread")
    args, extra = p.parse_known_args()  # the rest goes to rlcm.py
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, reward, m, seed, args.out / f"{reward}-{m}-{seed}", 1 if args.jobs > 1 else None, extra)
                for seed in args.seeds for m in args.methods for reward in args.rewards]
        for job in jobs:
            job.result()
    for reward in args.rewards:
        table(reward, args.methods, args.seeds, args.out)
        curves([args.out / f"{reward}-{m}-{seed}" for m in args.methods for seed in args.seeds], args.out / f"{reward}.png")
        print(f"wrote {args.out}/{reward}.png")


if __name__ == "__main__":
    main()
