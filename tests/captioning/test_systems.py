"""docs/systems.md names every step and preset that follows other work, with the number of the paper."""

import re
from pathlib import Path

import pytest

from mmft_hf.captioning.steps.presets import preset_names, read_preset
from mmft_hf.captioning.steps.settings import STEPS

TEXT = (Path(__file__).parents[2] / "docs" / "systems.md").read_text()
FOLLOWED = {name: step.after for name, step in STEPS.items() if isinstance(step.after, str) and step.after}
FOLLOWED |= {name: read_preset(name).after for name in preset_names()}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_page_names_what_a_step_or_preset_follows(name):
    assert f"`{name}`" in TEXT
    for number in re.findall(r"\d{4}\.\d{5}", FOLLOWED[name]):
        assert number in TEXT, number


def test_the_page_names_no_step_that_does_not_exist():
    for kind, names in (("step", STEPS), ("preset", preset_names())):
        found = re.findall(rf"{kind}s? ((?:`\w+`(?:, | and )?)+)", TEXT)
        named = {name for group in found for name in re.findall(r"`(\w+)`", group)}
        assert named and named <= set(names), named - set(names)
