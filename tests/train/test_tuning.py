"""`--tune`: the learning rate is searched on validation by successive halving, then the whole training runs with it."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
from processes import run_python
from safetensors.torch import load_file
from tiny_clip import colour_dataset, striped_dataset
from training import make_trainer

import mmft_hf
from mmft_hf import MMFTConfig
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.hub.cards import model_card
from mmft_hf.train import tuning
from mmft_hf.train.checkpoints import NotFinite

RATES = [1e-7, 3e-3, 1e3]  # far too small, fit for the tiny CLIP, far too large
SETTINGS = {"epochs": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
SETTINGS |= {"warmup_steps": 3, "head": "prototypes", "calibrate": False}
FAST = {"save_strategy": "no", "load_best_model_at_end": False}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9, 32])
@pytest.mark.parametrize("center", [1e-5, 1.234e-3])
def test_rates_are_evenly_spaced_around_the_given_one(count, center):
    found = tuning.rates(center, count)
    assert len(found) == count and center in found
    steps = [math.log10(b / a) for a, b in itertools.pairwise(found)]
    expected = 0.5 if count < 5 else 2 / (count - 1)
    assert steps == pytest.approx([expected] * (count - 1), abs=0.042)  # two digits of each rate
    assert math.log10(found[-1] / center) >= math.log10(center / found[0]) - 1e-9


@pytest.mark.parametrize("count", range(2, 33))
def test_a_search_takes_as_many_steps_as_the_training(count):
    rounds = tuning.rounds(count, 10_000)
    assert sum(n * steps for n, steps in rounds) == pytest.approx(10_000, rel=0.05)
    assert rounds[0][0] == count and rounds[-1][0] in (2, 3)
    for (n, steps), (fewer, more) in itertools.pairwise(rounds):
        assert (fewer, more) == (n // 2, 2 * steps)


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [
        (6, 160, [(6, 13), (3, 26)]),
        (6, 50, [(6, 10), (3, 20)]),  # at least ten steps each
        (6, 12, [(6, 6), (3, 12)]),  # but none longer than the training
        (8, 1, [(8, 1), (4, 2), (2, 4)]),
    ],
)
def test_candidates_of_short_trainings(count, steps, expected):
    assert tuning.rounds(count, steps) == expected


@pytest.mark.parametrize(
    ("images", "settings", "expected"),
    [
        (27, {"num_train_epochs": 2}, 8),
        (27, {"num_train_epochs": 2, "gradient_accumulation_steps": 3}, 4),
        (27, {"num_train_epochs": 0.5}, 2),
        (27, {"max_steps": 5}, 5),
        (30, {"num_train_epochs": 1, "class_balance": True}, 4),
    ],
)
def test_steps_are_those_of_the_trainer(clip, tmp_path, images, settings, expected):
    data = colour_dataset(10).select(range(images))
    trainer = make_trainer(clip, tmp_path, data, evaluate=False, **FAST | settings)
    assert tuning.training_steps(trainer.args, images) == expected
    trainer.train()
    assert trainer.state.max_steps == expected


# -- which rates go on --------------------------------------------------------------------------------------------------
class Told:
    """Builds trainers whose validation is as told, and remembers what was trained."""

    def __init__(self, value, metric="loss"):
        self.value, self.metric, self.trained, self.configs = value, metric, [], []

    def __call__(self, config):
        self.configs.append(config)
        return SimpleNamespace(train=lambda: self.train(config), evaluate=lambda: self.evaluate(config))

    def train(self, config):
        self.trained.append((config.learning_rate, config.max_steps))
        if self.value(config.learning_rate, config.max_steps) is None:
            raise NotFinite("the loss became nan")

    def evaluate(self, config):
        return {f"eval_{self.metric}": self.value(config.learning_rate, config.max_steps)}


def config(tmp_path, **settings):
    return MMFTConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 160, "tune": 6} | settings)


def test_the_better_half_goes_on_and_the_longest_training_decides(tmp_path, capsys):
    # After 13 steps 6.3e-5 is ahead, after 26 steps 2.5e-5.
    build = Told(lambda rate, steps: abs(math.log10(rate / (6.3e-5 if steps == 13 else 2.5e-5))))
    found = tuning.search(build, config(tmp_path, warmup_steps=16), 64)
    assert build.trained == [(r, 13) for r in (4e-6, 1e-5, 2.5e-5, 6.3e-5, 1.6e-4, 4e-4)] + [
        (r, 26) for r in (2.5e-5, 6.3e-5, 1.6e-4)
    ]
    assert found["learning_rate"] == 2.5e-5 and found["metric"] == "loss"
    assert [(row["learning_rate"], row["steps"]) for row in found["candidates"]] == build.trained
    assert all(row["value"] == build.value(row["learning_rate"], row["steps"]) for row in found["candidates"])
    short = build.configs[1]  # the first one is not trained
    assert (short.warmup_steps, short.eval_strategy, short.save_strategy, short.report_to) == (1, "no", "no", [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "learning rate 4e-06, 13 steps: validation loss 1.197" and len(lines) == 11
    assert lines[-2] == "Training with learning rate 2.5e-05."


def test_a_rate_without_a_finite_loss_loses_and_the_lower_of_equals_wins(tmp_path, capsys):
    build = Told(lambda rate, steps: None if rate > 3e-4 else 0.5, metric="accuracy")
    found = tuning.search(build, config(tmp_path, metric_for_best_model="eval_accuracy"), 64)
    assert found["learning_rate"] == 4e-6 and found["metric"] == "accuracy"
    assert found["candidates"][5] == {"learning_rate": 4e-4, "steps": 13, "value": None}
    out = capsys.readouterr().out
    assert "learning rate 0.0004, 13 steps: the loss is not finite\n" in out
    assert "learning rate 4e-06, 26 steps: validation accuracy 50.0 %\n" in out
    assert "the lowest of those tried: type --learning_rate 4e-06 to search around it" in out
    with pytest.raises(UserError, match="expected a learning rate at which the loss stays finite, found none of 6"):
        tuning.search(Told(lambda rate, steps: None), config(tmp_path), 64)


def test_one_rate_that_is_left_over_is_not_trained_again(tmp_path):
    build = Told(lambda rate, steps: None if rate != 1e-5 else 0.5)
    assert tuning.search(build, config(tmp_path), 64)["learning_rate"] == 1e-5
    assert len(build.trained) == 6


@pytest.mark.slow
def test_an_interrupted_search_goes_on(tmp_path):
    def value(rate, steps):
        return abs(math.log10(rate / 2e-5)) + 1 / steps

    whole, states = Told(value), []
    expected = tuning.search(whole, config(tmp_path), 64, keep=lambda found: states.append(copy.deepcopy(found)))
    assert len(states) == len(whole.trained) + 1 == 10
    for done, state in enumerate(states):
        rest = Told(value)
        assert tuning.search(rest, config(tmp_path), 64, json.loads(json.dumps(state))) == expected
        assert rest.trained == whole.trained[done + 1 :]
    assert not rest.configs  # a finished search builds nothing


# -- whole runs ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def images():
    return {name: colour_dataset(4, seed, name == "train") for seed, name in enumerate(("train", "validation", "test"))}


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr(tuning, "rates", lambda center, count: RATES)


@pytest.fixture(scope="module")
def tuned(images, clip_folder, tmp_path_factory):
    """A run with three rates, of which one is fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "rates", lambda center, count: RATES)
        return mmft_hf.finetune(images, clip_folder, tmp_path_factory.mktemp("tuned") / "out", tune=3, **SETTINGS)


