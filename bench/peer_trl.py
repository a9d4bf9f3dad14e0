"""How fast is rlcm.py next to the DDPO trainer of TRL? Time per picture of whole epochs, on the same work.

    python bench/peer_trl.py                       # makes the peer's environment if missing, then measures
    python bench/peer_trl.py --profile             # also where the time goes
    python bench/peer_trl.py --batch-size 4 --micro-batch 4 --steps 2 --rounds 1       # does it run at all?

Three trainers run side by side, each in a process of its own: ours and TRL's at the same micro-batch, TRL's
at its default of one picture. A trainer waits on a pipe until it is told to do its next epoch, so only one
computes at a time; every round asks each for one epoch, in turns forwards and backwards, so that the
machine's noise hits all. The first epoch of each (with all loading) is not counted. An epoch lasts from the
end of one epoch's last optimizer step to the end of the next one's, the same hook in torch for both.

Pins     trl==0.23.1, the last release with DDPOTrainer, as published, with datasets==5.2.0 and
         pandas==3.1.1, which it imports. The rest is requirements.txt, so both trainers run on the same
         libraries. (Those of TRL 0.23.1's own days, transformers 4.56 and diffusers 0.35, cannot read
         tiny/sd, which was saved by later ones.) Adapted, from outside: one PartialState() before its
         pipeline, whose logger wants it.
Equal    tiny/sd with SD 1.5's schedule (noise in every step, as TRL wants it); fp32, CPU, threads; pictures
         an epoch; DDIM steps, eta 1; guidance in rollout and update; the 45 animals; rewards.compress; LoRA
         of rank and alpha 4 on to_q, to_k, to_v, to_out.0, which is fixed in TRL; optimizer steps an epoch;
         learning rate, clip ranges, gradient norm; advantages by prompt; no KL. What the U-Net is fed is
         counted in both; if it differs the script says so and fails.
Unequal  TRL encodes its prompts every time, ours once; TRL shuffles transitions; TRL's AdamW has a weight
         decay, ours is Adam; each has its own progress bar, ours also writes metrics.csv. Neither saves
         checkpoints.

s/epoch        seconds of an epoch over the rounds: median, least, most; ms/picture: of the median
cores          CPU time over time; where it falls short of --threads the machine had other work, and nothing
               printed should be believed
fed/picture    inputs of the U-Net
reward         mean of the first and of the last round's pictures
peer ratio     time of TRL over time of ours, median of the rounds
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = "torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy"
SAME = [line for line in (ROOT / "requirements.txt").read_text().split() if line.split("==")[0] in LIBRARIES]
PINS = ["trl==0.23.1", "datasets==5.2.0", "pandas==3.1.1", *SAME]
RATE, ADV_CLIP, GRAD_NORM, BUFFER, MIN_COUNT = 3e-3, 10.0, 5.0, 8, 4  # no influence on time, but equal
PARTS = ["U-Net in rollout", "U-Net in update", "backward", "VAE decode", "text encoder", "reward", "rest"]


# ---------------------------------------------------------------------------------------------------- workers
def ours(job):
    import rlcm

    given = {
        name: job[name] for name in ("model", "steps", "batch_size", "micro_batch", "updates", "guidance")
    }
    cfg = rlcm.configure(
        **given, method="ddpo", reward="compress", prompts="animals", precision="fp32", kl=0.0,
        lora_rank=4, lora_alpha=4, lr=RATE, adv_clip=ADV_CLIP, max_grad_norm=GRAD_NORM,
        buffer_size=BUFFER, min_count=MIN_COUNT, epochs=10**6, save_every=10**6, out=job["out"],
    )  # fmt: skip
    rlcm.train(cfg)


def theirs(job):
    import random

    from accelerate import PartialState

    import rewards

    PartialState()  # the pipeline below writes to accelerate's logger, which wants this first
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    m, score = job["micro_batch"], rewards.get_reward("compress")
    config = DDPOConfig(
        mixed_precision="no",
        save_freq=10**6,
        sample_num_steps=job["steps"],
        sample_eta=1.0,
        sample_guidance_scale=job["guidance"],
        sample_batch_size=m,
        sample_num_batches_per_epoch=job["batch_size"] // m,
        train_cfg=True,
        train_batch_size=m,
        train_gradient_accumulation_steps=job["batch_size"] // job["updates"] // m,
        train_learning_rate=RATE,
        train_adv_clip_max=ADV_CLIP,
        train_max_grad_norm=GRAD_NORM,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=BUFFER,
        per_prompt_stat_tracking_min_count=MIN_COUNT,
    )
    trainer = DDPOTrainer(
        config,
        lambda images, prompts, metadata: (score(images, prompts), {}),
        lambda: (random.choice(rewards.ANIMALS), {}),
        DefaultDDPOStableDiffusionPipeline(job["model"]),
    )
    step = 0
    for epoch in range(10**6):
        step = trainer.step(epoch, step)


def clocked(inner, part, spent, fed, scores):
    """The same function with a clock around it. The U-Net's inputs and the rewards are counted too."""
    import torch

    @functools.wraps(inner)
    def outer(*args, **kwargs):
        phase = "update" if torch.is_grad_enabled() else "rollout"
        key, start = f"U-Net in {phase}" if part == "U-Net" else part, time.perf_counter()
        result = inner(*args, **kwargs)
        spent[key] += time.perf_counter() - start
        if part == "U-Net":
            fed[key] += len(kwargs["sample"] if "sample" in kwargs else args[1])
        if part == "reward":
            scores.extend(result.tolist())
        return result

    return outer


