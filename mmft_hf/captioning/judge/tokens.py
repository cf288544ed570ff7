"""Counting tokens as the text tower will: with its own tokenizer, but without loading torch where that can be had."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer

from ...core.builtin import builtin


class TokenCounter:
    """Counts tokens, begin and end tokens included.

    Args:
        tokenizer: of transformers, or of the tokenizers library.
        limit: tokens that the text tower reads; default: the tokenizer's own.
    """

    def __init__(self, tokenizer, limit: int | None = None):
        limit = limit or getattr(tokenizer, "model_max_length", None)
        self.limit = None if limit is None or limit > 1e9 else int(limit)  # transformers writes 1e30 for none
        fast = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        self._slow = tokenizer if fast is None else None
        if fast is not None:
            # A copy, since a tokenizer keeps the padding and truncation of whoever called it last.
            self._fast = Tokenizer.from_str(fast.to_str())
            self._fast.no_padding()
            self._fast.no_truncation()

    def count(self, text: str) -> int:
        """Tokens of one text, however many."""
        if self._slow is not None:
            return len(self._slow([text], verbose=False)["input_ids"][0])
        return len(self._fast.encode(text).ids)

    def digest(self) -> str:
        """16 hex digits of what the tokenizer does."""
        content = json.dumps(self._slow.get_vocab(), sort_keys=True) if self._slow is not None else self._fast.to_str()
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_counter(name_or_path: str) -> TokenCounter:
    """The counter of a dual encoder (Hub id, folder or `builtin/…`).

    Where transformers 5 saved the tokenizer, its file is the whole of it and is read alone. In older repositories
    transformers builds the tokenizer from other files, too: there it is asked, which takes torch and some seconds.

    Raises:
        UserError: not found.
    """
    try:
        config = json.loads(_file(name_or_path, "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("backend") == "tokenizers":
            model = json.loads(_file(name_or_path, "config.json").read_text(encoding="utf-8"))
            if model["model_type"] == "clip":  # the limits of others are not that simple: see encoders.token_limit
                limits = [model["text_config"]["max_position_embeddings"], config.get("model_max_length") or 10**30]
                return TokenCounter(Tokenizer.from_file(str(_file(name_or_path, "tokenizer.json"))), min(limits))
    except Exception:
        pass  # whatever it is, transformers knows more shapes of folders, and says what is wrong with this one
    from ...model.loading import load_tokenizer

    return TokenCounter(load_tokenizer(name_or_path))


def _file(name_or_path: str, file: str) -> Path:
    folder = Path(builtin(name_or_path))
    return folder / file if folder.is_dir() else Path(hf_hub_download(name_or_path, file))
