"""`AdaptedProcessor`: pictures become pixels, and texts become vectors of a caption encoder, for an `AdaptedCLIP`.

The caption encoder may be a language model of any size, so it is opened for texts whose vectors are not known yet, and for
nothing else. Texts of a training are encoded before it (`features.prepare_texts`); a classifier predicts without any.

Shapes: `n` texts, `d` size of the vectors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from ..core.builtin import builtin
from ..core.console import is_main
from ..core.errors import UserError
from ..core.files import TRUNK_FILES, TRUNK_FOLDER
from ..core.markdown import public_name
from ..core.reading import parse_json

if TYPE_CHECKING:
    from .caption_encoder import CaptionEncoder

logger = logging.getLogger(__name__)
BATCH_SIZE = 32


class TextTrunk:
    """The caption encoder of an `AdaptedCLIP`, and the vectors that are known.

    Args:
        source: a folder or Hub id that `CaptionEncoder.from_pretrained` opens, or the path of a GGUF file; or a caption encoder, which
            stays open.
        known_as: what the model's configuration says about the encoder that it was made with (see `describe`): another one is
            refused. None: the first one that is opened is taken.
        model: the folder or Hub repository of the model, whose folder `text_trunk` is the source; instead of `source`.
        revision: of that repository.
        allow_pickle: as in `load_model`.
    """

    def __init__(
        self,
        source: str | Path | CaptionEncoder | None = None,
        known_as: Mapping | None = None,
        model: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
    ):
        self._allow_pickle = allow_pickle
        self._source, self.known_as, self._model, self._revision = source, known_as, model, revision
        self._encoder: CaptionEncoder | None = None
        self._files: dict[str, bytes] = {}  # what `save_pretrained` of the encoder writes
        self._places: dict[str, tuple[int, int]] = {}  # of a text: the table of its vector, and the row there
        self._tables: list[tuple[Tensor, Tensor]] = []

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Vectors `(n, d)` in float32 of texts. The encoder is opened if one of them is new.

        Raises:
            UserError: the encoder is missing, or is not the one that the model was made with.
        """
        return self.encoded(texts)[0]

    def encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`vectors` of texts, and which of the texts the encoder truncated, bool `(n,)`."""
        if new := self.unknown(texts):
            encoder = self.open(len(new))
            for start in range(0, len(new), BATCH_SIZE):
                batch = new[start : start + BATCH_SIZE]
                self.keep(batch, *encoder.encode_batch(batch))
            self.close()
        found = [self._places[text] for text in texts]
        vectors, cut = ([self._tables[table][column][row] for table, row in found] for column in (0, 1))
        return torch.stack(vectors).float(), torch.stack(cut)

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The texts whose vectors are not known, each once, short ones first."""
        return sorted({text for text in texts if text not in self._places}, key=lambda text: (len(text), text))

    def keep(self, texts: Sequence[str], vectors: Tensor, cut: Tensor) -> None:
        """From now on the vectors `(n, d)` of these texts are known, in half precision, as the cache on disk has them.

        Args:
            cut: which of the texts were truncated, bool `(n,)`.
        """
        self._places.update((text, (len(self._tables), row)) for row, text in enumerate(texts))
        self._tables.append((vectors.detach().cpu().half(), cut.cpu()))

    def open(self, texts: int) -> CaptionEncoder:
        """The caption encoder; it says its name and size first.

        Args:
            texts: how many will be encoded, for that line.

        Raises:
            UserError: as for `vectors`.
        """
        if self._encoder is not None:
            return self._encoder
        if self._source is not None and not isinstance(self._source, (str, Path)):
            encoder = self._source
        else:
            encoder = self._loaded(texts)
        found = describe(encoder)
        if self.known_as and found["digest"] != self.known_as.get("digest"):
            raise UserError(
                f"text trunk {found['name']}: expected the caption encoder that the model was made with, found another one, or other "
                "settings of it (weights, LoRA, pooling, instruction). Restore the model's folder text_trunk, or the base model "
                f"that its {TRUNK_FILES[0]} names."
            )
        self.known_as, self._encoder = found, encoder
        return encoder

    def _loaded(self, texts: int) -> CaptionEncoder:
        place = str(self._source) if self._source is not None else self._own_folder()
        from .caption_encoder import CaptionEncoder  # here, because a classifier that predicts does without

        if is_main():
            known = self.known_as or {}
            size = f" ({parameters_shown(known['parameters'])})" if known.get("parameters") else ""
            logger.warning(
                "Opening the caption encoder %s%s to encode %s.",
                known.get("name") or public_name(place),
                size,
                "a text" if texts == 1 else f"{texts:,} texts",
            )
        try:
            return CaptionEncoder.from_pretrained(place, allow_pickle=self._allow_pickle)
        except UserError as error:
            if self._source is not None:
                raise
            raise UserError(
                f"{error} New texts need the caption encoder that the model was made with; pictures are classified without it, with "
                f"the classes that the model knows. Get the base model that {TRUNK_FOLDER}/{TRUNK_FILES[0]} names, or leave "
                "the new class names out."
            ) from error

    def _own_folder(self) -> str:
        """The folder `text_trunk` of the model, downloaded if that is a Hub repository."""
        place = Path(builtin(self._model)) / TRUNK_FOLDER
        if not Path(builtin(self._model)).is_dir():
            try:
                whole = snapshot_download(
                    self._model,
                    revision=self._revision,
                    allow_patterns=[f"{TRUNK_FOLDER}/{name}" for name in TRUNK_FILES],
                )
            except Exception as error:  # no network, no access, no such revision
                raise UserError(
                    f"model {self._model!r}: expected {TRUNK_FOLDER}/{TRUNK_FILES[0]}, which names the caption encoder that new "
                    f"texts need; it could not be downloaded ({type(error).__name__}). Pictures are classified without it: leave the "
                    "new class names out."
                ) from error
            place = Path(whole) / TRUNK_FOLDER
        if not (place / TRUNK_FILES[0]).is_file():
            raise UserError(
                f"model {self._model!r}: expected {TRUNK_FOLDER}/{TRUNK_FILES[0]}, which names the caption encoder that new texts "
                "need, found none. Pictures are classified without it, with the classes that the model knows: leave the new class "
                "names out, or restore the folder."
            )
        return str(place)

    def close(self) -> None:
        """Lets go of the encoder, and of its memory, until it is needed again."""
        if self._encoder is not None and not self._files:
            with tempfile.TemporaryDirectory() as folder:
                self._encoder.save_pretrained(folder)
                self._files = _read(Path(folder))
        self._encoder = None

    def _find_files(self) -> None:
        """Makes the files of the encoder known, of which a model that was loaded may have none."""
        if self._files:
            return
        if self._model is None:
            self.open(0)
            self.close()
            return
        try:
            self._files = _read(Path(self._own_folder()))
        except UserError as error:  # the classifier does without
            logger.warning("Note: the folder %s of the model is missing. %s", TRUNK_FOLDER, error)

    def record(self) -> dict:
        """What `caption_encoder.json` says; empty if it is missing."""
        self._find_files()
        return parse_json(self._files.get(TRUNK_FILES[0], b"{}"), TRUNK_FILES[0])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `text_trunk` into the folder of a model: what `CaptionEncoder.from_pretrained` opens, without the base model."""
        self._find_files()
        if not self._files:
            return
        place = Path(folder) / TRUNK_FOLDER
        place.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (place / name).write_bytes(content)


def _read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TRUNK_FILES if (folder / name).is_file()}


def parameters_shown(count: int) -> str:
    """`135 million parameters`."""
    return f"{count / 1e6:,.0f} million parameters" if count >= 1e6 else f"{count:,} parameters"


def describe(encoder: CaptionEncoder) -> dict:
    """What an `AdaptedCLIP` records about its caption encoder, in values that JSON can hold: its `name`, its number of
    `parameters`, and a `digest` of all that its vectors depend on, but for its place and the versions of libraries."""
    identity = encoder.identity()
    # The weights say what the base model is, wherever it lies.
    content = json.dumps({**identity, "versions": None, "base": None}, sort_keys=True, default=str)
    return {
        "name": public_name(str(identity["base"])),
        "parameters": encoder.parameters_count,
        "digest": hashlib.sha256(content.encode()).hexdigest(),
    }


class AdaptedProcessor:
    """Prepares pictures and texts for an `AdaptedCLIP`.

    Args:
        image_processor: that of the image tower.
        trunk: gives the vectors of texts.
    """

    def __init__(self, image_processor: BaseImageProcessor, trunk: TextTrunk):
        self.image_processor, self.trunk = image_processor, trunk

    def __call__(
        self, text: str | Sequence[str] | None = None, images=None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """`text_vectors` `(n, d)` and `pixel_values` `(B, 3, height, width)` of what is given."""
        found = {} if images is None else dict(self.image_processor(images, return_tensors=return_tensors))
        if text is not None:
            found["text_vectors"] = self.trunk.vectors([text] if isinstance(text, str) else list(text))
        return BatchFeature(found)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the image processor, and `text_trunk`."""
        self.image_processor.save_pretrained(folder)
        self.trunk.save_pretrained(folder)
