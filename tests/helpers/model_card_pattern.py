"""The whole model card as one pattern: the run of `test_cards.py`. Every word that is not a figure is fixed."""

import re

NUMBER = r"-?[\d.,]+"
PERCENT = r"[\d.]+ %"
SPAN = r"[\d.]+ to [\d.]+"
PYTHON = r"```python\n(?:[^`].*\n|\n)+?```"
NAMES = r"(?:red|green|blue) thing"

PATTERN = re.compile(
    rf"""\A---
library_name: transformers
pipeline_tag: zero-shot-image-classification
license: mit
tags:
- clip
- image-classification
- mmft
- synthetic-captions
metrics:
- accuracy
model-index:
- name: base fine-tuned on pictures
  results:
  - task:
      type: image-classification
      name: Image classification
    dataset:
      type: pictures
      name: pictures
      split: test
    metrics:
    - type: accuracy
      value: {NUMBER}
      name: Accuracy \(95 % interval {SPAN} %\)
      args:
        interval: 0\.95
        low: {NUMBER}
        high: {NUMBER}
        images: 18
    - type: mean_per_class_accuracy
      value: {NUMBER}
      name: Accuracy, mean over the classes
---
# base fine-tuned on pictures

An image classifier for 3 classes: red thing, green thing and blue thing\. It is base, a CLIP model \(one that embeds images and texts in the same space\), fine-tuned on images, their labels and captions of pictures\. The method is \[MMFT\]\(https://arxiv\.org/abs/2601\.21426\), multimodal fine-tuning with synthetic captions\.

## Result

\| on 18 test images \| accuracy \| 95 % interval \|
\| --- \| --- \| --- \|
\| before: the untuned model, zero-shot, with `a photo of a \{{\}}\.` \| {PERCENT} \| {SPAN} % \|
\| \*\*after fine-tuning\*\* \| \*\*{PERCENT}\*\* \| {SPAN} % \|
\| after, mean over the classes \| {PERCENT} \|  \|

Fine-tuning gained {NUMBER} points\. The two intervals do not overlap: it is more than chance in the choice of test images\.

What was kept \(selection policy `val-full`\): epoch \d+ of 10, the best on validation; epoch 0 is the untuned model\. On the 12 validation images it has {PERCENT}, the untuned model zero-shot {PERCENT}\. The test images were read once, after that\.

!\[Test images with the model's answers\]\(predictions_test\.png\)

Some test images, spread evenly over the split\. Green: right\. Red: wrong, with the true class below\.

## Use

The snippets are for this folder\. `predictions_test\.png` stands for a picture of yours\. It is compared with `prototypes\.safetensors`, which has one embedding per class: the average over its training captions\.

With `mmft_hf` installed:

{PYTHON}

The same classifier with `transformers` alone, where the model is a plain `CLIPModel`:

{PYTHON}

As a zero-shot classifier, with class names \(here its classes; any others will do\) in place of the prototypes\. Its accuracy is not the one above, and was not measured:

{PYTHON}

Embeddings of images and texts, with `sentence-transformers` 6\.2 or later:

{PYTHON}

## Where it errs

!\[Which classes are taken for which\]\(confusion\.png\)

Weakest classes first:

\| class \| training images \| test images right \| accuracy \(95 % interval\) \| most often taken for \|
\| --- \| --- \| --- \| --- \| --- \|
(?:\| {NAMES} \| 8 \| \d of 6 \| {PERCENT} \({SPAN}\) \| (?:{NAMES} \(\d\))? \|
){{3}}
## How it was made

### Data

Images and labels: pictures, with captions in `captioned`\.

\| split \| images \|  \|
\| --- \| --- \| --- \|
\| training \| 24 \| 8 of each class \|
\| validation \| 12 \| chose what was kept \|
\| test \| 18 \| read once, for the result above \|

Fingerprint `[0-9a-f]{{16}}`: of class names, labels, image files and captions\. `mmft-hf finetune` finds the same one in the same data\.

### Captions

23 of 24 training images have captions, 45 in all\. The others were trained with the class template alone\. They are written by `tiny/vlm` \(44\); texts that the data set already had, which no model wrote \(1\)\.

Aspects: `visual` and `shape`\.

The prompts, where `\[class name\]` stands for the name of the image's class:

visual

````text
Describe this \[class name\] & its ```look```
````

shape

```text
<b>Shape</b> of \[class name\]\?
```

### Training

Both towers were trained whole, in batches of 8 images\. The loss, 0\.1 x SupCon \+ 0\.9 x CLIP, draws an image towards its own text and towards the texts of its class\. Seed \d+\.

!\[Training loss and validation accuracy by epoch\]\(curves\.png\)

Epoch 0 is the untuned model, compared with prototypes made as in the other epochs\. The dashed line is the untuned model, zero-shot\.

Settings that differ from the defaults:

\| setting \| here \| default \|
\| --- \| --- \| --- \|
\| `learning_rate` \| `0\.005` \| `1e-05` \|
\| `num_train_epochs` \| `10` \| `50` \|
\| `per_device_train_batch_size` \| `8` \| `64` \|

Made with python [\w.+]+, mmft\\_hf [\w.+]+, torch [\w.+]+, transformers [\w.+]+, datasets [\w.+]+, accelerate [\w.+]+, tokenizers [\w.+]+(?:, on [^\n]+)?\.

## Limits

- It knows 3 classes and answers with one of them for any picture, also for one that shows none of them\. Scores are no probabilities of being right: nobody has checked how well they are calibrated\.
- The test images are the test split of pictures: they come from where the training images come from\. On pictures from elsewhere \(other cameras, styles, places\) the accuracy may be quite another\.
- The 95 % interval is for the choice of test images, as if each had been drawn by itself; several pictures of one thing make it too narrow\. It leaves out the luck of training: another seed gives somewhat different figures\.
- A wrong label in the test split counts as an error of the model, and one in the training split was learnt\.
- Every class has fewer than 30 test images \(the fewest: 6\)\. The accuracy of such a class is a rough figure, and the order of the table above is partly chance\.
- The captions were written by a model that was told the label, so a wrong label went into them\. No person has read them all, and they contain errors\.
- What holds for the base model, base, holds for this one: its biases were not examined\.

## Licence

`mit`, taken over from the base model\. For the images and texts that it learnt from, the card of captioned states `cc-by-4\.0`\.
\Z"""
)
