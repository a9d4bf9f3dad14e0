"""SD-Turbo and SDXL-Turbo (arXiv 2311.17042): Stable Diffusion 2.1 and SDXL in 1 to 4 steps, at 512 px.

    python rlcm.py --model examples/turbo.py:sd_turbo --reward aesthetic      # or sdxl_turbo

An Euler-ancestral step is DDPO's step, here with noise levels sigma that end at 0. SDXL-Turbo comes with that
scheduler. SD-Turbo comes with an EulerDiscreteScheduler, which adds no noise, so it is replaced, as in its
authors' demo (Stability-AI/generative-models, scripts/demo/turbo.py). With the LoRA, a plain pipeline needs:

    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)

LICENCE, as reported: Stability AI's Community License of July 2024, free for research, and for firms that
earn less than a million dollars a year. The cards still say non-commercial: read LICENSE.md. MEMORY,
calculated with the aesthetic reward: 5 GB, and 10 for SDXL-Turbo. No real weights have been run.
"""
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler

from examples.sdxl import SDXL, SETTINGS
from rlcm import DTYPES, StableDiffusion, make_schedule, require


class SDTurbo(StableDiffusion):
    """A LoRA on SD-Turbo's U-Net, in levels of sigma: a latent is a clean one plus sigma times noise."""

    def set_up(self):
        require(self.cfg.method == "ddpo", f"{self.cfg.model} is Euler-ancestral: --method must be ddpo")
        super().set_up()
        self.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.step_options = {}  # it has no eta

    def build_schedule(self, method, H):
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(H)
        sigma = scheduler.sigmas.double()  # (H+1,), the last is 0
        one = torch.ones(H)
        start = scheduler.init_noise_sigma
        return make_schedule(scheduler.timesteps, (one, sigma[:-1]), (one, sigma[1:]), start=start)

    def predict(self, x, t, c):
        """The network takes latents of variance 1, as from the scheduler's scale_model_input."""
        scheduler = self.pipe.scheduler
        sigma = scheduler.sigmas[scheduler.index_for_timestep(t)]
        return super().predict(x / (sigma**2 + 1).sqrt(), t, c)


class SDXLTurbo(SDTurbo, SDXL):
    """The same with SDXL's text encoders: here super() in SDTurbo is SDXL."""


def loader(model, source):
    """A function for --model."""
    def load(cfg, device):
        pipe = DiffusionPipeline.from_pretrained(source, dtype=DTYPES[cfg.precision], variant="fp16")
        return model(pipe.to(device), cfg)

    load.settings = SETTINGS | dict(method="ddpo", resolution=512, guidance_scale=0.0)
    return load


sd_turbo = loader(SDTurbo, "stabilityai/sd-turbo")
sdxl_turbo = loader(SDXLTurbo, "stabilityai/sdxl-turbo")
