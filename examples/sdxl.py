"""SDXL and its few-step relatives, for a card of 24 GB.

    python rlcm.py --model examples/sdxl.py:dmd2 --reward aesthetic      # or lcm_lora, lcm, ssd_1b

    lcm_lora  SDXL base with the LoRA latent-consistency/lcm-lora-sdxl        openrail++
    lcm       U-Net latent-consistency/lcm-sdxl, which takes the guidance     openrail++
    ssd_1b    U-Net latent-consistency/lcm-ssd-1b, the same in half the size  openrail++, base apache-2.0
    dmd2      SDXL base with the LoRA of tianweiy/DMD2                        cc-by-nc-4.0: non-commercial

The LoRA of a run is trained on top of the few-step LoRA, so a pipeline needs both:

    pipe.load_lora_weights("latent-consistency/lcm-lora-sdxl", adapter_name="few-step")
    pipe.load_lora_weights("runs/NAME", adapter_name="tuned")
    pipe.set_adapters(["few-step", "tuned"])

For a pipeline of your own, docs/models.md has the file to write. With small random weights, it draws what
plain pipelines draw. Neither the real weights nor a GPU have been tried.
"""
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from rlcm import DTYPES, StableDiffusion, require

BASE = "stabilityai/stable-diffusion-xl-base-1.0"

# RLCM's own settings for the aesthetic reward, with fewer epochs; not tuned for SDXL. By arithmetic they take
# 16 GB: U-Net 5.2, text encoders 1.6, VAE and LoRA 0.5, the reward's CLIP 0.9, activations of an image 7.8.
# With --gradient-checkpointing 12: activations are then 0.7, and decoding takes the most, 3.2 an image.
SETTINGS = dict(
    precision="bf16", resolution=1024, steps=4, epochs=200, batch_size=32, micro_batch=1, lr=1e-4,
    lora_rank=8, lora_alpha=8, buffer_size=32, min_count=16, save_every=10,
)  # fmt: skip


class SDXL(StableDiffusion):
    """A LoRA on SDXL: two text encoders, and a U-Net that is told the size of the image."""

    def set_up(self):
        super().set_up()
        require(not self.pipe.vae.config.latents_mean, "its VAE shifts the latents: not supported")
        if self.pipe.vae.config.force_upcast:  # it overflows in half precision
            self.pipe.vae.float()

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> inputs of the U-Net; with classifier-free guidance 2B rows, first B empty prompts."""
        self.warn_if_longer(prompts, self.pipe.tokenizer.model_max_length)
        options = dict(device=self.device, do_classifier_free_guidance=self.guided)
        c, empty, pooled, empty_pooled = self.pipe.encode_prompt(prompts, **options)
        if self.guided:
            c = torch.cat([empty, c])
            pooled = torch.cat([empty_pooled, pooled])
        size = [self.cfg.resolution, self.cfg.resolution]
        time_ids = torch.tensor([size + [0, 0] + size] * len(c), device=self.device)  # original, crop, target
        added = dict(text_embeds=pooled, time_ids=time_ids)
        w = self.guidance_input(len(c))
        return dict(encoder_hidden_states=c, added_cond_kwargs=added, timestep_cond=w)


def loader(guidance_scale, source=BASE, unet=None, lora=None, file=None, **scheduler):
    """A function for --model: the pipeline `source` with a few-step U-Net or LoRA and an LCMScheduler."""
    def load(cfg, device):
        precision = DTYPES[cfg.precision]
        options = dict(variant="fp16")
        if unet:
            options["unet"] = UNet2DConditionModel.from_pretrained(unet, dtype=torch.float32, **options)
        dtypes = dict(default=precision, unet=torch.float32, vae=torch.float32)
        pipe = StableDiffusionXLPipeline.from_pretrained(source, dtype=dtypes, **options)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **scheduler)

        # The LoRA becomes part of the U-Net, and so of the reference. It is added in float32: bf16 would
        # round away what is small beside a weight.
        if lora:
            pipe.load_lora_weights(lora, weight_name=file)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        pipe.unet.to(precision)
        return SDXL(pipe.to(device), cfg)

    load.settings = SETTINGS | dict(guidance_scale=guidance_scale)
    return load


# Guidance as published: none for the LoRAs, 8 for the U-Nets, which were distilled at 3 to 13.
lcm_lora = loader(1.0, lora="latent-consistency/lcm-lora-sdxl", file="pytorch_lora_weights.safetensors")
lcm = loader(8.0, unet="latent-consistency/lcm-sdxl")
ssd_1b = loader(8.0, "segmind/SSD-1B", unet="latent-consistency/lcm-ssd-1b")

# At the timesteps of its training, 999, 749, 499 and 249: LCMScheduler's default is 999, 759, 499 and 259.
DMD2 = "dmd2_sdxl_4step_lora_fp16.safetensors"
dmd2 = loader(1.0, lora="tianweiy/DMD2", file=DMD2, original_inference_steps=4)
