"""Refining: steps are applied to a captioned dataset, and the result is written as another captioned folder."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from datasets.fingerprint import Hasher

from ..core.arguments import DataArguments, ModelArguments
from ..core.builtin import builtin
from ..core.console import is_main, some
from ..core.errors import UserError, nearest
from ..core.files import COMPARED_PAGE, DETAILS_FILE, REFINED_PAGE, atomic_write, keeping
from ..core.markdown import public_name
from ..core.seals import note_if_changed
from ..data.raw import split_role
from .arguments import CaptionArguments
from .ask.plan import pictures_of
from .split import new_run_id
from .steps.asking import Ask, answered
from .steps.base import Row, Step, score_of
from .steps.clip_score import ClipScore
from .steps.diversity import vendi_of_classes
from .steps.self_retrieval import SelfRetrieval
from .steps.settings import check_order, make_step, named_step, read_recipe
from .types import ACCEPTED
from .workflow import load_data, write_folder
from .write.card import captioned_splits, title
from .write.comparison import Compared, changes_from, choose, comparison_page, refined_page
from .write.dataset import CAPTION_FEATURES, RECORD, captions_from
from .write.figures import caption_figures, figure_rows, own_figures
from .write.labelled import LabelledImages, with_columns
from .write.output_folder import CaptionFolder
from .write.statistics import CaptionStatistics

if TYPE_CHECKING:
    from .steps.scorer import Scorer

VERSION = 1  # part of the fingerprint: raise it with any change of what is written
KEPT = (
    "model",
    "checks",
    "prompt_texts",
    "requests",
    "left_out",
    "spent",
    "last_run",
    "statuses",
    "sources",
    "license",
)


class CaptionTable:
    """The caption records of one split, in an order that depends on pictures and classes alone.

    Args:
        name: of the dataset, for messages.
        dataset: columns `image`, `label`, and `captions` or `caption_records`.
        group_column: see `CaptionArguments`.

    Attributes:
        rows: in the order of class and sha256.
        order: for each of them, its number in the dataset.
        shared: number of images that have all their captions in common with another one. Without a `group_column` they form
            groups.

    Raises:
        UserError: no such column; no captions.
    """

    def __init__(self, name: str, dataset: Dataset, group_column: str | None = None):
        if group_column and group_column not in dataset.column_names:
            raise UserError(
                f"--group_column: expected one of {', '.join(dataset.column_names)}, found {group_column!r}."
                f"{nearest(group_column, dataset.column_names)}"
            )
        self.part = part = LabelledImages(name, dataset, captioned=True)
        records = [with_all(r, c) for r, c in zip(part.records, part.captions, strict=True)]
        if not any(map(captions_from, records)):
            raise UserError(
                f"{name}: expected captions, found none. Type mmft-hf caption --dataset_name {shlex.quote(name)} …"
            )
        texts = ["\n".join(sorted(captions_from(own))) for own in records]
        counts = Counter(zip(part.labels, texts, strict=True))
        self.shared = sum(count for (_, text), count in counts.items() if count > 1 and text)
        values = dataset[group_column][:] if group_column else [text or None for text in texts]
        groups = [f"row {i}" if value is None else f"= {value}" for i, value in enumerate(values)]
        self.order = sorted(range(len(records)), key=lambda i: (part.labels[i], part.hashes[i] or "", i))
        self.rows = [Row(part.hashes[i], part.labels[i], part.class_name(i), groups[i], records[i]) for i in self.order]

    def images(self) -> Dataset:
        """The images and labels in the order of `rows`, not decoded."""
        return self.part.images.select_columns(["image", "label"]).select(self.order)

    def scores(self) -> list[str]:
        """Names of the scores that captions have."""
        found = (score["name"] for row in self.rows for k in row.captions() for score in row.records[k]["scores"] or ())
        return list(dict.fromkeys(found))

    def texts(self) -> set[str]:
        """All captions."""
        return {row.records[k]["text"] for row in self.rows for k in row.captions()}

    def dataset(self) -> Dataset:
        """The dataset with the present records."""
        records: list = [None] * len(self.order)
        for i, row in zip(self.order, self.rows, strict=True):
            records[i] = list(row.records)
        return _rebuilt(self.part, records, [captions_from(own) for own in records])


def with_all(records: Sequence[dict], captions: Sequence[str]) -> list[dict]:
    """The records of an image, and one for each of its captions that has none: a text that the dataset already had."""
    known = {record["text"] for record in records if record["status"] in ACCEPTED}
    own = {
        "aspect": "captions",
        "status": "ok",
        "model": "columns",
        "prompt_id": "captions",
        "checks": [],
        "attempts": 1,
    }
    new = [text for text in dict.fromkeys(captions) if text not in known]
    return [*records, *(dict.fromkeys(RECORD) | own | {"text": text, "sample": i} for i, text in enumerate(new))]


def _rebuilt(part: LabelledImages, records: list, captions: list) -> Dataset:
    columns = {"captions": captions, "caption_records": records, "image_sha256": part.hashes}
    result = with_columns(part.images, columns, CAPTION_FEATURES)
    ordered = [name for name in part.columns if name in result.column_names]
    return result.select_columns(ordered + [name for name in result.column_names if name not in ordered])


def _completed(name: str, dataset: Dataset) -> Dataset:
    """A split that is not refined, with the columns and fields of one that is."""
    part = LabelledImages(name, dataset)
    return _rebuilt(part, part.records, part.captions)


@dataclass
class AppliedStep:
    """What a step did.

    Args:
        before, after: number of captions.
        unscored: captions to which it could give no score, or which it kept because they had none.
        dropped: number of captions that it dropped, by class.
    """

    step: Step
    before: int
    after: int
    unscored: int
    dropped: Counter = field(default_factory=Counter)

    def summary(self) -> dict:
        """Entry of `captions.json`."""
        step = self.step
        options = {
            key: value for key, value in step.spec().items() if key not in ("step", "version") and value is not None
        }
        told = {"about": step.about, "follows": step.after, "differs": step.differs}
        counts = {"before": self.before, "after": self.after, "unscored": self.unscored, "dropped": dict(self.dropped)}
        return {"name": step.name, "options": options} | told | counts


def apply_steps(table: CaptionTable, steps: Sequence[Step], scorer: Scorer | None) -> list[AppliedStep]:
    """Applies steps to the rows of a table, one after the other.

    Raises:
        UserError: a class would lose its last caption.
    """
    applied = []
    for number, step in enumerate(steps, 1):
        before = _by_class(table.rows)
        fitted = step.fit(table.rows, scorer)
        answers = [answered(step.ask(row, fitted), _nobody) for row in table.rows]
        found = step.apply(table.rows, scorer, answers)
        names = (*step.writes(), *step.reads())
        unscored = sum(
            not any(score["name"] in names for score in row.records[k]["scores"] or ())
            for row in (table.rows if step.reads() else _with(table.rows, found))
            for k in row.captions()
        )
        table.rows = _with(table.rows, found)
        after = _by_class(table.rows)
        if lost := [name for name in before if not after[name]]:
            raise UserError(
                f"step {number} {step.name}: expected each class to keep a caption, but {some(lost)} would lose the last one. "
                "Choose a lower threshold, or keep instead of above. Nothing was written."
            )
        applied.append(AppliedStep(step, before.total(), after.total(), unscored, before - after))
    return applied


def _nobody(ask: Ask) -> None:
    raise RuntimeError(f"a question to the {ask.role}, whom no step may ask")


def _with(rows: Sequence[Row], records: Sequence[Sequence[dict]]) -> list[Row]:
    return [replace(row, records=own) for row, own in zip(rows, records, strict=True)]


def _by_class(rows: Sequence[Row]) -> Counter:
    """Number of captions by class, each text of an image once."""
    found: Counter = Counter()
    for row in rows:
        if count := len(captions_from(row.records)):
            found[row.class_name] += count
    return found


@dataclass
class RefineResult:
    """The result of a run: what each step did, and the statistics of what was written; None: the folder was up to date."""

    applied: list[AppliedStep] = field(default_factory=list)
    statistics: CaptionStatistics | None = None


class RefineWorkflow:
    """Everything that `mmft-hf caption refine` does, without what it prints.

    Args:
        source: the captioned dataset: a folder or Hub id. It is only read.

    Raises:
        UserError: an unusable setting, step, split or folder, before anything is computed.
    """

    def __init__(self, data_args: DataArguments, args: CaptionArguments, source: str):
        self.args, self.source = args, source
        recipe = read_recipe(args.steps or ())
        self.steps = recipe.steps
        self.group_column = args.group_column or recipe.group_column
        needs = [step.name for step in self.steps if step.needs_scorer()]
        self.scorer = (args.scorer or recipe.scorer) if needs else None
        self.flatters = False
        is_student = args.scorer_is_student or bool(recipe.scorer_is_student)
        if needs:
            self._check_scorer(needs[0], is_student)
        self._check_report_scorer(is_student)
        self._check_place()
        for flag, typed in (("--classes", args.classes), ("--shots", data_args.shots)):
            if typed:
                raise UserError(
                    f"{flag}: expected the whole training split to be refined, found {typed}. Leave {flag} out."
                )
        self.data, self.train = load_data(replace(data_args, dataset_name=source))
        self._check_split(data_args)
        self.table = CaptionTable(source, self.data[self.train], self.group_column)
        check_order(self.steps, self.table.scores())
        self.folder = CaptionFolder(args.output_dir)
        self.earlier = self._earlier()
        self.made_from = self._made_from()

    def _check_scorer(self, step: str, is_student: bool) -> None:
        if not self.scorer:
            raise UserError(
                f"--scorer: expected the model that step {step} scores captions with, found none. Type --scorer NAME, for example "
                "google/siglip2-base-patch16-224."
            )
        self.flatters = self._is_student("--scorer", self.scorer, is_student)

    def _check_report_scorer(self, is_student: bool) -> None:
        name = self.args.report_scorer
        if name and self.scorer and _place(name) == _place(self.scorer):
            raise UserError(
                f"--report_scorer {name}: expected another model than --scorer, which has chosen the captions, found the same. Type "
                "another one."
            )
        if name:
            self._is_student("--report_scorer", name, is_student)

    def _is_student(self, flag: str, name: str, allowed: bool) -> bool:
        """Whether a model is the one that will be trained, which must be `allowed`."""
        student = self.args.model_name_or_path or ModelArguments.model_name_or_path
        same = _place(name) == _place(student)
        if same and not allowed:
            raise UserError(
                f"{flag} {name}: expected another model than the one that will be trained (--model_name_or_path {student}), because "
                f"a model flatters what it learns from. Type another {flag}, the --model_name_or_path that you will train, or "
                "--scorer_is_student true."
            )
        return same

    def _check_place(self) -> None:
        output, source = Path(self.args.output_dir).resolve(), Path(builtin(self.source)).resolve()
        if source.is_dir() and (output == source or source in output.parents or output in source.parents):
            raise UserError(
                f"--output_dir {self.args.output_dir}: expected a folder apart from {self.source}, which is only read. Type another "
                "one."
            )

    def _check_split(self, data_args: DataArguments) -> None:
        """Only training images are refined: whatever is learnt from other splits makes their results too good."""
        for split in self.args.split or [self.train]:
            role = "test" if split == data_args.test_split else split_role(split)
            if split == data_args.validation_split:
                role = "validation"
            if role in ("test", "validation") or split != self.train:
                raise UserError(
                    f"--split: expected the split to train on, found {split!r}. Only training captions are refined."
                )

    def _earlier(self) -> dict:
        """`captions.json` of the source; empty if it has none."""
        folder = Path(builtin(self.source))
        found = CaptionFolder(folder).details() if folder.is_dir() else {}
        note_if_changed(found, folder / DETAILS_FILE)
        return found

    def _made_from(self) -> dict:
        found = {"dataset_name": public_name(self.source), "captioner": {"backend": "columns"}}
        found |= self.earlier.get("made_from") or {}
        found |= {"split": [self.train], "refined": [step.spec() for step in self.steps]}
        found |= {"scorer": self.scorer and public_name(self.scorer), "group_column": self.group_column}
        return found | {"report_scorer": self.args.report_scorer and public_name(self.args.report_scorer)}

    def run(self) -> RefineResult:
        """Applies the steps and writes the folder, unless it is there already.

        Raises:
            UserError: a class would lose its last caption; another dataset is in the folder.
        """
        self.folder.claim(self.made_from, self.args.overwrite_output_dir, lambda: pictures_of(self.data))
        with keeping(lambda: f"{self.folder.path} has its earlier captions." if self.folder.details() else None):
            return self._run()

    def _run(self) -> RefineResult:
        scorer = open_scorer(self.scorer, self.table, is_main()) if self.scorer else None
        identity = scorer.identity() if scorer else None
        spec = [step.spec() for step in self.steps]
        part = self.table.part
        seen = (
            self.args.report_scorer,
            self.data[self.train]._fingerprint,
            part.hashes,
            part.captions,
            spec,
            identity,
            self.group_column,
            VERSION,
        )
        fingerprints = {n: d._fingerprint for n, d in self.data.items()} | {self.train: Hasher.hash(seen)}
        if not self.args.overwrite_output_dir and self.folder.is_current(fingerprints, self.made_from):
            return RefineResult()
        before = self.table.rows
        applied = apply_steps(self.table, self.steps, scorer)
        refined = self.table.dataset()
        splits = {name: _completed(name, split) for name, split in self.data.items() if name != self.train}
        splits = {self.train: refined} | splits
        comparison = own_figures(refined)
        self._add_figures(comparison, before, scorer)
        details = {key: self.earlier[key] for key in KEPT if key in self.earlier} | {
            "made_from": self.made_from,
            "run_id": new_run_id(),
            "complete": self.earlier.get("complete", True),
            "fingerprints": fingerprints,
            "steps": [*(self.earlier.get("steps") or ()), *(step.summary() for step in applied)],
            "comparison": comparison,
            "scorer": identity and identity | {"is_student": self.flatters},
            "report_scorer": self.args.report_scorer and public_name(self.args.report_scorer),
        }
        statistics = write_folder(self.folder, splits, self.train, details)
        return RefineResult(applied, statistics)

    def _add_figures(self, comparison: dict, before: Sequence[Row], scorer: Scorer | None) -> None:
        """Adds what needs a model: how different captions are, and what `--report_scorer` says of them."""
        sides = (before, self.table.rows)
        if scorer:
            for side, score in zip(comparison.values(), vendi_of_classes(sides, scorer), strict=True):
                side["vendi"] = score
        if self.args.report_scorer:
            name = public_name(self.args.report_scorer)
            judge = open_scorer(self.args.report_scorer, self.table, is_main())
            for side, rows in zip(comparison.values(), sides, strict=True):
                for step, score in ((ClipScore(), "clip"), (SelfRetrieval(), "sr_pct")):
                    found = [
                        score_of(r, score) for own in step.apply(rows, judge) for r in own if r["status"] in ACCEPTED
                    ]
                    values = [value for value in found if value is not None]
                    mean = sum(values) / len(values) if values else None
                    side["scores"][f"{score} by {name}"] = {"mean": mean, "captions": len(values)}


def _place(name: str) -> str:
    """One spelling of a model's name: a folder's real path, or the Hub id."""
    path = Path(builtin(name))
    return str(path.resolve()) if path.is_dir() else name


def refine_captions(
    dataset: Dataset,
    steps: Sequence[str | Mapping[str, Mapping]],
    scorer: str | None = None,
    group_column: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Scores the captions of a dataset and keeps the best, as `mmft-hf caption refine` does.

    Args:
        dataset: training images: columns `image` and `label` (`ClassLabel`), and `captions` or `caption_records`.
        steps: names, or names with their options: `["clip_score", {"select": {"by": "clip", "keep": 2}}]`.
        scorer: Hub id or folder of the dual encoder that scores, for steps that write scores. It should not be the model
            that will be trained, which flatters what it learns from.
        group_column (*optional*): equal for images of the same thing. Default: images with the same captions are taken as one.
        progress: whether bars are shown.

    Returns:
        The dataset with `captions`, `caption_records` and `image_sha256`, images with their original bytes. A caption that was
        dropped stays in `caption_records` with the status `dropped`.

    Raises:
        UserError: an unknown step or option; steps in an order that cannot work; no scorer for a step that needs one; a class
            would lose its last caption.
    """
    made = [make_step(*named_step(entry, "steps")) for entry in steps]
    table = CaptionTable("dataset", dataset, group_column)
    check_order(made, table.scores())
    if scorer is None and (needs := [step.name for step in made if step.needs_scorer()]):
        raise UserError(f"--scorer: expected the model that step {needs[0]} scores captions with, found none.")
    apply_steps(table, made, scorer and open_scorer(scorer, table, progress))
    return table.dataset()


