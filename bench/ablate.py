"""What happens if a method's schedule is changed? On the embedded model, with the reward compress.

    python bench/ablate.py share                               # rlcm that replaces a share of the noise
    python bench/ablate.py levels --seeds 0

Missing runs are trained, and judged during training as in bench/compare.py, which explains the columns; other
flags go to rlcm.py. The settings are the defaults, but a run ends when the accuracy has fallen to 0.85.

share      `new` 1, 0.81 and 0.5 for rlcm: how much of the noise is fresh
last       ddpo with and without the last action of Stable Diffusion's own scheduler, whose std is 0.03 here
levels     score with levels even in the 1/2, 2/3 and 1/3 power of beta's integral; and in the
           1/3 power down to timestep 0, where DDIM ends, not to the data
"""
import contextlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import rlcm
from bench.common import Parser
from bench.compare import add_flags, report, train_all
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


# ---- The ablations: a method, and a context for each of its variants
OWN = contextlib.nullcontext
ABLATIONS = {
    "share": ("rlcm", {"share-1": OWN}),
    "last": ("ddpo", {"no-last-action": OWN, "last-action": partial(changed, "ddpo", with_last_action)}),
    "levels": ("score", {"levels-2": OWN}),
}
for new in (0.81, 0.5):
    ABLATIONS["share"][1][f"share-{new}"] = partial(changed, "rlcm", partial(share, new))
for name, power, last in (("levels-1.5", 1.5, False), ("levels-3", 3, False), ("levels-down-to-0", 3, True)):
    ABLATIONS["levels"][1][name] = partial(changed, "score", partial(levels, power, last))


def ablate(args):
    method, variants = ABLATIONS[args.ablation]
    every = 2 if method == "rlcm" else 1
    flags = ["--method", method, "--epochs", 80, "--save-every", every]
    report(args, train_all(args, dict.fromkeys(variants, flags), variants=variants))


def main(argv=None):
    p = Parser("ablate", __doc__)
    p.add_argument("ablation", choices=ABLATIONS)
    add_flags(p, "runs/ablate")
    return p.run(ablate, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
