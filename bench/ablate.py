"""The papers' ablations on the embedded model, reward compress, and what each action can change.

    python bench/ablate.py bands                      # and so on: the words below
    python bench/ablate.py horizon --seeds 0 --parts last-1 last-2
    python bench/ablate.py seconds --runs runs/compare/compress-rlcm-0 runs/compare/compress-ddpo-0

Rows go to runs/ablate/*/*.csv; what is there is not run again. A table is printed and, next to it, a figure
written: runs/ablate/WORD.png. No training in bands, unseen, seconds; minutes to an hour in the others.

In bands, horizon, rewards, longer and what builds on them `the default` is that of rlcm when they were made:
a LoRA of rank 4 and a last noise of 0.6. bench/frontier.py has the default of today (rank 16, 0.3).

bands      base models; one noise varies, 16 samples for each of 32 prompts, the others stay. `reward`: std of
           the reward it makes; `pixels`: std of a pixel; then the share of that variance by frequency (waves
           across the picture); share of the reward's variance that a linear fit explains from `paler` (mean
           brightness and saturation), from `smoother` (log energy above 12 waves), `share` (the same energy
           divided by that of all waves, which fading leaves alone), and paler and smoother together; last,
           what goes with a reward that is 1 kB higher: change of brightness, of saturation, of log energy in
           2-4 waves and above 12
learned    the same of what the runs of `horizon` did to 128 pictures of the same noise: share of the squared
           change by frequency, and what came with each kB saved; along each run, and where 0.4 kB are saved
horizon    rlcm trained with H = 1, 2, 4, 8: the default (last-H) and the papers' actions (all-H)
rewards    incompress and clip: the default and the papers' actions
longer     60 epochs without and with --kl, and the papers' actions: where does it turn?
diversity  pictures of one prompt, their mean distance, at equal reward: of the runs of `longer`
unseen     things that were not among the prompts: animals, plants, food
seconds    reward and accuracy against seconds for a picture, by number of steps

Common columns: `reward`, `accuracy`, `animals`, `retrieval`, `blank` as in bench/recognise.py; `held_out` in
metrics.csv: reward of the 45 training animals, drawn without noise on the last latent; `likeness` as in
rlcm.py; path_kl: nats between tuned and base model, sum over the actions of training; passes: of the network
with 32 rows, a backward counting two; `pixel` and `clip`: mean distance of two of 8 pictures of one prompt,
16 prompts: root mean square of pixels, 1 - cosine for tiny/clip.
"""

import argparse
import csv
import functools
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from matplotlib.figure import Figure

import rewards
import rlcm
from bench.frontier import blurred
from bench.recognise import measure
from tiny import make_tiny

COLUMNS = "accuracy", "animals", "retrieval", "blank", "kB", "reward"
BEFORE = dict(  # rlcm's default when the tables of docs/ablations.md were made
    model="tiny", lora_rank=4, lora_alpha=4, last_noise=0.6, min_likeness=0.92, save_every=3
)


# ------------------------------------------------------------------------------------------------- in common
def read(path):
    """Rows of a csv, numbers as floats."""

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path) as f:
        return [{name: number(value) for name, value in row.items()} for row in csv.DictReader(f)]


def kept(path, make):
    """Rows of a csv; if it is not there, what make() gives, written there."""
    if not path.exists():
        rows = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        rlcm.save_metrics(rows, path)
    return read(path)


def within(values, groups):
    """(groups * n, ...) -> the same less the mean of its group."""
    values = values.unflatten(0, (groups, -1))
    return (values - values.mean(1, keepdim=True)).flatten(0, 1)


def save(canvas, path):
    canvas.savefig(path, dpi=110)
    print(f"wrote {path}")


@functools.cache
def data():
    """Training pictures, their labels, 200 fixed captions."""
    pictures, labels = make_tiny.training_pictures()
    return pictures, labels, make_tiny.fixed_captions(labels)


