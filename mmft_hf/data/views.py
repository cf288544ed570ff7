"""Views of a dataset for a data loader: rows are read, cropped and given a text when they are needed."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image
from PIL import ImageOps
from torch.utils.data import Dataset as TorchDataset

from ..core.console import some
from ..core.errors import UserError
from .cache import DecodedPictures, Features
from .caption_sources import SOURCES, TEMPLATE
from .caption_weights import WEIGHTS
from .columns import check_plain, column_of, entries_of, with_values
from .images import BadImage, random_crop_box, read_image
from .labels import MISSING, ClassList, Labels, class_label, class_names_of, has_several, one_form
from .sampling import IGNORED, PADDING, generator
from .splits import captions_of
from .texts import DEFAULT_TEMPLATE, class_prompt, joined_class_names, training_text

logger = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning once: for example a bad picture is met again in every epoch."""
    logger.warning(message)


@dataclass(frozen=True)
class TextView:
    """Which texts an image may get, and which one it gets: a caption after the class template, or the template alone.

    Args:
        class_names: `C` names, in the order of the labels.
        templates: with `{}` for the class name; of several, one is drawn for each read.
        caption_dropout: probability of the class template alone instead of a caption; the mix `(("template", p),)`.
        seed: of all draws.
        windows: splits a caption, given the class prompt before it, into parts that the text tower reads whole; of several, one is
            drawn for each read. None: the caption stays whole.
        mix: names and probabilities of sources: `template`, and those that captions have by `caption_sources`; what is left to 1
            goes to all captions of the row alike. If the row has none of a source, the class template takes its place.

    A row is a mapping with `label`, a class or a list of classes, and, perhaps, `captions`, `caption_weights` (how much each of
    them counts) and `caption_sources` (see `data.caption_sources`). In a text of several classes, their
    names are joined.
    """

    class_names: Sequence[str]
    templates: str | Sequence[str] = DEFAULT_TEMPLATE
    caption_dropout: float = 0.0
    seed: int = 0
    windows: Callable[[str, str], Sequence[str]] | None = None
    mix: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        templates = (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)
        object.__setattr__(self, "templates", templates)
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.caption_dropout and not self.mix:
            object.__setattr__(self, "mix", ((TEMPLATE, self.caption_dropout),))

    def class_texts(self, label: int | Sequence[int]) -> list[str]:
        """The templates with the name of a class, or of several."""
        name = joined_class_names(self.class_names, label)
        return [class_prompt(template, name) for template in self.templates]

    def caption_texts(self, row: Mapping) -> list[tuple[str, ...]]:
        """Each caption of a row after each template: one text, or one for each of its windows."""
        captions, name = captions_of(row.get("captions")), joined_class_names(self.class_names, row["label"])
        return [
            tuple(training_text(template, name, part) for part in self._parts(template, name, caption))
            for template in self.templates
            for caption in captions
        ]

    def _parts(self, template: str, name: str, caption: str) -> Sequence[str]:
        return (caption,) if self.windows is None else self.windows(class_prompt(template, name), caption)

    def possible_texts(self, row: Mapping) -> list[str]:
        """Every text that `draw` may give to a row."""
        texts = [text for parts in self.caption_texts(row) for text in parts]
        return texts if texts and not self.mix else texts + self.class_texts(row["label"])

    def draw(
        self, row: Mapping, epoch: int, place: int, crop: Callable[[np.random.Generator], tuple] | None = None
    ) -> tuple[str, tuple | None, float]:
        """The text of a row in one epoch, what `crop` draws, and how much the text counts (the class template alone: 1): a
        function of (seed, epoch, place) alone.

        Args:
            place: number of the row in its dataset.
            crop: draws from the generator that also draws the caption, before it, and the template, after it.
        """
        # 1: a separate stream from the sampler's (seed, epoch).
        rng = generator(self.seed, epoch, place, 1)
        captions = captions_of(row.get("captions"))
        number = rng.integers(len(captions)) if captions else None
        if self.mix and captions:
            number = self._of_source(row, number, epoch, place)
        drawn = crop(rng) if crop else None
        template = self.templates[rng.integers(len(self.templates)) if len(self.templates) > 1 else 0]
        caption = None if number is None else captions[number]
        name = joined_class_names(self.class_names, row["label"])
        if caption and len(parts := self._parts(template, name, caption)) > 1:
            caption = parts[generator(self.seed, epoch, place, 4).integers(len(parts))]  # 4: a stream of its own
        weights = row.get(WEIGHTS)
        weight = 1.0 if number is None or weights is None else weights[number]
        return training_text(template, name, caption), drawn, weight

    def _of_source(self, row: Mapping, number: int, epoch: int, place: int) -> int | None:
        """The number of a caption of the drawn source: `number` if that is all captions; None for the class template."""
        # 2: another separate stream, so that every other draw is what it would be without a mix.
        rng, bit = generator(self.seed, epoch, place, 2), 1
        at = rng.random()
        for name, share in self.mix:
            if at < share:
                own = [] if name == TEMPLATE else [k for k, sources in enumerate(row[SOURCES]) if sources & bit]
                return own[rng.integers(len(own))] if own else None
            at -= share
            bit <<= name != TEMPLATE
        return number


