"""SANA-Sprint (arXiv 2503.09641), a consistency model for images of 1024 px in one to four steps, with RLCM.

    python rlcm.py --model examples/sana_sprint.py:sana_600m --reward aesthetic
    python rlcm.py --model examples/sana_sprint.py:sana_1_6b --reward aesthetic --steps 2

SanaSprint(pipe, cfg) takes any SanaSprintPipeline that is loaded and on its device, say from a folder.

SANA-Sprint's time is an angle t: x = cos(t) x_0 + sin(t) z, for latents divided by the scheduler's
sigma_data. Each step predicts x_0 and adds noise at the next angle, so it is rlcm_policy with
alpha-bar = cos^2 t and f_theta = pred_x0.
"""
import inspect

import torch
from diffusers import SanaSprintPipeline

from rlcm import StableDiffusion, make_schedule, require

# What the text encoder is asked to do with a prompt: a default of the pipeline's call, not of encode_prompt.
INSTRUCTION = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default


def alpha_bar(t):
    """cos^2 t, the signal's share of the variance, except at pure noise.

    There the scheduler's t is 1.57080, just above pi/2, and dividing by its cosine would lose every digit.
    eps and rlcm_policy both use this number and it cancels, so 1/2 gives the pipeline's mean, too.
    """
    return torch.where(t < 1.57, t.cos() ** 2, 0.5)


class SanaSprint(StableDiffusion):
    """A LoRA on the transformer of a SanaSprintPipeline."""

    component = "transformer"
    guided = False  # the guidance scale is an input of the network

    def set_up(self):
        pipe = self.pipe
        cfg = self.cfg
        require(cfg.method == "rlcm", f"SANA-Sprint is a consistency model: --method rlcm, not {cfg.method}")
        found = type(pipe.scheduler).__name__
        require(found == "SCMScheduler", f"{cfg.model} has a {found}, not an SCMScheduler")
        unit = pipe.vae_scale_factor
        require(cfg.resolution % unit == 0, f"--resolution {cfg.resolution}: must be a multiple of {unit}")
        self.shape = (self.network.config.in_channels, cfg.resolution // unit, cfg.resolution // unit)

    def schedule(self, H):
        self.pipe.scheduler.set_timesteps(H, intermediate_timesteps=1.3 if H == 2 else None)
        t = self.pipe.scheduler.timesteps  # (H+1,)
        s = make_schedule(t[:-1], alpha_bar(t[:-1]), alpha_bar(t[1:]), t[1:].sin())
        s.c_skip = torch.zeros(H)
        s.c_out = torch.ones(H)
        return s

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> (B, L, E) and an attention mask (B, L)."""
        return self.pipe.encode_prompt(prompts, device=self.device, complex_human_instruction=INSTRUCTION)

    def eps(self, x, t, c):
        """The network is a rectified flow: at its own scale and time it predicts noise minus data."""
        scale = t.cos() + t.sin()
        x_flow = x / scale
        t_flow = t.sin() / scale
        pred_x0 = x_flow - t_flow * super().eps(x_flow, t_flow, c)
        return (x - alpha_bar(t).sqrt() * pred_x0) / (1 - alpha_bar(t)).sqrt()

    def predict(self, x, t, c):
        embeddings, mask = c
        guidance = embeddings.new_full([len(x)], self.cfg.guidance_scale)  # rounded as in the pipeline
        return self.network(
            x,
            encoder_hidden_states=embeddings.to(x.dtype),
            encoder_attention_mask=mask,
            timestep=t.expand(len(x)).to(self.device),
            guidance=guidance * self.network.config.guidance_embeds_scale,
        ).sample


def load(source, cfg, device):
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    return SanaSprint(SanaSprintPipeline.from_pretrained(source, dtype=dtype).to(device), cfg)


def sana_600m(cfg, device):
    return load("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", cfg, device)


def sana_1_6b(cfg, device):
    return load("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", cfg, device)


# RLCM's settings for compress, the pipeline's guidance scale, and micro-batches for a card of 24 GB.
sana_600m.settings = dict(
    precision="bf16", resolution=1024, steps=4, epochs=1000, batch_size=16, micro_batch=2, lr=1e-4,
    guidance_scale=4.5, lora_rank=16, lora_alpha=32, buffer_size=16, min_count=16, save_every=10,
)  # fmt: skip
sana_1_6b.settings = sana_600m.settings | dict(gradient_checkpointing=True)
