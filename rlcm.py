"""RLCM in one file: fine-tune a few-step text-to-image model on any reward with policy gradients.

    python rlcm.py --reward compress --steps 4              # train: writes images and a LoRA to runs/NAME/
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress          # or score: the same loop, a different Gaussian
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
the reward is given at the final step. A step that adds no noise has no density: it is not an action, and the
sums over k leave it out.

    x_{k+1} ~ N( mean_theta(x_k, t_k, c), std_k^2 I ),  k = 0 .. H-1       the three policies
    J(theta) = E[ r(decode(x_H), c) ]                                      rollout
    grad J   = E[ sum_k A grad log p_theta(x_{k+1} | x_k, c) ]             log_prob, policy_loss
    A        = (r - mean r) / std r, per prompt                            advantages

That is RLCM and DDPO. Scores as Actions adds a KL penalty towards the pretrained model (--kl lambda), with r
measured in standard deviations of its prompt's rewards, as A is:

    J(theta) = E[ r - lambda sum_k KL_k ]                                  path_kl
    KL_k     = |mean_theta - mean_ref|^2 / (2 std_k^2)                     gaussian_kl
    grad J   = E[ sum_k A_k grad log p_theta - lambda sum_k grad KL_k ]    train
    A_k      = A - lambda (G_k - mean G_k),  G_k = sum_{j>k} KL_j          G_k is the KL-to-go

mean G_k is that of the batch. KL_k is not in A_k: it depends on the state x_k, not on the action drawn there,
so its gradient is taken directly. The action is only charged for the KL of the later steps, whose states it
changes.

GLOSSARY      shape           meaning; symbol in the papers
    B, H, D                   images in a batch; steps (network evaluations); elements of a latent
    x         (B, C, h, w)    latent before step k; x_0 ~ N(0, I) is noise, x_H is decoded
    k                         index of the step, an int
    c                         encoded prompts: whatever model.encode returns
    s                         schedule: s.t (H,) timestep of each step (tau_n in RLCM); s.alpha_bar and
                              s.alpha_bar_next (H,) alpha-bar before and after the step, the signal's share
                              of the variance; s.std (H,) std of the added noise; s.actions: list of the
                              steps that add noise; rlcm also has s.c_skip, s.c_out (H,)
    eps       a function      eps(x, t, c) -> (B, C, h, w): the noise that the network predicts in x
    pred_x0   (B, C, h, w)    predicted clean latent; the papers number backwards: x_0 hat
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
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import transformers
from huggingface_hub.utils import enable_progress_bars
from matplotlib.figure import Figure
from PIL import ImageDraw, ImageOps
from tqdm import tqdm

import rewards
from rewards import PROMPTS, BadInput, explained, get_prompts, get_reward, load_function, require, to_pil

# ================================================== METHOD ==================================================
# Everything from here to CONFIG needs only torch, numpy, math and SimpleNamespace, so it can be copied.


# ---- The three policies: x (B, C, h, w), int k, c -> mean (B, C, h, w) and std, a scalar, of x_{k+1}
def rlcm_policy(eps, x, k, c, s):
    """Consistency model: predict the clean latent, then add noise of the next level (RLCM, section 4)."""
    alpha_bar = s.alpha_bar[k]
    pred_x0 = (x - (1 - alpha_bar).sqrt() * eps(x, s.t[k], c)) / alpha_bar.sqrt()
    f = s.c_out[k] * pred_x0 + s.c_skip[k] * x  # consistency function f_theta (LCM, eq. 9)
    return s.alpha_bar_next[k].sqrt() * f, s.std[k]


def ddpo_policy(eps, x, k, c, s):
    """Diffusion model: a DDIM step with eta = 1, which is Euler-ancestral (DDPO, section 4; DDIM, eq. 12)."""
    alpha_bar = s.alpha_bar[k]
    alpha_bar_next = s.alpha_bar_next[k]
    std = s.std[k]
    noise = eps(x, s.t[k], c)
    pred_x0 = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    direction = (1 - alpha_bar_next - std**2).clamp(min=0).sqrt() * noise  # DDIM: "pointing to x_t"
    return alpha_bar_next.sqrt() * pred_x0 + direction, std


def score_policy(eps, x, k, c, s):
    """Reverse-time SDE dX = (1/2 beta X + beta a) dt + sqrt(beta) dB with the score as action (SaA, sec. 3).

    The mean is exact for a step of any length (Tweedie's formula), with rho = exp(-integral of beta over it).
    It is DDPO's Gaussian written in terms of the score. What differs is that time is continuous.
    """
    rho = s.alpha_bar[k] / s.alpha_bar_next[k]
    a = -eps(x, s.t[k], c) / (1 - s.alpha_bar[k]).sqrt()  # the score
    return (x + (1 - rho) * a) / rho.sqrt(), s.std[k]


# ---- Their schedules, from the model's own scheduler: a LoRA is trained on the timesteps it is sampled with
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
    return make_schedule(t, alpha_bar, alpha_bar_next, eta_one(alpha_bar, alpha_bar_next), eta=1.0)


def score_schedule(scheduler, cfg):
    """Continuous time: the model's log alpha-bar, interpolated linearly between its timesteps.

    The forward SDE dX = -1/2 beta X dt + sqrt(beta) dB has alpha_bar(t) = exp(-integral of beta up to t).
    Steps are evenly spaced in the cube root of that integral: small near the data, where leftover noise
    would be visible.
    """
    integral = -scheduler.alphas_cumprod.double().log()  # at t = 0 .. 999
    root = torch.linspace(1, 0, cfg.steps + 1).double()
    grid = integral[0] + (integral[-1] - integral[0]) * root**3  # (H+1,)
    t = torch.from_numpy(np.interp(grid[:-1], integral, range(len(integral)))).float()
    alpha_bar = (-grid).exp()
    std = eta_one(alpha_bar[:-1], alpha_bar[1:])
    return make_schedule(t, alpha_bar[:-1].float(), alpha_bar[1:].float(), std.float())


def eta_one(alpha_bar, alpha_bar_next):
    """Std of each step, (H,): DDIM's eq. 16 with eta = 1. For small steps it is about sqrt(beta dt)."""
    return ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()


def make_schedule(t, alpha_bar, alpha_bar_next, std, **step_options):
    """The glossary's s from four tensors (H,), with keyword arguments for the scheduler's own step()."""
    s = SimpleNamespace(t=t, alpha_bar=alpha_bar, alpha_bar_next=alpha_bar_next, std=std)
    s.step_options = step_options
    s.actions = std.nonzero().flatten().tolist()
    return s


# A new sampler is one entry here, with a preset in TINY or FULL if it needs one. `scheduler` is the diffusers
# class that people sample with: a model with another one is converted to it with `options`, or refused if
# that is None. When a run starts, the steps of the method `checked_as` are compared with that scheduler:
# score has a time grid of its own, so ddpo's steps stand for it. `tiny` is the embedded model to train.
LCM = dict(scheduler="LCMScheduler", options=None, checked_as="rlcm", tiny="tiny/lcm")
DDIM = dict(scheduler="DDIMScheduler", options={"clip_sample": False}, checked_as="ddpo", tiny="tiny/sd")
METHODS = {
    "rlcm": SimpleNamespace(schedule=rlcm_schedule, policy=rlcm_policy, **LCM),
    "ddpo": SimpleNamespace(schedule=ddpo_schedule, policy=ddpo_policy, **DDIM),
    "score": SimpleNamespace(schedule=score_schedule, policy=score_policy, **DDIM),
}


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2 I) averaged over the D elements of a latent.

    x_next, mean: (B, C, h, w); std: scalar; returns (B,). It is averaged, not summed, as in the official code
    of DDPO and RLCM. That makes log-ratios D times smaller, so the clip range is scaled by 1/D as well: 1e-4
    is 1.6 on the summed log-ratio of a 4 x 64 x 64 latent (D = 16,384), and 0.077 on tiny's (D = 768).
    """
    log_p = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_p.mean((1, 2, 3))


def gaussian_kl(mean, mean_ref, std):
    """KL( N(mean, std^2 I) || N(mean_ref, std^2 I) ) in nats, summed over the D elements of a latent.

    mean, mean_ref: (B, C, h, w); std: scalar; returns (B,). For `score`, in small steps, it is Girsanov's
    1/2 beta dt |a_theta - a_ref|^2 (SaA, section 3).
    """
    return ((mean - mean_ref) ** 2).sum((1, 2, 3)) / (2 * std**2)


@torch.no_grad()
def rollout(policy, eps, s, c, z):
    """Sample B trajectories with z (H+1, B, C, h, w), standard normal: x_0, then the noise of each step.

    Returns two lists of (B, C, h, w), H + 1 latents x and H means, and log_p, a dict: action k -> (B,).
    """
    x = [z[0]]
    means = []
    log_p = {}
    for k in range(len(s.t)):
        mean, std = policy(eps, x[k], k, c, s)
        means.append(mean)
        x.append(mean + std * z[k + 1])  # x_{k+1} ~ N(mean_k, std_k^2 I)
        if k in s.actions:
            log_p[k] = log_prob(x[k + 1], mean, std)
    return x, means, log_p


@torch.no_grad()
def path_kl(policy, eps_ref, s, c, x, means):
    """KL_k along a rollout's x and means. Returns mean_ref, a dict: action k -> (B, C, h, w), and kl (B, H).

    The sum of KL_k bounds the KL of the finished latents if every step is an action (SaA, section 3).
    """
    mean_ref = {}
    kl = x[0].new_zeros(len(x[0]), len(means))
    for k in s.actions:
        mean_ref[k], std = policy(eps_ref, x[k], k, c, s)
        kl[:, k] = gaussian_kl(means[k], mean_ref[k], std)
    return mean_ref, kl


def advantages(r, prompts, history, buffer_size, min_count, adv_clip):
    """Rewards standardised per prompt (DDPO and RLCM, appendices): r (B,), B strings -> A (B,).

    `history` maps a prompt to a list of its latest rewards and is updated in place. It holds buffer_size of
    them, or every reward in this batch if that is more. Until a prompt has min_count rewards, the mean and
    std of the whole batch are used.
    """
    r = r.double()  # otherwise integer rewards would truncate A
    A = torch.zeros_like(r)
    for prompt in dict.fromkeys(prompts):
        i = [n for n, other in enumerate(prompts) if other == prompt]
        latest = history.get(prompt, []) + r[i].tolist()
        history[prompt] = latest[-max(buffer_size, len(i)) :]
        enough = len(history[prompt]) >= min_count
        seen = r.new_tensor(history[prompt]) if enough else r
        std = seen.std(correction=0)
        if std > 1e-6 * seen.abs().max():  # otherwise the rewards are equal up to rounding and A stays 0
            A[i] = (r[i] - seen.mean()) / std
    return A.clamp(-adv_clip, adv_clip).float()


def policy_loss(log_p, log_p_old, A, algo="ppo", clip_range=1e-4):
    """Loss and ratio of n actions. log_p, log_p_old, A, loss and ratio are all (n,).

    With one optimizer step per rollout the ratio is 1, nothing is clipped, and PPO's gradient is REINFORCE's.
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
    """Settings of a run; the flags are generated from them. The defaults train rlcm on the embedded model."""

    reward: str = flag("compress", rewards.HELP)
    method: Literal[tuple(METHODS)] = flag("rlcm", "consistency model, diffusion model, reverse SDE")
    algo: Literal["ppo", "reinforce"] = flag("ppo", "PPO's clipped ratio, or plain REINFORCE")
    model: str = flag("tiny", "tiny, a diffusers pipeline (folder or hub id), or path/to/file.py:function")
    prompts: str = flag("animals", f"{', '.join(PROMPTS)}, a text file of prompts, or a quoted prompt")
    resolution: int = flag(64, "height and width of the images in pixels")
    steps: int = flag(4, "H, network evaluations per image")
    epochs: int = flag(27, "number of rollouts")
    batch_size: int = flag(64, "B, images per rollout")
    micro_batch: int = flag(32, "images per network pass and per reward call; affects only memory and speed")
    group_size: int = flag(1, "images per prompt in a batch; GRPO if --buffer-size is no larger")
    updates: int = flag(1, "optimizer steps per epoch, each on an equal part of the batch")
    lr: float = flag(9e-4, "learning rate of Adam")
    kl: float = flag(0.0, "lambda: penalty per nat of KL, in standard deviations of the reward")
    guidance_scale: float = flag(6.0, "guidance scale in training and in sampling")
    lora_rank: int = flag(16, "rank of the LoRA")
    lora_alpha: int = flag(16, "alpha of the LoRA, which is scaled by alpha / rank")
    clip_range: float = flag(1e-4, "PPO's epsilon; small because the log-prob is averaged over the latent")
    adv_clip: float = flag(10.0, "advantages are clipped to plus or minus this")
    buffer_size: int = flag(8, "rewards remembered per prompt")
    min_count: int = flag(4, "until a prompt has this many rewards, the batch's mean and std are used")
    max_grad_norm: float = flag(5.0, "the gradient is clipped to this norm")
    precision: Literal["fp32", "bf16"] = flag("fp32", "network dtype; bf16 by default at full size on a GPU")
    gradient_checkpointing: bool = flag(False, "less memory and more time for the same gradient")
    log_with: Literal["", "wandb", "tensorboard"] = flag("", "also log metrics and sample grids there")
    seed: int = flag(0, "seed of the LoRA, the prompts and the noise")
    save_every: int = flag(4, "epochs between sample grids and saved LoRAs")
    out: str = flag("", "folder of the run; default runs/METHOD-REWARD-SEED-TIME-PID")


