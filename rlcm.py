"""RLCM in one file: teach a few-step text-to-image model to please any reward, by policy gradients.

    python rlcm.py --reward compress --steps 4                  # train: runs/NAME/ gets pictures, curve, LoRA
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress              # or score: the same loop, another Gaussian
    python rlcm.py --sample "a cat" "a dog" --load runs/NAME    # base row above tuned row, same noise
    python rlcm.py --resume runs/NAME                           # go on where a stopped run was last saved
    accelerate launch rlcm.py --reward compress                 # several GPUs: the batch is shared out

THE IDEA
A consistency model draws in a few steps; each one guesses the clean picture and adds noise again, ever less.
So each latent on the way is drawn from a Gaussian whose mean the network gives: its probability is known.
A reward judges the finished picture. What led to better pictures than usual for the prompt is made likelier.
A diffusion model and a reverse-time SDE do the same with another Gaussian, so one loop trains all three.

THE OBJECTIVE
A Markov decision process: state (x_k, t_k, c), action x_{k+1}, reward r at the end. On the right: where.

    x_{k+1} ~ N( mean_theta(x_k, t_k, c), std_k^2 I ), k = 0 .. H-1       rlcm_policy ddpo_policy score_policy
    J(theta) = E[ r(decode(x_H), c) - lambda sum_k KL_k ]                 collect, path_kl
    KL_k     = |mean_theta - mean_pre|^2 / (2 std_k^2)                    gaussian_kl
    grad J   = E[ sum_k A_k grad log p(x_{k+1} | x_k, c) ]                log_prob, policy_loss
               - lambda E[ sum_k grad KL_k ]                              update
    A_k      = (r - mean r) / std r - V(x_k) - lambda sum_{j>k} KL_j      advantages, train

In J, too, r is in standard deviations of its prompt's rewards. V is 0, or with --value the reward foreseen
in x_k. Sums run over the steps that add noise and are trained. `rollout` samples from a policy and `update`
scores the samples with the same policy: they cannot drift apart.

GLOSSARY      shape           meaning, symbol in the papers
    B, H, D                   pictures in a batch; steps: evaluations of the network; latent dimensions C*h*w
    x         (B, C, h, w)    latent before a step: x_0 ~ N(0, I) is noise, x_H is decoded
    k         (B,)            number of the step, for each row of the batch
    s         (H,) each       schedule: s.t timestep (tau in RLCM, real for score), s.ab alpha-bar, share of
                              the signal in x_k, s.ab_next in x_{k+1}, s.std, s.actions: trained k
    c         (B, L, E)       embedding of the prompt
    eps       a function      eps(x, t, c) -> (B, C, h, w): the noise that the network sees in x
    pre                       of the pretrained (base) model: the same network without its adapter
    clean     (B, C, h, w)    predicted clean latent, the papers' x_0 with a hat
    log_p     (B,)            log-prob of an action; ratio = exp(log_p - log_p_old)
    A         (B,) or (H, B)  advantage
    lambda                    charge for a nat of KL, in standard deviations of the reward: --kl
    H, too                    of pictures (B, 3, H, W): height

PAPERS on arXiv: RLCM 2404.03673, RL for Consistency Models. LCM 2310.04378, Latent Consistency Models.
    DDPO 2305.13301, Training Diffusion Models with Reinforcement Learning. DDIM 2010.02502. PPO 1707.06347.
    SaA 2409.08400 and 2502.01819, Scores as Actions.

DIFFERS FROM THE RLCM CODE (github.com/Owen-Oertell/rlcm)
    1. The last action. The paper has it both ways: section 4 and Fig. 2 show H - 1 actions, the algorithm box
       and the MDP one more. The code noises the last latent once more, to its own level, and scores that, on
       which the picture does not depend. Here --last-noise 0 has the last evaluation add none. Else it adds
       noise that the picture shows: that step is the only action then, judged against the mirrored noise.
    2. The paper's kernel is of a variance-exploding process: mean f, variance tau^2 - eps^2. Scale x by
       sqrt(ab) and put tau^2 = (1 - ab) / ab, eps = 0: this is the kernel here and in the code.
    3. Timesteps of today's LCMScheduler, on which the LoRA is then sampled; there diffusers' of 2023.
    4. States, mean, std and log-prob are float32, so that the ratio before the first step is exactly 1.
    5. A KL to the pretrained model, as in SaA (--paper: none). No learning-rate schedule. Seeded.
DIFFERS FROM THE DDPO CODE (github.com/kvablack/ddpo-pytorch)
    Adam (there AdamW, decay 1e-4). Pictures and timesteps keep their order (there, and in RLCM's code, they
    are shuffled). A step with std = 0, the last one of tiny/sd, is no action (SD's last std is 0.02).
DIFFERS FROM THE SCORES AS ACTIONS CODE (github.com/hanyang1999/ContTimeRL4DM)
    Any reward and number of steps (there ImageReward, 50). Real times (there DDIM's), the kernel is theirs.
    Advantage: reward, standardised by prompt, less V(x_k), the reward of the predicted picture in a scale by
    least squares (there V(t_{k+1}) - V(t_k), where V adds a trained network to it: docs/results.md).
KEPT: log-prob averaged over D, advantages by prompt, clip range near 1e-4, one pass over the data.
"""
import copy
import csv
import io
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import tqdm

import rewards
from rewards import PROMPTS, BadInput, get_prompts, get_reward, pictures


# ================================================== METHOD ==================================================
# Down to TRAINING a function needs torch, numpy, SimpleNamespace and functions above it: copy what you like.
def at(v, k):
    """v[k] for a batch of steps, ready for arithmetic with latents: (H,), (B,) -> (B, 1, 1, 1)."""
    return v[k].view(-1, 1, 1, 1)


def eta_one(ab, ab_next):
    """std of a step from ab to ab_next: DDIM, eq. 16 with eta = 1. In small steps it is sqrt(beta dt)."""
    return ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt()


def on(device, **tensors):
    return SimpleNamespace(**{name: v.to(device) for name, v in tensors.items()})


# ---- three kernels: x (B, C, h, w), k (B,), c (B, L, E) -> mean (B, C, h, w), std (B, 1, 1, 1) of x_{k+1}
def rlcm_policy(eps, x, k, c, s):
    """Consistency model: guess the clean latent, add noise of the next level (RLCM, section 4)."""
    ab, ab_next, std = at(s.ab, k), at(s.ab_next, k), at(s.std, k)
    clean = (x - (1 - ab).sqrt() * eps(x, s.t[k], c)) / ab.sqrt()
    f = at(s.c_out, k) * clean + at(s.c_skip, k) * x  # consistency function f_theta (LCM, eq. 9)
    return ab_next.sqrt() * f, std


def ddpo_policy(eps, x, k, c, s):
    """Diffusion model: a DDIM step with eta = 1, that is Euler-ancestral (DDPO, section 4; DDIM, eq. 12)."""
    ab, ab_next, std = at(s.ab, k), at(s.ab_next, k), at(s.std, k)
    noise = eps(x, s.t[k], c)
    clean = (x - (1 - ab).sqrt() * noise) / ab.sqrt()
    direction = (1 - ab_next - std**2).clamp(min=0).sqrt() * noise  # back towards x_k
    return ab_next.sqrt() * clean + direction, std


