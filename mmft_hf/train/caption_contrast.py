"""Caption-contrastive tuning of a caption encoder: two captions of one picture are brought together, those of others apart.

After stage 1 of Huang et al., "LLM2CLIP" (arXiv 2411.04997): LoRA on a frozen language model, cosines times 50, one direction,
negatives from all processes. Different here: pictures have classes, so other texts of the same class are no negatives (or are, as in the
paper, with `same_class="negative"`); a picture with one caption is paired with the text of its class; the instruction, if there is
one, stands before both texts, because a model that is tuned with one and used without it loses most of what it has learned.

Shapes: `N` pairs of a step in all processes, `d` size of the vectors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..core.distributed import gather
from ..core.errors import UserError
from ..data.sampling import generator
from ..data.splits import captions_of
from ..data.texts import DEFAULT_TEMPLATE, class_prompt
from ..data.views import text_rows
from ..model.caption_encoder import CaptionEncoder
from ..model.features import Encoding, encode_captions_once, sorted_distinct

SCALE = 50.0
BLOCK = 1024  # queries that are compared with all documents at a time


class Pair(NamedTuple):
    """Two texts of one picture, and its class."""

    query: str
    document: str
    label: int


class CaptionPairs(torch.utils.data.Dataset):
    """Two different texts of each picture, drawn anew in each epoch: captions, or the only caption and the text of its class.

    A draw depends on the seed, the epoch and the row alone, so a resume draws what the run would have drawn.

    Args:
        dataset: columns `label` and `captions`.
        class_template: of the text of a class.
        seed: of the draws.

    Attributes:
        texts: different texts of each picture that has two or more.
        labels: classes of these pictures.
        left_out: number of pictures without a pair: they have no caption.
        epoch: of the next draws.
    """

    def __init__(self, dataset: Dataset, class_template: str = DEFAULT_TEMPLATE, seed: int = 0):
        names = dataset.features["label"].names
        self.seed, self.epoch = seed, 0
        self.texts: list[list[str]] = []
        self.labels: list[int] = []
        self.left_out = 0
        for row in text_rows(dataset):
            texts = list(dict.fromkeys(captions_of(row["captions"])))
            if len(texts) == 1:
                texts = list(dict.fromkeys([*texts, class_prompt(class_template, names[row["label"]])]))
            if len(texts) < 2:
                self.left_out += 1
                continue
            self.texts.append(texts)
            self.labels.append(row["label"])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Pair:
        texts = self.texts[row]
        first, second = generator(self.seed, self.epoch, row).permutation(len(texts))[:2]
        return Pair(texts[first], texts[second], self.labels[row])

    def fixed(self) -> list[Pair]:
        """The first two texts of each picture."""
        return [Pair(*texts[:2], label) for texts, label in zip(self.texts, self.labels, strict=True)]

    def divided(self, rest: Sequence[int], held: Sequence[int]) -> tuple[CaptionPairs, CaptionPairs]:
        """The pairs of two lists of rows."""
        return self._of(rest), self._of(held)

    def _of(self, rows: Sequence[int]) -> CaptionPairs:
        part = CaptionPairs.__new__(CaptionPairs)
        part.seed, part.epoch, part.left_out = self.seed, 0, 0
        part.texts, part.labels = [self.texts[i] for i in rows], [self.labels[i] for i in rows]
        return part


def caption_loss(
    queries: Tensor, documents: Tensor, labels: Tensor, scale: float = SCALE, same_class: str = "mask"
) -> Tensor:
    """Mean over i of -log (e^{s cos(q_i, p_i)} / sum_j e^{s cos(q_i, p_j)}), j = i and all j of other classes than that of i.

    Args:
        queries, documents: `(N, d)`.
        labels: classes `(N,)`.
        scale: s.
        same_class: `negative`: j are all rows, as in the paper.

    References: LLM2CLIP, section 3.1; without its drawn negatives, which are other rows of a batch.
    """
    logits = scale * F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T
    if same_class == "mask":
        same = labels[:, None] == labels[None, :]
        logits = logits.masked_fill(same.fill_diagonal_(False), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def caption_retrieval(encoder: CaptionEncoder, pairs: Sequence[Pair], how: Encoding) -> dict:
    """How well an encoder finds the second text of a picture by its first.

    The protocol: the queries are the first texts of `n` pictures; the documents are the `m` different ones among their second texts. A
    query is right at k if fewer than k of the other documents are as close to it as its own, or closer: ties count as wrong. Its class is
    right if the closest document is one of a picture of that class. Figures depend on n and m, and say nothing beside those of
    other data or of other papers.

    Returns:
        `recall_at_1`, `recall_at_5`, `chance` (of recall at 1), `class_at_1`, `pictures` (n), `documents` (m).
    """
    texts = sorted_distinct(text for pair in pairs for text in pair[:2])
    place = {text: i for i, text in enumerate(texts)}
    vectors = F.normalize(encode_captions_once(encoder, texts, how).embeds, dim=-1)
    documents = {text: i for i, text in enumerate(dict.fromkeys(pair.document for pair in pairs))}
    answers = vectors[[place[text] for text in documents]]
    classes: list[set[int]] = [set() for _ in documents]
    for pair in pairs:
        classes[documents[pair.document]].add(pair.label)
    ranks, right = [], 0
    for start in range(0, len(pairs), BLOCK):
        block = pairs[start : start + BLOCK]
        cosines = vectors[[place[pair.query] for pair in block]] @ answers.T
        own = cosines.gather(1, torch.tensor([[documents[pair.document]] for pair in block]))
        ranks.append((cosines >= own).sum(dim=1) - 1)
        closest = cosines.argmax(dim=1).tolist()
        right += sum(pair.label in classes[i] for pair, i in zip(block, closest, strict=True))
    rank = torch.cat(ranks)
    return {
        "recall_at_1": (rank < 1).float().mean().item(),
        "recall_at_5": (rank < 5).float().mean().item(),
        "chance": 1 / len(documents),
        "class_at_1": right / len(pairs),
        "pictures": len(pairs),
        "documents": len(documents),
    }


class CaptionTrainer(Trainer):
    """The stock Trainer with `caption_loss`. A checkpoint holds the LoRA weights, and not those of the base model.

    Args:
        encoder: with LoRA.
        pairs: of training pictures.
        args: `remove_unused_columns` must be false.
        scale, same_class: of `caption_loss`.
    """

    def __init__(
        self,
        encoder: CaptionEncoder,
        args: TrainingArguments,
        pairs: CaptionPairs,
        scale: float = SCALE,
        same_class: str = "mask",
    ):
        if args.n_gpu > 1:
            raise UserError(
                f"expected one process per GPU, found one process with {args.n_gpu} GPUs. Type accelerate launch "
                f"--num_processes {args.n_gpu} recipes/llm2clip/cc.py …, or set CUDA_VISIBLE_DEVICES=0 to use one."
            )
        self.scale, self.same_class = scale, same_class
        super().__init__(encoder, args, data_collator=self._collate, train_dataset=pairs, callbacks=[_NewDraws(pairs)])

    def _collate(self, pairs: list[Pair]) -> dict[str, Tensor]:
        texts = [pair.query for pair in pairs] + [pair.document for pair in pairs]
        return {**self.model.tokens(texts)[0], "labels": torch.tensor([pair.label for pair in pairs])}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        # One forward for both texts: DDP counts the gradients of one.
        vectors = model({key: value for key, value in inputs.items() if key != "labels"})
        queries, documents = (gather(part) for part in vectors.chunk(2))
        return caption_loss(queries, documents, gather(labels), self.scale, self.same_class)

    def _save(self, output_dir=None, state_dict=None):
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.accelerator.unwrap_model(self.model).load_lora(resume_from_checkpoint)


class _NewDraws(TrainerCallback):
    def __init__(self, pairs: CaptionPairs):
        self.pairs = pairs

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.pairs.epoch = int(state.epoch + 1e-6)


def same_settings(folder: Path, file: str, settings: dict) -> None:
    """Raises `UserError` unless a run in a folder was started with these settings, which `file` there holds."""
    found = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    for key, value in settings.items():
        if found.get("settings", {}).get(key, value) != value:
            raise UserError(
                f"--{key}: expected {found['settings'][key]!r}, with which the run in {folder} was started, found {value!r}. Type it again, "
                "or another --output_dir."
            )