def text_rows(dataset: Dataset) -> Iterator[dict]:
    """The labelled rows of a dataset as `TextView` takes them, without opening a picture."""
    captions = dataset["captions"][:] if "captions" in dataset.column_names else [None] * len(dataset)
    for label, value in zip(dataset["label"][:], captions, strict=True):
        if label != IGNORED:
            yield {"label": label, "captions": value}


def caption_counts(dataset: Dataset, texts: TextView) -> Counter[tuple[int, tuple[str, ...]]]:
    """How many rows of each class have each caption, as `TextView.caption_texts` gives it. It counts for all classes of its
    picture."""
    counts: Counter[tuple[int, tuple[str, ...]]] = Counter()
    for row in text_rows(dataset):
        for text in texts.caption_texts(row):
            counts.update((c, text) for c in (row["label"] if isinstance(row["label"], list) else [row["label"]]))
    return counts


class ImageView(TorchDataset):
    """Rows for evaluation: `image` (or `image_embeds`, `image_trunk`), `label`, `skipped`.

    The label is a class; or where pictures may have several, float32 `(C,)`, with 1 for each of them.

    Args:
        dataset: with columns `image` and `label`. A column `source_row` names a bad picture by its row in its own split.
        on_bad_image: `fail` raises `UserError` with the row's number; `skip` gives `image=None` with label -100, which
            the collator turns into a blank picture; it is left out of every metric and counted.
        name: of the split, for messages.
        short_side: of pictures as the decode cache keeps them (`cache.DecodedPictures`), in pixels; None: no such cache.
    """

    region = "whole"
    """What of each picture is shown. A subclass that shows a part overrides it and `_picture`."""

    def __init__(
        self, dataset: Dataset, on_bad_image: str = "fail", name: str = "evaluation", short_side: int | None = None
    ):
        wanted = ("image", "label", "captions", WEIGHTS, SOURCES, "source_row")
        columns = [name for name in wanted if name in dataset.column_names]
        # Undecoded: datasets would raise inside itself at a bad picture, without the row's number.
        self.rows = dataset.select_columns(columns).cast_column("image", Image(decode=False))
        self.on_bad_image = on_bad_image
        self.name = name
        self.short_side = short_side
        self._read = DecodedPictures(short_side).read if short_side else read_image
        self.features: Features | None = None
        self.key = "image"
        self.classes = len(class_names_of(dataset)) if has_several(dataset) else None
        # Rows held out of another split are named by their place there.
        split = str(dataset.split or "")
        self.split_name = "" if split in ("", name, name.removesuffix("ing")) else f" of split {split!r}"

    def __len__(self) -> int:
        return len(self.rows)

    def use_features(self, features: Features, part: str = "embeds") -> None:
        """From now on a row has `image_embeds` `(D,)` or, with `part="trunk"`, `image_trunk` `(H,)` instead of `image`, and no
        picture is opened."""
        self.features, self.key = features, f"image_{part}"
        self.rows = self.rows.remove_columns("image")

    def read(self, row: int) -> dict:
        """The row with its picture or embedding; None if it cannot be read and `on_bad_image` is `skip`."""
        values = self.rows[row]
        try:
            values[self.key] = self._picture(values["image"]) if self.features is None else self._embedding(row)
        except BadImage as error:
            path = (values.get("image") or {}).get("path")
            place = f"row {values.get('source_row', row)}{self.split_name}"
            where = f"{self.name} image, {place}{f' ({path})' if path else ''}"
            if self.on_bad_image == "fail":
                raise UserError(
                    f"{where} cannot be read: {error}. Repair or remove it, or type --on_bad_image skip."
                ) from error
            warn_once(f"{where} is skipped: {error}")
            values[self.key] = None
        return values

    def _picture(self, source):
        return self._read(source)

    def _embedding(self, row: int):
        if not self.features.flags[row]:
            raise BadImage("it could not be read when it was encoded")
        return self.features.embeds[row]

    def no_example(self) -> dict:
        """A row that stands for no image."""
        image = None if self.features is None else self.features.embeds.new_zeros(self.features.embeds.shape[1])
        return {self.key: image, "label": self._label(IGNORED)}

    def _label(self, label: int | list[int]) -> int | np.ndarray:
        """The class of a row; or where it may have several, float32 `(C,)` with 1 for each of them."""
        if self.classes is None:
            return label
        row = np.zeros(self.classes, dtype=np.float32)
        row[... if label == IGNORED else label] = IGNORED if label == IGNORED else 1
        return row

    def __getitem__(self, row: int) -> dict:
        values = self.read(row)
        if values[self.key] is None:
            return self.no_example() | {"skipped": 1}
        return {self.key: values[self.key], "label": self._label(values["label"]), "skipped": 0}


