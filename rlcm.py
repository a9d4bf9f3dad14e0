"""RLCM in one file: teach a few-step text-to-image model to please any reward, by policy gradients.

    python rlcm.py --reward compress --steps 4                   # train: runs/NAME/ gets pictures, curve, LoRA
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress               # or score: the same loop, another Gaussian
    python rlcm.py --sample "a cat" "a dog" --load runs/NAME     # base row above tuned row, same noise
    python rlcm.py --resume runs/NAME                            # go on where a stopped run was last saved
    accelerate launch rlcm.py --reward compress                  # several GPUs: the batch is shared out

THE IDEA
A consistency model draws in a few steps; each one guesses the clean picture and adds noise again, ever less.
So each latent on the way is drawn from a Gaussian whose mean the network gives: its probability is known.
A reward judges the finished picture. What led to better pictures than usual for the prompt is made likelier.
A diffusion model and a reverse-time SDE do the same with another Gaussian, so one loop trains all three.

THE OBJECTIVE
A Markov decision process: state (x_k, t_k, c), action x_{k+1}, the reward r at the end. Where it is computed:

    x_{k+1} ~ N( mean_theta(x_k, t_k, c), std_k^2 I ),   k = 0 .. H-1      rlcm_policy ddpo_policy score_policy
    J(theta) = E[ r(decode(x_H), c) - lambda sum_k KL_k ]                  collect, path_kl
    KL_k     = |mean_theta - mean_pre|^2 / (2 std_k^2)                     gaussian_kl
    grad J   = E[ sum_k A grad log p(x_{k+1} | x_k, c) ]                   log_prob, policy_loss
               - lambda E[ sum_k grad KL_k ]                               update
    A        = (R - mean R) / std R by prompt,  R = r - lambda sum_k KL_k  advantages

`rollout` samples from a policy, `update` scores the samples with that very policy: the two cannot drift apart.

GLOSSARY      shape            meaning, symbol in the papers
    B, H, D                    pictures in a batch; steps (evaluations of the network); latent dimensions C*h*w
    x         (B, C, h, w)     latent before a step: x_0 ~ N(0, I) is noise, x_H is decoded
    k         (B,)             number of the step of each row of the batch
    s         (H,) each        schedule, for each step: s.t timestep (tau in RLCM; real for score), s.ab alpha-bar
                               = share of the signal in the variance of x, s.ab_next the next step's, s.std
    c         (B, L, E)        embedding of the prompt
    eps       a function       eps(x, t, c) -> (B, C, h, w): the noise that the network sees in x
    pre                        of the pretrained (base) model: the same network without its adapter
    clean     (B, C, h, w)     predicted clean latent, the papers' x_0 with a hat
    log_p     (B,)             log-prob of an action; ratio = exp(log_p - log_p_old)
    A         (B,) or (H, B)   advantage
    lambda                     weight of the KL, in reward per nat: --kl

PAPERS
    RLCM  Oertell et al. 2024, RL for Consistency Models, arXiv 2404.03673
    LCM   Luo et al. 2023, Latent Consistency Models, arXiv 2310.04378
    DDPO  Black et al. 2023, Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301
    DDIM  Song et al. 2020, Denoising Diffusion Implicit Models, arXiv 2010.02502
    SaA   Zhao et al. 2024 and 2025, Scores as Actions, arXiv 2409.08400 and 2502.01819
    PPO   Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347

DIFFERS FROM THE RLCM CODE (github.com/Owen-Oertell/rlcm)
    1. The last evaluation adds no noise and is no action. The paper has it both ways: section 4 and Fig. 2 show
       H - 1 actions, the algorithm box one more. The code noises the last latent once more, to its own level, and
       scores that noise, on which the picture does not depend.
    2. The paper writes the kernel for a variance-exploding process, mean f and variance tau^2 - eps^2. Scale x by
       sqrt(ab) and put tau^2 = (1 - ab) / ab, eps = 0, to get the kernel here and in the code.
    3. Timesteps are those of today's LCMScheduler, on which the LoRA is then sampled; there, diffusers' of 2023.
    4. States, mean, std and log-prob are float32, so that the ratio before the first step is exactly 1.
    5. A KL to the pretrained model, as in SaA. No learning-rate schedule. Prompts and noise depend on the seed.
DIFFERS FROM THE DDPO CODE (github.com/kvablack/ddpo-pytorch)
    Adam (there AdamW, decay 1e-4). Pictures and timesteps keep their order (there shuffled). A last step with
    std = 0, as of tiny/sd, has no density and is no action (there SD's scheduler makes it 0.02).
DIFFERS FROM THE SCORES AS ACTIONS CODE (github.com/hanyang1999/ContTimeRL4DM)
    Any reward and number of steps (there ImageReward, 50). Euler-Maruyama on a grid of real times (there DDIM,
    eta = 1). Advantage: return to go minus a value that does not see the prompt (there V(t_{k+1}) - V(t_k), with
    the frozen reward of the predicted picture inside V).
KEPT FROM ALL: log-prob averaged over D, advantages by prompt, clip range near 1e-4, one pass over the data.
"""
import copy
import csv
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import numpy as np
import torch

from rewards import HELP, PROMPTS, BadInput, get_prompts, get_reward


# =================================================== METHOD ===================================================
# Down to TRAINING, a function needs torch, numpy, SimpleNamespace and the functions above it: copy what you like.
def at(v, k):
    """v[k] for a batch of steps, ready for arithmetic with latents: (H,), (B,) -> (B, 1, 1, 1)."""
    return v[k].view(-1, 1, 1, 1)


# ---- three kernels: x (B, C, h, w), k (B,), c (B, L, E) -> mean (B, C, h, w) and std (B, 1, 1, 1) of x_{k+1}
def rlcm_policy(eps, x, k, c, s):
    """Consistency model: guess the clean latent, add noise of the next level (RLCM, section 4)."""
    ab, ab_next, std = at(s.ab, k), at(s.ab_next, k), at(s.std, k)
    clean = (x - (1 - ab).sqrt() * eps(x, s.t[k], c)) / ab.sqrt()
    f = at(s.c_out, k) * clean + at(s.c_skip, k) * x  # consistency function f_theta (LCM, eq. 9)
    return ab_next.sqrt() * f, std


