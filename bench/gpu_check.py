"""One command for the day there is a GPU: does all of it work there, and how fast? No network, nine minutes.

    python bench/gpu_check.py     # without a GPU the same at toy size: speed and memory are not judged

Each row of the table is guarded: what fails or has no time left is a row, and the others go on. Checked are
the suite's tests for a GPU, the main job in each precision, a resumed run, the rewards with small random
models, the full size (random weights) at three micro-batches, --compile on and off, --low-memory, and
bench/efficiency.py. Exit status: 1 if a row failed. The table is written to runs/gpu-check.txt as well.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rewards
import rlcm
from bench import full_size

ROOT = rlcm.HERE
GPU = torch.cuda.is_available()
ENDS = time.time() + 8.5 * 60  # a job that has not ended then is given up
PIXELS, TOY = (512, False) if GPU else (64, True)
# setting, micro-batch
FULL = [("bf16+compile", 16), ("bf16", 16), ("bf16", 2), ("bf16", 32), ("bf16+low", 1)]
FULL += [("bf16+compile", 32), ("bf16+compile", 2)]  # the most telling first, in case the time is up
FULL = FULL if GPU else [("bf16", 2), ("bf16+low", 1)]
rows = []


def row(name, passed, figure, should):
    """passed: True, False, or None for what is not judged."""
    verdict = {True: "pass", False: "FAIL", None: "-"}[passed]
    rows.append((name, verdict, figure, should))
    print(f"{name:24} {verdict:5} {figure}", flush=True)


def guarded(name, should, check, *args):
    """A check is a function -> passed, figure."""
    try:
        if left() <= 0:
            raise TimeoutError("no time left")
        row(name, *check(*args), should)
    except Exception as e:
        row(name, False, rlcm.one_line(e)[:70], should)


def left():
    return ENDS - time.time()


def output(*command, **environment):
    """What a program of the repository prints. Raises RuntimeError with its last line."""
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=left())
    options["env"] = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    if done.returncode:
        raise RuntimeError(((done.stderr or done.stdout).strip().splitlines() or ["killed"])[-1])
    return done.stdout


def suite():
    said = output("-m", "pytest", "-q", "test_rlcm.py", "-k", "on_the_gpu", RLCM_TEST_GPU="1")
    last = said.splitlines()[-1].strip("= ")
    return "passed" in last if GPU else None, last


def columns(run):
    """metrics.csv: {name: list of numbers}."""
    names, *lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return {name: [float(line[i]) for line in lines if line[i]] for i, name in enumerate(names)}


def train(out, epochs, *more):
    """The main job, shortened -> its metrics."""
    toy = "--batch-size 8 --steps 2" if TOY else ""
    given = f"--model tiny --reward compress --save-every 3 --min-likeness 0 --epochs {epochs} {toy}".split()
    output("rlcm.py", *given, "--out", out, *more)
    return columns(out)


def main_job(folder, precision, epochs):
    log = train(folder / precision, epochs, "--precision", precision)
    r, drift, clock = log["reward_mean"], max(log["ratio_drift"]), log["seconds"]
    pace = (clock[-1] - clock[0]) / (epochs - 1)
    learnt = r[-1] > r[0] or TOY
    figure = f"drift {drift:.2g}, reward {r[0]:.3f} -> {r[-1]:.3f}, {pace:.2f} s an epoch"
    return drift == 0 and learnt, figure


def resumed(folder, precision, epochs):
    """Against the uninterrupted main job: weights and rewards."""
    out = folder / f"{precision}-resumed"
    train(out, 3, "--precision", precision)
    output("rlcm.py", "--resume", out, "--epochs", epochs)
    logs = [columns(run)["reward_mean"][-1] for run in (out, folder / precision)]
    a, b = (rlcm.load_checkpoint(run)["trained"] for run in (out, folder / precision))
    gap = max((a[name] - b[name]).abs().max() / b[name].abs().max() for name in b).item()
    figure = f"weights off by {gap:.2g} of the largest, reward by {abs(logs[0] - logs[1]):.2g}"
    return gap <= (0.1 if GPU else 0), figure


def reward(name):
    """On this device, against float32 on the CPU."""
    import test_rlcm

    device, (images, _) = torch.device("cuda" if GPU else "cpu"), test_rlcm.whole_pixels(H=40, W=40)
    fn = rewards.get_reward(name)
    said = rewards.describe(images, rewards.HUB["llava"]) if name == "align" else []
    describe = rewards.describe

    def described(images, source):  # a long description may differ in half precision: it is run, not compared
        describe(images, source)
        return said

    with mock.patch.object(rewards, "describe", described):
        expected, score = (fn(v, test_rlcm.PROMPTS) for v in (images, images.to(device)))
    gap, size = (score - expected).abs().max().item(), expected.abs().max().item()
    return gap <= 0.02 * max(size, 1), f"off by {gap:.2g} of {size:.2g}"


def reward_rows(folder):
    """Small random models in the places of the hub's."""
    os.environ.setdefault("RLCM_TEST_GPU", "1")  # test_rlcm hides the GPU else
    import test_rlcm

    hub = {name: str(folder / name) for name in rewards.HUB}
    torch.manual_seed(0)
    test_rlcm.small_clip(hub["clip"], hub["clip"])
    test_rlcm.small_clip(hub["pickscore"], hub["pickscore-processor"])
    test_rlcm.small_llava(hub["llava"])
    test_rlcm.small_bert(hub["bert"])
    test_rlcm.small_aesthetic(hub["aesthetic"])
    with mock.patch.multiple(rewards, HUB=hub, BERT_LAYER=2):
        for name in [*test_rlcm.MODEL_REWARDS, "compress"]:
            guarded(f"reward {name}", "the CPU's in fp32, to 2 %", reward, name)


