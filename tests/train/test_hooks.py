"""What `MMFTTrainer` leans on in `transformers.Trainer` without a promise: a release that changes it is told by name."""

import inspect
import re

import pytest
import transformers
from transformers import Trainer

from mmft_hf import MMFTTrainer
from mmft_hf.train import trainer
from mmft_hf.train.trainer import PRIVATE_ATTRIBUTES, PRIVATE_HOOKS


def broken(name: str, parameters: tuple[str, ...], stock: type = Trainer) -> str:
    """What is wrong with a private method of the stock Trainer; empty if nothing is."""
    where = f"transformers {transformers.__version__}"
    method = getattr(stock, name, None)
    if method is None:
        return f"{where} has no Trainer.{name} any more: see the header of mmft_hf/train/trainer.py for what it is used for."
    gone = [parameter for parameter in parameters if parameter not in inspect.signature(method).parameters]
    if gone:
        return f"{where}: Trainer.{name} no longer has the parameter {', '.join(gone)}, which mmft_hf/train relies on."
    return ""


@pytest.mark.parametrize("name", PRIVATE_HOOKS)
def test_every_private_method_is_there_with_its_parameters(name):
    assert broken(name, PRIVATE_HOOKS[name]) == ""


@pytest.mark.parametrize("name", PRIVATE_ATTRIBUTES)
def test_every_private_attribute_is_used_by_the_stock_trainer(name):
    found = re.search(rf"self\.{name}\b|[\"']{name}[\"']", inspect.getsource(Trainer))
    assert found, (
        f"transformers {transformers.__version__}: Trainer no longer uses self.{name}, on which mmft_hf relies."
    )


def test_a_missing_method_and_a_missing_parameter_are_named():
    class Other:
        def _save(self, output_dir=None):
            pass

    assert "no longer has the parameter state_dict" in broken("_save", PRIVATE_HOOKS["_save"], Other)
    assert "has no Trainer._run_epoch any more" in broken("_run_epoch", (), Other)


def overridden() -> set[str]:
    """Names of the methods of the stock Trainer that ours and its parts define anew."""
    parts = MMFTTrainer.__mro__[: MMFTTrainer.__mro__.index(Trainer)]
    own = {name for part in parts for name, value in vars(part).items() if callable(value) and name[:2] != "__"}
    return {name for name in own if hasattr(Trainer, name)}


def test_header_and_table_name_everything_that_is_overridden():
    names = overridden()
    assert {name for name in names if name.startswith("_")} <= PRIVATE_HOOKS.keys()
    documented = set(re.findall(r"`(\w+)`", trainer.__doc__))
    assert names | PRIVATE_HOOKS.keys() | set(PRIVATE_ATTRIBUTES) <= documented
    public = trainer.__doc__.split("Private ones")[0]
    assert {name for name in names if not name.startswith("_")} <= set(re.findall(r"`(\w+)`", public))


def test_an_override_that_nothing_calls_would_be_silent():
    """Every private name of ours is either a hook of the stock Trainer or known to be an addition."""
    parts = MMFTTrainer.__mro__[: MMFTTrainer.__mro__.index(Trainer)]
    own = {name for part in parts for name, value in vars(part).items() if callable(value) and name[:2] != "__"}
    added = {"build_prototypes", "current_prototypes", "forget_prototypes", "stop_at", "trained_parameters"}
    added |= {"_averaged", "_chunk_size", "_class_metrics", "_exchange", "_expect_finite_losses", "_forward"}
    added |= {"_save_files", "_unsharded", "_untuned_images", "_write_model"}
    assert own - overridden() == added