def ddpo_policy(eps, x, k, c, s):
    """Diffusion model: a DDIM step with eta = 1, also known as Euler-ancestral (DDPO; DDIM, eq. 12)."""
    ab, ab_next, std = at(s.ab, k), at(s.ab_next, k), at(s.std, k)
    noise = eps(x, s.t[k], c)
    clean = (x - (1 - ab).sqrt() * noise) / ab.sqrt()
    direction = (1 - ab_next - std**2).clamp(min=0).sqrt() * noise  # back towards x_k
    return ab_next.sqrt() * clean + direction, std


def score_policy(eps, x, k, c, s):
    """Reverse-time SDE: an Euler-Maruyama step with the score as the action a (SaA, section 3).

    dX = (1/2 beta X + beta a) dt + sqrt(beta) dB, where std_k^2 is the integral of beta over the step.
    """
    ab, std = at(s.ab, k), at(s.std, k)
    a = -eps(x, s.t[k], c) / (1 - ab).sqrt()
    return x + std**2 * (x / 2 + a), std


# ---- their schedules: constants of H steps, (H,) each, from the model's own scheduler in diffusers
def rlcm_schedule(scheduler, H, device):
    """Of an LCMScheduler. The last step goes to ab = 1: no noise, x_H = f_theta(x_{H-1})."""
    scheduler.set_timesteps(H)
    t = scheduler.timesteps
    ab = scheduler.alphas_cumprod[t]
    ab_next = torch.cat([ab[1:], torch.ones(1)])
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # LCM, appendix
    return on(device, t=t, ab=ab, ab_next=ab_next, std=(1 - ab_next).sqrt(), c_skip=c_skip, c_out=c_out)


def ddpo_schedule(scheduler, H, device):
    """Of a DDIMScheduler with eta = 1."""
    scheduler.set_timesteps(H)
    t = scheduler.timesteps
    t_next = t - scheduler.config.num_train_timesteps // H  # where DDIMScheduler.step goes from t
    ab = scheduler.alphas_cumprod[t]
    ab_next = scheduler.alphas_cumprod[t_next.clamp(min=0)]
    ab_next = torch.where(t_next >= 0, ab_next, scheduler.final_alpha_cumprod)
    variance = (1 - ab_next) / (1 - ab) * (1 - ab / ab_next)  # DDIM, eq. 16
    return on(device, t=t, ab=ab, ab_next=ab_next, std=variance.sqrt())


def score_schedule(scheduler, H, device):
    """Real times, from the model's log alpha-bar made linear between its timesteps.

    The forward SDE dX = -1/2 beta X dt + sqrt(beta) dB has ab(t) = exp(-integral of beta from 0 to t). Steps are
    even in the cube root of that integral: small near the data, where the last one's noise stays in the picture.
    """
    integral = -scheduler.alphas_cumprod.double().log()  # at t = 0 .. 999
    root = torch.linspace(1, 0, H + 1).double()
    grid = integral[0] + (integral[-1] - integral[0]) * root**3
    t = torch.from_numpy(np.interp(grid[:-1], integral, np.arange(len(integral)))).float()
    ab, std = (-grid).exp().float(), (grid[:-1] - grid[1:]).sqrt().float()
    return on(device, t=t, ab=ab[:-1], ab_next=ab[1:], std=std)


def on(device, **tensors):
    return SimpleNamespace(**{name: v.to(device) for name, v in tensors.items()})


METHODS = {
    "rlcm": (rlcm_schedule, rlcm_policy),
    "ddpo": (ddpo_schedule, ddpo_policy),
    "score": (score_schedule, score_policy),
}


