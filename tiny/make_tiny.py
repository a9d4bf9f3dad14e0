"""Build the embedded models `tiny/sd`, `tiny/lcm` and `tiny/clip` from published emoji artwork.

    pip install -r requirements.txt resvg-py==0.5.0      # and `npm` on the PATH: the artwork is npm packages
    python tiny/make_tiny.py                             # everything, resumable; tiny/README.md has the times
    python tiny/make_tiny.py --stage report              # only the quality numbers and the grids

Stages, each of which checkpoints to `--work` and continues where it was stopped:

    data      64x64 pictures of animals, nature, food and drink by four vendors, captioned by their names
    vae       AutoencoderKL, 64x64x3 -> 8x8x12: L1 + edge L1 + KL; then its decoder alone
    teacher   CLIP text encoder + U-Net, epsilon prediction, min-SNR weights (arXiv 2112.10752, 2303.09556)
    lcm       latent consistency distillation with embedded guidance (LCD, arXiv 2310.04378, Alg. 1)
    clip      a small CLIPModel, so that `--reward clip` means something here (CLIP, arXiv 2103.00020)
    report    nearest-training-picture accuracy, retrieval accuracy and sample grids

bench/compare.py measures runs of rlcm.py with the same captions and the same judges.
"""

import argparse
import copy
import io
import json
import math
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------------- data
PACKAGES = {  # npm package: version (sources and licences are listed in tiny/README.md)
    "emojibase-data": "17.0.0",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
}
GROUPS, NOT_SUBGROUPS = (3, 4), (48,)  # animals-nature, food-drink; without dishware
NOT_LABELS = {"guide dog", "service dog"}  # same picture as "dog" with a vest
RENAME = {"ewe": "sheep", "honeybee": "bee", "chipmunk": "squirrel", "lady beetle": "ladybug"}
RENAME["t-rex"] = "tyrannosaurus"
COLUMNS = 40  # of the sheet


