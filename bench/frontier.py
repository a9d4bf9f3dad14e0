"""What a reward costs in recognition: reward against accuracy along runs, a table and a figure.

    python bench/frontier.py                                  # the ways below, seeds 0 1 2; minutes a run
    python bench/frontier.py --ways last all --seeds 0         # some of them
    python bench/frontier.py --table                           # only from the runs that are there

Every few epochs of a run the 200 fixed captions of bench/recognise.py are drawn, without noise on the last
latent, and judged: reward (minus kB), accuracy (nearest training picture), retrieval (tiny/clip), shape
(nearest training picture by its edges) and bright (mean of all pixels: fading raises it). Rows go to
runs/frontier/WAY-SEED/frontier.csv; a run that is complete is not run again. A run ends when the accuracy is
below one half. Ways, each also with -kl, lambda = 0.01:

last     rlcm's default: noise on the clean latent is the only action, judged against its mirror image
rank-1, rank-4, rank-64  the same with a LoRA of another rank; the default has 16
last-8   the same in 8 steps
noise-0.6  with a last noise of 0.6, not 0.3; before: and of rank 4, the default until it was changed
all      rlcm with the papers' actions, the noises between evaluations
all-value  the same with --value
all-4    the same with a LoRA of rank 4
clip     rlcm's default with tiny/clip's score added to the reward, compress:1,clip:0.25; the table has
         compress alone, and retrieval is no judge from outside here
ddpo     DDPO in 5 steps; ddpo-value: with --value; ddpo-50: in 50 steps, guidance 5, as in the
         papers, half an hour a seed
score    Scores as Actions in 6 steps, its default is with --value; score-plain: without
last scaled, clip scaled  the LoRA at the end of the run, scaled by 0.2 to 1 when drawing
linear   no training: a linear map of the base model's clean latents, 3 x 3 neighbours, fitted to what
         blurring does to them, with its 12 ranks; linear-4, linear-1: cut down to the 4, to the 1 largest
blur     no training: the base model's pictures blurred (sigma 0.7, 1, 2, 3 pixels)
vae      the same, then through the VAE: what the decoder can draw
fade     no training: the base model's pictures faded to white (by 0.2, 0.4, 0.6)

Table: where a way's accuracy has come down to 0.85, and to 0.75: the other columns there, by linear
interpolation between epochs; mean and, in brackets, each seed. Passes: of the network with 32 rows, guidance
counting two rows, a backward two passes, until then.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusers
import numpy as np
import torch
from matplotlib.figure import Figure

import rewards
import rlcm
from tiny import make_tiny


def rank(r):
    return dict(lora_rank=r, lora_alpha=r)


WAYS = {  # settings, epochs at which to judge
    "last": (dict(), range(12, 46, 3)),
    "rank-1": (rank(1), range(12, 61, 3)),
    "rank-4": (rank(4), range(12, 61, 3)),
    "rank-64": (rank(64) | dict(lr=6e-4), range(12, 46, 3)),
    "last-8": (dict(steps=8), range(12, 46, 3)),
    "noise-0.6": (dict(last_noise=0.6), range(12, 46, 3)),
    "before": (rank(4) | dict(last_noise=0.6), range(12, 46, 3)),
    "clip": (dict(reward="compress:1,clip:0.25"), range(12, 46, 3)),
    "all": (dict(last_noise=0.0), range(9, 61, 3)),
    "all-4": (rank(4) | dict(last_noise=0.0), range(12, 61, 3)),
    "all-value": (dict(last_noise=0.0, value=True), range(6, 61, 3)),
    "ddpo": (dict(method="ddpo"), range(6, 41, 2)),
    "ddpo-value": (dict(method="ddpo", value=True), range(4, 41, 2)),
    "ddpo-50": (dict(method="ddpo", steps=50, guidance=5.0), range(8, 25, 4)),
    "score": (dict(method="score"), range(4, 41, 2)),
    "score-plain": (dict(method="score", value=False), range(4, 41, 2)),
}
WAYS |= {f"{way}-kl": (settings | dict(kl=0.01), epochs) for way, (settings, epochs) in WAYS.items()}
STRENGTHS = 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0


def edges(pictures):
    """Brightness gradients of pictures (B, 3, 64, 64) at half size, as unit vectors: fading leaves them."""
    y = torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 2)
    v = torch.cat([y.diff(dim=2).flatten(1), y.diff(dim=3).flatten(1)], 1)
    return v / v.norm(dim=1, keepdim=True).clamp(min=1e-6)


def judge(pictures, captions, data):
    """The columns of a row. data: training pictures and their labels."""
    pictures = pictures.cpu()
    nearest = (edges(pictures) @ edges(data[0]).T).argmax(1).tolist()
    return {
        "accuracy": make_tiny.nearest_accuracy(pictures, captions, *data),
        "retrieval": make_tiny.retrieval(pictures, captions, data[1]),
        "shape": sum(data[1][n] == c for n, c in zip(nearest, captions)) / len(captions),
        "bright": pictures.mean().item(),
        "reward": rewards.compress(pictures, captions).mean().item(),
    }


def train(way, seed, out, data):
    """A run that is judged on the way; frontier.csv appears when it is complete."""
    settings, epochs = WAYS[way]
    captions, record, rows = make_tiny.fixed_captions(data[1]), rlcm.record, []

    def judged(run, epoch, scores, kl, log, halt):
        if epoch in epochs:
            rows.append({"epoch": epoch} | judge(rlcm.draw(run.model, run.cfg, captions), captions, data))
            print(way, seed, *(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
        over = bool(rows) and rows[-1]["accuracy"] < 0.5
        return record(run, epoch, scores, kl, log, halt or over)

    rlcm.record = judged
    try:
        settings = settings | dict(epochs=max(epochs), min_likeness=0.0, save_every=1000)
        rlcm.train(rlcm.configure(model="tiny", seed=seed, out=str(out), **settings))
    finally:
        rlcm.record = record
    rlcm.save_metrics(rows, out / "frontier.csv")


def scaled(out, data):
    """The LoRA of a run that went too far, at several strengths; to strength.csv beside it."""
    cfg, captions, rows = rlcm.read_config(out), make_tiny.fixed_captions(data[1]), []
    model = rlcm.load_model(cfg)
    rlcm.load_weights(model, out)
    for strength in STRENGTHS:
        model.pipe.set_adapters(model.pipe.get_active_adapters(), strength)
        rows.append({"strength": strength} | judge(rlcm.draw(model, cfg, captions), captions, data))
    rlcm.save_metrics(rows, out / "strength.csv")


def passes(way):
    """Passes of the network in an epoch."""
    cfg = rlcm.configure(model="tiny", **WAYS[way][0])
    schedule, _ = rlcm.METHODS[cfg.method]
    folder = rlcm.HERE / rlcm.TINY[cfg.method] / "scheduler"
    kind = diffusers.LCMScheduler if cfg.method == "rlcm" else diffusers.DDIMScheduler
    options = dict(last_std=cfg.last_noise) if cfg.last_noise else {}
    actions = len(schedule(kind.from_pretrained(folder), cfg.steps, "cpu", **options).actions)
    batches = cfg.batch_size / 32 * (1 if cfg.method == "rlcm" else 2)
    return batches * (cfg.steps + 3 * actions + (actions if cfg.kl else 0))


def blurred(images, sigma):
    x = torch.arange(-12, 13.0)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    images = torch.nn.functional.pad(images, (12, 12, 12, 12), mode="replicate")
    images = torch.nn.functional.conv2d(images, kernel, groups=3)
    return torch.nn.functional.conv2d(images, kernel.mT, groups=3)


@torch.no_grad()
def processed(data):
    """The base model's pictures without any training -> a row for each way and its strength."""
    cfg = rlcm.configure(model="tiny")
    model, captions, rows = rlcm.load_model(cfg), make_tiny.fixed_captions(data[1]), []
    x, pictures = last_latents(model, cfg, captions)
    other = last_latents(model, cfg, sorted(set(data[1])) * 2, seed=10_000)

    def row(way, images):
        rows.append({"way": way} | judge(images, captions, data))

    ranks = {"linear": 12, "linear-4": 4, "linear-1": 1}
    for way in ("blur", "vae", "fade", *ranks):
        row(way, pictures)
    for sigma in (0.7, 1, 2, 3):
        soft = blurred(pictures, sigma)
        row("blur", soft)
        row("vae", decoded(model, encoded(model, soft)))
        M = fit(other[0], encoded(model, blurred(other[1], sigma)) - other[0])
        for way, r in ranks.items():
            row(way, decoded(model, x + apply(M, x, r)))
    for share in (0.2, 0.4, 0.6):
        row("fade", pictures + share * (1 - pictures))
    return rows


