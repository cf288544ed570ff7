"""`--help` prints the settings in groups, ours first, and folds the stock settings of transformers."""

import importlib
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from mmft_hf.cli import VERBS, main
from mmft_hf.commands.parser import STOCK, build_parser


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_is_in_one_group(verb):
    parser = build_parser(verb)
    shown = [action.dest for actions in parser.groups.values() for action in actions]
    command = importlib.import_module(f"mmft_hf.commands.{verb}")
    settings = {field.name for kind in command.ARGUMENTS for field in fields(kind) if field.init}
    assert len(shown) == len(set(shown)) and settings <= set(shown)


@pytest.mark.parametrize("verb", ["finetune", "benchmark"])
def test_stock_settings_are_printed_only_with_all(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([verb, "--help"]) == 0
    short = capsys.readouterr().out
    assert main([verb, "--help", "all"]) == 0
    everything = capsys.readouterr().out
    stock = build_parser(verb).groups[STOCK]
    assert {action.dest for action in stock} < {field.name for field in fields(TrainingArguments)}
    assert not any(f"\n  --{action.dest} " in short for action in stock)
    assert all(f"\n  --{action.dest}" in everything for action in stock)
    assert f"{len(stock)} more; mmft-hf {verb} --help all" in short and "--help all prints" not in everything
    order = [
        short.index(f"\n{title}:\n") for title in ("model", "data", "method", "classifier", "training", "output", STOCK)
    ]
    assert order == sorted(order)
    assert max(map(len, (short + everything).splitlines())) <= 100
    assert "--load_best_model_at_end [true|false]" in short and "None" not in short


def test_help_of_a_stock_setting_is_ours():
    (seed,) = (action for action in build_parser("finetune").groups["training"] if action.dest == "seed")
    assert seed.help == "Seed of everything random in training."
