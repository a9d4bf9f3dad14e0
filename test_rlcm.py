"""Tests of rlcm.py and rewards.py against independent computations: python -m pytest -q test_rlcm.py"""
import csv
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

sys.path.insert(1, str(Path(__file__).resolve().parent / "tiny"))
import make_tiny
import rewards
import rlcm
from bench import figures
from rewards import BadInput
from rlcm import Config, METHODS, advantages, at, gaussian_kl, log_prob, policy_loss, rlcm_policy, rlcm_readout, rlcm_schedule, rollout, update

HERE = Path(__file__).resolve().parent
GUIDANCE = rlcm.PRESETS["tiny", "rlcm"]["guidance"]
SMALL = dict(model="tiny", epochs=2, batch_size=8, micro_batch=4, save_every=1)


@pytest.fixture(scope="session")
def lcm_scheduler():
    from diffusers import LCMScheduler
    return LCMScheduler.from_pretrained(HERE / "tiny" / "lcm" / "scheduler")


@pytest.fixture(scope="session")
def model():
    return rlcm.load_model(rlcm.resolve(Config(model="tiny")), "cpu")


def perturbed(model, scale=0.1):
    """The model with an adapter that is no longer the identity."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.unet.named_parameters()):
            if "lora_" in name:
                p.copy_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """One short real run of the default method, shared by the tests that look at what a run leaves behind."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert rlcm.main(f"--model tiny --epochs 10 --batch_size 48 --micro_batch 24 --lr 3e-3 --save_every 5 --seed 0 --out {out}".split()) is None
    return out


def metrics(run):
    return list(csv.DictReader(open(run / "metrics.csv")))


# ------------------------------------------------------------------------------------------------- kernels and log-prob
@pytest.mark.parametrize("steps", [2, 4, 8, 50])
def test_kernel_and_readout_equal_diffusers(lcm_scheduler, steps):
    """A whole trajectory with the same noise, step by step through LCMScheduler.step, for an arbitrary network."""
    eps = lambda x, t, c: torch.tanh(x * 1.3 + t.view(-1, 1, 1, 1) / 500 - 1) + c
    s = rlcm_schedule(lcm_scheduler, steps, "cpu")
    x, c = torch.randn(3, 12, 8, 8), torch.randn(3, 1, 1, 1)
    lcm_scheduler.set_timesteps(steps)
    assert s.t.tolist() == lcm_scheduler.timesteps.tolist()
    for i, t in enumerate(lcm_scheduler.timesteps):
        theirs = lcm_scheduler.step(eps(x, t.expand(3), c), t, x, generator=torch.Generator().manual_seed(i))
        k = torch.full((3,), i)
        torch.testing.assert_close(rlcm_readout(eps, x, k, c, s), theirs.denoised, rtol=1e-5, atol=1e-5)
        if i < steps - 1:
            mean, std = rlcm_policy(eps, x, k, c, s)
            ours = mean + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=1e-5)
            x = ours


@pytest.mark.parametrize("steps, alpha_to_one", [(10, False), (50, False), (7, True)])
def test_ddpo_kernel_equals_ddim_with_eta_one(steps, alpha_to_one):
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=alpha_to_one, steps_offset=0 if alpha_to_one else 1)
    eps = lambda x, t, c: torch.tanh(x * 1.3 + t.view(-1, 1, 1, 1) / 500 - 1)
    s, x = rlcm.ddpo_schedule(scheduler, steps, "cpu"), torch.randn(3, 12, 8, 8)
    assert len(s.std) == steps and (s.std[:-1] > 0).all() and (s.std[-1] == 0) == alpha_to_one
    for i, t in enumerate(scheduler.timesteps):
        z = torch.randn(x.shape)
        mean, std = rlcm.ddpo_policy(eps, x, torch.full((3,), i), None, s)
        theirs = scheduler.step(eps(x, t.expand(3), None), t, x, eta=1.0, variance_noise=z).prev_sample
        x = mean + std * z
        torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-5)


