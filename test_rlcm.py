"""Tests of rlcm.py, then rewards.py, bench/ and examples/, against independent computations.

    python -m pytest -q -n 2 --dist worksteal test_rlcm.py     # two processes of one thread each
"""
import os

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import accelerate
import accelerate.state
import diffusers
import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import rewards
import rlcm
from bench import compare, evaluate, plot, sample
from rewards import BadInput
from rlcm import METHODS, Config, advantages, gaussian_kl, log_prob, path_kl, policy_loss, preset, rollout
from tiny import make_tiny

HERE = Path(rlcm.__file__).resolve().parent
torch.set_num_threads(1)
rlcm.quiet()


@pytest.fixture(autouse=True)
def own_seed():
    torch.manual_seed(0)


def scheduler_of(method):
    """That of the embedded model: rlcm's and tiny/sd's DDIM end without noise."""
    kind, folder = (LCMScheduler, "lcm") if method == "rlcm" else (DDIMScheduler, "sd")
    return kind.from_pretrained(HERE / "tiny" / folder / "scheduler")


# ------------------------------------------------------------------------------------ kernels and schedules
def wave(x, t, c):
    """An arbitrary network."""
    return torch.tanh(x * 1.3 + t / 500 - 1) + c


SPACED = dict(timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True)
STEPS = [  # method, steps, what differs in the embedded model's scheduler, actions
    ("rlcm", 1, {}, 0),
    ("rlcm", 50, {}, 49),
    ("rlcm", 4, dict(timestep_scaling=0.002), 3),  # f_theta is far from the clean latent
    ("ddpo", 7, SPACED, 6),
    ("ddpo", 7, SPACED | dict(set_alpha_to_one=False), 6),  # the last timestep is 0, with the final alpha
    ("ddpo", 10, SPACED | dict(set_alpha_to_one=False, steps_offset=1), 10),  # Stable Diffusion's own
]


@pytest.mark.parametrize("method, steps, options, actions", STEPS)
def test_steps_equal_diffusers(method, steps, options, actions):
    """A whole trajectory with the same noise through LCMScheduler, or DDIMScheduler with eta 1."""
    (schedule, policy), scheduler = METHODS[method], scheduler_of(method)
    scheduler = scheduler.from_config(scheduler.config, **options)
    s, x, c = schedule(scheduler, steps), torch.randn(3, 12, 8, 8), torch.randn(3, 1, 1, 1)
    scheduler.set_timesteps(steps)
    assert s.t.tolist() == scheduler.timesteps.tolist() and s.ab.shape == (steps + 1,)
    assert ((s.std > 0) == (torch.arange(steps) < actions)).all() and list(s.actions) == list(range(actions))
    for k, t in enumerate(scheduler.timesteps):
        noise, same = (torch.Generator().manual_seed(k) for _ in range(2))
        eta = dict(eta=1.0) if method == "ddpo" else {}
        theirs = scheduler.step(wave(x, t, c), t, x, generator=noise, **eta)
        mean, std = policy(wave, x, k, c, s)
        x = mean + std * torch.randn(x.shape, generator=same)
        assert_close(x, theirs.prev_sample, rtol=1e-4, atol=1e-5)


def test_score_schedule_is_the_vp_sde_of_the_models_betas():
    """dX = -1/2 beta X dt + sqrt(beta) dB has ab(t) = exp(-integral): by quadrature over the betas.

    std is that of the bridge from the noised picture to the picture itself (DDPM, eq. 7).
    """
    scheduler = scheduler_of("score")
    s = rlcm.score_schedule(scheduler, 12)
    rate = -np.log(1 - scheduler.betas.double().numpy())  # beta(t) on [j - 1, j]
    t = s.t.double().tolist() + [0.0]

    def integral(t):
        points = np.linspace(1e-9, t, 20_001)
        return np.trapezoid(rate[np.ceil(points).astype(int).clip(max=999)], dx=t / 20_000) + rate[0]

    for k in (0, 5, 11):
        later, sooner = integral(t[k]), integral(t[k + 1])
        assert -np.log(s.ab[k].item()) == pytest.approx(later, rel=1e-3)
        assert -np.log(s.ab[k + 1].item()) == pytest.approx(sooner, rel=1e-3)
        bridge = -np.expm1(-sooner) * -np.expm1(sooner - later) / -np.expm1(-later)
        assert s.std[k].item() ** 2 == pytest.approx(bridge, rel=5e-3)
    roots = (-s.ab[:-1].double().log() - rate[0]) ** (1 / 3)
    assert_close(roots.diff(), -roots[:1].expand(11) / 12, rtol=1e-3, atol=1e-4)
    assert (s.t.diff() < 0).all() and s.t[0] == 999 and list(s.actions) == list(range(12))


def test_score_steps_are_the_reverse_sde_and_ddpos_gaussian():
    """In small steps x + beta dt (x / 2 + a) with std^2 = beta dt, and a KL of 1/2 beta dt |a - a_pre|^2
    (Girsanov); in steps of any length DDIM's formula on the same schedule."""
    s = rlcm.score_schedule(scheduler_of("score"), 400)
    x, c = torch.randn(2, 4, 3, 4, 4)
    for k in (50, 200, 300):
        beta_dt = (s.ab[k + 1] / s.ab[k]).log()
        a, a_pre = (-wave(x, s.t[k], c) / (1 - s.ab[k]).sqrt() for c in (c, c + 0.1))
        mean, std = rlcm.score_policy(wave, x, k, c, s)
        mean_pre, _ = rlcm.score_policy(wave, x, k, c + 0.1, s)
        assert_close(mean, x + beta_dt * (x / 2 + a), atol=2e-3, rtol=0)
        assert_close(std**2, beta_dt, atol=0, rtol=0.1)
        girsanov = beta_dt / 2 * ((a - a_pre) ** 2).sum((1, 2, 3))
        assert_close(gaussian_kl(mean, mean_pre, std), girsanov, rtol=0.1, atol=0)
    s = rlcm.score_schedule(scheduler_of("score"), 6)
    for given in ((wave, x, k, c, s) for k in range(6)):
        assert_close(rlcm.score_policy(*given), rlcm.ddpo_policy(*given), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 6, 50])
@pytest.mark.parametrize("variance", [0.0, 1.0])
def test_a_score_step_of_any_length_is_exact(variance, steps):
    """With the score of N(0.3, variance): x_k ~ N(sqrt(ab) 0.3, V_k), V_k = ab variance + 1 - ab, goes over
    into x_{k+1}, and few steps end at the law of the data. The program's std is for variance 0; data of
    variance 1 need std^2 = 1 - ab / ab_next."""
    s = rlcm.score_schedule(scheduler_of("score"), steps)
    if variance:
        s.std = (1 - s.ab[:-1] / s.ab[1:]).sqrt()
    centre, V = s.ab.sqrt() * 0.3, s.ab * variance + 1 - s.ab
    reached = 0.0, 1.0  # mean and variance of the noise that sampling starts from
    for k in range(steps):
        points, factor = torch.stack([centre[k], centre[k] + 1]).view(2, 1, 1, 1), (1 - s.ab[k]).sqrt() / V[k]
        mean, std = rlcm.score_policy(lambda x, t, c: factor * (x - centre[k]), points, k, None, s)
        low, slope = mean[0].squeeze(), mean.diff(dim=0).squeeze()  # the kernel is linear
        assert_close(low, centre[k + 1], atol=1e-5, rtol=1e-3)
        assert_close(slope**2 * V[k] + std**2, V[k + 1], atol=1e-5, rtol=1e-3)
        reached = low + slope * (reached[0] - centre[k]), slope**2 * reached[1] + std**2
    assert_close(reached[0], torch.tensor(0.3), atol=0.025, rtol=0)
    assert_close(reached[1], V[-1], atol=1e-4, rtol=0.01)


def test_log_prob_and_kl_equal_torch_distributions():
    x, mean, other = torch.randn(3, 5, 4, 8, 8)
    for std in (torch.tensor(0.1), torch.tensor(1.7)):
        p, q = Normal(mean, std), Normal(other, std)
        assert_close(log_prob(x, mean, std), p.log_prob(x).mean((1, 2, 3)))
        assert_close(gaussian_kl(mean, other, std), kl_divergence(p, q).sum((1, 2, 3)))


@pytest.mark.parametrize("method, actions", [("rlcm", 4), ("ddpo", 4), ("score", 5)])
def test_a_rollout_has_the_log_prob_and_kl_of_its_steps(method, actions):
    """On the embedded models' schedules: rlcm's and tiny/sd's DDIM end without noise, which is no action."""
    schedule, policy = METHODS[method]
    s, z, c = schedule(scheduler_of(method), 5), torch.randn(6, 3, 2, 4, 4), torch.randn(3, 1, 1, 1)
    x, mean, log_p = rollout(policy, wave, s, c, z)
    _, kl = path_kl(policy, lambda x, t, c: wave(x, t, 0), s, c, x, mean)
    assert torch.equal(x[0], z[0]) and log_p.shape == kl.shape == (5, 3)
    assert not log_p[actions:].any() and not kl[actions:].any() and list(s.actions) == list(range(actions))
    assert_close(x[1:], mean + s.std.view(5, 1, 1, 1, 1) * z[1:])
    for k in range(actions):
        p, q = Normal(mean[k], s.std[k]), Normal(policy(wave, x[k], k, 0, s)[0], s.std[k])
        assert_close(log_p[k], p.log_prob(x[k + 1]).mean((1, 2, 3)))
        assert_close(kl[k], kl_divergence(p, q).sum((1, 2, 3)))


