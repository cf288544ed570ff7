"""The caption checks. All texts are our own; they imitate faults that captioners were seen to make."""

import random
import time

import pytest

from mmft_hf.captioning.judge.checks import (
    CHECKS,
    DEFAULT_ACTIONS,
    CaptionChecker,
    duplicate_key,
    duplicates,
    parse_actions,
)
from mmft_hf.captioning.types import ACCEPTED, STATUSES
from mmft_hf.core.errors import UserError
from mmft_hf.data.texts import PromptSet

PETS = ["Saint_Bernard", "boxer", "Egyptian_Mau", "Abyssinian", "great_pyrenees", "pug", "cat", "dog"]
BERNARD, BOXER, MAU, CAT = 0, 1, 2, 6
GOOD = (
    "This Saint Bernard has a large, broad head with a white blaze between dark eyes. Its coat is thick and mostly white, "
    "with rich reddish-brown patches over the back, and its heavy jowls set it apart from other dogs."
)


@pytest.fixture(scope="module")
def pets():
    return CaptionChecker(PETS)


def fired(checker, text, label=BERNARD, **options):
    return checker.check(text, options.pop("finish_reason", "stop"), label, **options).checks


# -- a good caption ---------------------------------------------------------------------------------------------------
CLEAN = [
    (GOOD, BERNARD),
    ("The boxer's short, fawn coat has a white chest; its muzzle is square (about 8 cm wide).", BOXER),
    ("An Egyptian Mau with random spots, not stripes, on a silver-grey ground - a rare, natural pattern.", MAU),
    ("Two cats sit on a wall. The left one is grey; the right one, 3.5 kg at most, is black & white.", CAT),
    ('A cat beside a sign that reads "停" and a note that says "keep out".', CAT),
    ("A cat with café-au-lait fur and a naïve look, photographed at 50 % zoom... It yawns!", CAT),
    ("Description of a cat in one line: grey, small, asleep.", CAT),
    ("Here is a cat: its fur is long, its eyes are green.", CAT),
    ("Great, sweeping whiskers frame the cat's face.", CAT),
    ("Sure-footed on the ledge, the cat looks down.", CAT),
    ("This is a cat, very, very soft, very calm.", CAT),
    ("A cat drawn with 2 * 3 squares, snake_case letters and a tail that curls upwards_", CAT),
]


@pytest.mark.parametrize("text, label", CLEAN)
def test_a_good_caption_passes_unchanged(pets, text, label):
    found = pets.check(text, "stop", label, prompt=PromptSet(domain="pets").prompt("shape", PETS[label]))
    assert (found.text, found.status, found.checks) == (text, "ok", ())
    assert found.mentions_label and found.reask is None and not found.needs_larger_budget


def test_random_plain_captions_pass_unchanged(pets):
    rng = random.Random(0)
    words = "broad round white soft short long curly dark eyes coat ears tail muzzle chest patch with and its has of".split()
    for _ in range(300):
        sentences = [
            " ".join(rng.sample(words, rng.randint(4, 12))).capitalize() + "." for _ in range(rng.randint(1, 4))
        ]
        text = " ".join(["The pug stands.", *sentences])
        found = pets.check(text, "stop", PETS.index("pug"))
        assert (found.text, found.status, found.checks) == (text, "ok", ())


def test_cleaning_twice_changes_nothing_more(pets):
    messy = "<think>A dog.</think>\n## Shape\n\n**Caption:** “The *Saint Bernard’s* head is broad.”"
    once = pets.check(messy, "stop", BERNARD)
    assert once.text == "The Saint Bernard's head is broad."
    assert once.checks == ("thinking", "markdown", "boilerplate", "quotes") and once.status == "ok"
    assert pets.check(once.text, "stop", BERNARD).checks == ()


# -- cleaning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, clean",
    [
        ("<think>The label says cat.</think>\n\nA cat on a mat.", "A cat on a mat."),
        ("<THINKING>hm</THINKING> A cat on a mat.", "A cat on a mat."),
        ("The label says cat, so I begin.\n</think>\nA cat on a mat.", "A cat on a mat."),
        ("A cat on a mat.\n<think>Should I say more", "A cat on a mat."),
        ("[THINK]hm[/THINK]A cat on a mat.", "A cat on a mat."),
    ],
)
def test_thinking_is_taken_out(pets, text, clean):
    found = pets.check(text, "stop", CAT)
    assert found.text == clean and "thinking" in found.checks and found.status == "ok"


