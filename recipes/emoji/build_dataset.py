"""Builds the emoji dataset: pictures of one concept by several vendors, 43 classes, new concepts and new styles as tests.

usage: bash fetch.sh RAW && python build_dataset.py RAW OUT      (needs rsvg-convert; about a minute on 2 cores)
"""

import argparse
import collections
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from concepts import Icons, norm, package, read_concepts
from datasets import ClassLabel, Dataset, Features, Image, List, Value, disable_progress_bars
from render import draw, icon_svg
from texts import Texts

# vendor: (Iconify set, or package, folder and ending of its files), npm package, licence
VENDORS = {
    "noto": ("noto", "@iconify-json/noto", "Apache-2.0"),
    "twemoji": ("twemoji", "@iconify-json/twemoji", "CC-BY-4.0"),
    "fluent_flat": ("fluent-emoji-flat", "@iconify-json/fluent-emoji-flat", "MIT"),
    "emojione2": ("emojione", "@iconify-json/emojione", "CC-BY-4.0"),
    "openmoji": ("openmoji", "@iconify-json/openmoji", "CC-BY-SA-4.0"),
    # The package says Apache-2.0; of the original, that is the code, and the drawings are CC BY 4.0.
    "fxemoji": ("fxemoji", "@iconify-json/fxemoji", "CC-BY-4.0"),
    "streamline": ("streamline-emojis", "@iconify-json/streamline-emojis", "CC-BY-4.0"),
    "fluent_3d": (("lobehub-fluent-emoji-3d", "assets", "webp"), "@lobehub/fluent-emoji-3d", "MIT"),
    "openmoji_black": (("openmoji", "black/svg", "svg"), "openmoji", "CC-BY-SA-4.0"),
    "fluent_hc": ("fluent-emoji-high-contrast", "@iconify-json/fluent-emoji-high-contrast", "MIT"),
    "emojione_mono": ("emojione-monotone", "@iconify-json/emojione-monotone", "CC-BY-4.0"),
}
NEW_VENDORS = ("openmoji", "fxemoji", "streamline", "fluent_3d")
MONOCHROME = ("openmoji_black", "fluent_hc", "emojione_mono")
SPLITS = ("train", "validation", "test", "test_new_vendor", "test_monochrome")

# CLDR subgroup: class. Those whose class a picture alone shows; people, signs, flags and symbols are left out.
CLASSES = {
    "face-smiling": "smiling face",
    "face-costume": "costume face",
    "cat-face": "cat face",
    "heart": "heart",
    "hand-fingers-open": "open hand",
    "hand-single-finger": "pointing hand",
    "hand-fingers-closed": "fist",
    "body-parts": "body part",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "insect",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "prepared food",
    "food-asian": "Asian food",
    "food-sweet": "dessert",
    "drink": "drink",
    "dishware": "tableware",
    "place-building": "building",
    "transport-ground": "land vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "sky-weather": "sky and weather",
    "sport": "sports equipment",
    "game": "game",
    "clothing": "clothing",
    "musical-instrument": "musical instrument",
    "phone": "telephone",
    "computer": "computer",
    "book-paper": "book or paper",
    "money": "money",
    "mail": "mail",
    "writing": "writing tool",
    "office": "office supplies",
    "lock": "lock or key",
    "tool": "tool",
    "science": "science",
    "medical": "medicine",
    "household": "household item",
}
PEOPLE = r"\b(man|woman|men|women|person|people|boy|girl|prince|princess)\b"
COLOURS = r"\b(red|orange|yellow|green|blue|purple|brown|black|white|grey|light blue|pink)\b"
STATES = r"\b(open|closed|bullet|high-speed|oncoming|with|flying|waxing|waning|crescent|gibbous|quarter|first|last|full|new)\b"


def family(concept: dict) -> str:
    """Variants of one concept (gender, colour, face or body, direction) have one key, and so one split."""
    subgroup = concept["subgroup"]
    name = re.sub(r":.*| facing right| face$", "", concept["label"].lower())
    name = re.sub(PEOPLE, "", name)
    if subgroup != "heart":
        name = re.sub(COLOURS, "", name)
    if subgroup in ("sky-weather", "transport-ground", "book-paper", "mail", "lock"):
        name = re.sub(STATES, "", name)
    return f"{subgroup}|{' '.join(name.split())}"


