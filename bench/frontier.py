"""What a reward costs in recognition: reward against accuracy along runs, a table and a figure.

    python bench/frontier.py                                  # the ways below, seeds 0 1 2; minutes a run
    python bench/frontier.py --ways last all --seeds 0         # some of them
    python bench/frontier.py --table                           # only from the runs that are there

Every few epochs of a run the 200 fixed captions of bench/recognise.py are drawn, without noise on the last
latent, and judged: reward (minus kB), accuracy (nearest training picture), retrieval (tiny/clip). Rows go to
runs/frontier/WAY-SEED/frontier.csv; a run that is complete is not run again. A run ends when the accuracy is
below one half. Ways, each also with -kl, lambda = 0.01:

last     rlcm's default: noise on the clean latent is the only action, judged against its mirror image
last-8   the same in 8 steps
all      rlcm with the papers' actions, the noises between evaluations
all-value  the same with --value
clip     rlcm's default with tiny/clip's score added to the reward, compress:1,clip:1 (table: compress alone)
ddpo     DDPO in 5 steps; ddpo-value: with --value; ddpo-50: in 50 steps, guidance 5, as in the
         papers, half an hour a seed
score    Scores as Actions in 6 steps, its default is with --value; score-plain: without
strength the LoRA at the end of `last`, scaled by 0.2 to 1 when drawing
blur     no training: the base model's pictures blurred (sigma 0.7, 1, 2, 3 pixels)
vae      the same, then through the VAE: what the decoder can draw
fade     no training: the base model's pictures faded to white (by 0.2, 0.4, 0.6)

Table: reward at which a way's accuracy is 0.85 and 0.75, and its retrieval there, by linear interpolation
between epochs; mean and, in brackets, each seed. Passes: of the network with 32 rows, guidance counting two
rows, a backward two passes, until the accuracy has come down to 0.85.
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
from bench.recognise import measure
from tiny import make_tiny

WAYS = {  # settings, epochs at which to judge
    "last": (dict(), (*range(3, 34, 3), 40, 50, 60)),
    "last-8": (dict(steps=8), (*range(12, 34, 3), 40, 50)),
    "clip": (dict(reward="compress:1,clip:1"), range(6, 61, 3)),
    "all": (dict(last_noise=0.0), range(6, 61, 3)),
    "all-value": (dict(last_noise=0.0, value=True), range(6, 61, 3)),
    "ddpo": (dict(method="ddpo"), range(6, 41, 2)),
    "ddpo-value": (dict(method="ddpo", value=True), range(4, 41, 2)),
    "ddpo-50": (dict(method="ddpo", steps=50, guidance=5.0), range(8, 25, 4)),
    "score": (dict(method="score"), range(4, 41, 2)),
    "score-plain": (dict(method="score", value=False), range(4, 41, 2)),
}
WAYS |= {f"{way}-kl": (settings | dict(kl=0.01), epochs) for way, (settings, epochs) in WAYS.items()}
COLUMNS = "accuracy", "animals", "retrieval", "blank", "kB", "reward"


def train(way, seed, out, data):
    """A run that is judged on the way; frontier.csv appears when it is complete."""
    settings, epochs = WAYS[way]
    captions, record, rows = make_tiny.fixed_captions(data[1]), rlcm.record, []

    def judged(run, epoch, scores, kl, log, halt):
        if epoch in epochs:
            row = dict(zip(COLUMNS, measure(run.model, run.cfg, captions, data)))
            rows.append({"epoch": epoch} | row | {"reward": -row["kB"]})
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
    for strength in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        model.pipe.set_adapters(model.pipe.get_active_adapters(), strength)
        rows.append({"strength": strength, **dict(zip(COLUMNS, measure(model, cfg, captions, data)))})
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
    model, captions = rlcm.load_model(cfg), make_tiny.fixed_captions(data[1])
    base, vae, rows = rlcm.draw(model, cfg, captions), model.pipe.vae, []

    def judge(way, images):
        row = {"way": way, "accuracy": make_tiny.nearest_accuracy(images, captions, *data)}
        row["retrieval"] = make_tiny.retrieval(images, captions, data[1])
        rows.append(row | {"reward": float(rewards.compress(images, captions).mean())})

    for way in ("blur", "vae", "fade"):
        judge(way, base)
    for sigma in (0.7, 1, 2, 3):
        soft = blurred(base, sigma)
        judge("blur", soft)
        latents = [vae.encode(2 * part - 1).latent_dist.mean for part in soft.split(50)]
        judge("vae", torch.cat([rlcm.decode(model.pipe, x * vae.config.scaling_factor) for x in latents]))
    for share in (0.2, 0.4, 0.6):
        judge("fade", base + share * (1 - base))
    return rows


def rows_of(path):
    with open(path) as f:
        rows = list(csv.DictReader(f))
    return [{name: v if name == "way" else float(v) for name, v in row.items()} for row in rows]


def crossing(rows, accuracy):
    """(reward, retrieval, epoch) where the accuracy first falls to that value; nan where it does not."""
    for a, b in zip(rows, rows[1:]):
        if b["accuracy"] <= accuracy < a["accuracy"]:
            share = (a["accuracy"] - accuracy) / (a["accuracy"] - b["accuracy"])
            pairs = [(a.get(name, np.nan), b.get(name, np.nan)) for name in ("reward", "retrieval", "epoch")]
            return [start + share * (end - start) for start, end in pairs]
    return [np.nan] * 3


def table(runs):
    titles = "reward at 0.85", "retrieval", "reward at 0.75", "retrieval", "passes to 0.85"
    print(f"{'way':9}" + "".join(f"{title:>34}" for title in titles))
    for way, members in runs.items():
        at_85, at_75 = (np.array([crossing(rows, accuracy) for rows in members]) for accuracy in (0.85, 0.75))
        cost = at_85[:, 2] * passes(way) if way in WAYS else at_85[:, 2]
        line = f"{way:9}"
        for values in (at_85[:, 0], at_85[:, 1], at_75[:, 0], at_75[:, 1], cost):
            digits = 0 if values is cost else 3
            each = " ".join(f"{value:.{digits}f}" for value in values)
            line += f"{f'{values.mean():.{digits}f} ({each})':>34}"
        print(line)


def figure(runs, path):
    canvas = Figure(figsize=(10, 4), layout="constrained")
    axes = canvas.subplots(1, 2, sharex=True)
    for number, (way, members) in enumerate(runs.items()):
        style = dict(color=f"C{number}", marker="o", markersize=3, linestyle="-" if way in WAYS else ":")
        for i, rows in enumerate(members):
            for axis, judge in zip(axes, ("accuracy", "retrieval")):
                x, y = [row["reward"] for row in rows], [row[judge] for row in rows]
                axis.plot(x, y, label=way if i == 0 else None, **style)
    axes[0].set(xlabel="reward: minus kB", ylabel="still recognised (nearest training picture)")
    axes[1].set(xlabel="reward: minus kB", ylabel="retrieval (tiny/clip)")
    axes[0].legend(frameon=False)
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
    if "last" in args.ways:
        files["strength"] = [path.with_name("strength.csv") for path in files["last"]]
        for path in files["strength"]:
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
    figure(runs, args.out / "frontier.png")
    print(f"wrote {args.out}/frontier.png")


if __name__ == "__main__":
    try:
        main()
    except rewards.BadInput as e:
        sys.exit(f"frontier.py: {e}")