@pytest.mark.parametrize(
    "text, clean",
    [
        ("The **cat** is __grey__ and *soft*.", "The cat is grey and soft."),
        ("```\nA cat on a mat.\n```", "A cat on a mat."),
        ("```text\nA cat on a mat.\n```", "A cat on a mat."),
        ("# Shape\nA cat on a mat.", "A cat on a mat."),
        ("## A cat on a mat.", "A cat on a mat."),
        ("- A cat with short fur\n- a long tail\n- green eyes.", "A cat with short fur; a long tail; green eyes."),
        ("1. A cat.\n2. It is grey.", "A cat. It is grey."),
        ("> A cat on a mat.", "A cat on a mat."),
        ("A `cat` on a mat.<br>It sleeps.", "A cat on a mat. It sleeps."),
        ("The **cat is grey.", "The cat is grey."),
        ("<caption>A cat on a mat.</caption>", "A cat on a mat."),
        ("A cat on a mat.\n\n---", "A cat on a mat."),
    ],
)
def test_markdown_is_cleaned(pets, text, clean):
    found = pets.check(text, "stop", CAT)
    assert found.text == clean and found.checks == ("markdown",)


@pytest.mark.parametrize(
    "opener",
    [
        "Caption: ",
        "Image description: ",
        "Here is a caption: ",
        "Here's a 50-word caption for the cat photo:\n\n",
        "Here is a description of the cat's primary shape characteristics in 50 words: ",
        "Sure! ",
        "Sure! Here is a caption: ",
        "Certainly, here is the description you asked for:\n",
        "Sure thing! Caption: ",
        "Primary visual characteristics: ",
    ],
)
def test_openers_are_taken_off(pets, opener):
    found = pets.check(opener + "A cat on a mat.", "stop", CAT)
    assert found.text == "A cat on a mat." and found.checks == ("boilerplate",)


def test_words_about_the_answer_are_taken_off_its_end(pets):
    for end in (
        " (50 words)",
        " [Word count: 12]",
        " Word count: 12",
        " Let me know if you need more!",
        "<|im_end|>",
        "</s>",
    ):
        assert pets.check("A cat on a mat." + end, "stop", CAT).text == "A cat on a mat.", end


def test_nothing_is_removed_from_the_middle_of_a_text(pets):
    for text in (
        "The cat's collar has a tag with a caption: it says Tom.",
        "A short, thick-set cat.",
        "A cat. I cannot see its tail.",
        "The cat looks sorry, but proud.",
        "A cat and (in the corner, two words) a name.",
    ):
        found = pets.check(text, "stop", CAT)
        assert (found.text, found.status) == (text, "ok")


def test_quotes_are_straightened_and_enclosing_ones_removed(pets):
    assert pets.check("The cat’s “king” pose", "stop", CAT).text == 'The cat\'s "king" pose'
    assert pets.check('"A cat on a mat."', "stop", CAT).text == "A cat on a mat."
    kept = '"Tom" is a cat, and so is "Tim"'
    assert pets.check(kept, "stop", CAT).text == kept


def test_invisible_characters_go(pets):
    assert pets.check("A\u200b cat\u202e on\u00a0a \x07mat.\ufeff", "stop", CAT).text == "A cat on a mat."


def test_peoples_own_words_are_only_looked_at():
    checker = CaptionChecker(PETS, clean=False)
    text = "Caption: the **dog’s**  toy, www.example.org"
    found = checker.check(text, None, CAT)
    assert found.text == "Caption: the **dog’s** toy, www.example.org" and found.status == "ok" and found.reask is None
    assert found.checks == ("markdown", "boilerplate", "quotes", "url", "label_missing", "other_class")
    assert checker.check("  ", None, CAT).status == "empty" and checker.check("", None, CAT).reask is None
    assert checker.check("I'm sorry, this is not a cat.", None, CAT).status == "ok"


