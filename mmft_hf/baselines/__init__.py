"""Baselines on frozen features: pure functions of arrays, one file per family. No model, no files, no test labels.

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
"""
