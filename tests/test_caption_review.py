"""Captioning: odd servers, odd data, odd moments; one short test each."""

import pytest
from caption_server import serving
from caption_tools import NAMES, dataset, picture, undecoded
from datasets import ClassLabel, Dataset, Features, Image

from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.captioning.calls import Limits
from mmft_hf.captioning.journal import by_slot
from mmft_hf.captioning.limits import RetryPolicy

QUICK = RetryPolicy(base_s=0.02, cap_s=0.1)
PICTURES = [picture(i) for i in range(40)]
HISTORY = ("key", "slot", "status", "pending", "reask", "updated_at")


@pytest.fixture
def server(tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as running:
        yield running


@pytest.fixture
def run(server, tmp_path):
    """Captions a data set in one folder."""

    def go(data, limits=None, actions=None, **settings):
        captioner = Captioner("openai", **{"model": "m", "base_url": f"{server.url}/v1", **settings})
        options = {"limits": limits or Limits(4, retry=QUICK), "check_actions": actions, "progress": False}
        return undecoded(caption_dataset(data, captioner, run_dir=tmp_path / "run", **options))

    return go


def says(text, **more) -> dict:
    """A rule: this answer."""
    choice = {"message": {"content": text}, "finish_reason": more.pop("finish_reason", "stop")}
    return {"do": "ok", "body": {"model": "m", "choices": [choice], **more}}


def history(folder) -> list[list[tuple]]:
    """Of each slot, its tries as (reask, status, pending), the one that counts last."""
    return [[(r["reask"], r["status"], r["pending"]) for r in rows] for _, rows in by_slot(folder / "journal", HISTORY)]


def on_disk(files) -> Dataset:
    """A data set that names its files."""
    columns = {"image": [{"bytes": None, "path": str(f)} for f in files], "label": [i % 2 for i in range(len(files))]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=NAMES)}))


# -- what servers say -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "odd",
    [
        {"model": {"a": 1}},
        {"model": "x" * 10**6},
        {"usage": {"prompt_tokens": 10**30, "completion_tokens": 10**10}},
    ],
    ids=["no name", "long name", "counts"],
)
def test_odd_fields_beside_a_good_caption_do_no_harm(server, run, odd):
    server.server.script = {"rules": [says("a fine blue thing", **odd)]}
    (row,) = run(dataset(PICTURES[:1]))
    assert row["captions"] == ["a fine blue thing"] and row["caption_records"][0]["tokens_in"] is None


def test_an_ending_that_is_no_word_is_a_bad_answer(server, run):
    server.server.script = {"rules": [says("a fine blue thing", finish_reason={"a": 1}) | {"at": [2]}]}
    (row,) = run(dataset(PICTURES[:1]))
    assert [r["status"] for r in row["caption_records"]] == ["ok"] * 3 and len(server.requests()) == 4


def test_half_a_character_in_an_answer_or_a_class_name_can_be_stored(server, run):
    server.server.script = {"rules": [says("a fine blue thing \ud83d")]}
    (row,) = run(dataset(PICTURES[:1], names=["blue_thing\udce9", "b"]))  # a folder named in Latin-1
    assert row["captions"] == ["a fine blue thing ?"]
