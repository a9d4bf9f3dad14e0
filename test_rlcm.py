"""Tests of rlcm.py, then of rewards.py, bench/ and examples/, against independent computations.

python -m pytest -q -n 2 --dist worksteal test_rlcm.py     # two processes of one thread each
"""

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import builtins
import contextlib
import csv
import dis
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accelerate
import diffusers
import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributions import Normal, kl_divergence
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import rewards
import rlcm
from bench import ablate, compare, evaluate, plot, sample
from examples import differentiable, ocr_reward, points, sdxl, value
from rewards import BadInput
from rlcm import METHODS, Config, advantages, gaussian_kl, path_kl, policy, policy_loss, preset, rollout
from tiny import make_tiny

HERE = Path(rlcm.__file__).resolve().parent
LORA = "pytorch_lora_weights.safetensors"
torch.set_num_threads(1)
rlcm.quiet()


@pytest.fixture(autouse=True)
def own_seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- the policy and its schedules
def wave(x, t, c):
    """An arbitrary network."""
    return torch.tanh(x * 1.3 + t / 500 - 1) + c


def wave_x0(x, k, c, s):
    """The clean latent if `wave` is the noise."""
    return (x - s.noise[k] * wave(x, s.t[k], c)) / s.signal[k]


def scheduler_of(method, **changes):
    """The embedded model's, which ends without noise."""
    kind = LCMScheduler if method == "rlcm" else DDIMScheduler
    return kind.from_pretrained(HERE / METHODS[method].tiny / "scheduler", **changes)


def schedule_of(method, steps):
    return METHODS[method].schedule(scheduler_of(method), Config(steps=steps))


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
STEPS = [  # method, steps, what differs in the embedded model's scheduler, number of actions
    ("rlcm", 50, {}, 49),
    ("rlcm", 4, {"timestep_scaling": 0.002}, 3),  # f_theta is far from the predicted clean latent
    ("rlcm", 4, V | ZERO_SNR, 3),
    ("rlcm", 7, {"prediction_type": "sample"} | ZERO_SNR, 6),
    ("ddpo", 5, {}, 4),
    ("ddpo", 7, {}, 7),  # t - 1000 // 7 is not the next of these trailing timesteps
    ("ddpo", 7, {"timestep_spacing": "linspace"} | V, 6),
    ("ddpo", 7, {"timestep_spacing": "leading", "set_alpha_to_one": False}, 7),  # Stable Diffusion's own
    ("ddpo", 10, {"prediction_type": "sample"}, 9),
]


@pytest.mark.parametrize("method, steps, changes, actions", STEPS)
def test_steps_equal_diffusers(method, steps, changes, actions):
    """A whole trajectory with the same noise through LCMScheduler, or through DDIMScheduler with eta 1."""
    scheduler = scheduler_of(method, **changes)
    s = METHODS[method].schedule(scheduler, Config(steps=steps))
    model = SimpleNamespace(prediction=scheduler.config.prediction_type)
    scheduler.set_timesteps(steps)
    assert s.t.tolist() == scheduler.timesteps.tolist()
    assert s.actions == list(range(actions))

    def denoise(x, k, c, s):
        return rlcm.StableDiffusion.pred_x0(model, wave(x, s.t[k], c), x, k, s)

    options = {"eta": 1.0} if method == "ddpo" else {}
    c = torch.randn(3, 1, 1, 1)
    x = torch.randn(3, 12, 8, 8)
    for k, t in enumerate(scheduler.timesteps):
        noise = torch.Generator().manual_seed(k)
        theirs = scheduler.step(wave(x, t, c), t, x, generator=noise, **options).prev_sample
        mean, std = policy(denoise, x, k, c, s)
        x = mean + std * torch.randn(x.shape, generator=noise.manual_seed(k))
        assert_close(x, theirs, rtol=1e-4, atol=1e-5)


def paper_policy(method, x, k, eps, s):
    """Mean and std as each paper prints them, from alpha-bar; the others step to alpha_bar_next."""
    ab = s.signal[k] ** 2
    ab_next = s.signal_next[k] ** 2
    sigma = ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt()  # DDIM, eq. 16 with eta = 1
    if method == "rlcm":
        f = s.c_skip[k] * x + s.c_out[k] * (x - (1 - ab).sqrt() * eps) / ab.sqrt()
        return ab_next.sqrt() * f, (1 - ab_next).sqrt()
    if method == "ddpo":  # DDIM, eq. 12
        pred_x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
        return ab_next.sqrt() * pred_x0 + (1 - ab_next - sigma**2).clamp(min=0).sqrt() * eps, sigma
    rho = ab / ab_next  # the reverse-time SDE, over a step of any length, with a = the score
    return (x - (1 - rho) * eps / (1 - ab).sqrt()) / rho.sqrt(), sigma


@pytest.mark.parametrize("method, steps", [("rlcm", 4), ("rlcm", 8), ("ddpo", 5), ("ddpo", 50), ("score", 6)])
def test_policy_is_that_of_each_paper(method, steps):
    x, c = torch.randn(2, 4, 3, 4, 4)
    s = schedule_of(method, steps)
    for k in range(steps):
        mean, std = policy(wave_x0, x, k, c, s)
        expected, sigma = paper_policy(method, x, k, wave(x, s.t[k], c), s)
        assert_close(mean, expected, atol=1e-4, rtol=1e-4)
        assert_close(std, sigma, atol=2e-4, rtol=1e-4)


def test_score_schedule_is_the_sde_of_the_betas():
    """dX = -1/2 beta X dt + sqrt(beta) dB has alpha_bar(t) = exp(-integral of beta), at any real t.

    In 12 steps the square root of the integral falls evenly to a twelfth, then the data are reached.
    """
    s = schedule_of("score", 12)
    integral = -np.log1p(-scheduler_of("score").betas.double().numpy()).cumsum()  # at t = 0 .. 999
    before = np.interp(s.t, range(1000), integral)
    np.testing.assert_allclose(-2 * s.signal.log(), before, rtol=1e-3)
    np.testing.assert_allclose(-2 * s.signal_next.log(), np.append(before[1:], 0), rtol=1e-3)
    np.testing.assert_allclose(np.sqrt(before / before[0]), np.linspace(1, 1 / 12, 12), rtol=1e-3)
    assert s.t[0] == 999 and s.actions == list(range(11))
    finest = schedule_of("score", 400)
    assert finest.t[-1] == pytest.approx(0, abs=1e-3) and finest.t[-2] > 0  # not between the data and t = 0


def test_numbers_of_the_docstring():
    """The table, and the worked advantages."""
    text = rlcm.__doc__.split("IN NUMBERS")[1].split("GLOSSARY")[0]
    for method, steps in (("rlcm", 4), ("ddpo", 5)):
        s = schedule_of(method, steps)
        for k in range(steps):
            std = s.new[k].sqrt() * s.noise_next[k]
            row = f"{k}  {s.t[k]}   {s.signal[k]:.3f}  {s.noise[k]:.3f}  {s.new[k]:.3f}  {std:.3f}"
            assert row + ", no action" * (k not in s.actions) in text
    numbers = [re.findall(r"-?\d\.\d+", part) for part in text[text.index("Rewards") :].split("give")]
    r, A = (torch.tensor([float(n) for n in part]) for part in numbers)
    assert_close(advantages(r[:4], [*"aaaa"], {}, 4, 4, 10.0), A, rtol=0, atol=0.005)


