"""A few images are captioned by a strong model, and their captions tune a captioner for the others."""

import hashlib
import json
import os
import re
import shlex

import pytest
import torch
from caption_server import serving
from caption_tools import NAMES, dataset, picture
from datasets import DatasetDict, Image, load_dataset
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
from mmft_hf.cli import main
from mmft_hf.core.files import atomic_write

ASPECTS = ["--aspects", "visual", "shape", "--words", "20", "--domain", "pets"]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve training pictures; the first is also in the test split, which no captioner may be tuned on."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures = {"train": range(12), "test": [0, 20, 21]}
    for name, numbers in pictures.items():
        (folder / "data").mkdir(exist_ok=True)
        dataset([picture(i) for i in numbers]).to_parquet(folder / "data" / f"{name}-0.parquet")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving({}, tmp_path_factory.mktemp("log") / "requests.jsonl") as found:
        yield found


def run(*words) -> int:
    return main([str(word) for word in words])


def captioned(server, source, folder, *more) -> int:
    model = ("--captioner", "openai", "--captioner_model", "strong", "--base_url", f"{server.url}/v1")
    return run("caption", *model, "--dataset_name", source, "--output_dir", folder, *ASPECTS, *more)


@pytest.fixture(scope="module")
def seed(server, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seed") / "captioned"
    assert captioned(server, source, folder) == 0
    return folder


@pytest.fixture(scope="module")
def chats(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats") / "chats"
    assert run("caption", "chats", seed, "--output_dir", folder) == 0
    return folder


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_pictures_and_prompts_are_those_that_the_captioner_was_sent(chats, seed, server, monkeypatch):
    sent = {(row["picture"], row["prompt"]) for row in server.requests()}
    sealed = {digest(picture(i)) for i in (0, 20, 21)}
    found = set()
    for line in lines(chats):
        (name,), (asked,), (said,) = line["images_file_names"], line["prompt"], line["completion"]
        assert [part["type"] for part in asked["content"]] == ["image", "text"]
        assert (asked["role"], said["role"]) == ("user", "assistant")
        shown = digest((chats / name).read_bytes())
        found.add((shown, asked["content"][1]["text"]))
        assert line["image_sha256"] not in sealed
        accepted = {row["image_sha256"]: row["captions"] for row in load_dataset(str(seed), split="train")}
        assert said["content"][0]["text"] in accepted[line["image_sha256"]]
    assert found == {pair for pair in sent if pair[0] != digest(picture(0))} and len(found) == 22
    assert len(list((chats / "images").iterdir())) == 11


def test_the_folder_opens_as_its_card_says(chats, monkeypatch):
    card = (chats / "README.md").read_text()
    assert "22 captions of 11 training pictures, written by `strong`" in card and "(1 here)" in card
    assert (
        "the prompt that asked for it" in card and "Pictures and prompts are those that the captioner was sent" in card
    )
    assert "terms of whoever runs `strong`" in card and "/" not in card.split("data_dir=")[1].split(",")[0]
    monkeypatch.chdir(chats)
    found = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], found)
    rows = found["chats"]
    assert [len(own) for own in rows["images"]] == [1] * 22 and rows.column_names[:3] == [
        "images",
        "prompt",
        "completion",
    ]


def test_the_tuned_captioner_is_asked_what_it_was_tuned_on(chats, source, vlm, tmp_path, monkeypatch):
    """Two steps of a loss on the completion alone, as TRL takes it for prompts and completions; then the command of the card."""
    processor, tuned = AutoProcessor.from_pretrained(vlm), tmp_path / "tuned"
    model = LlavaForConditionalGeneration.from_pretrained(vlm)
    rows = load_dataset("imagefolder", data_dir=str(chats), split="train").select(range(4))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(2):
        loss = 0
        for row in rows:
            texts = [
                processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False),
                processor.apply_chat_template(row["prompt"] + row["completion"], tokenize=False),
            ]
            asked, whole = (
                processor(images=row["images"], text=text, return_tensors="pt", add_special_tokens=False)
                for text in texts
            )
            labels = whole["input_ids"].clone()
            labels[:, : asked["input_ids"].shape[1]] = -100
            loss += model(**whole, labels=labels).loss / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    model.save_pretrained(tuned)
    processor.save_pretrained(tuned)

    asked, generate = [], TransformersBackend._generate

    def spied(self, requests):
        asked.extend((digest(r.pictures[0].data), r.prompt, self._question(r, 1)) for r in requests)
        return generate(self, requests)

    monkeypatch.setattr(TransformersBackend, "_generate", spied)
    command = re.search(r"```sh\nmmft-hf (.*?)\n```", (chats / "README.md").read_text())[1].replace("TUNED", str(tuned))
    more = ("--max_tokens", 8, "--on_check", "truncated=keep", "repetition=keep", "empty=keep", "--max_reasks", 0)
    words = (*shlex.split(command), *more, "--dataset_name", source, "--output_dir", tmp_path / "out")
    assert run(*words) in (0, 3)  # some of its random words may be none at all
    exported = {}
    for row in load_dataset("imagefolder", data_dir=str(chats), split="train"):
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        exported[row["image_sha256"], row["prompt"][0]["content"][1]["text"]] = text
    again = {(shown, prompt): text for shown, prompt, text in asked}
    assert len(again) == 24 and {key: again[key] for key in exported} == exported


