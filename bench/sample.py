"""Images of a run: the base model in the first row, the tuned one below it, from the same noise.

    python bench/sample.py runs/NAME "a cat" "a dog"                        # writes runs/NAME/sample.png
    python bench/sample.py runs/NAME "a cat" --strength 0.5 1 --out cat.png  # a tuned row for each strength

Steps and guidance are the run's. The noise of image i is that of torch.Generator().manual_seed(i), so a plain
diffusers pipeline draws the same images.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from rewards import BadInput


# ---- Also used by other scripts
class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as its help, and says what is wrong in one line."""

    def __init__(self, name, doc):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(f"bench/{name}.py", description=doc, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")

    def run(self, work, argv=None, more=False):
        """Call work(args). Returns the exit status: its own or 0, 2 for bad input, 130 after Ctrl-C.

        With `more`, args.flags holds the flags that are not the script's own; otherwise they are refused.
        """
        try:
            args, args.flags = self.parse_known_args(argv)
            if args.flags and not more:
                self.error(f"unknown argument {args.flags[0]}")
            rlcm.quiet()
            return work(args) or 0
        except (BadInput, OSError, torch.OutOfMemoryError) as e:
            status = 2
            message = e
        except KeyboardInterrupt:
            status = 130
            message = "stopped"
        print(f"{self.prog}: {message}", file=sys.stderr)
        return status


def open_run(run, **changes):
    """A run's settings, with some changed, and its model with fresh weights. Raises BadInput."""
    cfg = replace(rlcm.read_config(run), gradient_checkpointing=False, **changes)
    rlcm.check(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return cfg, rlcm.load_model(cfg, device)


# ---- The script
def sample(run, prompts, strengths=(1.0,), out=None):
    """Draw the rows into an image file. Returns its path. Raises BadInput."""
    cfg, model = open_run(run)
    path = Path(out or Path(run) / "sample.png")
    fits = path.suffix in (".png", ".jpg", ".webp") and path.parent.is_dir()
    rlcm.require(fits, f"--out {path}: give a .png, .jpg or .webp file in a folder that exists")

    with model.reference():
        images = [rlcm.generate(model, cfg, prompts)]
    captions = [f"{prompt}, base" for prompt in prompts]

    # A LoRA adds lora_B lora_A to a layer, so it has half the strength when lora_B is halved.
    for strength in strengths:
        rlcm.load_checkpoint(run, model)
        scaled = [p for name, p in model.trainable.items() if "lora_B" in name]
        rlcm.require(scaled or strength == 1, f"--strength {strength}: this model has no LoRA to scale")
        for p in scaled:
            p.data *= strength
        images.append(rlcm.generate(model, cfg, prompts))
        name = "tuned" if strength == 1 else f"x {strength:g}"
        captions += [f"{prompt}, {name}" for prompt in prompts]

    rlcm.sample_grid(torch.cat(images), captions, columns=len(prompts)).save(path)
    return path


def main(argv=None):
    p = Parser("sample", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder")
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    p.add_argument("--strength", nargs="+", type=float, default=[1.0], help="of the LoRA; default 1")
    p.add_argument("--out", metavar="FILE", help="default: RUN/sample.png")

    def work(args):
        print(f"wrote {sample(args.run, args.prompts, args.strength, args.out)}")

    return p.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