def work(job):
    """Train for ever: an epoch for each line on stdin, answered by a line of JSON; at its end, end."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    sys.path.insert(0, str(ROOT))
    import diffusers
    import torch
    import transformers
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import rewards

    torch.set_num_threads(job["threads"])
    pins = [pin.split("==") for pin in SAME]
    unpinned = [f"{name} {version(name)}" for name, pin in pins if version(name).split("+")[0] != pin]
    spent, fed, scores, state = Counter(), Counter(), [], Counter()

    for owner, name, part in (
        (diffusers.UNet2DConditionModel, "forward", "U-Net"),
        (diffusers.AutoencoderKL, "decode", "VAE decode"),
        (transformers.CLIPTextModel, "forward", "text encoder"),
        (torch.Tensor, "backward", "backward"),
    ):
        setattr(owner, name, clocked(getattr(owner, name), part, spent, fed, scores))
    rewards.REWARDS["compress"] = clocked(rewards.compress, "reward", spent, fed, scores)

    def next_epoch():
        if not sys.stdin.readline():
            os._exit(0)
        for counted in (spent, fed, scores):
            counted.clear()
        state["start"], state["cpu"] = time.perf_counter(), time.process_time()

    def after_step(*_):
        state["steps"] += 1
        if state["steps"] % job["updates"] == 0:
            seconds = time.perf_counter() - state["start"]
            spent["rest"] = seconds - sum(spent.values())
            row = {
                "seconds": seconds,
                "cores": (time.process_time() - state["cpu"]) / seconds,
                "parts": spent,
                "fed": fed,
                "scored": len(scores),
                "reward": statistics.fmean(scores),
                "unpinned": unpinned,
            }
            print(json.dumps(row), file=answer, flush=True)
            next_epoch()

    register_optimizer_step_post_hook(after_step)
    next_epoch()
    (ours if job["who"] == "rlcm" else theirs)(job)


# ----------------------------------------------------------------------------------------------------- parent
def environment(folder):
    """The peer's python, with PINS; installed on the first call, or when they have changed."""
    python, done = folder / "bin" / "python", folder / "pins.json"
    if not done.exists() or json.loads(done.read_text()) != PINS:
        print(f"installing {' '.join(PINS)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
        done.write_text(json.dumps(PINS))
    return str(python)


def with_noise_to_the_end(folder):
    """A copy of tiny/sd with SD 1.5's DDIM schedule: TRL divides by the std of each step."""
    shutil.copytree(ROOT / "tiny" / "sd", folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"timestep_spacing": "leading", "set_alpha_to_one": False}
    path.write_text(json.dumps(config))


class Trainer:
    """A worker process. epoch() lets it run one epoch and returns its answer."""

    def __init__(self, python, who, micro_batch, args, folder):
        self.name, self.epochs = f"{who}, micro-batch {micro_batch}", []
        self.log = folder / f"{who}-{micro_batch}.log"
        job = {
            name: getattr(args, name) for name in ("batch_size", "steps", "updates", "guidance", "threads")
        }
        job |= {"who": who, "micro_batch": micro_batch, "model": str(folder / "sd")}
        job |= {"out": str(folder / f"{who}-{micro_batch}")}
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        command = [python, __file__, "--worker", json.dumps(job)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.log, "w"))
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)

    def epoch(self):
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            sys.exit(f"{self.name} has died; the end of its log:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)


def ratio(slow, fast):
    """Paired by round: median, and the whole range."""
    r = [a["seconds"] / b["seconds"] for a, b in zip(slow.epochs, fast.epochs)]
    return statistics.median(r), f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})"