def full(folder, setting, m, tflop, rate):
    """A row of the full-size table."""
    found = full_size.measure(folder, setting, max(m, 8) if GPU else 2, m, PIXELS, tflop, rate, left())
    shares = found["rollout_share"], found["update_share"]
    figure = f"{shares[0]:.0%}, {shares[1]:.0%}; {found['rollout']:.3g} s, {found['update']:.3g} s; "
    figure += f"{found['peak']:.1f} GiB, drift {found['ratio_drift']:.2g}"
    good = found["ratio_drift"] < 1e-4
    if GPU and setting == "bf16+low":
        good = good and found["peak"] * 2**30 <= 8e9
    if GPU and (setting, m) == ("bf16+compile", 16):
        good = good and min(shares) >= 0.45
    return good, figure


def full_rows(folder):
    """Share of the bf16 matmul rate in rollout and update; seconds a picture and an action."""
    full_size.make(folder / "full", PIXELS, TOY)
    tflop, rate = full_size.count(PIXELS, TOY), full_size.matmul_rate()
    print(full_size.floor(tflop, rate, 16))
    row("bf16 matmul", None, f"{rate:.2f} TFLOP/s", "H100 SXM: 600 to 700, A100: 250")
    targets = {("bf16+compile", 16): "45 % in both; ", ("bf16+low", 1): "at most 8 GB; "}
    for setting, m in FULL:
        should = targets.get((setting, m), "") + "drift < 1e-4"
        guarded(f"{setting}, micro-batch {m}", should, full, folder / "full", setting, m, tflop, rate)


def efficiency():
    toy = " --batch-sizes 4" if TOY else ""
    said = output("bench/efficiency.py", *f"--methods rlcm --epochs {1 if TOY else 4}{toy}".split())
    found = float(re.search(r"^efficiency ([\d.]+)$", said, re.M)[1])
    return found >= 0.8 if GPU else None, f"{found:.2f}"


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args(argv)
    name = f"{os.cpu_count()} CPU cores, {platform.machine()}, toy size"
    name = torch.cuda.get_device_name() if GPU else name
    print(f"{name}, torch {torch.__version__}", flush=True)
    rlcm.quiet()
    epochs, began = 4 if TOY else 9, time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        guarded("suite", "passed", suite)
        for precision in ("fp32", "bf16", "fp16") if GPU else ("fp32", "bf16"):
            guarded(f"main job {precision}", "drift 0, reward rises", main_job, folder, precision, epochs)
        guarded("resume", "0.1 at most" if GPU else "bit for bit", resumed, folder, "fp32", epochs)
        for part in (reward_rows, full_rows):
            try:
                part(folder)
            except Exception as e:
                row(part.__name__, False, rlcm.one_line(e)[:70], "-")
        guarded("efficiency", "0.8 or more", efficiency)
    table = [f"{name}, torch {torch.__version__}, {time.time() - began:.0f} s", ""]
    table += ["| what | | found | should be |", "|---|---|---|---|"]
    table += [f"| {' | '.join(cells)} |" for cells in rows]
    print("\n".join(table))
    (ROOT / "runs").mkdir(exist_ok=True)
    (ROOT / "runs" / "gpu-check.txt").write_text("\n".join(table) + "\n")
    return int(any(verdict == "FAIL" for _, verdict, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
