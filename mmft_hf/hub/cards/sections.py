"""The model card's sections about origin: base model, data, captions, settings, limits, licence."""

from __future__ import annotations

from collections.abc import Mapping

from ...core.markdown import code, fenced, listed, md, table

PAPER = "https://arxiv.org/abs/2601.21426"
FEW = 30  # test images of a class, below which its own accuracy says little
CLASS_MARK = "[class name]"  # in the prompts of `captions.json`


def short(source: Mapping) -> str:
    """The name without its owner."""
    return source["name"].split("/")[-1]


def named(source: Mapping) -> str:
    """A model or data set, with a link where it is on the Hub."""
    if source["kind"] == "hub":
        kind = "datasets/" if source["type"] == "dataset" else ""
        return f"[{md(source['name'])}](https://huggingface.co/{kind}{source['name']})"
    return md(short(source))


def pictures_of(data: Mapping) -> Mapping:
    """The data set whose images were captioned, where that is known; else the data set itself."""
    return data.get("captions_of") or data


def has_lora(record: Mapping) -> bool:
    """Whether a tower was trained by LoRA."""
    return "lora" in (record["identity"]["vision_tower"], record["identity"]["text_tower"])


def written_by(captions: Mapping) -> list[str]:
    """The models that wrote captions."""
    return [name for name in captions["models"] if name not in ("columns", "template", "unknown")]


# -- how it was made --------------------------------------------------------------------------------------------------
def made(record: Mapping, results: Mapping, curves: str) -> str:
    """Data, captions and training, as Markdown."""
    identity, sources = record["identity"], record["sources"]
    captions = sources["captions"]
    parts = ["### Data", _data(identity, sources, record["notes"]), "### Captions"]
    parts.append(_captions(captions, sources["splits"]["train"]) if captions else _no_captions(identity))
    w, end = identity["supcon_weight"], identity.get("supcon_weight_end")
    weights_of_loss = f"{w:g} x SupCon + {1 - w:g} x CLIP"
    if end is not None:
        weights_of_loss = f"w x SupCon + (1 - w) x CLIP with w from {w:g} at the start to {end:g} at the end"
    how = {"full": "trained whole", "lora": "trained by LoRA", "frozen": "left as they were"}
    vision, text = (how[identity[f"{tower}_tower"]] for tower in ("vision", "text"))
    weights = (
        f"Both towers were {vision}"
        if vision == text
        else f"The image tower's weights were {vision}, the text tower's {text}"
    )
    batch, processes = identity["per_device_train_batch_size"], identity["world_size"]
    each = f", {batch} on each of {processes} processes" if processes > 1 else ""
    training = (
        f"{weights}, in batches of {batch * processes} images{each}. The loss, {weights_of_loss}, draws an image "
        f"towards its own text and towards the texts of its class. Seed {identity['seed']}."
    )
    zero = results["zero_shot_won"] or not identity["load_best_model_at_end"]
    caption = "Epoch 0 is the untuned model, compared with prototypes made as in the other epochs. The dashed line is the untuned model, zero-shot."
    parts += ["### Training", training, f"![Training loss and validation accuracy by epoch]({curves})"]
    parts += [caption if not zero else "The dashed line is the untuned model, zero-shot."]
    if sources["settings"]:
        rows = [(code(name), *map(_value, values)) for name, values in sources["settings"].items()]
        parts.append(f"Settings that differ from the defaults:\n\n{table(('setting', 'here', 'default'), rows)}")
    else:
        parts.append("All settings are the defaults.")
    used = ", ".join(f"{md(name)} {md(version)}" for name, version in record["versions"].items())
    parts.append(f"Made with {used}" + (f", on {md(sources['device'])}." if sources["device"] else "."))
    return "\n\n".join(parts)


def _value(value: object) -> str:
    if value is None:
        return "not set"
    return code(f"{value:g}" if isinstance(value, float) else value)


def _data(identity: Mapping, sources: Mapping, notes: list[str]) -> str:
    data, counts = sources["dataset"], sources["train_images_per_class"]
    spread = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    chosen = "chose what was kept" if identity["load_best_model_at_end"] else "watched the training"
    rows = [
        ("training", f"{sources['splits']['train']:,}", f"{spread} of each class"),
        ("validation", f"{sources['splits']['validation']:,}", chosen),
        ("test", f"{sources['splits']['test']:,}", "read once, for the result above"),
    ]
    details = [f"{key} {code(data[key])}" for key in ("config", "revision") if data[key]]
    original = data.get("captions_of")
    text = f"Images and labels: {named(pictures_of(data))}"
    text += f", with captions in {code(short(data)) if data['kind'] != 'hub' else named(data)}" if original else ""
    text += f" ({', '.join(details)})" if details else ""
    lines = [text + ".", table(("split", "images", ""), rows)]
    lines += ["\n".join(f"- {md(note, 400)}" for note in notes)] if notes else []
    lines.append(
        f"Fingerprint {code(identity['dataset_fingerprint'])}: of class names, labels, image files and captions. "
        "`mmft-hf finetune` finds the same one in the same data."
    )
    return "\n\n".join(lines)


