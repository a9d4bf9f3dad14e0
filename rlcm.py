"""RLCM in one file: fine-tune a few-step text-to-image model on any reward with policy gradients.

    python rlcm.py --reward compress --steps 4              # train: writes images and a LoRA to runs/NAME/
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress          # or score: the same loop, another Gaussian
    python rlcm.py --model my_model.py:load                 # a network of your own: see class StableDiffusion
    python rlcm.py --resume runs/NAME                       # resume an interrupted run
    accelerate launch rlcm.py --reward compress             # several GPUs: the batch is split across them

THE IDEA
A consistency model samples an image in a few steps: each step predicts the clean image, then re-noises it
with less noise. So every latent on the way is drawn from a Gaussian whose mean is the network's output, and
its log-probability has a closed form. A reward scores the finished image, and steps that led to above-average
images for their prompt become more likely. A diffusion model and a reverse-time SDE have Gaussian steps, too;
only the mean and the std differ, so one loop trains all three.

THE OBJECTIVE
Sampling is a Markov decision process: the state is (x_k, t_k, c), the action is the next latent x_{k+1}, and
the reward is given at the final step. A step that adds no noise has no density, so it is not an action.

    x_{k+1} ~ N( mean_theta(x_k, t_k, c), std_k^2 I ),  k = 0 .. H-1       rlcm_policy and two others
    J(theta) = E[ r(decode(x_H), c) ]                                      rollout
    grad J   = E[ sum_k A grad log p_theta(x_{k+1} | x_k, c) ], std_k > 0  log_prob, policy_loss
    A        = (r - mean r) / std r, per prompt                            advantages

That is RLCM and DDPO. Scores as Actions adds a KL penalty towards the pretrained model (--kl lambda), with r
measured in standard deviations of its prompt's rewards, as A is:

    J(theta) = E[ r - lambda sum_k KL_k ]                                  path_kl
    KL_k     = |mean_theta - mean_ref|^2 / (2 std_k^2)                     gaussian_kl
    grad J   = E[ sum_k A_k grad log p_theta - lambda sum_k grad KL_k ]    train
    A_k      = A - lambda (G_k - mean G_k),  G_k = sum_{j>k} KL_j          G_k is the KL-to-go

KL_k is not in A_k: it depends on the state x_k, not on the action drawn there, so its gradient is taken
directly. The action is only charged for the KL of the later steps, whose states it changes.

GLOSSARY      shape           meaning; symbol in the papers
    B, H, D                   images in a batch; steps (network evaluations); numbers in a latent
    x         (B, C, h, w)    latent before a step; x_0 ~ N(0, I) is noise, x_H is decoded
    k                         number of the step, an int
    c                         encoded prompts: whatever model.encode returns
    s                         schedule: s.t (H,) timestep of each step (tau_n in RLCM); s.alpha_bar and
                              s.alpha_bar_next (H,) alpha-bar before and after the step, the signal's share
                              of the variance; s.std (H,) of the noise added; s.actions: steps with noise
    eps       a function      eps(x, t, c) -> (B, C, h, w): the noise that the network sees in x
    pred_x0   (B, C, h, w)    predicted clean latent, x_0 with a hat in the papers
    ref                       reference: the pretrained model, which is the network without its LoRA
    log_p     (B,)            log-prob of an action; ratio = exp(log_p - log_p_old)
    A         (B,)            advantage

PAPERS on arXiv: RLCM 2404.03673, RL for Consistency Models. LCM 2310.04378, Latent Consistency Models.
    DDPO 2305.13301, Training Diffusion Models with Reinforcement Learning. DDIM 2010.02502. PPO 1707.06347.
    SaA 2409.08400 and 2502.01819, Scores as Actions. Differences from the official code: docs/papers.md.
NOT HERE: full fine-tuning, v-prediction, fp16, value functions. What goes beyond the papers: examples/.
"""
import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
import torch
import transformers
from huggingface_hub.utils import enable_progress_bars
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import rewards
from rewards import PROMPTS, BadInput, explained, get_prompts, get_reward, load_function, one_line, require, to_pil

# ================================================== METHOD ==================================================
# Everything above CONFIG needs only torch, numpy, math, SimpleNamespace and functions above it: copy it.


# ---- The three policies: x (B, C, h, w), int k, c -> mean (B, C, h, w) and std, a scalar, of x_{k+1}
def rlcm_policy(eps, x, k, c, s):
    """Consistency model: predict the clean latent, then add noise of the next level (RLCM, section 4)."""
    alpha_bar, alpha_bar_next = s.alpha_bar[k], s.alpha_bar_next[k]
    pred_x0 = (x - (1 - alpha_bar).sqrt() * eps(x, s.t[k], c)) / alpha_bar.sqrt()
    f = s.c_out[k] * pred_x0 + s.c_skip[k] * x  # consistency function f_theta (LCM, eq. 9)
    return alpha_bar_next.sqrt() * f, s.std[k]


def ddpo_policy(eps, x, k, c, s):
    """Diffusion model: a DDIM step with eta = 1, which is Euler-ancestral (DDPO, section 4; DDIM, eq. 12)."""
    alpha_bar, alpha_bar_next = s.alpha_bar[k], s.alpha_bar_next[k]
    std = s.std[k]
    noise = eps(x, s.t[k], c)
    pred_x0 = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    direction = (1 - alpha_bar_next - std**2).clamp(min=0).sqrt() * noise  # DDIM's "direction pointing to x_t"
    return alpha_bar_next.sqrt() * pred_x0 + direction, std