@torch.no_grad()
def spread(images, names):
    """Mean distance of pictures of one prompt, in pixels and for tiny/clip."""
    picture = rewards.clip_embed(images, names, rewards.TINY_CLIP, rewards.TINY_CLIP)[0]
    cosine = picture.unflatten(0, (-1, 16)).transpose(0, 1)  # (16 prompts, 8, E)
    cosine = (cosine @ cosine.mT).sum((1, 2))
    return {"pixel": rewards.diversity(images, names), "clip": 1 - ((cosine - 8) / 56).mean().item()}


@torch.no_grad()
def nats(model, cfg, z):
    """path_kl of 32 trajectories with the actions of training."""
    schedule, policy = rlcm.METHODS[cfg.method]
    s = schedule(model.pipe.scheduler, cfg.steps, "cpu", *[cfg.last_noise] * bool(cfg.last_noise))
    c = rlcm.encode(model.pipe, rewards.ANIMALS[: z.shape[1]])
    x, mean, _ = rlcm.rollout(policy, model.eps, s, c, z)
    with rlcm.pretrained(model) as eps_pre:
        return rlcm.path_kl(policy, eps_pre, s, c, x, mean)[1].sum(0).mean().item()


EIGHT = rewards.ANIMALS[:16] * 8  # 8 pictures of each of 16 prompts


def judge(model, cfg, eight=False):
    """The common columns; with `eight` also the distances of pictures of one prompt."""
    row = dict(zip(COLUMNS, measure(model, cfg, data()[2], data()[:2])))
    z = torch.randn(cfg.steps + 1, 32, *model.shape, generator=torch.Generator().manual_seed(7))
    row["path_kl"] = nats(model, cfg, z)
    return row | (spread(rlcm.draw(model, cfg, EIGHT), EIGHT) if eight else {})


def passes(cfg):
    """Passes of the network in an epoch, 32 rows each, a backward counting two."""
    actions = 1 if cfg.last_noise else cfg.steps - 1
    return cfg.batch_size // 32 * (cfg.steps + actions * (4 if cfg.kl else 3))


def train(out, judged_at, eight, **settings):
    """A run, judged after those epochs and at its end -> rows; curve.csv: held_out along the run."""
    cfg = rlcm.configure(**(BEFORE | dict(eval_prompts="animals", out=str(out)) | settings))
    rows, curve, record, judging = [], [], rlcm.record, [0.0]
    start = time.process_time()

    def judged(run, epoch, *args):
        over, last = record(run, epoch, *args), run.rows[-1]
        now = time.process_time()
        at = {"epoch": epoch, "pictures": last["reward_queries"], "passes": epoch * passes(cfg)}
        at |= {name: last[name] for name in ("likeness", "held_out")}
        at["seconds"] = now - start - judging[0]
        if at["held_out"] != "":
            curve.append(at)
        if over or epoch == cfg.epochs or epoch in judged_at:
            rows.append(at | judge(run.model, cfg, eight))
            (out / "at").mkdir(exist_ok=True)
            rlcm.save_weights(run.model.pipe, out / "at" / f"{epoch}")
            print(out.name, *(f"{name} {v:.3f}" for name, v in rows[-1].items()), flush=True)
        judging[0] += time.process_time() - now
        return over

    rlcm.record = judged
    try:
        rlcm.train(cfg)
    finally:
        rlcm.record = record
    rlcm.save_metrics(curve, out / "curve.csv")
    return rows


def base(args, cfg, eight=False):
    """The base model's row, epoch 0."""
    name = f"{cfg.method}-{cfg.steps}-{cfg.reward.replace(':', '-')}{'-eight' * eight}"

    def make():
        model, reward_fn = rlcm.load_model(replace(cfg, kl=0.0)), rewards.get_reward(cfg.reward, cfg.model)
        r = reward_fn(rlcm.draw(model, cfg, rewards.ANIMALS), rewards.ANIMALS)
        start = {"epoch": 0, "pictures": 0, "passes": 0, "likeness": 1, "held_out": r.mean().item()}
        return [start | {"seconds": 0} | judge(model, cfg, eight)]

    return kept(args.out / "base" / f"{name}.csv", make)