def test_rates_far_too_small_and_far_too_large_lose(tuned):
    found = tuned.metrics["tuning"]
    assert found["learning_rate"] == 3e-3 and found["metric"] == "loss"
    assert [(row["learning_rate"], row["steps"]) for row in found["candidates"]] == [(rate, 6) for rate in RATES]
    record = json.loads((tuned.output_dir / "mmft.json").read_text())
    assert record["tuning"] == found == json.loads((tuned.output_dir / "all_results.json").read_text())["tuning"]
    assert record["identity"]["learning_rate"] == 1e-3 and record["identity"]["other_settings"]["tune"] == 3
    card = model_card(tuned.output_dir)
    assert "The learning rate, 0.003, was chosen by short trainings from the untuned weights" in card
    row = found["candidates"][0]
    assert f"| 1e-07 | 6 | {row['value']:.3f} |" in card


def test_a_candidate_is_a_short_training_of_its_own(tuned, images, clip, tmp_path):
    """What the search measured, a training of so many steps measures by itself."""
    short = {"per_device_train_batch_size": 8, "max_steps": 6, "warmup_steps": 3} | FAST
    trainer = make_trainer(clip, tmp_path, images["train"], learning_rate=3e-3, **short)
    trainer.eval_dataset = images["validation"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(tuned.metrics["tuning"]["candidates"][1]["value"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"vision_tower": "lora", "text_tower": "lora", "lora_dropout": 0.1},
        {"vision_tower": "head", "text_tower": "frozen"},
        {"weight_averaging": 0.9, "supcon_weight_end": 0.5, "crop_min_area": 1.0},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0},
        {"gradient_accumulation_steps": 2, "samples_per_class": 2},
        {"several": True},
    ],
    ids=str,
)
def test_the_training_is_that_of_the_rate_alone(images, clip_folder, tmp_path, more):
    """To the last bit: the search leaves neither weights nor random numbers behind."""
    settings, data = SETTINGS | more, images
    if settings.pop("several", False):
        settings |= {"head": "auto", "calibrate": True}
        data = {
            "train": striped_dataset(24, captions=True),
            "validation": striped_dataset(12, 1),
            "test": striped_dataset(12, 2),
        }
    searched = mmft_hf.finetune(data, clip_folder, tmp_path / "searched", tune=2, **settings)
    rate = searched.metrics["tuning"]["learning_rate"]
    alone = mmft_hf.finetune(data, clip_folder, tmp_path / "alone", **settings | {"learning_rate": rate})
    assert "tuning" not in alone.metrics
    one, other = (load_file(run.output_dir / "model.safetensors") for run in (searched, alone))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
