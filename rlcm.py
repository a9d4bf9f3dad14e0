"""RLCM in one file: teach a few-step text-to-image model to please any reward, by policy gradients.

    python rlcm.py --reward compress --steps 4                  # train: runs/NAME/ gets pictures, a LoRA
    python rlcm.py --reward my_reward.py:redness --prompts my_prompts.txt
    python rlcm.py --method ddpo --reward compress              # or score: the same loop, another Gaussian
    python rlcm.py --resume runs/NAME                           # go on with a run that was stopped
    accelerate launch rlcm.py --reward compress                 # several GPUs: the batch is shared out

THE IDEA
A consistency model draws in a few steps: each guesses the clean picture and adds noise again, less each time.
So every latent on the way is drawn from a Gaussian whose mean the network gives: its probability is known. A
reward judges the finished picture; steps to better ones than usual for the prompt become more likely.
A diffusion model and a reverse-time SDE differ only in the Gaussian, so one loop trains all three.

THE OBJECTIVE
A Markov decision process: the state is (x_k, t_k, c), the action is the next latent, the reward comes last.

    x_{k+1} ~ N( mean_theta(x_k, t_k, c), std_k^2 I ),  k = 0 .. H-1       rlcm_policy and two others
    J(theta) = E[ r(decode(x_H), c) ]                                      rollout
    grad J   = E[ sum_k A grad log p_theta(x_{k+1} | x_k, c) ], std_k > 0  log_prob, policy_loss
    A        = (r - mean r) / std r, by prompt                             advantages

That is RLCM and DDPO. Scores as Actions adds a KL penalty towards the pretrained model (--kl lambda); in it
r is in standard deviations of its prompt's rewards, as A is:

    J(theta) = E[ r - lambda sum_k KL_k ]                                  path_kl
    KL_k     = |mean_theta - mean_pre|^2 / (2 std_k^2)                     gaussian_kl
    grad J   = E[ sum_k A_k grad log p_theta - lambda sum_k grad KL_k ]    optimize
    A_k      = A - lambda (G_k - mean G_k),  G_k = sum_{j>k} KL_j          the KL that action k can change

GLOSSARY      shape           meaning, symbol in the papers
    B, H, D                   pictures in a batch; steps (evaluations of the network); numbers in a latent
    x         (B, C, h, w)    latent before a step; x_0 ~ N(0, I) is noise, x_H is decoded
    k                         number of the step, an int
    c         (B, L, E)       embedding of the prompt
    s                         schedule: s.t (H,) timestep (tau_n in RLCM), s.ab (H+1,) alpha-bar, the share of
                              signal in x_k, s.std (H,) noise of the step, s.actions the steps that add noise
    eps       a function      eps(x, t, c) -> (B, C, h, w): the noise that the network sees in x
    clean     (B, C, h, w)    predicted clean latent, the papers' x_0 with a hat
    pre                       of the pretrained model: the same network without its adapter
    log_p     (B,)            log-prob of an action; ratio = exp(log_p - log_p_old)
    A         (B,)            advantage

PAPERS on arXiv: RLCM 2404.03673, RL for Consistency Models. LCM 2310.04378, Latent Consistency Models.
    DDPO 2305.13301, Training Diffusion Models with Reinforcement Learning. DDIM 2010.02502. PPO 1707.06347.
    SaA 2409.08400 and 2502.01819, Scores as Actions. Differences to their official codes: docs/papers.md.
NOT HERE: full fine-tuning, v-prediction, SDXL, fp16, value functions. Beyond the papers: examples/.
"""
import io
import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields
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
from safetensors import SafetensorError
from tqdm import tqdm

import rewards
from rewards import PROMPTS, BadInput, get_prompts, get_reward, one_line, pictures, require

# ================================================== METHOD ==================================================
# Down to TRAIN a function needs torch, numpy, math, SimpleNamespace and functions above it: copy it.

# ---- the three policies: x (B, C, h, w), int k, c (B, L, E) -> mean (B, C, h, w) and std () of x_{k+1}
def rlcm_policy(eps, x, k, c, s):
    """Consistency model: guess the clean latent, add noise of the next level (RLCM, section 4)."""
    ab, ab_next = s.ab[k], s.ab[k + 1]
    clean = (x - (1 - ab).sqrt() * eps(x, s.t[k], c)) / ab.sqrt()
    f = s.c_out[k] * clean + s.c_skip[k] * x  # consistency function f_theta (LCM, eq. 9)
    return ab_next.sqrt() * f, s.std[k]


