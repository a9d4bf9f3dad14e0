"""Rewards and prompt sets for rlcm.py.

A reward is any function

    fn(images, prompts) -> (B,) float tensor, higher is better
        images   (B, 3, H, W) float32 in [0, 1], on the training device
        prompts  list of B strings

Name one with `--reward`: a key of REWARDS below, `path/to/file.py:function` for your own, or a weighted sum
of such parts, `aesthetic:1,compress:0.05`. It is called with one micro-batch of pictures at a time, on a GPU
from a worker thread while the next one is being sampled.

From Python:

    reward = get_reward("aesthetic:1,compress:0.05")
    reward(images, prompts)         (B,)    the sum
    reward.terms(images, prompts)   (n, B)  its n terms, weights included: one pass, and .sum(0) is the sum
    reward.names                    n strings: "aesthetic:1", "compress:0.05"

`picture_statistics` and `diversity` are alarms against reward hacking. They need the pictures and no model.

Heavy imports belong inside the function that needs them. The models behind rewards come from the Hugging Face
hub (HUB) at their first picture; only the embedded model has its own CLIP (TINY_CLIP). They live on the
pictures' device, and leave a GPU whose memory is short once they have scored.
"""
import functools
import importlib.util
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what to do about it."""


# ----------------------------------------------------------------------------------------------------- models
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
BERT_RECALL = 0.5170288  # ... and mean recall of unrelated English sentences there
ROOM = 6.0  # GiB of GPU memory that a reward's model leaves to the training, or goes


@contextmanager
def reaching(source):
    """Whatever fails inside is a BadInput that names the model `source`."""
    try:
        yield
    except Exception as e:
        raise BadInput(
            f"cannot load {source} ({type(e).__name__}: {' '.join(str(e).split())[:100]}): "
            "it takes the Hugging Face hub once, or its cache (HF_HOME) filled elsewhere; "
            "compress and incompress need no model"
        ) from e


@functools.cache
def load(kind, source, **options):
    """`kind`.from_pretrained(source) of transformers, once. Raises BadInput."""
    import transformers

    with reaching(source):
        transformers.utils.cached_file(source, "config.json")  # no hub: told after one file's retries
        return getattr(transformers, kind).from_pretrained(source, **options)


def dtype_on(device):
    """Half precision on a GPU, float32 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32


@contextmanager
def lent(kind, source, device, **options):
    """The model of that kind on `device` for the block. It leaves again if less than ROOM is free then."""
    dtype = dtype_on(device)
    model = load(kind, source, dtype=dtype, **options)
    for p in model.parameters():  # DeBERTa's q_bias and v_bias come as float32
        p.data = p.data.to(dtype)  # not model.to(dtype): LLaVA's rotary buffers must stay float32
    yield model.to(device)
    if free_gib(device) < ROOM:
        model.to("cpu")


def free_gib(device):
    """GiB that this process can still have on a GPU: the driver's free memory and what torch keeps unused.

    Elsewhere no limit.
    """
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) / 2**30


# ---------------------------------------------------------------------------------------------------- rewards
def pictures(images):
    """(B, 3, H, W) float in [0, 1] -> list of B pictures of Pillow."""
    pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(p) for p in pixels]


def jpeg_kilobytes(images, quality=95):
    """Size of each picture as a JPEG file, in kilobytes of 1000 bytes (as DDPO, arXiv 2305.13301).

    images (B, 3, H, W) float in [0, 1] -> (B,) float32. A thread a core: Pillow encodes without the GIL.
    """
    def kilobytes(picture):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return buffer.tell() / 1000

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.tensor(list(pool.map(kilobytes, pictures(images))))


def compress(images, prompts):
    """minus the JPEG size in kB: pictures that compress well"""
    return -jpeg_kilobytes(images)


def incompress(images, prompts):
    """the JPEG size in kB: pictures full of detail"""
    return jpeg_kilobytes(images)


