"""What a reader is told of the methods: which belong together, which read captions, what an ablation tests."""

from __future__ import annotations

# Which methods belong together on the page. A name that is not here is put beside its relatives by its beginning.
WISE = "+wise"
UNTUNED = ("zs", "zs-ens", "zs-cap", "zs-cupl")
ON_FEATURES = ("lp", "gda", "tip", "tip-f", "lp++", "zs-lp", "clap", "lp-permuted-labels")
FAMILIES = {
    "untuned": "Untuned model",
    "features": "On frozen features",
    "tuned": "Fine-tuned without captions",
    "mmft": "MMFT: fine-tuned with captions",
    "ablation": "Ablations of MMFT",
}
ABLATIONS = {
    "mmft-no-captions": "The same loss on class templates, in training and at inference: what captions bring in all.",
    "mmft-train-captions": "Captions in training, the class template at inference: what captions in training bring alone.",
    "mmft-test-captions": "Class templates in training, captions at inference: what captions at inference bring alone.",
    "mmft-w0": "w = 0, the CLIP loss alone: what the SupCon term brings.",
    "mmft-w1": "w = 1, the SupCon loss alone: what the CLIP term brings.",
    "mmft-shuffle-within": "Captions shuffled among the images of a class: is it the text of the very image that helps?",
    "mmft-shuffle-across": "Captions shuffled among all images, a control that should lose: do captions have to be true?",
    "mmft-permuted-labels": "Labels shuffled among all images, a control that should lose: class names in the texts alone are left.",
}
VARIANTS = {
    "mmft-lora": "The LoRA of clip-lora in both towers in place of whole towers.",
    "mmft-mixed": "Compared with prototypes halfway between captions and class template.",
    "mmft-balanced": "Four images of each class in a batch: more positives for the SupCon term.",
    "mmft-schedule": "w falls from 0.5 to 0 in the course of training: classes first, then single images.",
    "mmft-averaged": "The running average of the weights (decay 0.95) in place of the last ones.",
    "mmft-dropout": "Half of the captions dropped in training: do class templates among them help?",
    "mmft-lora-all": "LoRA of rank 8 in all layers of both towers in place of whole towers.",
    "mmft-frozen-text": "The image tower alone is trained.",
    "mmft-frozen-vision": "The text tower alone is trained.",
}


def about(method: str) -> str:
    """What a variant of mmft changes."""
    base = base_of(method)
    text = ABLATIONS.get(base) or VARIANTS.get(base) or ("" if base == "mmft" else "A variant of mmft.")
    return f"Weights halfway to those of the untuned model. {text}".strip() if base != method else text


# Those that are always there first: their place gives their colour, in every report.
KNOWN = {
    "features": ON_FEATURES,
    "tuned": ("flyp", "ce", "clip-lora", "ce-frozen", "lp-ft", "flyp-ens"),
    "mmft": tuple(VARIANTS),
    "ablation": tuple(ABLATIONS),
}


def base_of(method: str) -> str:
    """The method that weights were interpolated from, without `+wise`."""
    return method.removesuffix(WISE)


def family(method: str) -> str:
    """A key of `FAMILIES`."""
    base = base_of(method)
    if base in ABLATIONS:
        return "ablation"
    if base.startswith("mmft"):
        return "mmft"
    return "untuned" if base in UNTUNED else "features" if base in ON_FEATURES else "tuned"


def reads_captions(method: str) -> bool:
    """Whether captions are any part of a method."""
    return base_of(method) == "zs-cap" or (method.startswith("mmft") and base_of(method) != "mmft-no-captions")