def test_only_its_own_files_are_replaced_and_only_if_told_to(chats, seed, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("caption", "chats", seed, "--output_dir", out) == 0
    before = (out / "metadata.jsonl").read_bytes()
    assert before == (chats / "metadata.jsonl").read_bytes()
    (out / "images" / "stale.png").write_bytes(b"")
    assert run("caption", "chats", seed, "--output_dir", out) == 2
    assert "--overwrite_output_dir true to replace them" in capsys.readouterr().err
    assert run("caption", "chats", seed, "--output_dir", out, "--overwrite_output_dir", "true") == 0
    assert (out / "metadata.jsonl").read_bytes() == before and not (out / "images" / "stale.png").exists()
    (out / "mine.txt").write_text("kept")
    assert run("caption", "chats", seed, "--output_dir", out, "--overwrite_output_dir", "true") == 2
    assert "found other files" in capsys.readouterr().err and (out / "mine.txt").exists()


def test_captions_without_a_prompt_are_counted_and_a_folder_without_captions_is_refused(seed, tmp_path, capsys):
    """Captions of an aspect that no prompt asks for, as presets write them."""
    other = tmp_path / "other"
    rows = load_dataset(str(seed))["train"].cast_column("image", Image(decode=False))
    turned = rows.map(
        lambda row: {
            "caption_records": [
                {**r, "aspect": "dense" if r["aspect"] == "shape" else r["aspect"]} for r in row["caption_records"]
            ]
        }
    )
    DatasetDict({"train": turned})["train"].to_parquet(other / "data" / "train-0.parquet")
    details = json.loads((seed / "captions.json").read_text())
    with atomic_write(other / "captions.json") as file:
        file.write_text(json.dumps(details | {"files": []}))
    assert run("caption", "chats", other, "--output_dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (
        "12 captions of 12 pictures are in" in printed
        and "Left out: 12 captions of the aspect dense, which no prompt asks for." in printed
    )
    del details["made_from"]["prompts"]
    (other / "captions.json").write_text(json.dumps(details | {"files": []}))
    words = ("caption", "chats", other, "--output_dir", tmp_path / "own", "--aspects", "dense")
    assert run(*words, "--own_prompts", '{"dense": "Say all of this {class_name}."}') == 0
    assert "does not say with which prompts" in capsys.readouterr().out
    asked = {line["prompt"][0]["content"][1]["text"] for line in lines(tmp_path / "own")}
    card = (tmp_path / "own" / "README.md").read_text()
    assert "a prompt for it" in card and "The captions were not asked for with these prompts" in card
    assert asked == {f"Say all of this {name.replace('_', ' ')}." for name in NAMES}
    for words, expected in (
        ((tmp_path,), "expected a captioned folder, found no captions.json"),
        ((), "expected one captioned folder, found none"),
        ((other, "--aspects", "texture"), "expected captions of the aspects texture, found the aspects visual, dense"),
    ):
        assert run("caption", "chats", *words, "--output_dir", tmp_path / "none") == 2
        assert expected in " ".join(capsys.readouterr().err.split())
    assert not os.listdir(tmp_path / "none") if (tmp_path / "none").is_dir() else True


def test_only_representatives_are_captioned(server, source, seed, clip_folder, tmp_path, capsys):
    """They are those that the step of this name would choose."""
    before = len(server.requests())
    out = tmp_path / "out"
    words = ("--representatives", 0.3)
    assert captioned(server, source, out, *words) == 2
    assert "--scorer: expected the model by whose embeddings" in capsys.readouterr().err
    assert captioned(server, source, out, *words, "--scorer", clip_folder) == 0
    steps = tmp_path / "steps.yaml"
    steps.write_text("steps: [representatives: {share: 0.3}]")
    refined = tmp_path / "refined"
    flags = ("--steps", steps, "--scorer", clip_folder)
    assert run("caption", "refine", seed, "--output_dir", refined, *flags) == 0
    assert run("caption", "refine", seed, "--output_dir", tmp_path / "x", *flags, *words) == 2
    assert "--representatives: expected the whole training split to be refined" in capsys.readouterr().err
    own, kept = (
        {row["image_sha256"] for row in load_dataset(str(folder), split="train") if row["captions"]}
        for folder in (out, refined)
    )
    assert own == kept and len(own) == 4  # of six images of each class, two
    assert {row["picture"] for row in server.requests()[before:]} == own
    record = json.loads((out / "captions.json").read_text())
    assert record["representatives"] == {"share": 0.3, "scorer": clip_folder.name, "images": {"train": 4}}
    assert captioned(server, source, out) == 0  # the others later, in the same folder
    assert len({row["picture"] for row in server.requests()[before:]}) == 12
