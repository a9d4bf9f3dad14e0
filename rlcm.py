"""RLCM in one file: fine-tune a text-to-image model on any reward with policy gradients.

    python rlcm.py --reward compress --steps 4              # train: writes images and a LoRA to runs/NAME/
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress          # or score: the same loop, another sampler
    python rlcm.py --model SimianLuo/LCM_Dreamshaper_v7     # the paper's model; the default is a tiny one
    python rlcm.py --model my_model.py:load                 # a network of your own: see class DiffusersModel
    python rlcm.py --resume runs/NAME                       # resume an interrupted run
    accelerate launch rlcm.py --reward compress             # several GPUs: the batch is split across them

THE IDEA
A consistency model samples an image in a few steps: each step predicts the clean image, then re-noises it
with less noise. So every latent on the way is drawn from a Gaussian whose mean is the prediction, scaled to
the next level, and its log-probability has a closed form. A reward scores the finished image, and steps that
led to above-average images for their prompt become more likely. Diffusion models and reverse-time SDEs take
the same kind of step, but keep part of the noise that they predict. So one loop trains all three.

THE OBJECTIVE (on the right: the function that computes it)
Sampling is a Markov decision process: the state is (x_k, t_k, c), the action is the next latent x_{k+1}, and
the reward comes at the end. A latent is alpha_t * clean latent + sigma_t * z, z ~ N(0, I); alpha_t is called
signal here, and sigma_t noise. A step predicts the clean latent, pred_x0, and with it the noise eps in x_k.
It keeps part of eps and adds fresh noise: a share `new` of the next level's noise variance. Deterministic
DDIM has new = 0. A prime marks the level of x_{k+1}:

    x_{k+1} ~ N( signal' pred_x0 + sqrt(1 - new) noise' eps,  new noise'^2 I )              policy
    eps = (x_k - signal pred_x0) / noise

    RLCM      new = 1: nothing is kept. pred_x0 is the consistency function (an LCM adds c_skip x_k, which is
              about 0), and fresh noise is added to it.
    DDPO      new = 1 - (signal noise' / (signal' noise))^2: DDIM with eta = 1.
    SaA       Scores as Actions: the same share, at levels of continuous time. The score is -eps / noise. If
              it is the true score, the mean is the reverse-time SDE's for a step of any length, here and in
              DDPO; the std is the SDE's for short steps only.

    J(theta) = E[ r(decode(x_H), c) ]                                       rollout
    grad J   ≈ E[ sum_k A grad log p_theta(x_{k+1} | x_k, c) ]              log_prob, policy_loss
    A        = (r - mean r) / std r, per prompt                             advantages

A step that adds no noise has no density: it is not an action, and the sums over k leave it out. This is one
reason for the ≈: such a last step depends on theta, too, but its derivative is dropped, as in RLCM, since it
would take a reward that can be differentiated (examples/differentiable.py). The others: dividing by each
prompt's std reweights the prompts; mean r includes the image's own reward, and rewards from slightly older
policies; and the code's loss is this divided by D * number of actions.

The KL penalty of Scores as Actions (--kl lambda, for every method, 0 by default) keeps the policy near the
pretrained model. Here r is standardised as in A:

    J(theta) = E[ r - lambda sum_k KL_k ]                                   path_kl
    KL_k     = |mean_theta - mean_ref|^2 / (2 std_k^2)                      gaussian_kl
    grad J   ≈ E[ sum_k A_k grad log p_theta - lambda sum_k grad KL_k ]     train
    A_k      = A - lambda (G_k - mean G_k),  G_k = sum_{j>k} KL_j           G_k is the KL-to-go

mean G_k is the batch's, for each k. KL_k depends on theta and x_k, but not on the action drawn at k: in A_k
it would only add variance. An action is charged for the KL of later steps, whose states it changes.

IN NUMBERS
    rlcm, 4 steps of tiny/lcm                          ddpo, 5 steps of tiny/sd
    k    t  signal  noise    new  std added            k    t  signal  noise    new  std added
    0  999   0.068  0.998  1.000  0.974                0  999   0.068  0.998  0.879  0.920
    1  759   0.229  0.974  1.000  0.850                1  799   0.193  0.981  0.800  0.819
    2  499   0.527  0.850  1.000  0.584                2  599   0.402  0.916  0.740  0.652
    3  259   0.812  0.584  1.000  0.000, no action     3  399   0.653  0.758  0.759  0.431
                                                       4  199   0.869  0.495  1.000  0.000, no action

Rewards -2.9, -2.6, -2.5, -2.0 of one prompt (mean -2.5, std 0.324) give A = -1.23, -0.31, 0.00, 1.54.

GLOSSARY      shape           meaning; symbol in the papers
    B, H, D                   images in a batch; steps (network evaluations); elements of a latent
    x         (B, C, h, w)    latent before step k; x_0 is noise, x_H is decoded (the papers count down)
    k                         index of the step, an int
    c                         encoded prompts: whatever model.encode returns
    s                         schedule. Tensors (H,): s.t, timestep of each step (tau_n in RLCM); s.signal and
                              s.noise, the level before it; s.signal_next and s.noise_next, the level after
                              it; s.new, the share of fresh noise variance, so std_k^2 = new noise'^2;
                              s.c_skip and s.c_out, 0 and 1 but for an LCM. And s.start, the std of x_0;
                              s.actions, a list of the steps that add noise
    denoise   a function      denoise(x, k, c, s) -> pred_x0: the network
    pred_x0   (B, C, h, w)    predicted clean latent; x_0 hat in the papers
    eps       (B, C, h, w)    the noise in x that pred_x0 implies
    ref                       reference: the pretrained model, which is the network without its LoRA
    log_p     (B,)            log-prob of an action; ratio = exp(log_p - log_p_old)
    A         (B,)            advantage

PAPERS on arXiv: RLCM 2404.03673, RL for Consistency Models. LCM 2310.04378, Latent Consistency Models.
    DDPO 2305.13301, Training Diffusion Models with Reinforcement Learning. DDIM 2010.02502. PPO 1707.06347.
    SaA 2409.08400, Scores as Actions, and 2502.01819. Differences from the official code: docs/papers.md.
    "Official:" names the functions of Owen-Oertell/rlcm (b8330ed), then of kvablack/ddpo-pytorch (1958463).
NOT HERE: full fine-tuning of a pipeline, fp16, value networks. Extensions beyond the papers: examples/.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.utils import enable_progress_bars
from matplotlib.figure import Figure
from PIL import ImageDraw, ImageOps
from tqdm import tqdm

import rewards
from rewards import BadInput, explained, get_prompts, get_reward, load_function, require, to_pil

# diffusers, peft and accelerate are imported where they are used, or `import rlcm` would take twice as long.

# ================================================== METHOD ==================================================
# Everything from here to CONFIG needs only torch, numpy, math and SimpleNamespace, so it can be copied.


def policy(denoise, x, k, c, s):
    """The Gaussian of x_{k+1} given x_k = x. Returns its mean (B, C, h, w) and its std, a scalar.

    Official: LCMScheduler.step; ddim_step_with_logprob.
    """
    pred_x0 = denoise(x, k, c, s).float()
    eps = (x - s.signal[k] * pred_x0) / s.noise[k]
    f = s.c_skip[k] * x + s.c_out[k] * pred_x0  # consistency function f_theta (LCM, eq. 9); else pred_x0
    kept = (1 - s.new[k]).sqrt() * s.noise_next[k]
    std = s.new[k].sqrt() * s.noise_next[k]
    return s.signal_next[k] * f + kept * eps, std


# The same in each paper's words, where signal = sqrt(ab) and noise = sqrt(1 - ab), with ab = alpha-bar:
#
#   RLCM, section 4 (nothing kept)       mean  sqrt(ab') f_theta(x, t),  std  sqrt(1 - ab')
#   DDPO: DDIM, eq. 12                   mean  sqrt(ab') pred_x0 + sqrt(1 - ab' - std^2) eps
#         DDIM, eq. 16, eta = 1          std   sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab')
#   SaA: with the score a = -eps / noise and rho = ab / ab', the mean is (x + (1 - rho) a) / sqrt(rho).
#         For steps short compared with the distance to the data, it is x + (beta x / 2 + beta a) dt, and
#         the std sqrt(beta dt). With 6 steps the std is 0.5 to 0.7 of that.


# ---- Schedules, from the model's own scheduler: a LoRA is trained on the timesteps it is sampled with
def rlcm_schedule(scheduler, cfg):
    """Schedule of cfg.steps from an LCMScheduler. The last step adds no noise: H - 1 actions."""
    scheduler.set_timesteps(cfg.steps)
    t = scheduler.timesteps
    alpha_bar = scheduler.alphas_cumprod[t]
    alpha_bar_next = torch.cat([alpha_bar[1:], torch.ones(1)])
    new = torch.ones(len(t))
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # LCM, appendix
    return make_schedule(t, level(alpha_bar), level(alpha_bar_next), new, c_skip=c_skip, c_out=c_out)


def ddpo_schedule(scheduler, cfg):
    """Schedule of cfg.steps from a DDIMScheduler with eta = 1.

    Its last step adds noise, too, unless the scheduler has set_alpha_to_one.
    """
    scheduler.set_timesteps(cfg.steps)
    t = scheduler.timesteps
    t_next = t - scheduler.config.num_train_timesteps // cfg.steps  # as in DDIMScheduler.step
    alpha_bar = scheduler.alphas_cumprod[t]
    alpha_bar_next = scheduler.alphas_cumprod[t_next.clamp(min=0)]
    alpha_bar_next = torch.where(t_next >= 0, alpha_bar_next, scheduler.final_alpha_cumprod)
    return make_schedule(t, level(alpha_bar), level(alpha_bar_next))


def score_schedule(scheduler, cfg):
    """Continuous time: the SDE dX = -1/2 beta X dt + sqrt(beta) dB of the model's betas.

    alpha_bar(t) is exp(-integral of beta up to t). Levels are evenly spaced in the square root of that
    integral, so steps are small near the data. The last one reaches alpha_bar = 1: H - 1 actions.
    """
    integral = -scheduler.alphas_cumprod.double().log()  # at t = 0 .. 999, interpolated linearly
    smallest = max(1 / cfg.steps, (integral[0] / integral[-1]).sqrt().item())
    grid = integral[-1] * torch.linspace(1, smallest, cfg.steps).double() ** 2
    t = torch.from_numpy(np.interp(grid, integral, range(len(integral)))).float()
    alpha_bar = torch.cat([-grid, torch.zeros(1)]).exp()  # (H+1,)
    return make_schedule(t, level(alpha_bar[:-1]), level(alpha_bar[1:]))


def level(alpha_bar):
    """Signal and noise, each (H,), from alpha_bar (H,), the signal's share of the variance."""
    alpha_bar = alpha_bar.double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def make_schedule(t, level, level_next, new=None, **others):
    """The glossary's s from timesteps (H,) and two levels, each a pair (signal, noise) of tensors (H,).

    `new` defaults to DDIM's with eta = 1, an Euler-ancestral step. Others: start, c_skip and c_out.
    """
    signal, noise = level
    signal_next, noise_next = level_next
    if new is None:
        new = 1 - (signal * noise_next / (signal_next * noise)) ** 2
    s = SimpleNamespace(t=t, start=1.0, c_skip=torch.zeros(len(t)), c_out=torch.ones(len(t)))
    s.signal = signal.float()
    s.noise = noise.float()
    s.signal_next = signal_next.float()
    s.noise_next = noise_next.float()
    s.new = new.float()
    vars(s).update(others)
    s.actions = (s.new * s.noise_next).nonzero().flatten().tolist()
    return s


