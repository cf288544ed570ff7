"""Losses and trainings that give the same numbers in one process or several.

In each of several processes, `main(folder, *names)` computes the loss of shards of every size in `SIZES` and every term of the
last of them, trains the named cases, and saves in the first process what came out.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from term_cases import differences, every_term
from tiny_clip import COLOURS, build_clip, colour_dataset, striped_dataset
from transformers import TrainerCallback, set_seed
from word_trunk import HashedWords

from mmft_hf import MMFTConfig, MMFTLoss, MMFTTrainer, set_towers
from mmft_hf.baselines.clip_lora import class_texts_trainer
from mmft_hf.baselines.cross_entropy import head_trainer
from mmft_hf.model.adapted_processor import TextTrunk
from mmft_hf.model.adapted_start import with_text_trunk
from mmft_hf.model.features import Encoding
from mmft_hf.predict.heads import LinearHead

SIZES = {2: [[4, 4], [5, 2]], 3: [[3, 1, 4]]}  # rows of each process
STEP = 12  # images of a step in all processes: for 1, 2 and 3 of them
# Rows of three classes: 9, 7 and 3 images, 7 of them left for the last step; and 13 images, one left.
UNEVEN = [i for i in range(27) if i % 3 == 0 or (i % 3 == 1 and i < 21) or i in (2, 5, 8)]
ONE_LEFT = list(range(13))
CASES = {
    "full": {},
    "one left": {"rows": ONE_LEFT},
    "lora": {"towers": ("lora", "lora"), "learning_rate": 0.3},
    "lora and frozen": {"towers": ("lora", "frozen"), "learning_rate": 0.3},
    "kept pictures": {"towers": ("frozen", "lora"), "learning_rate": 0.3, "crop_min_area": 1.0},
    "kept trunks": {"towers": ("head", "head"), "learning_rate": 0.3, "crop_min_area": 1.0},
    "checkpointing": {"gradient_checkpointing": True},
    "chunks": {"loss_chunk_size": 2},
    "chunks, lora, checkpointing": {
        "towers": ("full", "lora"),
        "loss_chunk_size": 3,
        "gradient_checkpointing": True,
    },
    "class-balanced": {"samples_per_class": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "templates": {"captions": False},
    "several labels": {"several": True},
    "UniCL": {"include_self": True, "supcon_weight": 1.0},
    "cross-entropy, head": {"trainer": "head"},
    "cross-entropy, class texts": {"trainer": "texts", "towers": ("lora", "lora"), "loss_chunk_size": 2},
    "options for few images": {
        "weight_averaging": 0.7,
        "supcon_weight_end": 1.0,
        "caption_dropout": 0.5,
        "template_weight": 0.3,
    },
    "sample weights": {"scores": True, "sample_weight": "score:clip", "caption_dropout": 0.2},
    "adapted": {"adapted": True},
    "adapted, frozen text": {"adapted": True, "towers": ("lora", "frozen"), "loss_chunk_size": 2},
    "text mix": {"sources": True, "text_mix": ["template=0.2", "short=0.5"]},
    "long captions": {"long": True, "long_captions": "windows"},
    "bf16": {"bf16": True},
    "bf16, chunks": {"bf16": True, "loss_chunk_size": 2},
}
# One case of each kind: towers, chunks, sampling, baselines, options.
FAST = (
    "full",
    "chunks, lora, checkpointing",
    "class-balanced",
    "several labels",
    "cross-entropy, head",
    "options for few images",
    "adapted",
)


def loss_and_gradients(sizes: list[int], rank: int | None = None) -> tuple[float, list[torch.Tensor]]:
    """MMFTLoss in float64 of rows that are the same everywhere: all of them, or the shard of a process."""
    g = torch.Generator().manual_seed(0)
    n = sum(sizes)
    inputs = torch.randn(n, 6, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, (n,), generator=g)
    image_weight = torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_()
    text_weight = torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    rows = slice(0, n) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x = inputs[rows]
    losses = MMFTLoss(0.3)(x @ image_weight, x.tanh() @ text_weight, labels[rows], scale.exp())
    return losses["loss"].item(), list(torch.autograd.grad(losses["loss"], [image_weight, text_weight, scale]))


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.first = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.first:
            named = model.named_parameters()
            self.first = {f"gradient of {n}": p.grad.detach().clone() for n, p in named if p.grad is not None}


def make_trainer(kind: str, model, config, train, validation, processor) -> MMFTTrainer:
    """The Trainer of a case: of the method, or of a baseline by cross-entropy."""
    if kind == "head":
        weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        head = LinearHead(weight, train.features["label"].names, torch.zeros(3))
        return head_trainer(model, processor, config, train, head, validation)
    if kind == "texts":
        return class_texts_trainer(model, processor, config, train, validation)
    return MMFTTrainer(model, config, train, validation, processor)


def run(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Two epochs of a case: gradients of the first step and final weights; logs and metrics."""
    settings = dict(CASES[name])
    rows, captions = settings.pop("rows", UNEVEN), settings.pop("captions", True)
    data = colour_dataset(9, captions=captions).select(rows), colour_dataset(4, seed=1).select(range(11))
    if settings.pop("scores", False):
        records = [
            [{"text": text, "scores": [{"name": "clip", "value": (7 * i + k) % 11}]} for k, text in enumerate(own)]
            for i, own in enumerate(data[0]["captions"][:])
        ]
        data = data[0].add_column("caption_records", records), data[1]
    if settings.pop("sources", False):
        records = [
            [{"text": text, "step": "short" if k else None} for k, text in enumerate(own)]
            for own in data[0]["captions"][:]
        ]
        data = data[0].add_column("caption_records", records), data[1]
    if settings.pop("long", False):
        captions = [
            [f"{text}. {'It stands on a table. ' * i}" for text in own] for i, own in enumerate(data[0]["captions"][:])
        ]
        data = data[0].remove_columns("captions").add_column("captions", captions), data[1]
    if settings.pop("several", False):
        data = striped_dataset(19, captions=True), striped_dataset(11, seed=1)
    model, processor = build_clip()
    if settings.pop("adapted", False):  # its texts are new to it, so that all processes encode some of them
        texts = [f"a {word}" for word in COLOURS]
        torch.manual_seed(0)
        model, processor = with_text_trunk(model, processor, TextTrunk(HashedWords(20)), texts, Encoding(shard=True))
    set_seed(0)
    set_towers(model, *settings.pop("towers", ("full", "full")))
    # Adam would blow the rounding of gradients that are zero (those of k_proj.bias) up to whole steps.
    settings = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2, "logging_strategy": "epoch"} | settings
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    gradients = Gradients()
    trainer = make_trainer(
        settings.pop("trainer", "mmft"),
        model,
        MMFTConfig(
            output_dir=str(folder / name),
            per_device_train_batch_size=STEP // world,
            save_strategy="no",
            load_best_model_at_end=False,
            per_device_eval_batch_size=3,
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        *data,
        processor,
    )
    trainer.add_callback(gradients)
    trainer.train()
    keys = ("loss", "supcon_loss", "clip_loss", "anchors_with_positives", "captions_cut", "skipped_images")
    logs = {f"{log['epoch']} {key}": log[key] for log in trainer.state.log_history for key in keys if key in log}
    metrics = {key: value for key, value in trainer.evaluate().items() if "accuracy" in key or "precision" in key}
    head = trainer.build_prototypes()
    head = {"head": head.weight if isinstance(head, LinearHead) else head.embeddings}
    weights = {n: v.detach().clone() for n, v in model.state_dict().items()}
    return weights | gradients.first | head, logs | metrics | {"world": world}


def main(folder: str, *names: str) -> None:
    folder = Path(folder)
    torch.set_num_threads(1)
    os.environ["MMFT_HF_CACHE"] = str(folder / "cache")  # what is encoded is encoded here, by all processes
    world = int(os.environ["WORLD_SIZE"])
    alone = {str(sizes): loss_and_gradients(sizes) for sizes in SIZES[world]}
    terms_alone = every_term(SIZES[world][-1])
    torch.distributed.init_process_group("gloo")
    rank, losses = torch.distributed.get_rank(), {}
    for sizes in SIZES[world]:
        loss, gradients = loss_and_gradients(sizes, rank)
        expected_loss, expected = alone[str(sizes)]
        for gradient in gradients:  # what DDP does
            torch.distributed.all_reduce(gradient)
            gradient /= world
        losses[str(sizes)] = {
            "loss": abs(loss - expected_loss),
            "gradient": max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True)),
            "largest gradient": max(g.abs().max().item() for g in expected),
        }
    terms = differences(every_term(SIZES[world][-1], rank), terms_alone)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
        (folder / "terms.json").write_text(json.dumps(terms))
    for name in names:
        tensors, numbers = run(name, folder)
        if rank == 0:
            save_file({n: v.contiguous() for n, v in tensors.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(numbers))
    torch.distributed.destroy_process_group()
    os._exit(0)  # without the end of the interpreter, in which threads of gloo may abort: see mmft_hf/launch.py
