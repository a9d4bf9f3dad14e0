"""RLCM with one action, the last: noise on the clean latent, scored against its antithetic sample.

    python examples/last_noise.py             # half a minute on one core: pictures before and after, a LoRA
    python examples/last_noise.py --seed 1 --out runs/last-noise-1

A consistency model's last evaluation adds no noise, and rlcm.py trains the H - 1 steps before it. Here it
does add some, 0.3 z on the clean latent, and is the only action. Nothing random follows, so a picture can be
compared with the one that -z would have made: R = (r - r_mirror) / 2. The pair shares everything else, so R
isolates the action. One step in H is trained: half the passes of the papers' actions, but two rewards.

It optimises the reward of pictures with this noise on them, through the last evaluation alone: what the LoRA
does to the steps before is not in the gradient. With one update per rollout R grad log p is unbiased: -z is
as likely as z and flips the sign of grad log p. With more, the surrogate E[ratio R] is (J(d) - J(-d)) / 2
for a change d of the mean, which has no curvature and cannot see that a step was too long. So there is one
update, and no KL penalty: R is standardised by its own std, so lambda would have other units than in
rlcm.py.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from rlcm import advantages, decode, log_prob, rlcm_policy, rlcm_schedule, rollout

SETTINGS = dict(epochs=18, lr=1.2e-3)  # and Config's: rlcm on tiny
NOISE = 0.3  # std on the clean latent, where pictures have about 1


def train(cfg):
    """Fine-tune as `cfg` says -> mean reward of pictures without the noise, before and after."""
    out = Path(cfg.out)
    out.mkdir(parents=True)
    model, prompts = rlcm.load_model(cfg), rlcm.get_prompts(cfg.prompts)
    reward = rlcm.get_reward(cfg.reward, cfg.model)
    s, k = rlcm_schedule(model.pipe.scheduler, cfg.steps), cfg.steps - 1
    s.std[k], s.actions = NOISE, [k]
    optimizer, history = torch.optim.Adam(model.trained.values(), cfg.lr), {}
    micro = [slice(i, i + cfg.micro_batch) for i in range(0, cfg.batch_size, cfg.micro_batch)]
    before = rlcm.draw(model, cfg, prompts)  # without the noise
    for epoch in range(1, cfg.epochs + 1):
        g = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        own = [prompts[i] for i in torch.randint(len(prompts), (cfg.batch_size,), generator=g)]
        z = torch.randn(cfg.steps + 1, cfg.batch_size, *model.shape, generator=g).to(model.device)
        c = rlcm.encode(model.pipe, own)

        # 1. rollout   2. reward of the pictures and of their mirror images
        parts = []
        for b in micro:
            x, mean, _ = rollout(rlcm_policy, model.eps, s, c[b], z[:, b])
            r = reward(decode(model.pipe, x[-1]), own[b])
            r_mirror = reward(decode(model.pipe, 2 * mean[k] - x[-1]), own[b])
            parts.append((x[k], x[-1], r, r_mirror))
        x, x_next, r, r_mirror = (torch.cat(part) for part in zip(*parts))

        # 3. advantage: how much better than the mirror image, in standard deviations
        A = advantages((r - r_mirror) / 2, own, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        A = A.to(model.device)

        # 4. policy gradient, one optimizer step: at ratio 1 PPO is this
        for b in micro:
            mean, std = rlcm_policy(model.eps, x[b], k, c[b], s)
            loss = -A[b] * log_prob(x_next[b], mean, std)
            (loss.sum() / cfg.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.trained.values(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch:3d}   reward with the noise {r.mean():.3f}", flush=True)
    rlcm.save_lora(model.pipe, out)
    both = before, rlcm.draw(model, cfg, prompts)
    rewards = [reward(images, prompts).mean().item() for images in both]
    rlcm.sample_grid(torch.cat([v[:8] for v in both]), prompts[:8] * 2, out / "samples.png", "below: tuned")
    print(f"reward without the noise {rewards[0]:.3f} -> {rewards[1]:.3f}; pictures and LoRA: {out}")
    return rewards


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--epochs", SETTINGS["epochs"]), ("--batch-size", 64), ("--seed", 0)):
        p.add_argument(name, type=int, default=default)
    p.add_argument("--out", default="runs/last-noise", help="a new folder")
    p.add_argument("--model", default="tiny", help="for another than tiny edit SETTINGS, too")
    rlcm.quiet()
    train(rlcm.Config(**SETTINGS | vars(p.parse_args())))