def key(hexcode):
    """Emoji code as all packages share it: lower case, without variation selectors and leading zeros."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")


def to_pixels(image):
    """PIL picture of any size and mode -> (64, 64, 3) uint8 on white."""
    image = image.convert("RGBA").resize((64, 64), Image.LANCZOS)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), image).convert("RGB"))


def build_data(work):
    """Fetch the packages; write pictures.webp, one lossless sheet, and pictures.json: labels and vendors."""
    if (HERE / "pictures.json").exists():
        return
    import resvg_py

    archives = {}
    for name, version in PACKAGES.items():
        path = work / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            pack = ["npm", "pack", "--silent", f"{name}@{version}"]
            subprocess.run(pack, cwd=work, check=True, stdout=subprocess.DEVNULL)
        archives[name] = tarfile.open(path)

    def read(name, member):
        return archives[name].extractfile("package/" + member).read()

    concepts = {}
    for entry in json.loads(read("emojibase-data", "en/data.json")):
        label = entry["label"].lower()
        wanted = entry.get("group") in GROUPS and entry["subgroup"] not in NOT_SUBGROUPS
        if wanted and label not in NOT_LABELS:
            concepts[key(entry["hexcode"])] = RENAME.get(label, label)

    rows = []
    for vendor, folder in (("google", "img/google/64/"), ("twitter", "img/twitter/64/"), ("3d", "assets/")):
        name = "@lobehub/fluent-emoji-3d" if vendor == "3d" else f"emoji-datasource-{vendor}"
        for member in archives[name].getmembers():
            code = key(Path(member.name).stem)
            if member.name.startswith("package/" + folder) and code in concepts:
                picture = Image.open(io.BytesIO(archives[name].extractfile(member).read()))
                rows.append((concepts[code], vendor, to_pixels(picture)))
    icons = json.loads(read("@iconify-json/fluent-emoji-flat", "icons.json"))
    for code, slug in json.loads(read("@iconify-json/fluent-emoji-flat", "chars.json")).items():
        slug = icons["aliases"].get(slug, {"parent": slug})["parent"]
        if key(code) in concepts and slug in icons["icons"]:
            icon = icons["icons"][slug]
            w, h = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{icon["body"]}</svg>'
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))
            rows.append((concepts[key(code)], "flat", to_pixels(Image.open(io.BytesIO(png)))))
    rows = sorted({row[:2]: row for row in rows}.values(), key=lambda row: row[:2])  # by label and vendor
    labels, vendors, pictures = zip(*rows)
    sheet = np.full((-(-len(rows) // COLUMNS) * 64, COLUMNS * 64, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = 64 * (i // COLUMNS), 64 * (i % COLUMNS)
        sheet[y : y + 64, x : x + 64] = picture
    Image.fromarray(sheet).save(HERE / "pictures.webp", lossless=True, quality=80, method=4)
    (HERE / "pictures.json").write_text(json.dumps({"labels": labels, "vendors": vendors}) + "\n")


def training_pictures():
    """-> pictures (N, 3, 64, 64) float in [0, 1], labels: list of N captions."""
    labels = json.loads((HERE / "pictures.json").read_text())["labels"]
    sheet = torch.from_numpy(np.array(Image.open(HERE / "pictures.webp").convert("RGB"))).float() / 255
    tiles = sheet.unfold(0, 64, 64).unfold(1, 64, 64)  # (rows, COLUMNS, 3, 64, 64)
    return tiles.flatten(0, 1)[: len(labels)].contiguous(), labels


STYLES = ("3d", "flat")  # Fluent's two: twins in composition, the easier half


def pool(styles=None):
    """Indices of the pictures to learn from: those of `styles`, or of all four vendors."""
    vendors = json.loads((HERE / "pictures.json").read_text())["vendors"]
    return torch.tensor([i for i, v in enumerate(vendors) if styles is None or v in styles])


# -------------------------------------------------------------------------------------- what the stages share
def phase_at(phases, step):
    """(steps, ...) phases one after another: the phase that holds `step`, and the step it began at."""
    first = 0
    for phase in phases:
        if step < first + phase[0]:
            return phase, first
        first += phase[0]


def save_state(path, step, **parts):
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "step": step}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_state(path, **parts):
    """Put what save_state wrote into networks and optimizer. -> the step to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def cosine(lr, step, length):
    """Learning rate of step `step` of `length`: warm-up over 100 steps, cosine to zero."""
    return lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / length))


def trapezoid(lr, step, length, warm_up):
    """Learning rate of step `step` of `length`: warm-up, constant, linear to zero over the second half."""
    return lr * min(1, (step + 1) / warm_up, 2 * (1 - step / length))


def descend(loss, network, opt, lr):
    """An optimizer step with the gradient clipped to norm 1."""
    for group in opt.param_groups:
        group["lr"] = lr
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    opt.step()


@torch.no_grad()
def follow(ema, network, step, decay):
    """Move the moving average of the weights, faster in the first steps."""
    for a, b in zip(ema.parameters(), network.parameters()):
        a.lerp_(b, 1 - min(decay, (step + 1) / (step + 10)))


def due(step, steps, every):
    return (step + 1) % every == 0 or step + 1 == steps


def say(stage, step, steps, clock, numbers):
    print(f"{stage} {step + 1}/{steps}  {numbers}  {time.time() - clock:.0f} s", flush=True)


# -------------------------------------------------------------------------------------------------------- vae
def new_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        3, 3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 24, 48, 80), layers_per_block=1, mid_block_add_attention=False,
        latent_channels=12, sample_size=64, norm_num_groups=8,
    )  # fmt: skip


