"""The examples beside rlcm.py on the same task: what do they save, and what do they cost?

    python bench/extensions.py last-noise         # compress: one action with the last noise; rlcm
    python bench/extensions.py value              # compress: score with a value function; without it
    python bench/extensions.py differentiable     # clip: back-propagation, policy gradient, both

Every two epochs a run draws the 200 fixed captions of bench/compare.py, which explains reward, accuracy and
retrieval. The table has the last epoch, and where the accuracy first falls to --accuracy ("-" if never). What
was found is kept in runs/extensions/WORD and not measured again. Of differentiable, retrieval is no outside
judge: it asks tiny/clip, which is the reward.

passes      of 32 rows through the network, counted by a hook; a row that has a gradient counts three
seconds     of training; the pictures for the judges and the sample grids are not in it
"""
import contextlib
import io
import itertools
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import rlcm
from bench.compare import cell, crossing, judge, plain
from bench.evaluate import write_rows
from bench.plot import read_rows
from bench.sample import Parser
from examples import differentiable, last_noise, value

WORDS = {  # {name: the function that trains, its settings}
    "last-noise": {
        "last noise": (last_noise.train, last_noise.SETTINGS | dict(epochs=22)),
        "rlcm": (rlcm.train, dict(epochs=36)),
    },
    "value": {
        "value": (value.train, value.SETTINGS | dict(epochs=10)),
        "score": (rlcm.train, value.SETTINGS | dict(epochs=18)),
    },
    "differentiable": {
        "last evaluation": (differentiable.train, differentiable.SETTINGS | dict(epochs=20)),
        "rlcm": (rlcm.train, differentiable.SETTINGS | dict(epochs=40)),
        "both": (partial(differentiable.train, hybrid=True), differentiable.SETTINGS | dict(epochs=20)),
    },
}


def judged(train, cfg, every):
    """Run train(cfg), look at its model on the way -> a row for the base model and every `every` epochs."""
    rows, models, load_model, draw = [], [], rlcm.load_model, rlcm.draw
    count = {"epoch": 0, "seconds": -time.time(), "passes": 0.0}

    def aside(work, *args):
        """Do something that is not training: neither the clock nor the passes go on."""
        before, began = dict(count), time.time()
        result = work(*args)
        count.update(before | {"seconds": before["seconds"] - (time.time() - began)})
        return result

    def look():
        rows.append(count | {"seconds": count["seconds"] + time.time()} | judge(models[0], cfg))

    def loaded(*args):
        models.append(load_model(*args))
        models[0].pipe.unet.register_forward_pre_hook(counted)
        count["seconds"] = -time.time()
        aside(look)
        return models[0]

    def counted(network, args):
        count["passes"] += len(args[0]) * (3 if torch.is_grad_enabled() else 1) / 32

    def stepped(*_):
        count["epoch"] += 1  # an optimizer step each
        if count["epoch"] % every == 0 or count["epoch"] == cfg.epochs:
            aside(look)

    hook = register_optimizer_step_post_hook(stepped)
    try:
        with mock.patch.multiple(rlcm, load_model=loaded, draw=partial(aside, draw)):
            train(cfg)
    finally:
        hook.remove()
    return rows


def found(name, way, args, seed):
    """The rows of a way to train and a seed, from its file or made now."""
    path = args.out / args.word / f"{plain(name)}-{seed}.csv"
    if not path.exists():
        train, settings = way
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            cfg = rlcm.Config(**settings | dict(seed=seed, out=f"{folder}/run", save_every=10**6))
            rows = judged(train, cfg, args.every)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(rows, path)
        print(f"wrote {path}", flush=True)
    return read_rows(path)


def show(args):
    ways = WORDS[args.word]
    columns = {name: [found(name, ways[name], args, seed) for seed in args.seeds] for name in ways}
    at = {"base model": lambda rows: rows[0], "at the end": lambda rows: rows[-1]}
    at[f"at accuracy {args.accuracy}"] = lambda rows: crossing(rows, "accuracy", args.accuracy)
    digits = dict(reward=3, accuracy=3, retrieval=3, epoch=0, passes=0, seconds=0)
    print(f"{'':28}" + "".join(f"{name:32}" for name in columns))
    for (where, row), (column, n) in itertools.product(at.items(), digits.items()):
        cells = [cell([row(rows)[column] for rows in runs], n) for runs in columns.values()]
        print(f"{where + ': ' + column:28}" + "".join(f"{text:32}" for text in cells).rstrip())


def main(argv=None):
    p = Parser("extensions", __doc__)
    p.add_argument("word", choices=list(WORDS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    p.add_argument("--every", type=int, default=2, help="epochs between looks at the model")
    p.add_argument("--accuracy", type=float, default=0.85, help="that the ways are compared at")
    p.add_argument("--out", type=Path, default=Path("runs/extensions"), help="folder of what is found")
    return p.run(show, argv)


if __name__ == "__main__":
    sys.exit(main())
