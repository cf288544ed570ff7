"""Names of the files in a run folder or a model; writing that leaves whole files or none; locks."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import PartialResult, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The files that a fine-tuning run writes into its folder, apart from the model and its checkpoints.
RUN_FILE = "mmft.json"
RESULTS_FILE = "all_results.json"
STATE_FILE = "trainer_state.json"
PREDICTIONS_FILE = "predictions_test.parquet"
LOCK_FILE = ".mmft.lock"  # there while a process works in the folder
HEAD_FILE = "head.safetensors"
PROTOTYPES_FILE = "prototypes.safetensors"  # the head's file in version 0.1
CARD_FILE = "README.md"
SHEET_FILE, CONFUSION_FILE, CURVES_FILE = "predictions_test.png", "confusion.png", "curves.png"
CERTAINTY_FILE = "certainty.png"
RUN_FILES = {RUN_FILE, RESULTS_FILE, STATE_FILE, PREDICTIONS_FILE, HEAD_FILE, PROTOTYPES_FILE, CARD_FILE}
RUN_FILES |= {SHEET_FILE, CONFUSION_FILE, CURVES_FILE, CERTAINTY_FILE}
ADAPTER_FOLDER, ADAPTER_FILES = "adapter", ("adapter_config.json", "adapter_model.safetensors")
# The caption encoder of an AdaptedCLIP: what names its base model, and its own LoRA weights, if it has any.
TRUNK_FOLDER, TRUNK_FILES = "text_trunk", ("caption_encoder.json", *ADAPTER_FILES)
SUBFOLDERS = {ADAPTER_FOLDER: ADAPTER_FILES, TRUNK_FOLDER: TRUNK_FILES}  # of a run's folder, with the files in each

# The files that a captioning run writes into its folder, apart from the data and the card.
DETAILS_FILE, PAGE_FILE, PICTURE_FILE = "captions.json", "captions.html", "captions.png"
REFINED_PAGE, COMPARED_PAGE = "refined.html", "compared.html"
STEPS_FILE = "steps.parquet"  # what steps found out about single captions

# The files from which a model and its processor are loaded, apart from the weights.
MODEL_FILES = frozenset(
    "config.json preprocessor_config.json processor_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model tokenizer.model".split()
)
WEIGHTS_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_TEMPORARY = re.compile(
    r"\.mmft\.lock|\.(.+\.)?[0-9a-f]{32}\.tmp|mmft\.json\.tmp|captions\.json\.new"
)  # the last two: version 0.1


def is_weights(name: str) -> bool:
    """Whether a file holds a model's weights, or is the index of several such files."""
    return _WEIGHTS.fullmatch(name) is not None


def model_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a local folder from which a model and its processor are loaded; none if it is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name in MODEL_FILES or p.suffix in (".safetensors", ".bin", ".json"))


def belongs_to_run(name: str) -> bool:
    """Whether a file of a run folder is one of the run's own: results, head, model or processor."""
    return name in RUN_FILES | MODEL_FILES or is_weights(name)


def is_temporary(name: str) -> bool:
    """Whether a file or folder was left behind by a process that was killed while writing."""
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


