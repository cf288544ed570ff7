"""The recipes whose steps write captions, as they are typed, against a server on loopback that knows what is in each picture."""

import json
import re
from pathlib import Path

import pytest
from caption_server import serving
from caption_tools import written
from datasets import DatasetDict, Image, load_dataset
from scripted_responder import ScriptedResponder
from tiny_clip import COLOURS, colour_dataset

import mmft_hf
from mmft_hf.captioning.ask.captioner import Captioner
from mmft_hf.captioning.ask.pictures import PicturePolicy, prepare, sha256
from mmft_hf.cli import main

RECIPES = Path(__file__).parents[2] / "recipes" / "captions" / "steps"
NONE = sha256(b"")  # of the pictures of a question without any
CALLS = {  # of 6 images with two captions each
    "rank_and_fuse": 6,
    "local_detail": 6 * 5 + 6,
    "enrich": 6 + 6 + 6,
    "short_and_dense": 12,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    data = colour_dataset(2, captions=False)
    names = list(COLOURS)
    texts = [
        [f"{names[c]} paper number {i}.", f"a sheet, {names[c]} and plain {i}."] for i, c in enumerate(data["label"])
    ]
    extra = {"captions": texts, "alt": [f"sheet {i} of {names[c]}" for i, c in enumerate(data["label"])]}
    for name, column in extra.items():
        data = data.add_column(name, column)
    DatasetDict({"train": data})["train"].to_parquet(folder / "captioned" / "data" / "train-0.parquet")
    return folder / "captioned"


def colours(folder: Path) -> dict[str, str]:
    """The colour of each picture, by the sha256 of what is sent of it."""
    data = load_dataset(str(folder))["train"].cast_column("image", Image(decode=False))
    names = data.features["label"].names
    return {sha256(prepare(row["image"]["bytes"], PicturePolicy()).data): names[row["label"]] for row in data}


def reply_of(seen: dict[str, str]):
    """A captioner and a writer. `seen`: the colour of each picture, by sha256; parts of pictures have none of their own."""

    def reply(prompt: str, picture: str) -> str:
        name = seen.get(picture, "one colour")
        if "JSON object" in prompt:
            keys = [json.loads(key) for key in re.findall(r'"(?:[^"\\]|\\.)*"', prompt.split("JSON object")[1])]
            said = {key: f"The {key} is {name}." if key in ("color", "shape") else "not visible" for key in keys}
            return json.dumps(said)
        if picture != NONE:
            place = re.search(r"part of a larger image \((.*?)\)", prompt)
            return f"{name} in {place[1]}" if place else f"a view of {name}, {len(prompt)}"
        quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', prompt)
        return " and ".join([text.strip(". ") for text in quoted if " " in text][:2]) + "."

    return reply


@pytest.fixture
def refine(source, clip_folder, tmp_path, capsys):
    with serving({}, tmp_path / "requests.jsonl") as server:
        server.server.reply = reply_of(colours(source))

        def run(*more, output=tmp_path / "out", scorer=clip_folder):
            capsys.readouterr()
            roles = []
            for role, name in (("captioner", ""), ("writer", "writer_"), ("judge", "judge_")):
                roles += [
                    f"--{role}",
                    "openai",
                    f"--{role}_model",
                    f"{role}-model",
                    f"--{name}base_url",
                    f"{server.url}/v1",
                ]
            words = ["caption", "refine", source, "--output_dir", output, *roles, "--scorer", scorer, *more]
            return main([str(word) for word in words]), " ".join("".join(capsys.readouterr()).split())

        run.server = server
        yield run


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("enrich", "short_and_dense"))) for name in CALLS]
)
def test_recipes_write_what_was_answered_and_ask_nothing_twice(recipe, refine, source, tmp_path):
    code, said = refine("--steps", RECIPES / f"{recipe}.yaml")
    assert code == 0, said
    assert len(refine.server.requests()) == CALLS[recipe], [r["prompt"] for r in refine.server.requests()]
    old, new = written(source), written(tmp_path / "out")
    for one, two in zip(old, new, strict=True):
        mine = [r for r in two["caption_records"] if r["step"] and r["status"] == "ok"]
        assert (mine or recipe == "rank_and_fuse") and all(
            r["model"] in ("writer-model", "captioner-model") and r["text"] in two["captions"] for r in mine
        )
        kept = {r["text"] for r in two["caption_records"]}
        assert set(one["captions"]) <= kept  # nothing is deleted
    if recipe == "local_detail":
        (mine,) = [r for r in new[0]["caption_records"] if r["step"] == "merge_local" and r["status"] == "ok"]
        views = {r["view"] for r in new[0]["caption_records"] if r["view"]}
        assert views == {*(f"quadrant:{i}" for i in range(4)), "centre"}
        assert new[0]["captions"] == [mine["text"]] and len(mine["parents"]) >= 3
    if recipe == "rank_and_fuse":
        for row in new:
            fused = [r for r in row["caption_records"] if r["step"] == "rank_and_fuse" and r["parents"]]
            assert len(fused[0]["parents"]) == 2 and fused[0]["status"] in ("ok", "dropped")
    if recipe == "short_and_dense":
        assert [len(row["captions"]) for row in new] == [4] * 6 and "some 156 tokens" in said
    refine("--steps", RECIPES / f"{recipe}.yaml")
    assert len(refine.server.requests()) == CALLS[recipe]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["diversify", "multi_captioner"])
