"""A reward that reads: does the picture show the words that the prompt has in quotation marks?

    pip install rapidocr onnxruntime            # its weights are in the package: no hub, no GPU
    python examples/ocr_reward.py                  # scores of right, wrong and blank pictures
    python rlcm.py --reward examples/ocr_reward.py:ocr --prompts signs.txt --model YOUR_MODEL

A line of signs.txt: a shop sign that says "OPEN". The score is 1 where just that is read, 0 where nothing is.
The embedded model cannot write: take one that can.
"""

import argparse
import functools
import re
from difflib import SequenceMatcher

import torch
from PIL import Image, ImageDraw, ImageFont


@functools.cache
def reader():
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "critical"})


def letters(text):
    return "".join(c for c in text.lower() if c.isalnum())


def similarity(prompt, text):
    """2 x letters in common / (letters wanted + letters read): 0 to 1. Without quotation marks: all words."""
    wanted = letters(" ".join(re.findall('["“](.+?)["”]', prompt)) or prompt)
    return SequenceMatcher(None, wanted, letters(text), autojunk=False).ratio() if letters(text) else 0.0


def ocr(images, prompts):
    """How well each picture shows the words of its prompt, 0 to 1."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    texts = [" ".join(reader()(picture[..., ::-1]).txts or ()) for picture in pixels]  # BGR, as OpenCV has it
    return torch.tensor([similarity(prompt, text) for prompt, text in zip(prompts, texts)])


def rendered(text, size=128, ink="black", paper="white"):
    """(1, 3, size, size) float in [0, 1]"""
    picture, font = Image.new("RGB", (size, size), paper), ImageFont.load_default(size // 5)
    ImageDraw.Draw(picture).text((size / 2, size / 2), text, ink, font, anchor="mm", align="center")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, size, size, 3).permute(0, 3, 1, 2) / 255


def main():
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    prompt = 'a shop sign that says "OPEN"'
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    print(f"score  picture, for the prompt: {prompt}")
    for picture, name in (
        (rendered("OPEN"), "OPEN"),
        (rendered("OPEN", size=64), "OPEN, 64 pixels wide"),
        (rendered("open", ink="yellow", paper="darkred"), "open, yellow on red"),
        (rendered("OPEM"), "OPEM"),
        (rendered("OPEN\nDAILY"), "OPEN DAILY, in two lines"),
        (rendered("CLOSED"), "CLOSED"),
        (rendered(""), "blank"),
        (noise, "noise"),
    ):
        print(f"{ocr(picture, [prompt]).item():5.2f}  {name}")


if __name__ == "__main__":
    main()