def clip_pixels(images, size, mean, std):
    """CLIP's image processor on tensors: short side to `size` (bicubic, antialiased), centre crop, normalise.

    images (B, 3, H, W) in [0, 1]; mean, std: 3 numbers each -> (B, 3, size, size) float32.
    """
    H, W = images.shape[-2:]
    H, W = size * H // min(H, W), size * W // min(H, W)
    images = F.interpolate(images.float(), (H, W), mode="bicubic", antialias=True)
    images = images.clamp(0, 1)  # bicubic overshoots
    top, left = (H - size) // 2, (W - size) // 2
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images[..., top : top + size, left : left + size] - mean) / std


@torch.no_grad()
def clip_embed(images, prompts, source, processor):
    """A CLIP's embeddings of B pictures and B prompts, of unit length, and its logit scale.

    -> (B, E), (B, E), () float32
    """
    processor = load("AutoProcessor", processor)
    tokens = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    with lent("CLIPModel", source, images.device) as model:
        pixels = clip_pixels(images, model.config.vision_config.image_size, mean, std)
        out = model(pixel_values=pixels.to(model.dtype), **tokens.to(images.device))
        picture, prompt = (F.normalize(v.float(), dim=1) for v in (out.image_embeds, out.text_embeds))
        return picture, prompt, model.logit_scale.float().exp()


def clip(images, prompts, source=None):
    """CLIPScore, 2.5 max(cos, 0) of picture and prompt: 0 to 2.5

    Hessel et al. 2021, arXiv 2104.08718, but the prompt as it stands, without their prefix "A photo depicts".
    """
    source = source or HUB["clip"]
    picture, prompt, _ = clip_embed(images, prompts, source, source)
    return 2.5 * (picture * prompt).sum(1).clamp(min=0)


def pickscore(images, prompts):
    """PickScore, what people prefer: logit scale x cos of a CLIP-H tuned on their choices, about 17 to 24

    Kirstain et al. 2023, arXiv 2305.01569. Not divided by anything (some divide by 26).
    """
    picture, prompt, scale = clip_embed(images, prompts, HUB["pickscore"], HUB["pickscore-processor"])
    return scale * (picture * prompt).sum(1)


@functools.cache
def aesthetic_head(source):
    """(weight, bias) of the layers of LAION's predictor, 768 - 1024 - 128 - 64 - 16 - 1. Raises BadInput."""
    from transformers.utils import cached_file

    with reaching(source):
        path = cached_file(source, "aesthetic-model.pth")
        state = torch.load(path, map_location="cpu", weights_only=True)
        layers = 0, 2, 4, 6, 7  # between them: dropout
        return [(state[f"layers.{i}.weight"].float(), state[f"layers.{i}.bias"].float()) for i in layers]


def aesthetic(images, prompts):
    """LAION's aesthetic predictor on CLIP ViT-L/14: the rating people would give, 1 to 10

    github.com/christophschuhmann/improved-aesthetic-predictor, the variant that DDPO and RLCM use. It has no
    nonlinearity.
    """
    x, _, _ = clip_embed(images, prompts, HUB["clip"], HUB["clip"])  # (B, 768)
    for weight, bias in aesthetic_head(HUB["aesthetic"]):
        x = F.linear(x, weight.to(x.device), bias.to(x.device))
    return x.squeeze(1)


