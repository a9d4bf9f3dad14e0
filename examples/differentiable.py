"""Back-propagate a differentiable reward through the last evaluation, DRaFT-1 (arXiv 2309.17400).

    python examples/differentiable.py               # reward clip, twenty seconds: a LoRA
    python examples/differentiable.py --hybrid --out runs/hybrid      # adds RLCM's policy gradient

A consistency model's last evaluation adds no noise, x_H = f(x_{H-1}). It is no action, so RLCM's gradient
leaves it out. Where the reward has a gradient it need not: with x_{k+1} ~ p_theta(x_{k+1} | x_k) before it,

    J(theta) = E[ r(decode(f_theta(x_{H-1}))) ]
    grad J   = E[ grad r(decode(f_theta(x_{H-1}))) + sum_{k<H-1} A grad log p_theta(x_{k+1} | x_k) ]

The first term holds x_{H-1} fixed: one backward pass through reward, decoder and network, and no noise of a
policy gradient. Alone it is DRaFT-1. The second is RLCM's; with --hybrid the sum is the whole gradient of J
(RTDMD, arXiv 2605.26108, also uses both).

Rewards with a gradient: clip, pickscore, aesthetic, and your own if it is made of torch functions.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from rlcm import advantages, decode, log_prob, rlcm_policy, rlcm_schedule, rollout

SETTINGS = dict(reward="clip", epochs=12, lr=1.2e-3)  # and Config's: rlcm on tiny


def train(cfg, hybrid=False):
    """Fine-tune as `cfg` says -> mean reward of every prompt's picture, before and after."""
    out = Path(cfg.out)
    out.mkdir(parents=True)
    model, prompts = rlcm.load_model(cfg), rlcm.get_prompts(cfg.prompts)
    rlcm.rewards.DTYPE.clear()  # reward models in float32 on a GPU, too: gradients underflow in float16
    reward = rlcm.get_reward(cfg.reward, cfg.model)
    s = rlcm_schedule(model.pipe.scheduler, cfg.steps)
    noisy = SimpleNamespace(**vars(s) | {"std": s.std[:-1]})  # all steps but the last
    optimizer, history = torch.optim.Adam(model.trained.values(), cfg.lr), {}
    micro = [slice(i, i + cfg.micro_batch) for i in range(0, cfg.batch_size, cfg.micro_batch)]
    before = rlcm.draw(model, cfg, prompts)
    for epoch in range(1, cfg.epochs + 1):
        g = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        own = [prompts[i] for i in torch.randint(len(prompts), (cfg.batch_size,), generator=g)]
        z = torch.randn(cfg.steps, cfg.batch_size, *model.shape, generator=g).to(model.device)
        c, parts = rlcm.encode(model.pipe, own), []

        # 1. rollout, up to x_{H-1}   2. first term: last evaluation, decoder and reward with their gradient
        for b in micro:
            x, _, _ = rollout(rlcm_policy, model.eps, noisy, c[b], z[:, b])
            f, _ = rlcm_policy(model.eps, x[-1], cfg.steps - 1, c[b], s)
            r = reward(decode(model.pipe, f), own[b])
            rlcm.require(r.requires_grad, f"the reward {cfg.reward} has no gradient: rlcm.py needs none")
            (-r.sum() / cfg.batch_size).backward()
            parts.append((x, r.detach()[None]))
        x, r = (torch.cat(part, 1) for part in zip(*parts))

        # 3. second term: policy gradient; A in units of r again, log-prob summed over the latent
        if hybrid:
            A = advantages(r[0], own, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip) * r.std()
            A = A.to(model.device) * x[0, 0].numel()
            for k in s.actions:
                for b in micro:
                    mean, std = rlcm_policy(model.eps, x[k, b], k, c[b], s)
                    loss = -A[b] * log_prob(x[k + 1, b], mean, std)
                    (loss.sum() / cfg.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.trained.values(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch:3d}   reward {r.mean():.3f}", flush=True)
    rlcm.save_lora(model.pipe, out)
    both = before, rlcm.draw(model, cfg, prompts)
    rewards = [reward(images, prompts).mean().item() for images in both]
    rlcm.sample_grid(torch.cat([v[:8] for v in both]), prompts[:8] * 2, out / "samples.png", "below: tuned")
    print(f"reward {rewards[0]:.3f} -> {rewards[1]:.3f}; pictures and LoRA: {out}")
    return rewards


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hybrid", action="store_true", help="add the policy gradient of the noisy steps")
    for name, default in (("--epochs", SETTINGS["epochs"]), ("--batch-size", 64), ("--seed", 0)):
        p.add_argument(name, type=int, default=default)
    p.add_argument("--reward", default=SETTINGS["reward"], help="one with a gradient")
    p.add_argument("--prompts", default="animals", help="as --prompts of rlcm.py")
    p.add_argument("--out", default="runs/differentiable", help="a new folder")
    p.add_argument("--model", default="tiny", help="for another than tiny edit SETTINGS, too")
    args = vars(p.parse_args())
    rlcm.quiet()
    hybrid = args.pop("hybrid")
    train(rlcm.Config(**SETTINGS | args), hybrid)
