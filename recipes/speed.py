"""Measures a training step, an epoch, prototypes and chunks, against a plain loop and against the bare model.

    python recipes/speed.py                                  # what this machine can do in reasonable time
    python recipes/speed.py --geometries ViT-B/16 --batches 256 1024 --rounds 10

All variants of a row take turns within one run, on one model with random weights: ratios hold on a machine that is busy,
single figures do not. The median of the rounds is shown, after one round that is not counted.

  ours    a step of MMFTTrainer, from the end of the last one: loading, forward, loss, backward, optimizer, callbacks
  floor   forward, backward and optimizer step of the same model on a batch that is there already
  77      the floor, with every text of the batch padded to 77 tokens
  fp32    the floor without autocast
  plain   an ordinary loop: loading, 77 tokens, float32 (float16 on a GPU), every text of every image encoded;
          its epoch ends with prototypes encoded class by class, at once, with 77 tokens
"""

from __future__ import annotations

import argparse
import ctypes
import io
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory

# This folder has an evaluate.py, which must not hide the library of that name.
sys.path.pop(0)

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, TrainerCallback

from mmft_hf import ClassPrototypes, MMFTConfig, MMFTDataCollator, MMFTTrainer, load_model
from mmft_hf.data.texts import training_text
from mmft_hf.data.views import ImageView
from mmft_hf.model.adapted_clip import AdaptedCLIP, AdaptedCLIPConfig
from mmft_hf.model.adapted_processor import AdaptedProcessor, TextTrunk
from mmft_hf.model.collator import tokenize
from mmft_hf.model.embedding import add_embedding_forward, embedding_forward
from mmft_hf.model.loading import encode_texts
from mmft_hf.model.losses import MMFTLoss
from mmft_hf.model.opening import default_device

GEOMETRIES = {"ViT-B/32": 32, "ViT-B/16": 16, "tiny-clip": None}
CLASSES = 37  # as in Oxford Pets
TEMPLATE = "a photo of a {}."
# FLOP/s, dense, in bfloat16 (float16 without bfloat16), as the manufacturers state them.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "V100": 125e12,
}
DEVICE = default_device()


def build(geometry: str) -> tuple[CLIPModel, CLIPProcessor]:
    """A model of random weights, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    model, processor = load_model("builtin/tiny-clip")
    patch = GEOMETRIES[geometry]
    if patch is None:
        return model.to(DEVICE), processor
    tokenizer = processor.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=ids, vision_config={"patch_size": patch})
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    return CLIPModel(config).to(DEVICE), CLIPProcessor(CLIPImageProcessor(), tokenizer)


def captions(count: int) -> list[str]:
    """Sentences of 8 to 40 words, as long as a multimodal model's."""
    rng = np.random.default_rng(0)
    words = (
        "the a small large round striped soft dark ears tail fur stands on grass with green eyes and white paws".split()
    )
    return [" ".join(rng.choice(words, rng.integers(8, 41))) + f" {i}." for i in range(count)]


def build_dataset(images: int, with_captions: bool) -> Dataset:
    """JPEG files of 500 x 375 pixels with three captions each, or none."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(16):
        small = Pillow.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        with io.BytesIO() as buffer:
            small.resize((500, 375), Pillow.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
    columns = {
        "image": [{"bytes": files[i % 16]} for i in range(images)],
        "label": [i % CLASSES for i in range(images)],
    }
    features = {"image": Image(), "label": ClassLabel(names=[f"kind number {i}" for i in range(CLASSES)])}
    if with_captions:
        texts = captions(3 * images)
        columns["captions"] = [texts[3 * i : 3 * i + 3] for i in range(images)]
        features["captions"] = List(Value("string"))
    return Dataset.from_dict(columns, features=Features(features))


def synchronize() -> None:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def memory() -> int:
    """Bytes in use: of the accelerator, or of this process."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_memory_back() -> None:
    """From here on large blocks go straight to the system and back, so that memory in use is what is measured."""
    if DEVICE.type == "cpu" and sys.platform == "linux":
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(option, 1 << 20)


