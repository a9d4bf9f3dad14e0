"""Back-propagate a differentiable reward through the last step: DRaFT-1 (arXiv 2309.17400).

    python examples/differentiable.py               # half a minute with the reward clip; writes a LoRA
    python examples/differentiable.py --hybrid --out runs/hybrid      # adds RLCM's policy gradient

A consistency model's last step adds no noise, x_H = f(x_{H-1}), so it is not an action and is left out of
RLCM's gradient. Where the reward has a gradient, the last step can be trained, too. In the steps before it,
x_{k+1} ~ p_theta(x_{k+1} | x_k), hence

    J(theta) = E[ r(decode(f_theta(x_{H-1}))) ]
    grad J   = E[ grad r(decode(f_theta(x_{H-1}))) + sum_{k<H-1} A grad log p_theta(x_{k+1} | x_k) ]

The first term holds x_{H-1} fixed: it is one backward pass through reward, decoder and network, without the
noise of a policy gradient. Alone it is DRaFT-1. The second term is RLCM's. With --hybrid both are used, and
their sum is the whole gradient of J (RTDMD, arXiv 2605.26108, uses both, too).

Rewards with a gradient: clip, pickscore, aesthetic, and your own if it is made of torch functions.
"""
import argparse
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rlcm
from rlcm import policy

SETTINGS = dict(reward="clip", epochs=12, lr=1.2e-3)  # the rest is Config's: rlcm on tiny


def train(cfg, hybrid=False):
    """Fine-tune with `cfg`. Returns the mean reward over one image per prompt, before and after."""
    out = Path(cfg.out)
    out.mkdir(parents=True)
    model = rlcm.load_model(cfg, "cuda" if torch.cuda.is_available() else "cpu")
    prompts = rlcm.get_prompts(cfg.prompts)
    rlcm.rewards.DTYPE.clear()  # reward models in float32 on a GPU, too: gradients underflow in float16
    reward = rlcm.get_reward(cfg.reward, cfg.model)
    s = model.schedule(cfg.steps)
    noisy = copy.copy(s)
    noisy.t = s.t[:-1]  # a rollout that ends at x_{H-1}
    optimizer = torch.optim.Adam(model.trainable.values(), cfg.lr)
    history = {}
    micro_batches = [SimpleNamespace(i=i) for i in torch.arange(cfg.batch_size).split(cfg.micro_batch)]
    before = rlcm.generate(model, cfg, prompts)
    for epoch in range(1, cfg.epochs + 1):
        generator = torch.Generator().manual_seed((cfg.seed + 1) * 1_000_003 + epoch)
        batch = [prompts[n] for n in torch.randint(len(prompts), (cfg.batch_size,), generator=generator)]
        z = torch.randn(cfg.steps, cfg.batch_size, *model.shape, generator=generator).to(model.device)

        # 1. Rollout to x_{H-1}. First term: the last step, decoder and reward, with their gradient.
        r = torch.zeros(cfg.batch_size)
        for micro in micro_batches:
            own = [batch[n] for n in micro.i]
            micro.c = model.encode(own)
            micro.x, _, _ = rlcm.rollout(model.denoise, noisy, micro.c, z[:, micro.i])
            f, _ = policy(model.denoise, micro.x[-1], cfg.steps - 1, micro.c, s)
            own_r = reward(model.decode(f), own)
            rlcm.require(own_r.requires_grad, f"the reward {cfg.reward} has no gradient: rlcm.py needs none")
            (-own_r.sum() / cfg.batch_size).backward()
            r[micro.i] = own_r.detach()

        # 2. Second term: the policy gradient.
        if hybrid:
            A = rlcm.advantages(r, batch, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)
            A = A * r.std()  # in units of r again
            A = A.to(model.device) * z[0, 0].numel()  # so the log-prob counts as a sum over the latent
            for k in s.actions:
                for micro in micro_batches:
                    mean, std = policy(model.denoise, micro.x[k], k, micro.c, s)
                    loss = -A[micro.i] * rlcm.log_prob(micro.x[k + 1], mean, std)
                    (loss.sum() / cfg.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.trainable.values(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch:3d}   reward {r.mean():.3f}", flush=True)

    model.save(out)
    after = rlcm.generate(model, cfg, prompts)
    images = torch.cat([before[:8], after[:8]])  # the lower half: after
    rlcm.sample_grid(images, prompts[:8] * 2, len(images) // 2).save(out / "samples.png")
    rewards = [reward(images, prompts).mean().item() for images in (before, after)]
    print(f"reward {rewards[0]:.3f} -> {rewards[1]:.3f}; images and LoRA: {out}")
    return rewards


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hybrid", action="store_true", help="add the policy gradient of the noisy steps")
    p.add_argument("--epochs", type=int, default=SETTINGS["epochs"])
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--reward", default=SETTINGS["reward"], help="one with a gradient")
    p.add_argument("--prompts", default="animals", help="as --prompts of rlcm.py")
    p.add_argument("--out", default="runs/differentiable", help="a new folder")
    p.add_argument("--model", default="tiny", help="for a model other than tiny, also edit SETTINGS")
    args = vars(p.parse_args())
    rlcm.quiet()
    hybrid = args.pop("hybrid")
    train(rlcm.Config(**SETTINGS | args), hybrid)
