"""Requests to the tiny image-text-to-text model, and what is compared of its answers."""

import asyncio
import io

from PIL import Image

from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
from mmft_hf.captioning.types import Answer, Picture, Request, Sampling

GREEDY = Sampling(temperature=0)


LONG = "What shape does it have, and is its surface smooth? Write one sentence. " * 3


def picture(colour: str, width: int = 20, height: int = 30) -> Picture:
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return Picture(data.getvalue(), "image/png", width, height)


def request(colour: str = "red", prompt: str = "Describe it.", max_tokens: int = 12, seed: int = 0) -> Request:
    return Request((picture(colour),), prompt, max_tokens, ("visual",), seed)


def ask(backend: TransformersBackend, requests: list[Request]) -> list:
    return asyncio.run(backend.generate(requests))


# Lengths in no order. The first ends by itself after two words.
MIXED = [
    request("red", "Describe it.", 30),
    request("blue", LONG, 25),
    request("blue", "Describe", 40),
    request("lime", LONG + LONG, 7),
    request("red", "Colour?", 40),
    request("white", "A", 1),
]


def seen(answer: Answer) -> tuple:
    return answer.text, answer.tokens_in, answer.tokens_out, answer.finish_reason
