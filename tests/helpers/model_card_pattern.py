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

An image classifier for 3 classes: red thing, green thing and blue thing\. It is base, a CLIP model \(one that embeds images and texts in the same space\), fine-tuned on images, labels and captions of pictures\. The method is \[MMFT\]\(https://arxiv\.org/abs/2601\.21426\), multimodal fine-tuning with synthetic captions\.

## Result

\| 18 test images \| accuracy \| 95 % interval \|
\| --- \| --- \| --- \|
\| before: the untuned model, zero-shot, with `a photo of a \{{\}}\.` \| {PERCENT} \| {SPAN} % \|
\| \*\*after fine-tuning\*\* \| \*\*{PERCENT}\*\* \| {SPAN} % \|
\| after fine-tuning, mean over the classes \| {PERCENT} \|  \|

Fine-tuning gained {NUMBER} points\. The two intervals do not overlap: the gain is larger than the choice of test images explains\.

What was kept \(selection policy `val-full`\): weights halfway to the tuned ones, with class texts and a kernel regression on the training images; the tuned ones are of epoch \d+ of 10; the default, since 12 validation images are too few to choose by\. Its accuracy on the 12 validation images is {PERCENT}; the untuned model has {PERCENT} zero-shot\. The test images were read once, after the selection\.

\*\*Scores\*\* are probabilities, calibrated on validation \(temperature {NUMBER}\)\. Their expected calibration error on the test images is {NUMBER}; on so few images a perfectly calibrated classifier shows {NUMBER}\. The area under the risk–coverage curve is {NUMBER}, {NUMBER} above that of a perfect order\.

!\[How often answers are right by their probability, and errors among the most certain answers\]\(certainty\.png\)

!\[Test images with the model's answers\]\(predictions_test\.png\)

Some test images, spread evenly over the split\. Green: correct\. Red: wrong, with the true class below\.

## Use

The snippets are for this folder\. `predictions_test\.png` stands for a picture of yours\. Its embedding goes through the head in `head\.safetensors`, of kind `kernel`, which holds embeddings of the training images\.

With `mmft_hf` installed:

{PYTHON}

The same classifier with `transformers` alone, where the model is a plain `CLIPModel`:

{PYTHON}

As a zero-shot classifier, with class names \(here its classes; any others will do\) in place of the head\. Its accuracy is not the one above, and was not measured:

{PYTHON}

Embeddings of images and texts, with `sentence-transformers` 6\.2 or later:

{PYTHON}

## Errors

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
\| validation \| 12 \| selected the epoch; too few to choose the weights and head by \|
\| test \| 18 \| read once, for the result above \|

Fingerprint `[0-9a-f]{{16}}` of class names, labels, image files and captions: `mmft-hf finetune` computes the same one from the same data\.

### Captions

23 of 24 training images have captions, 45 in total\. The others were trained with the class template alone\. They are texts written by `tiny/vlm` \(44\); texts that the dataset already had, which no model wrote \(1\)\.

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

### Classifier

16 candidates were compared on 12 validation images, by cross-entropy after calibration \(each half by the other's temperature\)\. Weights are `\(1 − a\) · untuned \+ a · tuned`\. Kept: \*\*kernel\*\* at a = 0\.5: the default, since 12 validation images are too few to choose by\.

\| head \| a \| validation loss \| validation accuracy \|
\| --- \| --- \| --- \| --- \|
(?:\| (?:mean|prototypes|linear|logistic|kernel|zero-shot) \| (?:0|0\.5|1) \| {NUMBER} \| {PERCENT} \|
){{16}}
### Training

Both towers were trained in full, in batches of 8 images\. The loss, 0\.1 x SupCon \+ 0\.9 x CLIP, draws an image towards its own text and towards the texts of its class\. Seed \d+\.

!\[Training loss and validation accuracy by epoch\]\(curves\.png\)

Epoch 0 is the untuned model, with prototypes computed as in the other epochs\. The dashed line is the untuned model, zero-shot\.

Settings that differ from the defaults:

\| setting \| here \| default \|
\| --- \| --- \| --- \|
\| `learning_rate` \| `0\.005` \| `1e-05` \|
\| `num_train_epochs` \| `10` \| `50; on a CPU 10` \|
\| `per_device_train_batch_size` \| `8` \| `64` \|

Made with python [\w.+]+, mmft\\_hf [\w.+]+, torch [\w.+]+, transformers [\w.+]+, datasets [\w.+]+, accelerate [\w.+]+, tokenizers [\w.+]+(?:, on [^\n]+)?\.

## Limits

- It knows 3 classes and answers with one of them for any image, even one that shows none of them\.
- The test images are the test split of pictures: they come from the same source as the training images\. On images from elsewhere \(other cameras, styles, places\) the accuracy may be very different\.
- The 95 % interval covers the choice of test images, as if each had been drawn independently; several pictures of the same thing make it too narrow\. It does not cover the randomness of training: another seed gives slightly different figures\.
- A wrong label in the test split counts as an error of the model\. A wrong label in the training split was learned\.
- Every class has fewer than 30 test images \(the fewest: 6\)\. The accuracy of such a class is a rough figure, and the order of the table above is partly chance\.
- The captions were written by a model that was told the label, so a wrong label is in its captions too\. Nobody has read all of them, and they contain errors\.
- The limits of the base model, base, apply here too: its biases were not examined\.

## Licence

`mit`, the licence of the base model\. For the images and texts it learned from, the card of captioned states `cc-by-4\.0`\.
\Z"""
)
