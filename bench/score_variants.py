"""Which value function, which kernel, which loss for --method score? Trials on the embedded model; tables.

    python bench/score_variants.py --kernels      # base model: reward and recognition, by kernel and steps
    python bench/score_variants.py                # trains the ways below, seeds 0 1 2, and prints their table
    python bench/score_variants.py --ways base mc --seeds 0 --reward clip --steps 6 --lr 0.005
    python bench/score_variants.py --table        # the table of the runs that are there
    python bench/score_variants.py --steps 6 --halved --ways line ddpo   # tuned in 6, drawn in 3, 6, 12

A way is trained by rlcm.train, some functions replaced: tiny's preset for the method (--steps, --lr: other
settings), no KL, 20 epochs at most. From epoch 4 every second epoch is judged by the 200 fixed captions of
bench/recognise.py; an accuracy below 0.9 ends the run. Judgements go to OUT/WAY-REWARD-SEED/variants.csv, the
LoRAs beside it. 2 to 4 minutes a run on one core; a complete run is not run again. Ways:

base        rlcm.py without --value: advantage = the reward, standardised by prompt
line        rlcm.py with --value: less V_k = a_k + b_k r, the least squares of this rollout's rewards
euler       the kernel of before: Euler-Maruyama, mean x + std^2 (x / 2 + a), std^2 = the integral of beta
mc          advantage = the standardised reward less V(t_k, x_k)
td          advantage = V(t_{k+1}, x_{k+1}) - V(t_k, x_k), with V = the standardised reward at the end
mc-dt       mc, td with the martingale loss sum_k (R - V_k)^2 weighted by the length of the step in t, as the
td-dt       integral over time would be; else uniform in k, as in the authors' code
td-std      td, then standardised over the batch for each k, as in the authors' code
ddpo        --method ddpo

V = cos(pi t / 2T) r(clean picture that the network predicts at x, c) + sin(pi t / 2T) F(t, x, c), as in
github.com/hanyang1999/ContTimeRL4DM, all in rewards standardised by prompt; r costs a decode and a reward a
state, and no pass of the network. F is a small convolutional network of latent, time and prompt. It starts
from four rollouts of the base model; then V is used before it is fitted to the same pictures.

Columns: reward, retrieval (tiny/clip) and passes of the network (32 rows; guidance two, a backward two) where
the accuracy (nearest training picture) falls to 0.95 and to 0.9, by linear interpolation between judged
epochs; processor seconds of an epoch. Mean and, in brackets, each seed. Below, every judged epoch, and what
share of the variance of the standardised rewards V explains at each k: 1 - E (R - V_k)^2 / Var R.
"""

import argparse
import csv
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import rewards
import rlcm
from bench.frontier import crossing
from bench.recognise import measure
from tiny import make_tiny

WAYS = "base", "line", "mc", "td", "mc-dt", "td-dt", "td-std", "euler", "ddpo"
COLUMNS = "accuracy", "animals", "retrieval", "blank", "kB", "reward"
EPOCHS, FIRST, STOP, WARM_UP = 20, 4, 0.9, 4


# ---- kernels
def euler_schedule(scheduler, H, device):
    """rlcm's grid; std^2 is the integral of beta over the step."""
    s = rlcm.score_schedule(scheduler, H, device)
    s.std = (s.ab_next / s.ab).log().sqrt()
    return s


def euler_policy(eps, x, k, c, s):
    ab, std = rlcm.at(s.ab, k), rlcm.at(s.std, k)
    a = -eps(x, s.t[k], c) / (1 - ab).sqrt()
    return x + std**2 * (x / 2 + a), std


def wide_schedule(scheduler, H, device):
    """rlcm's grid and exact mean; std of the forward process, not of the one conditioned on the data."""
    s = rlcm.score_schedule(scheduler, H, device)
    s.std = (1 - s.ab / s.ab_next).sqrt()
    return s


KERNELS = {
    "Euler-Maruyama": (euler_schedule, euler_policy),
    "exact mean, std^2 = 1 - rho": (wide_schedule, rlcm.score_policy),
    "exact mean, eta = 1 (rlcm.py)": (rlcm.score_schedule, rlcm.score_policy),
}


def judge(model, cfg, captions, data, steps):
    """-> reward, accuracy, retrieval of pictures in so many steps."""
    images = rlcm.draw(model, cfg, captions, steps).cpu()
    r = rewards.get_reward(cfg.reward, cfg.model)(images, captions).mean().item()
    accuracy = make_tiny.nearest_accuracy(images, captions, *data)
    return r, accuracy, make_tiny.retrieval(images, captions, data[1])


