"""The cards: nothing but facts, no placeholder, snippets that run, metadata that the Hub reads, and no markup from data."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shutil
import types
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from caption_records import DETAILS, MIXED, captioned, record
from card_tools import execute, ink, snippets
from dataset_card_pattern import PATTERN as DATASET_PATTERN
from datasets import Dataset
from datasets import Image as ImageColumn
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from model_card_pattern import PATTERN
from PIL import Image
from processes import run_python
from tiny_clip import COLOURS, colour_dataset
from transformers import AutoModel, AutoProcessor, CLIPModel, pipeline

import mmft_hf
from mmft_hf.captioning.write.card import caption_card
from mmft_hf.captioning.write.report import caption_report
from mmft_hf.captioning.write.statistics import CaptionStatistics
from mmft_hf.cli import main
from mmft_hf.core.markdown import code, fenced, md, public_name, read_front_matter
from mmft_hf.hub.cards import card_for_repository, model_card
from mmft_hf.hub.cards.model import _validation_role
from mmft_hf.hub.publish import inference_code

PLACEHOLDERS = re.compile(r"TODO|FIXME|TBD|\[More|[Mm]ore [Ii]nformation|\bNone\b|\bnan\b|\$\w|FOLDER|YOUR_")
EVIL = [
    "a | b",
    "`code` $x$",
    "<script>alert(1)</script>",
    "--- x",
    "two\nlines # and *stars*",
    "[x](http://evil.example)",
]


def finetune(model, data, output, *more) -> Path:
    settings = [
        "--learning_rate",
        "5e-3",
        "--per_device_train_batch_size",
        "8",
        "--use_cpu",
        "true",
        "--disable_tqdm",
        "true",
    ]
    command = ["finetune", "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*command, *settings, *more]) == 0
    return output


def with_records(rows: Dataset) -> Dataset:
    """Captions of a model, but one row without any and one from a column, with the records that say so."""
    records = [
        [record(text=c, aspect=a) for c, a in zip(captions, ("visual", "shape"), strict=True)]
        for captions in rows["captions"]
    ]
    records[0] = [record(text="", status="empty")]
    records[1] = [record(text=rows[1]["captions"][0], model="columns", aspect="name")]
    return captioned_like(rows, records)


def captioned_like(rows: Dataset, records: list) -> Dataset:
    made = captioned(records, images=rows["image"][:])
    labels = Dataset.from_dict({"label": rows["label"][:]}, features=rows.select_columns("label").features)
    return (
        made.remove_columns("label")
        .add_column("label", labels["label"][:])
        .cast_column("label", rows.features["label"])
    )


@pytest.fixture(scope="module")
def run(clip_folder, tmp_path_factory) -> Path:
    """A finished run on captions that a model wrote, in a folder as `mmft-hf caption` leaves it."""
    root = tmp_path_factory.mktemp("cards")
    shutil.copytree(clip_folder, root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    data = root / "captioned"
    data.mkdir()
    for seed, (split, per_class) in enumerate((("train", 8), ("validation", 4), ("test", 6))):
        with_records(colour_dataset(per_class, seed)).to_parquet(data / f"{split}.parquet")
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (data / "captions.json").write_text(json.dumps({**DETAILS, "made_from": {"dataset_name": "pictures"}}))
    return finetune(root / "base", data, root / "run", "--num_train_epochs", "10")


def changed(run: Path, folder: Path, record=None, results=None, rows=None) -> Path:
    """A copy of a run with other facts, as far as the card reads them."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*", "model.safetensors"))
    for name, change in (("mmft.json", record), ("all_results.json", results)):
        found = json.loads((folder / name).read_text())
        if change:
            change(found)
        (folder / name).write_text(json.dumps(found))
    if rows:
        Dataset.from_list(rows).to_parquet(folder / "predictions_test.parquet")
    return folder


def outside_code(text: str) -> str:
    return re.sub(
        r"^(`{3,})\w+\n.*?^\1$|(?<!\\)`[^`\n]*`", "", read_front_matter(text)[1], flags=re.DOTALL | re.MULTILINE
    )


# -- the model card ---------------------------------------------------------------------------------------------------
def test_the_whole_model_card(run):
    card = (run / "README.md").read_text(encoding="utf-8")
    assert card == model_card(run)  # a function of the folder's files
    assert PATTERN.fullmatch(card), first_difference(PATTERN, card)
    assert not PLACEHOLDERS.search(outside_code(card))
    assert str(run.parent) not in card


