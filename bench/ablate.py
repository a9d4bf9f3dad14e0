"""The RLCM paper's own ablations on the embedded model, reward compress.

    python bench/ablate.py horizon                                 # rlcm trained with H = 2, 4, 8 steps
    python bench/ablate.py steps --seeds 0 --out runs/compare      # rlcm and ddpo sampled with other steps
    python bench/ablate.py longer --seeds 0                        # 54 epochs, with and without --kl

Prints a table. Missing runs are trained, and judged during training as in bench/compare.py, which explains
the columns; other flags go to rlcm.py. The runs are written to --out.
steps has the same runs as bench/compare.py, so with --out runs/compare it reuses them.

steps      bench/evaluate.py of each run
longer     a row every 9 epochs: does the reward still rise, and are images still recognised? longer.webp has
           the first seed's images from epoch to epoch, a block of columns for each penalty
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image

from bench.compare import MEANS, add_flags, cell, show, table, train_all
from bench.evaluate import evaluate
from bench.plot import read_rows
from bench.sample import Parser


def show_rows(title, tables, columns):
    """tables: one per seed, with the same rows. Print each row with the mean and each seed."""
    for same in zip(*tables):
        cells = [cell([row[name] for row in same]) for name in columns]
        show(title.format(**same[0]), cells)


def horizon(args):
    parts = {f"H-{H}": ["--steps", H] for H in (2, 4, 8)}
    table(train_all(args, parts), -2.25)


def steps(args):
    parts = {f"compress-{method}": ["--method", method] for method in ("rlcm", "ddpo")}
    groups = train_all(args, parts)
    tables = {name: [evaluate(run) for run in runs] for name, runs in groups.items()}
    columns = "reward", "seconds"
    show("", columns)
    for name in groups:
        show_rows(name + ", {weights}, {prompts}, {steps} steps", tables[name], columns)


def longer(args):
    parts = {f"kl-{kl}": ["--kl", kl, "--epochs", 54, "--save-every", 9] for kl in (0, 0.005, 0.02)}
    groups = train_all(args, parts)
    show("", MEANS)
    for name, runs in groups.items():
        tables = [read_rows(run / "judged.csv") for run in runs]
        show_rows(name + ", epoch {epoch:.0f}", tables, MEANS)

    # The first four images of each sample grid: epochs downwards, penalties side by side.
    columns = []
    for first, *_ in groups.values():
        grids = [np.asarray(Image.open(path)) for path in sorted((first / "samples").glob("*.png"))]
        columns.append(np.concatenate([grid[:146, :512] for grid in grids]))
    Image.fromarray(np.concatenate(columns, 1)).save(args.out / "longer.webp")
    print(f"wrote {args.out}/longer.webp")


ABLATIONS = {"horizon": horizon, "steps": steps, "longer": longer}


def main(argv=None):
    p = Parser("ablate", __doc__)
    p.add_argument("ablation", choices=ABLATIONS)
    add_flags(p, "runs/ablate")
    return p.run(lambda args: ABLATIONS[args.ablation](args), argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
