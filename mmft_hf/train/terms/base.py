"""The interface of a loss term."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ...model.losses import Batch
from ...predict.heads import Head


class LossTerm:
    """One summand of the training loss: a pure function of a `Batch`.

    Each term is a class in its own file, imported in `terms/__init__.py`. It sets `name` and defines `__call__`.

    Attributes:
        name: of the term; its loss is logged as `NAME_loss`.
        weight: factor in the sum: a number, or a function of the optimizer steps done and of all steps. A term of weight 0
            is computed and logged, and adds nothing.
        needs: what there must be in addition to the embeddings of the images:
            `texts`: one drawn for each image;
            `class_texts`: one of every class, as `batch.extras["class_embeds"]`;
            `untuned_images`: the images by the image tower as the Trainer got it, as `batch.extras["untuned_image_embeds"]`;
            `image_tokens`: tokens of the images, for `local` alone.
        log_weight: whether `NAME_weight` is logged.
        over_classes: whether it is a cross-entropy over class logits, to which it adds `batch.extras["adjustment"]`.
        parameters: the trained parameters of the term itself, by name. The Trainer gives it to the optimizer and keeps it in
            checkpoints; `__call__` reads it from `batch.parameters[self.name]`, since only what goes through the forward
            of the wrapped model is averaged over processes.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("texts",)
    weight: float | Callable[[int, int], float] = 1.0
    log_weight: bool = True
    over_classes: ClassVar[bool] = False
    parameters: Mapping[str, nn.Parameter] = {}

    def __init__(self, weight: float | Callable[[int, int], float] = 1.0):
        self.weight = weight

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """`{"loss": scalar}`, and any further scalars that are to be logged, by unique names.

        The batch holds the rows of all processes, and autocast is off.
        """
        raise NotImplementedError

    def local(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values `(B, …)` of the images of this process, for `batch.extras`: what would be too large to be gathered itself.

        Args:
            rows: `image_tokens` and `untuned_image_tokens` `(B, P, H)`, unit-norm, if the term needs them and there are any: a
                tower whose outputs are kept has none.
        """
        return {}

    def head(self, parameters: Mapping[str, Tensor], class_names: Sequence[str]) -> Head | None:
        """The classifier that the term trains, which validation then uses; None (the default) leaves it to prototypes."""
        return None