def kernels(data):
    captions = make_tiny.fixed_captions(data[1])
    print(f"{'base model':30}" + "".join(f"{f'{n} steps: reward  acc  retr':>30}" for n in (3, 6, 12)))
    for name in [*KERNELS, "ddpo"]:
        cfg = rlcm.configure(model="tiny", method="ddpo" if name == "ddpo" else "score")
        model = rlcm.load_model(cfg)
        with patch.dict(rlcm.METHODS, {cfg.method: KERNELS.get(name, rlcm.METHODS["ddpo"])}):
            cells = [judge(model, cfg, captions, data, n) for n in (3, 6, 12)]
        print(f"{name:30}" + "".join(f"{r:18.3f} {a:5.3f} {q:5.3f}" for r, a, q in cells), flush=True)


# ---- value function
class Value(torch.nn.Module):
    """V(t, x, c) of states x (n, C, h, w), t (n,), c (n, L, E), with r (n,) of their predicted pictures."""

    def __init__(self, channels, embedding, width=48):
        super().__init__()
        self.first = torch.nn.Conv2d(channels, width, 3, padding=1)
        layers = torch.nn.Linear(embedding + 2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2 * width)
        self.condition = torch.nn.Sequential(*layers)
        self.second = torch.nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.last = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.last.weight)

    def forward(self, x, t, c, r):
        cos, sin = (torch.pi / 2 * t / 1000).cos(), (torch.pi / 2 * t / 1000).sin()
        time_and_prompt = torch.cat([c.mean(1), cos[:, None], sin[:, None]], 1)
        scale, shift = self.condition(time_and_prompt)[:, :, None, None].chunk(2, 1)
        h = torch.nn.functional.silu(self.first(x) * (1 + scale) + shift)
        h = torch.nn.functional.silu(self.second(h)).mean((2, 3))
        return cos * r + sin * self.last(h)[:, 0]


@torch.no_grad()
def frozen_rewards(run, roll, prompts):
    """Rewards of the clean pictures that the network predicts at each state: (H, B). No pass of the network:
    the mean of the next state holds the score."""
    s, r = run.s, []
    for k in range(len(s.std)):
        a = (roll.mean[k] * (s.ab[k] / s.ab_next[k]).sqrt() - roll.x[k]) / (1 - s.ab[k] / s.ab_next[k])
        clean = (roll.x[k] + (1 - s.ab[k]) * a) / s.ab[k].sqrt()
        r.append(run.reward_fn(rlcm.decode(run.model.pipe, clean), prompts))
    return torch.stack(r)


def scales(R, prompts, history, size, min_count):
    """Mean and std (B,) by which rlcm.advantages has just standardised R."""
    seen = [history[prompt] for prompt in prompts]
    seen = [torch.tensor(h).double() if len(h) >= min(min_count, size) else R.double() for h in seen]
    return torch.stack([h.mean() for h in seen]), torch.stack([h.std(correction=0) + 1e-6 for h in seen])