# ------------------------------------------------------------------------------------ the loop, on Gaussians
class Linear:
    """A model of data N(0, 1), whose noise is sqrt(1 - ab) x, for the loop of the program.

    In step k its score is off by -a_k x + b_k, which are trained; `pre` are those of the pretrained model.
    All kernels are linear, slope_k x + shift_k, and all laws Gaussian.
    """

    def __init__(self, method, steps, shape=(1, 1, 2), off=0.15):
        self.method, self.shape, self.device, self.passes = method, shape, "cpu", []
        self.s = METHODS[method][0](scheduler_of(method), steps)
        self.pre = off * torch.randn(2, steps)
        self.trained = {name: torch.nn.Parameter(off * torch.randn(steps)) for name in "ab"}
        self.now = self.trained.values()
        switches = dict(enable_adapters=lambda: setattr(self, "now", self.trained.values()))
        switches |= dict(disable_adapters=lambda: setattr(self, "now", self.pre))
        self.pipe = SimpleNamespace(unet=SimpleNamespace(**switches))

    def eps(self, x, t, c):
        self.passes.append(len(x))
        (a, b), k = self.now, (self.s.t == t).nonzero().item()
        return (1 - self.s.ab[k]).sqrt() * ((1 + a[k]) * x - b[k])

    def kernels(self, a, b):
        """(slope, shift, std) of every step, by the papers' formulas, in double precision."""
        for k, (u, v) in enumerate(zip(self.s.ab[:-1].double(), self.s.ab[1:].double())):
            eps = torch.stack([1 + a[k], -b[k]]) * (1 - u).sqrt()  # slope and shift
            x0 = (torch.tensor([1.0, 0.0]) - (1 - u).sqrt() * eps) / u.sqrt()
            rho, std = u / v, ((1 - v) / (1 - u) * (1 - u / v)).sqrt()  # DDIM, eq. 16
            if self.method == "rlcm":  # sqrt(ab') f; c_out is 1 and c_skip 0 but for 1e-7
                yield *v.sqrt() * x0, (1 - v).sqrt()
            elif self.method == "ddpo":  # DDIM, eq. 12
                yield *v.sqrt() * x0 + (1 - v - std**2).clamp(min=0).sqrt() * eps, std
            else:  # (x + (1 - rho) score) / sqrt(rho)
                yield (1 - (1 - rho) * (1 + a[k])) / rho.sqrt(), (1 - rho) / rho.sqrt() * b[k], std

    def laws(self, a, b):
        """Mean and variance of x_H, and the expected KL of the path; all of one number of the latent."""
        (mean, var, kl), pre = torch.tensor([0.0, 1.0, 0.0]).double(), [*self.kernels(*self.pre.double())]
        for k, (slope, shift, std) in enumerate(self.kernels(a, b)):
            if k in self.s.actions:
                p, q = slope - pre[k][0], shift - pre[k][1]
                kl = kl + (p**2 * (var + mean**2) + 2 * p * q * mean + q**2) / (2 * std**2)
            mean, var = slope * mean + shift, slope**2 * var + std**2
        return mean, var, kl

    def parameters(self):
        return [p.detach().double().requires_grad_() for p in self.trained.values()]


def quadratic(images):
    return (-((images - 2) ** 2) / 2).sum((1, 2, 3))


@pytest.fixture
def loop(monkeypatch):
    """Runs rlcm.optimize on a model -> of every epoch what `record` gets, x and c of its rollouts and the
    rewarded prompts; and the gradient of every optimizer step. Without an optimizer nothing moves."""

    def play(model, optimizer=None, prompts="a", reward=quadratic, **settings):
        seen, gradients = [SimpleNamespace(x=[], c=[], prompts=[])], []
        cfg = dict(method=getattr(model, "method", "rlcm"), steps=len(model.s.std), epochs=1, batch_size=12)
        cfg |= dict(buffer_size=1, min_count=1, adv_clip=1e9, max_grad_norm=1e9) | settings

        def spy(policy, eps, s, c, z):
            seen[-1].c.append(c)
            seen[-1].x.append((out := rollout(policy, eps, s, c, z))[0])
            return out

        def record(run, epoch, r, kl, stats, norms):
            vars(seen[-1]).update(r=r, kl=kl, stats=stats, norms=norms)
            seen.append(SimpleNamespace(x=[], c=[], prompts=[]))

        def terms(images, prompts):  # two parts
            seen[-1].prompts += prompts
            return torch.outer(torch.tensor([0.3, 0.7]), reward(images))

        def note(*_):
            gradients.append(torch.cat([p.grad.flatten() for p in model.trained.values()]).double())

        monkeypatch.setattr(rlcm, "record", record)
        monkeypatch.setattr(rlcm, "rollout", spy)
        if isinstance(model, Linear):
            monkeypatch.setattr(rlcm, "encode", lambda _, own: torch.tensor([*map(ord, own)]).view(-1, 1, 1))
            monkeypatch.setattr(rlcm, "decode", lambda _, x: x)
        optimizer = optimizer or torch.optim.SGD(model.trained.values(), 0.0)
        optimizer.register_step_pre_hook(note)
        rlcm.optimize(SimpleNamespace(
            cfg=rlcm.Config(**cfg), accelerator=accelerate.Accelerator(cpu=True), model=model, s=model.s,
            optimizer=optimizer, reward=SimpleNamespace(terms=terms), prompts=[*prompts], history={}, rows=[],
        ))  # fmt: skip
        return seen[:-1], torch.stack(gradients)

    return play


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("method, steps", [("rlcm", 4), ("ddpo", 5), ("score", 5)])
def test_the_gradient_is_that_of_the_objective(loop, method, steps, lam):
    """The mean of the loop's gradients against that of E[r] / std r - lambda sum_k E[KL_k] in closed form.

    The loss is a mean over actions and D = 2 numbers; a step that is no action learns nothing. REINFORCE has
    PPO's gradients, sample by sample."""
    m = Linear(method, steps)
    sizes = dict(batch_size=8192, micro_batch=8192, kl=lam)
    seen, found = loop(m, epochs=16, **sizes)
    assert_close(found[:1], loop(m, algo="reinforce", **sizes)[1], rtol=1e-3, atol=1e-4)
    found = -2 * len(m.s.actions) * found.view(16, 2, steps)
    mean, var, kl = m.laws(*(given := m.parameters()))
    std = (var**2 + 2 * (mean - 2) ** 2 * var).detach().sqrt()
    assert seen[0].r.sum(0).std().item() == pytest.approx(std.item(), rel=0.05)
    assert seen[0].kl.sum(0).mean().item() == pytest.approx(2 * kl.item() * (lam > 0), rel=0.05)
    objective = -((mean - 2) ** 2 + var) / std - lam * 2 * kl
    exact = torch.stack(torch.autograd.grad(objective, given))
    exact[:, len(m.s.actions) :] = 0
    error = found.std(0).norm() / 16**0.5
    assert error < 0.015 * exact.norm() and (found.mean(0) - exact).norm() < 3 * error


@pytest.mark.parametrize("updates, size, parts", [(1, 12, [12]), (1, 5, [5, 5, 2]), (2, 4, [4, 2, 4, 2])])
def test_each_action_is_weighed_by_its_own_advantage_and_kl(loop, updates, size, parts):
    """Every optimizer step has the gradient, by hand, of its share of the pictures, however they are cut;
    clipped to max_grad_norm, and `record` gets the norm before that."""
    m, lam, D, H = Linear("score", 4, (1, 2, 2)), 0.3, 4, 4
    options = dict(updates=updates, micro_batch=size, max_grad_norm=0.01, kl=lam)
    (seen,), found = loop(m, prompts="ab", **options)
    assert sorted(m.passes) == sorted(3 * H * parts) and not seen.stats[1:].any()  # the ratio is exactly 1
    x, c, given = torch.cat(seen.x, 1).double(), torch.cat(seen.c).flatten(), m.parameters()
    assert len(x[0].flatten(1).unique(dim=0)) == 12 and seen.prompts == [*map(chr, c)]
    p = [Normal(u * x[k] + v, std) for k, (u, v, std) in enumerate(m.kernels(*given))]
    q = [Normal(u * x[k] + v, std) for k, (u, v, std) in enumerate(m.kernels(*m.pre.double()))]
    log_p = torch.stack([p[k].log_prob(x[k + 1]).mean((1, 2, 3)) for k in range(H)])
    kl = torch.stack([kl_divergence(p[k], q[k]).sum((1, 2, 3)) for k in range(H)])
    assert_close(seen.kl.double(), kl.detach(), rtol=1e-3, atol=1e-5)
    r, A = quadratic(x[-1]), torch.zeros(12).double()
    for i in (c == ord("a"), c == ord("b")):
        A[i] = (r[i] - r[i].mean()) / r[i].std(correction=0)
    later = torch.stack([kl[k + 1 :].sum(0) for k in range(H)]).detach()
    loss = lam * kl / D - (A - lam * (later - later.mean(1, keepdim=True))) * log_p
    for share, gradient, norm in zip(loss.chunk(updates, 1), found, seen.norms, strict=True):
        exact = torch.cat(torch.autograd.grad(share.mean(), given, retain_graph=True))
        assert_close(gradient, exact * 0.01 / exact.norm(), rtol=1e-3, atol=1e-6)
        assert norm.item() == pytest.approx(exact.norm().item(), rel=1e-3) and norm > 0.02


