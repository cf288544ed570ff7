"""The interface of a head, and its file: `head.safetensors`.

Shapes: `C` classes, `D` embedding size, `B` images per batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from ...core.arguments import Range
from ...core.console import some
from ...core.errors import UserError
from ...core.files import ADAPTER_FILES, HEAD_FILE, PROTOTYPES_FILE, atomic_write
from ...core.reading import check_regular, parse_json, refuse_pointers
from ...core.schema import ClassNames, conform
from ...model.loading import embedding_size

FORMAT = "mmft-head-1"
REMEDY = "Copy the file again, or save the classifier again."
Positive = Annotated[float, Range(0, open=("low",))]
DECISION = 0.5  # a class holds from this score on, where a picture may have several labels, unless `reject_below` says otherwise
UNKNOWN = "unknown"  # the answer to a picture whose best class has a probability below `reject_below`


@dataclass(kw_only=True)
class Answers:
    """The fields that all heads have.

    Args:
        temperature: divides the logits; above 1 it makes probabilities less certain.
        reject_below: a picture whose best class has a lower probability is answered `unknown`; None: each gets a class. With
            several labels: a class holds from this probability on; None: from 0.5 on.
        fitted: how the head was fitted and calibrated, by name.
        several_labels: each class is decided by itself, so that a picture may have several, or none.
        offsets (`(C,)`, *optional*): added to the logits after the temperature. Several labels need them, since their scores are
            compared with a threshold.
        thresholds (`(C,)`, *optional*): with several labels, the probability from which on each class holds, in place of one for all.
    """

    temperature: Positive = 1.0
    reject_below: Annotated[float, Range(0, 1)] | None = None
    fitted: dict = field(default_factory=dict)
    several_labels: bool = False
    offsets: Tensor | None = None
    thresholds: Tensor | None = None


class Head(Answers):
    """Turns unit-norm image embeddings into class logits.

    Each kind of head is a dataclass in its own file, imported in `heads/__init__.py`. It sets `kind`, has a field
    `class_names` (`C` names, in the order of the logits) and defines `raw_logits`. All of its fields are saved: tensors as
    tensors, the others as JSON in the file's metadata. When a file is read, each field must have the type that its
    annotation states (see `core.schema`), and each tensor must be finite.

    `formula` gives the raw logits of embeddings `x` as a Python expression of the fields. It is optional: the code that is
    published for use without this library contains it.
    """

    kind: ClassVar[str]
    formula: ClassVar[str | None] = None
    class_names: list[str]

    @property
    def about(self) -> str:
        """What the head is, in a few words, for a line that is printed."""
        return f"{self.kind} head"

    def raw_logits(self, image_embeds: Tensor) -> Tensor:
        """`(B, C)` logits of unit-norm image embeddings `(B, D)`, before the temperature."""
        raise NotImplementedError

    def logits(self, image_embeds: Tensor) -> Tensor:
        """`(B, C)` logits of unit-norm image embeddings `(B, D)`; their softmax gives the probabilities, with several labels
        their sigmoid."""
        logits = self.raw_logits(image_embeds) / self.temperature
        return logits if self.offsets is None else logits + self.offsets.to(logits.device)

    @property
    def decision(self) -> float | np.ndarray:
        """With several labels: the probability from which a class holds, one for all or of each class, float32 `(C,)`."""
        if self.thresholds is not None:
            return self.thresholds.float().cpu().numpy()
        return DECISION if self.reject_below is None else self.reject_below

    def rejecting(self, reject_below: float | None) -> Head:
        """This head with another threshold, which is also that of all classes; with None as it is.

        Raises:
            UserError: it is not a probability, or a class has the name of the answer to rejected pictures.
        """
        if reject_below is not None and reject_below not in Range(0, 1):
            raise UserError(f"--reject_below: expected a probability from 0 to 1, found {reject_below!r}.")
        if reject_below is not None and not self.several_labels:
            check_unknown(self.class_names)
        thresholds = self.thresholds if reject_below is None else None
        return replace(self, reject_below=reject_below, thresholds=thresholds)

    def scores(self, image_embeds: Tensor) -> Tensor:
        """`(B, C)` probabilities of unit-norm image embeddings `(B, D)`; with several labels, that each class holds."""
        return self.probabilities(self.logits(image_embeds))

    def probabilities(self, logits: Tensor) -> Tensor:
        """`(B, C)` probabilities of logits `(B, C)`."""
        return logits.float().sigmoid() if self.several_labels else logits.float().softmax(dim=1)

    def check_model(self, model: PreTrainedModel, name: str) -> None:
        """Raises `UserError` unless this head fits the model: its embedding size, and its classes if it names any."""
        size, classes = embedding_size(model), len(self.class_names)
        try:
            shape = tuple(self.logits(torch.zeros(1, size)).shape)
        except (RuntimeError, IndexError):  # how torch refuses a product of matrices that do not fit
            shape = None
        own = self.thresholds is None or self.thresholds.shape == (classes,)
        if shape != (1, classes) or not own:
            tensors = {f.name: getattr(self, f.name) for f in fields(self)}
            found = [f"{key} {tuple(value.shape)}" for key, value in tensors.items() if isinstance(value, Tensor)]
            raise UserError(
                f"{name!r}: expected a head for the model's embedding size {size} and for {classes} classes, found "
                f"{', '.join(found)} in {HEAD_FILE}: it belongs to another model. Run mmft-hf finetune again, or take both "
                "files from one run."
            )
        given = [label for _, label in sorted((model.config.id2label or {}).items())]
        unnamed = given == [f"LABEL_{i}" for i in range(len(given))]
        if not unnamed and given != list(self.class_names):
            raise UserError(
                f"{name!r}: expected a head for the model's {len(given)} classes {some(given)}, found {classes} classes in "
                f"{HEAD_FILE}: {some(self.class_names)}. Take config.json and {HEAD_FILE} from one run."
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `head.safetensors`, and removes a `prototypes.safetensors` of another head. Returns the file's path."""
        path = Path(folder) / HEAD_FILE
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.to_bytes())
        path.with_name(PROTOTYPES_FILE).unlink(missing_ok=True)
        return path

    def to_bytes(self) -> bytes:
        """The content of `head.safetensors`."""
        tensors, metadata = {}, {"format": FORMAT, "kind": self.kind}
        for known in fields(self):
            value = getattr(self, known.name)
            if isinstance(value, Tensor):
                tensors[known.name] = value.detach().cpu().contiguous()
            else:
                metadata[known.name] = json.dumps(value, ensure_ascii=False)
        return save(tensors, metadata)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, revision: str | None = None, **hub) -> Head:
        """Reads a head of this kind from a folder, or from a model repository on the Hub.

        Args:
            revision: branch, tag or commit of the repository.
            hub: `token`, `cache_dir`, `local_files_only`, as in huggingface_hub.

        Raises:
            UserError: there is no head, or one of another kind.
        """
        return cls.from_file(find_head(folder_or_hub_id, revision, **hub))

    @classmethod
    def from_file(cls, path: Path) -> Head:
        """Reads a `head.safetensors` of this kind."""
        metadata, tensors = read(path)
        kind = metadata.get("kind")
        if kind != cls.kind:
            raise UserError(f"{path}: expected a head of kind {cls.kind}, found {kind!r}.")
        texts = {key: value for key, value in metadata.items() if key not in ("format", "kind")}
        settings = {key: parse_json(value, f"{path}, field {key}", Any, REMEDY) for key, value in texts.items()}
        return cls.from_parts(path, tensors | settings)

    @classmethod
    def from_parts(cls, path: Path, parts: dict[str, Any]) -> Head:
        """A head from its fields as they were read, checked; errors name the file."""
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(parts.keys() - known):
            raise UserError(
                f"{path}: expected the parts {', '.join(sorted(known))} of a {cls.kind} head, found also "
                f"{some([name[:40] for name in unknown])}: a newer mmft_hf wrote it. Type pip install --upgrade mmft_hf."
            )
        required = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
        if missing := sorted(required - parts.keys()):
            raise UserError(
                f"{path}: expected the parts of a {cls.kind} head, found a damaged file without {', '.join(missing)}. {REMEDY}"
            )
        types = get_type_hints(cls, include_extras=True)
        for name, value in parts.items():
            conform(value, types[name], f"{path}, {name}", REMEDY)
            if isinstance(value, Tensor) and not (value.is_floating_point() and value.isfinite().all()):
                found = "others" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
                raise UserError(f"{path}, {name}: expected finite floating-point numbers, found {found}. {REMEDY}")
        conform(parts["class_names"], ClassNames, f"{path}, class_names", REMEDY)
        return cls(**parts)