def score_policy(eps, x, k, c, s):
    """Reverse-time SDE dX = (1/2 beta X + beta a) dt + sqrt(beta) dB with the score as action (SaA, sec. 3).

    The mean is exact for steps of any length (Tweedie's formula), rho = exp(-integral of beta over the step).
    It is ddpo's Gaussian, written in the score: what differs is that time is real, and any grid will do.
    """
    ab, ab_next, std = at(s.ab, k), at(s.ab_next, k), at(s.std, k)
    a = -eps(x, s.t[k], c) / (1 - ab).sqrt()
    rho = ab / ab_next
    return (x + (1 - rho) * a) / rho.sqrt(), std


# ---- their schedules: constants of H steps, (H,) each, from the model's own scheduler in diffusers
def rlcm_schedule(scheduler, H, device, last_std=0.0):
    """Of an LCMScheduler. The last step goes to ab = 1 and adds no noise: x_H = f_theta(x_{H-1}).

    With last_std it does add noise, on the clean latent, and is the only action (docs/results.md says why).
    """
    scheduler.set_timesteps(H)
    t = scheduler.timesteps
    ab = scheduler.alphas_cumprod[t]
    ab_next = torch.cat([ab[1:], torch.ones(1)])
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # LCM, appendix
    std = (1 - ab_next).sqrt()
    std[-1] = last_std
    actions = torch.arange(H - 1, H) if last_std else torch.arange(H - 1)
    return on(device, t=t, ab=ab, ab_next=ab_next, std=std, c_skip=c_skip, c_out=c_out, actions=actions)


def ddpo_schedule(scheduler, H, device):
    """Of a DDIMScheduler with eta = 1."""
    scheduler.set_timesteps(H)
    t = scheduler.timesteps
    t_next = torch.cat([t[1:], torch.tensor([-1])])
    ab, ab_next = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t_next.clamp(min=0)]
    ab_next = torch.where(t_next >= 0, ab_next, scheduler.final_alpha_cumprod)
    std = eta_one(ab, ab_next)
    actions = (std > 0).nonzero().flatten()  # a step without noise is none
    return on(device, t=t, ab=ab, ab_next=ab_next, std=std, actions=actions)


def score_schedule(scheduler, H, device):
    """Real times, from the model's log alpha-bar made linear between its timesteps.

    The forward SDE dX = -1/2 beta X dt + sqrt(beta) dB has ab(t) = exp(-integral of beta up to t). Steps are
    even in the cube root of that integral: small near the data, where the last noise stays in the picture.
    """
    integral = -scheduler.alphas_cumprod.double().log()  # at t = 0 .. 999
    root = torch.linspace(1, 0, H + 1).double()
    grid = integral[0] + (integral[-1] - integral[0]) * root**3
    t = torch.from_numpy(np.interp(grid[:-1], integral, np.arange(len(integral)))).float()
    ab, ab_next = (-grid).exp().unfold(0, 2, 1).T
    std = eta_one(ab, ab_next).float()
    return on(device, t=t, ab=ab.float(), ab_next=ab_next.float(), std=std, actions=torch.arange(H))


METHODS = {
    "rlcm": (rlcm_schedule, rlcm_policy),
    "ddpo": (ddpo_schedule, ddpo_policy),
    "score": (score_schedule, score_policy),
}