def test_score_schedule_is_the_vp_sde_of_the_models_betas():
    """Integral of beta by quadrature over the model's own betas: dX = -1/2 beta X dt + sqrt(beta) dB has ab(t) = exp(-integral)."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler.from_pretrained(HERE / "tiny" / "sd" / "scheduler")
    s = rlcm.score_schedule(scheduler, 12, "cpu")
    rate = -np.log(1 - scheduler.betas.double().numpy())  # beta(t) on [j - 1, j], per timestep
    integral = lambda t: np.trapezoid([rate[min(int(np.ceil(u)), 999)] for u in np.linspace(1e-9, t, 20_001)], dx=t / 20_000) + rate[0]
    t = s.t.double().tolist() + [0.0]
    for k in (0, 5, 11):
        assert -np.log(s.ab[k].item()) == pytest.approx(integral(t[k]), rel=1e-3)
        assert s.std[k].item() ** 2 == pytest.approx(integral(t[k]) - (integral(t[k + 1]) if t[k + 1] else rate[0]), rel=5e-3)
    assert (s.t.diff() < 0).all() and s.t[0] == 999


def test_score_kernel_is_euler_maruyama_and_converges_to_the_data():
    """The step by hand; and with the exact score of N(0.3, 1) many steps end at that law (of data at t = 0)."""
    m = Gaussian("score", 50, 0.3)
    x, k = torch.randn(6, 1, 1, 1), torch.tensor([0, 3, 10, 20, 40, 49])
    mean, std = METHODS["score"][1](m.eps, x, k, None, m.s)
    beta_dt, ab = (v[k].view(-1, 1, 1, 1) for v in (m.s.std**2, m.s.ab))
    torch.testing.assert_close(mean, x + (x / 2 - (x - ab.sqrt() * 0.3)) * beta_dt, atol=1e-5, rtol=1e-4)
    roll = rollout(m, "score", m.s, torch.zeros(20_000, 1, 1), torch.randn(51, 20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)), 20_000)
    assert roll.x[-1].mean().item() == pytest.approx(0.3, abs=0.03) and roll.x[-1].var().item() == pytest.approx(1.0, rel=0.05)


def test_schedule_of_mixed_timesteps_equals_one_at_a_time(lcm_scheduler):
    """The update flattens timesteps into one batch: row k of a mixed batch is the kernel at k."""
    eps = lambda x, t, c: x * (t.view(-1, 1, 1, 1) / 1000)
    s, x = rlcm_schedule(lcm_scheduler, 8, "cpu"), torch.randn(7, 2, 3, 3)
    mean, std = rlcm_policy(eps, x, torch.arange(7), None, s)
    for k in range(7):
        m, sd = rlcm_policy(eps, x[k : k + 1], torch.tensor([k]), None, s)
        assert torch.equal(mean[k : k + 1], m) and torch.equal(std[k : k + 1], sd)


def test_log_prob_and_kl_equal_torch_distributions():
    x, mean, other, std = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.rand(5, 1, 1, 1) + 0.1
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    torch.testing.assert_close(log_prob(x, mean, std), p.log_prob(x).mean((1, 2, 3)))
    torch.testing.assert_close(gaussian_kl(mean, other, std), torch.distributions.kl_divergence(p, q).sum((1, 2, 3)))


# ------------------------------------------------------------------------------------------------------ ratio, gradients
def rolled(model, cfg, B=8, reference=False, steps=4):
    s = rlcm_schedule(model.pipe.scheduler, steps, "cpu")
    c = model.encode(["a cat", "dog", "pizza", "red apple"] * (B // 4))
    z = torch.randn(steps, B, *model.shape, generator=torch.Generator().manual_seed(5))
    return s, c, rollout(model, "rlcm", s, c, z, cfg.micro_batch, reference)


@pytest.mark.parametrize("updates, micro_batch", [(1, 8), (1, 3), (2, 2)])
def test_ratio_is_exactly_one_before_the_first_step(model, updates, micro_batch):
    perturbed(model)
    cfg = rlcm.resolve(Config(model="tiny", updates=updates, micro_batch=micro_batch, kl=0.0))
    cfg.micro_batch = rlcm.micro_batch_of(cfg, 8 // updates)
    s, c, roll = rolled(model, cfg)
    params = [p for p in model.unet.parameters() if p.requires_grad]
    before = [p.clone() for p in params]
    log = update(model, cfg, Accelerator(cpu=True), torch.optim.SGD(params, 1e-3), s, c, roll, torch.randn(8), torch.ones(8))
    assert log["ratio_drift"] == 0.0
    assert log["grad_norm"] > 0 and any(not torch.equal(a, b) for a, b in zip(before, params))
    drift = update(model, cfg, Accelerator(cpu=True), torch.optim.SGD(params, 0.0), s, c, roll, torch.randn(8), torch.ones(8))["ratio_drift"]
    assert drift > 0  # the metric sees a policy that has moved


def gradient(model, cfg, B=8, kl=0.0):
    """Gradient of one optimizer step of `update`, read from an SGD step of size one."""
    perturbed(model)
    cfg = replace(cfg, kl=kl, max_grad_norm=1e9)
    s, c, roll = rolled(model, cfg, B, reference=kl > 0)
    params = [p for p in model.unet.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    A = torch.randn(B, generator=torch.Generator().manual_seed(9))
    update(model, cfg, Accelerator(cpu=True), torch.optim.SGD(params, 1.0), s, c, roll, A, torch.ones(B))
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, params)])


def test_ppo_and_reinforce_gradients_agree_at_ratio_one(model):
    cfg = rlcm.resolve(Config(model="tiny", micro_batch=4, kl=0.0))
    ppo, reinforce = gradient(model, cfg), gradient(model, replace(cfg, algo="reinforce"))
    assert ppo.norm() > 1e-4
    torch.testing.assert_close(ppo, reinforce, rtol=1e-3, atol=1e-6)


def test_micro_batch_changes_memory_not_the_gradient(model):
    cfg = rlcm.resolve(Config(model="tiny"))
    small, large = gradient(model, replace(cfg, micro_batch=2), kl=0.1), gradient(model, replace(cfg, micro_batch=8), kl=0.1)
    assert (small - large).norm() < 1e-3 * large.norm()


def test_ppo_clips_only_what_profits():
    old, A = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    loss, ratio = policy_loss(new, old, A, "ppo", 0.1)
    loss.sum().backward()
    torch.testing.assert_close(ratio, new.detach().exp())
    assert (new.grad != 0).tolist() == [False, True, True, False]  # up with A > 0 and down with A < 0 are clipped
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.1, -np.exp(-0.5), np.exp(0.5), 0.9], dtype=torch.float32))


def test_low_memory_gives_the_same_gradient(model):
    cfg = rlcm.resolve(Config(model="tiny", low_memory=True))
    assert cfg.micro_batch == 1
    lean = rlcm.load_model(cfg, "cpu")
    assert lean.unet.is_gradient_checkpointing and not model.unet.is_gradient_checkpointing and lean.pipe.vae.use_slicing
    a, b = gradient(lean, cfg, B=4, kl=0.1), gradient(model, replace(cfg, low_memory=False), B=4, kl=0.1)
    assert b.norm() > 1e-4 and (a - b).norm() < 1e-3 * b.norm()


class Gaussian:
    """Data N(theta, 1), D = 1: noised data is N(sqrt(ab) theta, 1), so score, eps and consistency function are closed forms, and every
    kernel is linear: mean = slope_k x + shift_k theta. `eps` is the network that makes the program's own parametrisation produce them."""

    def __init__(self, method, steps, theta):
        from diffusers import DDIMScheduler, LCMScheduler
        kind, folder = (LCMScheduler, "lcm") if method == "rlcm" else (DDIMScheduler, "sd")
        self.method, self.unet, self.pre = method, torch.nn.Identity(), torch.tensor(theta)
        self.s, self.theta = METHODS[method][0](kind.from_pretrained(HERE / "tiny" / folder / "scheduler"), steps, "cpu"), torch.nn.Parameter(torch.tensor(theta))

    def network(self, x, t, theta):
        v = lambda name: at(getattr(self.s, name), torch.searchsorted(-self.s.t, -t))  # of each t
        ab = v("ab")
        if self.method != "rlcm":
            return (1 - ab).sqrt() * (x - ab.sqrt() * theta)  # -sqrt(1 - ab) score
        x_0 = (theta + x - ab.sqrt() * theta - v("c_skip") * x) / v("c_out")  # f(x, t) = theta + (x - sqrt(ab) theta)
        return (x - ab.sqrt() * x_0) / (1 - ab).sqrt()

    def eps(self, x, t, c):
        return self.network(x, t, self.theta)

    def eps_pre(self, x, t, c):
        return self.network(x, t, self.pre)

    def decode(self, latents):
        return latents

    def kernels(self):
        """(slope_k, shift_k) from the papers' formulas, double precision."""
        ab, std = self.s.ab.double(), self.s.std.double()
        if self.method == "rlcm":  # sqrt(ab') f
            return [(ab[k + 1].sqrt(), ab[k + 1].sqrt() * (1 - ab[k].sqrt())) for k in range(len(std))]
        if self.method == "score":  # x + beta dt (x / 2 - (x - sqrt(ab) theta))
            return [(1 - b / 2, b * a.sqrt()) for a, b in zip(ab, std**2)]
        out = []
        for a, a_next, sigma in zip(ab, self.s.ab_next.double(), std):  # DDIM: sqrt(ab') E[x_0 | x] + sqrt(1 - ab' - sigma^2) eps
            direction = (1 - a_next - sigma**2).clamp(min=0).sqrt() * (1 - a).sqrt()
            out.append((a_next.sqrt() * a.sqrt() + direction, a_next.sqrt() * (1 - a) - direction * a.sqrt()))
        return out


@pytest.mark.parametrize("method, algo, steps", [("rlcm", "ppo", 2), ("rlcm", "reinforce", 4), ("rlcm", "ppo", 4), ("ddpo", "ppo", 5), ("score", "reinforce", 6), ("score", "ppo", 6)])
def test_policy_gradient_is_unbiased_on_gaussian_data(method, algo, steps):
    """Monte-Carlo gradient of E[r], r = -(x - 2)^2 / 2, against the closed form, through rollout and update themselves.

    Mean and derivative of the mean follow by recursion, and the variance does not depend on theta. RLCM's last evaluation and DDIM's
    last step are no actions: their theta is a constant.
    """
    theta, N, repeats = 0.3, 4096, 40
    m = Gaussian(method, steps, theta)
    T, mu, dmu = len(m.s.std), torch.zeros(()).double(), torch.zeros(()).double()
    for (slope, shift), std in zip(m.kernels(), m.s.std):
        mu, dmu = slope * mu + shift * theta, slope * dmu + shift * (std > 0)
    mean = mu + (theta * (1 - m.s.ab[-1].double().sqrt()) if method == "rlcm" else 0)  # f of the last evaluation has slope 1 in x
    exact = -(mean - 2) * dmu  # dE[r] / dtheta
    cfg = replace(rlcm.resolve(Config(model="tiny", method=method, algo=algo, steps=steps, kl=0.0)), micro_batch=N, max_grad_norm=1e9)
    accelerator, estimates = Accelerator(cpu=True), []
    for i in range(repeats):
        m.theta.data.fill_(theta)
        z = torch.randn(T + 1, N, 1, 1, 1, generator=torch.Generator().manual_seed(i))
        pictures = []
        roll = rollout(m, method, m.s, torch.zeros(N, 1, 1), z, N, on_pictures=lambda images, b: pictures.append(images))
        r = -((torch.cat(pictures).flatten() - 2) ** 2) / 2
        update(m, cfg, accelerator, torch.optim.SGD([m.theta], 1.0), m.s, torch.zeros(N, 1, 1), roll, r - r.mean(), torch.ones(N))
        estimates.append((m.theta.item() - theta) * int((m.s.std > 0).sum()))  # the loss averages over the actions; DDIM's last step is none
    estimates = torch.tensor(estimates, dtype=torch.double)
    error = estimates.std() / repeats**0.5
    assert error < 0.15 * exact.abs()
    assert (estimates.mean() - exact).abs() < 3.5 * error, (estimates.mean(), exact, error)


