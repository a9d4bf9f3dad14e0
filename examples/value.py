"""Scores as Actions with a value function: the reward of the image that is predicted at each step.

    python examples/value.py               # a minute on one core: images before and after, a LoRA

At x_k, before the action is drawn, the network predicts a clean latent, and the reward g_k of its image says
much about the final reward. A prediction V of A from g_k is subtracted from A:

    A_k = (r - mean r) / std r - V(x_k),    V(x_k) = a_k + b_k (g_k - mean r) / std r

with a_k and b_k fitted by least squares. V depends on the state alone, so the gradient keeps its mean, up to
O(1/B) as V is fitted to the batch. Least squares makes A_k small, which usually lowers the gradient's
variance. It costs a decoding and a reward per step.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rlcm

SETTINGS = rlcm.preset("score") | {"epochs": 6}


def value(A, g, r, prompts, history, min_count):
    """V (H, B) for A (B,), r (B,) and g (H, B). It standardises g with r's statistics from `advantages`."""
    V = torch.zeros_like(g)
    for n, prompt in enumerate(prompts):
        enough = len(history[prompt]) >= min_count
        seen = torch.tensor(history[prompt]) if enough else r
        std = seen.std(correction=0)
        if std > 1e-6 * seen.abs().max():
            V[:, n] = (g[:, n] - seen.mean()) / std
    V = V - V.mean(1, keepdim=True)
    b = (A * V).sum(1) / (V**2).sum(1).clamp(min=1e-6)  # (H,)
    return A.mean() + b[:, None] * V


def train(cfg):
    """Fine-tune with `cfg`. Returns the mean reward over one image per prompt, before and after."""
    out = Path(cfg.out)
    out.mkdir(parents=True)
    model = rlcm.load_model(cfg, "cuda" if torch.cuda.is_available() else "cpu")
    prompts = rlcm.get_prompts(cfg.prompts)
    reward = rlcm.get_reward(cfg.reward, cfg.model)
    s = model.schedule(cfg.steps)
    optimizer = torch.optim.Adam(model.trainable.values(), cfg.lr)
    history = {}
    micro_batches = [SimpleNamespace(i=i) for i in torch.arange(cfg.batch_size).split(cfg.micro_batch)]
    before = rlcm.generate(model, cfg, prompts)
    for epoch in range(1, cfg.epochs + 1):
        generator = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        batch = [prompts[n] for n in torch.randint(len(prompts), (cfg.batch_size,), generator=generator)]
        z = torch.randn(cfg.steps + 1, cfg.batch_size, *model.shape, generator=generator).to(model.device)

        # 1. Rollout. The reward is given to the finished images and to those predicted at each step.
        r = torch.zeros(cfg.batch_size)
        g = torch.zeros(cfg.steps, cfg.batch_size)
        for micro in micro_batches:
            own = [batch[n] for n in micro.i]
            micro.c = model.encode(own)
            pred_x0 = []

            def denoise(x, k, c, s):
                pred_x0.append(model.denoise(x, k, c, s))
                return pred_x0[k]

            micro.x, _, _ = rlcm.rollout(denoise, s, micro.c, z[:, micro.i])
            r[micro.i] = reward(model.decode(micro.x[-1]), own)
            for k in s.actions:
                g[k, micro.i] = reward(model.decode(pred_x0[k]), own)

        # 2. Advantage, minus the value.
        A = rlcm.advantages(r, batch, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
        A_k = A - value(A, g, r, batch, history, cfg.min_count)  # (H, B)
        left = A_k[s.actions].var() / A.var()

        # 3. Policy gradient. With one optimizer step per rollout, PPO's is REINFORCE's.
        for k in s.actions:
            for micro in micro_batches:
                mean, std = rlcm.policy(model.denoise, micro.x[k], k, micro.c, s)
                loss = -A_k[k, micro.i].to(model.device) * rlcm.log_prob(micro.x[k + 1], mean, std)
                (loss.sum() / (len(s.actions) * cfg.batch_size)).backward()
        torch.nn.utils.clip_grad_norm_(model.trainable.values(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch:3d}   reward {r.mean():.3f}   variance that V leaves {left:.2f}", flush=True)

    model.save(out)
    after = rlcm.generate(model, cfg, prompts)
    images = torch.cat([before[:8], after[:8]])  # the lower half: after
    rlcm.sample_grid(images, prompts[:8] * 2, len(images) // 2).save(out / "samples.png")
    rewards = [reward(images, prompts).mean().item() for images in (before, after)]
    print(f"reward {rewards[0]:.3f} -> {rewards[1]:.3f}; images and LoRA: {out}")
    return rewards


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=SETTINGS["epochs"])
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs/value", help="a new folder")
    p.add_argument("--model", default="tiny", help="for a model other than tiny, also edit SETTINGS")
    rlcm.quiet()
    train(rlcm.Config(**SETTINGS | vars(p.parse_args())))
