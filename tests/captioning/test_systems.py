"""docs/systems.md names every step and preset that follows other work, with the number of the paper."""

import re
from pathlib import Path

import pytest

from mmft_hf.captioning.steps.presets import preset_names, read_preset
from mmft_hf.captioning.steps.settings import STEPS

SYSTEMS = """2SFS ALIGN ALIP BIOMEDICA CapArena CapRL CapsFusion CLAP CLIP-LoRA CLIP-MoE CLOSE CoLLM CompCap DAM-VP DenseFusion-1M DreamLIP
FINECAPTION FlexCap FLYP FreestyleRet FuseCap GeneCIS GRADE HMGIE KnowAda Koala-36M LLM2CLIP LP++ LP-FT MacCap MMICT MobileCLIP2 MOCHa
MultiCapCLIP NEVIS'22 NoC OmniDiff Pix2Cap-COCO ProKeR PromptCap RECAP ScaleCap ShareGPT4V SPIDEr-max SyCoCa SynC Synthio TextHarmony
TextHawk2 TIMO Tip-Adapter TL;DR UniFGVC UniME URECA VeCLIP Vendi VisDiff WiSE-FT""".split()
TITLED = (
    "CLIP reward",
    "Compress & Align",
    "Cream of the Crop",
    "Discriminative fine-tuning",
    "Diverse beam search",
    "Dual caption preference optimization",
    "Guiding captioning models",
    "Image-to-text evaluation",
    "LLM mix-up",
    "mask-adapted CLIP",
    "Multi-LLM caption generation",
    "No Detail Left Behind",
    "Omniview-Tuning",
    "Patch Matters",
    "Ranking and LLM-based fusion",
    "Revisiting image-caption data",
    "Scalability of text-to-image generation",
    "Schur complement",
    "Visual Fact Checker",
)
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


@pytest.mark.parametrize("name", [*SYSTEMS, *TITLED])
def test_each_system_has_a_row_that_says_what_differs_or_why_it_is_not_here(name):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")
    ]
    found = [row for row in rows if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", row[0])]
    assert found and all(len(row) in (2, 3) and all(row) for row in found)


def test_the_page_names_only_recipes_and_tests_that_are_there():
    root = Path(__file__).parents[2]
    tests = {path.name for path in (root / "tests").rglob("test_*.py")}
    recipes = {path.name for path in (root / "recipes" / "captions" / "steps").glob("*.yaml")}
    assert set(re.findall(r"`(test_\w+\.py)`", TEXT)) <= tests
    assert set(re.findall(r"`(\w+\.yaml)`", TEXT)) <= recipes
