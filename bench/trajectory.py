"""How an image is drawn: two trajectories of one prompt, one rewarded above the prompt's average, one below.

    python bench/trajectory.py runs/NAME "cat"                     # writes runs/NAME/trajectory.png
    python bench/trajectory.py runs/NAME "cat" --weights base      # of the pretrained model alone

The upper row shows the latents x_0 to x_H, decoded; below each are the clean image that the model predicts
from it and the std of the noise added next. Last come the reward and the advantage A among 32 images of the
prompt. Base and tuned model start from the same noise and draw the same noise in each step.
"""
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from matplotlib.figure import Figure

import rlcm
from bench.common import Parser, open_run
from rewards import get_reward

COUNT = 32


@torch.no_grad()
def trajectories(model, cfg, prompt):
    """Latents x_0 to x_H and predictions, decoded, (B, 3, H, W) each; the stds (H,) and rewards (B,)."""
    s = model.schedule(cfg.steps)
    c = model.encode([prompt] * COUNT)
    z = torch.randn(cfg.steps + 1, COUNT, *model.shape, generator=torch.Generator().manual_seed(0))
    x, _, _ = rlcm.rollout(model.denoise, s, c, z.to(model.device))
    images = [model.decode(latents) for latents in x]
    predicted = [model.decode(model.denoise(x[k], k, c, s)) for k in range(cfg.steps)]
    r = get_reward(cfg.reward, cfg.model)(images[-1], [prompt] * COUNT)
    return images, predicted, s.noise_next * s.new.sqrt(), r


def draw(args):
    """Draw the figure. Raises BadInput."""
    cfg, model = open_run(args.run)
    rlcm.load_checkpoint(args.run, model)
    H = cfg.steps
    figure = Figure(figsize=(1.7 * (H + 1), 7 * len(args.weights)), layout="constrained")
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    blocks = figure.subplots(4 * len(args.weights), H + 1, subplot_kw=bare).reshape(-1, 2, H + 1)

    # The first weights decide which two trajectories are shown.
    cases = []
    for name in args.weights:
        with model.reference() if name == "base" else contextlib.nullcontext():
            found = trajectories(model, cfg, args.prompt)
        r = cases[0][-1] if cases else found[-1]
        cases += [(name, i.item(), *found) for i in (r.argmax(), r.argmin())]
    for (above, below), (name, i, images, predicted, stds, r) in zip(blocks, cases):
        A = rlcm.advantages(r, [args.prompt] * COUNT, {}, COUNT, 1, 10.0)
        above[0].set_ylabel(name)
        below[0].set_ylabel("predicted")
        for axis, image in zip([*above, *below], images + predicted):
            axis.imshow(image[i].permute(1, 2, 0).cpu())
        for k in range(H):
            above[k].set_title(f"x_{k}", fontsize=9)
            below[k].set_xlabel(f"+ noise, std {stds[k]:.2f}" if stds[k] else "no noise", fontsize=9)
        above[H].set_title(f"reward {r[i]:.2f}, A {A[i]:+.2f}", fontsize=9)
    path = args.out or f"{args.run}/trajectory.png"
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main(argv=None):
    p = Parser("trajectory", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder")
    p.add_argument("prompt", metavar="PROMPT")
    p.add_argument("--weights", nargs="+", choices=("base", "tuned"), default=("base", "tuned"))
    p.add_argument("--out", metavar="FILE", help="default: RUN/trajectory.png")
    return p.run(draw, argv)


if __name__ == "__main__":
    sys.exit(main())