def test_score_in_small_steps_is_the_reverse_sde():
    """x + beta dt (x / 2 + a), std^2 = beta dt, Girsanov's KL."""
    x, c = torch.randn(2, 4, 3, 4, 4)
    c_ref = c + 0.1
    s = schedule_of("score", 400)
    for k in (50, 200, 300):
        beta_dt = 2 * (s.signal_next[k] / s.signal[k]).log()
        a = -wave(x, s.t[k], c) / s.noise[k]
        a_ref = -wave(x, s.t[k], c_ref) / s.noise[k]
        mean, std = policy(wave_x0, x, k, c, s)
        mean_ref, _ = policy(wave_x0, x, k, c_ref, s)
        assert_close(mean, x + beta_dt * (x / 2 + a), atol=2e-3, rtol=0)
        assert_close(std**2, beta_dt, atol=0, rtol=0.1)
        girsanov = beta_dt / 2 * ((a - a_ref) ** 2).sum((1, 2, 3))
        assert_close(gaussian_kl(mean, mean_ref, std), girsanov, rtol=0.1, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_rollout_has_the_log_prob_and_kl_of_its_steps(method):
    """By torch.distributions. The last step has no noise, and so neither."""
    s = schedule_of(method, 5)
    z = torch.randn(6, 3, 2, 4, 4)
    x, means, log_p = rollout(wave_x0, s, 1.0, z)
    _, kl = path_kl(lambda x, k, c, s: wave_x0(x, k, 0.9, s), s, 1.0, x, means)
    assert torch.equal(x[0], z[0]) and list(log_p) == [0, 1, 2, 3]
    for k in range(5):
        mean_ref, std = policy(wave_x0, x[k], k, 0.9, s)
        assert_close(x[k + 1], means[k] + std * z[k + 1])
        if k < 4:
            p = Normal(means[k], std)
            assert_close(log_p[k], p.log_prob(x[k + 1]).mean((1, 2, 3)))
            assert_close(kl[:, k], kl_divergence(p, Normal(mean_ref, std)).sum((1, 2, 3)))
    assert kl.shape == (3, 5) and not kl[:, 4].any()


@pytest.mark.parametrize("method", METHODS)
def test_no_action_has_most_of_the_gradient(method):
    """At the start of the method's default run, on half a batch."""
    cfg = Config(**preset(method))
    model = rlcm.load_model(cfg, "cpu")
    s = model.schedule(cfg.steps)
    prompts = rewards.ANIMALS[:32]
    c = model.encode(prompts)
    x, _, _ = rollout(model.denoise, s, c, torch.randn(cfg.steps + 1, 32, *model.shape))
    with torch.no_grad():
        A = standardised(rewards.compress(model.decode(x[-1]), prompts))
    squares = []
    for k in s.actions:
        mean, std = policy(model.denoise, x[k], k, c, s)
        loss = (-A * rlcm.log_prob(x[k + 1], mean, std)).sum()
        found = torch.autograd.grad(loss, list(model.trainable.values()))
        squares.append(sum(g.square().sum() for g in found))
    shares = torch.stack(squares) / sum(squares)
    assert shares.max() < 0.6, shares


# ------------------------------------------------------------------------------------- training, on Gaussians
class Linear:
    """A model by the contract whose steps and laws are all Gaussian.

    It is exact for data of N(0, 1), but in step k its score is off by -a_k x + b_k c. These offsets are
    trained; those of the reference are others.
    """

    shape = (3, 1, 1)
    device = "cpu"

    def __init__(self, method, steps, off=0.15):
        self.method = method
        self.s = schedule_of(method, steps)
        self.ref = off * torch.randn(2, steps)
        self.offsets = torch.nn.Parameter(off * torch.randn(2, steps))
        self.used = self.offsets
        self.trainable = {"offsets": self.offsets, "unused": torch.nn.Parameter(torch.zeros(1))}
        self.passes = []  # the prompts of each

    def schedule(self, H):
        return self.s

    def encode(self, prompts):
        return torch.tensor([{"a": 1.0, "b": 2.0}[prompt] for prompt in prompts]).view(-1, 1, 1, 1)

    def denoise(self, x, k, c, s):
        self.passes.append(c.flatten().tolist())
        a, b = self.used[:, k]
        score = b * c - (1 + a) * x
        return (x + s.noise[k] ** 2 * score) / s.signal[k]

    def decode(self, x):
        return x

    @contextlib.contextmanager
    def reference(self):
        self.used = self.ref
        yield
        self.used = self.offsets

    def save(self, folder):
        pass

    def kernels(self, offsets):
        """Slope, shift and std of every step, from its policy at x = 0 and x = 1."""
        points = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        kernels = []
        self.used = offsets
        for k in range(len(self.s.t)):
            mean, std = policy(self.denoise, points, k, torch.ones(1), self.s)
            shift, end = mean.flatten()
            kernels.append((end - shift, shift, std))
        self.used = self.offsets
        return kernels

    def laws(self, offsets, c=1.0):
        """Mean and variance of x_H, and the expected KL of the path, of one number of the latent."""
        mean = kl = torch.tensor(0.0)
        var = torch.tensor(1.0)
        references = self.kernels(self.ref)
        for (slope, shift, std), (slope_ref, shift_ref, _) in zip(self.kernels(offsets), references):
            if std > 0:
                p = slope - slope_ref
                q = (shift - shift_ref) * c
                kl = kl + (p**2 * (var + mean**2) + 2 * p * q * mean + q**2) / (2 * std**2)
            mean = slope * mean + shift * c
            var = slope**2 * var + std**2
        return mean, var, kl


def quadratic(images, prompts):
    return (-((images - 2) ** 2) / 2).sum((1, 2, 3))


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Trains a Linear, by default without moving it -> the gradient of every optimizer step, and the rows."""
    monkeypatch.setitem(rewards.REWARDS, "quadratic", quadratic)

    def play(model, prompts="a\nb", at_step=None, on_epoch=None, **settings):
        gradients = []
        rows = []

        def before_step(optimizer, *_):
            gradients.append(model.offsets.grad.clone())
            if at_step:
                at_step(optimizer)

        def after_epoch(epoch, given, row):
            assert given is model
            model.batches = model.passes
            model.passes = []
            rows.append(row)
            if on_epoch:
                on_epoch(epoch, row)

        file = tmp_path / "prompts.txt"
        file.write_text(prompts)
        cfg = dict(method=model.method, steps=len(model.s.t), reward="quadratic", prompts=str(file))
        cfg |= dict(epochs=1, batch_size=12, lr=1e-12, buffer_size=1, min_count=1, save_every=1000)
        cfg |= dict(adv_clip=1e9, max_grad_norm=1e9, out=f"{tmp_path}/{time.time()}")
        monkeypatch.setattr(rlcm, "load_model", lambda cfg, device: model)
        hook = register_optimizer_step_pre_hook(before_step)
        rlcm.train(Config(**cfg | settings), on_epoch=after_epoch)
        hook.remove()
        return torch.stack(gradients), rows

    return play


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("method, steps", [("rlcm", 4), ("ddpo", 5), ("score", 5)])
def test_gradient_is_that_of_the_objective(play, method, steps, lam):
    """The mean of 8 gradients is that of E[r / std r - lambda sum_k KL_k] in closed form. Two prompts.

    The loss is a mean over actions and the D = 3 numbers; a step that is no action learns nothing. With one
    update REINFORCE has PPO's gradients.
    """
    model = Linear(method, steps)
    sizes = dict(batch_size=8192, micro_batch=8192, kl=lam)
    found, _ = play(model, epochs=8, **sizes)
    reinforce, _ = play(model, algo="reinforce", **sizes)
    assert_close(reinforce, found[:1], rtol=1e-3, atol=1e-4)
    found = -3 * len(model.s.actions) * found

    objective = 0
    for c in (1.0, 2.0):
        mean, var, kl = model.laws(model.offsets, c)
        std = (3 * (var**2 / 2 + (mean - 2) ** 2 * var)).sqrt().detach()
        objective = objective - 3 / 4 * ((mean - 2) ** 2 + var) / std - lam * 3 / 2 * kl
    (exact,) = torch.autograd.grad(objective, model.offsets)
    exact[:, len(model.s.actions) :] = 0
    error = found.std(0).norm() / 8**0.5
    assert error < 0.015 * exact.norm() and (found.mean(0) - exact).norm() < 3 * error


def test_gradient_is_the_same_however_the_batch_is_cut(play):
    """Into micro-batches, or into parts for several optimizer steps; or clipped. A group has one prompt."""
    model = Linear("score", 4)
    given = dict(group_size=3, kl=0.3)
    (whole,), _ = play(model, **given)
    (other,), _ = play(model, **given, seed=1)
    assert (other - whole).norm() > 0.1 * whole.norm()
    groups = torch.tensor(model.batches[0]).view(4, 3)
    assert not groups.diff().any() and len(groups.unique()) == 2
    (small,), _ = play(model, **given, micro_batch=5)
    assert {len(batch) for batch in model.batches} == {5, 2}
    halves, _ = play(model, **given, updates=2)
    (clipped,), (_, row) = play(model, **given, max_grad_norm=0.01)
    assert_close(small, whole)
    assert_close(halves.mean(0), whole)
    assert (halves[0] - whole).norm() > 0.1 * whole.norm()
    assert_close(clipped, 0.01 * whole / whole.norm())
    assert row["grad_norm"] == pytest.approx(whole.norm().item()) and row["ratio_drift"] == 0


def test_action_is_charged_for_the_kl_of_later_steps(play, monkeypatch):
    """Of no other, and against the batch's mean."""
    A = []
    kl = []

    def spied_loss(*given):
        A.append(given[2])
        return policy_loss(*given)

    def spied_kl(*given):
        found = path_kl(*given)
        kl.append(found[1])
        return found

    monkeypatch.setattr(rlcm, "policy_loss", spied_loss)
    monkeypatch.setattr(rlcm, "path_kl", spied_kl)
    model = Linear("score", 4)
    play(model)
    play(model, kl=0.5)
    for k in range(3):
        later = kl[0][:, k + 1 :].sum(1)
        assert_close(A[3 + k], A[k] - 0.5 * (later - later.mean()))


def test_score_reaches_the_tilted_gaussian(play):
    """p_ref(x) exp(r(x) / lambda), with r = -(x - 2)^2 / 2. Here lambda counts in stds of r at the end."""
    model = Linear("score", 32, off=0.0)
    _, var_ref, _ = model.laws(model.offsets)
    kl = 0.7

    def at_step(optimizer):
        optimizer.param_groups[0]["lr"] *= 0.95

    play(model, at_step=at_step, prompts="a", epochs=60, lr=0.2, kl=kl, batch_size=512, micro_batch=512)
    found = torch.stack(model.laws(model.offsets)[:2]).detach()
    mean, var = found
    lam = kl * (3 * (var**2 / 2 + (mean - 2) ** 2 * var)).sqrt()
    var = 1 / (1 / var_ref + 1 / lam)
    assert_close(found, torch.stack([2 * var / lam, var]), rtol=0.05, atol=0)
    assert found[0] > 0.5  # it has moved: the reference has mean 0


def test_on_epoch_may_add_columns_and_is_not_timed(play, tmp_path):
    """It is called first with epoch 0 and an empty row. A row without a column has an empty cell."""

    def on_epoch(epoch, row):
        time.sleep(0.5)
        if epoch == 2:
            row["extra"] = torch.tensor(7)

    _, rows = play(Linear("rlcm", 2), on_epoch=on_epoch, epochs=2, out=f"{tmp_path}/run")
    assert rows[0] == {} and 0 < rows[2]["seconds"] < 0.5
    table = csv.DictReader(open(tmp_path / "run" / "metrics.csv"))
    assert [row["extra"] for row in table] == ["", "7.0"]


def test_ppo_clips_only_what_profits():
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_p = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    loss, ratio = policy_loss(log_p, torch.zeros(4), A, "ppo", 0.1)
    loss.sum().backward()
    assert_close(ratio, log_p.detach().exp())
    assert_close(loss.detach(), torch.tensor([-1.1, -math.exp(-0.5), math.exp(0.5), 0.9]))
    assert (log_p.grad != 0).tolist() == [False, True, True, False]  # raised where A > 0, lowered where A < 0


def standardised(r, seen=None):
    seen = torch.as_tensor(r if seen is None else seen).double()
    return ((torch.as_tensor(r) - seen.mean()) / seen.std(correction=0)).float()


def test_advantages_by_hand_with_integer_rewards():
    history = {}
    A = advantages(torch.tensor([1, 3, 10, 10]), ["a", "a", "b", "b"], history, 4, 2, 10.0)
    assert_close(A, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    A = advantages(torch.tensor([5, 7]), ["a", "a"], history, 4, 4, 10.0)
    assert_close(A, standardised([5, 7], seen=[1, 3, 5, 7]))
    advantages(torch.tensor([9, 9]), ["a", "a"], history, 4, 2, 10.0)
    assert history == {"a": [5, 7, 9, 9], "b": [10, 10]}  # the oldest fell out


def test_advantages_of_groups_are_grpos():
    """No history: only the images of this batch count, even where the buffer is smaller than the group."""
    history = {"a": [50.0] * 4, "b": [-50.0] * 4}
    r = torch.randn(12)
    for buffer_size in (1, 4):
        A = advantages(r, [*"aaaabbbbcccc"], history, buffer_size, 1, 10.0)
        assert_close(A, torch.cat([standardised(group) for group in r.split(4)]))


def test_advantages_of_rare_prompts_use_the_batch():
    """And they are clipped."""
    r = torch.tensor([0.0, 1.0, 2.0, 100.0])
    A = advantages(r, [*"abcd"], {}, 16, 2, 1.5)
    assert_close(A, standardised(r).clamp(-1.5, 1.5))  # the last would be 1.73


def test_advantages_of_rewards_in_another_unit_or_shape():
    """They have no unit, and are 0 where all rewards are equal up to rounding.

    (B, 1), as from a linear layer, means (B,). Anything else is an error that has both sizes.
    """
    r = torch.randn(40)
    prompts = [*"abcd"] * 10
    A = advantages(r, prompts, {}, 4, 4, 10.0)
    assert_close(advantages(1e-7 * r, prompts, {}, 4, 4, 10.0), A)
    assert not advantages(0.1 + 1e-8 * r, prompts, {}, 4, 4, 10.0).any()
    assert torch.equal(advantages(r[:, None], prompts, {}, 4, 4, 10.0), A)
    with pytest.raises(RuntimeError, match=r"'\[40\]' is invalid for input of size 80"):
        advantages(torch.randn(40, 2), prompts, {}, 4, 4, 10.0)


def test_method_computes_in_float32():
    """A ratio of bf16 latents: of 1e-3 it would be nothing but rounding."""
    s = schedule_of("rlcm", 4)
    x = torch.randn(8, 3, 8, 8, dtype=torch.bfloat16)
    mean, std = policy(lambda x, k, c, s: wave_x0(x, k, c, s).bfloat16(), x, 1, 0.1, s)
    assert mean.dtype == torch.float32
    x_next = (mean + std * torch.randn(mean.shape)).bfloat16()
    moved = (mean + 0.01).bfloat16()
    means = moved, mean.bfloat16()
    exact = [Normal(m.double(), std).log_prob(x_next.double()).mean((1, 2, 3)).float() for m in means]
    found = [rlcm.log_prob(x_next, m, std) for m in means]
    assert_close(found[0] - found[1], exact[0] - exact[1], rtol=1e-3, atol=1e-6)


def test_method_part_can_be_copied():
    """Its functions use torch, math, numpy, SimpleNamespace and each other."""
    part = re.split(r"# =+ [A-Z ]+ =+\n", (HERE / "rlcm.py").read_text())[1]
    alone = dict(torch=torch, math=math, np=np, SimpleNamespace=SimpleNamespace)
    exec(part, alone)
    for function in filter(inspect.isfunction, alone.values()):
        used = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
        assert used <= alone.keys() | set(dir(builtins)), function
    assert alone["METHODS"].keys() == METHODS.keys()


# -------------------------------------------------------------------------------------- runs of a small model
SMALL = dict(resolution=16, steps=2, epochs=2, batch_size=4, micro_batch=16, lr=0.1, guidance_scale=3.0)
SMALL |= dict(lora_rank=2, lora_alpha=4, buffer_size=8, min_count=4, save_every=1, prompts="a red cat")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])  # with what takes long to import:
PRELOADED = accelerate.Accelerator, diffusers.LatentConsistencyModelPipeline
session = pytest.fixture(scope="session")