def trained(args, what, parts, eight=False):
    """{part: a list of rows for each seed}, the base model's first; what is missing is trained first."""
    runs = {}
    for part in args.parts or parts:
        settings, judged_at = parts[part]
        for seed in args.seeds:
            out = args.out / what / f"{part}-{seed}"
            if not args.table and not (out / "ablate.csv").exists():
                if out.exists():
                    raise rewards.BadInput(f"{out} was stopped half-way: remove it")
                kept(out / "ablate.csv", lambda: train(out, judged_at, eight, seed=seed, **settings))
            if (out / "ablate.csv").exists():
                cfg = rlcm.read_config(out)
                runs.setdefault(part, []).append(base(args, cfg, eight) + read(out / "ablate.csv"))
                runs[part][-1][0]["folder"] = out
    return runs


def crossing(rows, name, value):
    """The row where a column first passes a value, by linear interpolation; nan where it does not."""
    for a, b in zip(rows, rows[1:]):
        if min(a[name], b[name]) <= value < max(a[name], b[name]):
            share = (value - a[name]) / (b[name] - a[name])
            return {key: a[key] + share * (b[key] - a[key]) for key in b}
    return dict.fromkeys(rows[-1], np.nan)


def show(name, rows, columns):
    """A line for each row, the last one their mean."""
    mean = {key: np.mean([row[key] for row in rows]) for key in columns}
    for title, row in [(name if i == 0 else "", row) for i, row in enumerate(rows)] + [("mean", mean)]:
        if title != "mean" or len(rows) > 1:
            digits = {key: 0 if abs(row[key]) >= 100 or key == "epoch" else 3 for key in columns}
            print(f"{title:22}" + "".join(f"{row[key]:11.{digits[key]}f}" for key in columns))


def heading(text, columns):
    print(f"\n{text}\n{'':22}" + "".join(f"{name:>11}" for name in columns))


def lines(axis, runs, x, y):
    """A line for each run, a colour for each part; dashed: the papers' actions."""
    for number, (part, members) in enumerate(runs.items()):
        for i, rows in enumerate(members):
            style = dict(color=f"C{number}", linestyle="--" if part.startswith("all") else "-", alpha=0.8)
            style |= dict(label=part if i == 0 else None)
            axis.plot([row[x] for row in rows], [row[y] for row in rows], **style)


# ----------------------------------------------------------------------------------------------------- bands
SAMPLES, START = 16, 32
BANDS = (0, 1.5, 4.5, 12.5, 99)  # waves across the picture: 0-1, 2-4, 5-12, more
BAND_NAMES = "0-1", "2-4", "5-12", ">12"


@torch.no_grad()
def vary(model, method, s, k, c, z, seed):
    """Pictures (32 * 16, ...) that differ, in each group of 16, only in the noise after evaluation k."""
    policy, g, x = rlcm.METHODS[method][1], torch.Generator().manual_seed(seed * 100 + k), z[0]
    for j in range(len(s.std)):
        parts = []
        for xs, cs in zip(x.split(START), c.split(START)):
            mean, std = policy(model.eps, xs, torch.full((len(xs),), j), cs, s)
            parts.append(mean)
        mean = torch.cat(parts)
        if j == k:
            mean, c, z = (v.repeat_interleave(SAMPLES, d) for v, d in ((mean, 0), (c, 0), (z, 1)))
            x = mean + s.std[j] * torch.randn(mean.shape, generator=g)
        else:
            x = mean + s.std[j] * z[j + 1]
    return torch.cat([rlcm.decode(model.pipe, part) for part in x.split(START)])


def spectrum(images):
    """Energy in the four bands, whose sum is the mean of x^2: (B, 3, H, W) -> (B, 4)."""
    n = images.shape[-1]
    f = torch.fft.fftfreq(n) * n
    radius = (f[:, None] ** 2 + f**2).sqrt()
    power = torch.fft.fft2(images).abs().square().mean(1) / n**4
    masks = [(a <= radius) & (radius < b) for a, b in zip(BANDS, BANDS[1:])]
    return torch.stack([(power * mask).sum((1, 2)) for mask in masks], 1)


def explained(target, features):
    """R^2 of a linear fit, means of the groups taken out before: (n,), (n, m)."""
    x = np.asarray(features, float)
    y = np.asarray(target, float)
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return 1 - (left**2).sum() / (y**2).sum()


