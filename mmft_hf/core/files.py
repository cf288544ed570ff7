"""Names of the files in a run folder or a model, and atomic writing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

# The files that a fine-tuning run writes into its folder, apart from the model and its checkpoints.
RUN_FILE = "mmft.json"
RESULTS_FILE = "all_results.json"
STATE_FILE = "trainer_state.json"
PREDICTIONS_FILE = "predictions_test.parquet"
HEAD_FILE = "head.safetensors"
PROTOTYPES_FILE = "prototypes.safetensors"  # the head's file in version 0.1
CARD_FILE = "README.md"
SHEET_FILE, CONFUSION_FILE, CURVES_FILE = "predictions_test.png", "confusion.png", "curves.png"
RUN_FILES = {RUN_FILE, RESULTS_FILE, STATE_FILE, PREDICTIONS_FILE, HEAD_FILE, PROTOTYPES_FILE, CARD_FILE}
RUN_FILES |= {SHEET_FILE, CONFUSION_FILE, CURVES_FILE}
ADAPTER_FOLDER, ADAPTER_FILES = "adapter", ("adapter_config.json", "adapter_model.safetensors")

# The files that a captioning run writes into its folder, apart from the data and the card.
DETAILS_FILE, PAGE_FILE, PICTURE_FILE = "captions.json", "captions.html", "captions.png"

# The files from which a model and its processor are loaded, apart from the weights.
MODEL_FILES = frozenset(
    "config.json preprocessor_config.json processor_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model tokenizer.model".split()
)
WEIGHTS_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|mmft\.json\.tmp|captions\.json\.new")  # the last two: version 0.1


def is_weights(name: str) -> bool:
    """Whether a file holds a model's weights, or is the index of several such files."""
    return _WEIGHTS.fullmatch(name) is not None


def belongs_to_run(name: str) -> bool:
    """Whether a file of a run folder is one of the run's own: results, head, model or processor."""
    return name in RUN_FILES | MODEL_FILES or is_weights(name)


def is_temporary(name: str) -> bool:
    """Whether a file was left behind by a process that was killed while writing."""
    return _TEMPORARY.fullmatch(name) is not None


def is_ours(folder: str | os.PathLike) -> bool:
    """Whether a folder holds what a verb wrote: a fine-tuning run or one of its checkpoints, captions, or a benchmark.

    What is in it and below is never data of a folder that contains it, even if it holds pictures and tables. A folder that
    is given as data itself is another matter: captions are read from such a folder.
    """
    folder = Path(os.path.abspath(folder))

    def has(*names: str) -> bool:
        return all(os.path.exists(folder / name) for name in names)

    return (
        has(RUN_FILE)
        or (re.fullmatch(r"checkpoint-\d+", folder.name) is not None and has(STATE_FILE))
        or has(DETAILS_FILE, PAGE_FILE)
        or next(folder.glob("journal/journal-*.sqlite"), None) is not None  # captions that are being written
        or has("results.jsonl", "claims")
        or has("results.jsonl", "report.html")
    )


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and moves what was written there into place at the end.

    Readers never see a partial file. If several processes write the same file, the last one wins. If the block raises,
    `path` keeps its content. Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: str | os.PathLike, content, indent: int | None = 2, **options) -> None:
    """Writes a JSON file atomically. `options` go to `json.dumps`."""
    text = json.dumps(content, indent=indent, **options)
    with atomic_write(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: str | os.PathLike):
    """The content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