# ---- log-prob and KL of one step
def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2 I) averaged over D: (B, C, h, w) twice, (B, 1, 1, 1) -> (B,).

    The average, not the sum, as in DDPO's and RLCM's code: it makes log-ratios D times smaller, which is why
    the clip range is as small as 1e-4. A step with std = 0 has no density: 0 stands there, without gradient.
    """
    noisy = std > 0
    std = torch.where(noisy, std, 1.0)
    log_p = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * np.log(2 * np.pi)
    return torch.where(noisy, log_p, 0.0).mean((1, 2, 3))


def gaussian_kl(mean, mean_pre, std):
    """KL( N(mean, std^2 I) || N(mean_pre, std^2 I) ), nats, summed over D: -> (B,); 0 where std = 0.

    For `score`, in small steps, it is Girsanov's 1/2 beta dt |s_theta - s_pre|^2 (SaA, section 3).
    """
    noisy = std > 0
    kl = (mean - mean_pre) ** 2 / (2 * torch.where(noisy, std, 1.0) ** 2)
    return torch.where(noisy, kl, 0.0).sum((1, 2, 3))


# ---- rollout
@torch.no_grad()
def rollout(policy, eps, s, c, z):
    """Sample B trajectories. c (B, L, E); z (H+1, B, C, h, w) standard normal: x_0, then each step's noise.

    -> x (H+1, B, C, h, w), mean (H, B, C, h, w), log_p (H, B).
    """
    H, B = len(s.std), len(c)
    assert z.shape[:2] == (H + 1, B), f"z {tuple(z.shape)} does not fit {H} steps of {B} pictures"
    x, mean, log_p = [z[0]], [], []
    for k in range(H):
        mean_k, std = policy(eps, x[k], torch.full((B,), k, device=z.device), c, s)
        x.append(mean_k + std * z[k + 1])  # x_{k+1} ~ N(mean_k, std_k^2 I)
        mean.append(mean_k)
        log_p.append(log_prob(x[k + 1], mean_k, std))
    return torch.stack(x), torch.stack(mean), torch.stack(log_p)


@torch.no_grad()
def path_kl(policy, eps_pre, s, c, x, mean):
    """KL_k of a rollout's steps: x (H+1, B, C, h, w), mean (H, B, C, h, w) -> mean_pre like mean, kl (H, B).

    The sum bounds the KL of the final latents where all steps have noise and are actions: `score`, and `ddpo`
    with SD's scheduler.
    """
    mean_pre, kl = torch.zeros_like(mean), torch.zeros_like(mean[:, :, 0, 0, 0])
    for k in s.actions.tolist():
        mean_pre[k], std = policy(eps_pre, x[k], torch.full((len(c),), k, device=x.device), c, s)
        kl[k] = gaussian_kl(mean[k], mean_pre[k], std)
    return mean_pre, kl


# ---- advantages
def predicted(method, x, mean, ab, ab_next):
    """The clean latents that the network saw in x when it gave that mean, all (B, C, h, w)."""
    if method == "rlcm":
        return mean / ab_next.sqrt()  # f_theta
    rho = ab / ab_next
    a = (mean * rho.sqrt() - x) / (1 - rho)  # the score, from the mean of score_policy, which is ddpo's too
    return (x + (1 - ab) * a) / ab.sqrt()  # Tweedie's formula


def advantages(R, prompts, history, size, min_count, clip, guess=None):
    """Rewards standardised by prompt (DDPO and RLCM, appendices): R (B,), B strings -> A (B,).

    `history`, prompt -> list of its last `size` rewards, is updated in place. A prompt with fewer than
    min_count of them is standardised by the mean and std of this batch. With guess (B, H), rewards of the
    pictures predicted at each x_k, A is (B, H): less a value V(x_k) as in SaA, the line that fits best.
    """
    assert R.shape == (len(prompts),)
    R = R.double()  # integer rewards must not truncate
    for prompt, value in zip(prompts, R.tolist()):
        history[prompt] = (history.get(prompt, []) + [value])[-size:]
    mean, std = torch.empty_like(R), torch.empty_like(R)
    for i, prompt in enumerate(prompts):
        enough = len(history[prompt]) >= min(min_count, size)
        seen = torch.tensor(history[prompt], dtype=torch.double) if enough else R
        mean[i], std[i] = seen.mean(), seen.std(correction=0) + 1e-6
    A = (R - mean) / std
    if guess is not None:  # V(x_k) = a_k + b_k guess_k, by least squares over the batch
        A, V = (A - A.mean())[:, None], (guess - mean[:, None]) / std[:, None]
        V = V - V.mean(0)
        A = A - V * (A * V).sum(0) / (V**2).sum(0).clamp(min=1e-6)  # (B, H)
    return A.clamp(-clip, clip).float()


# ---- loss and update
def policy_loss(log_p, log_p_old, A, algo="ppo", clip_range=1e-4):
    """Loss and ratio of each action: (n,), (n,), (n,) -> (n,), (n,).

    With one optimizer step for a rollout the ratio is 1, the clip is inert, and both have the same gradient.
    """
    ratio = (log_p - log_p_old).exp()
    if algo == "reinforce":
        return -A * log_p, ratio  # gradient -A grad log pi(a_k | s_k) (DDPO_SF in DDPO)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(A * ratio, A * clipped), ratio  # PPO, eq. 7


def update(
    policy, eps, s, c, x, log_p_old, A, optimizer, micro_batch, algo="ppo", clip_range=1e-4, updates=1,
    max_grad_norm=1.0, mean_pre=None, kl_weight=0.0,
    backward=torch.Tensor.backward, clip_grad_norm=torch.nn.utils.clip_grad_norm_,
):  # fmt: skip
    """One pass over a rollout, in `updates` optimizer steps on a share of the pictures each -> metrics.

    x (H+1, B, C, h, w) and log_p_old (H, B) from `rollout`; c (B, L, E); A (B,) or (H, B). With mean_pre from
    `path_kl` the KL is charged; kl_weight is lambda, in units of A for each nat.
    All actions of an optimizer step are one batch, cut into micro-batches of the rollout's size: passes of
    another shape round differently, and the ratio would not be exactly 1 before the first step.
    """
    H, B = log_p_old.shape
    D, n, A = x[0, 0].numel(), B // updates, A.expand(H, B)
    assert x.shape[:2] == (H + 1, B) and len(c) == B and n * updates == B
    rows, drift, norms = [], [], []
    for u in range(updates):
        all_k = s.actions.repeat_interleave(n)  # step and picture of each action
        all_b = torch.arange(u * n, (u + 1) * n, device=x.device).repeat(len(s.actions))
        for k, b in zip(all_k.split(micro_batch), all_b.split(micro_batch)):
            mean, std = policy(eps, x[k, b], k, c[b], s)
            log_p = log_prob(x[k + 1, b], mean, std)
            loss, ratio = policy_loss(log_p, log_p_old[k, b], A[k, b], algo, clip_range)
            if mean_pre is not None:  # lambda grad KL_k, over D as the log-prob is
                loss = loss + kl_weight * gaussian_kl(mean, mean_pre[k, b], std) / D
            backward(loss.sum() / len(all_k))
            if u == 0:  # nothing has moved yet: any difference is rounding
                drift.append((ratio.detach() - 1).abs().max())
            outside = ((ratio - 1).abs() > clip_range).float()
            rows.append(torch.stack([loss, (log_p - log_p_old[k, b]) ** 2 / 2, outside]).detach())
        norms.append(clip_grad_norm(optimizer.param_groups[0]["params"], max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
    names = "loss", "approx_kl", "clip_fraction", "ratio_drift", "grad_norm"
    values = *torch.cat(rows, 1).mean(1), torch.stack(drift).max(), torch.stack(norms).mean()
    return {name: value.item() for name, value in zip(names, values)}


# ================================================= TRAINING =================================================
def train(cfg, resume=False, stop=()):
    """Fine-tune as `cfg` says, or until the epoch in which `stop` becomes true -> folder. Raises BadInput."""
    run = start(cfg, resume)
    s, accelerator = run.s, run.accelerator
    with run.bar:
        for epoch in run.epochs:
            # 1. prompts and noise: functions of seed and epoch, so that a resumed run repeats them
            g = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
            index = torch.randint(len(run.prompts), (cfg.batch_size,), generator=g)
            z = torch.randn(len(s.std) + 1, cfg.batch_size, *run.model.shape, generator=g)
            prompts = [run.prompts[i] for i in index]

            # 2. trajectories x_0 .. x_H, the rewards of their pictures, their KL to the pretrained model
            roll = collect(run, prompts[run.mine], index[run.mine], z[:, run.mine])

            # 3. advantages: rewards standardised by prompt over all processes, less V and lambda KL to come
            halt = torch.full_like(roll.kl[0], bool(stop))
            gathered = accelerator.gather((roll.scores, roll.kl.sum(0), roll.guess, halt))
            scores, kl, guess, halt = (v.cpu() for v in gathered)
            R = scores[..., : len(run.reward_fn.names)].sum(2)  # (B, 1 or 2)
            R = (R[:, 0] - R[:, 1]) / 2 if cfg.last_noise else R[:, 0]  # better than its mirror image?
            settings = cfg.buffer_size, cfg.min_count, cfg.adv_clip
            A = advantages(R, prompts, run.history, *settings, guess if cfg.value else None)
            to_come = roll.kl.sum(0) - roll.kl.cumsum(0)  # (H, B), not KL_k: it was fixed before the action
            to_come = to_come - accelerator.reduce(to_come.mean(1, keepdim=True), "mean")
            A = A.view(len(A), -1)[run.mine].T.to(run.device) - cfg.kl * to_come  # (H, B)

            # 4. policy gradient
            log = update(
                run.policy, run.model.eps, s, roll.c, roll.x, roll.log_p, A, run.optimizer, run.micro_batch,
                cfg.algo, cfg.clip_range, cfg.updates, cfg.max_grad_norm, roll.mean_pre, cfg.kl,
                backward=accelerator.backward, clip_grad_norm=accelerator.clip_grad_norm_,
            )  # fmt: skip

            # 5. metrics; from time to time pictures, the LoRA and a checkpoint
            over = record(run, epoch, scores, kl, log | {"diversity": roll.diversity}, bool(halt.any()))
            if accelerator.gather(torch.tensor([over], device=run.device)).any():
                break
    return finish(run)


@torch.no_grad()
def collect(run, prompts, index, z):
    """One process's n trajectories, in micro-batches, a namespace: c (n, L, E), x (H+1, n, C, h, w), mean and
    mean_pre (H, n, C, h, w; None without KL), log_p and kl (H, n), scores (n, 1, parts + 4) of rewards.judge,
    guess (n, H), diversity. With last_noise scores are (n, 2, ...): also of what the mirrored noise makes."""
    c, z = run.embedding[index].to(run.device), z.to(run.device)
    batches = [slice(i, i + run.micro_batch) for i in range(0, len(prompts), run.micro_batch)]
    parts, scores, small = [], [], []
    for b in batches:
        x, mean, log_p = rollout(run.policy, run.model.eps, run.s, c[b], z[:, b])
        parts.append((x, mean, log_p))
        ends = (x[-1], 2 * mean[-1] - x[-1]) if run.cfg.last_noise else (x[-1],)
        images = [decode(run.model.pipe, end) for end in ends]
        scores.append([run.scorer.submit(rewards.judge, run.reward_fn, i, prompts[b]) for i in images])
        small.append(F.adaptive_avg_pool2d(images[0], 32))
        if run.device.type == "cpu":  # on a GPU pictures are scored while the next are sampled
            wait(scores[-1])
    x, mean, log_p = (torch.cat(part, 1) for part in zip(*parts))
    mean_pre, kl = None, torch.zeros_like(log_p)
    if run.cfg.kl:
        with pretrained(run.model) as eps_pre:
            parts = [path_kl(run.policy, eps_pre, run.s, c[b], x[:, b], mean[:, b]) for b in batches]
        mean_pre, kl = (torch.cat(part, 1) for part in zip(*parts))
    scores = torch.cat([torch.stack([score.result() for score in pair], 1) for pair in scores])
    guess = torch.zeros_like(log_p)
    for k in run.s.actions.tolist() if run.cfg.value else []:
        clean = predicted(run.cfg.method, x[k], mean[k], run.s.ab[k], run.s.ab_next[k])
        guess[k] = torch.cat([run.reward_fn(decode(run.model.pipe, clean[b]), prompts[b]) for b in batches])
    return SimpleNamespace(
        c=c, x=x, mean=mean, mean_pre=mean_pre, log_p=log_p, kl=kl, scores=scores.to(run.device),
        guess=guess.T, diversity=rewards.diversity(torch.cat(small), prompts),
    )  # fmt: skip


# =============================================== CONFIGURATION ==============================================
def knob(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    """All that a run depends on; the command line is made of it. Values: tiny's for rlcm; others: PRESETS."""

    reward: str = knob("compress", rewards.HELP)
    method: Literal["rlcm", "ddpo", "score"] = knob("rlcm", "consistency model, diffusion model, reverse SDE")
    algo: Literal["ppo", "reinforce"] = knob("ppo", "clipped ratio, or plain score function")
    model: str = knob("tiny", "tiny, folder or hub id of a diffusers pipeline; default on a GPU: the papers'")
    lcm_lora: Optional[str] = knob(None, "LCM-LoRA that makes an SD-1.x --model a consistency model")
    paper: bool = knob(False, "the papers' settings for this method and reward, their GPUs' batches as one")
    prompts: str = knob("animals", f"{', '.join(PROMPTS)}, a text file of prompts, or a quoted prompt")
    pixels: int = knob(64, "height and width of the pictures")
    steps: int = knob(4, "H, evaluations of the network for one picture, 1 to 50")
    last_noise: float = knob(0.3, "std of the noise on the clean latent, the only action then; 0: none")
    epochs: int = knob(60, "rollouts of the run, at most")
    min_likeness: float = knob(0.91, "end when the sample grid is less like epoch 0's than this; 0: do not")
    batch_size: int = knob(64, "B, pictures of an epoch")
    micro_batch: int = knob(32, "pictures of one pass; changes memory, and results only by rounding")
    updates: int = knob(1, "optimizer steps of an epoch, each on its share of the pictures")
    lr: float = knob(1.2e-3, "learning rate of Adam")
    value: bool = knob(False, "V(x_k): the reward of the picture predicted at each step, one more decode")
    kl: float = knob(0.0, "lambda: charge for a nat of KL to the pretrained model, in stds of the reward")
    guidance: float = knob(6.0, "guidance scale, in training as in sampling")
    lora_rank: int = knob(16, "rank of the adapter; 0: train all weights of the network")
    lora_alpha: int = knob(16, "alpha of the adapter")
    clip_range: float = knob(1e-4, "PPO's epsilon; small, because the log-prob is an average over D")
    adv_clip: float = knob(10.0, "advantages are clipped to +- this")
    buffer_size: int = knob(8, "rewards remembered for each prompt")
    min_count: int = knob(4, "with fewer of them, the batch's mean and std serve")
    max_grad_norm: float = knob(5.0, "the gradient is clipped to this norm")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = knob("fp32", "of the network; on a GPU: bf16")
    compile: bool = knob(False, "torch.compile the network: minutes at the start, then faster on a GPU")
    low_memory: bool = knob(False, "one picture a pass, gradient checkpointing: same gradient")
    log_with: Optional[Literal["wandb", "tensorboard"]] = knob(None, "also log metrics and pictures there")
    seed: int = knob(0, "of adapter, prompts and noise")
    save_every: int = knob(2, "epochs between pictures, LoRAs and checkpoints")
    eval_prompts: Optional[str] = knob(None, "held-out prompts: 64 are drawn at each save, see best/")
    out: Optional[str] = knob(None, "folder of the run, default runs/METHOD-REWARD-SEED-TIME")


