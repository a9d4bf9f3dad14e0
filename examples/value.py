"""Scores as Actions with a value function: the reward of the picture predicted at each step.

    python examples/value.py               # a minute on one core: pictures before and after, a LoRA

At x_k, before the action is chosen, the network predicts a clean latent, and the reward g_k of its picture
predicts much of the final reward. Subtract that expected part from the advantage:

    A_k = (r - mean r) / std r - V(x_k),    V(x_k) = a_k + b_k (g_k - mean r) / std r

with a_k and b_k by least squares over the batch. V looks at the state alone, so that the gradient has less
variance and the same mean, up to O(1/B), as a_k and b_k know the batch. Cost: a decode and a reward per step.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from rlcm import advantages, decode, log_prob, policy_loss, rollout

SETTINGS = dict(method="score", steps=6, epochs=8, lr=5e-3, guidance=3.0, lora_rank=4, lora_alpha=4)


def predicted(x, mean, ab, ab_next):
    """The clean latent that the network saw in x when it gave this mean: (B, C, h, w) twice."""
    rho = ab / ab_next
    score = (mean * rho.sqrt() - x) / (1 - rho)  # score_policy solved for a; ddpo's mean is the same
    return (x + (1 - ab) * score) / ab.sqrt()  # Tweedie's formula


def standardised(g, r, prompts, history, min_count):
    """g (K, B) in the units of `advantages`, which has just put r (B,) into history -> (K, B)."""
    seen = [torch.tensor(history[p]) if len(history[p]) >= min_count else r for p in prompts]
    mean, std = (torch.stack(v) for v in zip(*[(v.mean(), v.std(correction=0)) for v in seen]))
    return torch.where(std > 1e-6 * mean.abs(), (g - mean) / std, 0.0)


def value(A, g):
    """a_k + b_k g_k nearest to A by least squares: A (B,), g (K, B) -> (K, B)."""
    g = g - g.mean(1, keepdim=True)
    b = (A * g).sum(1, keepdim=True) / (g**2).sum(1, keepdim=True).clamp(min=1e-6)
    return A.mean() + b * g


def train(cfg):
    """Fine-tune as `cfg` says -> mean reward of every prompt's picture, before and after."""
    out = Path(cfg.out)
    out.mkdir(parents=True)
    model, prompts = rlcm.load_model(cfg), rlcm.get_prompts(cfg.prompts)
    reward = rlcm.get_reward(cfg.reward, cfg.model)
    schedule, policy = rlcm.METHODS[cfg.method]
    s = schedule(model.pipe.scheduler, cfg.steps)
    optimizer, history = torch.optim.Adam(model.trained.values(), cfg.lr), {}
    micro = [slice(i, i + cfg.micro_batch) for i in range(0, cfg.batch_size, cfg.micro_batch)]
    before = rlcm.draw(model, cfg, prompts)
    for epoch in range(1, cfg.epochs + 1):
        noise = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        own = [prompts[i] for i in torch.randint(len(prompts), (cfg.batch_size,), generator=noise)]
        z = torch.randn(cfg.steps + 1, cfg.batch_size, *model.shape, generator=noise).to(model.device)
        c, parts = rlcm.encode(model.pipe, own), []
        for b in micro:  # 1. rollout   2. rewards, of the finished pictures and of those foreseen
            x, mean, log_p = rollout(policy, model.eps, s, c[b], z[:, b])
            x0 = [predicted(x[k], mean[k], s.ab[k], s.ab[k + 1]) for k in s.actions]
            r, *g = [reward(decode(model.pipe, latent), own[b]) for latent in (x[-1], *x0)]
            parts.append((x, log_p, r[None], torch.stack(g)))
        x, log_p_old, r, g = (torch.cat(part, 1) for part in zip(*parts))

        # 3. advantage, less the value
        A = advantages(r[0], own, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        V = value(A, standardised(g, r[0], own, history, cfg.min_count))
        left, A = (A - V).var() / A.var(), (A - V).to(model.device)

        # 4. policy gradient, one optimizer step
        for k in s.actions:
            for b in micro:
                mean, std = policy(model.eps, x[k, b], k, c[b], s)
                log_p = log_prob(x[k + 1, b], mean, std)
                loss, _ = policy_loss(log_p, log_p_old[k, b], A[k, b])
                (loss.sum() / A.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.trained.values(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch:3d}   reward {r.mean():.3f}   variance that V leaves {left:.2f}", flush=True)
    rlcm.save_lora(model.pipe, out)
    both = before, rlcm.draw(model, cfg, prompts)
    rewards = [reward(images, prompts).mean().item() for images in both]
    rlcm.sample_grid(torch.cat([v[:8] for v in both]), prompts[:8] * 2, out / "samples.png", "below: tuned")
    print(f"reward {rewards[0]:.3f} -> {rewards[1]:.3f}; pictures and LoRA: {out}")
    return rewards


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--epochs", SETTINGS["epochs"]), ("--batch-size", 64), ("--seed", 0)):
        p.add_argument(name, type=int, default=default)
    p.add_argument("--out", default="runs/value", help="a new folder")
    p.add_argument("--model", default="tiny", help="for another than tiny edit SETTINGS, too")
    rlcm.quiet()
    train(rlcm.Config(**SETTINGS | vars(p.parse_args())))
