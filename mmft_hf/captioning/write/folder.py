"""The folder of a captioning run: `data/*.parquet`, `captions.json`, a report, a card; and `journal/`, which stays.

A new data set takes the place of an old one file by file, the record last: whatever a kill leaves, the folder is known
as ours, and the same command mends it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

from datasets import Dataset, Image

from ...core.console import printable_text
from ...core.errors import UserError
from ...core.files import is_temporary, read_json, write_json
from ...version import __version__

RECORD_FILE, PAGE_FILE, PICTURE_FILE = "captions.json", "captions.html", "captions.png"
PARTIAL = ".partial"
SHARD_BYTES = 500 * 2**20


def _who(captioner: Mapping | None) -> str:
    """`openai gpt-4.1-mini`, `template`."""
    identity = (captioner or {}).get("identity", captioner or {})
    return " ".join(str(identity[key]) for key in ("backend", "model") if identity.get(key)) or "nobody"


def _changes(name: str, before, now) -> list[str]:
    """What differs, one setting each: `max_tokens 200 there, 400 here`."""
    if name == "captioner" and _who(before) != _who(now):
        before, now = _who(before), _who(now)
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [change for key in names for change in _changes(key, before.get(key), now.get(key))]
    shown = [json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value for value in (before, now)]
    there, here = (shorten(printable_text(text), 60, placeholder=" …") for text in shown)
    return [f"{name} {there} there, {here} here" if there != here else f"another {name}"]


class CaptionFolder:
    """An `output_dir` of captions.

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def record(self) -> dict:
        """`captions.json` of an earlier run; empty where there is none."""
        found = read_json(self.path / RECORD_FILE)
        known = isinstance(found, dict) and isinstance(found.get("files"), list)
        # Its files are removed when others take their place: none outside of the folder can be.
        return found if known and all(_inside(name) for name in found["files"]) else {}

    def claim(self, made_from: Mapping, overwrite: bool) -> None:
        """Makes sure that a data set may be written here.

        Args:
            made_from: what the data set is made from: its name, the captioner with its prompts. A folder with other
                entries is another's.

        Raises:
            UserError: the folder holds another captioned data set, or files that are not ours.
        """
        record = self.record()
        if not record:
            journal = self.path / "journal"  # with a lock alone where a run was killed at once
            ours = {PARTIAL}
            if journal.is_dir() and all(p.name.startswith(("journal-", "rank-")) for p in journal.iterdir()):
                ours.add("journal")
            if self.path.is_dir() and any(p.name not in ours and not is_temporary(p.name) for p in self.path.iterdir()):
                raise UserError(
                    f"--output_dir {self.path}: expected an empty or new folder, found files that mmft-hf did not write. "
                    "Type another --output_dir."
                )
            return
        before = record.get("made_from", {})
        different = [name for name in made_from if json.dumps(before.get(name)) != json.dumps(made_from[name])]
        if different and not overwrite:
            now = json.loads(json.dumps(made_from))
            found = [change for name in different for change in _changes(name, before.get(name), now[name])]
            raise UserError(
                f"--output_dir {self.path}: expected the settings of the captions there, found others: {'; '.join(found)}. "
                "Type another --output_dir, or --overwrite_output_dir true to replace the data set (the journal stays, "
                "and nothing in it is asked twice)."
            )

    def is_current(self, fingerprints: Mapping[str, str]) -> bool:
        """Whether the data set here is the one with these fingerprints, whole."""
        record = self.record()
        files = [self.path / name for name in record.get("files", ())]
        return bool(files) and record.get("fingerprints") == fingerprints and all(file.exists() for file in files)

    def write(self, splits: Mapping[str, Dataset], record: Mapping, extras=None) -> dict:
        """Writes the splits as parquet files, with `record` in `captions.json`.

        Args:
            extras (*optional*): called with the new folder before it takes its place, to put a report and a card there.

        Returns:
            The record as it was written.
        """
        partial = self.path / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "data").mkdir(parents=True)
        for name, split in splits.items():
            _write_shards(split, partial / "data", name)
        if extras:
            extras(partial)
        files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
        record = {**record, "mmft_hf": __version__, "files": files}
        write_json(partial / RECORD_FILE, record, ensure_ascii=False)

        old = [name for name in self.record().get("files", ()) if name not in files]
        # Until the new files are all there, the record names the old and the new.
        between = {**record, "files": sorted({*old, *files}), "fingerprints": None, "complete": False}
        write_json(self.path / RECORD_FILE, between, ensure_ascii=False)
        (self.path / "data").mkdir(exist_ok=True)
        for name in old:
            (self.path / name).unlink(missing_ok=True)
        for name in files:
            (partial / name).replace(self.path / name)
        (partial / RECORD_FILE).replace(self.path / RECORD_FILE)
        shutil.rmtree(partial)
        return record


def _inside(name: object) -> bool:
    path = Path(name) if isinstance(name, str) else Path("..")
    return not path.is_absolute() and ".." not in path.parts


def _write_shards(dataset: Dataset, folder: Path, split: str) -> None:
    """`{split}-{i:05d}-of-{n:05d}.parquet`, each of about `SHARD_BYTES`, with few rows in memory at a time."""
    undecoded = dataset.cast_column("image", Image(decode=False))
    count = max(1, -(-undecoded.data.nbytes // SHARD_BYTES))
    for i in range(count):
        shard = undecoded.shard(count, i, contiguous=True).cast_column("image", Image())
        shard.to_parquet(folder / f"{split}-{i:05d}-of-{count:05d}.parquet", batch_size=100)