def ddpo_policy(eps, x, k, c, s):
    """Diffusion model: a DDIM step with eta = 1, which is Euler-ancestral (DDPO, section 4; DDIM, eq. 12)."""
    ab, ab_next, std = s.ab[k], s.ab[k + 1], s.std[k]
    noise = eps(x, s.t[k], c)
    clean = (x - (1 - ab).sqrt() * noise) / ab.sqrt()
    direction = (1 - ab_next - std**2).clamp(min=0).sqrt() * noise  # DDIM's "direction pointing to x_t"
    return ab_next.sqrt() * clean + direction, std


def score_policy(eps, x, k, c, s):
    """Reverse-time SDE dX = (1/2 beta X + beta a) dt + sqrt(beta) dB with the score as action (SaA, sec. 3).

    The mean is exact for a step of any length (Tweedie's formula); rho = exp(-integral of beta over it).
    It is DDPO's Gaussian written in the score. What differs is that time is continuous: any grid will do.
    """
    ab, rho = s.ab[k], s.ab[k] / s.ab[k + 1]
    a = -eps(x, s.t[k], c) / (1 - ab).sqrt()  # the score
    return (x + (1 - rho) * a) / rho.sqrt(), s.std[k]


# ---- their schedules, from the model's own scheduler: a LoRA is trained on the timesteps of plain diffusers
def rlcm_schedule(scheduler, H):
    """Of an LCMScheduler. The last step, x_H = f_theta(x_{H-1}), has std 0, so no density: H - 1 actions."""
    scheduler.set_timesteps(H)
    t = scheduler.timesteps
    ab = torch.cat([scheduler.alphas_cumprod[t], torch.ones(1)])
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)  # LCM, appendix
    std = (1 - ab[1:]).sqrt()
    return SimpleNamespace(t=t, ab=ab, std=std, c_skip=c_skip, c_out=c_out, actions=range(H - 1))


def ddpo_schedule(scheduler, H):
    """Of a DDIMScheduler with eta = 1. A last step with std = 0 is no action."""
    scheduler.set_timesteps(H)
    t = scheduler.timesteps
    ab = torch.cat([scheduler.alphas_cumprod[t], scheduler.final_alpha_cumprod.view(1)])
    std = eta_one(ab)
    return SimpleNamespace(t=t, ab=ab, std=std, actions=range(H if std[-1] > 0 else H - 1))


def score_schedule(scheduler, H):
    """Continuous time: the model's log alpha-bar, linear between its timesteps. All H steps are actions.

    The forward SDE dX = -1/2 beta X dt + sqrt(beta) dB has ab(t) = exp(-integral of beta up to t). Steps are
    even in the cube root of that integral: small near the data, where the last noise stays in the picture.
    """
    integral = -scheduler.alphas_cumprod.double().log()  # at t = 0 .. 999
    root = torch.linspace(1, 0, H + 1).double()
    grid = integral[0] + (integral[-1] - integral[0]) * root**3  # (H+1,)
    t = torch.from_numpy(np.interp(grid[:-1], integral, np.arange(len(integral)))).float()
    ab = (-grid).exp()
    return SimpleNamespace(t=t, ab=ab.float(), std=eta_one(ab).float(), actions=range(H))


def eta_one(ab):
    """std of each step, DDIM's eq. 16 with eta = 1: (H+1,) -> (H,). In small steps it is sqrt(beta dt)."""
    return ((1 - ab[1:]) / (1 - ab[:-1]) * (1 - ab[:-1] / ab[1:])).sqrt()


