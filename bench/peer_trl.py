"""How fast is rlcm.py next to the DDPO trainer of TRL? Seconds of whole epochs, on the same work.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install -r requirements.txt PINS      # see below
    python bench/peer_trl.py --python /tmp/peer/bin/python
    python bench/peer_trl.py --python ... --trl-micro-batch 1         # its default beside ours
    python bench/peer_trl.py --python ... --batch-size 4 --micro-batch 4 --steps 2 --rounds 1     # a try

PINS are trl==0.23.1, the last release with DDPOTrainer, and datasets==5.2.0 pandas==3.1.1, which it imports;
so both trainers run on the same libraries.

Both run side by side, each in a process of its own, at the same micro-batch unless told otherwise. A trainer
waits on a pipe until it is told to do its next epoch, so only one computes at a time; every round asks each
for one epoch, in turns forwards and backwards, so that the machine's noise hits both. The first epoch of
each, with all loading, is not counted. An epoch lasts from the end of one epoch's last optimizer step to the
end of the next one's, by the same hook in torch.

Equal    tiny/sd with SD 1.5's schedule (noise in every step, as TRL wants it); fp32, CPU, threads; pictures
         an epoch; DDIM steps, eta 1; guidance in rollout and update; the 45 animals; rewards.compress; LoRA
         of rank and alpha 4 on to_q, to_k, to_v, to_out.0, which is fixed in TRL; optimizer steps an epoch;
         learning rate, clip ranges, gradient norm; advantages by prompt; no KL. What the U-Net is fed is
         counted in both; if it differs the script says so and fails.
Unequal  TRL shuffles transitions; TRL's AdamW has a weight decay, ours is Adam; each has its own progress
         bar; ours also writes metrics.csv and a checkpoint every epoch.

s/epoch      seconds of an epoch over the rounds: median (least to most)
cores        CPU time over time; where it falls short of --threads the machine had other work, and nothing
             printed should be believed
fed/picture  inputs of the U-Net
peer ratio   time of TRL over time of ours, median of the rounds
"""
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from bench.sample import Parser
from rewards import get_prompts, get_reward

ROOT = Path(rlcm.__file__).resolve().parent
PINS = "trl==0.23.1 datasets==5.2.0 pandas==3.1.1"
RATE, ADV_CLIP, GRAD_NORM, BUFFER, MIN_COUNT = 3e-3, 10.0, 5.0, 8, 4  # no influence on time, but equal
SHARED = "model", "steps", "batch_size", "micro_batch", "updates", "guidance"


# ---- workers
def ours(job):
    cfg = rlcm.Config(
        **{name: job[name] for name in SHARED}, method="ddpo", lora_rank=4, lora_alpha=4, lr=RATE,
        adv_clip=ADV_CLIP, max_grad_norm=GRAD_NORM, buffer_size=BUFFER, min_count=MIN_COUNT,
        epochs=10**6, save_every=10**6, out=job["out"],
    )  # fmt: skip
    rlcm.train(cfg)


def theirs(job):
    import random

    from accelerate import PartialState

    PartialState()  # the pipeline below writes to accelerate's logger, which wants this first
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    m, score, animals = job["micro_batch"], get_reward("compress"), get_prompts("animals")
    config = DDPOConfig(
        sample_num_steps=job["steps"], sample_eta=1.0, sample_guidance_scale=job["guidance"], train_cfg=True,
        sample_batch_size=m, sample_num_batches_per_epoch=job["batch_size"] // m, train_batch_size=m,
        train_gradient_accumulation_steps=job["batch_size"] // job["updates"] // m,
        train_learning_rate=RATE, train_adv_clip_max=ADV_CLIP, train_max_grad_norm=GRAD_NORM,
        per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=BUFFER,
        per_prompt_stat_tracking_min_count=MIN_COUNT, mixed_precision="no", save_freq=10**6,
    )  # fmt: skip
    trainer = DDPOTrainer(
        config,
        lambda images, prompts, metadata: (score(images, prompts), {}),
        lambda: (random.choice(animals), {}),
        DefaultDDPOStableDiffusionPipeline(job["model"]),
    )
    step = 0
    for epoch in range(10**6):
        step = trainer.step(epoch, step)