def test_score_reaches_the_tilted_gaussian(loop):
    """r = -(x - 2)^2 / 2 with lambda, in stds of r, such that the optimum is p_pre(x) exp(r(x))."""
    m, epochs = Linear("score", 48, (1, 1, 1), off=0.0), 80
    _, var_pre, _ = m.laws(*m.parameters())  # p_pre is N(0, var_pre)
    var = 1 / (1 / var_pre + 1)
    mean = 2 * var
    lam = 1 / (var**2 / 2 + (mean - 2) ** 2 * var).sqrt().item()
    optimizer = torch.optim.Adam(m.trained.values(), 0.2, betas=(0.9, 0.99))
    slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 - i / epochs) ** 2)
    optimizer.register_step_post_hook(lambda *_: slower.step())
    loop(m, optimizer, epochs=epochs, kl=lam, batch_size=512, micro_batch=512)
    assert_close(torch.stack(m.laws(*m.parameters())[:2]), torch.stack([mean, var]), rtol=0.05, atol=0)


def test_the_ratio_is_exactly_one_before_the_first_step(loop):
    """With the embedded model, in micro-batches of 4 and 1. After a step it is not, and `record` sees it."""
    model = rlcm.load_model(rlcm.Config(**rlcm.preset("rlcm", "tiny")))
    model.s = rlcm.rlcm_schedule(model.pipe.scheduler, 3)
    for p in model.trained.values():
        p.data = 0.1 * torch.randn(p.shape)
    optimizer = torch.optim.SGD(model.trained.values(), 0.01)
    given = model, optimizer, ["a cat", "pizza"], lambda images: images.mean((1, 2, 3))
    (seen,), _ = loop(*given, batch_size=10, micro_batch=4, updates=2, kl=0.1)
    assert [len(part) for part in seen.c] == [4, 1, 4, 1] and seen.stats.shape[1] == 2 * 10
    assert not seen.stats[1:, :10].any() and seen.stats[1:, 10:].any()
    assert (seen.kl[:2] > 0).all() and (seen.kl[2] == 0).all() and (seen.norms > 0).all()


def test_ppo_clips_only_what_profits():
    old, A = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    loss, ratio = policy_loss(new, old, A, "ppo", 0.1)
    loss.sum().backward()
    assert_close(ratio, new.detach().exp())
    assert (new.grad != 0).tolist() == [False, True, True, False]  # up with A > 0, down with A < 0: clipped
    assert_close(loss.detach(), torch.tensor([-1.1, -math.exp(-0.5), math.exp(0.5), 0.9]))


def close(A, expected):
    assert_close(A, torch.as_tensor(expected).float(), atol=1e-5, rtol=0)


def test_advantages_by_hand_with_integer_rewards():
    history = {}
    A = advantages(torch.tensor([1, 3, 10, 10]), ["a", "a", "b", "b"], history, 4, 2, 10.0)
    close(A, [-1.0, 1.0, 0.0, 0.0])
    assert A.dtype == torch.float32
    v = np.array([1, 3, 5, 7])
    close(advantages(torch.tensor([5, 7]), ["a", "a"], history, 4, 2, 10.0), (v[2:] - v.mean()) / v.std())
    advantages(torch.tensor([9, 9]), ["a", "a"], history, 4, 2, 10.0)
    assert history == {"a": [5, 7, 9, 9], "b": [10, 10]}  # the oldest fell out


def test_the_window_is_the_buffer_or_all_of_the_batch():
    """Whichever is more; so the order of the batch does not matter."""
    r = torch.tensor([1.0, 2, 3, 4])
    close(advantages(r, list("aaaa"), {}, 1, 4, 10.0), (r - 2.5) / r.std(correction=0))
    r, prompts, order = torch.randn(40), [*"abcd"] * 10, torch.randperm(40)
    A = advantages(r, prompts, {}, 3, 2, 10.0)
    close(advantages(r[order], [prompts[i] for i in order], {}, 3, 2, 10.0), A[order])


def test_advantages_of_rare_prompts_use_the_batch_and_know_clip_and_no_unit():
    r = torch.tensor([0.0, 1.0, 2.0, 100.0])
    expected = (r - r.mean()) / r.std(correction=0)  # the last is 1.73
    close(advantages(r, list("abcd"), {}, 16, 2, 1.5), expected.clamp(-1.5, 1.5))
    r, prompts = torch.randn(24, dtype=torch.double), [*"abc"] * 8
    close(advantages(1e-7 * r, prompts, {}, 4, 4, 10.0), advantages(r, prompts, {}, 4, 4, 10.0))
    assert not advantages(torch.full((24,), 0.1), prompts, {}, 4, 4, 10.0).any()


def test_the_method_part_works_alone():
    """Cut out of the file and run with torch, math, numpy and SimpleNamespace only, on a small network."""
    source = (HERE / "rlcm.py").read_text()
    part = "#" + source[source.index("= METHOD =") : source.index("= TRAIN =")]
    lift = SimpleNamespace(torch=torch, math=math, np=np, SimpleNamespace=SimpleNamespace)
    exec(part, vars(lift))
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def eps(x, t, c):
        return network(torch.cat([x[:, :, 0, 0], t.expand(8, 1) / 1000, c[:, 0]], 1)).view_as(x)

    for method, (schedule, policy) in lift.METHODS.items():
        s = schedule(scheduler_of(method), 4)
        c, z, prompts = torch.rand(8, 1, 1), torch.randn(5, 8, 2, 1, 1), ["a", "b"] * 4
        x, mean, log_p_old = lift.rollout(policy, eps, s, c, z)
        _, kl = lift.path_kl(policy, lambda x, t, c: 0 * x, s, c, x, mean)
        A = lift.advantages(-x[-1].norm(dim=1).flatten(), prompts, {}, 8, 2, 10.0) - 0.1 * kl
        for k in s.actions:
            log_p = lift.log_prob(x[k + 1], *policy(eps, x[k], k, c, s))
            loss, ratio = lift.policy_loss(log_p, log_p_old[k], A[k])
            gradients = torch.autograd.grad(loss.mean(), network.parameters())
            assert (ratio == 1).all() and all(g.isfinite().all() and g.any() for g in gradients)


LORA = "pytorch_lora_weights.safetensors"
SMALL = dict(pixels=16, steps=2, epochs=2, batch_size=4, micro_batch=4, lr=0.1, guidance=3.0, save_every=1)
SMALL |= dict(lora_rank=2, lora_alpha=4, buffer_size=8, min_count=4, prompts="a red cat")  # runs of mini
DRAW = dict(num_inference_steps=2, guidance_scale=3.0, height=16, width=16)  # ... in a plain pipeline
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])  # with what takes long to import:
PRELOADED = accelerate.Accelerator, diffusers.LatentConsistencyModelPipeline
session = pytest.fixture(scope="session")


def make_mini(folder, kind):
    """The embedded pipeline with a small U-Net of random weights: for what a run does around its network."""
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / kind)
    blocks = dict(down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"])
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config | blocks | dict(block_out_channels=[16]))
    pipe.save_pretrained(folder)
    return str(folder)


mini = session(lambda tmp_path_factory: make_mini(tmp_path_factory.mktemp("lcm"), "lcm"))
mini_sd = session(lambda tmp_path_factory: make_mini(tmp_path_factory.mktemp("sd"), "sd"))


@session
def finished(mini, tmp_path_factory):  # a run of two epochs
    assert start(model=mini, out=(out := tmp_path_factory.mktemp("runs") / "finished")) == 0
    return out


def words(**settings):  # a command line
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def start(**settings):
    return rlcm.main(words(**SMALL | settings))


def metrics(run):
    """The rows of metrics.csv without the time they took."""
    names, *rows = [line.split(",") for line in (Path(run) / "metrics.csv").read_text().splitlines()]
    return [{k: float(v) for k, v in zip(names, row) if k != "seconds"} for row in rows]


def column(run, name):
    return [row[name] for row in metrics(run)]


def contents(folder):
    """{path: bytes}, but for what safetensors left where it was killed, and Python."""
    paths = [p for p in Path(folder).rglob("*") if p.name[0] != "." and "__pycache__" not in str(p)]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def found_in(sheet, images):
    """(y, x) of pictures (B, 3, H, W), enlarged to 128 pixels, in a PNG: by the middle line, then by all."""
    sheet, places = np.asarray(Image.open(sheet).convert("RGB")).astype(np.int16), []
    lines = np.lib.stride_tricks.sliding_window_view(sheet[..., 1], 128, axis=1)  # (H, W - 127, 128)
    for picture in rlcm.pictures(images):
        tile = np.asarray(picture.resize((128, 128), Image.LANCZOS)).astype(np.int16)
        y, x = np.unravel_index(np.abs(lines - tile[64, :, 1]).max(2).argmin(), lines.shape[:2])
        assert np.abs(sheet[y - 64 : y + 64, x : x + 128] - tile).max() <= 2, "the picture is not in the grid"
        places.append((y, x))
    return places


def grid_of(run, epoch, folder, lora=None, scheduler=None, prompts=("a red cat",), **options):
    """Pictures that a user of diffusers gets, without this repository's code; found in a run's grid."""
    pipe = folder
    if not isinstance(folder, DiffusionPipeline):
        pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = (scheduler or type(pipe.scheduler)).from_config(pipe.scheduler.config)
    if lora:
        pipe.load_lora_weights(lora)
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(list(prompts), generator=noise, output_type="pt", **DRAW | options).images
    return images, found_in(run / "samples" / f"epoch-{epoch:04d}.png", images)


