"""The model card: what was measured, on which data, and how to use the model. It contains no placeholders.

The card is a function of the files of a finished run (`mmft.json`, `all_results.json`, `predictions_test.parquet`), so it
can be rendered again for the repository in which they are published.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from ...core import files
from ...core.errors import UserError
from ...core.markdown import code, front_matter, listed, md, read_front_matter
from ...core.pages import render_card
from ...core.reading import check_regular, read_json, read_text
from ...core.records import CardRecord, RunResults, check_metrics
from ...core.schema import shown
from ...model.families import FAMILIES
from ...predict.figures import legible
from ...predict.metrics import uneven_note, wilson_interval
from ...version import __version__
from ..vision import vision_class
from .sources import has_lora, images_of, model_authors, short
from .use import snippets

REMEDY = "Restore the file, or run mmft-hf finetune again."
TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md.j2"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that trained the model."""
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
    """The model card as Markdown. Its sentences are in `templates/model_card.md.j2`.

    Args:
        folder: of a finished run.
        repo_id: where the model will be published; the snippets load it from there. Default: they run in the folder.
        parts: what is published, see `push_model`. Default: what the folder has.
        license: of the model. Default: that of the base model, if known.
        inference_code: whether `mmft_inference.py` is published too.
    """
    folder = Path(folder)
    record, results = _read(folder, files.RUN_FILE, CardRecord), _read(folder, files.RESULTS_FILE, RunResults)
    if record.get("model_type", "clip") not in FAMILIES:
        raise UserError(f"{folder / files.RUN_FILE}, field model_type: expected one of {', '.join(FAMILIES)}. {REMEDY}")
    if len(record["sources"]["train_images_per_class"]) != len(record["class_names"]):
        raise UserError(
            f"{folder / files.RUN_FILE}, field sources.train_images_per_class: expected {len(record['class_names'])} numbers, one "
            f"for each class, found {len(record['sources']['train_images_per_class'])}. {REMEDY}"
        )
    base, data, captions = (record["sources"][key] for key in ("base_model", "dataset", "captions"))
    images, names, trunk = images_of(data), record["class_names"], record["sources"].get("text_trunk")
    parts = parts or ("both" if has_lora(record) and (folder / files.ADAPTER_FOLDER).is_dir() else "merged")
    title = repo_id.split("/")[-1] if repo_id else f"{short(base)} fine-tuned on {short(images)}"
    license_fields = {"license": license} if license else _license_of(base)
    family = FAMILIES[record.get("model_type", "clip")]
    stock_class = vision_class(folder) if parts == "vision" else family.model if family.texts == "tokens" else None
    check_metrics(results, str(folder / files.RESULTS_FILE), REMEDY)
    several = results.get("several_labels", False)
    classes = _per_class(folder / files.PREDICTIONS_FILE, names, record["sources"]["train_images_per_class"], several)
    tested = [row for row in classes if row["images"]]
    shown = [*names] if len(names) <= 10 else [*names[:8], f"{len(names) - 8} more"]
    licensed = next((source for source in (images, data) if _licenses(source)), images)
    return render_card(
        TEMPLATE,
        front=Markup(front_matter(_metadata(record, results, title, parts, license_fields))),
        title=title,
        record=record,
        results=results,
        metric=_metric(results),
        uneven=_uneven(results),
        validation_role=_validation_role(record["identity"], results),
        images=images,
        family=family,
        class_names=Markup(listed(md(name, 60) for name in shown)),
        use=Markup(snippets(record, repo_id, parts, inference_code, results, stock_class)),
        trunk=trunk,
        trunk_licence=_licenses(trunk) if trunk else None,
        classes=sorted(tested, key=lambda row: row["right"] / row["images"]),
        untested=Markup(listed(md(row["label"], 60) for row in classes if not row["images"])),
        models=model_authors(captions) if captions else [],
        held_out=any(note.startswith("There is no test split") for note in record["notes"]),
        license=license,
        licence=_licenses(license_fields),
        licensed_data=licensed,
        data_licence=_licenses(licensed),
        named=_named,
        short=short,
        setting=_setting,
        listed=lambda items: Markup(listed(items)),
    )


def _read(folder: Path, name: str, schema) -> dict:
    try:
        return read_json(folder / name, schema, REMEDY)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: expected {name} of a finished run in it, found none.") from error


