"""RLCM in one file: reinforcement learning for consistency models, from the formula to the trained LoRA.

Fine-tunes a text-to-image latent consistency model on any reward by policy gradients, next to the diffusion baseline (DDPO) and to
continuous-time RL (Scores as Actions). Read it from the top: each equation stands beside the line that computes it. Rewards and prompt
sets live in rewards.py; pictures, tables and the LoRA's file in bench/figures.py.

    python rlcm.py --reward compress --steps 4                     # train; runs/NAME/ holds pictures, curves and the LoRA
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress                 # or --method score: the same loop, another Gaussian kernel
    python rlcm.py --sample "a cat" "a dog" --load runs/NAME       # base row above tuned row, same noise
    python rlcm.py --evaluate runs/NAME                            # reward by number of steps, base and tuned, held-out prompts apart
    python rlcm.py --plot runs/A runs/B                            # reward against reward queries and wall-clock
    python rlcm.py --resume runs/NAME                              # go on where a stopped run was last saved, bit for bit
    accelerate launch rlcm.py --reward compress                    # several GPUs; B is shared out, one process writes

Papers
    RLCM   Oertell et al. 2024, RL for Consistency Models: Faster Reward Guided Text-to-Image Generation     arXiv 2404.03673
    LCM    Luo et al. 2023, Latent Consistency Models                                                        arXiv 2310.04378
    DDPO   Black et al. 2023, Training Diffusion Models with Reinforcement Learning                          arXiv 2305.13301
    SaA    Zhao et al. 2024/25, Scores as Actions                                                            arXiv 2409.08400, 2502.01819

The idea. Sampling, in few steps or many, is a Markov decision process with Gaussian kernels:
    state s_k = (x_k, t_k, c)      action a_k = x_{k+1} ~ N( mean_theta(x_k, t_k, c), std_k^2 I )      k = 0 .. T-1
    picture = decode( readout(x_T) )      reward r(picture, c), given once, at the end
    RLCM    mean = sqrt(ab_{k+1}) f_theta(x_k, t_k, c)           std = sqrt(1 - ab_{k+1})    readout = f_theta(x_T, t_T, c)
    DDPO    mean = the DDIM step with eta = 1                    std = DDIM's sigma_k        readout = x_T
    SaA     mean = x_k + (1/2 x_k + score_theta) beta dt         std = sqrt(beta dt)         readout = x_T
A method is three functions: schedule, policy and readout. Rollout samples from the policy, the update re-scores with the same call, and
nothing else knows which method runs, but for SaA's value function.

Glossary       symbol in the papers                                         here
    B          pictures per epoch                                           cfg.batch_size
    H          evaluations of the model for one picture                     cfg.steps
    T          actions (transitions) in one picture: H - 1 for RLCM, else H len(s.std)
    D          latent dimensions, C * h * w
    x_k        noisy latent, x_0 ~ N(0, I)                                  x        (B, C, h, w) float32
    t_k        timestep of the model's own scheduler; SaA: a real number    s.t[k]
    ab         alpha-bar, the share of signal variance at t_k               s.ab[k]
    c          prompt embedding                                             c        (B, L, E)
    eps        predicted noise = - score * sqrt(1 - ab); pre: adapter off   eps(x, t, c), eps_pre
    lambda     weight of the KL to the pretrained model                     cfg.kl
    A_k        advantage of an action                                       advantage

Differs from the official RLCM code (github.com/Owen-Oertell/rlcm)
    1. The last evaluation has no action. There the last state is noised once more to its own timestep and that noise is scored
       as an action which the picture never depends on: no signal, one more transition to pay for (bench/last_action.py). H = 1 has no action at all.
    2. Timesteps, alpha-bar and boundary scalings are the LCMScheduler's own, so the LoRA is trained on the schedule it is sampled with.
    3. States, mean, std and log-prob are float32, passes have one shape: the ratio before the first step is exactly 1 (`ratio_drift`).
    4. A KL to the pretrained model (as in SaA) keeps the subject in the picture. Without it, compression ends in a blank page.
    5. Prompts and noise are a function of seed and epoch: a run resumes bit for bit. No learning-rate schedule; the final epoch is saved.
Differs from the DDPO code: guidance is on in training as in sampling; an action with std = 0 has no density and is left out of the loss.
Kept from both: log-prob averaged over D, per-prompt running advantages, PPO clip range 1e-4, one pass over the data.
"""
import copy
import csv
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a quiet terminal: nothing here that the user could act on
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
import numpy as np
import torch
from rewards import HELP, PROMPTS, BadInput, get_prompts, get_reward


# ------------------------------------------------------------------------------------------------------------- config
def flag(default, help, **parser):
    return field(default=default, metadata={"help": help, **parser})


