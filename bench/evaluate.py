"""What did a run learn? Mean reward of the base and of the tuned model, by number of steps.

    python bench/evaluate.py runs/NAME
    python bench/evaluate.py runs/NAME --prompts my_prompts.txt      # other held-out prompts
    python bench/evaluate.py runs/NAME --steps 8 --guidance 4        # than those of the run

Prints a table and writes it to the run's folder, evaluation.csv and evaluation.png:

sampler          the run's method; for a diffusion model also DPM-Solver++, which has no noise
steps            evaluations of the model for one picture: for rlcm 1, 2, 4, 8 and H, the run's own unless
                 --steps says otherwise; for diffusion H / 2, H, 2 H, 10, 20 and 50; for DPM-Solver++ H
weights          base: the pretrained model; tuned: the run's
prompts          training: the run's; held-out: --prompts
reward           mean over 64 pictures, or one of each prompt up to 256; base and tuned from the same noise
standard_error   of that mean
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from rewards import BadInput, get_prompts, get_reward

STEPS = {"lcm": (1, 2, 4, 8), "diffusion": (10, 20, 50)}
PICTURES = 64  # at least, for each number of the table


def evaluate(run, held_out="other-animals", **given):
    """Measure a run's folder, with its settings but for those given -> the table's rows. Raises BadInput."""
    run, held_out = Path(run), get_prompts(held_out)
    cfg = replace(rlcm.drawing_config(run, **given), kl=0.0, log_with=None)
    rlcm.check(cfg)
    H, reward_fn = cfg.steps, get_reward(cfg.reward, cfg.model)
    sets = {"training": get_prompts(cfg.prompts), "held-out": held_out}
    models = {"base": rlcm.load_model(cfg), "tuned": rlcm.load_model(cfg)}
    rlcm.load_weights(models["tuned"], run)
    if cfg.method == "rlcm":
        samplers = [("rlcm", n) for n in sorted({H, *STEPS["lcm"]})]
    else:
        numbers = sorted({H // 2, H, 2 * H, *STEPS["diffusion"]})
        samplers = [(cfg.method, n) for n in numbers] + [("dpm-solver++", H)]

    rows = []
    rlcm.say(f"{'sampler':>12} {'steps':>5}  {'weights':7} {'prompts':8} {'reward':>8} {'+-':>6}")
    for weights, model in models.items():
        for (sampler, n), (name, prompts) in itertools.product(samplers, sets.items()):
            prompts = (prompts * PICTURES)[: max(PICTURES, min(len(prompts), 256))]
            if sampler == "dpm-solver++":
                images = draw_with_solver(model.pipe, cfg, prompts, n)
            else:
                images = rlcm.draw(model, cfg, prompts, n)
            batches = [slice(i, i + cfg.micro_batch) for i in range(0, len(prompts), cfg.micro_batch)]
            r = torch.cat([reward_fn(images[b], prompts[b]) for b in batches])  # (B,)
            reward, error = r.mean().item(), (r.std() / len(r) ** 0.5).item()
            row = {"sampler": sampler, "steps": n, "weights": weights, "prompts": name}
            rows.append(row | {"reward": reward, "standard_error": error})
            rlcm.say(f"{sampler:>12} {n:5d}  {weights:7} {name:8} {reward:8.3f} {error:6.3f}")
    rlcm.save_metrics(rows, run / "evaluation.csv")
    save_figure(rows, run / "evaluation.png", cfg.reward)
    rlcm.say(f"wrote {run}/evaluation.csv and {run}/evaluation.png")
    return rows


def draw_with_solver(pipe, cfg, prompts, steps):
    """Pictures (B, 3, H, W) by DPM-Solver++ from the x_0 of `rlcm.draw`."""
    from diffusers import DPMSolverMultistepScheduler

    own, images = pipe.scheduler, []
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    options = dict(num_inference_steps=steps, guidance_scale=cfg.guidance, output_type="pt")
    options |= dict(height=cfg.pixels, width=cfg.pixels)
    for i in range(0, len(prompts), cfg.micro_batch):
        part = prompts[i : i + cfg.micro_batch]
        g = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        images.append(pipe(part, generator=g, **options).images.float())
    pipe.scheduler = own
    return torch.cat(images)


def save_figure(rows, path, reward):
    """Reward against number of steps: a line for each sampler, weights and prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis, lines = figure.subplots(), {}
    for row in rows:
        lines.setdefault((row["sampler"], row["weights"], row["prompts"]), []).append(row)
    for (sampler, weights, prompts), part in lines.items():
        steps, mean, error = zip(*((row["steps"], row["reward"], row["standard_error"]) for row in part))
        axis.errorbar(
            steps,
            mean,
            error,
            label=f"{sampler}, {weights}, {prompts}",
            capsize=3,
            marker="x" if sampler == "dpm-solver++" else "o",
            linestyle="-" if prompts == "training" else "--",
            color="C0" if weights == "base" else "C1",
        )
    axis.set(xlabel="evaluations of the model for one picture", ylabel=f"reward: {reward}", xscale="log")
    ticks = sorted({row["steps"] for row in rows})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main(argv=None):
    """The program -> exit status: 0, 2 for bad input, 130 after Ctrl-C."""

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    p.error = refuse
    p.add_argument("run", metavar="RUN", help="a run's folder")
    p.add_argument("--prompts", default="other-animals", help="held-out prompts, as --prompts of rlcm.py")
    p.add_argument("--steps", type=int, metavar="H", help="default: the run's")
    p.add_argument("--guidance", type=float, help="guidance scale; default: the run's")
    try:
        args = p.parse_args(argv)
        rlcm.quiet()
        given = {name: getattr(args, name) for name in ("steps", "guidance")}
        evaluate(args.run, args.prompts, **{name: v for name, v in given.items() if v is not None})
    except (BadInput, OSError) as e:
        print(f"evaluate.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