# ----------------------------------------------------------------------------------------- the file as a file
def test_the_two_files_alone(mini, tmp_path, monkeypatch):
    """In an empty folder and a fresh interpreter: importing changes nothing; they train, resume, refuse."""
    monkeypatch.chdir(tmp_path)
    for name in ("rlcm.py", "rewards.py"):
        shutil.copy(HERE / name, tmp_path)
    train = words(**SMALL | {"prompts": "animals", "epochs": 1}, model=mini, out="run")
    code = f"""
import os, random, runpy, signal, sys, threading, numpy, torch
def state():
    rng = torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate()
    torchs = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    handlers = [signal.getsignal(n) for n in signal.valid_signals()]
    return dict(os.environ), os.getcwd(), handlers, rng, torchs, threading.active_count()
before = state()
import rlcm, rewards
assert state() == before
print([name for name in ("diffusers", "peft", "accelerate") if name in sys.modules])
for command in {train}, "--resume run --epochs 2".split(), "--reward nope".split():
    sys.argv = ["rlcm.py", *command]
    try:
        runpy.run_path("rlcm.py", run_name="__main__")
    except SystemExit as e:
        print("status", e.code)
"""
    env = {name: os.environ.get(name, "") for name in ("PATH", "HOME", "CUDA_VISIBLE_DEVICES")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, bars = done.stdout.splitlines(), [v for v in re.split(r"[\r\n]", done.stderr) if v.strip()]
    assert said[0] == "[]" and said[1].startswith(f"rlcm on {mini}")
    assert [line for line in said if "status" in line] == ["status 0", "status 0", "status 2"]
    assert bars.pop().startswith("rlcm.py: unknown reward 'nope'")
    assert bars and all(re.search(r"\d%.*epoch", line) for line in bars), bars  # quiet
    run = {"config.json", "metrics.csv", "reward.png", LORA, "checkpoint.pt", "samples"}
    assert contents("run").keys() == run | {f"samples/epoch-000{epoch}.png" for epoch in (0, 1, 2)}


# ----------------------------------------------------------------------------------- settings and the model
ROW = "steps epochs batch_size lora_rank lora_alpha buffer_size min_count clip_range adv_clip max_grad_norm"
ROW = f"{ROW} guidance updates".split()
PUBLISHED = {  # DESIGN.md, section 5: RLCM's four GPUs (align: three) as one; ddpo-pytorch's config/dgx.py
    "rlcm compress": (8, 1000, 16, 16, 32, 16, 16, 1e-4, 10, 5, 8, 1),
    "rlcm incompress": (8, 1000, 16, 16, 32, 16, 16, 1e-4, 10, 5, 8, 1),
    "rlcm aesthetic": (8, 1000, 32, 8, 8, 32, 16, 1e-4, 10, 5, 8, 1),
    "rlcm align": (16, 708, 120, 16, 32, 32, 16, 1e-4, 10, 5, 8, 1),
    "ddpo compress": (50, 100, 256, 4, 4, 16, 16, 1e-4, 5, 1, 5, 4),
    "ddpo incompress": (50, 100, 256, 4, 4, 16, 16, 1e-4, 5, 1, 5, 4),
    "ddpo aesthetic": (50, 200, 256, 4, 4, 32, 16, 1e-4, 5, 1, 5, 2),
    "ddpo align": (50, 200, 288, 4, 4, 32, 16, 1e-4, 5, 1, 5, 2),
}


def parsed(command):  # a Config, and what the table of published values has of it
    cfg = rlcm.parse(shlex.split(command, comments=True))[0]
    return cfg, tuple(getattr(cfg, name) for name in ROW)


def test_presets_are_the_papers_flags_win_and_help_shows_what_would_be_used(capsys):
    for method, like, lr in (("rlcm", "rlcm", 1e-4), ("ddpo", "ddpo", 3e-4), ("score", "ddpo", 3e-4)):
        cfg, row = parsed(f"--model real --method {method}" + " --steps 8" * (method == "rlcm"))
        assert row == PUBLISHED[f"{like} compress"]
        assert (cfg.lr, cfg.kl, cfg.pixels, cfg.model, cfg.method) == (lr, 0, 512, "real", method)
    assert parsed("--model real")[0].steps == 4 and parsed("")[0] == Config(**preset()) == Config()
    cfg, _ = parsed("--model real --method ddpo --lr 1e-3 --steps 4 --pixels 64")  # also Config's own values
    assert (cfg.lr, cfg.steps, cfg.pixels, cfg.batch_size) == (1e-3, 4, 64, 256)
    with pytest.raises(rlcm.BadInput, match="--out .*must be str"):
        rlcm.check(Config(out=Path("run")))
    with pytest.raises(SystemExit, match="0"):
        rlcm.main(["--method", "ddpo", "--help"])
    shown = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    assert re.search(r"--lr .*?\(default: (.*?)\)", shown)[1] == str(preset("ddpo", "tiny")["lr"])


def test_the_commands_of_docs_papers_are_the_published_settings(monkeypatch):
    monkeypatch.chdir(HERE)
    text = "\n".join(re.findall(r"```\w*\n(.*?)```", Path("docs/papers.md").read_text(), re.S))
    commands, found = re.findall(r"^python rlcm\.py (.*)", text.replace("\\\n", " "), re.M), {}
    for cfg, row in map(parsed, commands):
        rlcm.check(cfg)
        assert rlcm.get_reward(cfg.reward, cfg.model) and len(rlcm.get_prompts(cfg.prompts)) > 1
        found[f"{cfg.method} {cfg.reward.removesuffix('_13b')}"] = row
    assert len(commands) >= 8 and found | PUBLISHED == found


@pytest.mark.parametrize("gpu, command, used", [
    (False, "", "tiny fp32"),
    (True, "", "SimianLuo/LCM_Dreamshaper_v7 bf16"),
    (True, "--method ddpo --precision fp32", "Lykon/dreamshaper-7 fp32"),
])
def test_a_gpu_takes_the_papers_model_and_the_first_line_says_so(gpu, command, used, monkeypatch, capsys):
    monkeypatch.setattr(rlcm, "train", lambda cfg, resume: print(cfg.model, cfg.precision))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert rlcm.main(command.split()) == 0
    first, trained = capsys.readouterr().out.splitlines()
    assert trained == used and used.split()[0] in first and ("no CUDA GPU" in first) == (not gpu)


def test_eps_is_the_guided_network_and_without_its_adapter_the_pretrained_one(mini, mini_sd, monkeypatch):
    """Also compiled, by a compiler that counts; and with checkpointing, which computes a block twice."""
    passes, gradients, x, t = [], [], torch.randn(2, 12, 2, 2), torch.tensor(499)
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a, **k: passes.append("fast") or f(*a, **k))
    for folder, option, expected in (
        (mini, {}, ["block"]),
        (mini, {"compile": True}, ["fast", "block"]),
        (mini, {"gradient_checkpointing": True}, ["block", "block"]),
        (mini_sd, {"method": "ddpo"}, ["block"]),
    ):
        model = rlcm.load_model(Config(**SMALL, **option, model=folder))
        for i, p in enumerate(model.trained.values()):
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        c, nothing = (rlcm.encode(model.pipe, prompts) for prompts in (["cat", "dog"], ["", ""]))
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        w = model.pipe.get_guidance_scale_embedding(torch.tensor([3.0 - 1] * 2), 256)
        if folder == mini:
            base = unet(x, t, c, timestep_cond=w).sample
        else:
            base = 3.0 * unet(x, t, c).sample - 2.0 * unet(x, t, nothing).sample
        model.pipe.unet.disable_adapters()
        assert_close(model.eps(x, t, c), base)
        assert not rlcm.decode(model.pipe, x).requires_grad  # it would keep the whole decoder's activations
        model.pipe.unet.enable_adapters()
        assert (model.eps(x, t, c) - base).abs().mean() > 0.01
        passes.clear()
        block = model.pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
        block.register_forward_pre_hook(lambda *_: passes.append("block"))
        model.eps(x, t, c).square().sum().backward()
        gradients.append([p.grad for p in model.trained.values()])
        assert passes == expected
    assert all(g.any() for g in gradients[0])
    assert_close(gradients[:1] * 2, gradients[1:3])


# ------------------------------------------------------------------------------------------------------- runs
def test_a_run_learns_and_its_lora_draws_its_last_grid_in_a_plain_pipeline(tmp_path):
    given = dict(epochs=4, batch_size=16, micro_batch=16, lr=5e-3, save_every=4, prompts="a red apple")
    run = rlcm.train(Config(**preset("rlcm", "tiny") | given, out=str(tmp_path / "run")))
    r, std = column(run, "reward_mean"), column(run, "reward_std")
    assert r[-1] > r[0] + 1.5 * std[0] and column(run, "ratio_drift") == [0.0] * 4
    assert column(run, "pictures") == [16, 32, 48, 64] and len(os.listdir(run / "samples")) == 2
    given = dict(num_inference_steps=4, guidance_scale=6.0, height=64, width=64, prompts=["a red apple"] * 16)
    (base, places), found = (grid_of(run, e, HERE / "tiny" / "lcm", e and run, **given) for e in (0, 4))
    assert len(set(places)) == 16 and places == sorted(places) == found[1]  # in reading order
    assert (found[0] - base).abs().mean() > 0.005  # the LoRA does something


def block_of(page, word):
    """The one Python block of a page that has the word."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / page).read_text(), re.S)
    (block,) = [block for block in blocks if word in block]
    return block


def test_a_lora_keeps_its_strength_elsewhere(finished, mini, tmp_path, monkeypatch):
    """Alpha is twice the rank. In a plain pipeline, one that still has a training adapter, Kohya's format."""
    monkeypatch.chdir(tmp_path)
    exec(block_of("docs/your-reward.md", "kohya").replace("runs/NAME", str(finished)), {})
    trainee = rlcm.load_model(rlcm.read_config(finished)).pipe
    for pipe, lora in ((mini, finished), (trainee, finished), (mini, tmp_path / "kohya.safetensors")):
        grid_of(finished, 2, pipe, lora)


