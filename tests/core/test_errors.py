"""Messages spell settings as the reader types them: with dashes on the command line, without them in Python."""

import pickle

import pytest

from mmft_hf import load_captioned_dataset
from mmft_hf.cli import main
from mmft_hf.core.errors import PartialResult, UserError, command_line_spelling


@pytest.mark.parametrize("kind", [UserError, PartialResult])
@pytest.mark.parametrize(
    ("written", "in_python"),
    [
        ("--shots: expected 1 or more, found 0.", "shots: expected 1 or more, found 0."),
        ("Leave it out, or type --train_split NAME.", "Leave it out, or type train_split NAME."),
        (
            "Write them: mmft-hf caption --dataset_name a.b --output_dir c. Then type --dataset_name c.",
            "Write them: mmft-hf caption --dataset_name a.b --output_dir c. Then type dataset_name c.",
        ),
        ("It needs a card (mmft-hf push F --repo_id X); leave --out out.", "It needs a card (mmft-hf push F --repo_id X); leave out out."),
        ("accelerate launch --num_processes 2 recipes/finetune.py", "accelerate launch --num_processes 2 recipes/finetune.py"),
        ("a -- b, --- c, well-known, no--setting", "a -- b, --- c, well-known, no--setting"),
    ],
)  # fmt: skip
def test_settings_have_no_dashes_in_python(kind, written, in_python):
    error = pickle.loads(pickle.dumps(kind(written)))  # as between the processes of a DataLoader
    with command_line_spelling():
        assert str(error) == written
    assert str(error) == in_python


def test_one_message_in_python_and_on_the_command_line(data_folder, capsys):
    with pytest.raises(UserError) as told:
        load_captioned_dataset(str(data_folder), train_split="tran")
    assert str(told.value).endswith("Type train_split NAME.")
    assert main(["caption", "--captioner", "template", "--dataset_name", str(data_folder), "--train_split", "tran", "--output_dir", "unused"]) == 2  # fmt: skip
    assert capsys.readouterr().err.endswith("Type --train_split NAME.\n")