@torch.no_grad()
def describe(images, source):
    """What the LLaVA `source` says is going on in each picture: list of B strings.

    Greedily, in 64 tokens at most. The question is DDPO's.
    """
    processor = load("AutoProcessor", source)
    question = ["USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:"] * len(images)
    with lent("LlavaForConditionalGeneration", source, images.device) as model:
        asked = processor(images=pictures(images), text=question, return_tensors="pt")
        asked = asked.to(images.device, model.dtype)
        said = model.generate(**asked, do_sample=False, max_new_tokens=64)[:, asked["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(said, skip_special_tokens=True)]


@torch.no_grad()
def bert_recall(references, candidates, device):
    """BERTScore's recall: mean over the reference's tokens of the best cosine to any token of the candidate.

    Zhang et al. 2020, arXiv 1904.09675. Two lists of B sentences -> (B,) float32.
    As in the package bert-score, [CLS] and [SEP] can be matched, but do not ask to be.
    """
    tokenizer = load("AutoTokenizer", HUB["bert"])

    def embed(sentences):  # -> unit vectors (B, L, E), is it a token (B, L), is it of the sentence (B, L)
        options = dict(padding=True, truncation=True, return_special_tokens_mask=True, return_tensors="pt")
        tokens = tokenizer(sentences, **options).to(device)
        special = tokens.pop("special_tokens_mask").bool()  # padding, too
        state = model(**tokens).last_hidden_state.float()
        return F.normalize(state, dim=2), tokens["attention_mask"].bool(), ~special

    with lent("AutoModel", HUB["bert"], device, num_hidden_layers=BERT_LAYER) as model:
        reference, _, word = embed(references)
        candidate, there, _ = embed(candidates)
    cosine = reference @ candidate.mT  # (B, L of the reference, L of the candidate)
    best = cosine.masked_fill(~there[:, None], -1).amax(2)
    return (best * word).sum(1) / word.sum(1)


def align(images, prompts, llava=None):
    """does a LLaVA's description say what the prompt says? BERTScore recall, 0 for unrelated texts, 1 at most

    As DDPO and RLCM compare them, with two differences: LLaVA-1.5 7B describes the pictures (there 13B of
    the first LLaVA; nearest: align_13b), and sees them as they are (there as JPEG-80, sent to a server).
    They report the recall before rescaling: 0.517 + 0.483 x this.
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
    """Reward function of that name, or weighted sum of several, with .terms and .names (see the file's head).

    With model "tiny", `clip` is the embedded model's own CLIP. Raises BadInput.
    """
    names = [part.strip() for part in name.split(",")]
    if len(set(names)) < len(names):
        raise BadInput(f"the reward {name!r} has a part twice: add up its weights")
    fns = [get_term(part, name, model) for part in names]

    def terms(images, prompts):
        return torch.stack([fn(images, prompts) for fn in fns])  # (n, B)

    def reward(images, prompts):
        return terms(images, prompts).sum(0)  # (B,)

    reward.terms, reward.names = terms, names
    return reward


def get_term(part, whole, model):
    """One part of a sum, `reward` or `reward:weight`, checked on every call. Raises BadInput."""
    name, _, weight = part.rpartition(":")
    if name not in REWARDS and ".py:" not in name:
        name, weight = part, "1"
    if not part:
        raise BadInput(f"an empty part in the reward {whole!r}: write a sum as aesthetic:1,compress:0.05")
    if name in REWARDS:
        tiny_clip = (name, model) == ("clip", "tiny")
        fn = functools.partial(clip, source=TINY_CLIP) if tiny_clip else REWARDS[name]
    elif ".py:" in name:
        fn = load_function(*name.rsplit(":", 1))
    else:
        known = ", ".join(REWARDS)
        raise BadInput(f"unknown reward {name!r}: choose from {known}, or give path/to/file.py:function")
    try:
        scale = float(weight)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise BadInput(f"the weight {weight!r} of reward {name!r} is not a finite number: write {name}:0.5")
    return functools.partial(checked, part, fn, scale)


def checked(part, fn, scale, images, prompts):
    """scale x fn(images, prompts), (B,) float32 on the CPU. BadInput if it is not B finite real numbers."""
    try:
        with torch.no_grad(), torch.cuda.device_of(images):  # a new thread has gradients on, and GPU 0
            r = torch.as_tensor(fn(images, prompts)).detach()
            r = scale * r.float().cpu()  # float: integer rewards must not truncate advantages
    except BadInput:
        raise
    except Exception as e:
        raise BadInput(f"reward {part!r} raised {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
    B, shape, returned = len(prompts), tuple(r.shape), f"reward {part!r} returned"
    if shape != (B,):
        must = f"it must return one number each, shape ({B},)"
        raise BadInput(f"{returned} shape {shape} for {B} pictures: {must}")
    if not r.isfinite().all():
        i = int((~r.isfinite()).nonzero()[0])
        raise BadInput(f"{returned} {r[i].item()} for the prompt {prompts[i]!r}: it must be finite")
    return r


def load_function(path, name):
    """Function `name` of the Python file `path`, which is run to get it. Raises BadInput."""
    if not Path(path).is_file():
        raise BadInput(f"no reward file {path}: give path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise BadInput(f"the reward file {path} does not load: {reason}") from e
    if not callable(getattr(module, name, None)):
        raise BadInput(f"{path} has no function {name!r}")
    return getattr(module, name)


# ----------------------------------------------------------------------------------------------------- alarms
@torch.no_grad()
def picture_statistics(images):
    """Signs of reward hacking in the pictures themselves: {name: (B,) float32}. Watch how far they move.

    images (B, 3, H, W) in [0, 1]; Y = 0.299 R + 0.587 G + 0.114 B is the luma of a pixel.
    blank    1 if fewer than 2 % of the pixels differ by > 0.15 in a channel from the median colour, else 0
    dark     share of the pixels with Y < 0.1
    edges    mean over i, j of |grad Y|, the root of (Y[i+1, j] - Y[i, j])^2 + (Y[i, j+1] - Y[i, j])^2
    colours  entropy, - sum_k p_k log2 p_k, of the histogram of 64 colours, 4 levels a channel: 0 to 6 bits
    """
    x = images.float()
    page = x.flatten(2).median(2).values[:, :, None, None]  # (B, 3, 1, 1)
    drawn = ((x - page).abs().amax(1) > 0.15).float().mean((1, 2))  # (B,)
    Y = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]  # (B, H, W)
    down, right = Y[:, 1:, :-1] - Y[:, :-1, :-1], Y[:, :-1, 1:] - Y[:, :-1, :-1]  # (B, H-1, W-1)
    r, g, b = (4 * x).long().clamp(0, 3).unbind(1)  # (B, H, W)
    colour = (16 * r + 4 * g + b).flatten(1)  # (B, HW), 0 to 63
    p = torch.stack([c.bincount(minlength=64) for c in colour]) / colour.shape[1]  # (B, 64)
    return {
        "blank": (drawn < 0.02).float(),
        "dark": (Y < 0.1).float().mean((1, 2)),
        "edges": (down**2 + right**2).sqrt().mean((1, 2)),
        "colours": torch.special.entr(p).sum(1) / math.log(2),
    }


LOOKS = "blank", "dark", "edges", "colours"


def judge(reward, images, prompts):
    """The parts of a reward from get_reward, then picture_statistics: (B, parts + 4) float32 on the CPU."""
    looks = torch.stack([*picture_statistics(images).values()]).cpu()
    return torch.cat([reward.terms(images, prompts), looks]).T


def moved_far(now, then):
    """What has moved far between two epochs, in words, or "". Two dicts of LOOKS and diversity."""
    far = [
        ("blank", now["blank"] > then["blank"] + 0.05),
        ("dark", abs(now["dark"] - then["dark"]) > 0.2),
        ("edges", not 0.55 < now["edges"] / (then["edges"] + 1e-6) < 1.8),
        ("colours", now["colours"] < 0.5 * then["colours"]),
        ("diversity", now["diversity"] < 0.45 * then["diversity"]),
    ]
    return ", ".join(f"{name} {then[name]:.3f} -> {now[name]:.3f}" for name, moved in far if moved)


@torch.no_grad()
def diversity(images, prompts):
    """Mean distance of two pictures of the same prompt, a float: 0 when they are one picture.

    Mean over pairs with equal prompts of the root of mean((x_i - x_j)^2); nan without one.
    images (B, 3, H, W) in [0, 1]; pictures reduced to 32 x 32 will do.
    """
    number = torch.tensor([prompts.index(p) for p in prompts])  # (B,)
    i, j = torch.triu_indices(len(prompts), len(prompts), 1)  # the pairs, in the order of pdist
    distance = torch.pdist(images.flatten(1).float()) / images[0].numel() ** 0.5
    return distance.cpu()[number[i] == number[j]].mean().item()


# ---------------------------------------------------------------------------------------------------- prompts
ANIMALS = (  # the 45 common animals of the DDPO paper, appendix
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf "
    "lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck "
    "goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"
).split()
OTHER_ANIMALS = (  # held out: none of the 45, all known to the embedded model
    "badger beaver bison crab crocodile eagle elephant flamingo giraffe hippopotamus jellyfish koala leopard "
    "lobster octopus otter owl panda parrot peacock penguin rhinoceros snail swan"
).split()
# ImageNet-1k's animal classes, 0 to 397, the first name of each. The lists in DDPO's and RLCM's code have all
# the synonyms of a class in its prompt: "tench, Tinca tinca".
IMAGENET_ANIMALS = (
    "tench, goldfish, great white shark, tiger shark, hammerhead, electric ray, stingray, cock, hen, "
    "ostrich, brambling, goldfinch, house finch, junco, indigo bunting, robin, bulbul, jay, magpie, "
    "chickadee, water ouzel, kite, bald eagle, vulture, great grey owl, European fire salamander, common "
    "newt, eft, spotted salamander, axolotl, bullfrog, tree frog, tailed frog, loggerhead, leatherback "
    "turtle, mud turtle, terrapin, box turtle, banded gecko, common iguana, American chameleon, whiptail, "
    "agama, frilled lizard, alligator lizard, Gila monster, green lizard, African chameleon, Komodo dragon, "
    "African crocodile, American alligator, triceratops, thunder snake, ringneck snake, hognose snake, green "
    "snake, king snake, garter snake, water snake, vine snake, night snake, boa constrictor, rock python, "
    "Indian cobra, green mamba, sea snake, horned viper, diamondback, sidewinder, trilobite, harvestman, "
    "scorpion, black and gold garden spider, barn spider, garden spider, black widow, tarantula, wolf "
    "spider, tick, centipede, black grouse, ptarmigan, ruffed grouse, prairie chicken, peacock, quail, "
    "partridge, African grey, macaw, sulphur-crested cockatoo, lorikeet, coucal, bee eater, hornbill, "
    "hummingbird, jacamar, toucan, drake, red-breasted merganser, goose, black swan, tusker, echidna, "
    "platypus, wallaby, koala, wombat, jellyfish, sea anemone, brain coral, flatworm, nematode, conch, "
    "snail, slug, sea slug, chiton, chambered nautilus, Dungeness crab, rock crab, fiddler crab, king crab, "
    "American lobster, spiny lobster, crayfish, hermit crab, isopod, white stork, black stork, spoonbill, "
    "flamingo, little blue heron, American egret, bittern, crane, limpkin, European gallinule, American "
    "coot, bustard, ruddy turnstone, red-backed sandpiper, redshank, dowitcher, oystercatcher, pelican, king "
    "penguin, albatross, grey whale, killer whale, dugong, sea lion, Chihuahua, Japanese spaniel, Maltese "
    "dog, Pekinese, Shih-Tzu, Blenheim spaniel, papillon, toy terrier, Rhodesian ridgeback, Afghan hound, "
    "basset, beagle, bloodhound, bluetick, black-and-tan coonhound, Walker hound, English foxhound, redbone, "
    "borzoi, Irish wolfhound, Italian greyhound, whippet, Ibizan hound, Norwegian elkhound, otterhound, "
    "Saluki, Scottish deerhound, Weimaraner, Staffordshire bullterrier, American Staffordshire terrier, "
    "Bedlington terrier, Border terrier, Kerry blue terrier, Irish terrier, Norfolk terrier, Norwich "
    "terrier, Yorkshire terrier, wire-haired fox terrier, Lakeland terrier, Sealyham terrier, Airedale, "
    "cairn, Australian terrier, Dandie Dinmont, Boston bull, miniature schnauzer, giant schnauzer, standard "
    "schnauzer, Scotch terrier, Tibetan terrier, silky terrier, soft-coated wheaten terrier, West Highland "
    "white terrier, Lhasa, flat-coated retriever, curly-coated retriever, golden retriever, Labrador "
    "retriever, Chesapeake Bay retriever, German short-haired pointer, vizsla, English setter, Irish setter, "
    "Gordon setter, Brittany spaniel, clumber, English springer, Welsh springer spaniel, cocker spaniel, "
    "Sussex spaniel, Irish water spaniel, kuvasz, schipperke, groenendael, malinois, briard, kelpie, "
    "komondor, Old English sheepdog, Shetland sheepdog, collie, Border collie, Bouvier des Flandres, "
    "Rottweiler, German shepherd, Doberman, miniature pinscher, Greater Swiss Mountain dog, Bernese mountain "
    "dog, Appenzeller, EntleBucher, boxer, bull mastiff, Tibetan mastiff, French bulldog, Great Dane, Saint "
    "Bernard, Eskimo dog, malamute, Siberian husky, dalmatian, affenpinscher, basenji, pug, Leonberg, "
    "Newfoundland, Great Pyrenees, Samoyed, Pomeranian, chow, keeshond, Brabancon griffon, Pembroke, "
    "Cardigan, toy poodle, miniature poodle, standard poodle, Mexican hairless, timber wolf, white wolf, red "
    "wolf, coyote, dingo, dhole, African hunting dog, hyena, red fox, kit fox, Arctic fox, grey fox, tabby, "
    "tiger cat, Persian cat, Siamese cat, Egyptian cat, cougar, lynx, leopard, snow leopard, jaguar, lion, "
    "tiger, cheetah, brown bear, American black bear, ice bear, sloth bear, mongoose, meerkat, tiger beetle, "
    "ladybug, ground beetle, long-horned beetle, leaf beetle, dung beetle, rhinoceros beetle, weevil, fly, "
    "bee, ant, grasshopper, cricket, walking stick, cockroach, mantis, cicada, leafhopper, lacewing, "
    "dragonfly, damselfly, admiral, ringlet, monarch, cabbage butterfly, sulphur butterfly, lycaenid, "
    "starfish, sea urchin, sea cucumber, wood rabbit, hare, Angora, hamster, porcupine, fox squirrel, "
    "marmot, beaver, guinea pig, sorrel, zebra, hog, wild boar, warthog, hippopotamus, ox, water buffalo, "
    "bison, ram, bighorn, ibex, hartebeest, impala, gazelle, Arabian camel, llama, weasel, mink, polecat, "
    "black-footed ferret, otter, skunk, badger, armadillo, three-toed sloth, orangutan, gorilla, chimpanzee, "
    "gibbon, siamang, guenon, patas, baboon, macaque, langur, colobus, proboscis monkey, marmoset, capuchin, "
    "howler monkey, titi, spider monkey, squirrel monkey, Madagascar cat, indri, Indian elephant, African "
    "elephant, lesser panda, giant panda, barracouta, eel, coho, rock beauty, anemone fish, sturgeon, gar, "
    "lionfish, puffer"
).split(", ")
# RLCM's appendix and both official codes; DDPO, section 6.2, writes "washing dishes".
ACTIVITIES = "riding a bike", "playing chess", "washing the dishes"
PROMPTS = {
    "animals": ANIMALS,
    "other-animals": OTHER_ANIMALS,
    "imagenet-animals": IMAGENET_ANIMALS,
    "animals-activities": [
        f"{'an' if animal[0] in 'aeiou' else 'a'} {animal} {activity}"
        for animal in ANIMALS
        for activity in ACTIVITIES
    ],
}


def get_prompts(name):
    """List of prompts: a set of that name, the non-empty lines of a text file, or the words themselves.

    Words are a prompt if there are two or more, no file has that name, and they do not end in .txt.
    Raises BadInput.
    """
    if name in PROMPTS:
        return list(PROMPTS[name])
    if len(name.split()) > 1 and not os.path.exists(name) and not name.endswith(".txt"):
        return [name.strip()]
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(
            f"no prompt set and no readable text file {name!r} ({type(e).__name__}): "
            f"choose from {', '.join(PROMPTS)}, give a file with one prompt a line, "
            "or a prompt of two words or more"
        ) from e
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"the prompt file {name} is empty: write one prompt a line")
    return prompts
