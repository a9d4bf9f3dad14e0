"""The method part of rlcm.py in somebody else's research: no pictures, no text, no diffusers, no Accelerate.

    python bench/lifted.py            # some seconds on one core; prints the mean reward as it rises
    python bench/lifted.py --plot     # also without the KL; docs/lifted.png: points before and after, curves

The data are points in the plane, six Gaussians on a circle. A small consistency model learns to draw them in
four steps. Then it is rewarded for points near a corner, which is off the circle, and charged for leaving the
model that it was: its points gather where the data are nearest to the corner. Without the charge they go into
the corner. What each function that is lifted needs:

rlcm_policy(eps, x, k, c, s) -> mean and std of x_{k+1}
    Your network as eps(x, t, c), the noise that it sees in x. States x (B, C, h, w): a point is (B, 2, 1, 1).
    The number of the step k (B,). What you condition on, c (B, ...). The schedule s: see `schedule` below.
rollout(policy, eps, s, c, z) -> x (H+1, B, C, h, w), mean (H, B, C, h, w), log_p (H, B)
    Standard normal noise z (H+1, B, C, h, w).
path_kl(policy, eps_pre, s, c, x, mean) -> mean_pre like mean, kl (H, B), nats
    Only for the charge: the eps of the model you started with.
advantages(R, prompts, history, size, min_count, clip) -> A (B,), in standard deviations
    A reward is compared with the last `size` ones of its prompt, any hashable name, which `history` keeps, a
    dict of yours. Here all points have one prompt and are compared with their batch.
log_prob(x_next, mean, std) -> (B,)
    Averaged over the D numbers of a state.
policy_loss(log_p, log_p_old, A, algo, clip_range) -> loss and ratio of each action
    The log-prob is an average over D, so PPO's usual clip range of 0.2 is 0.2 / D here.
update(...) -> metrics, a dict
    All of these for a rollout, in optimizer steps. `backward` and `clip_grad_norm` are torch's unless given.
"""

import argparse
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from rlcm import advantages, log_prob, path_kl, policy_loss, rlcm_policy, rollout, update

H, B, D = 4, 256, 2  # steps, points of an epoch, numbers of a state
ANGLES = torch.arange(6) * torch.pi / 3 + torch.pi / 4
CENTRES, WIDTH = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.1  # (6, 2)
CORNER = torch.tensor([2.0, 2.0])


def schedule(t):
    """Constants of the steps, (H,) each, at falling times t: at pi/2 there is noise alone, at 0 the data."""
    ab = t.cos() ** 2  # share of the data in the variance of x_k
    ab_next = torch.cat([ab[1:], torch.ones(1)])  # of x_{k+1}: at the end 1
    s = SimpleNamespace(t=t, ab=ab, ab_next=ab_next, std=(1 - ab_next).sqrt())
    s.c_skip, s.c_out = torch.zeros_like(t), torch.ones_like(t)  # x_0 = c_skip x + c_out clean, in LCMs
    s.actions = torch.arange(len(t) - 1)  # the steps to reinforce: those with noise
    return s


class Network(torch.nn.Module):
    """Guesses the clean point: x (n, 2), t (n,) -> (n, 2)."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(64, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.cos()[:, None], t.sin()[:, None]], 1))

    def eps(self, x, t, c):
        """The same as rlcm.py wants it: the noise in x (n, 2, 1, 1)."""
        clean, t = self(x.flatten(1), t).view_as(x), t.view(-1, 1, 1, 1)
        return (x - t.cos() * clean) / t.sin()


def pretrain(steps=2000):
    """A consistency model: from anywhere on a path of the probability-flow ODE it guesses the path's end.

    No teacher is needed: the score of a mixture of Gaussians is known.
    """
    s, x, paths = schedule(torch.linspace(1.55, 0.05, 32)), torch.randn(4096, 2), []
    for ab, ab_next in zip(s.ab, s.ab_next):  # DDIM, eta = 0
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


def learn(network, kl_weight=0.3, epochs=30, say=print):
    """Reinforce points near the corner -> mean reward of each epoch."""
    s, c, before = schedule(torch.linspace(1.55, 0.3, H)), torch.zeros(B, 0), copy.deepcopy(network)
    prompts, history, curve = ["any"] * B, {}, []
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for epoch in range(epochs):
        x, mean, log_p = rollout(rlcm_policy, network.eps, s, c, torch.randn(H + 1, B, D, 1, 1))
        r = -(x[-1].flatten(1) - CORNER).norm(dim=1)  # (B,), any function of the samples
        mean_pre, kl = path_kl(rlcm_policy, before.eps, s, c, x, mean)
        A = advantages(r, prompts, history, size=B, min_count=B, clip=5)
        to_come = kl.sum(0) - kl.cumsum(0)  # (H, B), the KL after each action
        A = A - kl_weight * (to_come - to_come.mean(1, keepdim=True))
        if epoch == 0:  # the first thing to check in code of your own: scored again, the ratio is exactly 1
            mean_0, std = rlcm_policy(network.eps, x[0], torch.zeros(B, dtype=torch.long), c, s)
            _, ratio = policy_loss(log_prob(x[1], mean_0, std), log_p[0], A)
            assert (ratio == 1).all()
        update(
            rlcm_policy, network.eps, s, c, x, log_p, A, optimizer, micro_batch=B, updates=4,
            clip_range=0.2 / D, mean_pre=mean_pre, kl_weight=kl_weight,
        )  # fmt: skip
        curve.append(r.mean().item())
        if epoch % 5 == 4 or epoch == 0:
            say(f"epoch {epoch + 1:3d}   mean reward {curve[-1]:.3f}   KL {kl.sum(0).mean():.2f} nats")
    return curve


def draw(network, n=1000):
    """-> (n, 2)."""
    s, z = schedule(torch.linspace(1.55, 0.3, H)), torch.randn(H + 1, n, D, 1, 1)
    return rollout(rlcm_policy, network.eps, s, torch.zeros(n, 0), z)[0][-1].flatten(1)


def plot(points, curves, path):
    """Points (n, 2) and rewards by their names -> a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(points) + 4, 3), layout="constrained")
    *axes, last = figure.subplots(1, len(points) + 1)
    for axis, (name, xy) in zip(axes, points.items()):
        axis.scatter(*xy.T, s=2, color="C0")
        axis.scatter(*CORNER, marker="*", color="C1")
        axis.set(title=name, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    for name, rewards in curves.items():
        last.plot(rewards, label=name)
    last.set(xlabel="epoch", ylabel="minus distance to the star")
    last.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--plot", action="store_true", help="draw docs/lifted.png")
    args = p.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base = pretrain()
    tuned = copy.deepcopy(base)
    curve = learn(tuned)
    if args.plot:
        free = copy.deepcopy(base)
        points, curves = {"before": draw(base)}, {"lambda = 0.3": curve, "lambda = 0": learn(free, 0.0)}
        points |= {"lambda = 0.3": draw(tuned), "lambda = 0": draw(free)}
        path = Path(__file__).resolve().parent.parent / "docs" / "lifted.png"
        plot(points, curves, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