@dataclass
class Config:
    """Everything a run depends on; the command line is made of it. None: taken from the model's preset (`PRESETS`)."""
    reward: str = flag("compress", HELP)
    method: Literal["rlcm", "ddpo", "score"] = flag("rlcm", "the policy: a consistency model's, a diffusion model's in discrete or in continuous time")
    algo: Literal["ppo", "reinforce"] = flag("ppo", "clipped ratio, or plain score function")
    model: str = flag("auto", "auto, tiny, a folder or a hub id of a diffusers pipeline; auto: the real model on a CUDA GPU, tiny elsewhere")
    lcm_lora: Optional[str] = flag(None, "LCM-LoRA (hub id or folder) that makes an SD-1.x --model a consistency model; stays frozen under the adapter")
    paper: bool = flag(False, "the papers' settings for this method and reward, at one GPU's equivalent of their batch")
    prompts: Optional[str] = flag(None, f"{', '.join(PROMPTS)}, or a text file with one prompt a line; default animals")
    steps: Optional[int] = flag(None, "H, evaluations of the model for one picture: 2 to 50; default 4 for rlcm")
    epochs: Optional[int] = flag(None, "rollouts of the run")
    batch_size: Optional[int] = flag(None, "B, pictures in an epoch")
    micro_batch: Optional[int] = flag(None, "pictures or transitions in one pass of the network; changes memory, not results")
    updates: Optional[int] = flag(None, "optimizer steps in an epoch, each on its share of the pictures")
    lr: Optional[float] = flag(None, "learning rate of Adam")
    kl: Optional[float] = flag(None, "lambda, in units of reward per nat of path KL to the pretrained model; 0: none")
    guidance: Optional[float] = flag(None, "guidance scale")
    lora_rank: Optional[int] = flag(None, "rank of the adapter; 0: train all weights of the network")
    lora_alpha: Optional[int] = flag(None, "alpha of the adapter")
    clip_range: float = flag(1e-4, "PPO's epsilon; the log-prob is an average over D, so ratios stay close to 1")
    adv_clip: Optional[float] = flag(None, "advantages are clipped to +- this")
    buffer_size: Optional[int] = flag(None, "rewards remembered for each prompt")
    min_count: Optional[int] = flag(None, "with fewer of them the batch's mean and std serve")
    max_grad_norm: Optional[float] = flag(None, "gradient norm is clipped to this")
    precision: Optional[Literal["fp32", "bf16", "fp16"]] = flag(None, "of the network; default bf16 on a GPU, fp32 elsewhere")
    low_memory: bool = flag(False, "one picture a pass, gradient checkpointing, sliced VAE: slower, the same gradient")
    log_with: Optional[Literal["wandb", "tensorboard"]] = flag(None, "also log metrics and pictures there")
    seed: int = flag(0, "of adapter, prompts and noise")
    save_every: int = flag(10, "epochs between sample grids, curves and saved LoRAs")
    out: Optional[str] = flag(None, "run directory; default runs/METHOD-REWARD-SEED-TIME (with --sample: the picture's file)")
    sample: Optional[list[str]] = flag(None, "draw these prompts instead of training", nargs="+")
    load: Optional[str] = flag(None, "with --sample: the run whose weights draw the second row")
    evaluate: Optional[str] = flag(None, "table of this run's reward, base and tuned, by number of steps")
    eval_prompts: str = flag("other-animals", "held-out prompts of --evaluate: as --prompts")
    plot: Optional[list[str]] = flag(None, "draw the reward curves of these runs; seeds of one setting are averaged", nargs="+")
    resume: Optional[str] = flag(None, "continue this run directory, bit for bit; of its settings only --epochs may change")


TINY = {"rlcm": "lcm", "ddpo": "sd", "score": "sd"}
REAL = {"rlcm": "SimianLuo/LCM_Dreamshaper_v7", "ddpo": "Lykon/dreamshaper-7", "score": "Lykon/dreamshaper-7"}
OURS = dict(batch_size=64, micro_batch=32, updates=1, lora_rank=4, lora_alpha=4, buffer_size=8, min_count=4, adv_clip=10.0, max_grad_norm=5.0)
RLCM = dict(steps=4, epochs=1000, batch_size=16, micro_batch=2, updates=1, lr=1e-4, kl=0.0, guidance=8.0, lora_rank=16, lora_alpha=32,
            buffer_size=16, min_count=16, adv_clip=10.0, max_grad_norm=5.0)
DDPO = dict(steps=50, epochs=100, batch_size=256, micro_batch=2, updates=4, lr=3e-4, kl=0.0, guidance=5.0, lora_rank=4, lora_alpha=4,
            buffer_size=16, min_count=16, adv_clip=5.0, max_grad_norm=1.0)
PRESETS = {  # (model, method): ours for the embedded models, the papers' for the real ones, but RLCM in four steps
    ("tiny", "rlcm"): OURS | dict(steps=4, epochs=64, lr=1.2e-3, kl=0.0028, guidance=6.0),
    ("tiny", "ddpo"): OURS | dict(steps=5, epochs=40, lr=3e-3, kl=0.001, guidance=3.0),
    ("tiny", "score"): OURS | dict(steps=6, epochs=20, lr=5e-3, kl=0.0025, guidance=3.0),
    ("real", "rlcm"): RLCM, ("real", "ddpo"): DDPO, ("real", "score"): DDPO,
}
PAPER = {  # --paper: (method, reward), what differs from the lines above; RLCM's four GPUs as one batch; incompress as compress
    ("rlcm", "compress"): dict(steps=8, prompts="imagenet-animals"),
    ("rlcm", "aesthetic"): dict(steps=8, batch_size=32, lora_rank=8, lora_alpha=8, buffer_size=32),
    ("rlcm", "align"): dict(steps=16, epochs=708, batch_size=160, lr=4e-4, buffer_size=32, prompts="animals-activities"),
    ("ddpo", "compress"): dict(prompts="imagenet-animals"), ("ddpo", "aesthetic"): dict(updates=2),
    ("ddpo", "align"): dict(updates=2, prompts="animals-activities"),
}


