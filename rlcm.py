"""RLCM in one file: reinforcement learning for consistency models, from the formula to the trained LoRA.

Fine-tunes a text-to-image latent consistency model on any reward by policy gradients, next to the diffusion baseline (DDPO). Read it
from the top: each equation stands beside the line that computes it. Rewards and prompt sets live next door, in rewards.py.

    python rlcm.py --reward compress --steps 4                     # train; runs/NAME/ holds pictures, curves and the LoRA
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress                 # the diffusion baseline
    python rlcm.py --sample "a cat" "a dog" --load runs/NAME       # base row above tuned row, same noise
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

    RLCM (section 4)   mean = sqrt(ab_{k+1}) f_theta(x_k, t_k, c),   std = sqrt(1 - ab_{k+1}),   readout = f_theta(x_T, t_T, c)
    DDPO               mean = the DDIM step with eta = 1,            std = DDIM's sigma_k,       readout = x_T

A method is three functions of one signature: its schedule, its policy (x, k, c) -> mean, std, and its readout. Rollout samples
from the policy, the update re-scores with the same call, and everything else in this file does not know which method runs.

Glossary       symbol in the papers                                         here
    B          pictures per epoch                                           cfg.batch_size
    H          evaluations of the model for one picture                     cfg.steps
    T          actions (transitions) in one picture: H - 1, for DDPO H      len(s.std)
    D          latent dimensions, C * h * w
    x_k        noisy latent, x_0 ~ N(0, I)                                  x        (B, C, h, w) float32
    t_k        timestep of the model's own scheduler                        s.t[k]
    ab         alpha-bar, the share of signal variance at t_k               s.ab[k]
    c          prompt embedding                                             c        (B, L, E)
    eps        the network: predicted noise                                 eps(x, t, c)
    f_theta    consistency function: the clean latent, in one step          f
    pre        the pretrained model: the same network, adapter off          mean_pre
    lambda     weight of the KL to the pretrained model                     cfg.kl
    A_k        advantage of an action                                       advantage

Differs from the official RLCM code (github.com/Owen-Oertell/rlcm)
    1. The last evaluation has no action. There the last state is noised once more to its own timestep and that noise is scored
       as an action which the picture never depends on: no signal in expectation, one more transition to pay for. H = 1 has none.
    2. Timesteps, alpha-bar and boundary scalings are the LCMScheduler's own, so the LoRA is trained on the schedule it is sampled with.
    3. States are stored as the network saw them and mean, std and log-prob are float32, in micro-batches of one shape: the ratio is
       exactly 1 before the first optimizer step. `ratio_drift` in metrics.csv shows it.
    4. A KL to the pretrained model (as in SaA) keeps the subject in the picture. Without it, compression ends in a blank page.
    5. The prompts and noise of epoch e are a function of (seed, e): no generator state to lose.
    6. No learning-rate schedule; the final epoch is saved; the LoRA has the keys and the alpha that diffusers reads.
Differs from the DDPO code: guidance is on in training as in sampling; an action with std = 0 has no density and is left out of the loss.
Kept from both papers: log-prob averaged over D, per-prompt running advantages, PPO clip range 1e-4, one pass over the data.
"""
import csv
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a quiet terminal: nothing here that the user could act on
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
import torch

from rewards import HELP, PROMPTS, BadInput, get_prompts, get_reward

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------------------- config
def flag(default, help, **parser):
    return field(default=default, metadata={"help": help, **parser})


