"""What does an epoch cost beside the bare network?

    python bench/efficiency.py                            # rlcm and ddpo at their defaults, tiny
    python bench/efficiency.py --batch-sizes 8 16 32 64   # is it flat?
    python bench/efficiency.py --methods rlcm score --epochs 20

A run of the program; the bare loop follows each of its epochs, so that the machine's noise hits both.

epoch        seconds of an epoch inside `rlcm.train`, all five numbered steps; median (least to most)
bare         seconds of the same passes of the same network on fixed inputs and nothing else: the rollout's
             forwards, the pretrained model's where there is a KL penalty, the VAE's decodes, forwards and
             backwards of the update, optimizer steps; same batch, micro-batch, dtype and device
efficiency   bare / epoch: median of the ratios of such pairs; last line: the lowest one

The first epoch warms up, the last one saves pictures and weights: neither is counted.
"""
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from bench.sample import Parser


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_epoch(run):
    """A function that does the passes of an epoch of `run` on fixed inputs; the run's weights stay."""
    cfg, model = run.cfg, run.model
    unet, vae, device = model.pipe.unet, model.pipe.vae, model.device
    m = min(cfg.micro_batch, cfg.batch_size // cfg.updates)
    batches, dim = cfg.batch_size // m, unet.config.time_cond_proj_dim
    rows = 2 * m if not dim and cfg.guidance > 1 else m  # classifier-free guidance in one pass
    x = torch.randn(rows, *model.shape, device=device, dtype=vae.dtype)
    c = rlcm.encode(model.pipe, ["a cat"]).expand(rows, -1, -1)
    w = torch.zeros(rows, dim, device=device, dtype=vae.dtype) if dim else None
    s, optimizer = run.s, torch.optim.Adam(model.trained.values(), 0.0)
    half = dict(device_type=device.type, dtype=torch.bfloat16, enabled=cfg.precision == "bf16")

    def network():
        with torch.autocast(**half):
            return unet(x, s.t[0], encoder_hidden_states=c, timestep_cond=w).sample.float()

    def epoch():
        with torch.no_grad():
            for _ in range(batches * (len(s.std) + (len(s.actions) if cfg.kl else 0))):
                network()
            for _ in range(batches):
                vae.decode(x[:m])
        for _ in range(cfg.updates):
            for _ in range(len(s.actions) * batches // cfg.updates):
                network().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def pairs(cfg, n):
    """Train with the bare loop after each epoch -> seconds of n epochs, seconds of n bare loops."""
    clock, bare, record = [], [], rlcm.record

    def recorded(run, *args):  # the last thing that an epoch does
        record(run, *args)
        clock.append(now())
        if not bare:
            bare.append(bare_epoch(run))
        bare[0]()
        clock.append(now())

    with mock.patch.object(rlcm, "record", recorded):
        rlcm.train(replace(cfg, epochs=n + 2))
    seconds = [b - a for a, b in zip(clock[1:], clock[2:])][: 2 * n]
    return seconds[0::2], seconds[1::2]


def main(argv=None):
    p = Parser("efficiency", __doc__)
    p.add_argument("--methods", nargs="+", default=["rlcm", "ddpo"], choices=list(rlcm.METHODS))
    p.add_argument("--batch-sizes", nargs="+", type=int, metavar="B", help="default: the preset's")
    p.add_argument("--epochs", type=int, default=8, help="that are measured")
    p.add_argument("--model", default="tiny")

    def work(args):
        ratios = []
        for method in args.methods:
            for size in args.batch_sizes or [None]:
                given = rlcm.preset(method, args.model) | dict(save_every=10**6)
                given |= {"batch_size": size} if size else {}
                with tempfile.TemporaryDirectory() as folder, mock.patch.object(rlcm, "say"):
                    cfg = rlcm.Config(**given, out=f"{folder}/run")
                    ours, bare = pairs(cfg, args.epochs)
                ratios.append(statistics.median(b / a for a, b in zip(ours, bare)))
                times = [f"{statistics.median(v):.2f} s ({min(v):.2f} to {max(v):.2f})" for v in (ours, bare)]
                print(f"{method}, {cfg.batch_size} pictures, {cfg.steps} steps: epoch {times[0]}", end=", ")
                print(f"bare {times[1]}, efficiency {ratios[-1]:.2f}", flush=True)
        print(f"efficiency {min(ratios):.2f}")

    return p.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