LOOKS = "bright", "colour", "coarse", "fine"


def looks(images):
    """(B, 4): mean brightness, mean saturation, log energy in 2-4 waves and above 12."""
    energy = spectrum(images).log()
    luma = images.mean((2, 3)) @ torch.tensor([0.299, 0.587, 0.114])
    saturation = (images.amax(1) - images.amin(1)).mean((1, 2))
    return torch.stack([luma, saturation, energy[:, 1], energy[:, 3]], 1)


def band_row(images, r):
    """What varies in 32 groups of 16 pictures and with what the reward goes."""
    share, own = spectrum(within(images, START)).mean(0), spectrum(images)
    look = looks(images)
    features = {
        "paler": look[:, :2],
        "smoother": look[:, 3:],
        "share": look[:, 3:] - own[:, 1:].sum(1).log()[:, None],
        "both": look[:, [0, 1, 3]],
    }
    unbiased, y = SAMPLES / (SAMPLES - 1), within(r, START)
    row = {"reward": (unbiased * y.square().mean()).sqrt().item()}
    row["pixels"] = (unbiased * share.sum()).sqrt().item()
    row |= dict(zip(BAND_NAMES, (share / share.sum()).tolist()))
    row |= {name: explained(y, within(v, START)) for name, v in features.items()}
    return row | dict(zip(LOOKS, (within(look, START).T @ y / (y @ y)).tolist()))


def bands_of(method, seed):
    """A row for each action; for rlcm also one for the noise on the clean latent."""
    cfg = rlcm.configure(**BEFORE | dict(method=method))
    model, schedule = rlcm.load_model(cfg), rlcm.METHODS[method][0]
    s, rows = schedule(model.pipe.scheduler, cfg.steps, "cpu"), []
    g = torch.Generator().manual_seed(seed)
    names = [rewards.ANIMALS[i] for i in torch.randperm(45, generator=g)[:START]]
    z = torch.randn(cfg.steps + 1, START, *model.shape, generator=g)
    c, steps = rlcm.encode(model.pipe, names), [(s, k) for k in s.actions.tolist()]
    if method == "rlcm":
        steps.append((schedule(model.pipe.scheduler, cfg.steps, "cpu", cfg.last_noise), cfg.steps - 1))
    for s, k in steps:
        images = vary(model, method, s, k, c, z, seed)
        r = rewards.compress(images, None)
        row = {"method": method, "noise": k + 1, "of": cfg.steps, "std": s.std[k].item()}
        rows.append(row | band_row(images, r))
        print(seed, *(f"{v:.3f}" if type(v) is float else v for v in rows[-1].values()), flush=True)
    return rows


def bands(args):
    runs = []
    for seed in args.seeds:
        paths = {method: args.out / "bands" / f"{method}-{seed}.csv" for method in args.parts or rlcm.METHODS}
        runs.append([kept(path, lambda: bands_of(method, seed)) for method, path in paths.items()])
    rows = []
    for seeds in zip(*(sum(run, []) for run in runs)):  # the same row of each seed
        rows.append({name: v if type(v) is str else np.mean([row[name] for row in seeds])
                     for name, v in seeds[0].items()})  # fmt: skip
    print(f"mean of seeds {args.seeds}\n{'':14}" + "".join(f"{name:>10}" for name in list(rows[0])[3:]))
    for row in rows:
        name = f"{row['method']} {row['noise']:.0f} of {row['of']:.0f}"
        print(f"{name:14}" + "".join(f"{v:10.3f}" for v in list(row.values())[3:]))
    canvas = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    names = [f"{row['method']}, noise {row['noise']:.0f}, std {row['std']:.2f}" for row in rows]
    y, start = -np.arange(len(rows)), np.zeros(len(rows))
    for band in BAND_NAMES:
        width = [row[band] for row in rows]
        left.barh(y, width, left=start, label=f"{band} waves")
        start += width
    left.set(yticks=y, yticklabels=names, xlabel="share of the pixels' variance")
    left.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    for shift, name in ((0.2, "paler"), (-0.2, "smoother")):
        right.barh(y + shift, [row[name] for row in rows], 0.38, label=name)
    right.set(xlabel="share of the reward's variance explained", xlim=(0, 1))
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save(canvas, args.out / "bands.png")


