"""Publishes a trained model or a captioned dataset on the Hub, in one commit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..core.arguments import setting
from ..core.console import say
from ..core.errors import UserError
from ..core.files import DETAILS_FILE, RUN_FILE
from ..core.reading import read_json
from ..core.records import RunRecord

POSITIONAL = ("folder", "the --output_dir of mmft-hf finetune or mmft-hf caption")
MARKERS = {"model": RUN_FILE, "dataset": DETAILS_FILE}  # the file that tells what a folder holds


@dataclass
class PushArguments:
    """What is published, and where."""

    repo_id: str | None = setting(None, "Name on the Hub: user/name or organization/name.")
    repo_type: str | None = setting(
        None, "model or dataset. Default: what the folder holds.", choices=("model", "dataset")
    )
    private: bool = setting(False, "Make a new repository private.")
    revision: str | None = setting(None, "Branch; created if it is missing. Default: main.")
    create_pr: bool = setting(False, "Open a pull request; the branch stays as it is.")
    license: str | None = setting(None, "Licence for the card, e.g. mit or cc-by-4.0.")
    captions_only: bool = setting(
        False, "Publish the captions without the images; others join them to their own images by content."
    )
    parts: str = setting(
        "merged",
        "What is published of a model. merged: all of it; for a LoRA run adapter (for peft), or both; vision: of a CLIP or MetaCLIP 2 the "
        "image tower and the head, which open in transformers without mmft_hf.",
        choices=("merged", "adapter", "both", "vision"),
    )
    with_inference_code: bool = setting(
        False, "Add a file with which pipeline(…, trust_remote_code=True) works without mmft_hf."
    )


def keys_note(folder: Path) -> str | None:
    """What is published of the training pictures with a kernel head, in a line; None for other heads."""
    record = read_json(folder / RUN_FILE, RunRecord, "Restore the file, or run mmft-hf finetune again.")
    if record.get("head") != "kernel":
        return None
    other = shlex.join(["mmft-hf", "head", str(folder), "--head", "linear"])
    return f"Note: its kernel head holds the embeddings of the training pictures, not the pictures. For a head without, type {other}"


ARGUMENTS = (PushArguments,)


def run(args: PushArguments, folders: list[str]) -> None:
    """Checks the folder and the access, then pushes."""
    from ..captioning.write.output_folder import CaptionFolder
    from ..hub.publish import push_captioned_dataset, push_model

    if len(folders) != 1:
        raise UserError(
            f"push: expected one folder, found {', '.join(folders) or 'none'}. Type mmft-hf push FOLDER --repo_id user/name."
        )
    if not args.repo_id:
        raise UserError("--repo_id: expected a name on the Hub, found none. Type --repo_id user/name.")
    folder = Path(folders[0])
    found = next((kind for kind, file in MARKERS.items() if (folder / file).is_file()), None)
    if found is None and (lost := CaptionFolder(folder).lost_details()):
        raise UserError(f"{lost} Then push the folder.")
    if found is None:
        raise UserError(
            f"{folder}: expected the --output_dir of mmft-hf finetune (with mmft.json) or of mmft-hf caption (with captions.json), "
            f"found {'neither file' if folder.is_dir() else 'no such folder'}."
        )
    if args.repo_type and args.repo_type != found:
        raise UserError(f"--repo_type {args.repo_type}: expected a folder of that kind, found a {found}. Leave it out.")
    options = {"license": args.license, "private": args.private or None, "revision": args.revision}
    options["create_pr"] = args.create_pr
    say(f"Pushing {folder} to {args.repo_id} ({found})")
    if found == "model":
        if note := keys_note(folder):
            say(note)
        url = push_model(
            folder, args.repo_id, parts=args.parts, with_inference_code=args.with_inference_code, **options
        )
        use = f"mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {args.repo_id}"
        if args.parts == "vision":
            use = "Python of its card, with transformers alone"
    else:
        url = push_captioned_dataset(folder, args.repo_id, captions_only=args.captions_only, **options)
        use = f"mmft-hf finetune --dataset_name {args.repo_id}"
        if args.captions_only:
            use = f"mmft-hf finetune --dataset_name YOUR_IMAGES --captions_dataset {args.repo_id}"
    say(f"\nIt is at {url}. Use it:\n  {use}")
