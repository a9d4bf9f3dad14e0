"""Can one still tell what the pictures show? The embedded model's guard against reward hacking.

    python bench/recognise.py runs/A runs/B        # a table: each run's base model and tuned model

200 fixed captions, and the 45 animals of the training prompts, drawn from fixed noise at the run's steps and
guidance, an LCM's as a plain diffusers pipeline draws them. Columns:

accuracy      share of the 200 pictures whose nearest training picture (pixel L2) carries the caption
animals       the same for the 45 animals
retrieval     share of the 200 whose caption is the nearest of all to tiny/clip, the judge of `--reward clip`
blank         share of the 245 in which fewer than 2 % of the pixels differ visibly from the page
kB            mean JPEG size of the 200; compress rewards its negative
reward        mean of the run's own reward over the 200
first, last   of the run's metrics.csv, noise of --last-noise included: mean reward of the first and of the
              last three epochs
gain          last - first, in standard deviations of the first epoch's rewards
seconds       of the whole run
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rewards
import rlcm
from tiny import make_tiny


def measure(model, cfg, captions, data):
    """-> the first six columns."""
    pictures, animals = (rlcm.draw(model, cfg, prompts).cpu() for prompts in (captions, rewards.ANIMALS))
    return (
        make_tiny.nearest_accuracy(pictures, captions, *data),
        make_tiny.nearest_accuracy(animals, rewards.ANIMALS, *data),
        make_tiny.retrieval(pictures, captions, data[1]),
        float(rewards.picture_statistics(torch.cat([pictures, animals]))["blank"].mean()),
        float(rewards.jpeg_kilobytes(pictures).mean()),
        float(rewards.get_reward(cfg.reward, cfg.model)(pictures, captions).mean()),
    )


def learned(run):
    """-> the last four columns, as text."""
    rows = list(csv.DictReader(open(run / "metrics.csv")))
    r = [float(row["reward_mean"]) for row in rows]
    first, last = sum(r[:3]) / 3, sum(r[-3:]) / 3
    gain = (last - first) / float(rows[0]["reward_std"])
    return f"{first:9.3f} {last:9.3f} {gain:6.2f} {float(rows[-1]['seconds']):8.0f}"


def line(name, numbers, rest=""):
    accuracy, animals, retrieval, blank, kilobytes, reward = numbers
    print(f"{name[-34:]:34s} {accuracy:8.3f} {animals:8.3f} {retrieval:9.3f} {blank:6.3f}", end=" ")
    print(f"{kilobytes:6.3f} {reward:9.3f} {rest}", flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("runs", nargs="+", type=Path)
    args = p.parse_args()
    rlcm.quiet()
    data = make_tiny.training_pictures()
    captions, seen = make_tiny.fixed_captions(data[1]), {}
    print(f"{'':34s} accuracy  animals retrieval  blank     kB    reward", end=" ")
    print("    first      last   gain  seconds")
    for run in args.runs:
        cfg = replace(rlcm.drawing_config(run), kl=0.0)
        model, kind = rlcm.load_model(cfg), (cfg.method, cfg.steps, cfg.guidance, cfg.reward)
        if kind not in seen:
            seen[kind] = measure(model, cfg, captions, data)
            line(f"base model, {cfg.method}, {cfg.steps} steps", seen[kind])
        rlcm.load_weights(model, run)
        line(str(run), measure(model, cfg, captions, data), learned(run))


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as e:
        sys.exit(f"recognise.py: {e}")
