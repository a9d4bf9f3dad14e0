"""The training loop at its shortest: points in the plane, a small network and the METHOD part of rlcm.py.

    python examples/points.py            # a few seconds on one core; prints the mean reward as it rises

A consistency model draws the points of a circle in four steps. It is rewarded for points far to the right
and pays for each nat of KL from the pretrained model. To train a network of your own, copy `learn` and bring
a schedule, a reward, and denoise(x, k, c, s), the clean x that your network predicts from x (B, C, h, w) at
step k.
"""
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlcm import advantages, gaussian_kl, log_prob, make_schedule, path_kl, policy, policy_loss, rollout

H = 4  # steps
B = 256  # points per epoch
D = 2  # elements of a point, which is a latent with two channels and one pixel
KL = 0.3  # lambda, --kl of rlcm.py


def learn(network, epochs=25):
    """Fine-tune the network on the reward. Returns the mean reward of each epoch."""
    ref = copy.deepcopy(network)
    s = schedule(torch.linspace(1.55, 0.3, H))
    c = None  # there are no prompts to encode
    prompts = ["any"] * B
    history = {}
    curve = []
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(1, epochs + 1):
        # 1. Rollout. The reward is the first coordinate of the point.
        z = torch.randn(H + 1, B, D, 1, 1)
        x, means, log_p_old = rollout(network.denoise, s, c, z)
        r = x[-1][:, 0, 0, 0]
        mean_ref, kl = path_kl(ref.denoise, s, c, x, means)

        # 2. Advantage: was the point better than usual? Minus lambda times the KL-to-go.
        A = advantages(r, prompts, history, buffer_size=B, min_count=B, adv_clip=5)
        kl_to_go = kl.sum(1, keepdim=True) - kl.cumsum(1)
        A_k = A[:, None] - KL * (kl_to_go - kl_to_go.mean(0))  # (B, H)

        # 3. Policy gradient. The log-prob is averaged over D, so PPO's usual 0.2 is divided by D.
        for k in s.actions:
            mean, std = policy(network.denoise, x[k], k, c, s)
            log_p = log_prob(x[k + 1], mean, std)
            loss, ratio = policy_loss(log_p, log_p_old[k], A_k[:, k], "ppo", clip_range=0.2 / D)
            loss = loss + KL * gaussian_kl(mean, mean_ref[k], std) / D
            loss.mean().backward()
            assert (ratio == 1).all()  # the first thing to check in your own code
        optimizer.step()
        optimizer.zero_grad()
        curve.append(r.mean().item())
        print(f"epoch {epoch:3d}   mean reward {curve[-1]:.3f}   KL {kl.sum(1).mean():.2f} nats")
    return curve


def schedule(t):
    """The schedule with falling times t (H,). A point is cos(t) x_0 + sin(t) z: pure noise at pi / 2."""
    t_next = torch.cat([t[1:], torch.zeros(1)])
    return make_schedule(t, (t.cos(), t.sin()), (t_next.cos(), t_next.sin()), new=torch.ones(H))


class Network(nn.Sequential):
    """Layers that shift a point before it is projected onto the circle, which gives the predicted data point.

    Without a shift that is x / |x|, the exact consistency model of a circle: its probability-flow ODE moves a
    point along the radius.
    """

    def denoise(self, x, k, c, s):
        time = s.t[k].expand(len(x), 1)
        shift = self(torch.cat([x.flatten(1), time], 1)).view_as(x)
        return nn.functional.normalize(x + shift)


def pretrained():
    network = Network(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


if __name__ == "__main__":
    torch.manual_seed(0)
    learn(pretrained())