def last_latents(model, cfg, captions, seed=0):
    """The base model's clean latents (B, 12, 8, 8) and pictures; noise i has the generator seed + i."""
    s, c = rlcm.rlcm_schedule(model.pipe.scheduler, cfg.steps, "cpu"), rlcm.encode(model.pipe, captions)
    g, shape = torch.Generator(), (cfg.steps + 1, *model.shape)
    z = torch.stack([torch.randn(shape, generator=g.manual_seed(seed + i)) for i in range(len(c))], 1)
    x = [rlcm.rollout(rlcm.rlcm_policy, model.eps, s, c[b], z[:, b])[0][-1] for b in batches(len(c))]
    return torch.cat(x), decoded(model, torch.cat(x))


def batches(n):
    return [slice(i, i + 32) for i in range(0, n, 32)]


def decoded(model, x):
    return torch.cat([rlcm.decode(model.pipe, x[b]) for b in batches(len(x))])


def encoded(model, pictures):
    vae = model.pipe.vae
    x = torch.cat([vae.encode(2 * pictures[b] - 1).latent_dist.mean for b in batches(len(pictures))])
    return x * vae.config.scaling_factor


def neighbours(x):
    """(B, 12, 8, 8) -> (B * 64, 12 * 9 + 1): each place with the eight around it, and a one."""
    v = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return torch.cat([v, torch.ones(len(v), 1)], 1)


