"""The output folder of a captioning run: `data/*.parquet`, `captions.json`, the report, the card, and the `journal/`.

A new dataset replaces an old one file by file, `captions.json` last. After a kill the folder is still recognized as ours,
and the same command repairs it. The journal always stays.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image

from ...core.console import printable_text, some
from ...core.errors import UserError
from ...core.files import (
    CARD_FILE,
    COMPARED_PAGE,
    DETAILS_FILE,
    PAGE_FILE,
    PICTURE_FILE,
    REFINED_PAGE,
    STEPS_FILE,
    is_temporary,
    write_json,
)
from ...core.reading import read_json
from ...core.records import CaptionFolderRecord
from ...core.schema import shown
from ...core.seals import digest_of, note_if_changed, sealed
from ...version import __version__

logger = logging.getLogger(__name__)
PARTIAL = ".partial"
SHARD_BYTES = 500 * 2**20


def _who(captioner: Mapping | None) -> str:
    """`openai gpt-4.1-mini`, `template`."""
    identity = (captioner or {}).get("identity", captioner or {})
    return " ".join(str(identity[key]) for key in ("backend", "model") if identity.get(key)) or "nobody"


def _changes(name: str, before, now) -> list[str]:
    """The settings that differ: `max_tokens 200 there, 400 here`."""
    if name == "captioner" and _who(before) != _who(now):
        before, now = _who(before), _who(now)
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [change for key in names for change in _changes(key, before.get(key), now.get(key))]
    shown = [json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value for value in (before, now)]
    there, here = (shorten(printable_text(text), 60, placeholder=" …") for text in shown)
    return [f"{name} {there} there, {here} here" if there != here else f"another {name}"]


class CaptionFolder:
    """An `output_dir` of captions, which need not exist yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def details(self) -> dict:
        """The content of `captions.json`; empty if there is none.

        Raises:
            UserError: it is damaged, or names files outside the folder.
        """
        path, remedy = self.path / DETAILS_FILE, "Restore the file, or type another --output_dir."
        try:
            found = read_json(path, CaptionFolderRecord, remedy)
        except FileNotFoundError:
            return {}
        # A new dataset removes the files of the old one, so none of them may be outside the folder.
        if outside := [name for name in found["files"] if not _inside(name)]:
            raise UserError(f"{path}, field files: expected files of this folder, found {shown(outside)}. {remedy}")
        return found

    def claim(self, made_from: Mapping, overwrite: bool, pictures: Callable[[], set[str]] | None = None) -> None:
        """Makes sure that a dataset may be written here.

        Args:
            made_from: what the dataset is made from: its name, the captioner, the prompts. A folder with other entries
                holds another dataset.
            overwrite: allow another dataset to be replaced.
            pictures (*optional*): sha256 of the dataset's pictures. If all pictures of the folder are among them, another
                name of the dataset does not make it another dataset: its folder was moved or renamed.

        Raises:
            UserError: the folder holds another captioned dataset, or files that are not ours.
        """
        details = self.details()
        if not details:
            self._claim_unknown(overwrite, pictures)
            return
        note_if_changed(details, self.path / DETAILS_FILE)
        for name in details.get("journals", ()):
            if not (self.path / "journal" / name).is_file():
                logger.warning("Note: %s is missing. What it held is asked for again.", self.path / "journal" / name)
        before = details.get("made_from", {})
        names = dict.fromkeys([*made_from, *(["refined"] if "refined" in before else [])])
        different = [name for name in names if json.dumps(before.get(name)) != json.dumps(made_from.get(name))]
        if different == ["dataset_name"] and pictures:
            there = self._pictures(details)
            if there and there <= pictures():
                return
        if different and not overwrite:
            now = json.loads(json.dumps(made_from))
            found = [change for name in different for change in _changes(name, before.get(name), now.get(name))]
            raise UserError(
                f"--output_dir {self.path}: expected the settings of the captions there, found others: {'; '.join(found)}. "
                "Type another --output_dir, or --overwrite_output_dir true to replace the dataset (the journal stays, "
                "and nothing in it is asked for again)."
            )

    def _claim_unknown(self, overwrite: bool, pictures: Callable[[], set[str]] | None) -> None:
        """`claim` for a folder without `captions.json`: nothing is written there yet, or only the journal, or the file was lost.

        A dataset whose record was lost is written again from its journal if the command is about its pictures.
        """
        journal = self.path / "journal"  # holds only a lock if a run was killed at once
        ours = {PARTIAL}
        if journal.is_dir() and all(p.name.startswith(("journal-", "rank-")) for p in journal.iterdir()):
            ours.add("journal")
        names = {p.name for p in self.path.iterdir() if not is_temporary(p.name)} if self.path.is_dir() else set()
        if names <= ours:
            return
        lost = self.lost_details()
        pages = {PAGE_FILE, PICTURE_FILE, REFINED_PAGE, COMPARED_PAGE, CARD_FILE, STEPS_FILE}
        if not lost or not names <= ours | {"data"} | pages:
            raise UserError(
                f"--output_dir {self.path}: expected an empty or new folder, found files that mmft-hf did not write. "
                "Type another --output_dir."
            )
        answers = "journal" in ours and any(journal.glob("journal-*.sqlite"))
        if not overwrite and not (answers and pictures and self._pictures({}) <= pictures()):
            raise UserError(
                f"--output_dir {self.path}: expected {DETAILS_FILE}, which tells what the captions there were made from, found none. "
                "Restore the file, type another --output_dir, or --overwrite_output_dir true to replace the dataset (a journal "
                "stays, and nothing in it is asked for again)."
            )
        logger.warning("Note: %s lacks %s: the dataset is written again.", self.path, DETAILS_FILE)

    def lost_details(self) -> str | None:
        """A sentence on a captioned dataset whose `captions.json` is gone, and what to type; None if there is none."""
        if (self.path / DETAILS_FILE).exists():
            return None
        answers = any(self.path.glob("journal/journal-*.sqlite"))
        if not (self.path / PAGE_FILE).is_file() and not (answers and self._data_files({})):
            return None
        return (
            f"{self.path} lacks {DETAILS_FILE}, which tells what its captions were made from. Type the command of the run again, "
            "which writes the file again" + (" and asks for nothing that is in the journal." if answers else ".")
        )

    def _data_files(self, details: Mapping) -> list[str]:
        """The names of the files of the dataset that is there. Those that nothing tells of are known by their names."""
        if "files" in details:
            return details["files"]
        found = sorted((self.path / "data").glob("*.parquet"))
        return [f"data/{path.name}" for path in found if re.fullmatch(r".+-\d{5}-of-\d{5}\.parquet", path.name)]

    def _pictures(self, details: Mapping) -> set[str]:
        """sha256 of the pictures of the dataset that is there; empty if its files cannot be read."""
        found: set[str] = set()
        files = [self.path / name for name in self._data_files(details) if name.endswith(".parquet")]
        for file in filter(Path.is_file, files):  # after a kill some may be gone
            try:
                found.update(pq.read_table(file, columns=["image_sha256"])["image_sha256"].to_pylist())
            except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
                return set()
        return found - {None}

    def is_current(self, fingerprints: Mapping[str, str], made_from: Mapping) -> bool:
        """Whether the folder holds the complete dataset with these fingerprints, under the present name."""
        details = self.details()
        files = details.get("files", ())
        same = details.get("fingerprints") == fingerprints and (
            details.get("made_from", {}).get("dataset_name") == made_from.get("dataset_name")
        )
        if gone := [name for name in files if same and not (self.path / name).is_file()]:
            logger.warning("Note: %s lacks %s: the dataset is written again.", self.path, some(gone))
        if not files or not same or gone:
            return False
        digests = details.get("digests", {})
        if changed := [name for name in files if name in digests and digest_of(self.path / name) != digests[name]]:
            logger.warning(
                "Note: %s: %s is not as it was written: edited, or damaged on the disk. --overwrite_output_dir true writes it "
                "again, and asks for nothing that is in the journal.",
                self.path,
                some(changed),
            )
        return True

    def write(
        self, splits: Mapping[str, Dataset], details: Mapping, add_files: Callable[[Path], object] | None = None
    ) -> None:
        """Writes the splits as parquet files, and `details` to `captions.json`.

        Args:
            add_files (*optional*): called with the new folder before it replaces the old one, to add a report and a card.
        """
        partial = self.path / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        try:
            (partial / "data").mkdir(parents=True)
            for name, split in splits.items():
                _write_shards(split, partial / "data", name)
            if add_files:
                add_files(partial)
            files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
            digests = {name: digest_of(partial / name) for name in files if name.endswith(".parquet")}
            journals = sorted(path.name for path in self.path.glob("journal/journal-*.sqlite"))
            details = {**details, "mmft_hf": __version__, "files": files, "digests": digests, "journals": journals}
            old = [name for name in self._data_files(self.details()) if name not in files]
            # Until all new files are in place, `captions.json` names the old and the new ones.
            between = {**details, "files": sorted({*old, *files}), "fingerprints": None, "complete": False}
            write_json(self.path / DETAILS_FILE, sealed(between), ensure_ascii=False)
            (self.path / "data").mkdir(exist_ok=True)
            for name in old:
                (self.path / name).unlink(missing_ok=True)
            for name in files:
                (partial / name).replace(self.path / name)
            write_json(self.path / DETAILS_FILE, sealed(details), ensure_ascii=False)
        finally:  # on a full disk it would only take room
            shutil.rmtree(partial, ignore_errors=True)


def _inside(name: str) -> bool:
    path = Path(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _write_shards(dataset: Dataset, folder: Path, split: str) -> None:
    """Writes `{split}-{i:05d}-of-{n:05d}.parquet`, each of about `SHARD_BYTES`, with few rows in memory at a time."""
    undecoded = dataset.cast_column("image", Image(decode=False))
    count = max(1, -(-undecoded.data.nbytes // SHARD_BYTES))
    for i in range(count):
        shard = undecoded.shard(count, i, contiguous=True).cast_column("image", Image())
        shard.to_parquet(folder / f"{split}-{i:05d}-of-{count:05d}.parquet", batch_size=100)
