"""What a captioning run stores and never asks for twice: keys, the union of files, locks, damage, full disks."""

import errno
import fcntl

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_server import serving
from caption_tools import NAMES, asked, dataset, pairs, picture, undecoded, wrong
from datasets import concatenate_datasets

from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.captioning.ask.journal import Journal
from mmft_hf.captioning.ask.journal_parquet import export_journal, import_journal
from mmft_hf.captioning.ask.journal_reader import by_slot, read_rows, settled_slots
from mmft_hf.captioning.ask.journal_table import JournalError
from mmft_hf.captioning.ask.limits import Limits
from mmft_hf.captioning.ask.pictures import PicturePolicy
from mmft_hf.captioning.judge.checks import CaptionChecker
from mmft_hf.captioning.split import SplitCaptioner
from mmft_hf.captioning.types import Sampling
from mmft_hf.core.errors import UserError
from mmft_hf.data.texts import PROMPT, PromptSet

PICTURES = [picture(i) for i in range(12)]


@pytest.fixture
def server(tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as running:
        yield running


@pytest.fixture
def run(server, tmp_path):
    """Captions a dataset in one folder; returns it with the requests that this took."""

    def go(data, folder="run", concurrency=8, **settings):
        before = len(server.requests())
        settings = {"model": "m", "base_url": f"{server.url}/v1", **settings}
        captioner = Captioner("openai", **settings)
        options = {"limits": Limits(concurrency), "progress": False}
        captioned = caption_dataset(data, captioner, run_dir=tmp_path / folder, **options)
        return undecoded(captioned), server.requests()[before:]

    return go


# -- keys -------------------------------------------------------------------------------------------------------------
def test_nothing_that_leaves_a_request_as_it_is_asks_again(run, monkeypatch):
    data = dataset(PICTURES)
    captioned, requests = run(data)
    assert not wrong(captioned) and len(requests) == len(set(asked(requests))) == 36
    monkeypatch.setenv("ANOTHER_KEY", "k" * 12)
    shuffled = data.select([5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10])
    renamed = data.add_column("more", ["x"] * 12).cast(data.add_column("more", ["x"] * 12).features)
    options = PromptSet(domain="imagenet")  # the same words
    for again, settings in (
        (data, {}),
        (shuffled, {"concurrency": 1, "batch_size": 3, "timeout_s": 9.0}),
        (renamed, {"api_key_env": "ANOTHER_KEY"}),
        (data.select([1, 4]), {"prompts": options}),
        (concatenate_datasets([data, data]), {}),
    ):
        captioned, requests = run(again, **settings)
        assert not requests and not wrong(captioned) and len(captioned) == len(again)


def test_a_server_at_another_address_is_the_same_server(run, tmp_path):
    run(dataset(PICTURES))
    with serving({}, tmp_path / "other.jsonl") as other:
        captioned, _ = run(dataset(PICTURES), base_url=f"{other.url}/v1/")
        assert not wrong(captioned) and not other.requests()


def test_new_rows_and_a_renamed_class_cost_their_own_requests_alone(run):
    run(dataset(PICTURES))
    grown, requests = run(dataset([picture(90), *PICTURES, picture(91)], labels=[1, *[i % 2 for i in range(12)], 0]))
    assert set(asked(requests)) == pairs(picture(90), NAMES[1]) | pairs(picture(91), NAMES[0])
    assert len(requests) == 6 and not wrong(grown)
    names = ["blue_thing", "scarlet-Thing"]
    renamed, requests = run(dataset(PICTURES, names))
    assert {p for p, _ in asked(requests)} == {p for i in range(1, 12, 2) for p, _ in pairs(PICTURES[i], "")}
    assert len(requests) == 18 and {"scarlet thing" in text for _, text in asked(requests)} == {True}
    assert not wrong(renamed, names=["blue_thing", "scarlet thing"])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "m2"},
        {"tag": "awq"},
        {"sampling": Sampling(temperature=0.0)},
        {"sampling": Sampling(options={"top_p": 0.9})},
        {"pictures": PicturePolicy(max_side=8)},
        {"prompts": PromptSet(template=PROMPT.replace("describe", "depict"))},
        {"prompts": PromptSet(words=40)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_a_request_asks_again(run, change):
    run(dataset(PICTURES[:2]))
    _, requests = run(dataset(PICTURES[:2]), **change)
    assert len(requests) == 6
    _, requests = run(dataset(PICTURES[:2]))
    assert not requests


def test_more_aspects_samples_or_changed_pictures_ask_for_the_new_ones_alone(run):
    run(dataset(PICTURES[:2]))
    _, requests = run(dataset(PICTURES[:2]), prompts=PromptSet(("color", "visual", "texture")))
    assert {text for _, text in asked(requests)} == {
        text.replace("visual", "color") for name in NAMES for _, text in pairs(b"", name, ("visual",))
    }
    _, requests = run(dataset(PICTURES[:2]), samples=2)
    assert len(requests) == 6 and len({r["body"]["seed"] for r in requests}) == 6
    _, requests = run(dataset([PICTURES[0], picture(77)]))
    assert set(asked(requests)) == pairs(picture(77), NAMES[1])


def test_a_picture_that_occurs_often_is_asked_about_once_even_in_flight(run, server):
    server.server.script = {"rules": [{"do": "ok", "delay_ms": 50}]}
    data = dataset([PICTURES[0]] * 8 + [PICTURES[1]] * 8, labels=[0] * 8 + [1] * 8)
    captioned, requests = run(data, concurrency=32)
    assert len(requests) == 6 and not wrong(captioned) and len(captioned) == 16
    # The same picture under another label is another question.
    captioned, requests = run(dataset([PICTURES[0], PICTURES[0]], labels=[0, 1]))
    assert set(asked(requests)) == pairs(PICTURES[0], NAMES[1]) and not wrong(captioned)


# -- several files ----------------------------------------------------------------------------------------------------
def row(key, status="ok", text="a", at=1.0, **more):
    return {"key": key, "slot": key, "status": status, "raw_text": text, "text": text, "updated_at": at, **more}


def test_files_are_read_as_one_and_a_key_in_two_counts_once(tmp_path):
    with Journal(tmp_path, 0) as first, Journal(tmp_path, 1) as second:
        first.put([row("a", "failed", None, 1.0), row("b", text="late", at=9.0), row("c"), row("e", "failed", at=1.0)])
        second.put([row("a", text="won", at=5.0), row("b", text="early", at=2.0), row("d"), row("e", "empty", at=0.5)])
        assert settled_slots(first.folder) == {"a", "b", "c", "d"}
    columns = ("key", "slot", "status", "text", "updated_at", "pending", "reask")
    read = {slot: [(r["status"], r["text"]) for r in rows] for slot, rows in by_slot(tmp_path, columns)}
    assert read["a"] == [("ok", "won")] and read["b"] == [("ok", "early")] and read["e"] == [("empty", "a")]
    assert export_journal(tmp_path, tmp_path / "all.parquet") == 5
    with Journal(tmp_path / "copy") as copy:
        assert import_journal(copy, tmp_path / "all.parquet") == 5
        assert import_journal(copy, tmp_path / "all.parquet") == 0
    copied = {slot: [(r["status"], r["text"]) for r in rows] for slot, rows in by_slot(tmp_path / "copy", columns)}
    assert copied == read


def test_an_exported_journal_stands_for_the_one_it_came_from(run, tmp_path):
    run(dataset(PICTURES))
    count = export_journal(tmp_path / "run" / "journal", tmp_path / "captions.parquet")
    with Journal(tmp_path / "elsewhere" / "journal") as journal:
        failed = next(
            iter(by_slot(tmp_path / "run" / "journal", ("key", "slot", "status", "updated_at", "pending", "reask")))
        )
        journal.put([row(failed[0], "failed", None, tokens_in=7)])  # asked for here without success
        assert count == import_journal(journal, tmp_path / "captions.parquet") == 36
    captioned, requests = run(dataset(reversed(PICTURES), labels=[(i + 1) % 2 for i in range(12)]), "elsewhere")
    assert not requests and not wrong(captioned)


@pytest.mark.parametrize("change", [{"status": "fine"}, {"slot": None}, {"checks": "{"}, {"checks": '{"a": 1}'}])
def test_a_journal_that_cannot_be_ours_is_refused_whole(tmp_path, change):
    with Journal(tmp_path / "a") as journal:
        journal.put([row("a"), row("b")])
    export_journal(tmp_path / "a", tmp_path / "good.parquet")
    table = pq.read_table(tmp_path / "good.parquet")
    first, second = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([first, {**second, **change}], table.schema), tmp_path / "bad.parquet")
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    for name in ("bad.parquet", "none.parquet"):
        with Journal(tmp_path / "b") as journal, pytest.raises(UserError, match="expected an exported journal"):
            import_journal(journal, tmp_path / name)
        with Journal(tmp_path / "b") as journal:
            assert not list(read_rows(journal.folder))


