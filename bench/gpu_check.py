"""For a machine with a GPU: does everything work there, how fast, and in how much memory? Needs no internet.

    python bench/gpu_check.py
    python bench/gpu_check.py --toy     # the same at toy size, on a CPU in fp32: does this script work?

Each row of the table is a job; a failed one does not stop the others. First the embedded model: resumed, in
fp32 and in bf16, and with a reward model. Then random weights in the architecture of LCM_Dreamshaper_v7 (SD
1.5 with guidance embedding, 512 px, bf16): several micro-batch sizes, checkpointing, compiled, and 1024 px.
Last, SD 1.5 with ddpo, guidance and a KL penalty. Writes runs/gpu-check.txt. Exit status: 1 if a job
failed. A run passes if its ratio_drift is small enough. A row shows

epoch        seconds of an epoch, the median
network      seconds of the epoch's passes through encoder, network and decoder alone, on fixed inputs
floor        seconds that these passes would take at the speed of a large matrix product
peak         GPU memory in GB
ratio_drift  largest |ratio - 1| before the first optimizer step: 0 in fp32, at most the clip range in bf16.
             Compiled code rounds differently with and without gradients: in bf16, on a small network
             (D = 256), it was 1.5e-4 to 5.5e-4, which is beyond the clip range, 1e-4
path_kl      of the untouched LoRA, with a KL penalty: 0 but for rounding. A run's smaller values mean nothing
"""
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch.utils import collect_env
from torch.utils.flop_counter import FlopCounterMode

import rlcm
from bench.common import Parser, read_rows

GPU = torch.cuda.is_available()


