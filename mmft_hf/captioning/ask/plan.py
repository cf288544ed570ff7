"""The plan: which requests a dataset needs, and the keys under which their results are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Image
from tqdm.auto import tqdm

from ...data.images import BadImage, original_bytes
from .captioner import Captioner
from .pictures import sha256


def canonical(value: Any) -> str:
    """JSON in canonical form: sorted keys, no spaces, text unescaped."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Slot:
    """One caption that the plan asks for.

    Args:
        key: key of its first request, which names the slot.
        prompt: prompt of the first request, for one aspect or for all of them.
        single: prompt of later requests, always for this aspect alone.
        prompt_id: names the wording, whatever the class name.
    """

    key: str
    aspect: str
    sample: int
    prompt: str
    single: str
    prompt_id: str

    @property
    def seed(self) -> int:
        return int(self.key[:7], 16)


class Keys:
    """Makes slots and request keys. A request has the same key in any dataset, order, process or folder.

    Args:
        captioner: with a backend that asks a model.
        identity: of that backend.
    """

    def __init__(self, captioner: Captioner, identity: Mapping[str, Any]):
        self.captioner = captioner
        spec = captioner.spec(identity)
        self._same = {name: spec[name] for name in ("version", "identity", "pictures", "sampling")}
        self._ids = {aspect: captioner.prompts.prompt_id(aspect) for aspect in captioner.prompts.aspects}
        self._prompts: dict[str, tuple[str | None, dict[str, str]]] = {}

    def key(self, image_sha256: str, aspect: str, prompt: str, sample: int, reask: int) -> str:
        """sha256 in hex of everything that determines the answer.

        The token limit is not part of it: an answer that came to its end would be the same under a larger limit, and a
        truncated one is asked for again once the limit is larger.
        """
        changing = {"image": image_sha256, "aspect": aspect, "prompt": prompt, "sample": sample, "reask": reask}
        return sha256(canonical({**self._same, **changing}).encode())

    def slots(self, image_sha256: str, class_name: str) -> list[Slot]:
        """All slots of one picture, by aspect, then by sample."""
        if class_name not in self._prompts:
            prompts = self.captioner.prompts
            single = {aspect: prompts.prompt(aspect, class_name) for aspect in prompts.aspects}
            self._prompts[class_name] = (prompts.joint_prompt(class_name) if self.captioner.joint else None, single)
        joint, single = self._prompts[class_name]
        slots = []
        for aspect, own in single.items():
            for sample in range(self.captioner.samples):
                prompt = joint or own
                key = self.key(image_sha256, aspect, prompt, sample, 0)
                slots.append(Slot(key, aspect, sample, prompt, own, self._ids[aspect]))
        return slots

    def budget(self) -> int:
        """Token limit of the first request of a slot."""
        return self.captioner.sampling.max_tokens * (len(self._ids) if self.captioner.joint else 1)


@dataclass(frozen=True)
class WorkItem:
    """One picture with its open slots. `row`: the row of the dataset that holds its bytes."""

    row: int
    label: int
    class_name: str
    image_sha256: str
    slots: tuple[Slot, ...]


@dataclass
class Plan:
    """The slots that a dataset needs, and those of them that are still open.

    Args:
        items: distinct pictures with open slots, for this process.
        slots: all slots of the rows to caption; `others`: of the other rows, which may have results of an earlier run.
        rows, repeated: number of rows to caption, and how many of them repeat the picture of an earlier row.
        unreadable: for each row whose bytes cannot be read, the reason.
        digest: of the pictures in their order, and of which rows are to be captioned.
    """

    items: list[WorkItem]
    slots: set[str]
    others: set[str] = field(default_factory=set)
    rows: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    repeated: int = 0
    digest: str = ""

    @property
    def open(self) -> int:
        """Number of captions to ask for."""
        return sum(len(item.slots) for item in self.items)


def make_plan(
    dataset: Dataset,
    keys: Keys,
    done: set[str],
    rows: Container[int] | None = None,
    part: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Plan:
    """The plan of one split. Reads one picture at a time.

    Args:
        dataset: columns `image` (not decoded) and `label`.
        done: slots that need no call.
        rows: the rows to caption; None: all.
        part: `(rank, world)`: this process takes every world-th distinct picture, from the rank-th on. Strided, because
            neighbours are often of the same class and take equally long.
        progress: whether to show a progress bar.
    """
    names = dataset.features["label"].names
    rank, world = part
    plan = Plan([], set())
    pictures, seen_so_far = 0, hashlib.sha256()
    bar = tqdm(digests(dataset), "Planning", len(dataset), unit=" images", disable=not progress)
    for row, (digest, label) in enumerate(bar):
        asked = rows is None or row in rows
        plan.rows += asked
        seen_so_far.update(f"{digest} {asked}\n".encode("utf-8", "replace"))
        if isinstance(digest, BadImage):
            if asked:
                plan.unreadable[row] = str(digest)
            continue
        slots = keys.slots(digest, names[label])
        if not asked:
            plan.others.update(slot.key for slot in slots)
            continue
        if slots[0].key in plan.slots:
            plan.repeated += 1
            continue
        plan.slots.update(slot.key for slot in slots)
        missing = tuple(slot for slot in slots if slot.key not in done)
        if missing and pictures % world == rank:
            plan.items.append(WorkItem(row, label, names[label], digest, missing))
        pictures += 1
    plan.digest = seen_so_far.hexdigest()
    return plan


def digests(dataset: Dataset) -> Iterator[tuple[str | BadImage, int]]:
    """For each row the sha256 of its picture's bytes (or why they cannot be read) and its label."""
    for row in dataset.select_columns(["image", "label"]):
        try:
            yield sha256(original_bytes(row["image"])), row["label"]
        except BadImage as error:
            yield error, row["label"]


def pictures_of(data: Mapping[str, Dataset]) -> set[str]:
    """The sha256 of all pictures that can be read, of all splits."""
    undecoded = (dataset.cast_column("image", Image(decode=False)) for dataset in data.values())
    return {digest for dataset in undecoded for digest, _ in digests(dataset) if isinstance(digest, str)}
