"""Prompts and class names."""

import pytest

from mmft_hf.captioning.judge.tokens import TokenCounter
from mmft_hf.core.errors import UserError
from mmft_hf.data.texts import (
    ASPECTS,
    DOMAINS,
    LONG,
    PromptSet,
    beginning,
    check_template,
    class_prompt,
    clean_class_name,
    training_text,
)
from mmft_hf.model.collator import tokenize


def test_the_prompt_of_the_method():
    found = PromptSet(domain="pets").prompt("shape", "Saint_Bernard")
    assert found == (
        "To differentiate this saint bernard photo from other pets photos, describe its primary shape characteristics "
        "based on the photo in 50 words."
    )


def test_a_benchmark_stands_for_its_domain_word():
    assert "from other traffic signs photos" in PromptSet(domain="gtsrb").prompt("visual", "stop")
    assert len(DOMAINS) == 13 and len(ASPECTS) == 8


def test_braces_in_a_class_name_stay_text():
    assert "this {domain} {words} {0.class} photo" in PromptSet().prompt("visual", "{domain} {words} {0.class}")
    assert class_prompt("a photo of a {}.", "{} and {}") == "a photo of a {} and {}."


def test_names_can_be_kept_as_they_are():
    assert "this Saint_Bernard photo" in PromptSet(clean_names=False).prompt("visual", "Saint_Bernard")


def test_own_aspects_and_prompts():
    prompts = PromptSet(
        aspects=("visual", "rust"), words=20, own_prompts={"rust": "Where is rust on this {class_name}?"}
    )
    assert prompts.prompt("rust", "bolt") == "Where is rust on this bolt?"
    assert prompts.prompt("visual", "bolt").endswith("in 20 words.")


def test_prompt_id_follows_the_wording_and_nothing_else():
    assert PromptSet().prompt_id("visual") == PromptSet(aspects=("visual",)).prompt_id("visual")
    ids = {PromptSet().prompt_id("visual"), PromptSet().prompt_id("shape"), PromptSet(words=40).prompt_id("visual")}
    assert len(ids | {PromptSet(domain="pets").prompt_id("visual")}) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aspects": ()}, "one or more"),
        ({"aspects": ("visual", "visual")}, "different"),
        ({"words": 0}, "1 or more"),
        ({"template": "a {clas_name}"}, "Did you mean 'class_name'"),
        ({"template": "a {}"}, "expected {class_name}"),
        ({"own_prompts": {"smell": "x"}}, "smell"),
    ],
)
def test_settings_that_make_no_prompt_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PromptSet(**settings)


def test_class_names_are_cleaned():
    assert clean_class_name("saint_bernard") == "saint bernard"
    assert clean_class_name("  well-known__thing ") == "well known thing"


def test_training_text():
    assert training_text("a photo of a {}.", "big_cat", "It sleeps.") == "a photo of a big cat. It sleeps."
    assert training_text("a photo of a {}.", "big_cat", None) == "a photo of a big cat."


@pytest.mark.parametrize("template", ["a photo", "{} {}", "a {name}"])
def test_a_class_template_has_one_place_for_the_name(template):
    with pytest.raises(UserError, match="once"):
        check_template(template)


# -- long texts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "a" * 9000,
        "猫" * 9000,
        " " * 9000 + "cat",
        "cat, dog; " * 2000,
        "x" * 5000 + " end",
        "." * 9000,
        "cat" + " " * 9000,
    ],
)
def test_of_a_long_text_only_the_beginning_is_tokenized_and_that_changes_nothing(clip, text):
    tokenizer = clip[1].tokenizer
    counter, whole = TokenCounter(tokenizer), tokenizer(text, verbose=False)["input_ids"]
    tokens, cut = tokenize(clip[1], [text, "short"])
    assert tokens["input_ids"][0].tolist()[: len(whole)] == tokenizer(text, truncation=True)["input_ids"]
    assert cut.tolist() == [len(whole) > 77, False] and counter.exceeds(text) == (len(whole) > 77)
    assert counter.count(text) == len(whole)
    counted = []
    beginning(text, 77, lambda part: counted.append(len(part)) or len(part))
    assert counted == [LONG]
