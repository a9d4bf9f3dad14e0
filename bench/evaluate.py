"""What did a run learn? Mean reward of the base and of the tuned model, by number of steps.

    python bench/evaluate.py runs/NAME
    python bench/evaluate.py runs/NAME --judges clip aesthetic             # rewards it was not trained on
    python bench/evaluate.py runs/NAME --prompts my_prompts.txt            # other held-out prompts
    python bench/evaluate.py runs/NAME --steps 2 4 8 --guidance-scale 4    # other than in training

Prints a table and writes it to the run's folder, as evaluation.csv:

weights          base: the pretrained model; tuned: with what the run learned
prompts          training: the run's; held-out: --prompts
steps            network evaluations per image: those of the run, for rlcm also 1, 2, 4, 8, for ddpo and score
                 also 2, 5, 10, 20, 50; or --steps
reward           mean over --images images, base and tuned from the same noise; after +- its standard error,
                 in the file reward_error; the same for each judge, in a column of its name
seconds          to draw an image, without its reward
"""
import contextlib
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rlcm
from bench.common import Parser, open_run
from rewards import get_prompts, get_reward


def evaluate(run, held_out="other-animals", steps=(), judges=(), count=64, **changes):
    """Measure a run, with its settings except for `changes`. Returns the rows. Raises BadInput."""
    run = Path(run)
    rlcm.require(count > 1, f"--images {count}: at least 2")
    cfg, model = open_run(run, **changes)
    rewards = {"reward": get_reward(cfg.reward, cfg.model)}
    rewards |= {name: get_reward(name, cfg.model) for name in judges}
    training = get_prompts(str(run / "prompts.txt"))
    trained = {prompt.lower() for prompt in training}
    unseen = [prompt for prompt in dict.fromkeys(get_prompts(held_out)) if prompt.lower() not in trained]
    rlcm.require(unseen, f"--prompts {held_out}: the run was trained on all of them, so none is held out")
    sets = {"training": training, "held-out": unseen}
    print(f"{len(training)} training prompts, {len(unseen)} of {held_out} that are not among them")

    # Of the default numbers of steps, those that the scheduler refuses are left out.
    more = (1, 2, 4, 8) if cfg.method == "rlcm" else (2, 5, 10, 20, 50)
    numbers = []
    for n in sorted(set(steps or (cfg.steps, *more))):
        rlcm.check(replace(cfg, steps=n))
        try:
            with rlcm.explained(f"--steps {n} does not suit the model's scheduler"):
                model.schedule(n)
            numbers.append(n)
        except rlcm.BadInput as e:
            if steps:
                raise
            print(f"left out: {e}")

    rlcm.load_checkpoint(run, model)
    states = {"base": model.reference, "tuned": contextlib.nullcontext}
    rows = []
    print(f"{'weights':8}{'prompts':10}{'steps':>5}", *(f"{name:>18}" for name in rewards), "  seconds")
    for (weights, state), (name, prompts), n in itertools.product(states.items(), sets.items(), numbers):
        prompts = [prompts[i * len(prompts) // count] for i in range(count)]  # spread over all of them
        began = time.time()
        with state():
            images = rlcm.generate(model, replace(cfg, steps=n), prompts)
        images.sum().item()  # waits for the GPU
        seconds = (time.time() - began) / count
        row = {"weights": weights, "prompts": name, "steps": n}
        cells = []
        for column, reward in rewards.items():
            r = reward(images, prompts, cfg.micro_batch)
            row[column] = r.mean().item()
            row[f"{column}_error"] = r.std().item() / count**0.5
            cells.append(f"{row[column]:9.3f} +- {row[f'{column}_error']:.3f}")
        rows.append(row | {"seconds": seconds})
        print(f"{weights:8}{name:10}{n:5}", *cells, f"{seconds:9.4f}", flush=True)

    rlcm.write_rows(rows, run / "evaluation.csv")
    print(f"wrote {run}/evaluation.csv")
    return rows


def main(argv=None):
    p = Parser("evaluate", __doc__)
    p.add_argument("run", metavar="RUN", help="a run's folder")
    p.add_argument("--judges", nargs="+", default=(), metavar="REWARD", help="other rewards, as in rlcm.py")
    p.add_argument("--prompts", default="other-animals", help="held-out prompts, as --prompts of rlcm.py")
    p.add_argument("--steps", nargs="+", type=int, default=(), metavar="N", help="numbers of steps to try")
    p.add_argument("--guidance-scale", type=float, help="default: the run's")
    p.add_argument("--images", type=int, default=64, help="for each row of the table; default 64")

    def work(args):
        changes = {"guidance_scale": args.guidance_scale} if args.guidance_scale is not None else {}
        evaluate(args.run, args.prompts, args.steps, args.judges, args.images, **changes)

    return p.run(work, argv)


if __name__ == "__main__":
    sys.exit(main())