def resolve(cfg):
    """A copy of cfg with what was left open filled in and every number checked. Raises BadInput."""
    if cfg.model == "auto":
        model, why = (REAL["ddpo" if cfg.lcm_lora else cfg.method], "a CUDA GPU is here") if torch.cuda.is_available() else ("tiny", "no CUDA GPU here")
        say(f"model: {model} ({why}; --model chooses)")
        cfg = replace(cfg, model=model)
    task = cfg.method, cfg.reward.removeprefix("in")
    preset = PRESETS["real", cfg.method] | PAPER.get(task, {}) if cfg.paper else PRESETS["tiny" if cfg.model == "tiny" else "real", cfg.method]
    preset = {"prompts": "animals", "precision": "bf16" if torch.cuda.is_available() else "fp32"} | preset
    preset |= ({"micro_batch": 1} if cfg.low_memory else {}) | ({"guidance": 1.5} if cfg.lcm_lora else {})
    cfg = replace(cfg, **{name: value for name, value in preset.items() if getattr(cfg, name) is None})
    for wrong, message in (
        (cfg.paper and task not in PAPER, f"--paper: no published settings for {' '.join(task)}: choose from {', '.join(map(' '.join, PAPER))}"),
        (cfg.lcm_lora and cfg.method != "rlcm", "--lcm-lora makes a consistency model: it goes with --method rlcm"),
        (cfg.log_with and not find_spec(cfg.log_with), f"--log-with {cfg.log_with}: not installed here; pip install {cfg.log_with}"),
        (cfg.precision == "fp16" and not torch.cuda.is_available(), "--precision fp16 needs a GPU: take bf16 or fp32"),
        (not 2 <= cfg.steps <= 50, f"--steps {cfg.steps}: between 2 and 50 evaluations; a single one has no random transition to reinforce"),
    ):
        if wrong:
            raise BadInput(message)
    for name, value in vars(cfg).items():
        zero = name in ("kl", "guidance", "seed", "lora_rank")
        if type(value) in (int, float) and not (0 < value < float("inf") or zero and value == 0):
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a positive number" + " or zero" * zero)
    return cfg


def say(line):
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


# ----------------------------------------------------------------------------------------------------------- schedules
def rlcm_schedule(scheduler, steps, device):
    """Constants of the model's own LCMScheduler: of each evaluation t, ab, c_skip, c_out (H,); of each action ab_next, std (T,)."""
    scheduler.set_timesteps(steps)
    t, ab = scheduler.timesteps, scheduler.alphas_cumprod[scheduler.timesteps]
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # LCM, appendix
    return on(device, t=t, ab=ab, c_skip=c_skip, c_out=c_out, ab_next=ab[1:], std=(1 - ab[1:]).sqrt())