FULL = {
    # RLCM's code and Table 1 for compress, the batches of its four GPUs as one, but 4 steps and 512 pixels
    # where RLCM has 8 and 768. docs/papers.md has the other tasks.
    "rlcm": dict(
        model="SimianLuo/LCM_Dreamshaper_v7", precision="bf16", resolution=512, epochs=1000, batch_size=16,
        micro_batch=4, lr=1e-4, guidance_scale=8.0, lora_rank=16, lora_alpha=32, buffer_size=16, min_count=16,
        save_every=10,
    ),
    # ddpo-pytorch's config/dgx.py for compress, the batches of its eight GPUs as one.
    "ddpo": dict(
        model="Lykon/dreamshaper-7", precision="bf16", resolution=512, steps=50, epochs=100, batch_size=256,
        micro_batch=4, updates=4, lr=3e-4, guidance_scale=5.0, lora_rank=4, lora_alpha=4, adv_clip=5.0,
        buffer_size=16, min_count=16, max_grad_norm=1.0, save_every=10,
    ),
}  # fmt: skip
FULL["score"] = FULL["ddpo"]  # its authors' settings are for one prompt and a reward that is not built in
TINY = {  # settings for the embedded model, chosen on seeds 0 to 2: docs/results.md
    "rlcm": {},  # Config's defaults
    "ddpo": dict(steps=5, epochs=24, lr=1.5e-3, guidance_scale=3.0, lora_rank=4, lora_alpha=4),
    "score": dict(steps=6, epochs=26, lr=2.5e-3, guidance_scale=3.0),
}


