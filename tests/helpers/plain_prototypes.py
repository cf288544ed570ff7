"""Prototypes by plain loops: what the library's are compared with."""

import torch


def encode_one_by_one(model, processor, texts) -> torch.Tensor:
    rows = []
    for text in texts:
        tokens = processor.tokenizer([text], truncation=True, return_tensors="pt")
        rows.append(model.get_text_features(**tokens).pooler_output[0])
    return torch.stack(rows)


@torch.no_grad()
def naive_caption_prototypes(model, processor, dataset, template) -> torch.Tensor:
    """Class by class, caption by caption: normalise, mean, normalise."""
    names, means = dataset.features["label"].names, []
    for c, name in enumerate(names):
        texts = [f"{template.format(name)} {t}" for row in dataset if row["label"] == c for t in row["captions"]]
        embeds = encode_one_by_one(model, processor, texts or [template.format(name)])
        mean = (embeds / embeds.norm(dim=1, keepdim=True)).mean(dim=0)
        means.append(mean / mean.norm())
    return torch.stack(means)