@pytest.mark.parametrize("method, steps", [("rlcm", 4), ("ddpo", 5), ("score", 6)])
def test_kl_and_its_gradient_are_the_closed_form(method, steps):
    """KL_k = shift_k^2 (theta - theta_pre)^2 / (2 std_k^2): for `score` that is 1/2 beta dt |s_theta - s_pre|^2, Girsanov's.
    With zero advantage the update moves theta by lambda times its mean slope."""
    theta, pre, N = 0.7, 0.2, 16
    m = Gaussian(method, steps, pre)
    m.theta.data.fill_(theta)
    T = len(m.s.std)
    roll = rollout(m, method, m.s, torch.zeros(N, 1, 1), torch.randn(T + 1, N, 1, 1, 1, generator=torch.Generator().manual_seed(0)), N, reference=True)
    random = m.s.std > 0  # DDIM's last step is no action
    shift2 = torch.stack([shift**2 for _, shift in m.kernels()])[random] / m.s.std[random].double() ** 2
    assert random.sum() == T - (method == "ddpo") and not roll.kl[~random].any()
    torch.testing.assert_close(roll.kl[random].double(), (shift2 * (theta - pre) ** 2 / 2)[:, None].expand(-1, N), rtol=2e-3, atol=1e-6)
    cfg = replace(rlcm.resolve(Config(model="tiny", method=method, kl=2.0)), micro_batch=N, max_grad_norm=1e9)
    update(m, cfg, Accelerator(cpu=True), torch.optim.SGD([m.theta], 1.0), m.s, torch.zeros(N, 1, 1), roll, torch.zeros(N), torch.full((N,), 3.0))
    assert theta - m.theta.item() == pytest.approx(2.0 * 3.0 * (theta - pre) * shift2.mean().item(), rel=2e-3)


class LinearScore(Gaussian):
    """Score -(1 + a_k) x + b_k of unit-variance data at mean zero, a and b of each step to be learned."""

    def __init__(self, steps):
        super().__init__("score", steps, 0.0)
        self.a, self.b = (torch.nn.Parameter(torch.zeros(steps)) for _ in range(2))

    def eps(self, x, t, c):
        k = torch.searchsorted(-self.s.t, -t)
        return (1 - at(self.s.ab, k)).sqrt() * ((1 + at(self.a, k)) * x - at(self.b, k))


def test_score_reaches_the_tilted_gaussian():
    """r = -(x - 2)^2 / 2 and lambda = 1 on data N(0, 1): the optimum is p(x) exp(r(x)) = N(1, 1/2). Rollout, value function and update are the program's.
    With 48 Euler-Maruyama steps the best policy of this kind ends at mean 1.011 and variance 0.518 (a linear-quadratic problem, solved by hand)."""
    steps, N, lam, iterations = 48, 512, 1.0, 80
    torch.manual_seed(0)
    m, V = LinearScore(steps), rlcm.Value(1)
    cfg = replace(rlcm.resolve(Config(model="tiny", method="score", steps=50, kl=lam)), micro_batch=N, max_grad_norm=1e9)
    accelerator, optimizer, V_optimizer = Accelerator(cpu=True), torch.optim.Adam([m.a, m.b], betas=(0.9, 0.99)), torch.optim.Adam(V.parameters(), 3e-3)
    c = torch.zeros(N, 1, 1)

    def sample(g, n=N):
        pictures = []
        roll = rollout(m, "score", m.s, c.expand(n, -1, -1) if n == N else torch.zeros(n, 1, 1), torch.randn(steps + 1, n, 1, 1, 1, generator=g), n, True, lambda images, b: pictures.append(images))
        return roll, torch.cat(pictures).flatten()

    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - i / iterations) ** 2
        g = torch.Generator().manual_seed(i)
        roll, x = sample(g)
        to_go = -((x - 2) ** 2) / 2 - lam * roll.kl.flip(0).cumsum(0).flip(0)  # (T, N)
        advantage = rlcm.actor_critic(V, V_optimizer, accelerator, m.s, roll, to_go, g, fits=8)
        update(m, cfg, accelerator, optimizer, m.s, c, roll, advantage, torch.ones(N))
    _, x = sample(torch.Generator().manual_seed(10**6), 40_000)
    assert x.mean().item() == pytest.approx(1.0, rel=0.05) and x.var().item() == pytest.approx(0.5, rel=0.05), (x.mean(), x.var())


# ----------------------------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand_with_integer_rewards():
    history = {}
    A, scale = advantages(torch.tensor([1, 3, 10, 10]), ["a", "a", "b", "b"], history, 4, 2, 10.0)
    torch.testing.assert_close(A, torch.tensor([-1.0, 1.0, 0.0, 0.0]), atol=1e-4, rtol=0)
    assert scale[0].item() == pytest.approx(1.0, abs=1e-5) and A.dtype == torch.float32
    A, _ = advantages(torch.tensor([5, 7]), ["a", "a"], history, 4, 2, 10.0)
    v = np.array([1, 3, 5, 7])
    torch.testing.assert_close(A, torch.tensor((np.array([5, 7]) - v.mean()) / v.std(), dtype=torch.float32), atol=1e-4, rtol=0)
    A, _ = advantages(torch.tensor([9.0, 9.0]), ["a", "a"], history, 4, 2, 10.0)
    assert history["a"] == [5, 7, 9, 9]  # the oldest fell out
    advantages(torch.tensor([0.0, 8.0, 100.0]), ["c", "c", "d"], history, 2, 99, 10.0)
    A, _ = advantages(torch.tensor([3.0, 5.0, 200.0]), ["c", "c", "d"], history, 2, 99, 10.0)
    torch.testing.assert_close(A[:2], torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)  # a full buffer serves, however large min_count


def test_advantages_of_rare_prompts_use_the_batch_and_are_clipped():
    r = torch.tensor([0.0, 1.0, 2.0, 100.0])
    A, _ = advantages(r, ["a", "b", "c", "d"], {}, 16, 2, 1.5)
    expected = ((r - r.mean()) / r.std(correction=0)).clamp(-1.5, 1.5)
    torch.testing.assert_close(A, expected, atol=1e-5, rtol=0)
    assert A.max() == 1.5


# ------------------------------------------------------------------------------------------------------ models, settings
def test_the_papers_settings_and_that_an_explicit_flag_wins():
    """The tables of the two papers (RLCM appendix, four GPUs as one; DDPO appendix)."""
    settings = lambda *names, **given: [getattr(rlcm.resolve(Config(model="real", paper=True, **given)), name) for name in names]
    names = ("steps", "epochs", "batch_size", "lr", "lora_rank", "lora_alpha", "buffer_size", "min_count", "clip_range", "adv_clip", "max_grad_norm", "guidance", "updates", "prompts")
    assert settings(*names, reward="incompress") == [8, 1000, 16, 1e-4, 16, 32, 16, 16, 1e-4, 10, 5, 8.0, 1, "imagenet-animals"]
    assert settings(*names, reward="aesthetic") == [8, 1000, 32, 1e-4, 8, 8, 32, 16, 1e-4, 10, 5, 8.0, 1, "animals"]
    assert settings(*names, reward="align") == [16, 708, 160, 4e-4, 16, 32, 32, 16, 1e-4, 10, 5, 8.0, 1, "animals-activities"]
    assert settings("steps", "batch_size", "updates", "lr", "guidance", "adv_clip", "max_grad_norm", method="ddpo", reward="aesthetic") == [50, 256, 2, 3e-4, 5.0, 5, 1]
    assert settings("updates", "prompts", method="ddpo", reward="compress") == [4, "imagenet-animals"]
    assert settings("steps", "prompts", reward="align", steps=4, prompts="a cat") == [4, "a cat"]


