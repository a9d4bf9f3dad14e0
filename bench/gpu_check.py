"""One command for the day there is a GPU: does all of it work there, and how fast? No network, nine minutes.

    python bench/gpu_check.py
    python bench/gpu_check.py --toy     # the same at toy size, also on a CPU: is this script itself in order?

Each row of the table is guarded: what fails or has no time left is a row, and the others go on. Checked are
the main job in each precision, a resumed run, rewards on the GPU, the full-size architecture with random
weights at several settings, and bench/efficiency.py. The table goes to runs/gpu-check.txt too. Exit status:
1 if a row failed.

Full size is the U-Net of LCM_Dreamshaper_v7 (SD 1.5 with guidance embedding, 860 M weights), CLIP ViT-L's
text encoder and the KL-f8 VAE, built from their configurations: the shapes and the cost of the real thing.
The program trains it with 4 steps (3 actions) at 512 px; of the last of four epochs the row says:

share     of the rate at which this GPU multiplies large bf16 matrices, from the floating-point operations
          of rollout, decode and update, counted on the meta device; what --gradient-checkpointing computes
          twice counts once, what the program does besides is in the time
seconds   of the epoch
GiB       peak of GPU memory that torch had allocated; on a CPU 0
drift     largest |ratio - 1| before the first optimizer step
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from bench.efficiency import now
from bench.plot import read_rows
from bench.sample import Parser
from rewards import get_reward
from tiny import make_tiny

ROOT = Path(rlcm.__file__).resolve().parent
ENDS = time.time() + 8.5 * 60  # a job that has not ended then is given up
H, ACTIONS = 4, 3
# Flags, micro-batch; the most telling first, in case the time is up
FULL = [("--compile", 16), ("", 16), ("", 4), ("--gradient-checkpointing", 4)]
TOY = [("", 2), ("--gradient-checkpointing", 1)]
rows = []


def row(name, passed, found, should=""):
    """passed: True, False, or None for what is not judged."""
    verdict = {True: "pass", False: "FAIL", None: "-"}[passed]
    rows.append((name, verdict, found, should))
    print(f"{name:44} {verdict:5} {found}", flush=True)


def guarded(name, should, check, *args):
    """A check is a function -> passed, what was found."""
    try:
        if time.time() > ENDS:
            raise TimeoutError("no time left")
        row(name, *check(*args), should)
    except Exception as e:
        row(name, False, rlcm.one_line(e)[:100], should)


def output(*command):
    """What a program of the repository prints. Raises RuntimeError with its last line."""
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=max(1, ENDS - time.time()))
    options["env"] = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    return done.stdout


# ---- the embedded model
def main_job(out, precision, toy, epochs):
    flags = "--model tiny --reward compress --save-every 3" + " --batch-size 8 --steps 2" * toy
    output("rlcm.py", *flags.split(), "--epochs", epochs, "--precision", precision, "--out", out)
    log = read_rows(out / "metrics.csv")
    first, last, drift = log[0]["reward_mean"], log[-1]["reward_mean"], max(r["ratio_drift"] for r in log)
    found = f"drift {drift:.2g}, reward {first:.3f} to {last:.3f}, "
    seconds = (log[-1]["seconds"] - log[0]["seconds"]) / (epochs - 1)
    return drift == 0 and (toy or last > first), found + f"{seconds:.2f} s an epoch"


def resumed(folder, toy, epochs):
    """A run that was cut in two against the one that was not."""
    whole, cut = folder / "fp32", folder / "cut"
    main_job(cut, "fp32", toy, 3)
    output("rlcm.py", "--resume", cut, "--epochs", epochs)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True)["trained"] for out in (cut, whole))
    gap = max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in b)
    return gap <= (0.1 if torch.cuda.is_available() else 0), f"weights off by {gap:.2g} of the largest"


def reward(name):
    """On this device, against the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, prompts = (v[:4] for v in make_tiny.training_pictures())
    fn = get_reward(name, "tiny")
    expected, found = (fn(images.to(d), prompts).cpu() for d in ("cpu", device))
    gap, size = (found - expected).abs().max().item(), expected.abs().max().item()
    return gap <= 0.02 * max(size, 1), f"off by {gap:.2g} of {size:.2g}"


def efficiency(toy):
    flags = "--methods rlcm --epochs " + ("1 --batch-sizes 8" if toy else "4")
    found = float(re.search(r"^efficiency ([\d.]+)$", output("bench/efficiency.py", *flags.split()), re.M)[1])
    return None if toy else found >= 0.8, f"{found:.2f}"


# ---- full size
def networks(pixels, toy):
    """The U-Net and the VAE of the full size; toy: the same layers, a tenth as wide."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    wide, vae_wide = (320, 640, 1280, 1280), (128, 256, 512, 512)
    if toy:
        wide, vae_wide = (32, 64, 128, 128), (32, 32, 32, 32)
    unet = UNet2DConditionModel(
        sample_size=pixels // 8, cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=256,
        block_out_channels=wide,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=vae_wide, layers_per_block=2, latent_channels=4, sample_size=pixels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return unet, vae


def make(folder, pixels, toy):
    """Write a pipeline of the full size with random weights, in bf16: 2.1 GB."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet, vae = networks(pixels, toy)
    sizes = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    text = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1 if toy else 12))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "lcm" / "tokenizer", model_max_length=77)
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipe = LatentConsistencyModelPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(dtype=torch.bfloat16).save_pretrained(folder)


