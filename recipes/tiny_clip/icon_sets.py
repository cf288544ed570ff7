"""Read the icons of the npm packages: name, aliases, tags, categories and SVG of each."""

import json
import re
from pathlib import Path

import yaml

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">{body}</svg>'
)
BRAND = re.compile(r"brand|logo|social media|flag|currenc|crypto|programming|file type", re.I)


def icon(name, svg, aliases=(), tags=(), categories=()):
    """One icon; aliases are other names of it, tags are words about it, categories are the set's own drawers."""
    return {"name": name, "svg": svg, "aliases": list(aliases), "tags": list(tags), "categories": list(categories)}


def plain(name, strip=""):
    """'chef-toque-hat-2' -> 'chef toque hat'."""
    name = re.sub(strip, "", name) if strip else name
    return re.sub(r"\s+", " ", re.sub(r"[-_ ]+\d+\b|[-_]+", " ", name)).strip().lower()


def iconify(folder, strip="", skip=""):
    """An @iconify-json package. strip: removed from names; skip: icons whose name matches are left out."""
    data = json.loads((folder / "icons.json").read_text())
    meta = json.loads(p.read_text()) if (p := folder / "metadata.json").exists() else {}
    categories, aliases = {}, {}
    for category, names in meta.get("categories", {}).items():
        for name in names:
            categories.setdefault(name, []).append(category)
    for alias, entry in data.get("aliases", {}).items():
        aliases.setdefault(entry["parent"], []).append(plain(alias, strip))
    seen = set()
    # longest names last: of 'bot-16', 'bot-20' ... the largest drawing is kept
    for name in sorted(data["icons"], key=lambda n: [int(x) for x in re.findall(r"\d+$", n)], reverse=True):
        entry = data["icons"][name]
        if entry.get("hidden") or (skip and re.search(skip, name)):
            continue
        body = entry["body"]
        if "fluent" in folder.name:
            if (key := re.sub(r"-\d+$", "", name)) in seen:
                continue
            seen.add(key)
        w, h = (entry.get(k, data.get(k, 16)) for k in ("width", "height"))
        x, y = (entry.get(k, data.get(k, 0)) for k in ("left", "top"))
        svg = SVG.format(w=w, h=h, x=x, y=y, body=body)
        yield icon(plain(name, strip), svg, aliases.get(name, ()), (), categories.get(name, ()))


def lucide(folder):
    tags = json.loads((folder / "tags.json").read_text())
    for path in sorted((folder / "icons").glob("*.svg")):
        yield icon(plain(path.stem), path.read_text(), (), tags.get(path.stem, ()))


def tabler(folder):
    for name, entry in json.loads((folder / "icons.json").read_text()).items():
        for style in entry["styles"]:
            path = folder / "icons" / style / f"{name}.svg"
            if path.exists():
                tags = [str(t) for t in entry["tags"]]
                yield icon(plain(name), path.read_text(), (), tags, [entry["category"].lower()])


def phosphor(folder):
    """The catalogue is JavaScript; name, categories and tags are extracted from it by pattern."""
    text = (folder / "dist" / "index.mjs").read_text()
    drawers = dict(re.findall(r'i\.(\w+) = "([^"]+)"', text[: text.index("a = /*")]))
    pattern = r'name: "([^"]+)",(?:.*?)categories: \[(.*?)\](?:.*?)tags: \[(.*?)\]'
    for name, categories, tags in re.findall(pattern, text, re.S):
        categories = [drawers.get(c, "") for c in re.findall(r"e\.(\w+)", categories)]
        tags = [t for t in re.findall(r'"([^"]+)"', tags) if "*" not in t]
        for style in ("fill", "duotone", "regular"):
            path = folder / "assets" / style / (name if style == "regular" else f"{name}-{style}")
            if (path := path.with_name(path.name + ".svg")).exists():
                yield icon(plain(name), path.read_text(), (), tags, categories)


def mdi(folder):
    for entry in json.loads((folder / "meta.json").read_text()):
        if not entry["deprecated"] and not entry["name"].endswith("-outline"):
            path = folder / "svg" / f"{entry['name']}.svg"
            aliases = [plain(a) for a in entry["aliases"]]
            yield icon(plain(entry["name"]), path.read_text(), aliases, (), [t.lower() for t in entry["tags"]])


def fontawesome(folder):
    drawers = {}
    for entry in yaml.safe_load((folder / "metadata" / "categories.yml").read_text()).values():
        for name in entry["icons"]:
            drawers.setdefault(name, []).append(entry["label"].lower())
    for name, entry in yaml.safe_load((folder / "metadata" / "icons.yml").read_text()).items():
        path = folder / "svgs" / "solid" / f"{name}.svg"
        if path.exists():
            aliases = [plain(str(a)) for a in (entry.get("aliases") or {}).get("names", ())]
            tags = [str(t) for t in (entry.get("search") or {}).get("terms") or ()]
            yield icon(plain(entry["label"]), path.read_text(), [plain(name), *aliases], tags, drawers.get(name, ()))


def carbon(folder):
    drawers = {}
    for entry in yaml.safe_load((folder / "categories.yml").read_text())["categories"]:
        for name in entry["members"]:
            drawers.setdefault(name, []).append(entry["name"].lower())
    for entry in json.loads((folder / "metadata.json").read_text())["icons"]:
        if entry.get("deprecated") or not entry["assets"]:
            continue
        name, aliases = entry["name"], [str(a) for a in entry.get("aliases", ())]
        yield icon(plain(name), entry["assets"][0]["source"], (), aliases, drawers.get(name, ()))


READERS = {
    "iconify": iconify,
    "lucide": lucide,
    "tabler": tabler,
    "phosphor": phosphor,
    "mdi": mdi,
    "fontawesome": fontawesome,
}
READERS["carbon"] = carbon


def read_set(entry, raw):
    """Icons of one entry of sources.json; raw: folder of the unpacked packages. Brands, logos and flags are left out."""
    folder = Path(raw) / f"{entry['package'].lstrip('@').replace('/', '-')}-{entry['version']}"
    for item in READERS[entry["reader"]](folder, **entry.get("options", {})):
        if not BRAND.search(" ".join([item["name"], *item["categories"]])):
            yield item
