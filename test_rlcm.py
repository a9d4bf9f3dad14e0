"""Tests of rlcm.py and rewards.py against independent computations: python -m pytest -q test_rlcm.py"""
import csv
import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import rewards
import rlcm
from rewards import BadInput
from rlcm import Config, METHODS, advantages, at, gaussian_kl, log_prob, policy_loss, rlcm_policy, rlcm_readout, rlcm_schedule, rollout, update

HERE = Path(__file__).resolve().parent
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
    assert rlcm.main(f"--model tiny --epochs 10 --batch_size 48 --micro_batch 24 --save_every 5 --seed 0 --out {out}".split()) is None
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


class GaussianLCM:
    """Data N(theta, 1): the consistency function of the probability-flow ODE is f(x, t) = theta + (x - sqrt(ab) theta), as ab + 1 - ab = 1.

    `eps` is the network that makes the program's own parametrisation produce this f. Everything is linear, so the mean of the
    sample is a closed form in theta. D = 1.
    """
    def __init__(self, scheduler, steps, theta):
        self.s, self.theta, self.unet = rlcm_schedule(scheduler, steps, "cpu"), torch.nn.Parameter(torch.tensor(theta)), None
        self.frozen = False

    def eps(self, x, t, c):
        ab, c_skip, c_out = (at(v, torch.searchsorted(-self.s.t, -t)) for v in (self.s.ab, self.s.c_skip, self.s.c_out))  # k of each t
        theta = self.theta.detach() if self.frozen else self.theta
        x_0 = (theta + x - ab.sqrt() * theta - c_skip * x) / c_out
        return (x - ab.sqrt() * x_0) / (1 - ab).sqrt()

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("algo, steps", [("ppo", 2), ("reinforce", 4), ("ppo", 4)])
def test_policy_gradient_is_unbiased_on_gaussian_data(lcm_scheduler, algo, steps):
    """Monte-Carlo gradient of E[r], r = -(x - 2)^2 / 2, against the closed form, through rollout and update themselves.

    The last evaluation is no action, so its theta is a constant: x_{k+1} = sqrt(ab') f(x_k) + sqrt(1 - ab') z is linear,
    mean and derivative of the mean follow by recursion, and the variance does not depend on theta.
    """
    theta, N, repeats = 0.3, 4096, 40
    m = GaussianLCM(lcm_scheduler, steps, theta)
    root = m.s.ab.double().sqrt()
    mu, dmu = torch.zeros(()).double(), torch.zeros(()).double()
    for k in range(steps - 1):
        mu, dmu = root[k + 1] * (theta * (1 - root[k]) + mu), root[k + 1] * ((1 - root[k]) + dmu)
    mean, dmean = theta * (1 - root[-1]) + mu, dmu  # of the picture; f of the last evaluation has slope 1 in x
    exact = -(mean - 2) * dmean  # dE[r] / dtheta
    cfg = replace(rlcm.resolve(Config(model="tiny", algo=algo, steps=steps, kl=0.0)), micro_batch=N, max_grad_norm=1e9)
    accelerator, estimates = Accelerator(cpu=True), []
    m.unet = torch.nn.Identity()
    for i in range(repeats):
        m.theta.data.fill_(theta)
        z = torch.randn(steps, N, 1, 1, 1, generator=torch.Generator().manual_seed(i))
        pictures = []
        roll = rollout(m, "rlcm", m.s, torch.zeros(N, 1, 1), z, N, on_pictures=lambda images, b: pictures.append(images))
        r = -((torch.cat(pictures).flatten() - 2) ** 2) / 2
        update(m, cfg, accelerator, torch.optim.SGD([m.theta], 1.0), m.s, torch.zeros(N, 1, 1), roll, r - r.mean(), torch.ones(N))
        estimates.append((m.theta.item() - theta) * (steps - 1))  # the loss averages over the T actions
    estimates = torch.tensor(estimates, dtype=torch.double)
    error = estimates.std() / repeats**0.5
    assert error < 0.1 * exact.abs()
    assert (estimates.mean() - exact).abs() < 3.5 * error, (estimates.mean(), exact, error)