# -- empty, refused, truncated ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", None, " \n", "<think>only thoughts</think>", "**", '""'])
def test_empty(pets, text):
    first, last = pets.check(text, "stop", CAT), pets.check(text, "stop", CAT, last_try=True)
    assert first.text is None and first.status == last.status == "empty" and "empty" in first.checks
    assert first.reask == "Answer in one plain paragraph of at most 50 words." and last.reask is None
    assert not first.needs_larger_budget
    assert pets.check(text, "stop", CAT, says_length=True).reask == "Answer in one plain paragraph."


@pytest.mark.parametrize("text", ["", "<think>I look at the cat and", "<think>All of it</think>"])
def test_thinking_that_used_up_the_budget(pets, text):
    found = pets.check(text, "length", CAT, thinking_tokens=200)
    assert found.status == "empty" and found.needs_larger_budget and found.reask.startswith("Answer directly")


def test_an_answer_truncated_by_thinking_needs_a_larger_budget_too(pets):
    assert pets.check("A cat with", "length", CAT, thinking_tokens=190).needs_larger_budget
    assert not pets.check("A cat with", "length", CAT).needs_larger_budget


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot identify people.",
        "Sorry, no image was given.",
        "I cannot describe this image.",
        "I am unable to see the picture.",
        "Unfortunately, I can't view images.",
        "As an AI language model, I have no eyes.",
        "Unable to process the image.",
        "It is not possible to describe the photo.",
        "No image was provided.",
        "Please upload the photo.",
        "I apologize, but there is no cat here.",
        "Caption: I cannot help with this.",
    ],
)
def test_refusals(pets, text):
    found = pets.check(text, "stop", CAT)
    assert found.status == "refused" and "refusal" in found.checks and found.reask is None


@pytest.mark.parametrize(
    "text",
    [
        "A bird that is unable to fly, beside a cat.",
        "Unable to fly, the chick sits by the cat.",
        "A cat that looks as if to say: I'm sorry, I cannot help it.",
        "Sorry-looking and wet, the cat hides.",
        "This cat cannot be told from its shadow.",
        "No image noise, sharp whiskers, a grey cat.",
        "I see a cat.",
    ],
)
def test_no_refusals(pets, text):
    assert "refusal" not in fired(pets, text, CAT)


def test_a_refusal_reported_by_the_provider_counts(pets):
    found = pets.check("", "refusal", CAT)
    assert (found.status, found.checks, found.text) == ("refused", ("refusal",), None)


def test_a_truncated_answer_is_trimmed_to_its_last_sentence(pets):
    found = pets.check(GOOD + " The St. Bernard weighs 3.5 times", "length", BERNARD)
    assert found.text == GOOD and found.status == "trimmed" and found.checks == ("truncated",) and found.reask is None


def test_a_truncated_answer_without_enough_sentences_is_asked_again(pets):
    text = "A cat. On its head there is a white blaze that runs from between the"
    first, last = pets.check(text, "length", CAT), pets.check(text, "length", CAT, last_try=True)
    assert first.status == last.status == "truncated" and first.text == text
    assert "at most 50 words" in first.reask and last.reask is None


def test_actions_for_truncated_answers():
    text = "A grey cat sits here. It has"
    assert CaptionChecker(PETS, actions={"truncated": "keep"}).check(text, "length", CAT).status == "ok"
    asking = CaptionChecker(PETS, actions={"truncated": "reask"})
    assert (
        asking.check(text, "length", CAT).reask and asking.check(text, "length", CAT, last_try=True).status == "trimmed"
    )
    assert CaptionChecker(PETS, actions={"truncated": "reject"}).check(text, "length", CAT).status == "rejected"


# -- tokens -----------------------------------------------------------------------------------------------------------
class WordTokenizer:
    """One token per word, and one at each end."""

    model_max_length = 16

    def __call__(self, texts, verbose=True):
        return {"input_ids": [[0, *range(len(text.split())), 1] for text in texts]}

    def get_vocab(self):
        return {"a": 0}


