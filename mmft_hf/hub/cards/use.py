"""The model card's snippets. Each runs as it stands: in the run's folder, or anywhere once the model is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Template

from ...core.files import PROTOTYPES_FILE, SHEET_FILE
from ...core.markdown import fenced
from ...data.texts import class_prompt, clean_class_name
from ...model.families import FAMILIES
from .sources import has_lora

PROTOTYPES_FROM = {
    "captions": "the average over its training captions",
    "template": "its class template",
    "templates": "the average over several class templates",
    "images": "the average over its training images",
}
PIPELINE = """\
import mmft_hf  # adds the pipeline
${download}from transformers import pipeline

classifier = pipeline("mmft-image-classification", model=$model)
print(classifier($picture, top_k=3))"""
REMOTE = """\
${download}from transformers import pipeline

classifier = pipeline("image-classification", model=$model, trust_remote_code=True)
print(classifier($picture, top_k=3))"""
STOCK = """\
import json

import torch
${download}${imports}from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, $class

model = $clip
processor = AutoProcessor.from_pretrained($model)
with safe_open($prototypes, framework="pt") as file:
    names, scale = json.loads(file.metadata()["class_names"]), float(file.metadata()["logit_scale"])
    prototypes = file.get_tensor("prototypes")

picture = Image.open($picture).convert("RGB")
pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    image = $embed[0]
scores = (scale * prototypes @ (image / image.norm())).softmax(dim=0)
for i in scores.argsort(descending=True)[:3].tolist():
    print(names[i], round(scores[i].item(), 3))"""
ZERO_SHOT = """\
${download}from transformers import pipeline

classifier = pipeline("zero-shot-image-classification", model=$model)
labels = $labels
print(classifier($picture, candidate_labels=labels, hypothesis_template=$template))"""
SENTENCES = """\
${download}from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer($model)
image = model.encode(Image.open($picture).convert("RGB"))
texts = model.encode($prompts)
print(model.similarity(image, texts))"""


def snippets(record: Mapping, repo_id: str | None, parts: str, inference_code: bool) -> str:
    """How to use what is published (see `model_card`), as Markdown."""
    names = [clean_class_name(name) for name in record["class_names"]]
    base, template = record["sources"]["base_model"], record["identity"]["class_template"]

    family = FAMILIES[record.get("model_type", "clip")]
    embed = "model.vision_model(pixels).pooler_output"

    def file(name: str) -> str:
        return f'hf_hub_download("{repo_id}", "{name}")' if repo_id else f'"{name}"'

    values = {
        "model": json.dumps(repo_id or "."),
        "picture": file(SHEET_FILE),
        "prototypes": file(PROTOTYPES_FILE),
        "download": "from huggingface_hub import hf_hub_download\n" if repo_id else "",
        "labels": repr(names if len(names) <= 10 else names[:5]),
        "template": repr(template),
        "prompts": repr([class_prompt(template, name) for name in names[:2]]),
        "imports": "",
        "class": family.model,
        "clip": f"{family.model}.from_pretrained({json.dumps(repo_id or '.')}).eval()",
        "embed": f"model.visual_projection({embed})" if family.visual_projection else embed,
    }

    def snippet(text: str, **more: str) -> str:
        return fenced(Template(text).substitute(values | more), "python")

    share = record["identity"].get("template_weight") if record["prototypes"] == "captions" else 0
    mixed = f", drawn towards its class template with weight {share:g}" if share else ""
    here = "" if repo_id else "The snippets are for this folder. "
    lines = [
        f"{here}`{SHEET_FILE}` stands for a picture of yours. It is compared with `{PROTOTYPES_FILE}`, which has one embedding per class: "
        f"{PROTOTYPES_FROM[record['prototypes']]}{mixed}."
    ]
    if parts != "adapter":
        lines += ["With `mmft_hf` installed:", snippet(PIPELINE)]
        if inference_code:
            lines.append("Without it, by the code in `mmft_inference.py`, which you should read before you trust it:")
            lines.append(snippet(REMOTE))
        some = "some of its classes" if len(names) > 10 else "its classes"
        lines += [
            f"The same classifier with `transformers` alone, where the model is a plain `{family.model}`:",
            snippet(STOCK),
        ]
        if family.zero_shot:
            scores = " Each score is a sigmoid whose bias fine-tuning left as it was: compare them, but do not take them for probabilities."
            lines += [
                f"As a zero-shot classifier, with class names (here {some}; any others will do) in place of the prototypes. Its "
                f"accuracy is not the one above, and was not measured{':' if not family.padded else '.' + scores}",
                snippet(ZERO_SHOT),
            ]
        if family is FAMILIES["clip"]:
            lines += ["Embeddings of images and texts, with `sentence-transformers` 6.2 or later:", snippet(SENTENCES)]
    if has_lora(record) and parts in ("adapter", "both"):
        lines += _adapter(base, repo_id, parts, family.model, snippet)
    return "\n\n".join(lines)


def _adapter(base: Mapping, repo_id: str | None, parts: str, model: str, snippet) -> list[str]:
    """How to load the adapter of a LoRA run."""
    where = "" if parts == "adapter" else " (in `adapter/`)"
    if base["kind"] == "local":
        return [
            f"The LoRA adapter{where} belongs to a base model that was a local folder: whoever has that folder loads it there "
            "with `peft.PeftModel.from_pretrained`."
        ]
    imports, revision = "", f", revision={json.dumps(base['revision'])}" if base["revision"] else ""
    clip = f"{model}.from_pretrained({json.dumps(base['name'])}{revision})"
    if base["kind"] == "builtin":
        imports, clip = "from mmft_hf import load_model\n", f"load_model({json.dumps(base['name'])})[0]"
    folder = (
        f'{json.dumps(repo_id)}, subfolder="adapter"'
        if parts == "both" and repo_id
        else json.dumps(repo_id or "adapter")
    )
    text = snippet(
        STOCK,
        imports=f"{imports}from peft import PeftModel\n",
        clip=f"PeftModel.from_pretrained({clip}, {folder}).merge_and_unload().eval()",
    )
    if base["kind"] == "builtin":
        text = text.replace(
            f"from transformers import AutoProcessor, {model}", "from transformers import AutoProcessor"
        )
    return [f"The base model with the LoRA adapter{where} and `peft`, which gives the same model:", text]
