"""Weight averaging: the average itself, what is evaluated, saved and resumed, and that training takes no notice of it."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import colour_dataset
from training import StopAfter, changed, make_trainer, weights, with_lora
from transformers import TrainerCallback

from mmft_hf import ClassPrototypes, MMFTConfig, load_model, set_towers
from mmft_hf.core.errors import UserError
from mmft_hf.train.checkpoints import last_complete_checkpoint

DECAY = 0.7
EVERY_STEP = {
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_total_limit": None,
}


class Steps(TrainerCallback):
    """Keeps the weights that each step left."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))


def average(steps: list[dict], decay: float = DECAY) -> dict[str, torch.Tensor]:
    """Mean over the steps, the last with weight 1, the one before with `decay`, and so on."""
    factors = torch.tensor([decay**k for k in range(len(steps))][::-1], dtype=torch.float64)
    stacked = {name: torch.stack([step[name].double() for step in steps], dim=-1) for name in steps[0]}
    return {name: ((values * factors).sum(-1) / factors.sum()).float() for name, values in stacked.items()}


def difference(some: dict, others: dict) -> float:
    assert some.keys() <= others.keys()
    return max((some[name].double() - others[name].double()).abs().max().item() for name in some)


@pytest.fixture(scope="module")
def averaged(_clip, tmp_path_factory):
    """A training whose average is evaluated and saved after every step, one without average, and the steps of both."""
    folder, found = tmp_path_factory.mktemp("averaged"), []
    for name, decay in (("with", DECAY), ("without", 0.0)):
        trainer = make_trainer(copy.deepcopy(_clip), folder / name, weight_averaging=decay, **EVERY_STEP)
        steps = Steps()
        trainer.add_callback(steps)
        trainer.train()
        found += [trainer, steps.weights]
    return found


def test_training_takes_no_notice_of_the_average(averaged):
    _, steps, _, plain_steps = averaged
    assert len(steps) == len(plain_steps) == 6
    assert not any(changed(some, other) for some, other in zip(steps, plain_steps, strict=True))


def test_the_average_is_that_of_the_steps_and_a_checkpoint_holds_both(averaged, _clip):
    trainer, steps, _, _ = averaged
    for n in range(1, 7):
        folder = f"{trainer.args.output_dir}/checkpoint-{n}"
        saved, raw = (load_file(f"{folder}/{name}.safetensors") for name in ("model", "unaveraged"))
        assert difference(saved, average(steps[:n])) < 1e-6
        assert difference(raw, steps[n - 1]) == 0 and set(raw) == {name for name, _ in _clip[0].named_parameters()}
        assert n == 1 or difference(saved, steps[n - 1]) > 1e-4
    start = f"{trainer.args.output_dir}/checkpoint-0"
    for name in ("model", "unaveraged"):
        assert difference(load_file(f"{start}/{name}.safetensors"), weights(_clip[0])) == 0


def test_the_average_is_what_is_evaluated(averaged, _clip, tmp_path):
    trainer, steps, _, _ = averaged
    model, processor = copy.deepcopy(_clip)
    plain = make_trainer((model, processor), tmp_path)
    found = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    for n in range(7):
        model.load_state_dict(average(steps[:n]) if n else weights(_clip[0]))
        plain.forget_prototypes()
        assert found[n] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5), n
        if n > 1:
            model.load_state_dict(steps[n - 1])
            plain.forget_prototypes()
            assert found[n] != pytest.approx(plain.evaluate()["eval_loss"], abs=1e-4), n


def test_the_best_average_is_what_is_left(averaged):
    trainer, _, _, _ = averaged
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert difference(best, weights(trainer.model)) == 0
    kept = trainer.evaluate()["eval_accuracy"]
    assert kept == trainer.state.best_metric