@contextmanager
def peak_memory(found: dict):
    """Adds `resting` and `peak` bytes to `found`."""
    if DEVICE.type == "cpu" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer in use
    found["resting"] = found["peak"] = memory()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield
        synchronize()
        found["peak"] = torch.cuda.max_memory_allocated()
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found["peak"] = max(found["peak"], memory())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()


def autocast(precision: str):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(DEVICE.type, kind) if kind else nullcontext()


class Turns(TrainerCallback):
    """After every step of the Trainer, the other variants take theirs on the same model and optimizer."""

    def __init__(self, processor, dataset: Dataset, batch: int, precision: str):
        self.processor, self.dataset, self.batch, self.precision = processor, dataset, batch, precision
        self.seconds, self.memory, self.phases = defaultdict(list), defaultdict(int), defaultdict(list)
        self.loss = MMFTLoss()
        self.view = ImageView(dataset)
        self.plain_precision = "fp32" if DEVICE.type == "cpu" else "fp16"
        self.trainer = None
        self.flops = 0

    # -- ours ---------------------------------------------------------------------------------------------------------
    def on_step_begin(self, args, state, control, **kwargs):
        self.note("load")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.note("forward, backward")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.note("optimiser")

    def note(self, phase: str) -> None:
        synchronize()
        now = time.perf_counter()
        self.phases[phase].append(now - self.mark)
        self.mark = now

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        synchronize()
        self.seconds["ours"].append(time.perf_counter() - self.start)
        batch = self.ready()
        for name in ("floor", "77", "fp32", "plain"):
            self.take(name, model, optimizer, batch)
        self.start = self.mark = time.perf_counter()

    # -- the others ---------------------------------------------------------------------------------------------------
    def ready(self) -> dict:
        """The batch that the Trainer had last, on the device, and the same with 77 tokens."""
        keys = list(self.trainer._sampler)[(len(self.seconds["ours"]) - 1) * self.batch :][: self.batch]
        view = self.trainer.callback_handler.train_dataloader.dataset
        rows = [view[key] for key in keys]
        found = {
            "floor": MMFTDataCollator(self.processor, distinct_texts=True)(rows),
            "77": MMFTDataCollator(self.processor, pad_to_limit=True)(rows),
        }
        return {name: {k: v.to(DEVICE) for k, v in batch.items()} for name, batch in found.items()}

    def take(self, name: str, model, optimizer, batch: dict) -> None:
        precision = {"fp32": "fp32", "plain": self.plain_precision}.get(name, self.precision)
        used = {}
        with peak_memory(used):
            synchronize()
            start = time.perf_counter()
            if name == "plain":
                inputs = self.load()
            else:
                inputs = batch["77" if name == "77" else "floor"]
            count = FlopCounterMode(display=False) if name == "floor" and not self.flops else nullcontext()
            with count:
                self.step(model, optimizer, inputs, precision, stock=name == "plain")
            synchronize()
            if count is not None and isinstance(count, FlopCounterMode):
                self.flops = count.get_total_flops()
            self.seconds[name].append(time.perf_counter() - start)
        self.memory[name] = max(self.memory[name], used["peak"] - used["resting"])

    def step(self, model, optimizer, inputs: dict, precision: str, stock: bool) -> None:
        model.train()
        tensors = {k: inputs[k] for k in ("pixel_values", "input_ids", "attention_mask")}
        with autocast(precision):
            # Not model(...): accelerate gave that the precision of the training.
            if stock:
                out = type(model).forward(model, **tensors)
                images, texts, scale = out.image_embeds, out.text_embeds, model.logit_scale.exp()
            else:
                out = embedding_forward(model, **tensors, chunk_size=0)
                images, texts, scale = out["image_embeds"], out["text_embeds"], out["scale"]
            texts = texts[inputs["text_rows"]] if "text_rows" in inputs else texts
            loss = self.loss(images, texts, inputs["labels"], scale)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def load(self) -> dict:
        """What an ordinary loop does before a step."""
        start = len(self.seconds["plain"]) * self.batch
        rows = [self.view[i % len(self.view)] for i in range(start, start + self.batch)]
        inputs = MMFTDataCollator(self.processor)(rows)
        names = self.dataset.features["label"].names
        labels = [row["label"] for row in rows]
        captioned = "captions" in self.dataset.column_names
        given = self.dataset["captions"][: self.batch] if captioned else [[None]] * self.batch
        texts = [training_text(TEMPLATE, names[label], text[0]) for label, text in zip(labels, given, strict=True)]
        inputs |= tokenize(self.processor, texts, "max_length")[0]
        return {k: v.to(DEVICE) for k, v in inputs.items()}