@dataclass
class Config:
    """Everything a run depends on; the command line is made of it. None: taken from the model's preset (`PRESETS`)."""
    reward: str = flag("compress", HELP)
    method: Literal["rlcm", "ddpo"] = flag("rlcm", "the policy: a consistency model's, or a diffusion model's")
    algo: Literal["ppo", "reinforce"] = flag("ppo", "clipped ratio, or plain score function")
    model: str = flag("auto", "auto, tiny, a folder or a hub id of a diffusers pipeline; auto: the real model on a CUDA GPU, tiny elsewhere")
    prompts: str = flag("animals", f"{', '.join(PROMPTS)}, or a text file with one prompt a line")
    steps: Optional[int] = flag(None, "H, evaluations of the model for one picture: 2 to 50; default 4 for rlcm, 10 or 50 for ddpo")
    epochs: Optional[int] = flag(None, "rollouts of the run")
    batch_size: Optional[int] = flag(None, "B, pictures in an epoch")
    micro_batch: Optional[int] = flag(None, "pictures or transitions in one pass of the network; changes memory, not results")
    updates: Optional[int] = flag(None, "optimizer steps in an epoch, each on its share of the pictures")
    lr: Optional[float] = flag(None, "learning rate of Adam")
    kl: Optional[float] = flag(None, "lambda, in units of reward per nat of path KL to the pretrained model; 0: none")
    guidance: Optional[float] = flag(None, "guidance scale")
    lora_rank: Optional[int] = flag(None, "rank of the adapter")
    lora_alpha: Optional[int] = flag(None, "alpha of the adapter")
    clip_range: float = flag(1e-4, "PPO's epsilon; the log-prob is an average over D, so ratios stay close to 1")
    adv_clip: float = flag(10.0, "advantages are clipped to +- this")
    buffer_size: Optional[int] = flag(None, "rewards remembered for each prompt")
    min_count: Optional[int] = flag(None, "with fewer of them the batch's mean and std serve")
    max_grad_norm: float = flag(5.0, "gradient norm is clipped to this")
    precision: Optional[Literal["fp32", "bf16", "fp16"]] = flag(None, "of the network; default bf16 on a GPU, fp32 elsewhere")
    seed: int = flag(0, "of adapter, prompts and noise")
    save_every: int = flag(10, "epochs between sample grids, curves and saved LoRAs")
    out: Optional[str] = flag(None, "run directory; default runs/METHOD-REWARD-SEED-TIME (with --sample: the picture's file)")
    sample: Optional[list[str]] = flag(None, "draw these prompts instead of training", nargs="+")
    load: Optional[str] = flag(None, "with --sample: the run whose LoRA draws the second row")
    resume: Optional[str] = flag(None, "continue this run directory, bit for bit; of its settings only --epochs may change")


TINY, REAL = {"rlcm": "lcm", "ddpo": "sd"}, {"rlcm": "SimianLuo/LCM_Dreamshaper_v7", "ddpo": "Lykon/dreamshaper-7"}
PRESETS = {  # (model, method): the papers' settings for the real models, ours for the embedded ones
    ("tiny", "rlcm"): dict(steps=4, epochs=24, batch_size=64, micro_batch=32, updates=1, lr=3e-3, kl=0.003, guidance=3.0, lora_rank=8, lora_alpha=8, buffer_size=8, min_count=4),
    ("tiny", "ddpo"): dict(steps=10, epochs=24, batch_size=64, micro_batch=32, updates=1, lr=3e-3, kl=0.003, guidance=3.0, lora_rank=8, lora_alpha=8, buffer_size=8, min_count=4),
    ("real", "rlcm"): dict(steps=4, epochs=1000, batch_size=16, micro_batch=2, updates=1, lr=1e-4, kl=0.0, guidance=8.0, lora_rank=16, lora_alpha=32, buffer_size=16, min_count=16),
    ("real", "ddpo"): dict(steps=50, epochs=100, batch_size=256, micro_batch=2, updates=4, lr=3e-4, kl=0.0, guidance=5.0, lora_rank=4, lora_alpha=4, buffer_size=16, min_count=16),
}


