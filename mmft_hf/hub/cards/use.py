"""The model card's section on use. Its snippets run as they stand: in the run's folder, or anywhere once it is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from ...core.files import HEAD_FILE, PROTOTYPES_FILE, SHEET_FILE
from ...core.pages import render_card
from ...data.texts import class_prompt, clean_class_name
from ...model.families import FAMILIES
from .sources import has_lora

TEMPLATE = Path(__file__).parents[1] / "templates" / "model_use.md.j2"
PROTOTYPES_FROM = {
    "captions": "the average over its training captions",
    "template": "its class template",
    "templates": "the average over several class templates",
    "images": "the average over its training images",
}


def snippets(
    record: Mapping, repo_id: str | None, parts: str, inference_code: bool, results: Mapping, stock_class: str | None
) -> str:
    """How to use what is published (see `model_card`), as Markdown from `templates/model_use.md.j2`.

    Args:
        results: of the run.
        stock_class: of transformers, which opens the model; None: there is none.
    """
    names = [clean_class_name(name) for name in record["class_names"]]
    base, template = record["sources"]["base_model"], record["identity"]["class_template"]
    family = FAMILIES[record.get("model_type", "clip")]
    embed = "model.vision_model(pixels).pooler_output"
    if family.model == "VisionTextDualEncoderModel":  # some convolutional towers give a picture of one pixel
        embed += ".flatten(1)"
    name, base_name = json.dumps(repo_id or "."), json.dumps(base["name"])
    revision = f", revision={json.dumps(base['revision'])}" if base["revision"] else ""

    def file(name: str) -> str:
        return f'hf_hub_download("{repo_id}", "{name}")' if repo_id else f'"{name}"'

    code = {
        "name": name,
        "picture": file(SHEET_FILE),
        "prototypes": file(PROTOTYPES_FILE),
        "head_file": file(HEAD_FILE),
        "head": record.get("head", "prototypes"),
        "download": "from huggingface_hub import hf_hub_download\n" if repo_id else "",
        "labels": repr(names if len(names) <= 10 else names[:5]),
        "prompt": repr(template),
        "prompts": repr([class_prompt(template, name) for name in names[:2]]),
        "embed": f"model.visual_projection({embed})" if family.vision_head else embed,
        "base_model": f"load_model({base_name})[0]"
        if base["kind"] == "builtin"
        else f"{family.model}.from_pretrained({base_name}{revision})",
        "adapter": f'{name}, subfolder="adapter"' if parts == "both" and repo_id else json.dumps(repo_id or "adapter"),
    }
    return render_card(
        TEMPLATE,
        **{key: Markup(value) for key, value in code.items()},
        repo_id=repo_id,
        parts=parts,
        inference_code=inference_code,
        stock_class=stock_class,
        opener="AutoImageProcessor" if parts == "vision" else "AutoProcessor",
        family=family,
        many=len(names) > 10,
        least=results.get("reject_below"),
        thresholds="thresholds" in results,
        several=results.get("several_labels", False),
        made_from=PROTOTYPES_FROM[record["prototypes"]],
        template_weight=record["identity"].get("template_weight") if record["prototypes"] == "captions" else 0,
        lora=has_lora(record) and parts in ("adapter", "both"),
        base=base,
    ).strip("\n")