HERE = Path(__file__).resolve().parent
TINY = {"rlcm": "tiny/lcm", "ddpo": "tiny/sd", "score": "tiny/sd"}
REAL = {"rlcm": "SimianLuo/LCM_Dreamshaper_v7", "ddpo": "Lykon/dreamshaper-7", "score": "Lykon/dreamshaper-7"}
BOTH = dict(buffer_size=16, min_count=16, micro_batch=2, last_noise=0.0, pixels=512, save_every=50)
BOTH |= dict(min_likeness=0.0)
RLCM = BOTH | dict(epochs=1000, batch_size=16, lr=1e-4, guidance=8.0, lora_rank=16, lora_alpha=32, kl=4e-4)
DDPO = BOTH | dict(steps=50, epochs=100, batch_size=256, updates=4, lr=3e-4, guidance=5.0)
RANK_4 = dict(lora_rank=4, lora_alpha=4)  # that of ddpo-pytorch
DDPO |= RANK_4 | dict(adv_clip=5.0, max_grad_norm=1.0)
TINY_SD = RANK_4 | dict(last_noise=0.0, guidance=3.0, min_likeness=0.9)
PRESETS = {  # (model, method): what differs from Config; real: the official codes', but steps and kl
    ("tiny", "rlcm"): {},
    ("tiny", "ddpo"): TINY_SD | dict(steps=5, lr=3e-3),
    ("tiny", "score"): TINY_SD | dict(steps=6, lr=5e-3, value=True),
    ("real", "rlcm"): RLCM,
    ("real", "ddpo"): DDPO,
    ("real", "score"): DDPO | dict(kl=4e-4),
}
IMAGENET, ACTIVITIES = dict(prompts="imagenet-animals"), dict(prompts="animals-activities")
PAPER = {  # --paper: (method, reward): what differs from the real preset
    # RLCM, appendix (align's lr too: its YAML has 4e-4); the batches of its 4 GPUs (align: 3) as one
    ("rlcm", "compress"): IMAGENET | dict(steps=8, kl=0.0),
    ("rlcm", "incompress"): IMAGENET | dict(steps=8, kl=0.0),
    ("rlcm", "aesthetic"): dict(steps=8, batch_size=32, lora_rank=8, lora_alpha=8, buffer_size=32, kl=0.0),
    ("rlcm", "align"): ACTIVITIES | dict(steps=16, epochs=708, batch_size=120, buffer_size=32, kl=0.0),
    # ddpo-pytorch, config/dgx.py, which RLCM compares with; DDPO's own table is full fine-tuning at 1e-5
    ("ddpo", "compress"): IMAGENET,
    ("ddpo", "incompress"): IMAGENET,
    ("ddpo", "aesthetic"): dict(epochs=200, updates=2, buffer_size=32),
    ("ddpo", "align"): ACTIVITIES | dict(epochs=200, batch_size=288, updates=2, buffer_size=32),
}