def full_size(cfg, device):
    """A model for --model bench/gpu_check.py:full_size. Below 512 px it is a toy, a tenth as wide."""
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    thin = 1 if cfg.resolution >= 512 else 10
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12 // thin)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    blocks["block_out_channels"] = [max(32, 128 // thin) * n for n in (1, 2, 4, 4)]
    unet = dict(cross_attention_dim=768, time_cond_proj_dim=256 if cfg.method == "rlcm" else None)
    unet["block_out_channels"] = [320 // thin * n for n in (1, 2, 4, 4)]
    with device:
        parts = dict(text_encoder=CLIPTextModel(CLIPTextConfig(**text)), unet=UNet2DConditionModel(**unet))
        parts["vae"] = AutoencoderKL(layers_per_block=2, **blocks)
    tiny = Path(rlcm.__file__).parent / rlcm.METHODS[cfg.method].tiny
    pipe = DiffusionPipeline.from_pretrained(tiny, **parts)
    pipe.tokenizer.model_max_length = 77
    return rlcm.StableDiffusion(pipe.to(device, rlcm.DTYPES[cfg.precision]), cfg)


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
    """A training run. After each epoch the bare passes are timed; before the first, their FLOPs are counted.

    Counted in eager mode: dynamo never compiles a function that it first met during a count.
    """
    counter = FlopCounterMode(display=False)

    def on_epoch(epoch, model, row):
        if epoch == 0:
            with counter, torch.compiler.set_stance("force_eager"):
                passes(model, cfg)
        row["network"] = seconds(passes, model, cfg)

    if GPU:
        torch.cuda.reset_peak_memory_stats()
    rows = read_rows(rlcm.train(replace(cfg, out=f"{folder}/run"), on_epoch=on_epoch) / "metrics.csv")
    peak = torch.cuda.max_memory_allocated() / 1e9
    n = 8192 if GPU else 1024
    matrix = torch.randn(n, n, device="cuda" if GPU else "cpu", dtype=rlcm.DTYPES[cfg.precision])
    product = np.median([seconds(torch.mm, matrix, matrix) for _ in range(20)])
    floor = counter.get_total_flops() / (2 * n**3) * product
    epoch = np.median(np.diff([row["seconds"] for row in rows]))
    network = np.median([row["network"] for row in rows])
    drift = max(row["ratio_drift"] for row in rows)
    found = f"epoch {epoch:.3g} s, network {network:.3g} s, floor {floor:.3g} s, peak {peak:.1f} GB, "
    found += f"ratio_drift {drift:.1g}, path_kl {rows[0]['path_kl']:.2g}"
    return drift <= (cfg.clip_range if cfg.precision == "bf16" else 0), found


def resume(cfg, folder):
    """A run stopped after two epochs and resumed, against an uninterrupted one."""
    cut = replace(cfg, out=f"{folder}/cut")
    rlcm.train(replace(cut, epochs=2))
    folders = [rlcm.train(cut, resume=True), rlcm.train(replace(cfg, out=f"{folder}/whole"))]
    learned = []
    for out in folders:
        trained = torch.load(out / "checkpoint.pt", weights_only=True)["trainable"]
        learned.append(torch.cat([p.flatten() for name, p in trained.items() if "lora_B" in name]))
    gap = (torch.dist(*learned) / learned[1].norm()).item()
    return gap <= (0.2 if GPU else 0), f"lora_B differs by {gap:.2g} of its norm"


def card():
    """Its name, memory and versions."""
    device = torch.cuda.get_device_properties()
    found = f"{device.name}, compute capability {device.major}.{device.minor}, "
    found += f"{device.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}, "
    found += f"driver {collect_env.get_nvidia_driver_version(collect_env.run)}"
    return found


def check(args):
    """Do all jobs. Returns the exit status."""
    rlcm.require(args.toy or GPU, "there is no CUDA GPU here: --toy tries this script on the CPU")
    half = "bf16" if GPU else "fp32"
    tiny = rlcm.Config(epochs=9)
    full = rlcm.Config(epochs=4, batch_size=16, resolution=512, lr=1e-4, precision=half)
    full.model = f"{__file__}:full_size"
    if args.toy:
        tiny = replace(tiny, epochs=3, batch_size=8, micro_batch=4, steps=2)
        full = replace(full, epochs=3, batch_size=2, resolution=64, steps=2)
    jobs = {"embedded, resumed": (resume, tiny), "embedded, fp32": (run, tiny)}
    tiny = replace(tiny, precision=half)
    jobs[f"embedded, {half}"] = run, tiny
    jobs["  compress:1,clip:0.1"] = run, replace(tiny, reward="compress:1,clip:0.1")
    for m in (1, 2) if args.toy else (4, 8, 16):
        jobs[f"full size, micro-batch {m}"] = run, replace(full, micro_batch=m)
    full = replace(full, micro_batch=2 if args.toy else 4)
    jobs["  gradient checkpointing"] = run, replace(full, gradient_checkpointing=True)
    jobs["  torch.compile"] = run, replace(full, model=f"{__file__}:compiled")
    jobs["  ddpo, guidance 6, kl 0.01"] = run, replace(full, method="ddpo", kl=0.01)
    jobs["  2x resolution, one image"] = run, replace(full, resolution=2 * full.resolution, micro_batch=1)

    Path("runs").mkdir(exist_ok=True)
    table = f"{card() if GPU else 'CPU'}, torch {torch.__version__}{', toy size' * args.toy}\n"
    for name, (job, cfg) in jobs.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                good, found = job(cfg, folder)
        except Exception as e:
            good = False
            found = repr(e)[:200]
        gc.collect()
        torch.cuda.empty_cache()
        table += f"{'ok' if good else 'FAIL':5}{name:28}{found}\n"
        Path("runs/gpu-check.txt").write_text(table)
    print(f"\n{table}wrote runs/gpu-check.txt")
    return int("\nFAIL" in table)


def main(argv=None):
    p = Parser("gpu_check", __doc__)
    p.add_argument("--toy", action="store_true", help="toy size, also without a GPU; a few minutes")
    return p.run(check, argv)


if __name__ == "__main__":
    sys.exit(main())