def _captions(captions: Mapping, images: int) -> str:
    have = "All" if captions["images"] == images else f"{captions['images']:,} of"
    lines = [f"{have} {images:,} training images have captions, {captions['captions']:,} in all."]
    if captions["images"] < images:
        lines[0] += " The others were trained with the class template alone."
    own = f" ({listed(map(code, captions['columns']))})" if captions["columns"] else ""
    said = {
        "columns": f"texts that the data set already had{own}, which no model wrote",
        "template": "class templates",
        "unknown": "texts whose author is not recorded",
    }
    kinds = [(said.get(name, f"written by {code(name)}"), count) for name, count in captions["models"].items()]
    if not kinds:
        lines[0] += f" They are the column {code(captions['column'])}, which does not say who wrote them."
    elif len(kinds) == 1:
        lines[0] += f" They are {kinds[0][0]}."
    else:
        lines[0] += f" They are {'; '.join(f'{what} ({count:,})' for what, count in kinds)}."
    if written_by(captions) and captions["aspects"]:
        lines.append(f"Aspects: {listed(map(code, captions['aspects']))}.")
    if captions["prompts"] and written_by(captions):
        mark = f", where `{CLASS_MARK}` stands for the name of the image's class" if _knew(captions) else ""
        lines.append(f"The prompts{mark}:")
        lines += [f"{md(aspect)}\n\n{fenced(text)}" for aspect, text in captions["prompts"].items()]
    return "\n\n".join(lines)


def _knew(captions: Mapping) -> bool:
    return any(CLASS_MARK in text for text in captions["prompts"].values())


def _no_captions(identity: Mapping) -> str:
    return (
        f"There were none: the text of every image was {code(identity['class_template'])} with the name of its class."
    )


# -- limits -----------------------------------------------------------------------------------------------------------
def limits(record: Mapping, test_images: list[int]) -> str:
    """What the figures do not say, as a Markdown list.

    Args:
        test_images: of each class.
    """
    sources, captions = record["sources"], record["sources"]["captions"]
    data = named(pictures_of(sources["dataset"]))
    held_out = any(note.startswith("There is no test split") for note in record["notes"])
    if held_out:
        test = f"The test images were held out of the training split of {data} at random"
    else:
        test = f"The test images are the test split of {data}"
    lines = [
        f"It knows {len(test_images)} classes and answers with one of them for any picture, also for one that shows none of them. "
        "Scores are no probabilities of being right: nobody has checked how well they are calibrated.",
        f"{test}: they come from where the training images come from. On pictures from elsewhere (other cameras, styles, places) "
        "the accuracy may be quite another.",
        "The 95 % interval is for the choice of test images, as if each had been drawn by itself; several pictures of one thing "
        "make it too narrow. It leaves out the luck of training: another seed gives somewhat different figures.",
        "A wrong label in the test split counts as an error of the model, and one in the training split was learnt.",
    ]
    tested = [n for n in test_images if n]
    few = sum(n < FEW for n in tested)
    if few:
        which = "Every class has" if few == len(test_images) else f"{few} of the classes have"
        lines.append(
            f"{which} fewer than {FEW} test images (the fewest: {min(tested)}). The accuracy of such a class is a rough figure, and "
            "the order of the table above is partly chance."
        )
    if captions and written_by(captions):
        told = " that was told the label, so a wrong label went into them" if _knew(captions) else ""
        lines.append(
            f"The captions were written by a model{told}. No person has read them all, and they contain errors."
        )
    elif captions and not captions["models"]:
        lines.append("Nothing is known of how the captions were written, or of their errors.")
    lines.append(
        f"What holds for the base model, {named(sources['base_model'])}, holds for this one: its biases were not examined."
    )
    if short(sources["base_model"]) == "tiny-clip" and sources["base_model"]["kind"] == "builtin":
        lines.append(
            "tiny-clip is very small and knows drawings only: it is for trying things out, not for any product."
        )
    return "\n".join(f"- {line}" for line in lines)


# -- licence ----------------------------------------------------------------------------------------------------------
def rights(base: Mapping) -> dict:
    """`license` for the metadata, as the base model's own card states it; empty where it states none."""
    found = {key: base[key] for key in ("license", "license_name", "license_link") if key in base}
    return found if isinstance(found.get("license"), str) else {}


def licence(base: Mapping, data: Mapping, granted: Mapping, chosen: bool) -> str:
    """Who allows what, as far as the cards of base model and data say it."""

    def stated(source: Mapping) -> str | None:
        found = source.get("license")
        values = [source.get("license_name") or found] if isinstance(found, str) else found or []
        return listed(map(code, values)) if values else None

    name = code(granted.get("license_name") or granted.get("license") or "")
    if chosen:
        text = f"Published under {name}, as its publisher chose."
    elif granted:
        text = f"{name}, taken over from the base model."
    else:
        text = (
            "This card states no licence, since that of the base model is not known here. Whoever publishes the model must choose "
            "one that base model and data allow."
        )
    if base["kind"] == "builtin":
        text += " The notices of the base model (`NOTICE` beside it in `mmft_hf`) go with it."
    origin = pictures_of(data)
    for source in (origin, data):
        if stated(source):
            return f"{text} For the images and texts that it learnt from, the card of {named(source)} states {stated(source)}."
    return f"{text} The licence of the images and texts that it learnt from ({named(origin)}) is not known here."
