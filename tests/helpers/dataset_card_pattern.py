"""The whole card of a captioned data set as one pattern: that of `test_cards.py`. Only the version may differ."""

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

5 captions for 5 images of someone/colours in 3 classes, written by `tiny/vlm`\. A caption is a text about its picture: a model of images and texts, such as CLIP, is fine-tuned on both, and on the labels\.

!\[Some images with their captions\]\(captions\.png\)

\| in figures \| \|
\|---\|---\|
\| images \| 5 \|
\| captions \| 5 \|
\| captions per image \| 1\.00 \|
\| images without a caption \| 1 \|
\| name their class \| 100\.0 % \|
\| over the token limit \| 22\.2 % \|
\| cut at a sentence \| 20\.0 % \|
\| deny their label \| 1 \|
\| texts of several images \| 1 \|

All figures, with samples and the checks in detail: \[captions\.html\]\(captions\.html\)\.

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

`captions` holds the accepted texts of an image, for training\. `caption_records` holds every answer with its aspect, status,
checks and origin\. `image_sha256` is of the image file's bytes, as they are at the source\.

## Captions by aspect

\| aspect \| captions \| words: median, 95th percentile, most \| tokens: the same \| name their class \|
\|---\|---\|---\|---\|---\|
\| visual \| 4 \| 3\.5 · 4 · 4 \| 18\.5 · 20\.85 · 21 \| 100\.0 % \|
\| shape \| 1 \| 5 · 5 · 5 \| 26 · 26 · 26 \| 100\.0 % \|
\| all \| 5 \| 4 · 4\.8 · 5 \| 20 · 25 · 26 \| 100\.0 % \|

## Checks

Captions by status: ok 4, trimmed 1, refused 1, rejected 1, failed 1, empty 1, not_run 1\.

What the checks found:

\| check \| meaning \| answers \| share \|
\|---\|---\|---\|---\|
\| `empty` \| the answer was empty \| 1 \| 11\.1 % \|
\| `thinking_budget` \| thinking used up the token budget \| 1 \| 11\.1 % \|
\| `refusal` \| the model or its provider refused \| 1 \| 11\.1 % \|
\| `over_token_limit` \| with its class template longer than the text tower reads \| 2 \| 22\.2 % \|
\| `repetition` \| the text repeats itself \| 1 \| 11\.1 % \|
\| `label_missing` \| the class is not named \| 2 \| 22\.2 % \|
\| `label_contradicted` \| the text denies the label \| 1 \| 11\.1 % \|

## How they were made

- model: `tiny/vlm`, 5 captions
- temperature: 0\.2
- tokens: 1,100 in, 400 out
- cost of the last run: 0\.25 USD
- mmft_hf [\w.]+, run 20260101T000000Z

The prompts, where `\[class name\]` stands for the name of the image's class:

visual

````text
Describe this \[class name\] & its ```look```
````

shape

```text
<b>Shape</b> of \[class name\]\?
```

## Limits

- The captions were written by a model that was told the label\. One can be right about the class without being right about the picture, and a wrong label goes into its caption\.
- The checks look at words: they do not compare a caption with its picture\.
- They are for training\. For evaluation, use images and labels alone\.

## Licence

This card states no licence, since that of the images is not known here\. Whoever publishes the data set must choose one that allows it\. Captions that a model wrote may be under the terms of whoever offers it\.
\Z"""
)