def plain_prototypes(model, processor, dataset: Dataset, precision: str, at_once: int = 100_000) -> torch.Tensor:
    """Class by class, all captions of a class at once (or at most `at_once`), padded to 77 tokens."""
    names, means = dataset.features["label"].names, []
    texts = defaultdict(list)
    if "captions" in dataset.column_names:
        for label, several in zip(dataset["label"][:], dataset["captions"][:], strict=True):
            texts[label] += [training_text(TEMPLATE, names[label], text) for text in several]
    else:
        texts = {label: [training_text(TEMPLATE, name, None)] for label, name in enumerate(names)}
    model.eval()
    with torch.no_grad(), autocast(precision):
        for label in sorted(texts):
            tokens, _ = tokenize(processor, texts[label], "max_length")
            pieces = zip(*(tokens[name].split(at_once) for name in ("input_ids", "attention_mask")), strict=True)
            embeds = torch.cat([encode_texts(model, ids.to(DEVICE), mask.to(DEVICE)) for ids, mask in pieces])
            means.append(F.normalize(embeds.mean(dim=0), dim=0))
    return torch.stack(means).float().cpu()


def our_prototypes(model, processor, dataset: Dataset, precision: str) -> torch.Tensor:
    with autocast(precision):
        return ClassPrototypes.from_captions(model, processor, dataset, TEMPLATE).embeddings


def timed(function, *arguments) -> tuple[float, dict]:
    used: dict = {}
    with peak_memory(used):
        synchronize()
        start = time.perf_counter()
        function(*arguments)
        synchronize()
        return time.perf_counter() - start, used


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def steps(geometry: str, batch: int, kind: str, rounds: int, precision: str) -> None:
    """Prints the table of one geometry, batch and kind of text."""
    model, processor = build(geometry)
    dataset = build_dataset((rounds + 1) * batch, kind == "captions")
    turns = Turns(processor, dataset, batch, precision)
    with TemporaryDirectory() as folder:
        args = MMFTConfig(
            folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            disable_tqdm=True,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            dataloader_num_workers=0,  # as the ordinary loop; workers would load while the others have their turn
        )
        trainer = MMFTTrainer(model, args, dataset, processing_class=processor, callbacks=[turns])
        turns.trainer = trainer
        trainer.train()
    seconds = {name: statistics.median(values[1:]) for name, values in turns.seconds.items()}
    texts = sum(len(several or [None]) for several in dataset["captions"]) if kind == "captions" else CLASSES
    ours, _ = timed(our_prototypes, model, processor, dataset, precision)
    plain, _ = timed(plain_prototypes, model, processor, dataset, turns.plain_precision)
    epochs = {"ours": (rounds + 1) * seconds["ours"] + ours, "plain": (rounds + 1) * seconds["plain"] + plain}
    print(f"### {geometry}, batches of {batch}, {kind}, {precision}, {rounds} rounds\n")
    rows = []
    for name in ("ours", "floor", "77", "fp32", "plain"):
        values = turns.seconds[name][1:]
        own = "" if name == "ours" else megabytes(turns.memory[name])
        spread = f"{min(values):.2f} to {max(values):.2f}"
        ratio = f"{seconds[name] / seconds['ours']:.2f}"
        rows.append([name, f"{batch / seconds[name]:.1f}", f"{seconds[name]:.3f}", spread, ratio, own])
    print_table(["step", "images/s", "seconds", "from, to", "time / ours", "memory above rest"], rows)
    phases = {name: statistics.median(values[1:]) for name, values in turns.phases.items()}
    rest = seconds["ours"] - sum(phases.values())
    shares = [f"{name} {100 * value / seconds['ours']:.1f} %" for name, value in [*phases.items(), ("rest", rest)]]
    print(f"- overhead of a step over the floor: {100 * (seconds['ours'] / seconds['floor'] - 1):+.1f} %")
    print(f"- where a step's time goes: {', '.join(shares)}")
    print(
        f"- 77 tokens / ours: {seconds['77'] / seconds['floor']:.2f}; fp32 / {precision}: {seconds['fp32'] / seconds['floor']:.2f}"
    )
    print(f"- prototypes of {texts:,} texts: {ours:.2f} s, plain {plain:.2f} s, {plain / ours:.1f} times")
    print(f"- epoch with prototypes: {epochs['plain'] / epochs['ours']:.2f} times as fast as the plain loop")
    speed = turns.flops / seconds["ours"]
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    share = next((f", {100 * speed / peak:.0f} % of the peak" for key, peak in PEAKS.items() if key in name), "")
    print(f"- model FLOP/s: {speed / 1e12:.2f} T{share}\n", flush=True)


