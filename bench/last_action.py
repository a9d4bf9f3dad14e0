"""Ablation of RLCM's last action: H evaluations, H - 1 of them followed by noise. What about the last one?

    python bench/last_action.py                                    # seeds 0 1 2, 20 epochs without KL
    python bench/last_action.py --reward clip --variants dropped official --jobs 2

dropped     --last-noise 0 of rlcm.py: the last evaluation adds no noise and is no action
official    as in the official code: its result is noised once more, to its own level, which is scored as an
            action and which the picture never sees
noise S     noise of std S on the last clean latent is an action more, and the picture shows it; the program's
            --last-noise S makes it the only one

Each is the program with another entry in METHODS or with wrapped functions, in a process of its own; a run
that has its LoRA is not run again. Table: mean reward of the last three epochs for each seed, their mean,
seconds an epoch.
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm


def official():
    """One action more; what is decoded is the last clean latent, before its noise."""
    clean, decode = [], rlcm.decode

    def schedule(*args):
        s = rlcm.rlcm_schedule(*args)
        s.ab_next = torch.cat([s.ab[1:], s.ab[-1:]])
        s.std, s.actions = (1 - s.ab_next).sqrt(), torch.arange(len(s.std))
        return s

    def policy(eps, x, k, c, s):
        mean, std = rlcm.rlcm_policy(eps, x, k, c, s)
        clean[:] = [mean.detach() / rlcm.at(s.ab_next, k).sqrt()]
        return mean, std

    rlcm.METHODS["rlcm"] = schedule, policy
    rlcm.decode = lambda pipe, x: decode(pipe, clean[0])  # right after the rollout


def noisy(std):
    def schedule(*args):
        s = rlcm.rlcm_schedule(*args)
        s.std[-1], s.actions = std, torch.arange(len(s.std))
        return s

    rlcm.METHODS["rlcm"] = schedule, rlcm.rlcm_policy


def work(variant, arguments):
    """In a process of its own: a run with that last action."""
    if variant == "official":
        official()
    elif variant.startswith("noise"):
        noisy(float(variant.split()[1]))
    sys.exit(rlcm.main(arguments))


def run(variant, seed, args):
    """-> mean reward of the last three epochs, seconds an epoch."""
    out = args.out / f"{variant.replace(' ', '-')}-{seed}"
    if not (out / "pytorch_lora_weights.safetensors").exists():
        settings = dict(reward=args.reward, epochs=args.epochs, kl=args.kl, seed=seed, out=out)
        settings |= dict(model="tiny", last_noise=0, min_likeness=0, save_every=args.epochs)
        settings |= dict(lora_rank=4, lora_alpha=4)  # the default when docs/results.md was written
        flags = [str(v) for name, value in settings.items() for v in (f"--{name.replace('_', '-')}", value)]
        env = os.environ | ({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})
        command = [sys.executable, __file__, "--work", variant, *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{out}: {done.stderr.splitlines()[-1]}")
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    r = [float(row["reward_mean"]) for row in rows[-3:]]
    return sum(r) / len(r), float(rows[-1]["seconds"]) / len(rows)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = "dropped", "official", "noise"
    p.add_argument("--variants", nargs="+", default=names, choices=names)
    p.add_argument("--noise", nargs="+", type=float, default=[0.03, 0.1], help="S of the variant noise")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--kl", type=float, default=0.0)
    p.add_argument("--reward", default="compress")
    p.add_argument("--out", type=Path, help="default runs/last-action-REWARD")
    p.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; with more than one, each has one thread"
    )
    p.add_argument("--work", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        work(args.work[0], args.work[1:])
    args.out = args.out or Path(f"runs/last-action-{args.reward}")
    variants = [v for v in args.variants if v != "noise"]
    if "noise" in args.variants:
        variants += [f"noise {std}" for std in args.noise]
    print(f"{'last action':14}" + "".join(f"seed {seed:<6}" for seed in args.seeds), end="")
    print(f"{'mean':>8}{'seconds an epoch':>20}", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {(v, seed): pool.submit(run, v, seed, args) for seed in args.seeds for v in variants}
        for v in variants:
            r, seconds = zip(*(jobs[v, seed].result() for seed in args.seeds))
            print(f"{v:14}" + "".join(f"{value:<11.3f}" for value in r), end="")
            print(f"{sum(r) / len(r):>8.3f}{sum(seconds) / len(r):>20.2f}", flush=True)


if __name__ == "__main__":
    main()
