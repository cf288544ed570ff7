"""Tiny random language models and sentence encoders, saved as their makers could have published them."""

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = (
    "a an the photo picture of on in with small large red blue green yellow scarlet azure cat dog feline hound house tree two three "
    "left right near far above under sits stands shows there is and , ."
).split()


def word_tokenizer(words=WORDS, pad: str | None = "<pad>", end: str | None = "</s>", side: str = "right"):
    """One token per word; a text begins with `<s>`, as those of Llama do."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *filter(None, [end, pad]), *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    backend.decoder = decoders.WordPiece()
    names = {"pad_token": pad, "eos_token": end, "bos_token": "<s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, model_max_length=512, **names)


def save_llama(folder: Path, seed: int = 0, tokenizer=None, **more) -> Path:
    """A decoder with rotary positions."""
    tokenizer = tokenizer or word_tokenizer()
    config = hf.LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_key_value_heads=2, **_ids(tokenizer), **more)
    return _save(hf.LlamaModel, config, tokenizer, folder, seed)


def save_gpt2(folder: Path, seed: int = 0) -> Path:
    """A decoder with learned absolute positions, whose tokenizer pads on the left and has no pad token."""
    tokenizer = word_tokenizer(pad=None, side="left")
    config = hf.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, **_ids(tokenizer))
    return _save(hf.GPT2Model, config, tokenizer, folder, seed)


def save_bert(folder: Path, seed: int = 0, pooling: str | None = None, max_tokens: int = 16) -> Path:
    """An encoder; with `pooling` a folder of sentence-transformers."""
    tokenizer = hf.BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}, model_max_length=64
    )
    config = hf.BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2)
    _save(hf.BertModel, config, tokenizer, folder, seed)
    if pooling:
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ]
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
    return folder


def _ids(tokenizer) -> dict:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _save(kind: type, config, tokenizer, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config.initializer_range = 0.2
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Four attributes, each in two wordings that share no word.
ATTRIBUTES = [
    {"red": "scarlet", "blue": "azure", "green": "emerald", "black": "dark", "white": "pale"},
    {"cat": "feline", "dog": "hound", "bird": "fowl", "horse": "steed", "cow": "cattle"},
    {"one": "single", "two": "pair", "three": "trio", "many": "several"},
    {"house": "home", "tree": "oak", "road": "street", "river": "stream", "hill": "mount"},
]
WORDINGS = "{2} {0} {1} near the {3}", "beside a {3} there stands , {0} , the {1} : {2}"


def wordings(combination) -> list[str]:
    """The two captions of a combination of attributes, given as one word of each of `ATTRIBUTES`."""
    other = [words[word] for words, word in zip(ATTRIBUTES, combination, strict=True)]
    return [WORDINGS[0].format(*combination), WORDINGS[1].format(*other)]


def wording_tokenizer():
    """A tokenizer of the words of `wordings`."""
    words = {word for words in ATTRIBUTES for pair in words.items() for word in pair}
    return word_tokenizer(sorted(words | set("near the beside a there stands , :".split())))
