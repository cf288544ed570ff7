"""Captioned datasets made of records, without any captioner."""

from datasets import ClassLabel, Dataset, Features, Image
from tiny_clip import COLOURS, colour_images

from mmft_hf.captioning.write.dataset import CAPTION_FEATURES, RECORD

DETAILS = {
    "made_from": {"dataset_name": "someone/colours", "split": ["train"], "sampling": {"temperature": 0.2}},
    "model": "tiny/vlm",
    "run_id": "20260101T000000Z",
    "checks": {"token_limit": 77},
    "prompt_texts": {"visual": "Describe this [class name] & its ```look```", "shape": "<b>Shape</b> of [class name]?"},
    "last_run": {"calls": 9, "failures": {"http_503": 2}, "cost_usd": 0.25, "stopped": None},
}


def record(aspect="visual", text="a red thing", status="ok", checks=(), **others):
    base = dict.fromkeys(RECORD) | {"model": "tiny/vlm", "prompt_id": aspect, "sample": 0, "attempts": 1}
    base |= {"tokens_in": 100, "tokens_out": 20, "mentions_label": "thing" in (text or "")}
    base |= {"clip_tokens": len(text) + 2 if text else None}
    return base | {"aspect": aspect, "text": text, "status": status, "checks": list(checks)} | others


def captioned(records, names=tuple(COLOURS), images=None):
    """A dataset of as many rows as there are lists of records."""
    pictures = colour_images(-(-len(records) // 3))
    rows = [
        {
            "image": pictures[i][0],
            "label": pictures[i][1],
            "captions": [r["text"] for r in own if r["status"] in ("ok", "trimmed")],
            "caption_records": own,
            "image_sha256": f"{i:064x}",
        }
        for i, own in enumerate(records)
    ]
    columns = {
        key: [row[key] for row in rows] for key in ("image", "label", "captions", "caption_records", "image_sha256")
    }
    columns["image"] = images or columns["image"]
    features = {"image": Image(), "label": ClassLabel(names=list(names)), **CAPTION_FEATURES}
    return Dataset.from_dict(columns, features=Features(features))


MIXED = [
    [record(text="a red thing, round"), record("shape", "a round red thing indeed", checks=["label_missing"])],
    [
        record(text="green thing", status="trimmed", checks=["over_token_limit"]),
        record("shape", None, "refused", ["refusal"]),
    ],
    [record(text="A red thing,  ROUND"), record("shape", None, "failed", checks=(), finish_reason=None, attempts=5)],
    [
        record(text=None, status="rejected", checks=["repetition", "label_missing"], tokens_out=200),
        record(text="red thing again"),
        record("shape", None, "rejected", ["label_contradicted", "over_token_limit"]),
    ],
    [
        record(text=None, status="empty", checks=["empty", "thinking_budget"]),
        record("shape", None, "not_run", attempts=0),
    ],
]
