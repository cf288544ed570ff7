"""The model card: `model` renders it, `sources` collects what is known about the base model, the data and the captions."""

from ...core.markdown import public_name
from .model import card_for_repository, model_card, versions, write_model_card

__all__ = ["card_for_repository", "model_card", "public_name", "versions", "write_model_card"]