def ddpo_schedule(scheduler, steps, device):
    """Constants of the model's DDIMScheduler at eta = 1, of each of T = H actions: t, ab, ab_next, std (T,)."""
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps
    before = t - scheduler.config.num_train_timesteps // steps  # where DDIMScheduler.step goes from t
    ab, ab_next = scheduler.alphas_cumprod[t], torch.where(before >= 0, scheduler.alphas_cumprod[before.clamp(min=0)], scheduler.final_alpha_cumprod)
    return on(device, t=t, ab=ab, ab_next=ab_next, std=((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt())  # DDIM, eq. 16


def score_schedule(scheduler, steps, device):
    """Real times of the reverse SDE, of each of T = H actions: t, ab (T,) and std (T,), std^2 = integral of beta over the step.

    In the forward SDE dX = -1/2 beta X dt + sqrt(beta) dB the integral of beta from 0 to t is -log ab(t): the model's schedule, linear
    between its timesteps. Steps shrink towards the data, where the last one's noise stays in the picture.
    """
    integral = -scheduler.alphas_cumprod.double().log()  # of beta, at t = 0 .. 999
    grid = integral[0] + (integral[-1] - integral[0]) * torch.linspace(1, 0, steps + 1).double() ** 3
    t = torch.from_numpy(np.interp(grid[:-1], integral, np.arange(len(integral))))
    return on(device, t=t.float(), ab=(-grid[:-1]).exp().float(), std=(grid[:-1] - grid[1:]).sqrt().float())


def on(device, **tensors):
    return SimpleNamespace(**{name: value.to(device) for name, value in tensors.items()})


def at(v, k):
    """v[k] for a batch of indices: (H,), (B,) -> (B, 1, 1, 1)."""
    return v[k].view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------------------ log-prob
def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over latent dimensions: (B, C, h, w) x 2, (B, 1, 1, 1) -> (B,).

    The average, not the sum, as DDPO and RLCM have it: log-ratios shrink by 1/D, which gives clip_range = 1e-4 its meaning.
    """
    log_p = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return log_p.mean((1, 2, 3))


def gaussian_kl(mean, mean_pre, std):
    """KL( N(mean, std^2 I) || N(mean_pre, std^2 I) ) in nats, summed over dimensions: -> (B,)   (SaA: Girsanov, one step)."""
    return ((mean - mean_pre) ** 2 / (2 * std**2)).sum((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------ policies
def rlcm_readout(eps, x, k, c, s):
    """f_theta(x_k, t_k, c), the consistency function (LCM, eq. 9): x (B, C, h, w), k (B,) -> clean latent (B, C, h, w)."""
    x_0 = (x - (1 - at(s.ab, k)).sqrt() * eps(x, s.t[k], c)) / at(s.ab, k).sqrt()  # predicted clean latent
    return at(s.c_out, k) * x_0 + at(s.c_skip, k) * x


def rlcm_policy(eps, x, k, c, s):
    """Kernel of action k (RLCM, section 4): denoise, then noise to the next level: x (B, C, h, w), k (B,) -> mean (B, C, h, w), std (B, 1, 1, 1) of x_{k+1}."""
    return at(s.ab_next, k).sqrt() * rlcm_readout(eps, x, k, c, s), at(s.std, k)


def ddpo_policy(eps, x, k, c, s):
    """DDIM step with eta = 1 (DDPO; DDIM, arXiv 2010.02502, eq. 12): as rlcm_policy."""
    e = eps(x, s.t[k], c)
    x_0 = (x - (1 - at(s.ab, k)).sqrt() * e) / at(s.ab, k).sqrt()  # predicted clean latent
    direction = (1 - at(s.ab_next, k) - at(s.std, k) ** 2).clamp(min=0).sqrt() * e  # towards x_k
    return at(s.ab_next, k).sqrt() * x_0 + direction, at(s.std, k)


def score_policy(eps, x, k, c, s):
    """Euler-Maruyama step of the reverse SDE (SaA): the action is the score, its exploration the noise of the SDE: as rlcm_policy."""
    score = -eps(x, s.t[k], c) / (1 - at(s.ab, k)).sqrt()
    return x + at(s.std, k) ** 2 * (x / 2 + score), at(s.std, k)


METHODS = {  # schedule, policy, readout
    "rlcm": (rlcm_schedule, rlcm_policy, rlcm_readout),
    "ddpo": (ddpo_schedule, ddpo_policy, lambda eps, x, k, c, s: x),
    "score": (score_schedule, score_policy, lambda eps, x, k, c, s: x),
}


# ------------------------------------------------------------------------------------------------------------- rollout
@torch.no_grad()
def rollout(model, method, s, c, z, micro_batch, reference=False, on_pictures=None):
    """Sample B trajectories from noise z, in micro-batches.

    z (T+1, B, C, h, w): z[0] is x_0, z[k+1] the noise of action k. c (B, L, E). `on_pictures(images, slice)` gets a micro-batch before the
    next is sampled. Returns x (T+1, B, C, h, w), mean (T, B, C, h, w), log_p (T, B) and, against the pretrained model, mean_pre
    (T, B, C, h, w) and kl (T, B), or None and zeros; all float32.
    """
    _, policy, readout = METHODS[method]
    T, B, random = len(z) - 1, len(c), (s.std > 0).tolist()
    assert z.shape[1] == B and T == len(s.std)
    x, mean, log_p, kl = torch.empty_like(z), torch.empty_like(z[1:]), z.new_zeros(T, B), z.new_zeros(T, B)
    mean_pre = torch.empty_like(mean) if reference else None
    for i in range(0, B, micro_batch):
        b = slice(i, i + micro_batch)
        step = lambda n: torch.full((len(c[b]),), n, device=z.device)
        x[0, b] = z[0, b]
        for k in range(T):
            mean[k, b], std = policy(model.eps, x[k, b], step(k), c[b], s)
            x[k + 1, b] = mean[k, b] + std * z[k + 1, b]  # a_k ~ pi_theta
            log_p[k, b] = log_prob(x[k + 1, b], mean[k, b], std)
            if reference and random[k]:  # an action without noise has no density
                mean_pre[k, b] = policy(model.eps_pre, x[k, b], step(k), c[b], s)[0]
                kl[k, b] = gaussian_kl(mean[k, b], mean_pre[k, b], std)
        if on_pictures:
            on_pictures(model.decode(readout(model.eps, x[T, b], step(T), c[b], s)), b)
    return SimpleNamespace(x=x, mean=mean, log_p=log_p, mean_pre=mean_pre, kl=kl)


# ---------------------------------------------------------------------------------------------------------- advantages
def advantages(rewards, prompts, history, size, min_count, clip):
    """Rewards standardised by prompt, as DDPO and RLCM do: (B,) and B prompts -> advantage (B,), scale (B,) = 1 / std used.

    `history` (prompt -> list of its last `size` rewards) is updated in place. A prompt with fewer than `min_count` rewards is
    standardised by the mean and std of this batch.
    """
    assert rewards.shape == (len(prompts),)
    rewards = rewards.double()
    for prompt, r in zip(prompts, rewards.tolist()):
        history[prompt] = (history.get(prompt, []) + [r])[-size:]
    seen = [torch.tensor(history[p], dtype=torch.double) if len(history[p]) >= min(min_count, size) else rewards for p in prompts]
    mean, std = torch.stack([v.mean() for v in seen]), torch.stack([v.std(correction=0) for v in seen]) + 1e-6
    return ((rewards - mean) / std).clamp(-clip, clip).float(), (1 / std).float()


# ------------------------------------------------------------------------------------------ value function (score only)
class Value(torch.nn.Module):
    """V_phi(t, x_t, c) = sqrt(ab) R_phi(x_0) + sqrt(1 - ab) F_phi(x_0, t), at the data end R_phi alone (SaA): (n, C, h, w), (n, 1, 1, 1) -> (n,)."""

    def __init__(self, C):
        super().__init__()
        net = lambda channels: torch.nn.Sequential(
            torch.nn.Conv2d(channels, 32, 3, 2, 1), torch.nn.SiLU(), torch.nn.Conv2d(32, 64, 3, 2, 1), torch.nn.SiLU(),
            torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(256, 1), torch.nn.Flatten(0))
        self.R, self.F = net(C), net(C + 1)

    def forward(self, x_0, ab):
        x_0, t = x_0.clamp(-4, 4), ab.expand(-1, 1, *x_0.shape[2:])  # latents have unit scale; a guess from pure noise may not
        return ab.flatten().sqrt() * self.R(x_0) + (1 - ab).flatten().sqrt() * self.F(torch.cat([x_0, t], 1))


def actor_critic(V, optimizer, accelerator, s, roll, target, g, fits=64):
    """Advantage = return to go minus V_phi(t_k, x_k), then V_phi is fitted to the return to go (martingale loss): target (T, B) -> (T, B)."""
    k = torch.arange(len(s.std), device=target.device).repeat_interleave(target.shape[1])
    x, mean, ab, goal = roll.x[:-1].flatten(0, 1), roll.mean.flatten(0, 1), at(s.ab, k), target.flatten()
    score = (mean - x) / at(s.std, k) ** 2 - x / 2  # the action, read off the step it made
    x_0 = (x + (1 - ab) * score) / ab.sqrt()  # predicted clean latent (Tweedie)
    with torch.no_grad():
        advantage = goal - torch.cat([V(*part) for part in zip(x_0.split(1024), ab.split(1024))])
    for i in torch.randint(len(goal), (fits, 256), generator=g).to(goal.device):
        accelerator.backward((V(x_0[i], ab[i]) - goal[i]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return advantage.view_as(target)


# ----------------------------------------------------------------------------------------------------- loss and update
def policy_loss(log_p, log_p_old, advantage, algo, clip_range):
    """Loss of each transition and its ratio: (n,), (n,), (n,) -> (n,), (n,)."""
    ratio = (log_p - log_p_old).exp()
    if algo == "reinforce":
        return -advantage * log_p, ratio  # grad = -A_k grad log pi(a_k | s_k)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(advantage * ratio, advantage * clipped), ratio  # PPO (arXiv 1707.06347, eq. 7)


def update(model, cfg, accelerator, optimizer, s, c, roll, advantage, scale, skipped=0):
    """One pass over the rollout in `cfg.updates` optimizer steps. Returns the epoch's metrics.

    The transitions of all timesteps of a step's pictures are one flat batch, walked in micro-batches of the rollout's own shape
    and order. roll: what `rollout` returned; advantage (B,) or (T, B); scale (B,). A step whose gradient is not finite is left
    out; `skipped` counts them in a row. Raises BadInput at ten.
    """
    policy, B, D = METHODS[cfg.method][1], roll.log_p.shape[1], roll.x[0, 0].numel()
    random = s.std > 0  # an action without noise has no density: it is left out
    T, n = int(random.sum()), B // cfg.updates  # actions of a picture, pictures of one optimizer step
    m, stats, drift, norms = micro_batch_of(cfg, n), [], [], []
    for u in range(cfg.updates):
        b = slice(u * n, (u + 1) * n)
        flat = lambda v: v[random][:, b].flatten(0, 1)  # (T, B, ...) -> (T * n, ...)
        x, x_next, log_p_old, k = flat(roll.x[:-1]), flat(roll.x[1:]), flat(roll.log_p), random.nonzero().repeat_interleave(n)
        mean_pre = flat(roll.mean_pre) if cfg.kl else None
        c_k, A, w = c[b].repeat(T, 1, 1), flat(advantage.expand(len(s.std), -1)), scale[b].repeat(T)
        for i in range(0, T * n, m):
            j = slice(i, i + m)
            with accelerator.no_sync(model.unet) if i + m < T * n else nullcontext():  # processes average gradients once a step
                mean, std = policy(model.eps, x[j], k[j], c_k[j], s)
                log_p = log_prob(x_next[j], mean, std)
                loss, ratio = policy_loss(log_p, log_p_old[j], A[j], cfg.algo, cfg.clip_range)
                if cfg.kl:  # the charge lambda KL_k depends on theta itself: its own gradient, in the units of A and log_p
                    loss = loss + cfg.kl * w[j] * gaussian_kl(mean, mean_pre[j], std) / D
                accelerator.backward(loss.sum() / (T * n))
            stats.append(torch.stack([loss, (log_p - log_p_old[j]) ** 2 / 2, ((ratio - 1).abs() > cfg.clip_range).float()]).detach())
            if u == 0:  # nothing has moved yet: any difference is numerical
                drift.append((ratio.detach() - 1).abs().max())
        norms.append(accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.max_grad_norm))
        skipped = 0 if norms[-1].isfinite() else skipped + 1
        if skipped == 10:
            raise BadInput("ten gradients in a row were not finite: nothing was changed by them; try a smaller --lr or --precision fp32")
        if not skipped or accelerator.scaler:  # fp16's scaler leaves the step out by itself, and needs to see it
            optimizer.step()
        optimizer.zero_grad()
    loss, approx_kl, clip_fraction = accelerator.reduce(torch.cat(stats, 1).mean(1), "mean").tolist()
    drift, norm = torch.stack(drift).max().item(), torch.stack(norms).mean().item()
    return {"loss": loss, "approx_kl": approx_kl, "clip_fraction": clip_fraction, "ratio_drift": drift, "grad_norm": norm, "skipped": skipped}


def micro_batch_of(cfg, n):
    """Largest micro-batch up to cfg.micro_batch that divides n, so that every pass of the network has one shape."""
    return max(m for m in range(1, min(cfg.micro_batch, n) + 1) if n % m == 0)


# ------------------------------------------------------------------------------------------------------------- model
def load_model(cfg, device):
    """The diffusers pipeline and what the algorithm needs of it, as plain functions: a namespace. Raises BadInput.

    pipe; unet (what is trained of it in float32, the rest frozen); eps(x, t, c), eps_pre(x, t, c) -> (B, C, h, w) float32;
    encode(prompts) -> (B, L, E); decode(latents) -> (B, 3, H, W) in [0, 1]; shape (C, h, w).
    """
    from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
    from diffusers.training_utils import cast_training_params
    from diffusers.utils import logging
    from huggingface_hub.utils import enable_progress_bars
    from peft import LoraConfig
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar(), transformers_logging.disable_progress_bar(), enable_progress_bars()  # none for loading, but one for a download
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.precision]
    path = str(Path(__file__).resolve().parent / "tiny" / TINY[cfg.method]) if cfg.model == "tiny" else cfg.model
    try:
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, safety_checker=None, requires_safety_checker=False)
        if cfg.lcm_lora:
            path, pipe.scheduler = cfg.lcm_lora, LCMScheduler.from_config(pipe.scheduler.config)
            pipe.load_lora_weights(path), pipe.fuse_lora(), pipe.unload_lora_weights()
    except Exception as e:
        raise BadInput(f"cannot load the model {path} ({type(e).__name__}): give a folder or hub id of a diffusers pipeline, or --model tiny, which needs no download") from e
    if cfg.method != "rlcm":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    elif not isinstance(pipe.scheduler, LCMScheduler):
        raise BadInput(f"{path} has a {type(pipe.scheduler).__name__}: --method rlcm needs a latent consistency model with an LCMScheduler")
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise BadInput(f"{path} predicts {pipe.scheduler.config.prediction_type!r}: only epsilon prediction is supported")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.unet.requires_grad_(not cfg.lora_rank)
    torch.manual_seed(cfg.seed)  # of the adapter's initial weights
    reference = copy.deepcopy(pipe.unet) if cfg.kl and not cfg.lora_rank else None
    if cfg.lora_rank:
        pipe.unet.add_adapter(LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(pipe.unet, torch.float32)  # what is trained is float32 whatever the network is
    if cfg.low_memory:
        pipe.unet.enable_gradient_checkpointing(), pipe.vae.enable_slicing()

    m = SimpleNamespace(pipe=pipe, unet=pipe.unet, shape=(pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size))
    if dim := pipe.unet.config.time_cond_proj_dim:  # an LCM's network takes the guidance scale as an input (LCM, section 4.2); w = guidance - 1 in that paper's formula
        w = pipe.get_guidance_scale_embedding(torch.tensor([cfg.guidance - 1.0]), dim).to(device, dtype)

    def network(x, t, c, unet=None):
        return (unet or m.unet)(x.to(dtype), t, encoder_hidden_states=c, timestep_cond=w.expand(len(x), -1) if dim else None).sample.float()

    def guided(x, t, c, unet=None):  # classifier-free guidance, both halves in one pass, in rollout and update alike
        e_0, e_c = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([m.nothing.expand_as(c), c]), unet).chunk(2)
        return e_0 + cfg.guidance * (e_c - e_0)

    def pretrained(x, t, c):  # the same network with its adapter off, or a copy of all weights
        if not cfg.lora_rank:
            return m.eps(x, t, c, reference)
        pipe.unet.disable_adapters()
        e = m.eps(x, t, c)
        pipe.unet.enable_adapters()
        return e

    @torch.no_grad()
    def encode(prompts):
        return torch.cat([pipe.encode_prompt(prompts[i : i + 64], device, 1, False)[0] for i in range(0, len(prompts), 64)])

    @torch.no_grad()
    def decode(latents):
        return (pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    m.eps = guided if not dim and cfg.guidance > 1 else network
    m.eps_pre, m.encode, m.decode, m.nothing = pretrained, encode, decode, encode([""])
    return m


# ------------------------------------------------------------------------------------------------------- run directory
@contextmanager
def aside(path, mode="w"):
    """A file to write that takes the place of `path` once it is whole and on the disk."""
    with open(f"{path}.part", mode) as f:
        yield f
        f.flush(), os.fsync(f.fileno())
    os.replace(f"{path}.part", path)


def save_metrics(rows, path):
    """A list of dicts as CSV."""
    with aside(path) as f:
        csv.writer(f, lineterminator="\n").writerows([rows[0], *(row.values() for row in rows)])


def save_checkpoint(folder, **state):
    """Write folder/state.pt; the one before it stays as previous.pt."""
    folder.mkdir(exist_ok=True)
    with aside(folder / "state.pt", "wb") as f:
        torch.save(state, f)
        if (folder / "state.pt").exists():
            os.replace(folder / "state.pt", folder / "previous.pt")


def load_checkpoint(folder):
    """The newest checkpoint that can be read; a run stopped before its first one begins anew. Raises BadInput."""
    for path in filter(Path.exists, (folder / "state.pt", folder / "previous.pt")):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain data only
        except Exception as e:
            say(f"{path} is damaged ({type(e).__name__})")
    if any(folder.glob("*.pt")):
        raise BadInput(f"no readable checkpoint in {folder}: start a new run")
    return {"history": {}, "rows": []}


def read_config(folder):
    """config.json of a run directory as a Config. Raises BadInput."""
    try:
        saved = json.loads((Path(folder) / "config.json").read_text())
        return Config(**{f.name: saved[f.name] for f in fields(Config)})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{folder} is not a run directory of this version ({type(e).__name__} on its config.json): give the folder that training printed") from e


def resumed(cfg):
    """The settings of the run cfg.resume, with cfg.epochs if given. Raises BadInput where another one was changed."""
    changed = [f.name for f in fields(Config) if f.name not in ("resume", "epochs") and getattr(cfg, f.name) != f.default]
    if changed:
        raise BadInput(f"--{changed[0].replace('_', '-')} cannot change on --resume: the run would not be the one left alone; start a new run, or change only --epochs")
    saved = read_config(cfg.resume)
    return replace(saved, resume=cfg.resume, out=cfg.resume, epochs=cfg.epochs or saved.epochs)


# ----------------------------------------------------------------------------------------------------------- main loop
def train(cfg, stop=()):
    """Train as `cfg` says, or until the epoch in which `stop` becomes true; returns the run directory, a Path. Raises BadInput."""
    from accelerate import Accelerator
    from bench.figures import curves, draw, likeness, save_samples, save_weights
    from tqdm import tqdm
    cfg = resolve(cfg)
    reward_fn, prompts = get_reward(cfg.reward, cfg.model), get_prompts(cfg.prompts)
    out = Path(cfg.out or f"runs/{cfg.method}-{cfg.reward.split('/')[-1].replace(':', '-')}-{cfg.seed}-{time.strftime('%m%d-%H%M%S')}")
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(cfg.precision, cfg.precision), log_with=cfg.log_with, project_dir=out)
    P, rank, device, leader = accelerator.num_processes, accelerator.process_index, accelerator.device, accelerator.is_main_process
    if cfg.batch_size % (P * cfg.updates):
        raise BadInput(f"--batch-size {cfg.batch_size} does not divide into {P} processes x --updates {cfg.updates}")
    if not cfg.resume and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise BadInput(f"{out} exists and is not an empty folder: give another --out")
    state = load_checkpoint(out / "checkpoint")
    history, rows = state["history"], state["rows"]
    if len(rows) >= cfg.epochs:
        raise BadInput(f"{out} already has {len(rows)} epochs: give more --epochs to go on")
    model = load_model(cfg, device)
    s = METHODS[cfg.method][0](model.pipe.scheduler, cfg.steps, device)
    trained = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    parts = {"optimizer": torch.optim.Adam(trained.values(), cfg.lr)}
    model.unet, parts["optimizer"] = accelerator.prepare(model.unet, parts["optimizer"])
    if cfg.method == "score":
        V = Value(model.shape[0])
        parts["V"], parts["V_optimizer"] = accelerator.prepare(V, torch.optim.Adam(V.parameters(), 1e-3))
    embedding, T, mine = model.encode(prompts), len(s.std), cfg.batch_size // P
    share = slice(rank * mine, (rank + 1) * mine)  # of the batch, for this process
    shown = (prompts * 16)[:16]  # the sample grid: the same prompts and the same noise every time
    first = draw(model, cfg, shown)
    r = reward_fn(first, shown)  # a reward that does not work shows here, before anything is written
    if leader:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")}
        with aside(out / "config.json") as f:
            json.dump({**asdict(replace(cfg, resume=None)), "processes": P, "versions": versions}, f, indent=1)
        save_samples(out, 0, first, first, shown, r)
    accelerator.init_trackers("rlcm", {name: str(value) for name, value in asdict(cfg).items()})
    if rows:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        model.pipe.unet.load_state_dict(state["trained"], strict=False)
    start = time.time() - (rows[-1]["seconds"] if rows else 0)
    scorer = ThreadPoolExecutor(1) if device.type == "cuda" else None  # on a CPU a second thread only takes cores from the network
    bar = tqdm(range(len(rows) + 1, cfg.epochs + 1), initial=len(rows), total=cfg.epochs, unit="epoch", disable=not leader, dynamic_ncols=True)
    for epoch in bar:
        # 1. sample prompts and noise, a function of (seed, epoch); each process takes its share
        g = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        index = torch.randint(len(prompts), (cfg.batch_size,), generator=g)
        z = torch.randn(T + 1, cfg.batch_size, *model.shape, generator=g)[:, share].to(device)
        c, names = embedding[index[share].to(device)], [prompts[i] for i in index]
        # 2. roll out the policy; a micro-batch is scored while the next is sampled
        jobs, rewards = [], []
        def score(images, b):
            jobs.append(scorer.submit(reward_fn, images, names[share][b])) if scorer else rewards.append(reward_fn(images, names[share][b]))
        roll = rollout(model, cfg.method, s, c, z, micro_batch_of(cfg, mine // cfg.updates), cfg.kl > 0, score)
        rewards = torch.cat(rewards or [job.result() for job in jobs])
        # 3. returns r - lambda * KL of the path, standardised by prompt over all processes
        mine_all = torch.stack([rewards, roll.kl.sum(0).cpu(), torch.full((mine,), float(bool(stop)))], 1)
        r, path_kl, stopping = accelerator.gather(mine_all.to(device)).cpu().T  # (B,) each
        advantage, scale = (v[share].to(device) for v in advantages(r - cfg.kl * path_kl, names, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip))
        if cfg.method == "score":
            to_go = advantage + cfg.kl * scale * (roll.kl.cumsum(0) - roll.kl)  # (T, B): the KL paid before an action is given back
            advantage = actor_critic(parts["V"], parts["V_optimizer"], accelerator, s, roll, to_go, g)
        # 4. policy gradient
        log = update(model, cfg, accelerator, parts["optimizer"], s, c, roll, advantage, scale, rows[-1]["skipped"] if rows else 0)
        # 5. write down
        rows.append({"epoch": epoch, "seconds": round(time.time() - start, 3), "reward_queries": epoch * cfg.batch_size, "reward_mean": r.mean().item(),
                     "reward_std": r.std(correction=0).item(), "reward_min": r.min().item(), "reward_max": r.max().item(),
                     "path_kl": path_kl.mean().item(), **log, "likeness": ""})
        bar.set_postfix(reward=f"{r.mean():.3f}", start=f"{rows[0]['reward_mean']:.3f}")
        if save := epoch % cfg.save_every == 0 or epoch == cfg.epochs:
            images = draw(model, cfg, shown)
            rows[-1]["likeness"] = likeness(images, first)
            for tracker in accelerator.trackers:
                tracker.log_images({"samples": images.permute(0, 2, 3, 1).cpu().numpy()}, epoch, **{"dataformats": "NHWC"} if cfg.log_with == "tensorboard" else {})
        accelerator.log({name: value for name, value in rows[-1].items() if value != ""}, epoch)
        if leader:
            save_metrics(rows, out / "metrics.csv")
        if leader and save:
            save_samples(out, epoch, images, first, shown, reward_fn(images, shown))
            save_weights(model.pipe, out)
            curves([out], out / "reward.png")
        if leader and (save or stopping.any()):
            save_checkpoint(out / "checkpoint", trained=trained, history=history, rows=rows, **{name: part.state_dict() for name, part in parts.items()})
        if stopping.any():
            bar.close()
            say(f"stopped after epoch {epoch}; to go on: python rlcm.py --resume {out}")
            return out
    use = f'pipe.load_lora_weights("{out}")' if cfg.lora_rank else f'UNet2DConditionModel.from_pretrained("{out}/unet")'
    say(f"reward {rows[0]['reward_mean']:.3f} -> {rows[-1]['reward_mean']:.3f} in {cfg.epochs} epochs, {rows[-1]['seconds']:.0f} s; likeness {rows[-1]['likeness']:.2f} "
        f"(1 unchanged, 0 blank)\npictures {out}/samples, curve {out}/reward.png; to use it: {use}, or: python rlcm.py --sample \"a cat\" --load {out}")
    return out


def main(argv=None):
    from transformers import HfArgumentParser
    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")
    def interrupt(*_):  # the first Ctrl-C ends the epoch and saves, the second ends at once
        stop.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    parser, stop = HfArgumentParser(Config, allow_abbrev=False, prog="rlcm.py", description=__doc__.split("\n\n")[0]), []
    parser.error = refuse
    try:
        cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        modes = [name for name in ("sample", "evaluate", "plot", "resume") if getattr(cfg, name)]
        if unknown:
            refuse(f"unknown argument {unknown[0]}")
        if cfg.load and modes != ["sample"]:
            refuse("--load goes with --sample")
        if len(modes) > 1:
            refuse(f"--{modes[0]} and --{modes[1]} are two commands: give one")
        if modes in ([], ["resume"]):
            signal.signal(signal.SIGINT, interrupt)
            train(resumed(cfg) if modes else cfg, stop)
            return 130 if stop else None
        from bench import figures
        getattr(figures, modes[0])(cfg)
    except (BadInput, OSError, KeyboardInterrupt) as e:  # OSError: a full disk, a folder that cannot be written
        print("rlcm.py:", str(e) or "stopped; a run goes on from its last checkpoint with --resume RUN", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(main())
