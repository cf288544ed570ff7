"""Model cards, and what they are made of: `model` writes them, `provenance` collects what is known of a run's origin."""

from ...core.markdown import public_name
from .model import card_for_repository, model_card, versions, write_model_card

__all__ = ["card_for_repository", "model_card", "public_name", "versions", "write_model_card"]