# -------------------------------------------------------------------------------------------------- training
END = "epoch", "passes", "seconds", "likeness", "reward", "accuracy", "retrieval", "blank", "path_kl"


def curves(runs):
    """runs -> the same with the rows of curve.csv in place of the judged ones."""
    return {part: [rows[:1] + read(rows[0]["folder"] / "curve.csv") for rows in members]
            for part, members in runs.items()}  # fmt: skip


def ends(runs):
    """Table: base models and what the runs end with."""
    heading("base model, then the end of each run; likeness ends it", END)
    for part, members in runs.items():
        show(f"{part}, base", [members[0][0]], END)
        show(part, [rows[-1] for rows in members], END)


JUDGE = {1: range(6, 61, 3), 2: range(9, 61, 3), 4: range(12, 61, 6), 8: range(12, 61, 6)}
HORIZONS = {f"last-{H}": (dict(steps=H), JUDGE[H]) for H in JUDGE}
HORIZONS |= {f"all-{H}": (dict(steps=H, last_noise=0.0), JUDGE[H]) for H in (2, 4, 8)}


def horizon(args):
    runs = trained(args, "horizon", HORIZONS)
    ends(runs)
    columns = "epoch", "pictures", "passes", "seconds", "reward", "accuracy", "retrieval", "path_kl"
    for name, value in (("accuracy", 0.85), ("reward", -2.2)):
        heading(f"where the {name} is {value}", columns)
        for part, members in runs.items():
            show(part, [crossing(rows, name, value) for rows in members], columns)
    canvas = Figure(figsize=(12, 4), layout="constrained")
    axes = canvas.subplots(1, 3, sharey=True)
    titles = dict(pictures="pictures scored", passes="passes of the network", seconds="CPU seconds")
    for axis, (name, title) in zip(axes, titles.items()):
        lines(axis, curves(runs), name, "held_out")
        axis.set(xlabel=title)
    axes[0].set(ylabel="reward of 45 animals, drawn without last noise")
    axes[2].legend(frameon=False, fontsize=8)
    save(canvas, args.out / "horizon.png")


REWARDS = {
    f"{way}-{reward}": (dict(reward=reward) | given, range(24, 61, 18))
    for reward in ("incompress", "clip")
    for way, given in (("last", {}), ("all", dict(last_noise=0.0)))
}


def other_rewards(args):
    runs = trained(args, "rewards", REWARDS)
    ends(runs)
    kinds = list(dict.fromkeys(part.split("-")[1] for part in runs))
    canvas = Figure(figsize=(5.5 * len(kinds), 3.8), layout="constrained")
    for column, reward in enumerate(kinds):
        part = {name: members for name, members in runs.items() if name.endswith("-" + reward)}
        axis = canvas.add_subplot(1, len(kinds), column + 1)
        lines(axis, curves(part), "passes", "held_out")
        axis.set(xlabel="passes of the network", ylabel=f"{reward} of 45 animals")
        axis.legend(frameon=False)
    save(canvas, args.out / "rewards.png")


LONG, JUDGED = dict(epochs=60, min_likeness=0.0), range(6, 61, 6)
LONGER = {
    "none": (LONG, JUDGED),
    "kl-0.005": (LONG | dict(kl=0.005), JUDGED),
    "kl-0.02": (LONG | dict(kl=0.02), JUDGED),
    "all": (LONG | dict(last_noise=0.0, epochs=48), JUDGED),
}


def longer(args):
    runs = trained(args, "longer", LONGER, eight=True)
    columns = "epoch", "passes", "likeness", "reward", "accuracy", "retrieval", "blank", "path_kl"
    columns += "pixel", "clip"
    heading("along the runs, each seed", columns)
    for part, members in runs.items():
        for rows in members:
            for i, row in enumerate(rows):
                show(part if i == 0 else "", [row], columns)
    canvas = Figure(figsize=(12, 6), layout="constrained")
    titles = dict(reward="reward: minus kB", accuracy="still recognised", retrieval="retrieval (tiny/clip)")
    titles |= dict(path_kl="path KL, nats", pixel="diversity, pixels", clip="diversity, tiny/clip")
    for axis, (name, title) in zip(canvas.subplots(2, 3).flat, titles.items()):
        lines(axis, runs, "epoch", name)
        axis.set(xlabel="epoch", ylabel=title)
    canvas.axes[0].legend(frameon=False)
    save(canvas, args.out / "longer.png")


