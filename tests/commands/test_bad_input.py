"""What the command line says, and which exit code it gives, when something is not as it should be."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from data_tools import png_of_size, save_pictures, with_bad_picture, with_column, write_csv, write_jsonl
from datasets import ClassLabel, Features, Image
from huggingface_hub import constants
from processes import run_python
from tiny_clip import COLOURS, colour_dataset, colour_images
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

import mmft_hf
from mmft_hf import MMFTConfig, MMFTTrainer, load_model
from mmft_hf.cli import VERBS, main
from mmft_hf.core.errors import UserError
from mmft_hf.data import images
from mmft_hf.model.loading import encode_images

NAMES = list(COLOURS)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No bars on stderr, and an empty working folder."""
    monkeypatch.setattr(datasets.utils.tqdm, "__init__", _without_bar(datasets.utils.tqdm.__init__))
    monkeypatch.chdir(tmp_path)


def _without_bar(init):
    def quiet_init(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "disable": True})

    return quiet_init


@pytest.fixture
def fails(capsys):
    """Runs a command and checks that it ends with `code` and one message that holds all `words`."""

    def check(argv, *words, code=2):
        result = main([str(word) for word in argv])
        err = capsys.readouterr().err
        assert result == code, err
        assert "Traceback" not in err and "bug in mmft_hf" not in err
        assert err.count("mmft-hf: ") == 1
        message = err[err.index("mmft-hf: ") :]
        for word in words:
            assert word in message
        return message

    return check


@pytest.fixture
def succeeds(capsys):
    def check(argv):
        result = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert result == 0, err
        return out, err

    return check


@pytest.fixture
def finetune(clip_folder, data_folder, tmp_path):
    """The command line of a run of one step; later settings win."""

    def command(*more, data=data_folder):
        return [
            *("finetune", "--model_name_or_path", clip_folder, "--dataset_name", data),
            *("--output_dir", tmp_path / "out", "--max_steps", 1, "--disable_tqdm", "true", "--use_cpu", "true"),
            *more,
        ]

    return command


@pytest.fixture(scope="module")
def trained(clip_folder, data_folder, tmp_path_factory):
    """A finished run of one step."""
    folder = tmp_path_factory.mktemp("run") / "out"
    settings = {"model_name_or_path": clip_folder, "dataset_name": data_folder, "output_dir": folder, "max_steps": 1}
    settings |= {"disable_tqdm": "true", "use_cpu": "true"}
    assert main(["finetune", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]) == 0
    return folder


@pytest.fixture
def data_with(tmp_path):
    """Saves a folder of three splits in which some are replaced."""

    def save(**replaced):
        folder = tmp_path / "data"
        folder.mkdir()
        for seed, split in enumerate(("train", "validation", "test")):
            replaced.get(split, colour_dataset(3, seed)).to_parquet(folder / f"{split}.parquet")
        return folder

    return save


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- the command line -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mmft-hf {verb}") and "--config" in out


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["mmft_hf", mmft_hf.__version__]


def test_no_verb_prints_help(capsys):
    assert main([]) == 2
    assert "usage: mmft-hf VERB" in capsys.readouterr().out


