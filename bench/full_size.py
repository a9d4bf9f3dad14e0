"""Memory and time of the real architecture with random weights: no download, same shapes, same cost.

    python bench/full_size.py                                      # every setting of this device, 512 px
    python bench/full_size.py --pixels 256 --settings fp32 bf16+low
    python bench/full_size.py --make runs/full-size                # only build the pipeline; then
    python rlcm.py --model runs/full-size ...                      # the program itself at that size

The U-Net of LCM_Dreamshaper_v7 (SD 1.5 with guidance embedding, 860 M weights), CLIP ViT-L's text encoder
and the KL-f8 VAE, built from their configurations. Each setting runs in a process of its own: the program's
rollout and update at H = 4 with 3 actions, LoRA of rank 16, no KL. "low" is --low-memory. Columns:

micro-batch   rows of one pass of the network
rollout       seconds a picture: four evaluations and one decode
update        seconds an action: forward, backward and its share of the optimizer step
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

SETTINGS = "fp32", "fp32+low", "bf16", "bf16+low", "fp16", "fp16+low"


def make(folder, pixels):
    """Write a pipeline of the full size with random weights, in bf16: 2.1 GB -> weights of the U-Net."""
    from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    unet = UNet2DConditionModel(
        sample_size=pixels // 8, cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=256
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=pixels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
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


def work(folder, setting, B):
    """Measure one setting with B pictures -> a dict. On a GPU all runs twice, and the second time counts."""
    from accelerate import Accelerator

    precision, low = setting.split("+")[0], setting.endswith("+low")
    settings = dict(precision=precision, low_memory=low, steps=4, batch_size=B, kl=0.0)
    cfg = rlcm.configure(model=folder, **settings)
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    device = accelerator.device
    model = rlcm.load_model(cfg, accelerator)
    optimizer = accelerator.prepare_optimizer(torch.optim.Adam(model.trained.values(), cfg.lr))
    s, c = rlcm.rlcm_schedule(model.pipe.scheduler, cfg.steps, device), rlcm.encode(model.pipe, ["a cat"] * B)
    m = max(m for m in range(1, cfg.micro_batch + 1) if B % m == 0)

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for i in range(2 if device.type == "cuda" else 1):
        g = torch.Generator().manual_seed(i)
        z = torch.randn(cfg.steps + 1, B, *model.shape, generator=g).to(device)
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


def main():
    raw, gpu = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS if gpu else SETTINGS[:4])
    p.add_argument("--pixels", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=8 if gpu else 1)
    p.add_argument("--make", metavar="FOLDER", help="build the pipeline there and stop")
    p.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    rlcm.quiet()
    if args.work:
        print(json.dumps(work(*args.work, args.batch_size)))
        return
    folder = Path(args.make or "runs/full-size.tmp")
    if not folder.exists():
        print(f"U-Net with {make(folder, args.pixels) / 1e6:.0f} M weights in {folder}", flush=True)
    if args.make:
        return
    cores = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})"
    name = torch.cuda.get_device_name() if gpu else cores
    print(f"{name}, {args.pixels} px, {args.batch_size} pictures")
    print(f"{'setting':10}{'micro-batch':>12}{'rollout':>10}{'update':>10}{'ratio_drift':>14}{'peak':>10}")
    try:
        for setting in args.settings:
            print(f"{setting:10}", end="", flush=True)
            given = "--batch-size", str(args.batch_size), "--work", folder, setting
            command = [sys.executable, __file__, *given]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"  failed: {(done.stderr.splitlines() or ['killed'])[-1]}", flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{row['micro_batch']:>12}{row['rollout']:>9.2f}s{row['update']:>9.2f}s", end="")
            print(f"{row['ratio_drift']:>14.2g}{row['peak']:>6.1f} GiB", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
