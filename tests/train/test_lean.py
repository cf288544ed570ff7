"""What a step, an epoch and a start do not do."""

import os
import sys

import pytest
import torch
from tiny_clip import colour_dataset, colour_images
from training import make_trainer
from transformers import TrainerCallback

from mmft_hf import MMFTConfig, MMFTTrainer, set_towers
from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data.splits import load_splits


class EveryEpoch(TrainerCallback):
    """Calls a function at the end of every epoch."""

    def __init__(self, function):
        self.function = function

    def on_epoch_end(self, args, state, control, **kwargs):
        self.function(kwargs)


def texts_seen(model) -> list[tuple[int, int]]:
    """Shapes of all that the text tower is given from now on."""
    seen = []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape)),
        with_kwargs=True,
    )
    return seen


def test_a_text_is_encoded_once_in_a_batch_and_padded_to_the_longest(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, colour_dataset(8, captions=False), False, num_train_epochs=1)
    seen = texts_seen(clip[0])
    trainer.train()
    longest = len(trainer.processing_class.tokenizer("a photo of a green thing.")["input_ids"])
    assert len(seen) == 3  # steps
    assert all(rows <= 3 and tokens <= longest < 77 for rows, tokens in seen)


@pytest.mark.slow
def test_prototypes_are_built_when_the_text_tower_changed_and_only_then(clip, _clip, tmp_path, monkeypatch):
    import copy

    calls = []
    build = MMFTTrainer.build_prototypes
    monkeypatch.setattr(MMFTTrainer, "build_prototypes", lambda self: calls.append(1) or build(self))
    trainer = make_trainer(clip, tmp_path / "full", num_train_epochs=3)
    trainer.train()  # epochs 0 to 3
    assert len(calls) == 4
    trainer.evaluate()  # other weights: those of the best epoch
    trainer.evaluate()
    assert len(calls) == 5

    calls.clear()
    frozen = (copy.deepcopy(_clip[0]), _clip[1])
    set_towers(frozen[0], "full", "frozen")
    trainer = make_trainer(frozen, tmp_path / "frozen", num_train_epochs=3, load_best_model_at_end=False)
    trainer.train()
    assert len(calls) == 1
    # The logit scale is trained all the same.
    assert trainer.prototypes.logit_scale == pytest.approx(frozen[0].logit_scale.exp().item())
    assert trainer.prototypes.logit_scale != pytest.approx(_clip[0].logit_scale.exp().item(), abs=1e-5)


@pytest.mark.slow
def test_kept_prototypes_are_those_of_the_weights(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, num_train_epochs=2, learning_rate=3e-3)
    trainer.train()
    trainer.evaluate()
    torch.testing.assert_close(trainer.prototypes.embeddings, trainer.build_prototypes().embeddings, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_workers_live_through_all_epochs(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, num_train_epochs=3, dataloader_num_workers=1)
    assert trainer.args.dataloader_persistent_workers
    pids = []
    trainer.add_callback(
        EveryEpoch(lambda kwargs: pids.append([w.pid for w in kwargs["train_dataloader"]._iterator._workers]))
    )
    trainer.train()
    assert len(pids) == 3 and len(pids[0]) == 1
    assert pids[0] == pids[1] == pids[2]


@pytest.mark.slow
def test_a_step_waits_for_no_number(clip, tmp_path, monkeypatch):
    """On an accelerator each of these calls would wait until it has computed all that is in its queue."""
    trainer = make_trainer(clip, tmp_path, evaluate=False, num_train_epochs=1, max_grad_norm=1.0)
    calls = []
    compute_loss = trainer.compute_loss

    def watched(*args, **kwargs):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
                patch.setattr(torch.Tensor, name, lambda self, *a, name=name, **k: calls.append(name) or True)
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert trainer.state.global_step == 3 and calls == []


def test_a_loss_that_was_not_looked_at_is_looked_at_before_a_checkpoint(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path)
    trainer._unseen_losses = [(1, torch.tensor(1.0), None), (2, torch.tensor(float("nan")), None)]
    trainer._expect_finite_losses(1)  # the last one may still be computed
    with pytest.raises(UserError, match="the loss became nan at step 2"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_start_up_opens_no_image_file(clip, tmp_path):
    for i, (image, label) in enumerate(colour_images(4)):
        folder = tmp_path / "data" / ("train" if i < 8 else "test") / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    opened, watched = [], [True]

    def hook(event, args):  # stays until the process ends
        if watched and event == "open":
            opened.append(str(args[0]))

    def pictures() -> int:
        return sum(name.endswith(".png") for name in opened)

    sys.addaudithook(hook)
    splits = load_splits(DataArguments(dataset_name=str(tmp_path / "data")))
    args = MMFTConfig(str(tmp_path / "out"), use_cpu=True, per_device_train_batch_size=4)
    trainer = MMFTTrainer(clip[0], args, splits.train, splits.validation, clip[1])
    loader = trainer.get_train_dataloader()
    assert pictures() == 0
    next(iter(loader))
    watched.clear()
    assert pictures() >= 4  # the hook does see them


def test_defaults_of_speed_on_a_cpu(monkeypatch):
    args = MMFTConfig(use_cpu=True)
    assert (args.bf16, args.dataloader_num_workers, args.dataloader_persistent_workers) == (False, 0, False)
    assert args.ddp_find_unused_parameters is False
    assert args.optim == "adamw_torch_fused"


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_batches_cut_by_accelerate_are_refused(name):
    with pytest.raises(UserError, match=f"accelerator_config: expected {name} false"):
        MMFTConfig(accelerator_config={name: True})


def test_compiled_training_has_one_shape(clip, tmp_path, monkeypatch):
    """Every batch of a run that is compiled, also the last one of 2 images, has the shapes of the first."""
    data = colour_dataset(6)  # 18 images in batches of 8
    trainer = make_trainer(clip, tmp_path, data, False, num_train_epochs=2, torch_compile=False)
    trainer.args.torch_compile = True
    trainer.data_collator.pad_to_limit, trainer.data_collator.distinct_texts = True, False
    shapes = {tuple(sorted((k, tuple(v.shape)) for k, v in batch.items())) for batch in trainer.get_train_dataloader()}
    assert len(shapes) == 1 and "text_rows" not in dict(next(iter(shapes)))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MMFT_TEST_COMPILE"), reason="compiles for a minute: MMFT_TEST_COMPILE=1")
def test_compiled_training_is_the_same_training(clip, _clip, tmp_path):
    import copy

    data = colour_dataset(6)
    settings = {"optim": "sgd", "learning_rate": 0.1}
    plain = make_trainer((copy.deepcopy(_clip[0]), _clip[1]), tmp_path / "plain", data, False, **settings)
    plain.train()
    compiled = make_trainer(clip, tmp_path / "compiled", data, False, torch_compile=True, **settings)
    compiled.train()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(clip[0].state_dict()[name], value, atol=1e-5, rtol=0)