def test_an_lcm_lora_makes_a_diffusion_model_a_consistency_model_and_stays_under_the_adapter(tmp_path):
    """The network under the fresh adapter is tiny/sd with the LCM-LoRA's product added to its weights by hand; a run trains on top of it."""
    from diffusers import LCMScheduler, StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    pipe = StableDiffusionPipeline.from_pretrained(HERE / "tiny" / "sd", dtype=torch.float32)
    plain = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0", "conv1"]))
    with torch.no_grad():
        for i, (name, p) in enumerate(pipe.unet.named_parameters()):
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    state = get_peft_model_state_dict(pipe.unet)
    from diffusers.training_utils import _collate_lora_metadata
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lcm-lora", state, **_collate_lora_metadata({"unet": pipe.unet}))
    m = rlcm.load_model(rlcm.resolve(Config(model=str(HERE / "tiny" / "sd"), lcm_lora=str(tmp_path / "lcm-lora"), lora_rank=4)), "cpu")
    assert isinstance(m.pipe.scheduler, LCMScheduler) and m.eps.__name__ == "guided"
    merged = {name.replace(".base_layer", ""): p for name, p in m.unet.state_dict().items() if "lora_" not in name}
    changed = 0
    for name, p in plain.items():
        key = name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in state:
            A, B = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
            delta = torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1)).view(p.shape) * 2 if A.ndim == 2 else torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A) * 2
            changed += 1
            torch.testing.assert_close(merged[name], p + delta, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(merged[name], p)
    assert changed > 10
    out = rlcm.train(Config(model=str(HERE / "tiny" / "sd"), lcm_lora=str(tmp_path / "lcm-lora"), lora_rank=4, steps=2, epochs=2, batch_size=4, kl=0.01, save_every=2, out=str(tmp_path / "run")))
    rows = metrics(out)
    assert float(rows[0]["path_kl"]) == 0 < float(rows[1]["path_kl"]) and float(rows[0]["ratio_drift"]) == 0


@pytest.mark.parametrize("rank", [4, 0])
def test_half_precision_trains_float32_weights_with_the_same_arithmetic_in_rollout_and_update(rank, tmp_path):
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()  # one process has one precision
    out = rlcm.train(Config(**{**SMALL, "precision": "bf16", "kl": 0.01}, lora_rank=rank, out=str(tmp_path / "run")))
    AcceleratorState._reset_state()
    from safetensors.torch import load_file
    saved = load_file(out / ("pytorch_lora_weights.safetensors" if rank else "unet/diffusion_pytorch_model.safetensors"))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in saved.values())
    rows = metrics(out)
    assert [float(row["ratio_drift"]) for row in rows] == [0.0, 0.0] and float(rows[1]["path_kl"]) > float(rows[0]["path_kl"])
    assert float(rows[0]["path_kl"]) == 0 or not rank  # a copied reference runs outside autocast
    assert rlcm.main(["--sample", "a cat", "--load", str(out)]) is None and (out / "sample.png").exists()


def test_trackers_are_given_metrics_and_pictures(tmp_path, monkeypatch):
    """With a tracker in place of tensorboard's, which is not installed here."""
    from accelerate import tracking
    seen = []

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None
        def __init__(self, run, logging_dir=None, **kwargs): super().__init__()
        def store_init_configuration(self, values): seen.append(("config", values))
        def log(self, values, step=None, **kwargs): seen.append(("log", values, step))
        def log_images(self, values, step=None, **kwargs): seen.append(("images", values, step, kwargs))

    monkeypatch.setattr(rlcm, "find_spec", lambda name: True)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    out = rlcm.train(Config(**SMALL, log_with="tensorboard", out=str(tmp_path / "run")))
    assert [entry[0] for entry in seen] == ["config", "images", "log", "images", "log"] and seen[0][1]["reward"] == "compress"
    pictures = seen[1][1]["samples"]
    assert pictures.shape == (16, 64, 64, 3) and 0 <= pictures.min() < pictures.max() <= 1 and seen[1][3] == {"dataformats": "NHWC"}
    assert [entry[2] for entry in seen if entry[0] == "log"] == [1, 2] and seen[2][1]["reward_mean"] == float(metrics(out)[0]["reward_mean"])


# -------------------------------------------------------------------------------------------------------------- rewards
def test_compress_is_the_size_of_the_jpeg_file(tmp_path):
    images = torch.rand(3, 3, 40, 56)
    images[1] = 1.0
    for i, image in enumerate(images):
        Image.fromarray(np.uint8(np.rint(image.permute(1, 2, 0).numpy() * 255))).save(tmp_path / f"{i}.jpg", quality=95)
    sizes = torch.tensor([(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(3)])
    prompts = [""] * 3
    torch.testing.assert_close(rewards.get_reward("compress")(images, prompts), -sizes)
    torch.testing.assert_close(rewards.get_reward("incompress")(images, prompts), sizes)
    assert sizes[1] < sizes[0]


def test_reward_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def redness(images, prompts):\n    return (images[:, 0].mean((1, 2)) * 10).int()\n")
    r = rewards.get_reward(f"{tmp_path}/mine.py:redness")(torch.stack([torch.ones(3, 4, 4), torch.zeros(3, 4, 4)]), ["a", "b"])
    assert r.tolist() == [10.0, 0.0] and r.dtype == torch.float32


NAMES = ["aesthetic", "clip", "pickscore", "align"]
PROMPTS = ["a cat", "a dog", "two red apples on a table", "owl", "a fox"]


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """Random models of the rewards' architectures, a few hundred kB, laid out as the hub has them: {key of HUB: folder}."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    root = tmp_path_factory.mktemp("hub")
    hub = {name: str(root / name) for name in rewards.HUB}
    words = "a cat dog two red apples on table owl fox The image contains USER Answer concisely what is going in this ASSISTANT : ? white bird runs".split()

    def tokenizer(start, end, template, image=(), **options):
        vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", *image, start, *words, end])}  # the end has the highest id, as CLIP's
        raw = Tokenizer(models.WordLevel(vocab, "<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        raw.post_processor = processors.TemplateProcessing(template, special_tokens=[(start, vocab[start]), (end, vocab[end])])
        return tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token=start, eos_token=end,
                                          additional_special_tokens=list(image), **options), len(vocab)

    def image_processor(**options):
        return tf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, **options)

    body = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(body, image_size=24, patch_size=6)
    torch.manual_seed(0)
    tokens, n = tokenizer("<s>", "</s>", "<s> $A </s>", model_max_length=8)
    for name, processor, own in (("clip", "clip", {}), ("pickscore", "pickscore-processor", {"image_mean": [0.1, 0.5, 0.9]})):
        text = dict(body, vocab_size=n, max_position_embeddings=8, eos_token_id=n - 1)
        clip = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20, initializer_factor=4.0))
        clip.save_pretrained(hub[name]), clip.config.save_pretrained(hub[processor])
        tf.CLIPProcessor(image_processor(**own), tokens).save_pretrained(hub[processor])
    tokens, n = tokenizer("<s>", "</s>", "<s> $A", ["<image>"])
    text = tf.LlamaConfig(**body, vocab_size=n, bos_token_id=3, eos_token_id=n - 1, pad_token_id=0, initializer_range=0.5)
    cfg = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**vision, initializer_factor=4.0), text_config=text, image_token_index=2, image_seq_length=16, initializer_range=0.5)
    tf.LlavaForConditionalGeneration(cfg).save_pretrained(hub["llava"])
    tf.LlavaProcessor(image_processor(), tokens, patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(hub["llava"])
    tokens, n = tokenizer("[CLS]", "[SEP]", "[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    cfg = tf.DebertaConfig(**dict(body, num_hidden_layers=3), vocab_size=n, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0, initializer_range=0.5)
    tf.DebertaModel(cfg).save_pretrained(hub["bert"])
    tokens.save_pretrained(hub["bert"])
    head = {f"layers.{i}.{k}": torch.randn(*((o, n) if k == "weight" else (o,))) * n**-0.5
            for i, n, o in ((0, 20, 16), (2, 16, 8), (4, 8, 8), (6, 8, 4), (7, 4, 1)) for k in ("weight", "bias")}
    Path(hub["aesthetic"]).mkdir()
    torch.save(head, Path(hub["aesthetic"]) / "aesthetic-model.pth")
    return hub


@pytest.fixture
def hub(small_models, monkeypatch):
    monkeypatch.setattr(rewards, "HUB", small_models)
    monkeypatch.setattr(rewards, "BERT_LAYER", 2)
    return small_models


def whole_pixels(B=5, H=24, W=36):
    """Pictures whose values are multiples of 1/255, and the same ones for Pillow; the crop is all that is left to CLIP's processor."""
    pixels = np.random.default_rng(0).integers(0, 256, (B, H, W, 3), dtype=np.uint8)
    pixels[:, :, :, 0] //= np.arange(1, B + 1, dtype=np.uint8)[:, None, None]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, [Image.fromarray(p) for p in pixels]


def cosines(model, processor, pictures):
    """Picture by picture through transformers alone: embeddings (B, E), logits (B,)."""
    from transformers import AutoProcessor, CLIPModel
    model, processor = CLIPModel.from_pretrained(model), AutoProcessor.from_pretrained(processor)
    with torch.no_grad():
        out = [model(**processor(text=[p], images=[i], truncation=True, return_tensors="pt")) for p, i in zip(PROMPTS, pictures)]
    return torch.cat([o.image_embeds for o in out]), torch.cat([o.logits_per_image[0] for o in out]), model.logit_scale.exp().item()


def test_clip_pixels_equal_the_image_processor_of_transformers():
    """Pillow rounds to bytes after each of its two passes, hence the tolerance of two grey levels."""
    from transformers import CLIPImageProcessorPil
    for H, W, size in ((64, 64, 224), (512, 384, 224), (45, 77, 24), (77, 45, 30)):
        smooth = torch.nn.functional.interpolate(0.05 + 0.9 * torch.rand(2, 3, 6, 6), (H, W), mode="bilinear")
        smooth = (smooth * 255).round() / 255
        theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        expected = theirs([Image.fromarray(np.uint8(np.rint(p.permute(1, 2, 0).numpy() * 255))) for p in smooth], return_tensors="pt")["pixel_values"]
        ours = rewards.clip_pixels(smooth, size, theirs.image_mean, theirs.image_std)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2 / 255 / min(theirs.image_std))


