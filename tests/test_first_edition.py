"""What the first edition of the library left on disk, and the numbers that it computed: still opened, still the same.

`fixtures/first_edition` holds runs, captioned folders and benchmark results as release 0.1.0 wrote them, and `answers`
with what it made of them. Each test copies what it needs to a folder of its own, lets the library of today do the same,
and compares. Only the command line and the public names are used, so that modules may move without a change here.

Counts, texts, hashes and files are compared exactly, everywhere. Floating-point numbers are compared to the last bit
where the machine computes as the one of the recording did (see `environment`), and within `TOLERANCE` elsewhere.

`fixtures/make_first_edition.py` made the folder, with the commands and the `observe_…` functions below.
"""

import contextlib
import csv
import hashlib
import io
import json
import re
import shutil
import sqlite3
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from caption_server import serving
from peft import PeftModel
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import CLIPModel, pipeline, set_seed

import mmft_hf
from mmft_hf import (
    Captioner,
    ClassBalancedSampler,
    ClassificationReport,
    ClassPrototypes,
    MMFTConfig,
    MMFTDataCollator,
    MMFTImageClassificationPipeline,
    MMFTLoss,
    MMFTTrainer,
    PromptSet,
    caption_dataset,
    clip_loss,
    few_shot_split,
    load_captioned_dataset,
    load_model,
    set_towers,
    supcon_loss,
)
from mmft_hf.cli import main

FIRST = Path(__file__).parent / "fixtures" / "first_edition"
TOLERANCE = 1e-6
# Of training: the rounding of one step is carried through all those that follow.
TRAINED = 1e-4

# -- the commands -------------------------------------------------------------------------------------------------------
# All names are relative: a run is resumed with the names that it was started with, wherever its folder lies.
# Adam's epsilon is large so that gradients that are zero up to rounding do not become whole steps.
# What the first edition did, which had no setting for it.
PLAIN = "--head prototypes --calibrate false"
TRAIN = f"finetune --model_name_or_path clip --use_cpu true --adam_epsilon 1e-4 --seed 3 {PLAIN}"
COLOURS = f"{TRAIN} --dataset_name colours --per_device_train_batch_size 6"
RUNS = {
    "full": f"{COLOURS} --learning_rate 5e-4 --num_train_epochs 5",
    "lora": f"{COLOURS} --learning_rate 3e-3 --num_train_epochs 4 --vision_tower lora --text_tower lora --lora_rank 2 "
    "--lora_dropout 0.1 --metric_for_best_model loss --save_strategy steps --save_steps 2 --eval_strategy steps --eval_steps 2",
    "held_out": f"{TRAIN} --dataset_name pets --learning_rate 1e-3 --num_train_epochs 3 --shots 4 --shots_seed 1 "
    "--per_device_train_batch_size 4",
}
# Which run each of these would have become, had it not been killed after so many steps.
CUT = {"full_cut": ("full", 8), "lora_cut": ("lora", 7)}

ASKING = "caption --dataset_name photos --concurrency 1 --model_name_or_path clip"
CAPTIONED = {
    "openai": f"{ASKING} --captioner openai --captioner_model m",
    "openai_cut": f"{ASKING} --captioner openai --captioner_model m",
    "openai_mixed": f"{ASKING} --captioner openai --captioner_model m --aspects visual shape",
    "gemini": f"{ASKING} --captioner gemini --captioner_model gemini-2.5-flash-lite --aspects_per_call all --domain pets "
    "--api_key_env FIRST_EDITION_KEY --max_side 16",
    "anthropic": f"{ASKING} --captioner anthropic --captioner_model c --samples 2 --aspects visual --words 30 "
    "--temperature 0.7 --max_tokens 300 --api_key_env FIRST_EDITION_KEY",
    "columns": "caption --captioner columns --dataset_name colours --text_columns notes --model_name_or_path clip",
    "template": "caption --captioner template --dataset_name colours --class_template a_{} --model_name_or_path clip",
}
ASKED = [name for name, words in CAPTIONED.items() if "--concurrency" in words]
MORE_TOKENS = ("--max_tokens", "400")
PATHS = {"openai": "/v1", "gemini": "/v1beta", "anthropic": ""}