def fit(x, change):
    """Least squares from the neighbours of x to a change of x -> (109, 12)."""
    X, Y = neighbours(x), change.flatten(2).transpose(1, 2).flatten(0, 1)
    return torch.linalg.solve(X.T @ X + 0.1 * torch.eye(X.shape[1]), X.T @ Y)


def apply(M, x, r):
    """The change that the map makes of x, cut down to the r ranks that count most (the constant is kept)."""
    U, S, V = torch.linalg.svd(M[:-1], full_matrices=False)
    M = torch.cat([U[:, :r] * S[:r] @ V[:r], M[-1:]])
    return (neighbours(x) @ M).view(len(x), 64, 12).transpose(1, 2).reshape(x.shape)


def rows_of(path):
    with open(path) as f:
        rows = list(csv.DictReader(f))
    return [{name: v if name == "way" else float(v) for name, v in row.items()} for row in rows]


def crossing(rows, accuracy, columns=("reward", "retrieval", "epoch")):
    """The columns where the accuracy first falls to that value, interpolated; nan where it does not."""
    for a, b in zip(rows, rows[1:]):
        if b["accuracy"] <= accuracy < a["accuracy"]:
            share = (a["accuracy"] - accuracy) / (a["accuracy"] - b["accuracy"])
            pairs = [(a.get(name, np.nan), b.get(name, np.nan)) for name in columns]
            return [start + share * (end - start) for start, end in pairs]
    return [np.nan] * len(columns)


def table(runs):
    columns = "reward", "retrieval", "shape", "bright", "epoch"
    for accuracy in (0.85, 0.75):
        print(f"\n{f'at {accuracy}':12}" + "".join(f"{name:>30}" for name in (*columns[:-1], "passes")))
        for way, members in runs.items():
            values = np.array([crossing(rows, accuracy, columns) for rows in members]).T  # (columns, seeds)
            values[-1] *= passes(way) if way in WAYS else np.nan
            line = f"{way:12}"
            for name, each in zip(columns, values):
                digits = 0 if name == "epoch" else 3
                seeds = " ".join(f"{value:.{digits}f}" for value in each)
                line += f"{f'{each.mean():.{digits}f} ({seeds})':>30}"
            print(line)


def figure(runs, path):
    """A colour for each way; dashed: its LoRA scaled; grey and dotted: no training."""
    canvas = Figure(figsize=(10, 4), layout="constrained")
    axes = canvas.subplots(1, 2, sharex=True)
    colours = {way: f"C{number}" for number, way in enumerate(way for way in runs if way in WAYS)}
    markers = dict(blur="s", vae="^", fade="x")
    for way, members in runs.items():
        style = dict(color=colours.get(way.removesuffix(" scaled"), "0.4"), markersize=4, linewidth=1.2)
        style |= dict(linestyle="-" if way in WAYS else "--" if "scaled" in way else ":")
        style |= dict(marker=markers.get(way, "o"), alpha=0.8)
        for i, rows in enumerate(members):
            for axis, column in zip(axes, ("accuracy", "retrieval")):
                x, y = [row["reward"] for row in rows], [row[column] for row in rows]
                axis.plot(x, y, label=way if i == 0 else None, **style)
    axes[0].set(xlabel="reward: minus kB", ylabel="still recognised (nearest training picture)")
    axes[1].set(xlabel="reward: minus kB", ylabel="retrieval (tiny/clip)", xlim=(-2.63, -1.8))
    axes[0].axhline(0.85, color="0.8", linewidth=0.8, zorder=0)
    axes[0].legend(frameon=False, fontsize=8)
    canvas.savefig(path, dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=Path("runs/frontier"))
    p.add_argument("--table", action="store_true", help="do not train")
    args = p.parse_args()
    rlcm.quiet()
    data, runs = make_tiny.training_pictures(), {}
    for seed in args.seeds:
        for way in args.ways:
            out = args.out / f"{way}-{seed}"
            if not (out / "frontier.csv").exists() and not args.table:
                if out.exists():
                    raise rewards.BadInput(f"{out} was stopped half-way: remove it")
                train(way, seed, out, data)
    files = {way: [args.out / f"{way}-{seed}" / "frontier.csv" for seed in args.seeds] for way in args.ways}
    for way in [way for way in ("last", "clip") if way in args.ways]:
        files[f"{way} scaled"] = [path.with_name("strength.csv") for path in files[way]]
        for path in files[f"{way} scaled"]:
            if path.parent.exists() and not path.exists():
                scaled(path.parent, data)
    for way, found in files.items():
        read = [rows_of(path) for path in found if path.exists()]
        if read:
            runs[way] = read
    untrained = args.out / "untrained.csv"
    if not untrained.exists():
        rlcm.save_metrics(processed(data), untrained)
    for row in rows_of(untrained):
        runs.setdefault(row.pop("way"), [[]])[0].append(row)
    table(runs)
    figure({way: runs[way] for way in runs if "linear" not in way}, args.out / "frontier.png")
    print(f"wrote {args.out}/frontier.png")


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as e:
        sys.exit(f"frontier.py: {e}")
