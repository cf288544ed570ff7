"""Classifies pictures, or all pictures in folders, with a saved classifier."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.arguments import ALLOW_PICKLE, Range, check_settings, setting
from ..core.console import plain
from ..core.errors import PartialResult, UserError
from ..core.files import atomic_write, keeping, write_csv


@dataclass
class PredictArguments:
    """Which classifier is used, and how its answers are written."""

    model_name_or_path: str = setting("outputs/mmft", "Output folder of finetune, or its Hub repository.")
    model_revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")
    allow_pickle: bool = setting(False, ALLOW_PICKLE)
    classes: list[str] | None = setting(
        None,
        "Names of any classes, which pictures are compared with by the class template, in place of the classifier's own; accuracy on "
        "them was not measured. A model with --text_trunk opens its caption encoder for them.",
    )
    top_k: int = setting(
        3,
        "Classes printed for each picture. With several labels per picture: all that hold, whatever this is.",
        range=Range(1),
    )
    output_file: str | None = setting(
        None,
        "A .csv or .jsonl file for the answers. Default: they are printed. In .csv, texts that a spreadsheet would run "
        "get an apostrophe in front; in .jsonl all are exact.",
    )
    reject_below: float | None = setting(
        None,
        "Answer `unknown` if the best class has a probability below this. With several labels per picture: a class holds from this "
        "score on. Default: what the classifier was saved with.",
        range=Range(0, 1),
    )
    batch_size: int = setting(64, "Pictures per batch.", range=Range(1))


ARGUMENTS = (PredictArguments,)
POSITIONAL = ("images", "pictures, or folders of pictures")


def run(args: PredictArguments, images: list[str]) -> None:
    """Prints one line per picture. A picture that cannot be read is named and left out."""
    import torch
    from tqdm.auto import tqdm

    from ..data.images import BadImage, read_image
    from ..data.strangers import find_images
    from ..model.opening import default_device
    from ..predict.classifier import ImageClassifier

    files, notes = find_images(images)
    for note in notes:
        print(note, file=sys.stderr)
    check_settings(args)
    if args.output_file and Path(args.output_file).suffix not in (".csv", ".jsonl"):
        raise UserError(f"--output_file {args.output_file}: expected a name that ends in .csv or .jsonl.")
    if args.output_file:
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    source = (args.model_name_or_path, args.model_revision, args.allow_pickle)
    classifier = (
        ImageClassifier.zero_shot(source[0], args.classes, *source[1:])
        if args.classes is not None
        else ImageClassifier.from_pretrained(*source)
    ).to(default_device())
    if args.reject_below is not None:
        classifier.head = classifier.head.rejecting(args.reject_below)
    # Other programs may read the answers on standard output; this line is not one of them.
    name, classes = plain(args.model_name_or_path), len(classifier.class_names)
    print(f"Classifying {len(files):,} pictures with {name} ({classes} classes)", file=sys.stderr)

    answers, bad = [], []
    starts = range(0, len(files), args.batch_size)
    for start in tqdm(starts, desc="Pictures", disable=len(starts) < 3):
        readable, pixels = [], []
        for file in files[start : start + args.batch_size]:
            try:
                pixels.append(classifier.preprocess([read_image(file)]))
                readable.append(file)
            except BadImage as error:
                bad.append(file)
                print(plain(f"{file}: cannot be read ({error})", lines=False), file=sys.stderr)
        if pixels:
            with torch.no_grad():
                logits = classifier(torch.cat(pixels).to(classifier.model.device))
            answers += zip(readable, classifier.best(logits, args.top_k), strict=True)

    if args.output_file:
        with keeping(lambda: f"{len(answers)} pictures are classified, but {args.output_file} is as it was before."):
            _write(Path(args.output_file), answers)
        print(f"{len(answers)} predictions written to {plain(args.output_file)}")
    else:
        for file, best in answers:
            said = ", ".join(f"{one['label']} {one['score']:.1%}" for one in best) or "none of the classes"
            print(plain(f"{file}: {said}", lines=False))
    if bad:
        raise PartialResult(f"{len(bad)} of {len(files)} pictures could not be read; the others are classified.")


def _write(path: Path, answers: list[tuple[str, list[dict]]]) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"file": name, "predictions": best}, ensure_ascii=False) for name, best in answers]
        with atomic_write(path) as temporary:
            # File names need not be valid UTF-8: their bytes are written as they are.
            temporary.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
        return
    classes = max((len(best) for _, best in answers), default=0)  # with several labels, pictures differ
    header = ["file", *(f"{what}_{k + 1}" for k in range(classes) for what in ("label", "score"))]
    rows = [[name, *(value for one in best for value in one.values())] for name, best in answers]
    write_csv(path, [header, *(row + [""] * (len(header) - len(row)) for row in rows)])