def make_mini(folder, kind):
    """The embedded pipeline with a small U-Net of random weights: for what a run does around its network."""
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / kind)
    blocks = dict(down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"])
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config | blocks | {"block_out_channels": [16]})
    if kind == "sd":  # another scheduler than it is trained with
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder)
    return str(folder)


@session
def mini(tmp_path_factory):
    return make_mini(tmp_path_factory.mktemp("lcm"), "lcm")


@session
def mini_sd(tmp_path_factory):
    return make_mini(tmp_path_factory.mktemp("sd"), "sd")


@session
def finished(mini, tmp_path_factory):
    """A run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert start(model=mini, out=out) == 0
    return out


def words(**settings):
    """A command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def start(**settings):
    return rlcm.main(words(**SMALL | settings))


def column(run, name):
    with open(Path(run) / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def contents(folder):
    paths = [p for p in Path(folder).rglob("*") if "__pycache__" not in str(p)]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def for_pillow(images):
    return [Image.fromarray(np.uint8(np.rint(image.permute(1, 2, 0).numpy() * 255))) for image in images]


def ddim(folder, lora):
    """A plain pipeline that samples with DDIM."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(lora)
    return pipe


def plain_images(pipe, prompts, size=64, **options):
    """What a plain pipeline draws, image i from the seed i."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    options = dict(num_inference_steps=2, guidance_scale=3.0) | options
    return pipe(prompts, generator=noise, height=size, width=size, output_type="pt", **options).images


def check_grid(run, epoch, pipe, prompts=["a red cat"], size=16, **options):
    """A run's grid begins with the images that a plain pipeline draws, 128 pixels wide. Returns those."""
    images = plain_images(pipe, prompts, size, **options)
    sheet = np.asarray(Image.open(run / "samples" / f"epoch-{epoch:04d}.png")).astype(int)
    for n, image in enumerate(for_pillow(images)):
        expected = np.asarray(image.resize((128, 128))).astype(int)
        assert np.abs(sheet[:128, 128 * n : 128 * (n + 1)] - expected).max() <= 2
    return images


def test_two_files_alone(mini, tmp_path, monkeypatch):
    """In an empty folder and a new interpreter: importing changes nothing; they train, resume and refuse.

    A model file that imports rlcm gets the running program. A terminal may fail to print a prompt.
    """
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text("\u732b\nan ant", encoding="utf-8")
    for name in ("rlcm.py", "rewards.py"):
        shutil.copy(HERE / name, tmp_path)
    Path("mine.py").write_text(f"""
import dataclasses
from rlcm import load_model
def load(cfg, device):
    print("load_model of", load_model.__module__)
    return load_model(dataclasses.replace(cfg, model={mini!r}), device)
""")
    train = words(**SMALL | {"prompts": "own.txt", "epochs": 1}, model="mine.py:load", out="run")
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
    env = {name: os.environ.get(name, "") for name in ("PATH", "HOME", "OMP_NUM_THREADS")}
    env["PYTHONIOENCODING"] = "cp1252"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the first is '?'" in done.stdout
    said = done.stdout.splitlines()
    bars = [line for line in re.split(r"[\r\n]|\x1b\[A", done.stderr) if line.strip()]
    assert said[0] == "[]" and re.fullmatch("rlcm on mine.py:load, device cpu, folder run", said[1])
    assert said.count("load_model of __main__") == 2
    assert [line for line in said if "status" in line] == ["status 0", "status 0", "status 2"]
    assert bars.pop().startswith("rlcm.py: unknown reward 'nope'")
    assert bars and all("%" in line for line in bars), bars  # quiet
    run = {"config.json", "prompts.txt", "metrics.csv", "reward.png", LORA, "checkpoint.pt", "samples"}
    assert contents("run").keys() == run | {f"samples/epoch-000{epoch}.png" for epoch in (0, 1, 2)}
    assert len({path.stat().st_mode for path in Path("run").iterdir() if path.is_file()}) == 1


# --------------------------------------------------------------------------------------------------- settings
COLUMNS = """
method reward steps epochs batch_size updates lora_rank lora_alpha buffer_size min_count lr clip_range
adv_clip max_grad_norm guidance_scale
""".split()
PUBLISHED = """
rlcm compress   8  1000 16  1 16 32 16 16 0.0001 0.0001 10.0 5.0 8.0
rlcm aesthetic  8  1000 32  1 8  8  32 16 0.0001 0.0001 10.0 5.0 8.0
rlcm align      16 708  120 1 16 32 32 16 0.0001 0.0001 10.0 5.0 8.0
ddpo compress   50 100  256 4 4  4  16 16 0.0003 0.0001 5.0  1.0 5.0
ddpo aesthetic  50 200  256 2 4  4  32 16 0.0003 0.0001 5.0  1.0 5.0
ddpo align      50 200  288 2 4  4  32 16 0.0003 0.0001 5.0  1.0 5.0
"""  # DESIGN.md, section 5: RLCM's four GPUs (align: three) as one; ddpo-pytorch's config/dgx.py
PUBLISHED = [line.split() for line in PUBLISHED.strip().splitlines()]


def parsed(command):
    return rlcm.parse(shlex.split(command, comments=True))[0]


def table_row(cfg):
    return [str(getattr(cfg, name)).removesuffix("_13b") for name in COLUMNS]


def test_presets_are_published_and_flags_win(capsys):
    """--help shows the values that this method and model would use."""
    assert table_row(parsed("--model real --steps 8")) == PUBLISHED[0]
    assert table_row(parsed("--model real --method ddpo")) == PUBLISHED[3]
    assert table_row(parsed("--model real --method score"))[1:] == PUBLISHED[3][1:]
    assert parsed("") == Config(**preset()) == Config()
    cfg = parsed("--model real --method ddpo --lr 1e-3 --steps 4 --resolution 64")  # also Config's own values
    assert (cfg.lr, cfg.steps, cfg.resolution, cfg.batch_size) == (1e-3, 4, 64, 256)
    with pytest.raises(SystemExit, match="0"):
        rlcm.main(["--method", "ddpo", "--lr", "0.5", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.findall(r"--(?:lr LR|steps STEPS) .*?\(default: (.*?)\)", shown) == ["5", "0.004"]


def test_commands_of_docs_papers_are_published(monkeypatch):
    monkeypatch.chdir(HERE)
    text = "\n".join(re.findall(r"```\w*\n(.*?)```", Path("docs/papers.md").read_text(), re.S))
    configs = [parsed(command) for command in re.findall(r"^python rlcm\.py (.*)", text, re.M)]
    for cfg in configs:
        rlcm.check(cfg)
        assert rlcm.get_reward(cfg.reward, cfg.model) and len(rlcm.get_prompts(cfg.prompts)) > 1
    assert [table_row(cfg) for cfg in configs] == PUBLISHED


def test_default_is_the_embedded_model_on_a_gpu_too(monkeypatch):
    assert parsed("--model real").precision == "fp32"
    for hardware, precision in ((True, "bf16"), (False, "fp32")):  # a T4 emulates bf16, slowly
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware)
        assert parsed("").model == "tiny" and parsed("").precision == "fp32"
        assert parsed("--model real").precision == parsed("--model real --method ddpo").precision == precision


def test_model_file_settings_lie_between_defaults_and_flags(tmp_path):
    file = tmp_path / "sized.py"
    file.write_text("def load(cfg, device): pass\nload.settings = dict(steps=7, resolution=32)")
    cfg = parsed(f"--model {file}:load --method ddpo --steps 9")
    expected = dict(model=f"{file}:load", method="ddpo", steps=9, resolution=32)
    assert cfg == Config(**expected)
    file.write_text("def load(cfg, device): pass\nload.settings = dict(method='score')")
    os.utime(file, (1, 1))
    assert parsed(f"--model {file}:load").method == "score"
    assert parsed(f"--model {file}:load --method rlcm").method == "rlcm"


@pytest.mark.parametrize("wrong", [
    dict(precision="bfloat16"), dict(algo="grpo"), dict(gradient_checkpointing="no"), dict(lr="1e-4"),
    dict(epochs=2.5), dict(steps="4"),
])  # fmt: skip
def test_settings_made_in_python_are_checked(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s)'{name}'.*expected.*{value}"):
        Config(**wrong)
    with pytest.raises(BadInput, match="--method grpo: must be one of rlcm, ddpo, score"):
        rlcm.check(Config(method="grpo"))


# ------------------------------------------------------------------------------------- the model and its LoRA
def test_denoise_is_the_guided_network(mini, mini_sd):
    """In reference() it is the pretrained one."""
    x = torch.randn(2, 12, 2, 2)
    for folder, settings in ((mini, {}), (mini_sd, {"method": "ddpo", "gradient_checkpointing": True})):
        model = rlcm.load_model(Config(**SMALL, **settings, model=folder), "cpu")
        for p in model.trainable.values():
            torch.nn.init.normal_(p, std=0.1)
        s = model.schedule(2)
        with pytest.warns(UserWarning, match="ignored"):
            model.encode(["dog " * 99])
        c = model.encode(["cat", "dog"])
        words = c["encoder_hidden_states"]
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        if folder == mini:
            w = model.pipe.get_guidance_scale_embedding(torch.tensor([2.0, 2.0]), 256)
            eps = unet(x, s.t[1], words, timestep_cond=w).sample
        else:
            empty, _ = model.pipe.encode_prompt(["", ""], "cpu", 1, False)
            eps = 3.0 * unet(x, s.t[1], words[2:]).sample - 2.0 * unet(x, s.t[1], empty).sample
        expected = (x - s.noise[1] * eps) / s.signal[1]
        with pytest.raises(KeyboardInterrupt), model.reference():
            assert_close(model.denoise(x, 1, c, s), expected)
            raise KeyboardInterrupt
        pred_x0 = model.denoise(x, 1, c, s)
        pred_x0.square().sum().backward()
        assert (pred_x0 - expected).abs().mean() > 0.01
        assert model.network.is_gradient_checkpointing == ("gradient_checkpointing" in settings)
        assert all(p.grad.any() for p in model.trainable.values())
        assert not model.decode(x).requires_grad  # it would keep the whole decoder's activations


def test_run_learns_and_a_plain_pipeline_draws_its_last_grid(tmp_path):
    given = dict(epochs=3, batch_size=16, micro_batch=16, lr=5e-3, save_every=3, prompts="a red apple")
    run = rlcm.train(Config(**preset("rlcm", "tiny") | given, out=str(tmp_path / "run")))
    r = column(run, "reward_mean")
    assert r[-1] > r[0] + 1.5 * column(run, "reward_std")[0] and column(run, "ratio_drift") == [0.0] * 3
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / "lcm")
    same = dict(num_inference_steps=4, guidance_scale=6.0, size=64, prompts=["a red apple"] * 8)
    before = check_grid(run, 0, pipe, **same)
    pipe.load_lora_weights(run)
    after = check_grid(run, 3, pipe, **same)
    assert (after - before).abs().mean() > 0.005


def test_lora_has_full_strength_in_every_loader(finished, mini, tmp_path):
    """Its alpha is twice its rank."""
    file = finished / LORA
    save_file(convert_state_dict_to_kohya(load_file(file)), tmp_path / "kohya.safetensors")
    for load in (
        lambda pipe: pipe.load_lora_weights(finished),
        lambda pipe: pipe.load_lora_weights(load_file(file)),
        lambda pipe: pipe.unet.load_lora_adapter(file, prefix="unet"),
        lambda pipe: pipe.load_lora_weights(tmp_path / "kohya.safetensors"),
    ):
        pipe = DiffusionPipeline.from_pretrained(mini)
        load(pipe)
        check_grid(finished, 2, pipe)


def test_pipeline_that_would_be_trained_wrongly_is_refused(mini):
    """With a LoRA that is not fused, or fused and not unloaded; or in another dtype than --precision says."""
    cfg = Config(**SMALL)
    pipe = DiffusionPipeline.from_pretrained(mini)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    for prepare in (lambda: None, pipe.unet.fuse_lora):
        prepare()
        with pytest.raises(BadInput, match="first fuse_lora.., unload_lora_weights"):
            rlcm.StableDiffusion(pipe, cfg)
    pipe.unload_lora_weights()
    for dtype, precision in ((torch.bfloat16, "fp32"), (torch.float16, "bf16"), (torch.float32, "bf16")):
        with pytest.raises(BadInput, match="load the pipeline with dtype=torch"):
            rlcm.StableDiffusion(pipe.to(dtype), replace(cfg, precision=precision))
    rlcm.StableDiffusion(pipe.to(torch.float32), cfg)


def test_compiled_network_saves_an_ordinary_lora(finished, mini, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(mini)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    rlcm.StableDiffusion(pipe, Config(**SMALL)).save(tmp_path)
    assert load_file(tmp_path / LORA).keys() == load_file(finished / LORA).keys()


def test_new_sampler_is_one_entry(mini_sd, tmp_path, monkeypatch):
    """DDIM with half of the noise: the LoRA is sampled by a plain pipeline with eta = 0.5."""

    def half(scheduler, cfg):
        s = METHODS["ddpo"].schedule(scheduler, cfg)
        s.new = s.new / 4
        return s

    own = dict(schedule=half, checked_as="half", step_options={"eta": 0.5})
    entry = SimpleNamespace(**vars(METHODS["ddpo"]) | own)
    monkeypatch.setitem(METHODS, "half", entry)
    run = rlcm.train(Config(**SMALL, method="half", model=mini_sd, out=str(tmp_path / "run")))
    check_grid(run, 2, ddim(mini_sd, run), eta=0.5)
    entry.step_options = {"eta": 0.51}
    with pytest.raises(BadInput, match="step 1 is off by"):
        rlcm.load_model(Config(**SMALL, method="half", model=mini_sd), "cpu").schedule(2)


# ------------------------------------------------------------------------------------------------------- runs
def test_what_a_run_says(mini, tmp_path, monkeypatch, capsys):
    """With 20,000 prompts it starts in seconds; its commands can be pasted; a reward's name is no formula."""
    monkeypatch.chdir(tmp_path)
    Path("many.txt").write_text("\n".join(map("cat {}".format, range(20_000))))
    Path("$x^$.py").write_text("def fn(images, prompts): return images.mean((1, 2, 3))")
    began = time.process_time()
    given = dict(model=mini, epochs=1, reward="$x^$.py:fn:2, incompress:0.5")
    assert start(**given, prompts="many.txt", out="a run") == 0 and time.process_time() - began < 10
    said = capsys.readouterr().out
    Path("many.txt").unlink()
    assert rlcm.main(shlex.split(re.search(r"python rlcm.py (.*--resume.*)", said)[1])) == 0
    for line in said, capsys.readouterr().out:
        assert "20000 prompts, the first is 'cat 0'" in line
    terms = [column("a run", "$x^$.py:fn:2"), column("a run", "incompress:0.5")]
    assert column("a run", "reward_mean") == pytest.approx(np.sum(terms, 0), rel=1e-5)


def test_run_of_a_notebook(mini, tmp_path):
    """Outside the main thread, in bf16 with a ratio of exactly 1. The caller's random state is left alone.

    Within an autocast, which would keep the weights that were cast before an optimizer step, it is the same.
    """

    def random_state():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = random_state()
    out = tmp_path / "run"
    given = dict(model=mini, precision="bf16", kl=0.01, updates=2, batch_size=8)
    thread = threading.Thread(target=start, kwargs=dict(given, out=out))
    thread.start()
    thread.join()
    first_kl, second_kl = column(out, "path_kl")
    assert column(out, "ratio_drift") == [0.0, 0.0] and first_kl == 0 < second_kl
    assert {p.dtype for p in load_file(out / LORA).values()} == {torch.float32}
    assert random_state() == before

    with torch.autocast("cpu", torch.bfloat16):
        assert start(**given, out=tmp_path / "within") == 0
    assert column(tmp_path / "within", "path_kl") == [0, second_kl]
    assert column(tmp_path / "within", "clip_fraction")[0] > 0


# -------------------------------------------------------------------------------------------------- processes
def spawn(command, moment=None):
    """The program in a process. At a moment it gets a signal, or its disk is full.

    A moment is an audit event, what its path has in it, how many such pass before, and then the signal, or
    the bytes that a file may have from then on.
    """
    receiver, sender = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=in_child, args=(sender, command, moment))
    process.start()
    return process, receiver


def in_child(sender, command, moment):
    seen = []

    def audit(event, found):
        if moment and event == moment[0] and moment[1] in str(found[0]):
            seen.append(1)
            if len(seen) == moment[2] + 1:
                if isinstance(moment[3], signal.Signals):
                    os.kill(os.getpid(), moment[3])
                else:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (moment[3], moment[3]))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    sys.addaudithook(audit)
    status, said = one_of_several(command)
    sender.send(said)
    sys.exit(status)