def edges(x):
    """Horizontal and vertical differences: the term that keeps outlines sharp."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def errors(y, x):
    """L1 of the pictures and of their edges."""
    return (y - x).abs().mean(), sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x)))


VAE_PHASES = ((1600, 32, 2e-3), (2000, 12, 1.5e-3))  # steps, batch, learning rate


def train_vae(work, device):
    x_all = training_pictures()[0] * 2 - 1
    torch.manual_seed(0)
    vae = new_vae().to(device)
    opt = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    ema = copy.deepcopy(vae)
    start, steps = load_state(work / "vae.pt", vae=vae, ema=ema, opt=opt), sum(n for n, _, _ in VAE_PHASES)
    clock, log = time.time(), []
    for step in range(start, steps):
        g = torch.Generator().manual_seed(step)
        (length, batch, lr), first = phase_at(VAE_PHASES, step)
        x = x_all[torch.randint(len(x_all), (batch,), generator=g)].to(device)
        q = vae.encode(x).latent_dist
        y = vae.decode(q.sample()).sample
        l1, edge = errors(y, x)
        kl = 0.5 * (q.mean**2 + q.var - 1 - q.logvar).mean()
        descend(l1 + edge + (1e-3 if first == 0 else 3e-4) * kl, vae, opt, cosine(lr, step - first, length))
        follow(ema, vae, step, 0.995)
        log.append((l1.item(), edge.item()))
        if due(step, steps, 50):
            say("vae", step, steps, clock, "L1 {:.4f}  edge {:.4f}".format(*np.mean(log[-50:], 0)))
        if due(step, steps, 250):
            save_state(work / "vae.pt", step + 1, vae=vae, ema=ema, opt=opt)
    return ema.eval()


def standardise(vae, x_all):
    """Give the latents zero mean and unit variance in each channel, as a diffusion model assumes at t = 0.

    It is folded into the two 1x1 convolutions around them: `scaling_factor` is 1, the pictures do not change.
    """
    with torch.no_grad():
        z = torch.cat([vae.encode(x).latent_dist.mean for x in x_all.split(64)])
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        enc, dec, n = vae.quant_conv, vae.post_quant_conv, len(mean)
        dec.bias += dec.weight[:, :, 0, 0] @ mean
        dec.weight *= std[None, :, None, None]
        enc.weight[:n] /= std[:, None, None, None]
        enc.bias[:n] = (enc.bias[:n] - mean) / std
        enc.bias[n:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)
    return vae


def train_decoder(work, device, vae, steps, batch=12, lr=1.5e-3, noise=0.05):
    """Sharpen the decoder alone on the pictures of STYLES: latents and U-Nets stay what they are."""
    pictures = training_pictures()[0]
    z_all, x_all = encode_all(vae, pictures, device), (pictures * 2 - 1).to(device)
    decoder, indices = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]), pool(STYLES)
    opt = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    ema, clock, log = copy.deepcopy(decoder), time.time(), []
    start = load_state(work / "decoder.pt", decoder=decoder, ema=ema, opt=opt)
    for step in range(start, steps):
        g = torch.Generator().manual_seed(2 * 10**6 + step)
        index = indices[torch.randint(len(indices), (batch,), generator=g)]
        z = z_all[index] + noise * torch.randn(batch, *z_all.shape[1:], generator=g).to(device)
        l1, edge = errors(vae.decode(z).sample, x_all[index])
        descend(l1 + edge, decoder, opt, cosine(lr, step, steps))
        follow(ema, decoder, step, 0.995)
        log.append((l1.item(), edge.item()))
        if due(step, steps, 50):
            say("decoder", step, steps, clock, "L1 {:.4f}  edge {:.4f}".format(*np.mean(log[-50:], 0)))
        if due(step, steps, 250):
            save_state(work / "decoder.pt", step + 1, decoder=decoder, ema=ema, opt=opt)
    decoder.load_state_dict(ema.state_dict())
    return vae


# --------------------------------------------------------------------------------- tokenizer and text encoder
MAX_TOKENS = 8  # <bos>, up to six words, <eos>


def word_tokenizer(words, eos):
    """One token for each of `words`, lower case; anything else is <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    special = [("<bos>", 1), ("<eos>", eos)]
    tok.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=special)
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=MAX_TOKENS, **names)


def words_of(labels):
    return ["a", "an"] + sorted({w for label in labels for w in label.split()} - {"a", "an"})


