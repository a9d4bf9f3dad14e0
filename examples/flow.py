"""Two rectified flows that were distilled to a few steps: Z-Image-Turbo and FLUX.2-klein-4B, both apache-2.0.

    python rlcm.py --model examples/flow.py:klein_4b --reward aesthetic      # or z_image_turbo

A klein of your own takes a file of two lines, here for --model my_klein.py:mine:

    from examples.flow import klein
    mine = klein("my-folder")

A rectified flow mixes a clean latent with noise z, (1 - s) times the latent plus s times z, with s
falling from 1 to 0, and its network predicts the velocity, z minus the clean latent. A step here predicts the
clean latent and mixes it with new noise for the next s: --method rlcm. The models' authors take Euler steps
without noise, which are not a policy. Re-noised images are "pretty decent" (leejet/stable-diffusion.cpp, pull
request 1413), but have not been tried here, so look at samples/epoch-0000.png first.

The levels are the pipelines': evenly spaced, then shifted. An action's gradient grows with
s (1 - s_next) / s_next, so the last action dominates: by this factor, 0.66 (Z-Image) or 0.87 (klein) of the
sum of squares.

With the LoRA, a plain pipeline needs this sampler, too (or FlowMatchLCMScheduler, which is the same). The
pipeline does not pass its generator to the scheduler's step, so the noise comes from the global seed. In
float32 on a CPU, this draws image i of rlcm.generate with klein. Z-Image needs guidance_scale=0.0, but no z:

    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
    torch.manual_seed(i)
    z = torch.randn(1, 32 * 32, 128).mT.reshape(1, 128, 32, 32)  # klein's noise is drawn as tokens
    pipe(prompt=prompt, latents=z, height=512, width=512, num_inference_steps=4)

MEMORY in bf16, calculated; no real weights were run: transformer 12.3 GB (klein 7.8), text encoder 8.0, VAE
0.2, LoRA with Adam 0.3; per image with gradient checkpointing 0.7 at 512 px, 2.5 at 1024 (klein 0.24, 0.7).
So at 512 px Z-Image needs a 24 GB card, and klein with the aesthetic reward 17 GB plus 0.24 per image.
"""
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from rlcm import DTYPES, DiffusersModel, make_schedule, require


class Flow(DiffusersModel):
    """A LoRA on the transformer of a pipeline with a FlowMatchEulerDiscreteScheduler, without guidance."""

    component = "transformer"
    patch = 2  # a token of the transformer is a patch of 2 x 2 latent pixels

    def set_up(self):
        cfg = self.cfg
        require(cfg.method == "rlcm", f"{cfg.model} is sampled by re-noising: --method must be rlcm")
        require(cfg.guidance_scale == 0, f"{cfg.model} takes no guidance: --guidance-scale must be 0")
        config = self.pipe.scheduler.config
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)

    def build_schedule(self, method, H, mu=None):
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / H, H).tolist(), mu=mu)
        s = scheduler.sigmas.double()  # (H+1,), the last is 0
        return make_schedule(scheduler.timesteps, (1 - s[:-1], s[:-1]), (1 - s[1:], s[1:]), torch.ones(H))

    def pred_x0(self, output, x, k, s):
        return x - s.noise[k] * output


class ZImage(Flow):
    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> a list of B embeddings (L, E), each with a length of its own."""
        self.warn_if_longer(prompts, 512)  # the pipeline's max_sequence_length
        prompts = list(prompts)  # a copy, because the pipeline writes its chat template into the list
        return self.pipe.encode_prompt(prompts, self.device, do_classifier_free_guidance=False)[0]

    def predict(self, x, t, c):
        """The velocity. The network's time runs from noise, 0, to data, 1, so its output is minus this."""
        time = ((1000 - t) / 1000).expand(len(x)).to(x.device)
        frames = list(x.to(self.dtype).unsqueeze(2))  # B of (C, 1, h, w)
        out = self.network(frames, time, c, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def decode(self, x):
        vae = self.pipe.vae.config
        return super().decode(x + vae.shift_factor * vae.scaling_factor)  # it divides by the latter


class Flux2Klein(Flow):
    """A latent is a row of tokens, (1, h w, C), since the pipeline draws the noise of a step like that."""

    # Of the double blocks, then of the single ones, where q, k and v are one layer: 16.7M weights at rank 16.
    lora_layers = r".*\.(to_[qkv]|to_out\.0)|single_.*\.(to_qkv_mlp_proj|to_out)"

    def __init__(self, pipe, cfg):
        require(pipe.config.is_distilled, f"{cfg.model} is a base model: it must be a distilled one")
        super().__init__(pipe, cfg)
        self.side = cfg.resolution // (pipe.vae_scale_factor * self.patch)
        self.shape = (1, self.side**2, self.network.config.in_channels)

    def build_schedule(self, method, H):
        return super().build_schedule(method, H, compute_empirical_mu(self.side**2, H))

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> embeddings (B, L, E) and position ids (B, L, 4)."""
        self.warn_if_longer(prompts, 512)
        return self.pipe.encode_prompt(prompts, self.device)

    def predict(self, x, t, c):
        """The velocity. In bf16 the pipeline rounds the time before it divides, and so does this."""
        embeddings, text_ids = c
        x = x.squeeze(1).to(self.dtype)
        time = t.expand(len(x)).to(x) / 1000
        n = torch.arange(self.side)
        ids = torch.cartesian_prod(n[:1], n, n, n[:1]).to(x.device)  # 0, row, column, 0 of each token
        return self.network(x, embeddings, time, ids, text_ids, return_dict=False)[0].unsqueeze(1)

    def decode(self, x):
        """Undo the VAE's batch norm of the tokens, each of which then becomes 2 x 2 latent pixels."""
        vae = self.pipe.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        x = x.squeeze(1) * std + vae.bn.running_mean
        x = x.mT.unflatten(2, (self.side, self.side))  # (B, C, h, w)
        x = torch.nn.functional.pixel_shuffle(x, 2).to(vae.dtype)
        return (vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)


def loader(model, source, steps):
    """A function for --model, with RLCM's settings for compress, which are not tuned for these models."""
    def load(cfg, device):
        pipe = DiffusionPipeline.from_pretrained(source, dtype=DTYPES[cfg.precision])
        return model(pipe.to(device), cfg)

    load.settings = dict(
        precision="bf16", resolution=512, steps=steps, epochs=1000, batch_size=16, micro_batch=2, lr=1e-4,
        guidance_scale=0.0, lora_alpha=32, buffer_size=16, min_count=16, save_every=10,
        gradient_checkpointing=True,
    )  # fmt: skip
    return load


def klein(source):
    return loader(Flux2Klein, source, steps=4)


klein_4b = klein("black-forest-labs/FLUX.2-klein-4B")
z_image_turbo = loader(ZImage, "Tongyi-MAI/Z-Image-Turbo", steps=8)