def score_policy(eps, x, k, c, s):
    """Reverse-time SDE dX = (1/2 beta X + beta a) dt + sqrt(beta) dB with the score as action (SaA, sec. 3).

    The mean is exact for a step of any length (Tweedie's formula), with rho = exp(-integral of beta over it).
    It is DDPO's Gaussian written in terms of the score. What differs is that time is continuous.
    """
    rho = s.alpha_bar[k] / s.alpha_bar_next[k]
    a = -eps(x, s.t[k], c) / (1 - s.alpha_bar[k]).sqrt()  # the score
    return (x + (1 - rho) * a) / rho.sqrt(), s.std[k]


# ---- Their schedules, from the model's own scheduler: the LoRA is trained on the timesteps it is sampled with
def rlcm_schedule(scheduler, cfg):
    """Schedule of cfg.steps from an LCMScheduler. The last step adds no noise: H - 1 actions."""
    scheduler.set_timesteps(cfg.steps)
    t = scheduler.timesteps
    alpha_bar = scheduler.alphas_cumprod[t]
    alpha_bar_next = torch.cat([alpha_bar[1:], torch.ones(1)])
    std = (1 - alpha_bar_next).sqrt()
    s = make_schedule(t, alpha_bar, alpha_bar_next, std)
    s.c_skip, s.c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # LCM, appendix
    return s


def ddpo_schedule(scheduler, cfg):
    """Schedule of cfg.steps from a DDIMScheduler with eta = 1."""
    scheduler.set_timesteps(cfg.steps)
    t = scheduler.timesteps
    t_next = t - scheduler.config.num_train_timesteps // cfg.steps  # as in DDIMScheduler.step
    alpha_bar = scheduler.alphas_cumprod[t]
    alpha_bar_next = scheduler.alphas_cumprod[t_next.clamp(min=0)]
    alpha_bar_next = torch.where(t_next >= 0, alpha_bar_next, scheduler.final_alpha_cumprod)
    return make_schedule(t, alpha_bar, alpha_bar_next, eta_one(alpha_bar, alpha_bar_next))


def score_schedule(scheduler, cfg):
    """Continuous time: the model's log alpha-bar, interpolated linearly between its timesteps.

    The forward SDE dX = -1/2 beta X dt + sqrt(beta) dB has alpha_bar(t) = exp(-integral of beta up to t).
    Steps are even in the cube root of that integral: small near the data, where leftover noise would be
    visible.
    """
    integral = -scheduler.alphas_cumprod.double().log()  # at t = 0 .. 999
    root = torch.linspace(1, 0, cfg.steps + 1).double()
    grid = integral[0] + (integral[-1] - integral[0]) * root**3  # (H+1,)
    t = torch.from_numpy(np.interp(grid[:-1], integral, np.arange(len(integral)))).float()
    alpha_bar = (-grid).exp()
    std = eta_one(alpha_bar[:-1], alpha_bar[1:])
    return make_schedule(t, alpha_bar[:-1].float(), alpha_bar[1:].float(), std.float())


def eta_one(alpha_bar, alpha_bar_next):
    """Std of each step, (H,): DDIM's eq. 16 with eta = 1. In small steps it is sqrt(beta dt)."""
    return ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()


def make_schedule(t, alpha_bar, alpha_bar_next, std):
    """The namespace s of the glossary from four tensors (H,). Only steps with noise are actions."""
    actions = std.nonzero().flatten().tolist()
    return SimpleNamespace(t=t, alpha_bar=alpha_bar, alpha_bar_next=alpha_bar_next, std=std, actions=actions)