METHODS = {
    "rlcm": (rlcm_schedule, rlcm_policy),
    "ddpo": (ddpo_schedule, ddpo_policy),
    "score": (score_schedule, score_policy),
}


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2 I) averaged over the D numbers of a latent: (B, C, h, w) twice, () -> (B,).

    The average, not the sum, as in the official codes of DDPO and RLCM: log-ratios are D times smaller, so
    the clip range is, too: 1e-4 is 1.6 on the summed log-ratio of a 4 x 64 x 64 latent (D = 16,384).
    """
    log_p = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_p.mean((1, 2, 3))


def gaussian_kl(mean, mean_pre, std):
    """KL( N(mean, std^2 I) || N(mean_pre, std^2 I) ) in nats, summed over D: (B, C, h, w) twice, () -> (B,).

    For `score`, in small steps, it is Girsanov's 1/2 beta dt |a_theta - a_pre|^2 (SaA, section 3).
    """
    return ((mean - mean_pre) ** 2).sum((1, 2, 3)) / (2 * std**2)


@torch.no_grad()
def rollout(policy, eps, s, c, z):
    """Sample B trajectories. c (B, L, E); z (H+1, B, C, h, w) standard normal: x_0, then each step's noise.

    -> x (H+1, B, C, h, w), mean (H, B, C, h, w), log_p (H, B), in which a step without noise has 0.
    """
    H, B = len(s.std), len(c)
    x, mean, log_p = [z[0]], [], torch.zeros(H, B, device=z.device)
    for k in range(H):
        mean_k, std = policy(eps, x[k], k, c, s)
        x.append(mean_k + std * z[k + 1])  # x_{k+1} ~ N(mean_k, std_k^2 I)
        mean.append(mean_k)
        if k in s.actions:
            log_p[k] = log_prob(x[k + 1], mean_k, std)
    return torch.stack(x), torch.stack(mean), log_p


@torch.no_grad()
def path_kl(policy, eps_pre, s, c, x, mean):
    """KL_k along a rollout: x (H+1, B, C, h, w), mean (H, B, C, h, w) -> mean_pre like mean, kl (H, B).

    Their sum bounds the KL of the finished latents where every step is an action (SaA, section 3).
    """
    mean_pre, kl = mean.clone(), torch.zeros(mean.shape[:2], device=mean.device)
    for k in s.actions:
        mean_pre[k], std = policy(eps_pre, x[k], k, c, s)
        kl[k] = gaussian_kl(mean[k], mean_pre[k], std)
    return mean_pre, kl


def advantages(r, prompts, history, size, min_count, clip):
    """Rewards standardised by prompt (DDPO and RLCM, appendices): r (B,), B strings -> A (B,).

    `history`, prompt -> list of its last rewards, is updated in place. It holds `size` of them, or all of
    this batch's if there are more. A prompt with fewer than min_count is standardised by the whole batch.
    """
    r = r.double()  # with integers A would be integer, too
    A = torch.zeros_like(r)
    for prompt in dict.fromkeys(prompts):
        i = [n for n, other in enumerate(prompts) if other == prompt]
        history[prompt] = (history.get(prompt, []) + r[i].tolist())[-max(size, len(i)) :]
        seen = r
        if len(history[prompt]) >= min_count:
            seen = torch.tensor(history[prompt], dtype=torch.double)
        std = seen.std(correction=0)
        if std > 1e-6 * seen.abs().max():  # else they are equal, up to rounding: A is 0
            A[i] = (r[i] - seen.mean()) / std
    return A.clamp(-clip, clip).float()


def policy_loss(log_p, log_p_old, A, algo="ppo", clip_range=1e-4):
    """Loss and ratio of n actions: (n,), (n,), (n,) -> (n,), (n,).

    With one optimizer step for a rollout the ratio is 1, nothing is clipped, and both have the same gradient.
    """
    ratio = (log_p - log_p_old).exp()
    if algo == "reinforce":
        return -A * log_p, ratio  # gradient -A grad log p (DDPO_SF in DDPO, section 4)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(A * ratio, A * clipped), ratio  # PPO, eq. 7


# =================================================== TRAIN ==================================================
def optimize(run):
    """The algorithm of RLCM (its algorithm 1), DDPO and Scores as Actions; `run` is made by `train`."""
    cfg, s, model, optimizer, accelerator = run.cfg, run.s, run.model, run.optimizer, run.accelerator
    policy = METHODS[cfg.method][1]
    n, m = cfg.batch_size // accelerator.num_processes, cfg.micro_batch
    mine = slice(n * accelerator.process_index, n * (accelerator.process_index + 1))
    shares = [range(i, i + n // cfg.updates) for i in range(0, n, n // cfg.updates)]  # of optimizer steps
    batches = [[slice(i, min(i + m, share.stop)) for i in share[::m]] for share in shares]  # micro-batches
    for epoch in range(len(run.rows) + 1, cfg.epochs + 1):
        # Prompts and noise depend on seed and epoch alone: a resumed run repeats them.
        g = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        index = torch.randint(len(run.prompts), (cfg.batch_size,), generator=g)
        z = torch.randn(cfg.steps + 1, cfg.batch_size, *model.shape, generator=g)[:, mine].to(model.device)
        prompts = [run.prompts[i] for i in index]
        c = encode(model.pipe, prompts[mine])

        # 1. rollout: the sampler is the policy.   2. reward of the finished pictures
        done = []
        for b in progress(sum(batches, []), f"epoch {epoch}, sampling"):
            x, mean, log_p = rollout(policy, model.eps, s, c[b], z[:, b])
            r = run.reward.terms(decode(model.pipe, x[-1]), prompts[mine][b]).to(model.device)  # (terms, b)
            mean_pre, kl = log_p, torch.zeros_like(log_p)  # without a KL penalty neither is used
            if cfg.kl > 0:
                model.pipe.unet.disable_adapters()  # now the network is the pretrained one
                mean_pre, kl = path_kl(policy, model.eps, s, c[b], x, mean)
                model.pipe.unet.enable_adapters()
            done.append((x, mean_pre, log_p, r, kl))
        x, mean_pre, log_p_old, r, kl = (torch.cat(v, 1) for v in zip(*done))

        # 3. advantage: was the picture better than usual for its prompt? Less lambda times the KL to come
        r = accelerator.gather(r.T.contiguous()).T.cpu()  # of all processes
        A = advantages(r.sum(0), prompts, run.history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        A = A[mine].to(model.device).expand(cfg.steps, n)
        if cfg.kl > 0:
            to_come = kl.sum(0) - kl.cumsum(0)  # G_k (H, n): KL_k itself is not in it
            A = A - cfg.kl * (to_come - accelerator.reduce(to_come.mean(1, keepdim=True), "mean"))

        # 4. policy gradient. Rows are grouped as in the rollout: the ratio starts at exactly 1
        stats, norms = [], []
        for share in batches:
            for k in progress(s.actions, f"epoch {epoch}, learning"):
                for b in share:
                    mean, std = policy(model.eps, x[k, b], k, c[b], s)
                    log_p = log_prob(x[k + 1, b], mean, std)
                    loss, _ = policy_loss(log_p, log_p_old[k, b], A[k, b], cfg.algo, cfg.clip_range)
                    if cfg.kl > 0:  # lambda grad KL_k, averaged over D as the log-prob is
                        loss = loss + cfg.kl * gaussian_kl(mean, mean_pre[k, b], std) / x[0, 0].numel()
                    (loss.sum() / (len(s.actions) * n // cfg.updates)).backward()
                    stats.append(torch.stack([loss, log_p - log_p_old[k, b]]).detach())
            norms.append(torch.nn.utils.clip_grad_norm_(model.trained.values(), cfg.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # 5. a row of metrics.csv; now and then the sample grid and the LoRA; a checkpoint
        record(run, epoch, r, kl, torch.cat(stats, 1), torch.stack(norms))


def train(cfg, resume=False):
    """Fine-tune as `cfg` says, with resume go on with the run in cfg.out -> its folder. Raises BadInput."""
    from accelerate import Accelerator

    check(cfg)
    reward, prompts = get_reward(cfg.reward, cfg.model), get_prompts(cfg.prompts)
    name = f"{cfg.method}-{re.sub(r'[^a-zA-Z0-9.]+', '-', cfg.reward)}-{cfg.seed}"
    out = Path(cfg.out or f"runs/{name}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}")
    require(resume or not any(out.glob("*")), f"{out} is not empty: give another --out, or --resume {out}")
    say(f"reward {cfg.reward}; {len(prompts)} prompts, the first is {prompts[0]!r}; folder {out}")
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", log_with=cfg.log_with or None, project_dir=out)
    shares = accelerator.num_processes * cfg.updates
    require(cfg.batch_size % shares == 0, f"--batch-size: a multiple of {shares}, processes x --updates")
    model = load_model(cfg, accelerator)
    s = METHODS[cfg.method][0](model.pipe.scheduler, cfg.steps)
    require(s.actions, f"--method {cfg.method} --steps {cfg.steps} adds no noise: nothing to reinforce")
    most = model.pipe.tokenizer.model_max_length
    cut = [p for p, ids in zip(prompts, model.pipe.tokenizer(prompts).input_ids) if len(ids) > most]
    if cut:
        say(f"warning: {len(cut)} prompts are cut after {most} tokens, the first is {cut[0][:50]!r}...")
    optimizer = torch.optim.Adam(model.trained.values(), cfg.lr)
    rows, history = load_checkpoint(cfg, model, optimizer) if resume else ([], {})
    run = SimpleNamespace(
        cfg=cfg, out=out, accelerator=accelerator, model=model, s=s, optimizer=optimizer, reward=reward,
        prompts=prompts, history=history, rows=rows, began=time.time() - (rows[-1]["seconds"] if rows else 0),
    )  # fmt: skip
    if accelerator.is_main_process:
        if not resume:
            save_pictures(run, 0)  # makes the folder, and shows whether the reward works
        write(out / "config.json", json.dumps(asdict(cfg), indent=1))
    accelerator.init_trackers("rlcm", asdict(cfg))
    bar = dict(initial=len(rows), total=cfg.epochs, unit="epoch", dynamic_ncols=True)
    with tqdm(**bar, disable=not first_process()) as run.bar:
        optimize(run)
    time.sleep(0.1)  # else it can hang: gloo's thread frees its last tensors under the lock that ending holds
    accelerator.end_training()
    say(f"reward {rows[0]['reward_mean']:.3f} -> {rows[-1]['reward_mean']:.3f}, {rows[-1]['seconds']:.0f} s")
    say(f"to go on: python rlcm.py --resume {shlex.quote(str(out))} --epochs {2 * cfg.epochs}")
    say(f'{out} has samples/, reward.png, metrics.csv and the LoRA: pipe.load_lora_weights("{out}")')
    return out


def record(run, epoch, r, kl, stats, norms):
    """Log an epoch, save what is due. r (terms, B) is of all processes; of this one are kl (H, n), stats
    (2, actions) with loss and log-ratio, norms (updates,) of the gradient. BadInput if that is not finite."""
    cfg, rows, total, (loss, log_ratio) = run.cfg, run.rows, r.sum(0), stats
    drift = log_ratio.expm1().abs()  # |ratio - 1|
    means = {
        "path_kl": kl.sum(0).mean(),  # nats, along a picture's path; 0 without a KL penalty
        "loss": loss.mean(),
        "approx_kl": (log_ratio**2).mean() / 2,  # from rollout's policy to the updated one, nats / D^2
        "clip_fraction": (drift > cfg.clip_range).float().mean(),
        "ratio_drift": drift[: len(drift) // cfg.updates].max(),  # before the first optimizer step: 0 in fp32
        "grad_norm": norms.mean(),  # before it is clipped
    }
    values = run.accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
    require(math.isfinite(values[-1]), f"the gradient of epoch {epoch} is not finite: try a smaller --lr")
    row = {
        "epoch": epoch,
        "seconds": round(time.time() - run.began, 3),
        "pictures": epoch * cfg.batch_size,  # scored so far
        "reward_mean": total.mean().item(),
        "reward_std": total.std(correction=0).item(),
        **dict(zip(means, values)),
        **dict(zip(run.reward.names, r.mean(1).tolist())),  # the terms of a sum
    }
    rows.append(row)
    run.accelerator.log(row, epoch)
    if not run.accelerator.is_main_process:
        return
    run.bar.set_postfix(reward=f"{row['reward_mean']:.3f}", start=f"{rows[0]['reward_mean']:.3f}")
    run.bar.update()
    table = [",".join(map(str, line)) for line in (row, *map(dict.values, rows))]  # keys first
    write(run.out / "metrics.csv", "\n".join(table) + "\n")
    if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
        save_pictures(run, epoch)
        save_lora(run.model.pipe, run.out)
    state = dict(trained=run.model.trained, optimizer=run.optimizer.state_dict())
    torch.save(state | dict(history=run.history, rows=rows), whole := io.BytesIO())
    write(run.out / "checkpoint.pt", whole.getvalue())  # last: all that it refers to is there


def first_process():
    return os.environ.get("RANK", "0") == "0"


def say(line):
    if first_process():
        print(line, flush=True)


def progress(items, what):  # a bar over a list that appears only when it takes long
    return tqdm(items, what, leave=False, delay=3, dynamic_ncols=True, disable=not first_process())


# ================================================== CONFIG ==================================================
def flag(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    """All that a run depends on; the command line is made of it. Defaults: rlcm on tiny; others: PRESETS."""
    reward: str = flag("compress", rewards.HELP)
    method: Literal["rlcm", "ddpo", "score"] = flag("rlcm", "consistency model, diffusion model, reverse SDE")
    algo: Literal["ppo", "reinforce"] = flag("ppo", "clipped ratio, or plain score function")
    model: str = flag("tiny", "tiny, a folder or hub id of a diffusers pipeline; on a GPU the papers' model")
    prompts: str = flag("animals", f"{', '.join(PROMPTS)}, a text file of prompts, or a quoted prompt")
    pixels: int = flag(64, "height and width of the pictures")
    steps: int = flag(4, "H, evaluations of the network for one picture")
    epochs: int = flag(27, "rollouts of the run")
    batch_size: int = flag(64, "B, pictures of a rollout")
    micro_batch: int = flag(32, "pictures of one pass of the network; changes memory, not the gradient")
    updates: int = flag(1, "optimizer steps of an epoch, each on its share of the pictures")
    lr: float = flag(9e-4, "learning rate of Adam")
    kl: float = flag(0.0, "lambda: penalty for a nat of KL to the pretrained model, in stds of the reward")
    guidance: float = flag(6.0, "guidance scale, in training as in sampling")
    lora_rank: int = flag(16, "rank of the LoRA")
    lora_alpha: int = flag(16, "alpha of the LoRA: it is scaled by alpha / rank")
    clip_range: float = flag(1e-4, "PPO's epsilon; small, because the log-prob is an average over D")
    adv_clip: float = flag(10.0, "advantages are clipped to +- this")
    buffer_size: int = flag(8, "rewards remembered for each prompt")
    min_count: int = flag(4, "with fewer of them, the batch's mean and std serve")
    max_grad_norm: float = flag(5.0, "the gradient is clipped to this norm")
    precision: Literal["fp32", "bf16"] = flag("fp32", "of the network; full size on a GPU: bf16")
    compile: bool = flag(False, "torch.compile the network")
    gradient_checkpointing: bool = flag(False, "less memory, the same gradient, more time")
    log_with: Literal["", "wandb", "tensorboard"] = flag("", "also log the metrics there")
    seed: int = flag(0, "of LoRA, prompts and noise")
    save_every: int = flag(4, "epochs between sample grids and LoRAs")
    out: str = flag("", "folder of the run; if not given, runs/METHOD-REWARD-SEED-TIME")


# Full size: compress in RLCM's code and in ddpo-pytorch; the papers' other settings: docs/papers.md.
FULL = dict(pixels=512, micro_batch=4, buffer_size=16, min_count=16, save_every=10)
RLCM = FULL | dict(epochs=1000, batch_size=16, lr=1e-4, guidance=8.0, lora_rank=16, lora_alpha=32)
DDPO = FULL | dict(epochs=100, batch_size=256, updates=4, lr=3e-4, guidance=5.0, lora_rank=4, lora_alpha=4)
DDPO |= dict(steps=50, adv_clip=5.0, max_grad_norm=1.0)
PRESETS = {  # (size, method): the model, and what differs from Config
    ("tiny", "rlcm"): ("tiny", {}),
    ("tiny", "ddpo"): ("tiny", dict(steps=5, epochs=24, lr=1.5e-3, guidance=3.0, lora_rank=4, lora_alpha=4)),
    ("tiny", "score"): ("tiny", dict(steps=6, epochs=26, lr=2.5e-3, guidance=3.0)),
    ("full", "rlcm"): ("SimianLuo/LCM_Dreamshaper_v7", RLCM),
    ("full", "ddpo"): ("Lykon/dreamshaper-7", DDPO),
    ("full", "score"): ("Lykon/dreamshaper-7", DDPO),
}


def preset(method="rlcm", model=None):
    """Settings for Config(**...), a dict. Without a model: the papers' on a CUDA GPU, elsewhere tiny."""
    gpu = torch.cuda.is_available()
    size = "tiny" if model == "tiny" or not (model or gpu) else "full"
    name, settings = PRESETS[size, method]
    settings = dict(precision="bf16" if gpu and size == "full" else "fp32") | settings
    return dict(method=method, model=model or name) | settings


