"""Can one still tell what the pictures show? The embedded model's guard against reward hacking.

    python bench/recognise.py runs/A runs/B        # a table: base model, then each run's LoRA

For 200 fixed captions and fixed noise, drawn by a plain diffusers pipeline at the run's steps and guidance:
accuracy   share of pictures whose nearest training picture (pixel L2, tiny/pictures.webp) carries the caption
animals    the same over the 45 animals that training prompts with
blank      share of pictures in which fewer than 2 % of the pixels differ visibly from the page
reward     mean of the run's own reward over the 200 pictures
first, last, gain   of the run's metrics.csv: mean reward of the first and of the last three epochs; difference in initial standard deviations
"""
import argparse
import csv
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tiny")]
import torch

import make_tiny
import rewards


def blank(pictures):
    """(B, 3, H, W) -> share of blank ones: median colour almost everywhere."""
    page = pictures.flatten(2).median(2).values[:, :, None, None]
    return float((((pictures - page).abs().amax(1) > 0.15).float().mean((1, 2)) < 0.02).float().mean())


def measure(pipe, captions, steps, guidance, reward, data):
    pictures = make_tiny.draw(pipe, captions, num_inference_steps=steps, guidance_scale=guidance)
    animals = make_tiny.draw(pipe, rewards.ANIMALS, num_inference_steps=steps, guidance_scale=guidance)
    return (make_tiny.nearest_accuracy(pictures, captions, *data), make_tiny.nearest_accuracy(animals, rewards.ANIMALS, *data),
            blank(torch.cat([pictures, animals])), float(rewards.get_reward(reward)(pictures, captions).mean()))


def learned(run):
    rows = [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(open(run / "metrics.csv"))]
    first, last = (sum(row["reward_mean"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    return f"{first:9.3f} {last:9.3f} {(last - first) / rows[0]['reward_std']:6.2f} {rows[-1]['seconds']:8.0f}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path)
    args = p.parse_args()
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar(), transformers_logging.disable_progress_bar()
    data = make_tiny.training_pictures()
    captions = make_tiny.fixed_captions(data[1])
    print(f"{'':34s} accuracy  animals  blank    reward     first      last   gain  seconds")
    for n, run in enumerate([None] + args.runs):
        config = json.loads(((run or args.runs[0]) / "config.json").read_text())
        pipe = DiffusionPipeline.from_pretrained(HERE.parent / "tiny" / "lcm", dtype=torch.float32)
        if run:
            pipe.load_lora_weights(run)
        row = measure(pipe, captions, config["steps"], config["guidance"], config["reward"], data)
        print(f"{str(run or 'base model')[-34:]:34s} {row[0]:8.3f} {row[1]:8.3f} {row[2]:6.3f} {row[3]:9.3f} {learned(run) if run else ''}", flush=True)


if __name__ == "__main__":
    main()
