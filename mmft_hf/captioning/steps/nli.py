"""A local model of natural language inference: how likely one text contradicts another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ...core.builtin import builtin
from ...core.errors import UserError
from ...model.opening import default_device, first_line
from ...model.weights import find_weights

BATCH_SIZE = 32  # pairs in a pass
EXAMPLE = "For example, write model: cross-encoder/nli-deberta-v3-small."


class Inference:
    """A sequence classifier with a class for contradiction, such as `cross-encoder/nli-deberta-v3-small`.

    Args:
        name: Hub id or folder.

    Raises:
        UserError: no such model, or none that has one class whose name begins with `contradict`.
    """

    def __init__(self, name: str):
        path, where = builtin(name), f"step agreement, model {name}"
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            options = {"dtype": torch.float32, "output_loading_info": True}
            model, found = find_weights(path).from_pretrained(
                AutoModelForSequenceClassification, name, config, **options
            )
        except UserError:
            raise
        except Exception as error:  # missing, or content that one of many constructors cannot use
            raise UserError(
                f"{where}: expected a model of natural language inference; it could not be loaded ({first_line(error)}). {EXAMPLE}"
            ) from error
        labels = [i for i, word in config.id2label.items() if word.lower().startswith("contradict")]
        if len(labels) != 1 or found["missing_keys"]:
            classes = ", ".join(config.id2label.values()) if len(labels) != 1 else "no weights of its classes"
            raise UserError(
                f"{where}: expected a model of natural language inference, with a class contradiction, found {classes}. {EXAMPLE}"
            )
        # Kinds such as RoBERTa keep two places free. Few tokenizers lack a limit, and a longer pair would end the run.
        limit = getattr(config, "max_position_embeddings", None) or self._tokenizer.model_max_length + 2
        self._tokenizer.model_max_length = min(self._tokenizer.model_max_length, limit - 2)
        self._contradiction = int(labels[0])
        self._model = model.to(default_device()).eval()

    @torch.inference_mode()
    def contradictions(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """The probability, from 0 to 1, that a premise contradicts a text, for each pair `(premise, text)`.

        Pairs over the token limit of the model lose the end of the longer text.
        """
        ordered = sorted(set(pairs), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
        found = {}
        for start in range(0, len(ordered), BATCH_SIZE):
            batch = ordered[start : start + BATCH_SIZE]
            inputs = self._tokenizer(
                *map(list, zip(*batch, strict=True)), padding=True, truncation=True, return_tensors="pt"
            )
            logits = self._model(**inputs.to(self._model.device)).logits
            found |= dict(zip(batch, logits.softmax(dim=-1)[:, self._contradiction].tolist(), strict=True))
        return found
