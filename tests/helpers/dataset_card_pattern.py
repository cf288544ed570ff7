"""The whole card of the captioned dataset in `test_cards.py` as one pattern. Only the version may differ."""

import re

PATTERN = re.compile(
    r"""\A---
language:
- en
annotations_creators:
- machine-generated
task_categories:
- image-classification
tags:
- captions
- clip
- mmft
- synthetic-captions
pretty_name: Captions of someone/colours
size_categories:
- n<1K
configs:
- config_name: default
  description: run 20260101T000000Z
  data_files:
  - split: train
    path: data/train-\*\.parquet
---
# Captions of someone/colours

5 captions for 5 images of someone/colours in 3 classes, written by `tiny/vlm`\. Each caption describes its image\. A model of images and texts, such as CLIP, can be fine-tuned on them and on the labels together\.

!\[Some images with their captions\]\(captions\.png\)

\| figure \| value \|
\|---\|---\|
\| images \| 5 \|
\| images without a caption \| 1 \|
\| captions \| 5 \|
\| captions per image \| 1\.00 \|
\| captions that name their class \| 100\.0 % \|
\| trimmed captions \| 20\.0 % \|
\| longest caption in tokens \| 26 \|
\| answers over the token limit \| 22\.2 % \|
\| answers that deny their label \| 1 \|
\| texts shared by several images \| 1 \|

All figures, with samples and details of the checks: \[captions\.html\]\(captions\.html\)\.

## Use

In this folder:

```python
import os

from datasets import load_dataset

data = load_dataset\(os\.getcwd\(\)\)
row = data\["train"\]\[0\]
print\(row\["captions"\]\)
```

Train on it: `mmft-hf finetune --dataset_name \.`\.

`captions` holds the accepted captions of an image, for training\. `caption_records` holds every answer with its aspect, status,
checks and provenance\. `image_sha256` is the SHA-256 of the original image file\.

## Captions by aspect

Lengths are given as median · 95th percentile · maximum\.

\| aspect \| captions \| words \| tokens \| name their class \|
\|---\|---\|---\|---\|---\|
\| visual \| 4 \| 3\.5 · 4 · 4 \| 18\.5 · 20\.85 · 21 \| 100\.0 % \|
\| shape \| 1 \| 5 · 5 · 5 \| 26 · 26 · 26 \| 100\.0 % \|
\| all \| 5 \| 4 · 4\.8 · 5 \| 20 · 25 · 26 \| 100\.0 % \|

## Checks

Captions by status: `ok` 4, `trimmed` 1, `refused` 1, `rejected` 1, `failed` 1, `empty` 1, `not_run` 1\.

\| check \| meaning \| answers \| share \|
\|---\|---\|---\|---\|
\| `empty` \| the answer was empty \| 1 \| 11\.1 % \|
\| `thinking_budget` \| thinking used up the token budget \| 1 \| 11\.1 % \|
\| `refusal` \| the model or its provider refused \| 1 \| 11\.1 % \|
\| `over_token_limit` \| with its class template longer than the text tower reads \| 2 \| 22\.2 % \|
\| `repetition` \| the text repeats itself \| 1 \| 11\.1 % \|
\| `label_missing` \| the class is not named \| 2 \| 22\.2 % \|
\| `label_contradicted` \| the text denies the label \| 1 \| 11\.1 % \|

## How the captions were written

- model: `tiny/vlm`, 5 captions
- temperature: 0\.2
- tokens: 1,100 in, 400 out
- cost of the last run: 0\.25 USD
- mmft_hf [\w.]+, run 20260101T000000Z

The prompts, with `\[class name\]` in place of the class of the image:

visual

````text
Describe this \[class name\] & its ```look```
````

shape

```text
<b>Shape</b> of \[class name\]\?
```

## Limitations

- The captions were written by a model that was told the label\. A caption can fit the class and still be wrong about the picture, and a wrong label is repeated in its caption\.
- The checks look only at words\. They do not compare a caption with its picture\.
- The captions are for training\. Evaluate on images and labels alone\.

## Licence

The licence of the images is not known here, so this card states none\. Whoever publishes the dataset must choose a licence that allows it\. Captions written by a model may be subject to the terms of its provider\.
\Z"""
)