def one_of_several(command):
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        status = rlcm.main(command)
    return status, said.getvalue()


def ended(process, receiver):
    """Its exit status, and the last line that it printed; none if it was killed."""
    process.join()
    said = receiver.recv().splitlines()[-1] if process.exitcode >= 0 else ""
    return process.exitcode, said


MOMENTS = [  # of a run that begins or is resumed; its exit status; epochs that it has saved
    (("open", "epoch-0000.png", 0, 99), 2, 0),
    (("open", "checkpoint.pt", 1, 999), 2, 1),
    (("os.rename", "config.json", 0, signal.SIGKILL), -9, 1),
    (("os.rename", "metrics.csv", 0, signal.SIGKILL), -9, 1),
    (("open", LORA, 0, 999), 2, 1),
    (("os.rename", "checkpoint.pt", 1, signal.SIGINT), 130, 2),
    (("open", "epoch-0004.png", 0, signal.SIGKILL), -9, 3),
    (None, 0, 5),
]


def test_killed_run_resumes_bit_identical(mini_sd, tmp_path):
    """At seven moments; a full disk and Ctrl-C are one line. A file is always the old or the new one.

    It is a run of ddpo with two updates.
    """
    alone = tmp_path / "alone"
    killed = tmp_path / "killed"
    given = dict(model=mini_sd, method="ddpo", epochs=5, kl=0.01, updates=2)
    assert start(**given, out=alone) == 0
    assert column(alone, "ratio_drift") == [0.0] * 5 and all(column(alone, "clip_fraction"))
    check_grid(alone, 5, ddim(mini_sd, alone), eta=1.0)

    checkpoint = killed / "checkpoint.pt"
    for moment, status, epochs in MOMENTS:
        command = words(resume=killed, epochs=5)
        if not checkpoint.exists():
            shutil.rmtree(killed, ignore_errors=True)
            command = words(**SMALL | given, out=killed)
        code, said = ended(*spawn(command, moment))
        assert code == status and said.startswith("rlcm.py: ") == (status > 0), (moment, said)
        assert checkpoint.exists() == (epochs > 0)
        if epochs:
            assert len(torch.load(checkpoint)["rows"]) == epochs
            assert len(column(killed, "epoch")) in (epochs, epochs + 1)
            assert rlcm.read_config(killed).epochs == 5 and load_file(killed / LORA)
    ours = contents(alone)
    theirs = contents(killed)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name.startswith("samples/"))
    assert_close(load_file(alone / LORA), load_file(killed / LORA), rtol=0, atol=0)
    for name in ("reward_mean", "path_kl", "clip_fraction", "grad_norm"):
        assert column(alone, name) == column(killed, name)


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
    children = [spawn(command), spawn(command)]
    found = [ended(*child) for child in children]
    assert sorted(code for code, _ in found) == codes
    assert all(said.startswith("rlcm.py: ") == (code > 0) for code, said in found)
    runs = [*Path().glob("run"), *Path().glob("runs/rlcm-fn-0-*")]
    assert len(runs) == codes.count(0) and all((run / LORA).exists() for run in runs)


def test_two_processes_give_the_gradient_of_one(mini, tmp_path):
    """Both start from the first one's weights. The second one's reward is slow."""
    one = tmp_path / "one"
    two = tmp_path / "two"
    mine = tmp_path / "ranked.py"
    mine.write_text(f"""import dataclasses, os, rlcm, time
rank = int(os.environ.get("RANK", 0))
def fn(images, prompts): return time.sleep(rank) or images.mean((1, 2, 3))
def load(cfg, device):
    model = rlcm.load_model(dataclasses.replace(cfg, model={mini!r}), device)
    for p in model.trainable.values():
        p.data += rank
    return model""")
    given = dict(steps=3, kl=10.0, batch_size=8, lr=0.02, prompts="animals", group_size=2)
    given |= dict(model=f"{mine}:load", reward=f"{mine}:fn")
    assert start(**given, out=one) == 0
    where = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(tmp_path), max_restarts=0)
    nodes = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="forkserver", **where)
    before = signal.getsignal(signal.SIGINT)
    found = elastic_launch(nodes, one_of_several)(words(**SMALL | given, out=two))
    signal.signal(signal.SIGINT, before)  # the launcher keeps it
    assert [found[rank][0] for rank in (0, 1)] == [0, 0]
    assert ["python rlcm.py --resume" in found[rank][1] for rank in (0, 1)] == [True, False]
    assert contents(one).keys() == contents(two).keys() and column(two, "ratio_drift") == [0.0, 0.0]
    for name in ("reward_mean", "reward_std", "path_kl", "grad_norm"):
        assert column(one, name) == pytest.approx(column(two, name), rel=1e-3, abs=1e-6), name