class TrainingView(ImageView):
    """Rows for training: `image`, `box`, `label`, `text`, `skipped`, as a function of (seed, epoch, row) alone; where the dataset
    has weights of its captions, `weight`, too.

    Indexed by `epoch * length + row`, which `EpochSampler` yields. With `on_bad_image="skip"` the next readable row takes
    the place of a bad one, so that batches keep their size in every process, and `skipped` counts the skipped rows. The
    sampler's `PADDING` gives a row with the label -100.

    Args:
        texts: which texts the images get. Its seed is that of the crops, too.
        crop_min_area: smallest share of the area that a random crop keeps; 1 means no random crop.
        horizontal_flip: whether half of the reads, drawn at random, are mirrored.
        on_bad_image, short_side: see `ImageView`.
    """

    def __init__(
        self,
        dataset: Dataset,
        texts: TextView,
        crop_min_area: float = 0.9,
        on_bad_image: str = "fail",
        short_side: int | None = None,
        horizontal_flip: bool = False,
    ):
        super().__init__(dataset, on_bad_image, "training", short_side)
        self.texts = texts
        self.crop_min_area = crop_min_area
        self.horizontal_flip = horizontal_flip
        self.text_features: tuple[dict[str, int], Features] | None = None
        self.text_key = "text"
        self.weighted = WEIGHTS in self.rows.column_names

    def use_text_features(self, positions: dict[str, int], features: Features, part: str = "embeds") -> None:
        """From now on a row has `text_embeds` `(D,)` or, with `part="trunk"`, `text_trunk` `(H,)` instead of `text`, and `cut`
        says whether the text was truncated.

        Args:
            positions: the row of `features` of every text that can be drawn.
        """
        self.text_features, self.text_key = (positions, features), f"text_{part}"

    def _text(self, text: str) -> dict:
        if self.text_features is None:
            return {"text": text}
        positions, features = self.text_features
        return {self.text_key: features.embeds[positions[text]], "cut": bool(features.flags[positions[text]])}

    def _no_text(self) -> dict:
        weight = {"weight": 1.0} if self.weighted else {}
        if self.text_features is None:
            return {"text": "", **weight}
        embeds = self.text_features[1].embeds
        return {self.text_key: embeds.new_zeros(embeds.shape[1]), "cut": False, **weight}

    def __getitem__(self, key: int) -> dict:
        if key == PADDING:
            return self.no_example() | {"box": None, "skipped": 0} | self._no_text()
        epoch, row = divmod(key, len(self))
        for skipped in range(len(self)):
            values = self.read((row + skipped) % len(self))
            if values[self.key] is not None:
                break
        else:
            raise UserError("none of the training images can be read.")
        if values["label"] == IGNORED:
            return self.no_example() | {"box": None, "skipped": skipped} | self._no_text()
        image = values[self.key]
        crop = None
        if self.crop_min_area < 1:
            crop = functools.partial(random_crop_box, *image.size, self.crop_min_area)
        text, box, weight = self.texts.draw(values, epoch, row, crop)
        if self.horizontal_flip and generator(self.texts.seed, epoch, row, 8).random() < 0.5:  # 8: a stream of its own
            image = ImageOps.mirror(image)
        label = self._label(values["label"])
        counting = {"weight": weight} if self.weighted else {}
        return {self.key: image, "box": box, "label": label, "skipped": skipped} | self._text(text) | counting