# ---- log-prob and KL of one step
def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2 I) averaged over D: (B, C, h, w) twice, (B, 1, 1, 1) -> (B,).

    The average, not the sum, as in DDPO's and RLCM's code: it makes log-ratios D times smaller, which is why the
    clip range is as small as 1e-4. A step with std = 0 has no density: 0 stands there, without gradient.
    """
    noisy = std > 0
    std = torch.where(noisy, std, 1.0)
    log_p = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * np.log(2 * np.pi)
    return torch.where(noisy, log_p, 0.0).mean((1, 2, 3))


def gaussian_kl(mean, mean_pre, std):
    """KL( N(mean, std^2 I) || N(mean_pre, std^2 I) ), nats, summed over D: -> (B,); 0 where std = 0.

    For `score` it is 1/2 beta dt |s_theta - s_pre|^2: a step of Girsanov's formula (SaA, section 3).
    """
    noisy = std > 0
    kl = (mean - mean_pre) ** 2 / (2 * torch.where(noisy, std, 1.0) ** 2)
    return torch.where(noisy, kl, 0.0).sum((1, 2, 3))


# ---- rollout
@torch.no_grad()
def rollout(policy, eps, s, c, z):
    """Sample B trajectories.

    c (B, L, E); z (H+1, B, C, h, w) standard normal: x_0, then the noise of each step.
    -> x (H+1, B, C, h, w), mean (H, B, C, h, w), log_p (H, B).
    """
    H, B = len(s.std), len(c)
    assert z.shape[:2] == (H + 1, B), f"z {tuple(z.shape)} does not fit {H} steps of {B} pictures"
    x, mean, log_p = [z[0]], [], []
    for k in range(H):
        mean_k, std = policy(eps, x[k], torch.full((B,), k, device=z.device), c, s)
        x.append(mean_k + std * z[k + 1])  # a_k ~ pi_theta( . | s_k)
        mean.append(mean_k)
        log_p.append(log_prob(x[k + 1], mean_k, std))
    return torch.stack(x), torch.stack(mean), torch.stack(log_p)


@torch.no_grad()
def path_kl(policy, eps_pre, s, c, x, mean):
    """KL_k of each step of a rollout: x (H+1, B, C, h, w), mean (H, B, C, h, w) -> mean_pre like mean, kl (H, B).

    The sum bounds the KL of the final latents, but for a last step without noise, which is not charged: so it
    does for `score` alone.
    """
    mean_pre, kl = torch.zeros_like(mean), torch.zeros_like(mean[:, :, 0, 0, 0])
    for k in (s.std > 0).nonzero().flatten().tolist():
        mean_pre[k], std = policy(eps_pre, x[k], torch.full((len(c),), k, device=x.device), c, s)
        kl[k] = gaussian_kl(mean[k], mean_pre[k], std)
    return mean_pre, kl


# ---- advantages
def advantages(returns, prompts, history, size, min_count, clip):
    """Returns standardised by prompt (DDPO and RLCM, appendices): (B,), B strings -> A (B,), 1 / std (B,).

    `history`, prompt -> list of its last `size` returns, is updated in place. A prompt with fewer than min_count
    is standardised by the mean and std of this batch.
    """
    assert returns.shape == (len(prompts),)
    returns = returns.double()  # integer rewards must not truncate
    for prompt, R in zip(prompts, returns.tolist()):
        history[prompt] = (history.get(prompt, []) + [R])[-size:]
    mean, std = torch.empty_like(returns), torch.empty_like(returns)
    for i, prompt in enumerate(prompts):
        enough = len(history[prompt]) >= min(min_count, size)
        seen = torch.tensor(history[prompt], dtype=torch.double) if enough else returns
        mean[i], std[i] = seen.mean(), seen.std(correction=0) + 1e-6
    return ((returns - mean) / std).clamp(-clip, clip).float(), (1 / std).float()


# ---- loss and update
def policy_loss(log_p, log_p_old, A, algo="ppo", clip_range=1e-4):
    """Loss and ratio of each action: (n,), (n,), (n,) -> (n,), (n,).

    With one optimizer step for a rollout the ratio is 1 and the clip inert: both losses have the same gradient.
    """
    ratio = (log_p - log_p_old).exp()
    if algo == "reinforce":
        return -A * log_p, ratio  # gradient -A grad log pi(a_k | s_k) (DDPO_SF in DDPO)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(A * ratio, A * clipped), ratio  # PPO, eq. 7


def update(
    policy, eps, s, c, x, log_p_old, A, optimizer, micro_batch, algo="ppo", clip_range=1e-4, updates=1,
    max_grad_norm=1.0, mean_pre=None, kl_weight=None,
    backward=torch.Tensor.backward, clip_grad_norm=torch.nn.utils.clip_grad_norm_,
):  # fmt: skip
    """One pass over a rollout in `updates` optimizer steps, each on its share of the pictures. -> metrics, a dict.

    x (H+1, B, C, h, w) and log_p_old (H, B) from `rollout`; c (B, L, E); A (B,) or (H, B). With mean_pre from
    `path_kl` the KL is charged: kl_weight (B,) = lambda / std of the prompt's returns, the units of A.
    The actions of a step's pictures are one flat batch, cut into micro-batches of the rollout's size: passes of
    another shape round differently, and the ratio would not be exactly 1 before the first step.
    """
    H, B = log_p_old.shape
    D, n, A = x[0, 0].numel(), B // updates, A.expand(H, B)
    assert x.shape[:2] == (H + 1, B) and len(c) == B and n * updates == B
    actions = (s.std > 0).nonzero().flatten()  # a step without noise is none
    rows, drift, norms = [], [], []
    for u in range(updates):
        all_k = actions.repeat_interleave(n)  # step and picture of each action
        all_b = torch.arange(u * n, (u + 1) * n, device=x.device).repeat(len(actions))
        for k, b in zip(all_k.split(micro_batch), all_b.split(micro_batch)):
            mean, std = policy(eps, x[k, b], k, c[b], s)
            log_p = log_prob(x[k + 1, b], mean, std)
            loss, ratio = policy_loss(log_p, log_p_old[k, b], A[k, b], algo, clip_range)
            if mean_pre is not None:  # lambda grad KL_k; over D, as the log-prob is
                loss = loss + kl_weight[b] * gaussian_kl(mean, mean_pre[k, b], std) / D
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


# ---- value function, of --method score
class Value(torch.nn.Module):
    """V(t, x_t) = sqrt(ab) R(clean) + sqrt(1 - ab) F(clean, t), at the data R alone (after SaA, section 4).

    clean (n, C, h, w), ab (n, 1, 1, 1) -> (n,).
    """

    def __init__(self, C):
        super().__init__()
        conv = lambda n, m: [torch.nn.Conv2d(n, m, 3, stride=2, padding=1), torch.nn.SiLU()]
        head = lambda: [torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(256, 1)]
        self.R = torch.nn.Sequential(*conv(C, 32), *conv(32, 64), *head())
        self.F = torch.nn.Sequential(*conv(C + 1, 32), *conv(32, 64), *head())

    def forward(self, clean, ab):
        clean = clean.clamp(-4, 4)  # latents have unit scale; a guess from pure noise may not
        t = ab.expand(-1, 1, *clean.shape[2:])
        R, F = self.R(clean), self.F(torch.cat([clean, t], 1))  # (n, 1)
        return (ab.view(-1, 1).sqrt() * R + (1 - ab).view(-1, 1).sqrt() * F).flatten()


def actor_critic(V, optimizer, s, x, mean, to_go, generator, fits=64, backward=torch.Tensor.backward):
    """Advantage: return to go minus V of the state. Then V is fitted to the return to go (SaA's martingale loss).

    x (H+1, B, C, h, w) and mean (H, B, C, h, w) from `rollout`, to_go (H, B) -> A (H, B).
    """
    H, B = to_go.shape
    k = torch.arange(H, device=x.device).repeat_interleave(B)
    ab, std, target = at(s.ab, k), at(s.std, k), to_go.flatten()
    x, mean = x[:-1].flatten(0, 1), mean.flatten(0, 1)  # (H * B, C, h, w)
    a = (mean - x) / std**2 - x / 2  # the action, read off the step that it made
    clean = (x + (1 - ab) * a) / ab.sqrt()  # Tweedie's formula
    with torch.no_grad():
        A = target - torch.cat([V(*part) for part in zip(clean.split(1024), ab.split(1024))])
    for i in torch.randint(H * B, (fits, 256), generator=generator).to(x.device):
        backward((V(clean[i], ab[i]) - target[i]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return A.view(H, B)


# ================================================== TRAINING ==================================================
def train(cfg, resume=False, stop=()):
    """Fine-tune as `cfg` says, or until the epoch in which `stop` becomes true. -> the run's folder.

    Raises BadInput.
    """
    run = start(cfg, resume)
    s, accelerator = run.s, run.accelerator
    for epoch in run.bar:
        # 1. prompts and noise: functions of seed and epoch, so that a resumed run repeats them
        g = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        index = torch.randint(len(run.prompts), (cfg.batch_size,), generator=g)
        z = torch.randn(len(s.std) + 1, cfg.batch_size, *run.model.shape, generator=g)
        prompts = [run.prompts[i] for i in index]

        # 2. trajectories x_0 .. x_H, the rewards of their pictures, their KL to the pretrained model
        roll = collect(run, prompts[run.mine], index[run.mine], z[:, run.mine])

        # 3. advantages of the returns r - lambda sum_k KL_k, by prompt, over all processes
        halt = torch.full_like(roll.r, bool(stop))
        r, kl, halt = accelerator.gather(torch.stack([roll.r, roll.kl.sum(0), halt], 1)).cpu().T  # (B,) each
        A = advantages(r - cfg.kl * kl, prompts, run.history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        A, inv_std = (v[run.mine].to(run.device) for v in A)
        if cfg.method == "score":  # no action is charged for the KL paid before it
            to_go = A + cfg.kl * inv_std * (roll.kl.cumsum(0) - roll.kl)  # (H, B)
            A = actor_critic(*run.critic, s, roll.x, roll.mean, to_go, g, backward=accelerator.backward)

        # 4. policy gradient
        log = update(
            run.policy, run.model.eps, s, roll.c, roll.x, roll.log_p, A, run.optimizer, run.micro_batch,
            cfg.algo, cfg.clip_range, cfg.updates, cfg.max_grad_norm, roll.mean_pre, cfg.kl * inv_std,
            backward=accelerator.backward, clip_grad_norm=accelerator.clip_grad_norm_,
        )  # fmt: skip

        # 5. metrics; from time to time pictures, the LoRA and a checkpoint
        record(run, epoch, r, kl, log, halt=bool(halt.any()))
        if halt.any():
            break
    return finish(run)


@torch.no_grad()
def collect(run, prompts, index, z):
    """Experience of one process: n pictures in micro-batches, each scored while the next is sampled.

    -> c (n, L, E), x (H+1, n, C, h, w), mean (H, n, C, h, w), log_p and kl (H, n), r (n,); mean_pre, None without KL.
    """
    c, z = run.embedding[index.to(run.device)], z.to(run.device)
    batches = [slice(i, i + run.micro_batch) for i in range(0, len(prompts), run.micro_batch)]
    parts, scores = [], []
    for b in batches:
        parts.append(rollout(run.policy, run.model.eps, run.s, c[b], z[:, b]))
        scores.append(run.score(decode(run.model.pipe, parts[-1][0][-1]), prompts[b]))
    x, mean, log_p = (torch.cat(part, 1) for part in zip(*parts))
    mean_pre, kl = None, torch.zeros_like(log_p)
    if run.cfg.kl:
        with pretrained(run.model) as eps_pre:
            parts = [path_kl(run.policy, eps_pre, run.s, c[b], x[:, b], mean[:, b]) for b in batches]
        mean_pre, kl = (torch.cat(part, 1) for part in zip(*parts))
    r = torch.cat([wait() for wait in scores]).to(run.device)
    return SimpleNamespace(c=c, x=x, mean=mean, log_p=log_p, r=r, kl=kl, mean_pre=mean_pre)


# ================================================ CONFIGURATION ===============================================
def knob(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    """All that a run depends on; the command line is made of it. The values are those of rlcm on the embedded model:
    `configure` has the others'."""

    reward: str = knob("compress", HELP)
    method: Literal["rlcm", "ddpo", "score"] = knob("rlcm", "consistency model, diffusion model, reverse-time SDE")
    algo: Literal["ppo", "reinforce"] = knob("ppo", "clipped ratio, or plain score function")
    model: str = knob("tiny", "tiny, a folder or a hub id of a diffusers pipeline; default on a GPU: the papers'")
    lcm_lora: Optional[str] = knob(None, "LCM-LoRA, folder or hub id, to make an SD-1.x --model a consistency model")
    paper: bool = knob(False, "the papers' settings for this method and reward, their GPUs' batches as one")
    prompts: str = knob("animals", f"{', '.join(PROMPTS)}, a text file of prompts, or a quoted prompt")
    steps: int = knob(4, "H, evaluations of the network for one picture, 2 to 50")
    epochs: int = knob(64, "rollouts of the run")
    batch_size: int = knob(64, "B, pictures of an epoch")
    micro_batch: int = knob(32, "rows of one pass of the network; changes memory, not results")
    updates: int = knob(1, "optimizer steps of an epoch, each on its share of the pictures")
    lr: float = knob(1.2e-3, "learning rate of Adam")
    kl: float = knob(0.0028, "lambda: reward charged for a nat of KL to the pretrained model; 0: none")
    guidance: float = knob(6.0, "guidance scale, in training as in sampling")
    lora_rank: int = knob(4, "rank of the adapter; 0: train all weights of the network")
    lora_alpha: int = knob(4, "alpha of the adapter")
    clip_range: float = knob(1e-4, "PPO's epsilon; small, because the log-prob is an average over D")
    adv_clip: float = knob(10.0, "advantages are clipped to +- this")
    buffer_size: int = knob(8, "returns remembered for each prompt")
    min_count: int = knob(4, "with fewer of them, the batch's mean and std serve")
    max_grad_norm: float = knob(5.0, "the gradient is clipped to this norm")
    precision: Literal["fp32", "bf16", "fp16"] = knob("fp32", "of the network; default on a GPU: bf16")
    low_memory: bool = knob(False, "one row a pass, gradient checkpointing, sliced VAE: slower, the same gradient")
    log_with: Optional[Literal["wandb", "tensorboard"]] = knob(None, "also log metrics and pictures there")
    seed: int = knob(0, "of adapter, prompts and noise")
    save_every: int = knob(10, "epochs between pictures, LoRAs and checkpoints")
    out: Optional[str] = knob(None, "the run's folder, default runs/METHOD-REWARD-SEED-TIME; with --sample: its file")


HERE = Path(__file__).resolve().parent
TINY = {"rlcm": "tiny/lcm", "ddpo": "tiny/sd", "score": "tiny/sd"}
REAL = {"rlcm": "SimianLuo/LCM_Dreamshaper_v7", "ddpo": "Lykon/dreamshaper-7", "score": "Lykon/dreamshaper-7"}
COUNTS = dict(buffer_size=16, min_count=16, micro_batch=2, kl=0.0)
RLCM = COUNTS | dict(epochs=1000, batch_size=16, lr=1e-4, guidance=8.0, lora_rank=16, lora_alpha=32)
DDPO = COUNTS | dict(steps=50, epochs=100, batch_size=256, updates=4, lr=3e-4, guidance=5.0, adv_clip=5.0)
DDPO["max_grad_norm"] = 1.0
PRESETS = {  # (model, method): what differs from Config; for real models the official codes', but RLCM in 4 steps
    ("tiny", "rlcm"): {},
    ("tiny", "ddpo"): dict(steps=5, epochs=40, lr=3e-3, kl=0.001, guidance=3.0),
    ("tiny", "score"): dict(steps=6, epochs=20, lr=5e-3, kl=0.0025, guidance=3.0),
    ("real", "rlcm"): RLCM,
    ("real", "ddpo"): DDPO,
    ("real", "score"): DDPO,
}
PAPER = {  # --paper: (method, reward), on top of the real preset. RLCM, appendix: 4 GPUs (3 for align) as one batch.
    ("rlcm", "compress"): dict(steps=8, prompts="imagenet-animals"),
    ("rlcm", "incompress"): dict(steps=8, prompts="imagenet-animals"),
    ("rlcm", "aesthetic"): dict(steps=8, batch_size=32, lora_rank=8, lora_alpha=8, buffer_size=32),
    ("rlcm", "align"): dict(steps=16, epochs=708, batch_size=120, buffer_size=32, prompts="animals-activities"),
    # ddpo-pytorch, config/dgx.py, which RLCM compares with; DDPO's own table is full fine-tuning at 1e-5
    ("ddpo", "compress"): dict(prompts="imagenet-animals"),
    ("ddpo", "incompress"): dict(prompts="imagenet-animals"),
    ("ddpo", "aesthetic"): dict(epochs=200, updates=2, buffer_size=32),
    ("ddpo", "align"): dict(epochs=200, updates=2, buffer_size=32, batch_size=288, prompts="animals-activities"),
}


def configure(**given):
    """A Config: the preset of the method and the model, under the settings given. Raises BadInput."""
    cfg, cuda = Config(**given), torch.cuda.is_available()
    if "model" not in given:
        model, found = (REAL["ddpo" if cfg.lcm_lora else cfg.method], "a") if cuda else ("tiny", "no")
        say(f"model: {model} ({found} CUDA GPU is here; --model chooses)")
        given = given | {"model": model}
    task = cfg.method, cfg.reward
    if cfg.paper and task not in PAPER:
        known = ", ".join(" ".join(key) for key in PAPER)
        raise BadInput(f"--paper: no published settings for {' '.join(task)}: choose from {known}")
    kind = "tiny" if given["model"] == "tiny" and not cfg.paper else "real"
    preset = PRESETS[kind, cfg.method] | (PAPER[task] if cfg.paper else {})
    preset |= {"precision": "bf16" if cuda else "fp32"}
    preset |= {"micro_batch": 1} if cfg.low_memory else {}
    preset |= {"guidance": 1.5} if cfg.lcm_lora else {}
    return Config(**(preset | given))


def check(cfg):
    """Raises BadInput for settings that cannot work."""
    for wrong, message in (
        (not 2 <= cfg.steps <= 50, f"--steps {cfg.steps}: between 2 and 50; a single one has no noise to reinforce"),
        (cfg.lcm_lora and cfg.method != "rlcm", "--lcm-lora makes a consistency model: it goes with --method rlcm"),
        (cfg.algo == "reinforce" and cfg.updates > 1, "--algo reinforce allows one of --updates: it has no ratio"),
        (cfg.log_with and not find_spec(cfg.log_with), f"--log-with: first pip install {cfg.log_with}"),
        (cfg.precision == "fp16" and not torch.cuda.is_available(), "--precision fp16 needs a GPU: take bf16"),
    ):
        if wrong:
            raise BadInput(message)
    for name, value in vars(cfg).items():
        zero = name in ("kl", "guidance", "seed", "lora_rank")
        if type(value) in (int, float) and not (0 < value < float("inf") or zero and value == 0):
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be a positive number" + " or zero" * zero)


def say(line):
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


# ==================================================== MODEL ===================================================
def load_model(cfg, accelerator=None):
    """The pipeline that cfg names, ready to train and to draw: a namespace. Raises BadInput.

    pipe (diffusers', with the adapter in pipe.unet), trained (its trained weights by name, float32), eps (of the
    network, guided), reference (the pretrained eps, where there is no adapter to switch off), shape (C, h, w).
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    device = accelerator.device if accelerator else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare = accelerator.prepare_model if accelerator else lambda network, **options: network
    pipe, reference = load_pipeline(cfg), None
    pipe.to(device)
    unet = pipe.unet.requires_grad_(not cfg.lora_rank)
    if cfg.kl and not cfg.lora_rank:
        frozen = copy.deepcopy(unet).requires_grad_(False)
        reference = noise_predictor(pipe, prepare(frozen, evaluation_mode=True), cfg.guidance)
    if cfg.lora_rank:
        layers = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as in both official codes
        lora = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=layers, init_lora_weights="gaussian")
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            unet.add_adapter(lora)
    cast_training_params(unet, torch.float32)  # what is trained is float32 whatever the network is
    if cfg.low_memory:
        unet.enable_gradient_checkpointing()
        pipe.vae.enable_slicing()
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    shape = unet.config.in_channels, unet.config.sample_size, unet.config.sample_size
    eps = noise_predictor(pipe, prepare(unet), cfg.guidance)
    return SimpleNamespace(pipe=pipe, trained=trained, eps=eps, reference=reference, shape=shape)


def load_pipeline(cfg):
    """diffusers' pipeline with the scheduler of the method. Raises BadInput."""
    from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.precision]
    source = str(HERE / TINY[cfg.method]) if cfg.model == "tiny" else cfg.model
    try:
        unchecked = dict(safety_checker=None, requires_safety_checker=False)
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **unchecked)
        if cfg.lcm_lora:
            source, pipe.scheduler = cfg.lcm_lora, LCMScheduler.from_config(pipe.scheduler.config)
            pipe.load_lora_weights(source)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    except Exception as e:
        advice = "give a folder or hub id of a diffusers pipeline, or --model tiny, which needs no download"
        raise BadInput(f"cannot load the model {source} ({one_line(e)}): {advice}") from e
    if cfg.method != "rlcm":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    elif not isinstance(pipe.scheduler, LCMScheduler):
        found = type(pipe.scheduler).__name__
        raise BadInput(f"{source} has a {found}: --method rlcm needs a consistency model with an LCMScheduler")
    if pipe.scheduler.config.prediction_type != "epsilon":
        found = pipe.scheduler.config.prediction_type
        raise BadInput(f"{source} predicts {found!r}: only epsilon prediction is supported")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def noise_predictor(pipe, network, guidance):
    """eps of a network, guided as its pipeline guides: x (B, C, h, w), t (B,), c (B, L, E) -> (B, C, h, w) float32."""
    dtype, dim = pipe.vae.dtype, pipe.unet.config.time_cond_proj_dim
    if dim:  # an LCM takes the guidance scale as an input (LCM, section 4.2), less one in that paper's formula
        w = pipe.get_guidance_scale_embedding(torch.tensor([guidance - 1.0]), dim).to(pipe.vae.device, dtype)

    def eps(x, t, c):
        condition = w.expand(len(x), -1) if dim else None
        return network(x.to(dtype), t, encoder_hidden_states=c, timestep_cond=condition).sample.float()

    if dim or guidance <= 1:
        return eps
    nothing = encode(pipe, [""])

    def guided(x, t, c):  # classifier-free guidance, both halves in one pass
        e_0, e_c = eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([nothing.expand_as(c), c])).chunk(2)
        return e_0 + guidance * (e_c - e_0)

    return guided