def count(pixels, toy):
    """TFLOP of one picture's rollout, decode and update."""
    from peft import LoraConfig
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet, vae = networks(pixels, toy)
        lora = LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        unet.requires_grad_(False).add_adapter(lora)
        x, c = torch.zeros(1, 4, pixels // 8, pixels // 8), torch.zeros(1, 77, 768)
        given = dict(timestep=torch.zeros(1), encoder_hidden_states=c, timestep_cond=torch.zeros(1, 256))
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                vae.decode(x)
                for _ in range(H):
                    unet(x, **given)
            for _ in range(ACTIONS):
                unet(x, **given).sample.sum().backward()
    return counter.get_total_flops() / 1e12


def matmul_rate():
    """TFLOP a second of a product of large square matrices in bf16 on this machine: median of ten."""
    gpu, seconds = torch.cuda.is_available(), []
    n = 8192 if gpu else 1024
    a = torch.randn(n, n, device="cuda" if gpu else "cpu", dtype=torch.bfloat16)
    for _ in range(13):
        began = now()
        a @ a
        seconds.append(now() - began)
    return 2 * n**3 / sorted(seconds[3:])[5] / 1e12


def full(folder, flags, m, pixels, tflop, rate, toy):
    """The program itself with that architecture, in a process of its own."""
    out, B = folder / f"full{flags}-{m}", 2 if toy else 16
    given = f"--model {folder}/full --reward compress --precision bf16 --pixels {pixels} --steps {H}"
    given += f" --epochs 4 --batch-size {B} --micro-batch {m} --save-every 100 {flags} --out {out}"
    said = output(__file__, "--work", *given.split())
    log, peak = read_rows(out / "metrics.csv"), float(said.splitlines()[-1])
    seconds = log[-1]["seconds"] - log[-2]["seconds"]
    drift, share = max(row["ratio_drift"] for row in log), B * tflop / rate / seconds
    found = f"share {share:.0%}, {seconds:.3g} s, {peak:.1f} GiB, drift {drift:.2g}"
    fast = toy or (flags, m) != FULL[0] or share >= 0.4
    return drift < 1e-4 and fast, found


def full_rows(folder, toy):
    pixels = 64 if toy else 512
    make(folder / "full", pixels, toy)
    tflop, rate = count(pixels, toy), matmul_rate()
    row("TFLOP of a picture, full size", None, f"{tflop:.3g}")
    row("bf16 matmul", None, f"{rate:.2f} TFLOP/s", "H100 SXM: 600 to 700, A100: 250")
    for i, (flags, m) in enumerate(TOY if toy else FULL):
        should = "drift < 1e-4" + ", share 40 %" * (not toy and i == 0)
        name = f"full size {flags} micro-batch {m}".replace("  ", " ")
        guarded(name, should, full, folder, flags, m, pixels, tflop, rate, toy)


def check(args):
    toy, gpu = args.toy, torch.cuda.is_available()
    rlcm.require(toy or gpu, "there is no CUDA GPU here: --toy tries this script on the CPU")
    name = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
    title, began = f"{name}, torch {torch.__version__}{', toy size' * toy}", time.time()
    print(title, flush=True)
    epochs = 4 if toy else 9
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for precision in ("fp32", "bf16"):
            should = "drift 0, reward rises"
            guarded(f"main job {precision}", should, main_job, folder / precision, precision, toy, epochs)
        guarded("resume", "0.1 at most" if gpu else "bit for bit", resumed, folder, toy, epochs)
        for reward_name in ("compress", "clip"):
            guarded(f"reward {reward_name}", "the CPU's, to 2 %", reward, reward_name)
        try:
            full_rows(folder, toy)
        except Exception as e:
            row("full size", False, rlcm.one_line(e)[:100])
        guarded("efficiency", "0.8 or more", efficiency, toy)
    table = [f"{title}, {time.time() - began:.0f} s", ""]
    for cells in (("what", "", "found", "should be"), ("---",) * 4, *rows):
        table.append(f"| {' | '.join(cells)} |")
    path = ROOT / "runs" / "gpu-check.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(table) + "\n")
    print(f"wrote {path}")
    return int(any(verdict == "FAIL" for _, verdict, _, _ in rows))


def main(argv=None):
    p = Parser("gpu_check", __doc__)
    p.add_argument("--toy", action="store_true", help="toy size, also without a GPU; two minutes")
    p.add_argument("--work", action="store_true", help="rlcm.py with the other flags, then its peak memory")

    def work(args):
        if not args.work:
            if args.flags:
                p.error(f"unknown argument {args.flags[0]}")
            return check(args)
        status = rlcm.main(args.flags)
        print(torch.cuda.max_memory_allocated() / 2**30)  # without a GPU it is 0
        return status

    return p.run(work, argv, more=True)


if __name__ == "__main__":
    sys.exit(main())
