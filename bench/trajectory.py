"""How an image is drawn: two trajectories of one prompt, one rewarded above the prompt's average, one below.

    python bench/trajectory.py runs/NAME "cat"                     # writes runs/NAME/trajectory.png
    python bench/trajectory.py runs/NAME "cat" --weights base      # of the pretrained model alone

Above are the latents x_0 to x_H, decoded, and below each the clean image that the model predicts from it, and
the std of the noise added then. At the end stand the reward and the advantage A among 32 images of the
prompt. Base and tuned model start from the same noise and draw the same noise in each step.
"""
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib
import torch
from matplotlib.figure import Figure

import rlcm
from bench.common import Parser, open_run
from rewards import get_reward

COUNT = 32


@torch.no_grad()
def trajectories(model, cfg, prompt):
    """Decoded latents, H + 1 of (B, 3, H, W), decoded predictions, H of them, the stds, the rewards (B,)."""
    s = model.schedule(cfg.steps)
    c = model.encode([prompt] * COUNT)
    z = torch.randn(cfg.steps + 1, COUNT, *model.shape, generator=torch.Generator().manual_seed(0))
    x, _, _ = rlcm.rollout(model.denoise, s, c, z.to(model.device))
    predictions = [model.denoise(x[k], k, c, s) for k in range(cfg.steps)]
    images = [model.decode(latents) for latents in x]
    r = get_reward(cfg.reward, cfg.model)(images[-1], [prompt] * COUNT)
    return images, [model.decode(latents) for latents in predictions], s.noise_next * s.new.sqrt(), r


@matplotlib.rc_context({"text.parse_math": False})
def draw(run, prompt, path, weights):
    """Draw the figure. Raises BadInput."""
    cfg, model = open_run(run)
    rlcm.load_checkpoint(run, model)
    states = {"base": model.reference, "tuned": contextlib.nullcontext}
    H = cfg.steps
    figure = Figure(figsize=(1.7 * (H + 1), 7 * len(weights)), layout="constrained")
    blocks = figure.subplots(4 * len(weights), H + 1).reshape(-1, 2, H + 1)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[], frame_on=False)

    # Which two are shown is decided by the first weights.
    cases = []
    for name in weights:
        with states[name]():
            found = trajectories(model, cfg, prompt)
        shown = [case[1] for case in cases[:2]] or [found[-1].argmax().item(), found[-1].argmin().item()]
        cases += [(name, i, *found) for i in shown]
    for (above, below), (name, i, images, predictions, stds, r) in zip(blocks, cases):
        A = rlcm.advantages(r, [prompt] * COUNT, {}, COUNT, 1, 10.0)
        above[0].set_ylabel(name)
        below[0].set_ylabel("predicted")
        for k in range(H):
            above[k].set_title(f"x_{k}", fontsize=9)
            above[k].imshow(images[k][i].permute(1, 2, 0).cpu())
            below[k].imshow(predictions[k][i].permute(1, 2, 0).cpu())
            below[k].set_xlabel(f"+ noise, std {stds[k]:.2f}" if stds[k] else "no noise", fontsize=9)
        above[H].set_title(f"reward {r[i]:.2f}, A {A[i]:+.2f}", fontsize=9)
        above[H].imshow(images[H][i].permute(1, 2, 0).cpu())
    figure.savefig(path, dpi=100)


def main(argv=None):
    p = Parser("trajectory", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder")
    p.add_argument("prompt", metavar="PROMPT")
    p.add_argument("--weights", nargs="+", choices=("base", "tuned"), default=("base", "tuned"))
    p.add_argument("--out", metavar="FILE", help="default: RUN/trajectory.png")

    def work(args):
        path = args.out or f"{args.run}/trajectory.png"
        draw(args.run, args.prompt, path, args.weights)
        print(f"wrote {path}")

    return p.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
