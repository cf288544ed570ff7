"""Publishing what a run left: a model with its class prototypes, or a captioned data set, each with its card."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from string import Template

from ..core.builtin import builtin
from ..core.errors import UserError
from ..core.files import (
    ADAPTER_FILES,
    ADAPTER_FOLDER,
    CARD_FILE,
    HEAD_FILE,
    MODEL_FILES,
    PROTOTYPES_FILE,
    RUN_FILE,
    RUN_FILES,
    STATE_FILE,
    is_weights,
)
from ..predict.heads import Head, load_head
from .cards import card_for_repository
from .client import check_access, published, push_files

INFERENCE_FILE = "mmft_inference.py"
DATA_FILES = re.compile(r"(data|captions)/[\w.-]+-\d{5}-of-\d{5}\.parquet")


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    parts: str = "merged",
    with_inference_code: bool = False,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Publishes what `mmft-hf finetune` left in a folder: model, processor, prototypes, results and card.

    Args:
        folder: the output folder of a finished run.
        repo_id, private, revision, create_pr, token: see `push_files`.
        parts: of a LoRA run: `merged` (a plain model), `adapter` (for peft), or `both`.
        with_inference_code: adds one file, with which `pipeline("image-classification", model=…, trust_remote_code=True)`
            works without this library.
        license: of the model, e.g. `mit`, if the card cannot take it over from the base model.

    Returns:
        The address of the commit or pull request.

    Raises:
        UserError: the folder is no finished run; see `push_files`.
        PartialResult: see `push_files`.
    """
    repo_id = check_access(repo_id, token, create_pr)
    files = model_files(folder, repo_id, parts=parts, with_inference_code=with_inference_code, license=license)
    options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    return push_files(files, repo_id, "model", "Model, prototypes, results and card", marker=RUN_FILE, **options)


def is_published(name: str) -> bool:
    """Whether a file of a model's folder is published: none that somebody put there, no checkpoint, no pickle."""
    return name in RUN_FILES | MODEL_FILES or is_weights(name)


def folder_files(folder: Path) -> dict[str, Path | bytes]:
    """What of a model's folder may be published, by name; records of the run without local paths."""
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and is_published(path.name)
    }
    for name in (RUN_FILE, STATE_FILE):  # the settings; where the best checkpoint was
        if name in files:
            record = json.loads((folder / name).read_text(encoding="utf-8"))
            files[name] = (json.dumps(published(record), indent=2) + "\n").encode()
    return files


def model_files(
    folder: str | Path,
    repo_id: str,
    parts: str = "merged",
    with_inference_code: bool = False,
    license: str | None = None,
) -> dict[str, Path | bytes]:
    """The files of a finished run, by their path in the repository (see `push_model`)."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: expected the output folder of mmft-hf finetune, found no mmft.json that can be read. Type its path."
        ) from error
    if not record.get("completed"):
        raise UserError(
            f"{folder}: expected a finished run, found one that was cut. Finish it first: its command with "
            "--resume_from_checkpoint true."
        )
    missing = [name for name in ("config.json", CARD_FILE) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in (HEAD_FILE, PROTOTYPES_FILE)):
        missing.append(HEAD_FILE)
    if missing:
        raise UserError(f"{folder}: expected {', '.join(missing)} in it, found none. Run mmft-hf finetune again.")
    adapter = [path for name in ADAPTER_FILES if (path := folder / ADAPTER_FOLDER / name).is_file()]
    if parts not in ("merged", "adapter", "both"):
        raise UserError(f"--parts: expected merged, adapter or both, found {parts!r}.")
    if parts != "merged" and not adapter:
        raise UserError(f"--parts {parts}: expected the adapter of a LoRA run in {folder / 'adapter'}, found none.")
    files = folder_files(folder)
    if parts == "adapter":
        files = {name: path for name, path in files.items() if not is_weights(name)}
        files |= {path.name: path for path in adapter}
    elif parts == "both":
        files |= {f"{ADAPTER_FOLDER}/{path.name}": path for path in adapter}
    files[CARD_FILE] = card_for_repository(folder, repo_id, parts, license, with_inference_code).encode()
    base = str((record.get("identity") or {}).get("base_model") or "")
    if base.startswith("builtin/"):
        files["NOTICE"] = Path(builtin(base)) / "NOTICE"  # its licence asks for that
    if with_inference_code:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = INFERENCE_FILE.removesuffix(".py")
        classes = {"impl": f"{name}.MMFTImageClassificationPipeline", "pt": config["architectures"]}
        # Under the stock task's name: with this library, its own task needs no remote code; and the stock pipeline, which
        # would put a random head on the model, now asks for it in place of guessing.
        config["custom_pipelines"] = {"image-classification": {**classes, "type": "image"}}
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        head = load_head(folder)
        files |= {HEAD_FILE: head.to_bytes(), INFERENCE_FILE: inference_code(head).encode()}
    return files


def inference_code(head: Head) -> str:
    """The content of `mmft_inference.py`: a pipeline without this library, with the head's formula in it."""
    if head.formula is None:
        raise UserError(
            f"--with_inference_code: expected a head that works without mmft_hf, found a {head.kind} head. Leave it out."
        )
    text = (Path(__file__).parent / "templates" / "mmft_inference.txt").read_text(encoding="utf-8")
    parts = ", ".join(field.name for field in fields(head))
    return Template(text).substitute(kind=head.kind, formula=head.formula, parts=parts)


