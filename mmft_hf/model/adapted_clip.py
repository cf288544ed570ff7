"""`AdaptedCLIP`: the image tower of a dual encoder, and vectors of a caption encoder behind an adaptor in place of its text tower.

The caption encoder, a language model or a sentence encoder, is no part of the model: its vectors are computed once
(`adapted_processor`), and training and prediction need nothing else of it.

Shapes: `B` images or texts, `d` size of the vectors, `D` embedding size.

References: Huang et al. 2024, "LLM2CLIP" (arXiv 2411.04997), for frozen vectors and the adaptor, whose 4 blocks are those of the
authors' code. Here the image projection of the dual encoder is kept, where theirs is new.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from ..core.errors import UserError

MODEL_TYPE = "mmft_adapted_clip"
# Image towers that `AutoModel` does not know.
TOWERS = {
    "align_vision_model": "AlignVisionModel",
    "altclip_vision_model": "AltCLIPVisionModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
}


class TextAdaptorConfig(PreTrainedConfig):
    """Sizes of the adaptor.

    Args:
        hidden_size: `d`, of the vectors.
        num_hidden_layers: its blocks.
        intermediate_size: inner width of a block. Default: 2 d.
    """

    model_type = "mmft_text_adaptor"

    def __init__(self, hidden_size=512, num_hidden_layers=4, intermediate_size=None, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.intermediate_size = intermediate_size or 2 * hidden_size


class AdaptedCLIPConfig(PreTrainedConfig):
    """What `AdaptedCLIP` is built from.

    Args:
        vision_config: of the image tower, of any kind that `AutoModel` knows, or one of `TOWERS`.
        text_config: of the adaptor, see `TextAdaptorConfig`.
        projection_dim: `D`.
        vision_projection: whether a linear layer follows the image tower. Without one (SigLIP, ALIGN) its pooled output is the
            embedding.
        logit_scale_init_value: logarithm of the scale of the logits.
        text_trunk: digest of the settings and weights of the caption encoder whose vectors the adaptor reads
            (`adapted_processor.TextTrunk`); None: unknown.
    """

    model_type = MODEL_TYPE
    sub_configs = {"vision_config": AutoConfig, "text_config": TextAdaptorConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        projection_dim=512,
        vision_projection=True,
        logit_scale_init_value=2.6592,
        text_trunk=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        vision = vision_config or {"model_type": "clip_vision_model"}
        self.vision_config = AutoConfig.for_model(**vision) if isinstance(vision, dict) else vision
        text = text_config or {}
        self.text_config = TextAdaptorConfig(**text) if isinstance(text, dict) else text
        self.projection_dim, self.vision_projection = projection_dim, vision_projection
        self.logit_scale_init_value, self.text_trunk = logit_scale_init_value, text_trunk


class AdaptorBlock(nn.Module):
    """`h + W2 gelu(W1 LN(h))`, with biases, on `(B, d)`."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


class TextAdaptor(nn.Module):
    """Blocks on the vectors of texts: with 4 of them and an inner width of 2 d, 16 d² + 20 d parameters."""

    def __init__(self, config: TextAdaptorConfig):
        super().__init__()
        self.size = config.hidden_size
        sizes = (config.hidden_size, config.intermediate_size)
        self.layers = nn.ModuleList(AdaptorBlock(*sizes) for _ in range(config.num_hidden_layers))

    def forward(self, text_vectors: Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output` `(B, d)` of vectors `(B, d)`.

        Raises:
            UserError: vectors of another size, or token ids.
        """
        if text_vectors.ndim != 2 or text_vectors.shape[1] != self.size or not text_vectors.is_floating_point():
            raise UserError(
                f"text_vectors: expected vectors (texts, {self.size}) of the caption encoder that this model was made with, found "
                f"{str(text_vectors.dtype).removeprefix('torch.')} of shape {tuple(text_vectors.shape)}. Give the "
                "model's own processor the texts, or the vectors of that encoder."
            )
        hidden = text_vectors
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutputWithPooling(pooler_output=hidden)


class AdaptedCLIP(PreTrainedModel):
    """A dual encoder whose texts are vectors. Its parts have the names that they have in `CLIPModel`.

    `text_model` is the adaptor, and `text_projection` a layer norm and a linear layer into the common space.
    """

    config_class = AdaptedCLIPConfig
    base_model_prefix = MODEL_TYPE
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: AdaptedCLIPConfig):
        super().__init__(config)
        kind = config.vision_config.model_type
        make = getattr(transformers, TOWERS[kind])._from_config if kind in TOWERS else AutoModel.from_config
        tower = make(config.vision_config)
        # Earlier versions of transformers wrap the tower that a dual encoder holds.
        self.vision_model = getattr(tower, "vision_model", tower)
        self.supports_gradient_checkpointing = self.vision_model.supports_gradient_checkpointing
        self.text_model = TextAdaptor(config.text_config)
        width, size = config.text_config.hidden_size, config.projection_dim
        self.text_projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        self.visual_projection = (
            nn.Linear(config.vision_config.hidden_size, size, bias=False) if config.vision_projection else nn.Identity()
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Output of the image tower; its `pooler_output` `(B, D)` is the embedding, not normalized."""
        found = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        # Some convolutional towers give a picture of one pixel.
        found.pooler_output = self.visual_projection(found.pooler_output.flatten(1))
        return found

    def get_text_features(self, text_vectors: Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output` `(B, D)`, the embedding, not normalized, of vectors `(B, d)`.

        Raises:
            UserError: vectors of another size.
        """
        found = self.text_model(text_vectors)
        found.pooler_output = self.text_projection(found.pooler_output)
        return found

    def forward(
        self, text_vectors: Tensor | None = None, pixel_values: Tensor | None = None, return_loss: bool | None = None
    ) -> CLIPOutput:
        """What `CLIPModel` returns: unit-norm embeddings, scaled cosines and, with `return_loss`, the contrastive loss.

        Args:
            text_vectors (`(B, d)`): of the caption encoder.
            pixel_values (`(B, 3, height, width)`): of the images.
        """
        images, texts = self.get_image_features(pixel_values), self.get_text_features(text_vectors)
        image_embeds, text_embeds = (F.normalize(found.pooler_output, dim=-1) for found in (images, texts))
        logits = self.logit_scale.exp() * text_embeds @ image_embeds.T
        loss = None
        if return_loss:
            pairs = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        return CLIPOutput(
            loss=loss,
            logits_per_image=logits.T,
            logits_per_text=logits,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )


AutoConfig.register(MODEL_TYPE, AdaptedCLIPConfig)
AutoModel.register(AdaptedCLIPConfig, AdaptedCLIP)
