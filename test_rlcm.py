"""Tests of rlcm.py, rewards.py and bench/ against independent computations.

    python -m pytest -q -n 2 --dist worksteal test_rlcm.py     # two processes of one thread each
    python -m pytest -q test_rlcm.py                           # one process

They need no network, and run on the CPU also where there is a GPU, unless RLCM_TEST_GPU is set.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.update({} if "RLCM_TEST_GPU" in os.environ else {"CUDA_VISIBLE_DEVICES": ""})

import ast
import contextlib
import csv
import functools
import importlib.util
import inspect
import io
import itertools
import json
import multiprocessing
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import accelerate
import accelerate.state
import matplotlib.figure  # noqa: F401
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    HfArgumentParser,
    PreTrainedTokenizerFast,
)

import rewards
import rlcm
from bench import evaluate, frontier, full_size, gpu_check, lifted, plot
from rewards import BadInput
from rlcm import METHODS, Config, advantages, at, gaussian_kl, log_prob, path_kl, policy_loss, rollout, update
from tiny import make_tiny

HERE = Path(rlcm.__file__).parent
PRELOADED = accelerate.Accelerator, HfArgumentParser, tqdm  # for the children, forked from such a process
MINI = dict(pixels=16, min_likeness=0.0)  # settings of every run of the `mini` pipelines
SMALL = dict(MINI, epochs=2, batch_size=8, micro_batch=4, save_every=1)
torch.set_num_threads(1)
rlcm.quiet()


# --------------------------------------------------------------------------------------------------- fixtures
@pytest.fixture(autouse=True)
def everything_as_it_was():
    """A test's seeds are its own, and the program gives Ctrl-C back whatever it did."""
    before = signal.getsignal(signal.SIGINT)
    torch.manual_seed(0)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is before


def scheduler_of(method):
    """That of the embedded model: rlcm's and tiny/sd's DDIM end without noise."""
    kind, folder = (LCMScheduler, "lcm") if method == "rlcm" else (DDIMScheduler, "sd")
    return kind.from_pretrained(HERE / "tiny" / folder / "scheduler")


@pytest.fixture
def lcm_scheduler():
    return scheduler_of("rlcm")


@pytest.fixture(scope="session")
def loaded():
    return rlcm.load_model(rlcm.configure(model="tiny"))


@pytest.fixture
def model(loaded):
    """tiny/lcm with an adapter that is no longer the identity."""
    return perturbed(loaded)


def perturbed(model, scale=0.1):
    with torch.no_grad():
        for i, p in enumerate(model.trained.values()):
            p.copy_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def make_mini(folder, method):
    """A pipeline of random weights that draws 16x16 pictures: for all that a run does around its network."""
    torch.manual_seed(0)
    lcm = method == "rlcm"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "tiny" / "lcm" / "tokenizer")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    text = CLIPTextConfig(**sizes, **ids, max_position_embeddings=tokenizer.model_max_length)
    blocks = dict(down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"])
    blocks |= dict(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
    blocks |= dict(cross_attention_dim=16, time_cond_proj_dim=16 if lcm else None)
    unet = UNet2DConditionModel(4, 4, 4, **blocks)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    blocks |= dict(block_out_channels=(4, 4, 8), norm_num_groups=4, mid_block_add_attention=False)
    vae = AutoencoderKL(3, 3, **blocks, sample_size=16, latent_channels=4, scaling_factor=0.5)
    unchecked = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline = LatentConsistencyModelPipeline if lcm else StableDiffusionPipeline
    pipe = pipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler_of(method), **unchecked)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    return make_mini(tmp_path_factory.mktemp("mini-lcm"), "rlcm")


@pytest.fixture(scope="session")
def mini_sd(tmp_path_factory):
    return make_mini(tmp_path_factory.mktemp("mini-sd"), "ddpo")


def words(**settings):
    """A command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def metrics(run):
    with open(run / "metrics.csv") as f:
        return list(csv.DictReader(f))


def column(run, name):
    return [float(row[name]) for row in metrics(run)]


def values(run):
    """All of metrics.csv but the time it took."""
    return [[v for k, v in row.items() if k != "seconds"] for row in metrics(run)]


def same_weights(a, b):
    """Bit for bit; the file's header may order its entries differently."""
    a, b = (load_file(run / "pytorch_lora_weights.safetensors") for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def plain_pictures(folder, prompts, lora=None, **options):
    """What a user of diffusers gets, without this repository's code: (B, 3, H, W)."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    g = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(list(prompts), generator=g, output_type="pt", **options).images


def place(picture, path):
    """(y, x) of a picture (3, H, W), enlarged to 128 pixels, in a sheet: by its middle line, then by all."""
    picture = Image.fromarray(np.uint8(np.rint(picture.permute(1, 2, 0).numpy() * 255)))
    tile = np.asarray(picture.resize((128, 128), Image.LANCZOS)).astype(np.int16)
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(np.int16)
    lines = np.lib.stride_tricks.sliding_window_view(sheet[..., 1], 128, axis=1)  # (H, W - 127, 128)
    y, x = np.unravel_index(np.abs(lines - tile[64, :, 1]).max(2).argmin(), lines.shape[:2])
    assert np.abs(sheet[y - 64 : y + 64, x : x + 128] - tile).max() <= 2, "the picture is not in the sheet"
    return y, x


# ------------------------------------------------------------------------------------ kernels, log-prob, KL
def wave(x, t, c):
    """An arbitrary network."""
    return torch.tanh(x * 1.3 + t.view(-1, 1, 1, 1) / 500 - 1) + c


@pytest.mark.parametrize("steps, scaling", [(1, 10.0), (2, 10.0), (4, 0.002), (8, 0.002), (50, 10.0)])
def test_rlcm_steps_equal_diffusers(lcm_scheduler, steps, scaling):
    """A whole trajectory with the same noise through LCMScheduler.step, the last step included.

    With the usual scaling of timesteps, 10, f_theta is the clean latent but for 1e-7, with a small one not.
    """
    lcm_scheduler.register_to_config(timestep_scaling=scaling)
    s = rlcm.rlcm_schedule(lcm_scheduler, steps, "cpu")
    x, c = torch.randn(3, 12, 8, 8), torch.randn(3, 1, 1, 1)
    lcm_scheduler.set_timesteps(steps)
    assert s.t.tolist() == lcm_scheduler.timesteps.tolist()
    for i, t in enumerate(lcm_scheduler.timesteps):
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        noise = torch.Generator().manual_seed(i)
        theirs = lcm_scheduler.step(wave(x, t.expand(3), c), t, x, generator=noise)
        mean, std = rlcm.rlcm_policy(wave, x, torch.full((3,), i), c, s)
        f = mean / s.ab_next[i].sqrt()
        torch.testing.assert_close(f, theirs.denoised, rtol=1e-5, atol=1e-5)
        x = mean + std * z
        torch.testing.assert_close(x, theirs.prev_sample, rtol=1e-5, atol=1e-5)
    assert (s.std[:-1] > 0).all() and s.std[-1] == 0 and s.ab_next[-1] == 1
    assert s.actions.tolist() == list(range(steps - 1))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_last_noise_is_added_to_what_the_steps_without_it_draw(lcm_scheduler, steps):
    """And is the only action: x_H is Gaussian around the clean latent that the plain sampler ends with."""
    plain = rlcm.rlcm_schedule(lcm_scheduler, steps, "cpu")
    noisy = rlcm.rlcm_schedule(lcm_scheduler, steps, "cpu", last_std=0.6)
    z, c = torch.randn(steps + 1, 3, 12, 8, 8), torch.randn(3, 1, 1, 1)
    x, _, _ = rollout(rlcm.rlcm_policy, wave, plain, c, z)
    y, mean, log_p = rollout(rlcm.rlcm_policy, wave, noisy, c, z)
    assert noisy.actions.tolist() == [steps - 1]
    assert torch.equal(x[:-1], y[:-1]) and torch.equal(mean[-1], x[-1])
    torch.testing.assert_close(y[-1], x[-1] + 0.6 * z[-1])
    density = torch.distributions.Normal(x[-1], 0.6).log_prob(y[-1])
    torch.testing.assert_close(log_p[-1], density.mean((1, 2, 3)))


@pytest.mark.parametrize("steps, to_one", [(10, False), (50, False), (7, True)])
def test_ddpo_steps_equal_ddim_with_eta_one(steps, to_one):
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler = DDIMScheduler(**betas, set_alpha_to_one=to_one, steps_offset=0 if to_one else 1)
    s, x = rlcm.ddpo_schedule(scheduler, steps, "cpu"), torch.randn(3, 12, 8, 8)
    assert len(s.std) == steps and (s.std[:-1] > 0).all() and (s.std[-1] == 0) == to_one
    assert s.actions.tolist() == list(range(steps - to_one))
    for i, t in enumerate(scheduler.timesteps):
        z = torch.randn(x.shape)
        mean, std = rlcm.ddpo_policy(wave, x, torch.full((3,), i), 0.0, s)
        theirs = scheduler.step(wave(x, t.expand(3), 0.0), t, x, eta=1.0, variance_noise=z)
        x = mean + std * z
        torch.testing.assert_close(x, theirs.prev_sample, rtol=1e-4, atol=1e-5)


def test_score_schedule_is_the_vp_sde_of_the_models_betas():
    """dX = -1/2 beta X dt + sqrt(beta) dB has ab(t) = exp(-integral): by quadrature over the betas.

    std is that of the bridge from the noised picture to the picture itself (DDPM, eq. 7).
    """
    scheduler = DDIMScheduler.from_pretrained(HERE / "tiny" / "sd" / "scheduler")
    s = rlcm.score_schedule(scheduler, 12, "cpu")
    rate = -np.log(1 - scheduler.betas.double().numpy())  # beta(t) on [j - 1, j]
    t = s.t.double().tolist() + [0.0]

    def integral(t):
        points = np.linspace(1e-9, t, 20_001)
        return np.trapezoid(rate[np.ceil(points).astype(int).clip(max=999)], dx=t / 20_000) + rate[0]

    for k in (0, 5, 11):
        later, sooner = integral(t[k]), integral(t[k + 1])
        assert -np.log(s.ab[k].item()) == pytest.approx(later, rel=1e-3)
        assert -np.log(s.ab_next[k].item()) == pytest.approx(sooner, rel=1e-3)
        bridge = -np.expm1(-sooner) * -np.expm1(sooner - later) / -np.expm1(-later)
        assert s.std[k].item() ** 2 == pytest.approx(bridge, rel=5e-3)
    roots = (-s.ab.double().log() - rate[0]).clamp(min=0) ** (1 / 3)
    torch.testing.assert_close(roots.diff(), -roots[:1].expand(11) / 12, rtol=1e-3, atol=1e-4)
    assert (s.t.diff() < 0).all() and s.t[0] == 999 and s.actions.tolist() == list(range(12))
    assert torch.equal(s.ab[1:], s.ab_next[:-1])


def test_the_std_of_score_tends_to_that_of_the_reverse_sde():
    """std^2 / (beta dt) -> 1 at a rate of 1 / H, but near the data, where no step is small."""
    error = {}
    for H in (50, 400):
        s = rlcm.score_schedule(scheduler_of("score"), H, "cpu")
        k = s.ab < 0.9
        error[H] = (s.std[k] ** 2 / (s.ab_next[k] / s.ab[k]).log() - 1).abs().max().item()
    assert error[400] < 0.05 and error[400] == pytest.approx(error[50] / 8, rel=0.3)


def test_score_step_by_hand_is_ddpos_gaussian():
    """(x + (1 - r) a) / sqrt(r), r = exp(-integral of beta), in small steps x + beta dt (x / 2 + a); and
    DDIM's formula on the same schedule, with another network."""
    m = Gaussian("score", 50, 0.3)
    x, k = torch.randn(6, 1, 1, 1), torch.tensor([0, 3, 10, 20, 40, 49])
    mean, std = rlcm.score_policy(m.eps, x, k, None, m.s)
    ab, ab_next = at(m.s.ab, k).double(), at(m.s.ab_next, k).double()
    a, r = ab.sqrt() * 0.3 - x, ab / ab_next
    torch.testing.assert_close(mean.double(), (x + (1 - r) * a) / r.sqrt(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(std, at(m.s.std, k))
    euler = x + (ab_next / ab).log() * (x / 2 + a)
    torch.testing.assert_close(mean[4:].double(), euler[4:], atol=2e-3, rtol=0)
    x, k = torch.randn(50, 3, 4, 4), torch.arange(50)
    given = wave, x, k, 0.0, m.s
    for ours, theirs in zip(rlcm.score_policy(*given), rlcm.ddpo_policy(*given)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 6, 50])
@pytest.mark.parametrize("variance", [0.0, 1.0])
def test_a_score_step_of_any_length_is_exact(variance, steps):
    """With the score of N(0.3, variance): x_k ~ N(sqrt(ab) 0.3, V_k), V_k = ab variance + 1 - ab, goes over
    into x_{k+1}. The program's std is for variance 0; data of variance 1 need std^2 = 1 - ab / ab_next."""
    s = rlcm.score_schedule(scheduler_of("score"), steps, "cpu")
    if variance:
        s.std = (1 - s.ab / s.ab_next).sqrt()
    V, V_next = (ab * variance + 1 - ab for ab in (s.ab, s.ab_next))

    def eps(x, t, c):
        return at((1 - s.ab).sqrt() / V, k) * (x - at(s.ab.sqrt(), k) * 0.3)

    k = torch.arange(steps)
    centre = at(s.ab.sqrt(), k) * 0.3
    low, std = rlcm.score_policy(eps, centre, k, None, s)
    high, _ = rlcm.score_policy(eps, centre + 1, k, None, s)
    torch.testing.assert_close(low.flatten(), s.ab_next.sqrt() * 0.3, atol=1e-5, rtol=1e-4)
    reached = (high - low).flatten() ** 2 * V + std.flatten() ** 2  # the kernel is linear
    torch.testing.assert_close(reached, V_next, atol=1e-6, rtol=1e-3)


def test_six_steps_of_score_end_at_the_law_of_the_data():
    m = Gaussian("score", 6, 0.3)
    m.s.std = (1 - m.s.ab / m.s.ab_next).sqrt()
    end = m.rollout(20_000, seed=0)[0][-1]
    assert end.mean().item() == pytest.approx(0.3, abs=0.03)
    assert end.var().item() == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_mixed_steps_equals_one_at_a_time(method):
    """The update flattens steps into one batch: row k of a mixed batch is the kernel at k."""
    schedule, policy = METHODS[method]
    s, x = schedule(scheduler_of(method), 8, "cpu"), torch.randn(8, 2, 3, 3)
    mean, std = policy(wave, x, torch.arange(8), 0.0, s)
    assert std.shape == (8, 1, 1, 1)
    for k in range(8):
        one = policy(wave, x[k : k + 1], torch.tensor([k]), 0.0, s)
        assert torch.equal(mean[k : k + 1], one[0]) and torch.equal(std[k : k + 1], one[1])


def test_log_prob_and_kl_equal_torch_distributions():
    x, mean, other = torch.randn(3, 5, 4, 8, 8)
    std = torch.rand(5, 1, 1, 1) + 0.1
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    torch.testing.assert_close(log_prob(x, mean, std), p.log_prob(x).mean((1, 2, 3)))
    kl = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian_kl(mean, other, std), kl.sum((1, 2, 3)))


def test_a_step_without_noise_has_log_prob_and_kl_zero_and_no_gradient():
    """Beside a noisy row, whose values stay what they are alone; x_next = mean makes 0/0 of a density."""
    mean = torch.randn(3, 2, 4, 4, requires_grad=True)
    std = torch.tensor([0.0, 0.5, 0.0]).view(3, 1, 1, 1).requires_grad_()
    x, other = mean.detach().clone(), torch.randn(3, 2, 4, 4)
    x[1:] += 0.3
    for fn, given in ((log_prob, (x, mean, std)), (gaussian_kl, (mean, other, std))):
        value = fn(*given)
        assert value[0] == value[2] == 0 and value[1] != 0
        torch.testing.assert_close(value[1:2], fn(*(v[1:2] for v in given)))
        for g in torch.autograd.grad(value.sum(), (mean, std)):
            assert g.isfinite().all() and not g[0].any() and not g[2].any() and g[1].any()


@pytest.mark.parametrize("method, last_is_noisy", [("rlcm", False), ("ddpo", False), ("score", True)])
def test_the_log_prob_of_a_rollout_is_that_of_its_steps(method, last_is_noisy):
    """On the embedded models' schedules: rlcm's and tiny/sd's DDIM end without noise, 0 there and not NaN."""
    schedule, policy = METHODS[method]
    s, z = schedule(scheduler_of(method), 5, "cpu"), torch.randn(6, 3, 2, 4, 4)
    c = torch.randn(3, 1, 1, 1)
    x, mean, log_p = rollout(policy, wave, s, c, z)
    assert torch.equal(x[0], z[0]) and log_p.shape == (5, 3)
    noisy = torch.tensor([True] * 4 + [last_is_noisy])
    assert torch.equal(s.std > 0, noisy)
    for k in range(5):
        density = torch.distributions.Normal(mean[k], s.std[k] if noisy[k] else 1.0).log_prob(x[k + 1])
        torch.testing.assert_close(log_p[k], density.mean((1, 2, 3)) * noisy[k])
        torch.testing.assert_close(x[k + 1], mean[k] + s.std[k] * z[k + 1])
    _, kl = path_kl(policy, lambda x, t, c: wave(x, t, 0), s, c, x, mean)
    assert torch.equal((kl > 0).all(1), noisy) and torch.equal((kl == 0).all(1), ~noisy)
    with pytest.raises(AssertionError):
        rollout(policy, wave, s, c, z[:-1])


def test_the_method_part_works_alone():
    """Cut out of the file and run with torch, numpy and SimpleNamespace only, on a small network."""
    source = (HERE / "rlcm.py").read_text()
    part = source[source.index("= METHOD =") : source.index("= TRAINING =")]
    lift = {"torch": torch, "np": np, "SimpleNamespace": SimpleNamespace}
    exec("#" + part, lift)
    lift = SimpleNamespace(**lift)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    pretrained = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def noise_of(network):
        return lambda x, t, c: network(torch.cat([x[:, :, 0, 0], t[:, None] / 1000, c[:, 0]], 1)).view_as(x)

    for method, (schedule, policy) in lift.METHODS.items():
        before = [p.detach().clone() for p in network.parameters()]
        s = schedule(scheduler_of(method), 4, "cpu")
        c, z, prompts = torch.rand(8, 1, 1), torch.randn(5, 8, 2, 1, 1), ["a", "b"] * 4
        x, mean, log_p = lift.rollout(policy, noise_of(network), s, c, z)
        mean_pre, kl = lift.path_kl(policy, noise_of(pretrained), s, c, x, mean)
        A = lift.advantages(-x[-1].norm(dim=1).flatten(), prompts, {}, 8, 2, 10.0) - 0.1 * kl
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        charge = dict(mean_pre=mean_pre, kl_weight=0.1)
        log = lift.update(policy, noise_of(network), s, c, x, log_p, A, optimizer, 8, **charge)
        assert log["ratio_drift"] == 0 and log["grad_norm"] > 0 and all(np.isfinite(v) for v in log.values())
        assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters()))


# ---------------------------------------------------------------------------------------- ratio and gradients
def rolled(model, micro_batch, kl=False, steps=4, B=8):
    """Experience with a real model: arguments of `update` up to log_p_old, and mean_pre."""
    s, policy = rlcm.rlcm_schedule(model.pipe.scheduler, steps, "cpu"), rlcm.rlcm_policy
    c = rlcm.encode(model.pipe, ["a cat", "dog", "pizza", "red apple"] * (B // 4))
    z = torch.randn(steps + 1, B, *model.shape, generator=torch.Generator().manual_seed(5))
    batches = [slice(i, i + micro_batch) for i in range(0, B, micro_batch)]
    parts = [rollout(policy, model.eps, s, c[b], z[:, b]) for b in batches]
    x, mean, log_p = (torch.cat(part, 1) for part in zip(*parts))
    mean_pre = None
    if kl:
        with rlcm.pretrained(model) as eps_pre:
            mean_pre, _ = path_kl(policy, eps_pre, s, c, x, mean)
    return (policy, model.eps, s, c, x, log_p), mean_pre


@pytest.mark.parametrize("updates, micro_batch", [(1, 8), (1, 4), (2, 2)])
def test_the_ratio_is_exactly_one_before_the_first_step(model, updates, micro_batch):
    given, _ = rolled(model, micro_batch)
    params = list(model.trained.values())
    before, A = [p.detach().clone() for p in params], torch.randn(8)
    log = update(*given, A, torch.optim.SGD(params, 1e-3), micro_batch, updates=updates)
    assert log["ratio_drift"] == 0.0 and (updates > 1 or log["approx_kl"] == log["clip_fraction"] == 0.0)
    assert log["grad_norm"] > 0 and any(not torch.equal(a, b) for a, b in zip(before, params))
    log = update(*given, A, torch.optim.SGD(params, 0.0), micro_batch, updates=updates)
    assert log["ratio_drift"] > 0 and log["approx_kl"] > 0  # the metrics see a policy that has moved


def gradient(model, micro_batch=4, algo="ppo", kl=0.0, B=8):
    """Gradient of `update`, read from a step of plain gradient descent."""
    given, mean_pre = rolled(perturbed(model), micro_batch, kl > 0, B=B)
    params = list(model.trained.values())
    before = [p.detach().clone() for p in params]
    A = torch.randn(B, generator=torch.Generator().manual_seed(9))
    charge = dict(mean_pre=mean_pre, kl_weight=kl)
    update(*given, A, torch.optim.SGD(params, 1.0), micro_batch, algo, max_grad_norm=1e9, **charge)
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, params)])


