"""Rewards and prompt sets for rlcm.py. A reward is any function

    fn(images, prompts) -> (B,) float tensor, higher is better
        images   (B, 3, H, W) float32 in [0, 1], on the training device; a copy, safe to change in place
        prompts  list of B strings

Name one with `--reward`: a key of REWARDS below, `path/to/file.py:function` for your own, or a weighted sum
of those. It is given one micro-batch of images at a time. From Python:

    reward = get_reward("aesthetic:1,compress:0.05")
    reward(images, prompts, micro_batch=64) (B,)    the sum; it sees 64 images at a time
    reward.components(images, prompts)      (B, n)  its n components, weights included
    reward.names                            n strings: "aesthetic:1", "compress:0.05"

Heavy imports belong inside the function that needs them. The models behind rewards are downloaded from the
Hugging Face Hub on first use and stay on their device. The embedded model has a CLIP of its own (TINY_CLIP).
"""
import contextlib
import functools
import importlib.util
import io
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image


# ---------------------------------------------------------------------------------------------------- rewards
def to_pil(images):
    """(B, 3, H, W) float in [0, 1] -> list of B Pillow images."""
    pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(p) for p in pixels]


def jpeg_kilobytes(images, quality=95):
    """Size of each image as a JPEG file, kilobytes of 1000 bytes (DDPO, arXiv 2305.13301): (B,) float32."""
    files = [io.BytesIO() for _ in images]
    for image, file in zip(to_pil(images), files):
        image.save(file, "JPEG", quality=quality)
    return torch.tensor([file.tell() / 1000 for file in files])


def compress(images, prompts):
    """minus the JPEG size in kB: images that compress well"""
    return -jpeg_kilobytes(images)


def incompress(images, prompts):
    """the JPEG size in kB: images full of detail"""
    return jpeg_kilobytes(images)


def clip_pixels(images, size, mean, std):
    """CLIP's image processor on tensors: short side to `size`, centre crop, normalise: (B, 3, size, size)."""
    H, W = images.shape[-2:]
    short = min(H, W)
    H = size * H // short
    W = size * W // short
    images = F.interpolate(images.float(), (H, W), mode="bicubic", antialias=True).clamp(0, 1)
    top = (H - size) // 2
    left = (W - size) // 2
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images[..., top : top + size, left : left + size] - mean) / std


def clip_embed(images, prompts, source, processor):
    """A CLIP's embeddings of images and prompts, (B, E) each, of unit length, and its logit scale, ()."""
    processor = load("AutoProcessor", processor)
    tokens = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    model = load("CLIPModel", source, images.device)
    config = processor.image_processor
    size = model.config.vision_config.image_size
    pixels = clip_pixels(images, size, config.image_mean, config.image_std)
    out = model(pixel_values=pixels.to(model.dtype), **tokens.to(images.device))
    image, prompt = (F.normalize(v.float(), dim=1) for v in (out.image_embeds, out.text_embeds))
    return image, prompt, model.logit_scale.float().exp()


def clip(images, prompts, source=None):
    """CLIPScore, 2.5 max(cos, 0) of image and prompt: 0 to 2.5

    Hessel et al. 2021, arXiv 2104.08718, but without their prefix "A photo depicts". Differentiable.
    """
    source = source or HUB["clip"]
    image, prompt, _ = clip_embed(images, prompts, source, source)
    return 2.5 * (image * prompt).sum(1).clamp(min=0)


def pickscore(images, prompts):
    """PickScore, a CLIP-H tuned on human preferences: logit scale x cos, about 17 to 24

    Kirstain et al. 2023, arXiv 2305.01569. Not rescaled (some code divides it by 26). Differentiable.
    """
    image, prompt, scale = clip_embed(images, prompts, HUB["pickscore"], HUB["pickscore-processor"])
    return scale * (image * prompt).sum(1)


def aesthetic(images, prompts):
    """LAION's aesthetic predictor on CLIP ViT-L/14: the rating that people would give, 1 to 10

    github.com/christophschuhmann/improved-aesthetic-predictor, linear, as in DDPO and RLCM. Differentiable.
    """
    x, _, _ = clip_embed(images, prompts, HUB["clip"], HUB["clip"])  # (B, 768)
    head = load("aesthetic-model.pth", HUB["aesthetic"])  # 768 - 1024 - 128 - 64 - 16 - 1
    for i in (0, 2, 4, 6, 7):  # between them: dropout
        x = F.linear(x, head[f"layers.{i}.weight"].to(x), head[f"layers.{i}.bias"].to(x))
    return x.squeeze(1)


