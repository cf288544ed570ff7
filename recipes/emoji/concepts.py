"""The concepts of emoji (emojibase), and which icon of which vendor draws which of them."""

import collections
import json
import re
import unicodedata
from pathlib import Path

SETS = (
    "noto twemoji openmoji fluent-emoji-flat noto-v1 emojione emojione-v1 fxemoji "
    "fluent-emoji-high-contrast emojione-monotone streamline-emojis"
).split()
SHORTCODES = ("cldr", "emojibase", "github", "joypixels", "iamcal", "emojibase-legacy")
# Names of fxemoji that no rule finds; "-": not an emoji.
FXEMOJI = """
cat=1F431 catside=1F408 dog=1F436 dogside=1F415 bunny=1F430 bunnyside=1F407 mouse=1F42D mouseside=1F401
pig=1F437 pigside=1F416 pigsnout=1F43D tiger=1F42F tigerside=1F405 leopardside=1F406 dragonhead=1F432
dragonside=1F409 hampster=1F439 frontfacingchick=1F425 spurtingwhale=1F433 acorn=1F330 chilipepper=1F336
evergreen=1F332 fallingleaf=1F342 leaffluttering=1F343 bouquetofflowers=1F490 bolt=26A1 wave=1F30A
sunrays=2600 sunraincloud=1F326 stormcloud=26C8 cellphone=1F4F1 confetti=1F38A fishcakeswirl=1F365
forkknife=1F374 present=1F381 tennisball=1F3BE heels=1F460 mensshoe=1F45E mansshirt=1F455 womansshirt=1F45A
sandals=1F461 makeupbag=1F45D pinkwallet=1F45B studiomic=1F399 videocasette=1F4FC heartblue=1F499
heartgreen=1F49A heartpurple=1F49C heartyellow=1F49B heartarrow=1F498 snowmountains=1F3D4 toykotower=1F5FC
sunglasses=1F60E darksunglasses=1F576 monkeyhear=1F649 monkeysee=1F648 monkeyspeak=1F64A turban=1F473
printericon=1F5A8 pen=1F58A construct=1F477 constructionsign=1F6A7 flexbicep=1F4AA fistedhand=270A
bullhorn=1F4E2 clamshellmobile=1F4F2 blackpushpin=1F4CC envelopedownarrowabove=1F4E9
highspeedtrainbulletnose=1F685 folder=1F4C1 openfolder=1F4C2 note=1F4DD notebookdecorativecover=1F4D4
outbox=1F4E4 loudlycrying=1F62D crying=1F622 handheldvideocamera=1F4F9 up=- down=- left=- right=- screen=-
document=- page=- pages=- kiss=- clock1oclock=1F550 clock2oclock=1F551 clock3oclock=1F552 clock4oclock=1F553
clock6oclock=1F555 clock7oclock=1F556 clock12oclock=1F55B
"""
MANUAL = {"fxemoji": dict(pair.split("=") for pair in FXEMOJI.split())}


def package(raw: Path, name: str) -> Path:
    """Folder of an unpacked npm package, of any version."""
    found = sorted(raw.glob(f"{name}-[0-9]*"))
    if not found:
        raise SystemExit(f"expected the package {name} in {raw}, found none. Type: bash fetch.sh {raw}")
    return found[-1]


def load(path: Path):
    return json.loads(path.read_text("utf-8"))


def norm(code: str) -> str:
    """Code points without variation selectors: `2764-FE0F` -> `2764`."""
    return "-".join(x for x in re.split(r"[-_ ]", code.upper()) if x not in ("FE0F", "FE0E"))


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def slug(text: str) -> str:
    text = re.sub("['“”]", "", _ascii(text).replace("&", "and"))
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _ascii(text))


