"""The texts of a concept: its names, keywords and, for some, a definition. They become its captions."""

import re
from pathlib import Path

from concepts import load, norm, package

# Subgroup -> files of WordNet in which the meaning of its names is looked up; all others: artifact.
LEXFILES = {
    "animal-mammal": ["animal"],
    "animal-bird": ["animal"],
    "animal-reptile": ["animal"],
    "animal-marine": ["animal"],
    "animal-bug": ["animal"],
    "plant-flower": ["plant"],
    "plant-other": ["plant"],
    "food-fruit": ["food", "plant"],
    "food-vegetable": ["food", "plant"],
    "food-prepared": ["food"],
    "food-asian": ["food"],
    "food-sweet": ["food"],
    "drink": ["food"],
    "body-parts": ["body"],
    "sky-weather": ["phenomenon", "object", "event"],
    "sport": ["act", "artifact"],
}
ARTIFACTS = (
    "dishware place-building transport-ground transport-water transport-air game clothing musical-instrument phone "
    "computer book-paper money mail writing office lock tool science medical household"
).split()
LEXFILES |= {subgroup: ["artifact"] for subgroup in ARTIFACTS}
# Numbers of WordNet's noun files, which start at 3.
NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
).split()
NUMBER = {name: i for i, name in enumerate(NOUNS, start=3)}


class WordNet:
    """Definitions of nouns (WordNet 3.0, Debian's wordnet-base)."""

    def __init__(self, raw: Path):
        folder = raw / "wordnet/usr/share/wordnet"
        self.senses, self.synsets = {}, {}
        for line in (folder / "index.noun").read_text("latin1").splitlines():
            if line[0] != " ":
                words = line.split()
                self.senses[words[0]] = words[-int(words[2]) :]
        for line in (folder / "data.noun").read_text("latin1").splitlines():
            if line[0] != " ":
                self.synsets[line[:8]] = (int(line[9:11]), line.split(" | ", 1)[1].strip())

    def gloss(self, lemma: str, files: list[str]) -> str | None:
        """Definition of the first sense in these files, without examples."""
        allowed = {NUMBER[name] for name in files}
        for offset in self.senses.get(lemma.lower().strip().replace(" ", "_"), []):
            number, text = self.synsets[offset]
            if number in allowed:
                return re.split(r';\s*"|\s"', text)[0].strip().rstrip(";")
        return None


class Texts:
    """Looks texts up by code points."""

    def __init__(self, raw: Path):
        def by_code(table):
            return {norm("-".join(f"{ord(char):X}" for char in key)): value for key, value in table.items()}

        annotations = load(package(raw, "cldr-annotations-full") / "annotations/en/annotations.json")
        self.cldr = by_code(annotations["annotations"]["annotations"])
        self.emojilib = by_code(load(package(raw, "emojilib") / "dist/emoji-en-US.json"))
        self.openmoji = {
            norm(entry["hexcode"]): entry for entry in load(package(raw, "openmoji") / "data/openmoji.json")
        }
        self.wordnet = WordNet(raw)

    def gloss(self, concept: dict) -> str | None:
        files = LEXFILES.get(concept["subgroup"])
        label = concept["label"].lower().replace("’", "'")
        for name in (label, re.sub(r" face$", "", label), re.sub(r"^(person|people) ", "", label)):
            if files and (found := self.wordnet.gloss(name, files)):
                return f"{name}: {found}"
        return None

    def of(self, code: str, concept: dict) -> tuple[list[str], list[str]]:
        """The texts of a concept, and where each is from."""
        label = concept["label"]
        keywords = dict.fromkeys([*concept["tags"], *self.cldr.get(code, {}).get("default", [])])
        tags = self.openmoji.get(code, {"openmoji_tags": ""})["openmoji_tags"].split(",")
        words = [word.replace("_", " ") for word in self.emojilib.get(code, [])[1:]]
        words = [word for word in words if re.match(r"^[A-Za-z][A-Za-z0-9 '-]*$", word)]
        found = {
            "cldr_name": label,
            "cldr_keywords": ", ".join(word for word in keywords if word.lower() != label.lower()),
            "openmoji_tags": ", ".join(tag.strip() for tag in tags if tag.strip()),
            "emojilib_keywords": ", ".join(list(dict.fromkeys(words))[:12]),
            "wordnet_gloss": self.gloss(concept) or "",
        }
        texts, sources = [], []
        for source, text in found.items():
            text = " ".join(text.replace("_", " ").split())
            if text and text.lower() not in [known.lower() for known in texts]:
                texts.append(text)
                sources.append(source)
        return texts, sources