def test_a_long_caption_is_trimmed_at_a_sentence():
    checker = CaptionChecker(
        PETS, WordTokenizer()
    )  # "a photo of a cat." and two more tokens leave nine words for the caption
    fits = "The cat sits on a mat. It sleeps well."
    assert checker.check(fits, "stop", CAT).clip_tokens == 11 and checker.check(fits, "stop", CAT).status == "ok"
    found = checker.check(fits + " It dreams of birds.", "stop", CAT)
    assert (found.text, found.status, found.clip_tokens) == (fits, "trimmed", 11) and found.checks == (
        "over_token_limit",
    )
    long = "The cat that sits on the mat sleeps as well as it can. It dreams."
    found = checker.check(long, "stop", CAT)
    assert (found.text, found.status, found.checks) == (long, "ok", ("over_token_limit",))


def test_the_text_without_its_tail_is_what_mentions_the_label():
    found = CaptionChecker(PETS, WordTokenizer()).check("It sits on a mat and looks up. A grey cat.", "stop", CAT)
    assert found.text == "It sits on a mat and looks up." and not found.mentions_label


def test_tokens_are_those_of_the_tokenizer(clip):
    tokenizer = clip[1].tokenizer
    found = CaptionChecker(PETS, tokenizer).check("A cat on a mat.", "stop", CAT)
    assert found.clip_tokens == len(tokenizer("A cat on a mat.")["input_ids"])


def test_the_digest_of_a_tokenizer_does_not_follow_its_last_call(clip):
    tokenizer = clip[1].tokenizer
    before = CaptionChecker(PETS, tokenizer).spec()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=7)
    assert CaptionChecker(PETS, tokenizer).spec() == before and before["token_limit"] == 77


# -- loops, scripts, echoes, addresses ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "The cat is soft soft soft soft soft soft.",
        "The cat is soft and the cat is soft and the cat is soft and the cat is soft and",
        "A cat with a white chest, a white chest, a white chest, a white chest",
        "A cat. " + "The fur is grey and short. " * 6,
        "A cat " + "ha" * 30,
    ],
)
def test_loops(pets, text):
    first, last = pets.check(text, "stop", CAT), pets.check(text, "stop", CAT, last_try=True)
    assert "repetition" in first.checks and "Do not repeat yourself." in first.reask
    assert first.status == last.status == "rejected" and last.reask is None


def test_no_loops(pets):
    for text in (
        "A very, very soft cat with a long, long, long tail.",
        "The cat is grey. The cat is small. The cat is asleep.",
        "A cat on a cat on a cat.",
        "The ears are round, the eyes are round, the head is round, the whole cat looks round.",
    ):
        assert fired(pets, text, CAT) == (), text


@pytest.mark.parametrize(
    "text",
    [
        "这只猫有灰色的毛",
        "A cat with a very 柔 coat that shines in the warm light of the evening sun.",
        "A cat with a мягкая coat that shines in the warm light of the evening sun by the door.",
        "Кошка cat",
    ],
)
def test_foreign_scripts(pets, text):
    assert "foreign_script" in fired(pets, text, CAT)


def test_no_foreign_scripts(pets):
    for text in (
        "A cat in a café, crème fur, 90° turn, 5 µm hairs, α-male, №1, ½ asleep, ﬁne",
        'A cat by a sign: "Выход 出口".',
    ):
        assert "foreign_script" not in fired(pets, text, CAT), text


def test_a_prompt_that_comes_back(pets):
    prompt = PromptSet(domain="pets").prompt("shape", "Saint_Bernard")
    echo = "To differentiate this Saint Bernard photo from other pets photos, note its broad head."
    found = pets.check(echo, "stop", BERNARD, prompt=prompt)
    assert found.checks == ("prompt_echo",) and found.status == "rejected"
    assert found.reask.startswith("Do not repeat these instructions.")
    natural = (
        "The primary shape characteristics of this Saint Bernard, set against other pets, are a broad head and chest."
    )
    assert fired(pets, natural, prompt=prompt) == ()


def test_a_long_class_name_is_no_echo():
    name = "sign that forbids all vehicles over three tonnes to enter"
    checker = CaptionChecker([name, "stop"])
    prompt = PromptSet(domain="gtsrb").prompt("shape", name)
    assert fired(checker, f"A round {name}, with a red rim.", 0, prompt=prompt) == ()