# --------------------------------------------------------------------------------- what is wrong, in one line
@pytest.mark.parametrize("given, named, epochs", [
    (dict(lr=1e6, save_every=9), "gradient is not finite", 1),
    (dict(lr=1e11, save_every=9), "images .* not finite", 1),
    (dict(reward="flaky.py:fn"), "must be finite", 2),
])  # fmt: skip
def test_run_that_goes_wrong_has_a_checkpoint(given, named, epochs, mini, tmp_path, monkeypatch, capsys):
    """The sixth time that this reward is asked for is in epoch 3."""
    monkeypatch.chdir(tmp_path)
    Path("flaky.py").write_text("""calls = []
def fn(images, prompts): return calls.append(1) or images.mean((1, 2, 3)) / (len(calls) != 6)""")
    assert start(model=mini, epochs=3, out="run", **given) == 2
    assert re.fullmatch(f"rlcm.py: .*{named}.*", capsys.readouterr().err.splitlines()[-1])
    assert len(torch.load("run/checkpoint.pt")["rows"]) == len(column("run", "epoch")) == epochs


def refused(command, named, folder, capsys):
    """One line on stderr, exit status 2, nothing written."""
    before = contents(folder)
    status = rlcm.main(command)
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("rlcm.py: ") and err.count("\n") == 1 and named in err, err
    assert contents(folder) == before


RUNS_A_COMMAND = b"cos\nsystem\n(S'touch touched'\ntR."  # as a pickle


@pytest.mark.parametrize("config, checkpoint, flags, named", [
    ({"steps": "4"}, None, "", "steps"),
    ({"lora_rank": 3}, None, "", "no checkpoint of this model and LoRA"),
    ({"lr": 0.5}, None, "", "only --epochs may change"),
    ({"prompts": "gone.txt"}, None, "", "only --epochs may change"),  # the run has its own
    ({}, None, "--method ddpo", ""),
    ({}, None, "--epochs 2", "already has 2 epochs"),
    ({}, b"cut off", "", "no checkpoint of this model and LoRA"),
    ({}, RUNS_A_COMMAND, "", "no checkpoint of this model and LoRA"),
])  # fmt: skip
def test_resume_refuses_what_does_not_fit(
    config, checkpoint, flags, named, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # where the command would touch a file
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(config))
    if checkpoint:
        (out / "checkpoint.pt").write_bytes(checkpoint)
    refused(["--resume", str(out), "--epochs", "3", *flags.split()], named, tmp_path, capsys)


BAD = {  # arguments: what the one line says
    "--reward nope": "choose from compress, incompress",
    "--reward compress,compress": "a part twice",
    "--reward compress:nan": "not a finite number",
    "--reward missing.py:fn": "no file missing.py",
    "--reward mine.py:nan": "the reward 'mine.py:nan' returned",
    "--reward mine.py:shape": "shape (16, 2) for 16",
    "--reward mine.py:raises": "KeyError: 'no'",
    "--reward compress:1e39": "must be finite",
    "--steps 1": "nothing to reinforce",
    "--steps 51": "51",
    "--batch-size 10 --updates 3": "a multiple of 3",
    "--batch-size 10 --group-size 4": "a multiple of 4",
    "--algo reinforce --updates 2": "--updates must be 1",
    "--kl -0.1": "--kl -0.1: must be",
    "--lr nan": "--lr nan: must be",
    "--save-every 0": "--save-every 0: must be",
    "--resolution 12": "multiple of 8",
    "--model tiny --resolution 24": "multiple of 16",
    "--rewards compress stray": "unrecognized arguments: --rewards compress stray",
    "--model no/such-model": "--model",
    "--model flux": "flux is a FluxPipeline, not a StableDiffusionPipeline",
    "--model v": "a EulerDiscreteScheduler is not for --method rlcm",
    "--model edm --method ddpo": "a EDMEulerScheduler is not for --method ddpo, which needs a DDIMScheduler",
    "--model snr --method ddpo": "zero terminal SNR",
    "--model snr-v --method score": "zero terminal SNR",
    "--model mine.py:value": "no function 'value'",
    "--model mine.py:raises": "KeyError: 'no'",
    "--model broken.py:load": "SyntaxError",
    "--out v": "v exists",
    "--resume nowhere": "not a run's folder",
    # Faults that users of other projects reported:
    "--model short --steps 30": "--steps 30 cannot be set up",
    "--model few --method ddpo --steps 150": "--steps 150 cannot be set up",
    "--model tiny --method ddpo --steps 61": "62 timesteps",
    "--model clipped": "step 1",
    "--model halves": "no *.fp16.* files",
    "--model inpaint --method ddpo": "cannot",
    "--reward parses.py:fn": "parses.py does not load (SystemExit",
    "--reward foreign.py:quits": "(SystemExit: 3)",
    "--reward foreign.py:complex": "complex numbers",
    "--reward one/one.py:fn,two/two.py:fn": "imports utils but gets",
    "--reward one/folder.py:fn,two/folder.py:fn": "imports shared but gets",
    "--prompts a.tsv": "a.tsv",
    "--prompts b.txt": "b.txt",
    "--prompts c.json": "c.json",
    "--prompts d.txt": "d.txt",
    "--log-with wandb": "first pip install wandb",  # a folder of that name is not the package
}


MINE = """
from __future__ import annotations
import dataclasses, torch
from neighbour import loads
loads.append(__name__)
@dataclasses.dataclass
class Setting:
    factor: float = 10
def redness(images, prompts): return (images[:, 0].mean((1, 2)) * Setting().factor).int()
def listed(images, prompts): return redness(images, prompts).tolist()
def greedy(images, prompts): return prompts.clear() or images.zero_().sum((1, 2, 3))
def nan(images, prompts): return images.mean((1, 2, 3)) / 0
def shape(images, prompts): return torch.zeros(len(prompts), 2)
def raises(*given): raise KeyError("no")
value = 3
"""
FOREIGN = """
import torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
def fn(images, prompts):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    return images.float().mean((1, 2, 3))
def quits(images, prompts): raise SystemExit(3)
def complex(images, prompts): return fn(images, prompts) * 1j
"""
BESIDE = "import {}\ndef fn(images, prompts): return images.mean((1, 2, 3))"
FILES = {
    "mine.py": MINE,
    "neighbour.py": "loads = []",
    "broken.py": "def load(:",
    "foreign.py": FOREIGN,
    "parses.py": "import argparse\nargparse.ArgumentParser().parse_args(['--none'])",
    "a.tsv": "a cat\t1\n",
    "b.txt": "id\tprompt\n1\ta cat\n",
    "c.json": '["a cat"]',
    "d.txt": '{"prompt": "a cat"}\n',
    "wandb/a-run": "as its logs are",
}
for name in ("one", "two"):
    FILES |= {f"{name}/utils.py": f"name = {name!r}", f"{name}/{name}.py": BESIDE.format("utils")}
    FILES |= {f"{name}/shared/__init__.py": "", f"{name}/folder.py": BESIDE.format("shared")}


@session
def place(mini, mini_sd, tmp_path_factory):
    """A folder with somebody's rewards, prompts and models, most of them bad."""
    place = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    scheduler = "scheduler/scheduler_config.json"
    for folder, source, file, changes in (
        ("flux", mini_sd, "model_index.json", {"_class_name": "FluxPipeline"}),
        ("edm", mini_sd, "model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}),
        ("v", mini_sd, scheduler, V),
        ("snr", mini_sd, scheduler, ZERO_SNR),
        ("snr-v", mini_sd, scheduler, V | ZERO_SNR),
        ("short", mini, scheduler, {"original_inference_steps": 20}),
        ("few", mini_sd, scheduler, {"num_train_timesteps": 100}),
        ("clipped", mini, scheduler, {"thresholding": True}),
        ("no-length", mini, "tokenizer/tokenizer_config.json", {"model_max_length": None}),
        ("inpaint", mini_sd, "unet/config.json", {}),
        ("halves", mini, "unet/config.json", {}),
    ):
        shutil.copytree(source, place / folder)
        file = place / folder / file
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    diffusers.EDMEulerScheduler().save_pretrained(place / "edm" / "scheduler")
    config = diffusers.UNet2DConditionModel.load_config(mini_sd + "/unet")
    unet = diffusers.UNet2DConditionModel.from_config(config, in_channels=25)
    unet.save_pretrained(place / "inpaint" / "unet")
    for file in (place / "halves").rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return place


@pytest.mark.filterwarnings("ignore:.*(log_with|local_dir_use_symlinks)")  # of libraries, before the line
@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, place, mini, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)  # as without wandb
    given = [] if "--resume" in arguments else words(**SMALL | {"epochs": 1}, model=mini)
    refused([*given, *arguments.split()], BAD[arguments], place, capsys)


@pytest.mark.parametrize("settings", [
    {"model": "no-length"},
    {"reward": "foreign.py:fn"},
    {"reward": ",".join(f"{'./' * 90}foreign.py:fn:{n}" for n in (1, 2))},
])  # fmt: skip
def test_reported_input_trains(settings, place, mini, monkeypatch):
    """A tokenizer without a length, a reward that changes torch, a folder name that is too long."""
    monkeypatch.chdir(place)
    assert start(**{"model": mini, "epochs": 1} | settings) == 0
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")


def test_edited_file_is_used_as_it_is_now(tmp_path):
    """In a notebook, say. So are its neighbours."""
    (tmp_path / "mine.py").write_text("import beside_it\ndef fn(i, p): return [beside_it.value] * 2")
    for now in (1, 2):
        (tmp_path / "beside_it.py").write_text(f"value = {now}")
        os.utime(tmp_path / "beside_it.py", (now, now))
        reward = rewards.get_reward(f"{tmp_path}/mine.py:fn")
        assert reward(torch.zeros(2, 3, 8, 8), ["a", "b"]).tolist() == [now] * 2


def test_images_that_are_not_finite_are_named():
    with pytest.raises(BadInput, match="images for the reward 'compress' are not finite"):
        rewards.get_reward("compress")(torch.full((1, 3, 8, 8), math.nan), ["a cat"])


# ------------------------------------------------------------------------------ a CUDA card that is not there
CARD = torch.device("cuda:0")
aten = torch.ops.aten


def tensors_in(values):
    for v in values:
        if isinstance(v, torch.Tensor):
            yield v
        elif isinstance(v, (list, tuple)):
            yield from tensors_in(v)