def test_kl_gradient_is_the_closed_form(lcm_scheduler):
    """With zero advantage the update moves theta by lambda * d/dtheta mean_k KL_k; KL_k = ab' (1 - sqrt ab)^2 (theta - theta_pre)^2 / (2 (1 - ab'))."""
    theta, pre, N, steps = 0.7, 0.2, 16, 4
    m = GaussianLCM(lcm_scheduler, steps, pre)
    z = torch.randn(steps, N, 1, 1, 1)
    roll = rollout(m, "rlcm", m.s, torch.zeros(N, 1, 1), z, N)
    roll.mean_pre = torch.stack([rlcm_policy(m.eps, roll.x[k], torch.full((N,), k), None, m.s)[0].detach() for k in range(steps - 1)])
    m.theta.data.fill_(theta)
    m.unet = torch.nn.Identity()
    cfg = replace(rlcm.resolve(Config(model="tiny", kl=2.0)), micro_batch=N, max_grad_norm=1e9)
    update(m, cfg, Accelerator(cpu=True), torch.optim.SGD([m.theta], 1.0), m.s, torch.zeros(N, 1, 1), roll, torch.zeros(N), torch.full((N,), 3.0))
    ab = m.s.ab.double()
    slope = sum(ab[k + 1] * (1 - ab[k].sqrt()) ** 2 * (theta - pre) / (1 - ab[k + 1]) for k in range(3)) / 3
    assert theta - m.theta.item() == pytest.approx(2.0 * 3.0 * slope.item(), rel=1e-3)


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


def test_advantages_of_rare_prompts_use_the_batch_and_are_clipped():
    r = torch.tensor([0.0, 1.0, 2.0, 100.0])
    A, _ = advantages(r, ["a", "b", "c", "d"], {}, 16, 2, 1.5)
    expected = ((r - r.mean()) / r.std(correction=0)).clamp(-1.5, 1.5)
    torch.testing.assert_close(A, expected, atol=1e-5, rtol=0)
    assert A.max() == 1.5


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


def test_prompt_sets(tmp_path):
    assert len(rewards.get_prompts("animals")) == len(set(rewards.get_prompts("animals"))) == 45
    (tmp_path / "p.txt").write_text("a cat\n\n  red apple \n")
    assert rewards.get_prompts(str(tmp_path / "p.txt")) == ["a cat", "red apple"]


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
    return pipe(prompts, num_inference_steps=4, guidance_scale=json.loads((lora / "config.json").read_text())["guidance"] if lora else 3.0, generator=g, output_type="np").images


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
    values = lambda p: [[v for k, v in row.items() if k != "seconds"] for row in metrics(p)]
    a, b, c = (rlcm.train(Config(**SMALL, seed=seed, out=str(tmp_path / name))) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
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
    values = lambda p: [[v for k, v in row.items() if k != "seconds"] for row in metrics(Path(p))]
    assert values(whole) == values(parts)
    assert same_weights(whole, parts)
    for name in ("samples/epoch-0003.png", "samples/epoch-0004.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


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
    assert rlcm.likeness(a, a) == pytest.approx(1.0, abs=1e-5)
    assert rlcm.likeness(torch.ones(4, 3, 8, 8), a) == 0.0
    assert abs(rlcm.likeness(torch.rand(64, 3, 32, 32), torch.rand(64, 3, 32, 32))) < 0.05


def test_tiny_draws_what_it_is_asked_for(model):
    """A sample of tiny/README.md's quality number: the nearest training picture carries the caption."""
    sys.path.insert(0, str(HERE / "tiny"))
    import make_tiny
    train, labels = make_tiny.training_pictures()
    captions = make_tiny.fixed_captions(labels)[:64]
    from diffusers import DiffusionPipeline
    pictures = make_tiny.draw(DiffusionPipeline.from_pretrained(HERE / "tiny" / "lcm", dtype=torch.float32), captions, num_inference_steps=4, guidance_scale=3.0)
    assert make_tiny.nearest_accuracy(pictures, captions, train, labels) >= 0.75
    assert sum(p.stat().st_size for p in (HERE / "tiny").rglob("*") if p.is_file() and "work" not in p.parts) <= 32e6


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
    "--lora_rank 0": "--lora-rank 0",
    "--method sarsa": "invalid choice",
    "--algo a2c": "invalid choice",
    "--precision int8": "invalid choice",
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
    "--sample cat --load nowhere": "not a run directory",
    "--sample cat --load half": "no pytorch_lora_weights.safetensors",
    "--load full": "--sample",
    "--resume nowhere": "not a run directory",
    "--resume full": "not a run directory",
    "--resume half": "no readable checkpoint",
    "--resume half --lr 0.1": "--lr cannot change",
    "--min-count 99": "no prompt would ever reach it",
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
    (tmp_path / "half" / "config.json").write_text(json.dumps(asdict(Config(model="tiny"))))
    before = sorted(str(p) for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
    given = arguments.split()
    assert rlcm.main(given if "--model" in given or "--resume" in given else given + ["--model", "tiny"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("rlcm.py: ") and BAD[arguments] in err
    assert sorted(str(p) for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before


def test_the_command_line_itself(tmp_path):
    """As a user types it: quiet, one line on stderr, status 2; and --help lists the rewards."""
    bad = subprocess.run([sys.executable, HERE / "rlcm.py", "--reward", "nope"], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    help_ = subprocess.run([sys.executable, HERE / "rlcm.py", "--help"], capture_output=True, text=True)
    assert help_.returncode == 0 and all(name in help_.stdout for name in rewards.REWARDS) and help_.stderr == ""
