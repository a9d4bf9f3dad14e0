"""The RLCM paper's own ablations on the embedded model, reward compress.

    python bench/ablate.py horizon                  # rlcm trained with H = 2, 4, 8 steps
    python bench/ablate.py steps --seeds 0          # reward by steps and by seconds, also of other prompts
    python bench/ablate.py longer --seeds 0         # 54 epochs, with and without --kl

Prints a table. Missing runs are trained, and judged during training as in bench/compare.py, which explains
the columns; other flags go to rlcm.py. horizon and longer have their own runs in runs/ablate; steps shares
those of bench/compare.py.

steps      bench/evaluate.py of rlcm and ddpo, base and tuned, 64 pictures a row
longer     a row every 9 epochs (--every): does the reward still rise, and what is left to recognise? Draws
           the pictures of the first seed along it, one column of them for each penalty: longer.webp
"""
import contextlib
import io
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image

import rlcm
from bench.compare import cell, table, train_all
from bench.evaluate import evaluate
from bench.plot import read_rows
from bench.sample import Parser

HORIZONS = 2, 4, 8
PENALTIES = 0, 0.005, 0.02
COLUMNS = "reward", "accuracy", "retrieval"


def trained(args, parts, folder):
    """Train {name: flags of rlcm.py} for every seed -> {name: folders of its seeds}."""
    runs, groups = {}, {name: [] for name in parts}
    for seed, (name, flags) in itertools.product(args.seeds, parts.items()):
        out = folder / f"{name}-{seed}"
        groups[name].append(out)
        runs[out] = ["--reward", "compress", "--seed", seed, *flags, *args.flags]
    train_all(runs, args.jobs)
    return groups


def show(title, rows=()):
    """A line of a table: mean and each seed. Without rows its heading."""
    cells = [cell([row[name] for row in rows], 3) if rows else name for name in COLUMNS]
    print(f"{title:28}" + "".join(f"{text:32}" for text in cells).rstrip(), flush=True)


def draw_grids(runs, path):
    """The first four pictures of each run's sample grids, epochs one below the other, runs side by side."""
    columns = []
    for run in runs:
        sheets = [np.asarray(Image.open(sheet)) for sheet in sorted((run / "samples").glob("*.png"))]
        columns.append(np.concatenate([sheet[:164, :512] for sheet in sheets]))  # the first line, four tiles
    Image.fromarray(np.concatenate(columns, 1)).save(path)
    print(f"wrote {path}")


def horizon(args):
    table(trained(args, {f"H-{H}": ["--steps", H] for H in HORIZONS}, args.out), -2.25)


def longer(args):
    parts = {f"kl-{kl:g}": ["--kl", kl, "--epochs", 54, "--save-every", args.every] for kl in PENALTIES}
    groups = trained(args, parts, args.out)
    show("")
    for name, runs in groups.items():
        for same in zip(*(read_rows(run / "judged.csv") for run in runs)):
            show(f"{name}, epoch {same[0]['epoch']:.0f}", same)
    draw_grids([runs[0] for runs in groups.values()], args.out / "longer.webp")


def steps(args):
    """By number of steps, base and tuned: reward of the training and of other prompts, seconds a picture."""
    print(f"{'':28}{'training prompts':32}{'held-out prompts':32}seconds")
    parts = {f"compress-{method}": ["--method", method] for method in ("rlcm", "ddpo")}
    for method, runs in trained(args, parts, args.compare).items():
        with contextlib.redirect_stdout(io.StringIO()):
            tables = [evaluate(run, pictures=args.pictures) for run in runs]  # (seeds, rows)
        found = {}
        for same in zip(*tables):
            title = "{}, {weights}, {steps} steps".format(method.removeprefix("compress-"), **same[0])
            found.setdefault(title, []).append(cell([row["reward"] for row in same], 3))
            seconds = np.mean([row["seconds"] for row in same])
            if len(found[title]) == 2:
                print(f"{title:28}{found[title][0]:32}{found[title][1]:32}{seconds:.4f}", flush=True)


WORDS = {"horizon": horizon, "steps": steps, "longer": longer}


def main(argv=None):
    p = Parser("ablate", __doc__)
    p.add_argument("word", choices=list(WORDS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, a thread each")
    p.add_argument("--out", type=Path, default=Path("runs/ablate"), help="figures and runs")
    p.add_argument("--compare", type=Path, default=Path("runs/compare"), help="runs of bench/compare.py")
    p.add_argument("--pictures", type=int, default=64, help="steps: for each row of the table")
    p.add_argument("--every", type=int, default=9, help="longer: epochs between rows")

    def work(args):
        rlcm.require(args.every > 0 and args.jobs > 0, "--every and --jobs: at least 1")
        args.out.mkdir(parents=True, exist_ok=True)
        WORDS[args.word](args)

    return p.run(work, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