def test_clip_pickscore_and_aesthetic_equal_their_models_run_by_hand(hub):
    images, pictures = whole_pixels()
    embedding, logits, scale = cosines(hub["clip"], hub["clip"], pictures)
    cos = logits / scale
    assert (cos > 0.05).any() and cos.std() > 0.02
    torch.testing.assert_close(rewards.get_reward("clip")(images, PROMPTS), 2.5 * cos.clamp(min=0), rtol=1e-4, atol=1e-4)
    head = torch.nn.Module()
    head.layers = torch.nn.Sequential(*(m for n, o in ((20, 16), (16, 8), (8, 8)) for m in (torch.nn.Linear(n, o), torch.nn.Dropout())), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
    head.load_state_dict(torch.load(Path(hub["aesthetic"]) / "aesthetic-model.pth", weights_only=True))
    torch.testing.assert_close(rewards.get_reward("aesthetic")(images, PROMPTS), head.eval().layers(embedding)[:, 0].detach(), rtol=1e-4, atol=1e-4)
    _, logits, _ = cosines(hub["pickscore"], hub["pickscore-processor"], pictures)
    torch.testing.assert_close(rewards.get_reward("pickscore")(images, PROMPTS), logits, rtol=1e-4, atol=1e-3)


def test_the_embedded_clip_is_the_reward_clip_of_the_embedded_model(hub):
    """With --model tiny, `clip` is tiny/clip: equal to transformers' own model and processor, it knows right captions from wrong ones, and it adds up."""
    from transformers import CLIPModel, CLIPProcessor
    train, labels = make_tiny.training_pictures()
    images, prompts = train[::20], labels[::20]
    clip, processor = CLIPModel.from_pretrained(HERE / "tiny" / "clip", dtype=torch.float32), CLIPProcessor.from_pretrained(HERE / "tiny" / "clip")
    whole = [Image.fromarray(np.uint8(np.rint(p.permute(1, 2, 0).numpy() * 255))) for p in images]
    with torch.no_grad():
        out = clip(**processor(text=prompts, images=whole, padding=True, truncation=True, return_tensors="pt"))
    expected = 2.5 * (out.image_embeds * out.text_embeds).sum(1)
    score = rewards.get_reward("clip", "tiny")
    torch.testing.assert_close(score(images, prompts), expected.clamp(min=0), rtol=1e-3, atol=1e-3)
    assert (score(images, prompts) > score(images, prompts[1:] + prompts[:1]) + 0.2).float().mean() > 0.9
    torch.testing.assert_close(rewards.get_reward("compress:1,clip:0.5", "tiny")(images, prompts), rewards.compress(images, prompts) + 0.5 * score(images, prompts))
    assert make_tiny.retrieval(images, prompts, labels) >= 0.9
    assert not torch.equal(rewards.get_reward("clip")(images, prompts), score(images, prompts))  # another model's `clip` comes from the hub


def test_align_is_bertscore_recall_of_a_greedy_description(hub):
    """Description token by token, one picture at a time; recall in loops over tokens, on the second of the encoder's three layers."""
    from transformers import AutoModel, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
    images, pictures = whole_pixels()
    llava, processor = LlavaForConditionalGeneration.from_pretrained(hub["llava"]), AutoProcessor.from_pretrained(hub["llava"])
    bert, tokenizer = AutoModel.from_pretrained(hub["bert"]), AutoTokenizer.from_pretrained(hub["bert"])
    said, expected = [], []
    with torch.no_grad():
        for prompt, picture in zip(PROMPTS, pictures):
            given = processor(text="USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:", images=picture, return_tensors="pt")
            out, ids = llava(**given), []
            while len(ids) < 64 and llava.config.text_config.eos_token_id not in ids:
                ids.append(int(out.logits[0, -1].argmax()))
                out = llava(input_ids=torch.tensor([ids[-1:]]), past_key_values=out.past_key_values)
            said.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
            reference, candidate = ([v / v.norm() for v in bert(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]]
                                    for text in (f"The image contains {prompt}", said[-1]))
            recall = np.mean([max(float(r @ c) for c in candidate) for r in reference[1:-1]])
            expected.append(float(recall - 0.5170288) / (1 - 0.5170288))
    assert len(set(said)) > 2 and len({len(text.split()) for text in said}) > 1
    assert rewards.describe(images) == said
    torch.testing.assert_close(rewards.get_reward("align")(images, PROMPTS), torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_pictures_scores_as_its_parts_and_loads_its_models_once(hub, name):
    images, _ = whole_pixels(H=40, W=40)
    fn = rewards.get_reward(name)
    whole, loads = fn(images, PROMPTS), rewards.load.cache_info().misses
    for size in (1, 3):
        parts = torch.cat([fn(images[i : i + size], PROMPTS[i : i + size]) for i in range(0, 5, size)])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert rewards.load.cache_info().misses == loads and whole.std() > 0


def test_a_reward_model_leaves_a_gpu_whose_memory_is_short(monkeypatch):
    moves, asked = [], []
    fake = SimpleNamespace(to=lambda device: moves.append(device) or fake)
    monkeypatch.setattr(rewards, "load", lambda kind, source, **options: asked.append(options["dtype"]) or fake)
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    for device, free, expected in ((gpu, rewards.ROOM - 1, [gpu, "cpu"]), (gpu, rewards.ROOM + 1, [gpu])):
        moves.clear()
        monkeypatch.setattr(rewards, "free_gib", lambda device: free)
        with rewards.lent("CLIPModel", "x", device) as model:
            assert model is fake and moves == [gpu]
        assert moves == expected
    monkeypatch.undo()
    assert rewards.free_gib(cpu) == float("inf") and asked == [torch.float16] * 2


def test_sums_with_weights(tmp_path):
    (tmp_path / "mine.py").write_text("def redness(images, prompts):\n    return (images[:, 0].mean((1, 2)) * 10).int()\n")
    images, prompts = torch.rand(3, 3, 16, 16), [""] * 3
    size, red = rewards.jpeg_kilobytes(images), (images[:, 0].mean((1, 2)) * 10).int()
    for name, expected in (("compress:0.05", -0.05 * size), ("incompress:-2, compress", -3 * size),
                           (f"{tmp_path}/mine.py:redness:0.5,compress:1e-1", 0.5 * red - 0.1 * size), (f"compress,{tmp_path}/mine.py:redness", red - size)):
        torch.testing.assert_close(rewards.get_reward(name)(images, prompts), expected, msg=name)
    with pytest.raises(BadInput, match="'compress:1e39'.*must be finite"):
        rewards.get_reward("incompress,compress:1e39")(images, prompts)


def test_a_model_out_of_reach_is_named(hub, tmp_path, monkeypatch):
    images, pictures = whole_pixels()
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=f"^cannot load {tmp_path}/absent .*hub.*compress and incompress need no model$"):
        patch.setitem(hub, "clip", str(tmp_path / "absent"))
        rewards.get_reward("clip")(images, PROMPTS)
    (tmp_path / "aesthetic-model.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that would run a command
    monkeypatch.setitem(hub, "aesthetic", str(tmp_path))
    with pytest.raises(BadInput, match=f"^cannot load {tmp_path} "):
        rewards.get_reward("aesthetic")(images, PROMPTS)


def test_prompt_sets():
    animals, others, imagenet, active = (rewards.get_prompts(name) for name in ("animals", "other-animals", "imagenet-animals", "animals-activities"))
    assert [len(set(v)) for v in (animals, others, imagenet, active)] == [len(v) for v in (animals, others, imagenet, active)] == [45, 24, 398, 135]
    assert not set(animals) & set(others) and set(others) <= set(json.loads((HERE / "tiny" / "pictures.json").read_text())["labels"])
    index = {0: "tench", 1: "goldfish", 151: "Chihuahua", 207: "golden retriever", 281: "tabby", 340: "zebra", 388: "giant panda", 397: "puffer"}
    assert {i: imagenet[i] for i in index} == index and not any("," in name for name in imagenet)
    assert {"an ant riding a bike", "a dog playing chess", "a kangaroo washing dishes"} < set(active)


def test_prompts_from_a_file_and_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n\n  red apple \n")
    Path("my prompts").write_text("owl\n")
    assert rewards.get_prompts("p.txt") == ["a cat", "red apple"] and rewards.get_prompts("my prompts") == ["owl"]
    long = "a cat " * 200
    assert rewards.get_prompts("a cat") == ["a cat"] and rewards.get_prompts(long) == [long.strip()]
    for typo in ("promts.txt", "my promts.txt", "cat", " ", ""):
        with pytest.raises(BadInput, match="two words"):
            rewards.get_prompts(typo)


# ---------------------------------------------------------------------------------------------------- when things go wrong
def test_a_gradient_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(model):
    perturbed(model)
    cfg = replace(rlcm.resolve(Config(model="tiny", kl=0.0)), updates=2, micro_batch=4)
    s, c, roll = rolled(model, cfg)
    params = [p for p in model.unet.parameters() if p.requires_grad]
    before, optimizer = [p.detach().clone() for p in params], torch.optim.Adam(params, 1e-3)
    bad = torch.full((8,), float("nan"))
    log = update(model, cfg, Accelerator(cpu=True), optimizer, s, c, roll, bad, torch.ones(8))
    assert log["skipped"] == 2 and all(torch.equal(a, b) for a, b in zip(before, params))
    with pytest.raises(BadInput, match="ten gradients in a row"):
        update(model, cfg, Accelerator(cpu=True), optimizer, s, c, roll, bad, torch.ones(8), skipped=8)
    half = torch.cat([bad[:4], torch.ones(4)])  # the second step is sound again
    log = update(model, cfg, Accelerator(cpu=True), optimizer, s, c, roll, half, torch.ones(8), skipped=8)
    assert log["skipped"] == 0 and any(not torch.equal(a, b) for a, b in zip(before, params)) and all(p.isfinite().all() for p in params)


LINES = dict(model="tiny", steps=2, epochs=5, batch_size=4, micro_batch=4, save_every=1, kl=0.01)  # a run of a second or two


def trainee(settings, where=None, limit=None):
    """Target of a child process: a run or its resumption, which kills itself at the point `where`, or has a disk full after `limit` bytes a file."""
    sys.stdout = sys.stderr = open("/dev/null", "w")
    torch.set_num_threads(1)
    calls = {"n": 0}

    def dies(fn, before=0):
        def deadly(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == where[1]:
                if before:  # half of the file is written
                    args[1].write(b"x" * before)
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)
        return deadly

    if where and where[0] == "save":
        torch.save = dies(torch.save, before=1000)
    if where and where[0] == "replace":
        os.replace = dies(os.replace)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(rlcm.main([word for name, value in settings.items() for word in (f"--{name}", str(value))]) or 0)


@pytest.fixture(scope="session")
def spawn():
    """Starts `trainee` in a fresh process whose libraries are already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlcm", "accelerate", "diffusers", "peft", "transformers", "test_rlcm"])

    def start(*args):
        process = context.Process(target=trainee, args=args)
        process.start()
        return process

    return start


def values(run):
    return [[v for k, v in row.items() if k != "seconds"] for row in metrics(Path(run))]


def go_on(out):
    """--resume where there is a run, a new one where there is not (killed before its config was written)."""
    if (out / "config.json").exists():
        return {"resume": out}
    shutil.rmtree(out, ignore_errors=True)
    return {**LINES, "out": out}


def test_a_run_killed_at_twenty_moments_ends_as_the_one_left_alone(spawn, tmp_path):
    """SIGKILL inside saves (half-written checkpoint, before and between renames), while starting and in the midst of epochs; then resumed to the end."""
    alone, killed, rng, epochs = tmp_path / "alone", tmp_path / "killed", np.random.default_rng(0), 14
    undisturbed = spawn({**LINES, "epochs": epochs, "out": alone})
    saves = [("replace", 1), ("save", 1), ("replace", 3), ("replace", 5), ("save", 2), ("replace", 8), ("replace", 6), ("save", 1)]
    written = lambda: (killed / "metrics.csv").stat().st_mtime_ns
    for n in range(20):
        if n == len(saves):
            undisturbed.join()
            assert undisturbed.exitcode == 0
            an_epoch = float(metrics(alone)[-1]["seconds"]) / epochs
        before = written() if n > 1 else None
        process = spawn({**go_on(killed), "epochs": epochs}, saves[n] if n < len(saves) else None)
        if n < len(saves):
            where = f"inside call {saves[n][1]} of {'torch.save' if saves[n][0] == 'save' else 'os.replace'}"
            process.join()
        else:
            while n % 2 and written() == before and process.is_alive():  # every other run gets past its first epoch
                time.sleep(0.005)
            wait = rng.uniform(0, 1.5 * an_epoch)
            where = f"{wait:.2f} s after {'an epoch' if n % 2 else 'its start'}"
            process.join(wait)
            process.kill(), process.join()
        assert process.exitcode == -signal.SIGKILL
        print(f"kill {n + 1:2d} {where:32} {len(values(killed)) if n else 0:2d} of {epochs} epochs in metrics.csv")  # seen with -rP
    assert len(values(killed)) >= 6  # the kills did not all meet the same epoch
    process = spawn({**go_on(killed), "epochs": epochs})
    process.join()
    assert process.exitcode == 0
    assert values(alone) == values(killed) and same_weights(alone, killed)
    for picture in (alone / "samples").iterdir():
        assert picture.read_bytes() == (killed / "samples" / picture.name).read_bytes()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(spawn, tmp_path):
    out = tmp_path / "run"
    process = spawn({**LINES, "epochs": 1, "out": out})
    process.join()
    before = (out / "checkpoint" / "state.pt").read_bytes()
    process = spawn({"resume": out, "epochs": 3}, None, 100_000)
    process.join()
    assert process.exitcode == 2
    assert (out / "checkpoint" / "state.pt").read_bytes() == before
    process = spawn({"resume": out, "epochs": 2})
    process.join()
    assert process.exitcode == 0 and len(values(out)) == 2


def test_a_reward_that_turns_nan_is_named_and_the_last_checkpoint_is_intact(spawn, tmp_path):
    (tmp_path / "flaky.py").write_text("calls = []\ndef fn(images, prompts):\n    calls.append(1)\n    r = images.mean((1, 2, 3))\n    return r / 0 * 0 if len(calls) == 6 else r\n")
    out = tmp_path / "run"
    process = spawn({**LINES, "reward": f"{tmp_path}/flaky.py:fn", "out": out})  # calls: first grid, then rollout and grid of each epoch
    process.join()
    assert process.exitcode == 2 and len(values(out)) == 2
    assert len(rlcm.load_checkpoint(out / "checkpoint")["rows"]) == 2
    process = spawn({"resume": out, "epochs": 3})
    process.join()
    assert process.exitcode == 0 and len(values(out)) == 3


def test_ctrl_c_saves_and_resumes(spawn, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        process = spawn({**LINES, "save_every": 100, "epochs": 12, "out": out})
        if out == parts:
            while not (out / "metrics.csv").exists():
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode == (130 if out == parts else 0)
    assert 1 <= len(values(parts)) < 12 and (parts / "checkpoint" / "state.pt").exists()
    process = spawn({"resume": parts})
    process.join()
    assert process.exitcode == 0 and values(whole) == values(parts) and same_weights(whole, parts)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """The same run on one process and on two with half the batch each: same rewards, gradient norms and weights, to float tolerance."""
    command = "rlcm.py --model tiny --epochs 2 --batch-size 8 --micro-batch 4 --kl 0.01 --seed 3 --out".split()
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one = subprocess.run([sys.executable, *command, tmp_path / "one"], cwd=HERE, env=env, capture_output=True, text=True)
    two = subprocess.run([*launch, *command, tmp_path / "two"], cwd=HERE, env=env, capture_output=True, text=True)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        for name in ("reward_mean", "reward_std", "path_kl", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4, abs=1e-6), name
        assert float(b["ratio_drift"]) == 0.0
    from safetensors.torch import load_file
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert all((a[k] - b[k]).abs().max() <= 0.05 * a[k].abs().max() for k in a)  # Adam's first steps are signs: tiny gradients may differ


# ---------------------------------------------------------------------------------------------------------------- runs
def test_a_run_learns_and_stays_on_policy(run):
    rows = metrics(run)
    r = [float(row["reward_mean"]) for row in rows]
    assert len(rows) == 10 and all(float(row["ratio_drift"]) == 0.0 for row in rows)
    assert np.mean(r[-3:]) > np.mean(r[:3]) + 0.25 * float(rows[0]["reward_std"])
    assert float(rows[0]["path_kl"]) == 0.0 < float(rows[-1]["path_kl"])
    assert [int(row["reward_queries"]) for row in rows] == [48 * (i + 1) for i in range(10)]


def test_a_run_leaves_what_it_promises(run):
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.csv", "samples", "reward.png", "checkpoint", "pytorch_lora_weights.safetensors"}
    assert {p.name for p in (run / "samples").iterdir()} == {f"epoch-{e:04d}.png" for e in (0, 5, 10)}
    assert json.loads((run / "config.json").read_text())["versions"]["torch"].startswith("2.13.0")
    assert 0.3 < float(metrics(run)[-1]["likeness"]) < 0.999


def plain_pictures(lora, prompts):
    """What a user of diffusers gets: no code of this repository."""
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / "lcm", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    g = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=4, guidance_scale=GUIDANCE, generator=g, output_type="np").images


def test_lora_in_a_plain_pipeline_draws_the_runs_last_grid(run):
    prompts = rewards.ANIMALS[:16]
    tuned, base = plain_pictures(run, prompts), plain_pictures(None, prompts)
    assert np.abs(tuned - base).mean() > 0.005  # the LoRA does something
    sheet = np.asarray(Image.open(run / "samples" / "epoch-0010.png")).astype(float)
    for i, picture in enumerate(tuned):  # 8 columns of 128-pixel tiles, 18-pixel caption lines
        y, x = 18 + (i // 8) * 146, (i % 8) * 128
        mine = np.asarray(Image.fromarray(np.uint8(np.rint(picture * 255))).resize((128, 128), Image.LANCZOS)).astype(float)
        assert np.abs(sheet[y : y + 128, x : x + 128] - mine).max() <= 2


def same_weights(a, b):
    """Bit for bit; the file's header may order its entries differently."""
    from safetensors.torch import load_file
    a, b = (load_file(Path(run) / "pytorch_lora_weights.safetensors") for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_seed_fixes_a_run_and_the_adapter_starts_as_the_identity(tmp_path):
    a, b, c = (rlcm.train(Config(**{**SMALL, "steps": 2, "save_every": 100}, seed=seed, out=str(tmp_path / name))) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert values(a) == values(b) != values(c)
    assert same_weights(a, b) and not same_weights(a, c)
    assert float(values(a)[0][6]) == 0.0  # path KL of the first epoch


def test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    """A run of four epochs, and one stopped after two whose newest checkpoint is then damaged, so that it goes on from the first."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    rlcm.train(Config(**{**SMALL, "epochs": 4}, kl=0.01, out=whole))
    rlcm.train(Config(**{**SMALL, "epochs": 2}, kl=0.01, out=parts))
    (tmp_path / "parts" / "checkpoint" / "state.pt").write_bytes(b"damaged")
    assert rlcm.main(["--resume", parts, "--epochs", "4"]) is None
    assert values(whole) == values(parts)
    assert same_weights(whole, parts)
    for name in ("samples/epoch-0003.png", "samples/epoch-0004.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("method", ["ddpo", "score"])
def test_the_diffusion_methods_learn(method, tmp_path):
    """A reward that few pictures suffice for: darkness."""
    (tmp_path / "mine.py").write_text("def dark(images, prompts):\n    return -images.mean((1, 2, 3))\n")
    out = rlcm.train(Config(model="tiny", method=method, reward=f"{tmp_path}/mine.py:dark", steps=4, epochs=10, batch_size=24, micro_batch=24, lr=0.01, kl=0.0, save_every=100, out=str(tmp_path / "run")))
    rows = metrics(out)
    r = [float(row["reward_mean"]) for row in rows]
    assert all(float(row["ratio_drift"]) == 0.0 for row in rows)
    assert np.mean(r[-3:]) > np.mean(r[:3]) + 0.7 * float(rows[0]["reward_std"]), r


@pytest.mark.parametrize("method", ["ddpo", "score"])
def test_the_diffusion_methods_run_stay_on_policy_and_are_evaluated(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(figures.STEPS, "diffusion", (3,))
    monkeypatch.setattr(figures, "PICTURES", 4)
    out = tmp_path / method
    (tmp_path / "two.txt").write_text("a cat\nan owl\n")
    assert rlcm.main(f"--model tiny --method {method} --prompts {tmp_path}/two.txt --steps 3 --epochs 2 --batch-size 8 --micro-batch 4 --save-every 2 --out {out}".split()) is None
    assert [float(row["ratio_drift"]) for row in metrics(out)] == [0.0, 0.0] and float(metrics(out)[1]["path_kl"]) > 0
    capsys.readouterr()
    assert rlcm.main(["--evaluate", str(out), "--eval-prompts", str(tmp_path / "two.txt"), "--steps", "2"]) is None
    rows = list(csv.DictReader(open(out / "evaluation.csv")))
    assert {(row["sampler"], row["steps"]) for row in rows} == {(method, "1"), (method, "2"), (method, "3"), (method, "4"), ("dpm-solver++", "2")}
    assert {(row["weights"], row["prompts"]) for row in rows} == {("base", "training"), ("base", "held-out"), ("tuned", "training"), ("tuned", "held-out")}
    assert (out / "evaluation.png").exists() and capsys.readouterr().err == ""  # a quiet terminal


def test_evaluate_measures_what_a_plain_pipeline_draws(run, tmp_path, monkeypatch):
    monkeypatch.setitem(figures.STEPS, "lcm", (1, 4))
    (tmp_path / "one.txt").write_text("pizza\n")
    assert rlcm.main(["--evaluate", str(run), "--eval-prompts", str(tmp_path / "one.txt")]) is None
    row = next(row for row in csv.DictReader(open(run / "evaluation.csv")) if (row["steps"], row["weights"], row["prompts"]) == ("4", "tuned", "held-out"))
    pictures = torch.from_numpy(plain_pictures(run, ["pizza"] * 64)).permute(0, 3, 1, 2)
    r = rewards.compress(pictures, ["pizza"] * 64)
    assert float(row["reward"]) == pytest.approx(r.mean().item(), abs=0.003)
    assert float(row["standard_error"]) == pytest.approx(r.std().item() / 8, rel=0.02)
    (run / "evaluation.csv").unlink(), (run / "evaluation.png").unlink()


def test_curves_average_the_seeds(run, tmp_path, monkeypatch):
    """A run and a copy of it with another seed and all rewards one higher: one line, half a unit above the run's own."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.json").write_text((run / "config.json").read_text().replace('"seed": 0', '"seed": 1'))
    rows = [{**row, "reward_mean": float(row["reward_mean"]) + 1} for row in metrics(run)]
    rlcm.save_metrics(rows, other / "metrics.csv")
    plt = figures.pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)  # so that the test can read the axes
    assert rlcm.main(["--plot", str(run), str(other), "--out", str(tmp_path / "curves.png")]) is None
    queries = plt.gcf().axes[0]
    assert len(queries.lines) == 1 and (tmp_path / "curves.png").exists()
    assert queries.lines[0].get_xdata()[-1] == 480
    assert queries.lines[0].get_ydata()[-1] == pytest.approx(float(metrics(run)[-1]["reward_mean"]) + 0.5)


def test_full_parameter_training_starts_as_the_base_model_and_is_loaded_back(tmp_path):
    out = rlcm.train(Config(**{**SMALL, "lora_rank": 0, "lr": 1e-4, "kl": 0.01}, out=str(tmp_path / "full")))
    rows = metrics(out)
    assert float(rows[0]["path_kl"]) == 0.0 < float(rows[1]["path_kl"]) and float(rows[0]["ratio_drift"]) == 0.0
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    pipe = DiffusionPipeline.from_pretrained(HERE / "tiny" / "lcm", unet=UNet2DConditionModel.from_pretrained(out / "unet"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    tuned = pipe(["a cat"], num_inference_steps=4, guidance_scale=GUIDANCE, generator=[torch.Generator().manual_seed(0)], output_type="np").images[0]
    assert rlcm.main(["--sample", "a cat", "--load", str(out), "--out", str(tmp_path / "s.png")]) is None
    mine = np.asarray(Image.fromarray(np.uint8(np.rint(tuned * 255))).resize((128, 128), Image.LANCZOS)).astype(float)
    assert np.abs(np.asarray(Image.open(tmp_path / "s.png")).astype(float)[146:274] - mine).max() <= 2


def test_sample_draws_base_above_tuned(run, tmp_path, capsys):
    path = tmp_path / "pictures.png"
    assert rlcm.main(["--sample", "a cat", "pizza", "--load", str(run), "--out", str(path)]) is None
    sheet = np.asarray(Image.open(path)).astype(float)
    assert sheet.shape == (2 * 146, 2 * 128, 3) and str(path) in capsys.readouterr().out
    base, tuned = plain_pictures(None, ["a cat", "pizza"]), plain_pictures(run, ["a cat", "pizza"])
    for row, pictures in enumerate((base, tuned)):
        for i, picture in enumerate(pictures):
            mine = np.asarray(Image.fromarray(np.uint8(np.rint(picture * 255))).resize((128, 128), Image.LANCZOS)).astype(float)
            assert np.abs(sheet[row * 146 : row * 146 + 128, i * 128 : i * 128 + 128] - mine).max() <= 2


def test_likeness():
    a = torch.rand(4, 3, 8, 8)
    assert figures.likeness(a, a) == pytest.approx(1.0, abs=1e-5)
    assert figures.likeness(torch.ones(4, 3, 8, 8), a) == 0.0
    assert abs(figures.likeness(torch.rand(64, 3, 32, 32), torch.rand(64, 3, 32, 32))) < 0.05


def test_tiny_draws_what_it_is_asked_for(model):
    """A sample of tiny/README.md's quality number: the nearest training picture carries the caption."""
    train, labels = make_tiny.training_pictures()
    captions = make_tiny.fixed_captions(labels)[:64]
    from diffusers import DiffusionPipeline
    pictures = make_tiny.draw(DiffusionPipeline.from_pretrained(HERE / "tiny" / "lcm", dtype=torch.float32), captions, num_inference_steps=4, guidance_scale=GUIDANCE)
    assert make_tiny.nearest_accuracy(pictures, captions, train, labels) >= 0.75
    assert make_tiny.retrieval(pictures, captions, labels) >= 0.65
    size = lambda folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "work" not in p.parts)
    assert size(HERE / "tiny") <= 34e6 and size(HERE / "tiny" / "clip") <= 4e6


# ------------------------------------------------------------------------------------------------------------ bad input
REWARD_FILE = """
import torch
def nan(images, prompts): return torch.tensor([float("nan")] * len(prompts))
def shape(images, prompts): return torch.zeros(len(prompts), 2)
def scalar(images, prompts): return 1.0
def raises(images, prompts): raise RuntimeError("no")
def text(images, prompts): return "five"
value = 3
"""

BAD = {  # arguments: what the message must name
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
    "--reward compress:": "not a finite number",
    "--reward compress:much": "'much' of reward 'compress'",
    "--reward compress:1,incompress:nan": "'nan' of reward 'incompress'",
    "--reward rewards_.py:raises:inf": "'inf' of reward 'rewards_.py:raises'",
    "--steps 0": "between 2 and 50",
    "--steps 1": "no random transition",
    "--steps 51": "between 2 and 50",
    "--steps four": "invalid int value",
    "--epochs 0": "--epochs 0",
    "--epochs -3": "--epochs -3",
    "--batch_size 0": "--batch-size 0",
    "--batch-size 10 --updates 3": "does not divide",
    "--lr nan": "--lr nan",
    "--lr -1": "--lr -1",
    "--kl -0.1": "--kl -0.1",
    "--kl inf": "--kl inf",
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
    "--lcm-lora nowhere": "cannot load the model nowhere",
    "--lcm-lora nowhere --method score": "goes with --method rlcm",
    "--rew compress": "--rew",
    "--nonsense": "--nonsense",
    "stray": "stray",
    "--model no/such-model": "--model tiny",
    "--model emptydir": "--model tiny",
    "--model prompts.txt": "--model tiny",
    "--prompts empty.txt": "is empty",
    "--prompts nowhere.txt": "one prompt a line",
    "--prompts binary.bin": "one prompt a line",
    "--prompts emptydir": "one prompt a line",
    "--out full": "not an empty folder",
    "--out prompts.txt": "not an empty folder",
    "--out /proc/nowhere/run": "No such file",
    "--sample cat --load nowhere": "not a run directory",
    "--sample cat --load half": "no weights in half",
    "--sample cat --evaluate half": "two commands",
    "--evaluate nowhere": "not a run directory",
    "--evaluate half": "no weights in half",
    "--evaluate half --eval-prompts nowhere.txt": "nowhere.txt",
    "--plot nowhere": "not a run directory",
    "--plot half": "no readable metrics.csv",
    "--load full": "--sample",
    "--resume nowhere": "not a run directory",
    "--resume full": "not a run directory",
    "--resume half": "no readable checkpoint",
    "--resume half --lr 0.1": "--lr cannot change",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_status_two_and_nothing_written(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_.py").write_text(REWARD_FILE)
    (tmp_path / "broken.py").write_text("def fn(:\n")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x81")
    for folder in ("emptydir", "full", "half"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "half" / "checkpoint").mkdir()
    (tmp_path / "half" / "checkpoint" / "state.pt").write_bytes(b"damaged")
    (tmp_path / "half" / "config.json").write_text(json.dumps(asdict(Config(model="tiny"))))
    before = sorted(str(p) for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
    given = arguments.split()
    assert rlcm.main(given if "--model" in given or "--resume" in given else given + ["--model", "tiny"]) == 2
    err = capsys.readouterr().err
    print(f"{arguments:50} {err}")  # seen with -rP
    assert err.count("\n") == 1 and err.startswith("rlcm.py: ") and BAD[arguments] in err
    assert sorted(str(p) for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before


def test_the_command_line_itself(tmp_path):
    """As a user types it: quiet, one line on stderr, status 2; and --help lists the rewards."""
    bad = subprocess.run([sys.executable, HERE / "rlcm.py", "--reward", "nope"], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    help_ = subprocess.run([sys.executable, HERE / "rlcm.py", "--help"], capture_output=True, text=True)
    assert help_.returncode == 0 and all(name in help_.stdout for name in rewards.REWARDS) and help_.stderr == ""