BENCHMARK = (
    "benchmark --model_name_or_path clip --dataset_name colours --use_cpu true --max_steps 4 --adam_epsilon 1e-4 "
    "--per_device_train_batch_size 6 --learning_rate 5e-4 --shots 1 2 --seeds 0 1 --methods zs zs-ens zs-cap lp gda tip-f "
    "lp++ ce clip-lora flyp mmft mmft+wise mmft-no-captions"
)
TIMES = ("fit_seconds", "test_seconds", "time")
RECOMPUTED = [
    ("lp", 2, 1),
    ("gda", 1, 0),
    ("ce", 1, 1),
    ("clip-lora", 2, 0),
    ("mmft", 2, 1),
    ("mmft-no-captions", 1, 0),
]

# What a Trainer is given in Python: settings of `set_towers` and of `MMFTConfig`.
TRAININGS = {
    "plain": ({}, {"num_train_epochs": 3}),
    "balanced": ({}, {"samples_per_class": 2, "caption_dropout": 0.3, "crop_min_area": 0.4, "data_seed": 5}),
    "blended": (
        {},
        {"supcon_weight": 0.3, "supcon_weight_end": 0.6, "include_self": True, "weight_averaging": 0.9}
        | {"template_weight": 0.2},
    ),
    "chunked": ({}, {"loss_chunk_size": 4, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}),
    "frozen": ({"text": "frozen"}, {"crop_min_area": 1.0, "prototypes": "images"}),
    "lora": ({"vision": "lora", "text": "full", "lora_dropout": 0.2}, {"prototypes": "templates"}),
}


# -- comparing ----------------------------------------------------------------------------------------------------------
def environment() -> dict:
    """What the last bit of a number depends on, apart from the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    libraries = ("torch", "transformers", "numpy", "pillow", "peft", "scikit-learn")
    return {
        "versions": {name: version(name) for name in libraries},
        "cpu": sorted(names),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.accelerator.is_available(),
    }


def answers(name: str):
    """What the first edition gave."""
    return json.loads((FIRST / "answers" / f"{name}.json").read_text(encoding="utf-8"))


EXACT = not (FIRST / "answers" / "environment.json").exists() or answers("environment") == environment()


def assert_same(found, expected, tolerance: float = TOLERANCE, place: str = "") -> None:
    """Both are made of dicts, lists, texts and numbers. A `sha256` of floats only means something where `EXACT`."""
    if isinstance(expected, dict):
        # A later edition may add a figure, but it keeps all of the first.
        assert isinstance(found, dict) and expected.keys() <= found.keys(), place
        for key in expected:
            if EXACT or key != "sha256":
                assert_same(found[key], expected[key], tolerance, f"{place}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, tolerance, f"{place}/{i}")
    elif isinstance(expected, float) and not EXACT:
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance), place
    else:
        assert found == expected, place


def assert_same_tensors(found: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if EXACT:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, atol=tolerance, rtol=tolerance, msg=name)


def plain(value):
    """Arrays and tensors as lists, tuples as lists: as they come back from JSON."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return plain(value.tolist()) if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value


def without_times(entry: dict) -> dict:
    return {k: v for k, v in entry.items() if not re.search("runtime|per_second|seconds|total_flos|^time$", k)}


# -- files --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the model and the pictures that all commands name, and no dataset in any cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("FIRST_EDITION_KEY", "no-secret")
    for name in ("clip", "colours", "photos", "pets", "pictures"):
        shutil.copytree(FIRST / name, name)
    return tmp_path


def bring(name: str, target: str | None = None) -> Path:
    """A copy of what the first edition left, with its times."""
    return Path(shutil.copytree(FIRST / name, target or Path(name).name))


def words(command: str, output: str, *more) -> list[str]:
    return [*command.split(), "--output_dir", output, *map(str, more)]


