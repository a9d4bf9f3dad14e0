"""What does an epoch cost beside the bare network?

    python bench/efficiency.py                                # rlcm and ddpo, default batch, embedded model
    python bench/efficiency.py --batch-sizes 8 16 32 64       # is it flat?
    python bench/efficiency.py --methods rlcm score --epochs 20

A run of the program; the bare loop follows each of its epochs, so that the machine's noise hits both.

epoch        seconds of an epoch inside `rlcm.train`, all five numbered steps; median (least to most)
bare         seconds of the same passes of the same network on fixed inputs and nothing else: the rollout's
             forwards, the pretrained model's where the KL is charged, the VAE's decodes, forwards and
             backwards of the update, optimizer steps; same batch, micro-batch, dtype and device
efficiency   bare / epoch: median of the ratios of such pairs; last line: the lowest one

Second line, from another run with clocks in it: seconds of the parts of an epoch. On a GPU a clock waits for
the device, so the parts add up to more than an epoch without clocks.

rollout, decode, path_kl, update    the functions of these names
reward       what is left of `collect`: waiting for the reward, all of it on a CPU
rest         of the epoch: prompts and noise, advantages, metrics
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_epoch(run):
    """A function that does the passes of an epoch of `run` on fixed inputs; the run's weights stay."""
    cfg, model, m = run.cfg, run.model, run.micro_batch
    unet, vae = model.pipe.unet, model.pipe.vae
    dim, dtype = unet.config.time_cond_proj_dim, vae.dtype
    rows = 2 * m if not dim and cfg.guidance > 1 else m  # classifier-free guidance in one pass
    x = torch.randn(rows, *model.shape, device=run.device, dtype=dtype)
    t, c = torch.full((rows,), 500, device=run.device), run.embedding[:1].expand(rows, -1, -1)
    w = torch.zeros(rows, dim, device=run.device, dtype=dtype) if dim else None
    H, actions = len(run.s.std), len(run.s.actions)
    decodes = 2 if cfg.last_noise else 1  # the mirror image's picture too
    optimizer = torch.optim.Adam(model.trained.values(), 0.0)

    def network():
        return unet(x, t, encoder_hidden_states=c, timestep_cond=w).sample

    def epoch():
        with torch.no_grad():
            for _ in range(cfg.batch_size // m):
                for _ in range(H):
                    network()
                for _ in range(decodes):
                    vae.decode(x[:m])
            if cfg.kl:
                with rlcm.pretrained(model):
                    for _ in range(actions * cfg.batch_size // m):
                        network()
        for _ in range(cfg.updates):
            for _ in range(actions * cfg.batch_size // cfg.updates // m):
                network().float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def pairs(cfg, n):
    """Train with the bare loop after each epoch -> seconds of n epochs, seconds of n bare loops, micro-batch.

    The first epoch warms up, the last one saves pictures and weights: both are left out.
    """
    clock, seen, started, recorded = [], SimpleNamespace(), rlcm.start, rlcm.record

    def start(*args):
        seen.run = started(*args)
        seen.bare = bare_epoch(seen.run)
        return seen.run

    def record(*args, **kwargs):  # the last thing an epoch does
        over = recorded(*args, **kwargs)
        clock.append(now())
        seen.bare()
        clock.append(now())
        return over

    with mock.patch.multiple(rlcm, start=start, record=record):
        rlcm.train(replace(cfg, epochs=n + 2))
    seconds = [b - a for a, b in zip(clock[1:], clock[2:])][: 2 * n]
    return seconds[0::2], seconds[1::2], seen.run.micro_batch


def breakdown(cfg, n=3):
    """Seconds of the parts of an epoch, mean of n: a dict."""
    spent, result, clock = Counter(), {}, []
    started, recorded = rlcm.start, rlcm.record

    def timed(function, part):
        def wrapper(*args, **kwargs):
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += now() - began

        return wrapper

    def start(*args):
        run = started(*args)
        spent.clear()  # of the first sample grid
        clock.append(now())
        return run

    def record(run, epoch, *args, **kwargs):
        if epoch == n:  # before the last sample grid
            inside = spent["rollout"] + spent["decode"] + spent["path_kl"]
            spent["reward"] = spent.pop("collect") - inside
            spent["rest"] = now() - clock[0] - sum(spent.values())
            result.update({part: seconds / n for part, seconds in spent.items()})
        return recorded(run, epoch, *args, **kwargs)

    names = "collect", "rollout", "decode", "path_kl", "update"
    clocks = {name: timed(getattr(rlcm, name), name) for name in names}
    with mock.patch.multiple(rlcm, **clocks, start=start, record=record):
        rlcm.train(replace(cfg, epochs=n))
    return result


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--methods", nargs="+", default=["rlcm", "ddpo"], choices=list(rlcm.METHODS))
    p.add_argument("--batch-sizes", nargs="+", type=int, default=[None], help="default: the preset's")
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--model", default="tiny")
    args = p.parse_args()
    rlcm.quiet()
    ratios = []
    for method in args.methods:
        for size in args.batch_sizes:
            given = {"min_likeness": 0} | ({"batch_size": size} if size else {})
            with tempfile.TemporaryDirectory() as folder, mock.patch.object(rlcm, "say"):
                cfg = rlcm.configure(model=args.model, method=method, save_every=10**6, **given)
                ours, bare, m = pairs(replace(cfg, out=f"{folder}/pairs"), args.epochs)
                parts = breakdown(replace(cfg, out=f"{folder}/parts"))
            ratios.append(statistics.median(b / a for a, b in zip(ours, bare)))
            numbers = [f"{statistics.median(v):.2f} s ({min(v):.2f} to {max(v):.2f})" for v in (ours, bare)]
            print(f"{method}, {cfg.batch_size} pictures, micro-batch {m}, {cfg.steps} steps: ", end="")
            print(f"epoch {numbers[0]}, bare {numbers[1]}, efficiency {ratios[-1]:.2f}", flush=True)
            print("    " + "   ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items()), flush=True)
    print(f"efficiency {min(ratios):.2f}")


if __name__ == "__main__":
    main()
