"""Budgets: what each training gets, what is refused, and that unequal ones give no verdict."""

import dataclasses

import numpy as np
import pytest
from benchmark_tools import command
from tiny_clip import colour_dataset

from mmft_hf import MMFTConfig, MMFTTrainer
from mmft_hf.benchmark.report.statistics import compare, gather
from mmft_hf.benchmark.report.verdict import verdict
from mmft_hf.benchmark.run import budgets, trainings
from mmft_hf.benchmark.run.arguments import BenchmarkArguments
from mmft_hf.benchmark.run.context import Context
from mmft_hf.benchmark.run.methods import METHODS, fit
from mmft_hf.benchmark.run.protocol import Task
from mmft_hf.benchmark.run.results import RESULTS_FILE, read_results
from mmft_hf.benchmark.run.trainings import settings_for
from mmft_hf.benchmark.run.workflow import check_budget, check_recipes
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError


@pytest.fixture
def task():
    """Four pictures of each of three classes."""
    train, validation = colour_dataset(4, seed=1), colour_dataset(3, seed=2)
    return Task(train, validation, train.features["label"].names, shots=4, seed=0, policy="val-k")


@pytest.fixture
def context(clip_folder, tmp_path):
    return Context(str(clip_folder), None, MMFTConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=5))


def given(context, task, name, shots, budget, rate=1e-3) -> dict:
    """The settings of the training of a method."""
    context.budget = budget
    task, recipe = dataclasses.replace(task, shots=shots), METHODS[name].training.recipe
    return settings_for(context, task, rate, "out", recipe, supcon_weight=0.3).to_dict()


# -- what each training gets ---------------------------------------------------------------------------------------------
def test_under_equal_budgets_every_method_has_the_settings_of_the_benchmark(context, task):
    for shots in (4, "full"):
        found = [given(context, task, name, shots, "equal") for name in ("mmft", "clip-lora", "ce", "lp-ft")]
        assert all(settings == found[0] for settings in found)
        assert found[0]["learning_rate"] == 1e-3 and found[0]["max_steps"] == -1
        assert found[0]["eval_strategy"] == ("epoch" if shots == "full" else "no")


NAMES = "max_steps num_train_epochs per_device_train_batch_size learning_rate weight_decay warmup_steps crop_min_area".split()


@pytest.mark.parametrize(
    ("name", "shots", "expected", "validated"),
    [
        ("mmft", 4, (-1, 50, 64, 1e-5, 1e-4, 0, 0.9), False),
        ("mmft-no-captions", "full", (-1, 50, 64, 1e-5, 1e-4, 0, 0.9), True),
        ("flyp", 4, (-1, 20, 256, 1e-5, 0.2, 0, 0.9), False),
        ("flyp-ens", "full", (-1, 100, 256, 1e-5, 0.0, 500, 0.9), True),
        ("ce", "full", (-1, 10, 512, 3e-5, 0.1, 500, 0.9), True),
        ("ce-frozen", "full", (4000, 1, 32, 1e-5, 0.0, 0, 0.9), False),
        ("clip-lora", 4, (2000, 1, 32, 2e-4, 1e-2, 0, 0.08), False),
        ("clip-lora", 16, (8000, 1, 32, 2e-4, 1e-2, 0, 0.08), False),
        ("2sfs", 4, (1200, 1, 32, 2e-4, 1e-2, 0, 0.9), False),
        ("2sfs-cap", 16, (4800, 1, 32, 2e-4, 1e-2, 0, 0.9), False),
    ],
)
def test_under_their_own_budgets_methods_train_as_their_authors_do(context, task, name, shots, expected, validated):
    found = given(context, task, name, shots, "authors")
    assert tuple(found[key] for key in NAMES) == expected
    assert (found["eval_strategy"] != "no") == found["load_best_model_at_end"] == validated
    assert found["supcon_weight"] == 0.3  # what makes the method is its own
    if name == "clip-lora":
        assert found["lr_scheduler_kwargs"] == {"min_lr": 1e-6} and found["horizontal_flip"]


def test_long_trainings_take_300_steps_for_each_image_of_a_class(context, task):
    assert given(context, task, "mmft", 4, "long")["max_steps"] == 1200
    found = given(context, task, "clip-lora", "full", "long")
    assert found["max_steps"] == 300 * 4  # 12 images of 3 classes
    # Validation looks at it as often as at 50 epochs, not in each of its 400 epochs of three steps.
    assert (found["eval_strategy"], found["eval_steps"], found["save_steps"]) == ("steps", 24, 24)
    uneven = dataclasses.replace(task, train=task.train.select(range(10)))
    assert given(context, uneven, "mmft", "full", "long")["max_steps"] == 300 * 4
    config = MMFTConfig("out", use_cpu=True, learning_rate=2e-5)
    for budget, rates in (("long", (2e-5, 2e-4)), ("equal", (2e-5,))):
        assert Context(context.model.name_or_path, None, config, budget=budget).learning_rates == pytest.approx(rates)