def run(arguments: list[str], code: int = 0) -> str:
    """Runs a command, expects its exit code, and returns what it printed on standard output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments) == code
    return printed.getvalue()


def front_matter(folder: Path) -> dict:
    """The YAML at the top of a card."""
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def json_of(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# -- runs ---------------------------------------------------------------------------------------------------------------
def pictures() -> list[str]:
    return sorted(str(path) for path in Path("pictures").iterdir())


def observe_classifier(folder: str, data: str) -> dict:
    """What everything that opens a finished run says of the pictures and the test split."""
    classifier = pipeline("mmft-image-classification", model=folder)
    assert isinstance(classifier, MMFTImageClassificationPipeline)
    run(["predict", "pictures", "--model_name_or_path", folder, "--output_file", "predicted.jsonl", "--top_k", "2"])
    run(["predict", *pictures(), "--model_name_or_path", folder, "--output_file", "predicted.csv"])
    run(["evaluate", "--model_name_or_path", folder, "--dataset_name", data, "--output_dir", "report"])
    prototypes = ClassPrototypes.from_pretrained(folder)
    return plain(
        {
            "pipeline": classifier(pictures(), top_k=3, batch_size=2),
            "of_an_image": classifier(PILImage.open(pictures()[0])),
            "jsonl": [json.loads(line) for line in Path("predicted.jsonl").read_text().splitlines()],
            "csv": [[_number(cell) for cell in row] for row in csv.reader(open("predicted.csv", encoding="utf-8"))],
            "report": json_of("report/report.json"),
            "per_class": Path("report/per_class.csv").read_text(),
            "confusion_matrix": Path("report/confusion_matrix.csv").read_text(),
            "prototypes": vars(prototypes),
        }
    )


def _number(cell: str):
    return float(cell) if re.fullmatch(r"\d+\.\d+(e-\d+)?", cell) else cell


def results_of(folder: str) -> dict:
    """The numbers of a run's own files, without times."""
    state = json_of(f"{folder}/trainer_state.json")
    return {
        "results": without_times(json_of(f"{folder}/all_results.json")) | {"selection": None},
        "predictions": pq.read_table(f"{folder}/predictions_test.parquet").to_pylist(),
        "log": [without_times(entry) for entry in state["log_history"]],
        "best": [state["best_global_step"], state["best_metric"], state["global_step"]],
    }


def assert_same_run(found: str, expected: str, results: dict | None = None) -> None:
    """Two folders of one run, of which `expected` is the first edition's.

    `results` are those of a resumed run: its log has one evaluation more, and its mean loss is of the last steps alone.
    """
    for name in ("model.safetensors", "prototypes.safetensors", "adapter/adapter_model.safetensors"):
        assert Path(found, name).exists() == Path(expected, name).exists(), name
        if Path(expected, name).exists():
            assert_same_tensors(load_file(f"{found}/{name}"), load_file(f"{expected}/{name}"), TRAINED)
    assert_same(results_of(found), results or results_of(expected), TRAINED)
    ours, theirs = json_of(f"{found}/mmft.json"), json_of(f"{expected}/mmft.json")
    assert ours["completed"] and theirs["completed"]
    for key in ("identity", "data"):
        assert theirs[key].items() <= ours[key].items(), key  # a later edition may name more
    for key in ("class_names", "model_type", "prototypes"):
        assert ours[key] == theirs[key], key
    for name in ("config.json", "adapter/adapter_config.json"):
        if Path(expected, name).exists():
            own, first = json_of(f"{found}/{name}"), json_of(f"{expected}/{name}")
            for made_by in ("transformers_version", "peft_version"):
                own.pop(made_by, None), first.pop(made_by, None)
            assert own == first, name
    ours, theirs = front_matter(Path(found)), front_matter(Path(expected))
    for key in ("library_name", "pipeline_tag", "tags", "metrics"):
        assert ours[key] == theirs[key], key
    (ours,), (theirs,) = ours["model-index"][0]["results"], theirs["model-index"][0]["results"]
    assert [m["type"] for m in ours["metrics"]] == [m["type"] for m in theirs["metrics"]]
    assert [m["value"] for m in ours["metrics"]] == [m["value"] for m in theirs["metrics"]]
    assert ours["metrics"][0]["args"] == theirs["metrics"][0]["args"] and ours["dataset"] == theirs["dataset"]


@pytest.mark.parametrize("name", ["full", "lora", "held_out"])
def test_a_finished_run_gives_the_same_answers(here, name):
    bring(f"runs/{name}")
    data = "pets" if name == "held_out" else "colours"
    assert_same(observe_classifier(name, data), answers(f"classifier_{name}"))
    if name != "held_out":  # whose test split was no file of its own
        test = load_captioned_dataset(data)["test"]
        top = pipeline("mmft-image-classification", model=name)(list(test["image"]), top_k=1)
        assert [one[0]["label"] for one in top] == [row["prediction"] for row in results_of(name)["predictions"]]


@pytest.mark.parametrize("name", ["full", "lora", "held_out"])
def test_the_same_command_makes_the_same_run(here, name):
    bring(f"runs/{name}", "expected")
    run(words(RUNS[name], "again"))
    assert_same_run("again", "expected")
    assert {p.name for p in Path("again").iterdir()} >= {p.name for p in Path("expected").iterdir()}


