"""Rewards and prompt sets for rlcm.py.

A reward is any function

    fn(images, prompts) -> (B,) float tensor, higher is better
        images   (B, 3, H, W) float32 in [0, 1], on the training device
        prompts  list of B strings

Name one with `--reward`: a key of REWARDS below, or `path/to/file.py:function` for your own.
It is called with one micro-batch of pictures at a time, on a GPU from a worker thread while the next one is being sampled.
Heavy imports belong inside the function that needs them.
"""
import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what to do about it."""


# ------------------------------------------------------------------------------------------------------------- rewards
def jpeg_kilobytes(images, quality=95):
    """Size of each picture as a JPEG file, in kilobytes of 1000 bytes (as DDPO, arXiv 2305.13301).

    images (B, 3, H, W) float in [0, 1] -> (B,) float32. Pillow releases the GIL while it encodes, so threads help.
    """
    def kilobytes(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        return buffer.tell() / 1000

    pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    with ThreadPoolExecutor(4) as pool:
        return torch.tensor(list(pool.map(kilobytes, pixels)))


def compress(images, prompts):
    """minus the JPEG size in kB: pictures that compress well"""
    return -jpeg_kilobytes(images)


def incompress(images, prompts):
    """the JPEG size in kB: pictures full of detail"""
    return jpeg_kilobytes(images)


REWARDS = {"compress": compress, "incompress": incompress}
HELP = "; ".join(f"{name}: {fn.__doc__.strip().splitlines()[0]}" for name, fn in REWARDS.items()) + "; or path/to/file.py:function"


def get_reward(name):
    """Reward function of that name, checked on every call: shape (B,), real numbers, finite. Raises BadInput."""
    if name in REWARDS:
        fn = REWARDS[name]
    elif ":" in name and name.rpartition(":")[0].endswith(".py"):
        fn = load_function(*name.rsplit(":", 1))
    else:
        raise BadInput(f"unknown reward {name!r}: choose from {', '.join(REWARDS)}, or give path/to/file.py:function")

    def checked(images, prompts):
        try:
            r = torch.as_tensor(fn(images, prompts)).detach().float().cpu()  # float: integer rewards must not truncate advantages
        except Exception as e:
            raise BadInput(f"reward {name!r} raised {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
        if tuple(r.shape) != (len(prompts),):
            raise BadInput(f"reward {name!r} returned shape {tuple(r.shape)} for {len(prompts)} pictures: it must return one number each, shape ({len(prompts)},)")
        if not r.isfinite().all():
            i = int((~r.isfinite()).nonzero()[0])
            raise BadInput(f"reward {name!r} returned {r[i].item()} for the prompt {prompts[i]!r}: it must be finite")
        return r

    return checked


def load_function(path, name):
    """Function `name` of the Python file `path`, which is run to get it. Raises BadInput."""
    if not Path(path).is_file():
        raise BadInput(f"no reward file {path}: give path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise BadInput(f"the reward file {path} does not load: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
    if not callable(getattr(module, name, None)):
        raise BadInput(f"{path} has no function {name!r}")
    return getattr(module, name)


# ------------------------------------------------------------------------------------------------------------- prompts
ANIMALS = (  # the 45 common animals of the DDPO paper, appendix
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly fish "
    "shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"
).split()
PROMPTS = {"animals": ANIMALS}


def get_prompts(name):
    """List of prompts: a set of that name, or the non-empty lines of a text file. Raises BadInput."""
    if name in PROMPTS:
        return list(PROMPTS[name])
    try:
        prompts = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"no prompt set and no readable text file {name!r} ({type(e).__name__}): choose from {', '.join(PROMPTS)}, or give a file with one prompt a line") from e
    if not prompts:
        raise BadInput(f"the prompt file {name} is empty: write one prompt a line")
    return prompts