# A new sampler is one entry here. `scheduler` is the diffusers class that it samples with: other schedulers are
# converted to it with `options`, or refused where options is None. `tiny` is the embedded model it trains.
METHODS = {
    "rlcm": SimpleNamespace(
        schedule=rlcm_schedule, policy=rlcm_policy, scheduler="LCMScheduler", options=None, tiny="tiny/lcm"
    ),
    "ddpo": SimpleNamespace(
        schedule=ddpo_schedule, policy=ddpo_policy, scheduler="DDIMScheduler", options={}, tiny="tiny/sd"
    ),
    "score": SimpleNamespace(
        schedule=score_schedule, policy=score_policy, scheduler="DDIMScheduler", options={}, tiny="tiny/sd"
    ),
}


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2 I) averaged over the D numbers of a latent.

    x_next, mean: (B, C, h, w); std: scalar; returns (B,). It is averaged, not summed, as in the official code
    of DDPO and RLCM. That makes log-ratios D times smaller, so the clip range is scaled by 1/D as well: 1e-4
    is 1.6 on the summed log-ratio of a 4 x 64 x 64 latent (D = 16,384), and 0.077 on tiny's (D = 768).
    """
    log_p = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_p.mean((1, 2, 3))


def gaussian_kl(mean, mean_ref, std):
    """KL( N(mean, std^2 I) || N(mean_ref, std^2 I) ) in nats, summed over the D numbers of a latent.

    mean, mean_ref: (B, C, h, w); std: scalar; returns (B,). For `score`, in small steps, it is Girsanov's
    1/2 beta dt |a_theta - a_ref|^2 (SaA, section 3).
    """
    return ((mean - mean_ref) ** 2).sum((1, 2, 3)) / (2 * std**2)


@torch.no_grad()
def rollout(policy, eps, s, c, z):
    """Sample B trajectories with z (H+1, B, C, h, w), standard normal: x_0, then the noise of each step.

    Returns x (H+1, B, C, h, w), mean (H, B, C, h, w), and log_p (H, B), 0 where a step adds no noise.
    """
    H, B = len(s.t), z.shape[1]
    x = [z[0]]
    means = []
    log_p = torch.zeros(H, B, device=z.device)
    for k in range(H):
        mean, std = policy(eps, x[k], k, c, s)
        x.append(mean + std * z[k + 1])  # x_{k+1} ~ N(mean_k, std_k^2 I)
        means.append(mean)
        if k in s.actions:
            log_p[k] = log_prob(x[k + 1], mean, std)
    return torch.stack(x), torch.stack(means), log_p


@torch.no_grad()
def path_kl(policy, eps_ref, s, c, x, mean):
    """KL_k along a rollout: x (H+1, B, C, h, w), mean (H, B, C, h, w) -> mean_ref like mean, kl (H, B).

    Their sum bounds the KL of the finished latents where every step is an action (SaA, section 3).
    """
    mean_ref = mean.clone()
    kl = torch.zeros(mean.shape[:2], device=mean.device)
    for k in s.actions:
        mean_ref[k], std = policy(eps_ref, x[k], k, c, s)
        kl[k] = gaussian_kl(mean[k], mean_ref[k], std)
    return mean_ref, kl


def advantages(r, prompts, history, buffer_size, min_count, adv_clip):
    """Rewards standardised per prompt (DDPO and RLCM, appendices): r (B,), B strings -> A (B,).

    `history` maps a prompt to a list of its latest rewards and is updated in place. It holds buffer_size of
    them, or every reward in this batch if that is more. Until a prompt has min_count rewards, the batch's mean
    and std are used.
    """
    r = r.double()  # otherwise integer rewards would truncate A
    A = torch.zeros_like(r)
    for prompt in dict.fromkeys(prompts):
        i = [n for n, other in enumerate(prompts) if other == prompt]
        history[prompt] = (history.get(prompt, []) + r[i].tolist())[-max(buffer_size, len(i)) :]
        seen = r
        if len(history[prompt]) >= min_count:
            seen = torch.tensor(history[prompt], dtype=torch.double)
        std = seen.std(correction=0)
        if std > 1e-6 * seen.abs().max():  # otherwise the rewards are equal up to rounding and A stays 0
            A[i] = (r[i] - seen.mean()) / std
    return A.clamp(-adv_clip, adv_clip).float()


def policy_loss(log_p, log_p_old, A, algo="ppo", clip_range=1e-4):
    """Loss and ratio of n actions: log_p, log_p_old, A: (n,); returns two of (n,).

    With one optimizer step per rollout the ratio is exactly 1, nothing is clipped, and PPO and REINFORCE have
    the same gradient.
    """
    ratio = (log_p - log_p_old).exp()
    if algo == "reinforce":
        return -A * log_p, ratio  # gradient -A grad log p (DDPO_SF in DDPO, section 4)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(A * ratio, A * clipped), ratio  # PPO, eq. 7


# ================================================== CONFIG ==================================================
def flag(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    """All settings of a run; the flags are generated from it. The defaults are rlcm on the embedded model."""

    reward: str = flag("compress", rewards.HELP)
    method: Literal["rlcm", "ddpo", "score"] = flag("rlcm", "consistency model, diffusion model, reverse SDE")
    algo: Literal["ppo", "reinforce"] = flag("ppo", "clipped ratio, or plain score function")
    model: str = flag("tiny", "tiny, folder or hub id of a diffusers pipeline, or path/to/file.py:function")
    prompts: str = flag("animals", f"{', '.join(PROMPTS)}, a text file of prompts, or a quoted prompt")
    resolution: int = flag(64, "height and width of the images in pixels")
    steps: int = flag(4, "H, network evaluations per image")
    epochs: int = flag(27, "number of rollouts")
    batch_size: int = flag(64, "B, images per rollout")
    micro_batch: int = flag(32, "images per network pass and per call of the reward; changes memory only")
    group_size: int = flag(1, "images per prompt in a batch; more than 1 makes the advantage GRPO's")
    updates: int = flag(1, "optimizer steps per epoch, each on an equal part of the batch")
    lr: float = flag(9e-4, "learning rate of Adam")
    kl: float = flag(0.0, "lambda: penalty per nat of KL, in standard deviations of the reward")
    guidance_scale: float = flag(6.0, "guidance scale in training and in sampling")
    lora_rank: int = flag(16, "rank of the LoRA")
    lora_alpha: int = flag(16, "alpha of the LoRA, which is scaled by alpha / rank")
    clip_range: float = flag(1e-4, "PPO's epsilon; small because the log-prob is averaged over the latent")
    adv_clip: float = flag(10.0, "advantages are clipped to this range")
    buffer_size: int = flag(8, "rewards remembered per prompt")
    min_count: int = flag(4, "until a prompt has this many rewards, the batch's mean and std are used")
    max_grad_norm: float = flag(5.0, "the gradient is clipped to this norm")
    precision: Literal["fp32", "bf16"] = flag("fp32", "of the network; bf16 by default at full size on a GPU")
    gradient_checkpointing: bool = flag(False, "less memory and more time for the same gradient")
    log_with: Literal["", "wandb", "tensorboard"] = flag("", "also log metrics and sample grids there")
    seed: int = flag(0, "seed of the LoRA, the prompts and the noise")
    save_every: int = flag(4, "epochs between sample grids and saved LoRAs")
    out: str = flag("", "folder of the run; by default runs/METHOD-REWARD-SEED-TIME")


# RLCM's code and Table 1 for compress, its four GPUs as one; docs/papers.md has the other tasks.
RLCM_FULL = dict(
    model="SimianLuo/LCM_Dreamshaper_v7", precision="bf16", resolution=512, epochs=1000, batch_size=16,
    micro_batch=4, lr=1e-4, guidance_scale=8.0, lora_rank=16, lora_alpha=32, buffer_size=16, min_count=16,
    save_every=10,
)  # fmt: skip
# ddpo-pytorch's config/dgx.py for compress, its eight GPUs as one.
DDPO_FULL = dict(
    model="Lykon/dreamshaper-7", precision="bf16", resolution=512, steps=50, epochs=100, batch_size=256,
    micro_batch=4, updates=4, lr=3e-4, guidance_scale=5.0, lora_rank=4, lora_alpha=4, adv_clip=5.0,
    buffer_size=16, min_count=16, max_grad_norm=1.0, save_every=10,
)  # fmt: skip
# The embedded model, tuned on seeds 0 to 2: docs/results.md. For rlcm they are Config's defaults.
RLCM_TINY = dict(model="tiny")
DDPO_TINY = dict(model="tiny", steps=5, epochs=24, lr=1.5e-3, guidance_scale=3.0, lora_rank=4, lora_alpha=4)
SCORE_TINY = dict(model="tiny", steps=6, epochs=26, lr=2.5e-3, guidance_scale=3.0)
FULL = {"rlcm": RLCM_FULL, "ddpo": DDPO_FULL, "score": DDPO_FULL}
TINY = {"rlcm": RLCM_TINY, "ddpo": DDPO_TINY, "score": SCORE_TINY}


def preset(method="rlcm", model=None):
    """Settings for Config(**...), a dict. Raises BadInput for a model file that does not load.

    Without a model: the papers' model on a CUDA GPU, the embedded one elsewhere. A model of your own starts
    from Config's defaults and the dict `settings` that its function may carry.
    """
    gpu = torch.cuda.is_available()
    if model and ".py:" in model:
        settings = getattr(load_function(model), "settings", {})
    elif model == "tiny" or not (model or gpu):
        settings = TINY[method]
    else:
        settings = FULL[method]
    here = {"method": method, "model": model or settings["model"]}
    return settings | here | ({} if gpu else {"precision": "fp32"})


def check(cfg):
    """Raise BadInput for settings that cannot work, wherever they come from."""
    for f in fields(Config):
        value = getattr(cfg, f.name)
        given = f"--{f.name.replace('_', '-')} {value}"
        choices = get_args(f.type)
        require(not choices or value in choices, f"{given}: choose from {', '.join(choices)}")
        if f.type in (int, float):
            zero = value == 0 and f.name in ("kl", "guidance_scale", "seed")
            require(zero or 0 < value < math.inf, f"{given}: must be a positive number (kl, guidance, seed: or 0)")
    require(cfg.min_count <= cfg.buffer_size, "--min-count: at most --buffer-size")
    require(cfg.algo == "ppo" or cfg.updates == 1, "--algo reinforce has no ratio: --updates must be 1")
    require(cfg.seed < 2**40, "--seed: below 2**40")
    require(not cfg.log_with or find_spec(cfg.log_with), f"first pip install {cfg.log_with}")


# =================================================== TRAIN ==================================================
def train(cfg, resume=False, on_epoch=None):
    """Fine-tune with `cfg`; with resume, continue the run in cfg.out. Returns the run's folder.

    This is Algorithm 1 of RLCM, and with other Gaussians DDPO and Scores as Actions. on_epoch(epoch, model, row)
    is called in every process: with epoch 0 and an empty row before the first epoch, then after each epoch,
    before its row is saved. It may add columns to the row. Raises BadInput.
    """
    from accelerate import Accelerator
    from accelerate.utils import broadcast

    # Settings, reward and prompts. Nothing is written before the first images have been rewarded.
    check(cfg)
    reward = get_reward(cfg.reward, cfg.model)
    name = f"{cfg.method}-{re.sub(r'[^a-zA-Z0-9.]+', '-', cfg.reward)}-{cfg.seed}"
    out = Path(cfg.out or f"runs/{name}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}")
    require(resume or not any(out.glob("*")), f"{out} is not empty: give another --out, or --resume {out}")
    prompts = get_prompts(str(out / "prompts.txt") if resume else cfg.prompts)
    say(f"reward {cfg.reward}; {len(prompts)} prompts, the first is {prompts[0]!r}; folder {out}")
    gpu = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not gpu, mixed_precision="no", log_with=cfg.log_with or None, project_dir=out)
    for divisor in (accelerator.num_processes * cfg.updates, cfg.group_size):
        require(cfg.batch_size % divisor == 0, f"--batch-size {cfg.batch_size}: must be a multiple of {divisor}")

    # The model, its schedule and the optimizer. Every process starts from the first one's weights.
    model = load_model(cfg, accelerator.device)
    with explained(f"--steps {cfg.steps} does not suit the model's scheduler"):
        s = model.schedule(cfg.steps)
    require(s.actions, f"--method {cfg.method} --steps {cfg.steps} adds no noise: nothing to reinforce")
    policy = METHODS[cfg.method].policy
    parameters = list(model.trainable.values())
    broadcast([p.data for p in parameters])
    optimizer = torch.optim.Adam(parameters, cfg.lr)
    rows, history = [], {}
    if resume:
        state = load_checkpoint(out, model)
        optimizer.load_state_dict(state["optimizer"])
        rows, history = state["rows"], state["history"]
        require(len(rows) < cfg.epochs, f"{out} already has {len(rows)} epochs: give more --epochs")

    # The images of the untrained model make the run's folder: a broken reward fails here.
    if accelerator.is_main_process:
        if not resume:
            save_samples(model, cfg, reward, prompts, out, 0)
            with replacing(out / "prompts.txt") as part:
                part.write_text("\n".join(prompts), encoding="utf-8")
        with replacing(out / "config.json") as part:
            part.write_text(json.dumps(asdict(cfg), indent=1))
    accelerator.init_trackers("rlcm", asdict(cfg))
    if on_epoch and not resume:
        on_epoch(0, model, {})

    # This process's part of a batch is cut into minibatches, one optimizer step each, and these are cut into
    # micro-batches. A micro-batch goes through the network as a whole, in the rollout and again in the update.
    mine = torch.arange(cfg.batch_size).chunk(accelerator.num_processes)[accelerator.process_index]
    parts = mine.chunk(cfg.updates)
    minibatches = [[SimpleNamespace(i=i) for i in part.split(cfg.micro_batch)] for part in parts]
    micro_batches = sum(minibatches, [])
    terms_per_step = len(s.actions) * len(parts[0])
    seconds = rows[-1]["seconds"] if rows else 0
    bar = progress(range(cfg.epochs), "training", initial=len(rows), unit="epoch", leave=True, delay=0)

    for epoch in range(len(rows) + 1, cfg.epochs + 1):
        # Prompts and noise depend on seed and epoch alone, so a resumed run draws the same again.
        began = time.time()
        generator = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        drawn = torch.randint(len(prompts), (cfg.batch_size // cfg.group_size,), generator=generator)
        batch = [prompts[n] for n in drawn.repeat_interleave(cfg.group_size)]
        z = torch.randn(cfg.steps + 1, cfg.batch_size, *model.shape, generator=generator)

        # 1. Rollout: the sampler is the policy. The reward is given to the finished images.
        for micro in progress(micro_batches, f"epoch {epoch}, sampling"):
            own = [batch[n] for n in micro.i]
            micro.c = model.encode(own)
            noise = z[:, micro.i].to(model.device)
            micro.x, mean, micro.log_p = rollout(policy, model.eps, s, micro.c, noise)
            with torch.no_grad():
                images = model.decode(micro.x[-1])
            micro.r = reward.terms(images, own).to(model.device)  # (b, terms)
            micro.kl = torch.zeros_like(micro.log_p)  # (H, b)
            if cfg.kl > 0:
                with model.reference():
                    micro.mean_ref, micro.kl = path_kl(policy, model.eps, s, micro.c, micro.x, mean)

        # 2. Advantage: was the image better than usual for its prompt? Minus lambda times the KL-to-go.
        terms = accelerator.gather(torch.cat([micro.r for micro in micro_batches])).cpu()  # (B, terms)
        kl = accelerator.gather(torch.cat([micro.kl.T for micro in micro_batches]).contiguous()).T  # (H, B)
        r = terms.sum(1)
        A = advantages(r, batch, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        kl_to_go = kl.sum(0) - kl.cumsum(0)  # KL_k itself is not in it
        A = A.to(model.device) - cfg.kl * (kl_to_go - kl_to_go.mean(1, keepdim=True))  # (H, B)

        # 3. Policy gradient: each action of the rollout again, now with gradients.
        losses, log_ratios, norms = [], [], []
        for minibatch in minibatches:
            for k in progress(s.actions, f"epoch {epoch}, learning"):
                for micro in minibatch:
                    mean, std = policy(model.eps, micro.x[k], k, micro.c, s)
                    log_p = log_prob(micro.x[k + 1], mean, std)
                    log_p_old = micro.log_p[k]
                    loss, ratio = policy_loss(log_p, log_p_old, A[k, micro.i], cfg.algo, cfg.clip_range)
                    if cfg.kl > 0:  # lambda grad KL_k, averaged over D as the log-prob is
                        loss = loss + cfg.kl * gaussian_kl(mean, micro.mean_ref[k], std) / mean[0].numel()
                    (loss.sum() / terms_per_step).backward()
                    losses.append(loss.detach())
                    log_ratios.append((log_p - log_p_old).detach())
            for p in parameters:
                if p.grad is not None:
                    p.grad = accelerator.reduce(p.grad, "mean")
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # 4. The row of metrics.csv. The ratio starts at exactly 1: in fp32 its drift is 0.
        log_ratio = torch.cat(log_ratios)
        drift = log_ratio.expm1().abs()  # |ratio - 1|
        means = {
            "loss": torch.cat(losses).mean(),
            "approx_kl": (log_ratio**2).mean() / 2,  # from the rollout's policy to the updated one, nats / D^2
            "clip_fraction": (drift > cfg.clip_range).float().mean(),
            "ratio_drift": drift[: len(drift) // cfg.updates].max(),  # before the first optimizer step
            "grad_norm": torch.stack(norms).mean(),  # before clipping
        }
        values = accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
        require(math.isfinite(values[-1]), f"the gradient of epoch {epoch} is not finite: try a smaller --lr")
        seconds += time.time() - began
        row = {
            "epoch": epoch,
            "seconds": round(seconds, 3),  # of sampling, rewards and learning
            "images": epoch * cfg.batch_size,  # rewarded so far
            "reward_mean": r.mean().item(),
            "reward_std": r.std(correction=0).item(),
            "path_kl": kl.sum(0).mean().item(),  # nats along an image's path; 0 without a KL penalty
            **dict(zip(means, values)),
            **dict(zip(reward.names, terms.mean(0).tolist())),  # the terms of a sum
            "gpu_gb": torch.cuda.max_memory_allocated() / 1e9,  # peak so far
        }
        if on_epoch:
            on_epoch(epoch, model, row)
        rows.append(row)
        accelerator.log(row, epoch)
        bar.set_postfix(reward=f"{row['reward_mean']:.3f}", start=f"{rows[0]['reward_mean']:.3f}")
        bar.update()

        # 5. Save. The checkpoint comes last: after a kill, --resume repeats the epoch that was not finished.
        if accelerator.is_main_process:
            save_metrics(rows, out)
            if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
                sheet = save_samples(model, cfg, reward, prompts, out, epoch)
                for tracker in accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if cfg.log_with == "tensorboard" else {}
                    tracker.log_images({"samples": [np.asarray(sheet)]}, epoch, **layout)
                save_curve(rows, cfg, out)
                model.save(out)
            save_checkpoint(model, optimizer, rows, history, out)

    bar.close()
    accelerator.end_training()
    say(f"reward {rows[0]['reward_mean']:.3f} -> {rows[-1]['reward_mean']:.3f}, {rows[-1]['seconds']:.0f} s")
    say(f"to train longer: python rlcm.py --resume {shlex.quote(str(out))} --epochs {2 * cfg.epochs}")
    say(f'{out} has samples/, reward.png, metrics.csv and the LoRA: pipe.load_lora_weights("{out}")')
    return out


def first_process():
    return os.environ.get("RANK", "0") == "0"


def say(line):
    if first_process():
        print(line, flush=True)


def progress(items, what, **options):
    """A progress bar, in the first process; by default one that appears only when it takes long."""
    options = dict(leave=False, delay=3, dynamic_ncols=True, disable=not first_process()) | options
    return tqdm(items, what, **options)


# =================================================== MODEL ==================================================
def load_model(cfg, device):
    """The model that cfg.model names, on a device. Raises BadInput."""
    if ".py:" not in cfg.model:
        return StableDiffusion(load_pipeline(cfg).to(device), cfg)
    function = load_function(cfg.model)
    with explained(f"the model {cfg.model} cannot be made"):
        return function(cfg, device)


def load_pipeline(cfg):
    """The diffusers pipeline that cfg.model names. Raises BadInput."""
    from diffusers import DiffusionPipeline

    source = cfg.model
    if source == "tiny":
        source = str(Path(__file__).resolve().parent / METHODS[cfg.method].tiny)
    kinds = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    options = dict(safety_checker=None, requires_safety_checker=False)
    options["dtype"] = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    advice = "give a folder or hub id of a diffusers pipeline, or --model tiny, which needs no download"
    with explained(f"cannot load the model {source}, {advice}"):
        kind = DiffusionPipeline.load_config(source)["_class_name"]
        require(kind in kinds, f"{source} is a {kind}: --model takes {' and '.join(kinds)}, or a file")
        return DiffusionPipeline.from_pretrained(source, **options)


LORA = "pytorch_lora_weights.safetensors"


class StableDiffusion:
    """The network that `train` trains: a LoRA on Stable Diffusion 1 or 2, or on their consistency models.

    `train` uses nothing but these members, so any class that has them can be trained (--model file.py:function
    with function(cfg, device) returning one). A relative of this class names the `component` of its pipeline
    that is trained and overrides `encode` and `predict`, and `set_up` if its scheduler is of another family.

        shape               (C, h, w) of a latent
        device              where encode, eps and decode compute, and where latents live
        trainable           dict: name -> parameter, float32
        schedule(H)         -> s as in the glossary, for the policy of cfg.method
        encode(prompts)     B strings -> c, anything that eps understands
        eps(x, t, c)        x (B, C, h, w), t a scalar -> predicted noise (B, C, h, w), float32, differentiable
        decode(x)           clean latents (B, C, h, w) -> images (B, 3, H, W), float32 in [0, 1]
        reference()         a context in which eps is the pretrained network's
        save(folder)        write the trained weights into a run's folder
    """

    component = "unet"
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as in both official codes

    def __init__(self, pipe, cfg):
        """pipe: a diffusers pipeline, on its device. Raises BadInput for what would be trained wrongly."""
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.pipe, self.cfg, self.device = pipe, cfg, pipe.device
        self.network = getattr(pipe, self.component)
        self.dtype = self.network.dtype
        self.set_up()

        # Everything is frozen but a fresh LoRA, whose weights are float32 whatever the network's dtype.
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        options = dict(target_modules=self.lora_layers, init_lora_weights="gaussian")
        lora = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.network.add_adapter(lora)
        cast_training_params(self.network, torch.float32)
        self.trainable = {name: p for name, p in self.network.named_parameters() if p.requires_grad}

        # cuDNN's attention may be chosen in the rollout but not in the update: the ratio would not start at 1.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if cfg.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        pipe.set_progress_bar_config(disable=True)

    def set_up(self):
        """The scheduler of the method, the guidance and the shape of a latent."""
        import diffusers

        pipe, cfg, method = self.pipe, self.cfg, METHODS[self.cfg.method]
        config, found = pipe.scheduler.config, type(pipe.scheduler).__name__
        faults = {
            f"has a {found}, which has no betas": "beta_schedule" not in config,
            f"has a {found}, not an {method.scheduler}": method.options is None and found != method.scheduler,
            "does not predict epsilon": config.get("prediction_type") != "epsilon",
            "has zero terminal SNR": config.get("rescale_betas_zero_snr"),
            "has a VAE that shifts its latents": pipe.vae.config.get("latents_mean"),
        }
        for fault, there in faults.items():
            require(not there, f"{cfg.model} {fault}: {cfg.method} does not support that")
        if method.options is not None:
            pipe.scheduler = getattr(diffusers, method.scheduler).from_config(config, **method.options)

        # A consistency model takes the guidance scale, less one, as an input (LCM, section 4.2). Others are
        # guided here, with the empty prompt.
        dim = self.network.config.time_cond_proj_dim
        self.guided = not dim and cfg.guidance_scale > 1
        if dim:
            w = pipe.get_guidance_scale_embedding(torch.tensor([cfg.guidance_scale - 1.0]), dim)
        self.w = w.to(self.device, self.dtype) if dim else None

        unit = pipe.vae_scale_factor * 2 ** (len(self.network.config.block_out_channels) - 1)
        require(cfg.resolution % unit == 0, f"--resolution {cfg.resolution}: must be a multiple of {unit}")
        size = cfg.resolution // pipe.vae_scale_factor
        self.shape = (self.network.config.in_channels, size, size)

    def schedule(self, H):
        return METHODS[self.cfg.method].schedule(self.pipe.scheduler, replace(self.cfg, steps=H))

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> (B, L, E); with classifier-free guidance (2B, L, E), first B empty prompts."""
        c, empty = self.pipe.encode_prompt(prompts, self.device, 1, self.guided)
        return torch.cat([empty, c]) if self.guided else c

    def eps(self, x, t, c):
        if self.guided:  # both halves in one pass
            x = torch.cat([x, x])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            noise = self.predict(x.to(self.dtype), t, c).float()
        if self.guided:
            uncond, cond = noise.chunk(2)
            noise = uncond + self.cfg.guidance_scale * (cond - uncond)
        return noise

    def predict(self, x, t, c):
        """The network's output."""
        w = None if self.w is None else self.w.expand(len(x), -1)
        return self.network(x, t, encoder_hidden_states=c, timestep_cond=w).sample

    def decode(self, x):
        """With gradients, if x has any."""
        vae = self.pipe.vae
        x = (x / vae.config.scaling_factor).to(vae.dtype)
        return (vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)

    @contextlib.contextmanager
    def reference(self):
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def save(self, folder):
        """The LoRA in diffusers' format. alpha / rank is multiplied into it, so it is right in every loader."""
        from peft.utils import get_peft_model_state_dict

        rank, alpha = self.cfg.lora_rank, self.cfg.lora_alpha
        weights = get_peft_model_state_dict(self.network)
        weights = {name: w * alpha / rank if "lora_B" in name else w for name, w in weights.items()}
        settings = self.network.peft_config["default"].to_dict() | {"lora_alpha": rank}
        given = {f"{self.component}_lora_layers": weights, f"{self.component}_lora_adapter_metadata": settings}
        with tempfile.TemporaryDirectory() as temporary, replacing(Path(folder) / LORA) as part:
            self.pipe.save_lora_weights(temporary, **given)
            shutil.copyfile(Path(temporary) / LORA, part)  # safetensors would make it private

    def too_long(self, prompts):
        """Those prompts of which the text encoder sees only the beginning, and how many tokens it sees."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(prompts).input_ids
        return [p for p, i in zip(prompts, ids) if len(i) > tokenizer.model_max_length]


def generate(model, cfg, prompts):
    """Images (B, 3, H, W) of B prompts; the noise of image i is that of torch.Generator().manual_seed(i).

    In float32 a plain diffusers pipeline with the same generators draws the same images.
    """
    policy, s = METHODS[cfg.method].policy, model.schedule(cfg.steps)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    z = torch.stack([torch.randn(cfg.steps + 1, *model.shape, generator=g) for g in generators], 1)
    images = []
    for i in progress(range(0, len(prompts), cfg.micro_batch), "drawing samples"):
        micro = slice(i, i + cfg.micro_batch)
        c = model.encode(prompts[micro])
        x, _, _ = rollout(policy, model.eps, s, c, z[:, micro].to(model.device))
        with torch.no_grad():
            images.append(model.decode(x[-1]))
    return torch.cat(images)


# =================================================== FILES ==================================================
@contextlib.contextmanager
def replacing(path):
    """Write to the path that this yields; then it becomes `path` at once: a kill leaves the old file or the new."""
    path = Path(path)
    part = path.with_name(f"part-{path.name}")
    yield part
    os.replace(part, path)


def save_samples(model, cfg, reward, prompts, out, epoch):
    """Write samples/epoch-0000.png: the same prompts and noise every time. Returns it as a Pillow image."""
    prompts = (prompts * 16)[:16]
    images, m = generate(model, cfg, prompts), cfg.micro_batch
    r = torch.cat([reward(images[i : i + m], prompts[i : i + m]) for i in range(0, 16, m)])
    captions = [f"{prompt}  {value:.2f}" for prompt, value in zip(prompts, r)]
    sheet = sample_grid(images, captions, f"epoch {epoch}: reward {r.mean():.3f}")
    with explained(f"cannot make a new folder {out}; give another --out, or --resume {out}"):
        (out / "samples").mkdir(parents=True, exist_ok=epoch > 0)  # two runs never share a folder
    with replacing(out / "samples" / f"epoch-{epoch:04d}.png") as part:
        sheet.save(part)
    return sheet


def sample_grid(images, captions, title="", columns=8):
    """Images (B, 3, H, W) in rows of `columns` with a caption below each, as one Pillow image."""
    tile, line = max(128, images.shape[-1] // 2), 18
    font = ImageFont.load_default(13)
    height = tile + line
    sheet = Image.new("RGB", (columns * tile, line + math.ceil(len(images) / columns) * height), "white")
    ImageDraw.Draw(sheet).text((4, 1), title, "black", font)
    for n, image in enumerate(to_pil(images)):
        cell = Image.new("RGB", (tile, height), "white")
        cell.paste(image.resize((tile, tile), Image.LANCZOS))
        ImageDraw.Draw(cell).text((4, tile + 1), captions[n], "black", font)
        sheet.paste(cell, (n % columns * tile, line + n // columns * height))
    return sheet


def save_curve(rows, cfg, out):
    """reward.png: mean and standard deviation of the reward by epoch."""
    mean, std = np.array([(row["reward_mean"], row["reward_std"]) for row in rows]).T
    epochs = range(1, len(rows) + 1)
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    axis.plot(epochs, mean)
    axis.fill_between(epochs, mean - std, mean + std, alpha=0.2)
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"reward: {cfg.reward}", parse_math=False)
    with replacing(out / "reward.png") as part:
        figure.savefig(part)


def save_metrics(rows, out):
    """metrics.csv: a row per epoch. Columns that some rows lack are empty there."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with replacing(out / "metrics.csv") as part, open(part, "w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def save_checkpoint(model, optimizer, rows, history, out):
    state = dict(trainable=model.trainable, optimizer=optimizer.state_dict(), history=history, rows=rows)
    buffer = io.BytesIO()  # torch.save reports a full disk only as an internal error
    torch.save(state, buffer)
    with replacing(out / "checkpoint.pt") as part:
        part.write_bytes(buffer.getvalue())