def test_help_imports_no_torch():
    code = (
        "import sys; from mmft_hf.cli import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_unknown_verb(fails):
    fails(["fine-tune"], "'fine-tune'", "Did you mean 'finetune'?")


def test_unknown_flag(fails):
    fails(["finetune", "--lerning_rate", "1"], "unknown setting --lerning_rate", "Did you mean 'learning_rate'?")


def test_abbreviated_flag_is_unknown(fails):
    fails(["finetune", "--learning", "1"], "unknown setting --learning", "learning_rate")


def test_word_without_a_flag(fails):
    fails(["finetune", "emoji"], "unexpected word 'emoji'", "--key value")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning_rate", "fast"),
        ("--seed", "1.5"),
        ("--overwrite_output_dir", "perhaps"),
        ("--eval_strategy", "sometimes"),
        ("--save_strategy", "rarely"),
        ("--logging_strategy", "much"),
        ("--lr_scheduler_type", "zigzag"),
        ("--vision_tower", "half"),
        ("--prototypes", "words"),
        ("--on_bad_image", "cry"),
    ],
)
def test_value_of_the_wrong_kind(flag, value, fails, finetune):
    fails(finetune(flag, value), flag.lstrip("-"), value)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--supcon_weight", "1.5", "expected 0 to 1, found 1.5"),
        ("--crop_min_area", "0", "expected above 0 to 1, found 0.0"),
        ("--seed", "-1", "0 to 4294967295"),
        ("--seed", "1099511627776", "0 to 4294967295"),
        ("--per_device_train_batch_size", "0", "1 or more"),
        ("--per_device_eval_batch_size", "-1", "1 or more"),
        ("--gradient_accumulation_steps", "0", "1 or more"),
        ("--dataloader_num_workers", "-1", "0 to 1024"),
        ("--dataloader_num_workers", "9999", "0 to 1024"),
        ("--learning_rate", "-1", "above 0"),
        ("--learning_rate", "nan", "above 0"),
        ("--weight_decay", "-1", "0 or more"),
        ("--max_steps", "0", "more than 0"),
        ("--label_smoothing_factor", "0.3", "0.0"),
        ("--prediction_loss_only", "true", "False"),
        ("--shots", "0", "1 or more"),
        ("--test_size", "1", "between 0 and 1"),
        ("--dataloader_drop_last", "true", "expected False"),
        ("--eval_do_concat_batches", "false", "expected True"),
        ("--eval_accumulation_steps", "0", "1 or more"),
        ("--data_seed", "-1", "0 or more"),
        ("--class_template", "a photo.", "{} once"),
        ("--class_template", "a {} of a {}.", "{} once"),
    ],
)
def test_value_outside_its_range(flag, value, expected, fails, finetune):
    message = fails(finetune(flag, value), flag.lstrip("-"), expected, "expected", "found")
    assert value in message or value.capitalize() in message or str(float(value)) in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--lr_scheduler_kwargs", '{"nosuch": 1}'), ("lr_scheduler_kwargs", "unexpected keyword argument 'nosuch'")),
        (("--lr_scheduler_kwargs", '{"num_cycles": "x"}'), ("lr_scheduler_kwargs", "'x'")),
        (("--lr_scheduler_kwargs", ""), ("lr_scheduler_kwargs", "expected an object")),
        (("--lr_scheduler_type", "warmup_stable_decay"), ("lr_scheduler_type warmup_stable_decay", "num_decay_steps")),
        (("--lr_scheduler_type", "cosine_with_min_lr"), ("lr_scheduler_type cosine_with_min_lr", "min_lr_rate")),
        (("--warmup_steps", "nan"), ("warmup_steps", "found nan")),
        (("--warmup_steps", "inf"), ("warmup_steps", "found inf")),
        (("--optim_args", "nosuch"), ("optim_args nosuch", "unpack")),
        (("--optim_args", "nosuch=1"), ("optim_args nosuch=1", "this optimizer ignores")),
        (("--optim", "rmsprop", "--optim_args", "momentum=x"), ("optim rmsprop with --optim_args momentum=x", "'x'")),
        (("--optim", "adamw_torch_npu_fused"), ("optim adamw_torch_npu_fused", "torch_npu")),
        (("--optim", "lomo"), ("optim lomo", "lomo_optim")),
        (("--adam_beta1", "2"), ("optim adamw", "beta")),
        (
            ("--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"nosuch": 1}'),
            ("gradient_checkpointing_kwargs", "'nosuch'"),
        ),
        (
            ("--per_device_train_batch_size", str(10**20)),
            ("per_device_train_batch_size", "at most 1,000,000,000,000,000"),
        ),
        (("--max_steps", str(10**20)), ("max_steps", "at most")),
        (("--output_dir", ""), ("output_dir", "a path in UTF-8")),
        (("--output_dir", "\udcff"), ("output_dir", "a path in UTF-8")),
    ],
)
def test_settings_that_would_fail_in_the_middle_of_a_run(settings, words, fails, finetune, tmp_path):
    fails(finetune(*settings, "--dataset_name", tmp_path / "not read"), *words)