def test_a_finished_run_is_known_by_its_settings(here):
    folder = bring("runs/full")
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir() if p.is_file()}
    run(words(RUNS["full"], "full", "--resume_from_checkpoint", "true"))  # complete: nothing to do
    run(words(RUNS["full"], "full"), 2)  # it would be overwritten
    run(words(RUNS["full"], "full", "--resume_from_checkpoint", "true", "--supcon_weight", 0.2), 2)
    shutil.copy("colours/validation.parquet", "colours/train.parquet")
    run(words(RUNS["full"], "full", "--resume_from_checkpoint", "true"), 2)  # other data
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("name", CUT)
def test_a_killed_run_is_resumed_to_the_same_weights(here, name):
    whole, _ = CUT[name]
    bring(f"runs/{name}", "moved"), bring(f"runs/{whole}", "expected")
    last = max(Path("moved").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    logged = json_of(last / "trainer_state.json")["log_history"]
    assert logged and not json_of("moved/mmft.json")["completed"]
    run(words(RUNS[whole], "moved", "--resume_from_checkpoint", "true"))
    assert_same_run("moved", "expected", answers("resumed")[name])
    # With the times of the killed process: it went on, and did not start again.
    assert json_of("moved/trainer_state.json")["log_history"][: len(logged)] == logged


def test_a_killed_run_with_other_settings_is_not_resumed(here):
    bring("runs/lora_cut", "lora")
    run(words(RUNS["lora"], "lora", "--resume_from_checkpoint", "true", "--lora_alpha", 8), 2)
    bring("runs/full_cut", "full")
    run(words(RUNS["full"], "full", "--resume_from_checkpoint", "true", "--learning_rate", "1e-3"), 2)


def observe_adapter(folder: str) -> dict:
    """Embeddings of the base model with the adapter, by PEFT alone, and of the merged model."""
    merged, processor = load_model(folder)
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained("clip"), f"{folder}/adapter")
    images = [PILImage.open(path).convert("RGB") for path in pictures()]
    texts = ["a photo of a red thing.", "a photo of a green thing. very green"]
    inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
    inputs |= processor.image_processor(images, return_tensors="pt")
    found = {}
    for name, model in (("merged", merged), ("adapted", adapted)):
        with torch.no_grad():
            out = model.eval()(**inputs)
        found[name] = {"images": out.image_embeds, "texts": out.text_embeds, "logits": out.logits_per_image}
    return plain(found)


def test_an_adapter_and_its_merged_model_give_the_same_embeddings(here):
    bring("runs/lora")
    found = observe_adapter("lora")
    assert_same(found, answers("adapter"))
    for name in ("images", "texts", "logits"):
        np.testing.assert_allclose(found["merged"][name], found["adapted"][name], atol=1e-5)


def test_a_checkpoint_with_lora_holds_what_is_trained_and_is_no_model(here):
    bring("runs/lora_cut")
    names = load_file("lora_cut/checkpoint-6/model.safetensors").keys()
    assert all(".lora_" in name or name == "logit_scale" for name in names)
    run(["predict", "pictures", "--model_name_or_path", "lora_cut/checkpoint-6"], 2)


