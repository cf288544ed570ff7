"""One tiny random model of each kind of dual encoder, with tokenizer and image processor of the kind's own classes."""

import string
from pathlib import Path

import torch
import transformers as hf
from tokenizers import pre_tokenizers

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"image_size": 16, "patch_size": 8}
CHARACTERS = string.ascii_letters + string.digits + ".,"


def byte_pairs() -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def word_pieces() -> hf.BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    return hf.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512)


def unigrams() -> hf.XLMRobertaTokenizer:
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{c}" for c in CHARACTERS), *CHARACTERS, "▁"]
    return hf.XLMRobertaTokenizer(vocab=[(word, -float(i)) for i, word in enumerate(words)], model_max_length=512)


def gemma() -> hf.GemmaTokenizer:
    """As SigLIP 2 has it; the tokenizer of SigLIP needs sentencepiece, which is no dependency."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS, *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    return hf.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=64, padding_side="right")


def text(tokenizer, **more) -> dict:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return TOWER | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 77} | more


def cropped(**more) -> hf.CLIPImageProcessor:
    return hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **more)


SQUARE = {"height": 16, "width": 16}
VISION = TOWER | PICTURE


def clip():
    tokenizer = hf.CLIPTokenizer(vocab=byte_pairs(), merges=[], model_max_length=77)
    config = hf.CLIPConfig(text_config=text(tokenizer), vision_config=VISION, projection_dim=24)
    return hf.CLIPModel(config), hf.CLIPProcessor(cropped(), tokenizer)


def metaclip_2():
    tokenizer = unigrams()
    config = hf.MetaClip2Config(text_config=text(tokenizer), vision_config=VISION, projection_dim=24)
    return hf.MetaClip2Model(config), hf.CLIPProcessor(cropped(), tokenizer)


def siglip():
    tokenizer = gemma()
    config = hf.SiglipConfig(text_config=text(tokenizer, max_position_embeddings=64), vision_config=VISION)
    model = hf.SiglipModel(config)
    torch.nn.init.constant_(model.logit_scale, 2.0)  # random ones are exp(0), and a bias of 0 hides it
    torch.nn.init.constant_(model.logit_bias, -3.0)
    return model, hf.SiglipProcessor(hf.SiglipImageProcessor(size=SQUARE), tokenizer)


def chinese_clip():
    tokenizer = word_pieces()
    config = hf.ChineseCLIPConfig(text_config=text(tokenizer), vision_config=VISION, projection_dim=24)
    pictures = hf.ChineseCLIPImageProcessor(size=SQUARE, do_center_crop=False)
    return hf.ChineseCLIPModel(config), hf.ChineseCLIPProcessor(pictures, tokenizer)


def altclip():
    tokenizer = unigrams()
    settings = text(tokenizer, project_dim=20, type_vocab_size=1, initializer_factor=1.0)
    config = hf.AltCLIPConfig(text_config=settings, vision_config=VISION, projection_dim=24)
    return hf.AltCLIPModel(config), hf.AltCLIPProcessor(cropped(), tokenizer)


# Two stages of EfficientNet.
EFFICIENT = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 3],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
}

STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
# Convolutional image towers: the configuration, the size of the pooled output, and whether LoRA goes into convolutions.
CONVOLUTIONAL = {
    "efficientnet": (hf.EfficientNetConfig(**EFFICIENT, hidden_dim=1280, drop_connect_rate=0.0), 1280, True),
    "resnet": (hf.ResNetConfig(**STAGES), 16, True),
    "resnet-basic": (hf.ResNetConfig(**STAGES, layer_type="basic"), 16, True),
    "regnet": (hf.RegNetConfig(**STAGES, groups_width=8), 16, True),
    "convnext": (hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4), 16, False),
    "mobilenet_v2": (hf.MobileNetV2Config(depth_multiplier=0.1, tf_padding=False), 1280, True),
    "swin": (hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4), 16, False),
}  # fmt: skip


def align():
    tokenizer = word_pieces()
    vision = {**EFFICIENT, "image_size": 16, "hidden_dim": 32}
    config = hf.AlignConfig(
        text_config=text(tokenizer), vision_config=vision, projection_dim=24, temperature_init_value=0.1
    )
    pictures = hf.EfficientNetImageProcessor(size=SQUARE, do_center_crop=False)
    return hf.AlignModel(config), hf.AlignProcessor(pictures, tokenizer)


def vit_bert():
    tokenizer = word_pieces()
    vision, words = hf.ViTConfig(**VISION), hf.BertConfig(**text(tokenizer))
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, words, projection_dim=24)
    pictures = hf.ViTImageProcessor(size=SQUARE)
    return hf.VisionTextDualEncoderModel(config), hf.VisionTextDualEncoderProcessor(pictures, tokenizer)


def clip_roberta():
    tokenizer = unigrams()
    vision, words = hf.CLIPVisionConfig(**VISION), hf.XLMRobertaConfig(**text(tokenizer))
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, words, projection_dim=24)
    return hf.VisionTextDualEncoderModel(config), hf.VisionTextDualEncoderProcessor(cropped(), tokenizer)


KINDS = {
    builder.__name__: builder
    for builder in (clip, metaclip_2, siglip, chinese_clip, altclip, align, vit_bert, clip_roberta)
}


def save(kind: str, folder: Path) -> Path:
    """The model of that kind, as a folder that its makers could have published."""
    torch.manual_seed(0)
    model, processor = KINDS[kind]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