# -- locks, damage, full disks ----------------------------------------------------------------------------------------
def test_one_writer_per_rank(tmp_path):
    with Journal(tmp_path):
        with pytest.raises(JournalError, match=r"found one at work here \(process"):
            Journal(tmp_path)
        Journal(tmp_path, 1).close()
    Journal(tmp_path).close()


def test_without_locks_each_writer_has_its_own_file_and_no_write_ahead_log(tmp_path, run, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with Journal(tmp_path / "both") as one, Journal(tmp_path / "both") as two:
        assert one.path != two.path and "cannot be trusted" in one.notes[0]
        one.put([row("a")]), two.put([row("b")])
        assert settled_slots(one.folder) == {"a", "b"}
        assert one._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    run(dataset(PICTURES[:6]))
    captioned, requests = run(dataset(PICTURES))
    assert len(requests) == 18 and not wrong(captioned)
    files = sorted(p.name for p in (tmp_path / "run" / "journal").iterdir() if p.suffix != ".lock")
    assert len(files) == 2 and all(name.endswith(".sqlite") for name in files)


@pytest.mark.parametrize("damage", [b"", b"not a journal " * 99, None], ids=["other header", "text", "middle"])
def test_a_damaged_journal_is_named_and_left_alone(run, tmp_path, damage):
    run(dataset(PICTURES))
    file = tmp_path / "run" / "journal" / "journal-00000.sqlite"
    data = bytearray(file.read_bytes())
    if damage is None:
        data[4096:] = b"\xa5" * (len(data) - 4096)
    else:
        data[: len(damage) or 16] = damage or b"SQLite format 7\0"
    file.write_bytes(data)
    for _ in range(2):  # and its lock is free again
        with pytest.raises(UserError, match=r"journal-00000.sqlite: expected a journal .* move it away"):
            run(dataset(PICTURES))
    assert file.read_bytes() == data
    file.rename(tmp_path / "damaged.sqlite")
    captioned, requests = run(dataset(PICTURES))
    assert len(requests) == 36 and not wrong(captioned)


def test_a_full_disk_stops_the_run_and_keeps_what_was_answered(server, tmp_path, run):
    data = dataset(PICTURES * 1 + [picture(i) for i in range(20, 60)])
    captioner = Captioner("openai", "m", base_url=f"{server.url}/v1")
    with SplitCaptioner(captioner, data, tmp_path / "run", CaptionChecker(NAMES), Limits(4), progress=False) as running:
        pages = running.journal._db.execute("PRAGMA page_count").fetchone()[0]
        running.journal._db.execute(f"PRAGMA max_page_count={pages + 12}")  # sqlite says then what it says at ENOSPC
        with pytest.raises(JournalError, match="Make room; what was answered so far is kept"):
            running.fill(running.plan())
        kept = len(list(read_rows(running.journal.folder, ("key",))))
    assert 0 < kept and len(server.requests()) - kept <= 4
    captioned, requests = run(data)
    assert len(requests) == 3 * 52 - kept and not wrong(captioned)