def test_readme_fuses_a_lora_and_a_run_starts_from_it(mini, mini_sd, finished, tmp_path):
    """An LCM-LoRA, or another run's: epoch 0's grid is what a plain pipeline draws with it."""
    recipe = block_of("README.md", "fuse_lora")
    pipe, layers = DiffusionPipeline.from_pretrained(mini_sd), ["to_q", "to_out.0", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.unet))
    for base, lora, scale in ((mini_sd, tmp_path / "lora", 1.5), (mini, finished, 3.0)):
        out, model, code = tmp_path / f"run{scale}", f"{tmp_path}/model{scale}", recipe
        names = {"Lykon/dreamshaper-7": base, "latent-consistency/lcm-lora-sdv1-5": lora, "my-lcm": model}
        for name, ours in names.items():
            assert name in code
            code = code.replace(name, str(ours))
        exec(code, {})
        assert start(model=model, guidance=scale, seed=1, out=out) == 0 and column(out, "grad_norm")[1] > 0
        images, _ = grid_of(out, 0, base, lora, LCMScheduler, guidance_scale=scale)
    assert found_in(finished / "samples" / "epoch-0002.png", images)  # the last grid of the other run


def test_what_a_run_says(mini, tmp_path, monkeypatch, capsys):
    """With 20,001 prompts it starts in seconds; commands can be pasted, with a space in the folder's name."""
    monkeypatch.chdir(tmp_path)
    Path("many.txt").write_text("\n".join([*map("cat {}".format, range(20_000)), "dog " * 99]))
    settings = dict(model=mini, epochs=1, reward="compress:1, incompress:0.5", prompts="many.txt")
    began = time.process_time()
    assert start(**settings, out="a run") == 0 and time.process_time() - began < 10
    said, (row,) = capsys.readouterr().out, metrics("a run")
    assert re.search(r"20001 prompts, the first is 'cat 0'.*\nwarning: 1 prompts .* 'dog", said)
    assert [row["reward_mean"], -row["incompress:0.5"]] == pytest.approx([row["compress:1"] / 2] * 2)
    assert rlcm.main(shlex.split(re.search(r"python rlcm.py (.*--resume.*)", said)[1])) == 0
    assert len(metrics("a run")) == 2 and row["grad_norm"] > 0
    assert start(**settings | {"prompts": "a cat"}) == 0
    assert re.fullmatch(r"rlcm-compress-1-incompress-0\.5-0-[\w-]+", *os.listdir("runs"))


def test_a_run_of_a_notebook(finished, mini, tmp_path):
    """Outside the main thread, after one of another precision: bf16, with a ratio of exactly 1 on a CPU."""
    status, given = [], dict(model=mini, precision="bf16", kl=0.01, out=(out := tmp_path / "run"))
    (thread := threading.Thread(target=lambda: status.append(start(**given)))).start()
    thread.join()
    assert status == [0] and column(out, "ratio_drift") == [0.0, 0.0] and column(out, "path_kl")[0] == 0
    assert {p.dtype for p in load_file(out / LORA).values()} == {torch.float32}


# -------------------------------------------------------------------------------------------------- processes
def spawn(command, at=None):
    """The program in a process that dies, or whose disk is full, `at` a moment: an audit event, the end of
    its path, how many such pass before, and the bytes that a file may have from then on, None to die."""
    receiver, sender = FORKED.Pipe(duplex=False)
    (process := FORKED.Process(target=in_child, args=(sender, command, at))).start()
    return process, receiver


def in_child(sender, command, at):
    seen = iter(range(999))

    def audit(event, found):
        if at and event == at[0] and str(found[0]).endswith(at[1]) and next(seen) == at[2]:
            if at[3] is None:
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (at[3], at[3]))

    sys.addaudithook(audit)
    status, said = one_of_several(command)
    sender.send(said)
    sys.exit(status)


def one_of_several(command):
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        return rlcm.main(command), said.getvalue()


def ended(process, receiver):
    """Its exit status, and the last line that it printed; none if it was killed."""
    process.join()
    return process.exitcode, receiver.recv().splitlines()[-1] if process.exitcode >= 0 else ""


MOMENTS = [  # to die or have a full disk, of a run that begins or goes on; exit status; epochs it has saved
    (("open", "epoch-0000.png", 0, 99), 2, 0),
    (("open", "checkpoint.pt.part", 1, 999), 2, 1),
    (("os.rename", "metrics.csv.part", 0, None), -9, 1),
    (("os.mkdir", "killed", 1, 999), 2, 2),  # in the LoRA
    (("os.rename", LORA + ".part", 0, None), -9, 2),
    (signal.SIGINT, 130, 3),
    (signal.SIGKILL, -9, 4),
    (None, 0, 6),
]


def test_a_run_killed_at_seven_moments_ends_as_the_one_left_alone(mini_sd, tmp_path):
    """A full disk and Ctrl-C are one line. Each file is always whole: the old or the new one. The end is the
    same bit for bit. It is a run of ddpo with two updates, on a model that came with another scheduler."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    shutil.copytree(mini_sd, model := tmp_path / "model")
    euler = diffusers.EulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    euler.save_pretrained(model / "scheduler")
    given = dict(model=model, method="ddpo", epochs=6, kl=0.01, updates=2, buffer_size=20)
    assert start(**given, out=alone) == 0 and column(alone, "ratio_drift") == [0.0] * 6
    grid_of(alone, 6, model, alone, DDIMScheduler, eta=1.0)
    for moment, status, epochs in MOMENTS:
        command = words(resume=killed, epochs=6)
        if not (checkpoint := killed / "checkpoint.pt").exists():
            shutil.rmtree(killed, ignore_errors=True)
            command = words(**SMALL | given, out=killed)
        sent = moment if isinstance(moment, signal.Signals) else None
        child, receiver = spawn(command, None if sent else moment)
        while sent and len(torch.load(checkpoint)["rows"]) < epochs and child.is_alive():
            time.sleep(0.001)
        if sent:
            os.kill(child.pid, sent)
        code, said = ended(child, receiver)
        assert code == status and said.startswith("rlcm.py: ") == (status > 0), (moment, said)
        assert ("stopped; --resume" in said) == (status == 130) and checkpoint.exists() == (epochs > 0)
        if epochs:
            done, lora = len(torch.load(checkpoint)["rows"]), load_file(killed / LORA)
            assert done == epochs or sent and done == epochs + 1
            assert len(metrics(killed)) in (done, done + 1) and lora.keys() == load_file(alone / LORA).keys()
    files, others = contents(alone), contents(killed)
    assert metrics(alone) == metrics(killed) and files.keys() == others.keys()
    assert all(files[name] == others[name] for name in files if name.startswith("samples/"))
    assert_close(load_file(alone / LORA), lora, rtol=0, atol=0)


@pytest.mark.parametrize("out, codes", [("--out run", [0, 2]), ("", [0, 0])])
def test_two_runs_started_at_once_never_share_a_folder(out, codes, mini, tmp_path, monkeypatch):
    """Each waits in its first rewards for the other."""
    monkeypatch.chdir(tmp_path)
    Path("meet.py").write_text("""import os, pathlib, time
def fn(images, prompts):
    pathlib.Path(f"{os.getpid()}.here").touch()
    while len(list(pathlib.Path().glob("*.here"))) < 2: time.sleep(0.01)
    return images.mean((1, 2, 3))""")
    command = words(**SMALL | dict(epochs=1, reward="meet.py:fn"), model=mini) + out.split()
    found = [ended(*child) for child in [spawn(command), spawn(command)]]
    runs = [*Path().glob("run"), *Path().glob("runs/*")]
    assert sorted(code for code, _ in found) == codes and len(runs) == codes.count(0)
    assert all(said.startswith("rlcm.py: ") == (code > 0) for code, said in found)
    assert all(len(metrics(run)) == 1 and (run / LORA).exists() for run in runs)


def test_two_processes_give_the_gradient_of_one(mini, tmp_path):
    """By torch.distributed.run's launcher, saving every epoch; the second one's reward is slow."""
    one, two, slow = tmp_path / "one", tmp_path / "two", tmp_path / "slow.py"
    slow.write_text("""import os, time
def fn(images, prompts): return time.sleep(float(os.environ.get("RANK", 0))) or images.mean((1, 2, 3))""")
    given = dict(model=mini, steps=3, kl=10.0, batch_size=8, lr=0.02, prompts="animals", reward=f"{slow}:fn")
    assert start(**given, out=one) == 0
    where = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(tmp_path), max_restarts=0)
    nodes = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="forkserver", **where)
    before = signal.getsignal(signal.SIGINT)
    found = elastic_launch(nodes, one_of_several)(words(**SMALL | given, out=two))
    signal.signal(signal.SIGINT, before)  # the launcher keeps it
    assert "python rlcm.py --resume" in found[0][1] and found == {0: (0, found[0][1]), 1: (0, "")}
    assert contents(one).keys() == contents(two).keys() and column(two, "ratio_drift") == [0.0, 0.0]
    for name in ("epoch", "reward_mean", "reward_std", "path_kl", "grad_norm", "loss"):
        assert column(one, name) == pytest.approx(column(two, name), rel=1e-3, abs=1e-6), name


# --------------------------------------------------------------------------------- what is wrong, in one line
@pytest.mark.parametrize("given, named, epochs", [
    (dict(lr=1e30), "the gradient of epoch 2 is not finite", 1),
    (dict(reward="flaky.py:fn"), "must be finite", 2),
])
def test_a_run_that_goes_wrong_has_a_checkpoint(given, named, epochs, mini, tmp_path, monkeypatch, capsys):
    """A reward is asked for 4 times in a grid, once in a rollout: the 15th time in epoch 3."""
    monkeypatch.chdir(tmp_path)
    Path("flaky.py").write_text("""calls = []