def first_difference(pattern: re.Pattern, text: str) -> str:
    """The first line of a card that its pattern does not know."""
    lines = text.splitlines(keepends=True)
    parts = pattern.pattern.removeprefix(r"\A").removesuffix(r"\Z").splitlines(keepends=True)
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(re.error):
            if found := re.match("".join(parts[:end]), text):
                return (
                    f"after line {found.group().count(chr(10))}: {''.join(lines[found.group().count(chr(10)) :][:3])!r}"
                )
    return "at its first line"


def test_figures_of_the_card_are_those_of_the_run(run):
    card, results = (run / "README.md").read_text(), json.loads((run / "all_results.json").read_text())
    low, high = (100 * results[f"zero_shot_test_accuracy_ci_{end}"] for end in ("low", "high"))
    assert f"| {100 * results['zero_shot_test_accuracy']:.1f} % | {low:.1f} to {high:.1f} % |" in card
    assert f"gained {100 * (results['test_accuracy'] - results['zero_shot_test_accuracy']):.1f} points" in card
    rows = Dataset.from_parquet(str(run / "predictions_test.parquet"))
    for name in COLOURS:
        right = sum(row["label"] == row["prediction"] == name for row in rows)
        assert f"| {name} | 8 | {right} of 6 |" in card


def test_snippets_of_the_model_card_run_and_agree(run, monkeypatch):
    monkeypatch.chdir(run)
    ours, stock, zero_shot, sentences = snippets(Path("README.md").read_text())
    answer = pipeline("mmft-image-classification", model=".")("predictions_test.png")
    assert answer[0]["label"] in execute(ours) and "score" in execute(zero_shot)
    label, score = execute(stock).splitlines()[0].rsplit(" ", 1)
    assert label == answer[0]["label"] and float(score) == pytest.approx(answer[0]["score"], abs=2e-3)
    if importlib.util.find_spec("sentence_transformers"):
        assert "tensor" in execute(sentences)
    # What sentence-transformers 6.2 does with a folder that has no modules.json, whether it is installed or not.
    model, processor = AutoModel.from_pretrained("."), AutoProcessor.from_pretrained(".")
    assert type(model) is CLIPModel and model.get_text_features and model.get_image_features
    inputs = processor(text=["a red thing"], images=Image.open("predictions_test.png"), return_tensors="pt")
    assert model(**inputs).image_embeds.shape == (1, 32)


@pytest.fixture
def awkward(tmp_path) -> dict[str, Path]:
    """A picture that is turned by its EXIF tag, and two that are transparent: each looks different if that is not heeded."""
    left, clear = Image.new("RGB", (40, 60), (220, 30, 30)), Image.new("RGBA", (30, 40), (0, 0, 0, 0))
    left.paste((40, 60, 220), (0, 0, 40, 15))
    clear.paste((30, 180, 40, 255), (0, 0, 12, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    left.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    clear.save(tmp_path / "clear.png")
    clear.quantize(8).save(tmp_path / "palette.png")
    return {path.stem: path for path in tmp_path.iterdir()}


@pytest.fixture(scope="module")
def heads(run, tmp_path_factory) -> dict[str, Path]:
    """The run, and with two other kinds of head."""
    root = tmp_path_factory.mktemp("heads")
    for name in ("linear", "prototypes"):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["head", str(run), "--head", name, "--output_dir", str(root / name)]) == 0
    shutil.copytree(run, root / "kernel", ignore=shutil.ignore_patterns("checkpoint-*"))
    for name in ("kernel", "linear", "prototypes"):
        head = mmft_hf.ImageClassifier.from_pretrained(root / name).head
        assert head.kind == name
        # So sure of everything here that a picture seen wrongly would get the same scores.
        replace(head, temperature={"kernel": 4, "linear": 3, "prototypes": 1}[name] * head.temperature).save_pretrained(
            root / name
        )
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize("kind", ["turned", "clear", "palette"])
@pytest.mark.parametrize("head", ["kernel", "linear", "prototypes"])
def test_snippets_give_the_answers_of_predict_on_awkward_pictures(kind, head, awkward, heads, monkeypatch):
    monkeypatch.chdir(heads[head])
    path = awkward[kind]
    classifier = mmft_hf.ImageClassifier.from_pretrained(".")
    expected = {best["label"]: best["score"] for best in classifier.predict(path, top_k=3)}
    naive = {best["label"]: best["score"] for best in classifier.predict(_naive(path), top_k=3)}
    assert max(abs(naive[name] - score) for name, score in expected.items()) > 0.003  # the case can tell them apart
    ours, stock, *_ = (
        code.replace("predictions_test.png", str(path)) for code in snippets(Path("README.md").read_text())
    )
    found = [line.rsplit(" ", 1) for line in execute(stock).splitlines()]
    assert {label: float(score) for label, score in found} == pytest.approx(expected, abs=1e-3)
    for best in ast.literal_eval(execute(ours)):
        assert best["score"] == pytest.approx(expected[best["label"]], abs=1e-5)


@pytest.mark.parametrize("kind", ["turned", "clear", "palette", "long"])
def test_the_published_inference_code_sees_what_predict_sees(kind, awkward, run, tmp_path, monkeypatch):
    Image.new("RGB", (4000, 2), (40, 60, 220)).save(tmp_path / "long.png")
    path = {**awkward, "long": tmp_path / "long.png"}[kind]
    classifier = mmft_hf.ImageClassifier.from_pretrained(run)
    module = types.ModuleType("mmft_inference")
    exec(compile(inference_code(classifier.head), "mmft_inference.py", "exec"), vars(module))
    image_processor = classifier.processor.image_processor
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *a, **k: sizes.append(size) or resize(image, size, *a, **k)
    )
    this = types.SimpleNamespace(image_processor=image_processor)
    for source in (str(path), Image.open(path)):
        pixels = module.MMFTImageClassificationPipeline.preprocess(this, source)["pixel_values"]
        assert torch.equal(pixels, classifier.preprocess([path]))
    assert max(width * height for width, height in sizes) <= 16 * 1600