def check_dataset(name: str, dataset: Dataset, class_names: list[str] | None = None) -> Dataset:
    """The dataset, its labels as numbers of the class names of the training.

    Args:
        name: of the argument, for messages.
        class_names (*optional*): of the training. Labels are matched by name. Default: the dataset's own.

    Raises:
        UserError: no `Dataset` of rows as they are stored; no image or label; labels without class names, another class, or a
            row without a class. Rows labelled -100 are left out by the training.
    """
    check_plain(name, dataset)
    for column in ("image", "label"):
        if column not in dataset.column_names:
            raise UserError(
                f"{name}: expected columns image and label, found {', '.join(dataset.column_names)}. Use "
                "mmft_hf.load_captioned_dataset(…), or dataset.rename_columns({…})."
            )
    kind = class_label(dataset.features["label"])
    if kind is None:
        raise UserError(
            f"{name}: expected labels with class names (ClassLabel), found {dataset.features['label']}. Use "
            "mmft_hf.load_captioned_dataset(…), or dataset.class_encode_column('label')."
        )
    if has_several(dataset):
        return _check_lists(name, dataset, kind.names, class_names)
    codes = pc.fill_null(column_of(dataset, "label"), MISSING).to_numpy()
    wrong = np.flatnonzero(((codes < 0) & (codes != IGNORED)) | (codes >= len(kind.names)))
    if len(wrong):
        found = "no label" if codes[wrong[0]] == MISSING else f"the label {codes[wrong[0]]}"
        raise UserError(
            f"{name}, row {wrong[0]}: expected a class from 0 to {len(kind.names) - 1}, found {found} ({len(wrong):,} such rows). "
            f"Leave such rows out: dataset.filter(lambda label: 0 <= label < {len(kind.names)}, input_columns='label')."
        )
    if class_names is None or kind.names == class_names:
        return dataset
    known = {one_form(name): number for number, name in enumerate(class_names)}
    table = np.array([known.get(one_form(own), MISSING) for own in kind.names])
    used = np.unique(codes[codes != IGNORED])
    if (table[used] == MISSING).any():
        other = [kind.names[code] for code in used if table[code] == MISSING]
        raise UserError(
            f"{name}: expected the classes of train_dataset ({some(class_names)}), found others: {some(other)}. Rename them, or leave "
            "their rows out."
        )
    codes = np.where(codes == IGNORED, IGNORED, table[codes])
    return with_values(dataset, "label", pa.array(codes), ClassLabel(names=class_names))


def _check_lists(name: str, dataset: Dataset, own: list[str], class_names: list[str] | None) -> Dataset:
    """`check_dataset` of pictures that may have several labels."""
    entries, _, row_of = entries_of(column_of(dataset, "label"))
    codes, missing = pc.fill_null(entries, MISSING).to_numpy(), np.flatnonzero(column_of(dataset, "label").is_null())
    wrong = np.flatnonzero((codes < 0) | (codes >= len(own)))
    if len(missing) or len(wrong):
        row, found = (missing[0], "no list") if len(missing) else (row_of[wrong[0]], f"the label {codes[wrong[0]]}")
        raise UserError(
            f"{name}, row {row}: expected a list of classes from 0 to {len(own) - 1}, found {found}. Correct the row, or leave it "
            "out; an empty list says that no class holds."
        )
    if class_names is None or own == class_names:
        return dataset
    labels = Labels(codes, own, True, name, row_of, np.ones(len(dataset), dtype=bool))
    values, kind = labels.column(labels.under(ClassList.of_names(class_names)), class_names)
    return with_values(dataset, "label", values, kind)
