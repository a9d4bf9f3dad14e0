"""What people look at and take away: sample grids, reward curves, tables, and the trained weights in diffusers' layout.

    every run                                        calls `draw`, `save_samples`, `save_weights` and `curves` as it saves
    python rlcm.py --sample "a cat" --load runs/A    calls `sample`
    python rlcm.py --evaluate runs/A                 calls `evaluate`
    python rlcm.py --plot runs/A runs/B ...          calls `curves`
"""
import csv
import itertools
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import rlcm
from rewards import BadInput, get_prompts, get_reward

STEPS = {"lcm": (1, 2, 4, 8), "diffusion": (10, 20, 50)}  # of --evaluate; for diffusion also half and twice what the run was trained with
PICTURES = 64  # at least, for each number of the table


def pyplot():
    """matplotlib for files only, and silent about its font cache."""
    import logging

    import matplotlib
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def sample_grid(rows, captions, path, title=""):
    """Picture of rows of pictures, captions under each. rows: list of (B, 3, H, W); captions: list of B strings for each row."""
    from PIL import Image, ImageDraw, ImageFont

    tile, line = max(128, rows[0].shape[-1] // 2), 18
    columns = min(8, len(rows[0]))
    lines = [(row[i : i + columns], text[i : i + columns]) for row, text in zip(rows, captions) for i in range(0, len(row), columns)]
    sheet = Image.new("RGB", (columns * tile, len(lines) * (tile + line) + (line if title else 0)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text((4, 1), title, "black", font)
    for n, (row, text) in enumerate(lines):
        y = n * (tile + line) + (line if title else 0)
        for i, (picture, caption) in enumerate(zip(row, text)):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            sheet.paste(Image.fromarray(pixels).resize((tile, tile), Image.LANCZOS), (i * tile, y))
            while font.getlength(caption) > tile - 6:
                caption = caption[:-2] + "…"
            pen.text((i * tile + 4, y + tile + 1), caption, "black", font)
    sheet.save(path)


def draw(model, cfg, prompts, steps=None):
    """Pictures (B, 3, H, W) of prompts from fixed noise, that of picture i from `torch.Generator().manual_seed(i)` in a diffusers pipeline's own
    order: a plain pipeline given the same generators draws the same ones."""
    out, s = [], rlcm.METHODS[cfg.method][0](model.pipe.scheduler, steps or cfg.steps, model.nothing.device)
    g = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    z = torch.stack([torch.stack([torch.randn(1, *model.shape, generator=g_i)[0] for _ in range(len(s.std) + 1)]) for g_i in g], 1)  # (T+1, B, C, h, w)
    rlcm.rollout(model, cfg.method, s, model.encode(prompts), z.to(s.ab.device), cfg.micro_batch, on_pictures=lambda images, b: out.append(images))
    return torch.cat(out)


def likeness(images, first):
    """Mean correlation of pictures with their first versions: 1 is unchanged, 0 unrelated; a blank page counts as 0."""
    a, b = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (images, first))
    norm = a.norm(dim=1) * b.norm(dim=1)
    return float(((a * b).sum(1) / norm.clamp(min=1e-6) * (a.std(1) > 0.02)).mean())


def save_samples(run, epoch, images, first, prompts, r):
    """The sample grid of an epoch, prompts and rewards (B,) below the pictures; `first`: the same ones at epoch 0."""
    title = f"epoch {epoch}: reward {r.mean():.3f}, likeness to epoch 0 {likeness(images, first):.2f}"
    sample_grid([images], [[f"{p}  {v:.2f}" for p, v in zip(prompts, r)]], run / "samples" / f"epoch-{epoch:04d}.png", title)


def plot(cfg):
    """--plot: the curves of several runs in one figure."""
    path = cfg.out or "plot.png"
    curves(cfg.plot, path)
    rlcm.say(f"wrote {path}")


def curves(runs, path):
    """Reward against reward queries and against wall-clock, runs that differ only in their seed as one line (band: one std over the seeds, or
    over the pictures of an epoch where there is one run). Raises BadInput."""
    plt = pyplot()
    groups = {}  # settings but the seed -> runs, each an array of the columns below
    for run in runs:
        settings = {name: value for name, value in asdict(rlcm.read_config(run)).items() if name not in ("seed", "out", "save_every")}
        try:
            rows = list(csv.DictReader(open(Path(run) / "metrics.csv")))
            columns = np.array([[float(row[name]) for name in ("reward_queries", "seconds", "reward_mean", "reward_std")] for row in rows]).T
        except (OSError, KeyError, ValueError) as e:
            raise BadInput(f"{run} has no readable metrics.csv ({type(e).__name__})") from e
        groups.setdefault(tuple(settings.items()), []).append(columns)
    differ = [name for name, _ in next(iter(groups)) if len({str(dict(key)[name]) for key in groups}) > 1]
    if len({dict(key)["method"] for key in groups}) == len(groups):
        differ = []  # the method says it all
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for key, members in groups.items():
        for axis, x in zip(axes, (0, 1)):
            grid = np.linspace(max(m[x, 0] for m in members), min(m[x, -1] for m in members), 200)
            y = np.array([np.interp(grid, m[x], m[2]) for m in members])
            band = y.std(0) if len(members) > 1 else np.interp(grid, members[0][x], members[0][3])
            line, = axis.plot(grid, y.mean(0), label=", ".join(f"{name} {dict(key)[name]}" for name in differ) or dict(key)["method"])
            axis.fill_between(grid, y.mean(0) - band, y.mean(0) + band, alpha=0.2, color=line.get_color(), linewidth=0)
    axes[0].set(xlabel="pictures scored", ylabel=f"reward: {', '.join(sorted({dict(key)['reward'] for key in groups}))}")
    axes[1].set(xlabel="seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_weights(pipe, folder):
    """What was trained, for diffusers: pytorch_lora_weights.safetensors for `pipe.load_lora_weights(folder)`, alpha included, or unet/; atomic."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    aside, name = folder / ".saving", "pytorch_lora_weights.safetensors" if hasattr(pipe.unet, "peft_config") else "unet"
    shutil.rmtree(aside, ignore_errors=True)
    if name == "unet":
        pipe.unet.save_pretrained(aside / name)
        shutil.rmtree(folder / name, ignore_errors=True)
    else:
        type(pipe).save_lora_weights(aside, unet_lora_layers=get_peft_model_state_dict(pipe.unet), **_collate_lora_metadata({"unet": pipe.unet}))
    os.replace(aside / name, folder / name)
    aside.rmdir()


def load_weights(model, run):
    """Put the trained weights of a run directory into a freshly loaded model. Raises BadInput."""
    try:
        if (run / "unet").exists():
            model.unet.load_state_dict(type(model.unet).from_pretrained(run / "unet").state_dict())
        else:
            model.unet.delete_adapters("default")
            model.pipe.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    except Exception as e:
        raise BadInput(f"no readable weights in {run} ({type(e).__name__}): the run saves them every --save-every epochs") from e


def settings_of(run, cfg):
    """Settings of a run directory for drawing: its own, but for steps and guidance given in cfg. Raises BadInput."""
    saved = rlcm.read_config(run)
    if not any((Path(run) / name).exists() for name in ("pytorch_lora_weights.safetensors", "unet")):
        raise BadInput(f"no weights in {run} yet: the run saves them every --save-every epochs")
    return rlcm.resolve(replace(saved, steps=cfg.steps or saved.steps, guidance=saved.guidance if cfg.guidance is None else cfg.guidance, kl=0.0,
                                precision=saved.precision if saved.lora_rank else "fp32"))  # weights trained in full are float32


def sample(cfg):
    """--sample: a row of the base model's pictures above a row of the tuned one's, from the same noise. Returns the file's path."""
    path = Path(cfg.out or Path(cfg.load or ".") / "sample.png")
    prompts, run = cfg.sample, cfg.load
    cfg = settings_of(run, cfg) if run else rlcm.resolve(cfg)
    model = rlcm.load_model(cfg, "cuda" if torch.cuda.is_available() else "cpu")
    rows, captions = [draw(model, cfg, prompts)], [prompts]  # a fresh adapter is the identity
    if run:
        load_weights(model, Path(run))
        rows, captions = rows + [draw(model, cfg, prompts)], [[f"base: {p}" for p in prompts], [f"tuned: {p}" for p in prompts]]
    sample_grid(rows, captions, path)
    rlcm.say(f"wrote {path}")
    return path


def evaluate(cfg):
    """--evaluate: mean reward and standard error of base and tuned model, on training and held-out prompts, by number of steps.

    Diffusion models also with DPM-Solver++, which has no noise. Writes evaluation.csv and evaluation.png. Returns the rows.
    """
    from diffusers import DPMSolverMultistepScheduler

    run, held_out = Path(cfg.evaluate), get_prompts(cfg.eval_prompts)
    cfg = settings_of(run, cfg)
    H, reward_fn = cfg.steps, get_reward(cfg.reward, cfg.model)
    sets = {"training": get_prompts(cfg.prompts), "held-out": held_out}
    model = rlcm.load_model(cfg, "cuda" if torch.cuda.is_available() else "cpu")
    samplers = [(cfg.method, n) for n in (STEPS["lcm"] if cfg.method == "rlcm" else sorted({H // 2, H, 2 * H, *STEPS["diffusion"]}))]
    samplers += [("dpm-solver++", H)] if cfg.method != "rlcm" else []
    own, fast, rows = model.pipe.scheduler, DPMSolverMultistepScheduler.from_config(model.pipe.scheduler.config), []
    rlcm.say(f"{'sampler':>12} {'steps':>5}  {'weights':7} {'prompts':8} {'reward':>8} {'+-':>6}")
    for weights in ("base", "tuned"):
        if weights == "tuned":
            load_weights(model, run)
        for (sampler, n), (name, prompts) in itertools.product(samplers, sets.items()):
            prompts = (prompts * PICTURES)[: max(PICTURES, min(len(prompts), 256))]
            if sampler == "dpm-solver++":
                model.pipe.scheduler, g = fast, [torch.Generator().manual_seed(i) for i in range(len(prompts))]
                images = torch.cat([model.pipe(prompts[i : i + 32], num_inference_steps=n, guidance_scale=cfg.guidance, generator=g[i : i + 32], output_type="pt").images
                                    for i in range(0, len(prompts), 32)]).float()
                model.pipe.scheduler = own
            else:
                images = draw(model, cfg, prompts, n)
            r = torch.cat([reward_fn(images[i : i + 32], prompts[i : i + 32]) for i in range(0, len(prompts), 32)])
            rows.append({"sampler": sampler, "steps": n, "weights": weights, "prompts": name, "reward": r.mean().item(), "standard_error": (r.std() / len(r) ** 0.5).item()})
            rlcm.say(f"{sampler:>12} {n:5d}  {weights:7} {name:8} {rows[-1]['reward']:8.3f} {rows[-1]['standard_error']:6.3f}")
    rlcm.save_metrics(rows, run / "evaluation.csv")
    figure, axis = pyplot().subplots(figsize=(8, 3.8), layout="constrained")
    for label in dict.fromkeys((row["sampler"], row["weights"], row["prompts"]) for row in rows):
        part = [row for row in rows if (row["sampler"], row["weights"], row["prompts"]) == label]
        axis.errorbar([row["steps"] for row in part], [row["reward"] for row in part], [row["standard_error"] for row in part], label=", ".join(label), capsize=3,
                      marker="x" if label[0] == "dpm-solver++" else "o", linestyle="-" if label[2] == "training" else "--", color="C0" if label[1] == "base" else "C1")
    axis.set(xlabel="evaluations of the model for one picture", ylabel=f"reward: {cfg.reward}", xscale="log")
    axis.set_xticks([n for _, n in samplers], [str(n) for _, n in samplers])
    axis.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(run / "evaluation.png", dpi=120)
    rlcm.say(f"wrote {run}/evaluation.csv and {run}/evaluation.png")
    return rows