@pytest.mark.parametrize("flag", ["--accelerator_config", "--fsdp_config", "--deepspeed"])
@pytest.mark.parametrize(
    ("text", "found"), [("[" * 100_000, "damaged"), ("[1]", "found a list"), ("{", "damaged"), ("\xff", "damaged")]
)
def test_a_file_of_settings_that_holds_none(flag, text, found, fails, finetune, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    fails(finetune(flag, tmp_path / "a.json"), f"{flag} {tmp_path / 'a.json'}: expected", found)


def test_endless_training(fails, finetune):
    fails(finetune("--max_steps", "-1", "--num_train_epochs", "inf"), "num_train_epochs", "1,000,000", "inf")


def test_settings_that_contradict_each_other(fails, finetune):
    fails(finetune("--save_strategy", "no"), "load_best_model_at_end")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--metric_for_best_model", "acc"),
        ("--metric_for_best_model", ""),
        ("--lr_scheduler_kwargs", "[1]"),
        ("--gradient_checkpointing_kwargs", "5"),
        ("--accelerator_config", "no such file"),
        ("--accelerator_config", '{"nope": 1}'),
        ("--report_to", "foo"),
        ("--report_to", "comet_ml"),  # which is not installed here
        ("--neftune_noise_alpha", "5"),
        ("--push_to_hub", "true"),
    ],
)
def test_settings_that_cannot_work_stop_before_the_training(flag, value, fails, finetune, tmp_path):
    fails(finetune(flag, value, "--resume_from_checkpoint", "true"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_steps_that_could_not_be_restored(fails, finetune):
    steps = ("--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 4)
    fails(finetune(*steps), "--save_steps and --eval_steps", "found 4 and 2")


def test_config_file_is_missing(fails):
    fails(["finetune", "--config", "nowhere.yaml"], "--config nowhere.yaml", "no such file")
    fails(["finetune", "--config"], "--config", "expected the name of a YAML file")


def test_unknown_key_of_a_config_file(fails, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\nsupcon_wieght: 0.1\n")
    fails(["finetune", "--config", path], str(path), "'supcon_wieght'", "Did you mean 'supcon_weight'?")


@pytest.mark.parametrize("key", ["config", "help"])
def test_flags_that_are_no_settings_are_no_keys(key, fails, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"{key}: a.yaml\n")
    fails(["finetune", "--config", path], f"unknown key '{key}'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- seed\n- 1\n", "`key: value`"), ("seed: [1\n", "expected YAML"), ("learning_rate: fast\n", "learning_rate")],
)
def test_config_file_that_is_no_list_of_settings(text, expected, fails, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    fails(["finetune", "--config", path], expected)


def test_config_file_that_is_no_text(fails, tmp_path):
    path = tmp_path / "a.yaml"
    colour_images(1)[0][0].save(path, "PNG")
    fails(["finetune", "--config", path], str(path), "expected text in UTF-8")


# -- data -------------------------------------------------------------------------------------------------------------
def test_no_data_there(fails, finetune, tmp_path):
    fails(finetune(data="no/such/folder"), "'no/such/folder'", "expected a Hub id, a folder")
    (tmp_path / "empty").mkdir()
    fails(finetune(data=tmp_path / "empty"), "found an empty folder")
    (tmp_path / "data.txt").write_text("x")
    fails(finetune(data=tmp_path / "data.txt"), "expected a file of type .parquet, .arrow, .csv", "'.txt'")
    fails(finetune(data="builtin/emoji-maxi"), "builtin/emoji-maxi", "expected one of", "builtin/emoji-mini")


def test_damaged_data_file_gives_the_reason(fails, finetune, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a.png", "label": \n')
    fails(finetune(data=path), "a.jsonl, line 1: expected one JSON object per line", "Correct the line")


def test_pictures_without_class_folders(fails, finetune, tmp_path):
    for i, (image, _) in enumerate(colour_images(2)):
        (tmp_path / "data").mkdir(exist_ok=True)
        image.save(tmp_path / "data" / f"{i}.png")
    fails(finetune(data=tmp_path / "data"), "expected one subfolder of images per class", "FILE.csv")


def test_missing_column(fails, finetune):
    fails(finetune("--label_column", "lable"), "'lable' for the label is missing", "found image, label, captions")
    fails(finetune("--image_column", "x"), "'x' for the image is missing", "--image_column NAME")
    fails(finetune("--captions_column", "texts"), "'texts' for the captions", "Columns of text: captions")


def test_captions_of_the_wrong_type(fails, finetune, data_with):
    numbers = {split: colour_dataset(3, captions=False).add_column("captions", [7] * 9) for split in ("train", "test")}
    data = data_with(**numbers, validation=numbers["test"])
    fails(finetune(data=data), "'captions'", "expected text or a list of texts", "int64", "--captions_column")


def test_images_of_the_wrong_type(fails, finetune):
    fails(finetune("--image_column", "label"), "'label'", "expected images or their paths", "ClassLabel")


def test_label_outside_the_class_list_is_named_by_row_and_split(fails, finetune, tmp_path):
    (tmp_path / "data").mkdir()
    for split, labels in (
        ("train", [0, 1, 2] * 3),
        ("validation", [0, 1, 2] * 3),
        ("test", [0, 1, 2, 0, 5, 2, 0, 1, 2]),
    ):
        data = colour_dataset(3).remove_columns("label").add_column("label", labels)
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    fails(
        finetune("--class_names", *NAMES, data=tmp_path / "data"),
        "'label', split 'test', row 4",
        "label 5",
        "3 classes: red thing, green thing, blue thing",
    )


def test_text_label_that_training_does_not_have(fails, finetune, tmp_path):
    (tmp_path / "data").mkdir()
    for split, last in (("train", "blue"), ("validation", "violet"), ("test", "blue")):
        data = colour_dataset(3).remove_columns("label").add_column("label", ["red", "green", "blue"] * 2 + [last] * 3)
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    fails(finetune(data=tmp_path / "data"), "split 'validation', row 6", "'violet'", "blue, green, red")


def test_row_without_a_label(fails, finetune, tmp_path):
    rows = [{"image": f"{i}.png", "label": "cat" if i % 2 else "dog"} for i in range(8)]
    rows[5]["label"] = None
    fails(
        finetune(data=write_jsonl(tmp_path / "a.jsonl", rows)),
        "split 'train', row 5: expected a class, found none",
        "1 of 8 rows",
    )


def test_bare_numbers_without_names(fails, finetune, tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"image": f"{i}.png", "label": i % 3} for i in range(9)])
    fails(finetune(data=path), "expected class names", "plain numbers (3 different", "--class_names")


def test_labels_of_the_wrong_type(fails, finetune, tmp_path):
    rows = [{"image": f"{i}.png", "label": i / 3, "list": [1], "pair": {"a": 1}} for i in range(9)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    fails(finetune(data=path), "row 1: expected a class, found the number 0.333333 with a fraction")
    fails(finetune("--label_column", "list", data=path), "expected class names, found plain numbers", "--class_names")
    fails(finetune("--label_column", "pair", data=path), "expected class names or numbers", "Value('int64')")


def test_wrong_number_of_class_names(fails, finetune):
    fails(
        finetune("--class_names", "a", "b"), "--class_names", "expected the data's own 3 names", "found 2 names (a, b)"
    )


def test_class_without_a_training_image(fails, finetune, data_with):
    train = colour_dataset(3).filter(lambda label: label != 1, input_columns="label")
    fails(finetune(data=data_with(train=train)), "1 of 3 classes", "no training image", "green thing")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_empty_split(split, fails, finetune, data_with):
    fails(finetune(data=data_with(**{split: colour_dataset(3).select([])})), f"split '{split}'", "it is empty")


def test_nothing_to_hold_out(fails, finetune, tmp_path):
    fails(finetune(data=save_pictures(tmp_path / "data", 1)), "no test split", "two images", "--test_split NAME")


def test_missing_split(fails, finetune):
    fails(finetune("--test_split", "tset"), "'tset' is missing", "found", "Did you mean 'test'?")


@pytest.mark.parametrize("other", ["cat-a", "Cat_A", "cat  a"])
def test_two_classes_with_the_same_name(other, fails, finetune, tmp_path):
    for name in ("cat_a", other, "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        colour_images(1)[0][0].save(tmp_path / "data" / name / "0.png")
    fails(finetune(data=tmp_path / "data"), "two classes have the same name", "'cat_a'", repr(other))


# -- bad pictures -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_training_picture_stops_and_is_named(workers, fails, finetune, data_with):
    data = data_with(train=with_bad_picture(4, colour_dataset(3)))
    message = fails(
        finetune("--dataloader_num_workers", workers, data=data),
        "training image, row 4 cannot be read",
        "--on_bad_image skip",
    )
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("split", ["validation", pytest.param("test", marks=pytest.mark.slow)])
def test_bad_evaluation_picture_stops_and_is_named(split, fails, finetune, data_with):
    data = data_with(**{split: with_bad_picture(4, colour_dataset(3))})
    fails(finetune(data=data), f"{split} image, row 4 cannot be read", "--on_bad_image skip")


@pytest.mark.slow
def test_the_message_is_all_that_a_process_leaves_on_stderr(finetune, data_with):
    data = data_with(train=with_bad_picture(4, colour_dataset(3)))
    _, err = run_python(["-m", "mmft_hf", *finetune("--eval_on_start", "false", data=data)], 2)
    assert len(err.splitlines()) == 1
    assert err.startswith("mmft-hf: training image, row 4 cannot be read: expected a picture")


def test_missing_file_is_named(fails, finetune, tmp_path):
    folder = save_pictures(tmp_path / "data", 10)
    (folder / NAMES[0] / "000.png").write_bytes(b"")
    fails(finetune("--max_steps", 1, data=folder), "cannot be read", "000.png")


def test_bad_pictures_are_skipped_and_counted_in_every_split(succeeds, finetune, data_with, tmp_path):
    bad = {split: with_bad_picture(4, colour_dataset(3, i)) for i, split in enumerate(("train", "validation", "test"))}
    steps = ("--max_steps", 2, "--logging_strategy", "steps", "--logging_steps", 1)
    out, _ = succeeds(finetune("--on_bad_image", "skip", *steps, data=data_with(**bad)))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_skipped_images"] == 1
    assert results["test_images"] == 8
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [log["skipped_images"] for log in logs if "skipped_images" in log] == [1, 1]
    assert "1 test images could not be read" in out


def test_huge_picture_stops_and_is_named(fails, finetune, data_with):
    data = colour_dataset(3).cast_column("image", Image(decode=False))
    pictures = [{"bytes": png_of_size(20_000, 20_000), "path": None}, *data["image"][1:]]
    train = with_column(data, "image", pictures).cast_column("image", Image())
    fails(finetune(data=data_with(train=train)), "training image, row 0 cannot be read", "pixels")


# -- the output folder ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_foreign_folder_is_never_touched(overwrite, fails, finetune, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-3").mkdir(parents=True)
    for name in ("thesis.tex", "config.json", "model.safetensors", "checkpoint-3/model.safetensors"):
        (out / name).write_text(name)
    before = content(out)
    fails(
        finetune("--overwrite_output_dir", overwrite),
        str(out),
        "found files that are not a run",
        "another --output_dir",
    )
    assert content(out) == before


def test_folder_with_another_run(fails, finetune, trained):
    before = content(trained)
    message = fails(finetune("--output_dir", trained, "--learning_rate", "1e-3"), "a finished run", "learning_rate")
    assert "--overwrite_output_dir true" in message and "another --output_dir" in message
    assert content(trained) == before


def test_overwriting_deletes_what_the_run_left_and_nothing_else(succeeds, finetune, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "checkpoint-mine").mkdir()
    own = ["my_config.json", "tokenizer_notes.md", "prior.safetensors", "checkpoint-x", "checkpoint-mine/a.txt"]
    for name in own:
        (out / name).write_text(name)
    (out / "checkpoint-77").mkdir()
    os.utime(out / "checkpoint-mine", (0, 0))  # by its date, it would be the first to be rotated away
    succeeds(finetune("--overwrite_output_dir", "true", "--learning_rate", "1e-3"))
    assert all((out / name).read_text() == name for name in own)
    assert not (out / "checkpoint-77").exists()
    assert json.loads((out / "mmft.json").read_text())["identity"]["learning_rate"] == 1e-3


def test_a_folder_is_not_taken_by_a_command_that_could_not_start(fails, succeeds, finetune, tmp_path):
    fails(finetune("--model_name_or_path", tmp_path / "no_model"), "no_model")
    assert not (tmp_path / "out").exists()
    succeeds(finetune())


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "{"])
def test_a_foreign_mmft_json_is_named(text, fails, finetune, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mmft.json").write_text(text)
    fails(finetune(), "mmft.json", "expected", "another --output_dir")


def test_resume_with_other_settings(fails, finetune, trained):
    before = content(trained)
    resume = ("--output_dir", trained, "--resume_from_checkpoint", "true")
    fails(
        finetune(*resume, "--supcon_weight", 0.5, "--seed", 7),
        "--resume_from_checkpoint",
        "supcon_weight was 0.1, now 0.5",
        "seed was 42, now 7",
    )
    assert content(trained) == before


def test_resume_with_another_rarely_used_setting(fails, finetune, trained):
    resume = ("--output_dir", trained, "--resume_from_checkpoint", "true")
    fails(finetune(*resume, "--lr_scheduler_kwargs", '{"num_cycles": 0.3}'), "other_settings", "num_cycles")


def test_resume_of_a_finished_run_has_nothing_to_do(succeeds, finetune, trained):
    before = content(trained)
    out, _ = succeeds(finetune("--output_dir", trained, "--resume_from_checkpoint", "true"))
    assert "complete" in out and "all_results.json" in out
    assert content(trained) == before


def test_resume_from_what_is_no_checkpoint(fails, finetune, tmp_path):
    (tmp_path / "nothing").mkdir()
    fails(finetune("--resume_from_checkpoint", tmp_path / "nothing"), "expected a complete checkpoint")


def test_resume_from_a_checkpoint_of_another_model(fails, finetune, trained, clip, tmp_path):
    config = CLIPConfig.from_dict(clip[0].config.to_dict())
    config.text_config.intermediate_size = 48
    CLIPModel(config).save_pretrained(tmp_path / "other")
    clip[1].save_pretrained(tmp_path / "other")
    checkpoint = max(trained.glob("checkpoint-*"))
    fails(
        finetune("--model_name_or_path", tmp_path / "other", "--resume_from_checkpoint", checkpoint),
        "checkpoint of another model",
        "text_config.intermediate_size 48 (found 64)",
    )


# -- the model --------------------------------------------------------------------------------------------------------
def test_model_that_is_no_clip(fails, finetune, tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    fails(finetune("--model_name_or_path", tmp_path / "bert"), "expected a CLIP-style", "'bert'", "openai/clip")


def test_a_model_without_its_vocabulary_is_refused(fails, finetune, clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").unlink()
    fails(finetune("--model_name_or_path", tmp_path / "clip"), "expected a tokenizer of 514 tokens", "tokenizer.json")


def test_cut_weights_are_named(fails, finetune, clip_folder, trained, tmp_path, shots):
    for source, name in ((clip_folder, "model.safetensors"), (trained, "head.safetensors")):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:500])
    fails(finetune("--model_name_or_path", tmp_path / "model.safetensors"), "model.safetensors")
    fails(["predict", shots, "--model_name_or_path", tmp_path / "head.safetensors"], "damaged")


def test_folder_without_a_model(fails, finetune, tmp_path):
    (tmp_path / "nothing").mkdir()
    fails(finetune("--model_name_or_path", tmp_path / "nothing"), "nothing", "config.json", "--model_name_or_path")
    other = ("--output_dir", tmp_path / "out2")
    fails(finetune("--model_name_or_path", "no/such", *other), "'no/such'", "expected a Hub id or a folder")


def test_model_without_weights_or_tokenizer(fails, finetune, clip, tmp_path):
    clip[0].config.save_pretrained(tmp_path / "half")
    fails(finetune("--model_name_or_path", tmp_path / "half"), "expected model.safetensors")
    clip[0].save_pretrained(tmp_path / "half")
    other = ("--output_dir", tmp_path / "out2")
    fails(finetune("--model_name_or_path", tmp_path / "half", *other), "a tokenizer")


def test_pickled_weights_are_not_read(fails, finetune, clip, tmp_path):
    for part in clip:
        part.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(clip[0].state_dict(), tmp_path / "old" / "pytorch_model.bin")
    fails(
        finetune("--model_name_or_path", tmp_path / "old"), "expected weights as model.safetensors, found only a pickle"
    )


def test_both_towers_frozen(fails, finetune):
    fails(finetune("--vision_tower", "frozen", "--text_tower", "frozen"), "--vision_tower and --text_tower", "frozen")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainer_refuses_half_precision_weights(dtype, clip, tmp_path):
    model, processor = clip
    with pytest.raises(UserError, match=r"expected float32 weights, found torch\..*float16.*load_model"):
        MMFTTrainer(
            model=model.to(dtype),
            args=MMFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True),
            train_dataset=colour_dataset(2),
            eval_dataset=colour_dataset(2),
            processing_class=processor,
        )


@pytest.mark.parametrize(("batch", "what", "step"), [(8, "the loss", 2), (24, "the validation loss", 1)])
def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(batch, what, step, fails, finetune):
    settings = ("--learning_rate", "1e30", "--max_steps", 6, "--per_device_train_batch_size", batch)
    message = fails(
        finetune(*settings, "--lr_scheduler_type", "constant"),
        f"{what} became",
        f"at step {step}",
        "smaller --learning_rate",
    )
    checkpoint = message.split("The last good checkpoint is ")[1].split(". Type")[0]
    model, processor = load_model(checkpoint)
    pixels = processor.image_processor(colour_images(1)[0][0], return_tensors="pt")["pixel_values"]
    assert torch.isfinite(encode_images(model, pixels)).all()


def test_the_only_step_was_not_finite(fails, finetune):
    settings = ("--learning_rate", "1e30", "--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "no")
    fails(finetune(*settings, "--load_best_model_at_end", "false"), "output of the trained model became nan at step 1")


def test_validation_pictures_that_are_all_bad(fails, finetune, data_with):
    bad = colour_dataset(1)
    for row in range(3):
        bad = with_bad_picture(row, bad)
    fails(finetune("--on_bad_image", "skip", data=data_with(validation=bad)), "at least one image that can be read")


def test_a_bad_picture_is_named_by_its_place_before_splits_were_cut(fails, finetune, tmp_path):
    (tmp_path / "one").mkdir()
    with_bad_picture(17, colour_dataset(8)).to_parquet(tmp_path / "one" / "train.parquet")
    fails(finetune("--shots", 8, data=tmp_path / "one"), "row 17")


# -- caption ----------------------------------------------------------------------------------------------------------
def test_caption_settings_that_cannot_work(fails, clip_folder, tmp_path):
    command = ["caption", "--model_name_or_path", clip_folder, "--output_dir", tmp_path / "out"]
    fails([*command, "--text_columns", "label"], "columns of text", "label")
    fails([*command, "--text_columns", "words"], "'words' is missing")
    fails(command, "expected one column", "text, text_source")
    fails([*command, "--text_columns", "text", "--model_name_or_path", tmp_path / "none"], "expected the tokenizer")
    asked = [*command, "--captioner", "openai", "--captioner_model", "m"]
    for name in ("own_prompts", "request_options"):
        fails([*asked, f"--{name}", "[" * 100_000], f"--{name}: expected JSON")
    fails([*asked, "--own_prompts", '{"visual": 1}'], "own_prompts: expected a text for 'visual', found 1")
    for words in (("--aspects", "\udcff"), ("--domain", "\udcff"), ("--own_prompts", '{"visual": "\\udcff"}')):
        fails([*asked, *words], "prompt: expected text in UTF-8", "\\udcff")
    assert not (tmp_path / "out").exists()


def test_captioning_never_deletes_what_is_not_its_own(fails, succeeds, clip_folder, tmp_path):
    out, data = tmp_path / "out", colour_dataset(4, captions=False)
    (tmp_path / "pictures").mkdir()
    data.add_column("text", ["a thing"] * len(data)).to_parquet(tmp_path / "pictures" / "train.parquet")
    command = ["caption", "--text_columns", "text", "--dataset_name", tmp_path / "pictures"]
    command += ["--model_name_or_path", clip_folder, "--output_dir", out]
    (out / "data").mkdir(parents=True)
    (out / "data" / "precious.parquet").write_text("mine")
    fails([*command, "--overwrite_output_dir", "true"], "did not write")
    succeeds([*command, "--output_dir", tmp_path / "new"])
    (tmp_path / "new" / "data" / "precious.parquet").write_text("mine")
    succeeds([*command, "--output_dir", tmp_path / "new"])  # the same command continues
    other = [*command, "--captioner", "template", "--output_dir", tmp_path / "new"]
    fails(other, "captioner columns there, template here", "--overwrite_output_dir true")
    succeeds([*other, "--overwrite_output_dir", "true"])
    assert (out / "data" / "precious.parquet").read_text() == "mine"
    assert (tmp_path / "new" / "data" / "precious.parquet").read_text() == "mine"


# -- predict ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def shots(tmp_path):
    """Two pictures in a folder."""
    folder = tmp_path / "shots"
    folder.mkdir()
    for name, (image, _) in zip("ab", colour_images(1), strict=False):
        image.save(folder / f"{name}.png")
    return folder


def test_predict_without_pictures(fails, trained, shots, tmp_path):
    model = ("--model_name_or_path", trained)
    fails(["predict", *model], "expected pictures or folders, found none", "mmft-hf predict PICTURE.jpg")
    fails(["predict", "nowhere.jpg", *model], "nowhere.jpg", "expected a picture or a folder", "found nothing there")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    fails(["predict", tmp_path / "texts", *model], "expected pictures in this folder", ".png")


def test_predict_with_one_bad_picture_classifies_the_others(trained, shots, capsys):
    (shots / "aa.jpg").write_bytes(b"\xff\xd8 no picture")
    assert main(["predict", str(shots), "--model_name_or_path", str(trained)]) == 3
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(shots / "a.png"), str(shots / "b.png")]
    assert all("%" in line for line in out.splitlines())
    assert "aa.jpg: cannot be read" in err and "1 of 3 pictures could not be read" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_predict_with_bad_pictures_alone(name, fails, trained, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    command = ["predict", tmp_path / "bad.png", "--model_name_or_path", trained, "--output_file", tmp_path / name]
    fails(command, "1 of 1 pictures", code=3)
    assert "bad.png" not in (tmp_path / name).read_text()


def test_predict_refuses_a_huge_picture(trained, shots, capsys, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    colour_images(1)[0][0].resize((10, 10)).save(shots / "c.png")
    assert main(["predict", str(shots), "--model_name_or_path", str(trained)]) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and out.startswith(f"{shots / 'c.png'}: ")
    assert "a.png: cannot be read (expected at most 200 pixels, found 24 x 20)" in err


@pytest.mark.parametrize(
    ("flag", "value"), [("--top_k", 0), ("--batch_size", 0), ("--batch_size", -3), ("--output_file", "out.xlsx")]
)
def test_predict_settings_outside_their_range(flag, value, fails, trained, shots):
    fails(["predict", shots, "--model_name_or_path", trained, flag, value], flag, "expected", str(value))


def test_classifier_without_prototypes(fails, clip_folder, shots, data_folder):
    for verb in (["predict", shots], ["evaluate", "--dataset_name", data_folder]):
        fails([*verb, "--model_name_or_path", clip_folder], "prototypes.safetensors", "mmft-hf finetune")


# -- evaluate ---------------------------------------------------------------------------------------------------------
def test_evaluate_on_a_class_that_the_model_does_not_know(fails, trained, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=[*NAMES, "mauve thing"])})
    data = colour_dataset(2, captions=False).cast(features)
    with_column(data, "label", [0, 1, 2, 3, 1, 2]).to_parquet(tmp_path / "test.parquet")
    fails(
        [
            "evaluate",
            "--model_name_or_path",
            trained,
            "--dataset_name",
            tmp_path / "test.parquet",
            "--test_split",
            "train",
        ],
        "split 'train', row 3",
        "'mauve thing'",
        "3 classes: red thing",
    )


def test_evaluate_on_other_data_without_a_test_split(fails, trained, tmp_path):
    data = save_pictures(tmp_path / "data", 5)
    fails(
        ["evaluate", "--model_name_or_path", trained, "--dataset_name", data],
        "expected a split named test",
        "found neither, only train. Type --test_split train.",
    )


def test_evaluate_on_an_empty_split(fails, trained, data_with):
    data = data_with(test=colour_dataset(2).select([]))
    fails(["evaluate", "--model_name_or_path", trained, "--dataset_name", data], "split 'test'", "it is empty")


def test_evaluate_with_a_bad_picture(fails, succeeds, trained, data_with):
    data = data_with(test=with_bad_picture(2, colour_dataset(3)))
    command = ["evaluate", "--model_name_or_path", trained, "--dataset_name", data]
    fails(command, "test image, row 2 cannot be read", "--on_bad_image skip")
    out, _ = succeeds([*command, "--on_bad_image", "skip"])
    assert "8 images" in out and "1 images that cannot be read" in out


def test_evaluate_settings_outside_their_range(fails, trained, data_folder):
    command = ["evaluate", "--model_name_or_path", trained, "--dataset_name", data_folder]
    fails([*command, "--per_device_eval_batch_size", 0], "--per_device_eval_batch_size", "1 or more")
    fails([*command, "--dataloader_num_workers", -1], "--dataloader_num_workers", "0 to 1024")


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of the finished run, whose record may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "moved"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected JSON"),
        ("{}", "field completed: expected true or false, found no such field"),
        ("[1]", "expected an object, found a list of 1"),
    ],
)
def test_evaluate_with_a_damaged_record(text, said, fails, moved, data_folder):
    (moved / "mmft.json").write_text(text)
    command = ["evaluate", "--model_name_or_path", moved, "--dataset_name", data_folder]
    fails(command, "mmft.json", said)


