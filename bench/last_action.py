"""Ablation of RLCM's last action: H evaluations, H - 1 of them followed by noise. What about the last one?

    python bench/last_action.py                                    # seeds 0 1 2, 20 epochs without KL
    python bench/last_action.py --reward clip --variants dropped backprop --jobs 2

dropped    as rlcm.py has it: the last evaluation is deterministic and no action
official   as the official code has it: its result is noised to its own timestep once more and scored as an action; the picture never sees that
noise S    noise of std S on the last clean latent is the action, and the picture shows it: every evaluation is trained
backprop   dropped, and the gradient of the reward itself goes back through decoder and last evaluation: only for a reward that has one, clip

Each is the program with another entry in METHODS, or with another `update`. Table: mean reward of the last three epochs for each seed, seconds an epoch.
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
import torch

import rewards
import rlcm


def official(noise):
    last = {}  # of each network: what its last evaluation showed

    def schedule(*args):
        s = rlcm.rlcm_schedule(*args)
        s.ab_next = torch.cat([s.ab[1:], s.ab[-1:]])
        s.std = (1 - s.ab_next).sqrt()
        return s

    def policy(eps, x, k, c, s):
        mean, std = rlcm.rlcm_policy(eps, x, k, c, s)
        last[eps] = mean.detach() / rlcm.at(s.ab_next, k).sqrt()
        return mean, std

    return schedule, policy, lambda eps, x, k, c, s: last[eps]


def noisy(noise):
    def schedule(*args):
        s = rlcm.rlcm_schedule(*args)
        s.ab_next, s.std = torch.cat([s.ab_next, s.ab.new_ones(1)]), torch.cat([s.std, s.ab.new_full((1,), noise)])
        return s

    return schedule, rlcm.rlcm_policy, lambda eps, x, k, c, s: x


def backprop(noise):
    """grad E[r] = E[ sum_k A_k grad log pi ] + E[ grad r(decode(f_theta(x_T, t_T))) ]: the second term, in the units in which `update` has the first."""
    names, update, get_reward, embed = [], rlcm.update, rlcm.get_reward, rewards.clip_embed.__wrapped__  # __wrapped__: without no_grad

    def remembering(*args):
        fn = get_reward(*args)
        return lambda images, prompts: names.extend(prompts) or fn(images, prompts)

    def with_last(model, cfg, accelerator, optimizer, s, c, roll, advantage, scale, *rest):
        B, T, D, m = len(c), len(s.std), roll.x[0, 0].numel(), cfg.micro_batch
        prompts = names[-B:]  # the rollout was scored last
        for i in range(0, B, m):
            b = slice(i, i + m)
            x_0 = rlcm.rlcm_readout(model.eps, roll.x[T, b], torch.full((len(c[b]),), T), c[b], s)
            picture, prompt, _ = embed(model.decode.__wrapped__(x_0), prompts[b], rewards.TINY_CLIP, rewards.TINY_CLIP)
            r = 2.5 * (picture * prompt).sum(1).clamp(min=0)
            accelerator.backward(-(scale[b] * r).sum() / (B * T * D))
        return update(model, cfg, accelerator, optimizer, s, c, roll, advantage, scale, *rest)

    rlcm.update, rlcm.get_reward = with_last, remembering
    return rlcm.METHODS["rlcm"]


VARIANTS = {"dropped": lambda noise: rlcm.METHODS["rlcm"], "official": official, "noise": noisy, "backprop": backprop}


def work(variant, noise, arguments):
    """In a process of its own: a run with that last action."""
    rlcm.METHODS["rlcm"] = VARIANTS[variant](noise)
    sys.exit(rlcm.main(arguments))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--variants", nargs="+", default=["dropped", "official", "noise"], choices=list(VARIANTS))
    p.add_argument("--noise", nargs="+", type=float, default=[0.03, 0.1])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--epochs", default="20")
    p.add_argument("--kl", default="0")
    p.add_argument("--reward", default="compress")
    p.add_argument("--out", type=Path, help="default runs/last-action-REWARD")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, each has one thread")
    p.add_argument("--work", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.out = args.out or Path(f"runs/last-action-{args.reward}")
    if args.work:
        work(args.work[0], float(args.work[1]), args.work[2:])
    variants = [(v, n) for v in args.variants for n in (args.noise if v == "noise" else [0.0])]
    env = {**os.environ, **({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})}

    def run(variant, noise, seed):
        out = args.out / f"{variant}-{noise}-{seed}"
        if not (out / "pytorch_lora_weights.safetensors").exists():
            arguments = ["--model", "tiny", "--reward", args.reward, "--epochs", args.epochs, "--kl", args.kl, "--seed", seed, "--save-every", args.epochs, "--out", out]
            done = subprocess.run([sys.executable, __file__, "--work", variant, str(noise), *map(str, arguments)], env=env, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{out}: {done.stderr.splitlines()[-1]}")
        rows = list(csv.DictReader(open(out / "metrics.csv")))
        return sum(float(row["reward_mean"]) for row in rows[-3:]) / 3, float(rows[-1]["seconds"]) / len(rows)

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {(v, seed): pool.submit(run, *v, seed) for seed in args.seeds for v in variants}
        print(f"{'last action':14}" + "".join(f"seed {seed:<6}" for seed in args.seeds) + f"{'mean':>8}{'seconds an epoch':>20}")
        for v in variants:
            results = [jobs[v, seed].result() for seed in args.seeds]
            name = v[0] if v[0] != "noise" else f"noise {v[1]}"
            print(f"{name:14}" + "".join(f"{r:<11.3f}" for r, _ in results) + f"{sum(r for r, _ in results) / len(results):>8.3f}{sum(t for _, t in results) / len(results):>20.2f}", flush=True)


if __name__ == "__main__":
    main()