def test_recipes_with_judges(recipe, refine, source, tmp_path):
    seen = colours(source)
    responder, write = ScriptedResponder({image: [name] for image, name in seen.items()}), reply_of(seen)

    def respond(prompt, picture):
        asked = prompt.split("\n")[-1].startswith("Answer with one") or prompt.endswith("the letter alone.")
        return responder.reply(prompt, [picture] if picture != NONE else ()) if asked else write(prompt, picture)

    refine.server.server.reply = respond
    code, said = refine("--steps", RECIPES / f"{recipe}.yaml")
    assert code == 0, said
    assert all(row["captions"] for row in written(tmp_path / "out"))


def test_parts_that_are_not_unique_are_asked_for_once_more(refine, tmp_path):
    code, said = refine("--steps", RECIPES / "unique_region.yaml")
    assert code == 0, said
    failed = 0
    for row in written(tmp_path / "out"):
        first = [r for r in row["caption_records"] if r["step"] == "unique_region"]
        assert sorted(r["view"] for r in first) == ["centre", *(f"quadrant:{i}" for i in range(4))]
        failed += sum(r["status"] != "ok" and r["scores"][0]["value"] <= 0 for r in first)
        again = [r for r in row["caption_records"] if r["step"] == "tell_apart"]
        assert all(r["view"] in {one["view"] for one in first if one["status"] != "ok"} for r in again)
    prompts = [row["prompt"] for row in refine.server.requests()]
    assert failed and sum("fits the second one as well" in prompt for prompt in prompts) == failed
    assert len(prompts) == 6 * 5 + failed


def test_a_column_reaches_the_writer_and_a_missing_one_is_refused_first(refine, tmp_path):
    (tmp_path / "steps.yaml").write_text("steps: [column_fusion: {column: alt}]")
    code, said = refine("--steps", tmp_path / "steps.yaml")
    assert code == 0, said
    assert all(re.search(r'Sentence 1: "sheet \d of ', row["prompt"]) for row in refine.server.requests())
    asked = len(refine.server.requests())
    assert asked == 12
    (tmp_path / "steps.yaml").write_text("steps: [column_fusion: {column: alt_text}]")
    code, said = refine("--steps", tmp_path / "steps.yaml", output=tmp_path / "other")
    assert code == 2 and "alt_text" in said and len(refine.server.requests()) == asked


def test_a_translation_is_checked_in_its_own_script(refine, tmp_path):
    refine.server.server.reply = lambda prompt, picture: f"лист бумаги номер {len(prompt)}"
    (tmp_path / "steps.yaml").write_text("steps: [translate: {language: ru}]")
    code, said = refine("--steps", tmp_path / "steps.yaml")
    assert code == 0 and "tokens on average" in said, said
    assert all(re.match("лист", text) for row in written(tmp_path / "out") for text in row["captions"])
    assert len(refine.server.requests()) == 12
    names = {name: f"лист {i}" for i, name in enumerate(COLOURS)}  # no text names its class now
    (tmp_path / "names.yaml").write_text(json.dumps(names))
    flags = ("--class_names_file", tmp_path / "names.yaml", "--on_check", "label_missing=reject")
    code, said = refine("--steps", tmp_path / "steps.yaml", *flags, output=tmp_path / "named")
    refused = [r for row in written(tmp_path / "named") for r in row["caption_records"] if r["step"] == "translate"]
    assert all("label_missing" in r["checks"] and r["status"] == "rejected" for r in refused)
    code, said = refine("--steps", "rank_and_fuse", *flags, output=tmp_path / "none")
    assert code == 2 and "--class_names_file: expected a step that writes in another language" in said
    asked = len(refine.server.requests())
    (tmp_path / "steps.yaml").write_text("steps: [translate: {language: en}]")
    code, said = refine("--steps", tmp_path / "steps.yaml", output=tmp_path / "other")
    assert code == 0 and len(refine.server.requests()) == asked + 2 * 12, said
    assert not any(re.match("лист", text) for row in written(tmp_path / "other") for text in row["captions"])


def test_two_pictures_reach_the_captioner_and_a_refused_text_is_recorded(refine, tmp_path):
    """The judge says yes to both pictures, so nothing differs. Its six questions serve both directions of each pair."""
    refine.server.server.reply = lambda prompt, picture: (
        "A view of one colour." if "two images" in prompt else "yes" if prompt.startswith("Is all") else "a thing in it"
    )
    code, said = refine("--steps", "difference")
    assert code == 0, said
    asked = [row["model"] for row in refine.server.requests()]
    assert (asked.count("captioner-model"), asked.count("judge-model")) == (6, 6)
    refused = [r for row in written(tmp_path / "out") for r in row["caption_records"] if r["step"] == "difference"]
    assert [r["status"] for r in refused] == ["rejected"] * 6 and all(len(r["refs"]) == 1 for r in refused)
    assert all(r["checks"] == ["not_different"] for r in refused)


def test_captions_are_rated_by_a_model_in_this_process(vlm, source, tmp_path):
    data = load_dataset(str(source))["train"].select(range(2))
    step = ["sentence_rating"]
    roles = {"captioner": Captioner("transformers", str(vlm))}
    found = mmft_hf.refine_captions(data, step, roles=roles, run_dir=str(tmp_path / "run"), progress=False)
    records = [r for row in found for r in row["caption_records"]]
    gaps = [score["value"] for r in records for score in r["scores"] or () if score["name"] == "gap"]
    assert len(gaps) >= 4 and len({*gaps}) > 1
    assert all(row["captions"] for row in found)
