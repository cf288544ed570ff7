"""Zero-shot accuracy, linear probe and a quick fine-tuning check of a saved model. Test splits only with --final."""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from model import image_features, text_features
from transformers import CLIPModel, CLIPProcessor

TEMPLATE = "a photo of a {}."
SPLITS = {
    "emoji_mini": ["validation", "test", "test_new_vendor"],
    "emoji": ["validation", "validation_new_vendor", "test", "test_new_vendor", "test_mono"],
}


def wilson(right, n, z=1.96):
    """95 % interval of a share."""
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return middle - half, middle + half


class Pictures:
    """A split as tensors: pixels (N, 3, S, S), labels (N,), captions; names are the class names in label order."""

    def __init__(self, rows, processor, core=False):
        if core:
            rows = rows.filter(lambda c: c == "1", input_columns="core")
        self.pixels = processor.image_processor(
            images=[im.convert("RGB") for im in rows["image"]], return_tensors="pt"
        ).pixel_values
        self.labels = torch.tensor(rows["label"])
        self.names = rows.features["label"].names
        self.texts = rows["text"]


@torch.no_grad()
def embed(model, pixels):
    """(pooled (N, W), projected and normalized (N, P)) of pixels (N, 3, S, S)."""
    parts = [image_features(model, x) for x in pixels.split(256)]
    return torch.cat([p for p, _ in parts]), F.normalize(torch.cat([q for _, q in parts]), dim=-1)


@torch.no_grad()
def class_embeddings(model, tokenizer, names, template=TEMPLATE):
    """(C, P) normalized text embeddings of the class names."""
    ids = tokenizer([template.format(n) for n in names], padding=True, return_tensors="pt").input_ids
    return F.normalize(text_features(model, ids), dim=-1)


def zero_shot(model, tokenizer, pictures, classes=None):
    """(right, n) of zero-shot top-1; classes: label numbers to choose among (default all)."""
    classes = torch.arange(len(pictures.names)) if classes is None else classes
    text = class_embeddings(model, tokenizer, [pictures.names[c] for c in classes])
    guess = classes[(embed(model, pictures.pixels)[1] @ text.T).argmax(1)]
    return int((guess == pictures.labels).sum()), len(guess)


def linear_probe(model, train, test, c=1.0):
    """Accuracy of logistic regression on the standardized pooled features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = embed(model, train.pixels)[0].numpy(), embed(model, test.pixels)[0].numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c * 0.01, max_iter=500))
    return float(probe.fit(x, train.labels.numpy()).score(y, test.labels.numpy()))


def fine_tune(model, processor, train, epochs=15, lr=2e-4, batch=64, seed=0):
    """Quick CLIP fine-tuning: one caption per picture, 'a photo of a {class}. {caption}', drawn again each epoch."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer, n = processor.tokenizer, len(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    steps = epochs * (n // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator)[: n // batch * batch].view(-1, batch):
            captions = []
            for i in rows.tolist():
                texts = train.texts[i]
                text = texts[int(torch.randint(len(texts), (), generator=generator))]
                captions.append(f"a photo of a {train.names[train.labels[i]]}. {text}")
            ids = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
            pixels = train.pixels[rows]
            flip = torch.rand(batch, generator=generator) < 0.5
            pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(3), pixels)
            image = F.normalize(image_features(model, pixels)[1], dim=-1)
            logits = model.logit_scale.exp() * image @ F.normalize(text_features(model, ids), dim=-1).T
            same = (train.labels[rows][:, None] == train.labels[rows][None]).float()
            target = same / same.sum(1, keepdim=True)
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--emoji-mini", type=Path, required=True)
    parser.add_argument("--final", action="store_true", help="all evaluation splits, for the card")
    parser.add_argument("--fine-tune", action="store_true", help="also fine-tune on emoji_mini train")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(2)
    processor = CLIPProcessor.from_pretrained(args.model)
    model = CLIPModel.from_pretrained(args.model, dtype=torch.float32).eval()
    figures = []
    for name, folder in (("emoji_mini", args.emoji_mini), ("emoji", args.emoji)):
        data = load_dataset(str(folder))
        core_classes = None
        if name == "emoji":
            rows = data["train"].select_columns(["label", "core"])
            core_classes = torch.tensor(sorted({r["label"] for r in rows if r["core"] == "1"}))
        for split in SPLITS[name] if args.final else [s for s in SPLITS[name] if s.startswith("validation")]:
            for classes in [None] if core_classes is None else [None, core_classes]:
                pictures = Pictures(data[split], processor, core=classes is not None)
                right, n = zero_shot(model, processor.tokenizer, pictures, classes)
                low, high = wilson(right, n)
                count = len(pictures.names) if classes is None else len(classes)
                figures.append(
                    {"set": name, "split": split, "classes": count, "right": right, "n": n, "low": low, "high": high}
                )
                print(
                    f"{name:10} {split:22} {count:3} classes {right / n:.3f} ({low:.3f} to {high:.3f}), n = {n}",
                    flush=True,
                )
    data = load_dataset(str(args.emoji_mini))
    train, valid = (Pictures(data[s], processor) for s in ("train", "validation"))
    print(f"linear probe, emoji_mini train -> validation: {linear_probe(model, train, valid):.3f}")
    if args.fine_tune:
        for seed in range(2):
            start = CLIPModel.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
            tuned = fine_tune(start, processor, train, seed=seed)
            right, n = zero_shot(tuned, processor.tokenizer, valid)
            print(f"fine-tuned on emoji_mini train, seed {seed} -> validation: {right / n:.3f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