def test_ppo_and_reinforce_gradients_agree_at_ratio_one(model):
    ppo, reinforce = gradient(model), gradient(model, algo="reinforce")
    assert ppo.norm() > 1e-4
    torch.testing.assert_close(ppo, reinforce, rtol=1e-3, atol=1e-6)


def test_rebel_is_reinforce_with_the_mean_of_the_pair_as_baseline():
    """Gradients before the first step of ((log-ratio - log-ratio') / eta - (r - r'))^2 and of -A log p."""
    eta, std, r = 0.7, torch.tensor(0.5), torch.tensor([1.3, -0.4])
    mean = torch.randn(3, 2, 4, 8, 8, requires_grad=True)  # of 3 steps of two pictures of one prompt
    x = mean.detach() + std * torch.randn(mean.shape)
    log_p = torch.stack([log_prob(x[k], mean[k], std.expand(2, 1, 1, 1)) for k in range(3)])  # (3, 2)
    ratio = (log_p - log_p.detach()).sum(0)  # logs of the two trajectories' ratios, 0 here
    rebel = ((ratio[0] - ratio[1]) / eta - (r[0] - r[1])) ** 2
    reinforce, _ = policy_loss(log_p, log_p.detach(), r - r.mean(), "reinforce")
    a, b = (torch.autograd.grad(loss, mean, retain_graph=True)[0] for loss in (rebel, reinforce.sum()))
    assert b.norm() > 1e-3
    torch.testing.assert_close(a, 4 / eta * b)


def test_micro_batch_changes_memory_not_the_gradient(model):
    small, large = gradient(model, 2, kl=0.1), gradient(model, 8, kl=0.1)
    assert large.norm() > 1e-4 and (small - large).norm() < 1e-3 * large.norm()


def test_low_memory_gives_the_same_gradient(model):
    cfg = rlcm.configure(model="tiny", low_memory=True)
    assert cfg.micro_batch == 1
    lean = rlcm.load_model(cfg)
    assert lean.pipe.unet.is_gradient_checkpointing and not model.pipe.unet.is_gradient_checkpointing
    a, b = gradient(lean, 1, kl=0.1, B=4), gradient(model, 4, kl=0.1, B=4)
    assert b.norm() > 1e-4 and (a - b).norm() < 1e-3 * b.norm()


def test_ppo_clips_only_what_profits():
    old, A = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    loss, ratio = policy_loss(new, old, A, "ppo", 0.1)
    loss.sum().backward()
    torch.testing.assert_close(ratio, new.detach().exp())
    assert (new.grad != 0).tolist() == [False, True, True, False]  # up with A > 0, down with A < 0: clipped
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.1, -np.exp(-0.5), np.exp(0.5), 0.9]).float())


class Gaussian:
    """Data N(theta, 1): noised data is N(sqrt(ab) theta, 1).

    Score, eps and consistency function are closed forms, and all kernels linear: slope_k x + shift_k theta.
    `eps` is the network that makes the program's own parametrisation produce them.
    """

    def __init__(self, method, steps, theta, shape=(1, 1, 1), **options):
        schedule, self.policy = METHODS[method]
        self.method, self.shape, self.pre = method, shape, torch.tensor(theta)
        self.s = schedule(scheduler_of(method), steps, "cpu", **options)
        self.theta = torch.nn.Parameter(torch.tensor(theta))

    def network(self, x, t, theta):
        k = torch.searchsorted(-self.s.t, -t)
        ab = at(self.s.ab, k)
        if self.method != "rlcm":
            return (1 - ab).sqrt() * (x - ab.sqrt() * theta)  # -sqrt(1 - ab) score
        f = theta + (x - ab.sqrt() * theta)
        clean = (f - at(self.s.c_skip, k) * x) / at(self.s.c_out, k)
        return (x - ab.sqrt() * clean) / (1 - ab).sqrt()

    def eps(self, x, t, c):
        return self.network(x, t, self.theta)

    def eps_pre(self, x, t, c):
        return self.network(x, t, self.pre)

    def rollout(self, N, seed, c=None):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(len(self.s.std) + 1, N, *self.shape, generator=g)
        return rollout(self.policy, self.eps, self.s, torch.zeros(N, 1, 1) if c is None else c, z)

    def path_kl(self, x, mean):
        return path_kl(self.policy, self.eps_pre, self.s, torch.zeros(x.shape[1], 1, 1), x, mean)

    def descend(self, x, log_p, A, optimizer=None, c=None, **options):
        """`update`, by default plain gradient descent in one micro-batch without clipping -> its metrics."""
        c = torch.zeros(len(log_p[0]), 1, 1) if c is None else c
        optimizer = optimizer or torch.optim.SGD([self.theta], 1.0)
        options = {"micro_batch": log_p.numel(), "max_grad_norm": 1e9} | options
        return update(self.policy, self.eps, self.s, c, x, log_p, A, optimizer, **options)

    def kernels(self):
        """(slope_k, shift_k) from the papers' formulas, double precision."""
        ab, ab_next, std = self.s.ab.double(), self.s.ab_next.double(), self.s.std.double()
        if self.method == "rlcm":  # sqrt(ab') f
            return [(b.sqrt(), b.sqrt() * (1 - a.sqrt())) for a, b in zip(ab, ab_next)]
        if self.method == "score":  # E[x_{k+1} | x_k], two Gaussians of variance 1 and covariance sqrt(r)
            return [((a / b).sqrt(), b.sqrt() * (1 - a / b)) for a, b in zip(ab, ab_next)]
        out = []
        for a, b, sigma in zip(ab, ab_next, std):  # DDIM: sqrt(ab') E[x_0 | x] + sqrt(1 - ab' - sigma^2) eps
            direction = (1 - b - sigma**2).clamp(min=0).sqrt() * (1 - a).sqrt()
            out.append((b.sqrt() * a.sqrt() + direction, b.sqrt() * (1 - a) - direction * a.sqrt()))
        return out


LAST = {"last_std": 0.6}
CASES = [
    ("rlcm", "ppo", 2, {}),
    ("rlcm", "reinforce", 4, {}),
    ("rlcm", "ppo", 1, LAST),
    ("rlcm", "ppo", 4, LAST),
    ("ddpo", "ppo", 5, {}),
    ("score", "ppo", 6, {}),
]


@pytest.mark.parametrize("method, algo, steps, options", CASES)
def test_the_policy_gradient_is_unbiased_on_gaussian_data(method, algo, steps, options):
    """Monte-Carlo gradient of E[r], r = -(x - 2)^2 / 2, through rollout and update, against the closed form.

    Mean and derivative of the mean follow by recursion; the variance does not depend on theta. In a step that
    is no action theta counts as a constant. With a last noise r is half its lead over its mirror image's.
    """
    theta, N, repeats = 0.3, 16_384, 12
    m = Gaussian(method, steps, theta, **options)
    mu = dmu = torch.zeros(()).double()
    for k, (slope, shift) in enumerate(m.kernels()):
        mu, dmu = slope * mu + shift * theta, slope * dmu + shift * (k in m.s.actions)
    exact = -(mu - 2) * dmu  # dE[r] / dtheta
    estimates = torch.empty(repeats).double()
    for i in range(repeats):
        m.theta.data.fill_(theta)
        x, mean, log_p = m.rollout(N, seed=i)
        r, mirrored = (-((end.flatten() - 2) ** 2) / 2 for end in (x[-1], 2 * mean[-1] - x[-1]))
        m.descend(x, log_p, (r - mirrored) / 2 if options else r - r.mean(), algo=algo)
        estimates[i] = (m.theta.item() - theta) * len(m.s.actions)  # the loss is a mean over the actions
    error = estimates.std() / repeats**0.5
    assert error < 0.15 * exact.abs()
    assert (estimates.mean() - exact).abs() < 3.5 * error, (estimates.mean(), exact, error)


@pytest.mark.parametrize("method, steps", [("ddpo", 5), ("score", 5), ("rlcm", 4)])
def test_a_value_keeps_the_gradient_and_lowers_the_error_of_its_estimate(method, steps):
    """A_k less the line through the rewards of the predicted points: same mean, less variance."""
    m, N = Gaussian(method, steps, 0.3), 1024
    prompts = [str(i) for i in range(N)]  # all new: judged by the batch
    estimates = torch.empty(2, 16).double()
    for i in range(16):
        for j in range(2):
            m.theta.data.fill_(0.3)
            x, mean, log_p = m.rollout(N, seed=i)
            r, guess = x[-1].flatten() - 2, torch.zeros(N, steps)
            for k in m.s.actions:
                point = rlcm.predicted(method, x[k], mean[k], m.s.ab[k], m.s.ab_next[k])
                guess[:, k] = point.flatten() - 2
            A = advantages(r, prompts, {}, 9, 9, 1e9, guess if j else None).view(N, -1).T
            m.descend(x, log_p, A * r.std(correction=0))
            estimates[j, i] = m.theta.item() - 0.3
    plain, value = estimates.mean(1)
    error = estimates.std(1)
    assert error[1] < 0.8 * error[0]
    assert (plain - value).abs() < 3.5 * (error.square().sum() / 16).sqrt()
    assert plain > 10 * error[0] / 4


@pytest.mark.parametrize("method, algo, steps, options", CASES[1:])
def test_the_kl_and_its_gradient_are_the_closed_form(method, algo, steps, options):
    """KL_k = D shift_k^2 (theta - theta_pre)^2 / (2 std_k^2).

    Without advantages the update moves theta by lambda times the mean slope of KL_k / D.
    """
    theta, pre, N = 0.7, 0.2, 16
    m = Gaussian(method, steps, pre, (2, 3, 1), **options)
    m.theta.data.fill_(theta)
    x, mean, log_p = m.rollout(N, seed=0)
    mean_pre, kl = m.path_kl(x, mean)
    actions = m.s.actions
    assert len(actions) == (1 if options else steps - (method != "score"))
    shift2 = torch.stack([shift**2 for _, shift in m.kernels()])[actions] / m.s.std[actions].double() ** 2
    exact = torch.zeros(steps).double()
    exact[actions] = 6 * shift2 * (theta - pre) ** 2 / 2
    torch.testing.assert_close(kl.double(), exact[:, None].expand(-1, N), rtol=2e-3, atol=1e-6)
    charge = dict(mean_pre=mean_pre, kl_weight=5.0)
    m.descend(x, log_p, torch.zeros(N), algo=algo, **charge)
    assert theta - m.theta.item() == pytest.approx(5.0 * (theta - pre) * shift2.mean().item(), rel=2e-3)


class Prompted(Gaussian):
    """A theta (N,) for each prompt; c holds the prompt's number."""

    def __init__(self, method, steps, theta, shape):
        super().__init__(method, steps, 0.0, shape)
        self.theta = torch.nn.Parameter(theta.clone())

    def eps(self, x, t, c):
        return self.network(x, t, self.theta[c[:, 0, 0].long()].view(-1, 1, 1, 1))


@pytest.mark.parametrize("micro_batch", [1, 5, 60])
def test_each_prompt_is_charged_its_own_kl(micro_batch):
    """The theta of a prompt moves by lambda times its own distance, cut as the batch may be."""
    theta, pre, B, steps = torch.tensor([0.7, 0.2, -0.5]), 0.2, 12, 6
    m = Prompted("score", steps, theta, (1, 2, 1))
    m.pre = torch.tensor(pre)
    c = (torch.arange(B) % 3).view(-1, 1, 1).float()
    x, mean, log_p = m.rollout(B, seed=0, c=c)
    mean_pre, _ = m.path_kl(x, mean)
    charge = dict(mean_pre=mean_pre, kl_weight=0.5)
    m.descend(x, log_p, torch.zeros(B), c=c, micro_batch=micro_batch, **charge)
    shift2 = torch.stack([shift**2 for _, shift in m.kernels()]) / m.s.std.double() ** 2
    moved = 0.5 * (theta - pre) * shift2.mean() / 3  # a third of the pictures each
    torch.testing.assert_close(theta - m.theta.detach(), moved.float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 5, 28])
def test_each_action_is_weighed_by_its_own_advantage(micro_batch):
    """The sum of A_k grad log p(x_{k+1} | x_k) by hand, cut as the batch may be."""
    m = Gaussian("score", 4, 0.3, (1, 2, 1))
    x, mean, log_p = m.rollout(7, seed=0)
    A = torch.randn(4, 7)
    m.descend(x, log_p, A, micro_batch=micro_batch)
    shift = torch.stack([shift for _, shift in m.kernels()]) / m.s.std.double() ** 2
    slopes = (x[1:] - mean).mean((2, 3, 4)) * shift[:, None]  # d log p / d theta, averaged over D
    assert m.theta.item() - 0.3 == pytest.approx((A * slopes).mean().item(), rel=1e-3)


def test_updates_are_steps_on_shares_of_the_pictures():
    """Three optimizer steps are three calls on a third of x, log-prob, advantages, prompts, base means."""
    states = []
    for updates in (1, 3):
        m = Prompted("score", 4, torch.tensor([0.5, 0.5]), (1, 2, 2))
        c = (torch.arange(12) % 2).view(-1, 1, 1).float()
        x, mean, log_p = m.rollout(12, seed=1, c=c)
        A = torch.linspace(-1, 1, 48).view(4, 12).roll(5, 1)
        mean_pre = mean + torch.linspace(0, 0.2, 12).view(-1, 1, 1, 1)
        parts = [slice(0, 12)] if updates == 3 else [slice(0, 4), slice(4, 8), slice(8, 12)]
        for b in parts:
            charge = dict(mean_pre=mean_pre[:, b], kl_weight=1.0)
            options = dict(c=c[b], updates=updates, micro_batch=4, clip_range=0.05)
            m.theta.grad = None
            m.descend(x[:, b], log_p[:, b], A[:, b], **options, **charge)
        states.append(m.theta.detach().clone())
    assert (states[0] - 0.5).abs().min() > 1e-3
    torch.testing.assert_close(states[0], states[1], rtol=1e-6, atol=1e-7)


def test_the_gradient_is_clipped_and_accumulated_by_the_functions_given():
    """max_grad_norm bounds the step; `backward` sees the loss of every micro-batch, as Accelerate's does."""
    m, seen = Gaussian("score", 4, 0.3), []
    x, _, log_p = m.rollout(8, seed=0)
    A = 100 * torch.ones(8)
    log = m.descend(x, log_p, A, max_grad_norm=0.25)
    assert log["grad_norm"] > 0.25 and (m.theta - 0.3).abs().item() == pytest.approx(0.25, rel=1e-3)
    steps = []
    for factor in (1, 2):
        m.theta.data.fill_(0.3)

        def backward(loss, factor=factor):
            seen.append(loss.item())
            (factor * loss).backward()

        def unlimited(parameters, max_norm):
            return torch.nn.utils.clip_grad_norm_(parameters, 1e9)

        own = dict(backward=backward, clip_grad_norm=unlimited)
        m.descend(x, log_p, A, micro_batch=8, max_grad_norm=0.1, **own)
        steps.append(m.theta.item() - 0.3)
    assert len(seen) == 2 * 4 and steps[1] == pytest.approx(2 * steps[0], rel=1e-4)


class LinearScore(Gaussian):
    """Score -(1 + a_k) x + b_k of data N(0, 1), a and b of each step to be learned."""

    def __init__(self, steps):
        super().__init__("score", steps, 0.0)
        self.a, self.b = (torch.nn.Parameter(torch.zeros(steps)) for _ in range(2))

    def eps(self, x, t, c):
        k = torch.searchsorted(-self.s.t, -t)
        return (1 - at(self.s.ab, k)).sqrt() * ((1 + at(self.a, k)) * x - at(self.b, k))


def test_score_reaches_the_tilted_gaussian():
    """r = -(x - 2)^2 / 2 and lambda = 1 on data N(0, 1): the optimum is p(x) exp(r(x)) = N(1, 1/2).

    std as for data of variance 1: the steps of the pretrained model are exact, p_pre is N(0, 1).
    """
    steps, N, iterations = 48, 512, 80
    m = LinearScore(steps)
    m.s.std = (1 - m.s.ab / m.s.ab_next).sqrt()
    optimizer = torch.optim.Adam([m.a, m.b], betas=(0.9, 0.99))
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - i / iterations) ** 2
        x, mean, log_p = m.rollout(N, seed=i)
        mean_pre, kl = m.path_kl(x, mean)
        r = -((x[-1].flatten() - 2) ** 2) / 2
        to_go = r - (kl.sum(0) - kl.cumsum(0))  # (H, N), without the KL that an action does not change
        A = to_go - to_go.mean(1, keepdim=True)
        m.descend(x, log_p, A, optimizer, mean_pre=mean_pre, kl_weight=1.0)
    x = m.rollout(40_000, seed=10**6)[0][-1]
    assert x.mean().item() == pytest.approx(1.0, rel=0.05) and x.var().item() == pytest.approx(0.5, rel=0.05)


# ------------------------------------------------------------------------------------------------- advantages
def close(A, expected):
    torch.testing.assert_close(A, torch.tensor(expected).float(), atol=1e-4, rtol=0)


def test_advantages_by_hand_with_integer_rewards():
    history = {}
    A = advantages(torch.tensor([1, 3, 10, 10]), ["a", "a", "b", "b"], history, 4, 2, 10.0)
    close(A, [-1.0, 1.0, 0.0, 0.0])
    assert A.dtype == torch.float32
    v = np.array([1, 3, 5, 7])
    A = advantages(torch.tensor([5, 7]), ["a", "a"], history, 4, 2, 10.0)
    close(A, (np.array([5, 7]) - v.mean()) / v.std())
    advantages(torch.tensor([9.0, 9.0]), ["a", "a"], history, 4, 2, 10.0)
    assert history["a"] == [5, 7, 9, 9]  # the oldest fell out
    advantages(torch.tensor([0.0, 8.0, 100.0]), ["c", "c", "d"], history, 2, 99, 10.0)
    A = advantages(torch.tensor([3.0, 5.0, 200.0]), ["c", "c", "d"], history, 2, 99, 10.0)
    close(A[:2], [-1.0, 1.0])  # a full buffer serves, however large min_count is


def test_advantages_of_rare_prompts_use_the_batch_and_are_clipped():
    r = torch.tensor([0.0, 1.0, 2.0, 100.0])
    A = advantages(r, ["a", "b", "c", "d"], {}, 16, 2, 1.5)
    expected = ((r - r.mean()) / r.std(correction=0)).clamp(-1.5, 1.5)
    torch.testing.assert_close(A, expected, atol=1e-5, rtol=0)
    assert A.max() == 1.5


def residual(A, guess):
    """What a line through (guess, A) leaves of A, by numpy."""
    slope, start = np.polyfit(guess.double().numpy(), A.double().numpy(), 1)
    return (A - slope * guess - start).float()