def test_a_resume_does_not_search_again(planted, tuned, images, clip_folder, tmp_path, monkeypatch):
    measured, tried = tuning._measured, []

    def interrupted(build, config, rate, *rest):
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(rate)
        return measured(build, config, rate, *rest)

    def run(**more):
        return mmft_hf.finetune(images, clip_folder, tmp_path / "out", tune=3, **SETTINGS, **more)

    monkeypatch.setattr(tuning, "_measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    record = json.loads((tmp_path / "out" / "mmft.json").read_text())
    assert not record["completed"] and record["tuning"]["learning_rate"] is None
    assert record["tuning"]["candidates"] == tuned.metrics["tuning"]["candidates"][:2]

    damaged = copy.deepcopy(record)
    damaged["tuning"]["candidates"][1]["value"] = "good"
    (tmp_path / "out" / "mmft.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=r"mmft.json, field tuning.candidates\[1\].value: expected .*number.*'good'"):
        run(resume_from_checkpoint="true")
    (tmp_path / "out" / "mmft.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"other_settings was \{.*'tune': 3.*\}, now \{.*'tune': 4"):
        mmft_hf.finetune(images, clip_folder, tmp_path / "out", tune=4, **SETTINGS, resume_from_checkpoint="true")

    tried.clear()
    tried.append(None)  # one more is allowed
    resumed = run(resume_from_checkpoint="true")
    assert tried == [None, 1e3]
    assert resumed.metrics["tuning"] == tuned.metrics["tuning"]
    one, other = (load_file(run.output_dir / "model.safetensors") for run in (tuned, resumed))
    assert all(one[name].equal(other[name]) for name in one)
    started_again = json.loads((tmp_path / "out" / "mmft.json").read_text())
    assert started_again["completed"] and started_again["tuning"]["learning_rate"] == 3e-3


def test_the_plan_says_what_the_search_takes(clip_folder, data_folder, tmp_path, monkeypatch, capsys):
    class Enough(Exception):
        pass

    def stop(*args):
        raise Enough

    monkeypatch.setattr(tuning, "_measured", stop)
    words = f"--dataset_name {data_folder} --model_name_or_path {clip_folder} --output_dir {tmp_path / 'out'} --tune 4"
    words += " --max_steps 100 --use_cpu true --learning_rate 1e-4"
    assert main(["finetune", *words.split()]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  tuning"))
    assert line.split(maxsplit=1)[1] == (
        "learning rates from 3.2e-05 to 0.001 are tried first: trainings 4 of 12 steps, then 2 of 24 steps; 96 steps in all, "
        "96% of the training's 100"
    )


def test_refusals(clip_folder, data_folder, tmp_path, capsys, monkeypatch):
    def refused(verb, *words):
        assert main([verb, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", *words]) == 2
        return capsys.readouterr().err

    assert "--tune: expected 2 to 32, found 1" in refused("finetune", "--tune", "1")
    message = refused("finetune", "--tune", "3", "--num_train_epochs", "0")
    assert "--tune: expected nothing with --num_train_epochs 0, found 3" in message
    names = ("--dataset_name", str(data_folder), "--model_name_or_path", str(clip_folder))
    assert "--tune: expected nothing, found 3. Type --learning_rates" in refused("benchmark", "--tune", "3", *names)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "--tune: expected nothing under FSDP and DeepSpeed" in refused("finetune", "--tune", "3")


def test_what_the_training_would_refuse_is_refused_before_the_search(images, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_measured", lambda *args: pytest.fail("a candidate was trained"))
    with pytest.raises(UserError, match="foo is not supported"):
        mmft_hf.finetune(images, clip_folder, tmp_path / "out", tune=3, report_to="foo", **SETTINGS)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_find_what_one_finds(clip_folder, data_folder, tmp_path):
    def finetune(launcher: list[str], name: str, batch: int, **more) -> tuple[dict, dict]:
        settings = {
            "model_name_or_path": clip_folder,
            "dataset_name": data_folder,
            "output_dir": tmp_path / name,
            "per_device_train_batch_size": batch,
            "num_train_epochs": 2,
            "tune": 4,
            # Adam would blow the rounding of gradients that are zero (those of k_proj.bias) up to whole steps.
            "optim": "sgd",
            "learning_rate": 0.1,
            "use_cpu": "true",
            "load_best_model_at_end": "false",
        }
        words = [word for key, value in (settings | more).items() for word in (f"--{key}", str(value))]
        out, _ = run_python(["-m", *launcher, "mmft_hf", "finetune", *words])
        assert out.count("Training with learning rate") == 1
        found = json.loads((tmp_path / name / "all_results.json").read_text())["tuning"]
        return found, load_file(tmp_path / name / "model.safetensors")

    two_processes = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    one, alone = finetune([], "one", 8)
    two, together = finetune(two_processes, "two", 4)
    assert two["learning_rate"] == one["learning_rate"]
    assert [(r["learning_rate"], r["steps"]) for r in two["candidates"]] == [
        (r["learning_rate"], r["steps"]) for r in one["candidates"]
    ]
    values = [[row["value"] for row in found["candidates"]] for found in (one, two)]
    assert values[1] == pytest.approx(values[0], abs=1e-5)
    assert len(set(values[0])) == len(values[0])
    assert max((alone[name] - together[name]).abs().max().item() for name in alone) < 1e-5
    # Interrupted after the third candidate: each process takes up what the first one kept.
    record = json.loads((tmp_path / "two" / "mmft.json").read_text())
    kept = {"metric": "loss", "learning_rate": None, "candidates": two["candidates"][:3]}
    record = {key: record[key] for key in ("identity", "data", "mmft_hf")} | {"completed": False, "tuning": kept}
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "mmft.json").write_text(json.dumps(record))
    again, resumed = finetune(two_processes, "resumed", 4, resume_from_checkpoint="true")
    assert again == two
    assert all(together[name].equal(resumed[name]) for name in together)
