"""Captions as conversations, from which a captioner of one's own is tuned: a folder of pictures and `metadata.jsonl`.

A line is a picture, the prompt that asked for a caption, and the caption, in the form of prompt and completion that TRL's `SFTTrainer`
reads. Prompts and pictures are those that the captioner was sent, so a later run asks the tuned model what it was tuned on.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from markupsafe import Markup

from ...core.errors import UserError
from ...core.files import CARD_FILE, DETAILS_FILE, atomic_folder, is_temporary
from ...core.markdown import code, front_matter, listed
from ...core.pages import render_card
from ...data.images import original_bytes
from ...data.texts import PromptSet
from ...version import __version__
from ..ask.pictures import PicturePolicy, prepare
from ..types import ACCEPTED
from .card import TEMPLATES, title
from .labelled import LabelledImages

CHATS_FILE, PICTURES = "metadata.jsonl", "images"  # names that `datasets` knows
KINDS = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp"}


@dataclass
class Chats:
    """What was written.

    Args:
        images, chats: number of pictures and of lines.
        models: who wrote the captions, with their number.
        sealed: images that were left out because they are also in a split that is not trained on.
        unprompted: accepted captions that were left out because no prompt asks for their aspect, by aspect.
    """

    images: int = 0
    chats: int = 0
    models: Counter = field(default_factory=Counter)
    sealed: int = 0
    unprompted: Counter = field(default_factory=Counter)


def recorded_prompts(made_from: Mapping[str, Any]) -> tuple[PromptSet, PicturePolicy] | None:
    """The prompts of a captioned folder and how its pictures were sent; None if it does not say.

    Args:
        made_from: of its `captions.json`.

    Raises:
        UserError: it says something else.
    """
    prompts, pictures = made_from.get("prompts"), made_from.get("pictures")
    if not prompts or not pictures:
        return None
    try:
        found = PromptSet(**{**prompts, "aspects": tuple(prompts["aspects"])})
        return found, PicturePolicy(**{f.name: pictures[f.name] for f in fields(PicturePolicy)})
    except (TypeError, KeyError) as error:
        raise UserError(f"{DETAILS_FILE}: expected the prompts of the captions, found others ({error}).") from error


def prompt_flags(prompts: PromptSet, pictures: PicturePolicy) -> str:
    """The flags with which a run of `mmft-hf caption` sends these prompts and pictures."""
    default, words = PromptSet(), []
    if prompts.aspects != default.aspects:
        words += ["--aspects", *prompts.aspects]
    names = {"domain": "domain", "words": "words", "template": "prompt_template"}
    for name, flag in names.items():
        if (value := getattr(prompts, name)) != getattr(default, name):
            words += [f"--{flag}", str(value)]
    if prompts.own_prompts:
        words += ["--own_prompts", json.dumps(dict(prompts.own_prompts), ensure_ascii=False)]
    if not prompts.clean_names:
        words += ["--keep_class_names", "true"]
    if pictures.max_side != PicturePolicy().max_side:
        words += ["--max_side", str(pictures.max_side)]
    return shlex.join(words)


def write_chats(
    folder: Path,
    dataset: Dataset,
    prompts: PromptSet,
    pictures: PicturePolicy,
    sealed: Collection[str],
    details: Mapping[str, Any],
    overwrite: bool = False,
    asked: bool = True,
) -> Chats:
    """Writes a line for each accepted caption of a training split.

    Args:
        folder: that does not exist, or is empty, or has such lines already.
        dataset: columns `image`, `label`, `captions` and `caption_records`.
        prompts, pictures: what the captioner was sent, or will be sent.
        sealed: sha256 of pictures that must not be trained on.
        details: content of `captions.json`, for the card.
        overwrite: allows earlier lines to be replaced.
        asked: whether the captions were asked for with these prompts.

    Raises:
        UserError: the folder has other files; no caption can be written.
    """
    _check_folder(folder, overwrite)
    found = Chats()
    with atomic_folder(folder) as partial:
        (partial / PICTURES).mkdir()
        with open(partial / CHATS_FILE, "w", encoding="utf-8") as file:
            for line in _lines(dataset, prompts, pictures, sealed, partial, found):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if not found.chats:
            aspects = ", ".join(found.unprompted) or "none"
            raise UserError(
                f"caption chats: expected captions of the aspects {', '.join(prompts.aspects)}, found the aspects {aspects}. Type --aspects, "
                "perhaps with --own_prompts."
            )
        (partial / CARD_FILE).write_text(_card(found, prompts, pictures, details, asked), encoding="utf-8")
        shutil.rmtree(folder / PICTURES, ignore_errors=True)
    return found


def _check_folder(folder: Path, overwrite: bool) -> None:
    there = {path.name for path in folder.iterdir() if not is_temporary(path.name)} if folder.is_dir() else set()
    if there - {CHATS_FILE, PICTURES, CARD_FILE} or (there and CHATS_FILE not in there):
        raise UserError(f"--output_dir {folder}: expected an empty or new folder, found other files. Type another one.")
    if there and not overwrite:
        raise UserError(
            f"--output_dir {folder}: expected an empty or new folder, found conversations. Type another one, or "
            "--overwrite_output_dir true to replace them."
        )


def _lines(
    dataset: Dataset, prompts: PromptSet, policy: PicturePolicy, sealed: Collection[str], folder: Path, found: Chats
) -> Iterator[dict]:
    """The lines; writes their pictures, and counts into `found`."""
    part = LabelledImages("dataset", dataset, captioned=True)
    for row, (digest, records, captions) in enumerate(zip(part.hashes, part.records, part.captions, strict=True)):
        texts = {}  # by text, so that each is one line
        for record in records:
            if record["status"] not in ACCEPTED or record["text"] not in captions:
                continue
            if record["aspect"] in prompts.aspects:
                texts.setdefault(record["text"], record)
            else:
                found.unprompted[record["aspect"] or "none"] += 1
        if not texts or digest is None:
            continue
        if digest in sealed:
            found.sealed += 1
            continue
        picture = prepare(original_bytes(part.images[row]["image"]), policy)
        name = f"{PICTURES}/{digest}.{KINDS[picture.mime]}"
        (folder / name).write_bytes(picture.data)
        found.images += 1
        for text, record in texts.items():
            found.chats += 1
            found.models[record["model"] or "unknown"] += 1
            asked = prompts.prompt(record["aspect"], part.class_name(row))
            yield {
                "images_file_names": [name],
                "prompt": [_said("user", {"type": "image"}, {"type": "text", "text": asked})],
                "completion": [_said("assistant", {"type": "text", "text": text})],
                "image_sha256": digest,
                "aspect": record["aspect"],
            }


def _said(role: str, *content: dict) -> dict:
    return {"role": role, "content": list(content)}


def _card(found: Chats, prompts: PromptSet, pictures: PicturePolicy, details: Mapping[str, Any], asked: bool) -> str:
    models = [name for name in found.models if name not in ("columns", "template", "unknown")]
    front: dict = {"license": details["license"]} if details.get("license") else {}
    tags = ["captions", *(["synthetic-captions"] if models else []), "trl"]
    front |= {"task_categories": ["image-to-text"], "tags": tags}
    return render_card(
        TEMPLATES / "chats_card.md.j2",
        front=Markup(front_matter(front)),
        title=title(details).replace("Captions", "Conversations about pictures", 1),
        found=found,
        asked=asked,
        written_by=Markup(listed(map(code, models))) if models else None,
        steps=[step["name"] for step in details.get("steps") or ()],
        flags=prompt_flags(prompts, pictures),
        version=__version__,
    )