def resolve(cfg):
    """A copy of cfg with what was left open filled in and every number checked. Raises BadInput."""
    cfg = replace(cfg)
    if cfg.model == "auto":
        cfg.model = REAL[cfg.method] if torch.cuda.is_available() else "tiny"
        why = "a CUDA GPU is here" if torch.cuda.is_available() else "no CUDA GPU here"
        say(f"model: {cfg.model} ({why}; --model chooses)")
    for name, value in PRESETS["tiny" if cfg.model == "tiny" else "real", cfg.method].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    cfg.precision = cfg.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    if not 2 <= cfg.steps <= 50:
        raise BadInput(f"--steps {cfg.steps}: between 2 and 50 evaluations" + (", because a single one has no random transition to reinforce" if cfg.steps == 1 else ""))
    for name in ("epochs", "batch_size", "micro_batch", "updates", "lr", "lora_rank", "lora_alpha", "clip_range", "adv_clip", "buffer_size", "min_count", "max_grad_norm", "save_every"):
        if not 0 < getattr(cfg, name) < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be a positive number")
    for name in ("kl", "guidance", "seed"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be zero or a positive number")
    if cfg.batch_size % cfg.updates:
        raise BadInput(f"--batch-size {cfg.batch_size} does not divide into --updates {cfg.updates}")
    if cfg.min_count > cfg.buffer_size:
        raise BadInput(f"--min-count {cfg.min_count} is more than the --buffer-size {cfg.buffer_size} rewards remembered: no prompt would ever reach it")
    return cfg


def say(line):
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


# ----------------------------------------------------------------------------------------------------------- schedules
def rlcm_schedule(scheduler, steps, device):
    """Constants of the model's own LCMScheduler: of each evaluation t, ab, c_skip, c_out (H,); of each action ab_next, std (T,)."""
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps
    ab = scheduler.alphas_cumprod[t]
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # LCM, appendix
    return on(device, t=t, ab=ab, c_skip=c_skip, c_out=c_out, ab_next=ab[1:], std=(1 - ab[1:]).sqrt())


def ddpo_schedule(scheduler, steps, device):
    """Constants of the model's DDIMScheduler at eta = 1, of each of T = H actions: t, ab, ab_next, std (T,)."""
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps
    before = t - scheduler.config.num_train_timesteps // steps  # where DDIMScheduler.step goes from t
    ab, ab_next = scheduler.alphas_cumprod[t], torch.where(before >= 0, scheduler.alphas_cumprod[before.clamp(min=0)], scheduler.final_alpha_cumprod)
    return on(device, t=t, ab=ab, ab_next=ab_next, std=((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt())  # DDIM, eq. 16


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


def ddpo_readout(eps, x, k, c, s):
    """The last state is the latent."""
    return x


def ddpo_policy(eps, x, k, c, s):
    """DDIM step with eta = 1 (DDPO; DDIM, arXiv 2010.02502, eq. 12): as rlcm_policy."""
    e = eps(x, s.t[k], c)
    x_0 = (x - (1 - at(s.ab, k)).sqrt() * e) / at(s.ab, k).sqrt()  # predicted clean latent
    direction = (1 - at(s.ab_next, k) - at(s.std, k) ** 2).clamp(min=0).sqrt() * e  # towards x_k
    return at(s.ab_next, k).sqrt() * x_0 + direction, at(s.std, k)


METHODS = {"ddpo": (ddpo_schedule, ddpo_policy, ddpo_readout), "rlcm": (rlcm_schedule, rlcm_policy, rlcm_readout)}


# ------------------------------------------------------------------------------------------------------------- rollout
@torch.no_grad()
def rollout(model, method, s, c, z, micro_batch, reference=False, on_pictures=None):
    """Sample B trajectories from noise z, in micro-batches.

    z (T+1, B, C, h, w): z[0] is x_0, z[k+1] the noise of action k. c (B, L, E). `on_pictures(images, slice)` is called as soon as a
    micro-batch is decoded, before the next one is sampled. Returns x (T+1, B, C, h, w); log_p (T, B); mean_pre (T, B, C, h, w) and
    kl (T, B) against the pretrained model, or None and zeros; all float32.
    """
    _, policy, readout = METHODS[method]
    T, B = len(z) - 1, len(c)
    assert z.shape[1] == B and T == len(s.std)
    x, log_p, kl = torch.empty_like(z), z.new_zeros(T, B), z.new_zeros(T, B)
    mean_pre = torch.empty_like(z[1:]) if reference else None
    for i in range(0, B, micro_batch):
        b = slice(i, i + micro_batch)
        x[0, b] = z[0, b]
        for n in range(T):
            k = torch.full((len(c[b]),), n, device=z.device)
            mean, std = policy(model.eps, x[n, b], k, c[b], s)
            x[n + 1, b] = mean + std * z[n + 1, b]  # a_k ~ pi_theta
            log_p[n, b] = log_prob(x[n + 1, b], mean, std)
            if reference and std.min() > 0:  # an action without noise has no density
                model.pipe.unet.disable_adapters()
                mean_pre[n, b] = policy(model.eps, x[n, b], k, c[b], s)[0]
                model.pipe.unet.enable_adapters()
                kl[n, b] = gaussian_kl(mean, mean_pre[n, b], std)
        if on_pictures:
            on_pictures(model.decode(readout(model.eps, x[T, b], torch.full_like(k, T), c[b], s)), b)
    return SimpleNamespace(x=x, log_p=log_p, mean_pre=mean_pre, kl=kl)


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
    seen = [torch.tensor(history[p], dtype=torch.double) if len(history[p]) >= min_count else rewards for p in prompts]
    mean, std = torch.stack([v.mean() for v in seen]), torch.stack([v.std(correction=0) for v in seen]) + 1e-6
    return ((rewards - mean) / std).clamp(-clip, clip).float(), (1 / std).float()


# ----------------------------------------------------------------------------------------------------- loss and update
def policy_loss(log_p, log_p_old, advantage, algo, clip_range):
    """Loss of each transition and its ratio: (n,), (n,), (n,) -> (n,), (n,)."""
    ratio = (log_p - log_p_old).exp()
    if algo == "reinforce":
        return -advantage * log_p, ratio  # grad = -A_k grad log pi(a_k | s_k)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(advantage * ratio, advantage * clipped), ratio  # PPO (arXiv 1707.06347, eq. 7)


def update(model, cfg, accelerator, optimizer, s, c, roll, advantage, scale):
    """One pass over the rollout in `cfg.updates` optimizer steps. Returns the epoch's metrics.

    The transitions of all timesteps of a step's pictures are one flat batch, walked in micro-batches of the rollout's own shape
    and order. roll: what `rollout` returned; advantage, scale (B,).
    """
    policy, B, D = METHODS[cfg.method][1], roll.log_p.shape[1], roll.x[0, 0].numel()
    random = s.std > 0  # an action without noise has no density: it is left out
    T = int(random.sum())
    n = B // cfg.updates  # pictures of one optimizer step
    m = micro_batch_of(cfg, n)
    stats, drift, norms = [], [], []
    for u in range(cfg.updates):
        b = slice(u * n, (u + 1) * n)
        flat = lambda v: v[random][:, b].flatten(0, 1)  # (T, B, ...) -> (T * n, ...)
        x, x_next, log_p_old, k = flat(roll.x[:-1]), flat(roll.x[1:]), flat(roll.log_p), random.nonzero().repeat_interleave(n)
        mean_pre = flat(roll.mean_pre) if cfg.kl else None
        c_k, A, w = c[b].repeat(T, 1, 1), advantage[b].repeat(T), scale[b].repeat(T)
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
        optimizer.step()
        optimizer.zero_grad()
    loss, approx_kl, clip_fraction = accelerator.reduce(torch.cat(stats, 1).mean(1), "mean").tolist()
    return {"loss": loss, "approx_kl": approx_kl, "clip_fraction": clip_fraction, "ratio_drift": torch.stack(drift).max().item(), "grad_norm": torch.stack(norms).mean().item()}


def micro_batch_of(cfg, n):
    """Largest micro-batch up to cfg.micro_batch that divides n, so that every pass of the network has one shape."""
    return max(m for m in range(1, min(cfg.micro_batch, n) + 1) if n % m == 0)


# ------------------------------------------------------------------------------------------------------------- model
def load_model(cfg, device):
    """The diffusers pipeline and what the algorithm needs of it, as plain functions.

    Returns a namespace: pipe; unet (with the LoRA, everything else frozen); eps(x, t, c) -> (B, C, h, w) float32; encode(prompts) ->
    (B, L, E); decode(latents) -> (B, 3, H, W) in [0, 1]; shape (C, h, w). Raises BadInput where no such pipeline can be had.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
    from diffusers.training_utils import cast_training_params
    from diffusers.utils import logging
    from peft import LoraConfig
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar(), transformers_logging.disable_progress_bar()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.precision]
    path = str(HERE / "tiny" / TINY[cfg.method]) if cfg.model == "tiny" else cfg.model
    try:
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, safety_checker=None, requires_safety_checker=False)
    except Exception as e:
        raise BadInput(f"cannot load the model {path} ({type(e).__name__}): give a folder or hub id of a diffusers pipeline, or --model tiny, which needs no download") from e
    if cfg.method == "ddpo":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    elif not isinstance(pipe.scheduler, LCMScheduler):
        raise BadInput(f"{path} has a {type(pipe.scheduler).__name__}: --method rlcm needs a latent consistency model with an LCMScheduler")
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise BadInput(f"{path} predicts {pipe.scheduler.config.prediction_type!r}: only epsilon prediction is supported")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    torch.manual_seed(cfg.seed)  # of the adapter's initial weights
    pipe.unet.add_adapter(LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(pipe.unet, torch.float32)  # the adapter stays float32 whatever the network is

    m = SimpleNamespace(pipe=pipe, unet=pipe.unet, shape=(pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size))
    dim = pipe.unet.config.time_cond_proj_dim
    if dim:  # an LCM's network takes the guidance scale as an input (LCM, section 4.2); w = guidance - 1 in that paper's formula
        w = pipe.get_guidance_scale_embedding(torch.tensor([cfg.guidance - 1.0]), dim).to(device, dtype)

    def network(x, t, c):
        return m.unet(x.to(dtype), t, encoder_hidden_states=c, timestep_cond=w.expand(len(x), -1) if dim else None).sample.float()

    def guided(x, t, c):  # classifier-free guidance, both halves in one pass, in rollout and update alike
        e_0, e_c = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([m.nothing.expand_as(c), c])).chunk(2)
        return e_0 + cfg.guidance * (e_c - e_0)

    @torch.no_grad()
    def encode(prompts):
        return torch.cat([pipe.encode_prompt(prompts[i : i + 64], device, 1, False)[0] for i in range(0, len(prompts), 64)])

    @torch.no_grad()
    def decode(latents):
        return (pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    m.eps = guided if cfg.method != "rlcm" and cfg.guidance > 1 else network
    m.encode, m.decode, m.nothing = encode, decode, encode([""])
    return m


# ------------------------------------------------------------------------------------------------------- run directory
def save_lora(pipe, folder):
    """Write pytorch_lora_weights.safetensors, alpha included, for `pipe.load_lora_weights(folder)`; atomic."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    aside = folder / ".saving"
    type(pipe).save_lora_weights(aside, unet_lora_layers=get_peft_model_state_dict(pipe.unet), **_collate_lora_metadata({"unet": pipe.unet}))
    os.replace(aside / "pytorch_lora_weights.safetensors", folder / "pytorch_lora_weights.safetensors")
    aside.rmdir()


def save_checkpoint(folder, **state):
    """Write folder/state.pt aside, then rename; the one before it stays as previous.pt."""
    folder.mkdir(exist_ok=True)
    with open(folder / "new.pt", "wb") as f:
        torch.save(state, f)
        f.flush(), os.fsync(f.fileno())
    if (folder / "state.pt").exists():
        os.replace(folder / "state.pt", folder / "previous.pt")
    os.replace(folder / "new.pt", folder / "state.pt")


def load_checkpoint(folder):
    """The newest checkpoint that can be read. Raises BadInput."""
    for path in (folder / "state.pt", folder / "previous.pt"):
        if path.exists():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain data only
            except Exception as e:
                say(f"{path} is damaged ({type(e).__name__})")
    raise BadInput(f"no readable checkpoint in {folder}: the run saves one every --save-every epochs")


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


def save_grid(rows, captions, path, title=""):
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


def save_metrics(rows, path):
    """metrics.csv, one row per epoch, replaced whole."""
    with open(path.with_suffix(".part"), "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".part"), path)


def save_curve(rows, path):
    """reward.png: mean and spread of the reward against pictures scored."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    column = lambda name: np.array([row[name] for row in rows], float)
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.fill_between(column("reward_queries"), column("reward_mean") - column("reward_std"), column("reward_mean") + column("reward_std"), alpha=0.2)
    axis.plot(column("reward_queries"), column("reward_mean"))
    axis.set(xlabel="pictures scored", ylabel="reward: mean, band of one std")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def likeness(images, first):
    """Mean correlation of pictures with their first versions: 1 is unchanged, 0 unrelated; a blank page counts as 0."""
    a, b = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (images, first))
    norm = a.norm(dim=1) * b.norm(dim=1)
    return float(((a * b).sum(1) / norm.clamp(min=1e-6) * (a.std(1) > 0.02)).mean())


def fixed_noise(T, B, shape):
    """Noise of picture i from `torch.Generator().manual_seed(i)`, in a diffusers pipeline's own order: (T+1, B, C, h, w)."""
    g = [torch.Generator().manual_seed(i) for i in range(B)]
    return torch.stack([torch.stack([torch.randn(1, *shape, generator=g_i)[0] for _ in range(T + 1)]) for g_i in g], 1)


def draw(model, cfg, s, prompts):
    """Pictures (B, 3, H, W) of prompts from fixed noise; a plain pipeline given the same generators draws the same ones."""
    out = []
    z = fixed_noise(len(s.std), len(prompts), model.shape).to(s.ab.device)
    rollout(model, cfg.method, s, model.encode(prompts), z, cfg.micro_batch, on_pictures=lambda images, b: out.append(images))
    return torch.cat(out)


# ----------------------------------------------------------------------------------------------------------- main loop
def inline(fn, *arguments):
    """What an executor's submit does, at once."""
    value = fn(*arguments)
    return SimpleNamespace(result=lambda: value)


def train(cfg):
    """Train as `cfg` says and return the run directory (a Path). Raises BadInput before anything is written where it can."""
    from accelerate import Accelerator
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from tqdm import tqdm

    cfg = resolve(cfg)
    reward_fn, prompts = get_reward(cfg.reward), get_prompts(cfg.prompts)
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(cfg.precision, cfg.precision))
    P, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if cfg.batch_size % (P * cfg.updates):
        raise BadInput(f"--batch-size {cfg.batch_size} does not divide into {P} processes x --updates {cfg.updates}")
    out = Path(cfg.out or f"runs/{cfg.method}-{cfg.reward.split('/')[-1].replace(':', '-')}-{cfg.seed}-{time.strftime('%m%d-%H%M%S')}")
    if not cfg.resume and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise BadInput(f"{out} exists and is not an empty folder: give another --out")

    if cfg.resume:
        state = load_checkpoint(out / "checkpoint")
        if len(state["rows"]) >= cfg.epochs:
            raise BadInput(f"{out} already has {len(state['rows'])} epochs: give more --epochs to go on")

    model = load_model(cfg, device)
    s = METHODS[cfg.method][0](model.pipe.scheduler, cfg.steps, device)
    optimizer = torch.optim.Adam([p for p in model.unet.parameters() if p.requires_grad], cfg.lr)
    model.unet, optimizer = accelerator.prepare(model.unet, optimizer)
    embedding, T, mine = model.encode(prompts), len(s.std), cfg.batch_size // P

    shown = (prompts * 16)[:16]  # the sample grid: the same prompts and the same noise every time
    first = draw(model, cfg, s, shown)
    r = reward_fn(first, shown)  # a reward that does not work shows here, before anything is written

    def save_samples(epoch, images, r):
        caption = [f"{p}  {v:.2f}" for p, v in zip(shown, r)]
        row_title = f"epoch {epoch}: reward {r.mean():.3f}, likeness to epoch 0 {likeness(images, first):.2f}"
        save_grid([images], [caption], out / "samples" / f"epoch-{epoch:04d}.png", row_title)

    if accelerator.is_main_process:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps({**asdict(replace(cfg, resume=None)), "processes": P, "versions": versions()}, indent=1) + "\n")
        save_samples(0, first, r)
    history, rows = {}, []
    if cfg.resume:
        set_peft_model_state_dict(model.pipe.unet, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        history, rows = state["history"], state["rows"]
    start = time.time() - (rows[-1]["seconds"] if rows else 0)
    submit = ThreadPoolExecutor(1).submit if device.type == "cuda" else inline  # on a CPU a second thread only takes cores from the network
    bar = tqdm(range(len(rows) + 1, cfg.epochs + 1), initial=len(rows), total=cfg.epochs, unit="epoch", disable=not accelerator.is_main_process, dynamic_ncols=True)
    for epoch in bar:
        # 1. sample prompts and noise, a function of (seed, epoch); each process takes its share
        g = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        index = torch.randint(len(prompts), (cfg.batch_size,), generator=g)[rank * mine : (rank + 1) * mine]
        z = torch.randn(T + 1, cfg.batch_size, *model.shape, generator=g)[:, rank * mine : (rank + 1) * mine].to(device)
        c, names = embedding[index.to(device)], [prompts[i] for i in index]
        # 2. roll out the policy; a micro-batch is scored while the next is sampled
        jobs = []
        roll = rollout(model, cfg.method, s, c, z, micro_batch_of(cfg, mine // cfg.updates), cfg.kl > 0,
                       lambda images, b: jobs.append(submit(reward_fn, images, names[b])))
        rewards = torch.cat([job.result() for job in jobs])
        # 3. returns r - lambda * KL of the path, standardised by prompt over all processes
        path_kl = roll.kl.sum(0).cpu()
        everyone = accelerator.gather(torch.stack([rewards, path_kl, index.float()]).T.contiguous().to(device)).cpu()  # (B, 3)
        advantage, scale = advantages(everyone[:, 0] - cfg.kl * everyone[:, 1], [prompts[int(i)] for i in everyone[:, 2]],
                                      history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        advantage, scale = (v[rank * mine : (rank + 1) * mine].to(device) for v in (advantage, scale))
        # 4. policy gradient
        log = update(model, cfg, accelerator, optimizer, s, c, roll, advantage, scale)
        # 5. write down
        r = everyone[:, 0]
        rows.append({"epoch": epoch, "seconds": round(time.time() - start, 3), "reward_queries": epoch * cfg.batch_size, "reward_mean": r.mean().item(),
                     "reward_std": r.std(correction=0).item(), "reward_min": r.min().item(), "reward_max": r.max().item(),
                     "path_kl": everyone[:, 1].mean().item(), **log, "likeness": ""})
        bar.set_postfix(reward=f"{r.mean():.3f}", start=f"{rows[0]['reward_mean']:.3f}")
        save = epoch % cfg.save_every == 0 or epoch == cfg.epochs
        if save:
            images = draw(model, cfg, s, shown)
            rows[-1]["likeness"] = likeness(images, first)
        if accelerator.is_main_process:
            save_metrics(rows, out / "metrics.csv")
        if accelerator.is_main_process and save:
            save_samples(epoch, images, reward_fn(images, shown))
            save_lora(model.pipe, out)
            save_curve(rows, out / "reward.png")
            save_checkpoint(out / "checkpoint", lora=get_peft_model_state_dict(model.pipe.unet), optimizer=optimizer.state_dict(), history=history, rows=rows)
    say(f"reward {rows[0]['reward_mean']:.3f} -> {rows[-1]['reward_mean']:.3f} in {cfg.epochs} epochs, {rows[-1]['seconds']:.0f} s; likeness {rows[-1]['likeness']:.2f} "
        f"(1 unchanged, 0 blank)\npictures {out}/samples, curve {out}/reward.png; use the LoRA: pipe.load_lora_weights(\"{out}\"), or: python rlcm.py --sample \"a cat\" --load {out}")
    return out


def versions():
    from importlib.metadata import version
    return {"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")}}


def sample(cfg):
    """--sample: a row of the base model's pictures above a row of the tuned one's, from the same noise. Returns the file's path."""
    if cfg.load:
        saved = read_config(cfg.load)
        if not (Path(cfg.load) / "pytorch_lora_weights.safetensors").exists():
            raise BadInput(f"{cfg.load} holds no pytorch_lora_weights.safetensors yet: the run saves it every --save-every epochs")
        cfg = replace(cfg, model=saved.model, method=saved.method, guidance=saved.guidance if cfg.guidance is None else cfg.guidance, steps=cfg.steps or saved.steps)
    cfg = resolve(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(cfg, device)
    s = METHODS[cfg.method][0](model.pipe.scheduler, cfg.steps, device)
    rows, captions = [draw(model, cfg, s, cfg.sample)], [cfg.sample]  # a fresh adapter is the identity
    if cfg.load:
        model.unet.delete_adapters("default")
        model.pipe.load_lora_weights(cfg.load)
        rows, captions = rows + [draw(model, cfg, s, cfg.sample)], [[f"base: {p}" for p in cfg.sample], [f"tuned: {p}" for p in cfg.sample]]
    path = Path(cfg.out or Path(cfg.load or ".") / "sample.png")
    save_grid(rows, captions, path)
    say(f"wrote {path}")
    return path


def main(argv=None):
    from transformers import HfArgumentParser

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    parser = HfArgumentParser(Config, allow_abbrev=False, prog="rlcm.py", description=__doc__.split("\n\n")[0])
    parser.error = refuse
    try:
        cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            refuse(f"unknown argument {unknown[0]}")
        if cfg.load and not cfg.sample:
            refuse("--load goes with --sample")
        if cfg.resume and not cfg.sample:
            cfg = resumed(cfg)
        sample(cfg) if cfg.sample else train(cfg)
    except BadInput as e:
        print(f"rlcm.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrlcm.py: stopped; --resume RUN continues from the last saved epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