class Card(TorchDispatchMode):
    """Its tensors have their numbers on the CPU, in storages that are remembered.

    They mix with the CPU's as a card's do: not at all but for numbers without dimension, indices and copies.
    """

    def __init__(self):
        super().__init__()
        self.places = {}

    def device_of(self, tensor):
        own = torch._C.TensorBase.device.__get__(tensor)
        _, device = self.places.get(tensor.untyped_storage()._cdata, (None, own))
        return own if own.type == "meta" else device

    def put(self, tensor, device=CARD):
        storage = tensor.untyped_storage()
        self.places[storage._cdata] = storage, device  # kept, so that no other storage gets its address

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = list(tensors_in(args))
        if operation.overloadpacket in (aten.index, aten.index_put_, aten.copy_):
            tensors = tensors[:1]
        there = any(v.device == CARD for v in tensors)
        mixed = any(v.device != CARD and v.dim() for v in tensors)
        assert not (there and mixed), f"{operation}: expected all tensors to be on the same device"
        if kwargs.get("device"):
            there = kwargs["device"] == CARD or torch._C._current_graph_task_id() >= 0  # in backward
            kwargs["device"] = torch.device("cpu") if there else kwargs["device"]
        assert not (there and kwargs.get("generator")), f"{operation}: a generator of the CPU"
        out = operation(*args, **kwargs)
        for tensor in tensors_in([out]) if there else []:
            self.put(tensor)
        return out


@pytest.fixture
def card(monkeypatch):
    card = Card()
    to = torch.Tensor.to
    autocast = torch.autocast

    def moved(tensor, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        out = to(tensor, dtype or tensor.dtype)
        if device and device != out.device:
            out = out.clone()
            card.put(out, device)
        return out

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.Tensor, "device", property(card.device_of))
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved(tensor, "cpu"))
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **options: autocast("cpu", *args, **options))
    monkeypatch.setattr(accelerate.state.PartialState, "default_device", CARD)
    accelerate.state.AcceleratorState._reset_state(True)
    yield card
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("method, precision", [("rlcm", "bf16"), ("ddpo", "fp32")])
def test_run_on_a_card_that_is_not_there(method, precision, card, mini, mini_sd, tmp_path):
    """It trains and is resumed, all of it on the card."""
    settings = SMALL | dict(method=method, precision=precision, kl=0.01, updates=2, out=f"{tmp_path}/run")
    settings["model"] = mini if method == "rlcm" else mini_sd
    devices = set()

    def on_epoch(epoch, model, row):
        devices.update(p.device for p in model.trainable.values())

    with card:
        rlcm.train(Config(**settings | {"epochs": 1}), on_epoch=on_epoch)
        rlcm.train(Config(**settings), resume=True, on_epoch=on_epoch)
    assert devices == {CARD} and column(tmp_path / "run", "ratio_drift") == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------- rewards
def test_sum_of_rewards_by_hand(place, monkeypatch):
    """Of JPEG sizes, a list of integers, and a reward that spoils its images. A file is imported once."""
    monkeypatch.chdir(place)
    images = torch.rand(3, 3, 40, 56)
    images[1] = 1.0
    kept = images.clone()
    prompts = ["a", "b", "c"]
    size = []
    for image in for_pillow(images):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        size.append(len(file.getvalue()) / 1000)
    size = torch.tensor(size)
    red = (images[:, 0].mean((1, 2)) * 10).int()
    reward = rewards.get_reward("mine.py:greedy, mine.py:listed:-0.5,compress,incompress:1e-1")
    assert reward.names == ["mine.py:greedy", "mine.py:listed:-0.5", "compress", "incompress:1e-1"]
    expected = torch.stack([torch.zeros(3), -0.5 * red, -size, 0.1 * size], 1)
    assert_close(reward.components(images, prompts), expected)
    assert_close(reward(images, prompts), expected.sum(1))
    assert torch.equal(images, kept) and prompts == ["a", "b", "c"]
    assert sys.modules["neighbour"].loads == [str(place / "mine.py")]


def drawn(step):
    """Every step-th of the embedded model's training images, for Pillow as well, and their captions."""
    images, prompts = make_tiny.training_pictures()
    return images[::step], for_pillow(images[::step]), prompts[::step]


BODY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def small_tokenizer(**options):
    """Of the embedded CLIP's words, without its limit of eight."""
    raw = tokenizers.Tokenizer.from_file(rewards.TINY_CLIP + "/tokenizer.json")
    raw.no_truncation()
    raw.no_padding()
    options |= dict(pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, **options)


