"""Weights between two states of one model."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel


def interpolated(tuned: PreTrainedModel, untuned: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """A copy with the weights `(1 - alpha) * untuned + alpha * tuned`, logit scale and running means included.

    Args:
        tuned, untuned: of one architecture, with LoRA merged.

    References: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), equation 1.
    """
    model = copy.deepcopy(tuned)
    with torch.no_grad():
        weights = untuned.state_dict()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(weights[name].to(value.device), 1 - alpha)
    return model