def changed(base, tuned):
    """What training did to pictures of the same noise."""
    saved = (rewards.compress(tuned, None) - rewards.compress(base, None)).mean()
    share = spectrum(tuned - base).mean(0)
    row = {"saved": saved.item(), "pixels": share.sum().sqrt().item()}
    row |= dict(zip(BAND_NAMES, (share / share.sum()).tolist()))
    return row | dict(zip(LOOKS, ((looks(tuned) - looks(base)).mean(0) / saved).tolist()))


def learned(args):
    """What each snapshot of the runs of `horizon` does to pictures of the same noise."""

    def make():
        rows, first = [], {}
        for folder in sorted(args.out.glob("horizon/*/at/*")):
            cfg = rlcm.read_config(folder.parents[1])
            model = rlcm.load_model(cfg)
            if cfg.steps not in first:
                first[cfg.steps] = rlcm.draw(model, cfg, EIGHT)
            rlcm.load_weights(model, folder)
            row = changed(first[cfg.steps], rlcm.draw(model, cfg, EIGHT))
            rows.append({"run": folder.parents[1].name, "epoch": int(folder.name)} | row)
        return rows

    rows = kept(args.out / "learned" / "learned.csv", make)
    columns, runs = list(rows[0])[1:], {}
    heading("what training did", columns)
    for row in sorted(rows, key=lambda row: row["epoch"]):
        part, _, seed = row.pop("run").rpartition("-")
        runs.setdefault(part, {}).setdefault(seed, []).append(row)
    for part, seeds in sorted(runs.items()):
        for seed, along in sorted(seeds.items()):
            for row in along:
                show(f"{part}-{seed}", [row], columns)
    heading("where 0.4 kB are saved, each seed", columns)
    for part, seeds in sorted(runs.items()):
        show(part, [crossing(along, "saved", 0.4) for _, along in sorted(seeds.items())], columns)


# ------------------------------------------------------------------------------------------------- diversity
def weaker(folder, strength=0.5):
    """The snapshots of a run's later half, drawn with a scaled LoRA."""
    cfg, rows = rlcm.read_config(folder), []
    for epoch in sorted(int(path.name) for path in (folder / "at").iterdir() if int(path.name) >= 30):
        model = rlcm.load_model(cfg)
        rlcm.load_weights(model, folder / "at" / f"{epoch}")
        model.pipe.set_adapters(model.pipe.get_active_adapters(), strength)
        rows.append({"epoch": epoch} | judge(model, cfg, True))
    return rows


def processed():
    """No training: the base model's pictures blurred or faded."""
    cfg = rlcm.configure(model="tiny")
    model, rows = rlcm.load_model(cfg), []
    captions, eight = rlcm.draw(model, cfg, data()[2]), rlcm.draw(model, cfg, EIGHT)
    ways = {"blur": [lambda v, a=a: blurred(v, a) for a in (0.3, 0.7, 1, 1.5)]}
    ways["fade"] = [lambda v, a=a: v + a * (1 - v) for a in (0, 0.2, 0.4, 0.6)]
    for way, changes in ways.items():
        for change in changes:
            images = change(captions)
            row = {"way": way, "reward": rewards.compress(images, None).mean().item()}
            row["accuracy"] = make_tiny.nearest_accuracy(images, data()[2], *data()[:2])
            row["retrieval"] = make_tiny.retrieval(images, data()[2], data()[1])
            rows.append(row | spread(change(eight), EIGHT))
    return rows