def configure(**given):
    """A Config: the preset of the method and the model, under the settings given. Raises BadInput."""
    cfg, cuda = Config(**given), torch.cuda.is_available()
    if "model" not in given:
        model, found = (REAL["ddpo" if cfg.lcm_lora else cfg.method], "a") if cuda else ("tiny", "no")
        say(f"model: {model} ({found} CUDA GPU is here; --model chooses)")
        given = given | {"model": model}
    task = cfg.method, cfg.reward.removesuffix("_13b")
    if cfg.paper and task not in PAPER:
        known = ", ".join(" ".join(key) for key in PAPER)
        none = "no published settings" + " but for ImageReward" * (cfg.method == "score")
        raise BadInput(f"--paper: {none} for {' '.join(task)}: choose from {known}")
    kind = "tiny" if given["model"] == "tiny" and not cfg.paper else "real"
    preset = PRESETS[kind, cfg.method] | (PAPER[task] if cfg.paper else {})
    preset |= {"precision": "bf16" if cuda else "fp32"}
    if kind == "real" and cuda:  # 1.07 GiB a row of SD-1.5 in bf16 at 512 px; 6 for the rest
        rows = 2 if cfg.method != "rlcm" or cfg.lcm_lora else 1
        rows *= 1 if given.get("precision", "bf16") in ("bf16", "fp16") else 2
        each = 1.07 * (given.get("pixels", 512) / 512) ** 2 * rows
        fit = (torch.cuda.get_device_properties(0).total_memory / 2**30 - 6) / each
        preset["micro_batch"] = 2 ** int(np.log2(np.clip(fit, 1, 16)))
    preset |= {"micro_batch": 1} if cfg.low_memory else {}
    preset |= {"guidance": 1.5} if cfg.lcm_lora else {}
    return Config(**(preset | given))


def check(cfg):
    """Raises BadInput for settings that cannot work."""
    gpu = torch.cuda.is_available()
    for wrong, message in (
        (not 1 <= cfg.steps <= 50, f"--steps {cfg.steps}: between 1 and 50"),
        (cfg.last_noise and cfg.method != "rlcm", "--last-noise goes with --method rlcm"),
        (cfg.last_noise and cfg.value, "--value goes with --last-noise 0: the mirror image is a baseline"),
        (cfg.lcm_lora and cfg.method != "rlcm", "--lcm-lora makes a consistency model: for --method rlcm"),
        (cfg.algo == "reinforce" and cfg.updates > 1, "--algo reinforce has no ratio: --updates must be 1"),
        (cfg.log_with and not find_spec(cfg.log_with), f"--log-with: first pip install {cfg.log_with}"),
        (cfg.precision == "fp16" and not gpu, "--precision fp16 needs a GPU: take bf16 or fp32"),
        (cfg.seed >= 2**40, "--seed: below 2**40"),
    ):
        if wrong:
            raise BadInput(message)
    for name, value in vars(cfg).items():
        zero = " or zero" * (name in ("kl", "last_noise", "guidance", "seed", "lora_rank", "min_likeness"))
        if type(value) in (int, float) and not (0 < value < float("inf") or zero and value == 0):
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a positive number{zero}")


def say(line):
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