@pytest.mark.parametrize(
    "text", ["See https://x.example/cat", "a cat, www.example.org", "cat (me@mail.example)", "cat.com"]
)
def test_addresses(pets, text):
    found = pets.check(text, "stop", CAT)
    assert "url" in found.checks and found.status == "ok"


def test_no_addresses(pets):
    assert fired(pets, "A cat. 3.5 kg. The cat is 4.io not, e.g.it sits@home.", CAT) in ((), ("url",))
    assert fired(pets, "The cat comes.Organic fur, 2.5 cm, i.e. short.", CAT) == ()


# -- the label --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, text",
    [
        ("Saint_Bernard", "SAINT BERNARDS play."),
        ("Saint_Bernard", "The saint-bernard's head"),
        ("pekingese", "Two Pékingese"),
        ("daisy", "White daisies in a row"),
        ("fox", "foxes"),
        ("leaf", "Autumn leaves"),
        ("bus", "red buses"),
        ("horse", "three horses"),
        ("cookie", "cookies on a tray"),
        ("office supplies", "one office supply"),
        ("fireman", "two firemen"),
        ("hot dog", "A hotdog with mustard"),
        ("AnnualCrop", "An annual crop seen from above"),
        ("queen anne's lace", "Queen Annes lace by the road"),
        ("tench, Tinca tinca", "A tench in green water"),
        ("glass", "two glasses"),
    ],
)
def test_the_label_is_found(name, text):
    assert CaptionChecker([name, "zebra"]).check(text, "stop", 0).mentions_label


@pytest.mark.parametrize(
    "name, text", [("cat", "a catalogue"), ("cap", "a cape"), ("boxer", "a box"), ("bus", "a bush"), ("car", "care")]
)
def test_the_label_is_not_found_in_other_words(name, text):
    found = CaptionChecker([name, "zebra"]).check(text, "stop", 0)
    assert not found.mentions_label and found.checks == ("label_missing",) and found.status == "ok"


def test_the_class_template_can_be_put_in_front():
    found = CaptionChecker(PETS, actions={"label_missing": "prefix"}).check("A broad head.", "stop", BERNARD)
    assert found.text == "a photo of a Saint Bernard. A broad head." and found.mentions_label
    assert found.checks == ("label_missing",) and found.status == "ok"


def test_a_missing_label_can_be_asked_for():
    checker = CaptionChecker(PETS, actions={"label_missing": "reask"}, words=20)
    found = checker.check("A broad head.", "stop", BERNARD)
    assert found.reask == "Use the words 'Saint Bernard'. Answer in one plain paragraph of at most 20 words."
    assert checker.check("A broad head.", "stop", BERNARD, last_try=True).status == "ok"


def test_another_class(pets):
    assert fired(pets, "A boxer with a fawn coat.") == ("label_missing", "other_class")
    assert fired(pets, "This Saint Bernard is larger than a boxer.") == ()
    assert fired(pets, "A boxing glove.") == ("label_missing",)


def test_a_class_named_within_the_own_name_is_no_other_class():
    assert fired(CaptionChecker(["tiger cat", "tiger"]), "Striped like a tiger", 0) == ("label_missing",)
    assert fired(CaptionChecker(["tiger cat", "tiger"]), "A tiger cat", 1) == ()  # ambiguous, but its own name is in it
    assert CaptionChecker(["crane", "crane"]).check("A crane", "stop", 1).mentions_label


DENIED = [
    "The dog in this photo is a Boxer, not a Saint Bernard. Its coat is fawn.",
    "This is a Boxer rather than a Saint Bernard.",
    "This is actually a Boxer, its muzzle square and dark.",
    "This isn't a Saint Bernard. It is a Boxer with a square muzzle.",
    "This dog is not a Saint Bernard; it has the short coat of a Boxer.",
    "The image does not show a Saint Bernard, but a smaller dog.",
    "The dog doesn't look like a Saint Bernard.",
    "While labelled so, this is clearly not a Saint Bernard.",
    "The picture is mislabelled: the dog is a boxer.",
    "The photo appears to be mislabeled, as a Saint Bernard has a longer coat.",
    "Its features are those of a Boxer rather than a Saint Bernard.",
    "The breed is not Saint Bernard. The muzzle is short.",
    "The short coat is inconsistent with a Saint Bernard.",
    "There is no Saint Bernard in this photo; the dog is fawn.",
    "A dog, not a Saint Bernard, with a short coat.",
    "The label seems incorrect: it is a small, short-haired dog.",
    "Despite the label, the dog has the square head of a Boxer.",
    "I look for jowls and cannot see a Saint Bernard here.",
    "Unlike a Saint Bernard, this dog has a short coat.",
    "It is a fawn dog. This is no Saint Bernard.",
]


