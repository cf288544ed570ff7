"""Publishing: a model or a captioned data set becomes one commit of a Hub repository, checked before its first byte.

What was uploaded before a push was cut is not uploaded again: the Hub knows files by their content. Nothing local is ever
changed or deleted.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .cards import public_name
from .errors import PartialResult, UserError

TRIES = 6
LONGEST_WAIT_S = 120.0
# The only files of a model's folder that are published: no checkpoint, no pickle, nothing that somebody put beside them.
MODEL_FILES = re.compile(
    r"README\.md|mmft\.json|all_results\.json|trainer_state\.json|predictions_test\.parquet|\w+\.png|prototypes\.safetensors"
    r"|config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|tokenizer\.json"
    r"|tokenizer_config\.json|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json|preprocessor_config\.json"
    r"|processor_config\.json"
)
MERGED_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
DATA_FILES = re.compile(r"(data|captions)/[\w.-]+-\d{5}-of-\d{5}\.parquet")


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    replaces: re.Pattern | None = None,
) -> str:
    """Makes a repository hold these files, in one commit. Files that are there already are not uploaded.

    Args:
        files: by path in the repository; a local file, or its content.
        repo_id: `user/name` or `organisation/name`.
        repo_type: `model` or `dataset`.
        private: of a repository that does not exist yet.
        revision: branch, made if it is missing. Default: main.
        create_pr: as a pull request, which leaves the branch as it is.
        token: default: the one of `hf auth login` or `HF_TOKEN`.
        replaces: paths of the repository that go if they are not among `files`.

    Returns:
        The address of the commit or pull request.

    Raises:
        UserError: no token, a wrong or read-only one, no right to the name, a name that cannot be one, no such branch.
        PartialResult: the Hub did not answer as it should in the end; the same push goes on.
    """
    api = HfApi(token=token)
    check_access(repo_id, token)
    operations: list = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in sorted(files.items())
    ]
    where = {"repo_id": repo_id, "repo_type": repo_type}
    _insist(lambda: api.create_repo(**where, private=private, exist_ok=True), repo_id)
    if revision and not create_pr:
        _insist(lambda: api.create_branch(**where, branch=revision, exist_ok=True), repo_id)
    if replaces:
        listed = _insist(lambda: api.list_repo_files(**where, revision=None if create_pr else revision), repo_id)
        operations += [CommitOperationDelete(path) for path in listed if replaces.fullmatch(path) and path not in files]
    # The operations remember what was uploaded, so that a further try only commits.
    commit = _insist(
        lambda: api.create_commit(
            **where, operations=operations, commit_message=message, revision=revision, create_pr=create_pr
        ),
        repo_id,
    )
    return commit.pr_url if create_pr else commit.commit_url


def check_access(repo_id: str, token: str | None = None) -> str:
    """Whether this token may write there, as far as can be known without writing. Returns the user's name.

    Raises:
        UserError: what is missing, and what to type.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id: expected user/name, found {repo_id!r}. {str(error).splitlines()[0]}") from error
    try:
        who = _insist(lambda: HfApi(token=token).whoami(), repo_id)
    except LocalTokenNotFoundError as error:
        raise UserError("expected a token of the Hub, found none. Type hf auth login, or export HF_TOKEN=…") from error
    auth = (who.get("auth") or {}).get("accessToken") or {}
    if auth.get("role") == "read":
        raise UserError(
            f"expected a token that may write, found {auth.get('displayName') or 'one'!s} of {who['name']}, which may only read. "
            "Make another on the Hub (Settings, Access Tokens), and type hf auth login."
        )
    owner = repo_id.split("/")[0] if "/" in repo_id else who["name"]
    names = [who["name"], *(org["name"] for org in who.get("orgs") or ())]
    if owner not in names:
        raise UserError(
            f"--repo_id {repo_id}: expected a name that begins with {' or '.join(f'{name}/' for name in names)}, since the "
            f"token is of {who['name']}; found {owner}/."
        )
    return who["name"]


def _insist(call, repo_id: str):
    """The result of a call to the Hub, after as many tries as it takes within reason."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except (LocalTokenNotFoundError, UserError):
            raise
        except OfflineModeIsEnabled as error:
            raise UserError(
                "expected a connection to the Hub, found offline mode. Type unset HF_HUB_OFFLINE, and push again."
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status in (401, 403, 404, 400, 422):
                raise UserError(_refused(status, repo_id, error)) from None
            hint = error.response.headers.get("Retry-After", "") if error.response is not None else ""
            wait, reason = float(hint) if hint.isdigit() else None, f"HTTP {status}"
        except Exception as error:
            if not _is_connection(error):
                raise
            wait, reason = None, f"{type(error).__name__}"
        if attempt == TRIES or (wait or 0) > LONGEST_WAIT_S:
            asked = f", and asks to wait {wait:.0f} s" if wait else ""
            raise PartialResult(
                f"{repo_id}: the Hub did not take it ({reason}{asked}). What was uploaded is kept there, and all is kept here.",
                again=True,
            )
        time.sleep(wait if wait is not None else random.uniform(0, min(30.0, 0.5 * 2**attempt)))
    raise AssertionError("unreachable")


def _refused(status: int, repo_id: str, error: HfHubHTTPError) -> str:
    said = " ".join((error.server_message or "").split())[:200]
    what = {
        401: "expected a token that the Hub knows, found one that it does not. Type hf auth login",
        403: "expected a token that may write there, found one that may not. Type hf auth login with another, or another --repo_id",
        404: "expected a repository or branch that exists and that the token may see, found none. Check the name",
    }.get(status, "the Hub refuses the request")
    return f"{repo_id}: {what}{f' ({said})' if said else ''}."


def _is_connection(error: Exception) -> bool:
    library = type(error).__module__.split(".")[0]
    return isinstance(error, (ConnectionError, TimeoutError)) or library in ("httpx", "httpx2", "httpcore", "requests")


def published(record):
    """A record without local paths: of a path only its last part is anybody's business."""
    if isinstance(record, dict):
        return {key: published(value) for key, value in record.items()}
    if isinstance(record, list):
        return [published(value) for value in record]
    return public_name(record) if isinstance(record, str) and len(record) < 1000 else record


