"""SANA-Sprint (arXiv 2503.09641), a consistency model for images of 1024 px in one to four steps, with RLCM.

    python rlcm.py --model examples/sana_sprint.py:sana_600m --reward aesthetic      # or sana_1_6b

Its time is an angle t: a latent is cos(t) times a clean one plus sin(t) sigma_data times noise, with the
scheduler's sigma_data. A step predicts the clean latent and adds noise at the next angle: --method rlcm.
"""
import inspect

import torch
from diffusers import SanaSprintPipeline

from rlcm import DTYPES, DiffusersModel, make_schedule, require

# What the text encoder is asked to do with a prompt: a default of the pipeline's call, not of encode_prompt.
INSTRUCTION = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default


class SanaSprint(DiffusersModel):
    """A LoRA on the transformer of any SanaSprintPipeline that is loaded and on its device."""

    component = "transformer"  # it takes the guidance scale as an input

    def set_up(self):
        method = self.cfg.method
        require(method == "rlcm", f"SANA-Sprint is a consistency model: --method rlcm, not {method}")
        found = type(self.pipe.scheduler).__name__
        require(found == "SCMScheduler", f"{self.cfg.model} has a {found}, not an SCMScheduler")

    def build_schedule(self, method, H):
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(H, intermediate_timesteps=1.3 if H == 2 else None)
        t = scheduler.timesteps.double()  # (H+1,)
        signal = t.cos()
        noise = t.sin() * scheduler.config.sigma_data
        now = signal[:-1], noise[:-1]
        after = signal[1:], noise[1:]
        start = scheduler.config.sigma_data
        return make_schedule(scheduler.timesteps[:-1], now, after, torch.ones(H), start=start)

    def encode(self, prompts):
        """B strings -> (B, L, E) and an attention mask (B, L)."""
        self.warn_if_longer(prompts, 300)  # the pipeline's max_sequence_length
        return self.pipe.encode_prompt(prompts, device=self.device, complex_human_instruction=INSTRUCTION)

    def predict(self, x, t, c):
        """The velocity that the scheduler takes. The network is a flow with another scale and time."""
        embeddings, mask = c
        sigma_data = self.pipe.scheduler.config.sigma_data
        time = t.sin() / (t.cos() + t.sin())
        scale = (time**2 + (1 - time) ** 2).sqrt()
        x = x / sigma_data * scale
        guidance = embeddings.new_full([len(x)], self.cfg.guidance_scale)  # rounded as in the pipeline
        flow = self.network(
            x.to(self.dtype),
            encoder_hidden_states=embeddings.to(self.dtype),
            encoder_attention_mask=mask,
            timestep=time.expand(len(x)).to(self.device),
            guidance=guidance * self.network.config.guidance_embeds_scale,
        ).sample.float()
        return ((1 - 2 * time) * x + (1 - 2 * time + 2 * time**2) * flow) / scale * sigma_data

    def pred_x0(self, output, x, k, s):
        return s.t[k].cos() * x - s.t[k].sin() * output

    def decode(self, x):
        return super().decode(x / self.pipe.scheduler.config.sigma_data)


def loader(source, **settings):
    """A function for --model, with RLCM's settings for compress, and micro-batches for a card of 24 GB."""
    def load(cfg, device):
        pipe = SanaSprintPipeline.from_pretrained(source, dtype=DTYPES[cfg.precision])
        return SanaSprint(pipe.to(device), cfg)

    load.settings = settings | dict(
        precision="bf16", resolution=1024, steps=4, epochs=1000, batch_size=16, micro_batch=2, lr=1e-4,
        guidance_scale=4.5, lora_alpha=32, buffer_size=16, min_count=16, save_every=10,
    )  # fmt: skip
    return load


sana_600m = loader("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers")
sana_1_6b = loader("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", gradient_checkpointing=True)
