"""The main job through the command line: what it leaves, what opens it, and that a kill loses nothing."""

import contextlib
import hashlib
import io
import json
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from forked import start
from PIL import Image
from processes import run_python, until
from safetensors.torch import load_file
from tiny_clip import COLOURS, colour_dataset
from transformers import CLIPModel, pipeline

import mmft_hf
from mmft_hf import ClassificationReport
from mmft_hf.cli import main

FAST = [
    "--num_train_epochs",
    "10",
    "--learning_rate",
    "5e-3",
    "--per_device_train_batch_size",
    "8",
    "--use_cpu",
    "true",
]


def arguments(clip_folder, data_folder, output) -> list[str]:
    return ["finetune", "--model_name_or_path", str(clip_folder), "--dataset_name", str(data_folder), "--output_dir", str(output), *FAST]  # fmt: skip


@pytest.fixture(scope="module")
def run(clip_folder, data_folder, tmp_path_factory):
    """One finished run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments(clip_folder, data_folder, folder)) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def pictures(data_folder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    test = load_dataset("parquet", data_files=str(data_folder / "test.parquet"), split="train")
    for i, row in enumerate(test):
        row["image"].save(folder / f"{i:02}.png")
    return sorted(map(str, folder.iterdir()))


def test_it_leaves_the_files_of_the_contract(run):
    folder, _ = run
    expected = {
        "config.json",
        "model.safetensors",
        "head.safetensors",
        "certainty.png",
        "mmft.json",
        "all_results.json",
    }
    expected |= {"predictions_test.parquet", "README.md", "tokenizer.json", "tokenizer_config.json"}
    found = {p.name for p in folder.iterdir()}
    assert expected <= found and "prototypes.safetensors" not in found  # that of version 0.1 holds prototypes alone
    # Nothing that would have to be unpickled, outside the checkpoints that only a resume reads.
    assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_results_have_the_names_of_the_contract(run):
    results = json.loads((run[0] / "all_results.json").read_text())
    for key in (
        "zero_shot_test_accuracy validation_accuracy test_accuracy test_mean_per_class_accuracy train_runtime "
        "train_samples_per_second test_accuracy_ci_low test_accuracy_ci_high selection_policy"
    ).split():
        assert key in results, key
    assert results["test_accuracy"] == 1.0 > results["zero_shot_test_accuracy"]
    assert results["test_images"] == 18


def test_predictions_agree_with_the_results(run, data_folder):
    rows = Dataset.from_parquet(str(run[0] / "predictions_test.parquet"))
    assert rows.column_names == ["index", "label", "prediction", "score"]
    truth = load_dataset("parquet", data_files=str(data_folder / "test.parquet"), split="train")["label"]
    assert rows["label"][:] == [list(COLOURS)[c] for c in truth]
    accuracy = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert accuracy == json.loads((run[0] / "all_results.json").read_text())["test_accuracy"]


def test_it_says_what_it_will_do_before_and_what_came_out_after(run):
    folder, printed = run
    before, after = printed.split("epoch   0.0/10")
    for text in (
        "3: red thing",
        "24 train, 12 validation, 18 test",
        "2.0 per training image",
        "vision tower full",
        "zero-shot",
    ):
        assert text in before, text
    why = "the default, since 12 validation images are too few to choose by"
    for text in ("fine-tuned      100.0 % (82.4 to 100.0)", "with class texts and a kernel regression", why, f"mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {folder}"):  # fmt: skip
        assert text in after, text


def test_pipeline_on_files_pictures_and_batches(run, pictures):
    classifier = pipeline("mmft-image-classification", model=str(run[0]))
    rows = Dataset.from_parquet(str(run[0] / "predictions_test.parquet"))
    from_files = classifier(pictures, top_k=1, batch_size=4)
    assert [top[0]["label"] for top in from_files] == rows["prediction"][:]
    for top, score in zip(from_files, rows["score"], strict=True):
        assert top[0]["score"] == pytest.approx(score, abs=1e-4)
    one = classifier(Image.open(pictures[0]))
    assert len(one) == 3 and sum(p["score"] for p in one) == pytest.approx(1, abs=1e-5)
    assert one[0] == pytest.approx(from_files[0][0])


def test_pipeline_with_evaluate(run, data_folder):
    import evaluate

    data = load_dataset("parquet", data_files=str(data_folder / "test.parquet"), split="train")
    classifier = pipeline("mmft-image-classification", model=str(run[0]))
    result = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=classifier,
        data=data,
        metric=ClassificationReport(keep_in_memory=True),
        label_mapping={name: i for i, name in enumerate(COLOURS)},
    )
    assert result["accuracy"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import mmft_hf, transformers.pipelines", "import transformers.pipelines, mmft_hf"])
def test_importing_the_package_registers_the_pipeline(order):
    code = f"{order}\nfrom transformers.pipelines import PIPELINE_REGISTRY as r\nprint(r.check_task('mmft-image-classification')[0])"
    assert run_python(["-c", code])[0].strip() == "mmft-image-classification"


def test_stock_transformers_open_the_folder(run, pictures):
    folder, _ = run
    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(COLOURS))
    zero_shot = pipeline("zero-shot-image-classification", model=str(folder))
    found = zero_shot(pictures[0], candidate_labels=list(COLOURS), hypothesis_template="a photo of a {}.")
    templates = mmft_hf.ClassPrototypes.from_templates(model, mmft_hf.load_model(str(folder))[1], list(COLOURS))
    ours = pipeline("mmft-image-classification", model=str(folder), prototypes=templates)(pictures[0])
    assert [p["label"] for p in found] == [p["label"] for p in ours]
    assert [p["score"] for p in found] == pytest.approx([p["score"] for p in ours], abs=1e-4)


def test_predict_prints_one_line_per_picture(run, pictures, capsys, tmp_path):
    folder, _ = run
    assert main(["predict", pictures[0], pictures[1], "--model_name_or_path", str(folder), "--top_k", "1"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{pictures[0]}: red thing ") and second.startswith(f"{pictures[1]}: green thing ")
    output = tmp_path / "answers.jsonl"
    assert (
        main(
            [
                "predict",
                str(Path(pictures[0]).parent),
                "--model_name_or_path",
                str(folder),
                "--output_file",
                str(output),
            ]
        )
        == 0
    )
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["file"] for a in answers] == pictures
    assert [a["predictions"][0]["label"] for a in answers] == list(COLOURS) * 6


def test_evaluate_gives_the_same_accuracy(run, data_folder, capsys, tmp_path):
    folder, _ = run
    report = tmp_path / "report"
    command = [
        "evaluate",
        "--model_name_or_path",
        str(folder),
        "--dataset_name",
        str(data_folder),
        "--output_dir",
        str(report),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    results = json.loads((folder / "all_results.json").read_text())
    assert "accuracy        100.0 % (82.4 to 100.0)" in printed
    found = json.loads((report / "report.json").read_text())
    assert found["accuracy"] == results["test_accuracy"] and found["split"] == "test"
    assert found["zero_shot"]["accuracy"] == results["zero_shot_test_accuracy"]
    assert (report / "confusion_matrix.csv").read_text().splitlines()[1] == "red thing,6,0,0"
    assert (report / "per_class.csv").read_text().splitlines()[1] == "red thing,6,1.0"


@pytest.fixture(scope="module")
def held_out(clip_folder, tmp_path_factory):
    """A run on a folder of class folders, whose test images were held out, and that folder."""
    from tiny_clip import colour_images

    root = tmp_path_factory.mktemp("held")
    for seed, name in enumerate(("pets", "more_pets")):
        for i, (image, label) in enumerate(colour_images(10, seed)):
            folder = root / name / list(COLOURS)[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:03}.png")
    command = ["finetune", "--dataset_name", str(root / "pets"), "--model_name_or_path", str(clip_folder)]
    settings = ["--shots", "4", "--shots_seed", "1", "--max_steps", "2", "--use_cpu", "true"]
    assert main([*command, "--output_dir", str(root / "out"), *settings]) == 0
    return root


def test_held_out_images_are_found_again_whatever_the_seed_of_the_call(held_out, capsys):
    command = ["evaluate", "--model_name_or_path", str(held_out / "out"), "--dataset_name"]
    assert main([*command, str(held_out / "pets"), "--output_dir", str(held_out / "report")]) == 0
    found = json.loads((held_out / "report" / "report.json").read_text())
    assert found["accuracy"] == json.loads((held_out / "out" / "all_results.json").read_text())["test_accuracy"]
    assert found["examples"] == 6
    assert main([*command, str(held_out / "more_pets")]) == 2
    assert (
        "or the data that the model was trained on, with its held-out test images; found neither, only train. Type "
        "--test_split train."
    ) in capsys.readouterr().err
    names = list(COLOURS)
    lines = [f"{p.relative_to(held_out)},{names.index(p.parent.name)}\n" for p in (held_out / "pets").glob("*/*.png")]
    (held_out / "test.csv").write_text("image,label\n" + "".join(lines))
    command += [str(held_out / "test.csv")]
    assert main(command) == 2  # a message of the training data must not hide what to type
    assert "found neither, only train. Type --test_split train. As the data" in capsys.readouterr().err
    assert main([*command, "--test_split", "train", "--class_names", *names]) == 0


@pytest.mark.usefixtures("captions_classify_nothing")
def test_the_zero_shot_classifier_wins_where_no_epoch_is_better(clip_folder, data_folder, tmp_path):
    more = ["--max_steps", "1", "--head", "prototypes"]
    assert main([*arguments(clip_folder, data_folder, tmp_path / "out"), *more]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert "no epoch was better" in results["selection"]
    assert results["test_accuracy"] == results["zero_shot_test_accuracy"]
    assert mmft_hf.ClassPrototypes.from_pretrained(tmp_path / "out").source == "template"
    expected, found = (load_file(folder / "model.safetensors") for folder in (clip_folder, tmp_path / "out"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_test_split_is_read_once_after_selection(clip_folder, data_folder, tmp_path, monkeypatch):
    from mmft_hf.data import views
    from mmft_hf.train.trainer import MMFTTrainer

    test = load_dataset("parquet", data_files=str(data_folder / "test.parquet"), split="train")
    sealed = {hashlib.sha256(row["bytes"]).hexdigest() for row in test.data.column("image").to_pylist()}
    events = []
    read, train = views.read_image, MMFTTrainer.train

    def logging_read(source):
        if hashlib.sha256(source["bytes"]).hexdigest() in sealed:
            events.append("test image")
        return read(source)

    def logging_train(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        events.append("trained")
        return result

    monkeypatch.setattr(views, "read_image", logging_read)
    monkeypatch.setattr(MMFTTrainer, "train", logging_train)
    more = ["--max_steps", "1", "--cache_frozen_features", "false"]  # the untuned model's embeddings are in no cache
    assert main([*arguments(clip_folder, data_folder, tmp_path / "out"), *more]) == 0
    # Once by the tuned and once by the untuned model, for the two rows of the result.
    assert events == ["trained"] + ["test image"] * 2 * len(test)


@pytest.mark.slow
def test_captions_are_made_then_trained_on(clip_folder, tmp_path, capsys):
    captioned, output = tmp_path / "captioned", tmp_path / "out"
    command = [
        "caption",
        "--text_columns",
        "text",
        "--output_dir",
        str(captioned),
        "--model_name_or_path",
        str(clip_folder),
    ]
    assert main(command) == 0
    data = load_dataset(str(captioned))
    original = mmft_hf.load_captioned_dataset("builtin/emoji-mini")
    assert {name: len(split) for name, split in data.items()} == {name: len(split) for name, split in original.items()}
    row, source = data["train"][5], original["train"][5]
    assert row["captions"] == list(dict.fromkeys(" ".join(t.split()) for t in source["text"]))
    assert row["caption_records"][0]["model"] == "columns" and row["caption_records"][0]["aspect"] == "text"
    assert data["test"][0]["captions"] == []
    stored = data["train"].data.column("image")[5].as_py()["bytes"]
    assert hashlib.sha256(stored).hexdigest() == row["image_sha256"]
    assert stored == original["train"].data.column("image")[5].as_py()["bytes"]
    command = [
        "finetune",
        "--dataset_name",
        str(captioned),
        "--model_name_or_path",
        str(clip_folder),
        "--output_dir",
        str(output),
    ]
    assert main([*command, "--max_steps", "1", "--per_device_train_batch_size", "8", "--use_cpu", "true"]) == 0
    assert "24: mammal" in capsys.readouterr().out


def test_without_captions_it_trains_with_templates_and_says_so(clip_folder, tmp_path, capsys):
    data = colour_dataset(4, captions=False)
    (tmp_path / "data").mkdir()
    data.add_column("text", ["a thing"] * len(data)).to_parquet(tmp_path / "data" / "train.parquet")
    assert main([*arguments(clip_folder, tmp_path / "data", tmp_path / "out"), "--max_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert 'none: class template "a photo of a {}." alone' in printed
    assert "type --captions_column text" in printed


@pytest.mark.parametrize(
    "sign",
    [
        "checkpoint-9/optimizer.pt",
        *(pytest.param(sign, marks=pytest.mark.slow) for sign in ("mmft.json", "checkpoint-3", "head.safetensors")),
    ],
)
def test_killed_and_resumed_gives_the_same_weights(run, clip_folder, data_folder, tmp_path, sign):
    """SIGKILL at the moment a file appears: before the first checkpoint, within one, between two, at the very end."""
    output = tmp_path / "out"
    words = arguments(clip_folder, data_folder, output)
    process = start(words, tmp_path / "killed.txt")
    until((output / sign).exists, every=0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.text
    resumed = start([*words, "--resume_from_checkpoint", "true"], tmp_path / "resumed.txt")
    assert resumed.wait() == 0, resumed.text
    expected, found = load_file(run[0] / "model.safetensors"), load_file(output / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert json.loads((output / "mmft.json").read_text())["completed"]


def test_a_finished_run_is_not_trained_again(run, clip_folder, data_folder, capsys):
    folder, _ = run
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert main([*arguments(clip_folder, data_folder, folder), "--resume_from_checkpoint", "true"]) == 0
    assert "complete" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_pipeline_prepares_pictures_as_in_training_whatever_backend_is_installed(run, pictures):
    class TorchvisionLike:
        def __call__(self, *args, **kwargs):
            raise AssertionError("another backend prepared the picture")

    stock = pipeline("mmft-image-classification", model=str(run[0]))
    ours = mmft_hf.MMFTImageClassificationPipeline(model=stock.model, image_processor=TorchvisionLike())
    assert ours(pictures[0]) == stock(pictures[0])
