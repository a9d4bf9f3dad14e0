"""Memory and time of the real architecture with random weights: no download, same shapes, same cost.

    python bench/full_size.py                                      # every setting that the device knows, 512 px
    python bench/full_size.py --pixels 256 --settings fp32 bf16+low
    python bench/full_size.py --make runs/full-size                # only build the pipeline; then: python rlcm.py --model runs/full-size ...

The U-Net of LCM_Dreamshaper_v7 (SD 1.5 with guidance embedding, 860 M weights), CLIP ViT-L's text encoder and the KL-f8 VAE, built from their
configurations. Each setting runs in a process of its own: the program's rollout and update at H = 4, LoRA of rank 16, no KL. Columns:
rollout       seconds a picture: four evaluations and one decode
update        seconds a transition: forward, backward and its share of the optimizer step
ratio_drift   largest abs(ratio - 1) before the first optimizer step
peak          of the GPU's memory allocated by torch; on a CPU of the process's resident memory, weights of the loading included
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

import rlcm

SETTINGS = {"fp32": ["fp32"], "fp32+low": ["fp32", "low"], "bf16": ["bf16"], "bf16+low": ["bf16", "low"], "fp16": ["fp16"], "fp16+low": ["fp16", "low"]}


def make(folder, pixels=512):
    """A pipeline of the full size with random weights, in bf16 on the disk (2.1 GB)."""
    from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    unet = UNet2DConditionModel(sample_size=pixels // 8, cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=256)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=pixels, norm_num_groups=32,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    torch.set_default_dtype(torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "lcm" / "tokenizer", model_max_length=77)
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = LatentConsistencyModelPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                          requires_safety_checker=False)
    pipe.save_pretrained(f"{folder}.part")
    os.replace(f"{folder}.part", folder)
    return sum(p.numel() for p in unet.parameters())


def work(folder, precision, low, B, device):
    """Measure one setting: rollout and update of B pictures, on a GPU twice, where the second counts."""
    from accelerate import Accelerator
    cfg = rlcm.resolve(rlcm.Config(model=folder, precision=precision, low_memory=low, steps=4, batch_size=B, kl=0.0))
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision), cpu=device == "cpu")
    model = rlcm.load_model(cfg, accelerator.device)
    model.unet, optimizer = accelerator.prepare(model.unet, torch.optim.Adam([p for p in model.unet.parameters() if p.requires_grad], cfg.lr))
    s = rlcm.rlcm_schedule(model.pipe.scheduler, cfg.steps, accelerator.device)
    c, pictures = model.encode(["a cat"] * B), []
    wait = torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None
    for i in range(2 if accelerator.device.type == "cuda" else 1):
        z = torch.randn(cfg.steps, B, *model.shape, generator=torch.Generator().manual_seed(i)).to(accelerator.device)
        wait()
        start = time.perf_counter()
        roll = rlcm.rollout(model, "rlcm", s, c, z, rlcm.micro_batch_of(cfg, B), on_pictures=lambda images, b: pictures.append(images.isfinite().all()))
        wait()
        middle = time.perf_counter()
        log = rlcm.update(model, cfg, accelerator, optimizer, s, c, roll, torch.randn(B, device=z.device), torch.ones(B, device=z.device))
        wait()
        end = time.perf_counter()
    assert all(pictures) and log["grad_norm"] > 0 and not log["skipped"]
    peak = torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rollout": (middle - start) / B, "update": (end - middle) / (B * (cfg.steps - 1)), "ratio_drift": log["ratio_drift"], "peak": peak / 2**30, "micro_batch": rlcm.micro_batch_of(cfg, B)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    p.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS)[: None if gpu else 4])
    p.add_argument("--pixels", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=8 if gpu else 1)
    p.add_argument("--make", metavar="FOLDER", help="build the pipeline there and stop")
    p.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        print(json.dumps(work(args.work[0], args.work[1], args.work[2] == "low", args.batch_size, "cuda" if gpu else "cpu")))
        return
    folder = Path(args.make or "runs/full-size.tmp")
    if not folder.exists():
        print(f"U-Net with {make(folder, args.pixels) / 1e6:.0f} M weights in {folder}", flush=True)
    if args.make:
        return
    name = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})"
    print(f"{name}, {args.pixels} px, {args.batch_size} pictures\n{'setting':10}{'micro-batch':>12}{'rollout':>10}{'update':>10}{'ratio_drift':>14}{'peak':>10}", flush=True)
    try:
        for setting in args.settings:
            precision, low = (SETTINGS[setting] + [""])[:2]
            done = subprocess.run([sys.executable, __file__, "--batch-size", str(args.batch_size), "--work", str(folder), precision, low], capture_output=True, text=True)
            if done.returncode:
                print(f"{setting:10}  failed: {(done.stderr.splitlines() or ['killed'])[-1]}", flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{setting:10}{row['micro_batch']:>12}{row['rollout']:>9.2f}s{row['update']:>9.2f}s{row['ratio_drift']:>14.2g}{row['peak']:>7.1f} GB", flush=True)
    finally:
        if not args.make:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