class Critic:
    """Stands in for rlcm.collect and rlcm.advantages."""

    def __init__(self, way):
        self.way, self.value, self.explained = way, None, []
        self.rlcm_collect, self.rlcm_advantages = rlcm.collect, rlcm.advantages

    def start(self, run):
        """The first V: fitted to rollouts of the base model."""
        cfg, H, g = run.cfg, len(run.s.std), torch.Generator().manual_seed(run.cfg.seed + 10**6)
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            self.value = Value(run.model.shape[0], run.embedding.shape[2])
        self.optimizer, history = torch.optim.Adam(self.value.parameters(), 2e-3), {}
        for _ in range(WARM_UP):
            index = torch.randint(len(run.prompts), (cfg.batch_size,), generator=g)
            prompts = [run.prompts[i] for i in index]
            z = torch.randn(H + 1, cfg.batch_size, *run.model.shape, generator=g)
            roll = self.collect(run, prompts, index, z)
            R = roll.scores[:, 0, : len(run.reward_fn.names)].sum(1)
            self.advantages(R, prompts, history, cfg.buffer_size, cfg.min_count, cfg.adv_clip)

    def collect(self, run, prompts, index, z):
        if self.value is None:
            self.start(run)
        roll = self.rlcm_collect(run, prompts, index, z)
        self.s, self.roll, self.frozen = run.s, roll, frozen_rewards(run, roll, prompts)
        return roll

    def advantages(self, R, prompts, history, size, min_count, clip, guess=None):
        """-> A (B, H), of which rlcm.train then takes its share: all, in one process."""
        A = self.rlcm_advantages(R, prompts, history, size, min_count, clip)
        mean, std = scales(R, prompts, history, size, min_count)
        assert torch.allclose(A, ((R - mean) / std).clamp(-clip, clip).float(), atol=1e-4)
        r = ((self.frozen - mean) / std).float()  # (H, B)
        V = self.network(r, A)
        self.explained.append((1 - (A - V).square().mean(1) / A.var()).tolist())
        A = torch.cat([V[1:], A[None]]) - V if self.way.startswith("td") else A - V
        if self.way == "td-std":
            A = (A - A.mean(1, keepdim=True)) / (A.std(1, keepdim=True) + 1e-8)
        return A.clamp(-clip, clip).T

    def network(self, r, R):
        """-> V (H, B), before it is fitted to these."""
        H, B = r.shape
        states = self.roll.x[:-1].flatten(0, 1), self.s.t.repeat_interleave(B), self.roll.c.repeat(H, 1, 1)
        states = *states, r.flatten()
        with torch.no_grad():
            V = self.value(*states).view(H, B)
        self.fit(states, R.repeat(H))
        return V

    def fit(self, states, R):
        """The martingale loss, 4 times over the states of a rollout."""
        dt = self.s.t - torch.cat([self.s.t[1:], torch.zeros(1)])
        weight = (dt / dt.mean()).repeat_interleave(len(R) // len(dt))
        weight = weight if self.way.endswith("-dt") else torch.ones_like(weight)
        for _ in range(4):
            for i in torch.randperm(len(R), generator=torch.Generator().manual_seed(0)).split(64):
                V = self.value(*(v[i] for v in states))
                (weight[i] * (R[i] - V) ** 2).mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()


# ---- runs
def train(way, reward, seed, out, data, **given):
    """A run that is judged on the way; variants.csv appears when it is complete."""
    captions, record, rows, judging = make_tiny.fixed_captions(data[1]), rlcm.record, [], [0.0]
    critic = Critic(way) if way[:2] in ("mc", "td") else None

    def judged(run, epoch, scores, kl, log, halt):
        if epoch >= FIRST and epoch % 2 == 0:
            began = time.process_time()
            row = {"epoch": epoch, "seconds": began - sum(judging)}
            each = 64 // 32 * cfg.steps * 2  # passes of a rollout, guidance two; an update is three of them
            row["passes"] = each * (4 * epoch + (WARM_UP if critic and critic.value else 0))
            row |= dict(zip(COLUMNS, measure(run.model, run.cfg, captions, data)))
            explained = np.mean(critic.explained[-FIRST:], 0) if critic else []
            rows.append(row | {f"explained_{k}": value for k, value in enumerate(explained)})
            rlcm.save_weights(run.model.pipe, out / f"epoch-{epoch}")
            rlcm.save_metrics(rows, out / "partial.csv")
            halt = halt or row["accuracy"] < STOP
            judging.append(time.process_time() - began)
            print(way, reward, seed, *(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
        return record(run, epoch, scores, kl, log, halt)

    method = "ddpo" if way.startswith("ddpo") else "score"
    settings = dict(epochs=EPOCHS, min_likeness=0.0, save_every=1000, out=str(out), value=way == "line")
    settings |= given
    cfg = rlcm.configure(model="tiny", method=method, reward=reward, seed=seed, **settings)
    with ExitStack() as stack:
        stack.enter_context(patch.object(rlcm, "record", judged))
        if way == "euler":
            stack.enter_context(patch.dict(rlcm.METHODS, score=KERNELS["Euler-Maruyama"]))
        if critic:
            stack.enter_context(patch.multiple(rlcm, collect=critic.collect, advantages=critic.advantages))
        rlcm.train(cfg)
    (out / "partial.csv").rename(out / "variants.csv")


def read(out, way, reward, seed):
    """-> rows, or none where the run is not complete."""
    path = out / f"{way}-{reward}-{seed}" / "variants.csv"
    if not path.exists():
        return []
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(open(path))]


def summary(values, digits=3):
    each = " ".join(f"{value:.{digits}f}" for value in values)
    return f"{np.mean(values):.{digits}f} ({each})"


def table(args):
    titles = [f"{name} at {at}" for at in ("0.95", "0.9") for name in ("reward", "retrieval", "passes")]
    print(f"{args.reward:8}" + "".join(f"{title:>29}" for title in [*titles, "s an epoch"]))
    for way in args.ways:
        members = [rows for rows in (read(args.out, way, args.reward, seed) for seed in args.seeds) if rows]
        if members:
            cells = []
            for at in (np.array([crossing(rows, accuracy) for rows in members]) for accuracy in (0.95, 0.9)):
                until = [
                    np.interp(epoch, *([row[v] for row in rows] for v in ("epoch", "passes")))
                    for epoch, rows in zip(at[:, 2], members)
                ]
                cells += [summary(at[:, 0]), summary(at[:, 1]), summary(until, 0)]
            seconds, epochs = ([rows[-1][v] - rows[0][v] for rows in members] for v in ("seconds", "epoch"))
            cells += [summary(np.divide(seconds, epochs), 1)]  # without the start
            print(f"{way:8}" + "".join(f"{cell:>29}" for cell in cells))
    print(f"\n{'each judged epoch':>18}  reward accuracy retrieval   explained, k = 0, 1 ..")
    for way in args.ways:
        for seed in args.seeds:
            for row in read(args.out, way, args.reward, seed):
                line = f"{way:8} {seed} {row['epoch']:7.0f}  {row['reward']:6.3f}    {row['accuracy']:.3f}"
                explained = "".join(f"{v:6.2f}" for name, v in row.items() if name.startswith("explained"))
                print(f"{line}     {row['retrieval']:.3f}  {explained}")


def halved(args, data):
    """Runs of both methods at the judged epoch whose reward is nearest to --at, in other numbers of steps."""
    captions = make_tiny.fixed_captions(data[1])
    print(f"{'':16} epoch" + "".join(f"{f'{n} steps: reward  acc  retr':>30}" for n in (3, 6, 12)), end="")
    print("   lost in 3, in 12: reward, accuracy")
    for way, seed in [(way, seed) for way in args.ways for seed in [None, *args.seeds]]:
        method, epoch = ("ddpo" if way.startswith("ddpo") else "score"), 0
        cfg = rlcm.configure(model="tiny", method=method, reward=args.reward, kl=0.0, **args.given)
        model = rlcm.load_model(cfg)
        if seed is not None:
            rows = read(args.out, way, args.reward, seed)
            if not rows:
                continue
            epoch = int(min(rows, key=lambda row: abs(row["reward"] - args.at))["epoch"])
            rlcm.load_weights(model, args.out / f"{way}-{args.reward}-{seed}" / f"epoch-{epoch}")
        cells = [judge(model, cfg, captions, data, n) for n in (3, 6, 12)]
        print(f"{way:10} {'model' if seed is None else seed:5} {epoch:5}", end="")
        print("".join(f"{r:18.3f} {a:5.3f} {q:5.3f}" for r, a, q in cells), end="   ")
        (r3, a3, _), (r6, a6, _), (r12, a12, _) = cells
        print(f"{r6 - r3:6.3f} {a6 - a3:6.3f} {r6 - r12:6.3f} {a6 - a12:6.3f}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--reward", default="compress")
    p.add_argument("--steps", type=int, help="default: tiny's preset")
    p.add_argument("--lr", type=float, help="likewise")
    p.add_argument("--out", type=Path, default=Path("runs/score-variants"))
    p.add_argument("--table", action="store_true", help="do not train")
    p.add_argument("--kernels", action="store_true", help="only the base model's table")
    p.add_argument("--halved", action="store_true", help="do not train, only draw in 3, 6, 12 steps")
    p.add_argument("--at", type=float, default=-2.25, help="reward of the runs that --halved compares")
    args = p.parse_args()
    args.given = {name: v for name, v in (("steps", args.steps), ("lr", args.lr)) if v is not None}
    rlcm.quiet()
    data = make_tiny.training_pictures()
    if args.kernels:
        return kernels(data)
    if args.halved:
        return halved(args, data)
    for seed in args.seeds:
        for way in args.ways:
            out = args.out / f"{way}-{args.reward}-{seed}"
            if not (out / "variants.csv").exists() and not args.table:
                if out.exists():
                    raise rewards.BadInput(f"{out} was stopped half-way: remove it")
                train(way, args.reward, seed, out, data, **args.given)
    table(args)


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as e:
        sys.exit(f"score_variants.py: {e}")