@pytest.mark.parametrize("text", DENIED)
def test_a_denied_label(pets, text):
    first, last = pets.check(text, "stop", BERNARD), pets.check(text, "stop", BERNARD, last_try=True)
    assert "label_contradicted" in first.checks and first.status == last.status == "rejected"
    assert "without comparing" in first.reask and last.reask is None


NOT_DENIED = [
    (CAT, "This is not a typical cat pose, with the tail over the nose."),
    (CAT, "Unlike other cats, this cat has no fur."),
    (CAT, "The cat is not just a pet, it is a hunter."),
    (CAT, "Not only a cat, but also its kitten is in the picture."),
    (CAT, "The cat is not facing the camera, and not a single whisker is bent."),
    (CAT, "It is not clear whether the cat sleeps."),
    (CAT, "A cat rather than its shadow is in focus, and the dog is not."),
    (CAT, "The cat does not show the cat's usual grace."),
    (CAT, "A cat, not fully grown, with a label on its collar."),
    (CAT, "A cat is often mislabelled as lazy."),
    (CAT, "A grey cat, not the cat's kitten, looks up instead of down."),
    (CAT, "There is no cat bed to be seen, the cat lies on a mat."),
    (CAT, "This cat is actually quite small, in fact tiny."),
    (BERNARD, "This is a Saint Bernard, not a Boxer, as its long coat shows."),
    (BERNARD, "Rather than a short coat, this Saint Bernard has a long one."),
    (BERNARD, "Unlike a boxer, the Saint Bernard has a long coat and is no small dog."),
    (BERNARD, "A Saint Bernard that does not look like a boxer or a pug."),
    (BERNARD, "This Saint Bernard can be mistaken for a great pyrenees, but is not white."),
    (MAU, "The Egyptian Mau's spots are not stripes, and its coat isn't plain."),
]


@pytest.mark.parametrize("label, text", NOT_DENIED)
def test_a_label_that_is_not_denied(pets, label, text):
    assert "label_contradicted" not in fired(pets, text, label)


def test_class_names_that_are_ordinary_words():
    textures = CaptionChecker(["woven", "grid", "striped", "smooth"])
    for text, label in (
        ("Woven threads, not smooth, form a grid rather than a flat sheet.", 0),
        ("The edges are not smooth, and the striped cloth is not new.", 2),
        ("A grid that is not perfectly regular, rather loose.", 1),
    ):
        assert "label_contradicted" not in fired(textures, text, label), text
    assert "label_contradicted" in fired(textures, "The pattern is not striped.", 2)
    assert "label_contradicted" in fired(textures, "The cloth looks woven rather than striped.", 2)


def test_a_denial_counts_although_it_was_trimmed_away():
    text = "The dog sits on a mat, alone. It is a boxer, not a Saint Bernard."
    found = CaptionChecker(PETS, WordTokenizer()).check(text, "stop", BERNARD, last_try=True)
    assert found.text == "The dog sits on a mat, alone." and found.status == "rejected"


# -- actions ----------------------------------------------------------------------------------------------------------
def test_parse_actions():
    assert parse_actions(["label_missing=prefix", " url = reject "]) == {"label_missing": "prefix", "url": "reject"}
    assert parse_actions([]) == {}
    with pytest.raises(UserError, match="Did you mean 'label_missing'"):
        parse_actions(["label_mising=reask"])
    with pytest.raises(UserError, match="expected keep, reask, reject, found 'prefix'"):
        parse_actions(["url=prefix"])
    with pytest.raises(UserError, match="found ''"):
        parse_actions(["url"])
    with pytest.raises(UserError, match="duplicate"):
        CaptionChecker(PETS, actions={"duplicate": "reject"})