def open_scorer(name: str, table: CaptionTable, progress: bool) -> Scorer:
    """The scorer of a table's images. Loads torch."""
    from .steps.scorer import Scorer

    return Scorer(name, table.images(), progress)


# -- the report -------------------------------------------------------------------------------------------------------
def caption_comparison(
    data_args: DataArguments, folder: str, other: str | None = None
) -> tuple[list[tuple[str, str, str]], Path]:
    """Writes the page of a captioned folder before and after its steps, or of another dataset (before) and it (after).

    Args:
        folder: the captioned folder, into which the page is written.
        other: another captioned dataset of the same images.

    Returns:
        The figures, as `figures.figure_rows`, and the page.

    Raises:
        UserError: no captioned folder; no steps to tell of, and no `other`; no image in common.
    """
    details = CaptionFolder(folder).details()
    if not details:
        raise UserError(f"caption report: expected a captioned folder, found no {DETAILS_FILE} in {folder}.")
    data, train = load_data(DataArguments(dataset_name=folder))
    split = next((name for name in captioned_splits(details) if name in data), train)
    name = title(details)
    if other is None:
        if not details.get("steps"):
            raise UserError(
                f"caption report: expected a folder of mmft-hf caption refine, found {folder}, which no step has changed. Type "
                "--compare OTHER to compare two captioned datasets."
            )
        with atomic_write(Path(folder) / REFINED_PAGE) as path:
            refined_page(path, data[split], f"{name}: before and after", details)
        return figure_rows(**details["comparison"]), Path(folder) / REFINED_PAGE
    others, other_train = load_data(replace(data_args, dataset_name=other))
    after = CaptionTable(folder, data[split])
    before = CaptionTable(other, others[split if split in others else other_train])
    figures = figure_rows(*(caption_figures((r.image_sha256, r.records) for r in t.rows) for t in (before, after)))
    there = {(row.image_sha256, row.class_name): row.records for row in before.rows if row.image_sha256}
    pairs = [
        Compared(i, changes_from(there[row.image_sha256, row.class_name], row.records))
        for i, row in enumerate(after.rows)
        if (row.image_sha256, row.class_name) in there
    ]
    if not pairs:
        raise UserError(f"--compare {other}: expected captions of the images of {folder}, found none of them there.")
    images = after.images()
    with atomic_write(Path(folder) / COMPARED_PAGE) as path:
        sides, steps = (public_name(other), public_name(folder)), details.get("steps") or ()
        comparison_page(path, f"{name}: compared", sides, figures, steps, choose(pairs, images["label"][:]), images)
    return figures, Path(folder) / COMPARED_PAGE