def check(cfg):
    """Raises BadInput for settings that cannot work, wherever they come from."""
    for f in fields(Config):
        value, choices, zero = getattr(cfg, f.name), get_args(f.type), f.name in ("kl", "guidance", "seed")
        given = f"--{f.name.replace('_', '-')} {value!r}"
        kinds = (float, int) if f.type is float else (f.type,)
        good = value in choices if choices else type(value) in kinds
        require(good, f"{given}: must be {', '.join(choices) or f.type.__name__}")
        good = f.type not in (int, float) or 0 < value < math.inf or zero and value == 0
        require(good, f"{given}: must be a positive number{' or zero' * zero}")
    require(cfg.steps <= (50 if cfg.method == "rlcm" else 999), "--steps: at most 50 for rlcm, else 999")
    require(cfg.min_count <= cfg.buffer_size, "--min-count: at most --buffer-size")
    require(cfg.algo == "ppo" or cfg.updates == 1, "--algo reinforce has no ratio: --updates must be 1")
    require(not cfg.log_with or find_spec(cfg.log_with), f"first pip install {cfg.log_with}")
    require(cfg.seed < 2**40, "--seed: below 2**40")


# =================================================== MODEL ==================================================
def load_model(cfg, accelerator=None):
    """The pipeline of cfg with a fresh LoRA -> a namespace: pipe (of diffusers), trained (the LoRA's weights
    by name, float32), eps, device, shape (C, h, w) of a latent. Raises BadInput."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    torch.backends.cuda.enable_cudnn_sdp(False)  # it may serve the rollout and not the update: ratio not 1
    pipe = load_pipeline(cfg)
    pipe.to(accelerator.device if accelerator else "cuda" if torch.cuda.is_available() else "cpu")
    pipe.vae.requires_grad_(False)
    unet = pipe.unet.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as in both official codes
    lora = dict(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        unet.add_adapter(LoraConfig(target_modules=layers, **lora))
    cast_training_params(unet, torch.float32)  # what is trained is float32 whatever the network is
    if cfg.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if cfg.compile:
        unet.compile()
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    eps = noise_predictor(pipe, accelerator.prepare_model(unet) if accelerator else unet, cfg)
    shape = (unet.config.in_channels, *[cfg.pixels // pipe.vae_scale_factor] * 2)
    return SimpleNamespace(pipe=pipe, trained=trained, eps=eps, device=pipe.device, shape=shape)


def load_pipeline(cfg):
    """diffusers' pipeline with the method's scheduler. Raises BadInput for what would be trained wrongly."""
    import diffusers

    source, kinds = cfg.model, ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    if source == "tiny":
        source = str(Path(__file__).resolve().parent / "tiny" / ("lcm" if cfg.method == "rlcm" else "sd"))
    options = dict(dtype=torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    options |= dict(safety_checker=None, requires_safety_checker=False)
    try:
        kind = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **options) if kind in kinds else None
    except Exception as e:
        advice = "give a folder or hub id of a diffusers pipeline, or --model tiny, which needs no download"
        raise BadInput(f"cannot load the model {source} ({one_line(e)}): {advice}") from e
    require(pipe, f"{source} is a {kind}: supported are {' and '.join(kinds)}")
    found, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    require("beta_schedule" in config, f"{source} has a {found}, which has no betas: not supported")
    require(cfg.method != "rlcm" or "LCM" in found, f"{source} has a {found}: rlcm needs an LCMScheduler")
    require(config.get("prediction_type") == "epsilon", f"{source} does not predict epsilon: not supported")
    require(not config.get("rescale_betas_zero_snr"), f"{source} has zero terminal SNR: not supported")
    require(not pipe.vae.config.get("latents_mean"), f"{source} has a VAE that shifts latents: not supported")
    require(cfg.pixels % unit == 0, f"--pixels {cfg.pixels}: {source} draws multiples of {unit}")
    if cfg.method != "rlcm":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_predictor(pipe, network, cfg):
    """eps(x, t, c) of a network, guided as its pipeline guides; in float32."""
    dtype, dim = pipe.text_encoder.dtype, pipe.unet.config.time_cond_proj_dim
    half = dict(device_type=pipe.device.type, dtype=torch.bfloat16, enabled=cfg.precision == "bf16")
    if dim:  # an LCM takes the guidance scale, less one, as an input (LCM, section 4.2)
        w = pipe.get_guidance_scale_embedding(torch.tensor([cfg.guidance - 1.0]), dim).to(pipe.device, dtype)

    def eps(x, t, c):
        condition = w.expand(len(x), -1) if dim else None
        with torch.autocast(**half):
            out = network(x.to(dtype), t, encoder_hidden_states=c, timestep_cond=condition).sample
        return out.float()

    def guided(x, t, c):  # classifier-free guidance, both halves in one pass
        e_0, e_c = eps(torch.cat([x, x]), t, torch.cat([empty.expand_as(c), c])).chunk(2)
        return e_0 + cfg.guidance * (e_c - e_0)

    if dim or cfg.guidance <= 1:
        return eps
    empty = encode(pipe, [""])
    return guided


@torch.no_grad()
def encode(pipe, prompts):
    """B strings -> (B, L, E)."""
    return pipe.encode_prompt(prompts, pipe.device, 1, False)[0]  # once each, without guidance


def decode(pipe, x):
    """Clean latents (B, C, h, w) -> pictures (B, 3, H, W) float32 in [0, 1]; with their gradient, if any."""
    x = (x / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    return (pipe.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)


def draw(model, cfg, prompts):
    """Pictures (B, 3, H, W) of prompts; the noise of picture i is that of torch.Generator().manual_seed(i).

    In float32 a plain diffusers pipeline with the same generators draws the same.
    """
    schedule, policy = METHODS[cfg.method]
    s, images = schedule(model.pipe.scheduler, cfg.steps), []
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    z = torch.stack([torch.randn(cfg.steps + 1, *model.shape, generator=g) for g in generators], 1)
    for i in progress(range(0, len(prompts), cfg.micro_batch), "drawing samples"):
        b = slice(i, i + cfg.micro_batch)
        x, _, _ = rollout(policy, model.eps, s, encode(model.pipe, prompts[b]), z[:, b].to(model.device))
        images.append(decode(model.pipe, x[-1]))
    return torch.cat(images)


# =================================================== FILES ==================================================
def write(path, data):
    """Text or bytes to a file, which is the old or the new one whenever the program is killed."""
    part = Path(f"{path}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


def save_pictures(run, epoch):
    """samples/epoch-0000.png: the same prompts and noise every time; reward.png: the curve, with one std."""
    prompts, m = (run.prompts * 16)[:16], run.cfg.micro_batch
    images = draw(run.model, run.cfg, prompts)
    r = torch.cat([run.reward(images[i : i + m], prompts[i : i + m]) for i in range(0, len(prompts), m)])
    captions = [f"{prompt}  {value:.2f}" for prompt, value in zip(prompts, r)]
    (run.out / "samples").mkdir(parents=True, exist_ok=epoch > 0)  # at 0: two runs never share a folder
    path = run.out / "samples" / f"epoch-{epoch:04d}.png"
    sample_grid(images, captions, path, f"epoch {epoch}: reward {r.mean():.3f}")
    if epoch:
        columns = "epoch", "reward_mean", "reward_std"
        epochs, mean, std = np.array([[row[name] for name in columns] for row in run.rows]).T
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        axis.plot(epochs, mean)
        axis.fill_between(epochs, mean - std, mean + std, alpha=0.2)
        axis.set(xlabel="epoch", ylabel=f"reward: {run.cfg.reward}")
        figure.savefig(run.out / "reward.png")


def sample_grid(images, captions, path, title="", columns=8):
    """Write pictures (B, 3, H, W) in rows of so many, captions (B strings) below them."""
    tile, line, font = max(128, images.shape[-1] // 2), 18, ImageFont.load_default(13)
    sheet = Image.new("RGB", (columns * tile, line + -(-len(images) // columns) * (tile + line)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 1), title, "black", font)
    for i, (picture, caption) in enumerate(zip(pictures(images), captions)):
        x, y = i % columns * tile, line + i // columns * (tile + line)
        sheet.paste(picture.resize((tile, tile), Image.LANCZOS), (x, y))
        pen.rectangle((x, y + tile, x + tile, y + tile + line), "white")  # over the last caption, if too long
        pen.text((x + 4, y + tile + 1), caption, "black", font)
    sheet.save(path)


def save_lora(pipe, out):
    """pytorch_lora_weights.safetensors, as diffusers has it, alpha included."""
    from peft.utils import get_peft_model_state_dict

    part, settings = "pytorch_lora_weights.safetensors.part", pipe.unet.peft_config["default"].to_dict()
    weights = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(out, weights, weight_name=part, unet_lora_adapter_metadata=settings)
    os.replace(out / part, out / part.removesuffix(".part"))


def load_checkpoint(cfg, model, optimizer):
    """Put a checkpoint's weights and optimizer state in place -> its rows and history. Raises BadInput."""
    try:  # tensors and plain data only
        state = torch.load(Path(cfg.out) / "checkpoint.pt", map_location="cpu", weights_only=True)
        rows, history, trained = state["rows"], state["history"], state["trained"]
        fits = {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in model.trained.items()}
        require(fits, "its weights are not those of this LoRA")
        model.pipe.unet.load_state_dict(trained, strict=False)  # all the others are as pretrained
        optimizer.load_state_dict(state["optimizer"])
    except Exception as e:
        raise BadInput(f"no checkpoint to go on with in {cfg.out} ({one_line(e)}): start a new run") from e
    require(len(rows) < cfg.epochs, f"{cfg.out} already has {len(rows)} epochs: give more --epochs to go on")
    return rows, history