# -- the Trainer in Python ------------------------------------------------------------------------------------------------
class Recording(MMFTDataCollator):
    """Keeps what each row of training became: its class, its text, and a hash of its pixels."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        if "input_ids" in batch:
            processor = self.processor.image_processor
            mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
            pixels = ((batch["pixel_values"] * std + mean) * 255).round().to(torch.uint8)
            which = batch.get("text_rows", torch.arange(len(rows)))
            texts = self.processor.tokenizer.batch_decode(batch["input_ids"][which], skip_special_tokens=True)
            crops = [hashlib.sha256(p.numpy().tobytes()).hexdigest()[:16] for p in pixels]
            self.seen.append([list(row) for row in zip(batch["labels"].tolist(), texts, crops, strict=True)])
        return batch


def observe_training(name: str) -> dict:
    """A few steps with a log line each, and all that the batches of the plain training held."""
    towers, settings = TRAININGS[name]
    set_seed(0)
    model, processor = load_model("clip")
    set_towers(model, **towers)
    data = load_captioned_dataset("colours")
    settings = {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 6, "seed": 1} | settings
    settings |= {"logging_strategy": "steps", "logging_steps": 1, "adam_epsilon": 1e-4}
    settings |= {"load_best_model_at_end": False}  # the weights of the last step are looked at
    collator = Recording(processor, distinct_texts=True)
    collator.seen = []
    trainer = MMFTTrainer(
        model=model,
        args=MMFTConfig(f"trained_{name}", use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=processor,
        data_collator=collator,
    )
    trainer.train()
    prediction = trainer.predict(data["test"])
    state = trainer.model.state_dict()
    whole = hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()
    return plain(
        {
            "log": [without_times(entry) for entry in trainer.state.log_history],
            "best": [trainer.state.best_global_step, trainer.state.best_metric],
            "batches": collator.seen if name == "plain" else len(collator.seen),
            "weights": {
                key: [value.double().sum().item(), value.double().norm().item()] for key, value in state.items()
            },
            "sha256": whole,
            "scores": prediction.predictions,
            "prototypes": trainer.build_prototypes().embeddings,
        }
    )


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_takes_the_same_steps(here, name):
    found, expected = observe_training(name), answers("trainings")[name]
    # Scores are cosines times a scale of about 14, sums are over thousands of weights.
    assert_same(found, expected, 10 * TRAINED)
    if name == "plain":
        assert len(expected["batches"]) == 9 and found["batches"] == expected["batches"]


# -- pure functions -------------------------------------------------------------------------------------------------------
def observe_losses(inputs: dict) -> dict:
    """Values and gradients of the losses on fixed embeddings, in two precisions and bfloat16."""
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for case, labels in inputs["labels"].items():
            labels = torch.tensor(labels)
            calls = {
                f"mmft {w} {own}": (lambda i, t, s, w=w, own=own, y=labels: MMFTLoss(w, own)(i, t, y, s))
                for w, own in ((0.1, False), (0.1, True), (0.0, False), (1.0, False), (0.5, True))
            }
            calls["supcon"] = lambda i, t, s, y=labels: supcon_loss(i, y, t, y, s)
            calls["supcon without pairs"] = lambda i, t, s, y=labels: supcon_loss(
                i, y, t, y, s, torch.eye(len(y), dtype=torch.bool)
            )
            calls["supcon of some"] = lambda i, t, s, y=labels: supcon_loss(i[:3], y[:3], t, y, s)
            calls["clip"] = lambda i, t, s: clip_loss(i, t, s)
            for call, function in calls.items():
                images, texts = (torch.tensor(inputs[k], dtype=dtype).requires_grad_() for k in ("images", "texts"))
                scale = torch.tensor(inputs["scale"], dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
                out = function(images, texts, scale)
                parts = out if isinstance(out, dict) else {"loss": out}
                gradients = torch.autograd.grad(parts["loss"], (images, texts, scale), allow_unused=True)
                values = {key: value.detach().double() for key, value in parts.items()}
                values |= {
                    f"d_{key}": None if g is None else g.double()
                    for key, g in zip(("images", "texts", "scale"), gradients, strict=True)
                }
                found[f"{dtype} {case} {call}"] = plain(values)
    return found


def test_losses_have_the_same_values_and_gradients():
    expected = answers("losses")
    found = observe_losses(expected["inputs"])
    assert len(found) == 3 * 4 * 9
    for name, values in expected["values"].items():
        # Half precision rounds the gradient once more, to three digits.
        assert_same(found[name], values, 1e-2 if "bfloat16" in name else TOLERANCE, name)


def observe_draws() -> dict:
    """Few-shot subsets, balanced batches, prompts and a report: what captions and results are stored under."""
    labels = [i % 4 for i in range(23)] + [9, 9]
    sampler = ClassBalancedSampler(labels, 8, 2, seed=3)
    batches = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
    prompts = {}
    for domain, more in (("pets", {}), ("eurosat", {"words": 20}), ("general objects", {"clean_names": False})):
        own = {"color": "Which colours has {class_name}?"}
        asked = PromptSet(("visual", "shape", "color"), domain, own_prompts=own, **more)
        texts = {a: [asked.prompt_id(a), asked.prompt(a, "Saint_Bernard {x}")] for a in asked.aspects}
        prompts[domain] = texts | {"joint": asked.joint_prompt("Saint_Bernard {x}")}
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(6) / 8, (9, 1)), axis=1)
    report = ClassificationReport(keep_in_memory=True).compute(
        predictions=scores.argmax(1).tolist(),
        references=[0, 1, 2, 3, 4, 4, 0, 1, 2],
        scores=scores.tolist(),
        class_names=list("abcdef"),
    )
    few = {f"{shots} {seed}": few_shot_split(labels, shots, seed) for shots in (1, 3, 6) for seed in (0, 1)}
    return plain({"few": few, "balanced": batches, "prompts": prompts, "scores": scores, "report": report})


def test_draws_and_prompts_are_the_same():
    assert_same(observe_draws(), answers("draws"))


def observe_prototypes() -> dict:
    """Class embeddings of the untuned model from every source, and what a classifier makes of them."""
    model, processor = load_model("clip")
    data = load_captioned_dataset("colours")
    train, names = data["train"], data["train"].features["label"].names
    made = {
        "captions": ClassPrototypes.from_captions(model, processor, train),
        "mixed": ClassPrototypes.from_captions(model, processor, train, "a {} here", template_weight=0.3),
        "template": ClassPrototypes.from_templates(model, processor, names),
        "templates": ClassPrototypes.from_templates(model, processor, names, ["a {}.", "one {}, there"]),
        "images": ClassPrototypes.from_images(model, processor, train),
        "stored": ClassPrototypes.from_pretrained("prototypes"),
    }
    made["interpolated"] = made["captions"].interpolate(made["template"], 0.25)
    embeds = torch.nn.functional.normalize(torch.arange(32.0).reshape(2, 16).cos(), dim=1)
    return plain({name: vars(p) | {"logits": p.logits(embeds)} for name, p in made.items()})


def test_prototypes_are_the_same(here):
    bring("prototypes")
    found = observe_prototypes()
    assert_same(found, answers("prototypes"))
    assert found["stored"] == found["mixed"] or not EXACT
    rows = load_captioned_dataset("colours", captions_column="notes")
    assert_same({name: plain_rows(split) for name, split in rows.items()}, answers("rows_of_colours"))


def plain_rows(dataset) -> list[dict]:
    """Rows with a hash in place of each picture."""
    rows = []
    for row in (
        dataset.cast_column("image", datasets.Image(decode=False)) if "image" in dataset.column_names else dataset
    ):
        image = row.pop("image")
        data = image["bytes"] or Path(image["path"]).read_bytes()
        rows.append(plain(row) | {"image": hashlib.sha256(data).hexdigest(), "file": Path(image["path"] or "").name})
    return rows


# -- captions -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def server(tmp_path_factory):
    with serving({}, tmp_path_factory.mktemp("server") / "requests.jsonl") as running:
        yield running


def captioning(name: str, url: str, output: str, *action) -> list[str]:
    """The command of a captioned folder, to a server at this address."""
    first, *rest = words(CAPTIONED[name], output)
    address = ["--base_url", url + PATHS[name.split("_")[0]]] if name in ASKED else []
    return [first, *action, *rest, *address]


def ask(server, name: str, output: str, *action, code: int = 0, text: bool = False, more=()):
    """Runs it; returns what the server was asked, as sorted pairs of picture and prompt."""
    before = len(server.requests())
    printed = run([*captioning(name, server.url, output, *action), *more], code)
    asked = sorted([row["picture"], row["prompt"]] for row in server.requests()[before:])
    return (asked, printed) if text else asked


def captioned_rows(folder: str) -> dict:
    """The rows of the parquet files, read without the library: captions with their records, but for the run's name and for the
    fields that were added since, which captioning leaves empty."""
    found = {}
    for path in sorted(Path(folder, "data").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            image = row.pop("image")
            row |= {"image": hashlib.sha256(image["bytes"]).hexdigest(), "file": image["path"]}
            for record in row.get("caption_records") or ():
                record.pop("run_id")
                for new in ("scores", "step", "parents", "view", "refs", "removed_by"):
                    assert record.pop(new, None) is None
        found.setdefault(path.name.split("-")[0], []).extend(rows)
    return found


JOURNAL = "key, slot, call_id, image_sha256, label, prompt_id, aspect, sample, reask, pending, status, raw_text, text, checks, max_tokens"
JOURNAL += ", tokens_in, tokens_out, cost, attempts, finish_reason, model, error_class"


def journal(folder: str) -> list[list]:
    """All results of a journal, read without the library."""
    rows = []
    for path in sorted(Path(folder, "journal").glob("*.sqlite")):
        with contextlib.closing(sqlite3.connect(path)) as db:
            rows += [list(row) for row in db.execute(f"SELECT {JOURNAL} FROM results")]
    return sorted(rows, key=str)


def numbers(text: str) -> list[list[int]]:
    """The whole numbers of each line."""
    found = (re.findall(r"(?<![\w.])\d[\d,]*(?![\w.])", line) for line in text.splitlines())
    return [[int(number.replace(",", "")) for number in line] for line in found]


@pytest.mark.parametrize("name", [name for name in CAPTIONED if name != "openai_cut"])
def test_captions_are_read_as_they_were(here, name):
    bring(f"captioned/{name}")
    expected = answers("captions")[name]
    assert captioned_rows(name) == expected["rows"]
    found = load_captioned_dataset(name)
    assert {split: [row["captions"] for row in data] for split, data in found.items()} == {
        split: [row["captions"] for row in rows] for split, rows in expected["rows"].items()
    }
    assert {split: [row["image"] for row in plain_rows(data)] for split, data in found.items()} == {
        split: [row["image"] for row in rows] for split, rows in expected["rows"].items()
    }


@pytest.mark.parametrize("name", ["openai", "gemini", "anthropic", "columns", "template"])
def test_a_finished_folder_asks_nothing_again(here, server, name):
    bring(f"captioned/{name}")
    before = journal(name)
    assert ask(server, name, name) == []
    assert journal(name) == before and captioned_rows(name) == answers("captions")[name]["rows"]


@pytest.mark.parametrize("name", ["openai", "gemini", "anthropic", "columns", "template"])
def test_the_data_set_is_made_again_from_the_journal_alone(here, server, name):
    folder = Path("again")
    if name in ASKED:
        shutil.copytree(FIRST / "captioned" / name / "journal", folder / "journal")
    assert ask(server, name, "again") == []
    assert captioned_rows("again") == answers("captions")[name]["rows"]
    ours, theirs = json_of(folder / "captions.json"), json_of(FIRST / "captioned" / name / "captions.json")
    for key in ("made_from", "complete", "statuses"):
        assert ours.get(key) == theirs.get(key), key
    ours, theirs = front_matter(folder), front_matter(FIRST / "captioned" / name)
    for card in (ours, theirs):
        for config in card["configs"]:
            config.pop("description", None)  # names the run
    assert ours == theirs
    assert {p.name for p in folder.iterdir()} >= {p.name for p in (FIRST / "captioned" / name).iterdir()}


@pytest.mark.parametrize("name", ["openai", "gemini", "anthropic"])
def test_requests_are_the_same(here, server, name):
    """Asked from scratch: the same pictures and prompts, stored under the same keys."""
    asked = ask(server, name, "new")
    assert asked == answers("captions")[name]["asked"] and asked
    bodies = [{k: v for k, v in row.items() if k in ("body", "model", "path")} for row in server.requests()]
    assert sorted(bodies, key=str) == answers("captions")[name]["bodies"]
    assert journal("new") == journal(str(FIRST / "captioned" / name)) == answers("captions")[name]["journal"]
    assert captioned_rows("new") == answers("captions")[name]["rows"]


def test_a_killed_run_asks_for_what_is_missing_alone(here, server):
    bring("captioned/openai_cut")
    expected = answers("captions")
    kept = journal("openai_cut")
    asked = ask(server, "openai_cut", "openai_cut")
    assert asked == expected["openai_cut"]["asked"] and 0 < len(asked) < len(expected["openai"]["asked"])
    assert len(kept) + len(asked) == len(expected["openai"]["asked"])
    assert captioned_rows("openai_cut") == expected["openai"]["rows"]
    assert all(row in journal("openai_cut") for row in kept)


def test_a_folder_with_failures_continues(here, server):
    bring("captioned/openai_mixed")
    expected = answers("captions")["openai_mixed"]
    asked, text = ask(server, "openai_mixed", "openai_mixed", "status", text=True)
    assert asked == [] and expected["status"] in numbers(text)
    server.server.script = expected["script"]
    asked = ask(server, "openai_mixed", "openai_mixed", code=3)
    assert asked == expected["asked_again"] and captioned_rows("openai_mixed") == expected["rows_again"]


def test_a_folder_with_failures_is_retried(here, server):
    bring("captioned/openai_mixed")
    expected = answers("captions")["openai_mixed"]
    asked = ask(server, "openai_mixed", "openai_mixed", "retry", "rejected", "refused", code=3)
    assert asked == expected["asked_by_retry"] and captioned_rows("openai_mixed") == expected["rows_after_retry"]
    assert journal("openai_mixed") == expected["journal_after_retry"]
    asked = ask(server, "openai_mixed", "openai_mixed", more=MORE_TOKENS)  # for what was cut
    assert asked == expected["asked_with_more_tokens"]
    assert captioned_rows("openai_mixed") == expected["rows_in_the_end"]
    assert ask(server, "openai_mixed", "openai_mixed", "retry", "rejected", "refused", more=MORE_TOKENS) == []


def test_journals_are_exported_and_imported(here, server):
    bring("captioned/openai"), shutil.copy(FIRST / "captioned" / "openai.parquet", "first.parquet")
    assert ask(server, "openai", "openai", "export", "now.parquet") == []
    first, now = (pq.read_table(f"{name}.parquet").to_pylist() for name in ("first", "now"))
    assert sorted(first, key=str) == sorted(now, key=str) and first
    assert ask(server, "openai", "copy", "import", "first.parquet") == []
    assert journal("copy") == journal("openai")
    assert ask(server, "openai", "copy") == []
    assert captioned_rows("copy") == answers("captions")["openai"]["rows"]


def test_captions_made_in_python_are_found_in_the_journal_too(here, server):
    bring("captioned/openai")
    captioner = Captioner("openai", "m", base_url=f"{server.url}/v1")
    data = load_captioned_dataset("photos")["train"]
    captioned = caption_dataset(data, captioner, run_dir="openai", progress=False)
    assert server.requests() == []
    assert captioned["captions"][:] == [row["captions"] for row in answers("captions")["openai"]["rows"]["train"]]


def observe_merges() -> dict:
    """Two captioned folders as one, and captions from JSON files."""
    run(["caption", "merge", "openai", "gemini", "--output_dir", "merged", "--model_name_or_path", "clip"])
    command = "caption import VisualCaption.json ShapeCaption.json --key_rule class/file_name --dataset_name photos"
    run([*command.split(), "--output_dir", "imported", "--model_name_or_path", "clip"])
    return {"merged": captioned_rows("merged"), "imported": captioned_rows("imported")}


def test_folders_are_merged_and_json_files_imported(here):
    for name in ("openai", "gemini"):
        bring(f"captioned/{name}")
    for path in (FIRST / "captioned").glob("*.json"):
        shutil.copy(path, path.name)
    assert observe_merges() == answers("merges")


def test_a_run_is_trained_on_captions_of_the_first_edition(here):
    bring("captioned/columns", "captioned")
    run(words(f"{TRAIN} --dataset_name captioned --max_steps 2 --per_device_train_batch_size 6", "run"))
    assert_same(results_of("run"), answers("run_on_captions"), TRAINED)


# -- the benchmark --------------------------------------------------------------------------------------------------------
def benchmark_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def benchmark(here):
    """The folder of the grid. Results of other versions are refused: those of the recording become those of today."""
    folder = bring("benchmark")
    rows = benchmark_rows(folder / "results.jsonl")
    known = {name: version(name) for name in ("torch", "transformers", "peft", "scikit-learn")}
    known["mmft_hf"] = mmft_hf.__version__
    for row in rows:
        assert row["identity"]["versions"].keys() == known.keys()
        row["identity"]["versions"] = {name: known[name] for name in row["identity"]["versions"]}
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_no_cell_of_a_benchmark_is_computed_anew(benchmark):
    before = (benchmark / "results.jsonl").read_bytes()
    assert len(before.splitlines()) == 2 + 4 * 11
    run(words(BENCHMARK, "benchmark"))
    assert (benchmark / "results.jsonl").read_bytes() == before
    run([*words(BENCHMARK, "benchmark"), "--learning_rate", "1e-3"], 2)  # other results are not mixed in
    assert (benchmark / "results.jsonl").read_bytes() == before
    shutil.rmtree(benchmark / "report"), (benchmark / "report.html").unlink()
    run(["benchmark", "--report", "benchmark"])
    assert (benchmark / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_cells_that_are_deleted_come_back_with_the_same_numbers(benchmark):
    path = benchmark / "results.jsonl"
    rows = benchmark_rows(path)
    cells = [(row["method"], row["shots"], row["seed"]) for row in rows]
    assert set(RECOMPUTED) <= set(cells)
    kept = [row for row, cell in zip(rows, cells, strict=True) if cell not in RECOMPUTED]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    written = [p.name for p in (benchmark / "subsets").iterdir() if "shots-0" not in p.name]
    for name in written:
        (benchmark / "subsets" / name).unlink()
    run(words(BENCHMARK, "benchmark"))
    again = benchmark_rows(path)
    assert again[: len(kept)] == kept and len(again) == len(rows)
    first = {cell: row for cell, row in zip(cells, rows, strict=True) if cell in RECOMPUTED}
    for row in again[len(kept) :]:
        expected = first.pop((row["method"], row["shots"], row["seed"]))
        times = dict.fromkeys(TIMES)
        assert_same(row | times, expected | times, 10 * TRAINED)
    assert not first
    assert len(written) == 4
    for name in written:
        assert json_of(benchmark / "subsets" / name) == json_of(FIRST / "benchmark" / "subsets" / name)