def _naive(path: Path) -> Image.Image:
    with Image.open(path) as image:
        plain = Image.new("RGB", image.size)
        plain.paste(image.convert("RGB"))
        return plain


@pytest.mark.slow
def test_published_snippets_run_from_a_cache_alone(run, tmp_path):
    card = card_for_repository(run, "someone/colours")
    assert (
        '"."' not in card
        and "for this folder" not in card
        and read_front_matter(card)[0]["model-index"][0]["name"] == "colours"
    )
    repo = tmp_path / "hub" / "models--someone--colours"
    shutil.copytree(run, repo / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("checkpoint-*"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (tmp_path / "empty").mkdir()
    code = "\n\n".join(snippets(card)[:3])
    out, _ = run_python(["-c", code], cwd=tmp_path / "empty", HF_HUB_CACHE=tmp_path / "hub", HF_HUB_OFFLINE=1)
    assert out.count("thing") >= 9, out


def test_the_hub_reads_the_metadata(run):
    card = ModelCard((run / "README.md").read_text())
    data: ModelCardData = card.data
    assert data.library_name == "transformers" and data.license == "mit" and data.metrics == ["accuracy"]
    name, results = model_index_to_eval_results(yaml.safe_load(card.content.split("---\n")[1])["model-index"])
    assert name == "base fine-tuned on pictures" and data.eval_results == results
    found = {result.metric_type: result.metric_value for result in results}
    expected = json.loads((run / "all_results.json").read_text())
    assert found["accuracy"] == pytest.approx(expected["test_accuracy"], abs=1e-4)
    assert found["mean_per_class_accuracy"] == pytest.approx(expected["test_mean_per_class_accuracy"], abs=1e-4)
    assert results[0].metric_args["low"] == pytest.approx(expected["test_accuracy_ci_low"], abs=1e-4)


def test_what_is_on_the_hub_is_named_and_linked(run, tmp_path):
    def facts(found):
        found["sources"]["base_model"] = {
            "name": "a/clip",
            "kind": "hub",
            "type": "model",
            "revision": None,
            "license": ["x"],
        }
        found["sources"]["dataset"] |= {"name": "a/captions", "kind": "hub", "captions_of": None}

    card = model_card(changed(run, tmp_path / "run", facts))
    front, text = read_front_matter(card)
    assert (
        front["base_model"] == "a/clip"
        and front["base_model_relation"] == "finetune"
        and front["datasets"] == ["a/captions"]
    )
    assert front["model-index"][0]["results"][0]["dataset"]["type"] == "a/captions"
    assert "(https://huggingface.co/a/clip)" in text and "(https://huggingface.co/datasets/a/captions)" in text
    assert "license" not in front and "must choose one" in text
    assert read_front_matter(card_for_repository(tmp_path / "run", "a/b", license="cc0-1.0"))[0]["license"] == "cc0-1.0"


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"zero_shot_won": True, "best_epoch": 0.0}, "both rows are the same classifier"),
        (
            {"test_accuracy": 0.2, "zero_shot_test_accuracy": 0.2},
            "Fine-tuning did not help here: the untuned model is as good",
        ),
        ({"test_accuracy": 0.2, "zero_shot_test_accuracy": 0.3}, "It was right 10.0 points more often."),
        ({"best_epoch": 0.0}, "The weights are those of the base model.** Only the head"),
        ({"zero_shot_test_accuracy_ci_high": 0.99}, "part of the gain may be chance"),
        ({"test_skipped_images": 7}, "7 test images could not be read"),
    ],
)
def test_what_did_not_go_well_is_said(run, tmp_path, results, words):
    assert words in model_card(changed(run, tmp_path / "run", results=lambda found: found.update(results)))


