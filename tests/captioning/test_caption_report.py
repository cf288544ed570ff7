"""The caption report and the card: their figures are right, and nothing that a model wrote becomes markup."""

import html.parser
import itertools
import json
import re
import statistics as reference

import pytest
import yaml
from caption_records import DETAILS, MIXED, captioned, record
from datasets import Image, load_dataset
from PIL import Image as PILImage
from tiny_clip import COLOURS

from mmft_hf.captioning.write.card import caption_card
from mmft_hf.captioning.write.report import caption_report
from mmft_hf.captioning.write.statistics import CaptionStatistics
from mmft_hf.commands.caption.printing import print_folder


class Page(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_figures_against_an_independent_count():
    dataset = captioned(MIXED)
    found = CaptionStatistics(dataset).figures
    assert json.loads(json.dumps(found)) == found
    records = list(itertools.chain(*MIXED))
    good = [r for r in records if r["status"] in ("ok", "trimmed")]
    assert found["images"] == found["distinct_images"] == 5 and found["images_without_caption"] == 1
    assert found["captions"] == len(good) == 5 and found["asked_again"] == 1
    assert found["statuses"] == {
        "ok": 4, "trimmed": 1, "refused": 1, "rejected": 1, "failed": 1, "empty": 1, "not_run": 1
    }  # fmt: skip
    assert found["failures"] == {
        "refused": 1, "failed": 1, "rejected: label_contradicted": 1, "empty: thinking_budget": 1, "not_run": 1
    }  # fmt: skip
    assert found["tokens_in"] == 100 * len(records) and found["tokens_out"] == sum(r["tokens_out"] for r in records)
    assert found["attempts"] == sum(r["attempts"] for r in records)
    for aspect in ("visual", "shape", None):
        own = [r for r in records if aspect in (None, r["aspect"])]
        texts = [r for r in own if r in good]
        counts = found["aspects"][aspect] if aspect else found["all"]
        assert counts["answers"] == sum(r["status"] not in ("failed", "not_run") for r in own)
        assert counts["captions"] == len(texts)
        assert counts["mentions_label"] == sum(r["mentions_label"] for r in texts)
        assert counts["trimmed"] == sum(r["status"] == "trimmed" for r in texts)
        words = [len(r["text"].split()) for r in texts]
        assert counts["words"]["median"] == reference.median(words) and counts["words"]["max"] == max(words)
        assert counts["words"]["mean"] == pytest.approx(reference.mean(words), abs=0.01)
        assert counts["clip_tokens"]["median"] == reference.median(r["clip_tokens"] for r in texts)
        for check, number in counts["checks"].items():
            assert number == sum(check in r["checks"] for r in own), (aspect, check)


def test_the_95th_percentile():
    texts = [" ".join(["word"] * n) for n in range(1, 102)]
    found = CaptionStatistics(captioned([[record(text=text)] for text in texts])).figures
    assert found["all"]["words"] == {"mean": 51.0, "median": 51.0, "p95": 96.0, "max": 101}


def test_overlap_and_duplicates():
    found = CaptionStatistics(captioned(MIXED)).figures
    # {a, red, thing, round} and {a, round, red, thing, indeed}
    assert found["overlap"] == [{"aspects": ["shape", "visual"], "jaccard": 0.8}]
    assert found["duplicates"] == {"texts": 1, "captions": 2}  # they differ only in case and spaces
    same = captioned([[record(), record("shape")]])
    assert CaptionStatistics(same).figures["duplicates"] == {"texts": 0, "captions": 0}


def test_classes_with_the_fewest_captions_come_first():
    classes = CaptionStatistics(captioned(MIXED)).figures["classes"]
    assert classes["with_images"] == 3 and classes["without_caption"] == 0
    assert classes["fewest"] == [
        {"label": "green thing", "images": 2, "captions": 1},
        {"label": "blue thing", "images": 1, "captions": 1},
        {"label": "red thing", "images": 2, "captions": 3},
    ]


def test_the_page_shows_the_figures(tmp_path):
    path = caption_report(CaptionStatistics(captioned(MIXED)), tmp_path, DETAILS)
    assert path == tmp_path / "captions.html"
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.words)
    for expected in (
        "Captions of someone/colours", "split train · tiny/vlm · 20260101T000000Z · 3 captions are missing",
        "a round red thing indeed", "rejected: label_contradicted", "1 answers were asked for again",
        "Describe this [class name] & its ```look```",
    ):  # fmt: skip
        assert expected in text, expected
    with PILImage.open(tmp_path / "captions.png") as picture:
        assert picture.width > 600


