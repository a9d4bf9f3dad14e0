"""The method part of rlcm.py in somebody else's research: no pictures, no text, no diffusers, no Accelerate.

    python examples/points.py            # some seconds on one core; prints the mean reward as it rises

The data are points in the plane, six Gaussians on a circle. A small consistency model learns to draw them in
four steps. Then it is rewarded for points near a corner that is off the circle, and pays for every nat of KL
to the model that it was: its points gather where the data come nearest to the corner. Yours are eps(x, t, c),
which is the noise in x (B, C, h, w), at a scalar t; a schedule; a reward.
"""
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from rlcm import advantages, gaussian_kl, log_prob, path_kl, policy_loss, rlcm_policy, rollout

H, B, D = 4, 256, 2  # steps, points of an epoch, numbers of a state
ANGLES = torch.arange(6) * torch.pi / 3 + torch.pi / 4
CENTRES, WIDTH = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.1  # (6, 2)
CORNER = torch.tensor([2.0, 2.0])


def schedule(t):
    """Constants of the steps at falling times t (H,): at pi/2 there is noise alone, at 0 the data."""
    ab = torch.cat([t.cos() ** 2, torch.ones(1)])  # (H+1,), share of the data in the variance of x_k
    s = SimpleNamespace(t=t, ab=ab, std=(1 - ab[1:]).sqrt(), actions=range(len(t) - 1))
    s.c_skip, s.c_out = torch.zeros_like(t), torch.ones_like(t)  # f = c_skip x + c_out x0
    return s


class Network(torch.nn.Module):
    """Guesses the clean point: x (n, 2), t (n,) -> (n, 2)."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(64, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.cos()[:, None], t.sin()[:, None]], 1))

    def eps(self, x, t, c):  # the same as rlcm.py wants it: x (n, 2, 1, 1), t ()
        x0 = self(x.flatten(1), t.expand(len(x))).view_as(x)
        return (x - t.cos() * x0) / t.sin()


def pretrain(steps=2000):
    """A consistency model: from anywhere on a path of the probability-flow ODE it guesses the path's end."""
    s, x, paths = schedule(torch.linspace(1.55, 0.05, 32)), torch.randn(4096, 2), []
    for ab, ab_next in zip(s.ab[:-1], s.ab[1:]):  # DDIM, eta = 0, with the exact score of the mixture
        paths.append(x)
        variance = ab * WIDTH**2 + 1 - ab
        offsets = x[:, None] - ab.sqrt() * CENTRES  # (n, 6, 2)
        share = (-(offsets**2).sum(2) / (2 * variance)).softmax(1)  # of each Gaussian at x
        noise = (1 - ab).sqrt() * (share[:, :, None] * offsets).sum(1) / variance
        x = ab_next.sqrt() * (x - (1 - ab).sqrt() * noise) / ab.sqrt() + (1 - ab_next).sqrt() * noise
    network, paths = Network(), torch.stack(paths)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        k, i = torch.randint(len(s.t), (512,)), torch.randint(len(x), (512,))
        (network(paths[k, i], s.t[k]) - x[i]).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


def learn(network, kl_weight=0.3, epochs=40):
    """Reinforce points near the corner -> mean reward of each epoch."""
    s, c, pre = schedule(torch.linspace(1.55, 0.3, H)), torch.zeros(B, 0), copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    prompts, history, curve = ["any"] * B, {}, []
    for epoch in range(1, epochs + 1):
        x, mean, log_p_old = rollout(rlcm_policy, network.eps, s, c, torch.randn(H + 1, B, D, 1, 1))
        r = -(x[-1].flatten(1) - CORNER).norm(dim=1)
        mean_pre, kl = path_kl(rlcm_policy, pre.eps, s, c, x, mean)
        A = advantages(r, prompts, history, size=B, min_count=B, clip=5)
        to_come = kl.sum(0) - kl.cumsum(0)  # (H, B), the KL after each action
        A = A - kl_weight * (to_come - to_come.mean(1, keepdim=True))
        for k in s.actions:
            mean_k, std = rlcm_policy(network.eps, x[k], k, c, s)
            log_p = log_prob(x[k + 1], mean_k, std)  # averaged over D: PPO's usual 0.2 is 0.2 / D here
            loss, ratio = policy_loss(log_p, log_p_old[k], A[k], clip_range=0.2 / D)
            loss = loss + kl_weight * gaussian_kl(mean_k, mean_pre[k], std) / D
            loss.mean().backward()
            assert (ratio == 1).all()  # the first thing to check in code of your own
        optimizer.step()
        optimizer.zero_grad()
        curve.append(r.mean().item())
        if epoch % 5 == 0 or epoch == 1:
            print(f"epoch {epoch:3d}   mean reward {curve[-1]:.3f}   KL {kl.sum(0).mean():.2f} nats")
    return curve


if __name__ == "__main__":
    torch.manual_seed(0)
    learn(pretrain())