def fn(images, prompts): return calls.append(1) or images.mean((1, 2, 3)) / (len(calls) != 15)""")
    assert start(model=mini, epochs=3, out="run", **given) == 2
    assert re.fullmatch(f"rlcm.py: .*{named}.*", capsys.readouterr().err.splitlines()[-1])
    assert len(torch.load("run/checkpoint.pt")["rows"]) == len(metrics("run")) == epochs
    assert epochs == 1 or rlcm.main(["--resume", "run"]) == 0 and len(metrics("run")) == 3


def refused(command, named, folder, capsys):
    """One line on stderr, exit status 2, nothing written."""
    before, status, err = contents(folder), rlcm.main(command), capsys.readouterr().err
    assert status == 2 and err.startswith("rlcm.py: ") and err.count("\n") == 1 and named in err, err
    assert contents(folder) == before


@pytest.mark.parametrize("config, spoil, flags, named", [
    ({"steps": "4"}, None, "", "--steps '4'"),
    ({"algo": "trpo"}, None, "", "--algo 'trpo'"),
    ({"lora_rank": 3}, None, "", "not those of this LoRA"),
    ({}, lambda state: state["trained"].popitem(), "", "not those of this LoRA"),
    ({}, lambda state: state.pop("optimizer"), "", "KeyError: 'optimizer'"),
    ({}, lambda state: state.update(rows=Path("x")), "", "UnpicklingError"),
    ({}, None, "--lr 0.5", "only --epochs may change, not lr"),
    ({}, None, "--epochs 2", "already has 2 epochs"),
])
def test_resume_refuses_what_does_not_fit(config, spoil, flags, named, finished, tmp_path, capsys):
    shutil.copytree(finished, out := tmp_path / "run")
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text()) | config))
    if spoil:
        spoil(state := torch.load(out / "checkpoint.pt"))
        torch.save(state, out / "checkpoint.pt")
    refused(["--resume", str(out), "--epochs", "3", *flags.split()], named, tmp_path, capsys)


BAD = {
    "--reward nope": "choose from compress, incompress",
    "--reward nan.py:fn": "must be finite",
    "--steps 1": "nothing to reinforce",
    "--steps 51": "at most 50 for rlcm",
    "--batch-size 10 --updates 3": "a multiple of 3",
    "--algo reinforce --updates 2": "--updates must be 1",
    "--kl -0.1": "--kl -0.1: must be a positive number or zero",
    "--pixels 12": "multiples of 8",
    "--rew compress stray": "unrecognized arguments: --rew compress stray",
    "--model no/such-model": "--model tiny",
    "--model flux": "flux is a FluxPipeline: supported are StableDiffusionPipeline and",
    "--model v": "rlcm needs an LCMScheduler",
    "--model edm --method ddpo": "edm has a EDMEulerScheduler, which has no betas",
    "--model v --method ddpo": "v does not predict epsilon",
    "--model shift --method ddpo": "a VAE that shifts latents",
    "--out v": "v is not empty",
    "--resume nowhere": "not a run's folder",
}


@session
def place_of_bad(mini_sd, tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    (place / "nan.py").write_text("def fn(images, prompts): return images.mean((1, 2, 3)) / 0")
    for folder, file, change in (
        ("flux", "model_index.json", {"_class_name": "FluxPipeline"}),
        ("edm", "model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}),
        ("v", "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("shift", "vae/config.json", {"latents_mean": [0.1] * 12}),
    ):
        shutil.copytree(mini_sd, place / folder)
        file = place / folder / file
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    diffusers.EDMEulerScheduler().save_pretrained(place / "edm" / "scheduler")
    return place


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, place_of_bad, mini, monkeypatch, capsys):
    monkeypatch.chdir(place_of_bad)
    given = [] if "--resume" in arguments else words(**SMALL | {"epochs": 1}, model=mini)
    refused([*given, *arguments.split()], BAD[arguments], place_of_bad, capsys)


# A card that is not there: its tensors say cuda:0, hold their numbers on the CPU, and mix with the CPU's as a
# GPU's do, not at all but for numbers without dimension, indices and copies. Not shown: kernels, rounding.
CARD, aten = torch.device("cuda:0"), torch.ops.aten


class OnCard(torch.Tensor):
    """A tensor of the card. To the engine below Python it is on cpu:1, which takes part in autograd."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = (property(lambda self, v=v: v) for v in (CARD, True, False))
    data = property(torch.Tensor.detach, lambda self, value: self.put(value))

    @staticmethod
    def __new__(cls, inner):
        options = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        options |= dict(device=torch.device("cpu:1"))
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        tensor.inner = inner
        tensor.tolist, tensor.untyped_storage = inner.tolist, inner.untyped_storage
        return tensor

    def put(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def __reduce_ex__(self, protocol):  # torch.load(map_location="cpu")
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return on_card(operation, args, kwargs or {})


class Card(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return on_card(operation, args, kwargs or {})


def mapped(change, v):
    """v with every tensor in its lists and tuples changed."""
    if isinstance(v, torch.Tensor):
        return change(v)
    return type(v)(mapped(change, part) for part in v) if type(v) in (list, tuple) else v


def on_card(operation, args, kwargs):
    """Run an operation with the numbers on the CPU; refuse what CUDA refuses."""
    name, asked, given, known = operation.overloadpacket, kwargs.get("device"), [], {}

    def inner(v):
        given.append(v)
        known.update({id(v.inner): v} if type(v) is OnCard else {})
        return v.inner if type(v) is OnCard else v

    args, kwargs = mapped(inner, args), {key: mapped(inner, v) for key, v in kwargs.items()}
    there = bool(known) if asked is None else asked in (CARD, torch.device("cpu:1"))
    if name in (aten.index, aten.index_put, aten.index_put_) and type(given[0]) is OnCard:
        given[1:] = given[-1:] if name is not aten.index else []  # indices may be on the CPU
    mixed = any(type(v) is not OnCard and v.dim() for v in given) and name not in (aten._to_copy, aten.copy_)
    assert not (known and mixed), f"{operation}: expected all tensors to be on the same device"
    assert not (there and kwargs.get("generator")), f"{operation}: a generator of the CPU"
    out = operation(*args, **kwargs | ({} if asked is None else {"device": torch.device("cpu")}))
    if not there or name is aten.copy_ and type(given[0]) is not OnCard:
        return out
    return mapped(lambda v: known[id(v)] if id(v) in known else OnCard(v), out)


@pytest.mark.parametrize("method, precision", [("rlcm", "bf16"), ("ddpo", "fp32"), ("score", "bf16")])
def test_a_run_on_a_gpu_that_is_not_there(method, precision, mini, mini_sd, tmp_path, monkeypatch):
    """It trains and is resumed, all of it on the card."""
    to, autocast, record, seen = torch.Tensor.to, torch.autocast, rlcm.record, set()
    for name, value in dict(_lazy_init=None, is_available=True, current_device=0).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    card = lambda v: CARD if str(v) == "cuda" else v  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *args, **kwargs: to(t, *map(card, args), **kwargs))
    monkeypatch.setattr(torch, "autocast", lambda device_type, **kwargs: autocast("cpu", **kwargs))
    monkeypatch.setattr(accelerate.state.PartialState, "default_device", CARD)
    monkeypatch.setattr(rlcm, "record", lambda *v: seen.update(t.device for t in v[3:]) or record(*v))
    settings = dict(SMALL, method=method, precision=precision, model=mini if method == "rlcm" else mini_sd)
    settings |= dict(steps=3, micro_batch=3, updates=2 if method == "ddpo" else 1, kl=0.01)
    settings["out"] = str(tmp_path / "run")
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(v, device="cuda:0") is made, then moved
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        with Card():
            rlcm.train(Config(**settings | dict(epochs=1)))
            rlcm.train(Config(**settings), resume=True)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
        accelerate.state.AcceleratorState._reset_state(True)
    assert seen == {CARD} and column(tmp_path / "run", "ratio_drift") == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------- rewards
REWARD_FILE = """
from __future__ import annotations
import dataclasses, torch
from neighbour import loads
loads.append(__name__)
@dataclasses.dataclass
class Setting:
    factor: float = 10
def redness(images, prompts): return (images[:, 0].mean((1, 2)) * Setting().factor).int()
def double(images, prompts): return redness(images, prompts).double()
def listed(images, prompts): return redness(images, prompts).tolist()
def greedy(images, prompts): return prompts.clear() or images.sub_(0.5).div_(0.2).sum((1, 2, 3))
def nan(images, prompts): return torch.tensor([float("nan")] * len(prompts))
def shape(images, prompts): return torch.zeros(len(prompts), 2)
def raises(images, prompts): raise RuntimeError("no")
value = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The current folder is one with a file of somebody's rewards, whose modules are forgotten later."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    Path("mine.py").write_text(REWARD_FILE)
    Path("neighbour.py").write_text("loads = []\n")
    Path("broken.py").write_text("def fn(:\n")
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def drawn(step):
    """Every step-th of the embedded model's training pictures, the same for Pillow, and their captions."""
    images, prompts = (v[::step] for v in make_tiny.training_pictures())
    return images, for_pillow(images), prompts


def for_pillow(images):
    return [Image.fromarray(np.uint8(np.rint(image.permute(1, 2, 0).numpy() * 255))) for image in images]


def test_compress_is_the_size_of_the_jpeg_file(tmp_path):
    images = torch.rand(3, 3, 40, 56)
    images[1] = 1.0
    for i, picture in enumerate(for_pillow(images)):
        picture.save(tmp_path / f"{i}.jpg", quality=95)
    sizes = torch.tensor([(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(3)])
    assert sizes[1] < sizes[0]
    for name, expected in (("compress", -sizes), ("incompress", sizes)):
        torch.testing.assert_close(rewards.get_reward(name)(images, [""] * 3), expected)


def test_a_reward_file_is_loaded_as_if_imported_by_name(mine):
    """Once, with its neighbour, and with a dataclass under a __future__ import."""
    images = torch.stack([torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    for name in ("redness", "double", "listed"):
        r = rewards.get_reward(f"mine.py:{name}")(images, ["a", "b"])
        assert r.tolist() == [10.0, 0.0] and r.dtype == torch.float32
    assert sys.modules["neighbour"].loads == ["mine"] and callable(sys.modules["mine"].redness)


def test_a_reward_gets_copies(mine):
    """One that normalises in place spoils neither other parts of a sum nor the caller's pictures."""
    images, prompts = torch.rand(3, 3, 16, 16), ["a", "b", "c"]
    kept, names = images.clone(), ["mine.py:greedy", "compress", "mine.py:redness"]
    alone = torch.stack([rewards.get_reward(name)(kept.clone(), prompts[:]) for name in names])
    assert torch.equal(rewards.get_reward(",".join(names)).terms(images, prompts), alone)
    assert torch.equal(images, kept) and prompts == ["a", "b", "c"]


def test_sums_with_weights(mine):
    images, prompts = torch.rand(3, 3, 16, 16), [""] * 3
    size, red = rewards.jpeg_kilobytes(images), (images[:, 0].mean((1, 2)) * 10).int()
    for name, terms in {
        "compress:0.05": [-0.05 * size],
        "incompress:-2, compress": [-2 * size, -size],
        "mine.py:redness:0.5,compress:1e-1": [0.5 * red, -0.1 * size],
    }.items():
        reward = rewards.get_reward(name)
        assert reward.names == name.replace(" ", "").split(",")
        torch.testing.assert_close(reward(images, prompts), sum(terms), msg=name)
        torch.testing.assert_close(reward.terms(images, prompts), torch.stack(terms), msg=name)


BAD_REWARDS = {  # name: what the message must say
    "nope": "choose from compress, incompress, .*path/to/file.py:function",
    "missing.py:fn": "no reward file missing.py",
    "mine.py:value": "no function 'value'",
    "mine.py:nan": "'mine.py:nan' returned nan for the prompt 'a cat': it must be finite",
    "incompress,compress:1e39": "'compress:1e39'.*must be finite",
    "mine.py:shape": r"returned shape \(5, 2\) for 5 pictures: it must be one number each, \(5,\)",
    "mine.py:raises": "'mine.py:raises' raised RuntimeError: no",
    "broken.py:fn": "broken.py does not load: SyntaxError",
    "compress, compress": "'compress, compress' has a part twice: add up its weights",
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_bad_reward_is_named(name, mine):
    with pytest.raises(BadInput, match=BAD_REWARDS[name]) as caught:
        rewards.get_reward(name)(torch.rand(5, 3, 4, 4), ["a cat"] * 5)
    assert "\n" not in str(caught.value)


BODY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def small_tokenizer(**options):
    """Of the embedded CLIP's words, without its limit of eight."""
    raw = tokenizers.Tokenizer.from_file(rewards.TINY_CLIP + "/tokenizer.json")
    raw.no_truncation()
    raw.no_padding()
    options |= dict(pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, **options)


def small_image_processor(size):
    crop = {"height": size, "width": size}
    return tf.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)


def small_llava(folder):
    tokens = small_tokenizer(additional_special_tokens=["<image>"])
    text = dict(BODY, vocab_size=len(tokens), bos_token_id=1, eos_token_id=316, initializer_range=0.5)
    vision = tf.CLIPVisionConfig(**BODY, image_size=24, patch_size=6, initializer_factor=4.0)
    ids = dict(image_token_index=len(tokens) - 1, image_seq_length=16, initializer_range=0.5)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**text, pad_token_id=0), **ids)
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    options = dict(patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    tf.LlavaProcessor(small_image_processor(24), tokens, **options).save_pretrained(folder)


def small_bert(folder):
    tokens = small_tokenizer()
    body = dict(BODY, num_hidden_layers=3, vocab_size=len(tokens), type_vocab_size=0, initializer_range=0.5)
    bert = tf.DebertaModel(tf.DebertaConfig(**body, relative_attention=True, pos_att_type=["c2p", "p2c"]))
    for name, p in bert.named_parameters():
        if name.endswith(("q_bias", "v_bias")):  # new ones are 0: nobody would miss them
            torch.nn.init.normal_(p)
    bert.save_pretrained(folder)
    tokens.save_pretrained(folder)


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """Models of the rewards' kinds, laid out as the hub has them, {key: folder}; and the aesthetic layers."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    hub = {name: str(root / name) for name in rewards.HUB} | {"clip": rewards.TINY_CLIP}
    small_llava(hub["llava"])
    small_bert(hub["bert"])
    clip, processor = (kind.from_pretrained(rewards.TINY_CLIP) for kind in (tf.CLIPModel, tf.CLIPProcessor))
    clip.logit_scale.data.fill_(3.0)
    clip.save_pretrained(hub["pickscore"])
    clip.config.save_pretrained(hub["pickscore-processor"])
    processor.image_processor.image_mean = [0.1, 0.5, 0.9]
    processor.save_pretrained(hub["pickscore-processor"])
    linear, drop, width = torch.nn.Linear, torch.nn.Dropout(), clip.config.projection_dim
    first = linear(width, 16), drop, linear(16, 8), drop, linear(8, 8), drop
    layers = torch.nn.Sequential(*first, linear(8, 4), linear(4, 1)).eval()
    for p in layers.parameters():
        p.data *= 3
    (root / "aesthetic").mkdir()
    state = {f"layers.{name}": p for name, p in layers.state_dict().items()}
    torch.save(state, root / "aesthetic" / "aesthetic-model.pth")
    return hub, layers


@pytest.fixture
def hub(small_models, monkeypatch):
    monkeypatch.setattr(rewards, "HUB", dict(small_models[0]))
    monkeypatch.setattr(rewards, "BERT_LAYER", 2)
    monkeypatch.setattr(rewards, "load", functools.cache(rewards.load.__wrapped__))
    return rewards.HUB


@torch.no_grad()
def test_clip_pickscore_and_aesthetic_equal_their_models_run_by_hand(hub, small_models, monkeypatch):
    """Picture by picture through transformers alone, which shrinks and crops them by Pillow."""
    images, _, prompts = drawn(40)
    images = torch.nn.functional.interpolate(images, (150, 120), mode="bilinear").mul(255).round() / 255
    pictures = for_pillow(images)

    def outputs(model, processor):
        model = tf.CLIPModel.from_pretrained(model, dtype=torch.float32)
        processor = tf.CLIPProcessor.from_pretrained(processor)
        pairs = [dict(text=[p], images=[i], return_tensors="pt") for p, i in zip(prompts, pictures)]
        out = [model(**processor(**pair)) for pair in pairs]
        embeddings, logits = zip(*((o.image_embeds, o.logits_per_image[0]) for o in out))
        return torch.cat(embeddings), torch.cat(logits), model.logit_scale.exp()

    embeddings, logits, scale = outputs(hub["clip"], hub["clip"])
    expected = {"clip": 2.5 * (logits / scale).clamp(min=0), "aesthetic": small_models[1](embeddings)[:, 0]}
    expected["pickscore"] = outputs(hub["pickscore"], hub["pickscore-processor"])[1]
    for name, by_hand in expected.items():
        score = rewards.get_reward(name)(images, prompts)
        assert score.std() > 0.02, name
        torch.testing.assert_close(score, by_hand, rtol=5e-3, atol=0.02, msg=lambda m: f"{name}: {m}")
    wrong = rewards.get_reward("clip")(images, prompts[1:] + prompts[:1])
    assert (expected["clip"] > wrong + 0.2).float().mean() > 0.9
    monkeypatch.setitem(hub, "clip", "nowhere")  # with --model tiny `clip` is the embedded one all the same
    both = rewards.get_reward("compress,clip:0.5", "tiny").terms(images, prompts)
    torch.testing.assert_close(both[1], 0.5 * expected["clip"], rtol=5e-3, atol=0.02)


@torch.no_grad()
def test_align_is_bertscore_recall_of_a_greedy_description(hub, monkeypatch):
    """Picture by picture and token by token; recall in loops, on the second of the encoder's three layers."""
    images, pictures, prompts = drawn(200)
    bert, tokenizer = tf.AutoModel.from_pretrained(hub["bert"]), tf.AutoTokenizer.from_pretrained(hub["bert"])
    question = "USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:"
    llava = tf.LlavaForConditionalGeneration.from_pretrained(hub["llava"])
    processor = tf.AutoProcessor.from_pretrained(hub["llava"])

    def describe(picture):
        out, ids = llava(**processor(text=question, images=picture, return_tensors="pt")), []
        while len(ids) < 64 and llava.config.text_config.eos_token_id not in ids:
            ids.append(int(out.logits[0, -1].argmax()))
            out = llava(input_ids=torch.tensor([ids[-1:]]), past_key_values=out.past_key_values)
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    def embed(text):
        state = bert(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        return state / state.norm(dim=1, keepdim=True)

    def recall(prompt, said):
        reference, candidate = embed(f"The image contains {prompt}")[1:-1], embed(said)
        return np.mean([max(float(r @ c) for c in candidate) for r in reference])

    said = [describe(picture) for picture in pictures]
    assert len(set(said)) > 2 and len({len(text.split()) for text in said}) > 1
    assert rewards.describe(images, hub["llava"]) == said
    expected = torch.tensor([(recall(p, s) - 0.5170288) / (1 - 0.5170288) for p, s in zip(prompts, said)])
    score = rewards.get_reward("align")(images, prompts)
    torch.testing.assert_close(score, expected.float(), rtol=1e-3, atol=1e-3)


def test_a_model_out_of_reach_is_named(hub, tmp_path, monkeypatch):
    """And a file of tensors cannot run a command."""
    monkeypatch.setitem(hub, "clip", f"{tmp_path}/absent")
    message = f"^cannot load {tmp_path}/absent .*hub.*compress and incompress need no model$"
    with pytest.raises(BadInput, match=message):
        rewards.get_reward("clip")(torch.rand(1, 3, 8, 8), ["a cat"])
    runs_a_command = f"cos\nsystem\n(S'touch {tmp_path}/touched'\ntR.".encode()
    (tmp_path / "aesthetic-model.pth").write_bytes(runs_a_command)
    with pytest.raises(BadInput, match=f"^cannot load {tmp_path} "):
        rewards.load("aesthetic-model.pth", str(tmp_path))
    assert not (tmp_path / "touched").exists()


def test_prompt_sets():
    """The ImageNet animals are classes 0 to 397 with all their names, as in DDPO's and RLCM's code."""
    animals, others, active = sets = [rewards.get_prompts(name) for name in rewards.PROMPTS]
    assert [len(set(v)) for v in sets] == [len(v) for v in sets] == [45, 24, 135]
    labels = json.loads((HERE / "tiny" / "pictures.json").read_text())["labels"]
    assert not set(animals) & set(others) and set(others) <= set(labels)
    assert {"an ant riding a bike", "a dog playing chess", "a kangaroo washing the dishes"} < set(active)
    imagenet = rewards.get_prompts(str(HERE / "examples" / "imagenet-animals.txt"))
    assert len(imagenet) == len(set(imagenet)) == 398
    assert (imagenet[0], imagenet[281]) == ("tench, Tinca tinca", "tabby, tabby cat")


def test_prompts_from_a_file_and_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n\n  red apple \n")
    Path("notepad.txt").write_bytes("\ufeffa caf\u00e9\r\nowl, bird\r\n".encode())
    assert rewards.get_prompts("p.txt") == ["a cat", "red apple"]
    assert rewards.get_prompts("notepad.txt") == ["a caf\u00e9", "owl, bird"]
    for words in ("a cat", "animals, please", "a cat " * 200):
        assert rewards.get_prompts(words) == [words.strip()]
    for typo in ("promts.txt", "my promts.txt", "cat", " ", ""):
        with pytest.raises(BadInput, match="two words"):
            rewards.get_prompts(typo)
    Path("empty.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="empty.txt is empty"):
        rewards.get_prompts("empty.txt")


@pytest.mark.parametrize("path", sorted((HERE / "bench").glob("*.py")), ids=lambda path: path.name)
def test_every_script_says_how_to_use_it_and_refuses_in_one_line(path, capsys):
    module = importlib.import_module(f"bench.{path.stem}")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0 and f"python bench/{path.name}" in capsys.readouterr().out
    needed = {"ablate": ["horizon"], "extensions": ["value"], "evaluate": ["run"], "plot": ["run"]}
    needed["sample"] = ["run", "a cat"]
    assert module.main([*needed.get(path.stem, []), "--no-such-flag"]) == 2
    assert re.fullmatch(rf"bench/{path.name}: .*no-such-flag.*\n", capsys.readouterr().err)


def test_evaluate_and_sample_draw_what_a_plain_pipeline_draws(mini, finished, tmp_path, monkeypatch):
    (tmp_path / "two.txt").write_text("pizza\na cat\n")
    rows = evaluate.evaluate(finished, str(tmp_path / "two.txt"), steps=[1, 2], pictures=6)
    cases = {(row["steps"], row["weights"], row["prompts"]): row for row in rows}
    assert set(cases) == set(itertools.product((1, 2), ("base", "tuned"), ("training", "held-out")))
    assert plot.read_rows(finished / "evaluation.csv") == rows and (finished / "evaluation.png").exists()
    drawn = []
    monkeypatch.setattr(rlcm, "sample_grid", lambda images, *_, **__: drawn.append(images))
    sample.sample(finished, ["pizza", "a cat"] * 3, [1.0])
    pipe = DiffusionPipeline.from_pretrained(mini, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for weights, row in (("base", drawn[0][:6]), ("tuned", drawn[0][6:])):
        if weights == "tuned":
            pipe.load_lora_weights(finished)
        g = [torch.Generator().manual_seed(i) for i in range(6)]
        images = pipe(["pizza", "a cat"] * 3, generator=g, output_type="pt", **DRAW).images
        torch.testing.assert_close(row, images, rtol=0, atol=1e-4)
        r, found = rewards.compress(images, [""] * 6), cases[2, weights, "held-out"]
        assert found["reward"] == pytest.approx(r.mean().item(), abs=0.003)
        assert found["standard_error"] == pytest.approx(r.std().item() / 6**0.5, rel=0.02)
    assert (drawn[0][:6] - drawn[0][6:]).abs().max() > 1e-3  # it has learnt


def test_compare_refuses_a_run_of_other_settings(tmp_path):
    run, cfg = tmp_path / "run", compare.settings(tmp_path / "run", [])
    assert not compare.finished(run, [])
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(cfg)))
    evaluate.write_rows([{"reward_mean": 1}] * cfg.epochs, run / "metrics.csv")
    with pytest.raises(rewards.BadInput, match="remove it"):  # it never got as far as a checkpoint
        compare.finished(run, [])
    [(run / name).touch() for name in ("checkpoint.pt", "judged.csv")]
    assert compare.finished(run, []) and not compare.finished(run, ["--epochs", 99])
    for name, value in (("lr", 0.5), ("epochs", 9)):
        with pytest.raises(rewards.BadInput, match=f"{name} .*{value}"):
            compare.finished(run, [f"--{name}", value])


def example(name):
    spec = importlib.util.spec_from_file_location(name, HERE / "examples" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_points_learn_to_please():
    points = example("points")
    curve = points.learn(points.pretrain(500), epochs=12)
    assert np.mean(curve[-3:]) > curve[0] + 0.5


EXAMPLES = ("last_noise", "rlcm"), ("value", "ddpo"), ("value", "score"), ("differentiable", "rlcm")


@pytest.mark.parametrize("name, method", EXAMPLES)
def test_an_example_leaves_a_lora_for_a_plain_pipeline(name, method, tmp_path, capsys):
    """It draws the pictures whose mean reward the example says that it ends with."""
    (tmp_path / "three.txt").write_text("cat\ndog\nowl\n")
    small = dict(epochs=2, batch_size=6, micro_batch=4, steps=4, guidance=3.0, lr=1e-2, lora_alpha=8)
    reward, train = "clip" if name == "differentiable" else "compress", example(name).train
    files = dict(prompts=str(tmp_path / "three.txt"), out=str(tmp_path / "run"))
    before, after = train(rlcm.Config(reward=reward, method=method, model="tiny", **small, **files))
    says = capsys.readouterr().out
    assert f"{before:.3f} -> {after:.3f}" in says and (tmp_path / "run" / "samples.png").exists()
    if name == "differentiable":
        assert after > before + 0.1
        with pytest.raises(rewards.BadInput, match="compress has no gradient"):
            train(rlcm.Config(out=str(tmp_path / "other")))
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / ("lcm" if method == "rlcm" else "sd"))
    pipe.load_lora_weights(tmp_path / "run")
    if method != "score":  # its times are real, a scheduler's are not
        options = dict(num_inference_steps=4, guidance_scale=3.0, height=64, width=64, output_type="pt")
        options |= {"eta": 1.0} if method == "ddpo" else {}
        noise, prompts = [torch.Generator().manual_seed(i) for i in range(3)], ["cat", "dog", "owl"]
        images = pipe(prompts, generator=noise, **options).images
        assert abs(rlcm.get_reward(reward, "tiny")(images, prompts).mean().item() - after) < 2e-3


def test_both_terms_of_differentiable_are_the_whole_gradient(monkeypatch, tmp_path):
    """Of E[r], in closed form, on Gaussians; the first term has all of the last evaluation's."""
    m, module, found = Linear("rlcm", 4), example("differentiable"), []
    m.pipe.scheduler = scheduler_of("rlcm")
    stubs = dict(load_model=lambda _: m, get_reward=lambda *_: lambda images, _: quadratic(images))
    stubs |= dict(encode=lambda _, own: torch.zeros(len(own), 1, 1), draw=lambda *_: torch.zeros(2, 1, 1, 2))
    for name, stub in (stubs | dict.fromkeys(("save_lora", "sample_grid"), lambda *_: None)).items():
        monkeypatch.setattr(rlcm, name, stub)
    monkeypatch.setattr(module, "decode", lambda _, x: x)
    note = lambda _: found.append([p.grad for p in m.trained.values()])  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", note)
    given = dict(epochs=16, batch_size=8192, micro_batch=8192, max_grad_norm=1e9, adv_clip=1e9, min_count=1)
    for hybrid in (False, True):
        module.train(Config(**given, prompts="a cat", out=str(tmp_path / str(hybrid))), hybrid)
    mean, var, _ = m.laws(*(given := m.parameters()))
    exact = torch.stack(torch.autograd.grad((mean - 2) ** 2 + var, given))  # of -r, two numbers of a latent
    first, both = torch.stack([torch.stack(g) for g in found]).double().chunk(2)
    error = both.std(0).norm() / 4
    assert error < 0.02 * exact.norm() and (both.mean(0) - exact).norm() < 3 * error
    assert not first[..., :3].any() and (first.mean(0) - exact)[:, 3].norm() < 0.02 * exact[:, 3].norm()


def test_the_ocr_reward_compares_texts():
    for text, score in (("Open", 1.0), ("OPEM", 0.75), ("", 0.0), ("!?", 0.0)):
        assert example("ocr_reward").similarity('a sign that says "OPEN"', text) == score
