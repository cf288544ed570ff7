"""Baselines, one file per family: pure functions of arrays on frozen features, and fine-tuning. None sees test labels.

## On frozen features

These functions need no model and no files.

| benchmark row | function | parameters chosen on validation |
|---|---|---|
| `lp` | `linear.logistic_regression` | `C`, by `linear.choose` |
| `gda` | `gda.gda` | `alpha`, by `gda.choose` |
| `tip` | `tip_adapter.tip` | `alpha`, `beta`, by `tip_adapter.choose` |
| `tip-f` | `tip_adapter.tip_f` | `alpha`, `beta`, by `tip_adapter.choose_f` |
| `lp++` | `lp_plus_plus.lp_plus_plus` | none |
| `zs-lp`, `clap` | `clap.zs_lp`, `clap.clap` | none |
| `proker` | `proker.proker` | `beta`, `ridge`, by `proker.choose` |

`NAME-cap` are the same functions with class averages of the captions for `zero_shot`. What they share with the heads of
`--head`, in particular the checks of the arrays, is in `predict.fitting`.

Every method takes `train_x`, `train_y`, `test_x` (and `zero_shot` if it needs texts) and returns scores `(N, C)`, a numpy
array of float64: logits, whose largest is the predicted class. The scores of a test row depend on no other test row.

Validation examples only choose parameters: `choose(train_x, train_y, val_x, val_y, …)` returns a `Choice`, and
`method(train_x, train_y, test_x, …, **choice.parameters)` uses it. Without a choice the defaults hold. Nothing is refitted on
validation.

Shapes: `n` training examples, `N` test examples, `C` classes, `D` embedding size. Features are numpy arrays or tensors of any
float type: unit-norm embeddings of one model. `zero_shot` `(C, D)` are the unit-norm text embeddings of the classes by the
same model, such as `ClassPrototypes.embeddings`. `train_y` `(n,)` are integers from 0 to C-1; C is the number of rows of
`zero_shot`, or the largest label plus one. Classes may have unequal sizes.

## By fine-tuning

With cross-entropy, by `MMFTTrainer` with another loss term, so that pictures, steps and the choice of the epoch are those of
MMFT. The model is trained in place; its learning rate is that of the `MMFTConfig` given.

| benchmark row | function | what is trained |
|---|---|---|
| `ce` | `cross_entropy.train_head` | image tower and linear head, from zero-shot weights |
| `ce-frozen` | `cross_entropy.train_head(fixed=True)` | image tower, with a fixed zero-shot head |
| `lp-ft` | `cross_entropy.train_head` | image tower and linear head, from the weights of `linear.head` |
| `clip-lora` | `clip_lora.clip_lora` | LoRA in the attention of both towers, against the texts of the classes |
"""
