"""An image-text-to-text model of 65,000 parameters, made from a configuration: its captions are random words.

A LLaVA: CLIP vision tower, projector, Llama. Saved with everything that `AutoProcessor` and a server read from a folder,
and none of it needs torchvision.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

try:  # under this name the class needs no torchvision
    from transformers import CLIPImageProcessorPil
except ImportError:  # before transformers 5.4
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

WORDS = """a the small large red green blue yellow bright dark round square soft shiny smooth thing picture with of on in
and corner edge surface pattern stripes spots centre background light""".split()

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte for any prompt, and one per word for the answers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    # As Llama's does; the chat template writes the begin token, too.
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", fast.bos_token_id)]
    )
    fast.add_tokens([" " + word for word in WORDS])
    return fast


def build_tiny_vlm(folder: str | Path, seed: int = 0) -> Path:
    """Writes model, processor and chat template into `folder` and returns it.

    Greedy texts depend on the picture, on every word of the prompt and on `seed`; about one word in thirty is the end.
    """
    folder, tokenizer = Path(folder), build_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=16, patch_size=8, initializer_range=0.3),
        text_config=LlamaConfig(
            **tower, **ids, vocab_size=len(tokenizer), max_position_embeddings=4096, initializer_range=0.3
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    # Only words and the end: bytes of noise would be no text.
    allowed = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(" " + word) for word in WORDS)}
    model.generation_config = GenerationConfig(
        **ids, suppress_tokens=[i for i in range(len(tokenizer)) if i not in allowed]
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy `default` takes away again
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(build_tiny_vlm(sys.argv[1]))