@pytest.mark.parametrize("towers", [("full", "frozen"), ("lora", "full")])
def test_without_validation_the_last_average_is_left_of_what_is_trained(clip, tmp_path, towers):
    set_towers(clip[0], *towers)
    start, steps = weights(clip[0]), Steps()
    trainer = make_trainer(clip, tmp_path, evaluate=False, weight_averaging=0.9)
    trainer.add_callback(steps)
    trainer.train()
    found = weights(trainer.model)
    assert difference(found, average(steps.weights, 0.9)) < 1e-6
    assert difference(found, steps.weights[-1]) > 1e-4
    frozen = {name: start[name] for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert frozen and not changed(frozen, found)
    trainer.train()  # a second training starts from these weights, with an average of its own
    assert difference(weights(trainer.model), average(steps.weights[6:], 0.9)) < 1e-6


@pytest.mark.parametrize("kind", ["epochs", "within an epoch"])
@pytest.mark.parametrize("towers", [("full", "full"), pytest.param(("lora", "full"), marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(_clip, tmp_path, kind, towers, caplog):
    """With all that a step may depend on."""
    settings = {"weight_averaging": 0.9, "supcon_weight": 0.6, "supcon_weight_end": 0.0, "caption_dropout": 0.5}
    settings |= {"num_train_epochs": 3, "load_best_model_at_end": False, "save_total_limit": None}
    if kind == "within an epoch":
        settings |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}

    def trainer(name):
        model = with_lora(copy.deepcopy(_clip), *towers) if "lora" in towers else copy.deepcopy(_clip)
        return make_trainer(model, tmp_path / name, **settings)

    straight = trainer("straight")
    straight.train()
    cut = trainer("cut")
    cut.add_callback(StopAfter(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-3" if kind == "epochs" else "checkpoint-4")
    resumed = trainer("cut")
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text
    assert not changed(weights(straight.model), weights(resumed.model))
    last = "checkpoint-9/unaveraged.safetensors" if kind == "epochs" else "checkpoint-8/unaveraged.safetensors"
    assert difference(*(load_file(tmp_path / name / last) for name in ("straight", "cut"))) == 0
    # Also the evaluation that a resume starts with.
    found = [
        [(x["step"], x["eval_loss"]) for x in t.state.log_history if "eval_loss" in x] for t in (straight, resumed)
    ]
    assert len(found[1]) == len(found[0]) + 1 and set(found[0]) == set(found[1])


def test_a_checkpoint_of_a_run_with_average_goes_on_with_one_and_the_reverse(clip, tmp_path):
    for decay, other in ((0.9, 0.0), (0.0, 0.9)):
        make_trainer(clip, tmp_path / str(decay), weight_averaging=decay, max_steps=1).train()
        trainer = make_trainer(clip, tmp_path / str(decay), weight_averaging=other, max_steps=2)
        before = weights(clip[0])
        expected = "expected a run with a weight_averaging" if decay else "expected a run with no weight_averaging"
        with pytest.raises(UserError, match=expected):
            trainer.train(resume_from_checkpoint=True)
        assert not changed(before, weights(clip[0]))


def test_a_checkpoint_of_other_towers_is_refused(clip, tmp_path):
    make_trainer(clip, tmp_path, weight_averaging=0.9, max_steps=1).train()
    set_towers(clip[0], "full", "frozen")
    trainer = make_trainer(clip, tmp_path, weight_averaging=0.9, max_steps=2)
    with pytest.raises(UserError, match="trained with other towers"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_decay_lies_from_0_to_below_1(value):
    with pytest.raises(UserError, match=f"weight_averaging: expected 0 to below 1, found {value}"):
        MMFTConfig("somewhere", use_cpu=True, weight_averaging=value)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_not_averaged(kind, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UserError, match=r"weight_averaging: expected 0 under FSDP and DeepSpeed, found 0\.9"):
        MMFTConfig("somewhere", use_cpu=True, weight_averaging=0.9)


def test_the_estimate_of_memory_counts_the_average(clip):
    from mmft_hf.model.memory import estimate_memory

    model, processor = clip
    set_towers(model, "full", "frozen")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain, averaging = (estimate_memory(model, processor, ["a text"], averaging=on) for on in (False, True))
    assert averaging.total(8) - plain.total(8) == 4 * trained


def test_a_save_within_training_has_the_average_and_nothing_beside(clip, tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                trainer.save_model(str(tmp_path / "saved"))

    steps = Steps()
    trainer = make_trainer(clip, tmp_path / "run", colour_dataset(8), evaluate=False, weight_averaging=DECAY)
    trainer.add_callback(steps)
    trainer.add_callback(Save())
    trainer.train()
    saved = tmp_path / "saved"
    assert difference(load_file(saved / "model.safetensors"), average(steps.weights[:3])) < 1e-6
    names = {"model.safetensors", "head.safetensors", "prototypes.safetensors"}
    assert {path.name for path in saved.glob("*.safetensors")} == names
    model, processor = load_model(str(saved))
    expected = ClassPrototypes.from_captions(model, processor, trainer.train_dataset).embeddings
    torch.testing.assert_close(ClassPrototypes.from_pretrained(saved).embeddings, expected, atol=1e-5, rtol=0)


def test_what_is_pushed_on_the_way_is_the_average_with_its_own_prototypes(clip, tmp_path):
    trainer, steps = make_trainer(clip, tmp_path / "run", num_train_epochs=1, weight_averaging=DECAY), Steps()
    trainer.add_callback(steps)
    trainer.args.push_to_hub = True  # from here on, so that no Hub is asked
    trainer._push_from_checkpoint = lambda folder: trainer._write_model(tmp_path / Path(folder).name)
    trainer.train()
    model, processor = load_model(str(tmp_path / "checkpoint-3"))
    assert difference(weights(model), average(steps.weights)) < 1e-6
    expected = ClassPrototypes.from_captions(model, processor, trainer.train_dataset).embeddings
    found = ClassPrototypes.from_pretrained(tmp_path / "checkpoint-3").embeddings
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
