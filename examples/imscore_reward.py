"""ImageReward, HPSv2, MPS and VQAScore as rewards, by the package imscore.

    pip install imscore
    python rlcm.py --reward examples/imscore_reward.py:hpsv2
    python rlcm.py --reward examples/imscore_reward.py:image_reward --model YOUR_MODEL --prompts mine.txt
    python examples/imscore_reward.py              # no hub: tiny/clip through imscore and through rewards.py

Their weights come from the Hugging Face hub at the first picture. HPSv2 and MPS fetch LAION's CLIP ViT-H/14
first, VQAScore flan-t5-xxl. clip_score, of tiny/clip, is the only one tried here with its own weights.
"""

import argparse
import functools
import importlib
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent


@functools.cache
def load(module, kind, source, device, dtype):
    import transformers  # of version 5, which lacks what imscore 0.0.11 asks of ImageReward's tokenizer

    transformers.BertTokenizer.additional_special_tokens_ids = property(lambda t: [t.vocab_size])
    kind = getattr(importlib.import_module(f"imscore.{module}.model"), kind)
    model = kind(source) if Path(source).is_dir() else kind.from_pretrained(source)
    return model.eval().requires_grad_(False).to(device, dtype)


@torch.no_grad()
def score(images, prompts, module, kind, source, dtype=torch.float32):
    """One picture at a time: VQAScore gives one number for a batch, and MPS looks at the batch's prompts."""
    model, images = load(module, kind, source, images.device, dtype), images.to(dtype)
    return torch.cat([model.score(image[None], [p]).flatten() for image, p in zip(images, prompts)])


def image_reward(images, prompts):
    return score(images, prompts, "imreward", "ImageReward", "RE-N-Y/ImageReward")


def hpsv2(images, prompts):
    return score(images, prompts, "hps", "HPSv2", "RE-N-Y/hpsv21")


def mps(images, prompts):
    return score(images, prompts, "mps", "MPS", "RE-N-Y/mpsv1")


def vqa_score(images, prompts):
    return score(images, prompts, "vqascore", "VQAScore", "RE-N-Y/clip-t5-xxl", torch.bfloat16)


def clip_score(images, prompts):
    return score(images, prompts, "preference", "CLIPScore", str(HERE / "tiny" / "clip"))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    sys.path.insert(0, str(HERE))
    import rewards
    from tiny import make_tiny

    images, labels = make_tiny.training_pictures()
    picked = [labels.index(name) for name in ("cat", "dog", "red apple", "owl")]
    images, labels = images[picked], [labels[i] for i in picked]
    for title, prompts in (("its own caption", labels), ("the next one's", labels[1:] + labels[:1])):
        a, b = clip_score(images, prompts), rewards.clip(images, prompts, rewards.TINY_CLIP)
        print(title)
        for prompt, x, y in zip(prompts, a, b):
            print(f"  {prompt:10s} imscore {x:6.2f}   rewards.py {y:5.2f}")


if __name__ == "__main__":
    main()
