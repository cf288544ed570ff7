"""A small text tower that gives the sentence embeddings of all-MiniLM-L6-v2: an `AlbertModel` of four unshared layers.

Words are factorized (rank 192) and only pieces that WordNet and the training texts use are kept; four of the six layers remain, with
1,024 of their 1,536 inner units. It is distilled on texts alone. Its pooled output, unlike the teacher's, is the embedding
itself, so that stock classes need no pooling option.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from texts import WordNet
from tokenizers import Tokenizer
from transformers import AlbertConfig, AlbertModel, BertModel, PreTrainedTokenizerFast

LAYERS = (0, 1, 3, 5)
RANK, INNER, LONGEST = 192, 1024, 128
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def batches(tokenizer, texts, size, longest=64):
    """Batches of similar length: `(rows, tokens)`."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chosen = [texts[row] for row in rows]
        yield rows, tokenizer(chosen, padding=True, truncation=True, max_length=longest, return_tensors="pt")


@torch.no_grad()
def teach(folder: Path, texts: list[str], size: int = 128) -> torch.Tensor:
    """Sentence embeddings `(texts, 384)` of all-MiniLM-L6-v2 in float16: means over tokens, of unit norm."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = torch.empty(len(texts), 384, dtype=torch.float16)
    for rows, tokens in batches(tokenizer, texts, size):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        found[rows] = F.normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=-1).half()
    return found


def kept_pieces(tokenizer, texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Pieces of the small vocabulary in the order of the large one, and how often each occurs."""
    counts = Counter()
    for start in range(0, len(texts), 10_000):
        for ids in tokenizer(texts[start : start + 10_000], add_special_tokens=False)["input_ids"]:
            counts.update(ids)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])

    def is_letter(piece):  # so that words of Latin, Greek and Cyrillic letters are never [UNK]
        letter = piece.removeprefix("##")
        return len(letter) == 1 and ord(letter) < 0x500

    kept = [piece for piece, i in pieces if piece in SPECIAL or counts[i] >= 2 or is_letter(piece)]
    vocabulary = tokenizer.get_vocab()
    return kept, np.array([counts[vocabulary[piece]] for piece in kept])