@torch.no_grad()
def describe(images, source):
    """Greedy answers of the LLaVA `source` to DDPO's question, one per image: B strings."""
    processor = load("AutoProcessor", source)
    texts = ["USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:"] * len(images)
    model = load("LlavaForConditionalGeneration", source, images.device)
    asked = processor(to_pil(images), texts, return_tensors="pt").to(images.device, model.dtype)
    said = model.generate(**asked, do_sample=False, max_new_tokens=64)[:, asked["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(said, skip_special_tokens=True)]


@torch.no_grad()
def bert_recall(references, candidates, device):
    """BERTScore's recall: mean over the reference's tokens of the best cosine to any token of the candidate.

    Zhang et al. 2020, arXiv 1904.09675. Two lists of B sentences -> (B,) float32.
    """
    tokenizer = load("AutoTokenizer", HUB["bert"])
    model = load("AutoModel", HUB["bert"], device, num_hidden_layers=BERT_LAYER)

    def embed(sentences):  # -> unit vectors (B, L, E); masks (B, L): not padding, not special
        options = dict(padding=True, truncation=True, return_special_tokens_mask=True, return_tensors="pt")
        tokens = tokenizer(sentences, **options).to(device)
        special = tokens.pop("special_tokens_mask").bool()  # padding, too
        state = model(**tokens).last_hidden_state.float()
        return F.normalize(state, dim=2), tokens["attention_mask"].bool(), ~special

    reference, _, word = embed(references)
    candidate, there, _ = embed(candidates)
    cosine = reference @ candidate.mT  # (B, L of the reference, L of the candidate)
    best = cosine.masked_fill(~there[:, None], -1).amax(2)
    return (best * word).sum(1) / word.sum(1)  # [CLS] and [SEP] count in the candidate only, as in bert-score


def align(images, prompts, llava=None):
    """does LLaVA's description say what the prompt says? BERTScore recall: 0 for unrelated texts, at most 1

    As in DDPO and RLCM, with two differences: LLaVA-1.5 7B describes the images (RLCM's has 13B; align_13b is
    closest), and it sees them uncompressed (theirs sees a JPEG of quality 80). They report
    the recall before rescaling, which is 0.517 + 0.483 x this.
    """
    said = describe(images, llava or HUB["llava"])
    recall = bert_recall([f"The image contains {p}" for p in prompts], said, images.device)
    return (recall - BERT_RECALL) / (1 - BERT_RECALL)


def align_13b(images, prompts):
    """align with LLaVA-1.5 13B in place of 7B: 26 GB of GPU memory instead of 14"""
    return align(images, prompts, HUB["llava-13b"])


REWARDS = {fn.__name__: fn for fn in (compress, incompress, aesthetic, clip, pickscore, align, align_13b)}
HELP = "; ".join(f"{name}: {fn.__doc__.splitlines()[0]}" for name, fn in REWARDS.items())
HELP += "; path/to/file.py:function; or a sum with weights, aesthetic:1,compress:0.05"


def get_reward(name, model=None):
    """The reward of that name, or a sum of several; with model "tiny", clip is tiny/clip. Raises BadInput."""
    names = [part.strip() for part in name.split(",")]
    require(all(names), f"an empty part in the reward {name!r}: write a sum as aesthetic:1,compress:0.05")
    require(len(set(names)) == len(names), f"the reward {name!r} has a part twice: add up its weights")
    fns = [get_component(part, model) for part in names]

    def components(images, prompts):
        return torch.stack([fn(images, prompts) for fn in fns], 1)  # (B, n)

    def reward(images, prompts, micro_batch=64):
        parts = [slice(i, i + micro_batch) for i in range(0, len(prompts), micro_batch)]
        return torch.cat([components(images[part], prompts[part]).sum(1) for part in parts])  # (B,)

    reward.components = components
    reward.names = names
    return reward


def get_component(part, model):
    """One part of a sum, `reward` or `reward:weight`, checked on every call. Raises BadInput."""
    name, _, weight = part.rpartition(":")
    if name not in REWARDS and ".py:" not in name:
        name, weight = part, "1"
    if ".py:" in name:
        fn = load_function(name)
    else:
        advice = f"choose from {', '.join(REWARDS)}, or give path/to/file.py:function"
        require(name in REWARDS, f"unknown reward {name!r}: {advice}")
        fn = REWARDS[name]
    if (name, model) == ("clip", "tiny"):
        fn = functools.partial(clip, source=TINY_CLIP)
    with explained(f"the weight {weight!r} of the reward {name!r} is not a finite number like 0.5"):
        scale = float(weight)
        int(scale)  # fails for infinity and NaN
    return functools.partial(checked, part, fn, scale)


def checked(part, fn, scale, images, prompts):
    """scale x fn(images, prompts), (B,) float32, on their device. BadInput unless it is B finite numbers."""
    require(images.isfinite().all(), f"the images for the reward {part!r} are not finite numbers")
    with explained(f"the reward {part!r} failed"):
        torch.set_grad_enabled(images.requires_grad)  # False in rlcm.py
        r = torch.as_tensor(fn(images.clone(), list(prompts)))  # copies, so in-place changes do no harm
        require(not r.is_complex(), f"the reward {part!r} returned complex numbers")
        r = scale * r.float().to(images.device)  # integers would truncate the advantages
    returned = f"the reward {part!r} returned"
    one_each = r.shape == (len(prompts),)
    require(one_each, f"{returned} shape {tuple(r.shape)} for {len(prompts)} images: return one number each")
    for value, prompt in zip(r.tolist(), prompts):
        require(math.isfinite(value), f"{returned} {value} for the prompt {prompt!r}: it must be finite")
    return r


# ---------------------------------------------------------------------------------------------------- prompts
ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
    beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee
    pig turkey fly llama camel bat gorilla hedgehog kangaroo
""".split()  # the 45 common animals of the DDPO paper, appendix
OTHER_ANIMALS = """
    badger beaver bison crab crocodile eagle elephant flamingo giraffe hippopotamus jellyfish koala leopard
    lobster octopus otter owl panda parrot peacock penguin rhinoceros snail swan
""".split()  # held out: none of the 45, all known to the embedded model
ACTIVITIES = "riding a bike", "playing chess", "washing the dishes"  # DDPO, section 6.2: "washing dishes"
PROMPTS = {"animals": ANIMALS, "other-animals": OTHER_ANIMALS}
PROMPTS["animals-activities"] = [
    f"{'an' if animal[0] in 'aeiou' else 'a'} {animal} {do}" for animal in ANIMALS for do in ACTIVITIES
]


def get_prompts(name):
    """List of prompts: the set of that name, the non-empty lines of a text file, or the text itself.

    Text is a prompt if it has two words or more, no file has that name, and it does not end in .txt.
    """
    if name in PROMPTS:
        return list(PROMPTS[name])
    words = len(name.split()) > 1 and not os.path.exists(name) and not name.endswith(".txt")
    sets = f"{', '.join(PROMPTS)}, a text file with one prompt per line, or two words or more"
    with explained(f"no prompt set and no readable text file {name!r}: choose from {sets}"):
        # Notepad's files begin with a byte-order mark.
        text = " ".join(name.split()) if words else Path(name).read_text(encoding="utf-8-sig")
    table = name.endswith((".csv", ".tsv", ".json", ".jsonl")) or re.match(r'\s*([\[{]\s*["\[{]|.*\t)', text)
    require(not table, f"{name} is a table or JSON: give a text file with one prompt per line")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    require(prompts, f"the prompt file {name} is empty: write one prompt per line")
    return prompts


# ---------------------------------------------------------------------------------- models behind the rewards
HUB = {  # hub ids, or folders, of the models behind the rewards
    "clip": "openai/clip-vit-large-patch14",
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor",  # a copy of LAION's sac+logos+ava1-l14-linearMSE
    "pickscore": "yuvalkirstain/PickScore_v1",
    "pickscore-processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "bert": "microsoft/deberta-xlarge-mnli",
}
TINY_CLIP = str(Path(__file__).resolve().parent / "tiny" / "clip")
BERT_LAYER = 40  # bert-score 0.3.13: this encoder's best layer
BERT_RECALL = 0.5170288  # ... and the mean recall of unrelated English sentences at that layer
DTYPE = {"cuda": torch.float16}  # of models on that type of device; float32 elsewhere


@functools.cache
def load(kind, source, device=None, **options):
    """transformers' `kind` from `source`, cached: a model on `device`, a processor, or a file of tensors."""
    # Without the Hub, HF_HOME must be a cache that has it.
    with explained(f"cannot load {source} from Hub or HF_HOME; compress and incompress need no model"):
        import transformers

        file = kind if kind.endswith(".pth") else "config.json"
        file = transformers.utils.cached_file(source, file)  # if the Hub is unreachable, fail after one file
        if file.endswith(".pth"):
            return torch.load(file, map_location="cpu", weights_only=True)
        if device:
            options["dtype"] = DTYPE.get(device.type, torch.float32)
        loaded = getattr(transformers, kind).from_pretrained(source, **options)
    for p in loaded.parameters() if device else ():  # DeBERTa's q_bias and v_bias load as float32
        p.data = p.data.to(options["dtype"])  # not loaded.to(dtype): LLaVA's rotary buffers must stay float32
    return loaded.requires_grad_(False).to(device) if device else loaded


# ----------------------------------------------------------------------------------------- functions in files
LOADED = {}  # folder -> modification times of its files at the last import


def load_function(spec):
    """The function that `path/to/file.py:function` names. Raises BadInput.

    Its file is imported once, and again if it or a file beside it has been changed since.
    """
    path, _, name = spec.rpartition(":")
    file = Path(path).resolve()
    require(file.is_file(), f"there is no file {path} in {os.getcwd()}: give path/to/file.py:function")
    changed = {neighbour: neighbour.stat().st_mtime_ns for neighbour in file.parent.glob("*.py")}
    if LOADED.setdefault(file.parent, changed) != changed:
        forget(file.parent)
    LOADED[file.parent] = changed
    module = str(file)  # a name that no other module has
    if module not in sys.modules:
        with explained(f"the file {path} does not load"):
            sys.path.append(str(file.parent))  # so that it can import its neighbours
            spec = importlib.util.spec_from_file_location(module, file)
            sys.modules[module] = importlib.util.module_from_spec(spec)  # dataclasses look there
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # hides "usage: ..."
                    spec.loader.exec_module(sys.modules[module])
                require_own_neighbours(file)
            except BaseException:
                del sys.modules[module]
                raise
    function = getattr(sys.modules[module], name, None)
    require(callable(function), f"{path} has no function {name!r}")
    return function


def forget(folder):
    """Forget the modules that were imported from a folder's files, except the program itself."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or "."
        if Path(file).parent == folder and name not in ("rlcm", "rewards", "__main__"):
            del sys.modules[name]


def require_own_neighbours(file):
    """Raise BadInput if a newly imported file got another module in place of its neighbour."""
    for neighbour in [*file.parent.glob("*.py"), *file.parent.glob("*/__init__.py")]:
        name = neighbour.parent.name if neighbour.stem == "__init__" else neighbour.stem
        module = sys.modules.get(name)
        imports = rf"^\s*(from\s+|import\s+(.*,\s*)?){name}\b"
        if module and re.search(imports, file.read_text(encoding="utf-8"), re.MULTILINE):
            own = Path(module.__file__).resolve() == neighbour
            require(own, f"{file} imports {name} but gets {module.__file__}: rename one")


# ----------------------------------------------------------------------------------------------------- errors
class BadInput(ValueError):
    """The user's input is wrong; the message is one line that says what is wrong and what to do about it."""


def require(ok, message):
    """Raises BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def one_line(e):
    """An exception's type and message."""
    return f"{type(e).__name__}: {' '.join(str(e).partition(chr(27))[0].split())[:160]}"  # no colour codes


@contextlib.contextmanager
def explained(what):
    """Run other people's code: any exception becomes a BadInput that says `what`, with the cause in brackets.

    PyTorch's grad mode, default dtype and default device are restored afterwards.
    """
    grad = torch.is_grad_enabled()
    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as e:
        raise BadInput(f"{what} ({one_line(e)})") from e
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