def preset(method="rlcm", model=None):
    """Settings for Config(**...), a dict. Raises BadInput for a model file that does not load.

    Without a model: the papers' model on a CUDA GPU, the embedded one elsewhere. A model of your own starts
    from Config's defaults and, if its function has one, the dict `settings`.
    """
    gpu = torch.cuda.is_available()
    model = model or (FULL[method]["model"] if gpu else "tiny")
    if ".py:" in model:
        settings = getattr(load_function(model), "settings", {})
    else:
        settings = (TINY if model == "tiny" else FULL).get(method, {})
    precision = {} if gpu else {"precision": "fp32"}
    return settings | precision | {"method": method, "model": model}


def check(cfg):
    """Raise BadInput for settings that cannot work, wherever they come from."""
    for name, value in asdict(cfg).items():
        if type(value) in (int, float):
            zero = value == 0 and name in ("kl", "guidance_scale", "seed")
            flag = f"--{name.replace('_', '-')} {value}"
            require(zero or 0 < value < 2**40, f"{flag}: must be a positive number below 2**40")
    require(cfg.min_count <= cfg.buffer_size, "--min-count must be at most --buffer-size")
    require(cfg.algo != "reinforce" or cfg.updates == 1, "--algo reinforce has no ratio: --updates must be 1")
    installed = not cfg.log_with or cfg.log_with in packages_distributions()
    require(installed, f"--log-with {cfg.log_with}: first pip install {cfg.log_with}")


