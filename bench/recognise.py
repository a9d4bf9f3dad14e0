"""Can one still tell what the pictures show? The embedded model's guard against reward hacking.

    python bench/recognise.py runs/A runs/B        # a table: each run's base model and tuned model

For 200 fixed captions and fixed noise, drawn at the run's steps and guidance, an LCM's just as a plain diffusers pipeline draws them (a test holds it to that):
accuracy   share of pictures whose nearest training picture (pixel L2, tiny/pictures.webp) carries the caption
animals    the same over the 45 animals that training prompts with
retrieval  share of pictures whose caption is the nearest of all concepts to tiny/clip, which is what --reward clip trains on
blank      share of pictures in which fewer than 2 % of the pixels differ visibly from the page
kB         mean JPEG size of the 200 pictures; compress rewards its negative
reward     mean of the run's own reward over the 200 pictures
first, last, gain   of the run's metrics.csv: mean reward of the first and of the last three epochs; difference in initial standard deviations
"""
import argparse
import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tiny")]
import torch

import make_tiny
import rewards
import rlcm
from bench import figures


def blank(pictures):
    """(B, 3, H, W) -> share of blank ones: median colour almost everywhere."""
    page = pictures.flatten(2).median(2).values[:, :, None, None]
    return float((((pictures - page).abs().amax(1) > 0.15).float().mean((1, 2)) < 0.02).float().mean())


def measure(model, cfg, captions, data):
    pictures, animals = figures.draw(model, cfg, captions), figures.draw(model, cfg, rewards.ANIMALS)
    accuracy = [make_tiny.nearest_accuracy(p, c, *data) for p, c in ((pictures, captions), (animals, rewards.ANIMALS))]
    kilobytes = float(rewards.jpeg_kilobytes(pictures).mean())
    return *accuracy, make_tiny.retrieval(pictures, captions, data[1]), blank(torch.cat([pictures, animals])), kilobytes, float(rewards.get_reward(cfg.reward, cfg.model)(pictures, captions).mean())


def learned(run):
    rows = [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(open(run / "metrics.csv"))]
    first, last = (sum(row["reward_mean"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    return f"{first:9.3f} {last:9.3f} {(last - first) / rows[0]['reward_std']:6.2f} {rows[-1]['seconds']:8.0f}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path)
    args = p.parse_args()
    data = make_tiny.training_pictures()
    captions, seen = make_tiny.fixed_captions(data[1]), {}
    print(f"{'':34s} accuracy  animals retrieval  blank     kB    reward     first      last   gain  seconds")

    def line(name, row, rest=""):
        print(f"{name[-34:]:34s} {row[0]:8.3f} {row[1]:8.3f} {row[2]:9.3f} {row[3]:6.3f} {row[4]:6.3f} {row[5]:9.3f} {rest}", flush=True)

    for run in args.runs:
        cfg = figures.settings_of(run, rlcm.Config())
        model, kind = rlcm.load_model(cfg, "cpu"), (cfg.method, cfg.steps, cfg.guidance, cfg.reward)
        if kind not in seen:
            seen[kind] = measure(model, cfg, captions, data)
            line(f"base model, {cfg.method}, {cfg.steps} steps", seen[kind])
        figures.load_weights(model, run)
        line(str(run), measure(model, cfg, captions, data), learned(run))


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as e:
        sys.exit(f"recognise.py: {e}")
