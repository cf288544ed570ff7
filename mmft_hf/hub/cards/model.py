"""The model card: what was measured, on what, and how to use it. No sentence of it is a placeholder.

It is a function of the files that a finished run leaves (`mmft.json`, `all_results.json`, `predictions_test.parquet`), so it
can be written again for the repository that they are published in.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template

from ...core.console import percent
from ...core.files import (
    CARD_FILE,
    CONFUSION_FILE,
    CURVES_FILE,
    PREDICTIONS_FILE,
    PROTOTYPES_FILE,
    RESULTS_FILE,
    RUN_FILE,
    SHEET_FILE,
)
from ...core.markdown import code, front_matter, listed, md, read_front_matter, table
from ...model.families import FAMILIES
from ...predict.figures import legible
from ...version import __version__
from .sections import PAPER, has_lora, licence, limits, made, named, pictures_of, rights, short, written_by
from .use import snippets

TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md"
ALL_ROWS, WEAKEST = 30, 15  # the table per class is folded where it is longer


def versions() -> dict[str, str]:
    """Versions of what made the model."""
    packages = ("torch", "transformers", "datasets", "accelerate", "tokenizers")
    return {
        "python": platform.python_version(),
        "mmft_hf": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def model_card(
    folder: str | Path,
    repo_id: str | None = None,
    parts: str | None = None,
    license: str | None = None,
    inference_code: bool = False,
) -> str:
    """Markdown of the model card.

    Args:
        folder: of a finished run.
        repo_id: where it will be published: its snippets load it from there. Default: they are run in the folder.
        parts: what of a LoRA run is published: `merged`, `adapter` or `both`. Default: what the folder has.
        license: of the model. Default: that of the base model, where it is known.
        inference_code: whether `mmft_inference.py` is published with it.
    """
    folder = Path(folder)
    record, results = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (RUN_FILE, RESULTS_FILE))
    parts = parts or ("both" if has_lora(record) and (folder / "adapter").is_dir() else "merged")
    base, data = record["sources"]["base_model"], record["sources"]["dataset"]
    title = repo_id.split("/")[-1] if repo_id else f"{short(base)} fine-tuned on {short(pictures_of(data))}"
    per_class = _per_class(folder / PREDICTIONS_FILE, record["class_names"])
    granted = {"license": license} if license else rights(base)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        front=front_matter(_front(record, results, title, parts, granted)),
        title=md(title),
        summary=_summary(record),
        result=_result(record, results),
        sheet=f"![Test images with the model's answers]({SHEET_FILE})\n\nSome test images, spread evenly over the split. Green: "
        "right. Red: wrong, with the true class below.",
        use=snippets(record, repo_id, parts, inference_code),
        errors=_errors(per_class, record["sources"]["train_images_per_class"]),
        made=made(record, results, CURVES_FILE),
        limits=limits(record, [row["images"] for row in per_class]),
        licence=licence(base, data, granted, chosen=bool(license)),
    )


def write_model_card(folder: str | Path) -> None:
    """Writes `README.md` of a finished run."""
    (Path(folder) / CARD_FILE).write_text(model_card(folder), encoding="utf-8")


def card_for_repository(
    folder: str | Path,
    repo_id: str,
    parts: str | None = None,
    license: str | None = None,
    inference_code: bool = False,
) -> str:
    """The card as it is published. One that somebody has edited stays as it is, but for what its snippets load.

    Args:
        folder, repo_id, parts, license, inference_code: see `model_card`.
    """
    path = Path(folder) / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    record = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
    ours = "sources" in record  # a run of an older make has none: its card counts as edited
    if text is None or (ours and text == model_card(folder)):
        return model_card(folder, repo_id, parts, license, inference_code)
    front, body = read_front_matter(text)
    front |= {"license": license} if license else {}

    def published(block: re.Match) -> str:
        fixed = block[0].replace('"."', json.dumps(repo_id))
        for name in (SHEET_FILE, PROTOTYPES_FILE):
            fixed = re.sub(rf'(?<!, )"{re.escape(name)}"', f'hf_hub_download("{repo_id}", "{name}")', fixed)
        if "hf_hub_download(" not in fixed or "import hf_hub_download" in fixed:
            return fixed
        return fixed.replace("```python\n", "```python\nfrom huggingface_hub import hf_hub_download\n", 1)

    body = re.sub(r"^```python\n.*?^```", published, body, flags=re.DOTALL | re.MULTILINE)
    return (front_matter(front) if front else "") + body


def _front(record: Mapping, results: Mapping, name: str, parts: str, granted: Mapping) -> dict:
    """Metadata that the Hub reads."""
    base, data, captions = (record["sources"][key] for key in ("base_model", "dataset", "captions"))
    front = {"library_name": "peft" if parts == "adapter" else "transformers"}
    kind = record.get("model_type", "clip")
    task = "zero-shot-image-classification" if FAMILIES[kind].zero_shot else "image-classification"
    front |= {"pipeline_tag": task, **granted}
    front["tags"] = [kind, "image-classification", "mmft"]
    front["tags"] += ["synthetic-captions"] if captions and written_by(captions) else []
    front["tags"] += ["lora"] if has_lora(record) else []
    if base["kind"] == "hub":
        front |= {"base_model": base["name"], "base_model_relation": "adapter" if parts == "adapter" else "finetune"}
    public = [source["name"] for source in (data, pictures_of(data)) if source["kind"] == "hub"]
    if public:
        front["datasets"] = list(dict.fromkeys(public))
    low, high = results["test_accuracy_ci_low"], results["test_accuracy_ci_high"]
    accuracy = {
        "type": "accuracy",
        "value": round(results["test_accuracy"], 4),
        "name": f"Accuracy (95 % interval {100 * low:.1f} to {100 * high:.1f} %)",
        "args": {"interval": 0.95, "low": round(low, 4), "high": round(high, 4), "images": results["test_images"]},
    }
    mean = round(results["test_mean_per_class_accuracy"], 4)
    metrics = [accuracy, {"type": "mean_per_class_accuracy", "value": mean, "name": "Accuracy, mean over the classes"}]
    if "test_top5_accuracy" in results:
        top5 = round(results["test_top5_accuracy"], 4)
        metrics.append({"type": "top_5_accuracy", "value": top5, "name": "Right class among the first five"})
    tested = data if data["kind"] == "hub" else pictures_of(data)
    dataset = {
        "type": tested["name"] if tested["kind"] == "hub" else re.sub(r"[^\w.-]+", "-", short(tested)),
        "name": short(tested),
        "config": data["config"],
        "split": data["test_split"] or "test",
        "revision": data["revision"],
    }
    dataset = {key: value for key, value in dataset.items() if value}
    task = {"type": "image-classification", "name": "Image classification"}
    result = {"task": task, "dataset": dataset, "metrics": metrics}
    return {**front, "metrics": ["accuracy"], "model-index": [{"name": name, "results": [result]}]}


def _summary(record: Mapping) -> str:
    names, sources = record["class_names"], record["sources"]
    some = names if len(names) <= 10 else names[:8]
    more = [f"{len(names) - 8} more"] if len(names) > 10 else []
    what = "images, their labels and captions" if sources["captions"] else "images and their labels"
    base, data = sources["base_model"], pictures_of(sources["dataset"])
    ours = " (which comes with `mmft_hf`)"
    kind = FAMILIES[record.get("model_type", "clip")].title
    kind = f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind} model (one that embeds images and texts in the same space)"
    return (
        f"An image classifier for {len(names)} classes: {listed([*(md(name, 60) for name in some), *more])}. It is "
        f"{named(base)}{ours * (base['kind'] == 'builtin')}, {kind}, "
        f"fine-tuned on {what} of {named(data)}{ours * (data['kind'] == 'builtin')}. The method is [MMFT]({PAPER}), "
        "multimodal fine-tuning with synthetic captions."
    )


# -- result -----------------------------------------------------------------------------------------------------------
def _result(record: Mapping, results: Mapping) -> str:
    def row(name: str, prefix: str, strong: str = "") -> tuple[str, ...]:
        low, high = (100 * results[f"{prefix}test_accuracy_ci_{end}"] for end in ("low", "high"))
        accuracy = percent(results[f"{prefix}test_accuracy"])
        return f"{strong}{name}{strong}", f"{strong}{accuracy}{strong}", f"{low:.1f} to {high:.1f} %"

    template = code(record["identity"]["class_template"])
    rows = [
        row(f"before: the untuned model, zero-shot, with {template}", "zero_shot_"),
        row("after fine-tuning", "", "**"),
        ("after, mean over the classes", percent(results["test_mean_per_class_accuracy"]), ""),
    ]
    if "test_top5_accuracy" in results:
        rows.append(("after, right class among the first five", percent(results["test_top5_accuracy"]), ""))
    head = (f"on {results['test_images']:,} test images", "accuracy", "95 % interval")
    lines = [table(head, rows), _verdict(results), _selection(record, results)]
    if results["test_skipped_images"]:
        lines.append(f"{results['test_skipped_images']:,} test images could not be read and are not counted.")
    return "\n\n".join(lines)


def _verdict(results: Mapping) -> str:
    """What the table means; in the words of the terminal where fine-tuning did not help."""
    tuned, untuned = results["test_accuracy"], results["zero_shot_test_accuracy"]
    gain = 100 * (tuned - untuned)
    if results["zero_shot_won"]:
        return (
            "**Fine-tuning did not help here.** No epoch was better on validation than the untuned model with the class "
            "template, so that is what was kept: both rows are the same classifier."
        )
    if tuned <= untuned:
        worse = f" It was right {-gain:.1f} points more often." if gain < 0 else ""
        return f"**Fine-tuning did not help here: the untuned model is as good.**{worse}"
    if results["test_accuracy_ci_low"] > results["zero_shot_test_accuracy_ci_high"]:
        chance = "The two intervals do not overlap: it is more than chance in the choice of test images."
    else:
        chance = "The two intervals overlap: with so few test images, part of the gain may be chance."
    return f"Fine-tuning gained {gain:.1f} points. {chance}"


def _selection(record: Mapping, results: Mapping) -> str:
    text = (
        f"What was kept (selection policy {code(results['selection_policy'])}): {md(results['selection'], 200)}. On the "
        f"{record['sources']['splits']['validation']:,} validation images it has "
        f"{percent(results['validation_accuracy'])}, the untuned model zero-shot "
        f"{percent(results['zero_shot_validation_accuracy'])}. The test images were read once, after that."
    )
    if results["best_epoch"] == 0 and not results["zero_shot_won"]:
        text += (
            " **Epoch 0 was kept: the weights are those of the base model.** New is only what an image is compared with: one "
            "embedding per class."
        )
    return text


# -- errors -----------------------------------------------------------------------------------------------------------
def _per_class(path: Path, names: list[str]) -> list[dict]:
    """For each class: `label`, `number`, `images`, `right`, `taken_for` (most frequent wrong answer and its count)."""
    import pyarrow.parquet as pq

    found = pq.read_table(path, columns=["label", "prediction"]).to_pydict()
    answers: dict[str, dict[str, int]] = {name: {} for name in names}
    for label, prediction in zip(found["label"], found["prediction"], strict=True):
        if label is not None:
            answers[label][prediction] = answers[label].get(prediction, 0) + 1
    rows = []
    for number, name in enumerate(names):
        wrong = {other: count for other, count in answers[name].items() if other != name}
        most = max(wrong.items(), key=lambda pair: pair[1]) if wrong else None
        row = {"label": name, "number": number, "images": sum(answers[name].values()), "taken_for": most}
        rows.append(row | {"right": answers[name].get(name, 0)})
    return rows


def _errors(per_class: list[dict], trained: list[int]) -> str:
    from ...predict.metrics import wilson_interval  # which loads torch, and captioning needs none

    tested = sorted((row for row in per_class if row["images"]), key=lambda r: (r["right"] / r["images"], r["number"]))
    cells = []
    for row in tested:
        low, high = wilson_interval(row["right"], row["images"])
        drawn = legible(row["label"], row["number"])
        label = md(row["label"], 60) + (f" ({drawn} in the pictures)" if drawn == f"class {row['number'] + 1}" else "")
        taken = f"{md(row['taken_for'][0], 60)} ({row['taken_for'][1]})" if row["taken_for"] else ""
        accuracy = f"{percent(row['right'] / row['images'])} ({100 * low:.0f} to {100 * high:.0f})"
        cells.append((label, trained[row["number"]], f"{row['right']} of {row['images']}", accuracy, taken))
    head = ("class", "training images", "test images right", "accuracy (95 % interval)", "most often taken for")
    lines = [f"![Which classes are taken for which]({CONFUSION_FILE})"]
    if len(cells) <= ALL_ROWS:
        lines.append(f"Weakest classes first:\n\n{table(head, cells)}")
    else:
        lines.append(f"The {WEAKEST} weakest classes:\n\n{table(head, cells[:WEAKEST])}")
        everything = f"<summary>All {len(cells)} classes, weakest first</summary>\n\n{table(head, cells)}"
        lines.append(f"<details>{everything}\n\n</details>")
    missing = [md(row["label"], 60) for row in per_class if not row["images"]]
    if missing:
        lines.append(f"Without a test image, and so without a figure: {listed(missing)}.")
    return "\n\n".join(lines)