def work(job):
    """Train for ever: an epoch for each line on stdin, answered by a line of JSON; at its end, end."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    from diffusers import UNet2DConditionModel
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(job["threads"])
    fed, state, forward = Counter(), Counter(), UNet2DConditionModel.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        sample = kwargs["sample"] if "sample" in kwargs else args[1]
        fed["update" if torch.is_grad_enabled() else "rollout"] += len(sample)
        return forward(*args, **kwargs)

    def next_epoch():
        if not sys.stdin.readline():
            os._exit(0)
        fed.clear()
        state["start"], state["cpu"] = time.perf_counter(), time.process_time()

    def after_step(*_):
        state["steps"] += 1
        if state["steps"] % job["updates"] == 0:
            seconds = time.perf_counter() - state["start"]
            row = {"seconds": seconds, "cores": (time.process_time() - state["cpu"]) / seconds, "fed": fed}
            print(json.dumps(row), file=answer, flush=True)
            next_epoch()

    UNet2DConditionModel.forward = counted
    register_optimizer_step_post_hook(after_step)
    next_epoch()
    (ours if job["who"] == "rlcm" else theirs)(job)


# ---- the script
def with_noise_to_the_end(folder):
    """A copy of tiny/sd with SD 1.5's DDIM schedule: TRL divides by the std of each step."""
    shutil.copytree(ROOT / "tiny" / "sd", folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"timestep_spacing": "leading", "set_alpha_to_one": False}
    path.write_text(json.dumps(config))


class Trainer:
    """A worker process. epoch() lets it run one epoch and returns its answer."""

    def __init__(self, python, who, args, folder):
        self.name, self.epochs, self.log = who, [], folder / f"{who}.log"
        names = *SHARED[1:], "threads"
        job = {name: getattr(args, name) for name in names} | {"who": who, "model": str(folder / "sd")}
        job["micro_batch"] = who == "trl" and args.trl_micro_batch or args.micro_batch
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        command = [python, __file__, "--worker", json.dumps(job | {"out": str(folder / who)})]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.log, "w"))
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)

    def epoch(self):
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        end = (self.log.read_text().strip().splitlines() or ["killed"])[-1]
        rlcm.require(line, f"{self.name} has died: {end}")
        return json.loads(line)


def measure(args, folder):
    fits = args.batch_size % (args.updates * args.micro_batch) == 0
    rlcm.require(fits, "--batch-size must be a multiple of --updates times --micro-batch")
    try:
        there = subprocess.run([args.python, "-c", "import trl.trainer.ddpo_trainer"], capture_output=True)
        found = there.returncode == 0
    except OSError:
        found = False
    advice = f"pip install -r requirements.txt {PINS}"
    rlcm.require(found, f"TRL with DDPOTrainer is not installed in {args.python}: {advice}, then --python")
    with_noise_to_the_end(folder / "sd")
    trainers = []
    try:
        for who, python in (("rlcm", sys.executable), ("trl", args.python)):
            trainers.append(Trainer(python, who, args, folder))
            trainers[-1].epoch()  # is not counted
        for i in range(args.rounds):
            for t in trainers[:: -1 if i % 2 else 1]:
                t.epochs.append(t.epoch())
    finally:
        for t in trainers:
            t.process.kill()
            t.process.wait()
    report(args, *trainers)


def report(args, rlcm_trainer, trl_trainer):
    print(f"{args.batch_size} pictures an epoch in micro-batches of {args.micro_batch}", end=", ")
    print(f"{args.steps} steps, guidance {args.guidance}, {args.updates} updates, {args.rounds} rounds")
    for t in (rlcm_trainer, trl_trainer):
        s, cores = [e["seconds"] for e in t.epochs], statistics.median(e["cores"] for e in t.epochs)
        fed = sum(t.epochs[0]["fed"].values()) / args.batch_size
        print(f"{t.name:5} s/epoch {statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})", end="   ")
        print(f"cores {cores:.2f} of {args.threads}   fed/picture {fed:.1f}")
    fed = [e["fed"] for t in (rlcm_trainer, trl_trainer) for e in t.epochs]
    different = next((f for f in fed if f != fed[0]), None)
    rlcm.require(different is None, f"not the same work: the U-Net was fed {fed[0]} and {different}")
    r = [b["seconds"] / a["seconds"] for a, b in zip(rlcm_trainer.epochs, trl_trainer.epochs)]
    print(f"peer ratio {statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})")


def main(argv=None):
    p = Parser("peer_trl", __doc__)
    p.add_argument("--python", default=sys.executable, help="of an environment with TRL")
    p.add_argument("--batch-size", type=int, default=64, help="pictures in an epoch")
    p.add_argument("--micro-batch", type=int, default=32, help="of both")
    p.add_argument("--trl-micro-batch", type=int, help="of TRL alone; its own default is 1")
    p.add_argument("--steps", type=int, default=10, help="DDIM steps")
    p.add_argument("--updates", type=int, default=1, help="optimizer steps in an epoch")
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--rounds", type=int, default=7, help="measured epochs of each trainer")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--worker", type=json.loads, help="a trainer; used by the script itself")

    def run(args):
        if args.worker:
            work(args.worker)
            return
        with tempfile.TemporaryDirectory() as folder:
            measure(args, Path(folder))

    return p.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
