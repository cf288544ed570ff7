"""Fine-tuning of the image tower and a linear head by cross-entropy: `MMFTTrainer` with another loss term.

Order of the images, crops, schedule, precision and the choice of the epoch are the Trainer's own, so this baseline sees
the same pictures in the same steps as MMFT does.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..core.errors import UserError
from ..model.embedding import remove_embedding_forward
from ..model.loading import embedding_size, scale_parameter
from ..model.towers import TOWERS
from ..predict.heads import LinearHead
from ..train.config import MMFTConfig
from ..train.terms import CrossEntropy, LossTerm
from ..train.trainer import MMFTTrainer


def train_head(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: MMFTConfig,
    train: Dataset,
    head: LinearHead,
    validation: Dataset | None = None,
    fixed: bool = False,
    cosine: bool = False,
    more: Sequence[LossTerm] = (),
) -> tuple[LinearHead, int]:
    """Fine-tunes the image tower, and a linear head on its unit-norm embeddings, by cross-entropy.

    The benchmark's `ce` starts from a zero-shot head, `ce-frozen` keeps that head fixed, `lp-ft` starts from a logistic
    regression on frozen features (`linear.head`), and `ce-last4` trains the last blocks of the tower.

    Args:
        model: trained in place, as far as its image tower is not frozen. The text tower and the logit scale are frozen, and no
            text is encoded.
        config: as for `MMFTTrainer`; its settings of the loss, of texts and of prototypes have no effect.
        train: columns `image`, `label`. Captions are not used, but if there are any, each image gets the crops that
            MMFT gives it.
        head: where the head starts.
        validation: columns `image`, `label`; it selects the best epoch, tower and head together. Without it the last step
            is kept.
        fixed, cosine: of the head, as for `CrossEntropy`.
        more: further loss terms.

    Returns:
        The trained head, and the number of optimizer steps taken.

    Raises:
        UserError: the head does not fit the classes or the model; otherwise as `MMFTTrainer`.

    References: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), for `ce`; Kumar et al.
    2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution" (arXiv 2202.10054), for `lp-ft`.
    """
    shape, names = (len(head.class_names), embedding_size(model)), train.features["label"].names
    if tuple(head.weight.shape) != shape or head.class_names != names:
        raise UserError(
            f"head: expected weights of shape {(len(names), shape[1])} for the classes of the training images, in their order, "
            f"found {tuple(head.weight.shape)} for {len(head.class_names)} classes."
        )
    trainer = head_trainer(model, processor, config, train, head, validation, fixed, cosine, more)
    trainer.train()
    found = trainer.current_prototypes()
    remove_embedding_forward(model)
    return found, trainer.state.global_step


def head_trainer(
    model, processor, config, train, head, validation=None, fixed=False, cosine=False, more=()
) -> MMFTTrainer:
    """The Trainer of `train_head`."""
    for name, parameter in model.named_parameters():
        if name.startswith(TOWERS["text"]):
            parameter.requires_grad_(False)
    scale_parameter(model).requires_grad_(False)
    return MMFTTrainer(
        model, config, train, validation, processor, loss=[CrossEntropy(head, fixed, cosine=cosine), *more]
    )