def test_actions_change_what_follows():
    kept = CaptionChecker(PETS, actions={"repetition": "keep", "refusal": "keep", "label_contradicted": "reject"})
    loop = kept.check("The cat is soft soft soft soft soft soft.", "stop", CAT)
    assert loop.status == "ok" and loop.checks == ("repetition",)
    assert kept.check("I cannot see a dog.", "stop", CAT).status == "ok"
    denied = kept.check(DENIED[0], "stop", BERNARD)
    assert denied.status == "rejected" and denied.reask is None
    asked = CaptionChecker(PETS, actions={"refusal": "reask"}).check("I cannot help.", "stop", CAT)
    assert asked.status == "refused" and asked.reask


def test_every_check_has_a_place_and_every_status_is_known(pets):
    assert set(CHECKS) == {*DEFAULT_ACTIONS, "duplicate"}
    texts = [GOOD, "", "I cannot.", "A cat with", *DENIED]
    assert {pets.check(t, r, BERNARD).status for t in texts for r in ("stop", "length", None)} <= set(STATUSES)
    for text in texts:
        order = [CHECKS.index(name) for name in fired(pets, text, finish_reason="length")]
        assert order == sorted(order)


def test_the_spec_follows_what_can_change_a_result():
    import json

    specs = [
        CaptionChecker(PETS, **options).spec()
        for options in ({}, {"words": 20}, {"actions": {"url": "reject"}}, {"clean": False})
    ] + [CaptionChecker(PETS, WordTokenizer()).spec(), CaptionChecker(PETS, template="a {}").spec()]
    assert len({json.dumps(spec, sort_keys=True) for spec in specs}) == len(specs)
    assert CaptionChecker(PETS).spec() == specs[0]


# -- hostile and long texts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "is a " * 10_000,
        "<think>" * 7_000,
        "*a " * 15_000,
        "[" * 50_000,
        "the image " * 5_000,
        "not a cat " * 5_000,
        "(50 " * 12_000,
        "`" * 50_000,
        "_a" * 25_000,
        "# " * 20_000,
        "- a\n" * 12_000,
        "a.com@" * 8_000,
        "ab" * 25_000,
        "St. A. " * 7_000,
    ],
)
def test_a_server_cannot_stop_the_clock(pets, text):
    start = time.process_time()  # of this process, however busy the machine is
    found = pets.check(text, "length", CAT, prompt="describe the image " * 9)
    assert time.process_time() - start < 20 and found.status in STATUSES


# -- duplicates -------------------------------------------------------------------------------------------------------
def test_duplicates_are_texts_of_more_than_one_image():
    rows = [("1", "A cat."), ("2", "a  CAT"), ("3", "A dog."), ("3", "A dog."), ("4", "A bird.")]
    assert duplicates(iter(rows)) == {duplicate_key("a cat")}
    assert duplicates([]) == set()


def test_accepted_statuses_come_with_a_text(pets):
    for text in (GOOD, "", "I cannot.", "A cat with", *DENIED):
        found = pets.check(text, "length", BERNARD)
        assert found.status not in ACCEPTED or found.text


def test_the_counter_counts_as_transformers_does():
    from datasets import load_dataset

    from mmft_hf.captioning.judge.tokens import TokenCounter, load_counter
    from mmft_hf.core.builtin import builtin
    from mmft_hf.model.loading import load_tokenizer

    theirs, ours = load_tokenizer("builtin/tiny-clip"), load_counter("builtin/tiny-clip")
    assert ours.limit == theirs.model_max_length == 77
    assert ours.digest() == TokenCounter(theirs).digest()
    texts = [text for row in load_dataset(builtin("builtin/emoji-mini"), split="test")["text"] for text in row]
    texts = [text + tail for text in sorted(set(texts)) for tail in ("", " — “É”  日本 " + 5 * text)]
    assert len(texts) > 500
    assert [ours.count(text) for text in texts] == [len(theirs(text, verbose=False)["input_ids"]) for text in texts]
