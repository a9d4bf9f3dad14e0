"""Memory and time of the real architecture with random weights: no download, same shapes, same cost.

    python bench/full_size.py                                      # every setting of this device, 512 px
    python bench/full_size.py --pixels 256 --settings fp32 bf16+low
    python bench/full_size.py --make runs/full-size                # only build the pipeline; then
    python rlcm.py --model runs/full-size ...                      # the program itself at that size

The U-Net of LCM_Dreamshaper_v7 (SD 1.5 with guidance embedding, 860 M weights), CLIP ViT-L's text encoder
and the KL-f8 VAE, built from their configurations. Each setting runs in a process of its own: the program's
rollout and update at H = 4 with 3 actions, LoRA of rank 16, no KL. "low" is --low-memory, "compile" is
--compile. In front of the table the floor: the TFLOP of an epoch, counted on the meta device, over the rate
at which this device multiplies large bf16 matrices. Columns:

micro-batch   rows of one pass of the network
rollout       seconds a picture: four evaluations and one decode
update        seconds an action: forward, backward and its share of the optimizer step
share         of that rate that rollout and update reach; what --low-memory computes twice counts once
ratio_drift   largest |ratio - 1| before the first optimizer step
peak          of GPU memory allocated by torch; on a CPU of resident memory, loading included
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm

SETTINGS = "fp32", "fp32+low", "bf16", "bf16+low", "bf16+compile", "fp16", "fp16+low"
H, ACTIONS = 4, 3


def networks(pixels, toy=False):
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


def count(pixels, toy=False):
    """TFLOP of a forward pass, of forward and backward, and of a decode, for one row: {name: TFLOP}."""
    from peft import LoraConfig
    from torch.utils.flop_counter import FlopCounterMode

    def tflop(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops() / 1e12

    with torch.device("meta"):
        unet, vae = networks(pixels, toy)
        lora = LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        unet.requires_grad_(False).add_adapter(lora)
        x, t, c = torch.zeros(1, 4, pixels // 8, pixels // 8), torch.zeros(1), torch.zeros(1, 77, 768)
        w = torch.zeros(1, 256)
        with torch.no_grad():
            forward, decode = tflop(lambda: unet(x, t, c, timestep_cond=w)), tflop(lambda: vae.decode(x))
        both = tflop(lambda: unet(x, t, c, timestep_cond=w).sample.sum().backward())
    return {"forward": forward, "both": both, "decode": decode}


def matmul_rate():
    """TFLOP a second of a product of large square matrices in bf16 on this machine: median of ten."""
    gpu = torch.cuda.is_available()
    n, seconds = 8192 if gpu else 1024, []
    a = torch.randn(n, n, device="cuda" if gpu else "cpu", dtype=torch.bfloat16)
    for _ in range(13):
        began = now()
        a @ a
        seconds.append(now() - began)
    return 2 * n**3 / sorted(seconds[3:])[5] / 1e12


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make(folder, pixels, toy=False):
    """Write a pipeline of the full size with random weights, in bf16: 2.1 GB -> weights of the U-Net."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    unet, vae = networks(pixels, toy)
    sizes = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    text = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1 if toy else 12))
    torch.set_default_dtype(torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(rlcm.HERE / "tiny" / "lcm" / "tokenizer", model_max_length=77)
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipe = LatentConsistencyModelPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(f"{folder}.part")
    os.replace(f"{folder}.part", folder)
    return sum(p.numel() for p in unet.parameters())


def work(folder, setting, B, micro_batch, pixels):
    """Measure one setting with B pictures -> a dict. On a GPU all runs twice, and the second time counts."""
    from accelerate import Accelerator

    precision, *extra = setting.split("+")
    settings = dict(precision=precision, low_memory="low" in extra, compile="compile" in extra, pixels=pixels)
    settings |= dict(steps=H, batch_size=B, kl=0.0, last_noise=0.0)
    settings |= {"micro_batch": micro_batch} if micro_batch else {}
    cfg = rlcm.configure(model=folder, **settings)
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    device = accelerator.device
    model = rlcm.load_model(cfg, accelerator)
    optimizer = accelerator.prepare_optimizer(torch.optim.Adam(model.trained.values(), cfg.lr))
    s, c = rlcm.rlcm_schedule(model.pipe.scheduler, H, device), rlcm.encode(model.pipe, ["a cat"] * B)
    m = max(m for m in range(1, cfg.micro_batch + 1) if B % m == 0)
    for i in range(2 if device.type == "cuda" or cfg.compile else 1):
        g = torch.Generator().manual_seed(i)
        z = torch.randn(H + 1, B, *model.shape, generator=g).to(device)
        clock, parts = [now()], []
        for b in torch.arange(B).split(m):
            parts.append(rlcm.rollout(rlcm.rlcm_policy, model.eps, s, c[b], z[:, b]))
            assert rlcm.decode(model.pipe, parts[-1][0][-1]).isfinite().all()
        clock.append(now())
        x, _, log_p = (torch.cat(part, 1) for part in zip(*parts))
        log = rlcm.update(
            rlcm.rlcm_policy, model.eps, s, c, x, log_p, torch.randn(B, device=device), optimizer, m,
            backward=accelerator.backward, clip_grad_norm=accelerator.clip_grad_norm_,
        )  # fmt: skip
        clock.append(now())
    assert log["grad_norm"] > 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "micro_batch": m,
        "rollout": (clock[1] - clock[0]) / B,
        "update": (clock[2] - clock[1]) / (B * len(s.actions)),
        "ratio_drift": log["ratio_drift"],
        "peak": (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident) / 2**30,
    }