@contextmanager
def pretrained(model):
    """eps of the pretrained model for the block: the network with its adapter off, or the copy of all weights."""
    if model.reference:
        yield model.reference
        return
    model.pipe.unet.disable_adapters()
    try:
        yield model.eps
    finally:
        model.pipe.unet.enable_adapters()


@torch.no_grad()
def encode(pipe, prompts):
    """B strings -> (B, L, E)."""
    parts = [prompts[i : i + 64] for i in range(0, len(prompts), 64)]
    return torch.cat([pipe.encode_prompt(part, pipe.vae.device, 1, False)[0] for part in parts])


@torch.no_grad()
def decode(pipe, x):
    """Clean latents (B, C, h, w) -> pictures (B, 3, H, W) float32 in [0, 1]."""
    x = (x / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    return (pipe.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)


# ================================================== PICTURES ==================================================
def draw(model, cfg, prompts, steps=None):
    """Pictures (B, 3, H, W) of prompts from fixed noise, that of torch.Generator().manual_seed(i) for picture i.

    It is drawn in the order of a diffusers pipeline: given the same generators, one draws the same pictures.
    """
    schedule, policy = METHODS[cfg.method]
    s, c = schedule(model.pipe.scheduler, steps or cfg.steps, model.pipe.vae.device), encode(model.pipe, prompts)
    z, images = torch.empty(len(s.std) + 1, len(prompts), *model.shape), []
    for i in range(len(prompts)):
        g = torch.Generator().manual_seed(i)
        for z_k in z:
            z_k[i] = torch.randn(1, *model.shape, generator=g)[0]
    for i in range(0, len(prompts), cfg.micro_batch):
        b = slice(i, i + cfg.micro_batch)
        x, _, _ = rollout(policy, model.eps, s, c[b], z[:, b].to(c.device))
        images.append(decode(model.pipe, x[-1]))
    return torch.cat(images)


def likeness(images, first):
    """Mean correlation of pictures with their first versions: 1 unchanged, 0 unrelated; a blank page counts as 0."""
    a, b = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (images, first))
    correlation = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)
    return float((correlation * (a.std(1) > 0.02)).mean())


