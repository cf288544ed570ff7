"""Several processes that share the pictures: which one this is, and when the others are done.

They exchange nothing while they work, since their shares end hours apart and a collective would time out. Each leaves a
mark next to the journal, and the first process waits for the marks of all.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path


class Processes:
    """The processes that `accelerate launch` or `torchrun` started, or this one alone.

    Args:
        shared: whether they share the work; if not, this one does it all.
    """

    def __init__(self, shared: bool = True):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) if shared else 1
        self.launch = uuid.uuid4().hex[:12]
        if self.world > 1:
            import torch.distributed as dist

            # A name for this launch, so that marks of an earlier one do not count. The process group ends at once.
            dist.init_process_group("gloo")
            launch = [self.launch]
            dist.broadcast_object_list(launch, src=0)
            (self.launch,) = launch
            dist.destroy_process_group()

    def done(self, folder: Path, split: str) -> None:
        """Leaves the mark of this process."""
        if self.world > 1:
            self._mark(folder, split, self.rank).write_text("done\n")

    def wait(self, folder: Path, split: str) -> None:
        """Waits for the marks of all processes and removes them. If a process dies, the launcher ends the others."""
        marks = [self._mark(folder, split, rank) for rank in range(self.world)] if self.world > 1 else []
        while not all(mark.exists() for mark in marks):
            time.sleep(0.2)
        for mark in folder.glob("rank-*.done"):
            # Another process may be ahead: its marks for the next splits stay.
            if mark in marks or self.launch not in mark.name:
                mark.unlink(missing_ok=True)

    def _mark(self, folder: Path, split: str, rank: int) -> Path:
        return folder / f"rank-{rank:05d}-{split}-{self.launch}.done"