def test_the_low_rank_matrices_of_the_authors_have_their_factor_and_their_rate(context, task, monkeypatch):
    seen = []

    def clip_lora(model, processor, config, train, validation, alpha):
        seen.append((alpha / trainings.RANK, config.learning_rate, config.max_steps, validation))
        return 7

    monkeypatch.setattr(trainings, "clip_lora", clip_lora)
    for context.budget in ("equal", "authors"):
        fit(METHODS["clip-lora"], context, task)
    assert seen[0] == (0.5, 1e-4, -1, None)  # ten times the rate of the benchmark
    assert seen[1] == (pytest.approx(1 / np.sqrt(2)), 2e-4, 2000, None)


def watched_rates(monkeypatch) -> list[float]:
    """The rates of the steps to come."""
    rates, compute_loss = [], MMFTTrainer.compute_loss

    def watched(self, *args, **kwargs):
        rates.append(self.lr_scheduler.get_last_lr()[0])
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(MMFTTrainer, "compute_loss", watched)
    return rates


def test_the_rate_of_2sfs_falls_in_each_of_its_stages(context, task, monkeypatch):
    monkeypatch.setattr(trainings, "TWO_STAGE_RECIPE", dataclasses.replace(budgets.TWO_STAGE_RECIPE, steps_per_shot=2))
    rates = watched_rates(monkeypatch)
    context.budget = "authors"
    found = fit(METHODS["2sfs"], context, task)
    assert (found.steps, found.images, found.tried, found.policy) == (8, 8 * 12, 1, "last")
    expected = [1e-6 + (2e-4 - 1e-6) * (1 + np.cos(np.pi * step / n)) / 2 for n in (5, 3) for step in range(n)]
    assert rates == pytest.approx(expected, rel=1e-6)
    rates.clear()
    context.budget, context.config.max_steps = "equal", 5
    fit(METHODS["2sfs"], context, task)
    assert [rates[0], rates[3]] == pytest.approx([1e-4, 1e-4])  # ten times the rate of the benchmark


def test_the_rate_of_clip_lora_falls_to_that_of_its_authors(context, task, monkeypatch):
    monkeypatch.setattr(trainings, "CLIP_LORA_RECIPE", dataclasses.replace(budgets.CLIP_LORA_RECIPE, steps_per_shot=2))
    rates = watched_rates(monkeypatch)
    context.budget = "authors"
    found = fit(METHODS["clip-lora"], context, task)
    assert (found.steps, found.images, found.tried, found.policy) == (8, 8 * 12, 1, "last")
    expected = [1e-6 + (2e-4 - 1e-6) * (1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batch", "steps", "whole"), [(5, 4, [5, 5, 2, 5]), (5, 6, [5, 5, 2] * 2), (12, 2, [12, 12])])
def test_images_seen_are_those_that_were_seen(context, task, monkeypatch, batch, steps, whole):
    context.config.per_device_train_batch_size, context.config.max_steps = batch, steps
    seen, compute_loss = [], MMFTTrainer.compute_loss

    def counted(self, model, inputs, *args, **kwargs):
        seen.append(len(inputs["labels"]))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MMFTTrainer, "compute_loss", counted)
    found = fit(METHODS["mmft"], context, task)
    assert seen == whole and (found.steps, found.images) == (steps, sum(whole))


# -- what is refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("budget", "typed", "settings", "told"),
    [
        ("authors", {}, {"learning_rate": 1e-3}, "learning_rate: expected nothing, found 0.001, with budget authors"),
        ("authors", {}, {"horizontal_flip": True}, "horizontal_flip: expected nothing, found True"),
        ("authors", {"learning_rates": [1e-3, 1e-4]}, {}, "learning_rates: expected nothing"),
        ("long", {}, {"num_train_epochs": 3}, "num_train_epochs: expected nothing, found 3"),
        ("long", {"min_steps": 9}, {}, "min_steps: expected 0, found 9"),
        ("long", {"learning_rates": [1e-3]}, {}, "learning_rates: expected two numbers with budget long"),
    ],
)
def test_settings_that_a_budget_decides_are_refused(budget, typed, settings, told):
    config = MMFTConfig("out", use_cpu=True, **settings)
    with pytest.raises(UserError, match=told):
        check_budget(BenchmarkArguments(budget=budget, **typed), config)
    check_budget(BenchmarkArguments(**typed), config)
    check_budget(BenchmarkArguments(budget=budget), MMFTConfig("out", use_cpu=True))