def test_evaluate_goes_on_where_the_untuned_model_is_gone(succeeds, moved, data_folder):
    record = json.loads((moved / "mmft.json").read_text())
    record["identity"]["base_model"] = "a/folder/that/was/moved"
    (moved / "mmft.json").write_text(json.dumps(record))
    out, _ = succeeds(["evaluate", "--model_name_or_path", moved, "--dataset_name", data_folder])
    assert "18 images" in out and "no zero-shot baseline" in out and "a/folder/that/was/moved" in out


def test_output_that_cannot_be_written(fails, trained, finetune, shots, data_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    fails(finetune("--output_dir", tmp_path / "file"), str(tmp_path / "file"), "expected")
    model = ("--model_name_or_path", trained)
    fails(["predict", shots, *model, "--output_file", tmp_path / "file" / "a.csv"], str(tmp_path / "file"), "expected")
    evaluate = ["evaluate", *model, "--dataset_name", data_folder]
    fails([*evaluate, "--output_dir", tmp_path / "file"], str(tmp_path / "file"), "Type another path")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("name", "found"), [("x" * 300, "File name too long"), ("a\0b", r"found 'a\x00b'")])
def test_a_name_that_no_file_can_have(name, found, finetune, fails):
    fails(finetune("--output_dir", name), found, "expected")
    fails(["predict", name, "--model_name_or_path", "model"])


