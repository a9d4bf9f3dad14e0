"""Z-Image-Turbo, a rectified flow of 6B parameters that was distilled to 8 steps (arXiv 2511.22699).

    python rlcm.py --model examples/z_image.py:turbo --reward aesthetic

A rectified flow mixes a clean latent with noise z, (1 - s) times the one plus s times the other, with s falling
from 1 to 0. Its network predicts the velocity, which is z minus the clean latent. A step here predicts the
clean latent and mixes it with new noise for the next s: --method rlcm.

Its authors do not sample it like this. They take Euler steps without noise, which are not a policy. How good
re-noised images are has not been tried here, so look at samples/epoch-0000.png first.

The levels s are even before the scheduler's shift, as in ZImagePipeline: with 8 steps and shift 3 they fall
from 1 to 0.3. The gradient of an action grows with s (1 - s_next) / s_next, here at most 1.2. If the last
level were 0.01, one action would have a hundred times the gradient of the others.

With the LoRA, a plain pipeline needs this sampler, too. It does not pass its generator to the scheduler's
step, so the noise comes from the global seed. In float32 on a CPU, this draws image i of rlcm.generate:

    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
    torch.manual_seed(i)
    pipe(prompt, height=512, width=512, num_inference_steps=8, guidance_scale=0.0)

MEMORY by arithmetic, since the real weights have not been run here: in bf16 the transformer takes 12.3 GB,
the text encoder 8.0, the VAE 0.2 and the LoRA with Adam 0.3. With gradient checkpointing, an image takes
about 0.7 GB at 512 px, 2.5 at 1024. So a 24 GB card trains at 512 px, next to a small reward model; 1024 px
take a 32 GB card.
"""
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

from rlcm import DiffusersModel, make_schedule, require


class ZImage(DiffusersModel):
    """A LoRA on the transformer of a ZImagePipeline without guidance, for the method rlcm."""

    component = "transformer"
    patch = 2  # a token of the transformer is a patch of 2 x 2 latent pixels

    def set_up(self):
        cfg = self.cfg
        require(cfg.method == "rlcm", f"{cfg.model} is sampled by re-noising: --method must be rlcm")
        require(cfg.guidance_scale == 0, f"{cfg.model} takes no guidance: --guidance-scale must be 0")
        config = self.pipe.scheduler.config
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)

    def build_schedule(self, method, H):
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / H, H).tolist())
        s = scheduler.sigmas.double()  # (H+1,), the last is 0
        return make_schedule(scheduler.timesteps, (1 - s[:-1], s[:-1]), (1 - s[1:], s[1:]), torch.ones(H))

    def encode(self, prompts):
        """B strings -> a list of B embeddings (L, E), each with a length of its own."""
        prompts = list(prompts)  # a copy, because the pipeline writes its chat template into the list
        return self.pipe.encode_prompt(prompts, self.device, do_classifier_free_guidance=False)[0]

    def predict(self, x, t, c):
        """The velocity. The network's time runs from noise, 0, to data, 1, so its own has the other sign."""
        time = ((1000 - t) / 1000).expand(len(x)).to(x.device)
        frames = list(x.to(self.dtype).unsqueeze(2))  # B of (C, 1, h, w)
        out = self.network(frames, time, c, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def pred_x0(self, output, x, k, s):
        return x - s.noise[k] * output

    def decode(self, x):
        vae = self.pipe.vae.config
        return super().decode(x + vae.shift_factor * vae.scaling_factor)  # it divides by the latter


def turbo(cfg, device):
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    pipe = ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image-Turbo", dtype=dtype)
    return ZImage(pipe.to(device), cfg)


# RLCM's settings for compress, not tuned for this model.
turbo.settings = dict(
    precision="bf16", resolution=512, steps=8, epochs=1000, batch_size=16, micro_batch=2, lr=1e-4,
    guidance_scale=0.0, lora_rank=16, lora_alpha=32, buffer_size=16, min_count=16,
    gradient_checkpointing=True, save_every=10,
)  # fmt: skip
