"""A caption encoder without a model: hashed bags of words. It has the contract of `CaptionEncoder` as far as an `AdaptedCLIP` needs it."""

import hashlib
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F


class HashedWords:
    """Unit-norm sums of random vectors, one for each word.

    Args:
        size: of the vectors.
        seed: of the random vectors; another one is another encoder.
    """

    parameters_count = 1_500_000
    max_length = 512

    def __init__(self, size: int = 256, seed: int = 0):
        self.size, self.seed = size, seed
        self.encoded: list[str] = []  # all texts, in the order of the calls

    def encode(self, texts, batch_size: int = 32) -> torch.Tensor:
        self.encoded += texts
        rows = [
            torch.stack([self._word(word) for word in ["", *re.findall(r"\w+", text.lower())]]).sum(0) for text in texts
        ]
        return F.normalize(torch.stack(rows), dim=-1)

    def encode_batch(self, texts) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode(texts), torch.zeros(len(texts), dtype=torch.bool)

    def _word(self, word: str) -> torch.Tensor:
        number = int.from_bytes(hashlib.sha256(f"{self.seed} {word}".encode()).digest()[:7], "big")
        return torch.randn(self.size, generator=torch.Generator().manual_seed(number))

    def identity(self) -> dict:
        return {"base": "hashed-words", "seed": self.seed, "size": self.size, "versions": ["of today"]}

    def save_pretrained(self, folder) -> None:
        (Path(folder) / "caption_encoder.json").write_text(json.dumps(self.identity()))
