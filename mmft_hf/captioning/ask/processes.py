"""Several processes, each with its share of the pictures: who this one is, and when the others are done.

Nothing is exchanged while they work: shares end hours apart, and a collective would time out. Each leaves a mark beside
the journal, and the first process waits for the marks of all.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path


class Processes:
    """As `accelerate launch` or `torchrun` started them; alone without them.

    Args:
        shared: False where this one does all the work, and the others have left.
    """

    def __init__(self, shared: bool = True):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) if shared else 1
        self.launch = uuid.uuid4().hex[:12]
        if self.world > 1:
            import torch.distributed as dist

            # One word for this launch, so that marks of an earlier one count for nothing. The group is given up at once.
            dist.init_process_group("gloo")
            word = [self.launch]
            dist.broadcast_object_list(word, src=0)
            self.launch = word[0]
            dist.destroy_process_group()

    def done(self, folder: Path, split: str) -> None:
        """Leaves this process's mark."""
        if self.world > 1:
            self._mark(folder, split, self.rank).write_text("done\n")

    def wait(self, folder: Path, split: str) -> None:
        """Returns once all marks are there, and takes them away. A process that dies takes the launch with it."""
        marks = [self._mark(folder, split, rank) for rank in range(self.world)] if self.world > 1 else []
        while not all(mark.exists() for mark in marks):
            time.sleep(0.2)
        for mark in folder.glob("rank-*.done"):
            # Another process may be further: its marks of the next splits stay.
            if mark in marks or self.launch not in mark.name:
                mark.unlink(missing_ok=True)

    def _mark(self, folder: Path, split: str, rank: int) -> Path:
        return folder / f"rank-{rank:05d}-{split}-{self.launch}.done"