# A new sampler is one entry here. `scheduler` names a diffusers class. A pipeline with another scheduler is
# converted with from_config(**options), or refused if there are no options. When a run starts, every step of
# the schedule of `checked_as` is compared with that scheduler's step(**step_options). A method that no
# scheduler implements names a related method there, as score does; its own schedule is not checked. `tiny` is
# the embedded model to train.
METHODS = {
    "rlcm": SimpleNamespace(
        schedule=rlcm_schedule, scheduler="LCMScheduler", options={}, step_options={}, checked_as="rlcm",
        tiny="tiny/lcm"
    ),
    "ddpo": SimpleNamespace(
        schedule=ddpo_schedule, scheduler="DDIMScheduler", options={"clip_sample": False},
        step_options={"eta": 1.0}, checked_as="ddpo", tiny="tiny/sd"
    ),
}  # fmt: skip
METHODS["score"] = SimpleNamespace(**vars(METHODS["ddpo"]) | {"schedule": score_schedule})


# ---- Log-prob, KL, rollout, advantages and loss
def log_prob(x_next, mean, std):
    """Mean over the D elements of a latent of log N(x_next; mean, std^2 I).

    x_next and mean are (B, C, h, w), std is a scalar; returns (B,), in float32 whatever it is given. The
    official code takes the mean, too, so the ratio is the D-th root of the true one: a clip range of 1e-4
    allows 1.6 on the summed log-ratio of a 4 x 64 x 64 latent (D = 16,384) and 0.077 on tiny's (D = 768).
    """
    log_p = -((x_next.float() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_p.mean((1, 2, 3))


def gaussian_kl(mean, mean_ref, std):
    """KL( N(mean, std^2 I) || N(mean_ref, std^2 I) ) in nats, summed over the D elements of a latent.

    mean and mean_ref are (B, C, h, w), std is a scalar; returns (B,). For steps short compared with the
    distance to the data it is Girsanov's 1/2 beta dt |a_theta - a_ref|^2. The last steps never are.
    """
    return ((mean - mean_ref) ** 2).sum((1, 2, 3)) / (2 * std**2)


@torch.no_grad()
def rollout(denoise, s, c, z):
    """Sample B trajectories with z (H+1, B, C, h, w), standard normal: for x_0, then for each step.

    Returns lists of H + 1 latents x and H means, (B, C, h, w) each, and log_p, a dict: action k -> (B,).
    Official: LatentConsistencyModelPipeline.__call__, pipeline_with_logprob.
    """
    x = [s.start * z[0]]
    means = []
    log_p = {}
    for k in range(len(s.t)):
        mean, std = policy(denoise, x[k], k, c, s)
        means.append(mean)
        x.append(mean + std * z[k + 1])  # x_{k+1} ~ N(mean_k, std_k^2 I)
        if k in s.actions:
            log_p[k] = log_prob(x[k + 1], mean, std)
    return x, means, log_p


@torch.no_grad()
def path_kl(denoise_ref, s, c, x, means):
    """KL_k along a rollout's x and means. Returns mean_ref, a dict: action k -> (B, C, h, w), and kl (B, H).

    If all earlier steps are actions, too, the expected sum of KL_k is at least the KL of the latents after
    the last action from the reference's. A last step without noise is not covered.
    """
    mean_ref = {}
    kl = x[0].new_zeros(len(x[0]), len(means))
    for k in s.actions:
        mean_ref[k], std = policy(denoise_ref, x[k], k, c, s)
        kl[:, k] = gaussian_kl(means[k], mean_ref[k], std)
    return mean_ref, kl


def advantages(r, prompts, history, buffer_size, min_count, adv_clip):
    """Rewards standardised per prompt (RLCM, section 4; DDPO, D.3): r (B,), B strings -> A (B,).

    `history`, prompt -> list of its latest rewards, is updated in place. It holds buffer_size of them, or all
    in this batch if that is more. Prompts with fewer than min_count use the mean and std of the batch.
    Official: PerPromptStatTracker.update.
    """
    r = r.double().view(len(prompts))  # otherwise integers would truncate A, and (B, 1) would make it (B, B)
    A = torch.zeros_like(r)
    for prompt in set(prompts):
        i = [n for n, other in enumerate(prompts) if other == prompt]
        latest = history.get(prompt, []) + r[i].tolist()
        history[prompt] = latest[-max(buffer_size, len(i)) :]
        seen = r.new_tensor(history[prompt]) if len(history[prompt]) >= min_count else r
        std = seen.std(correction=0)
        if std > 1e-6 * seen.abs().max():  # otherwise the rewards are equal up to rounding and A stays 0
            A[i] = (r[i] - seen.mean()) / std
    return A.clamp(-adv_clip, adv_clip).float()


def policy_loss(log_p, log_p_old, A, algo, clip_range):
    """Loss and ratio of n actions, all (n,). Official: inside ppo_training_loop, and inside main of train.py.

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


@strict
@dataclass
class Config:
    """Settings of a run, whose types are checked. The defaults train rlcm on the embedded model.

    The command line's flags are generated from it.
    """

    reward: str = flag("compress", rewards.HELP)
    method: str = flag("rlcm", f"{', '.join(METHODS)}: consistency model, diffusion model, reverse SDE")
    algo: Literal["ppo", "reinforce"] = flag("ppo", "PPO's clipped ratio, or plain REINFORCE")
    model: str = flag("tiny", "tiny, a diffusers pipeline (folder or hub id), or path/to/file.py:function")
    prompts: str = flag("animals", f"{', '.join(rewards.PROMPTS)}, a text file, or a quoted prompt")
    resolution: int = flag(64, "height and width of the images in pixels")
    steps: int = flag(4, "H, network evaluations per image")
    epochs: int = flag(16, "number of rollouts")
    batch_size: int = flag(64, "B, images per rollout")
    micro_batch: int = flag(32, "images per network pass and per reward call; affects only memory and speed")
    group_size: int = flag(1, "images per prompt in a batch; A is GRPO's if --buffer-size is at most this")
    updates: int = flag(1, "optimizer steps per epoch, each on an equal part of the batch")
    lr: float = flag(1.8e-3, "learning rate of Adam")
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
    save_every: int = flag(4, "epochs between sample grids")
    out: str = flag("", "folder of the run; default runs/METHOD-REWARD-SEED-TIME-PID")


TINY = {  # settings for the embedded model, chosen on seeds 0 to 2 (docs/results.md); rlcm's are the defaults
    "ddpo": dict(steps=5, epochs=10, lr=4e-3, guidance_scale=3.0),
    "score": dict(steps=6, epochs=9, lr=4e-3, guidance_scale=3.0),
}
FULL = {  # for other pipelines: the papers' settings for compress, with global batch sizes
    # RLCM's code and Table 1, but 4 steps and 512 pixels where they have 8 and 768.
    "rlcm": dict(epochs=1000, batch_size=16, lr=1e-4, guidance_scale=8.0, lora_alpha=32),
    # ddpo-pytorch's config/dgx.py
    "ddpo": dict(
        steps=50, epochs=100, batch_size=256, updates=4, lr=3e-4,
        guidance_scale=5.0, lora_rank=4, lora_alpha=4, adv_clip=5.0, max_grad_norm=1.0,
    ),
}  # fmt: skip
FULL["score"] = FULL["ddpo"]  # its authors' settings are for one prompt and a reward that is not built in
SIZE = dict(precision="bf16", resolution=512, micro_batch=4, buffer_size=16, min_count=16, save_every=10)


def preset(method=None, model="tiny"):
    """Settings for Config(**...), a dict: those of the model file's function, if it has `settings`.

    `settings` may contain `method`. Raises BadInput for a file that does not load.
    """
    if ".py:" in model:
        settings = getattr(load_function(model), "settings", {})
    else:
        settings = TINY.get(method, {}) if model == "tiny" else SIZE | FULL.get(method, FULL["rlcm"])
    if method:
        settings = settings | {"method": method}
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        settings = settings | {"precision": "fp32"}
    return settings | {"model": model}


def check(cfg):
    """Raise BadInput for settings that cannot work, wherever they come from."""
    from accelerate.tracking import get_available_trackers
    available = not cfg.log_with or cfg.log_with in map(str, get_available_trackers())
    require(available, f"--log-with {cfg.log_with}: first pip install {cfg.log_with}")
    for name, value in asdict(cfg).items():
        if type(value) in (int, float):
            zero = value == 0 and name in ("kl", "guidance_scale", "seed")
            require(zero or 0 < value < 1e12, f"--{name.replace('_', '-')} {value}: must be in (0, 1e12)")
    require(cfg.method in METHODS, f"--method {cfg.method}: must be one of {', '.join(METHODS)}")
    for divisor in (int(os.getenv("WORLD_SIZE", "1")) * cfg.updates, cfg.group_size):
        require(cfg.batch_size % divisor == 0, f"--batch-size must be a multiple of {divisor}")
    require(cfg.algo != "reinforce" or cfg.updates == 1, "--algo reinforce has no ratio: --updates must be 1")


# =================================================== MODEL ==================================================
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(cfg, device):
    """The model that cfg.model names, on a device. Raises BadInput."""
    from diffusers import DiffusionPipeline
    if ".py:" in cfg.model:
        return load_function(cfg.model)(cfg, device)
    source = cfg.model
    if source == "tiny":
        source = f"{Path(__file__).parent}/{METHODS[cfg.method].tiny}"
    kind = DiffusionPipeline.load_config(source)["_class_name"]
    require(
        kind in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
        f"{source} is a {kind}, not a StableDiffusionPipeline or an LCM: see examples/"
    )
    pipe = DiffusionPipeline.from_pretrained(source, dtype=DTYPES[cfg.precision], safety_checker=None)
    return StableDiffusion(pipe.to(device), cfg)


class DiffusersModel:
    """A LoRA on the network of a diffusers pipeline: what all families share.

    `train` takes any class with these members: --model file.py:function, where function(cfg, device) returns
    one. function.settings, a dict, overrides Config's defaults, and the flags override it. The file may
    import rlcm, and gets the running module. docs/models.md has more.

        shape                   (C, h, w) of a latent
        device                  where latents, c and images are
        trainable               dict: name -> parameter, float32
        schedule(H)             the glossary's s; tensors on the CPU
        encode(prompts)         B strings -> c, anything that denoise understands
        denoise(x, k, c, s)     x (B, C, h, w), k an int -> pred_x0, shaped like x, float32, differentiable
        decode(x)               clean latents (B, C, h, w) -> images (B, 3, height, width), float32 in [0, 1]
        reference()             a context in which denoise is the pretrained network's; used with --kl
        save(folder)            writes the trained weights into a run's folder

    denoise must be deterministic (no dropout), or the ratio does not start at 1. Nothing checks the schedule
    of a class of your own: compare it with a sampler that you trust. A subclass for another family of
    pipelines defines set_up, build_schedule, encode, predict and pred_x0, and its steps are checked.
    """

    component = "unet"  # the part of the pipeline to train
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as in both official codes
    patch = 1  # the height and width of a latent must be multiples of this
    step_options = {}  # arguments of the scheduler's step
    guided = False  # classifier-free guidance: c has two rows for each x, first all those without a prompt

    def __init__(self, pipe, cfg):
        """pipe: a diffusers pipeline, on its device. Raises BadInput for models it would train wrongly."""
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig
        self.pipe = pipe
        self.cfg = cfg
        self.device = pipe.device
        self.network = getattr(pipe, self.component)
        self.dtype = DTYPES[cfg.precision]
        require(self.network.dtype == self.dtype, f"load the pipeline with dtype={self.dtype}")
        require(not getattr(self.network, "peft_config", None), "first fuse_lora(), unload_lora_weights()")
        self.set_up()
        unit = pipe.vae_scale_factor * self.patch
        require(cfg.resolution % unit == 0, f"--resolution {cfg.resolution}: must be a multiple of {unit}")
        size = cfg.resolution // pipe.vae_scale_factor
        self.shape = (self.network.config.in_channels, size, size)

        # Everything is frozen except a new LoRA, whose weights are float32 whatever the network's dtype.
        pipe.vae.requires_grad_(False)
        pipe.vae.use_slicing = cfg.resolution >= 512  # decodes one image at a time, in less memory
        self.network.requires_grad_(False)
        lora = LoraConfig(
            r=cfg.lora_rank,
            lora_alpha=cfg.lora_alpha,
            target_modules=self.lora_layers,
            init_lora_weights="gaussian"
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

    def schedule(self, H):
        """Schedule for H steps. Raises BadInput if the steps of `checked_as` are not the scheduler's."""
        s = self.build_schedule(METHODS[self.cfg.method].checked_as, H)
        scheduler = self.pipe.scheduler
        name = type(scheduler).__name__
        require(len(s.t) == H, f"the {name} gives {len(s.t)} timesteps for --steps {H}: choose another")
        generator = torch.Generator()
        x, output = torch.randn(2, 1, *self.shape, generator=generator)
        for k, t in enumerate(s.t):
            generator.manual_seed(k)
            theirs = scheduler.step(output, t, x, generator=generator, **self.step_options).prev_sample
            mean, std = policy(lambda *_: self.pred_x0(output, x, k, s), x, k, None, s)
            ours = mean + std * torch.randn(x.shape, generator=generator.manual_seed(k))
            error = (ours - theirs).norm() / theirs.norm()
            require(error < 1e-4, f"the {name}'s step {k + 1} is off by {error:.1e} (nan: zero terminal SNR)")
        return self.build_schedule(self.cfg.method, H)

    def denoise(self, x, k, c, s):
        rows = torch.cat([x, x]) if self.guided else x  # without and with the prompt, in one pass
        # Inside an autocast around the whole run, a cache would keep casts of weights from before an update.
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False):
            output = self.predict(rows, s.t[k], c).float()
        if self.guided:
            uncond, cond = output.chunk(2)
            output = uncond + self.cfg.guidance_scale * (cond - uncond)
        return self.pred_x0(output, x, k, s)

    def warn_if_longer(self, prompts, limit):
        if max(map(len, self.pipe.tokenizer(prompts).input_ids)) > limit:
            warnings.warn(f"some prompts have more than {limit} tokens: the rest is ignored")

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
            name = f"{self.component}.{name}".replace(".default", "").replace("_orig_mod.", "")
            weights[name] = p * scale if "lora_B" in name else p
        write(f"{folder}/{LORA}", safetensors.torch.save(weights))


class StableDiffusion(DiffusersModel):
    """Stable Diffusion 1 or 2, or one of their consistency models."""

    def set_up(self):
        """Set the method's scheduler, the guidance and the shape of a latent."""
        import diffusers
        method = METHODS[self.cfg.method]
        scheduler = self.pipe.scheduler
        name = type(scheduler).__name__
        usable = name == method.scheduler or (method.options and "beta_schedule" in scheduler.config)
        require(usable, f"a {name} is not for --method {self.cfg.method}, which needs a {method.scheduler}")
        scheduler = getattr(diffusers, method.scheduler).from_config(scheduler.config, **method.options)
        self.pipe.scheduler = scheduler
        self.step_options = method.step_options
        self.prediction = scheduler.config.prediction_type
        self.patch = 2**self.network.num_upsamplers
        self.pipe.tokenizer.model_max_length = self.pipe.text_encoder.config.max_position_embeddings

        # Classifier-free guidance with the empty prompt, unless the network takes the scale as an input.
        self.guided = not self.network.config.time_cond_proj_dim and self.cfg.guidance_scale > 1

    def build_schedule(self, method, H):
        return METHODS[method].schedule(self.pipe.scheduler, replace(self.cfg, steps=H))

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> inputs of the U-Net, with B rows, or 2B with classifier-free guidance."""
        self.warn_if_longer(prompts, self.pipe.tokenizer.model_max_length)
        c, empty = self.pipe.encode_prompt(prompts, self.device, 1, self.guided)
        if self.guided:
            c = torch.cat([empty, c])
        return dict(encoder_hidden_states=c, timestep_cond=self.guidance_input(len(c)))

    def guidance_input(self, rows):
        """An LCM takes the guidance scale minus one as an input (LCM, section 4.2), other models nothing."""
        dim = self.network.config.time_cond_proj_dim
        if not dim:
            return None
        scale = torch.full((rows,), self.cfg.guidance_scale - 1.0)
        return self.pipe.get_guidance_scale_embedding(scale, dim).to(self.device, self.dtype)

    def predict(self, x, t, c):
        return self.network(x.to(self.dtype), t, **c).sample

    def pred_x0(self, output, x, k, s):
        """The predicted clean latent, from the network's output: clean latent, v or noise."""
        if self.prediction == "sample":
            return output
        if self.prediction == "v_prediction":
            return s.signal[k] * x - s.noise[k] * output
        return (x - s.noise[k] * output) / s.signal[k]


@torch.no_grad()
def generate(model, cfg, prompts):
    """Images (B, 3, height, width) of B prompts. In float32 image i is a plain pipeline's with the seed i."""
    s = model.schedule(cfg.steps)
    images = []
    for i in torch.arange(len(prompts)).split(cfg.micro_batch):
        c = model.encode([prompts[n] for n in i])
        generators = [torch.Generator().manual_seed(n) for n in i.tolist()]
        z = [torch.randn(cfg.steps + 1, *model.shape, generator=generator) for generator in generators]
        x = rollout(model.denoise, s, c, torch.stack(z, 1).to(model.device))[0]
        images.append(model.decode(x[-1]))
    return torch.cat(images)


# =================================================== TRAIN ==================================================
def train(cfg, resume=False, on_epoch=None):
    """Fine-tune with `cfg`; with resume, continue the run in cfg.out. Returns its folder. Raises BadInput.

    This is RLCM's Algorithm 1, but the optimizer steps after the loop over t, as in its code. Other schedules
    make it DDPO, and Scores as Actions without a value function. Every process calls on_epoch(0, model, {})
    first, then on_epoch(epoch, model, row), which may add to the row.
    """
    from accelerate import Accelerator
    from accelerate.utils import broadcast, listify

    # Settings, reward and prompts. The folder's default name omits the path of a reward file.
    reward_name = re.sub(r"[^,]*\.py:|[^\w.,]", "", cfg.reward)
    name = f"{cfg.method}-{reward_name}-{cfg.seed}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}"
    out = Path(cfg.out or f"runs/{name}")
    check(cfg)
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, log_with=cfg.log_with or None, project_dir=out)
    require(resume or not out.exists(), f"{out} exists: give a new --out, or --resume its checkpoint")
    reward = get_reward(cfg.reward, cfg.model)
    prompts = get_prompts(f"{out}/prompts.txt" if resume else cfg.prompts)
    hint = " (CUDA finds no GPU: is its driver too old?)" if cpu and torch.version.cuda else ""
    accelerator.print(
        f"{cfg.method} on {cfg.model}, device {accelerator.device}{hint}, folder {out}\n"
        f"reward {cfg.reward}; {len(prompts)} prompts, the first is {prompts[0]!r}"
    )

    # The model, its schedule and the optimizer. Every process starts from the first one's weights.
    with explained(f"--model {cfg.model} --steps {cfg.steps} cannot be set up; no *.fp16.* files are read"):
        model = load_model(cfg, accelerator.device)
        s = model.schedule(cfg.steps)
    require((s.new == s.new.clamp(0, 1)).all(), "a share of new noise is not in [0, 1]: zero terminal SNR?")
    require(s.actions, f"--method {cfg.method} --steps {cfg.steps} adds no noise: nothing to reinforce")
    parameters = list(model.trainable.values())
    broadcast([p.data for p in parameters])  # in place
    optimizer = torch.optim.Adam(parameters, cfg.lr)
    rows, history = resume_run(out, cfg, model, optimizer) if resume else ([], {})

    # A new run's folder. Nothing is written before the pretrained model's images have been rewarded.
    if accelerator.is_main_process and not resume:
        with explained(f"{cfg.model} cannot draw the first images"):
            sheet = draw_samples(model, cfg, reward, prompts)
        os.makedirs(f"{out}/samples")  # fails if another run has made it
        sheet.save(f"{out}/samples/epoch-0000.png")
        write(f"{out}/prompts.txt", "\n".join(prompts).encode())
    with explained(f"--log-with {cfg.log_with} cannot start"):
        accelerator.init_trackers("rlcm", asdict(cfg), {"wandb": {"reinit": "finish_previous"}})
    if on_epoch and not resume:
        on_epoch(0, model, {})

    # Each batch is cut into `updates` minibatches, one per optimizer step, each split across processes.
    B = cfg.batch_size
    local = torch.arange(B).view(cfg.updates, accelerator.num_processes, -1)[:, accelerator.process_index]
    actions_per_update = len(s.actions) * local.shape[1]  # of this process; p.grad is the processes' mean
    seconds = rows[-1]["seconds"] if rows else 0
    epochs = tqdm(range(len(rows) + 1, cfg.epochs + 1), disable=not accelerator.is_main_process)
    for epoch in epochs:
        # Prompts and noise depend on seed and epoch alone, so a resumed run draws the same again.
        began = time.time()
        generator = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        drawn = torch.randint(len(prompts), (B // cfg.group_size,), generator=generator)
        batch = [prompts[n] for n in drawn.repeat_interleave(cfg.group_size)]
        z = torch.randn(cfg.steps + 1, B, *model.shape, generator=generator)

        # 1. Rollout: the sampler is the policy. Each micro-batch is kept for the update.
        minibatches = []
        components = torch.zeros(B, len(reward.names), device=model.device)  # the reward is their sum
        kl = torch.zeros(B, cfg.steps, device=model.device)  # stays 0 without a penalty
        for part in local:
            minibatches.append([])
            for i in part.split(cfg.micro_batch):
                prompts_i = [batch[n] for n in i]
                with torch.no_grad():
                    c = model.encode(prompts_i)
                    x, means, log_p = rollout(model.denoise, s, c, z[:, i].to(model.device))
                    components[i] = reward.components(model.decode(x[-1]), prompts_i)
                mean_ref = None
                if cfg.kl > 0:
                    with model.reference():
                        mean_ref, kl[i] = path_kl(model.denoise, s, c, x, means)
                minibatches[-1].append((i, c, x, log_p, mean_ref))

        # 2. Advantage, minus lambda times the KL-to-go. Each process has filled its own rows and left zeros
        # elsewhere, so the sum is the whole batch, and A is the same everywhere.
        components = accelerator.reduce(components, "sum")
        kl = accelerator.reduce(kl, "sum")
        r = components.sum(1)
        A = advantages(r, batch, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        kl_to_go = kl.sum(1, keepdim=True) - kl.cumsum(1)  # (B, H); KL_k itself is left out
        A_k = A[:, None] - cfg.kl * (kl_to_go - kl_to_go.mean(0))

        # 3. Policy gradient: evaluate each action again, now with gradients. The micro-batches are those of
        # the rollout, so with the same weights log_p is the same to the bit, and the ratio is 1.
        ratios = []
        for minibatch in minibatches:
            for k in s.actions:
                for i, c, x, log_p_old, mean_ref in minibatch:
                    mean, std = policy(model.denoise, x[k], k, c, s)
                    log_p = log_prob(x[k + 1], mean, std)
                    loss, ratio = policy_loss(log_p, log_p_old[k], A_k[i, k], cfg.algo, cfg.clip_range)
                    if cfg.kl > 0:  # lambda grad KL_k, averaged over D as the log-prob is
                        loss += cfg.kl * gaussian_kl(mean, mean_ref[k], std) / math.prod(model.shape)
                    (loss.sum() / actions_per_update).backward()
                    ratios.append(ratio.detach())
            for p in parameters:
                if p.grad is not None:
                    p.grad = accelerator.reduce(p.grad, "mean")
            grad_norm = accelerator.clip_grad_norm_(parameters, cfg.max_grad_norm)
            require(grad_norm.isfinite(), f"epoch {epoch}: the gradient is not finite, lower --lr")
            optimizer.step()
            optimizer.zero_grad()

        # 4. The row of metrics.csv. The ratio starts at exactly 1: in fp32 its drift is 0.
        drift = (accelerator.gather(torch.cat(ratios)[None]) - 1).abs()  # (processes, actions)
        seconds += time.time() - began
        row = listify({  # tensors to numbers
            "epoch": epoch,
            "seconds": seconds,  # of sampling, rewards and learning
            "images": epoch * B,  # rewarded so far
            "reward_mean": r.mean(),
            "reward_std": r.std(correction=0),
            "path_kl": kl.sum(1).mean(),  # nats along an image's path; 0 without a KL penalty
            "clip_fraction": (drift > cfg.clip_range).float().mean(),  # PPO clips one side, by A's sign
            "ratio_drift": drift[:, :actions_per_update].max(),  # before the first optimizer step
            "grad_norm": grad_norm,  # of the last optimizer step, before clipping
            **dict(zip(reward.names, components.mean(0)))
        })
        if on_epoch:
            on_epoch(epoch, model, row)
        rows.append(json.loads(json.dumps(row, default=float)))  # on_epoch may add tensors, NumPy
        accelerator.log(row, epoch)
        epochs.set_postfix(reward=f"{row['reward_mean']:.3f}")

        # 5. Save. The checkpoint comes last: after a kill, --resume repeats the epoch that was not finished.
        if accelerator.is_main_process:
            if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
                sheet = draw_samples(model, cfg, reward, prompts)
                sheet.save(f"{out}/samples/epoch-{epoch:04d}.png")
                for tracker in accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if cfg.log_with == "tensorboard" else {}
                    tracker.log_images({"samples": np.asarray(sheet)[None]}, epoch, **layout)
            save_epoch(out, cfg, model, optimizer, rows, history)

    accelerator.end_training()
    accelerator.print(
        f"reward {rows[0]['reward_mean']:.3f} -> {row['reward_mean']:.3f}, {seconds:.0f} s\n"
        f"train longer: python rlcm.py --resume {shlex.quote(str(out))} --epochs {2 * cfg.epochs}\n"
        f"{out} has {', '.join(sorted(os.listdir(out)))}"
    )
    return out


# =================================================== FILES ==================================================
LORA = "pytorch_lora_weights.safetensors"


def write(path, data):
    """Write bytes to a file atomically: a kill leaves the old file or the new one."""
    part = Path(f"{path}.part")
    part.write_bytes(data)
    part.replace(path)


def write_rows(rows, path):
    """Write dicts to a csv file. Columns that some of them lack are empty there."""
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue().encode())


def draw_samples(model, cfg, reward, prompts):
    """16 images with their rewards as one Pillow image: the same prompts and noise every time."""
    prompts = (prompts * 16)[:16]
    images = generate(model, cfg, prompts)
    r = reward(images, prompts, cfg.micro_batch)
    return sample_grid(images, [f"{value:.2f} {prompt}" for value, prompt in zip(r, prompts)])


def sample_grid(images, captions, columns=8):
    """Images (B, 3, height, width) with captions, in full rows of `columns`, as one Pillow image."""
    from diffusers.utils import make_image_grid
    size = max(128, images.shape[-1] // 2)
    cells = []
    for image, caption in zip(to_pil(images), captions):
        cell = ImageOps.expand(image.resize((size, size)), (0, 0, 0, 18), "white")  # for a caption
        ImageDraw.Draw(cell).text((4, size + 1), caption, "black", font_size=13)
        cells.append(cell)
    return make_image_grid(cells, len(cells) // columns, columns)


def save_epoch(out, cfg, model, optimizer, rows, history):
    """config.json, metrics.csv, reward.png, the LoRA, and last the checkpoint that --resume starts from."""
    write(f"{out}/config.json", json.dumps(asdict(cfg), indent=1).encode())
    write_rows(rows, f"{out}/metrics.csv")
    axis = Figure(layout="constrained").subplots()
    axis.plot(range(1, len(rows) + 1), [row["reward_mean"] for row in rows])
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"reward: {cfg.reward}", parse_math=False)
    axis.figure.savefig(f"{out}/reward.png")

    model.save(out)
    state = dict(
        config=asdict(cfg),
        rows=rows,
        history=history,
        trainable=model.trainable,
        optimizer=optimizer.state_dict()
    )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(f"{out}/checkpoint.pt", buffer.getvalue())


def load_checkpoint(out, model):
    """Load a run's checkpoint into the model. Returns the checkpoint, a dict. Raises BadInput."""
    with explained(f"{out} has no checkpoint of this model and LoRA: start a new run in another folder"):
        state = torch.load(f"{out}/checkpoint.pt", map_location="cpu", weights_only=True)
        for name, p in model.trainable.items():
            p.data.copy_(state["trainable"][name].view_as(p))  # fails if the shapes differ
    return state


def resume_run(out, cfg, model, optimizer):
    """Load the checkpoint into model and optimizer. Returns its rows and history. Raises BadInput."""
    state = load_checkpoint(out, model)
    with explained(f"{out} has a damaged checkpoint: start a new run in another folder"):
        optimizer.load_state_dict(state["optimizer"])
        old = replace(Config(**state["config"]), epochs=cfg.epochs, out=cfg.out)
        require(cfg == old, f"with --resume only --epochs may change: other settings than the run's in {out}")
        rows = state["rows"]
        require(len(rows) < cfg.epochs, f"{out} already has {len(rows)} epochs: give more --epochs")
        return rows, state["history"]


def read_config(out):
    """config.json of a run's folder as a Config. Raises BadInput."""
    with explained(f"{out} is not a run's folder, or is one of another version"):
        return Config(**json.loads(Path(f"{out}/config.json").read_text()))


# =============================================== COMMAND LINE ===============================================
def parse(argv):
    """The command line -> a Config, and the run to resume or None. Raises BadInput."""
    parser = transformers.HfArgumentParser(Config, add_help=False)
    parser.error = lambda message: require(False, f"{message} (--help lists the flags)")
    parser.add_argument("--resume", help="a run's folder; only --epochs may change")
    parser.set_defaults(method=None)  # unless --method is given: settings of a model file may name it
    first = parser.parse_known_args(argv)[0]
    if first.resume:
        cfg = replace(read_config(first.resume), out=first.resume)
    else:
        with explained(f"{first.model} has settings that Config does not accept"):
            cfg = Config(**preset(first.method, first.model))
    parser.set_defaults(**asdict(cfg))  # for --help
    parser.add_argument("-h", "--help", action="help")
    return parser.parse_args(argv, namespace=cfg), first.resume  # cfg with the flags that are given


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
        message = "stopped; if an epoch was saved, --resume with the run's folder continues after it"
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