BOTH = [{"head": "mean", "alpha": 0.5}, {"head": "kernel", "alpha": 1.0}]


@pytest.mark.parametrize(
    ("epochs", "best_epoch_kept", "candidates", "enough", "expected"),
    [
        (3, True, [], None, "selected what was kept"),
        (3, False, [], None, "observed the training"),
        (3, True, BOTH, True, "selected what was kept"),
        (3, True, BOTH, False, "selected the epoch; too few to choose the weights and head by"),
        (3, False, BOTH, True, "selected the weights and head"),
        (0, True, BOTH[:1], False, "selected nothing"),
        (0, True, [BOTH[0], BOTH[0] | {"head": "kernel"}], False, "too few to choose the head by"),
    ],
)
def test_what_validation_selected_is_said_as_it_was(epochs, best_epoch_kept, candidates, enough, expected):
    identity = {"num_train_epochs": epochs, "max_steps": -1, "load_best_model_at_end": best_epoch_kept}
    results = {"head_candidates": candidates, "head_chosen_on_validation": enough} if candidates else {}
    assert _validation_role(identity, results) == expected


def test_lora_is_named_only_where_it_was(run, tmp_path):
    def lora(found):
        found["identity"]["vision_tower"] = "lora"
        found["sources"]["base_model"] = {"name": "a/clip", "kind": "hub", "type": "model", "revision": "v1"}

    assert "lora" not in model_card(run).lower() and "adapter" not in model_card(run)
    folder = changed(run, tmp_path / "run", lora)
    assert "peft" not in model_card(folder) and "image tower's weights were trained by LoRA" in model_card(folder)
    both, adapter = (model_card(folder, "a/b", parts) for parts in ("both", "adapter"))
    assert (
        'PeftModel.from_pretrained(CLIPModel.from_pretrained("a/clip", revision="v1"), "a/b", subfolder="adapter")'
        in both
    )
    assert len(snippets(both)) == 5 and len(snippets(adapter)) == 1 and '"a/b").merge' in adapter
    assert read_front_matter(adapter)[0]["base_model_relation"] == "adapter"
    for snippet in snippets(both):
        compile(snippet, "card", "exec")


def test_an_edited_card_is_published_as_it_was_edited(run, tmp_path):
    folder = changed(run, tmp_path / "run")
    (folder / "README.md").write_text(
        model_card(run).replace("## Limits", "## My limits").replace("license: mit\n", "")
    )
    card = card_for_repository(folder, "a/b", license="apache-2.0")
    assert "## My limits" in card and '"."' not in card and read_front_matter(card)[0]["license"] == "apache-2.0"
    assert card.count('hf_hub_download("a/b", "predictions_test.png")') == 4
    for snippet in snippets(card):
        compile(snippet, "card", "exec")
    (folder / "README.md").unlink()
    assert card_for_repository(folder, "a/b") == model_card(folder, "a/b")
    (folder / "README.md").write_text('# From an early version\n\n```python\npipeline("x", model=".")\n```\n')
    (folder / "mmft.json").write_text("{}")
    assert 'model="a/b"' in card_for_repository(folder, "a/b")