def prototypes(geometry: str, precision: str, rounds: int, at_once: int) -> None:
    """One class of 13,500 captions, and one of 500."""
    give_memory_back()
    model, processor = build(geometry)
    sizes, found = (500, 13_500), defaultdict(list)
    data = {}
    for size in sizes:
        features = Features({"label": ClassLabel(names=["thing"]), "captions": List(Value("string"))})
        data[size] = Dataset.from_dict({"label": [0] * (size // 3 + 1), "captions": _threes(size)}, features=features)
    plain = "fp32" if DEVICE.type == "cpu" else "fp16"
    our_prototypes(model, processor, data[500], precision)
    for _ in range(rounds):
        for size in sizes:
            found["ours", size].append(timed(our_prototypes, model, processor, data[size], precision))
        found["plain", sizes[1]].append(timed(plain_prototypes, model, processor, data[sizes[1]], plain, at_once))
    print(f"### Prototypes of one class, {geometry}, {precision}, {rounds} rounds\n")
    rows = []
    for (name, size), values in found.items():
        seconds = statistics.median(value for value, _ in values)
        peak = max(used["peak"] for _, used in values)
        above = max(used["peak"] - used["resting"] for _, used in values)
        rows.append([name, f"{size:,}", f"{seconds:.2f}", megabytes(peak), megabytes(above)])
    print_table(["way", "captions", "seconds", "peak memory", "above rest"], rows)


def _threes(size: int) -> list[list[str]]:
    texts = captions(size)
    return [texts[i : i + 3] for i in range(0, 3 * (size // 3 + 1), 3)]


def chunks(geometry: str, precision: str, whole: int, batch: int) -> None:
    """A step of `batch` images in chunks of `whole`, compared with a step of `whole`."""
    give_memory_back()
    model, processor = build(geometry)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    add_embedding_forward(model)
    width = processor.image_processor.crop_size["width"]
    loss, rows = MMFTLoss(), []

    def step(size: int, chunk: int) -> None:
        tokens, _ = tokenize(processor, [training_text(TEMPLATE, "thing", text) for text in captions(size)])
        inputs = {"pixel_values": torch.rand(size, 3, width, width, device=DEVICE)}
        inputs |= {k: v.to(DEVICE) for k, v in tokens.items()}
        with autocast(precision):
            out = model(**inputs, chunk_size=chunk)
            labels = torch.arange(size, device=DEVICE) % CLASSES
            value = loss(out["image_embeds"], out["text_embeds"], labels, out["scale"])["loss"]
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(8, 0)  # from here on the optimizer has its moments
    for size, chunk in ((whole, 0), (batch, whole)):
        seconds, used = timed(step, size, chunk)
        rows.append(
            [str(size), str(chunk or size), f"{seconds:.1f}", megabytes(used["resting"]), megabytes(used["peak"])]
        )
    print(f"### Chunks, {geometry}, {precision}\n")
    print_table(["batch", "at once", "seconds", "memory at rest", "peak"], rows)


def text_trunk(geometry: str, batch: int, rounds: int, precision: str, size: int = 2048) -> None:
    """A step of a CLIP beside one of the same image tower with an adaptor on vectors that are known, as `--text_trunk` trains.

    Args:
        size: of the vectors; 2048 is that of a language model of a billion parameters.
    """
    give_memory_back()
    clip, processor = build(geometry)
    sizes = {"hidden_size": size}, clip.config.projection_dim
    adapted = AdaptedCLIP(AdaptedCLIPConfig(clip.config.vision_config, *sizes)).to(DEVICE)
    texts = [training_text(TEMPLATE, "thing", text) for text in captions(batch)]
    trunk = TextTrunk()
    trunk.keep(texts, torch.randn(batch, size), torch.zeros(batch, dtype=torch.bool))
    processors = {"text tower": processor, "adaptor": AdaptedProcessor(processor.image_processor, trunk)}
    width, loss, taken = processor.image_processor.crop_size["width"], MMFTLoss(), defaultdict(list)
    pixels, labels = torch.rand(batch, 3, width, width, device=DEVICE), torch.arange(batch, device=DEVICE) % CLASSES
    models = {"text tower": clip, "adaptor": adapted}
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    for model in models.values():
        add_embedding_forward(model.train())
    # Seconds of the processor, which other work on the machine does not lengthen; on a GPU those of the clock.
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    for _ in range(rounds + 1):
        for name, model in models.items():
            synchronize()
            start = clock()
            inputs = {key: value.to(DEVICE) for key, value in tokenize(processors[name], texts)[0].items()}
            with autocast(precision):
                out = model(pixel_values=pixels, **inputs, chunk_size=0)
                value = loss(out["image_embeds"], out["text_embeds"], labels, out["scale"])["loss"]
            value.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            synchronize()
            taken[name].append(clock() - start)
    rows = []
    for name, model in models.items():
        seconds = statistics.median(taken[name][1:])
        ratio = seconds / statistics.median(taken["text tower"][1:])
        rows.append([name, f"{sum(p.numel() for p in model.parameters()):,}", f"{seconds:.2f}", f"{ratio:.2f}"])
    print(f"### Text trunk, {geometry}, batch {batch}, {precision}, captions, vectors of size {size:,}\n")
    print_table(["texts by", "parameters", "seconds of a step", "of the text tower's"], rows)


def main() -> None:
    on_cpu = DEVICE.type == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--geometries", nargs="+", choices=GEOMETRIES, default=["ViT-B/32"] if on_cpu else list(GEOMETRIES)
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[64] if on_cpu else [64, 256, 1024])
    parser.add_argument("--texts", nargs="+", choices=("captions", "prompts"), default=["captions", "prompts"])
    parser.add_argument("--rounds", type=int, default=3 if on_cpu else 10)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=("steps", "prototypes", "chunks", "text_trunk"),
        default=["steps", "prototypes", "chunks"],
    )
    parser.add_argument("--chunks", nargs=2, type=int, default=[64, 1024], metavar=("CHUNK", "BATCH"))
    parser.add_argument("--at_once", type=int, default=100_000, help="captions the plain way may encode at once")
    args = parser.parse_args()
    device = f"{torch.get_num_threads()} CPU threads" if on_cpu else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}\n")
    for geometry in args.geometries:
        if "steps" in args.sections:
            for batch in args.batches:
                for kind in args.texts:
                    steps(geometry, batch, kind, args.rounds, args.precision)
        if "prototypes" in args.sections:
            prototypes(geometry, args.precision, args.rounds, args.at_once)
        if "chunks" in args.sections:
            chunks(geometry, args.precision, *args.chunks)
        if "text_trunk" in args.sections:
            text_trunk(geometry, args.batches[0], args.rounds, args.precision)


if __name__ == "__main__":
    main()
