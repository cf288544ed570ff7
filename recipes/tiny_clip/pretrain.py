"""Pre-train the tiny CLIP on a prepared folder; fixed number of steps, seeded, resumable."""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import Captions, augment, load_items
from datasets import load_dataset
from evaluate import Pictures, linear_probe, zero_shot
from model import build, image_features, processor, save, start_local, text_features, train_tokenizer
from transformers import CLIPModel


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--emoji-mini", type=Path, required=True, help="for the validation figure in the log")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--decay-steps", type=int, default=1300, help="last steps, over which the rate falls to zero")
    parser.add_argument("--full-steps", type=int, default=400, help="last steps, with all patches")
    parser.add_argument(
        "--image-tower", type=Path, help="model of an earlier stage whose image tower is trained further"
    )
    parser.add_argument("--kind-steps", type=int, default=0, help="first steps, with hypernyms among the captions")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the patches seen before the last steps")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--bag-weight", type=float, default=1.0, help="weight of the auxiliary bag-of-words loss")
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vision-layers", type=int, default=6)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-every", type=int, default=1000)
    parser.add_argument("--plain-start", action="store_true", help="random starting weights throughout")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    return parser.parse_args()


class Threads:
    """Uses all threads or one, whichever steps faster just now: on a shared machine a busy core holds up the others."""

    def __init__(self, most):
        self.seconds, self.most, self.count = {1: 1.0, most: 0.0}, most, 0

    def begin(self):
        best = min(self.seconds, key=self.seconds.get)
        other = self.most if best == 1 else 1
        self.now = other if self.count % 25 == 24 else best
        self.count += 1
        torch.set_num_threads(self.now)
        self.start = time.time()

    def end(self):
        took, old = time.time() - self.start, self.seconds[self.now]
        self.seconds[self.now] = took if self.count % 25 == 0 or old == 0 else 0.7 * old + 0.3 * took


def tokenize(tokenizer, texts, max_tokens):
    """Token ids of the texts, the shorter half apart to save padding: ([int (B/2, L), ...], order that undoes the sort)."""
    rows = tokenizer(texts, truncation=True, max_length=max_tokens).input_ids
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    half, chunks = len(rows) // 2, []
    for part in (order[:half], order[half:]):
        length = max(len(rows[i]) for i in part)
        chunks.append(torch.tensor([rows[i] + [tokenizer.pad_token_id] * (length - len(rows[i])) for i in part]))
    return chunks, torch.tensor(order).argsort()


