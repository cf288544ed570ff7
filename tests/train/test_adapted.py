"""Training an `AdaptedCLIP`: each text is encoded once, and then the caption encoder is gone; rates, modes, resume, several processes."""

import copy

import pytest
import torch
from tiny_clip import COLOURS, build_clip, colour_dataset
from training import StopAfter, changed, make_trainer, weights, with_lora
from word_trunk import HashedWords

from mmft_hf.core.errors import UserError
from mmft_hf.data.texts import class_prompt
from mmft_hf.data.views import TextView, text_rows
from mmft_hf.model.adapted_processor import TextTrunk
from mmft_hf.model.adapted_start import with_text_trunk
from mmft_hf.model.features import Encoding
from mmft_hf.model.loading import load_model
from mmft_hf.model.towers import plain_state

STAY = {"save_strategy": "no", "load_best_model_at_end": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))


def texts_of(data) -> set[str]:
    return {text for row in text_rows(data) for text in TextView(list(COLOURS)).possible_texts(row)}


def start(words: HashedWords, data=None, size: int = 24):
    """An AdaptedCLIP whose text tower knew the texts of the data."""
    return with_text_trunk(*build_clip(), TextTrunk(words), texts_of(data or colour_dataset(8)), Encoding())


class Closed(HashedWords):
    """Refuses to encode once it is locked."""

    locked = False

    def encode(self, texts, batch_size=32):
        assert not self.locked, f"a text was encoded again: {texts[0]}"
        return super().encode(texts, batch_size)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("towers", [("full", "full"), ("lora", "head"), ("full", "frozen")])
def test_no_text_is_encoded_while_training(tmp_path, towers, kept):
    """Also with the adaptor in part, and without the cache of frozen towers."""
    words = Closed(24)
    model, processor = start(words)
    assert sorted(words.encoded) == sorted(set(words.encoded)) == sorted(texts_of(colour_dataset(8)))
    words.locked = True
    before = weights(model)
    trainer = make_trainer(
        with_lora((model, processor), *towers), tmp_path, cache_frozen_features=kept, caption_dropout=0.0, **STAY
    )
    trainer.train()
    trainer.build_prototypes()
    parts = {name.split(".")[0] for name in changed(before, plain_state(model))}
    assert parts >= {"logit_scale", "vision_model"}
    assert ("text_model" in parts, "text_projection" in parts) == (towers[1] == "full", towers[1] != "frozen")


def test_texts_that_the_encoder_truncates_are_counted(tmp_path):
    class Short(HashedWords):
        def encode_batch(self, texts):
            return self.encode(texts), torch.tensor(["very" in text for text in texts])

    trainer = make_trainer(start(Short(24)), tmp_path, num_train_epochs=4, **STAY)
    trainer.train()
    told = [log["captions_cut"] for log in trainer.state.log_history if "captions_cut" in log]
    assert len(told) == 4 and 0.2 < sum(told) / 4 < 0.8  # one of two captions of each picture


def test_texts_that_are_new_to_a_training_are_encoded_before_it(tmp_path, monkeypatch):
    """The Trainer alone, on other captions than the start has seen, opens the encoder once."""
    words = HashedWords(24)
    model, processor = start(words)
    trainer = make_trainer((model, processor), tmp_path, colour_dataset(11, seed=3), caption_dropout=0.3, **STAY)
    known, opened = set(words.encoded), []
    monkeypatch.setattr(processor.trunk, "open", lambda n, own=processor.trunk.open: opened.append(n) or own(n))
    trainer.train()
    new = texts_of(colour_dataset(11, seed=3)) | {class_prompt("a photo of a {}.", name) for name in COLOURS}
    assert opened == [len(new - known)] and set(words.encoded) == known | new


def test_the_adaptor_has_a_rate_of_its_own(tmp_path):
    model, processor = start(HashedWords(24))
    rates = {}
    for name, settings in {"default": {}, "named": {"head_learning_rate": 0.5}}.items():
        trainer = make_trainer((model, processor), tmp_path / name, learning_rate=0.02, **settings)
        groups = trainer.create_optimizer().param_groups
        names = {id(p): n for n, p in model.named_parameters()}
        rates[name] = {
            (names[id(p)].split(".")[0].startswith("text_"), group["lr"]) for group in groups for p in group["params"]
        }
        decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
        assert "text_model.layers.0.up.weight" in decayed and "text_model.layers.0.up.bias" not in decayed
        assert sum(len(group["params"]) for group in groups) == len(names)
    assert rates == {"default": {(True, 0.2), (False, 0.02)}, "named": {(True, 0.5), (False, 0.02)}}
    with pytest.raises(UserError, match="head_learning_rate: expected a model with an adaptor"):
        make_trainer(build_clip(), tmp_path / "clip", head_learning_rate=0.5)


def test_resumed_equals_uninterrupted(tmp_path):
    straight = make_trainer(start(HashedWords(24)), tmp_path / "straight")
    straight.train()
    cut = make_trainer(start(HashedWords(24)), tmp_path / "cut")
    cut.add_callback(StopAfter(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make_trainer(start(HashedWords(24)), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert not changed(weights(straight.model), weights(resumed.model))
    assert straight.state.best_metric == resumed.state.best_metric

    # Vectors of another encoder would be silently mixed with those that the adaptor was trained on.
    other = make_trainer(start(HashedWords(24, seed=1)), tmp_path / "cut")
    with pytest.raises(UserError, match=r"checkpoint of another model\. Expected text_trunk"):
        other.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))


def test_a_saved_model_goes_on_training(tmp_path):
    """A run's folder is a dual encoder for the next one."""
    words = HashedWords(24)
    trainer = make_trainer(start(words), tmp_path / "one", num_train_epochs=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model, processor = load_model(tmp_path / "saved")
    assert not changed(weights(trainer.model), weights(model))
    processor.trunk = TextTrunk(words, processor.trunk.known_as)
    second = make_trainer((model, processor), tmp_path / "two", num_train_epochs=1, **STAY)
    second.train()
    assert "text_model.layers.0.up.weight" in changed(weights(trainer.model), weights(model))


def test_averages_and_interpolation(tmp_path):
    """What acts on all weights by name acts on the adaptor."""
    from mmft_hf.model.interpolation import interpolated

    model, processor = start(HashedWords(24))
    untuned = copy.deepcopy(model)
    make_trainer((model, processor), tmp_path, weight_averaging=0.5, loss_chunk_size=3, **STAY).train()
    half = interpolated(model, untuned, 0.5)
    name = "text_model.layers.0.down.weight"
    mean = (model.state_dict()[name] + untuned.state_dict()[name]) / 2
    assert torch.allclose(half.state_dict()[name], mean) and mean.any()
