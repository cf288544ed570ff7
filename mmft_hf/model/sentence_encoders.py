"""What the files of sentence-transformers next to a text tower say about it: its pooling, and how many tokens it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypedDict

from ..core.reading import parse_json
from ..core.records import Count
from ..core.repositories import read_text_file

# Their names of the kinds of pooling; the old files have one field of true or false for each, `pooling_mode_…`. That of the
# square root is the mean times a number, which a projection to unit norm takes away.
POOLINGS = {
    "cls": "first",
    "cls_token": "first",
    "lasttoken": "last",
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",
}


class _Module(TypedDict):
    """An entry of `modules.json`."""

    path: str
    type: str


class _Limit(TypedDict, total=False):
    """`sentence_bert_config.json`."""

    max_seq_length: Count | None


@dataclass(frozen=True)
class SentenceEncoder:
    """A text tower that sentence-transformers saved.

    Args:
        pooling: one of `families.POOLINGS`; None: a kind that is not among them, or none was found.
        theirs: the name that sentence-transformers has for its pooling; empty: none was found.
        max_tokens: of a text; None: as the tokenizer says.
        others: its further layers, which are no part of the tower, apart from normalization.
    """

    pooling: str | None
    theirs: str
    max_tokens: int | None
    others: tuple[str, ...]


def read_sentence_encoder(name: str, revision: str | None = None, offline: bool = False) -> SentenceEncoder | None:
    """Reads `modules.json` of a folder or Hub id, and the files it names; None if it is no folder of sentence-transformers.

    Raises:
        UserError: one of the files is damaged.
    """

    def read(file: str, schema):
        text = read_text_file(name, file, revision, "model", offline)
        return None if text is None else parse_json(text, f"{name}, {file}", schema)

    modules = read("modules.json", list[_Module])
    if modules is None:
        return None
    kinds = {module["type"].rsplit(".", 1)[-1]: PurePosixPath(module["path"]).name for module in modules}
    settings = (read(f"{kinds['Pooling']}/config.json", dict) if kinds.get("Pooling") else None) or {}
    modes = [str(key).removeprefix("pooling_mode_") for key, value in settings.items() if value is True]
    if isinstance(settings.get("pooling_mode"), str):
        modes = [settings["pooling_mode"]]
    modes = [mode for mode in modes if mode != "include_prompt"]
    limit = read("sentence_bert_config.json", _Limit) or {}
    others = tuple(kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize"))
    pooling = POOLINGS.get(modes[0]) if len(modes) == 1 else None  # several are concatenated
    return SentenceEncoder(pooling, " and ".join(modes), limit.get("max_seq_length") or None, others)
