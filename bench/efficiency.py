"""What an epoch costs beside the bare network: epoch wall-clock over minimal loops of the same U-Net and VAE passes, in one run.

    python bench/efficiency.py                                # rlcm and ddpo, default batch, embedded model
    python bench/efficiency.py --batch-sizes 8 16 32 64       # is it flat?
    python bench/efficiency.py --methods rlcm score --epochs 20

epoch       wall-clock of an epoch inside `rlcm.train`: prompts, noise, rollout, reward, advantages, update, metrics
bare        the same passes of the same network on fixed inputs and nothing else: forwards of the rollout, with and without the adapter,
            forwards and backwards of the update, VAE decodes, one optimizer step; same batch, micro-batch, dtype, device
efficiency  bare / epoch. After each epoch the bare loop runs once, so that the machine's noise hits both: median of the ratios of such pairs.

The breakdown comes from another, instrumented run: rollout without its decodes and rewards, update, decode, reward, logging, rest.
"""
import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from bench import figures


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pairs(cfg, out, bare, n):
    """A run of n + 1 epochs with the bare loop after each: seconds of the n epochs behind the first, and of their bare loops."""
    clock, save_metrics = [], rlcm.save_metrics

    def save_and_run_bare(*args):  # the last thing an epoch does
        save_metrics(*args)
        clock.append(time.perf_counter())
        bare()
        clock.append(time.perf_counter())

    rlcm.save_metrics = save_and_run_bare
    try:
        rlcm.train(rlcm.replace(cfg, out=str(out), epochs=n + 1))
    finally:
        rlcm.save_metrics = save_metrics
    seconds = [b - a for a, b in zip(clock[1:], clock[2:])]
    return seconds[0::2], seconds[1::2]


def bare_epoch(cfg, model, optimizer):
    """A function that does an epoch's passes of the network, and nothing else."""
    unet, vae, B = model.pipe.unet, model.pipe.vae, cfg.batch_size
    m = rlcm.micro_batch_of(cfg, B // cfg.updates)
    rows = 2 * m if model.eps.__name__ == "guided" else m  # classifier-free guidance in one pass
    device, dtype = model.nothing.device, model.nothing.dtype
    std = rlcm.METHODS[cfg.method][0](model.pipe.scheduler, cfg.steps, device).std
    T, actions = len(std), int((std > 0).sum())  # DDIM's last step has no noise, so no reference and no update
    x, c = torch.randn(rows, *model.shape, device=device, dtype=dtype), model.encode(["a cat"]).expand(rows, -1, -1)
    t, dim = torch.full((rows,), 500, device=device), unet.config.time_cond_proj_dim
    w = torch.zeros(rows, dim, device=device, dtype=dtype) if dim else None

    def network():
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            return unet(x, t, encoder_hidden_states=c, timestep_cond=w).sample

    def epoch():
        with torch.no_grad():
            for _ in range(B // m):
                for _ in range(T + (cfg.method == "rlcm")):
                    network()
                if cfg.kl:
                    unet.disable_adapters()
                    for _ in range(actions):
                        network()
                    unet.enable_adapters()
                vae.decode(x[:m])
        for _ in range(cfg.updates):
            for _ in range(actions * B // cfg.updates // m):
                network().float().square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
        synchronize()

    return epoch


def breakdown(cfg, out, n=3):
    """Seconds of the parts of an epoch, mean of n, timed inside the program: a Counter, rollout without its decodes and rewards."""
    spent, inside, load = Counter(), [], rlcm.load_model

    def timed(fn, part, within=""):
        def wrapper(*args, **kwargs):
            if "draw" in inside or within not in ["", *inside]:  # the sample grid is no part of an epoch
                return fn(*args, **kwargs)
            inside.append(part)
            synchronize()
            start = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                synchronize()
                spent[part] += time.perf_counter() - start
                inside.remove(part)
        return wrapper

    def load_model(*args):
        model = load(*args)
        model.decode = timed(model.decode, "decode", "rollout")
        return model

    get_reward = rlcm.get_reward
    changed = {"rollout": timed(rlcm.rollout, "rollout"), "update": timed(rlcm.update, "update"), "load_model": load_model,
               "actor_critic": timed(rlcm.actor_critic, "value"), "save_metrics": timed(rlcm.save_metrics, "logging"),
               "get_reward": lambda *name: timed(get_reward(*name), "reward", "rollout")}
    before, draw = {name: getattr(rlcm, name) for name in changed}, figures.draw
    try:
        vars(rlcm).update(changed)
        figures.draw = timed(draw, "draw")
        rlcm.train(rlcm.replace(cfg, out=str(out), epochs=n))
        seconds = float(list(csv.DictReader(open(out / "metrics.csv")))[-1]["seconds"])
    finally:
        vars(rlcm).update(before)
        figures.draw = draw
    del spent["draw"]
    spent["rollout"] -= spent["decode"] + spent["reward"]
    spent["rest"] = seconds - sum(spent.values())
    return {part: value / n for part, value in spent.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", default=["rlcm", "ddpo"], choices=list(rlcm.METHODS))
    p.add_argument("--batch-sizes", nargs="+", type=int, default=[None], help="default: the preset's")
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--model", default="tiny")
    args = p.parse_args()
    results, rlcm.say = {}, lambda line: None  # only this script's lines
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            for B in args.batch_sizes:
                cfg = rlcm.resolve(rlcm.Config(model=args.model, method=method, batch_size=B, save_every=10**6))
                out = Path(folder) / f"{method}-{cfg.batch_size}"
                model = rlcm.load_model(cfg, "cuda" if torch.cuda.is_available() else "cpu")
                bare = bare_epoch(cfg, model, torch.optim.Adam([q for q in model.unet.parameters() if q.requires_grad], 0.0))
                ours, network = pairs(cfg, out, bare, args.epochs)
                parts = breakdown(cfg, Path(folder) / f"parts-{method}-{cfg.batch_size}")
                a, b = statistics.median(ours), statistics.median(network)
                ratio = results[method, cfg.batch_size] = statistics.median(y / x for x, y in zip(ours, network))
                print(f"{method}, {cfg.batch_size} pictures, micro-batch {rlcm.micro_batch_of(cfg, cfg.batch_size // cfg.updates)}, {cfg.steps} steps: epoch {a:.2f} s ({min(ours):.2f} to {max(ours):.2f}), "
                      f"bare {b:.2f} s ({min(network):.2f} to {max(network):.2f}), efficiency {ratio:.2f}", flush=True)
                print("    " + "   ".join(f"{part} {value:.3f}" for part, value in parts.items()), flush=True)
    print(f"efficiency {min(results.values()):.2f}")  # the lowest of those above


if __name__ == "__main__":
    main()