def test_advantages_less_the_value_that_fits_best():
    r, guess = torch.randn(50), torch.randn(50, 3)
    guess[:, 1] += 2 * r + 5
    guess[:, 2] = 7.0  # says nothing
    A = advantages(r, ["a"] * 50, {}, 50, 50, 10.0, guess)
    plain = advantages(r, ["a"] * 50, {}, 50, 50, 10.0)
    for k in (0, 1):
        torch.testing.assert_close(A[:, k], residual(plain, guess[:, k]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(A[:, 2], plain, atol=1e-4, rtol=1e-4)
    assert A[:, 1].std() < 0.6 < A[:, 0].std()
    prompts = ["a", "b"] * 25  # b's are better by 100: no news, in neither
    b = torch.tensor([0.0, 100.0]).repeat(25)
    shifted = advantages(r + b, prompts, {}, 50, 9, 10.0, guess[:, :2] + b[:, None])
    A = advantages(r, prompts, {}, 50, 9, 10.0, guess[:, :2])
    torch.testing.assert_close(shifted, A, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_predicted_picture_is_what_the_network_sees(method):
    """(x - sqrt(1 - ab) eps) / sqrt(ab), of an LCM the consistency function."""
    schedule, policy = METHODS[method]
    s, x, k = schedule(scheduler_of(method), 6, "cpu"), torch.randn(5, 3, 4, 4), torch.arange(5)
    mean, _ = policy(wave, x, k, 0.0, s)
    ab = at(s.ab, k)
    clean = (x - (1 - ab).sqrt() * wave(x, s.t[k], 0.0)) / ab.sqrt()
    if method == "rlcm":
        clean = at(s.c_out, k) * clean + at(s.c_skip, k) * x
    ours = rlcm.predicted(method, x, mean, ab, at(s.ab_next, k))
    torch.testing.assert_close(ours, clean, atol=2e-3, rtol=2e-3)


# ----------------------------------------------------------------------------------------- the file as a file
def test_importing_changes_nothing_and_imports_only_what_it_needs():
    heavy = ["diffusers", "transformers", "peft", "accelerate", "matplotlib"]
    code = f"""
import os, signal, sys, threading, torch
def state():
    handlers = [signal.getsignal(n) for n in signal.valid_signals()]
    random = torch.get_rng_state().tolist()
    return dict(os.environ), random, torch.get_default_dtype(), torch.is_grad_enabled(), handlers, os.getcwd()
before = state()
import rlcm, rewards
assert state() == before and threading.active_count() == 1
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_lines_functions_and_imports_of_the_two_files():
    """At most 110 columns, functions of 60 lines; rlcm.py imports rewards.py alone, that one no neighbour."""
    neighbours = {p.stem for p in HERE.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name[0] != ".")}
    for name, allowed in (("rlcm.py", {"rewards"}), ("rewards.py", set())):
        text = (HERE / name).read_text()
        assert not [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 110]
        nodes = list(ast.walk(ast.parse(text)))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        assert len(functions) > 20 and not [f.name for f in functions if f.end_lineno - f.lineno >= 60]
        imported = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        imported += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
        assert {module.split(".")[0] for module in imported} & (neighbours | {""}) == allowed


def test_the_two_files_alone_train_resume_and_sample(tmp_path):
    """In an empty folder, as a user types it, in a process that sees nothing of the repository."""
    for name in ("rlcm.py", "rewards.py"):
        shutil.copy(HERE / name, tmp_path)
    small = "--pixels 64 --steps 2 --batch-size 4 --micro-batch 4 --kl 0.01 --save-every 1"
    commands = [
        f"--model {HERE}/tiny/lcm {small} --epochs 1 --out run",
        "--resume run --epochs 2",
        "--load run --sample cat dog",
    ]
    code = f"""
import runpy, sys
for command in {commands}:
    sys.argv = ["rlcm.py", *command.split()]
    try:
        runpy.run_path("rlcm.py", run_name="__main__")
    except SystemExit as e:
        assert e.code == 0
        print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done\n") == 3
    assert "--load run" in done.stdout and "wrote run/sample.png" in done.stdout  # what to do next
    bars = [line for line in re.split(r"[\r\n]", done.stderr) if line.strip()]
    assert bars and all("epoch" in line and "reward=" in line or "0%" in line for line in bars), bars  # quiet
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    run = "config.json metrics.csv reward.png pytorch_lora_weights.safetensors checkpoint/state.pt sample.png"
    run += " samples/epoch-0000.png samples/epoch-0001.png samples/epoch-0002.png"
    assert left == {"rlcm.py", "rewards.py", *(f"run/{name}" for name in run.split())}
    assert len(metrics(tmp_path / "run")) == 2 and column(tmp_path / "run", "ratio_drift") == [0, 0]


# ------------------------------------------------------------------------------------------- models, settings
COLUMNS = "steps epochs batch_size lr lora_rank lora_alpha buffer_size min_count clip_range adv_clip"
COLUMNS = f"{COLUMNS} max_grad_norm guidance updates prompts".split()
PUBLISHED = {  # DESIGN.md, section 5: RLCM's four GPUs (align: three) as one; ddpo-pytorch's config/dgx.py
    "rlcm compress": [8, 1000, 16, 1e-4, 16, 32, 16, 16, 1e-4, 10, 5, 8, 1, "imagenet-animals"],
    "rlcm incompress": [8, 1000, 16, 1e-4, 16, 32, 16, 16, 1e-4, 10, 5, 8, 1, "imagenet-animals"],
    "rlcm aesthetic": [8, 1000, 32, 1e-4, 8, 8, 32, 16, 1e-4, 10, 5, 8, 1, "animals"],
    "rlcm align": [16, 708, 120, 1e-4, 16, 32, 32, 16, 1e-4, 10, 5, 8, 1, "animals-activities"],
    "ddpo compress": [50, 100, 256, 3e-4, 4, 4, 16, 16, 1e-4, 5, 1, 5, 4, "imagenet-animals"],
    "ddpo incompress": [50, 100, 256, 3e-4, 4, 4, 16, 16, 1e-4, 5, 1, 5, 4, "imagenet-animals"],
    "ddpo aesthetic": [50, 200, 256, 3e-4, 4, 4, 32, 16, 1e-4, 5, 1, 5, 2, "animals"],
    "ddpo align": [50, 200, 288, 3e-4, 4, 4, 32, 16, 1e-4, 5, 1, 5, 2, "animals-activities"],
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_papers_settings(task):
    method, reward = task.split()
    cfg = rlcm.configure(model="real", paper=True, method=method, reward=reward)
    assert {name: getattr(cfg, name) for name in COLUMNS} == dict(zip(COLUMNS, PUBLISHED[task]))
    assert cfg.kl == cfg.last_noise == cfg.min_likeness == 0 and cfg.pixels == 512  # as published


def test_what_is_given_wins_over_every_preset():
    cfg = rlcm.configure(model="real", paper=True, reward="align", steps=4, prompts="a cat", lr=4e-4, kl=0.1)
    assert (cfg.steps, cfg.prompts, cfg.lr, cfg.kl, cfg.batch_size) == (4, "a cat", 4e-4, 0.1, 120)
    cfg = rlcm.configure(model="tiny", method="ddpo", guidance=1.5, low_memory=True, micro_batch=8)
    assert (cfg.guidance, cfg.micro_batch, cfg.lr, cfg.steps) == (1.5, 8, 3e-3, 5)
    assert rlcm.configure(model="tiny", lr=1.2e-3, method="score").lr == 1.2e-3  # also if it is Config's own
    assert Config(method="ddpo").lr == Config().lr  # literal
    cfg = rlcm.configure(model="real", kl=0.0, pixels=64, save_every=7)
    assert (cfg.kl, cfg.pixels, cfg.save_every, cfg.epochs) == (0.0, 64, 7, 1000)


def test_the_presets_of_small_and_large_models():
    """The embedded model's ends when its pictures have changed; a large one is charged for changing them."""
    names = "pixels", "epochs", "min_likeness", "save_every", "kl"
    for model, expected in (("tiny", (64, 60, 0.91, 2, 0.0)), ("real", (512, 1000, 0.0, 50, 4e-4))):
        cfg = rlcm.configure(model=model)
        assert tuple(getattr(cfg, name) for name in names) == expected


@pytest.mark.parametrize("method, free, given, rows", [
    ("rlcm", 80, {}, 16),
    ("rlcm", 15, {}, 8),  # 9 / 1.07 are 8.4 rows
    ("ddpo", 15, {}, 4),  # of two passes each
    ("score", 15, {}, 4),
    ("rlcm", 15, {"pixels": 1024}, 2),
    ("ddpo", 15, {"paper": True}, 4),
    ("rlcm", 2, {}, 1),
    ("rlcm", 80, {"low_memory": True}, 1),
    ("rlcm", 80, {"micro_batch": 3}, 3),
    ("rlcm", 15, {"model": "tiny"}, 32),
])
def test_a_gpus_memory_sets_the_micro_batch(method, free, given, rows, monkeypatch):
    """A power of two of rows of 1.07 GiB at 512 px in what the card has beyond 6 GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=free * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert rlcm.configure(**{"model": "real", "method": method} | given).micro_batch == rows


def test_help_shows_the_values_that_would_be_used(capsys):
    def default(name, *command):
        with pytest.raises(SystemExit) as stopped:
            rlcm.main([*command, "--help"])
        assert not stopped.value.code
        shown = " ".join(capsys.readouterr().out.partition("options:")[2].split())
        assert all(reward in shown for reward in rewards.REWARDS)
        return re.search(rf"--{name} .*?\(default: (.*?)\)", shown)[1]

    assert default("lr") == "0.0012" and default("lr", "--method", "ddpo") == "0.003"
    assert default("lr", "--method", "ddpo", "--lr", "0.5") == "0.5"
    assert default("batch_size", *"--paper --reward aesthetic".split()) == "32"
    assert default("batch_size", *"--paper --reward aesthetic --batch-size 7".split()) == "7"


def test_a_gpu_takes_the_papers_model_in_half_precision_and_says_so(monkeypatch, capsys):
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for cuda, given, model, guidance in (
        (False, {}, "tiny", 6.0),
        (True, {}, "SimianLuo/LCM_Dreamshaper_v7", 8.0),
        (True, {"method": "ddpo"}, "Lykon/dreamshaper-7", 5.0),
        (True, {"method": "score", "guidance": 2.0}, "Lykon/dreamshaper-7", 2.0),
        (True, {"lcm_lora": "latent-consistency/lcm-lora-sdv1-5"}, "Lykon/dreamshaper-7", 1.5),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        cfg = rlcm.configure(**given)
        assert (cfg.model, cfg.guidance, cfg.precision) == (model, guidance, "bf16" if cuda else "fp32")
        assert re.fullmatch(rf"model: {model} \(.*GPU.*\)\n", capsys.readouterr().out)
        assert rlcm.configure(**given, model=model, precision="fp32").precision == "fp32"
        assert capsys.readouterr().out == ""


def test_only_the_first_of_several_processes_speaks(monkeypatch, capsys):
    for rank, said in (("0", "hello\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        rlcm.say("hello")
        assert capsys.readouterr().out == said


@torch.no_grad()
def test_eps_is_the_guided_network_and_pretrained_restores_the_adapter(model, mini_sd):
    """Against the U-Nets alone; the adapter is back also when the block raises."""
    x, t, c = torch.randn(2, *model.shape), torch.tensor([999, 19]), rlcm.encode(model.pipe, ["a cat", "dog"])
    unet = UNet2DConditionModel.from_pretrained(HERE / "tiny" / "lcm" / "unet")
    w = model.pipe.get_guidance_scale_embedding(torch.tensor([6.0 - 1] * 2), unet.config.time_cond_proj_dim)
    tuned, base = model.eps(x, t, c), unet(x, t, c, timestep_cond=w).sample
    with rlcm.pretrained(model) as eps_pre:
        torch.testing.assert_close(eps_pre(x, t, c), base)
    assert torch.equal(model.eps(x, t, c), tuned) and (tuned - base).abs().mean() > 0.01
    with pytest.raises(ZeroDivisionError), rlcm.pretrained(model):
        1 / 0
    assert torch.equal(model.eps(x, t, c), tuned)

    model = rlcm.load_model(Config(**MINI, model=mini_sd, method="ddpo", guidance=3.0))
    x, (c, nothing) = torch.randn(2, *model.shape), (rlcm.encode(model.pipe, [p, p]) for p in ("a cat", ""))
    unet = UNet2DConditionModel.from_pretrained(f"{mini_sd}/unet")
    e_c, e_0 = unet(x, t, c).sample, unet(x, t, nothing).sample
    torch.testing.assert_close(model.eps(x, t, c), e_0 + 3.0 * (e_c - e_0))
    plain = rlcm.load_model(Config(**MINI, model=mini_sd, method="ddpo", guidance=1.0))
    torch.testing.assert_close(plain.eps(x, t, c), e_c)


@torch.no_grad()
def test_a_saved_adapter_keeps_its_alpha_in_a_plain_pipeline(mini, tmp_path):
    """Alpha three times the rank: a reader that does not find it takes the rank."""
    random = torch.get_rng_state()
    cfg = Config(**MINI, model=mini, lora_rank=2, lora_alpha=6)
    model = perturbed(rlcm.load_model(cfg))
    assert torch.equal(torch.get_rng_state(), random)  # a program that loads it keeps its own random numbers
    rlcm.save_weights(model.pipe, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = DiffusionPipeline.from_pretrained(mini, dtype=torch.float32)
    given = torch.randn(2, *model.shape), torch.tensor([999, 19]), rlcm.encode(pipe, ["a cat", "dog"])
    w = {"timestep_cond": torch.randn(2, 16)}
    base, tuned = pipe.unet(*given, **w).sample, model.pipe.unet(*given, **w).sample
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(pipe.unet(*given, **w).sample, tuned)
    assert (tuned - base).abs().mean() > 0.01
    other = rlcm.load_model(cfg)
    rlcm.load_weights(other, tmp_path)
    assert torch.equal(other.pipe.unet(*given, **w).sample, tuned)


@torch.no_grad()
def test_compile_compiles_the_network_that_the_program_calls(mini, monkeypatch):
    """With a compiler that counts: every pass goes through it, the result and the weights' names stay."""
    cfg, passes = Config(**MINI, model=mini, lora_rank=2), []
    plain = perturbed(rlcm.load_model(cfg))

    def compiler(forward):
        return lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiler)
    fast = perturbed(rlcm.load_model(rlcm.replace(cfg, compile=True)))
    given = torch.randn(2, *plain.shape), torch.tensor([999, 19]), rlcm.encode(plain.pipe, ["a cat", "dog"])
    assert torch.equal(fast.eps(*given), plain.eps(*given)) and len(passes) == 1
    with rlcm.pretrained(plain) as base, rlcm.pretrained(fast) as fast_base:
        assert torch.equal(fast_base(*given), base(*given)) and len(passes) == 2
    assert fast.trained.keys() == plain.trained.keys() and rlcm.draw(fast, cfg, ["a cat"], 3).isfinite().all()
    assert len(passes) == 5


@pytest.mark.parametrize("method, pixels", [("rlcm", 8), ("rlcm", 24), ("ddpo", 24)])
def test_pictures_have_the_pixels_asked_for(method, pixels, mini, mini_sd, tmp_path):
    """As a plain pipeline draws them with height and width; trained so, too."""
    folder, out = mini if method == "rlcm" else mini_sd, tmp_path / "run"
    settings = dict(SMALL, model=folder, method=method, steps=2, epochs=1, guidance=3.0, prompts="a red cat")
    assert rlcm.main(words(**settings | {"pixels": pixels}, out=out)) == 0
    options = dict(num_inference_steps=2, guidance_scale=3.0, height=pixels, width=pixels)
    options |= {} if method == "rlcm" else {"eta": 1.0}
    for epoch, lora in ((0, None), (1, out)):
        picture = plain_pictures(folder, ["a red cat"], lora=lora, **options)[0]
        assert picture.shape == (3, pixels, pixels)
        place(picture, out / "samples" / f"epoch-000{epoch}.png")


# --------------------------------------------------------------------------------------------------- rewards
PROMPTS = ["a cat", "a dog", "two red apples on a table", "owl", "a fox"]
REWARD_FILE = """
import torch
def redness(images, prompts): return (images[:, 0].mean((1, 2)) * 10).int()
def double(images, prompts): return redness(images, prompts).double()
def listed(images, prompts): return redness(images, prompts).tolist()
def nan(images, prompts): return torch.tensor([float("nan")] * len(prompts))
def shape(images, prompts): return torch.zeros(len(prompts), 2)
def scalar(images, prompts): return 1.0
def raises(images, prompts): raise RuntimeError("no")
def text(images, prompts): return "five"
value = 3
"""


@pytest.fixture(scope="session")
def emoji():
    """The embedded model's training pictures and their captions: (N, 3, 64, 64), list of N."""
    return make_tiny.training_pictures()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder, the current one, with a file of rewards of somebody's own."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(REWARD_FILE)
    Path("broken.py").write_text("def fn(:\n")
    Path("prompts.txt").write_text("a cat\n")


def whole_pixels(B=5, H=24, W=36):
    """Pictures whose values are multiples of 1/255, and the same for Pillow. CLIP only has to crop them."""
    pixels = np.random.default_rng(0).integers(0, 256, (B, H, W, 3), dtype=np.uint8)
    pixels[:, :, :, 0] //= np.arange(1, B + 1, dtype=np.uint8)[:, None, None]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, [Image.fromarray(p) for p in pixels]


def for_pillow(images):
    return [Image.fromarray(np.uint8(np.rint(image.permute(1, 2, 0).numpy() * 255))) for image in images]


def test_rewards_can_be_copied_alone_and_importing_it_does_nothing(monkeypatch):
    """It imports the standard library, torch and Pillow; no environment variable is set, no seed."""
    source = Path(rewards.__file__)
    body = ast.parse(source.read_text()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in imports}
    assert roots <= {*sys.stdlib_module_names, "torch", "PIL"} and {"torch", "PIL"} <= roots
    monkeypatch.setattr(os, "environ", {})
    torch.rand(1)  # whatever seed an import sets, this is not its state
    state = torch.get_rng_state()
    spec = importlib.util.spec_from_file_location("a_copy", source)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert os.environ == {} and torch.equal(torch.get_rng_state(), state)


def test_compress_is_the_size_of_the_jpeg_file(tmp_path, monkeypatch):
    images = torch.rand(3, 3, 40, 56)
    images[1] = 1.0
    for i, picture in enumerate(for_pillow(images)):
        picture.save(tmp_path / f"{i}.jpg", quality=95)
    sizes = torch.tensor([(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(3)])
    assert sizes[1] < sizes[0]
    for cores in (1, 64, None):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        torch.testing.assert_close(rewards.get_reward("compress")(images, [""] * 3), -sizes)
        torch.testing.assert_close(rewards.get_reward("incompress")(images, [""] * 3), sizes)


def test_jpeg_threads_are_as_many_as_the_cores(monkeypatch):
    """Each of eight pictures waits until all eight are being encoded."""
    together = threading.Barrier(8)

    class Picture:
        def save(self, file, kind, quality):
            together.wait(timeout=30)
            file.write(b"12345")

    monkeypatch.setattr(rewards, "pictures", lambda images: [Picture() for _ in range(8)])
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert rewards.jpeg_kilobytes(None).tolist() == pytest.approx([0.005] * 8)


def test_reward_from_a_file(mine):
    images = torch.stack([torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    for name in ("redness", "double", "listed"):
        r = rewards.get_reward(f"mine.py:{name}")(images, ["a", "b"])
        assert r.tolist() == [10.0, 0.0] and r.dtype == torch.float32


def test_sums_with_weights(mine):
    """A sum, and its terms: each is scored once, and they add up to it."""
    images, prompts = torch.rand(3, 3, 16, 16), [""] * 3
    size, red = rewards.jpeg_kilobytes(images), (images[:, 0].mean((1, 2)) * 10).int()
    for name, terms in {
        "compress:0.05": {"compress:0.05": -0.05 * size},
        "incompress:-2, compress": {"incompress:-2": -2 * size, "compress": -size},
        "mine.py:redness:0.5,compress:1e-1": {"mine.py:redness:0.5": 0.5 * red, "compress:1e-1": -0.1 * size},
        "compress,mine.py:redness": {"compress": -size, "mine.py:redness": red.float()},
    }.items():
        reward = rewards.get_reward(name)
        torch.testing.assert_close(reward(images, prompts), sum(terms.values()), msg=name)
        assert reward.names == list(terms)
        torch.testing.assert_close(reward.terms(images, prompts), torch.stack(list(terms.values())), msg=name)
    with pytest.raises(BadInput, match="'compress:1e39'.*must be finite"):
        rewards.get_reward("incompress,compress:1e39")(images, prompts)


def test_a_reward_is_scored_once_on_the_pictures_gpu(monkeypatch):
    """Whichever thread calls, the current GPU is the pictures' while a reward works, without gradients."""
    seen, images = [], torch.rand(2, 3, 4, 4)

    @contextlib.contextmanager
    def device_of(given):
        seen.append(given is images)
        yield
        seen.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)

    def at_work(name, r, images, prompts):
        seen.append(name)
        assert not torch.is_grad_enabled()
        return r

    for name, r in (("a", [1, 2]), ("b", [3, 5])):
        monkeypatch.setitem(rewards.REWARDS, name, functools.partial(at_work, name, r))
    assert torch.is_grad_enabled()
    assert rewards.get_reward("a,b:2").terms(images, ["", ""]).tolist() == [[1, 2], [6, 10]]
    assert seen == [True, "a", "left", True, "b", "left"]


BAD_REWARDS = {  # name: what the message must say
    "nope": "choose from compress, incompress, .*path/to/file.py:function",
    "missing.py:fn": "no reward file missing.py",
    "mine.py:absent": "no function 'absent'",
    "mine.py:value": "no function 'value'",
    "mine.py:nan": "'mine.py:nan' returned nan for the prompt 'a cat': it must be finite",
    "mine.py:shape": r"returned shape \(5, 2\) for 5 pictures: it must return one number each, shape \(5,\)",
    "mine.py:scalar": "one number each",
    "mine.py:raises": "'mine.py:raises' raised RuntimeError: no",
    "mine.py:text": "'mine.py:text' raised",
    "broken.py:fn": "broken.py does not load: SyntaxError",
    "prompts.txt:fn": "unknown reward 'prompts.txt:fn'",
    "compress:1,nope:2": "unknown reward 'nope:2'",
    "compress, compress": "'compress, compress' has a part twice: add up its weights",
    "compress,,incompress": "an empty part in the reward 'compress,,incompress'",
    "compress:": "'' of reward 'compress' is not a finite number",
    "compress:much": "'much' of reward 'compress'",
    "compress:1,incompress:nan": "'nan' of reward 'incompress'",
    "mine.py:raises:inf": "'inf' of reward 'mine.py:raises'",
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_bad_reward_is_named(name, mine):
    with pytest.raises(BadInput, match=BAD_REWARDS[name]) as caught:
        rewards.get_reward(name)(torch.rand(5, 3, 4, 4), PROMPTS)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- rewards with a model
MODEL_REWARDS = ["aesthetic", "clip", "pickscore", "align"]
BODY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(BODY, image_size=24, patch_size=6)


def small_tokenizer(start, end, template, image=(), **options):
    """A tokenizer of words, and the size of its vocabulary."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = "a cat dog two red apples on table owl fox The image contains USER Answer concisely what is "
    words = (words + "going in this ASSISTANT : ? white bird runs").split()
    words = ["<pad>", "<unk>", *image, start, *words, end]  # the end has the highest id, as CLIP's
    vocab = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocab, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(start, vocab[start]), (end, vocab[end])]
    raw.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    names = dict(pad_token="<pad>", unk_token="<unk>", bos_token=start, eos_token=end)
    more = dict(additional_special_tokens=list(image), **options)
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, **names, **more), len(vocab)


def small_image_processor(**options):
    import transformers as tf
    size, crop = {"shortest_edge": 24}, {"height": 24, "width": 24}
    return tf.CLIPImageProcessorPil(size=size, crop_size=crop, **options)


def small_clip(folder, processor_folder, **processor):
    import transformers as tf
    tokens, n = small_tokenizer("<s>", "</s>", "<s> $A </s>", model_max_length=8)
    text = dict(BODY, vocab_size=n, max_position_embeddings=8, eos_token_id=n - 1)
    config = tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=20, initializer_factor=4.0)
    tf.CLIPModel(config).save_pretrained(folder)
    config.save_pretrained(processor_folder)
    tf.CLIPProcessor(small_image_processor(**processor), tokens).save_pretrained(processor_folder)


def small_llava(folder):
    import transformers as tf
    tokens, n = small_tokenizer("<s>", "</s>", "<s> $A", ["<image>"])
    ids = dict(vocab_size=n, bos_token_id=3, eos_token_id=n - 1, pad_token_id=0)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, initializer_factor=4.0),
        text_config=tf.LlamaConfig(**BODY, **ids, initializer_range=0.5),
        image_token_index=2,
        image_seq_length=16,
        initializer_range=0.5,
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    options = dict(patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    tf.LlavaProcessor(small_image_processor(), tokens, **options).save_pretrained(folder)


def small_bert(folder):
    import transformers as tf
    tokens, n = small_tokenizer("[CLS]", "[SEP]", "[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    body = dict(BODY, num_hidden_layers=3, vocab_size=n, type_vocab_size=0, initializer_range=0.5)
    config = tf.DebertaConfig(**body, relative_attention=True, pos_att_type=["c2p", "p2c"])
    bert = tf.DebertaModel(config)
    for name, p in bert.named_parameters():
        if name.endswith(("q_bias", "v_bias")):  # new ones are 0: nobody would miss them
            torch.nn.init.normal_(p)
    bert.save_pretrained(folder)
    tokens.save_pretrained(folder)


def small_aesthetic(folder):
    Path(folder).mkdir()
    sizes = {0: (20, 16), 2: (16, 8), 4: (8, 8), 6: (8, 4), 7: (4, 1)}
    head = {f"layers.{i}.weight": torch.randn(o, n) * 2 * n**-0.5 for i, (n, o) in sizes.items()}
    head |= {f"layers.{i}.bias": torch.randn(o) * n**-0.5 for i, (n, o) in sizes.items()}
    torch.save(head, Path(folder) / "aesthetic-model.pth")


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """Random models of the rewards' kinds, a few hundred kB, laid out as the hub has them: {key: folder}."""
    root = tmp_path_factory.mktemp("hub")
    hub = {name: str(root / name) for name in rewards.HUB}
    torch.manual_seed(0)
    small_clip(hub["clip"], hub["clip"])
    small_clip(hub["pickscore"], hub["pickscore-processor"], image_mean=[0.1, 0.5, 0.9])
    for size in ("llava", "llava-13b"):
        small_llava(hub[size])
    small_bert(hub["bert"])
    small_aesthetic(hub["aesthetic"])
    return hub


@pytest.fixture
def hub(small_models, monkeypatch):
    monkeypatch.setattr(rewards, "HUB", dict(small_models))
    monkeypatch.setattr(rewards, "BERT_LAYER", 2)
    return rewards.HUB


def cosines(model, processor, pictures):
    """Picture by picture through transformers alone: embeddings (B, E), logits (B,), logit scale."""
    from transformers import AutoProcessor, CLIPModel
    model, processor = CLIPModel.from_pretrained(model), AutoProcessor.from_pretrained(processor)
    out = []
    with torch.no_grad():
        for prompt, picture in zip(PROMPTS, pictures):
            given = processor(text=[prompt], images=[picture], truncation=True, return_tensors="pt")
            out.append(model(**given))
    logits = torch.cat([o.logits_per_image[0] for o in out])
    return torch.cat([o.image_embeds for o in out]), logits, model.logit_scale.exp().item()


def test_clip_pixels_equal_the_image_processor_of_transformers():
    """Pillow rounds to bytes after each of its two passes, hence the tolerance of two grey levels."""
    from transformers import CLIPImageProcessorPil
    for H, W, size in ((64, 64, 224), (512, 384, 224), (45, 77, 24), (77, 45, 30)):
        coarse = 0.05 + 0.9 * torch.rand(2, 3, 6, 6)
        smooth = torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear").mul(255).round() / 255
        crop = {"height": size, "width": size}
        theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
        expected = theirs(for_pillow(smooth), return_tensors="pt")["pixel_values"]
        ours = rewards.clip_pixels(smooth, size, theirs.image_mean, theirs.image_std)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2 / 255 / min(theirs.image_std))


def test_clip_pickscore_and_aesthetic_equal_their_models_run_by_hand(hub):
    images, pictures = whole_pixels()
    embedding, logits, scale = cosines(hub["clip"], hub["clip"], pictures)
    cos = logits / scale
    assert (cos > 0.05).any() and cos.std() > 0.02
    score = rewards.get_reward("clip")(images, PROMPTS)
    torch.testing.assert_close(score, 2.5 * cos.clamp(min=0), rtol=1e-4, atol=1e-4)

    nn, head = torch.nn, torch.nn.Module()
    layers = [m for n, o in ((20, 16), (16, 8), (8, 8)) for m in (nn.Linear(n, o), nn.Dropout())]
    head.layers = nn.Sequential(*layers, nn.Linear(8, 4), nn.Linear(4, 1))
    head.load_state_dict(torch.load(Path(hub["aesthetic"]) / "aesthetic-model.pth", weights_only=True))
    expected = head.eval().layers(embedding)[:, 0].detach()
    score = rewards.get_reward("aesthetic")(images, PROMPTS)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)

    _, logits, _ = cosines(hub["pickscore"], hub["pickscore-processor"], pictures)
    score = rewards.get_reward("pickscore")(images, PROMPTS)
    torch.testing.assert_close(score, logits, rtol=1e-4, atol=1e-3)


def test_the_embedded_clip_is_the_reward_clip_of_the_embedded_model(hub, emoji):
    """With --model tiny, `clip` is tiny/clip as transformers runs it. It knows right captions from wrong."""
    from transformers import CLIPModel, CLIPProcessor
    images, prompts = emoji[0][::20], emoji[1][::20]
    clip = CLIPModel.from_pretrained(HERE / "tiny" / "clip", dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(HERE / "tiny" / "clip")
    options = dict(padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = clip(**processor(text=prompts, images=for_pillow(images), **options))
    expected = 2.5 * (out.image_embeds * out.text_embeds).sum(1)
    score = rewards.get_reward("clip", "tiny")
    right, wrong = score(images, prompts), score(images, prompts[1:] + prompts[:1])
    torch.testing.assert_close(right, expected.clamp(min=0), rtol=1e-3, atol=1e-3)
    assert (right > wrong + 0.2).float().mean() > 0.9
    both = rewards.get_reward("compress:1,clip:0.5", "tiny")(images, prompts)
    torch.testing.assert_close(both, rewards.compress(images, prompts) + 0.5 * right)
    assert make_tiny.retrieval(images, prompts, emoji[1]) >= 0.9
    other = rewards.get_reward("clip")(images, prompts)  # another model's `clip` comes from the hub
    assert not torch.equal(other, right)


QUESTION = "USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:"


def descriptions(folder, pictures):
    """What the LLaVA in `folder` answers to the question, picture by picture and token by token."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    processor, said = AutoProcessor.from_pretrained(folder), []
    for picture in pictures:
        out, ids = llava(**processor(text=QUESTION, images=picture, return_tensors="pt")), []
        while len(ids) < 64 and llava.config.text_config.eos_token_id not in ids:
            ids.append(int(out.logits[0, -1].argmax()))
            out = llava(input_ids=torch.tensor([ids[-1:]]), past_key_values=out.past_key_values)
        said.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return said


@torch.no_grad()
def test_align_is_bertscore_recall_of_a_greedy_description(hub, monkeypatch):
    """Recall in loops over tokens, on the second of the encoder's three layers."""
    from transformers import AutoModel, AutoTokenizer
    images, pictures = whole_pixels()
    bert, tokenizer = AutoModel.from_pretrained(hub["bert"]), AutoTokenizer.from_pretrained(hub["bert"])

    def embed(text):
        state = bert(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        return state / state.norm(dim=1, keepdim=True)

    def recall(prompt, said):
        reference, candidate = embed(f"The image contains {prompt}")[1:-1], embed(said)
        return np.mean([max(float(r @ c) for c in candidate) for r in reference])

    said = descriptions(hub["llava"], pictures)
    assert len(set(said)) > 2 and len({len(text.split()) for text in said}) > 1
    assert rewards.describe(images, hub["llava"]) == said
    expected = torch.tensor([(recall(p, s) - 0.5170288) / (1 - 0.5170288) for p, s in zip(PROMPTS, said)])
    score = rewards.get_reward("align")(images, PROMPTS)
    torch.testing.assert_close(score, expected.float(), rtol=1e-3, atol=1e-3)

    other = rewards.get_reward("align_13b")(images, PROMPTS)  # the same with the other LLaVA
    assert not torch.equal(other, score)
    monkeypatch.setitem(hub, "llava", hub["llava-13b"])
    assert torch.equal(rewards.get_reward("align")(images, PROMPTS), other)


@pytest.mark.parametrize("name", MODEL_REWARDS)
def test_a_batch_of_pictures_scores_as_its_parts_and_loads_its_models_once(hub, name):
    images, _ = whole_pixels(H=40, W=40)
    fn = rewards.get_reward(name)
    whole, loads = fn(images, PROMPTS), rewards.load.cache_info().misses
    for size in (1, 3):
        parts = [fn(images[i : i + size], PROMPTS[i : i + size]) for i in range(0, 5, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert rewards.load.cache_info().misses == loads and whole.std() > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.04)], ids=str)
def test_half_precision_scores_like_float32(hub, monkeypatch, dtype, tolerance):
    """DeBERTa comes with two biases in float32 then; LLaVA's rotary buffers must stay float32."""
    images, _ = whole_pixels(H=40, W=40)
    said = rewards.describe(images, hub["llava"])
    full = {name: rewards.get_reward(name)(images, PROMPTS) for name in MODEL_REWARDS}
    monkeypatch.setattr(rewards, "dtype_on", lambda device: dtype)
    first = [text.split()[0] for text in rewards.describe(images, hub["llava"])]
    assert first == [text.split()[0] for text in said]  # a long greedy description may part at a near tie
    monkeypatch.setattr(rewards, "describe", lambda images, source: said)
    for name, expected in full.items():
        score = rewards.get_reward(name)(images, PROMPTS)
        assert not torch.equal(score, expected) and expected.std() > 2 * tolerance, name
        torch.testing.assert_close(score, expected, rtol=0.02, atol=tolerance, msg=lambda m: f"{name}: {m}")
    with rewards.lent("LlavaForConditionalGeneration", hub["llava"], torch.device("cpu")) as llava:
        assert {p.dtype for p in llava.parameters()} == {dtype}
        turns = llava.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(turns, 10000 ** (-torch.arange(8) / 8), rtol=1e-6, atol=0)


def test_model_rewards_stay_on_the_pictures_device(hub, monkeypatch):
    """Meta stands for a GPU: its tensors and the CPU's do not add up, and models are given nothing else."""
    meta, given, fresh = torch.device("meta"), [], rewards.load.__wrapped__

    def load(kind, source, **options):
        if "dtype" not in options:
            return fresh(kind, source, **options)
        model = fresh(kind, source, attn_implementation="eager", **options)
        hook = dict(hook=lambda _, args, kwargs: given.extend(kwargs.values()), with_kwargs=True)
        model.register_forward_pre_hook(**hook)
        model.generate = lambda **kwargs: given.extend(kwargs.values()) or torch.ones(5, 99, dtype=torch.long)
        return model

    images, pictures = whole_pixels()
    monkeypatch.setattr(rewards, "load", load)
    monkeypatch.setattr(rewards, "pictures", lambda images: pictures)
    monkeypatch.setattr(rewards, "dtype_on", lambda device: torch.float16)
    for name in MODEL_REWARDS:
        given.clear()
        score = rewards.REWARDS[name](images.to(meta), PROMPTS)
        tensors = [v for v in given if isinstance(v, torch.Tensor)]
        assert score.device == meta and score.shape == (5,) and len(tensors) >= 3, name
        assert {v.device for v in tensors} == {meta}, name
        assert {v.dtype for v in tensors if v.is_floating_point()} <= {torch.float16}, name


def test_a_reward_model_leaves_a_gpu_whose_memory_is_short(monkeypatch):
    moves, asked = [], []
    fake = SimpleNamespace(to=lambda device: moves.append(device) or fake, parameters=lambda: [])
    monkeypatch.setattr(rewards, "load", lambda kind, source, dtype: asked.append(dtype) or fake)
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
    for free, expected in ((rewards.ROOM - 1, [gpu, "cpu"]), (rewards.ROOM + 1, [gpu])):
        moves.clear()
        monkeypatch.setattr(rewards, "free_gib", lambda device: free)
        with rewards.lent("CLIPModel", "x", gpu) as model:
            assert model is fake and moves == [gpu]
        assert moves == expected
    assert asked == [torch.float16] * 2 and rewards.dtype_on(cpu) == torch.float32
    monkeypatch.undo()
    assert rewards.free_gib(cpu) == float("inf")
    memory = {"mem_get_info": (5 << 30, 80 << 30), "memory_reserved": 3 << 30, "memory_allocated": 1 << 30}
    for name, value in memory.items():  # 5 GiB free, and 2 that torch keeps unused
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value if device == gpu else None)
    assert rewards.free_gib(gpu) == 7


def test_a_model_out_of_reach_is_named(hub, tmp_path, monkeypatch):
    images, _ = whole_pixels()
    absent = tmp_path / "absent"
    monkeypatch.setitem(hub, "clip", str(absent))
    message = f"^cannot load {absent} .*hub.*compress and incompress need no model$"
    with pytest.raises(BadInput, match=message):
        rewards.get_reward("clip")(images, PROMPTS)
    touched = tmp_path / "touched"
    runs_a_command = f"cos\nsystem\n(S'touch {touched}'\ntR.".encode()
    (tmp_path / "aesthetic-model.pth").write_bytes(runs_a_command)
    with pytest.raises(BadInput, match=f"^cannot load {tmp_path} "):
        rewards.aesthetic_head(str(tmp_path))
    assert not touched.exists()


# ----------------------------------------------------------------------------------------------------- alarms
def statistics_in_loops(picture):
    """blank, dark, edges, colours of one picture (3, H, W), pixel by pixel in float64."""
    x = picture.double().numpy()
    _, H, W = x.shape
    median = [sorted(channel.flatten())[(H * W - 1) // 2] for channel in x]
    drawn, dark, gradient, colours = 0, 0, [], {}

    def luma(i, j):
        return 0.299 * x[0, i, j] + 0.587 * x[1, i, j] + 0.114 * x[2, i, j]

    for i in range(H):
        for j in range(W):
            drawn += any(abs(x[c, i, j] - median[c]) > 0.15 for c in range(3))
            dark += luma(i, j) < 0.1
            colour = tuple(min(int(x[c, i, j] * 4), 3) for c in range(3))
            colours[colour] = colours.get(colour, 0) + 1
            if i + 1 < H and j + 1 < W:
                gradient.append(np.hypot(luma(i + 1, j) - luma(i, j), luma(i, j + 1) - luma(i, j)))
    bits = -sum(n / (H * W) * np.log2(n / (H * W)) for n in colours.values())
    return drawn / (H * W) < 0.02, dark / (H * W), np.mean(gradient), bits


def test_picture_statistics_equal_loops_over_pixels():
    images = torch.rand(6, 3, 20, 10)
    images[1] *= 0.2  # mostly dark
    images[2] = 0.9 + 0.05 * images[2]  # a page with faint noise
    images[3] = images[2]
    images[2, 1, 4, 2:5] = 0.6  # 3 of 200 pixels are drawn, in one channel: blank
    images[3, 1, 4, 2:7] = 0.6  # 5 of 200 are: not blank
    images[4] = torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(3, 20, 10)
    images[5, 0] = images[5, 2] = 0.5
    ours = rewards.picture_statistics(images)
    loops = zip(*(statistics_in_loops(picture) for picture in images))
    assert list(ours) == ["blank", "dark", "edges", "colours"]
    assert ours["blank"].tolist() == [0, 1, 1, 0, 1, 0] and 0.3 < ours["dark"][1] < 0.7
    for (name, value), expected in zip(ours.items(), loops):
        expected = torch.tensor(np.array(expected, dtype=np.float32))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_picture_statistics_of_known_pictures():
    """A white page, a black one, a checkerboard in black and white, and stripes of all 64 colours."""
    i, j = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    stripes = torch.stack([i // 16, i // 4 % 4, i % 4]) / 4 + 0.1  # (3, 64, 64)
    checks = ((i + j) % 2).float().expand(3, 64, 64)
    images = torch.stack([torch.ones(3, 64, 64), torch.zeros(3, 64, 64), checks, stripes])
    ours = rewards.picture_statistics(images)
    torch.testing.assert_close(ours["blank"], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(ours["dark"][:3], torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(ours["edges"][:3], torch.tensor([0.0, 0.0, 2**0.5]))
    torch.testing.assert_close(ours["colours"], torch.tensor([0.0, 0.0, 1.0, 6.0]))


def test_judge_gives_the_parts_of_a_reward_then_the_statistics(mine):
    images, prompts = torch.rand(3, 3, 16, 16), [""] * 3
    images[1] = 0.05
    scores = rewards.judge(rewards.get_reward("compress:0.5,mine.py:redness"), images, prompts)
    red = (images[:, 0].mean((1, 2)) * 10).int().float()
    statistics = rewards.picture_statistics(images)
    assert tuple(statistics) == rewards.LOOKS and scores.dtype == torch.float32
    expected = [-0.5 * rewards.jpeg_kilobytes(images), red, *statistics.values()]
    torch.testing.assert_close(scores, torch.stack(expected, 1))


FAR = {  # name: from where it was still near, and far; blank is counted up, the rest up or down
    "blank": (0.1, [0.0, 0.14], [0.16, 1.0]),
    "dark": (0.4, [0.21, 0.59], [0.19, 0.61]),
    "edges": (0.1, [0.0551, 0.1799], [0.0549, 0.1801]),
    "colours": (3.0, [1.51, 6.0], [1.49, 0.0]),
    "diversity": (0.2, [0.0901, 0.9, np.nan], [0.0899, 0.0]),
}


@pytest.mark.parametrize("name", FAR)
def test_what_has_moved_far_is_named_with_both_numbers(name):
    then = {name: was for name, (was, _, _) in FAR.items()}
    was, near, far = FAR[name]
    for value in near:
        assert rewards.moved_far(then | {name: value}, then) == ""
    for value in far:
        assert rewards.moved_far(then | {name: value}, then) == f"{name} {was:.3f} -> {value:.3f}"


def test_all_that_has_moved_far_is_named():
    """Also where there were no edges at all, and no two pictures of a prompt."""
    then = dict(blank=0.0, dark=0.0, edges=0.0, colours=2.0, diversity=np.nan)
    now = dict(blank=1.0, dark=1.0, edges=0.5, colours=0.0, diversity=np.nan)
    assert [part.split()[0] for part in rewards.moved_far(now, then).split(", ")] == [*rewards.LOOKS]


def test_alarms_tell_the_embedded_models_pictures_from_blank_ones(emoji):
    """A run rewarded for small files can end so: pictures fade into the page and become one picture."""
    images, prompts = emoji[0][:200], emoji[1][:200]
    page = images.flatten(2).median(2).values[:, :, None, None]
    faded = page + 0.1 * (images - page)
    before, after = rewards.picture_statistics(images), rewards.picture_statistics(faded)
    assert before["blank"].mean() == 0 and after["blank"].mean() == 1
    assert after["edges"].mean() < 0.2 * before["edges"].mean()
    assert after["colours"].mean() < 0.5 * before["colours"].mean()
    assert rewards.diversity(faded, prompts) < 0.5 * rewards.diversity(images, prompts)
    then, now = (
        {name: v.mean().item() for name, v in rewards.picture_statistics(x).items()}
        | {"diversity": rewards.diversity(x, prompts)}
        for x in (images, faded)
    )
    named = [part.split()[0] for part in rewards.moved_far(now, then).split(", ")]
    assert named[:3] == ["blank", "edges", "colours"] and rewards.moved_far(then, then) == ""
    assert rewards.picture_statistics(images * 0.05)["dark"].mean() == 1


def test_diversity_equals_a_loop_over_pairs():
    images, prompts = torch.rand(7, 3, 5, 4), ["a", "b", "a", "c", "b", "a", "d"]
    images[4] = 1 - images[4] ** 3
    pairs = [(0, 2), (0, 5), (2, 5), (1, 4)]
    distances = [np.sqrt(np.mean((images[i].double() - images[j].double()).numpy() ** 2)) for i, j in pairs]
    assert rewards.diversity(images, prompts) == pytest.approx(np.mean(distances), rel=1e-5)
    assert rewards.diversity(images[:1].repeat(3, 1, 1, 1), ["a"] * 3) == 0
    assert rewards.diversity(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]), ["a", "a"]) == 1
    assert np.isnan(rewards.diversity(images[:2], ["a", "b"]))
    assert np.isnan(rewards.diversity(images[:1], ["a"]))


# ---------------------------------------------------------------------------------------------------- prompts
def test_prompt_sets():
    names = "animals", "other-animals", "imagenet-animals", "animals-activities"
    animals, others, imagenet, active = sets = [rewards.get_prompts(name) for name in names]
    assert [len(set(v)) for v in sets] == [len(v) for v in sets] == [45, 24, 398, 135]
    labels = json.loads((HERE / "tiny" / "pictures.json").read_text())["labels"]
    assert not set(animals) & set(others) and set(others) <= set(labels)
    index = {0: "tench", 1: "goldfish", 151: "Chihuahua", 207: "golden retriever", 281: "tabby", 340: "zebra"}
    index |= {388: "giant panda", 397: "puffer"}
    assert {i: imagenet[i] for i in index} == index and not any("," in name for name in imagenet)
    assert {"an ant riding a bike", "a dog playing chess", "a kangaroo washing the dishes"} < set(active)
    assert sum(prompt.endswith(" washing the dishes") for prompt in active) == 45


def test_prompts_from_a_file_and_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n\n  red apple \n")
    Path("my prompts").write_text("owl\n")
    assert rewards.get_prompts("p.txt") == ["a cat", "red apple"]
    assert rewards.get_prompts("my prompts") == ["owl"]
    long = "a cat " * 200
    assert rewards.get_prompts("a cat") == ["a cat"] and rewards.get_prompts(long) == [long.strip()]
    for typo in ("promts.txt", "my promts.txt", "cat", " ", ""):
        with pytest.raises(BadInput, match="two words"):
            rewards.get_prompts(typo)
    Path("empty.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="empty.txt is empty"):
        rewards.get_prompts("empty.txt")


def test_an_lcm_lora_makes_a_diffusion_model_a_consistency_model(mini_sd, tmp_path):
    """The network under the fresh adapter is the U-Net with the LoRA's product added to it by hand."""
    pipe = DiffusionPipeline.from_pretrained(mini_sd, dtype=torch.float32)
    plain = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    layers = ["to_q", "to_out.0", "conv1"]
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    pipe.unet.add_adapter(lora)
    state = get_peft_model_state_dict(pipe.unet)
    settings = {"unet_lora_layers": state, "unet_lora_adapter_metadata": lora.to_dict()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **settings)
    given = dict(model=mini_sd, lcm_lora=str(tmp_path / "lora"), steps=2, last_noise=0.0, kl=0.01)
    m = rlcm.load_model(rlcm.configure(**given, **MINI))
    assert isinstance(m.pipe.scheduler, LCMScheduler)
    merged = {name.replace(".base_layer", ""): p for name, p in m.pipe.unet.state_dict().items()}
    changed = 0
    for name, p in plain.items():
        A, B = (state.get(f"{name.removesuffix('.weight')}.lora_{v}.weight") for v in "AB")
        if A is not None:
            p = p + 2 * (B.flatten(1) @ A.flatten(1)).view(p.shape)  # alpha / r = 2
            changed += 1
        torch.testing.assert_close(merged[name], p, atol=1e-5, rtol=1e-4)
    assert changed > 10
    out = rlcm.train(Config(**given, **SMALL, out=str(tmp_path / "run")))
    assert column(out, "path_kl")[0] == 0 < column(out, "path_kl")[1] and column(out, "ratio_drift") == [0, 0]


@pytest.mark.parametrize("rank", [4, 0])
def test_half_precision_trains_float32_weights_with_the_ratio_still_one(rank, spawn, mini, tmp_path):
    out = tmp_path / "run"
    settings = dict(SMALL, model=mini, precision="bf16", kl=0.01, lora_rank=rank, lr=1e-3, out=out)
    assert spawn(train, settings).wait() == 0  # one process has one precision
    full = "unet/diffusion_pytorch_model.safetensors"
    saved = load_file(out / ("pytorch_lora_weights.safetensors" if rank else full))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in saved.values())
    kl = column(out, "path_kl")
    assert column(out, "ratio_drift") == [0, 0] and kl[1] > kl[0]
    assert kl[0] == 0  # a copy of all weights is rounded as they are
    assert rlcm.main(["--sample", "a cat", "--load", str(out)]) == 0 and (out / "sample.png").exists()


def test_trackers_are_given_metrics_and_pictures(mini, tmp_path, monkeypatch):
    """With a tracker in place of tensorboard's, which is not installed here."""
    seen = []

    class Fake(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run, logging_dir=None, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            seen.append(("config", values))

        def log(self, values, step=None, **kwargs):
            seen.append(("log", values, step))

        def log_images(self, values, step=None, **kwargs):
            seen.append(("images", values, step, kwargs))

    tensorboard = accelerate.tracking.LoggerType.TENSORBOARD
    monkeypatch.setattr(rlcm, "find_spec", lambda name: True)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [tensorboard])
    out = rlcm.train(Config(**SMALL, model=mini, log_with="tensorboard", out=str(tmp_path / "run")))
    assert Counter(entry[0] for entry in seen) == {"config": 1, "images": 2, "log": 2}
    kinds = {kind: [entry for entry in seen if entry[0] == kind] for kind in ("config", "images", "log")}
    assert kinds["config"][0][1]["reward"] == "compress"
    pictures = kinds["images"][0][1]["samples"]
    assert pictures.shape == (16, 16, 16, 3) and 0 <= pictures.min() < pictures.max() <= 1
    assert kinds["images"][0][3] == {"dataformats": "NHWC"}
    assert [step for _, _, step in kinds["log"]] == [1, 2]
    for name in ("reward_mean", "compress", "dark", "likeness"):
        assert [values[name] for _, values, _ in kinds["log"]] == column(out, name)
    assert not [values for _, values, _ in kinds["log"] if "held_out" in values]


# ------------------------------------------------------------------------------------------- runs, resumption
class Spy:
    """Calls of a function of rlcm.py, which goes on as before: arguments by name, and results."""

    def __init__(self, monkeypatch, name):
        self.calls, self.results, fn = [], [], getattr(rlcm, name)
        signature = inspect.signature(fn)

        def spy(*args, **kwargs):
            self.calls.append(signature.bind(*args, **kwargs).arguments)
            self.results.append(fn(*args, **kwargs))
            return self.results[-1]

        monkeypatch.setattr(rlcm, name, spy)


@pytest.mark.parametrize("method, last_noise, value", [
    ("rlcm", 0.0, False), ("rlcm", 0.6, False), ("rlcm", 0.0, True), ("ddpo", 0.0, False),
    ("score", 0.0, True),
])  # fmt: skip
def test_an_epoch_from_rewards_to_advantages(method, last_noise, value, mini, mini_sd, tmp_path, monkeypatch):
    """The last of three by hand: A_k = (r - mean) / std - lambda (KL_{k+1} + KL_{k+2} + ...), those centred.

    With a last noise r is half the lead over the mirror image, with a value what no line through the rewards
    of the pictures predicted at x_k explains. The reward, a sum, sees the decoded last latents; metrics.csv
    has its statistics, its parts and the pictures'.
    """
    red = "def red(images, prompts):\n    return (1e5 * images[:, 0].mean((1, 2))).int()\n"
    (tmp_path / "mine.py").write_text(red)
    (tmp_path / "two.txt").write_text("a cat\nan owl\n")
    kl, rollouts, updates = (Spy(monkeypatch, name) for name in ("path_kl", "rollout", "update"))
    collected, names = Spy(monkeypatch, "collect"), [f"{tmp_path}/mine.py:red:2", "compress:1e3"]
    cfg = Config(
        **MINI, reward=",".join(names), model=mini if method == "rlcm" else mini_sd, method=method, steps=3,
        prompts=f"{tmp_path}/two.txt", last_noise=last_noise, epochs=3, batch_size=8, micro_batch=5, lr=0.02,
        value=value, kl=0.5, buffer_size=99, min_count=99, adv_clip=99.0, save_every=100, lora_rank=4,
        lora_alpha=4, out=str(tmp_path / "run"),
    )  # fmt: skip
    rlcm.train(cfg)
    model, given, prompts = rlcm.load_model(cfg), updates.calls[-1], collected.calls[-1]["prompts"]
    assert given["micro_batch"] == 4 and given["x"].shape[:2] == (4, 8)  # the largest that divides the batch
    parts = [roll for roll in rollouts.results if roll[0].shape[1] == 4][-2:]  # not the sample grid's
    x, mean = (torch.cat(part, 1) for part in list(zip(*parts))[:2])
    ends = (x[-1], 2 * mean[-1] - x[-1]) if last_noise else (x[-1],)
    images = [rlcm.decode(model.pipe, end) for end in ends]
    reds = [2 * (1e5 * i[:, 0].mean((1, 2))).int().float() for i in images]
    sizes = [-1e3 * rewards.jpeg_kilobytes(i) for i in images]
    scores = [red + size for red, size in zip(reds, sizes)]
    r = (scores[0] - scores[1]) / 2 if last_noise else scores[0]
    path = torch.cat([result[1] for result in kl.results[-2:]], 1)  # (H, B)
    to_come = torch.stack([path[k + 1 :].sum(0) for k in range(3)])
    assert path.sum() > 0.01 and r.std() > 0 and torch.equal(x, given["x"])
    assert to_come[0].std() > 0.004 and not to_come[-1].any()
    noise = torch.cat([call["x"][0] for call in updates.calls])
    assert len(noise.unique(dim=0)) == 24  # of its own for each picture of each epoch
    A = (r - r.mean()).expand(3, 8).clone()
    for k in given["s"].actions.tolist() if value else ():
        clean = rlcm.predicted(method, x[k], mean[k], given["s"].ab[k], given["s"].ab_next[k])
        picture = rlcm.decode(model.pipe, clean)
        guess = 2 * (1e5 * picture[:, 0].mean((1, 2))).int() - 1e3 * rewards.jpeg_kilobytes(picture)
        assert (A[k].std() > 1.01 * residual(A[k], guess).std()) and not torch.equal(guess, r)
        A[k] = residual(A[k], guess)
    A = A / r.std(correction=0) - 0.5 * (to_come - to_come.mean(1, keepdim=True))
    actions = given["s"].actions
    torch.testing.assert_close(given["A"].expand(3, 8)[actions], A[actions], rtol=1e-3, atol=5e-3)
    assert given["kl_weight"] == 0.5
    scored, looks = torch.cat(scores), rewards.picture_statistics(torch.cat(images))
    row = {name: float(value or "nan") for name, value in metrics(tmp_path / "run")[-1].items()}
    pairs = [(i, j) for i in range(8) for j in range(i) if prompts[i] == prompts[j]]
    expected = {
        "reward_queries": 3 * (len(scored) + value * 8 * len(actions)), "reward_mean": scored.mean(),
        "reward_std": scored.std(correction=0), "reward_min": scored.min(), "reward_max": scored.max(),
        "path_kl": path.sum(0).mean(), names[0]: torch.cat(reds).mean(), names[1]: torch.cat(sizes).mean(),
        **{name: looks[name].mean() for name in ("blank", "dark", "edges", "colours")},
        "diversity": np.mean([((images[0][i] - images[0][j]) ** 2).mean().sqrt().item() for i, j in pairs]),
    }  # fmt: skip
    assert set(prompts) == {"a cat", "an owl"} and row["dark"] < 1 and 0 < row["edges"]
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name


def test_one_step_is_trained_by_its_last_noise(mini, tmp_path):
    """And the noise is of training only: the grid is what a plain pipeline draws in one step."""
    out = tmp_path / "run"
    settings = dict(SMALL, model=mini, steps=1, last_noise=0.6, lr=0.01, guidance=3.0, prompts="a red cat")
    assert rlcm.main(words(**settings, out=out)) == 0 and column(out, "ratio_drift") == [0, 0]
    options = dict(num_inference_steps=1, guidance_scale=3.0)
    base, tuned = (plain_pictures(mini, ["a red cat"], lora=lora, **options)[0] for lora in (None, out))
    assert (tuned - base).abs().max() > 0.02
    place(base, out / "samples" / "epoch-0000.png")
    place(tuned, out / "samples" / "epoch-0002.png")


def test_one_step_without_noise_draws_but_does_not_train(mini, tmp_path, capsys):
    """What training says of it: see BAD."""
    path = tmp_path / "one.png"
    settings = dict(MINI, model=mini, steps=1, guidance=3.0, last_noise=0.0)
    assert rlcm.main(["--sample", "a cat", *words(**settings, out=path)]) == 0
    place(plain_pictures(mini, ["a cat"], num_inference_steps=1, guidance_scale=3.0)[0], path)


def test_a_run_ends_when_its_pictures_are_no_longer_alike_and_can_go_on(mini, tmp_path, capsys):
    """At a save; resumed without the limit it ends as the run that never had one."""
    free, ended = tmp_path / "free", tmp_path / "ended"
    settings = dict(SMALL, model=mini, steps=2, lr=0.01, save_every=2, epochs=5)
    assert rlcm.main(words(**settings, out=free)) == 0
    second = float(metrics(free)[1]["likeness"])
    assert second < 0.9999 and not metrics(free)[0]["likeness"]
    limit = dict(settings, min_likeness=second + 1e-6, out=ended)
    assert rlcm.main(words(**limit)) == 0 and len(values(ended)) == 2
    assert values(ended) == values(free)[:2]
    assert {p.name for p in (ended / "samples").iterdir()} == {f"epoch-000{e}.png" for e in (0, 2)}
    go_on = rf"python rlcm.py (--resume {ended} --min-likeness 0\.\d\d)\n"
    said = re.search(rf"far enough, before 5 epochs; to go on: {go_on}", capsys.readouterr().out)
    assert rlcm.main(said[1].split()) == 0 and "far enough" not in capsys.readouterr().out
    assert values(ended) == values(free) and same_weights(ended, free)
    assert rlcm.read_config(ended).min_likeness == pytest.approx(second - 0.1, abs=0.0051)


def test_the_likeness_of_a_run_may_fall_to_the_limit_itself(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(rlcm, "likeness", lambda images, first: 0.5)
    for limit, epochs in ((0.5, 2), (0.51, 1)):
        settings = dict(SMALL, model=mini, steps=2, min_likeness=limit, out=tmp_path / str(limit))
        assert rlcm.main(words(**settings)) == 0 and len(values(tmp_path / str(limit))) == epochs


HELD_OUT = """
calls = []
def fn(images, prompts):
    mean = images[:, 0].mean((1, 2))
    if "an owl" not in prompts:
        return mean
    calls.append(1)
    return mean * (2, 3)[len(calls) - 1]
"""


def test_the_best_lora_on_held_out_prompts_is_kept_and_drawn(mini, tmp_path):
    """The reward doubles the held-out pictures of a process's first save, trebles those of its second."""
    (tmp_path / "mine.py").write_text(HELD_OUT)
    (tmp_path / "held-out.txt").write_text("an owl\nan eel\n")
    out, held_out = tmp_path / "run", ["an owl", "an eel"]
    settings = dict(SMALL, model=mini, steps=2, lr=0.02, guidance=3.0, reward=f"{tmp_path}/mine.py:fn")
    settings |= dict(prompts="a red cat", eval_prompts=tmp_path / "held-out.txt", out=out)
    options = dict(num_inference_steps=2, guidance_scale=3.0)
    loras = {}
    for command in (words(**settings), ["--resume", str(out), "--epochs", "3"]):
        assert rlcm.main(command) == 0
        epoch = len(values(out))
        loras[epoch] = shutil.copytree(out, tmp_path / f"after-{epoch}")
        mean = plain_pictures(mini, held_out, lora=loras[epoch], **options)[:, 0].mean().item()
        assert column(out, "held_out")[-1] == pytest.approx((3 if epoch == 2 else 2) * mean, rel=1e-3)
        assert same_weights(out / "best", loras[2])  # the third one is worse
    assert not same_weights(loras[2], loras[3]) and len(values(out)) == 3
    assert {p.name for p in (out / "best").iterdir()} == {"pytorch_lora_weights.safetensors", "config.json"}
    path = tmp_path / "best.png"
    assert rlcm.main(["--sample", "a red cat", "--load", str(out / "best"), "--out", str(path)]) == 0
    base, tuned = (plain_pictures(mini, ["a red cat"], lora=v, **options)[0] for v in (None, loras[2]))
    assert (tuned - base).abs().max() > 0.02 and place(tuned, path)[0] > place(base, path)[0]


def test_one_line_warns_of_pictures_that_have_moved_far(mini, tmp_path, monkeypatch, capsys):
    """Of the first epoch in which they have, compared with the run's first one; the bar goes on below it."""
    asked = []

    def moved_far(now, then):
        asked.append((now["epoch"], then["epoch"]))
        assert all(type(row[name]) is float for row in (now, then) for name in (*rewards.LOOKS, "diversity"))
        return "dark 0.100 -> 0.900" if now["epoch"] > 1 else ""

    monkeypatch.setattr(rewards, "moved_far", moved_far)
    settings = dict(SMALL, model=mini, steps=2, epochs=4, save_every=9, out=tmp_path / "run")
    assert rlcm.main(words(**settings)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert lines == [f"warning, epoch 2: dark 0.100 -> 0.900; look at {tmp_path}/run/samples"]
    assert asked == [(1, 1), (2, 1), (3, 1), (4, 1)]


def test_tf32_is_float32_with_faster_products_of_matrices(mini, tmp_path):
    """On a CPU it is float32."""
    settings, products = dict(SMALL, model=mini, steps=2, epochs=1, kl=0.01), torch.backends.cuda.matmul
    for precision in ("fp32", "tf32"):
        assert not products.allow_tf32
        assert rlcm.main(words(**settings, precision=precision, out=tmp_path / precision)) == 0
    allowed, products.allow_tf32 = products.allow_tf32, False
    assert allowed and column(tmp_path / "tf32", "ratio_drift") == [0]
    assert same_weights(tmp_path / "fp32", tmp_path / "tf32")


def test_a_seed_fixes_a_run_and_another_one_changes_it(mini, tmp_path):
    given = dict(SMALL, model=mini, steps=2, epochs=1)
    a, b, c = (
        rlcm.train(Config(**given, seed=seed, out=str(tmp_path / name)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert values(a) == values(b) and same_weights(a, b)
    assert column(a, "reward_std") != column(c, "reward_std")  # other prompts and noise
    assert not same_weights(a, c)


def test_a_gradient_that_is_not_finite_ends_the_run_not_its_checkpoint(mini, tmp_path, monkeypatch, capsys):
    """NaN advantages in the second epoch: one line; and the run can go on from the first."""
    out, calls = tmp_path / "run", []

    def poisoned(*args):
        calls.append(args)
        A = advantages(*args)
        return A / 0 * 0 if len(calls) == 2 else A

    with monkeypatch.context() as patch:
        patch.setattr(rlcm, "advantages", poisoned)
        assert rlcm.main(words(**SMALL, model=mini, steps=2, out=out)) == 2
    last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert last.startswith("rlcm.py: ") and "gradient of epoch 2 is not finite" in last
    assert len(values(out)) == 1
    assert rlcm.main(["--resume", str(out)]) == 0 and len(values(out)) == 2
    assert all(p.isfinite().all() for p in load_file(out / "pytorch_lora_weights.safetensors").values())


def test_resume_is_the_uninterrupted_run_bit_for_bit(mini, tmp_path):
    """A run of three epochs, and one of two that is given a third."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = dict(SMALL, model=mini, steps=2, kl=0.01, save_every=2, prompts="a red cat")
    assert rlcm.main(words(**settings | {"epochs": 3}, out=whole)) == 0
    assert rlcm.main(words(**settings, out=parts)) == 0
    assert rlcm.main(["--resume", str(parts), "--epochs", "3"]) == 0
    assert values(whole) == values(parts) and same_weights(whole, parts)
    for picture in (whole / "samples").iterdir():
        assert picture.read_bytes() == (parts / "samples" / picture.name).read_bytes()


def test_a_run_stopped_in_its_first_epoch_begins_anew_but_not_one_that_lost_its_checkpoint(mini, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = dict(SMALL, model=mini, steps=2, epochs=1)
    rlcm.train(Config(**settings, out=str(whole)))
    rlcm.start(Config(**settings, out=str(killed)))
    assert rlcm.main(["--resume", str(killed)]) == 0
    assert values(whole) == values(killed) and same_weights(whole, killed)
    before = (killed / rlcm.LORA).read_bytes()
    shutil.rmtree(killed / "checkpoint")
    assert rlcm.main(["--resume", str(killed), "--epochs", "3"]) == 2
    assert (killed / rlcm.LORA).read_bytes() == before


def test_full_parameter_training_starts_as_the_base_model_and_is_loaded_back(mini, tmp_path):
    settings = dict(SMALL, model=mini, lora_rank=0, lr=5e-3, kl=0.01, guidance=3.0)
    out = rlcm.train(Config(**settings, out=str(tmp_path / "full")))
    assert column(out, "path_kl")[0] == 0 < column(out, "path_kl")[1] and column(out, "ratio_drift") == [0, 0]
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    pipe = DiffusionPipeline.from_pretrained(mini, unet=unet, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=4, guidance_scale=3.0, output_type="pt")
    tuned = pipe(["a cat"], generator=[torch.Generator().manual_seed(0)], **options).images[0]
    base = plain_pictures(mini, ["a cat"], num_inference_steps=4, guidance_scale=3.0)[0]
    assert (tuned - base).abs().mean() > 0.01
    path = tmp_path / "s.png"
    assert rlcm.main(["--sample", "a cat", "--load", str(out), "--out", str(path)]) == 0
    assert place(tuned, path)[0] > place(base, path)[0]


def test_the_reference_of_full_training_is_rounded_as_the_network_is(mini, monkeypatch):
    """Half precision: weights that autocast rounds, in both, so that their KL is 0 at first also on a GPU."""
    made = Spy(monkeypatch, "noise_predictor")
    rlcm.load_model(Config(**MINI, model=mini, lora_rank=0, kl=0.1, precision="bf16"))
    frozen, trained = ([*call["network"].parameters()] for call in made.calls)
    assert {p.dtype for p in frozen} == {p.dtype for p in trained} == {torch.float32}
    assert all(p.requires_grad and not q.requires_grad and torch.equal(p, q) for p, q in zip(trained, frozen))


@pytest.mark.parametrize("method", ["ddpo", "score"])
def test_the_diffusion_methods_on_the_embedded_model(method, tmp_path):
    """They stay on policy, leave the base model, and their LoRA draws what the run's last grid shows."""
    out = tmp_path / method
    settings = dict(model="tiny", method=method, steps=3, epochs=2, batch_size=4, micro_batch=2, save_every=2)
    assert rlcm.main(words(**settings, prompts="a red cat", kl=0.01, out=out)) == 0
    assert column(out, "ratio_drift") == [0, 0] and column(out, "path_kl")[1] > column(out, "path_kl")[0] == 0
    model = rlcm.load_model(rlcm.read_config(out))
    rlcm.load_weights(model, out)
    if method == "ddpo":  # the same as a plain pipeline's DDIM with eta = 1
        options = dict(num_inference_steps=3, guidance_scale=3.0, eta=1.0)
        picture = plain_pictures(HERE / "tiny" / "sd", ["a red cat"], lora=out, **options)[0]
    else:
        picture = rlcm.draw(model, rlcm.read_config(out), ["a red cat"])[0]
    place(picture, out / "samples" / "epoch-0002.png")


# ------------------------------------------------------------------------------------- one run of the default
@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A short run of the default method on the embedded model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = dict(model="tiny", epochs=5, batch_size=16, micro_batch=8, lr=0.01, prompts="a red apple")
    assert rlcm.main(words(**settings, save_every=4, min_likeness=0, out=out)) == 0
    return out


PLAIN = dict(num_inference_steps=4, guidance_scale=6.0)


def test_a_run_learns_and_stays_on_policy(run):
    r = column(run, "reward_mean")
    assert len(r) == 5 and column(run, "ratio_drift") == [0.0] * 5
    assert np.mean(r[-2:]) > r[0] + column(run, "reward_std")[0]
    assert column(run, "reward_queries") == [32, 64, 96, 128, 160]


def test_a_run_leaves_what_it_promises(run):
    names = "config.json metrics.csv samples reward.png checkpoint pytorch_lora_weights.safetensors"
    assert {p.name for p in run.iterdir()} == set(names.split())
    assert {p.name for p in (run / "samples").iterdir()} == {f"epoch-{e:04d}.png" for e in (0, 4, 5)}
    config = json.loads((run / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__ and config["processes"] == 1
    assert rlcm.read_config(run) == Config(**{name: config[name] for name in asdict(Config())})
    likeness = {int(row["epoch"]): float(row["likeness"]) for row in metrics(run) if row["likeness"]}
    assert likeness.keys() == {4, 5} and 0.3 < likeness[5] < 0.999


def test_the_lora_in_a_plain_pipeline_draws_the_runs_last_grid(run):
    prompts = ["a red apple"] * 16
    tuned = plain_pictures(HERE / "tiny" / "lcm", prompts, lora=run, **PLAIN)
    base = plain_pictures(HERE / "tiny" / "lcm", prompts, **PLAIN)
    assert (tuned - base).abs().mean() > 0.005  # the LoRA does something
    for pictures, epoch in ((base, 0), (tuned, 5)):
        places = [place(picture, run / "samples" / f"epoch-{epoch:04d}.png") for picture in pictures]
        assert len(set(places)) == 16 and places == sorted(places)  # in reading order
    assert rlcm.likeness(tuned, base) == pytest.approx(float(metrics(run)[-1]["likeness"]), abs=1e-3)


def test_sample_draws_base_above_tuned(run, tmp_path, capsys):
    path, prompts = tmp_path / "pictures.png", ["a cat", "pizza"]
    assert rlcm.main(["--sample", *prompts, "--load", str(run), "--out", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    base = plain_pictures(HERE / "tiny" / "lcm", prompts, **PLAIN)
    tuned = plain_pictures(HERE / "tiny" / "lcm", prompts, lora=run, **PLAIN)
    (b0, b1), (t0, t1) = ([place(picture, path) for picture in row] for row in (base, tuned))
    assert b0[0] == b1[0] < t0[0] == t1[0] and b0[1] == t0[1] < b1[1] == t1[1]  # two rows, two columns
    two_rows = Image.open(path).size

    strengths = dict(enumerate(("-1", "0.5", "1"), 1))
    command = ["--sample", "pizza", "a cat", "--load", str(run), "--out", str(path)]
    assert rlcm.main([*command, "--strength", *strengths.values()]) == 0
    height = place(plain_pictures(HERE / "tiny" / "lcm", ["pizza"], **PLAIN)[0], path)[0]
    for row, strength in strengths.items():
        scale = {"cross_attention_kwargs": {"scale": float(strength)}}
        picture = plain_pictures(HERE / "tiny" / "lcm", ["pizza"], lora=run, **PLAIN, **scale)[0]
        assert place(picture, path) == (height + row * (t0[0] - b0[0]), b0[1])
    assert Image.open(path).size == (two_rows[0], two_rows[1] + 2 * (t0[0] - b0[0]))


def test_evaluate_measures_what_a_plain_pipeline_draws(run, tmp_path, monkeypatch):
    monkeypatch.setitem(evaluate.STEPS, "lcm", (1,))
    monkeypatch.setattr(evaluate, "PICTURES", 9)
    copy = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "one.txt").write_text("pizza\n")
    assert evaluate.main([str(copy), "--prompts", str(tmp_path / "one.txt")]) == 0
    with open(copy / "evaluation.csv") as f:
        table = {tuple(row.values())[:4]: row for row in csv.DictReader(f)}
    sets = [("1", "4"), ("base", "tuned"), ("training", "held-out")]
    assert set(table) == set(itertools.product(["rlcm"], *sets)) and (copy / "evaluation.png").exists()
    for weights, lora in (("base", None), ("tuned", run)):
        pictures = plain_pictures(HERE / "tiny" / "lcm", ["pizza"] * 9, lora=lora, **PLAIN)
        r, row = rewards.compress(pictures, ["pizza"] * 9), table["rlcm", "4", weights, "held-out"]
        assert float(row["reward"]) == pytest.approx(r.mean().item(), abs=0.003)
        assert float(row["standard_error"]) == pytest.approx(r.std().item() / 3, rel=0.02)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' DPM-Solver++
@pytest.mark.parametrize("method", ["ddpo", "score"])
def test_evaluate_of_the_diffusion_methods(method, mini_sd, tmp_path, capsys, monkeypatch):
    """Their own sampler by number of steps, and DPM-Solver++ as a plain pipeline draws it."""
    monkeypatch.setitem(evaluate.STEPS, "diffusion", (3,))
    monkeypatch.setattr(evaluate, "PICTURES", 4)
    out = tmp_path / method
    (tmp_path / "two.txt").write_text("a cat\nan owl\n")
    given = dict(SMALL, model=mini_sd, method=method, prompts=f"{tmp_path}/two.txt", steps=3, guidance=3.0)
    assert rlcm.main(words(**given, lr=0.01, out=out)) == 0
    capsys.readouterr()
    rows = evaluate.evaluate(out, str(tmp_path / "two.txt"), steps=2)
    assert capsys.readouterr().err == ""  # a quiet terminal
    samplers = {(row["sampler"], row["steps"]) for row in rows}
    assert samplers == {(method, 1), (method, 2), (method, 3), (method, 4), ("dpm-solver++", 2)}
    cases = {(row["weights"], row["prompts"]) for row in rows}
    assert cases == set(itertools.product(("base", "tuned"), ("training", "held-out"))) and len(rows) == 20
    assert (out / "evaluation.csv").exists() and (out / "evaluation.png").exists()
    pipe = DiffusionPipeline.from_pretrained(mini_sd, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(out)
    pipe.set_progress_bar_config(disable=True)
    g = [torch.Generator().manual_seed(i) for i in range(4)]
    options = dict(generator=g, num_inference_steps=2, guidance_scale=3.0, output_type="pt")
    r = rewards.compress(pipe(["a cat", "an owl"] * 2, **options).images, [""] * 4)
    found = [row["reward"] for row in rows if row["sampler"] == "dpm-solver++" and row["weights"] == "tuned"]
    assert found == pytest.approx([r.mean().item()] * 2, abs=0.003)


def fake_run(folder, seed, reward_mean, **settings):
    """What plot.py reads of a run: config.json and metrics.csv of three epochs of 8 pictures."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(Config(model="tiny", seed=seed, **settings))))
    rows = [
        {"epoch": i, "seconds": 2.0 * i, "reward_queries": 8 * i, "reward_mean": r, "reward_std": 0.5}
        for i, r in enumerate(reward_mean, 1)
    ]
    rlcm.save_metrics(rows, folder / "metrics.csv")
    return str(folder)


def test_curves_average_the_seeds(tmp_path):
    """Two seeds are one line, another learning rate is a second one; the band is one std."""
    a = fake_run(tmp_path / "a", 0, [1, 2, 3])
    b = fake_run(tmp_path / "b", 1, [3, 4, 5])
    c = fake_run(tmp_path / "c", 0, [0, 0, 6], lr=0.5)
    path = tmp_path / "curves.png"
    queries, seconds = plot.curves([a, b, c], path).axes
    assert path.stat().st_size > 1000
    for axis, end in ((queries, 24), (seconds, 6)):
        both, other = axis.lines
        assert both.get_xdata()[-1] == end and both.get_ydata()[[0, -1]].tolist() == [2, 4]
        assert other.get_ydata()[-1] == 6 and "0.5" in other.get_label()
        first, second = (band.get_paths()[0].vertices for band in axis.collections)
        assert first[:, 1].max() == 5 and second[:, 1].max() == 6.5
    assert plot.main([a, "--out", str(path)]) == 0


# ----------------------------------------------------------------------------------------- the other scripts
def test_lifted_functions_raise_the_reward_of_a_model_of_points():
    """The reward rises by more than a standard deviation; the charge keeps the points near the data."""
    torch.manual_seed(0)
    network = lifted.pretrain(steps=500)
    before = lifted.draw(network)
    rewards_before = -(before - lifted.CORNER).norm(dim=1)
    curve = lifted.learn(network, epochs=12, say=lambda line: None)
    assert curve[-1] > curve[0] + rewards_before.std()
    far = torch.cdist(lifted.draw(network), lifted.CENTRES).amin(1)  # from the data
    assert far.mean() < 0.6


def test_the_frontiers_linear_map_is_the_convolution_that_made_the_change():
    """Fitted by least squares it is the kernel; cut down it is the best of that rank (Eckart-Young)."""
    x, other = torch.randn(2, 60, 12, 8, 8)
    weight, bias = torch.randn(12, 12, 3, 3) / 10, torch.randn(12)
    M = frontier.fit(x, torch.nn.functional.conv2d(x, weight, bias, padding=1))
    expected = torch.nn.functional.conv2d(other, weight, bias, padding=1)
    torch.testing.assert_close(frontier.apply(M, other, 12), expected, rtol=1e-2, atol=2e-3)
    U, S, V = torch.linalg.svd(weight.flatten(1))
    least = (U[:, :4] * S[:4] @ V[:4]).view_as(weight)
    expected = torch.nn.functional.conv2d(other, least, bias, padding=1)
    torch.testing.assert_close(frontier.apply(M, other, 4), expected, rtol=1e-2, atol=2e-2)


def test_the_frontiers_edges_do_not_see_fading_and_its_crossing_lies_between_two_rows():
    pictures = torch.rand(4, 3, 64, 64)
    faded = frontier.edges(pictures + 0.6 * (1 - pictures))
    torch.testing.assert_close(frontier.edges(pictures), faded, rtol=1e-3, atol=1e-4)
    assert frontier.edges(torch.ones(1, 3, 64, 64)).eq(0).all()
    rows = [dict(accuracy=a, reward=r, epoch=e) for a, r, e in ((0.95, -3, 3), (0.9, -2, 6), (0.8, -1, 9))]
    assert frontier.crossing(rows, 0.85, ("reward", "epoch")) == pytest.approx([-1.5, 7.5])
    assert np.isnan(frontier.crossing(rows, 0.5)).all()


@pytest.mark.parametrize("path", sorted((HERE / "bench").glob("*.py")), ids=lambda path: path.name)
def test_every_script_says_how_to_use_it(path, monkeypatch, capsys):
    """Its imports work, and --help begins with its commands."""
    module = importlib.import_module(f"bench.{path.stem}")
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0 and f"python bench/{path.name}" in capsys.readouterr().out


def test_likeness():
    a = torch.rand(4, 3, 8, 8)
    assert rlcm.likeness(a, a) == pytest.approx(1.0, abs=1e-5)
    assert rlcm.likeness(1 - a, a) == pytest.approx(-1.0, abs=1e-5)
    assert rlcm.likeness(torch.ones(4, 3, 8, 8), a) == 0.0
    assert abs(rlcm.likeness(torch.rand(64, 3, 32, 32), torch.rand(64, 3, 32, 32))) < 0.05


def test_tiny_draws_what_it_is_asked_for():
    """A sample of tiny/README.md's quality number: the nearest training picture carries the caption."""
    train, labels = make_tiny.training_pictures()
    captions = make_tiny.fixed_captions(labels)[:64]
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / "lcm", dtype=torch.float32)
    pictures = make_tiny.draw(pipe, captions, **PLAIN)
    assert make_tiny.nearest_accuracy(pictures, captions, train, labels) >= 0.75
    assert make_tiny.retrieval(pictures, captions, labels) >= 0.65
    files = [p for p in (HERE / "tiny").rglob("*") if p.is_file() and "work" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 34e6
    assert sum(p.stat().st_size for p in files if "clip" in p.parts) <= 4e6


# -------------------------------------------------------------------------------------- when things go wrong
class Child:
    """A function in a process forked from one that has imported everything."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, *call):
        self.printed, sender = self.context.Pipe(duplex=False)
        self.process = self.context.Process(target=in_child, args=(sender, *call))
        self.process.start()

    def wait(self, timeout=None):
        """-> exit code, None if it still runs."""
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        return self.wait()

    def said(self):
        """The end of what it printed; nothing if it was killed."""
        return self.printed.recv() if self.printed.poll() else ""


def in_child(sender, function, *args):
    sys.stdout = sys.stderr = text = io.StringIO()
    torch.set_num_threads(1)
    status = 1
    try:
        status = function(*args)
    except BaseException:
        traceback.print_exc()
    sender.send(text.getvalue()[-9999:])
    sys.exit(status)


def file_limit(size, kill=False):
    """From now on no file grows beyond `size` bytes, as on a full disk; or the attempt kills the process."""
    if kill:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def train(settings, killed_at=None, full_at=None):
    """A run that dies as it writes byte `killed_at` of a file, or whose files end there after its rollout."""
    if killed_at:
        file_limit(killed_at, kill=True)
    original = rlcm.update

    def filled(*args, **kwargs):
        file_limit(full_at)
        return original(*args, **kwargs)

    rlcm.update = filled if full_at else original
    return rlcm.main(words(**settings))


@pytest.fixture(scope="session")
def spawn():
    Child.context.set_forkserver_preload([__name__])
    return Child


LINES = dict(MINI, steps=2, batch_size=4, micro_batch=4, save_every=1, kl=0.01, lora_rank=160)  # a second
SAVED = "samples/epoch-0001.png", "pytorch_lora_weights.safetensors", "checkpoint/state.pt"  # in this order


def sizes(run):
    """Of what a save writes: each file is larger than the one before, so that a limit meets one of them."""
    found = [(run / name).stat().st_size for name in SAVED]
    assert found == sorted(found)
    return found


def written(run):
    """When the last epoch was."""
    path = run / "metrics.csv"
    return path.stat().st_mtime_ns if path.exists() else 0


def go_on(settings):
    """--resume where there is a run, a new one where it died before its config was written."""
    out, epochs = settings["out"], settings["epochs"]
    if (out / "config.json").exists():
        return {"resume": out, "epochs": epochs}
    shutil.rmtree(out, ignore_errors=True)
    return settings


def test_a_run_killed_at_six_moments_ends_as_the_one_left_alone(spawn, mini, tmp_path):
    """SIGKILL in the midst of epochs, of the start, of a file; each time the run is resumed."""
    alone, killed, rng, epochs = tmp_path / "alone", tmp_path / "killed", np.random.default_rng(0), 10
    settings = dict(LINES, model=mini, epochs=epochs)
    assert spawn(train, settings | {"out": alone}).wait() == 0
    picture, lora, checkpoint = sizes(alone)
    an_epoch = column(alone, "seconds")[-1] / epochs
    settings["out"] = killed
    first = [picture // 2, (picture + lora) // 2, "second epoch"]
    moments = [*first, (lora + checkpoint) // 2, "start", "second epoch"]
    for n, moment in enumerate(moments, 1):
        if isinstance(moment, int):
            child = spawn(train, go_on(settings), moment)
            code, where = child.wait(), f"at byte {moment} of a file"
            assert code == -signal.SIGXFSZ, child.said()
        else:
            seen = {written(killed)}
            child = spawn(train, go_on(settings))
            while moment != "start" and len(seen) < 3 and child.wait(0.01) is None:  # the first one is saved
                seen.add(written(killed))
            wait = rng.uniform(0, 0.8 * an_epoch)
            child.wait(wait)
            code, where = child.kill(), f"{wait:.2f} s after its {moment}"
            assert code == -signal.SIGKILL, child.said()
        done = len(values(killed)) if written(killed) else 0
        print(f"kill {n} {where:32} {done} of {epochs} epochs in metrics.csv")  # seen with -rP
    assert 3 <= done < epochs
    assert spawn(train, go_on(settings)).wait() == 0
    assert values(alone) == values(killed) and same_weights(alone, killed)
    for path in (alone / "samples").iterdir():
        assert path.read_bytes() == (killed / "samples" / path.name).read_bytes()
    assert {p.name for p in alone.iterdir()} == {p.name for p in killed.iterdir()}


def write_metrics(out, version):
    rlcm.save_metrics([{"epoch": i, "reward": version} for i in range(500)], out / "metrics.csv")


def read_metrics(out):
    rows = metrics(out)
    assert len(rows) == 500
    return {int(row["reward"]) for row in rows}


def write_checkpoint(out, version):
    model = SimpleNamespace(trained={"w": torch.full((5000,), float(version))})
    history, rows = {"a cat": [float(version)]}, [{"epoch": version}]
    rlcm.save_checkpoint(SimpleNamespace(out=out, saved={}, model=model, history=history, rows=rows))


def read_checkpoint(out):
    state = rlcm.load_checkpoint(out)
    assert len(state["trained"]["w"]) == 5000
    return {*state["trained"]["w"].tolist(), *state["history"]["a cat"], state["rows"][0]["epoch"]}


class LoraPipe:
    """What save_weights needs of a pipeline."""

    save_lora_weights = staticmethod(StableDiffusionPipeline.save_lora_weights)

    def __init__(self, version):
        self.unet = torch.nn.Sequential()
        self.unet.to_q = torch.nn.Linear(64, 64)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"]), self.unet)
        for p in self.unet.parameters():
            torch.nn.init.constant_(p, version)


def write_weights(out, version):
    rlcm.save_weights(LoraPipe(version), out)


def read_weights(out):
    weights = load_file(out / "pytorch_lora_weights.safetensors").values()
    return {value for p in weights for value in p.unique().tolist()}


def write_and_die(write, out, event, size):
    """Write version 1; die before the event-th thing done to a path in `out`, or at a byte of a file."""
    seen = itertools.count(1)

    def audit(name, args):
        if any(str(out) in str(path) for path in args[:2]) and next(seen) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    if size:
        file_limit(size, kill=True)
    write(out, 1)


WRITERS = {
    "metrics.csv": (write_metrics, read_metrics),
    "checkpoint/state.pt": (write_checkpoint, read_checkpoint),
    "pytorch_lora_weights.safetensors": (write_weights, read_weights),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_the_old_or_the_new_one_wherever_its_writer_is_killed(name, spawn, tmp_path):
    """Before each thing done to a path (open, rename, ...) and in the midst of the contents."""
    write, read = WRITERS[name]
    write(tmp_path, 0)
    size = (tmp_path / name).stat().st_size
    cuts = [(0, 1), (0, size // 2), (0, size - 1), *((event, None) for event in range(1, 99))]
    found = []
    for event, size in cuts:
        out = tmp_path / f"{event}-{size}"
        out.mkdir()
        write(out, 0)
        child = spawn(write_and_die, write, out, event, size)
        code = child.wait()
        found.append(read(out))
        assert found[-1] in ({0}, {1}), (event, size)
        write(out, 2)
        assert read(out) == {2}  # what is left of the killed writer is not in the way
        left = {p.relative_to(out) for p in out.rglob("*")}
        assert left == {Path(name), *Path(name).parents} - {Path(".")}
        if code == 0:
            break
        assert code == (-signal.SIGKILL if event else -signal.SIGXFSZ), child.said()
    print(f"{len(found) - 1} kills in {name}: {found}")  # seen with -rP
    assert len(found) >= 6 and found[:4] == [{0}] * 4 and found[-1] == {1}


def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(spawn, mini, tmp_path):
    """It fills up in metrics.csv, a picture, the LoRA or the checkpoint of the second epoch."""
    out = tmp_path / "run"
    assert spawn(train, dict(LINES, model=mini, epochs=1, out=out)).wait() == 0
    picture, lora, checkpoint = sizes(out)
    before = (out / "checkpoint" / "state.pt").read_bytes()
    for limit in (200, picture // 2, (picture + lora) // 2, (lora + checkpoint) // 2):
        child = spawn(train, {"resume": out, "epochs": 2}, None, limit)
        code, said = child.wait(), child.said()
        last = re.split(r"[\r\n]", said.strip())[-1]
        assert code == 2 and last.startswith("rlcm.py: ") and "Traceback" not in said, said
        assert (out / "checkpoint" / "state.pt").read_bytes() == before
    assert spawn(train, {"resume": out, "epochs": 2}).wait() == 0 and len(values(out)) == 2


def test_a_reward_that_turns_nan_is_named_and_the_last_checkpoint_is_intact(spawn, mini, tmp_path):
    """Calls: the first grid, four micro-batches, then rollout and grid of each epoch."""
    (tmp_path / "flaky.py").write_text(
        "calls = []\ndef fn(images, prompts):\n    calls.append(1)\n    r = images.mean((1, 2, 3))\n"
        "    return r / 0 * 0 if len(calls) == 15 else r\n"
    )
    out = tmp_path / "run"
    child = spawn(train, dict(LINES, model=mini, epochs=5, reward=f"{tmp_path}/flaky.py:fn", out=out))
    assert child.wait() == 2 and "must be finite" in child.said()
    assert len(values(out)) == len(rlcm.load_checkpoint(out)["rows"]) == 2
    assert spawn(train, {"resume": out, "epochs": 3}).wait() == 0 and len(values(out)) == 3


def test_ctrl_c_saves_and_resumes(spawn, mini, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = dict(LINES, model=mini, save_every=100, epochs=20)
    assert spawn(train, settings | {"out": whole}).wait() == 0
    child = spawn(train, settings | {"out": parts})
    while not (parts / "metrics.csv").exists() and child.wait(0.01) is None:
        pass
    os.kill(child.process.pid, signal.SIGINT)
    code, said = child.wait(), child.said()
    assert code == 130, said
    done = len(values(parts))
    assert 1 <= done < 20 and f"stopped, before 20 epochs; to go on: python rlcm.py --resume {parts}" in said
    assert (parts / "samples" / f"epoch-{done:04d}.png").exists() and metrics(parts)[-1]["likeness"]
    lora = load_file(parts / "pytorch_lora_weights.safetensors").values()  # of the checkpoint's epoch
    trained = rlcm.load_checkpoint(parts)["trained"].values()
    assert len(lora) == len(trained) and all(any(torch.equal(p, q) for q in lora) for p in trained)
    assert spawn(train, {"resume": parts}).wait() == 0
    a, b = ([{**row, "seconds": 0, "likeness": 0} for row in metrics(run)] for run in (whole, parts))
    assert a == b and same_weights(whole, parts)


def train_as_one_of_several(settings):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train(settings)


def test_two_processes_give_the_gradient_of_one(spawn, mini, tmp_path):
    """A run on one process and, by torch.distributed.run's launcher, on two with half of each batch.

    Both end at epoch 2, whose save the first process alone compares with epoch 0.
    """
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    one, two = tmp_path / "one", tmp_path / "two"
    settings = dict(SMALL, model=mini, reward=f"{tmp_path}/mine.py:red", steps=3, kl=10.0, lr=0.02)
    settings |= dict(epochs=9, save_every=2, min_likeness=0.9999)
    assert spawn(train, settings | {"out": one}).wait() == 0
    where = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(tmp_path))
    nodes = dict(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, start_method="forkserver")
    before = signal.getsignal(signal.SIGINT)
    launched = elastic_launch(LaunchConfig(**nodes, **where), train_as_one_of_several)
    assert launched(settings | {"out": two}) == {0: 0, 1: 0}
    signal.signal(signal.SIGINT, before)  # the launcher keeps it
    assert json.loads((two / "config.json").read_text())["processes"] == 2
    names = "reward_mean", "reward_std", "reward_min", "reward_max", "path_kl", "grad_norm", "edges"
    for name in names:
        assert column(one, name) == pytest.approx(column(two, name), rel=1e-4, abs=1e-6), name
    assert column(two, "ratio_drift") == [0.0, 0.0]
    a, b = (load_file(run / "pytorch_lora_weights.safetensors") for run in (one, two))
    for name in a:  # Adam's first steps are signs: tiny gradients may differ
        assert (a[name] - b[name]).abs().max() <= 0.05 * a[name].abs().max(), name


# ------------------------------------------------------------------------------------ a GPU that is not there
# The card: its tensors say that they are on cuda:0, hold their numbers on the CPU, and mix with the CPU's as
# a GPU's do: not at all, but for numbers without dimension, for indices and for copies. The program runs on
# it whole, threads, files and all. (torch's FakeTensorMode computes no numbers, and its cuda tensors abort in
# backward where torch has no CUDA.) Shown: nothing is left on the wrong device, by libraries neither; no
# operation is given two dtypes (the CPU's kernels refuse what CUDA's refuse, and autocast does its work);
# what the program does differently on a GPU runs. Not shown: CUDA's own kernels, their rounding, their
# nondeterminism and speed, memory, what autocast does only on CUDA, streams, several GPUs.
CARD, aten = torch.device("cuda:0"), torch.ops.aten


class OnCard(torch.Tensor):
    """A tensor of the card. To the engine below Python it is on cpu:1, which takes part in autograd."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        options = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        options["device"] = torch.device("cpu:1")
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        tensor.inner = inner
        return tensor

    device, is_cuda, is_cpu = (property(lambda self, v=v: v) for v in (CARD, True, False))
    data = property(torch.Tensor.detach)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def __repr__(self):
        return f"OnCard({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __reduce_ex__(self, protocol):  # torch.load(map_location="cpu")
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return on_card(operation, args, kwargs or {})


class Card(TorchDispatchMode):
    """While it is entered, by each thread for itself, tensors can be made on the card and moved to it."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(v, device="cuda:0") is made, then moved
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

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
    moves = name in (aten._to_copy, aten.copy_)

    def inner(v):
        given.append(v)
        if type(v) is OnCard:
            known[id(v.inner)] = v
            return v.inner
        return v

    args, kwargs = mapped(inner, args), {key: mapped(inner, v) for key, v in kwargs.items()}
    there = bool(known) if asked is None else asked in (CARD, torch.device("cpu:1"))
    if name in (aten.index, aten.index_put, aten.index_put_) and type(given[0]) is OnCard:
        given[1:] = given[-1:] if name is not aten.index else []  # indices may be on the CPU
    if known and not moves and any(type(v) is not OnCard and v.dim() for v in given):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, cuda:0 and cpu")
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{operation}: expected a 'cuda' device type for generator but found 'cpu'")
    out = operation(*args, **kwargs | ({} if asked is None else {"device": torch.device("cpu")}))
    if not there or name is aten.copy_ and type(given[0]) is not OnCard:
        return out
    return mapped(lambda v: known[id(v)] if id(v) in known else OnCard(v), out)


@pytest.fixture
def card(monkeypatch):
    """The card is this machine's GPU."""
    to, autocast = torch.Tensor.to, torch.autocast
    here = {"_lazy_init": None, "is_available": True, "is_bf16_supported": True, "current_device": 0}
    here |= {"_exchange_device": 0, "_maybe_exchange_device": 0}
    here |= {"get_device_properties": SimpleNamespace(total_memory=40 << 30)}
    for name, value in here.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    pool = functools.partial(ThreadPoolExecutor, initializer=lambda: Card().__enter__())
    monkeypatch.setattr(rlcm, "ThreadPoolExecutor", pool)  # the worker thread is on it, too
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *args, **kwargs: to(t, *map(numbered, args), **kwargs))
    monkeypatch.setattr(torch, "autocast", lambda device_type, **kwargs: autocast("cpu", **kwargs))
    monkeypatch.setattr(accelerate.state.PartialState, "default_device", CARD)
    monkeypatch.setattr(rewards, "free_gib", lambda device: 40.0)
    torch.__future__.set_swap_module_params_on_conversion(True)
    fresh()
    with Card():
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)
    fresh()


def numbered(device):
    return CARD if str(device) == "cuda" else device


def fresh():
    """Nothing is kept from test to test: accelerate's device, models of rewards on the card."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    rewards.load.cache_clear()


ON_CARD = dict(epochs=2, batch_size=4, micro_batch=16, save_every=2, pixels=16, steps=2, kl=0.01)
CARD_RUNS = [  # method, precision and what else is different
    ("rlcm", "fp32", {"algo": "reinforce"}),
    ("rlcm", "bf16", {"lora_rank": 0}),
    ("rlcm", "fp16", dict(last_noise=0.0, low_memory=True, micro_batch=1, batch_size=2)),
    ("ddpo", "fp32", {"low_memory": True, "micro_batch": 2}),
    ("ddpo", "bf16", {"updates": 2, "guidance": 3.0}),
    ("ddpo", "fp16", {"lora_rank": 0}),
    ("score", "fp32", {"lora_rank": 0}),
    ("score", "bf16", {"updates": 2, "batch_size": 8, "value": True}),
    ("score", "fp16", {"kl": 0.0}),
]


@pytest.mark.parametrize("method, precision, options", CARD_RUNS)
def test_a_run_on_a_gpu_that_is_not_there(method, precision, options, card, mini, mini_sd, tmp_path):
    """It trains in that precision, one is resumed too, with its scaler, all on the card."""
    model = mini if method == "rlcm" else mini_sd
    given = dict(ON_CARD, method=method, model=model, precision=precision, out=str(tmp_path / "run"))
    seen, steps, draw = [], rlcm.update, rlcm.draw

    def update(policy, eps, s, c, x, log_p, A, optimizer, *args, **kwargs):
        weights = optimizer.param_groups[0]["params"]
        seen.append({v.device for v in (*vars(s).values(), c, x, log_p, A, *weights)})
        assert {v.dtype for v in (x, log_p, A, *weights)} == {torch.float32}
        return steps(policy, eps, s, c, x, log_p, A, optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(rlcm, "update", update)
        m.setattr(rlcm, "draw", lambda model, cfg, *p: draw(model, rlcm.replace(cfg, micro_batch=16), *p))
        out = rlcm.train(rlcm.configure(**given | {"epochs": 1} | options))
        if (method, precision) == ("score", "fp16"):
            rlcm.train(rlcm.replace(rlcm.read_config(out), epochs=2, out=str(out)), resume=True)
            assert rlcm.load_checkpoint(out)["scaler"]["scale"] > 0
    assert all(devices == {CARD} for devices in seen) and seen
    assert column(out, "ratio_drift") == [0.0] * len(seen) and column(out, "path_kl")[0] == 0
    unet = load_file(next(out.rglob("*.safetensors")))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in unet.values())


REFUSED = {
    "a tensor on the CPU": lambda x: x + torch.zeros(3, 4),
    "a noise on the CPU": lambda x: torch.stack([x, torch.zeros(3, 4)]),
    "a generator on the CPU": lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
    "an index on the GPU into the CPU's": lambda x: torch.zeros(3, 4)[torch.arange(2, device=x.device)],
    "two dtypes": lambda x: torch.nn.functional.linear(x, x.half()),
    "numpy": lambda x: x.numpy(),
}
ALLOWED = {
    "a number on the CPU": lambda x: x * torch.tensor(2.0),
    "an index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "a copy": lambda x: x.cpu() + torch.zeros(3, 4),
    "a new tensor": lambda x: x + torch.tensor([1.0] * 4, device=x.device),
}


def test_the_card_refuses_what_a_gpu_refuses_and_allows_what_it_allows(card):
    x = torch.ones(3, 4, device=CARD)
    for name, operation in REFUSED.items():
        with pytest.raises(RuntimeError, match="device|dtype|numpy"):
            print(name, operation(x))
    devices = [operation(x).device for operation in ALLOWED.values()]
    assert devices == [CARD, CARD, torch.device("cpu"), CARD]


@pytest.mark.parametrize("precision, near", [("fp32", 1e-5), ("bf16", 0.02), ("fp16", 2e-3)])
def test_drawing_on_a_gpu_that_is_not_there(precision, near, card, mini, tmp_path):
    """--sample, without accelerate and its autocast: the same pictures as on the CPU."""
    cfg = Config(model=mini, pixels=16, steps=2, precision=precision)
    drawn = rlcm.draw(rlcm.load_model(cfg), cfg, ["a cat", "pizza"])
    path = rlcm.sample(rlcm.replace(cfg, out=str(tmp_path / "drawn.png")), ["a cat", "pizza"])
    torch.cuda.is_available = lambda: False  # the fixture puts it back
    on_cpu = rlcm.draw(rlcm.load_model(cfg), cfg, ["a cat", "pizza"])
    assert drawn.device == CARD and on_cpu.device.type == "cpu" and path.exists()
    torch.testing.assert_close(drawn.cpu(), on_cpu, rtol=0, atol=near)


@pytest.mark.parametrize("name", [*MODEL_REWARDS, "compress"])
def test_rewards_on_a_gpu_that_is_not_there(name, card, hub, monkeypatch):
    """In half precision, on the pictures' device, from a thread of their own as in training."""
    images, _ = whole_pixels(H=40, W=40)
    on_cpu = rewards.judge(rewards.get_reward(name), images, PROMPTS)
    said = rewards.describe(images, hub["llava"]) if name == "align" else []
    fresh()
    describe = rewards.describe

    def described(images, source):  # a long description may differ in half precision: run, not compared
        assert len(describe(images, source)) == len(said)
        return said

    monkeypatch.setattr(rewards, "describe", described)
    scorer = rlcm.ThreadPoolExecutor(1)
    scores = scorer.submit(rewards.judge, rewards.get_reward(name), images.to(CARD), PROMPTS).result()
    assert scores.device.type == "cpu"
    torch.testing.assert_close(scores, on_cpu, rtol=0.02, atol=0.01)


# ----------------------------------------------------------------------- the few-step models that people use
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
TRAILING = dict(BETAS, timestep_spacing="trailing")
TURBO = EulerDiscreteScheduler(**TRAILING)
LCM = LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
V_LCM = LCMScheduler.from_config(LCM.config, prediction_type="v_prediction")
V_DDIM = DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction")
KINDS = {  # (is it an SDXL, does it take the guidance as an input, its scheduler), settings of the run
    "xl-lcm": ((True, True, LCM), dict(steps=2, last_noise=0.0, guidance=8.0)),
    "xl-lcm-lora": ((True, False, TURBO), dict(steps=2, lcm_lora="lora", guidance=1.5)),
    "xl-turbo": ((True, False, TURBO), dict(method="ddpo", steps=2, guidance=0.0)),
    "xl": ((True, False, V_DDIM), dict(method="ddpo", steps=2, guidance=3.0)),
    "turbo-4": ((False, False, TURBO), dict(method="ddpo", steps=4, guidance=0.0)),
    "turbo-2": ((False, False, TURBO), dict(method="ddpo", steps=2, guidance=0.0)),
    "v": ((False, False, V_DDIM), dict(method="ddpo", steps=2, guidance=3.0)),
    "v-lcm": ((False, True, V_LCM), dict(steps=2, last_noise=0.0, guidance=8.0)),
}


def make_kind(folder, xl, guided, scheduler):
    """make_mini for the other kinds: 16x16 pictures, random weights."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "tiny" / "lcm" / "tokenizer")
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids |= dict(num_hidden_layers=2, num_attention_heads=2)
    ids |= dict(max_position_embeddings=tokenizer.model_max_length)
    text = CLIPTextModel(CLIPTextConfig(**ids, hidden_size=16, intermediate_size=16))
    blocks = dict(down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2)
    blocks |= dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
    blocks |= dict(cross_attention_dim=40 if xl else 16, time_cond_proj_dim=16 if guided else None)
    if xl:
        blocks |= dict(addition_embed_type="text_time", addition_time_embed_dim=8)
        blocks |= dict(projection_class_embeddings_input_dim=6 * 8 + 12)
        large = CLIPTextConfig(**ids, hidden_size=24, intermediate_size=24, projection_dim=12)
        more = dict(text_encoder_2=CLIPTextModelWithProjection(large), tokenizer_2=tokenizer)
    unet = UNet2DConditionModel(8, 4, 4, **blocks)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    blocks |= dict(block_out_channels=(4, 8), norm_num_groups=4, mid_block_add_attention=False)
    blocks |= dict(scaling_factor=0.5, force_upcast=xl)
    vae = AutoencoderKL(3, 3, **blocks, sample_size=16, latent_channels=4)
    parts = dict(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    if xl:
        pipe = StableDiffusionXLPipeline(**parts, **more, add_watermarker=False)
    else:
        kind = LatentConsistencyModelPipeline if guided else StableDiffusionPipeline
        pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return pipe


def make_lcm_lora(folder, pipe):
    """An LCM-LoRA of random weights for that pipeline."""
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(lora)
    settings = {"unet_lora_adapter_metadata": lora.to_dict()}
    type(pipe).save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet), **settings)
    return str(folder)


def plain_pipeline(folder, cfg):
    """As its users load a model of that kind."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if cfg.lcm_lora:
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(cfg.lcm_lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    elif cfg.guidance == 0:
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def plain_grid(pipe, cfg, prompts):
    """It draws; picture i has a generator seeded i. Turbo's: from noise of the size that its steps assume.

    EulerAncestral starts from sigma z where the variance-exploding process is at sqrt(sigma^2 + 1) z.
    """
    options = dict(num_inference_steps=cfg.steps, guidance_scale=cfg.guidance, output_type="pt")
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    if cfg.method == "ddpo" and cfg.guidance:
        options["eta"] = 1.0
    if cfg.guidance == 0:
        pipe.scheduler.set_timesteps(cfg.steps)
        z = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
        options["latents"] = z * (1 + 1 / pipe.scheduler.init_noise_sigma**2) ** 0.5
    return pipe(list(prompts), generator=generators, **options).images


def watch(unet):
    """A list that gets what the network is given in its first call, {name: tensor}, a row each picture."""
    first = []

    def see(_, args, kwargs):
        given = dict(zip(("sample", "timestep"), args)) | kwargs
        given |= given.pop("added_cond_kwargs", None) or {}
        rows = len(given["sample"])
        if not first:
            given = {name: v for name, v in given.items() if torch.is_tensor(v)}
            first.append({name: v.expand(rows, *v.shape[1:]) for name, v in given.items()})

    unet.register_forward_pre_hook(see, with_kwargs=True)
    return first


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_step_model_trains_and_its_lora_draws_in_a_plain_pipeline(kind, tmp_path, monkeypatch):
    """The first call of the network is the one that diffusers makes, and the grids are what it draws."""
    folder, (made, settings) = str(tmp_path / "model"), KINDS[kind]
    pipe = make_kind(folder, *made)
    if "lcm_lora" in settings:
        settings = settings | dict(lcm_lora=make_lcm_lora(tmp_path / "lora", pipe))
    given = dict(model=folder, pixels=16, epochs=2, batch_size=4, micro_batch=16, save_every=2)
    given |= dict(lr=3e-3, kl=0.0, last_noise=0.0, prompts="a cat", out=str(tmp_path / "run"))
    cfg = rlcm.configure(**given | settings)
    load_model, grids, calls = rlcm.load_model, [], []

    def watched(*args):
        model = load_model(*args)
        calls.append(watch(model.pipe.unet))
        return model

    monkeypatch.setattr(rlcm, "load_model", watched)
    monkeypatch.setattr(rlcm, "save_pictures", lambda run, epoch, images: grids.append(images))
    (tmp_path / "run").mkdir()
    out = rlcm.train(cfg)
    assert column(out, "ratio_drift") == [0, 0] and column(out, "grad_norm")[1] > 0
    plain = plain_pipeline(folder, cfg)
    calls.append(watch(plain.unet))
    base = plain_grid(plain, cfg, ["a cat"] * 16)
    (ours,), (theirs,) = calls
    assert ours.keys() == theirs.keys() and len(ours) == 3 + made[1] + 2 * made[0]
    for name, v in theirs.items():
        torch.testing.assert_close(ours[name].float(), v.float(), msg=lambda m: f"{name}: {m}")
    plain.load_lora_weights(out)
    tuned = plain_grid(plain, cfg, ["a cat"] * 16)
    assert (tuned - base).abs().mean() > 1e-4
    for grid, pictures in zip(grids, (base, tuned)):
        torch.testing.assert_close(grid, pictures, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind, precision", [("xl-lcm", "fp16"), ("xl", "bf16")])
def test_an_sdxl_on_a_gpu_that_is_not_there(kind, precision, card, tmp_path):
    """In fp16 its VAE is in float32; the second one predicts v, under guidance."""
    made, settings = KINDS[kind]
    make_kind(tmp_path / "model", *made)
    given = dict(ON_CARD, model=str(tmp_path / "model"), precision=precision, out=str(tmp_path / "run"))
    out = rlcm.train(rlcm.configure(**given | settings | {"epochs": 1}))
    assert column(out, "ratio_drift") == column(out, "path_kl") == [0]
    assert column(out, "grad_norm")[0] > 0 or precision == "fp16"  # whose first steps may be skipped


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 10])
def test_ddpo_steps_with_trailing_timesteps_equal_euler_ancestral(steps, predicts):
    """SD-Turbo's sampler, in the variance-exploding process: x_vp = sqrt(ab) x_ve. Mean and std of each."""
    theirs = EulerAncestralDiscreteScheduler(**TRAILING, prediction_type=predicts)
    s = rlcm.ddpo_schedule(DDIMScheduler.from_config(theirs.config), steps, "cpu")
    theirs.set_timesteps(steps)
    assert s.t.tolist() == theirs.timesteps.tolist() and s.t[0] == 999
    x, c = torch.randn(3, 4, 8, 8), torch.randn(3, 1, 1, 1)

    def eps(x, t, c):
        out, ab = wave(x, t, c), at(theirs.alphas_cumprod, t)
        return out if predicts == "epsilon" else ab.sqrt() * out + (1 - ab).sqrt() * x

    for k, t in enumerate(theirs.timesteps):
        mean, std = rlcm.ddpo_policy(eps, x, torch.full((3,), k), c, s)
        x_ve, nexts, noises = x / s.ab[k].sqrt(), [], []
        out = wave(theirs.scale_model_input(x_ve, t), s.t[k].expand(3), c)
        for seed in (k, 100 + k):
            g, theirs._step_index = torch.Generator().manual_seed(seed), k
            nexts.append(theirs.step(out, t, x_ve, generator=g).prev_sample * s.ab_next[k].sqrt())
            noises.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        near = dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nexts[0] - nexts[1], std * (noises[0] - noises[1]), **near)
        torch.testing.assert_close(nexts[0] - std * noises[0], mean, **near)
        x = mean + std * noises[0]
    assert s.std[-1] == 0 and s.actions.tolist() == list(range(steps - 1))


@torch.no_grad()
def test_v_prediction_is_converted_to_epsilon(tmp_path):
    """v = sqrt(ab) eps - sqrt(1 - ab) x_0, x = sqrt(ab) x_0 + sqrt(1 - ab) eps. Guidance triples an error."""
    make_kind(tmp_path / "v", False, False, V_DDIM)
    model = rlcm.load_model(Config(model=str(tmp_path / "v"), method="ddpo", pixels=16, guidance=3.0))
    t, (noise, clean) = torch.tensor([999, 19]), torch.randn(2, 2, *model.shape)
    ab = at(V_DDIM.alphas_cumprod, t)
    x = ab.sqrt() * clean + (1 - ab).sqrt() * noise
    v = ab.sqrt() * noise - (1 - ab).sqrt() * clean
    c, nothing = (rlcm.encode(model.pipe, [p, p]) for p in ("a cat", ""))
    unet, asked = model.pipe.unet, []

    def forward(sample, timestep, encoder_hidden_states):  # off by some of the embedding
        off = (encoder_hidden_states - torch.cat([nothing, nothing]))[:, 1, 0].view(-1, 1, 1, 1)
        asked.append(timestep)
        return SimpleNamespace(sample=torch.cat([v, v]) + off)

    unet.forward = forward
    off = (c - nothing)[:, 1, 0].view(-1, 1, 1, 1)
    torch.testing.assert_close(model.eps(x, t, c), noise + 3.0 * ab.sqrt() * off, rtol=1e-4, atol=1e-4)
    assert asked[0].tolist() == [999, 19, 999, 19] and off.abs().min() > 1e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_vae_that_overflows_in_fp16_stays_in_float32(precision, tmp_path):
    """Where diffusers' own pipelines upcast: an SDXL with force_upcast, in fp16. bf16 has float32's range."""
    make_kind(tmp_path / "xl", True, False, TURBO)
    make_kind(tmp_path / "sd", False, False, TURBO)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for kind, dtype in (("xl", torch.float32 if precision == "fp16" else half), ("sd", half)):
        cfg = Config(model=str(tmp_path / kind), method="ddpo", pixels=16, precision=precision)
        pipe = rlcm.load_pipeline(cfg)
        assert (pipe.vae.dtype, pipe.unet.dtype, pipe.text_encoder.dtype) == (dtype, half, half)
        pictures = rlcm.decode(pipe, torch.randn(2, 4, 8, 8))
        assert pictures.dtype == torch.float32 and pictures.shape == (2, 3, 16, 16)


def test_a_pipeline_that_is_not_supported_is_named(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert rlcm.main(["--model", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{tmp_path} is a FluxPipeline; supported are " in err
    assert all(name in err for name in rlcm.PIPELINES) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("pixels", [18, 2])
def test_pixels_that_the_model_cannot_draw_are_refused(pixels, mini, tmp_path, capsys):
    given = words(model=mini, pixels=pixels, out=tmp_path / "run")
    assert rlcm.main(given) == 2
    assert capsys.readouterr().err == f"rlcm.py: --pixels {pixels}: {mini} draws multiples of 4\n"
    assert not (tmp_path / "run").exists()


MICRO_BATCHES = {  # GiB of the card: rlcm, ddpo, both at 768 px
    8: (1, 1, 1, 1),
    12: (4, 2, 2, 1),
    16: (8, 4, 4, 2),
    24: (16, 8, 4, 2),
    80: (16, 16, 16, 8),
}


@pytest.mark.parametrize("gib", MICRO_BATCHES)
def test_the_micro_batch_fits_the_card(gib, monkeypatch):
    """6 GiB for weights, VAE and rewards, 1.07 for a row at 512 px, 2.4 at 768, twice that under guidance."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = []
    for pixels in (512, 768):
        for method in ("rlcm", "ddpo"):
            given = dict(model="a/model", method=method, pixels=pixels)
            found.append(rlcm.configure(**given).micro_batch)
            assert rlcm.configure(**given, low_memory=True).micro_batch == 1
            assert rlcm.configure(**given, micro_batch=3).micro_batch == 3
    assert tuple(found) == MICRO_BATCHES[gib]
    assert rlcm.configure(model="tiny").micro_batch == 32


@pytest.mark.parametrize("precision, tf32", [("fp32", False), ("bf16", False), ("tf32", True)])
def test_float32_is_tf32_only_when_asked(precision, tf32, mini):
    """Of matrix products, and of convolutions, which torch computes in TF32 if nobody forbids it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        rlcm.load_model(Config(model=mini, pixels=16, precision=precision))
        assert (products.allow_tf32, convolutions.allow_tf32) == (tf32, tf32)
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


# ------------------------------------------------------------------------- a GPU that is there, and its check
on_the_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or no RLCM_TEST_GPU")


@on_the_gpu
def test_on_the_gpu_pictures_are_those_of_the_cpu(mini, mini_sd, monkeypatch):
    for method, model in (("rlcm", mini), ("ddpo", mini_sd), ("score", mini_sd)):
        cfg, drawn = Config(method=method, model=model, pixels=16, steps=3, guidance=3.0), []
        for gpu in (True, False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
            drawn.append(rlcm.draw(rlcm.load_model(cfg), cfg, ["a cat", "pizza"]).cpu())
        torch.testing.assert_close(*drawn, rtol=0, atol=0.02)  # convolutions are TF32


@on_the_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("method", rlcm.METHODS)
def test_on_the_gpu_the_ratio_is_one_before_the_first_step(method, precision, mini, mini_sd, tmp_path):
    fresh()
    given = dict(ON_CARD, method=method, model=mini if method == "rlcm" else mini_sd, precision=precision)
    out = rlcm.train(rlcm.configure(**given, out=str(tmp_path / "run")))
    assert column(out, "ratio_drift") == [0, 0] and column(out, "path_kl")[0] == 0
    fresh()


def test_the_full_size_is_counted_and_measured(tmp_path):
    """At toy size: a row of its table in this process, and the floor in front of it."""
    tflop = full_size.count(64, toy=True)
    assert 2 * tflop["forward"] > tflop["both"] > tflop["forward"] > 0 and tflop["decode"] > 0
    text = full_size.floor({"forward": 1.0, "both": 2.0, "decode": 3.0}, 10.0, 2)
    assert "an epoch of 2 pictures, H = 4, 3 actions: 26.0" in text and "floor of the epoch: 2.60 s" in text
    full_size.make(tmp_path / "toy", 64, toy=True)
    row = full_size.work(str(tmp_path / "toy"), "fp32", 1, 1, 64)
    assert row["micro_batch"] == 1 and row["ratio_drift"] == 0 and min(row["rollout"], row["update"]) > 0


def test_the_check_for_a_gpu_makes_a_row_of_every_failure(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("CUDA error: on this day")

    for name in ("suite", "main_job", "resumed", "reward_rows", "full_rows", "efficiency"):
        monkeypatch.setattr(gpu_check, name, fails)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "rows", [])
    assert gpu_check.main([]) == 1
    table = (tmp_path / "runs" / "gpu-check.txt").read_text()
    assert table.count("| FAIL | RuntimeError: CUDA error: on this day |") == 7
    assert capsys.readouterr().out.endswith(table)
    monkeypatch.setattr(gpu_check, "ENDS", 0)
    gpu_check.guarded("late", "-", fails)
    assert gpu_check.rows[-1][:2] == ("late", "FAIL") and "no time left" in gpu_check.rows[-1][2]


def test_the_check_for_a_gpu_on_the_rewards(tmp_path, monkeypatch):
    monkeypatch.setenv("RLCM_TEST_GPU", "1")
    monkeypatch.setattr(gpu_check, "rows", [])
    gpu_check.reward_rows(tmp_path)
    assert [verdict for _, verdict, _, _ in gpu_check.rows] == ["pass"] * 5, gpu_check.rows
    rewards.load.cache_clear()


# -------------------------------------------------------------------------------------------------- bad input
BAD = {  # arguments of rlcm.py: what the message must name
    "--reward nope": "compress, incompress",
    "--reward missing.py:fn": "no reward file missing.py",
    "--reward rewards_.py:absent": "no function 'absent'",
    "--reward rewards_.py:value": "no function 'value'",
    "--reward rewards_.py:nan": "must be finite",
    "--reward rewards_.py:shape": "one number each",
    "--reward rewards_.py:scalar": "one number each",
    "--reward rewards_.py:raises": "RuntimeError: no",
    "--reward rewards_.py:text": "raised",
    "--reward broken.py:fn": "does not load",
    "--reward prompts.txt:fn": "unknown reward",
    "--reward compress:1,nope:2": "unknown reward 'nope:2'",
    "--reward compress,,incompress": "an empty part",
    "--reward compress,compress": "a part twice",
    "--reward compress:": "not a finite number",
    "--reward compress:much": "'much' of reward 'compress'",
    "--reward compress:1,incompress:nan": "'nan' of reward 'incompress'",
    "--reward rewards_.py:raises:inf": "'inf' of reward 'rewards_.py:raises'",
    "--steps 0": "between 1 and 50",
    "--steps 1": "without noise: nothing to reinforce",
    "--steps 51": "between 1 and 50",
    "--last-noise 0.5 --method ddpo": "--method rlcm",
    "--last-noise -0.5": "--last-noise -0.5",
    "--steps four": "invalid int value",
    "--epochs 0": "--epochs 0",
    "--epochs -3": "--epochs -3",
    "--batch_size 0": "--batch-size 0",
    "--batch-size 10 --updates 3": "does not divide",
    "--algo reinforce --updates 2": "no ratio",
    "--lr nan": "--lr nan",
    "--lr -1": "--lr -1",
    "--kl -0.1": "--kl -0.1",
    "--kl inf": "--kl inf",
    "--min-likeness -1": "--min-likeness -1",
    "--pixels 0": "--pixels 0",
    "--pixels 18": "multiples of 4",
    "--pixels 72 --model tiny": "multiples of 16",
    "--pixels 18 --sample cat": "multiples of 4",
    "--seed -1": "--seed -1",
    "--clip_range 0": "--clip-range 0",
    "--lora_rank -1": "--lora-rank -1",
    "--method sarsa": "invalid choice",
    "--algo a2c": "invalid choice",
    "--precision int8": "invalid choice",
    "--precision fp16": "needs a GPU",
    "--log-with tensorboard": "pip install tensorboard",
    "--log-with paper": "invalid choice",
    "--paper --reward clip": "no published settings for rlcm clip",
    "--paper --method score": "no published settings but for ImageReward for score compress",
    "--lcm-lora nowhere": "cannot load the model nowhere",
    "--lcm-lora nowhere --method score": "--method rlcm",
    "--rew compress": "--rew",
    "--nonsense": "--nonsense",
    "stray": "stray",
    "--model no/such-model": "--model tiny",
    "--model emptydir": "--model tiny",
    "--model prompts.txt": "--model tiny",
    "--model flux": "flux is a FluxPipeline; supported are StableDiffusionPipeline, StableDiffusionXL",
    "--prompts empty.txt": "is empty",
    "--prompts nowhere.txt": "one prompt a line",
    "--prompts binary.bin": "one prompt a line",
    "--prompts emptydir": "one prompt a line",
    "--eval-prompts nowhere.txt": "one prompt a line",
    "--out full": "not an empty folder",
    "--out prompts.txt": "not an empty folder",
    "--out /proc/nowhere/run": "No such file",
    "--sample cat --load nowhere": "not a run directory",
    "--sample cat --load half": "no weights in half",
    "--sample cat --load damaged": "no readable weights in damaged",
    "--load full": "--sample",
    "--strength 0.5": "--strength with --load",
    "--strength 0.5 --sample cat": "--strength with --load",
    "--strength half --sample cat --load damaged": "invalid float value",
    "--strength 0.5 --sample cat --load whole": "this run has none",
    "--resume nowhere": "not a run directory",
    "--resume full": "not a run directory",
    "--resume half": "no readable checkpoint",
    "--resume hostile": "no readable checkpoint",
    "--resume half --lr 0.1": "--lr cannot go with --resume",
    "--resume half --eval-prompts animals": "--eval-prompts cannot go",
    "--resume half --min-likeness 0.5 --epochs 3": "no readable checkpoint",
    "--resume half --sample cat": "--sample",
}
BAD_BENCH = {
    "evaluate.py nowhere": "not a run directory",
    "evaluate.py half": "no weights in half",
    "evaluate.py damaged": "no readable weights in damaged",
    "evaluate.py half --prompts nowhere.txt": "nowhere.txt",
    "evaluate.py half --steps four": "invalid int value",
    "evaluate.py": "RUN",
    "plot.py nowhere": "not a run directory",
    "plot.py half": "no readable metrics.csv",
    "plot.py half --nonsense": "--nonsense",
}


def everything_in(folder):
    return sorted(str(p) for p in folder.rglob("*") if "__pycache__" not in p.parts)


@pytest.fixture
def bad_place(mini, tmp_path, monkeypatch):
    """The current folder, with all that can be wrong in it; leaves it as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_.py").write_text(REWARD_FILE)
    (tmp_path / "broken.py").write_text("def fn(:\n")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x81")
    for folder in ("emptydir", "full", "half/checkpoint", "damaged", "whole/unet", "flux"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "half" / "checkpoint" / "state.pt").write_bytes(b"damaged")
    (tmp_path / "damaged" / "pytorch_lora_weights.safetensors").write_bytes(b"damaged")
    (tmp_path / "hostile" / "checkpoint").mkdir(parents=True)
    (tmp_path / "hostile" / "checkpoint" / "state.pt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for folder, rank in (("half", 4), ("damaged", 4), ("hostile", 4), ("whole", 0)):
        cfg = Config(**MINI, model=mini, lora_rank=rank)
        (tmp_path / folder / "config.json").write_text(json.dumps(asdict(cfg)))
    before = everything_in(tmp_path)
    yield
    assert everything_in(tmp_path) == before


def answer(program, arguments, capsys):
    """What a program says to bad arguments: one line on stderr, exit status 2."""
    status, err = program.main(arguments), capsys.readouterr().err
    print(f"{' '.join(arguments):50} {err}")  # seen with -rP
    assert status == 2 and err.count("\n") == 1
    return err


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_status_two_and_nothing_written(arguments, bad_place, mini, capsys):
    given = arguments.split()
    if not {"--model", "--resume", "--load"} & set(given):
        given += ["--model", "tiny"] if "--paper" in given else ["--model", mini, "--micro-batch", "16"]
        given += [] if "--pixels" in given else ["--pixels", "16"]
        given += [] if "--epochs" in given else ["--epochs", "1"]  # of what is not refused
    err = answer(rlcm, given, capsys)
    assert err.startswith("rlcm.py: ") and BAD[arguments] in err


@pytest.mark.parametrize("arguments", BAD_BENCH)
def test_bad_input_of_evaluate_and_plot_is_answered_alike(arguments, bad_place, capsys):
    program, *given = arguments.split()
    err = answer({"evaluate.py": evaluate, "plot.py": plot}[program], given, capsys)
    assert err.startswith(f"{program}: ") and BAD_BENCH[arguments] in err


def test_bad_input_as_a_user_types_it(tmp_path):
    command = [sys.executable, HERE / "rlcm.py", "--reward", "nope"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