def read_concepts(raw: Path) -> dict[str, dict]:
    """Code points -> label, tags, subgroup and order of each emoji."""
    folder = package(raw, "emojibase-data")
    groups = load(folder / "meta/groups.json")
    return {
        norm(entry["hexcode"]): {
            "label": entry["label"],
            "tags": entry.get("tags", []),
            "subgroup": groups["subgroups"][str(entry["subgroup"])],
            "order": entry.get("order", 0),
        }
        for entry in load(folder / "en/data.json")
        if entry.get("subgroup") is not None and groups["groups"][str(entry["group"])] != "component"
    }


class Icons:
    """The icon sets of a folder of packages, and the concept of each icon."""

    def __init__(self, raw: Path, concepts: dict[str, dict]):
        self.concepts = concepts
        folders = {name: package(raw, f"iconify-json-{name}") for name in SETS}
        self.icons = {name: load(folder / "icons.json") for name, folder in folders.items()}
        self.chars = {name: load(folder / "chars.json") for name, folder in folders.items()}
        self.by_name = self._names()
        self.by_squashed = self._squashed(raw)

    def _names(self) -> dict[str, str]:
        """Names in order of trust: labels, code points of the sets, aliases."""
        names = {}
        for code, concept in self.concepts.items():
            names.setdefault(slug(concept["label"]), code)
        for chars in self.chars.values():
            for code, name in chars.items():
                if norm(code) in self.concepts:
                    names.setdefault(name, norm(code))
        for _ in range(3):  # an alias may have an alias
            for icons in self.icons.values():
                for alias, entry in icons.get("aliases", {}).items():
                    if set(entry) - {"parent"}:
                        continue  # rotated or flipped
                    if entry["parent"] in names:
                        names.setdefault(alias, names[entry["parent"]])
                    elif alias in names:
                        names.setdefault(entry["parent"], names[alias])
        return names

    def _squashed(self, raw: Path) -> dict[str, str]:
        """Names without anything but letters and digits, Unicode's and chat programs' among them."""
        names = {}
        for name, code in self.by_name.items():
            names.setdefault(squash(name), code)
        for code in self.concepts:
            if "-" not in code and (name := unicodedata.name(chr(int(code, 16)), None)):
                names.setdefault(squash(name), code)
        for entry in load(package(raw, "emoji-datasource-google") / "emoji.json"):
            if (code := norm(entry["unified"])) in self.concepts:
                for name in [entry["name"] or "", *entry["short_names"]]:
                    if name:
                        names.setdefault(squash(name), code)
        for file in SHORTCODES:
            for code, found in load(package(raw, "emojibase-data") / f"en/shortcodes/{file}.json").items():
                if norm(code) in self.concepts:
                    for name in [found] if isinstance(found, str) else found:
                        names.setdefault(squash(name), norm(code))
        return names

    def resolve(self, name: str) -> dict[str, str]:
        """Icon -> code points, for one set; each concept at most once."""
        icons, aliases = self.icons[name]["icons"], self.icons[name].get("aliases", {})
        manual, codes, out = MANUAL.get(name, {}), collections.defaultdict(list), {}
        for code, icon in self.chars[name].items():
            codes[icon].append(norm(code))
        for icon in sorted(icons, key=lambda icon: icon not in manual):
            if icon in manual:
                if manual[icon] in self.concepts:
                    out[icon] = manual[icon]
                continue
            code = next((code for code in codes[icon] if code in self.concepts), None) if icon in codes else None
            if not code and icon in codes:
                continue  # a skin tone, or another emoji that is not a separate concept
            code = code or self.by_name.get(icon)
            if not code:
                known = (a for a, entry in aliases.items() if entry.get("parent") == icon and a in self.by_name)
                code = next((self.by_name[alias] for alias in known), None)
            code = code or self.by_squashed.get(squash(icon))
            if not code and name == "streamline-emojis":
                base = re.sub(r"-(1|2|3|4|5)$", "", icon)
                code = self.by_name.get(base) if base != icon else None
            if code and code not in out.values():
                out[icon] = code
        return out