def load_checkpoint(out, model):
    """Put the weights of a run's checkpoint into the model. Returns the checkpoint, a dict. Raises BadInput."""
    with explained(f"no checkpoint that fits in {out}; start a new run"):
        state = torch.load(Path(out) / "checkpoint.pt", map_location="cpu", weights_only=True)
        saved, model_has = ({name: p.shape for name, p in w.items()} for w in (state["trainable"], model.trainable))
        require(saved == model_has, f"the checkpoint in {out} is not of this model and LoRA")
        for name, p in model.trainable.items():
            p.data.copy_(state["trainable"][name])
    return state


def read_config(out):
    """config.json of a run's folder as a Config, checked. Raises BadInput."""
    with explained(f"{out} is not a run's folder of this version"):
        cfg = Config(**json.loads((Path(out) / "config.json").read_text()))
        check(cfg)
    return cfg


# =============================================== COMMAND LINE ===============================================
def parse(argv):
    """The command line -> a Config, and whether to resume. Raises BadInput."""
    summary = __doc__.split("\n\n")[0]
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, description=summary)
    parser.error = lambda message: require(False, f"{message} (--help lists the flags)")
    parser.add_argument("--resume", metavar="RUN", help="resume this run's folder; only --epochs may change")
    parser.set_defaults(model=None)
    words = [word for word in argv if word not in ("-h", "--help")]
    first = parser.parse_known_args(words)[0]
    with explained(f"the settings of {first.model} do not fit"):
        defaults = asdict(Config(**preset(first.method, first.model)))
    if first.resume:
        defaults = asdict(read_config(first.resume)) | {"out": first.resume}
    parser.set_defaults(**defaults)
    used = vars(parser.parse_args(words))
    parser.set_defaults(**used)  # so that --help shows the values that would be used
    parser.parse_args(argv)
    resume = used.pop("resume")
    changed = [name for name in used if used[name] != defaults[name] and name != "epochs"]
    require(not (resume and changed), f"with --resume only --epochs may change, not {' '.join(changed)}")
    return Config(**used), bool(resume)


def quiet():
    """Libraries print errors only, and show a progress bar for a download but none for loading."""
    import diffusers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    enable_progress_bars()


def main(argv=None):
    """The program. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        cfg, resume = parse(sys.argv[1:] if argv is None else argv)
        quiet()
        say(f"{cfg.method} on {cfg.model}" + ("" if torch.cuda.is_available() else " (no CUDA GPU here)"))
        train(cfg, resume)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; --resume with the run's folder continues after its last saved epoch"
    except torch.OutOfMemoryError as e:
        status, message = 2, f"out of GPU memory: lower --micro-batch or add --gradient-checkpointing ({e})"
    except (BadInput, OSError) as e:  # OSError: a full disk, or a folder that cannot be written
        status, message = 2, e
    print(f"rlcm.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.modules["rlcm"] = sys.modules["__main__"]  # for a model or reward file that imports rlcm
    sys.exit(main())