# =================================================== MODEL ==================================================
def load_model(cfg, accelerator=None):
    """The pipeline of cfg, ready to train and to draw -> a namespace. Raises BadInput.

    pipe (of diffusers, with the adapter in its unet), trained (weights by name, float32), eps, reference (the
    pretrained eps, where there is no adapter to switch off), shape (C, h, w).
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.precision == "tf32"
    torch.backends.cuda.enable_cudnn_sdp(False)  # may serve the rollout and not the update
    prepare = accelerator.prepare_model if accelerator else lambda network, **options: network
    pipe, reference = load_pipeline(cfg), None
    pipe.to(accelerator.device if accelerator else "cuda" if torch.cuda.is_available() else "cpu")
    unet = pipe.unet.requires_grad_(not cfg.lora_rank)
    if cfg.lora_rank:
        layers = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as in both official codes
        lora = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=layers)
        lora.init_lora_weights = "gaussian"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            unet.add_adapter(lora)
    cast_training_params(unet, torch.float32)  # what is trained is float32 whatever the network is
    if cfg.kl and not cfg.lora_rank:
        frozen = copy.deepcopy(unet).requires_grad_(False)
        reference = noise_predictor(pipe, prepare(frozen, evaluation_mode=True), cfg.guidance)
    if cfg.low_memory:
        unet.enable_gradient_checkpointing()
    if cfg.compile:
        unet.compile()
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    side = cfg.pixels // pipe.vae_scale_factor
    shape = unet.config.in_channels, side, side
    eps = noise_predictor(pipe, prepare(unet), cfg.guidance)
    return SimpleNamespace(pipe=pipe, trained=trained, eps=eps, reference=reference, shape=shape)


PIPELINES = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"


def load_pipeline(cfg):
    """diffusers' pipeline with the scheduler of the method. Raises BadInput."""
    import diffusers

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.precision, torch.float32)
    source = str(HERE / TINY[cfg.method]) if cfg.model == "tiny" else cfg.model
    try:
        kind = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
        if kind in PIPELINES:
            options = {} if "XL" in kind else dict(safety_checker=None, requires_safety_checker=False)
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, **options)
            if cfg.lcm_lora:
                source, config = cfg.lcm_lora, pipe.scheduler.config
                pipe.scheduler = diffusers.LCMScheduler.from_config(config)
                pipe.load_lora_weights(source)
                pipe.fuse_lora()
                pipe.unload_lora_weights()
    except Exception as e:
        advice = "give a folder or hub id of a diffusers pipeline, or --model tiny, which needs no download"
        raise BadInput(f"cannot load the model {source} ({one_line(e)}): {advice}") from e
    if kind not in PIPELINES:
        raise BadInput(f"{source} is a {kind}; supported are {', '.join(PIPELINES)}")
    if cfg.method != "rlcm":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    found, predicts = type(pipe.scheduler).__name__, pipe.scheduler.config.prediction_type
    if cfg.method == "rlcm" and found != "LCMScheduler":
        raise BadInput(f"{source} has a {found}: rlcm needs a consistency model with an LCMScheduler")
    if predicts not in ("epsilon", "v_prediction") or (predicts, cfg.method) == ("v_prediction", "score"):
        raise BadInput(f"{source} predicts {predicts!r}: {cfg.method} needs epsilon (rlcm, ddpo: or v)")
    if pipe.scheduler.alphas_cumprod[-1] == 0:
        raise BadInput(f"{source} has no signal at all at its last timestep (zero SNR): not supported")
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if cfg.pixels % unit:
        raise BadInput(f"--pixels {cfg.pixels}: {source} draws multiples of {unit}")
    if "XL" in kind and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()  # as the pipeline itself does
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def noise_predictor(pipe, network, guidance):
    """eps(x, t, c) of a network, guided as its pipeline guides; float32."""
    dtype, dim = pipe.text_encoder.dtype, pipe.unet.config.time_cond_proj_dim
    if dim:  # an LCM takes the guidance scale, less one, as an input (LCM, section 4.2)
        w = pipe.get_guidance_scale_embedding(torch.tensor([guidance - 1.0]), dim).to(pipe.device, dtype)
    alpha_bar = pipe.scheduler.alphas_cumprod.to(pipe.device)

    def eps(x, t, c):
        condition = {"timestep_cond": w.expand(len(x), -1)} if dim else {}
        if pipe.unet.config.addition_embed_type == "text_time":  # SDXL: see `encode`
            size = [v * pipe.vae_scale_factor for v in x.shape[2:]]
            size = torch.tensor([*size, 0, 0, *size], device=x.device, dtype=dtype).expand(len(x), 6)
            pooled = c[:, -1, : pipe.text_encoder_2.config.projection_dim]
            c, condition["added_cond_kwargs"] = c[:, :-1], {"text_embeds": pooled, "time_ids": size}
        out = network(x.to(dtype), t, encoder_hidden_states=c, **condition).sample.float()
        if pipe.scheduler.config.prediction_type == "epsilon":
            return out
        ab = at(alpha_bar, t)
        return ab.sqrt() * out + (1 - ab).sqrt() * x  # v -> eps (Progressive Distillation, appendix D)

    def guided(x, t, c):  # classifier-free guidance, both halves in one pass
        both = torch.cat([nothing.expand_as(c), c])
        e_0, e_c = eps(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return e_0 + guidance * (e_c - e_0)

    if dim or guidance <= 1:
        return eps
    zeros = getattr(pipe.config, "force_zeros_for_empty_prompt", False)  # SDXL's way
    nothing = encode(pipe, [""]).to(pipe.device) * (0 if zeros else 1)
    return guided


@contextmanager
def pretrained(model):
    """eps of the pretrained model for a block: the network with its adapter off, or a copy of all weights."""
    if not model.reference:
        model.pipe.unet.disable_adapters()
    try:
        yield model.reference or model.eps
    finally:
        if not model.reference:
            model.pipe.unet.enable_adapters()


@torch.no_grad()
def encode(pipe, prompts):
    """B strings -> (B, L, E) on the CPU. Of SDXL, the last of L is the pooled embedding and zeros."""
    parts = []
    for i in range(0, len(prompts), 64):
        options = dict(device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        c, _, *pooled = pipe.encode_prompt(prompt=prompts[i : i + 64], **options)
        if pooled:
            row = F.pad(pooled[0], (0, c.shape[2] - pooled[0].shape[1]))
            c = torch.cat([c, row[:, None]], 1)
        parts.append(c.cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(pipe, x):
    """Clean latents (B, C, h, w) -> pictures (B, 3, H, W) float32 in [0, 1]."""
    x = (x / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    return (pipe.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)


# ================================================= PICTURES =================================================
def draw(model, cfg, prompts, steps=None):
    """Pictures (B, 3, H, W) of prompts; the noise of picture i is that of torch.Generator().manual_seed(i).

    It is drawn in diffusers' order: in float32 a plain pipeline with the same generators draws the same.
    """
    from diffusers.utils.torch_utils import randn_tensor

    schedule, policy = METHODS[cfg.method]
    device, c = model.pipe.device, encode(model.pipe, prompts)
    s = schedule(model.pipe.scheduler, steps or cfg.steps, device)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    z = torch.stack([randn_tensor((len(prompts), *model.shape), generators) for _ in range(len(s.std) + 1)])
    images = []
    for i in range(0, len(prompts), cfg.micro_batch):
        b = slice(i, i + cfg.micro_batch)
        x, _, _ = rollout(policy, model.eps, s, c[b].to(device), z[:, b].to(device))
        images.append(decode(model.pipe, x[-1]))
    return torch.cat(images)


def likeness(images, first):
    """Mean correlation of pictures with their first versions: 1 unchanged, 0 unrelated or blank."""
    a, b = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (images, first))
    correlation = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)
    return float((correlation * (a.std(1) > 0.02)).mean())


def sample_grid(images, captions, path, title="", columns=8):
    """Write pictures (B, 3, H, W) in rows of so many, captions (B strings) below them."""
    tile, line, font = max(128, images.shape[-1] // 2), 18, ImageFont.load_default(13)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * tile, line + rows * (tile + line)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 1), title, "black", font)
    for i, (picture, caption) in enumerate(zip(pictures(images), captions)):
        x, y = i % columns * tile, line + i // columns * (tile + line)
        sheet.paste(picture.resize((tile, tile), Image.LANCZOS), (x, y))
        pen.rectangle((x, y + tile, x + tile, y + tile + line), "white")  # over the last caption, if too long
        pen.text((x + 4, y + tile + 1), caption, "black", font)
    sheet.save(path)


def reward_curve(rows, path, label):
    """Write the curve of the mean reward, in a band of one std of the epoch's pictures."""
    from matplotlib.figure import Figure  # needs no backend

    epoch, mean, std = np.array([[row[v] for v in ("epoch", "reward_mean", "reward_std")] for row in rows]).T
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    axis.plot(epoch, mean)
    axis.fill_between(epoch, mean - std, mean + std, alpha=0.2)
    axis.set(xlabel="epoch", ylabel=label)
    figure.savefig(path)


# ==================================================== RUN ===================================================
def start(cfg, resume=False):
    """What the training loop needs, a namespace. Nothing is written before it works. Raises BadInput."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    check(cfg)
    reward_fn, prompts = get_reward(cfg.reward, cfg.model), get_prompts(cfg.prompts)
    held_out = get_prompts(cfg.eval_prompts)[:64] if cfg.eval_prompts else []
    name = f"{cfg.method}-{cfg.reward.split('/')[-1].replace(':', '-')}-{cfg.seed}"
    out = Path(cfg.out or f"runs/{name}-{time.strftime('%m%d-%H%M%S')}")
    if not resume and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise BadInput(f"{out} exists and is not an empty folder: give another --out")
    state = load_checkpoint(out) if resume else {"history": {}, "rows": []}
    rows, done = state["rows"], len(state["rows"])
    if done >= cfg.epochs:
        raise BadInput(f"{out} already has {done} epochs: give more --epochs to go on")
    precision = cfg.precision if cfg.precision in ("bf16", "fp16") else "no"
    options = dict(mixed_precision=precision, log_with=cfg.log_with, project_dir=out)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # while one process draws the grid
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience], **options)
    P, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if cfg.batch_size % (P * cfg.updates):
        raise BadInput(f"--batch-size {cfg.batch_size} does not divide into {P} processes x --updates")
    n = cfg.batch_size // P
    model = load_model(cfg, accelerator)
    schedule, policy = METHODS[cfg.method]
    options = {"last_std": cfg.last_noise} if cfg.last_noise else {}
    s = schedule(model.pipe.scheduler, cfg.steps, device, **options)
    if not len(s.actions):
        raise BadInput(f"--method {cfg.method} --steps {cfg.steps} draws without noise: nothing to reinforce")
    optimizer = accelerator.prepare_optimizer(torch.optim.Adam(model.trained.values(), cfg.lr))
    run = SimpleNamespace(
        cfg=cfg, out=out, accelerator=accelerator, device=device, model=model, optimizer=optimizer,
        policy=policy, s=s, prompts=prompts, shown=(prompts * 16)[:16], embedding=encode(model.pipe, prompts),
        held_out=held_out, warned=False, reward_fn=reward_fn, scorer=ThreadPoolExecutor(1),
        mine=slice(n * rank, n * rank + n),  # of the batch
        micro_batch=max(m for m in range(1, cfg.micro_batch + 1) if n // cfg.updates % m == 0),  # all full
        history=state["history"], rows=rows, saved={"optimizer": optimizer}, began=time.time(),
    )  # fmt: skip
    if accelerator.scaler:
        run.saved["scaler"] = accelerator.scaler
    if accelerator.is_main_process:
        run.first = draw(model, cfg, run.shown)
        save_pictures(run, 0, run.first)
        if not done:
            save_checkpoint(run)
        save_config(run)
    accelerator.init_trackers("rlcm", {name: str(value) for name, value in asdict(cfg).items()})
    if done:
        model.pipe.unet.load_state_dict(state["trained"], strict=False)
        for name, part in run.saved.items():
            part.load_state_dict(state[name])
        run.began -= rows[-1]["seconds"]
    run.epochs, bar = range(done + 1, cfg.epochs + 1), dict(initial=done, total=cfg.epochs, unit="epoch")
    run.bar = tqdm(**bar, disable=not accelerator.is_main_process, dynamic_ncols=True)
    return run


def record(run, epoch, scores, kl, log, halt):
    """A row of metrics.csv; pictures, LoRA, checkpoint when due -> is the run over? Raises BadInput.

    scores (B, 1 or 2, parts + 4) and kl (B,) of all processes, log of this one; halt: end the run here.
    """
    cfg, accelerator, scaler = run.cfg, run.accelerator, run.accelerator.scaler
    mean = accelerator.reduce(torch.tensor(list(log.values()), device=run.device), "mean").tolist()
    log = dict(zip(log, mean))
    if not np.isfinite(log["grad_norm"]) and not (scaler and scaler.get_scale() >= 1):  # fp16 skips the step
        advice = "the last checkpoint is untouched; start anew with a smaller --lr or --precision fp32"
        raise BadInput(f"the gradient of epoch {epoch} is not finite: {advice}")
    names = run.reward_fn.names
    r = scores[..., : len(names)].sum(2)  # (B, 1 or 2)
    row = {
        "epoch": epoch,
        "seconds": round(time.time() - run.began, 3),  # since the start
        "reward_queries": epoch * (r.numel() + cfg.value * len(kl) * len(run.s.actions)),  # pictures scored
        "reward_mean": r.mean().item(),  # of the epoch's pictures, with last_noise, before the KL is charged
        "reward_std": r.std(correction=0).item(),
        "reward_min": r.min().item(),
        "reward_max": r.max().item(),
        "path_kl": kl.mean().item(),  # nats, sum over a picture's steps
        **log,  # of `update`; ratio_drift: largest |ratio - 1| before the first optimizer step, 0 in fp32
        **dict(zip([*names, *rewards.LOOKS], scores.mean((0, 1)).tolist())),  # parts of the reward, alarms
        "likeness": "",  # of the sample grid to epoch 0's
        "held_out": "",  # mean reward of pictures of --eval-prompts
    }
    run.rows.append(row)
    if not accelerator.is_main_process:
        return halt
    run.bar.set_postfix(reward=f"{row['reward_mean']:.3f}", start=f"{run.rows[0]['reward_mean']:.3f}")
    run.bar.update()
    alarm = rewards.moved_far(row, run.rows[0])
    if alarm and not run.warned:
        run.bar.write(f"warning, epoch {epoch}: {alarm}; look at {run.out}/samples")
    run.warned = run.warned or bool(alarm)
    due = epoch % cfg.save_every == 0 or epoch == cfg.epochs or halt
    if due:
        images = draw(run.model, cfg, run.shown)
        row["likeness"] = likeness(images, run.first)
        if run.held_out:
            best = max([row["held_out"] for row in run.rows if row["held_out"] != ""], default=-np.inf)
            row["held_out"] = reward_of(run, draw(run.model, cfg, run.held_out), run.held_out).mean().item()
            if row["held_out"] > best:
                save_weights(run.model.pipe, run.out / "best")
                shutil.copy(run.out / "config.json", run.out / "best")
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if cfg.log_with == "tensorboard" else {}
            tracker.log_images({"samples": images.permute(0, 2, 3, 1).cpu().numpy()}, epoch, **options)
    accelerator.log({name: value for name, value in row.items() if value != ""}, epoch)
    save_metrics(run.rows, run.out / "metrics.csv")
    if due:
        save_pictures(run, epoch, images)
        save_weights(run.model.pipe, run.out)
        reward_curve(run.rows, run.out / "reward.png", f"reward: {cfg.reward}")
        save_checkpoint(run)
    return halt or due and max(row["likeness"], 0) < cfg.min_likeness


def reward_of(run, images, prompts):
    """Rewards (B,) of pictures (B, 3, H, W), a micro-batch at a time."""
    batches = [slice(i, i + run.micro_batch) for i in range(0, len(prompts), run.micro_batch)]
    return torch.cat([run.reward_fn(images[b], prompts[b]) for b in batches])


def finish(run):
    """Say what was reached, where everything is and how to use it -> the run's folder."""
    cfg, first, last, out = run.cfg, run.rows[0], run.rows[-1], run.out
    time.sleep(0.1)  # gloo's thread needs Python's lock to drop its last tensors; ending it holds that lock
    run.accelerator.end_training()
    if not run.accelerator.is_main_process:
        return out
    reward = f"reward in training {first['reward_mean']:.3f} -> {last['reward_mean']:.3f}"
    alike = f"likeness {last['likeness']:.2f} (1 unchanged, 0 blank)"
    say(f"{reward}, {last['epoch']} epochs, {last['seconds']:.0f} s; {alike}")
    if last["epoch"] < cfg.epochs:
        far = max(last["likeness"], 0) < cfg.min_likeness
        lower = f" --min-likeness {max(last['likeness'] - 0.1, 0):.2f}" if far else ""
        why = "the pictures have moved far enough" if far else "stopped"
        say(f"{why}, before {cfg.epochs} epochs; to go on: python rlcm.py --resume {out}{lower}")
    say(f"pictures: {out}/samples, curve: {out}/reward.png")
    if cfg.lora_rank:
        size = f"height={cfg.pixels}, width={cfg.pixels}"
        say(f'the LoRA: pipe.load_lora_weights("{out}"), then pipe(..., {size})')
        say(f'to look: python rlcm.py --sample "a cat" "a dog" --load {out} --strength 0.5 1')
    else:
        say(f'the network: {out}/unet; to draw: python rlcm.py --sample "a cat" "a dog" --load {out}')
    return out


# =================================================== FILES ==================================================
@contextmanager
def aside(path, mode="w"):
    """A file to write that takes the place of `path` once it is whole and on the disk."""
    with open(f"{path}.part", mode) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.part", path)


def save_pictures(run, epoch, images):
    """The sample grid: the same prompts and noise every time, prompt and reward below each picture."""
    r = reward_of(run, images, run.shown)  # at epoch 0 it shows whether the reward works
    captions = [f"{prompt}  {value:.2f}" for prompt, value in zip(run.shown, r)]
    title = f"epoch {epoch}: reward {r.mean():.3f}, likeness to epoch 0 {likeness(images, run.first):.2f}"
    (run.out / "samples").mkdir(parents=True, exist_ok=True)
    sample_grid(images, captions, run.out / "samples" / f"epoch-{epoch:04d}.png", title)


def save_config(run):
    packages = "torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy"
    versions = {name: version(name) for name in packages}
    about = {"processes": run.accelerator.num_processes, "versions": versions}
    with aside(run.out / "config.json") as f:
        json.dump(asdict(run.cfg) | about, f, indent=1)


def read_config(out):
    """config.json of a run's folder as a Config. Raises BadInput."""
    try:
        saved = json.loads((Path(out) / "config.json").read_text())
        return Config(**{f.name: saved[f.name] for f in fields(Config)})
    except (OSError, ValueError, KeyError, TypeError) as e:
        advice = "give the folder that training printed"
        raise BadInput(f"{out} is not a run directory of this version ({one_line(e)}): {advice}") from e


def save_metrics(rows, path):
    """A list of dicts as CSV."""
    with aside(path) as f:
        csv.writer(f, lineterminator="\n").writerows([rows[0], *(row.values() for row in rows)])


def save_checkpoint(run):
    """checkpoint/state.pt: all that a resumed run needs."""
    (run.out / "checkpoint").mkdir(exist_ok=True)
    state = {name: part.state_dict() for name, part in run.saved.items()}
    whole = io.BytesIO()  # a full disk is then an OSError
    torch.save({"trained": run.model.trained, "history": run.history, "rows": run.rows, **state}, whole)
    with aside(run.out / "checkpoint" / "state.pt", "wb") as f:
        f.write(whole.getbuffer())


def load_checkpoint(out):
    """What save_checkpoint wrote. Raises BadInput."""
    try:  # tensors and plain data only
        return torch.load(out / "checkpoint" / "state.pt", map_location="cpu", weights_only=True)
    except Exception as e:
        raise BadInput(f"no readable checkpoint in {out} ({type(e).__name__}): start a new run") from e


LORA = "pytorch_lora_weights.safetensors"


def save_weights(pipe, out):
    """What was trained, as diffusers has it: pytorch_lora_weights.safetensors, alpha included, or unet/."""
    from peft.utils import get_peft_model_state_dict

    part, name = out / ".saving", LORA if hasattr(pipe.unet, "peft_config") else "unet"
    shutil.rmtree(part, ignore_errors=True)
    if name == LORA:
        lora, settings = get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"].to_dict()
        type(pipe).save_lora_weights(part, unet_lora_layers=lora, unet_lora_adapter_metadata=settings)
    else:
        pipe.unet.save_pretrained(part / name)
        shutil.rmtree(out / name, ignore_errors=True)
    os.replace(part / name, out / name)
    part.rmdir()


def load_weights(model, out):
    """Put the trained weights of a run's folder into a freshly loaded model. Raises BadInput."""
    unet = model.pipe.unet
    try:
        if (out / "unet").exists():
            unet.load_state_dict(type(unet).from_pretrained(out / "unet").state_dict())
        else:
            unet.delete_adapters("default")
            model.pipe.load_lora_weights(out, weight_name=LORA)
    except Exception as e:
        raise BadInput(f"no readable weights in {out}: {one_line(e)}") from e


# =============================================== COMMAND LINE ===============================================
def sample(cfg, prompts, run=None, strengths=(1.0,)):
    """A row of the base model's pictures and, below, one for each strength of a run's LoRA -> the path.

    Raises BadInput.
    """
    check(replace(cfg, log_with=None))
    path = Path(f"{str(cfg.out or Path(run or '.') / 'sample').removesuffix('.png')}.png")
    model = load_model(replace(cfg, kl=0.0))
    images, captions = [draw(model, cfg, prompts)], list(prompts)  # a fresh adapter changes nothing
    if run:
        captions = [f"base: {p}" for p in prompts]
        load_weights(model, Path(run))
        for strength in strengths:
            if cfg.lora_rank:
                model.pipe.set_adapters(model.pipe.get_active_adapters(), strength)
            images.append(draw(model, cfg, prompts))
            captions += [f"{'tuned' if strength == 1 else f'x {strength:g}'}: {p}" for p in prompts]
    sample_grid(torch.cat(images), captions, path, columns=len(prompts))
    say(f"wrote {path}")
    return path


def drawing_config(run, **given):
    """A run's settings for drawing, under those given. Raises BadInput where it has no weights yet."""
    cfg = replace(read_config(run), **({"out": None, "compile": False} | given))
    if not any((Path(run) / name).exists() for name in (LORA, "unet")):
        raise BadInput(f"no weights in {run} yet: a run saves them every --save-every epochs")
    return cfg if cfg.lora_rank else replace(cfg, precision="fp32")  # weights trained in full are float32


def parse(argv):
    """The command line -> the Config, and what to do with it: sample, load, resume. Raises BadInput."""
    from transformers import HfArgumentParser

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    about = __doc__.split("\n\n")[0]
    parser = HfArgumentParser(Config, allow_abbrev=False, prog="rlcm.py", description=about)
    parser.error = refuse
    parser.add_argument("--sample", nargs="+", metavar="PROMPT", help="draw these prompts, do not train")
    parser.add_argument("--load", metavar="RUN", help="with --sample: the run that draws a second row")
    parser.add_argument("--strength", nargs="+", type=float, metavar="S", help="of the LoRA; a row for each")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run; its --epochs may change")
    parser.set_defaults(**{f.name: None for f in fields(Config)})  # first, what is given and what is not
    asked = vars(parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0])
    given = {name: value for name, value in asked.items() if value is not None}
    do = {name: given.pop(name, None) for name in ("sample", "load", "strength", "resume")}
    do = SimpleNamespace(**do)
    changed = [name for name in given if name not in ("epochs", "min_likeness")]
    changed += ["sample"] * bool(do.sample)
    if do.load and not do.sample or do.strength and not do.load:
        refuse("--load goes with --sample, and --strength with --load")
    if do.resume and changed:
        refuse(f"--{changed[0].replace('_', '-')} cannot go with --resume: --epochs and --min-likeness can")
    if do.resume:
        cfg = replace(read_config(do.resume), out=do.resume, **given)
    else:
        cfg = drawing_config(do.load, **given) if do.load else configure(**given)
    if do.strength and not cfg.lora_rank:
        refuse("--strength scales a LoRA, and this run has none")
    parser.set_defaults(**vars(cfg))  # then --help shows the values that this command line would use
    unknown = parser.parse_known_args(argv)[1]
    if unknown:
        refuse(f"unknown argument {unknown[0]}")
    return cfg, do


def quiet():
    """Libraries print errors only, and show a progress bar for a download but none for loading."""
    import diffusers
    import transformers
    from huggingface_hub.utils import enable_progress_bars

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    enable_progress_bars()


def main(argv=None):
    """The program -> exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    stop, before = [], None

    def interrupt(*_):
        stop.append(True)
        os.write(2, b"\nends after this epoch and saves; Ctrl-C again ends at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        cfg, do = parse(sys.argv[1:] if argv is None else argv)
        quiet()
        if do.sample:
            sample(cfg, do.sample, do.load, do.strength or [1.0])
        else:
            before = signal.signal(signal.SIGINT, interrupt)
            train(cfg, bool(do.resume), stop)
        return 130 if stop else 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; a run goes on from its last checkpoint with --resume RUN"
    except torch.OutOfMemoryError as e:
        status, message = 2, f"out of GPU memory: try a smaller --micro-batch or --low-memory ({one_line(e)})"
    except (BadInput, OSError, SafetensorError) as e:  # the last two: a full disk, a folder not to be written
        status, message = 2, e
    finally:
        if before:
            signal.signal(signal.SIGINT, before)
    print(f"rlcm.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