def make_llava(folder):
    tokens = small_tokenizer(additional_special_tokens=["<image>"])
    text = dict(BODY, model_type="llama", vocab_size=len(tokens), eos_token_id=316, initializer_range=0.5)
    vision = dict(BODY, model_type="clip_vision_model", image_size=24, patch_size=6, initializer_factor=4.0)
    ids = dict(image_token_index=len(tokens) - 1, initializer_range=0.5)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, **ids)
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    options = dict(patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    tf.LlavaProcessor(images, tokens, **options).save_pretrained(folder)


def make_bert(folder):
    tokens = small_tokenizer()
    sizes = BODY | {"num_hidden_layers": 3, "vocab_size": len(tokens)}
    tf.BertModel(tf.BertConfig(**sizes, initializer_range=0.5)).save_pretrained(folder)
    tokens.save_pretrained(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Models of the rewards' kinds, laid out as the hub has them: {name: folder}."""
    hub = {name: str(tmp_path / name) for name in rewards.HUB} | {"clip": rewards.TINY_CLIP}
    monkeypatch.setattr(rewards, "HUB", hub)
    monkeypatch.setattr(rewards, "load", functools.cache(rewards.load.__wrapped__))
    return hub


@torch.no_grad()
def test_clip_pickscore_and_aesthetic_equal_their_models(hub, monkeypatch):
    """Through transformers alone, which shrinks and crops images by Pillow."""
    images, _, prompts = drawn(40)
    images = torch.nn.functional.interpolate(images, (150, 120), mode="bilinear").mul(255).round() / 255
    clip = tf.CLIPModel.from_pretrained(hub["clip"], dtype=torch.float32)
    processor = tf.CLIPProcessor.from_pretrained(hub["clip"])

    def outputs():
        options = dict(padding=True, truncation=True, return_tensors="pt")
        out = clip(**processor(text=prompts, images=for_pillow(images), **options))
        return out.image_embeds, out.logits_per_image.diag()

    clip.logit_scale.data.zero_()
    embeddings, cosine = outputs()
    aesthetic = embeddings
    layers = {}
    for i in (0, 2, 4, 6, 7):
        size = 1 if i == 7 else 8
        layers[f"layers.{i}.weight"] = torch.randn(size, aesthetic.shape[1])
        layers[f"layers.{i}.bias"] = torch.randn(size)
        aesthetic = aesthetic @ layers[f"layers.{i}.weight"].T + layers[f"layers.{i}.bias"]
    Path(hub["aesthetic"]).mkdir()
    torch.save(layers, hub["aesthetic"] + "/aesthetic-model.pth")
    clip.logit_scale.data.fill_(3.0)
    clip.save_pretrained(hub["pickscore"])
    clip.config.save_pretrained(hub["pickscore-processor"])
    processor.image_processor.image_mean = [0.1, 0.5, 0.9]
    processor.save_pretrained(hub["pickscore-processor"])
    _, pickscore = outputs()
    expected = {"clip": 2.5 * cosine.clamp(min=0), "aesthetic": aesthetic[:, 0], "pickscore": pickscore}
    for name, by_hand in expected.items():
        score = rewards.get_reward(name)(images, prompts)
        assert score.std() > 0.02, name
        assert_close(score, by_hand, rtol=5e-3, atol=0.02, msg=lambda m: f"{name}: {m}")
    monkeypatch.setitem(hub, "clip", "nowhere")  # with --model tiny `clip` is the embedded one all the same
    assert_close(rewards.get_reward("clip", "tiny")(images, prompts), expected["clip"], rtol=5e-3, atol=0.02)


@torch.no_grad()
def test_align_is_bertscore_recall_of_a_greedy_description(hub, monkeypatch):
    """Image by image, on the second of the encoder's three layers."""
    make_llava(hub["llava"])
    make_bert(hub["bert"])
    monkeypatch.setattr(rewards, "BERT_LAYER", 2)
    images, for_them, prompts = drawn(200)
    bert = tf.AutoModel.from_pretrained(hub["bert"])
    tokenizer = tf.AutoTokenizer.from_pretrained(hub["bert"])
    llava = tf.LlavaForConditionalGeneration.from_pretrained(hub["llava"])
    processor = tf.AutoProcessor.from_pretrained(hub["llava"])

    def describe(image):
        question = "USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:"
        asked = processor(text=question, images=image, return_tensors="pt")
        said = llava.generate(**asked, do_sample=False, max_new_tokens=64)[0, asked.input_ids.shape[1] :]
        return processor.tokenizer.decode(said, skip_special_tokens=True)

    def embed(text):
        state = bert(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        return state / state.norm(dim=1, keepdim=True)

    def recall(prompt, said):
        reference = embed(f"The image contains {prompt}")[1:-1]  # without [CLS] and [SEP]
        return (reference @ embed(said).T).amax(1).mean()

    said = [describe(image) for image in for_them]
    assert len(set(said)) > 2 and len({len(text.split()) for text in said}) > 1
    assert rewards.describe(images, hub["llava"]) == said
    expected = (torch.stack(list(map(recall, prompts, said))) - 0.5170288) / (1 - 0.5170288)
    assert_close(rewards.get_reward("align")(images, prompts), expected, rtol=1e-3, atol=1e-3)


def test_model_out_of_reach_is_named(hub, tmp_path, monkeypatch):
    """And a file of tensors cannot run a command."""
    monkeypatch.setitem(hub, "clip", f"{tmp_path}/absent")
    with pytest.raises(BadInput, match=f"^cannot load {tmp_path}/absent.*compress .* need no model"):
        rewards.get_reward("clip")(torch.rand(1, 3, 8, 8), ["a cat"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aesthetic-model.pth").write_bytes(RUNS_A_COMMAND)
    with pytest.raises(BadInput, match=f"^cannot load {tmp_path}"):
        rewards.load("aesthetic-model.pth", str(tmp_path))
    assert not Path("touched").exists()


def test_prompt_sets():
    """The ImageNet animals are classes 0 to 397 with all their names, as in DDPO's and RLCM's code."""
    animals, others, active = [set(rewards.get_prompts(name)) for name in rewards.PROMPTS]
    assert [len(animals), len(others), len(active)] == [45, 24, 135]
    assert not animals & others and others <= set(make_tiny.training_pictures()[1])
    assert {"an ant riding a bike", "a dog playing chess", "a kangaroo washing the dishes"} < active
    imagenet = rewards.get_prompts(str(HERE / "examples" / "imagenet-animals.txt"))
    assert len(set(imagenet)) == 398 and imagenet[281] == "tabby, tabby cat"


def test_prompts_from_a_file_and_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As from Notepad. Other separators do not end a prompt.
    text = "\ufeffa caf\u00e9\r\n\r\n  owl, bird \r\na\u2028red\x85\x0bdog\n"
    Path("p.txt").write_bytes(text.encode())
    assert rewards.get_prompts("p.txt") == ["a caf\u00e9", "owl, bird", "a\u2028red\x85\x0bdog"]
    for words in ("a cat", "animals, please", "a cat " * 200):
        assert rewards.get_prompts(words) == [words.strip()]
    for typo in ("promts.txt", "my promts.txt", "cat", " ", ""):
        with pytest.raises(BadInput, match="two words"):
            rewards.get_prompts(typo)
    Path("empty.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="empty.txt is empty"):
        rewards.get_prompts("empty.txt")


# ---------------------------------------------------------------------------------------------------- bench/
@session
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    small = dict(steps=2, epochs=2, batch_size=8, micro_batch=4, lr=1e-2, guidance_scale=3.0)
    return rlcm.train(Config(**small, prompts="a cat", out=str(out)))


NEEDED = {"ablate": ["share"], "evaluate": ["run"], "plot": ["run"]}
NEEDED |= {"sample": ["run", "a cat"], "trajectory": ["run", "a cat"]}


SCRIPTS = sorted(path for path in (HERE / "bench").glob("*.py") if path.stem not in ("__init__", "common"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_shows_its_use_and_refuses_in_one_line(path, capsys):
    main = importlib.import_module(f"bench.{path.stem}").main
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and f"python bench/{path.name}" in capsys.readouterr().out
    assert main([*NEEDED.get(path.stem, []), "--no-such-flag"]) == 2
    assert re.fullmatch(rf"bench/{path.name}: .*no-such-flag.*\n", capsys.readouterr().err)


def test_evaluate_and_sample_draw_what_a_plain_pipeline_draws(tiny_run, tmp_path, monkeypatch):
    """And a LoRA of half the strength is half of it there; clip is a judge."""
    prompts = ["pizza"] * 3 + ["a dog"] * 3  # as the images are spread over the file
    (tmp_path / "two.txt").write_text("pizza\na dog\npizza\nA cat")
    flags = ["--prompts", str(tmp_path / "two.txt"), "--steps", "1", "2", "--images", "6", "--judges", "clip"]
    assert evaluate.main([str(tiny_run), *flags]) == 0
    rows = compare.read_rows(tiny_run / "evaluation.csv")
    cases = {(row["weights"], row["prompts"], row["steps"]): row for row in rows}
    assert set(cases) == set(itertools.product(("base", "tuned"), ("training", "held-out"), (1, 2)))
    drawn = []
    grid = rlcm.sample_grid

    def spied(images, captions, columns):
        drawn.append(images)
        return grid(images, captions, columns)

    monkeypatch.setattr(rlcm, "sample_grid", spied)
    assert sample.main([str(tiny_run), *prompts, "--strength", "0.5", "1"]) == 0
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / "lcm")
    for strength, images in zip((0, 0.5, 1), drawn[0].split(6)):
        if strength == 0.5:
            pipe.load_lora_weights(tiny_run)
        if strength:
            pipe.set_adapters(pipe.get_active_adapters(), strength)
        plain = plain_images(pipe, prompts)
        assert_close(images, plain, rtol=0, atol=1e-4)
        row = cases.get(({0: "base", 1: "tuned"}.get(strength), "held-out", 2))
        for column, name in [("reward", "compress"), ("clip", "clip")] if row else []:
            r = rewards.get_reward(name, "tiny")(plain, prompts)
            assert row[column] == pytest.approx(r.mean().item(), abs=0.003)
            assert row[f"{column}_error"] == pytest.approx(r.std().item() / 6**0.5, rel=0.02)
    assert (drawn[0][:6] - drawn[0][12:]).abs().max() > 1e-3  # it has learned


def test_evaluate_holds_out_what_was_not_trained_on(finished, tmp_path, monkeypatch, capsys):
    """Images are spread over all prompts. Numbers of steps that the scheduler refuses are left out."""
    monkeypatch.chdir(tmp_path)
    Path("mixed.txt").write_text("a red cat\nan ant\nan owl\na bee\na fox")
    seen = []
    schedule = rlcm.StableDiffusion.schedule

    def refuse(model, H):
        rlcm.require(H < 4, f"no {H} steps")
        return schedule(model, H)

    def generate(model, cfg, prompts):
        seen.append(prompts)
        return torch.zeros(2, 3, 8, 8)

    monkeypatch.setattr(rlcm, "generate", generate)
    monkeypatch.setattr(rlcm.StableDiffusion, "schedule", refuse)
    rows = evaluate.evaluate(finished, "mixed.txt", count=2)
    assert [row["steps"] for row in rows] == [1, 2, 1, 2, 1, 2, 1, 2] and seen[2] == ["an ant", "a bee"]
    said = capsys.readouterr().out
    assert "left out: no 4 steps" in said and "4 of mixed.txt that are not among them" in said
    with pytest.raises(BadInput, match="none is held out"):
        evaluate.evaluate(finished, str(finished / "prompts.txt"))


def test_plot_says_where_a_line_ends(finished, tmp_path, capsys):
    short = tmp_path / "short"
    shutil.copytree(finished, short)
    lines = (short / "metrics.csv").read_text().splitlines()
    (short / "metrics.csv").write_text("\n".join(lines[:2]))
    plot.curves([finished, short], tmp_path / "plot.png")
    assert "rlcm ends after 1 epochs, where the shortest of its runs ends" in capsys.readouterr().out


def test_compare_runs_until_the_accuracy_has_fallen(tmp_path, monkeypatch, capsys):
    """And the table has the point where it did, interpolated, and the best rate by the rule."""
    accuracies = iter([0.95, 0.91, 0.81, 0.95, 0.75, 0.7])
    same = dict(reward=-2.0, retrieval=0.5)
    judge = lambda n, *_: dict(passes=n, images=4 * n, accuracy=next(accuracies), **same)  # noqa: E731
    monkeypatch.setattr(compare, "judge", judge)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda *_: contextlib.nullcontext(builtins))
    small = ["--steps", "2", "--batch-size", "4", "--rates", "0.001", "0.002", "--seeds", "0"]
    assert compare.main(["--methods", "ddpo", "--out", str(tmp_path), *small]) == 0
    rows = compare.read_rows(tmp_path / "results.csv")
    at = {(row["lr"], row["accuracy"]): row["images"] for row in rows if row["at"] != "retrieval 0.75"}
    assert at == {(0.001, 0.9): 4, (0.001, 0.85): 6, (0.002, 0.9): 1, (0.002, 0.85): 2}
    assert "compress, ddpo: learning rate 0.002" in capsys.readouterr().out
    monkeypatch.setattr(compare, "train_judged", None)  # none is trained again
    assert compare.main(["--methods", "ddpo", "--out", str(tmp_path), *small]) == 0
    assert compare.best({1: (100, -2.0), 2: (50, -2.01), 3: (30, -2.03)}) == 2
    with pytest.raises(BadInput, match="other settings"):
        cfg = compare.settings(tmp_path / "compress-ddpo-0.001-0", ["--method", "ddpo"])
        compare.finished(cfg, False)


def test_judge_counts_passes(monkeypatch):
    """64 images with guidance are 4 passes of 32 rows: for each of 5 steps, and 3 times for 4 actions."""
    cfg = Config(**preset("ddpo"))
    monkeypatch.setattr(rlcm, "generate", lambda *_: torch.ones(200, 3, 64, 64))
    found = compare.judge(2, rlcm.load_model(cfg, "cpu"), cfg)
    assert found["passes"] == 2 * 4 * (5 + 3 * 4) and found["accuracy"] < 0.1  # blank images


@pytest.mark.parametrize("method, variants", ablate.ABLATIONS.values())
def test_ablations_change_the_schedule(method, variants):
    """Only within, and not what is checked at the start."""
    model = rlcm.load_model(Config(**preset(method)), "cpu")
    before = model.schedule(5)
    for name, variant in variants.items():
        with variant():
            s = model.schedule(5)
        expected = 5 if name in ("last-action", "levels-down-to-0") else 4
        assert len(s.actions) == expected, name
        assert torch.equal(s.new, before.new) == (name in ("share-1", "no-last-action", "levels-2")), name
    model.pipe.scheduler = type(model.pipe.scheduler).from_config(model.pipe.scheduler.config)
    assert torch.equal(model.schedule(5).new, before.new)


def test_folders_of_the_repository_win_over_packages_of_their_names(tmp_path):
    for name in ("bench", "examples", "tiny"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        found = importlib.machinery.PathFinder.find_spec(name, [str(HERE), str(tmp_path)])
        assert found.origin == str(HERE / name / "__init__.py")


# ---------------------------------------------------------------------------------------------- examples/
def test_points_learn():
    curve = points.learn(points.pretrained(), epochs=12)
    assert np.mean(curve[-3:]) > curve[0] + 0.3


@pytest.mark.parametrize("example, method", [(value, "ddpo"), (value, "score"), (differentiable, "rlcm")])
def test_example_leaves_a_lora_for_a_plain_pipeline(example, method, tmp_path, capsys):
    """A plain pipeline with the LoRA draws images of the mean reward that the example says it ends with."""
    out = tmp_path / "run"
    (tmp_path / "three.txt").write_text("cat\ndog\nowl\n")
    small = dict(epochs=2, batch_size=6, micro_batch=4, guidance_scale=3.0, lr=1e-2, lora_alpha=8)
    cfg = Config(**small, method=method, prompts=f"{tmp_path}/three.txt", out=str(out))
    if example is differentiable:
        with pytest.raises(BadInput, match="compress has no gradient"):
            example.train(replace(cfg, out=f"{tmp_path}/other"))
        cfg = replace(cfg, reward="clip")
    before, after = example.train(cfg)
    assert f"{before:.3f} -> {after:.3f}" in capsys.readouterr().out and (out / "samples.png").exists()
    assert example is value or after > before + 0.1
    pipe = DiffusionPipeline.from_pretrained(HERE / METHODS[method].tiny)
    pipe.load_lora_weights(out)
    if method != "score":  # its times are real numbers, a scheduler's are not
        prompts = ["cat", "dog", "owl"]
        images = plain_images(pipe, prompts, num_inference_steps=4, eta=float(method == "ddpo"))
        r = rewards.get_reward(cfg.reward, "tiny")(images, prompts)
        assert r.mean() == pytest.approx(after, abs=2e-3)


def test_both_terms_of_differentiable_are_the_gradient(monkeypatch, tmp_path):
    """The gradient of E[r], in closed form. The first term alone has all of the last evaluation's."""
    found = []

    def step(optimizer):
        found.append(optimizer.param_groups[0]["params"][0].grad)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    model = Linear("rlcm", 4)
    monkeypatch.setattr(rlcm, "load_model", lambda cfg, device: model)
    monkeypatch.setattr(rlcm, "get_reward", lambda *_: lambda images, prompts, *_: quadratic(images, prompts))
    monkeypatch.setattr(rlcm, "get_prompts", lambda name: ["a"])
    cfg = Config(epochs=16, batch_size=8192, micro_batch=8192, max_grad_norm=1e9, adv_clip=1e9, min_count=1)
    for hybrid in (False, True):
        differentiable.train(replace(cfg, out=f"{tmp_path}/{hybrid}"), hybrid)
    first, both = torch.stack(found).double().chunk(2)  # (16, 2, H) each
    offsets = model.offsets.detach().requires_grad_()
    mean, variance, _ = model.laws(offsets)
    loss = 3 * ((mean - 2) ** 2 + variance) / 2  # -E[r]; there are three numbers in an image
    (exact,) = torch.autograd.grad(loss, offsets)
    error = both.std(0).norm() / 4  # of the mean of 16
    assert error < 0.02 * exact.norm() and (both.mean(0) - exact).norm() < 3 * error
    assert not first[..., :3].any() and (first.mean(0) - exact)[:, 3].norm() < 0.02 * exact[:, 3].norm()


def test_ocr_reward_compares_texts():
    for text, score in (("Open", 1.0), ("OPEM", 0.75), ("", 0.0), ("!?", 0.0)):
        assert ocr_reward.similarity('a sign that says "OPEN"', text) == score


# ------------------------------------------------------------------------- examples/: newer few-step models
TEXT = dict(vocab_size=317, hidden_size=8, intermediate_size=8)
TEXT |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
VAE = dict(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4)
VAE |= dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)


def tiny_tokenizer(chat_template=None):
    tokenizer = tf.AutoTokenizer.from_pretrained(HERE / "tiny" / "lcm" / "tokenizer")
    tokenizer.chat_template = chat_template
    return tokenizer


def small_sdxl(**changes):
    """Its text encoders have one shape, so either fits."""
    clip = tf.CLIPTextConfig(
        **TEXT, num_hidden_layers=2, projection_dim=8, max_position_embeddings=8, eos_token_id=2
    )
    network = diffusers.UNet2DConditionModel(
        block_out_channels=[16], layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"],
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=8 + 8,
        projection_class_embeddings_input_dim=6 * 8 + 8, **changes,
    )  # fmt: skip
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**VAE, scaling_factor=0.13),
        text_encoder=tf.CLIPTextModel(clip),
        text_encoder_2=tf.CLIPTextModelWithProjection(clip),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(**betas),
    )


def add_few_step_lora(pipe):
    """It is also saved as DMD2's."""
    layers = dict(target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, **layers), "few-step")
    weights = get_peft_model_state_dict(pipe.unet, adapter_name="few-step")
    name = "dmd2_sdxl_4step_lora_fp16.safetensors"
    pipe.save_lora_weights("tianweiy/DMD2", weights, weight_name=name)


def small_sdxl_turbo():
    """With fractional timesteps: 999, 499.5 and 0."""
    pipe = small_sdxl()
    kind = diffusers.EulerAncestralDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    return pipe


def small_sd_turbo():
    """With an EulerDiscreteScheduler, as in the repository of SD-Turbo."""
    make_mini("sd", "sd")
    return diffusers.StableDiffusionPipeline.from_pretrained("sd")


def small_sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        qk_norm="rms_norm_across_heads", guidance_embeds=True, guidance_embeds_scale=0.2,
    )  # fmt: skip
    blocks = dict(block_out_channels=(8, 8), layers_per_block=(1, 1), qkv_multiscales=((), ()))
    both = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in blocks.items()}
    return diffusers.SanaSprintPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tf.Gemma2Model(tf.Gemma2Config(**TEXT, num_hidden_layers=1)),
        vae=diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.4, **both),
        transformer=transformer,
        scheduler=diffusers.SCMScheduler(),
    )