# -- models -----------------------------------------------------------------------------------------------------------
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
        parts: of a LoRA run: `merged` (a plain `CLIPModel`), `adapter` (for peft), or `both`.
        with_inference_code: adds one file, with which `pipeline(…, trust_remote_code=True)` works without this library.
        license: of the model, e.g. `mit`, if the card cannot take it over from the base model.

    Returns:
        The address of the commit or pull request.

    Raises:
        UserError: the folder is no finished run; see `push_files`.
        PartialResult: see `push_files`.
    """
    files = model_files(folder, repo_id, parts=parts, with_inference_code=with_inference_code, license=license)
    options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    return push_files(files, repo_id, "model", "Model, class prototypes, results and card", **options)


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
        record = json.loads((folder / "mmft.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: expected the output folder of mmft-hf finetune, found no mmft.json that can be read. Type its path."
        ) from error
    if not record.get("completed"):
        raise UserError(
            f"{folder}: expected a finished run, found one that was cut. Finish it first: its command with "
            "--resume_from_checkpoint true."
        )
    missing = [name for name in ("config.json", "prototypes.safetensors", "README.md") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: expected {', '.join(missing)} in it, found none. Run mmft-hf finetune again.")
    adapter = sorted(p for p in (folder / "adapter").glob("*") if p.suffix in (".json", ".safetensors"))
    if parts not in ("merged", "adapter", "both"):
        raise UserError(f"--parts: expected merged, adapter or both, found {parts!r}.")
    if parts != "merged" and not adapter:
        raise UserError(f"--parts {parts}: expected the adapter of a LoRA run in {folder / 'adapter'}, found none.")
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and MODEL_FILES.fullmatch(path.name)
    }
    if parts == "adapter":
        files = {name: path for name, path in files.items() if not MERGED_WEIGHTS.fullmatch(name)}
        files |= {path.name: path for path in adapter}
    elif parts == "both":
        files |= {f"adapter/{path.name}": path for path in adapter}
    files["mmft.json"] = (json.dumps(published(record), indent=2) + "\n").encode()
    if with_inference_code:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = INFERENCE_FILE.removesuffix(".py")
        implementation = {"impl": f"{name}.MMFTImageClassificationPipeline", "pt": ["CLIPModel"], "type": "image"}
        config["custom_pipelines"] = {"mmft-image-classification": implementation}
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        files[INFERENCE_FILE] = Path(__file__).parent / "templates" / INFERENCE_FILE
    return files


INFERENCE_FILE = "mmft_inference.py"


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
    check_access(repo_id, token)
    with tempfile.TemporaryDirectory() as temporary:
        if not isinstance(folder, (str, Path)):
            folder = _written(folder, Path(temporary) / "whole")
        files = dataset_files(folder, repo_id, Path(temporary) / "captions", captions_only, license)
        message = "Captions" if captions_only else "Images with captions"
        return push_files(files, repo_id, "dataset", message, replaces=DATA_FILES, **options)


def dataset_files(
    folder: str | Path, repo_id: str, scratch: Path, captions_only: bool = False, license: str | None = None
) -> dict[str, Path | bytes]:
    """The files of a captioned data set, by their path in the repository (see `push_captioned_dataset`).

    Args:
        scratch: folder for what has to be made: a card that names the repository, captions without their images.
    """
    from datasets import Image, load_dataset

    from .captioning.card import PAGE, PICTURE, caption_card
    from .captioning.folder import RECORD_FILE, CaptionFolder
    from .captioning.tally import caption_statistics

    folder, record = Path(folder), CaptionFolder(folder).record()
    data_files = [folder / name for name in record.get("files", ()) if DATA_FILES.fullmatch(name)]
    if not data_files or not all(path.is_file() for path in data_files):
        raise UserError(
            f"{folder}: expected the output folder of mmft-hf caption, found no {RECORD_FILE} whose parquet files are all there. "
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
        files |= {name: folder / name for name in (PAGE, PICTURE) if (folder / name).is_file()}
        (scratch / "data").mkdir()
        for path in data_files:
            (scratch / "data" / path.name).touch()  # the card lists splits by file name
    details = {**published(record), **({"license": license} if license else {})}
    first = first.cast_column("image", Image(decode=False))
    card = caption_card(first, scratch, details, caption_statistics(first), repo_id, captions_only)
    files["README.md"] = card.read_bytes()
    files[RECORD_FILE] = (json.dumps({**details, "files": sorted(files)}, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _written(dataset, folder: Path) -> Path:
    """A data set in memory as a folder of `mmft-hf caption`."""
    from datasets import Dataset, DatasetDict

    from .captioning.dataset import CAPTION_FEATURES
    from .captioning.folder import CaptionFolder
    from .captioning.report import caption_report

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
    CaptionFolder(folder).write(splits, details, lambda path: caption_report(splits[first], path, details))
    return folder