# =================================================== TRAIN ==================================================
# A progress bar, in the first process only. It appears if the work takes more than three seconds.
progress = partial(tqdm, leave=False, delay=3, dynamic_ncols=True, disable=os.getenv("RANK", "0") != "0")


def train(cfg, resume=False, on_epoch=None):
    """Fine-tune with `cfg`; with resume, continue the run in cfg.out. Returns the run's folder.

    This is Algorithm 1 of RLCM and, with other Gaussians, DDPO and Scores as Actions. In every process,
    on_epoch(epoch, model, row) is called with epoch 0 and an empty row before the first epoch, then after
    each epoch before its row is saved. It may add columns to the row. Raises BadInput.
    """
    from accelerate import Accelerator
    from accelerate.utils import broadcast, listify

    # Reward, prompts and folder. Nothing is written before the first images have been rewarded.
    check(cfg)
    name = re.sub(r"[^a-zA-Z0-9.]+", "-", f"{cfg.method}-{cfg.reward}")[:100]
    out = Path(cfg.out or f"runs/{name}-{cfg.seed}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}")
    require(resume or not any(out.glob("*")), f"{out} is not empty: give another --out, or --resume {out}")
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", log_with=cfg.log_with or None, project_dir=out)
    say = accelerator.print
    settings = asdict(cfg)
    H = cfg.steps
    B = cfg.batch_size
    lam = cfg.kl
    for divisor in (accelerator.num_processes * cfg.updates, cfg.group_size):
        require(B % divisor == 0, f"--batch-size {B}: must be a multiple of {divisor}")
    reward = get_reward(cfg.reward, cfg.model)
    prompts = get_prompts(str(out / "prompts.txt") if resume else cfg.prompts)
    say(f"{cfg.method} on {cfg.model}, device {accelerator.device}")
    say(f"reward {cfg.reward}; {len(prompts)} prompts, the first is {prompts[0]!r}; folder {out}")

    # The model, its schedule and the optimizer. Every process starts from the first one's weights.
    kinds = "tiny, a diffusers pipeline (folder or hub id, no *.fp16.* files), or path/to/file.py:function"
    with explained(f"--model {cfg.model} --steps {H} cannot be set up; --model takes {kinds}"):
        model = load_model(cfg, accelerator.device)
        s = model.schedule(H)
    require(s.actions, f"--method {cfg.method} --steps {H} adds no noise: nothing to reinforce")
    policy = METHODS[cfg.method].policy
    parameters = list(model.trainable.values())
    broadcast([p.data for p in parameters])  # in place
    optimizer = torch.optim.Adam(parameters, cfg.lr)
    rows = []
    history = {}
    seconds = 0
    if resume:
        state = load_checkpoint(out, model)
        with explained(f"{out} has a damaged checkpoint: start a new run in another folder"):
            optimizer.load_state_dict(state["optimizer"])
            rows = state["rows"]
            history = state["history"]
            seconds = rows[-1]["seconds"]
        same = asdict(Config(**state["config"])) | {"epochs": cfg.epochs, "out": cfg.out}
        changed = same.items() ^ settings.items()
        require(not changed, f"with --resume only --epochs may change: {sorted(changed)}")
        require(len(rows) < cfg.epochs, f"{out} already has {len(rows)} epochs: give more --epochs")

    # The first sample grid, of the pretrained model, creates the run's folder. A broken reward fails here.
    if accelerator.is_main_process:
        if not resume:
            with explained(f"{cfg.model} cannot draw the first images"):
                save_samples(model, cfg, reward, prompts, out, 0)
            write(out / "prompts.txt", "\n".join(prompts).encode())
        write(out / "config.json", json.dumps(settings, indent=1).encode())
    with explained(f"--log-with {cfg.log_with} cannot start"):
        accelerator.init_trackers("rlcm", settings)
    if on_epoch and not resume:
        on_epoch(0, model, {})

    # Each batch is cut into `updates` minibatches of one optimizer step each, and these among the processes.
    mine = torch.arange(B).view(cfg.updates, accelerator.num_processes, -1)[:, accelerator.process_index]
    actions_per_update = len(s.actions) * mine.shape[1]
    bar = progress(range(len(rows) + 1, cfg.epochs + 1), unit="epoch", leave=True, delay=0)
    for epoch in bar:
        # Prompts and noise depend on seed and epoch alone, so a resumed run draws the same again.
        began = time.time()
        generator = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        drawn = torch.randint(len(prompts), (B // cfg.group_size,), generator=generator)
        batch = [prompts[n] for n in drawn.repeat_interleave(cfg.group_size)]
        z = torch.randn(H + 1, B, *model.shape, generator=generator)

        # 1. Rollout: the sampler is the policy, and the reward is given to the finished images. The images of
        # a micro-batch go through the network together, here and in the update, so it is kept until then.
        minibatches = []
        terms = torch.zeros(B, len(reward.names), device=model.device)  # of the reward, which is their sum
        kl = torch.zeros(B, H, device=model.device)  # stays 0 without a penalty
        for part in mine:
            minibatches.append([])
            for i in progress(part.split(cfg.micro_batch), f"epoch {epoch}, sampling"):
                prompts_i = [batch[n] for n in i]
                with torch.no_grad():
                    c = model.encode(prompts_i)
                    x, means, log_p = rollout(policy, model.eps, s, c, z[:, i].to(model.device))
                    images = model.decode(x[-1])
                require(x[-1].isfinite().all(), f"epoch {epoch}: the latents are not finite, lower --lr")
                terms[i] = reward.terms(images, prompts_i)
                mean_ref = None
                if lam > 0:
                    with model.reference():
                        mean_ref, kl[i] = path_kl(policy, model.eps, s, c, x, means)
                minibatches[-1].append((i, c, x, log_p, mean_ref))

        # 2. Advantage: how much better is an image than usual for its prompt, less lambda times the KL-to-go?
        # Every process computes it for the whole batch, from the same history of rewards.
        terms = accelerator.reduce(terms, "sum")
        kl = accelerator.reduce(kl, "sum").T  # (H, B)
        r = terms.sum(1)
        A = advantages(r, batch, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        kl_to_go = kl.sum(0) - kl.cumsum(0)  # KL_k itself is left out
        A = A - lam * (kl_to_go - kl_to_go.mean(1, keepdim=True))  # (H, B)

        # 3. Policy gradient: evaluate each action of the rollout again, now with gradients.
        stats = []
        norms = []
        for minibatch in minibatches:
            for k in progress(s.actions, f"epoch {epoch}, learning"):
                for i, c, x, log_p_old, mean_ref in minibatch:
                    mean, std = policy(model.eps, x[k], k, c, s)
                    log_p = log_prob(x[k + 1], mean, std)
                    loss, ratio = policy_loss(log_p, log_p_old[k], A[k, i], cfg.algo, cfg.clip_range)
                    if lam > 0:  # lambda grad KL_k, averaged over D as the log-prob is
                        loss += lam * gaussian_kl(mean, mean_ref[k], std) / mean[0].numel()
                    (loss.sum() / actions_per_update).backward()
                    stats.append(torch.stack([loss, log_p - log_p_old[k]]).detach())
            for p in parameters:
                if p.grad is not None:
                    p.grad = accelerator.reduce(p.grad, "mean")
            norms.append(accelerator.clip_grad_norm_(parameters, cfg.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # 4. The row of metrics.csv. The ratio starts at exactly 1: in fp32 its drift is 0.
        loss, log_ratio = torch.cat(stats, 1)
        drift = log_ratio.expm1().abs()  # |ratio - 1|
        numbers = {
            "loss": loss.mean(),
            "approx_kl": (log_ratio**2).mean() / 2,  # KL(rollout's policy, updated one) / D^2
            "clip_fraction": (drift > cfg.clip_range).float().mean(),
            "ratio_drift": drift[:actions_per_update].max(),  # before the first step; mean of the processes
            "grad_norm": torch.stack(norms).mean(),  # before clipping
        }
        numbers = accelerator.reduce(numbers, "mean")
        require(numbers["grad_norm"].isfinite(), f"epoch {epoch}: the gradient is not finite, lower --lr")
        seconds += time.time() - began
        row = {
            "epoch": epoch,
            "seconds": seconds,  # of sampling, rewards and learning
            "images": epoch * B,  # rewarded so far
            "reward_mean": r.mean(),
            "reward_std": r.std(correction=0),
            "path_kl": kl.sum(0).mean(),  # nats along an image's path; 0 without a KL penalty
            **numbers,
            **dict(zip(reward.names, terms.mean(0))),  # the terms of a sum
            "gpu_gb": torch.cuda.max_memory_allocated() / 1e9,  # peak so far
        }
        row = listify(row)  # tensors to numbers
        if on_epoch:
            on_epoch(epoch, model, row)
        rows.append(row)
        accelerator.log(row, epoch)
        bar.set_postfix(reward=f"{row['reward_mean']:.3f}", start=f"{rows[0]['reward_mean']:.3f}")

        # 5. Save. The checkpoint comes last: after a kill, --resume repeats the epoch that was not finished.
        if accelerator.is_main_process:
            save_metrics(rows, out)
            if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
                sheet = save_samples(model, cfg, reward, prompts, out, epoch)
                for tracker in accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if cfg.log_with == "tensorboard" else {}
                    tracker.log_images({"samples": np.asarray(sheet)[None]}, epoch, **layout)
                save_curve(rows, cfg, out)
                model.save(out)
            state = dict(config=settings, optimizer=optimizer.state_dict(), rows=rows, history=history)
            state["trainable"] = model.trainable
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write(out / "checkpoint.pt", buffer.getvalue())

    accelerator.end_training()
    say(f"reward {rows[0]['reward_mean']:.3f} -> {rows[-1]['reward_mean']:.3f}, {seconds:.0f} s")
    say(f"to train longer: python rlcm.py --resume {shlex.quote(str(out))} --epochs {2 * cfg.epochs}")
    say(f'{out} has samples/, reward.png, metrics.csv and the LoRA: pipe.load_lora_weights("{out}")')
    return out


# =================================================== MODEL ==================================================
def load_model(cfg, device):
    """The model that cfg.model names, on a device. Raises BadInput."""
    from diffusers import DiffusionPipeline
    if ".py:" in cfg.model:
        return load_function(cfg.model)(cfg, device)
    source = cfg.model
    if source == "tiny":
        source = Path(__file__).resolve().parent / METHODS[cfg.method].tiny
    kind = DiffusionPipeline.load_config(source)["_class_name"]
    kinds = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    require(kind in kinds, f"{source} is a {kind}: supported are {' and '.join(kinds)}; others in examples/")
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, safety_checker=None)
    return StableDiffusion(pipe.to(device), cfg)


class StableDiffusion:
    """A LoRA on Stable Diffusion 1 or 2, or on one of their consistency models.

    `train` uses nothing but these members, so it trains any class that has them: --model file.py:function,
    where function(cfg, device) returns one. function.settings, a dict, is laid between Config's defaults and
    the flags. The file may import from rlcm: it gets the running module. docs/models.md has more.

        shape               (C, h, w) of a latent
        device              where latents, c and images are
        trainable           dict: name -> parameter, float32
        schedule(H)         the glossary's s, with all that the policy of cfg.method reads; tensors on the CPU
        encode(prompts)     B strings -> c, anything that eps understands
        eps(x, t, c)        x (B, C, h, w), t a scalar -> noise, shaped like x, float32, differentiable
        decode(x)           clean latents (B, C, h, w) -> images (B, 3, H, W), float32 in [0, 1]
        reference()         a context in which eps is the pretrained network's; used with --kl
        save(folder)        writes the trained weights into a run's folder

    A subclass names the `component` of its pipeline that is trained and overrides `encode` and `predict`, and
    for another kind of scheduler `set_up` and `schedule`.
    """

    component = "unet"
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as in both official codes

    def __init__(self, pipe, cfg):
        """pipe: a diffusers pipeline, on its device. Raises BadInput for models it would train wrongly."""
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig
        self.pipe = pipe
        self.cfg = cfg
        self.device = pipe.device
        self.network = getattr(pipe, self.component)
        self.dtype = self.network.dtype
        self.set_up()

        # Everything is frozen except a new LoRA, whose weights are float32 whatever the network's dtype.
        pipe.vae.requires_grad_(False)
        self.network.requires_grad_(False)
        lora = LoraConfig(
            r=cfg.lora_rank,
            lora_alpha=cfg.lora_alpha,
            target_modules=self.lora_layers,
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.network.add_adapter(lora)
        cast_training_params(self.network, torch.float32)
        self.trainable = {name: p for name, p in self.network.named_parameters() if p.requires_grad}

        # PyTorch may choose cuDNN's attention in the rollout but not in the update: the ratio would not be 1.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if cfg.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()

    def set_up(self):
        """Set the method's scheduler, the guidance and the shape of a latent."""
        import diffusers
        pipe = self.pipe
        cfg = self.cfg
        method = METHODS[cfg.method]
        unet = self.network.config
        config = pipe.scheduler.config
        found = type(pipe.scheduler).__name__
        require("beta_schedule" in config, f"{cfg.model} has a {found}, which has no betas: not supported")
        require(not config.get("rescale_betas_zero_snr"), f"{cfg.model} has zero terminal SNR: not supported")
        require(not pipe.vae.config.get("latents_mean"), f"VAE of {cfg.model} shifts latents: not supported")
        fits = method.options is not None or found == method.scheduler
        require(fits, f"{cfg.model} has a {found}: {cfg.method} needs a model with {method.scheduler}")
        pipe.scheduler = getattr(diffusers, method.scheduler).from_config(config, **(method.options or {}))

        most = pipe.text_encoder.config.max_position_embeddings
        pipe.tokenizer.model_max_length = min(most, pipe.tokenizer.model_max_length)

        # Classifier-free guidance with the empty prompt, unless the network takes the scale as an input.
        self.guided = not unet.time_cond_proj_dim and cfg.guidance_scale > 1

        unit = pipe.vae_scale_factor * 2**self.network.num_upsamplers
        require(cfg.resolution % unit == 0, f"--resolution {cfg.resolution}: must be a multiple of {unit}")
        size = cfg.resolution // pipe.vae_scale_factor
        self.shape = (unet.in_channels, size, size)

    def schedule(self, H):
        """Schedule for H steps. Raises BadInput unless the policy's steps equal the scheduler's own."""
        cfg = replace(self.cfg, steps=H)
        scheduler = self.pipe.scheduler
        method = METHODS[cfg.method]
        checked = METHODS[method.checked_as]
        s = checked.schedule(scheduler, cfg)
        name = type(scheduler).__name__
        require(len(s.t) == H, f"the {name} gives {len(s.t)} timesteps for --steps {H}: choose another")
        generator = torch.Generator()
        x, noise = torch.randn(2, 1, *self.shape, generator=generator)
        for k, t in enumerate(s.t):
            generator.manual_seed(k)
            theirs = scheduler.step(noise, t, x, generator=generator, **s.step_options).prev_sample
            mean, std = checked.policy(lambda *_: noise, x, k, None, s)
            ours = mean + std * torch.randn(x.shape, generator=generator.manual_seed(k))
            off = (ours - theirs).norm() / theirs.norm()
            require(off < 1e-4, f"step {k + 1} of the {name} is {off:.1%} off that of {cfg.method}")
        return method.schedule(scheduler, cfg)

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> (B, L, E); with classifier-free guidance (2B, L, E), the first B for empty prompts."""
        most = self.pipe.tokenizer.model_max_length
        if max(map(len, self.pipe.tokenizer(prompts).input_ids)) > most:
            warnings.warn(f"some prompts have more than {most} tokens: the rest is ignored")
        c, empty = self.pipe.encode_prompt(prompts, self.device, 1, self.guided)
        return torch.cat([empty, c]) if self.guided else c

    def eps(self, x, t, c):
        if self.guided:  # with and without the prompt, in one pass
            x = torch.cat([x, x])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            noise = self.predict(x.to(self.dtype), t, c).float()
        if self.guided:
            uncond, cond = noise.chunk(2)
            noise = uncond + self.cfg.guidance_scale * (cond - uncond)
        return noise

    def predict(self, x, t, c):
        """The network's output. An LCM takes the guidance scale minus one as an input (LCM, section 4.2)."""
        w = None
        if dim := self.network.config.time_cond_proj_dim:
            scale = torch.full((len(x),), self.cfg.guidance_scale - 1.0)
            w = self.pipe.get_guidance_scale_embedding(scale, dim).to(x)
        return self.network(x, t, encoder_hidden_states=c, timestep_cond=w).sample

    def decode(self, x):
        """Differentiable, if x requires gradients."""
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
        """Write the LoRA for diffusers, multiplied by alpha / rank because loaders take alpha = rank."""
        scale = self.cfg.lora_alpha / self.cfg.lora_rank
        weights = {}
        for name, p in self.trainable.items():
            name = f"{self.component}.{name}".replace(".default", "")
            weights[name] = p * scale if "lora_B" in name else p
        write(Path(folder) / "pytorch_lora_weights.safetensors", safetensors.torch.save(weights))


@torch.no_grad()
def generate(model, cfg, prompts):
    """Images (B, 3, H, W) of B prompts; the noise of image i is that of torch.Generator().manual_seed(i).

    In float32 a plain diffusers pipeline with the same generators draws the same images.
    """
    s = model.schedule(cfg.steps)
    shape = cfg.steps + 1, *model.shape
    policy = METHODS[cfg.method].policy
    images = []
    for i in progress(torch.arange(len(prompts)).split(cfg.micro_batch), "drawing samples"):
        c = model.encode([prompts[n] for n in i])
        z = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in i.tolist()]
        x, _, _ = rollout(policy, model.eps, s, c, torch.stack(z, 1).to(model.device))
        images.append(model.decode(x[-1]))
    return torch.cat(images)


# =================================================== FILES ==================================================
def write(path, data):
    """Write bytes to a file atomically: a kill leaves the old file or the new one.

    Images are written directly: a resumed run draws them again.
    """
    part = Path(f"{path}.part")
    part.write_bytes(data)
    part.replace(path)


def save_samples(model, cfg, reward, prompts, out, epoch):
    """samples/epoch-0000.png: the same prompts and noise every time, with rewards. Returns the sheet."""
    prompts = (prompts * 16)[:16]
    images = generate(model, cfg, prompts)
    r = reward(images, prompts, cfg.micro_batch)
    captions = [f"{value:.2f} {prompt}" for value, prompt in zip(r, prompts)]
    folder = out / "samples"
    with explained(f"{out} cannot be a new folder: give another --out, or --resume {out}"):
        folder.mkdir(parents=True, exist_ok=epoch > 0)  # two runs never share a folder
    sheet = sample_grid(images, captions)
    sheet.save(folder / f"epoch-{epoch:04d}.png")
    return sheet


def sample_grid(images, captions, columns=8):
    """Images (B, 3, H, W) in full rows of `columns`, with a caption below each, as one Pillow image."""
    from diffusers.utils import make_image_grid
    size = max(128, images.shape[-1] // 2)
    cells = []
    for image, caption in zip(to_pil(images), captions):
        cell = ImageOps.expand(image.resize((size, size)), (0, 0, 0, 18), "white")  # for a caption
        ImageDraw.Draw(cell).text((4, size + 1), caption, "black", font_size=13)
        cells.append(cell)
    return make_image_grid(cells, len(cells) // columns, columns)


def save_curve(rows, cfg, out):
    """reward.png: the mean reward by epoch."""
    axis = Figure(layout="constrained").subplots()
    axis.plot(range(1, len(rows) + 1), [row["reward_mean"] for row in rows])
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"reward: {cfg.reward}", parse_math=False)
    axis.figure.savefig(out / "reward.png")


def save_metrics(rows, out):
    """metrics.csv: a row per epoch. Columns that some rows lack are empty there."""
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(out / "metrics.csv", text.getvalue().encode())


def load_checkpoint(out, model):
    """Load a run's checkpoint into the model. Returns the checkpoint, a dict. Raises BadInput."""
    with explained(f"{out} has no checkpoint of this model and LoRA: start a new run in another folder"):
        state = torch.load(Path(out) / "checkpoint.pt", map_location="cpu", weights_only=True)
        for name, p in model.trainable.items():
            p.data.copy_(state["trainable"][name].view_as(p))  # fails if the shapes differ
    return state


def read_config(out):
    """config.json of a run's folder as a Config, checked. Raises BadInput."""
    with explained(f"{out} is not a run's folder, or is one of another version"):
        cfg = Config(**json.loads((Path(out) / "config.json").read_text()))
        check(cfg)
    return cfg


# =============================================== COMMAND LINE ===============================================
def parse(argv):
    """The command line -> a Config, and the run to resume or None. Raises BadInput."""
    parser = transformers.HfArgumentParser(Config, add_help=False, allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message} (--help lists the flags)")
    parser.add_argument("--resume", metavar="RUN", help="resume this run's folder; only --epochs may change")
    parser.set_defaults(model=None)
    first = parser.parse_known_args(argv)[0]
    with explained(f"{first.model} has settings that Config does not know"):
        cfg = Config(**preset(first.method, first.model))
    if first.resume:
        cfg = replace(read_config(first.resume), out=first.resume)
    parser.set_defaults(**asdict(cfg))
    parser.set_defaults(**vars(parser.parse_known_args(argv)[0]))  # --help shows what would be used
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    used = vars(parser.parse_args(argv))
    resume = used.pop("resume")
    return Config(**used), resume


def quiet():
    """Make libraries print only errors, with progress bars for downloads but not for loading."""
    import diffusers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    enable_progress_bars()


def main(argv=None):
    """The program. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    status = 2
    try:
        cfg, resume = parse(argv)
        quiet()
        train(cfg, resume)
        return 0
    except KeyboardInterrupt:
        status = 130
        message = "stopped; --resume with the run's folder continues after its last saved epoch"
    except torch.OutOfMemoryError as e:
        message = f"out of GPU memory: lower --micro-batch or add --gradient-checkpointing ({e})"
    except (BadInput, OSError) as e:  # OSError: a full disk, or a folder that cannot be written
        message = e
    print(f"rlcm.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.modules["rlcm"] = sys.modules["__main__"]  # for a model or reward file that imports rlcm
    sys.stdout.reconfigure(errors="replace")  # for prompts that the terminal cannot print
    sys.exit(main())
