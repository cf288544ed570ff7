"""A captioned folder that was damaged: the answers that are whole stay paid for, and what is lost is named and asked for again."""

import contextlib
import json
import shutil
import sqlite3

import pyarrow.parquet as pq
import pytest
from caption_server import serving
from caption_tools import image_folder

from mmft_hf.captioning.ask.journal import Journal
from mmft_hf.captioning.ask.journal_parquet import export_journal, import_journal
from mmft_hf.captioning.ask.journal_reader import by_slot, read_rows, settled_slots
from mmft_hf.captioning.ask.journal_table import COLUMNS
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError

OTHER = {"TEXT": "other", "INTEGER": 41, "REAL": 0.25}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A server, a captioned folder of six pictures, and the command that wrote it."""
    place = tmp_path_factory.mktemp("captioned")
    with serving({}, place / "log.jsonl") as server:
        words = ["caption", "--dataset_name", image_folder(place / "pictures", 6), "--captioner", "openai"]
        words += ["--captioner_model", "m", "--base_url", f"{server.url}/v1", "--aspects", "visual", "--output_dir"]
        assert main([str(word) for word in [*words, place / "out"]]) == 0
        yield server, place / "out", words


@pytest.fixture
def go(whole, tmp_path, capfd, caplog, monkeypatch):
    """Runs a verb on a copy of the folder. Returns the exit code, what it said, and the number of its requests."""
    server, folder, words = whole
    shutil.copytree(folder, tmp_path / "out")
    monkeypatch.chdir(tmp_path)

    def run(*more):
        before = len(server.requests())
        code = main([str(word) for word in (more or [*words, "out"])])
        said, notes = capfd.readouterr(), caplog.text
        caplog.clear()
        return code, said.out + said.err + notes, len(server.requests()) - before

    return run


def rows(folder):
    return {tries[-1]["image_sha256"]: tries[-1] for _, tries in by_slot(folder / "journal")}


def captions(folder):
    table = pq.read_table(folder / "data", columns=["image_sha256", "captions"])
    return sorted((row["image_sha256"], row["captions"]) for row in table.to_pylist())


def file_of(folder):
    return folder / "journal" / "journal-00000.sqlite"


def change(folder, sql, *values):
    with contextlib.closing(sqlite3.connect(file_of(folder))) as db, db:
        db.execute(sql, values)


# -- rows of the journal ----------------------------------------------------------------------------------------------
def test_a_bit_in_a_text_costs_one_request(go, whole, tmp_path):
    before, first = rows(tmp_path / "out"), captions(tmp_path / "out")
    row = next(iter(before.values()))
    content = bytearray(file_of(tmp_path / "out").read_bytes())
    place = content.index(row["text"].encode())
    content[place] ^= 1
    file_of(tmp_path / "out").write_bytes(content)
    code, said, _ = go("caption", "status", "--output_dir", "out")
    assert code == 0 and "visual           5" in said
    assert said.count("journal-00000.sqlite: 1 result is not as it was written") == 1 and row["key"] in said
    code, said, requests = go()
    assert code == 0 and requests == 1 and captions(tmp_path / "out") == first
    code, said, requests = go()
    assert code == 0 and requests == 0 and "not as it was written" not in said
    again = rows(tmp_path / "out")
    same = set(COLUMNS) - {"updated_at", "latency_ms", "run_id"}
    assert [{c: r[c] for c in same} for r in again.values()] == [{c: r[c] for c in same} for r in before.values()]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_row_with_another_value_does_not_count(column, tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.put(
            [{"key": slot, "slot": slot, "status": "ok", "text": "a", "label": "x"} for slot in ("m", "n", "o")]
        )
    change(tmp_path, f"UPDATE results SET {column} = ? WHERE slot = 'n'", OTHER[COLUMNS[column]])
    assert settled_slots(tmp_path / "journal") == {"m", "o"}
    assert [row["slot"] for row in read_rows(tmp_path / "journal")] == ["m", "o"]


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b"\x00" * 8, b"x"])
def test_a_text_that_is_no_text_does_not_count(damaged, tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.put(
            [{"key": slot, "slot": slot, "status": "ok", "text": f"the text of {slot}"} for slot in ("m", "n", "o")]
        )
    content = file_of(tmp_path).read_bytes()
    assert content.count(b"the text of n") == 1
    file_of(tmp_path).write_bytes(content.replace(b"the text of n", damaged + b"the text of n"[len(damaged) :]))
    assert settled_slots(tmp_path / "journal") == {"m", "o"}


def test_what_a_damaged_row_cost_is_not_added_to(tmp_path):
    row = {"key": "a", "slot": "a", "status": "ok", "tokens_in": 7, "cost": 2.0}
    with Journal(tmp_path / "journal") as journal:
        journal.put([row])
        journal.put([row])
        assert [r["tokens_in"] for r in read_rows(journal.folder)] == [14]
        change(tmp_path, "UPDATE results SET cost = 1e11")
        assert not list(read_rows(journal.folder))
        journal.put([row])
        assert [(r["tokens_in"], r["cost"]) for r in read_rows(journal.folder)] == [(7, 2.0)]
        assert journal.reopen(["ok"], {"a"}) == 1
        assert [r["status"] for r in read_rows(journal.folder)] == ["not_run"]


@pytest.mark.parametrize("where", ["order", "page"])
def test_results_that_cannot_be_found_refuse_the_file(where, go, tmp_path):
    file = file_of(tmp_path / "out")
    content = bytearray(file.read_bytes())
    if where == "order":  # the first slot becomes the last
        slot = min(row["slot"] for row in rows(tmp_path / "out").values()).encode()
        content = content.replace(slot, b"g" + slot[1:])
    else:  # a page that holds one result less than it did
        size = int.from_bytes(content[16:18], "big")
        page = next(p for p in range(size, len(content), size) if content[p] == 10 and content[p + 4] > 1)
        content[page + 4] -= 1
    file.write_bytes(content)
    for words in ((), ("caption", "status", "--output_dir", "out")):
        code, said, requests = go(*words)
        assert code == 2 and requests == 0 and "journal-00000.sqlite: expected a journal" in said


def test_a_journal_without_digests_is_continued(tmp_path):
    (tmp_path / "journal").mkdir()
    kinds = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    change(tmp_path, f"CREATE TABLE results ({kinds}, PRIMARY KEY (slot, key)) WITHOUT ROWID")
    old = "INSERT INTO results (key, slot, status, pending, updated_at) VALUES (?, ?, 'ok', 0, 1.0)"
    change(tmp_path, old, "a", "a")
    assert settled_slots(tmp_path / "journal") == {"a"}  # readers change nothing
    with Journal(tmp_path / "journal") as journal:
        journal.put([{"key": "b", "slot": "b", "status": "ok"}])
        change(tmp_path, "UPDATE results SET label = 'x'")
        assert settled_slots(journal.folder) == {"a"}
    change(tmp_path, old, "c", "c")  # as version 0.1 would go on
    assert settled_slots(tmp_path / "journal") == {"a", "c"}


@pytest.mark.parametrize("wrong", [{"tokens_in": -1}, {"updated_at": None}, {"pending": None}, {"cost": float("inf")}])
def test_no_import_brings_what_would_break_a_journal(wrong, tmp_path):
    with Journal(tmp_path / "a") as journal:
        journal.put([{"key": key, "slot": key, "status": "ok"} for key in "xy"])
    export_journal(tmp_path / "a", tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    first, second = table.to_pylist()
    pq.write_table(table.from_pylist([first, second | wrong], table.schema), tmp_path / "b.parquet")
    with Journal(tmp_path / "b") as journal:
        with pytest.raises(UserError, match=rf"b\.parquet: .* in column {next(iter(wrong))}, .* Nothing was imported"):
            import_journal(journal, tmp_path / "b.parquet")
        assert not list(read_rows(journal.folder))


def test_a_bit_in_an_exported_journal_is_found(tmp_path):
    with Journal(tmp_path / "a") as journal:
        journal.put([{"key": "x", "slot": "x", "status": "ok", "text": "a caption of its own"}])
    export_journal(tmp_path / "a", tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"caption of its own", b"caption of its owl", 1))
    with (
        Journal(tmp_path / "b") as journal,
        pytest.raises(UserError, match=r"a\.parquet: expected an exported journal"),
    ):
        import_journal(journal, tmp_path / "a.parquet")


def test_a_row_that_is_damaged_here_is_taken_from_an_export(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.put([{"key": "x", "slot": "x", "status": "ok", "text": "right"}])
        export_journal(journal.folder, tmp_path / "a.parquet")
        change(tmp_path, "UPDATE results SET text = 'wrong'")
        assert import_journal(journal, tmp_path / "a.parquet") == 1
        assert [row["text"] for row in read_rows(journal.folder)] == ["right"]


# -- captions.json ----------------------------------------------------------------------------------------------------
def test_without_captions_json_every_verb_says_so_and_the_journal_is_taken_up(go, tmp_path):
    out = tmp_path / "out"
    before, record = captions(out), json.loads((out / "captions.json").read_text())
    (out / "captions.json").unlink()
    (out / "data" / "old-00000-of-00001.parquet").write_bytes((out / "data" / record["files"][-1][5:]).read_bytes())
    code, said, _ = go("caption", "status", "--output_dir", "out")
    assert code == 0 and "out lacks captions.json" in said and "Type the command of the run again" in said
    code, said, _ = go("caption", "export", "answers.parquet", "--output_dir", "out")
    assert code == 0 and "out lacks captions.json" in said
    code, said, _ = go("push", "out", "--repo_id", "user/name")
    assert code == 2 and "out lacks captions.json" in said and "Then push" in said
    code, said, requests = go()
    assert code == 0 and requests == 0 and "lacks captions.json: the dataset is written again" in said
    assert captions(out) == before and not (out / "data" / "old-00000-of-00001.parquet").exists()
    found = json.loads((out / "captions.json").read_text())
    assert {k: found[k] for k in ("made_from", "files", "digests")} == {
        k: record[k] for k in ("made_from", "files", "digests")
    }
    assert "captions.json" not in go()[1]


def test_without_captions_json_another_dataset_replaces_nothing(go, whole, tmp_path):
    words = whole[2][:]
    words[2] = image_folder(tmp_path / "others", 3, start=50)
    (tmp_path / "out" / "captions.json").unlink()
    before = captions(tmp_path / "out")
    code, said, requests = go(*words, "out")
    assert code == 2 and requests == 0 and "expected captions.json" in said and "--overwrite_output_dir true" in said
    assert captions(tmp_path / "out") == before
    code, said, requests = go(*words, "out", "--overwrite_output_dir", "true")
    assert code == 0 and requests == 3 and "lacks captions.json" in said


def test_files_of_others_are_never_replaced(go, whole, tmp_path):
    (tmp_path / "out" / "captions.json").unlink()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for more in ((), ("--overwrite_output_dir", "true")):
        code, said, requests = go(*whole[2], "out", *more)
        assert code == 2 and requests == 0 and "files that mmft-hf did not write" in said


# -- folders where a file is wanted -----------------------------------------------------------------------------------
def test_a_folder_given_to_import_is_told_the_verbs_for_it(go, tmp_path):
    code, said, _ = go("caption", "import", "out", "--output_dir", "new")
    assert code == 2 and "found the folder out" in said
    assert "mmft-hf caption export JOURNAL.parquet --output_dir out" in said
    assert "mmft-hf caption import JOURNAL.parquet --output_dir new" in said and "caption merge out FOLDER" in said
    (tmp_path / "empty").mkdir()
    for name, found in (("empty", "found the folder empty"), ("none.parquet", "found no none.parquet")):
        code, said, _ = go("caption", "import", name, "--output_dir", "new")
        assert code == 2 and found in said and "Type mmft-hf caption import FILE" in said