# -- writing ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path near `path`, and moves what was written there into place at the end.

    Readers never see a partial file. If several processes write the same file, the last one wins. If the block raises,
    `path` keeps its content, and nothing else stays. Missing parent folders are created. The file gets the permissions
    that the umask leaves; safetensors would let only its owner read it.
    """
    path = Path(os.path.realpath(path))  # the target of a link is replaced, not the link
    temporary = _temporary_folder(path.parent)
    try:
        yield temporary / path.name
        widen_permissions(temporary)
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder in `folder`, and moves the files written there into place at the end.

    They replace those of the same name, and weights replace the weights of an earlier model, however these were divided
    into files; other files stay. If the block raises, `folder` keeps its content: nothing that was written in part gets a
    final name. Permissions as in `atomic_write`.
    """
    folder = Path(folder)
    temporary = _temporary_folder(folder)
    try:
        yield temporary
        widen_permissions(temporary)
        written = [path for path in temporary.rglob("*") if path.is_file()]
        # The record of a run goes last: it says that the others are there.
        for path in sorted(written, key=lambda path: (path.name == RUN_FILE, path)):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        names = {path.name for path in written if path.parent == temporary}
        if any(map(is_weights, names)):
            for path in folder.iterdir():
                if is_weights(path.name) and path.name not in names:
                    path.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_folder(place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    folder = place / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir()
    except OSError as error:
        error.filename = str(place)  # what the user knows
        raise
    return folder


def widen_permissions(folder: str | os.PathLike) -> None:
    """Gives all files in and below a folder the permissions that the umask leaves.

    Libraries that write through a temporary file, such as safetensors, leave files that only their owner can read.
    """
    probe = _temporary_folder(Path(folder))  # a process can read its umask only by changing it
    mode = stat.S_IMODE(probe.stat().st_mode) & 0o666
    probe.rmdir()
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def write_json(path: str | os.PathLike, content, indent: int | None = 2, **options) -> None:
    """Writes a JSON file atomically. `options` go to `json.dumps`."""
    text = json.dumps(content, indent=indent, **options)
    with atomic_write(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


# A spreadsheet takes a cell that begins so for a formula and may run it, also where it was quoted.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def write_csv(path: str | os.PathLike, rows: Iterable[Iterable]) -> None:
    """Writes a CSV file atomically, in UTF-8. No spreadsheet runs its texts, and no terminal obeys them.

    A text that begins with `=`, `+`, `-`, `@`, a tab, a new line or an apostrophe gets an apostrophe in front. Who reads the
    texts back removes one leading apostrophe. Control characters are written as `\\x1b`. Numbers are written as they are.
    """
    with atomic_write(path) as temporary:
        # File names need not be valid UTF-8: their bytes are written as they are.
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([_harmless(cell) for cell in row] for row in rows)


def _harmless(cell):
    if not isinstance(cell, str):
        return cell
    text = _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", cell)
    return f"'{text}" if text.startswith((*_FORMULA, "'")) else text


# -- disks that take no more ------------------------------------------------------------------------------------------
# The system refuses to write: the disk is full or read-only, a quota or a limit is reached, the device fails.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
# How safetensors, torch and sqlite say so, which raise exceptions of their own without an error number.
_NO_ROOM_TEXT = re.compile(
    r"no space left on device|disk quota exceeded|file too large|read-only file system|database or disk is full|disk I/O error|"
    r"attempt to write a readonly database|inline_container\.cc|PytorchStreamWriter|iostream error",
    re.IGNORECASE,
)


def no_room(error: BaseException | None) -> str | None:
    """What the system says if a disk that takes no more is behind an exception, else None. Its causes count, too."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            place = f"{error.filename}: " if error.filename else ""
            return place + os.strerror(error.errno)
        if found := _NO_ROOM_TEXT.search(str(error)):
            unnamed = found[0].startswith(("inline", "Pytorch", "iostream"))  # torch does not give the reason
            return "a file could not be written in full" if unnamed else found[0]
        error = error.__cause__ or error.__context__
    return None


def closed_cache(error: BaseException | None) -> str | None:
    """What to type if a cache of Hugging Face that cannot be written to is behind an exception, else None."""
    from huggingface_hub import constants

    places = {constants.HF_HOME, constants.HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE", constants.HF_HOME)}
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            name = os.path.abspath(os.fsdecode(error.filename))
            for place in map(os.path.abspath, sorted(places)):
                if os.path.commonpath((name, place)) == place:
                    return (
                        f"The cache in {place} cannot be written to ({os.strerror(error.errno)}). Type export HF_HOME=FOLDER with "
                        "a folder that can, and the command again."
                    )
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def keeping(kept: Callable[[], str | None], again: bool = True) -> Iterator[None]:
    """Turns a full or read-only disk, met while the block writes, into a `PartialResult`.

    Args:
        kept: says what is there nevertheless, in a sentence; None: nothing was begun, and the error stays what it is.
        again: as in `PartialResult`.
    """
    try:
        yield
    except PartialResult:
        raise
    except Exception as error:
        found = no_room(error)
        if found is None and isinstance(error, PermissionError):
            found = f"{error.filename}: {error.strerror}"
        if found is None or (left := kept()) is None:
            raise
        message = f"expected a place that can be written to, found: {found}. {left} Make room."
        raise PartialResult(message, again) from error


# -- one process at a time --------------------------------------------------------------------------------------------
class InUse(UserError):
    """Another process holds a lock."""


class Lock:
    """A lock file that this process holds. It ends with the process, however that ends.

    Args:
        path: of the file, which names the process. Its folder must exist.
        what: is named in the error: a folder.
        shared: processes with the same text may hold the lock at the same time; None: no other process may.

    Attributes:
        held: False on a file system without locks, where another process goes unnoticed.

    Raises:
        InUse: another process, or another user of the lock in this one, holds it.
    """

    def __init__(self, path: str | os.PathLike, what: str | os.PathLike, shared: str | None = None):
        self.path, self._handle = Path(path), None
        while fcntl is not None and self._handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if self._take(handle, shared) and self._is_at_path(handle):
                    self._handle = handle
            except BlockingIOError as error:
                owner = os.pread(handle, 200, 0).decode(errors="replace").split("\n")[0] or "unknown"
                other = " with other settings" if shared else ""
                raise InUse(
                    f"{what}: expected no other run{other}, found one at work here ({owner}). Wait for it or stop it, or "
                    "type another --output_dir."
                ) from error
            except OSError:  # no locks here
                return
            finally:
                if self._handle is None:
                    os.close(handle)

    def _take(self, handle: int, shared: str | None) -> bool:
        """Takes the lock, or joins those who share it. False: try again."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if shared is None:
                raise
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.pread(handle, 1000, 0).decode(errors="replace").split("\n")[1:2] != [shared]:
                raise
            return True
        with contextlib.suppress(OSError):  # on a full disk the file stays empty, and locks all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n{shared or ''}".encode(), 0)
        if shared is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # another process took it in between
                return False
        return True

    @property
    def held(self) -> bool:
        return self._handle is not None

    def _is_at_path(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self, remove: bool = False) -> None:
        """Ends the lock. `remove` deletes its file, unless others share it."""
        if self._handle is not None:
            if remove:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.path.unlink()
            os.close(self._handle)
            self._handle = None


def file_system(folder: str | os.PathLike) -> str:
    """The type of the file system that holds a folder (`ext4`, `nfs4`, …); `unknown` if the system does not say."""
    place, longest, kind = Path(folder).resolve(), -1, "unknown"
    with contextlib.suppress(OSError):  # a file of Linux
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, name, *_ = line.split()
            if len(mount) >= longest and place.is_relative_to(mount.replace("\\040", " ")):
                longest, kind = len(mount), name
    return kind
