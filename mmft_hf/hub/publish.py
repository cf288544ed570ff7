"""Publishes a trained model with its head, or a captioned dataset, with its card."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from string import Template

from ..core import files as names
from ..core.builtin import builtin
from ..core.errors import UserError
from ..core.markdown import without_local_paths
from ..core.reading import read_json
from ..core.records import ModelConfig, RunRecord
from ..core.seals import digest_of, is_of_run, note_changed_files, note_if_changed, sealed
from ..predict.heads import Head, load_head
from .cards import card_for_repository
from .client import check_access, push_files
from .vision import vision_files

logger = logging.getLogger(__name__)

PARTS = ("merged", "adapter", "both", "vision")
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
    """Publishes the folder of a finished run: model, processor, head, results and card.

    Args:
        folder: the output folder of a finished run.
        repo_id, private, revision, create_pr, token: see `push_files`.
        parts: `merged` (the whole model); for a LoRA run also `adapter` (for peft) or `both`; or `vision`: of a CLIP or MetaCLIP 2 the
            image tower with its projection, as a stock model, and the head.
        with_inference_code: adds a file with which `pipeline("image-classification", model=…, trust_remote_code=True)`
            works without this library.
        license: of the model, e.g. `mit`. Default: the licence of the base model, if known.

    Returns:
        The URL of the commit or pull request.

    Raises:
        UserError: the folder does not hold a finished run; see `push_files`.
        PartialResult: see `push_files`.
    """
    repo_id = check_access(repo_id, token, create_pr)
    files = model_files(folder, repo_id, parts=parts, with_inference_code=with_inference_code, license=license)
    options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    # A repository may hold the prototypes of an epoch, or of a run before: version 0.1 would read them in place of this head.
    options["replaces"] = re.compile(re.escape(names.PROTOTYPES_FILE))
    return push_files(files, repo_id, "model", "Model, head, results and card", marker=names.RUN_FILE, **options)


def folder_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a model's folder that are published, by name: no checkpoint, no pickle, no file that somebody added.

    Records of the run are published without local paths.
    """
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and names.belongs_to_run(path.name)
    }
    for name in names.TRUNK_FILES:
        if (path := folder / names.TRUNK_FOLDER / name).is_file():
            files[f"{names.TRUNK_FOLDER}/{name}"] = path
            if path.suffix == ".json":  # each names the base model of the caption encoder
                files[f"{names.TRUNK_FOLDER}/{name}"] = _as_json(without_local_paths(read_json(path)))
    if names.STATE_FILE in files:  # it names the best checkpoint
        files[names.STATE_FILE] = _as_json(without_local_paths(read_json(folder / names.STATE_FILE)))
    if names.RUN_FILE in files:  # it names the data
        files[names.RUN_FILE] = _as_json(_public_record(read_json(folder / names.RUN_FILE), files))
    return files


def _public_record(record: dict, files: dict[str, Path | bytes]) -> dict:
    """`mmft.json` without local paths, with the digests of the files as they are published."""
    record = without_local_paths(record)
    if record.get("files"):
        record["files"] = {name: digest_of(files[name]) for name in sorted(files) if is_of_run(name)}
    return sealed(record)


def _as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def model_files(
    folder: str | Path,
    repo_id: str,
    parts: str = "merged",
    with_inference_code: bool = False,
    license: str | None = None,
) -> dict[str, Path | bytes]:
    """The files of a finished run by their path in the repository. Arguments as in `push_model`."""
    folder = Path(folder)
    try:
        record = read_json(folder / names.RUN_FILE, RunRecord, "Restore the file, or run mmft-hf finetune again.")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: expected the output folder of mmft-hf finetune, found no mmft.json. Type its path."
        ) from error
    if not record["completed"]:
        raise UserError(
            f"{folder}: expected a finished run, found an interrupted one. Finish it first: type its command with "
            "--resume_from_checkpoint true."
        )
    missing = [name for name in ("config.json", names.CARD_FILE) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in (names.HEAD_FILE, names.PROTOTYPES_FILE)):
        missing.append(names.HEAD_FILE)
    if missing:
        raise UserError(f"{folder}: expected {', '.join(missing)} in it, found none. Run mmft-hf finetune again.")
    note_changed_files(folder)
    load_head(folder)  # damaged ones are not published
    adapter = [path for name in names.ADAPTER_FILES if (path := folder / names.ADAPTER_FOLDER / name).is_file()]
    if parts not in PARTS:
        raise UserError(f"--parts: expected {', '.join(PARTS)}, found {parts!r}.")
    if parts in ("adapter", "both") and not adapter:
        raise UserError(f"--parts {parts}: expected the adapter of a LoRA run in {folder / 'adapter'}, found none.")
    files = folder_files(folder)
    if parts == "adapter":
        files = {name: path for name, path in files.items() if not names.is_weights(name)}
        files |= {path.name: path for path in adapter}
    elif parts == "vision":
        whole = {name for name in files if name in names.MODEL_FILES or names.is_weights(name) or "/" in name}
        files = {name: path for name, path in files.items() if name not in whole} | vision_files(folder)
    elif parts == "both":
        files |= {f"{names.ADAPTER_FOLDER}/{path.name}": path for path in adapter}
    files[names.CARD_FILE] = card_for_repository(folder, repo_id, parts, license, with_inference_code).encode()
    base = record["identity"]["base_model"]
    if base.startswith("builtin/"):
        files["NOTICE"] = Path(builtin(base)) / "NOTICE"  # as its licence requires
    if with_inference_code:
        config = (
            json.loads(files["config.json"]) if parts == "vision" else read_json(folder / "config.json", ModelConfig)
        )
        name = INFERENCE_FILE.removesuffix(".py")
        classes = {"impl": f"{name}.MMFTImageClassificationPipeline", "pt": config["architectures"]}
        # The code is for the stock task, since ours needs none with this library. The stock pipeline, which would put a
        # random head on the model, now asks for the code instead.
        config["custom_pipelines"] = {"image-classification": {**classes, "type": "image"}}
        files["config.json"] = _as_json(config)
        head = load_head(folder)
        files |= {names.HEAD_FILE: head.to_bytes(), INFERENCE_FILE: inference_code(head).encode()}
    files[names.RUN_FILE] = _as_json(_public_record(record, files))
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