def build_tokenizer(labels):
    return word_tokenizer(["<pad>", "<bos>", "<eos>", "<unk>", *words_of(labels)], eos=2)


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=96, max_position_embeddings=MAX_TOKENS,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return CLIPTextModel(config)


def token_ids(tokenizer, captions):
    options = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return tokenizer(captions, **options).input_ids


def article(label):
    return ("an " if label[0] in "aeiou" else "a ") + label


# ---------------------------------------------------------------------------------------------------- teacher
SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    clip_sample=False, set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
LAST = dict(timestep_spacing="trailing", set_alpha_to_one=True)  # of tiny/sd: a last step to the clean latent
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def new_unet(**extra):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=12, out_channels=12, block_out_channels=(96, 128), layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=96, attention_head_dim=4, norm_num_groups=16, **extra,
    )  # fmt: skip


def add_noise(x, eps, t):
    ab = ALPHA_BAR.to(x.device)[t].view(-1, 1, 1, 1)
    return ab.sqrt() * x + (1 - ab).sqrt() * eps


def encode_all(vae, pictures, device):
    vae.to(device)
    with torch.no_grad():
        return torch.cat([vae.encode(x.to(device) * 2 - 1).latent_dist.mean for x in pictures.split(64)])


def caption_batch(ids_plain, ids_article, ids_empty, index, g):
    """Token ids for a batch: label, label with article, or nothing (10 %, for classifier-free guidance)."""
    u = torch.rand(len(index), 1, generator=g)
    return torch.where(u < 0.1, ids_empty, torch.where(u < 0.55, ids_plain[index], ids_article[index]))


# Steps and what to learn from: all, the easier half until it is drawn well, all.
TEACHER_PHASES = ((1200, None), (1400, STYLES), (3000, None))
TEACHER_ROUNDS = (2600, 3000)  # steps of each round of the learning rate


def train_teacher(work, device, vae, batch=64, lr=8e-4):
    steps = sum(TEACHER_ROUNDS)
    pictures, labels = training_pictures()
    z_all, tokenizer = encode_all(vae, pictures, device), build_tokenizer(labels)
    ids = [token_ids(tokenizer, c) for c in (labels, [article(c) for c in labels], [""])]
    torch.manual_seed(0)
    unet, text = new_unet().to(device), new_text_encoder(tokenizer).to(device)
    both = torch.nn.ModuleList([unet, text])
    opt = torch.optim.AdamW(both.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-2)
    ema, clock, log = copy.deepcopy(both), time.time(), []
    start = load_state(work / "teacher.pt", both=both, ema=ema, opt=opt)
    for step in range(start, steps):
        g = torch.Generator().manual_seed(step)
        (length,), first = phase_at([(n,) for n in TEACHER_ROUNDS], step)
        rate = trapezoid(lr, step - first, length, warm_up=200)
        (_, styles), first = phase_at(TEACHER_PHASES, step)
        if step in (start, first):
            indices = pool(styles)
        index = indices[torch.randint(len(indices), (batch,), generator=g)]
        x, eps = z_all[index], torch.randn(batch, *z_all.shape[1:], generator=g).to(device)
        t = torch.randint(1000, (batch,), generator=g).to(device)
        c = text(caption_batch(*ids, index, g).to(device))[0]
        snr = ALPHA_BAR.to(device)[t] / (1 - ALPHA_BAR.to(device)[t])
        error = (unet(add_noise(x, eps, t), t, c).sample - eps).square().mean((1, 2, 3))
        descend((error * snr.clamp(max=5) / snr).mean(), both, opt, rate)  # min-SNR-5
        follow(ema, both, step, 0.998)
        log.append(error.detach().mean().item())
        if due(step, steps, 50):
            say("teacher", step, steps, clock, f"eps loss {np.mean(log[-200:]):.4f}")
        if due(step, steps, 200):
            save_state(work / "teacher.pt", step + 1, both=both, ema=ema, opt=opt)
    return ema[0].eval(), ema[1].eval(), tokenizer