def sana_options(steps):
    """For two steps there is a default."""
    middle = {} if steps == 2 else dict(intermediate_timesteps=None)
    return dict(use_resolution_binning=False, **middle)


def small_z_image():
    """With the scheduler of Z-Image-Turbo."""
    chat = "user {{ messages[0].content }} {% if enable_thinking %} thinks {% endif %}"
    sizes = dict(in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(**VAE, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tf.Qwen3Model(tf.Qwen3Config(**TEXT, num_hidden_layers=3)),
        tokenizer=tiny_tokenizer(chat),
        transformer=diffusers.ZImageTransformer2DModel(cap_feat_dim=8, axes_dims=[4, 6, 6], **sizes),
    )


def small_klein():
    """With a batch norm that matters, and the 28 layers of text encoder that its pipeline looks into."""
    chat = "user {{ messages[0].content }}{% if not enable_thinking %} fast{% endif %}"
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 8, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(**VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 3)
    text = tf.Qwen3Config(**TEXT, num_hidden_layers=28)
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=tf.Qwen3ForCausalLM(text).eval(),
        tokenizer=tiny_tokenizer(chat),
        transformer=transformer,
        is_distilled=True,
    )


def klein_options(steps):
    """Its noise is drawn as tokens."""
    return dict(latents=torch.randn(1, 8 * 8, 16).mT.reshape(1, 16, 8, 8))


COMMON = dict(options=lambda steps: {}, changes={}, adapters=[], refused={}, steps=[3], size=16, guidance=0.0)
COMMON |= dict(variant=None, last="a red dog")
SDXL = dict(
    file="sdxl", hub="stabilityai/stable-diffusion-xl-base-1.0", scheduler="LCMScheduler", steps=[4],
    guidance=3.0, variant="fp16",
)  # fmt: skip
FLOW = dict(
    file="flow", scheduler="FlowMatchEulerDiscreteScheduler", changes=dict(stochastic_sampling=True),
    last=40 * "a red dog ", refused=dict(method="ddpo", guidance_scale=4.0, resolution=18),
)  # fmt: skip
TURBO = dict(
    file="turbo", scheduler="EulerAncestralDiscreteScheduler", variant="fp16", refused=dict(method="score"),
)  # fmt: skip
NEWER = {  # function of the file: its repository, a small pipeline, and how a plain one is called
    "dmd2": SDXL | dict(
        make=small_sdxl, options=lambda steps: dict(timesteps=[999, 749, 499, 249]), adapters=["few-step"]
    ),
    "lcm": SDXL | dict(
        make=lambda: small_sdxl(time_cond_proj_dim=8),  # its guidance is an input of the U-Net
        options=lambda steps: dict(timesteps=[999, 759, 499, 259]),
    ),
    "sana_600m": dict(
        file="sana_sprint", hub="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", make=small_sana,
        scheduler="SCMScheduler", options=sana_options, steps=[1, 2, 4], size=32, guidance=3.0,
        refused=dict(method="ddpo"),
    ),
    "z_image_turbo": FLOW | dict(hub="Tongyi-MAI/Z-Image-Turbo", make=small_z_image),
    "klein_4b": FLOW | dict(
        hub="black-forest-labs/FLUX.2-klein-4B", make=small_klein, options=klein_options, size=32
    ),
    "sd_turbo": TURBO | dict(hub="stabilityai/sd-turbo", make=small_sd_turbo),
    "sdxl_turbo": TURBO | dict(hub="stabilityai/sdxl-turbo", make=small_sdxl_turbo),
}  # fmt: skip


@pytest.fixture(params=NEWER)
def newer(request, tmp_path, monkeypatch):
    """A small pipeline under the name that the function loads, settings, and what a plain one draws."""
    monkeypatch.chdir(tmp_path)  # where folders have the names of the hub
    monkeypatch.setattr(rlcm, "draw_samples", lambda *_: Image.new("RGB", (8, 8)))  # it takes long
    case = SimpleNamespace(**COMMON | NEWER[request.param])
    pipe = case.make()
    case.pipe = pipe
    pipe.save_pretrained(case.hub, variant=case.variant)  # only a name: the weights are float32
    if request.param == "lcm":
        shutil.move(f"{case.hub}/unet", "latent-consistency/lcm-sdxl")
    if case.adapters:
        add_few_step_lora(pipe)
    kind = getattr(diffusers, case.scheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **case.changes)
    pipe.set_progress_bar_config(disable=True)

    case.prompts = ["a cat", case.last]
    Path("prompts.txt").write_text("\n".join(case.prompts))
    small = dict(resolution=case.size, steps=case.steps[-1], guidance_scale=case.guidance, epochs=2, lr=0.03)
    small |= dict(batch_size=4, micro_batch=4, updates=2, kl=0.01, lora_alpha=32, prompts="prompts.txt")
    case.cfg = Config(**preset(None, f"{HERE}/examples/{case.file}.py:{request.param}") | small, out="run")

    def plain(steps):
        """Image i with the seed i, of the pipeline's generator and of torch's."""
        same = dict(height=case.size, width=case.size, guidance_scale=case.guidance, output_type="pt")
        same["num_inference_steps"] = steps
        images = []
        for i, prompt in enumerate(case.prompts):
            generator = torch.manual_seed(i)
            options = case.options(steps)
            images.append(pipe(prompt=prompt, generator=generator, **same, **options).images)
        return torch.cat(images)

    case.plain = plain
    return case


@pytest.mark.filterwarnings("ignore:__array__", "ignore:Already found a `peft_config`")
def test_newer_model_draws_trains_and_redraws(newer):
    """What the plain pipeline draws, two epochs, and the saved LoRA in that pipeline. Others are refused."""
    case = newer
    model = rlcm.load_model(case.cfg, torch.device("cpu"))
    given = list(case.prompts)
    model.encode(given)
    assert given == case.prompts
    for steps in case.steps:
        before = rlcm.generate(model, replace(case.cfg, steps=steps), case.prompts)
        assert_close(before, case.plain(steps), rtol=0, atol=1e-5)

    epochs = []
    rlcm.train(case.cfg, on_epoch=lambda epoch, model, row: epochs.append((model, row)))
    (_, first), (model, second) = epochs[1:]
    assert first["ratio_drift"] == second["ratio_drift"] == 0 < second["path_kl"]
    assert second["clip_fraction"] > 0  # the second update
    case.pipe.load_lora_weights("run", adapter_name="tuned")
    case.pipe.set_adapters([*case.adapters, "tuned"])
    after = rlcm.generate(model, case.cfg, case.prompts)
    assert_close(after, case.plain(case.cfg.steps), rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 0.01

    # A run of one epoch and one more are the same run.
    rlcm.train(replace(case.cfg, epochs=1, out="half"))
    rlcm.train(replace(case.cfg, out="half"), resume=True)
    assert_close(load_file(f"half/{LORA}"), load_file(f"run/{LORA}"), rtol=0, atol=0)

    for name, wrong in ({"resolution": 17} | case.refused).items():
        flag = name.replace("_", "-")
        with pytest.raises(BadInput, match=f"^.*--{flag}.*$"):  # one line
            rlcm.load_model(replace(case.cfg, **{name: wrong}), torch.device("cpu"))


@pytest.mark.parametrize("newer", ["klein_4b"], indirect=True)
def test_klein_gets_the_times_of_its_pipeline(newer):
    """In bf16. A base model is refused."""
    cfg = replace(newer.cfg, precision="bf16")
    model = rlcm.load_model(cfg, torch.device("cpu"))
    assert sum(name.startswith("single") for name in model.trainable) == 2 * 2 * 2  # blocks, layers, A and B
    newer.prompts = ["a cat"]
    times = {}

    def look(network, args, given):
        times.setdefault(network, []).append(given.get("timestep", args[2:3]))

    model.network.register_forward_pre_hook(look, with_kwargs=True)
    newer.pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    rlcm.generate(model, cfg, newer.prompts)
    newer.pipe.to(torch.bfloat16)
    newer.plain(cfg.steps)
    assert [time for (time,) in times[model.network]] == times[newer.pipe.transformer]

    newer.pipe.register_to_config(is_distilled=False)
    newer.pipe.save_pretrained(newer.hub)
    with pytest.raises(BadInput, match="must be a distilled one"):
        rlcm.load_model(cfg, torch.device("cpu"))


@pytest.mark.parametrize("newer", ["lcm"], indirect=True)
def test_sdxl_of_a_bf16_pipeline_decodes_in_float32(newer):
    cfg = replace(newer.cfg, precision="bf16")
    assert sdxl.SDXL(newer.pipe.to(torch.bfloat16), cfg).pipe.vae.dtype == torch.float32