def _metric(results: Mapping) -> str:
    """The metric that selected, if the results have all of its values; else accuracy, as in version 0.1."""
    metric = results.get("selection_metric", "accuracy")
    whole = all(f"{of}{split}_{metric}" in results for of in ("", "zero_shot_") for split in ("test", "validation"))
    return metric if whole else "accuracy"


def _validation_role(identity: Mapping, results: Mapping) -> str:
    """What the validation images were used for."""
    trained = identity.get("num_train_epochs") != 0 or identity.get("max_steps", 0) > 0
    epochs = identity.get("load_best_model_at_end") and trained
    candidates = results.get("head_candidates") or ()
    differ = [word for key, word in (("alpha", "weights"), ("head", "head")) if len({c[key] for c in candidates}) > 1]
    choices = "the " + " and ".join(differ)
    if differ and results.get("head_chosen_on_validation", True):
        return "selected what was kept" if epochs else f"selected {choices}"
    if epochs:
        return f"selected the epoch; too few to choose {choices} by" if differ else "selected what was kept"
    return f"too few to choose {choices} by" if differ else "observed the training" if trained else "selected nothing"


def _uneven(results: Mapping) -> str:
    """Why the mean over the classes comes first; empty where it does not, and for results of versions that had no such rule."""
    keys = ("test_images_of_smallest_class", "test_images_of_largest_class", "zero_shot_test_mean_per_class_accuracy")
    return uneven_note(*(results[key] for key in keys[:2])) if all(key in results for key in keys) else ""


def write_model_card(folder: str | Path) -> None:
    """Writes the card of a finished run, `README.md`."""
    (Path(folder) / files.CARD_FILE).write_text(model_card(folder), encoding="utf-8")


def card_for_repository(
    folder: str | Path,
    repo_id: str,
    parts: str | None = None,
    license: str | None = None,
    inference_code: bool = False,
) -> str:
    """The card to publish. An edited card is kept, except that its snippets load from the repository.

    Args:
        folder, repo_id, parts, license, inference_code: see `model_card`.
    """
    path = Path(folder) / files.CARD_FILE
    text = read_text(path) if path.is_file() else None
    record = _read(Path(folder), files.RUN_FILE, dict)
    ours = "sources" in record  # early versions recorded none: their cards count as edited
    if text is None or (ours and text == model_card(folder)):
        return model_card(folder, repo_id, parts, license, inference_code)
    front, body = read_front_matter(text)
    front |= {"license": license} if license else {}

    def published(block: re.Match) -> str:
        fixed = block[0].replace('"."', json.dumps(repo_id))
        for name in (files.SHEET_FILE, files.PROTOTYPES_FILE, files.HEAD_FILE):
            fixed = re.sub(rf'(?<!, )"{re.escape(name)}"', f'hf_hub_download("{repo_id}", "{name}")', fixed)
        if "hf_hub_download(" not in fixed or "import hf_hub_download" in fixed:
            return fixed
        return fixed.replace("```python\n", "```python\nfrom huggingface_hub import hf_hub_download\n", 1)

    body = re.sub(r"^```python\n.*?^```", published, body, flags=re.DOTALL | re.MULTILINE)
    return (front_matter(front) if front else "") + body


def _metadata(record: Mapping, results: Mapping, name: str, parts: str, license_fields: Mapping) -> dict:
    """The metadata that the Hub reads."""
    base, data, captions = (record["sources"][key] for key in ("base_model", "dataset", "captions"))
    front = {"library_name": "peft" if parts == "adapter" else "transformers"}
    kind = record.get("model_type", "clip")
    zero_shot = FAMILIES[kind].zero_shot and parts != "vision"
    task = "zero-shot-image-classification" if zero_shot else "image-classification"
    front |= {"pipeline_tag": task, **license_fields}
    front["tags"] = [kind, "image-classification", "mmft"]
    front["tags"] += ["synthetic-captions"] if captions and model_authors(captions) else []
    front["tags"] += ["lora"] if has_lora(record) else []
    if base["kind"] == "hub":
        front |= {"base_model": base["name"], "base_model_relation": "adapter" if parts == "adapter" else "finetune"}
    public = [source["name"] for source in (data, images_of(data)) if source["kind"] == "hub"]
    if public:
        front["datasets"] = list(dict.fromkeys(public))
    low, high = results["test_accuracy_ci_low"], results["test_accuracy_ci_high"]
    several = results.get("several_labels")
    accuracy = {
        "type": "accuracy",
        "value": round(results["test_accuracy"], 4),
        "name": f"{'Exact match' if several else 'Accuracy'} (95 % interval {100 * low:.1f} to {100 * high:.1f} %)",
        "args": {"interval": 0.95, "low": round(low, 4), "high": round(high, 4), "images": results["test_images"]},
    }
    further = (
        {
            "mean_average_precision": "Mean average precision",
            "micro_f1": "F1 over all decisions",
            "macro_f1": "F1, mean over the classes",
        }
        if several
        else {"mean_per_class_accuracy": "Accuracy, mean over the classes"}
    )
    metrics = [accuracy] + [
        {"type": key, "value": round(results[f"test_{key}"], 4), "name": name} for key, name in further.items()
    ]
    metrics = metrics[::-1] if _uneven(results) else metrics
    if "test_top5_accuracy" in results:
        top5 = round(results["test_top5_accuracy"], 4)
        metrics.append({"type": "top_5_accuracy", "value": top5, "name": "Correct class among the top five"})
    tested = data if data["kind"] == "hub" else images_of(data)
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


