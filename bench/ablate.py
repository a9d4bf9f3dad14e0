"""Ablations on the embedded model: reward compress, and the default settings but for the number of epochs.

    python bench/ablate.py horizon                             # rlcm with H = 2, 4, 8 steps
    python bench/ablate.py share --seeds 0                     # rlcm that replaces a share of the noise

Missing runs are trained, and judged during training as in bench/compare.py, which explains the columns; other
flags go to rlcm.py. The runs are written to --out.

horizon    rlcm in 2, 4 and 8 steps
share      `new` 1, 0.81 and 0.5 for rlcm: how much of the noise is fresh
last       ddpo with and without the last action of Stable Diffusion's own scheduler, whose std is 0.03 here
levels     score with levels even in the 1/2, 2/3 and 1/3 power of beta's integral; and in the
           1/3 power down to timestep 0, where DDIM ends, not to the data
kl         rlcm with a KL penalty of 0, 0.005 and 0.02
value      the loop of examples/value.py with and without V; prints where the accuracy has fallen to 0.85
"""
import contextlib
import io
import itertools
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import rlcm
from bench.common import Parser
from bench.compare import ACCURACY, Fallen, add_flags, crossing, judge, report, settings, train_all
from examples import value
from rlcm import METHODS


# ---- Changed schedules
@contextlib.contextmanager
def changed(method, schedule):
    """Within it, the method has another schedule. The start-up check sees the method's own."""
    own = METHODS[method]
    METHODS["own"] = own
    checked_as = "own" if own.checked_as == method else own.checked_as
    METHODS[method] = SimpleNamespace(**vars(own) | dict(schedule=schedule, checked_as=checked_as))
    try:
        yield
    finally:
        METHODS[method] = own


def share(new, scheduler, cfg):
    s = rlcm.rlcm_schedule(scheduler, cfg)
    s.new = s.new * new
    return s


def with_last_action(scheduler, cfg):
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return rlcm.ddpo_schedule(scheduler, cfg)


def levels(power, last, scheduler, cfg):
    """score's schedule with another power, down to the data or to the last timestep."""
    integral = -scheduler.alphas_cumprod.double().log()
    end = integral[0].item() if last else 0.0
    root = torch.linspace(1, 0, cfg.steps + 1).double()
    grid = end + (integral[-1] - end) * root**power
    t = torch.from_numpy(np.interp(grid[:-1], integral, range(len(integral)))).float()
    alpha_bar = (-grid).exp()
    return rlcm.make_schedule(t, rlcm.level(alpha_bar[:-1]), rlcm.level(alpha_bar[1:]))


# ---- The ablations: {name: flags}, and what else a name changes
EACH = ["--save-every", 1]  # judged after each epoch, not after every second one
PARTS = {
    "horizon": {f"H-{H}": ["--steps", H] for H in (2, 4, 8)},
    "share": {f"share-{new}": [] for new in (1, 0.81, 0.5)},
    "last": {name: ["--method", "ddpo", *EACH] for name in ("no-last-action", "last-action")},
    "levels": {f"levels-{name}": ["--method", "score", *EACH] for name in (2, 1.5, 3, "down-to-0")},
    "kl": {f"kl-{kl}": ["--kl", kl] for kl in (0, 0.005, 0.02)},
}
VARIANTS = {"last-action": partial(changed, "ddpo", with_last_action)}
VARIANTS |= {f"share-{new}": partial(changed, "rlcm", partial(share, new)) for new in (0.81, 0.5)}
for power in (1.5, 3):
    VARIANTS[f"levels-{power}"] = partial(changed, "score", partial(levels, power, False))
VARIANTS["levels-down-to-0"] = partial(changed, "score", partial(levels, 3, True))


def with_value(args):
    """score with and without the value function, by the loop of examples/value.py. It cannot be resumed."""
    for lr, seed, use in itertools.product((2e-3, 4e-3, 8e-3), args.seeds, (True, False)):
        name = f"value-{lr:g}-{seed}" if use else f"no-value-{lr:g}-{seed}"
        cfg = settings(args.out / name, ["--method", "score", "--lr", lr, "--epochs", 80, "--seed", seed])
        rows = []

        def on_epoch(epoch, model):
            rows.append(judge(epoch, model, cfg))
            if rows[-1]["accuracy"] <= ACCURACY:
                raise Fallen

        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Fallen):
            value.train(cfg, use, on_epoch)
        at = crossing(rows, "accuracy", ACCURACY)
        print(name, {column: round(value, 3) for column, value in at.items()}, flush=True)


def at_equal_accuracy(args):
    if args.ablation == "value":
        with_value(args)
        return
    long = ["--epochs", 80, "--save-every", 2]  # it ends when the accuracy has fallen
    parts = {name: [*long, *flags] for name, flags in PARTS[args.ablation].items()}
    report(args, train_all(args, parts, variants=VARIANTS))


def main(argv=None):
    p = Parser("ablate", __doc__)
    p.add_argument("ablation", choices=[*PARTS, "value"])
    add_flags(p, "runs/ablate")
    return p.run(at_equal_accuracy, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