def diversity(args):
    runs = trained(args, "longer", LONGER, eight=True)
    if "none" in runs:
        folders = [rows[0]["folder"] for rows in runs["none"]]
        half = [rows[:1] + kept(f / "half.csv", lambda: weaker(f)) for f, rows in zip(folders, runs["none"])]
        runs["none x 0.5"] = half
    for row in kept(args.out / "diversity" / "processed.csv", processed):
        runs.setdefault(row.pop("way"), [[]])[0].append(row)
    columns = "reward", "accuracy", "retrieval", "pixel", "clip"
    heading("base model", columns)
    show("", [runs["none"][0][0]], columns)
    for reward in (-2.25, -2.1):
        heading(f"where the reward is {reward}", columns)
        for way, members in runs.items():
            show(way, [crossing(rows, "reward", reward) for rows in members], columns)
    canvas = Figure(figsize=(10, 4), layout="constrained")
    for axis, name in zip(canvas.subplots(1, 2), ("pixel", "clip")):
        lines(axis, runs, "reward", name)
        axis.set(xlabel="reward: minus kB", ylabel=f"mean distance of pictures of one prompt, {name}")
    canvas.axes[0].legend(frameon=False)
    save(canvas, args.out / "diversity.png")


# --------------------------------------------------------------------------------------- of runs in a folder
PLANTS = (
    "blossom, bouquet, cactus, cherry blossom, deciduous tree, evergreen tree, fallen leaf, four leaf "
    "clover, herb, hibiscus, hyacinth, leaf fluttering in wind, leafless tree, lotus, maple leaf, "
    "mushroom, palm tree, potted plant, rose, rosette, seedling, shamrock, sheaf of rice, sunflower, "
    "tulip, white flower, wilted flower"
).split(", ")
FOOD = (
    "avocado, bacon, bagel, banana, bell pepper, birthday cake, blueberries, bread, broccoli, burrito, "
    "butter, carrot, cheese wedge, cherries, chocolate bar, coconut, cookie, croissant, cucumber, "
    "cupcake, doughnut, egg, eggplant, french fries, grapes, green salad, hamburger, hot dog, ice "
    "cream, kiwi fruit, lemon, lollipop, mango, melon, pancakes, peach, pear, pie, pineapple, pizza, "
    "popcorn, potato, pretzel, red apple, sandwich, spaghetti, strawberry, sushi, taco, tomato, waffle, "
    "watermelon"
).split(", ")
GROUPS = {"trained": rewards.ANIMALS, "animals": rewards.OTHER_ANIMALS, "plants": PLANTS, "food": FOOD}


def judged_groups(model, cfg, weights):
    """A row for each group of names, two pictures of each."""
    rows = []
    for group, names in GROUPS.items():
        images = rlcm.draw(model, cfg, names * 2)
        row = {"group": group, "weights": weights}
        row["reward"] = rewards.get_reward(cfg.reward, cfg.model)(images, names * 2).mean().item()
        row["accuracy"] = make_tiny.nearest_accuracy(images, names * 2, *data()[:2])
        rows.append(row | {"retrieval": make_tiny.retrieval(images, names * 2, data()[1])})
    return rows


def base_and_tuned(args, what, measured):
    """{method: [rows of each run]} of the runs' folders, rows of measured(model, cfg, "base" or "tuned")."""
    runs = {}
    for run in args.runs:
        folder, _, strength = str(run).partition("@")
        cfg = replace(rlcm.drawing_config(folder), kl=0.0)

        def tuned():
            model = rlcm.load_model(cfg)
            rlcm.load_weights(model, Path(folder))
            model.pipe.set_adapters(model.pipe.get_active_adapters(), float(strength or 1))
            return measured(model, cfg, "tuned")

        name = f"base-{cfg.method}-{cfg.steps}"
        rows = kept(args.out / what / f"{name}.csv", lambda: measured(rlcm.load_model(cfg), cfg, "base"))
        rows = rows + kept(args.out / what / f"{run.name}.csv", tuned)
        runs.setdefault(cfg.method, []).append(rows)
    return runs