def split_concepts(concepts: dict[str, dict]) -> dict[str, str]:
    """60 % of the families of a class for train, 20 % for validation, 20 % for test; the draw is seeded by the class."""
    families = collections.defaultdict(set)
    for concept in concepts.values():
        families[concept["subgroup"]].add(family(concept))
    part = {}
    for subgroup, keys in families.items():
        keys = sorted(keys)
        random.Random(f"0|{subgroup}").shuffle(keys)
        n = max(1, round(0.2 * len(keys)))
        part |= {key: "test" if i < n else "validation" if i < 2 * n else "train" for i, key in enumerate(keys)}
    return {code: part[family(concept)] for code, concept in concepts.items()}


def split_of(vendor: str, concept_split: str) -> str | None:
    """The split of a picture; None: it is left out. New styles are seen in the test alone, with concepts of the test."""
    if vendor in NEW_VENDORS or vendor in MONOCHROME:
        style = "test_new_vendor" if vendor in NEW_VENDORS else "test_monochrome"
        return style if concept_split == "test" else None
    return concept_split


def sources(raw: Path, concepts: dict[str, dict]):
    """Yields (vendor, code points, what `draw` draws) of every icon that draws a concept of ours."""
    icons = Icons(raw, read_concepts(raw))
    for vendor, (where, _, _) in VENDORS.items():
        if isinstance(where, str):
            found = {code: icon_svg(icons.icons[where], name) for name, code in icons.resolve(where).items()}
        else:
            name, folder, ending = where
            found = {norm(path.stem): path for path in sorted((package(raw, name) / folder).glob(f"*.{ending}"))}
        yield from ((vendor, code, source) for code, source in found.items() if code in concepts)


def build(raw: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """The rows of each split, in the order of emoji, and the class names."""
    concepts = {code: c for code, c in read_concepts(raw).items() if c["subgroup"] in CLASSES}
    todo = list(sources(raw, concepts))
    drawn = {code for _, code, _ in todo}
    concepts = {code: concept for code, concept in concepts.items() if code in drawn}
    part, texts = split_concepts(concepts), Texts(raw)
    todo = [(split_of(vendor, part[code]), vendor, code, source) for vendor, code, source in todo]
    todo = sorted((job for job in todo if job[0]), key=lambda job: (concepts[job[2]]["order"], job[1]))
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(draw, [job[3] for job in todo]))
    rows, known = {split: [] for split in SPLITS}, {code: texts.of(code, concept) for code, concept in concepts.items()}
    for (split, vendor, code, _), picture in zip(todo, pictures, strict=True):
        if picture is None:
            print(f"left out, as it fails to render: {code} of {vendor}")
            continue
        text, origin = known[code]
        rows[split].append(
            {
                "id": f"{code}_{vendor}",
                "image": {"bytes": picture, "path": f"{code}_{vendor}.png"},
                "label": CLASSES[concepts[code]["subgroup"]],
                "text": text,
                "text_source": origin,
                "concept": code,
                "concept_name": concepts[code]["label"],
                "vendor": vendor,
                "source": f"npm:{VENDORS[vendor][1]}",
                "license": VENDORS[vendor][2],
            }
        )
    first = {}
    for concept in concepts.values():
        name = CLASSES[concept["subgroup"]]
        first[name] = min(concept["order"], first.get(name, concept["order"]))
    return rows, sorted(first, key=first.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="folder that fetch.sh filled")
    parser.add_argument("out", type=Path, help="folder of the dataset, for --dataset_name; it must not exist")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"expected a folder that does not exist yet, found {args.out}. Type another, or remove it.")
    if not shutil.which("rsvg-convert"):
        parser.error("expected the program rsvg-convert, found none. Type: apt-get install librsvg2-bin")
    disable_progress_bars()
    rows, names = build(args.raw)
    texts = ("id", "concept", "concept_name", "vendor", "source", "license")
    features = {name: Value("string") for name in texts} | {"image": Image(), "label": ClassLabel(names=names)}
    features |= {"text": List(Value("string")), "text_source": List(Value("string"))}
    for split, found in rows.items():
        data = Dataset.from_list(
            [row | {"label": names.index(row["label"])} for row in found], features=Features(features)
        )
        data.to_parquet(args.out / "data" / f"{split}-00000-of-00001.parquet")
        print(
            f"{split:16} {len(data):5,} images, {len(set(data['concept'][:])):4,} concepts, {len(set(data['label'][:]))} classes"
        )


if __name__ == "__main__":
    main()
