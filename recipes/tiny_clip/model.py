"""The model: tokenizer, stock CLIPModel, forward passes with dropped patches, and saving as float16."""

import copy
import json
import math
from pathlib import Path

import torch
from data import IMAGE_SIZE, MEAN, STD
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 77


def train_tokenizer(texts, vocab_size):
    """CLIP's byte-level BPE, lower-case, learnt from these texts; ids 0 and 1 are start and end."""
    blank = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = dict(state["vocab"])
    for letter in sorted(alphabet):  # a byte that never ended a word must still be known there
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def build(tokenizer, width, vision_layers, text_layers, patch):
    """A CLIPModel with random weights."""

    def tower(layers):
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "hidden_act": "gelu",  # one fused kernel; CLIP's quick_gelu is three
        }

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower(text_layers) | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    text |= {"pad_token_id": tokenizer.pad_token_id, "projection_dim": width}
    vision = tower(vision_layers) | {"image_size": IMAGE_SIZE, "patch_size": patch, "projection_dim": width}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    model.set_attn_implementation("eager")  # on a CPU the backward pass of sdpa takes several times as long
    return model


def grid_positions(side, width):
    """(1 + side * side, width) sine-cosine positions in two dimensions, zero for the class token."""
    place = torch.arange(side) / side
    waves = torch.exp(torch.linspace(math.log(math.pi), math.log(math.pi * side), width // 4))
    angle = place[:, None] * waves[None]
    line = torch.cat([angle.sin(), angle.cos()], 1)
    grid = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    return torch.cat([torch.zeros(1, width), grid.reshape(side * side, width)])


@torch.no_grad()
def start_local(model, strength=0.7, value_strength=0.4):
    """Starting weights of the vision tower under which a patch first looks at patches like and near itself.

    Query times key begins near the identity and value times output near its negative, as trained towers have it
    (mimetic initialization, Trockman and Kolter 2023): small towers on little data learn much faster from there.
    """
    config = model.config.vision_config
    width, heads = config.hidden_size, config.num_attention_heads
    side, size = config.image_size // config.patch_size, config.hidden_size // config.num_attention_heads
    model.vision_model.embeddings.position_embedding.weight.copy_(0.3 * grid_positions(side, width))
    eye = torch.eye(width)
    for layer in model.vision_model.encoder.layers:
        attention = layer.self_attn
        for h in range(heads):
            u, s, v = torch.linalg.svd(strength * (torch.randn(width, width) / width**0.5 + eye))
            rows = slice(h * size, (h + 1) * size)
            attention.q_proj.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
            attention.k_proj.weight[rows] = (v.T[:, :size] * s[:size].sqrt()).T
        u, s, v = torch.linalg.svd(value_strength * (torch.randn(width, width) / width**0.5 - eye))
        attention.v_proj.weight.copy_(v * s.sqrt()[:, None])
        attention.out_proj.weight.copy_(u * s.sqrt())


def image_features(model, pixels, keep=1.0, generator=None):
    """float (B, 3, S, S) -> (pooled (B, W), projected (B, P)). keep < 1: that share of the patches, drawn per picture."""
    vision = model.vision_model
    x = vision.embeddings(pixels)
    if keep < 1:
        patches = x.shape[1] - 1
        order = torch.rand(len(x), patches, generator=generator).argsort(1)[:, : round(keep * patches)] + 1
        order = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), order], 1)
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    x = vision.encoder(inputs_embeds=vision.pre_layrnorm(x)).last_hidden_state
    pooled = vision.post_layernorm(x[:, 0])
    return pooled, model.visual_projection(pooled)


def text_features(model, ids):
    """int (B, L) -> projected (B, P). Padding needs no mask: attention is causal and the pooled token comes first."""
    return model.text_projection(model.text_model(input_ids=ids).pooler_output)


def processor(tokenizer):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=list(MEAN), image_std=list(STD)
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def save(model, tokenizer, folder):
    """float16 safetensors, configuration, tokenizer and image processor into a folder.

    The configuration says float32, so that the weights are widened on loading: they can be trained as they come.
    """
    copy.deepcopy(model).half().save_pretrained(folder)
    config = Path(folder) / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    processor(tokenizer).save_pretrained(folder)