LABELS = np.repeat([0, 1, 2], [30, 8, 4])


@pytest.mark.parametrize(
    ("name", "shots", "told"),
    [
        ("mmft-lora", 4, r"mmft-lora \(a variant of our own"),
        ("lp-ft+wise", "full", r"lp-ft\+wise \(a variant of our own"),
        ("ce", 4, r"ce with 4 shots \(its authors say nothing of training with a few shots\)"),
        ("clip-lora", "full", r"clip-lora with all images \(its authors say nothing of training with all images\)"),
        (
            "flyp",
            "full",
            r"flyp with all images \(its authors warm up for 500 steps, and 42 images would be trained on for 100 steps",
        ),
    ],
)
def test_methods_whose_authors_say_nothing_are_refused(name, shots, told):
    with pytest.raises(
        UserError, match=f"budget authors: expected methods whose authors say .*{told}.* or type budget equal"
    ):
        check_recipes("authors", ["lp", name], [0, shots], LABELS)
    check_recipes("long", [name], [shots], LABELS)
    check_recipes(
        "authors", ["zs", "gda", "zs-no-captions+auto", "mmft", "mmft+auto", "mmft-w1"], [0, 1, "full"], LABELS
    )
    check_recipes("authors", ["flyp", "clip-lora+wise"], [1, 4], LABELS)


# -- results -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_long_benchmark_says_what_it_took_and_is_not_continued_with_another_budget(
    clip_folder, data_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(budgets, "LONG_STEPS", 3)
    words = command(clip_folder, data_folder, tmp_path / "out")
    del words[words.index("--max_steps") : words.index("--max_steps") + 2]
    words += ["--methods", "mmft", "mmft-no-captions", "lp", "--shots", "2", "--seeds", "0"]
    assert main([*words, "--budget", "authors"]) == 2
    told = "--per_device_train_batch_size: expected nothing, found 6, with --budget authors, which decides it"
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--budget", "long"]) == 0
    assert "  budget   long" in capsys.readouterr().out
    rows = {row["method"]: row for row in read_results(tmp_path / "out" / RESULTS_FILE)}
    for name in ("mmft", "mmft-no-captions"):
        assert (rows[name]["steps"], rows[name]["images_seen"], rows[name]["tried"]) == (
            6,
            36,
            2,
        )  # batches of 6 images
        assert rows[name]["chosen"]["learning_rate"] in (1e-3, 1e-2)
    assert rows["lp"]["steps"] is rows["lp"]["images_seen"] is None
    settings = rows["lp"]["identity"]["settings"]
    assert settings["budget"] == "long" and "num_train_epochs" not in settings  # which has no effect
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "Long budget: " in page
        and "6 steps</small>" in page
        and "36 images</small>" in page
        and "2 rates</small>" in page
    )
    assert "--budget long" in page
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "expected results of the same settings" in said and "budget long there, equal here" in said


def rows_of(accuracies: dict[str, float], **more) -> list[dict]:
    return [
        {"method": name, "shots": 4, "seed": seed, "status": "done", "selection_policy": "last", "test_images": 200}
        | {"test_accuracy": value + 0.01 * seed + 0.001 * seed * i, "identity": {}, "tried": 1}
        | more.get(name.replace("-", "_"), {})
        for i, (name, value) in enumerate(accuracies.items())
        for seed in (0, 1, 2)
    ]


SAME = {"steps": 10, "images_seen": 640}


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (SAME, True),
        (SAME | {"images_seen": 620}, True),  # short steps
        (SAME | {"images_seen": 600}, False),
        (SAME | {"steps": 20}, True),  # in smaller batches
        (SAME | {"tried": 2}, False),
        ({"steps": 10}, True),  # of an older version
        ({"steps": 11}, False),
        ({"steps": None, "tried": 96}, True),  # frozen features
    ],
)
def test_an_unequal_budget_gives_no_verdict(tmp_path, other, equal):
    rows = rows_of({"mmft": 0.8, "mmft-no-captions": 0.6}, mmft=SAME, mmft_no_captions=other)
    results = gather(rows, tmp_path)
    found = compare(results, "mmft", "mmft-no-captions", 4)
    assert found.verdict == ("better" if equal else "not at equal budget")
    headline, *_ = verdict(results)
    with_4 = "with 4 shots, "
    assert headline == (
        f"{with_4}captions helped."
        if equal
        else f"{with_4}the budgets are not equal, which leaves it open whether captions helped."
    ).replace("with", "With", 1)
