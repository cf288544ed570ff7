"""Checks the start of several processes, ends all of them with a message when one of them ends, and keeps other runs out.

`accelerate launch`, `torchrun` and schedulers that set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are treated alike.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from .console import is_main, plain
from .distributed import world_size
from .errors import PartialResult, UserError
from .files import LOCK_FILE, InUse, Lock, file_system

logger = logging.getLogger(__name__)

# gloo raises plain RuntimeErrors. NCCL and the rendezvous raise DistError.
LOST = re.compile(r"gloo|Connection (reset|closed|refused)|Broken pipe|Timed out waiting|Socket Timeout", re.IGNORECASE)
# Seconds in which the main thread may end by itself after a SIGTERM. In a blocked collective it cannot.
GRACE = 5
GO_ON = "Start all of them again as before, with --resume_from_checkpoint true"


def start(use_cpu: bool, timeout: float) -> None:
    """Joins the other processes if they run on CPUs, with `--ddp_timeout`, which the stock settings ignore on CPUs.

    Args:
        timeout: seconds after which a silent process counts as lost.

    Raises:
        UserError: the other processes did not join within that time.
    """
    by_launcher = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not use_cpu or not by_launcher or not dist.is_available() or dist.is_initialized():
        return
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"process {os.environ['RANK']} on {socket.gethostname()}: expected {os.environ['WORLD_SIZE']} processes to meet at "
            f"{where} within {timeout:g} seconds (--ddp_timeout), which failed: {str(error).splitlines()[0]} Are all "
            "machines started, with the same address, port and number of processes?"
        ) from error


@contextmanager
def own_words() -> Iterator[None]:
    """Drops a warning of transformers, before `check`, that names a launcher of old and not the setting that is missing."""

    def keep(record: logging.LogRecord) -> bool:
        return "process group is initialized, but parallel_mode" not in record.getMessage()

    library = logging.getLogger("transformers.training_args")
    library.addFilter(keep)
    try:
        yield
    finally:
        library.removeFilter(keep)


def check(world: int) -> None:
    """Refuses to train alone if several processes were requested. Both launchers let that happen silently.

    Args:
        world: the number of processes that work together.

    Raises:
        UserError: what to type instead.
    """
    if world > 1:
        return
    asked = os.environ.get("WORLD_SIZE", "1")
    if asked != "1":
        raise UserError(
            f"expected {asked} processes that train together, found that each would train alone: there is no accelerator "
            "here. Type --use_cpu true to train on CPUs."
        )
    # accelerate's launcher for one process sets these variables if it was asked for several.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes but started one, as it does with --cpu, or without --multi_gpu "
            "and a second GPU. Type accelerate launch --multi_gpu --num_processes N …, and after the script, for CPUs, "
            "--use_cpu true. If one is what you want, unset MASTER_ADDR."
        )


def check_shared(folder: Path) -> None:
    """Refuses an output folder that only some processes can see, because checkpoints and results would be incomplete.

    Raises:
        UserError: in every process.
    """
    if world_size() == 1:
        return
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    mark = folder / f".seen-{token[0]}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier()
    seen = [None] * world_size()
    dist.all_gather_object(seen, (mark.exists(), socket.gethostname()))
    if dist.get_rank() == 0:
        mark.unlink()
    blind = [f"process {rank} on {host}" for rank, (sees, host) in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"--output_dir {folder}: expected one folder that all processes share, found that {', '.join(blind[:4])} "
            f"cannot see what process 0 on {seen[0][1]} writes there. Type the same path on a file system that all "
            "machines mount."
        )


@contextmanager
def alone_in(folder: str | os.PathLike, shared: str | None = None) -> Iterator[None]:
    """Keeps other runs out of an output folder until the block ends. Of several processes the first one holds the lock.

    Args:
        folder: created if it is missing; deleted at the end if it is still empty then.
        shared: runs with the same text may work in the folder together; None: no other run may.

    Raises:
        InUse: another run is at work in the folder; in every process.
    """
    folder, lock, refusal = Path(folder), None, [None]
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder / LOCK_FILE, f"--output_dir {folder}", shared)
        except InUse as error:
            refusal = [str(error)]
        except OSError as error:
            # What cannot be written to has no two writers, and a finished run in it can be read.
            refused = isinstance(error, PermissionError) or error.errno == errno.EROFS
            if not (refused and folder.is_dir()):
                raise
    if world_size() > 1:
        dist.broadcast_object_list(refusal)
    if refusal[0]:
        raise InUse(refusal[0])
    if lock is not None and not lock.held:
        logger.warning(
            "%s is on a file system (%s) without locks: a second run in it would go unnoticed.",
            folder,
            file_system(folder),
        )
    try:
        yield
    finally:
        if lock is not None:
            lock.release(remove=True)
            with suppress(OSError):  # not empty
                for place in missing:
                    place.rmdir()


@contextmanager
def together(last_checkpoint: Callable[[], str | None]) -> Iterator[None]:
    """Ends this process with a message when another process ends or stops answering, or when the launcher sends SIGTERM.

    A collective operation fails by itself when another process ends: immediately if the connection breaks, otherwise after
    `--ddp_timeout`. A process that waits inside such an operation cannot act on SIGTERM; a thread does so after `GRACE`
    seconds.

    Args:
        last_checkpoint: returns the last complete checkpoint.

    Raises:
        PartialResult: names the checkpoint and what to type.
    """
    if world_size() == 1:
        yield
        return

    rank, world = dist.get_rank(), dist.get_world_size()

    def message(what: str) -> str:
        checkpoint = last_checkpoint()
        kept = f"The last complete checkpoint is {checkpoint}" if checkpoint else "There is no complete checkpoint yet"
        return f"process {rank} of {world}: {what}. {kept}. {GO_ON}."

    with _on_sigterm(lambda: message("stopped by SIGTERM, which a launcher sends when another process has ended")):
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
                raise
            what = f"another process has ended or does not answer ({_reason(error)}); its own message, or the launcher's, says why"
            raise PartialResult(message(what)) from error
        dist.destroy_process_group()
    if rank:
        # A gloo thread that still holds a tensor requests the interpreter's lock while the interpreter shuts down, and aborts
        # (pytorch#190489; about once in thirty exits on a busy machine). The launcher would then stop process 0 while it
        # still writes results. The other processes have nothing left to clean up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _on_sigterm(message: Callable[[], str]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return

    def stop(*_):
        raise PartialResult(message())

    def wait():
        while (received := os.read(reader, 1)) != b"":
            if received[0] == signal.SIGTERM and not ended.wait(GRACE):
                print(f"mmft-hf: {plain(message())}", file=sys.stderr, flush=True)
                os._exit(3)
        os.close(reader)

    ended = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=wait, daemon=True).start()
    before, before_fd = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(writer)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGTERM, before)
        os.close(writer)


def _reason(error: Exception) -> str:
    """The first sentence of an error message of gloo or NCCL, without the place in their code."""
    line = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0])
    return re.split(r"\.? This is typically", line)[0].rstrip(".")[:200]