def unseen(args):
    runs = base_and_tuned(args, "unseen", judged_groups)
    columns = "reward", "accuracy", "retrieval"
    canvas = Figure(figsize=(10, 3.6), layout="constrained")
    axes = canvas.subplots(1, 3)
    for number, (method, members) in enumerate(runs.items()):
        heading(f"{method}; {', '.join(f'{g}: {len(names)} names' for g, names in GROUPS.items())}", columns)
        for i, (group, weights) in enumerate((g, w) for g in GROUPS for w in ("base", "tuned")):
            mine = {"group": group, "weights": weights}
            rows = [row for rows in members for row in rows if row | mine == row]
            show(f"{group}, {weights}", rows[:1] if weights == "base" else rows, columns)
            for axis, name in zip(axes, columns):
                x = np.full(len(rows), i // 2 + 0.2 * number + 0.08 * (weights == "tuned"))
                style = dict(marker="o", linestyle="", color=f"C{number}", fillstyle="none")
                style |= dict(fillstyle="full") if weights == "tuned" else {}
                label = f"{method}, {weights}" if i < 2 else None
                axis.plot(x, [row[name] for row in rows], label=label, **style)
    for axis, name in zip(axes, columns):
        axis.set(ylabel=name, xticks=range(len(GROUPS)), xticklabels=list(GROUPS))
    axes[0].legend(frameon=False, fontsize=8)
    save(canvas, args.out / "unseen.png")


def judged_steps(model, cfg, weights):
    """A row for each number of steps, 100 pictures."""
    rows, captions = [], data()[2][:100]
    for steps in (1, 2, 4, 8) if cfg.method == "rlcm" else (2, 4, 8, 16):
        began = time.process_time()
        images = rlcm.draw(model, cfg, captions, steps)
        row = {"weights": weights, "steps": steps, "seconds": (time.process_time() - began) / len(captions)}
        r = rewards.get_reward(cfg.reward, cfg.model)(images, captions)
        row |= {"reward": r.mean().item(), "error": r.std().item() / len(r) ** 0.5}
        row["accuracy"] = make_tiny.nearest_accuracy(images, captions, *data()[:2])
        rows.append(row | {"retrieval": make_tiny.retrieval(images, captions, data()[1])})
    return rows


def inference(args):
    runs = base_and_tuned(args, "seconds", judged_steps)
    columns = "seconds", "reward", "error", "accuracy", "retrieval"
    canvas = Figure(figsize=(12, 3.8), layout="constrained")
    axes = canvas.subplots(1, 3)
    for number, (method, members) in enumerate(runs.items()):
        heading(f"{method}; CPU seconds for a picture, VAE included", columns)
        for weights in ("base", "tuned"):
            each = [[row for row in rows if row["weights"] == weights] for rows in members]
            each = each[:1] if weights == "base" else each
            for same in zip(*each):
                show(f"{weights}, {same[0]['steps']:.0f} steps", same, columns)
            for axis, name in zip(axes, ("reward", "accuracy", "retrieval")):
                for i, rows in enumerate(each):
                    style = dict(color=f"C{number}", marker="o", linestyle="--" if weights == "base" else "-")
                    style |= dict(label=f"{method}, {weights}" if i == 0 else None)
                    axis.plot([row["seconds"] for row in rows], [row[name] for row in rows], **style)
                axis.set(xlabel="CPU seconds for a picture", ylabel=name, xscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    save(canvas, args.out / "seconds.png")


WORDS = {
    "bands": bands,
    "horizon": horizon,
    "rewards": other_rewards,
    "longer": longer,
    "diversity": diversity,
    "learned": learned,
    "unseen": unseen,
    "seconds": inference,
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=list(WORDS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--parts", nargs="+", help="some lines of the table")
    p.add_argument("--table", action="store_true", help="do not train, only show what is there")
    folder, methods = "runs/compare/compress", ("rlcm", "ddpo")
    runs = [Path(f"{folder}-{method}-{seed}") for method in methods for seed in (0, 1, 2)]
    about = "for unseen and seconds; RUN@0.5 scales its LoRA"
    p.add_argument("--runs", nargs="+", type=Path, default=runs, help=about)
    p.add_argument("--out", type=Path, default=Path("runs/ablate"))
    args = p.parse_args()
    rlcm.quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    WORDS[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as e:
        sys.exit(f"ablate.py: {e}")
