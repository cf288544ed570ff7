"""The families of dual encoders that are supported, and how they differ.

All of them call their parts `vision_model`, `visual_projection`, `text_model` and `text_projection`, and have a forward that
returns `image_embeds` and `text_embeds`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One family of dual encoders.

    Args:
        title: common name.
        example: a model on the Hub.
        model, processor: classes of transformers.
        scale: parameter that scales the cosines: `logit_scale`, its logarithm, or `temperature`, its inverse.
        vision_head, text_head: name of the layer that projects a tower's pooled output into the common space. None: there is none,
            since the pooled output is the embedding.
        unused: parameters, by the start of their names, that do not affect a softmax over cosines and so get no gradient.
        padded: texts are lower case and always padded to the limit, and the text tower reads the padding: it has no mask.
        causal: tokens do not see later ones, so padding, which comes last, needs no mask. Without a mask attention can use
            its fastest kernels.
        max_tokens: limit of texts, if it is below what the positions allow.
        zero_shot: whether it works in transformers' zero-shot pipeline.
        texts: what its text tower reads: `tokens`, or `vectors` of a caption encoder, see `adapted_clip`.
    """

    title: str
    example: str
    model: str
    processor: str
    scale: str = "logit_scale"
    vision_head: str | None = "visual_projection"
    text_head: str | None = "text_projection"
    unused: tuple[str, ...] = ()
    padded: bool = False
    causal: bool = False
    max_tokens: int | None = None
    zero_shot: bool = True
    texts: str = "tokens"

    @property
    def text_inputs(self) -> tuple[str, ...]:
        """What `get_text_features` takes, by name."""
        return ("text_vectors",) if self.texts == "vectors" else ("input_ids", "attention_mask")


FAMILIES = {
    "clip": Family("CLIP", "openai/clip-vit-base-patch32", "CLIPModel", "CLIPProcessor", causal=True),
    "metaclip_2": Family(
        "MetaCLIP 2", "facebook/metaclip-2-worldwide-b16", "MetaClip2Model", "CLIPProcessor", causal=True
    ),
    "siglip": Family(
        "SigLIP",
        "google/siglip-base-patch16-224",
        "SiglipModel",
        "SiglipProcessor",
        vision_head=None,
        text_head="text_model.head",
        unused=("logit_bias",),  # the same for all pairs, so that it drops out of a softmax
        padded=True,
    ),
    "chinese_clip": Family(
        "Chinese-CLIP", "OFA-Sys/chinese-clip-vit-base-patch16", "ChineseCLIPModel", "ChineseCLIPProcessor"
    ),
    "altclip": Family("AltCLIP", "BAAI/AltCLIP", "AltCLIPModel", "AltCLIPProcessor"),
    "align": Family(
        "ALIGN",
        "kakaobrain/align-base",
        "AlignModel",
        "AlignProcessor",
        scale="temperature",
        vision_head=None,
        unused=("text_model.pooler.",),  # the first token is used unpooled
        max_tokens=64,  # as its own processor does
    ),
    "vision-text-dual-encoder": Family(
        "dual encoder",
        "one that VisionTextDualEncoderModel.from_vision_text_pretrained made",
        "VisionTextDualEncoderModel",
        "VisionTextDualEncoderProcessor",
        unused=("vision_model.embeddings.mask_token",),  # only used in pre-training with masked patches
        zero_shot=False,
    ),
    "mmft_adapted_clip": Family(
        "AdaptedCLIP",
        "one that mmft-hf finetune --text_trunk made",
        "AdaptedCLIP",
        "AdaptedProcessor",
        zero_shot=False,
        texts="vectors",
    ),
}
# Of all families, see `Family.text_inputs`.
TEXT_INPUTS = ("input_ids", "attention_mask", "text_vectors")
REFUSED = {
    "siglip2": "the NaFlex kind, whose pictures have any number of patches. Those of one size have model_type siglip"
}
# Text towers whose positions start after the padding token's id.
POSITIONS_AFTER_PADDING = (
    *("altclip_text_model", "camembert", "data2vec-text", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
# How the tokens of a text become one vector, where that is not the tower's own pooled output, see `pooling`.
POOLINGS = {
    "mean": "the mean of the tokens",
    "first": "the first token, often called [CLS]",
    "last": "the last token, as of a language model",
}
LONGEST_TEXT = 512  # tokens, where a text tower has no limit of its own


def is_padded(processor) -> bool:
    """Whether texts for this processor's model are padded to the limit, without a mask (see `Family`)."""
    return type(processor).__name__ in {family.processor for family in FAMILIES.values() if family.padded}


def unused_parameters(config) -> tuple[str, ...]:
    """Parameters, by the start of their names, that do not affect the embeddings of this model (see `Family`)."""
    # What `text_pooling` takes instead of the text tower's own pooled output, see `pooling`.
    pooler = ("text_model.pooler.",) if getattr(config, "text_pooling", None) else ()
    return FAMILIES[config.model_type].unused + pooler


def token_limit(config) -> int:
    """Maximum number of tokens that the text tower reads, including begin and end."""
    text, family = config.text_config, FAMILIES.get(config.model_type)
    limit = getattr(text, "max_position_embeddings", None) or LONGEST_TEXT  # some have no positions, or relative ones
    if text.model_type in POSITIONS_AFTER_PADDING:
        limit -= text.pad_token_id + 1
    return min(limit, family.max_tokens or limit) if family else limit
