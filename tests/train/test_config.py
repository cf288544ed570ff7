"""The settings of training: their metadata, what is refused, and what a resume compares."""

from dataclasses import dataclass, fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from mmft_hf import MMFTConfig
from mmft_hf.core.arguments import Range, setting
from mmft_hf.core.errors import UserError
from mmft_hf.train.config import HARMLESS

STOCK = {field.name for field in fields(TrainingArguments)}


def test_the_stock_argument_parser_reads_the_settings():
    (config,) = HfArgumentParser(MMFTConfig).parse_args_into_dataclasses(
        ["--supcon_weight", "0.3", "--use_cpu", "true"]
    )
    assert config.supcon_weight == 0.3


@pytest.mark.parametrize(
    ("allowed", "text", "inside", "outside"),
    [
        (Range(0, 1), "0 to 1", (0, 0.5, 1), (-0.1, 1.1, float("nan"))),
        (Range(2), "2 or more", (2, 3), (1, 1.9)),
        (Range(0, open=("low", "high")), "above 0", (1e-9,), (0, float("inf"))),
        (Range(0, 1, ("high",)), "0 to below 1", (0, 0.9), (1,)),
        (Range(0, 1, ("low",)), "above 0 to 1", (0.1, 1), (0,)),
    ],
)
def test_ranges(allowed, text, inside, outside):
    assert str(allowed) == text
    assert all(value in allowed for value in inside) and not any(value in allowed for value in outside)


def test_every_range_and_choice_is_checked():
    ranged = [field for field in fields(MMFTConfig) if "range" in field.metadata]
    assert len(ranged) >= 15
    for field in ranged:
        below = field.metadata["range"].low - 1
        with pytest.raises(UserError, match=rf"^{field.name}: expected {field.metadata['range']}, found {below}"):
            MMFTConfig("somewhere", use_cpu=True, **{field.name: below})
    for name in ("prototypes", "on_bad_image"):
        with pytest.raises(UserError, match=f"{name}: expected one of .*, found 'x'"):
            MMFTConfig("somewhere", use_cpu=True, **{name: "x"})


# -- what a resume compares --------------------------------------------------------------------------------------------
def test_stock_settings_that_are_declared_harmless_exist_and_none_of_them_moves_a_weight():
    older = {"logging_dir", "include_inputs_for_metrics", "include_tokens_per_second", "_n_gpu", "push_to_hub_model_id"}
    older |= {"push_to_hub_organization", "push_to_hub_token"}
    assert HARMLESS - older <= STOCK
    moves = "seed data_seed learning_rate optim optim_args weight_decay max_steps num_train_epochs bf16 fp16 tf32 "
    moves += (
        "lr_scheduler_type lr_scheduler_kwargs warmup_steps eval_steps save_steps metric_for_best_model fsdp deepspeed"
    )
    assert all(MMFTConfig.decides(name) for name in moves.split())
    assert not any(MMFTConfig.decides(name) for name in ("output_dir", "hub_token", "logging_steps", "loss_chunk_size"))


def test_a_setting_of_our_own_decides_unless_it_says_otherwise():
    own = {field.name for field in fields(MMFTConfig)} - STOCK
    assert {name for name in own if not MMFTConfig.decides(name)} == {
        "overwrite_output_dir",
        "loss_chunk_size",
        "cache_frozen_features",
        # What is fitted after the training, to the same weights.
        "head",
        "head_alphas",
        "calibrate",
        "reject_below",
        "reject_for_accuracy",
        "threshold",
    }


def test_a_stock_setting_that_nobody_knows_yet_decides():
    @dataclass
    class Later(MMFTConfig):
        logging_of_a_new_kind: bool = False
        ours: int = setting(1, "Nothing.", decides=False)

    assert Later.decides("logging_of_a_new_kind") and not Later.decides("ours")
