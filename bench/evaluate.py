"""What did a run learn? Mean reward of the base and of the tuned model, by number of steps.

    python bench/evaluate.py runs/NAME
    python bench/evaluate.py runs/NAME --prompts my_prompts.txt            # other held-out prompts
    python bench/evaluate.py runs/NAME --steps 2 4 8 --guidance 4          # than those of the run

Prints a table and writes it to the run's folder, evaluation.csv and evaluation.png:

steps            evaluations of the network for one picture: those of the run (H), for rlcm also 1, 2, 4, 8,
                 for the diffusion methods also H / 2, 2 H, 10, 20, 50; or --steps
weights          base: the pretrained model; tuned: with the run's LoRA
prompts          training: the run's; held-out: --prompts
reward           mean over --pictures pictures, base and tuned from the same noise
standard_error   of that mean
seconds          of drawing one picture, without its reward
"""
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from bench.sample import Parser, load_lora, open_run
from rewards import get_prompts, get_reward


def write_rows(rows, path):
    """A list of dicts with the same keys to a csv file."""
    lines = [",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))]
    rlcm.write(path, "\n".join(lines) + "\n")


def measure(model, cfg, prompts):
    """Draw and score a picture of each prompt -> the pictures, and the last three columns."""
    score, m = get_reward(cfg.reward, cfg.model), cfg.micro_batch
    began = time.time()
    images = rlcm.draw(model, cfg, prompts)
    if images.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.time() - began) / len(prompts)
    r = torch.cat([score(images[i : i + m], prompts[i : i + m]) for i in range(0, len(prompts), m)])
    error = r.std().item() / len(r) ** 0.5
    return images, {"reward": r.mean().item(), "standard_error": error, "seconds": seconds}


def evaluate(run, held_out="other-animals", steps=(), pictures=64, **changes):
    """Measure a run's folder, with its settings but for `changes` -> the table's rows. Raises BadInput."""
    run, held_out = Path(run), get_prompts(held_out)
    rlcm.require(pictures > 1, f"--pictures {pictures}: at least 2")
    cfg, model = open_run(run, **changes)
    H, more = cfg.steps, (1, 2, 4, 8)
    if cfg.method != "rlcm":
        more = (max(1, H // 2), 2 * H, 10, 20, 50)
    numbers = sorted(set(steps or (H, *more)))
    for n in numbers:
        rlcm.check(replace(cfg, steps=n))
    sets = {"training": get_prompts(cfg.prompts), "held-out": held_out}
    rows = []
    print(f"{'weights':8} {'prompts':9} {'steps':>5} {'reward':>8} {'+-':>6} {'seconds':>8}")
    for weights in ("base", "tuned"):
        if weights == "tuned":
            load_lora(model, run)
        for (name, prompts), n in itertools.product(sets.items(), numbers):
            prompts = (prompts * pictures)[:pictures]
            _, found = measure(model, replace(cfg, steps=n), prompts)
            rows.append({"steps": n, "weights": weights, "prompts": name} | found)
            print(f"{weights:8} {name:9} {n:5d}", end=" ")
            print("{reward:8.3f} {standard_error:6.3f} {seconds:8.4f}".format(**found), flush=True)
    write_rows(rows, run / "evaluation.csv")
    draw_figure(rows, run / "evaluation.png", cfg.reward)
    print(f"wrote {run}/evaluation.csv and {run}/evaluation.png")
    return rows


def draw_figure(rows, path, reward):
    """Reward against number of steps: a line for each of the weights and prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    for weights, prompts in dict.fromkeys((row["weights"], row["prompts"]) for row in rows):
        line = [row for row in rows if (row["weights"], row["prompts"]) == (weights, prompts)]
        steps, mean, error = zip(*((row["steps"], row["reward"], row["standard_error"]) for row in line))
        style = dict(color="C0" if weights == "base" else "C1", marker="o", capsize=3)
        style["linestyle"] = "-" if prompts == "training" else "--"
        axis.errorbar(steps, mean, error, label=f"{weights}, {prompts}", **style)
    axis.set(xlabel="evaluations of the network for one picture", ylabel=f"reward: {reward}", xscale="log")
    ticks = sorted({row["steps"] for row in rows})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main(argv=None):
    p = Parser("evaluate", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder")
    p.add_argument("--prompts", default="other-animals", help="held-out prompts, as --prompts of rlcm.py")
    p.add_argument("--steps", nargs="+", type=int, default=(), metavar="N", help="numbers of steps to try")
    p.add_argument("--guidance", type=float, help="guidance scale; default: the run's")
    p.add_argument("--pictures", type=int, default=64, help="for each row of the table; default 64")

    def work(args):
        changes = {} if args.guidance is None else {"guidance": args.guidance}
        evaluate(args.run, args.prompts, args.steps, args.pictures, **changes)

    return p.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