# -- our own defects --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [lambda: 1 / 0, lambda: open("/no/such/file")])
def test_a_defect_of_ours_is_1_with_a_traceback(error, capsys, monkeypatch):
    monkeypatch.setattr("mmft_hf.commands.env.run", lambda *args: error())
    assert main(["env"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "bug in mmft_hf" in err


def test_debug_shows_the_traceback_of_a_user_error(capsys):
    assert main(["finetune", "--debug", "--no_such_key", "1"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.rstrip().splitlines()[-1].startswith("mmft-hf: finetune: unknown setting")


def test_stopping_names_the_command_that_continues(fails, finetune, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmft_hf.commands.finetune.run", stop)
    message = fails(finetune("--class_template", "a {}!"), "To continue, type: mmft-hf finetune", code=3)
    assert message.rstrip().endswith("'a {}!' --resume_from_checkpoint true")


# -- Git LFS, caches ----------------------------------------------------------------------------------------------------
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_in_a_model(fails, finetune, clip_folder, tmp_path, name):
    shutil.copytree(clip_folder, tmp_path / "model")
    (tmp_path / "model" / name).write_text(POINTER)
    fails(finetune("--model_name_or_path", tmp_path / "model"), f"{name}: found a pointer of Git LFS", "git lfs pull")


@pytest.mark.parametrize("name", ["data.parquet", "data.csv", "data.json"])
def test_a_pointer_of_git_lfs_for_a_table(fails, finetune, tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    fails(finetune(data=tmp_path / name), f"{name}: found a pointer of Git LFS", "git lfs pull")


def test_a_pointer_of_git_lfs_for_a_picture_or_a_run(fails, trained, tmp_path, capsys):
    (tmp_path / "a.png").write_text(POINTER)
    words = ["predict", tmp_path / "a.png", "--model_name_or_path"]
    assert main([*map(str, words), str(trained)]) == 3
    err = capsys.readouterr().err
    assert "a.png: cannot be read" in err and "a pointer of Git LFS" in err and "git lfs pull" in err
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "run" / "head.safetensors").write_text(POINTER)
    fails([*words, tmp_path / "run"], "head.safetensors: found a pointer of Git LFS")


def test_a_cache_that_cannot_be_written_to(fails, finetune, monkeypatch, tmp_path):
    """As the system answers those who are not root."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))

    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "hub" / "models" / "x"))

    monkeypatch.setattr("mmft_hf.model.loading.AutoConfig.from_pretrained", refused)
    said = f"The cache in {tmp_path / 'hub'} cannot be written to (Permission denied). Type export HF_HOME="
    fails(finetune("--model_name_or_path", "nobody/nothing"), said)
    monkeypatch.setattr("mmft_hf.train.workflow.load_splits", refused)
    fails(finetune(), said)


# -- prompts that are the same to the model ---------------------------------------------------------------------------
def test_classes_that_the_text_tower_reads_alike_are_said_before_training(succeeds, finetune, data_folder, tmp_path):
    long = "very " * 17  # the tokenizer has a token for each letter and reads 77 of them
    names = ["red thing", f"{long}green", f"{long}blue"]
    out, _ = succeeds(finetune("--class_names", *names, "--output_dir", tmp_path / "alike"))
    said = "Note: The text tower reads the same prompt for very very"
    assert out.count(said) == 1 and out.index(said) < out.index("Test accuracy")