# -- captioned data sets ----------------------------------------------------------------------------------------------
def push_captioned_dataset(
    folder,
    repo_id: str,
    *,
    captions_only: bool = False,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Publishes a captioned data set: parquet files, the record of how it was made, report and card.

    Args:
        folder: the output folder of `mmft-hf caption`; or a `Dataset` or `DatasetDict` with the contract's columns.
        repo_id, private, revision, create_pr, token: see `push_files`.
        captions_only: leaves the images out, for those that may not be passed on. Whoever has them joins the captions to
            them by `image_sha256`: `load_captioned_dataset(IMAGES, captions_dataset=repo_id)`.
        license: of images and captions, e.g. `cc-by-4.0`.

    Returns:
        The address of the commit or pull request.

    Raises:
        UserError: no captioned data set there, or one with captions missing; see `push_files`.
        PartialResult: see `push_files`.
    """
    options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    repo_id = check_access(repo_id, token, create_pr)
    with tempfile.TemporaryDirectory() as temporary:
        if not isinstance(folder, (str, Path)):
            folder = _written(folder, Path(temporary) / "whole")
        files = dataset_files(folder, repo_id, Path(temporary) / "captions", captions_only, license)
        message = "Captions" if captions_only else "Images with captions"
        return push_files(files, repo_id, "dataset", message, replaces=DATA_FILES, marker="captions.json", **options)


def dataset_files(
    folder: str | Path, repo_id: str, scratch: Path, captions_only: bool = False, license: str | None = None
) -> dict[str, Path | bytes]:
    """The files of a captioned data set, by their path in the repository (see `push_captioned_dataset`).

    Args:
        scratch: folder for what has to be made: a card that names the repository, captions without their images.
    """
    from datasets import Image, load_dataset

    from ..captioning.write.card import caption_card
    from ..captioning.write.output_folder import DETAILS_FILE, PAGE_FILE, PICTURE_FILE, CaptionFolder
    from ..captioning.write.statistics import CaptionStatistics

    folder, record = Path(folder), CaptionFolder(folder).details()
    data_files = [folder / name for name in record.get("files", ()) if DATA_FILES.fullmatch(name)]
    if not data_files or not all(path.is_file() for path in data_files):
        raise UserError(
            f"{folder}: expected the output folder of mmft-hf caption, found no {DETAILS_FILE} whose parquet files are all there. "
            "Run mmft-hf caption first, or again."
        )
    scratch.mkdir(parents=True)
    splits = {path.name.rsplit("-", 3)[0] for path in data_files}
    data = {split: load_dataset(str(folder), split=split) for split in sorted(splits)}
    captioned = (record.get("made_from") or {}).get("split") or ["train"]
    first = data[captioned[0] if captioned[0] in data else sorted(data)[0]]
    if captions_only:
        (scratch / "captions").mkdir()
        for split, rows in data.items():
            if any(rows["captions"]):
                lean = rows.select_columns(["label", "captions", "caption_records", "image_sha256"])
                lean.to_parquet(scratch / "captions" / f"{split}-00000-of-00001.parquet")
        files: dict[str, Path | bytes] = {
            path.relative_to(scratch).as_posix(): path for path in sorted(scratch.rglob("*.parquet"))
        }
    else:
        files = {path.relative_to(folder).as_posix(): path for path in data_files}
        files |= {name: folder / name for name in (PAGE_FILE, PICTURE_FILE) if (folder / name).is_file()}
        (scratch / "data").mkdir()
        for path in data_files:
            (scratch / "data" / path.name).touch()  # the card lists splits by file name
    details = {**published(record), **({"license": license} if license else {})}
    first = first.cast_column("image", Image(decode=False))
    card = caption_card(CaptionStatistics(first), scratch, details, repo_id, captions_only)
    files[CARD_FILE] = card.read_bytes()
    files[DETAILS_FILE] = (
        json.dumps({**details, "files": sorted(files)}, indent=2, ensure_ascii=False) + "\n"
    ).encode()
    return files


def _written(dataset, folder: Path) -> Path:
    """A data set in memory as a folder of `mmft-hf caption`."""
    from datasets import Dataset, DatasetDict

    from ..captioning.write.dataset import CAPTION_FEATURES
    from ..captioning.write.output_folder import CaptionFolder
    from ..captioning.write.report import caption_report
    from ..captioning.write.statistics import CaptionStatistics

    splits = DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
    for name, split in splits.items():
        missing = [column for column in ("image", "label", *CAPTION_FEATURES) if column not in split.column_names]
        if missing:
            raise UserError(
                f"split {name!r}: expected the columns of a captioned data set, found no {', '.join(missing)}. Make them with "
                "mmft_hf.caption_dataset(…)."
            )
    first = "train" if "train" in splits else next(iter(splits))
    details = {"made_from": {"split": [first]}}
    CaptionFolder(folder).write(
        splits, details, lambda path: caption_report(CaptionStatistics(splits[first]), path, details)
    )
    return folder
