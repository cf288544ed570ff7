"""Baselines, one file per family: on frozen features, as pure functions of arrays, and by fine-tuning. No test labels.

## On frozen features

No model, no files.

| row | function | parameters chosen on validation |
|---|---|---|
| `zs` | `zero_shot.zero_shot` | none |
| `lp` | `linear.logistic_regression` | `C`, by `linear.choose` |
| `gda` | `gda.gda` | `alpha`, by `gda.choose` |
| `tip` | `tip_adapter.tip` | `alpha`, `beta`, by `tip_adapter.choose` |
| `tip-f` | `tip_adapter.tip_f` | `alpha`, `beta`, by `tip_adapter.choose_f` |
| `lp++` | `lp_plus_plus.lp_plus_plus` | none |
| `zs-lp`, `clap` | `clap.zs_lp`, `clap.clap` | none |

Every method takes `train_x`, `train_y`, `test_x` (and `zero_shot` where it needs texts) and returns scores `(N, C)`, a numpy
array of float64: logits, whose largest is the predicted class. The scores of a test row depend on no other test row, so
several test sets may be scored in one call, one below the other.

Validation examples serve for choosing parameters and for nothing else: `choose(train_x, train_y, val_x, val_y, …)` returns
a `Choice`, and `method(train_x, train_y, test_x, …, **choice.parameters)` uses it. Without that, the defaults hold: the
policies `val-k` and `last` of a results table. Nothing is refitted on validation.

Shapes: `n` training examples, `V` views of each, `N` test examples, `C` classes, `D` embedding size. Features are numpy
arrays or tensors of any float type; they are taken for unit-norm embeddings of one model. `zero_shot` `(C, D)` are the
class texts' unit-norm embeddings of the same model, such as `ClassPrototypes.embeddings`. `train_y` `(n,)` are integers
from 0 to C-1; C is the number of rows of `zero_shot`, or the largest label plus one. Classes may be of unequal size.

## By fine-tuning

With cross-entropy, on top of `MMFTTrainer`, whose pictures, steps and choice of the epoch they share. A model is trained in
place; its learning rate is that of the `MMFTConfig` given.

| row | function | what is trained |
|---|---|---|
| `ce` | `cross_entropy.train_head` | image tower and linear head, from zero-shot weights |
| `ce-frozen` | the same, `fixed=True` | image tower, with the zero-shot head as it is |
| `lp-ft` | the same | image tower and linear head, from the weights of `linear.head` |
| `ce-text` | `cross_entropy.train_class_texts` | both towers, against the classes' texts |
| `clip-lora` | `clip_lora.clip_lora` | LoRA in the attention of both towers, against the classes' texts |
"""
