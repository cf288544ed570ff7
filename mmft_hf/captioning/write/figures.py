"""The figures by which captions are compared before and after: for the console, the page and the card."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from datasets import Dataset

from ...data.sentences import sentences_of
from ..judge.checks import SharedTexts
from ..judge.wording import FUNCTION_WORDS, words_of
from ..types import ACCEPTED, DROPPED, REPLACED

FIGURES = {
    "captions": "captions",
    "captions_per_image": "captions per image",
    "images_without_caption": "images without a caption",
    "words": "words per caption",
    "words_per_sentence": "words per sentence",
    "content_words": "words per caption without articles, prepositions and the like",
    "distinct_words": "different ones of these per image",
    "distinct_1": "different words, as a share of all words",
    "distinct_2": "different pairs of words, as a share of all pairs",
    "shared_texts": "texts shared by several images",
}

VENDI = "different captions of a class (Vendi score, at equal numbers)"


def accepted(record: Mapping, before: bool = False) -> bool:
    """Whether a record is a caption; `before`: whether it was one before any step. Texts that steps wrote have parents."""
    if not record["text"]:
        return False
    if before:
        return record["status"] in (*ACCEPTED, DROPPED, REPLACED) and record.get("parents") is None
    return record["status"] in ACCEPTED


def as_before(records: Sequence[Mapping]) -> list[dict]:
    """The captions of an image as they were before steps."""
    return [{**record, "status": "ok"} for record in records if accepted(record, before=True)]


def caption_figures(images: Iterable[tuple[str | None, Sequence[Mapping]]], before: bool = False) -> dict:
    """The figures that a comparison shows, by the keys of `FIGURES`, and `scores`: mean and number by name.

    Args:
        images: sha256 and caption records of each image.
        before: count the captions that steps dropped or replaced, and not those that they wrote.
    """
    count, captions, without, words, pairs = 0, 0, 0, Counter(), Counter()
    sentences, content, different = 0, 0, 0
    shared, sums = SharedTexts(), defaultdict(lambda: [0.0, 0])
    for image, records in images:
        own = list({record["text"]: record for record in records if accepted(record, before)}.values())
        count, captions, without, names = count + 1, captions + len(own), without + (not own), set()
        for record in own:
            if image:
                shared.add(image, record["text"])
            said = words_of(record["text"])
            words.update(said)
            pairs.update(pairwise(said))
            sentences += len(sentences_of(record["text"]))
            telling = [word for word in said if word.isalnum() and word not in FUNCTION_WORDS]
            content += len(telling)
            names.update(telling)
            for score in record.get("scores") or ():
                total = sums[score["name"]]
                total[0], total[1] = total[0] + score["value"], total[1] + 1
        different += len(names)
    return {
        "captions": captions,
        "captions_per_image": round(captions / count, 2) if count else None,
        "images_without_caption": without,
        "words": round(words.total() / captions, 2) if captions else None,
        "words_per_sentence": round(words.total() / sentences, 2) if sentences else None,
        "content_words": round(content / captions, 2) if captions else None,
        "distinct_words": round(different / (count - without), 2) if captions else None,
        "distinct_1": round(len(words) / words.total(), 4) if words else None,
        "distinct_2": round(len(pairs) / pairs.total(), 4) if pairs else None,
        "shared_texts": len(shared.keys),
        "scores": {name: {"mean": round(s / n, 6), "captions": n} for name, (s, n) in sums.items()},
    }


def own_figures(dataset: Dataset) -> dict:
    """`caption_figures` of a dataset `before` and `after` the steps that its records tell of."""
    rows = dataset.select_columns(["image_sha256", "caption_records"])

    def images() -> Iterator[tuple[str | None, Sequence[Mapping]]]:
        for batch in rows.iter(200):
            records = (own or () for own in batch["caption_records"])
            yield from zip(batch["image_sha256"], records, strict=True)

    return {"before": caption_figures(images(), before=True), "after": caption_figures(images())}


def figure_rows(before: Mapping, after: Mapping) -> list[tuple[str, str, str]]:
    """Name, value before and value after, as text, for console, page and card."""
    # Folders of earlier versions lack some figures.
    known = {key: words for key, words in FIGURES.items() if key in before or key in after}
    rows = [(words, _text(before.get(key)), _text(after.get(key))) for key, words in known.items()]
    if None not in (before.get("vendi"), after.get("vendi")):
        rows.append((VENDI, _text(before["vendi"]), _text(after["vendi"])))
    for name in dict.fromkeys([*before["scores"], *after["scores"]]):
        found = [side["scores"].get(name, {"mean": None})["mean"] for side in (before, after)]
        rows.append((f"mean {name}", *map(_text, found)))
    measured = [side.get("metrics") or {} for side in (before, after)]
    rows += [
        (label, *(_text(side.get(label)) for side in measured)) for label in dict.fromkeys([*measured[0], *measured[1]])
    ]
    return rows


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