# ---------------------------------------------------------------------------- latent consistency distillation
W_RANGE = (1.0, 5.0)  # guidance_scale - 1: the student knows guidance scales 2 to 6
# Steps and timesteps of a solver step, at last those of the 50-step schedule.
LCM_PHASES = ((150, 100), (250, 40), (600, 20), (1000, 20))
LCM_ROUNDS = (1000, 1000)  # as TEACHER_ROUNDS


def f_theta(unet, x, t, c, w_embedding):
    """Consistency function with LCMScheduler's boundary scalings (sigma_data 0.5, timestep_scaling 10)."""
    s, ab = (10.0 * t).view(-1, 1, 1, 1), ALPHA_BAR.to(x.device)[t].view(-1, 1, 1, 1)
    x0 = (x - (1 - ab).sqrt() * unet(x, t, c, timestep_cond=w_embedding).sample) / ab.sqrt()
    return 0.25 / (s**2 + 0.25) * x + s / (s**2 + 0.25).sqrt() * x0


def train_lcm(work, device, vae, teacher, text, tokenizer, batch=32, lr=5e-4):
    from diffusers import LatentConsistencyModelPipeline as LCM

    steps = sum(LCM_ROUNDS)
    pictures, labels = training_pictures()
    indices = pool()
    z_all, alpha_bar = encode_all(vae, pictures, device), ALPHA_BAR.to(device)
    with torch.no_grad():
        ids = [token_ids(tokenizer, c) for c in (labels, [article(c) for c in labels], [""])]
        c_plain, c_article, c_empty = (text(part.to(device))[0] for part in ids)
    torch.manual_seed(0)
    student = new_unet(time_cond_proj_dim=256).to(device)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)  # start as the teacher
    opt = torch.optim.AdamW(student.parameters(), lr, betas=(0.9, 0.99), weight_decay=0)
    target, ema, clock, log = copy.deepcopy(student), copy.deepcopy(student), time.time(), []
    start = load_state(work / "lcm.pt", student=student, target=target, ema=ema, opt=opt)
    for step in range(start, steps):
        g = torch.Generator().manual_seed(10**6 + step)
        (length,), first = phase_at([(n,) for n in LCM_ROUNDS], step)
        (_, skip), _ = phase_at(LCM_PHASES, step)
        index = indices[torch.randint(len(indices), (batch,), generator=g)]
        t = torch.randint(1, 1000 // skip + 1, (batch,), generator=g) * skip - 1
        t = t.to(device)  # t_{n+k}: skip-1 ... 999
        s = (t - skip).clamp(min=0)  # t_n
        w = torch.rand(batch, generator=g) * (W_RANGE[1] - W_RANGE[0]) + W_RANGE[0]
        w_embedding = LCM.get_guidance_scale_embedding(None, w, embedding_dim=256).to(device)
        plain, here = (torch.rand(batch, 1, 1, generator=g) < 0.5).to(device), index.to(device)
        c = torch.where(plain, c_plain[here], c_article[here])
        x_t = add_noise(z_all[here], torch.randn(batch, *z_all.shape[1:], generator=g).to(device), t)
        # one DDIM step of the guided teacher from t_{n+k} to t_n, then the target network
        with torch.no_grad():
            both = torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([c, c_empty.expand_as(c)])
            e_c, e_0 = teacher(*both).sample.chunk(2)
            eps = e_c + w.to(device).view(-1, 1, 1, 1) * (e_c - e_0)
            ab_t, ab_s = (alpha_bar[i].view(-1, 1, 1, 1) for i in (t, s))
            x_s = ab_s.sqrt() * (x_t - (1 - ab_t).sqrt() * eps) / ab_t.sqrt() + (1 - ab_s).sqrt() * eps
            goal = f_theta(target, x_s, s, c, w_embedding)
        d = f_theta(student, x_t, t, c, w_embedding) - goal
        loss = ((d**2 + 1e-4).sqrt() - 1e-2).mean()  # pseudo-Huber
        descend(loss, student, opt, trapezoid(lr, step - first, length, warm_up=50))
        follow(ema, student, step, 0.99)
        with torch.no_grad():
            for m, b in zip(target.parameters(), student.parameters()):
                m.lerp_(b, 0.2)
        log.append(loss.item())
        if due(step, steps, 50):
            say("lcm", step, steps, clock, f"skip {skip}  loss {np.mean(log[-100:]):.4f}")
        if due(step, steps, 100):
            save_state(work / "lcm.pt", step + 1, student=student, target=target, ema=ema, opt=opt)
    return ema.eval()


# ------------------------------------------------------------------------------------------------------- clip
def new_clip(labels):
    """A small CLIPModel over 64x64 pictures and its processor.

    <eos> has the highest id: that is where CLIP reads a text's embedding.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<pad>", "<bos>", "<unk>", *words_of(labels), "<eos>"]
    text = dict(
        vocab_size=len(words), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
        pad_token_id=0, bos_token_id=1, eos_token_id=len(words) - 1,
    )  # fmt: skip
    vision = dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, image_size=64, patch_size=8,
    )  # fmt: skip
    size = dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    pixels = CLIPImageProcessorPil(**size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
    return clip, CLIPProcessor(image_processor=pixels, tokenizer=word_tokenizer(words, eos=len(words) - 1))


CLIP_ROUNDS = (3000, 1500)  # in the second, half of the pictures as `redrawn`, and all of them bent


@torch.no_grad()
def redrawn(pictures, device, copies=4):
    """What the VAE makes of each picture's latent plus noise of std 0 to 0.8: (n, ...) -> (copies, n, ...).

    Pictures (n, 3, 64, 64) in [0, 1]; the copies are soft and a little wrong, as a model's.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(HERE / "sd" / "vae", dtype=torch.float32).to(device)
    g = torch.Generator().manual_seed(0)
    z = torch.cat([vae.encode(part.to(device) * 2 - 1).latent_dist.mean.cpu() for part in pictures.split(64)])
    std = 0.8 * torch.rand(copies, len(z), 1, 1, 1, generator=g)
    z = (z + std * torch.randn(copies, *z.shape, generator=g)).flatten(0, 1)
    out = torch.cat([vae.decode(part.to(device)).sample.cpu() for part in z.split(64)])
    return (out / 2 + 0.5).clamp(0, 1).unflatten(0, (copies, -1))


def bent(x, g):
    """Pictures (B, 3, 64, 64) under a smooth random displacement of up to about 6 pixels."""
    shift = 0.1 * torch.randn(len(x), 2, 4, 4, generator=g)
    shift = F.interpolate(shift, (64, 64), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, 64)
    place = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    return F.grid_sample(x, place + shift, padding_mode="border", align_corners=True)


def disturbed(x, g):
    """Pictures (B, 3, 64, 64) mirrored, moved, blurred, faded or tinted, noisy: as a poor model draws."""
    B = len(x)
    x = torch.where(torch.rand(B, 1, 1, 1, generator=g) < 0.5, x.flip(3), x)
    moves, padded = torch.randint(0, 13, (2, B), generator=g).tolist(), F.pad(x, (6,) * 4, value=1.0)
    x = torch.stack([p[:, top : top + 64, left : left + 64] for p, top, left in zip(padded, *moves)])
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
    x = torch.lerp(x, blurred, 0.8 * torch.rand(B, 1, 1, 1, generator=g))
    x = 1 - (1 - x) * (1 - 0.6 * torch.rand(B, 3, 1, 1, generator=g) * torch.rand(B, 1, 1, 1, generator=g))
    x = x + 0.3 * torch.rand(B, 1, 1, 1, generator=g) ** 2 * torch.randn(x.shape, generator=g)
    return x.clamp(0, 1)


def train_clip(work, device, batch=96, lr=1e-3):
    """Each picture against the captions of all concepts: CLIP's loss, every other caption a negative."""
    pictures, labels = training_pictures()
    concepts = sorted(set(labels))
    target_all = torch.tensor([concepts.index(label) for label in labels])
    torch.manual_seed(0)
    clip, processor = new_clip(labels)
    clip.to(device)
    opt = torch.optim.AdamW(clip.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    ema, clock, log, steps, copies = copy.deepcopy(clip), time.time(), [], sum(CLIP_ROUNDS), None
    start = load_state(work / "clip.pt", clip=clip, ema=ema, opt=opt)
    wordings = concepts, [article(c) for c in concepts]
    ids = [processor.tokenizer(c, padding="max_length", return_tensors="pt").input_ids for c in wordings]
    ids = torch.stack(ids).to(device)
    for step in range(start, steps):
        g = torch.Generator().manual_seed(3 * 10**6 + step)
        (length,), first = phase_at([(n,) for n in CLIP_ROUNDS], step)
        index = torch.randint(len(pictures), (batch,), generator=g)
        x = pictures[index]
        if first:
            copies, half = redrawn(pictures, device) if copies is None else copies, batch // 2
            copy_of = torch.randint(len(copies), (batch - half,), generator=g)
            x = bent(torch.cat([x[:half], copies[copy_of, index[half:]]]), g)
        wording = ids[torch.randint(2, (len(concepts),), generator=g), torch.arange(len(concepts))]
        x = disturbed(x, g).to(device) * 2 - 1
        logits = clip(pixel_values=x, input_ids=wording, attention_mask=(wording > 0).long()).logits_per_image
        loss = F.cross_entropy(logits, target_all[index].to(device), label_smoothing=0.05)
        descend(loss, clip, opt, cosine(lr, step - first, length))
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(20))
        follow(ema, clip, step, 0.995)
        log.append((logits.argmax(1).cpu() == target_all[index]).float().mean().item())
        if due(step, steps, 50):
            say("clip", step, steps, clock, f"loss {loss.item():.3f}  retrieval {np.mean(log[-50:]):.3f}")
        if due(step, steps, 250):
            save_state(work / "clip.pt", step + 1, clip=clip, ema=ema, opt=opt)
    ema.eval().half().save_pretrained(HERE / "clip")
    processor.save_pretrained(HERE / "clip")


def retrieval(pictures, captions, labels):
    """Share of pictures (B, 3, 64, 64) whose caption is the nearest of all labels to them for tiny/clip."""
    from transformers import CLIPModel, CLIPProcessor

    clip = CLIPModel.from_pretrained(HERE / "clip", dtype=torch.float32)
    processor, concepts = CLIPProcessor.from_pretrained(HERE / "clip"), sorted(set(labels))
    seen = [Image.fromarray(p) for p in (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()]
    inputs = processor(text=concepts, images=seen, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        best = clip(**inputs).logits_per_image.argmax(1).tolist()
    return sum(concepts[b] == c for b, c in zip(best, captions)) / len(captions)


# ----------------------------------------------------------------------------------------------------- export
def export(vae, text, tokenizer, unet, folder, lcm):
    """Write a diffusers pipeline in fp16 safetensors."""
    from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

    vae, text, unet = (copy.deepcopy(part).cpu() for part in (vae, text, unet))
    parts = dict(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet)
    parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if lcm:
        scheduler = LCMScheduler(**SCHEDULE, original_inference_steps=50)
        pipe = LatentConsistencyModelPipeline(scheduler=scheduler, **parts)
    else:
        pipe = StableDiffusionPipeline(scheduler=DDIMScheduler(**(SCHEDULE | LAST)), **parts)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        for q in part.parameters():
            q.data = q.data.half()
    pipe.save_pretrained(folder)
    config = folder / "text_encoder" / "config.json"  # transformers loads in its dtype: fp32, like the rest
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for config in folder.glob("*/config.json"):  # no path of the machine that they were made on
        kept = json.loads(config.read_text())
        kept.pop("_name_or_path", None)
        config.write_text(json.dumps(kept, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------- report
def nearest_accuracy(pictures, captions, train, labels):
    """Share of `pictures` (B, 3, 64, 64) whose nearest training picture in pixel L2 carries their caption."""
    nearest = torch.cdist(pictures.flatten(1), train.flatten(1)).argmin(1).tolist()
    return sum(labels[n] == c for n, c in zip(nearest, captions)) / len(captions)


def draw(pipe, captions, batch=50, **kwargs):
    """Pictures (B, 3, 64, 64) in [0, 1] of a pipeline, the noise fixed by the position of the caption."""
    pipe.set_progress_bar_config(disable=True)
    out = []
    for i in range(0, len(captions), batch):
        part = captions[i : i + batch]
        g = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        images = pipe(part, generator=g, output_type="np", **kwargs).images
        out.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(out).float()


def fixed_captions(labels, n=200):
    concepts = sorted(set(labels))
    order = torch.randperm(len(concepts), generator=torch.Generator().manual_seed(0))
    return [concepts[i] for i in order[:n].tolist()]


def grid(pictures, columns, path):
    u8 = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(u8[i : i + columns]), 1) for i in range(0, len(u8) - columns + 1, columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


GUIDANCE = {"lcm": 6.0, "sd": 3.0}  # of the report, and rlcm.py's presets


def report(device):
    from diffusers import DiffusionPipeline

    train, labels = training_pictures()
    captions, drawn = fixed_captions(labels), {}
    pipes = {n: DiffusionPipeline.from_pretrained(HERE / n, dtype=torch.float32).to(device) for n in GUIDANCE}
    vae = pipes["sd"].vae
    with torch.no_grad():
        x = train.to(device) * 2 - 1
        y = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in x.split(64)])
    numbers = {"pictures": len(labels), "concepts": len(set(labels)), "guidance": GUIDANCE}
    numbers["vae L1 on [-1, 1]"] = round(float((y - x).abs().mean()), 4)
    for name, steps in (("lcm", 1), ("lcm", 2), ("lcm", 4), ("lcm", 8), ("sd", 25), ("sd", 50)):
        options = dict(num_inference_steps=steps, guidance_scale=GUIDANCE[name])
        pictures = drawn[name, steps] = draw(pipes[name], captions, **options)
        numbers[f"{name} {steps} steps"] = round(nearest_accuracy(pictures, captions, train, labels), 3)
        if (name, steps) in (("lcm", 4), ("lcm", 2), ("sd", 50)):
            grid(pictures[:40], 10, HERE / f"{name}-{steps}.png")
    g = torch.Generator().manual_seed(0)
    noisy = (train + 0.2 * torch.randn(train.shape, generator=g)).clamp(0, 1)
    for name, pictures, names in (
        ("clean pictures", train, labels),
        ("pictures with noise 0.2", noisy, labels),
        ("lcm 4 steps", drawn["lcm", 4], captions),
        ("lcm 2 steps", drawn["lcm", 2], captions),
    ):
        numbers[f"clip retrieval, {name}"] = round(retrieval(pictures, names, labels), 3)
    print(json.dumps(numbers, indent=1))
    (HERE / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("--work", type=Path, default=HERE / "work", help="downloads, checkpoints: not committed")
    p.add_argument("--stage", choices=("all", "clip", "report"), default="all")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--decoder-steps", type=int, default=1200)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    build_data(args.work)
    if args.stage == "all":
        vae = standardise(train_vae(args.work, args.device).cpu(), training_pictures()[0] * 2 - 1)
        vae = train_decoder(args.work, args.device, vae.to(args.device), args.decoder_steps).eval()
        teacher, text, tokenizer = train_teacher(args.work, args.device, vae)
        export(vae, text, tokenizer, teacher, HERE / "sd", lcm=False)
        student = train_lcm(args.work, args.device, vae, teacher, text, tokenizer)
        export(vae, text, tokenizer, student, HERE / "lcm", lcm=True)
    if args.stage in ("all", "clip"):
        train_clip(args.work, args.device)
    report(args.device)


if __name__ == "__main__":
    main()