def measure(folder, setting, B, micro_batch, pixels, tflop, rate, timeout=None):
    """`work` in a process of its own, and the shares of the rate reached. Raises RuntimeError."""
    given = [folder, setting, B, micro_batch, pixels]
    command = [sys.executable, __file__, "--work", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    row = json.loads(done.stdout.splitlines()[-1])
    shares = {
        "rollout_share": (H * tflop["forward"] + tflop["decode"]) / rate / row["rollout"],
        "update_share": tflop["both"] / rate / row["update"],
    }
    return row | shares


def floor(tflop, rate, B):
    """What an epoch of B pictures computes and how long it takes at least, in words."""
    epoch = B * (H * tflop["forward"] + tflop["decode"] + ACTIONS * tflop["both"])
    parts = ", ".join(f"{name} {v:.3g}" for name, v in tflop.items())
    return (
        f"TFLOP a row: {parts}; an epoch of {B} pictures, H = {H}, {ACTIONS} actions: {epoch:.1f}\n"
        f"bf16 matmul here: {rate:.2f} TFLOP/s; floor of the epoch: {epoch / rate:.2f} s"
    )


def main():
    raw, gpu = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS if gpu else SETTINGS[:4])
    p.add_argument("--pixels", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=16 if gpu else 1)
    p.add_argument("--make", metavar="FOLDER", help="build the pipeline there and stop")
    p.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = p.parse_args()
    rlcm.quiet()
    if args.work:
        print(json.dumps(work(*args.work[:2], *map(int, args.work[2:]))))
        return
    folder, B = Path(args.make or "runs/full-size.tmp"), args.batch_size
    if not folder.exists():
        print(f"U-Net with {make(folder, args.pixels) / 1e6:.0f} M weights in {folder}", flush=True)
    if args.make:
        return
    cores = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})"
    name = torch.cuda.get_device_name() if gpu else cores
    tflop, rate = count(args.pixels), matmul_rate()
    print(f"{name}, {args.pixels} px, {B} pictures\n{floor(tflop, rate, B)}")
    print(f"{'setting':13}{'micro-batch':>12}{'rollout':>10}{'update':>10}", end="")
    print(f"{'share':>14}{'ratio_drift':>13}{'peak':>10}")
    try:
        for setting in args.settings:
            print(f"{setting:13}", end="", flush=True)
            try:
                row = measure(folder, setting, B, 0, args.pixels, tflop, rate)
            except RuntimeError as e:
                print(f"  failed: {e}", flush=True)
                continue
            print(f"{row['micro_batch']:>12}{row['rollout']:>9.2f}s{row['update']:>9.2f}s", end="")
            print(f"{row['rollout_share']:>7.0%}{row['update_share']:>7.0%}", end="")
            print(f"{row['ratio_drift']:>13.2g}{row['peak']:>6.1f} GiB", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