def check_unknown(class_names: Sequence[str]) -> None:
    """Raises `UserError` if a class has the name of the answer to rejected pictures."""
    if UNKNOWN in class_names:
        raise UserError(
            f"--reject_below: expected classes of other names, found a class named {UNKNOWN!r}, which is the answer to a "
            "rejected picture. Rename the class, or type neither --reject_below nor --reject_for_accuracy."
        )


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    check_regular(path)
    refuse_pointers(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:  # of the header, or of a tensor
        found = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: expected a classifier's head, found a damaged file ({found}). {REMEDY}") from error


def find_head(folder_or_hub_id: str | Path, revision: str | None = None, **hub) -> Path:
    """The file of the head in a folder or Hub repository: `head.safetensors`, else that of version 0.1.

    Raises:
        UserError: there is none, or the repository cannot be read.
    """
    name = str(folder_or_hub_id)
    if Path(name).is_dir():
        found = [path for file in (HEAD_FILE, PROTOTYPES_FILE) if (path := Path(name) / file).is_file()]
        if found:
            return found[0]
        raise UserError(_no_head(name))

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(name, HEAD_FILE, revision=revision, **hub))
        except EntryNotFoundError:  # also offline, where the cache has only the other file
            return Path(hf_hub_download(name, PROTOTYPES_FILE, revision=revision, **hub))
    except RemoteEntryNotFoundError as error:
        raise UserError(_no_head(name)) from error
    except Exception as error:  # no such repository, offline, no access, a full disk
        raise UserError(
            f"{name!r}: expected a folder, or a repository that can be read; {str(error).strip().splitlines()[0]}"
        ) from error


def _no_head(name: str) -> str:
    local = Path(name).is_dir()
    if local and (Path(name) / ADAPTER_FILES[0]).is_file():
        return (
            f"{name!r}: expected a folder with {HEAD_FILE}, found a LoRA adapter alone. Type the --output_dir of its run, which has the "
            "merged model and its head."
        )
    folder = name if local else "FOLDER"
    code = f"m.ClassPrototypes.from_templates(*m.load_model({folder!r}), ['cat', 'dog']).save_pretrained({folder!r})"
    steps = [] if local else [f"hf download {name} --local-dir {folder}"]
    return "\n  ".join(
        [
            f"{name!r}: expected a folder or Hub repository with {HEAD_FILE} or {PROTOTYPES_FILE}, which `mmft-hf finetune` "
            "writes to its --output_dir; found neither. Run mmft-hf finetune first, or make a classifier from class names "
            f"alone, for use with --model_name_or_path {folder}:",
            *steps,
            f'python -c "import mmft_hf as m; {code}"',
        ]
    )
