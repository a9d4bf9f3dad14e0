"""Images of a run: the base model in the first row, the tuned one below it, from the same noise.

    python bench/sample.py runs/NAME "a cat" "a dog"                        # writes runs/NAME/sample.png
    python bench/sample.py runs/NAME "a cat" --strength 0.5 1 --out cat.png  # a tuned row for each strength
    python bench/sample.py runs/A "a cat" --also runs/B                     # a row of another run below

Steps and guidance are the run's. The noise of image i is that of torch.Generator().manual_seed(i), so a plain
diffusers pipeline draws the same images.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from bench.common import Parser, open_run


def sample(args):
    """Draw the rows into an image file. Raises BadInput."""
    cfg, model = open_run(args.run)
    path = Path(args.out or Path(args.run) / "sample.png")
    fits = path.suffix in (".png", ".jpg", ".webp") and path.parent.is_dir()
    rlcm.require(fits, f"--out {path}: give a .png, .jpg or .webp file in a folder that exists")

    with model.reference():
        images = [rlcm.generate(model, cfg, args.prompts)]
    captions = [f"{prompt}, base" for prompt in args.prompts]

    # A LoRA adds lora_B lora_A to a layer, so it has half the strength when lora_B is halved.
    tuned = cfg.reward if args.also else "tuned"
    rows = [(args.run, tuned if strength == 1 else f"x {strength:g}", strength) for strength in args.strength]
    rows += [(run, rlcm.read_config(run).reward, 1.0) for run in args.also]
    for run, name, strength in rows:
        rlcm.load_checkpoint(run, model)
        scaled = [p for name, p in model.trainable.items() if "lora_B" in name]
        rlcm.require(scaled or strength == 1, f"--strength {strength}: this model has no LoRA to scale")
        for p in scaled:
            p.data *= strength
        images.append(rlcm.generate(model, cfg, args.prompts))
        captions += [f"{prompt}, {name}" for prompt in args.prompts]

    rlcm.sample_grid(torch.cat(images), captions, columns=len(args.prompts)).save(path)
    print(f"wrote {path}")


def main(argv=None):
    p = Parser("sample", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder")
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    p.add_argument("--strength", nargs="+", type=float, default=[1.0], help="of the LoRA; default 1")
    p.add_argument("--also", nargs="+", default=[], metavar="RUN", help="runs with the same model and steps")
    p.add_argument("--out", metavar="FILE", help="default: RUN/sample.png")
    return p.run(sample, argv)


if __name__ == "__main__":
    sys.exit(main())