def _named(source: Mapping) -> Markup:
    """A base model or dataset by name, with a link if it is on the Hub."""
    if source["kind"] != "hub":
        return Markup(md(short(source)))
    kind = "datasets/" if source["type"] == "dataset" else ""
    return Markup(f"[{md(source['name'])}](https://huggingface.co/{kind}{source['name']})")


def _setting(value: object) -> str:
    return "not set" if value is None else Markup(code(f"{value:g}" if isinstance(value, float) else value))


def _license_of(base: Mapping) -> dict:
    """The licence fields of the base model's card, if it states a single licence."""
    found = {key: base[key] for key in ("license", "license_name", "license_link") if key in base}
    return found if isinstance(found.get("license"), str) else {}


def _licenses(source: Mapping) -> Markup | None:
    """The licences that a card states."""
    found = source.get("license")
    values = [source.get("license_name") or found] if isinstance(found, str) else found
    return Markup(listed(map(code, values))) if values else None


def _per_class(path: Path, names: list[str], training_images: list[int], several: bool) -> list[dict]:
    """One row per class: its test images, the right answers with their 95 % interval, and the most frequent wrong answer.

    With several labels per picture: its test images, how often it was answered, and how often rightly.
    """
    import pyarrow.parquet as pq

    try:
        check_regular(path)
        found = pq.read_table(path, columns=["label", "prediction"]).to_pydict()
    except Exception as error:  # missing or damaged: pyarrow has a dozen of errors for it
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: expected the predictions of the run, found: {said}. {REMEDY}") from error
    known = set(names)

    def is_ours(value) -> bool:
        if value is None:  # a picture that could not be read
            return True
        if several != isinstance(value, list):
            return False
        return all(isinstance(name, str) and name in known for name in (value if several else [value]))

    if strange := [value for column in found.values() for value in column if not is_ours(value)]:
        raise UserError(f"{path}: expected names of the run's classes, found {shown(strange[:3])}. {REMEDY}")
    pairs = [pair for pair in zip(found["label"], found["prediction"], strict=True) if pair[0] is not None]
    if several:
        images, answered, right = (Counter() for _ in range(3))
        for truth, answer in pairs:
            images.update(truth)
            answered.update(answer or ())
            right.update(set(truth) & set(answer or ()))
        return [
            {
                "label": name,
                "training_images": n,
                "images": images[name],
                "answered": answered[name],
                "right": right[name],
            }
            for name, n in zip(names, training_images, strict=True)
        ]
    answers: dict[str, Counter] = {name: Counter() for name in names}
    for label, prediction in pairs:
        answers[label][prediction] += 1
    rows = []
    for number, name in enumerate(names):
        images, right = answers[name].total(), answers[name].pop(name, 0)
        low, high = wilson_interval(right, images) if images else (0, 1)
        drawn_as = legible(name, number)
        taken_for, times = answers[name].most_common(1)[0] if answers[name] else (None, 0)
        rows.append(
            {
                "label": name,
                "training_images": training_images[number],
                "images": images,
                "right": right,
                "low": 100 * low,
                "high": 100 * high,
                "taken_for": taken_for,
                "times": times,
                "drawn_as": drawn_as if drawn_as == f"class {number + 1}" else None,
            }
        )
    return rows