# -- captioned datasets -----------------------------------------------------------------------------------------------
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
    """Publishes a captioned dataset: parquet files, the record of how it was made, report and card.

    Args:
        folder: the output folder of `mmft-hf caption`; or a `Dataset` or `DatasetDict` with the contract's columns.
        repo_id, private, revision, create_pr, token: see `push_files`.
        captions_only: leaves out the images, if they must not be redistributed. Users who have the images join the
            captions by `image_sha256`: `load_captioned_dataset(IMAGES, captions_dataset=repo_id)`.
        license: of images and captions, e.g. `cc-by-4.0`.

    Returns:
        The URL of the commit or pull request.

    Raises:
        UserError: no captioned dataset there, or one without columns for captions; see `push_files`.
        PartialResult: see `push_files`.
    """
    options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    repo_id = check_access(repo_id, token, create_pr)
    with tempfile.TemporaryDirectory() as temporary:
        if not isinstance(folder, (str, Path)):
            folder = _written(folder, Path(temporary) / "whole")
        files = dataset_files(folder, repo_id, Path(temporary) / "captions", captions_only, license)
        message = "Captions" if captions_only else "Images with captions"
        return push_files(files, repo_id, "dataset", message, replaces=DATA_FILES, marker=names.DETAILS_FILE, **options)


def dataset_files(
    folder: str | Path, repo_id: str, scratch: Path, captions_only: bool = False, license: str | None = None
) -> dict[str, Path | bytes]:
    """The files of a captioned dataset by their path in the repository. Arguments as in `push_captioned_dataset`.

    Args:
        scratch: folder for captions without images.
    """
    from datasets import Image, load_dataset

    from ..captioning.write.card import caption_card
    from ..captioning.write.output_folder import CaptionFolder
    from ..captioning.write.statistics import CaptionStatistics

    folder, record = Path(folder), CaptionFolder(folder).details()
    note_if_changed(record, folder / names.DETAILS_FILE)
    data_files = [folder / name for name in record.get("files", ()) if DATA_FILES.fullmatch(name)]
    if not data_files or not all(path.is_file() for path in data_files):
        raise UserError(
            f"{folder}: expected the output folder of mmft-hf caption, found no {names.DETAILS_FILE} whose parquet files all exist. "
            "Run mmft-hf caption first, or again."
        )
    digests = record.get("digests", {})
    for path in data_files:
        name = path.relative_to(folder).as_posix()
        if name in digests and digest_of(path) != digests[name]:
            logger.warning("Note: %s was changed after it was written, or is damaged.", path)
    scratch.mkdir(parents=True)
    splits = {path.name.rsplit("-", 3)[0] for path in data_files}
    data = {split: load_dataset(str(folder), split=split) for split in sorted(splits)}
    captioned = (record.get("made_from") or {}).get("split") or ["train"]
    first = data[captioned[0] if captioned[0] in data else sorted(data)[0]]
    if captions_only:
        data = {split: rows for split, rows in data.items() if any(rows["captions"])}
        files: dict[str, Path | bytes] = {
            f"captions/{split}-00000-of-00001.parquet": scratch / f"{split}.parquet" for split in data
        }
        for rows, path in zip(data.values(), files.values(), strict=True):
            rows.select_columns(["label", "captions", "caption_records", "image_sha256"]).to_parquet(path)
    else:
        files = {path.relative_to(folder).as_posix(): path for path in data_files}
        pages = (names.PAGE_FILE, names.PICTURE_FILE, names.REFINED_PAGE, names.STEPS_FILE)
        files |= {name: folder / name for name in pages if (folder / name).is_file()}
    details = {**without_local_paths(record), **({"license": license} if license else {})}
    first = first.cast_column("image", Image(decode=False))
    files[names.CARD_FILE] = caption_card(CaptionStatistics(first), details, data, repo_id, captions_only).encode()
    digests = {name: digest_of(path) for name, path in sorted(files.items()) if name.endswith(".parquet")}
    details = sealed({**details, "files": sorted(files), "digests": digests})
    files[names.DETAILS_FILE] = (json.dumps(details, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _written(dataset, folder: Path) -> Path:
    """Writes a dataset from memory as `mmft-hf caption` does."""
    from datasets import Dataset, DatasetDict

    from ..captioning.workflow import write_folder
    from ..captioning.write.dataset import CAPTION_FEATURES
    from ..captioning.write.output_folder import CaptionFolder

    splits = DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
    for name, split in splits.items():
        missing = [column for column in ("image", "label", *CAPTION_FEATURES) if column not in split.column_names]
        if missing:
            raise UserError(
                f"split {name!r}: expected the columns of a captioned dataset, found no {', '.join(missing)}. Create them with "
                "mmft_hf.caption_dataset(…)."
            )
    first = "train" if "train" in splits else next(iter(splits))
    write_folder(CaptionFolder(folder), splits, first, {"made_from": {"split": [first]}})
    return folder