def read_config(out):
    """config.json of a run's folder as a Config, checked. Raises BadInput."""
    try:
        cfg = Config(**json.loads((Path(out) / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise BadInput(f"{out} is not a run's folder of this version ({one_line(e)})") from e
    check(cfg)
    return cfg


# =============================================== COMMAND LINE ===============================================
def parse(argv):
    """The command line -> a Config, and whether to resume. Raises BadInput."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.error = lambda message: require(False, f"{message} (--help lists the flags)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run; only --epochs may change")
    parser.set_defaults(model=None)
    first = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    defaults = asdict(Config(**preset(first.method, first.model)))
    if first.resume:
        defaults = asdict(read_config(first.resume)) | {"out": first.resume}
    parser.set_defaults(**defaults)  # so that --help shows the values that would be used
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    changed = [name for name in given if given[name] != defaults[name] and name != "epochs"]
    require(not (resume and changed), f"with --resume only --epochs may change, not {' '.join(changed)}")
    return Config(**given), bool(resume)


def quiet():
    """Libraries print errors only, and show a bar for a download but none for loading."""
    import diffusers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    enable_progress_bars()


def main(argv=None):
    """The program -> exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        cfg, resume = parse(sys.argv[1:] if argv is None else argv)
        quiet()
        say(f"{cfg.method} on {cfg.model}" + " (no CUDA GPU here)" * (not torch.cuda.is_available()))
        train(cfg, resume)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; --resume with the run's folder goes on after its last epoch"
    except torch.OutOfMemoryError as e:
        status, message = 2, f"out of GPU memory: lower --micro-batch, add --gradient-checkpointing ({e})"
    except (BadInput, OSError, SafetensorError) as e:  # the last two: a full disk, a folder not to be written
        status, message = 2, e
    print(f"rlcm.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
