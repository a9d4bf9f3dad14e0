"""Pictures of a run: the base model in the first row, the tuned one below it, from the same noise.

    python bench/sample.py runs/NAME "a cat" "a dog"                        # writes runs/NAME/sample.png
    python bench/sample.py runs/NAME "a cat" --strength 0.5 1 --out cat.png  # a tuned row for each strength

Steps and guidance are the run's. The noise of picture i is that of torch.Generator().manual_seed(i), so a
plain diffusers pipeline draws the same pictures.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from rewards import BadInput


# ---- what the other scripts use too
class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as its help; a wrong flag is one line."""

    def __init__(self, name, doc):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"bench/{name}.py", description=doc, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")

    def run(self, work, argv=None, more=False):
        """Call work(args) -> exit status: what it returns, 2 for bad input, 130 after Ctrl-C.

        With `more`, flags that are not the script's own are allowed, and found in args.flags.
        """
        try:
            args, args.flags = self.parse_known_args(argv)
            if args.flags and not more:
                self.error(f"unknown argument {args.flags[0]}")
            rlcm.quiet()
            return work(args) or 0
        except (BadInput, OSError) as e:
            status, message = 2, e
        except KeyboardInterrupt:
            status, message = 130, "stopped"
        print(f"{self.prog}: {message}", file=sys.stderr)
        return status


def open_run(run, **changes):
    """A run's folder -> its config with the changes made, and its base model. Raises BadInput."""
    cfg = replace(rlcm.read_config(run), compile=False, gradient_checkpointing=False, **changes)
    rlcm.check(cfg)
    there = (Path(run) / "pytorch_lora_weights.safetensors").exists()
    message = f"{run} has no LoRA yet: the first one is saved after epoch {min(cfg.save_every, cfg.epochs)}"
    rlcm.require(there, message)
    return cfg, rlcm.load_model(cfg)


def load_lora(model, run):
    """The run's LoRA in the place of the fresh one, as any diffusers pipeline loads it. Raises BadInput."""
    model.pipe.delete_adapters("default")
    try:
        model.pipe.load_lora_weights(run)
    except Exception as e:
        raise BadInput(f"the LoRA in {run} does not fit its model ({rlcm.one_line(e)})") from e


# ---- the script
def sample(run, prompts, strengths=(1.0,), out=None):
    """Draw the rows into a file -> its path. Raises BadInput."""
    path = Path(out or Path(run) / "sample.png")
    rlcm.require(path.suffix in (".png", ".jpg", ".webp"), f"--out {path}: end it in .png, .jpg or .webp")
    rlcm.require(path.parent.is_dir(), f"there is no folder {path.parent}")
    cfg, model = open_run(run)
    images, captions = [rlcm.draw(model, cfg, prompts)], [f"{prompt}, base" for prompt in prompts]
    load_lora(model, run)
    for strength in strengths:
        model.pipe.set_adapters(model.pipe.get_active_adapters(), strength)
        images.append(rlcm.draw(model, cfg, prompts))
        name = "tuned" if strength == 1 else f"x {strength:g}"
        captions += [f"{prompt}, {name}" for prompt in prompts]
    rlcm.sample_grid(torch.cat(images), captions, path, str(run), columns=len(prompts))
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
