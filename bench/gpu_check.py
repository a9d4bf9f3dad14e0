"""For a machine with a GPU: does everything work there, how fast, and in how much memory? Needs no internet.

    python bench/gpu_check.py
    python bench/gpu_check.py --toy     # the same at toy size, on a CPU in fp32: does this script work?

Each row of the table is a job; a failed one does not stop the others. The jobs: the default run on the
embedded model in fp32 and bf16, a resumed run, and runs of LCM_Dreamshaper_v7's architecture with random
weights (SD 1.5 with guidance embedding, 512 px, bf16) at several micro-batches. Writes runs/gpu-check.txt.
Exit status: 1 if a job failed. For a run it shows seconds per epoch and

network   seconds for the epoch's passes of encoder, network and decoder alone, on fixed inputs
floor     seconds for the floating-point operations of these passes at the rate of a large matrix product
drift     largest |ratio - 1| before the first optimizer step: 0 in fp32, at most the clip range in bf16
"""
import contextlib
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import rlcm
from bench.plot import read_rows
from bench.sample import Parser

GPU = torch.cuda.is_available()
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def full_size(cfg, device):
    """A model for --model bench/gpu_check.py:full_size. Below 512 px it is a toy, a tenth as wide."""
    from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    thin = 1 if cfg.resolution >= 512 else 10
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12 // thin)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    blocks["block_out_channels"] = [max(32, 128 // thin) * n for n in (1, 2, 4, 4)]
    unet = dict(cross_attention_dim=768, time_cond_proj_dim=256)
    unet["block_out_channels"] = [320 // thin * n for n in (1, 2, 4, 4)]
    with device:
        parts = dict(text_encoder=CLIPTextModel(CLIPTextConfig(**text)), unet=UNet2DConditionModel(**unet))
        parts["vae"] = AutoencoderKL(layers_per_block=2, **blocks)
    pipe = LatentConsistencyModelPipeline.from_pretrained(Path(rlcm.__file__).parent / "tiny/lcm", **parts)
    pipe.tokenizer.model_max_length = 77
    return rlcm.StableDiffusion(pipe.to(device, DTYPE[cfg.precision]), cfg)


def compiled(cfg, device):
    model = full_size(cfg, device)
    model.network.compile(backend="inductor" if GPU else "eager")
    return model


def passes(model, cfg):
    """The network passes of an epoch on fixed inputs."""
    s = model.schedule(cfg.steps)
    x = torch.randn(cfg.micro_batch, *model.shape, device=model.device)
    for _ in range(cfg.batch_size // cfg.micro_batch):
        c = model.encode(["a cat"] * cfg.micro_batch)
        with torch.no_grad():
            for k in range(len(s.t)):
                model.denoise(x, k, c, s)
            model.decode(x)
        for k in s.actions:
            loss = model.denoise(x, k, c, s).square().mean()
            torch.autograd.grad(loss, list(model.trainable.values()))


def seconds(function, *given):
    began = time.perf_counter()
    function(*given)
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


# ---- The jobs. Each works in a new folder and returns whether it passed, and a line on what it found.
def run(cfg, folder):
    """A run. After each epoch come the bare passes; before the first, their operations are counted."""
    counter = FlopCounterMode(display=False)

    def on_epoch(epoch, model, row):
        with contextlib.nullcontext() if epoch else counter:
            row["network"] = seconds(passes, model, cfg)

    if GPU:
        torch.cuda.reset_peak_memory_stats()
    rows = read_rows(rlcm.train(replace(cfg, out=folder), on_epoch=on_epoch) / "metrics.csv")
    n = 8192 if GPU else 1024
    matrix = torch.randn(n, n, device="cuda" if GPU else "cpu", dtype=DTYPE[cfg.precision])
    product = np.median([seconds(torch.mm, matrix, matrix) for _ in range(20)])
    floor = counter.get_total_flops() / (2 * n**3) * product
    epoch = np.median(np.diff([row["seconds"] for row in rows]))
    network = np.median([row["network"] for row in rows])
    drift = max(row["ratio_drift"] for row in rows)
    found = f"epoch {epoch:.3g} s, network {network:.3g} s, floor {floor:.3g} s, "
    found += f"peak {rows[-1]['gpu_gb']:.1f} GB, drift {drift:.1g}, reward {rows[-1]['reward_mean']:.3f}"
    return drift <= (cfg.clip_range if cfg.precision == "bf16" else 0), found


def resume(cfg, folder):
    """A run stopped after two epochs and resumed, against an uninterrupted one."""
    cut = replace(cfg, out=f"{folder}/cut")
    rlcm.train(replace(cut, epochs=2))
    folders = [rlcm.train(cut, resume=True), rlcm.train(replace(cfg, out=f"{folder}/whole"))]
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True)["trainable"] for out in folders)
    gap = max((a[name] - b[name]).abs().max() / b[name].abs().max() for name in b).item()
    return gap <= (0.1 if GPU else 0), f"weights differ by {gap:.1g} of the largest"


def check(args):
    """Do all jobs. Returns the exit status."""
    rlcm.require(args.toy or GPU, "there is no CUDA GPU here: --toy tries this script on the CPU")
    half = "bf16" if GPU else "fp32"
    tiny = rlcm.Config(epochs=9)
    full = rlcm.Config(epochs=4, batch_size=16, resolution=512, lr=1e-4, precision=half)
    if args.toy:
        tiny = replace(tiny, epochs=3, batch_size=8, micro_batch=4, steps=2)
        full = replace(full, epochs=3, batch_size=2, resolution=64, steps=2)
    jobs = {"embedded, resumed": (resume, tiny), "embedded, fp32": (run, tiny)}
    jobs[f"embedded, {half}"] = run, replace(tiny, precision=half)
    for m in (1, 2) if args.toy else (4, 8, 16):
        full = replace(full, micro_batch=m, model=f"{__file__}:full_size")
        jobs[f"full size, micro-batch {m}"] = run, full
    jobs["  gradient checkpointing"] = run, replace(full, gradient_checkpointing=True)
    jobs["  torch.compile"] = run, replace(full, model=f"{__file__}:compiled")

    Path("runs").mkdir(exist_ok=True)
    machine = torch.cuda.get_device_name() if GPU else "CPU"
    table = f"{machine}, torch {torch.__version__}{', toy size' * args.toy}\n"
    for name, (job, cfg) in jobs.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                good, found = job(cfg, folder)
        except Exception as e:
            good = False
            found = repr(e)[:200]
        gc.collect()
        torch.cuda.empty_cache()
        table += f"{'ok' if good else 'FAIL':5}{name:26}{found}\n"
        Path("runs/gpu-check.txt").write_text(table)
    print(f"\n{table}wrote runs/gpu-check.txt")
    return int("\nFAIL" in table)


def main(argv=None):
    p = Parser("gpu_check", __doc__)
    p.add_argument("--toy", action="store_true", help="toy size, also without a GPU; a few minutes")
    return p.run(check, argv)


if __name__ == "__main__":
    sys.exit(main())