def test_names_from_data_become_no_markup(clip_folder, tmp_path, monkeypatch):
    root = tmp_path / "<b>`x`|"
    for split, per_class in (("train", 4), ("validation", 2), ("test", 2)):
        rows = colour_dataset(2 * per_class, captions=False)
        labels = [i % len(EVIL) for i in range(len(rows))]
        names = Dataset.from_dict({"image": rows["image"][:], "label": [EVIL[label] for label in labels]})
        root.mkdir(exist_ok=True)
        names.cast_column("image", rows.features["image"]).to_parquet(root / f"{split}.parquet")
    run = finetune(
        clip_folder, root, tmp_path / "run", "--num_train_epochs", "1", "--class_template", "a `{}` | <i>$x\n"
    )
    card = (run / "README.md").read_text(encoding="utf-8")
    text = outside_code(card)
    assert (
        "<script" not in text
        and "<b" not in text
        and "<i" not in text
        and "](http://evil" not in text
        and "$x" not in text
    )
    for block in re.findall(r"(?:^\|.*\n)+", read_front_matter(card)[1], flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    assert ModelCard(card).data.model_name and card.count("\n---\n") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "\\[x\\](http&#58;//evil.example)" in text
    assert len([line for line in card.splitlines() if line.startswith("## ")]) == 6
    for name in ("mammal", "`", "```\nx", "~~~", "@user www.x.org"):
        assert "\n" not in md(name) and not re.search(r"(?<!\\)[`~]", md(name)) and "@" not in md(name)
    monkeypatch.chdir(run)
    assert all(execute(snippet) for snippet in snippets(card)[:3])


def test_many_classes_are_folded_and_those_without_a_test_image_named(run, tmp_path):
    names = [f"bird {i}" for i in range(200)]
    rows = [{"index": i, "label": names[i % 199], "prediction": names[i % 7], "score": 0.5} for i in range(400)]

    def classes(found):
        found["class_names"] = names
        found["sources"]["train_images_per_class"] = [4] * 200

    card = model_card(changed(run, tmp_path / "run", classes, rows=rows))
    assert "<details><summary>All 199 classes, weakest first</summary>\n\n| class" in card and "\n\n</details>" in card
    assert "Without a test image, and so without a figure: bird 199." in card and "and 192 more" in card
    assert card.count("| bird 5 |") == 1 and card.count("| bird 8 |") == 2


def test_pictures_of_a_run(run):
    for name in ("confusion.png", "curves.png", "certainty.png", "predictions_test.png"):
        with Image.open(run / name) as picture:
            assert ink(picture) > 0.01 and (run / name).stat().st_size < 500_000, name


# -- the card of captions ---------------------------------------------------------------------------------------------
def test_the_whole_card_of_captions(tmp_path, monkeypatch):
    dataset = captioned(MIXED)
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    caption_report(CaptionStatistics(dataset), tmp_path, DETAILS)
    card = caption_card(CaptionStatistics(dataset), DETAILS, ["train"])
    assert DATASET_PATTERN.fullmatch(card), first_difference(DATASET_PATTERN, card)
    assert not PLACEHOLDERS.search(outside_code(card))
    assert DatasetCardData(**read_front_matter(card)[0]).pretty_name == "Captions of someone/colours"
    with Image.open(tmp_path / "captions.png") as picture:
        assert ink(picture) > 0.01
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (snippet,) = snippets(card)
    assert "red thing" in execute(snippet)


def test_captions_without_their_images_are_joined_as_the_card_says(tmp_path, monkeypatch):
    rows = colour_dataset(2, captions=False)
    (tmp_path / "IMAGES").mkdir()
    rows.to_parquet(tmp_path / "IMAGES" / "train.parquet")
    hashes = [
        sha256(image["bytes"]).hexdigest() for image in rows.cast_column("image", ImageColumn(decode=False))["image"]
    ]
    made = with_records(colour_dataset(2)).remove_columns("image_sha256").add_column("image_sha256", hashes)
    (tmp_path / "texts" / "captions").mkdir(parents=True)
    made.remove_columns("image").to_parquet(tmp_path / "texts" / "captions" / "train-00000-of-00001.parquet")
    details = {**DETAILS, "license": "cc-by-4.0"}
    options = {"repo_id": str(tmp_path / "texts"), "captions_only": True}
    card = caption_card(CaptionStatistics(made), details, ["train"], **options)
    assert "captions.png" not in card and "`cc-by-4.0`. Captions written by a model" in card
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets(card)
    assert "[" in execute(snippet)


# -- the examples -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["model_card", "dataset_card"])
def test_the_examples_are_whole(name):
    folder = Path(__file__).parents[2] / "docs" / "examples" / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert not PLACEHOLDERS.search(outside_code(card)) and "license" in read_front_matter(card)[0]
    for file in re.findall(r"\]\(([\w.]+)\)", card):
        assert (folder / file).is_file(), file
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000


# -- what pages are made of -------------------------------------------------------------------------------------------
def test_text_of_others():
    assert md("a\u202eb\x1b[31m") == "a b \\[31m" and md("x" * 200).endswith("…") and code("`|`\n") == "`'¦'`"
    assert fenced("a\n```\nb").startswith("````text\n") and public_name("/home/somebody/cats") == "cats"
    assert read_front_matter("---\n: [\n---\nx")[0] == {} == read_front_matter("no metadata")[0]