def small_tokenizer(folder: Path, kept: list[str]) -> PreTrainedTokenizerFast:
    description = json.loads((folder / "tokenizer.json").read_text())
    new = {piece: i for i, piece in enumerate(kept)}
    description["model"]["vocab"] = new
    for token in description["added_tokens"]:
        token["id"] = new[token["content"]]
    for special in description["post_processor"].get("special_tokens", {}).values():
        special["ids"] = [new[token] for token in special["tokens"]]
    description["truncation"] = description["padding"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        model_max_length=LONGEST,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def start(folder: Path, old_ids: list[int], counts: np.ndarray) -> AlbertModel:
    """The small tower with what it can take over from the teacher."""
    weights = load_file(folder / "model.safetensors")
    config = AlbertConfig(
        vocab_size=len(old_ids),
        embedding_size=RANK,
        hidden_size=384,
        num_hidden_layers=len(LAYERS),
        num_hidden_groups=len(LAYERS),
        num_attention_heads=12,
        intermediate_size=INNER,
        hidden_act="gelu",
        max_position_embeddings=LONGEST,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AlbertModel(config)
    words = weights["embeddings.word_embeddings.weight"][old_ids]
    weight = torch.from_numpy(np.sqrt(np.clip(counts, 1, 1000))).float()[:, None]
    basis = torch.linalg.svd(weight * words, full_matrices=False)[2][:RANK].T  # (384, RANK)
    state = {
        "embeddings.word_embeddings.weight": words @ basis,
        "embeddings.position_embeddings.weight": weights["embeddings.position_embeddings.weight"][:LONGEST] @ basis,
        "embeddings.token_type_embeddings.weight": weights["embeddings.token_type_embeddings.weight"][:1] @ basis,
        # The norm of what is left grows by its smaller number of values.
        "encoder.embedding_hidden_mapping_in.weight": weights["embeddings.LayerNorm.weight"][:, None]
        * basis
        * math.sqrt(384 / RANK),
        "encoder.embedding_hidden_mapping_in.bias": weights["embeddings.LayerNorm.bias"],
    }
    for new, old in enumerate(LAYERS):
        source, target = f"encoder.layer.{old}.", f"encoder.albert_layer_groups.{new}.albert_layers.0."
        inner, outer = weights[source + "intermediate.dense.weight"], weights[source + "output.dense.weight"]
        units = (inner.norm(dim=1) * outer.norm(dim=0)).topk(INNER).indices.sort().values
        state[target + "ffn.weight"] = inner[units]
        state[target + "ffn.bias"] = weights[source + "intermediate.dense.bias"][units]
        state[target + "ffn_output.weight"] = outer[:, units]
        state[target + "ffn_output.bias"] = weights[source + "output.dense.bias"]
        names = {
            "attention.self.query": "attention.query",
            "attention.self.key": "attention.key",
            "attention.self.value": "attention.value",
            "attention.output.dense": "attention.dense",
            "attention.output.LayerNorm": "attention.LayerNorm",
            "output.LayerNorm": "full_layer_layer_norm",
        }
        for old_name, new_name in names.items():
            for kind in ("weight", "bias"):
                state[f"{target}{new_name}.{kind}"] = weights[f"{source}{old_name}.{kind}"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or not all(name.startswith(("pooler", "embeddings.LayerNorm")) for name in missing):
        raise RuntimeError(
            f"expected the weights of a BertModel with six layers, found {unexpected}, missing {missing}"
        )
    torch.nn.init.eye_(model.pooler.weight)
    model.pooler.weight.data.mul_(0.3)
    return model


def distil(
    model, tokenizer, texts, targets, steps: int, size: int = 256, rate: float = 5e-4, seed: int = 0, report=None
):
    """Trains the tower to give the teacher's embeddings and their similarities within a batch."""
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    ids = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    lengths = np.array([len(row) for row in ids])
    warm, began, recent = 100, time.process_time(), []
    model.train()
    for step in range(steps):
        # Texts of similar length: a random place in the order by length, with random ties.
        if step % 200 == 0:
            order = np.lexsort((draw.random(len(texts)), lengths))
        first = draw.integers(0, len(texts) - size)
        rows = order[first : first + size]
        longest = lengths[rows].max()
        tokens = torch.zeros(size, longest, dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, : lengths[row]] = torch.tensor(ids[row])
        mask = (torch.arange(longest) < torch.from_numpy(lengths[rows])[:, None]).long()
        goal = targets[rows].float()
        with torch.autocast("cpu", torch.bfloat16):
            pooled = model(input_ids=tokens, attention_mask=mask).pooler_output
        own = F.normalize(pooled.float(), dim=-1)
        cosine = (own * goal).sum(-1)
        relations = ((own @ own.T - goal @ goal.T) ** 2).mean()
        loss = (1 - cosine).mean() + 10 * relations
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(cosine.mean().item())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}  cosine {np.mean(recent[-50:]):.4f}  {time.process_time() - began:.0f} CPU s",
                flush=True,
            )
            if report and (step + 1) % 500 == 0:
                report(model.eval(), step + 1)
                model.train()
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("minilm", "wordnet", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=260_000)
    parser.add_argument("--held-out", type=int, default=3_000)
    parser.add_argument("--phrases", type=int, default=80_000)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums of several threads have no fixed order
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = WordNet(args.wordnet).texts(args.phrases, args.seed)
    random.Random(args.seed).shuffle(texts)
    texts = texts[: args.texts]
    cache = args.out / "teacher.pt"
    if not cache.exists():
        torch.save(torch.cat([teach(args.minilm, texts[i : i + 20_000]) for i in range(0, len(texts), 20_000)]), cache)
    targets = torch.load(cache)
    large = PreTrainedTokenizerFast.from_pretrained(args.minilm)
    kept, counts = kept_pieces(large, texts)
    vocabulary = large.get_vocab()
    tokenizer = small_tokenizer(args.minilm, kept)
    model = start(args.minilm, [vocabulary[piece] for piece in kept], counts)
    held, goal = texts[-args.held_out :], targets[-args.held_out :].float()

    @torch.no_grad()
    def report(model, step):
        cosines = torch.empty(len(held))
        for rows, tokens in batches(tokenizer, held, 128):
            cosines[rows] = F.cosine_similarity(model(**tokens).pooler_output, goal[rows])
        low = cosines.quantile(0.05)
        print(f"step {step}  held-out texts: cosine {cosines.mean():.4f}, 5 % below {low:.4f}", flush=True)
        return cosines.mean().item()

    taught = texts[: -args.held_out], targets[: -args.held_out]
    distil(model, tokenizer, *taught, args.steps, seed=args.seed, report=report)
    record = {
        "texts": len(taught[0]),
        "steps": args.steps,
        "pieces": len(kept),
        "held_out_cosine": report(model, args.steps),
        "seed": args.seed,
    }
    (args.out / "distilled.json").write_text(json.dumps(record, indent=1))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