def measure(args, folder):
    sys.path.insert(0, str(ROOT))
    import rlcm

    python, n = environment(args.venv), args.batch_size // args.updates
    same, default = min(args.micro_batch, n), min(rlcm.Config.micro_batch, n)
    if n % same or n % default:
        sys.exit(f"micro-batches of {same} and {default} must divide the {n} pictures of an optimizer step")
    trainers = {}
    with_noise_to_the_end(folder / "sd")
    try:
        for who, m in sorted({("rlcm", same), ("trl", same), ("rlcm", default), ("trl", 1)}):
            t = trainers[who, m] = Trainer(python if who == "trl" else sys.executable, who, m, args, folder)
            unpinned = ", ".join(t.epoch()["unpinned"])  # the first epoch is not counted
            print(f"{t.name}: ready" + (f"; not as pinned: {unpinned}" if unpinned else ""), flush=True)
        for i in range(args.rounds):
            for t in list(trainers.values())[:: -1 if i % 2 else 1]:
                t.epochs.append(t.epoch())
    finally:
        for t in trainers.values():
            t.process.kill()
            t.process.wait()

    table(trainers.values(), args)
    if args.profile:
        profile(trainers.values(), args)
    work_done = [
        json.dumps([e["fed"], e["scored"]], sort_keys=True) for t in trainers.values() for e in t.epochs
    ]
    if len(set(work_done)) > 1:
        each = [
            f"{t.name} fed {t.epochs[0]['fed']}, scored {t.epochs[0]['scored']}" for t in trainers.values()
        ]
        sys.exit("not the same work: " + "; ".join(each))
    a, text_a = ratio(trainers["trl", same], trainers["rlcm", same])
    b, text_b = ratio(trainers["trl", 1], trainers["rlcm", default])
    print("\ntime of TRL over time of rlcm, median of the rounds (range):", end=" ")
    print(f"same micro-batch {text_a}, defaults {text_b}")
    print(f"peer ratio same micro-batch {a:.2f}, defaults {b:.2f}")


def table(trainers, args):
    print(
        f"\n{args.batch_size} pictures an epoch, {args.steps} DDIM steps, guidance {args.guidance},", end=" "
    )
    print(f"{args.updates} optimizer steps, {args.threads} threads; {args.rounds} rounds")
    print(f"{'':24s} {'s/epoch: median':>16s} {'min':>8s} {'max':>8s} {'ms/picture':>11s}", end=" ")
    print(f"{'cores':>6s} {'fed/picture':>12s} {'reward: first, last':>22s}")
    for t in trainers:
        s, first, last = [e["seconds"] for e in t.epochs], t.epochs[0], t.epochs[-1]
        median, cores = statistics.median(s), statistics.median(e["cores"] for e in t.epochs)
        print(f"{t.name:24s} {median:16.2f} {min(s):8.2f} {max(s):8.2f}", end=" ")
        print(f"{1000 * median / args.batch_size:11.1f} {cores:6.2f}", end=" ")
        print(f"{sum(first['fed'].values()) / args.batch_size:12.1f}", end=" ")
        print(f"{first['reward']:12.3f} {last['reward']:9.3f}")


def profile(trainers, args):
    print(f"\n{'ms/picture (share)':24s}" + "".join(f"{part:>18s}" for part in PARTS))
    for t in trainers:
        mean = [statistics.fmean(e["parts"].get(part, 0.0) for e in t.epochs) for part in PARTS]
        cells = [f"{1000 * v / args.batch_size:10.2f} ({v / sum(mean):5.1%})" for v in mean]
        print(f"{t.name:24s}" + "".join(cells))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument(
        "--venv", type=Path, default=Path("/tmp/peer-trl-venv"), help="environment of TRL; made if missing"
    )
    p.add_argument("--batch-size", type=int, default=64, help="pictures in an epoch")
    p.add_argument("--micro-batch", type=int, default=32, help="of both, in the first comparison")
    p.add_argument("--steps", type=int, default=10, help="DDIM steps")
    p.add_argument("--updates", type=int, default=1, help="optimizer steps in an epoch")
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--rounds", type=int, default=7, help="measured epochs of each trainer")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--profile", action="store_true", help="also print where the time goes")
    p.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        return work(args.worker)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
