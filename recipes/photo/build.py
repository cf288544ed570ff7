"""Joins the towers; with `--final` writes the folder of `builtin/photo`: a stock `VisionTextDualEncoderModel` in half precision.

Choices are made with 850 of ImageNet's classes, and on validation splits; `--final` then trains on all 1,000.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from align import SIZE, accuracy, as_pictures, class_texts, fitted_scale, split_classes, train
from drawings import TRAINED_ON, ConceptFilter, drawings
from image_tower import VARIANTS, image_tower
from text_tower import batches
from texts import imagenet
from transformers import AlbertModel, AutoTokenizer, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

# Settings that tell how a tokenizer was loaded and last used.
USED = (
    "is_local local_files_only max_length pad_to_multiple_of pad_token_type_id padding_side stride truncation_side "
    "truncation_strategy"
).split()
VALIDATION = (("emoji_mini", "validation"), ("openclipart", "validation"), ("emoji", "validation"))


class Embed:
    """Texts to the text tower's pooled output `(texts, 384)`; each text is encoded once."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AlbertModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.known = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for rows, tokens in batches(self.tokenizer, new, 128) if new else ():
            for row, vector in zip(rows, self.model(**tokens).pooler_output, strict=True):
                self.known[new[row]] = vector
        return torch.stack([self.known[text] for text in texts])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("text", "features", "tower", "imagenet", "emojibase", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="lite0")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--scale", type=float, default=9.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--share", type=float, default=3.0, help="weight of ImageNet's classes; drawings have 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--final", action="store_true", help="train on all classes, and write the folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    read = torch.load(args.features, weights_only=True)
    embed = Embed(args.text)
    features, texts, concepts = drawings(read["sets"], ConceptFilter(read["evaluation"], args.emojibase))
    image_model, processor, rows, _ = image_tower(args.tower, args.variant)
    names, glosses = imagenet(args.imagenet)
    pictures, every = as_pictures(rows), class_texts(names, glosses)
    options = {name: getattr(args, name) for name in ("steps", "rate", "decay", "dropout", "scale", "seed")}

    def trained_on(used):
        """Projections, with ImageNet's classes `used`."""
        sources = [(args.share, pictures[used], [every[i] for i in used], used), (1.0, features, texts, concepts)]
        return train(sources, embed, **options)

    used, held = split_classes(len(names))
    model = trained_on(used)
    held_out = accuracy(model, embed, pictures[held], range(len(held)), [names[i][0] for i in held])
    print(f"names of {len(held)} held-out classes of ImageNet: {100 * held_out:.1f} %", flush=True)
    if args.final:
        model = trained_on(np.arange(len(names)))
    sets = []
    for key in VALIDATION:
        values, items, classes = read["sets"][key]
        sets.append((values.float(), [item["label"] for item in items], [name.replace("_", " ") for name in classes]))
        print(f"{' '.join(key)}: {100 * accuracy(model, embed, *sets[-1]):.1f} %", flush=True)
    if not args.final:
        return

    scale = fitted_scale(model, embed, sets)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        image_model.config, embed.model.config, projection_dim=SIZE, logit_scale_init_value=math.log(scale)
    )
    joined = VisionTextDualEncoderModel(config, image_model, embed.model).eval()
    joined.visual_projection.load_state_dict(model.visual.state_dict())
    joined.text_projection.load_state_dict(model.text.state_dict())
    torch.nn.init.constant_(joined.logit_scale, math.log(scale))
    joined.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    embed.tokenizer.save_pretrained(args.out)
    settings = json.loads((args.out / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in USED}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # as every version of transformers calls it
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    settings = json.loads((args.out / "config.json").read_text())
    settings["text_config"].pop("_name_or_path", None)  # a folder of this machine
    (args.out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for file in args.out.iterdir():
        file.chmod(0o644)
    record = options | {
        "share": args.share,
        "variant": args.variant,
        "projection_dim": SIZE,
        "held_out_names": held_out,
    }
    record |= {"logit_scale": scale, "parameters": sum(p.numel() for p in joined.parameters())}
    record |= {"drawings": len(features), "concepts": len(set(concepts)), "trained_on": TRAINED_ON}
    record["text_tower"] = json.loads((args.text / "distilled.json").read_text())
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