def sample_grid(rows, captions, path, title=""):
    """Write rows of pictures, a list of (B, 3, H, W), with captions below, a list of B strings for each row."""
    from PIL import Image, ImageDraw, ImageFont

    tile, line, font = max(128, rows[0].shape[-1] // 2), 18, ImageFont.load_default(13)
    top, columns = line * bool(title), min(8, len(rows[0]))
    lines = []  # of at most eight pictures
    for images, texts in zip(rows, captions):
        lines += [(images[i : i + columns], texts[i : i + columns]) for i in range(0, len(images), columns)]
    sheet = Image.new("RGB", (columns * tile, top + len(lines) * (tile + line)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 1), title, "black", font)
    for n, (images, texts) in enumerate(lines):
        for i, (picture, text) in enumerate(zip(images, texts)):
            x, y = i * tile, top + n * (tile + line)
            pixels = (picture * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            sheet.paste(Image.fromarray(pixels).resize((tile, tile), Image.LANCZOS), (x, y))
            while font.getlength(text) > tile - 6:
                text = text[:-2] + "…"
            pen.text((x + 4, y + tile + 1), text, "black", font)
    sheet.save(path)


def reward_curve(rows, path, label):
    """Write the curve of the epochs' mean reward, in a band of one std over the pictures."""
    from matplotlib.figure import Figure  # needs no backend

    epoch, mean, std = (np.array([row[name] for row in rows]) for name in ("epoch", "reward_mean", "reward_std"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(epoch, mean)
    axis.fill_between(epoch, mean - std, mean + std, alpha=0.2, linewidth=0)
    axis.set(xlabel="epoch", ylabel=label)
    figure.savefig(path)


# ===================================================== RUN ====================================================
def start(cfg, resume=False):
    """Everything that the training loop needs: a namespace. Nothing is written until all of it works. Raises BadInput."""
    from accelerate import Accelerator
    from tqdm import tqdm

    check(cfg)
    reward_fn, prompts = get_reward(cfg.reward, cfg.model), get_prompts(cfg.prompts)
    name = f"{cfg.method}-{cfg.reward.split('/')[-1].replace(':', '-')}-{cfg.seed}-{time.strftime('%m%d-%H%M%S')}"
    out = Path(cfg.out or f"runs/{name}")
    if not resume and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise BadInput(f"{out} exists and is not an empty folder: give another --out")
    state = load_checkpoint(out)
    rows = state["rows"]
    if len(rows) >= cfg.epochs:
        raise BadInput(f"{out} already has {len(rows)} epochs: give more --epochs to go on")
    precision = "no" if cfg.precision == "fp32" else cfg.precision
    accelerator = Accelerator(mixed_precision=precision, log_with=cfg.log_with, project_dir=out)
    P, rank, leader = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    if cfg.batch_size % (P * cfg.updates):
        raise BadInput(f"--batch-size {cfg.batch_size} does not divide into {P} processes x --updates {cfg.updates}")
    model, device, n = load_model(cfg, accelerator), accelerator.device, cfg.batch_size // P
    schedule, policy = METHODS[cfg.method]
    optimizer = accelerator.prepare_optimizer(torch.optim.Adam(model.trained.values(), cfg.lr))
    run = SimpleNamespace(
        cfg=cfg, out=out, accelerator=accelerator, device=device, model=model, policy=policy, optimizer=optimizer,
        s=schedule(model.pipe.scheduler, cfg.steps, device), prompts=prompts, embedding=encode(model.pipe, prompts),
        reward_fn=reward_fn, score=scorer(reward_fn, device), mine=slice(rank * n, rank * n + n), rows=rows,
        micro_batch=max(m for m in range(1, cfg.micro_batch + 1) if n // cfg.updates % m == 0),  # one shape
        shown=(prompts * 16)[:16], first=None, history=state["history"], saved={"optimizer": optimizer},
    )  # fmt: skip
    if cfg.method == "score":
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            V = Value(model.shape[0])
        run.critic = accelerator.prepare(V, torch.optim.Adam(V.parameters(), 1e-3))
        run.saved |= {"V": V, "V_optimizer": run.critic[1]}
    if accelerator.scaler:
        run.saved["scaler"] = accelerator.scaler
    if leader:
        save_start(run)
    accelerator.init_trackers("rlcm", {name: str(value) for name, value in asdict(cfg).items()})
    if rows:
        model.pipe.unet.load_state_dict(state["trained"], strict=False)
        for name, part in run.saved.items():
            part.load_state_dict(state[name])
    run.began = time.time() - (rows[-1]["seconds"] if rows else 0)
    epochs = range(len(rows) + 1, cfg.epochs + 1)
    options = dict(initial=len(rows), total=cfg.epochs, unit="epoch", dynamic_ncols=True)
    run.bar = tqdm(epochs, disable=not leader, **options)
    return run


def scorer(reward_fn, device):
    """score(images, prompts) -> a function that waits for the rewards. On a GPU a thread computes them meanwhile;
    on a CPU it would only take cores from the network."""

    def now(images, prompts):
        r = reward_fn(images, prompts)
        return lambda: r

    if device.type == "cpu":
        return now
    pool = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
    return lambda images, prompts: pool.submit(reward_fn, images, prompts).result


def record(run, epoch, r, kl, log, halt):
    """Add the epoch's row to metrics.csv; save pictures, LoRA and checkpoint when due. r, kl (B,). Raises BadInput."""
    cfg, accelerator = run.cfg, run.accelerator
    values = accelerator.reduce(torch.tensor(list(log.values()), device=run.device), "mean").tolist()
    log, scaler = dict(zip(log, values)), accelerator.scaler  # fp16's scaler leaves out a step that overflows
    if not np.isfinite(log["grad_norm"]) and not (scaler and scaler.get_scale() >= 1):
        advice = "the last checkpoint is untouched; start anew with a smaller --lr or --precision fp32"
        raise BadInput(f"the gradient of epoch {epoch} is not finite: {advice}")
    row = {
        "epoch": epoch,
        "seconds": round(time.time() - run.began, 3),  # since the start
        "reward_queries": epoch * cfg.batch_size,  # pictures scored so far
        "reward_mean": r.mean().item(),  # of the epoch's B pictures, before the KL is charged
        "reward_std": r.std(correction=0).item(),
        "reward_min": r.min().item(),
        "reward_max": r.max().item(),
        "path_kl": kl.mean().item(),  # nats, sum over a picture's steps
        **log,  # ratio_drift: largest |ratio - 1| before the first optimizer step; in fp32 0. The rest: `update`
        "likeness": "",  # of the sample grid to epoch 0's
    }
    run.rows.append(row)
    if not accelerator.is_main_process:
        return
    run.bar.set_postfix(reward=f"{row['reward_mean']:.3f}", start=f"{run.rows[0]['reward_mean']:.3f}")
    due = epoch % cfg.save_every == 0 or epoch == cfg.epochs
    if due:
        images = draw(run.model, cfg, run.shown)
        row["likeness"] = likeness(images, run.first)
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if cfg.log_with == "tensorboard" else {}
            tracker.log_images({"samples": images.permute(0, 2, 3, 1).cpu().numpy()}, epoch, **options)
    accelerator.log({name: value for name, value in row.items() if value != ""}, epoch)
    save_metrics(run.rows, run.out / "metrics.csv")
    if due:
        save_samples(run, epoch, images)
        save_weights(run.model.pipe, run.out)
        reward_curve(run.rows, run.out / "reward.png", f"reward: {cfg.reward}")
    if due or halt:
        save_checkpoint(run)


def finish(run):
    """Say what was reached, where everything is and how to use it. -> the run's folder."""
    run.bar.close()
    first, last, out = run.rows[0], run.rows[-1], run.out
    if last["epoch"] < run.cfg.epochs:
        say(f"stopped after epoch {last['epoch']}; to go on: python rlcm.py --resume {out}")
    elif run.accelerator.is_main_process:
        full = f'UNet2DConditionModel.from_pretrained("{out}/unet")'
        use = f'pipe.load_lora_weights("{out}")' if run.cfg.lora_rank else full
        say(
            f"reward {first['reward_mean']:.3f} -> {last['reward_mean']:.3f} in {last['epoch']} epochs, "
            f"{last['seconds']:.0f} s; likeness {last['likeness']:.2f} (1 unchanged, 0 blank)\n"
            f"pictures {out}/samples, curve {out}/reward.png; to use it: {use}, "
            f'or: python rlcm.py --sample "a cat" --load {out}'
        )
    return out


# ==================================================== FILES ===================================================
@contextmanager
def aside(path, mode="w"):
    """A file to write that takes the place of `path` once it is whole and on the disk."""
    with open(f"{path}.part", mode) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.part", path)


def save_start(run):
    """The sample grid of the base model, and config.json. A reward that does not work shows here. Raises BadInput."""
    run.first = draw(run.model, run.cfg, run.shown)
    run.reward_fn(run.first, run.shown)
    (run.out / "samples").mkdir(parents=True, exist_ok=True)
    packages = "torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy"
    versions = {name: version(name) for name in packages}
    with aside(run.out / "config.json") as f:
        json.dump({**asdict(run.cfg), "processes": run.accelerator.num_processes, "versions": versions}, f, indent=1)
    save_samples(run, 0, run.first)


def save_samples(run, epoch, images):
    """The sample grid: the same prompts and noise every time, prompt and reward below each picture."""
    r = run.reward_fn(images, run.shown)
    captions = [f"{prompt}  {value:.2f}" for prompt, value in zip(run.shown, r)]
    title = f"epoch {epoch}: reward {r.mean():.3f}, likeness to epoch 0 {likeness(images, run.first):.2f}"
    sample_grid([images], [captions], run.out / "samples" / f"epoch-{epoch:04d}.png", title)


def save_metrics(rows, path):
    """A list of dicts as CSV."""
    with aside(path) as f:
        csv.writer(f, lineterminator="\n").writerows([rows[0], *(row.values() for row in rows)])


def save_checkpoint(run):
    """checkpoint/state.pt: all that a resumed run needs."""
    (run.out / "checkpoint").mkdir(exist_ok=True)
    state = {name: part.state_dict() for name, part in run.saved.items()}
    with aside(run.out / "checkpoint" / "state.pt", "wb") as f:
        torch.save({"trained": run.model.trained, "history": run.history, "rows": run.rows, **state}, f)


def load_checkpoint(out):
    """What save_checkpoint wrote; a run stopped before its first one begins anew. Raises BadInput."""
    path = out / "checkpoint" / "state.pt"
    if not path.exists():
        return {"history": {}, "rows": []}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain data only
    except Exception as e:
        raise BadInput(f"no readable checkpoint in {out} ({type(e).__name__}): start a new run") from e


def save_weights(pipe, out):
    """What was trained, as diffusers has it: pytorch_lora_weights.safetensors, alpha included, or unet/."""
    from peft.utils import get_peft_model_state_dict

    part, name = out / ".saving", "pytorch_lora_weights.safetensors"
    shutil.rmtree(part, ignore_errors=True)
    if hasattr(pipe.unet, "peft_config"):
        lora, settings = get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"].to_dict()
        type(pipe).save_lora_weights(part, unet_lora_layers=lora, unet_lora_adapter_metadata=settings)
    else:
        name = "unet"
        pipe.unet.save_pretrained(part / name)
        shutil.rmtree(out / name, ignore_errors=True)
    os.replace(part / name, out / name)
    part.rmdir()


def load_weights(model, out):
    """Put the trained weights of a run's folder into a freshly loaded model. Raises BadInput."""
    pipe = model.pipe
    try:
        if (out / "unet").exists():
            pipe.unet.load_state_dict(type(pipe.unet).from_pretrained(out / "unet").state_dict())
        else:
            pipe.unet.delete_adapters("default")
            pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    except Exception as e:
        raise BadInput(f"no readable weights in {out}: {one_line(e)}") from e


def read_config(out):
    """config.json of a run's folder as a Config. Raises BadInput."""
    try:
        saved = json.loads((Path(out) / "config.json").read_text())
        return Config(**{f.name: saved[f.name] for f in fields(Config)})
    except (OSError, ValueError, KeyError, TypeError) as e:
        advice = "give the folder that training printed"
        raise BadInput(f"{out} is not a run directory of this version ({one_line(e)}): {advice}") from e


# ================================================ COMMAND LINE ================================================
def sample(cfg, prompts, run=None):
    """Draw prompts with the base model and, from the same noise, with a run's weights below. -> the picture's path.

    Raises BadInput.
    """
    check(cfg)
    path = Path(cfg.out or Path(run or ".") / "sample.png")
    model = load_model(replace(cfg, kl=0.0))
    rows, captions = [draw(model, cfg, prompts)], [prompts]  # a fresh adapter changes nothing
    if run:
        load_weights(model, Path(run))
        rows.append(draw(model, cfg, prompts))
        captions = [[f"base: {p}" for p in prompts], [f"tuned: {p}" for p in prompts]]
    sample_grid(rows, captions, path)
    say(f"wrote {path}")
    return path


def drawing_config(run, **given):
    """A run's settings for drawing, under those given. Raises BadInput where it has no weights yet."""
    cfg = replace(read_config(run), **({"out": None} | given))
    if not any((Path(run) / name).exists() for name in ("pytorch_lora_weights.safetensors", "unet")):
        raise BadInput(f"no weights in {run} yet: a run saves them every --save-every epochs")
    return cfg if cfg.lora_rank else replace(cfg, precision="fp32")  # weights trained in full are float32


def parse(argv):
    """The command line -> the Config, and what to do with it: sample, load, resume. Raises BadInput."""
    from transformers import HfArgumentParser

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    parser = HfArgumentParser(Config, allow_abbrev=False, prog="rlcm.py", description=__doc__.split("\n\n")[0])
    parser.error = refuse
    parser.add_argument("--sample", nargs="+", metavar="PROMPT", help="draw these prompts instead of training")
    parser.add_argument("--load", metavar="RUN", help="with --sample: the run whose weights draw a second row")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run; only its --epochs may change")
    parser.set_defaults(**{f.name: None for f in fields(Config)})  # tells what is given from what is not
    asked = vars(parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0])
    do = SimpleNamespace(**{name: asked.pop(name) for name in ("sample", "load", "resume")})
    given = {name: value for name, value in asked.items() if value is not None}
    changed = [name for name in given if name != "epochs"]
    if do.load and not do.sample:
        refuse("--load goes with --sample")
    if do.resume and (do.sample or changed):
        refuse(f"--{'sample' if do.sample else changed[0].replace('_', '-')} does not go with --resume: only --epochs does")
    if do.resume:
        cfg = replace(read_config(do.resume), out=do.resume, **given)
    else:
        cfg = drawing_config(do.load, **given) if do.load else configure(**given)
    parser.set_defaults(**vars(cfg))  # --help shows the values that this command line would use
    unknown = parser.parse_known_args(argv)[1]
    if unknown:
        refuse(f"unknown argument {unknown[0]}")
    return cfg, do


def quiet():
    """Libraries print errors only, and a progress bar for a download but none for loading."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as of_transformers

    for logging in (of_diffusers, of_transformers):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    enable_progress_bars()


def main(argv=None):
    """The program. -> exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    stop = []

    def interrupt(*_):  # the first Ctrl-C ends the epoch and saves, the second ends at once
        stop.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        cfg, do = parse(sys.argv[1:] if argv is None else argv)
        quiet()
        if do.sample:
            sample(cfg, do.sample, do.load)
        else:
            signal.signal(signal.SIGINT, interrupt)
            train(cfg, bool(do.resume), stop)
        return 130 if stop else 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; a run goes on from its last checkpoint with --resume RUN"
    except torch.OutOfMemoryError as e:
        status, message = 2, f"out of GPU memory: try a smaller --micro-batch, or --low-memory ({one_line(e)})"
    except (BadInput, OSError) as e:  # OSError: a full disk, a folder that cannot be written
        status, message = 2, e
    print(f"rlcm.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