def contrastive(image, text, scale, fits):
    """CLIP loss with several right pairs: image, text float (B, P), fits bool (B, B). Mean of both directions."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    fits = fits.float()
    to_text = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    sources = json.loads((Path(__file__).parent / "sources.json").read_text())
    images, items, weight = load_items(args.data, sources)
    mono = torch.tensor([i["mono"] for i in items])
    captions = Captions(items)
    tokenizer = train_tokenizer(captions.corpus(), args.vocab)
    model = build(tokenizer, args.width, args.vision_layers, args.text_layers, args.patch)
    if not args.plain_start:
        start_local(model)
    if args.image_tower:
        earlier = CLIPModel.from_pretrained(args.image_tower, dtype=torch.float32)
        model.vision_model.load_state_dict(earlier.vision_model.state_dict())
        model.visual_projection.load_state_dict(earlier.visual_projection.state_dict())
    bag_head = nn.Linear(args.width, captions.bag.shape[1])  # auxiliary, thrown away after training
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(items)} pictures, {len(captions.index)} keys, bag of {captions.bag.shape[1]}, {len(tokenizer)} tokens")
    print(f"{parameters / 1e6:.2f} M parameters; {vars(args)}", flush=True)

    # Muon for the matrices of the layers (it needs far fewer steps), AdamW for the rest
    everything = [*model.named_parameters(), *bag_head.named_parameters()]
    matrices = [p for n, p in everything if p.ndim == 2 and "encoder.layers" in n]
    rest = [(n, p) for n, p in everything if not (p.ndim == 2 and "encoder.layers" in n)]
    plain = [p for n, p in rest if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in rest if not (p.ndim < 2 or "embedding" in n)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def rate(step):
        """Warm-up, constant, straight down: the number of steps can still be chosen while it is constant."""
        return max(0.0, min(1.0, (step + 1) / args.warmup, (args.steps - step) / args.decay_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    muon_schedule = torch.optim.lr_scheduler.LambdaLR(muon, rate)
    check = load_dataset(str(args.emoji_mini))
    train, valid = (Pictures(check[s], processor(tokenizer)) for s in ("train", "validation"))
    weight = weight / weight.sum()
    checkpoint, first, before = args.out.with_suffix(".checkpoint"), 0, 0.0
    state = {"model": model, "average": average, "bag_head": bag_head, "optimizer": optimizer, "schedule": schedule}
    state |= {"muon": muon, "muon_schedule": muon_schedule}
    if args.resume:
        saved = torch.load(checkpoint, weights_only=False)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        rng.bit_generator.state, first, before = saved["rng"], saved["step"], saved["seconds"]
        generator.set_state(saved["generator"])
    start, sums, threads = time.time(), np.zeros(2), Threads(args.threads)
    for step in range(first, args.steps):
        threads.begin()
        # Hypernyms and categories (koala: mammal) teach the image tower fast, but are close to class labels.
        captions.with_kinds = step < args.kind_steps
        rows = rng.choice(len(items), args.batch, replace=False, p=weight)
        texts, fits = captions.batch(rows, rng)
        chunks, back = tokenize(tokenizer, texts, args.max_tokens)
        index = torch.from_numpy(rows)
        pixels = augment(images[index], mono[index], generator)
        bag = torch.from_numpy(captions.bag[rows].toarray())
        keep = args.keep if step < args.steps - args.full_steps else 1.0
        with torch.autocast("cpu", torch.bfloat16):
            pooled, image = image_features(model, pixels, keep, generator)
            text = torch.cat([text_features(model, ids) for ids in chunks])[back]
        clip_loss = contrastive(image.float(), text.float(), model.logit_scale.exp(), fits)
        words = F.log_softmax(bag_head(pooled.float()), -1)
        bag_loss = -(words * bag / bag.sum(1, keepdim=True).clamp(min=1e-6)).sum(1).mean()
        optimizer.zero_grad()
        muon.zero_grad()
        (clip_loss + args.bag_weight * bag_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (optimizer, muon, schedule, muon_schedule):
            part.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step >= args.warmup:
            average.update_parameters(model)
        sums += clip_loss.item(), bag_loss.item()
        threads.end()
        if (step + 1) % 50 == 0:
            seconds = before + time.time() - start
            print(
                f"step {step + 1} clip {sums[0] / 50:.3f} words {sums[1] / 50:.3f} "
                f"scale {model.logit_scale.exp().item():.1f} {args.batch * (step + 1) / seconds:.0f} pictures/s, {threads.now} threads",
                flush=True,
            )
            sums[:] = 0
        if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
            net = average.module.eval()
            right, n = zero_shot(net, tokenizer, valid)
            probe = linear_probe(net, train, valid)
            print(
                f"step {step + 1}: emoji_mini validation zero-shot {right / n:.3f}, linear probe {probe:.3f}",
                flush=True,
            )
            save(net, tokenizer, args.out)
            saved = {name: part.state_dict() for name, part in state.items()}
            saved |= {"rng": rng.bit_generator.state, "generator": generator.get_state(), "step": step + 1}
            torch.save(saved | {"seconds": before + time.time() - start}, checkpoint)
    seconds = before + time.time() - start
    record = {"steps": args.steps, "views": args.steps * args.batch, "minutes": seconds / 60, "pictures": len(items)}
    record["tokens"] = len(tokenizer)
    if args.image_tower:
        record["stage_1"] = json.loads((args.image_tower / "training.json").read_text())
    record |= {"parameters": parameters, "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)}}
    (args.out / "training.json").write_text(json.dumps(record, indent=1))
    print(record)


if __name__ == "__main__":
    main()