def test_console_page_and_card_show_the_same_figures(tmp_path, capsys):
    found = CaptionStatistics(captioned(MIXED))
    page = caption_report(found, tmp_path, DETAILS).read_text(encoding="utf-8")
    card = caption_card(found, DETAILS)
    print_folder(tmp_path, found)
    printed = capsys.readouterr().out
    assert list(found.headline().values()) == [
        "5", "1", "5", "1.00", "100.0 %", "20.0 %", "26", "22.2 %", "1", "1"
    ]  # fmt: skip
    for label, text in found.headline().items():
        assert f"<b>{text}</b><span>{label}</span>" in page and f"| {label} | {text} |" in card
        assert re.search(rf"\n  {label} +{text}\n", printed), label
    assert "not accepted" in printed and "1 refused, 1 rejected, 1 failed, 1 empty, 1 not_run" in printed


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = Page(caption_report(CaptionStatistics(captioned(MIXED)), tmp_path, DETAILS).read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "form"} & {tag for tag, _ in page.tags}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


EVIL = "<script>alert('x')</script>\"><img src=x onerror=y> & ${title} $body |`code`"


def test_nothing_that_others_wrote_becomes_markup(tmp_path):
    names = ["red" + EVIL, "green thing", "blue thing"]
    records = [
        [
            record(EVIL, f"a {EVIL}", model=EVIL, prompt_id=EVIL),
            record("shape", None, f"failed{EVIL}", [EVIL], finish_reason=EVIL),
        ]
        for _ in range(3)
    ]
    details = {
        "made_from": {"dataset_name": EVIL, "split": EVIL},
        "model": EVIL,
        "run_id": EVIL,
        "prompt_texts": {EVIL: EVIL},
        "spent": {EVIL: EVIL},
        "last_run": {EVIL: EVIL, "failures": {EVIL: 1}},
    }
    dataset = captioned(records, names)
    path = caption_report(CaptionStatistics(dataset), tmp_path, details, rejected_text=lambda row, place: EVIL)
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(attrs["src"].startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert sum(EVIL in word for word in page.words) > 12  # and it is all readable

    card = caption_card(CaptionStatistics(dataset), details)
    outside = re.sub(r"(`{3,})\w+\n.*?\n\1|`[^`\n]*`", "", card.split("---\n", 2)[2], flags=re.DOTALL)
    assert "<script" not in outside and "<img" not in outside
    assert yaml.safe_load(card.split("---\n")[1])["pretty_name"] == f"Captions of {EVIL}"


def test_a_broken_image_breaks_nothing_else(tmp_path):
    dataset = captioned(MIXED)
    images = dataset.cast_column("image", Image(decode=False))["image"]
    images = [{"bytes": b"no picture", "path": None}, {"bytes": None, "path": "/no/such/file.png"}, *images[2:]]
    path = caption_report(CaptionStatistics(captioned(MIXED, images=images)), tmp_path, DETAILS)
    text = path.read_text(encoding="utf-8")
    assert "cannot be read" in text and "data:image/jpeg" in text and (tmp_path / "captions.png").exists()


@pytest.mark.parametrize(
    "records",
    [
        [],
        [[], [], []],
        [[record(text=None, status="empty", checks=["empty"], model=None)]],
        [[record(text=None, status="bad_image", checks=[], tokens_in=None, tokens_out=None, attempts=None)]],
        [[record(text="one", clip_tokens=None)]],
    ],
)
def test_without_captions(tmp_path, records):
    dataset = captioned(records)
    found = CaptionStatistics(dataset).figures
    assert found["captions"] == sum(r["status"] == "ok" for own in records for r in own)
    assert caption_report(CaptionStatistics(dataset), tmp_path, {}).exists()
    assert "# Captions" in caption_card(CaptionStatistics(dataset), {})


def test_images_are_not_read_for_the_figures(monkeypatch):
    """Rows hold a path that does not exist: reading any picture would fail."""
    images = [{"bytes": None, "path": "/no/such/file.png"}] * 5
    assert CaptionStatistics(captioned(MIXED, images=images)).figures["images"] == 5


def test_the_draw_of_samples_is_seeded(tmp_path):
    dataset = captioned([[record(text=f"a red thing no {i}")] for i in range(60)])
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pages.append(caption_report(CaptionStatistics(dataset), tmp_path / name, DETAILS).read_bytes())
    assert pages[0] == pages[1]


def test_texts_of_answers_that_were_not_accepted_can_be_shown(tmp_path):
    path = caption_report(
        CaptionStatistics(captioned(MIXED)),
        tmp_path,
        DETAILS,
        rejected_text=lambda row, place: f"row {row} place {place}",
    )
    assert "row 3 place 2" in path.read_text(encoding="utf-8")


# -- the card ---------------------------------------------------------------------------------------------------------
def card_of(dataset, details=DETAILS):
    text = caption_card(CaptionStatistics(dataset), details)
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_card_of_machine_made_captions():
    front, text = card_of(captioned(MIXED))
    assert front["language"] == ["en"] and front["annotations_creators"] == ["machine-generated"]
    assert front["task_categories"] == ["image-classification"] and front["size_categories"] == ["n<1K"]
    assert "synthetic-captions" in front["tags"] and "license" not in front
    assert "5 captions for 5 images of someone/colours in 3 classes, written by `tiny/vlm`." in text
    assert "Describe this [class name] & its ```look```" in text and "told the label" in text
    assert (
        "| `label_contradicted` | the text denies the label | 1 |" in text and "cost of the last run: 0.25 USD" in text
    )
    assert "$" not in text and "None" not in text and "TODO" not in text


def test_the_card_of_peoples_own_texts(tmp_path):
    details = {"made_from": {"dataset_name": str(tmp_path)}, "license": "mit"}
    front, text = card_of(captioned([[record(model="columns")]]), details)
    assert (
        "annotations_creators" not in front and "synthetic-captions" not in front["tags"] and front["license"] == "mit"
    )
    assert "No model wrote any of the texts." in text and "told the label" not in text
    assert str(tmp_path.parent) not in text


def test_the_card_of_refined_captions_tells_who_wrote_which():
    step = {
        "name": "verify",
        "options": {},
        "about": "judges",
        "follows": None,
        "differs": None,
        "before": 1,
        "after": 1,
    }
    step |= {"unscored": 1, "dropped": {}, "roles": ["judge"], "sees_label": False}
    step["asked"] = dict.fromkeys(("answered", "unsure", "unparsable", "refused", "failed"), 0)
    step["asked"] |= {"questions": 1, "calls": 1, "cost_usd": None}
    own, new = record(model="columns", checks=["contradicted"]), record(sample=1, text="a new text", model="tiny/vlm")
    sides = {side: {"captions": 1, "scores": {}} for side in ("before", "after")}
    _, text = card_of(captioned([[own, new]]), {"steps": [step], "comparison": sides, "roles": {}})
    assert ", written by `tiny/vlm` or taken from the dataset." in text
    assert "- model: `tiny/vlm`, 1 caption\n- taken from the dataset: 1 caption, neither" in text
    assert "1 question in 1 call:" in text and "1 caption before, 1 after. 1 caption without a score." in text
    assert "| `contradicted` | a judge denies something that it says | 1 |" in text
    # A table that follows a list at once would be part of its last entry.
    assert re.search(r"\n1\. `verify`.*\n\n+\| figure \| before", text)


def test_the_folder_of_a_card_opens(tmp_path):
    dataset = captioned(MIXED)
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    dataset.select([0]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    caption_report(CaptionStatistics(dataset), tmp_path, DETAILS)
    (tmp_path / "README.md").write_text(caption_card(CaptionStatistics(dataset), DETAILS, ("train", "test")), "utf-8")
    loaded = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"test": 1, "train": 5}
    assert loaded["train"].features["label"].names == list(COLOURS)
