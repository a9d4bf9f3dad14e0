"""A reward that reads: does the image show the words that the prompt has in quotation marks?

    pip install rapidocr onnxruntime               # its weights are in the package: no hub, no GPU
    python rlcm.py --reward examples/ocr_reward.py:ocr --prompts signs.txt --model YOUR_MODEL

A line of signs.txt: a shop sign that says "OPEN". The reward is 1 if exactly that is read, and 0 if nothing
is. The embedded model cannot write: take one that can.
"""
import functools
import re
from difflib import SequenceMatcher

import torch

from rewards import to_pil


@functools.cache
def reader():
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "critical"})


def letters(text):
    return "".join(c for c in text.lower() if c.isalnum())


def similarity(prompt, text):
    """2 x letters in common / (letters wanted + letters read): 0 to 1. Without quotation marks: all words."""
    quoted = re.findall('["“](.+?)["”]', prompt)
    wanted = letters(" ".join(quoted) or prompt)
    read = letters(text)
    return SequenceMatcher(None, wanted, read, autojunk=False).ratio() if read else 0.0


def ocr(images, prompts):
    """How well each image shows the words of its prompt, 0 to 1."""
    texts = [" ".join(reader()(image).txts or ()) for image in to_pil(images)]
    return torch.tensor([similarity(prompt, text) for prompt, text in zip(prompts, texts)])
