"""Counts tokens with the text tower's own tokenizer, without loading torch where possible."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer

from ...core.builtin import builtin
from ...data.texts import beginning


class TokenCounter:
    """Counts tokens, begin and end tokens included.

    Args:
        tokenizer: from transformers or from the tokenizers library.
        limit: number of tokens that the text tower reads. Default: the tokenizer's own limit.
    """

    def __init__(self, tokenizer, limit: int | None = None):
        limit = limit or getattr(tokenizer, "model_max_length", None)
        self.limit = None if limit is None or limit > 1e9 else int(limit)  # transformers writes 1e30 for no limit
        fast = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        self._slow = tokenizer if fast is None else None
        if fast is not None:
            # A copy, because a tokenizer keeps the padding and truncation of its last call.
            self._fast = Tokenizer.from_str(fast.to_str())
            self._fast.no_padding()
            self._fast.no_truncation()

    def count(self, text: str) -> int:
        """Number of tokens of one text, without truncation."""
        if self._slow is not None:
            return len(self._slow([text], verbose=False)["input_ids"][0])
        return len(self._fast.encode(text).ids)

    def exceeds(self, text: str) -> bool:
        """Whether a text has more tokens than the text tower reads."""
        return self.limit is not None and self.count(beginning(text, self.limit, self.count)) > self.limit

    def digest(self) -> str:
        """Sixteen hex digits that identify what the tokenizer does."""
        content = json.dumps(self._slow.get_vocab(), sort_keys=True) if self._slow is not None else self._fast.to_str()
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_counter(name_or_path: str) -> TokenCounter:
    """Returns the token counter of a dual encoder (Hub id, folder or `builtin/…`).

    If transformers 5 saved the tokenizer, `tokenizer.json` describes it completely and is the only file read. Older
    repositories spread the tokenizer over several files, so transformers loads it, which imports torch and takes seconds.

    Raises:
        UserError: the model was not found.
    """
    try:
        config = json.loads(_file(name_or_path, "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("backend") == "tokenizers":
            model = json.loads(_file(name_or_path, "config.json").read_text(encoding="utf-8"))
            if model["model_type"] == "clip":  # other families have more complex limits
                limits = [model["text_config"]["max_position_embeddings"], config.get("model_max_length") or 10**30]
                return TokenCounter(Tokenizer.from_file(str(_file(name_or_path, "tokenizer.json"))), min(limits))
    except Exception:
        pass  # transformers reads more layouts, and explains what is wrong with this one
    from ...model.loading import load_tokenizer

    return TokenCounter(load_tokenizer(name_or_path))


def _file(name_or_path: str, file: str) -> Path:
    folder = Path(builtin(name_or_path))
    return folder / file if folder.is_dir() else Path(hf_hub_download(name_or_path, file))
