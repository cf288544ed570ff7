"""Refining: steps are applied to a captioned dataset, and the result is written as another captioned folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from datasets import Dataset
from datasets.fingerprint import Hasher

from ..core.arguments import DataArguments, ModelArguments
from ..core.builtin import builtin
from ..core.console import is_main
from ..core.errors import UserError
from ..core.files import DETAILS_FILE, keeping
from ..core.markdown import public_name
from ..core.seals import note_if_changed
from ..data.raw import split_role
from ..data.texts import joined_class_names
from .apply import AppliedStep, apply_steps
from .arguments import COUNTER, CaptionArguments
from .ask.captioner import Captioner
from .ask.dispatch import Outcome
from .ask.journal_reader import spent_dollars
from .ask.limits import Limits
from .ask.plan import pictures_of
from .ask.roles import check_features, check_roles, check_samples, open_roles, role_summary
from .asker import Asker, PicturesOfDataset
from .bounds import PlannedStep, planned
from .caption_table import CaptionTable, completed
from .judge.checks import CaptionChecker, parse_actions
from .judge.tokens import load_counter
from .split import new_run_id
from .steps.base import Row, Step, score_of
from .steps.clip_score import ClipScore
from .steps.diversity import vendi_of_classes
from .steps.languages import read_class_names
from .steps.self_retrieval import SelfRetrieval
from .steps.settings import check_order, make_step, named_step, read_recipe
from .types import ACCEPTED
from .workflow import load_data, write_folder
from .write.figures import own_figures
from .write.output_folder import CaptionFolder
from .write.statistics import CaptionStatistics

if TYPE_CHECKING:
    from .steps.scorer import Scorer

VERSION = 2  # part of the fingerprint: raise it with any change of what is written
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


@dataclass
class RefineResult:
    """The result of a run.

    Args:
        applied: what each step did.
        statistics: of what was written; None: the folder was up to date.
        outcome: the calls of this run.
        open: number of questions without an answer that the next run asks again.
    """

    applied: list[AppliedStep] = field(default_factory=list)
    statistics: CaptionStatistics | None = None
    outcome: Outcome = field(default_factory=Outcome)
    open: int = 0


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
        needs = [step.title for step in self.steps if step.needs_scorer()]
        self.scorer = (args.scorer or recipe.scorer) if needs else None
        self.flatters = False
        is_student = args.scorer_is_student or bool(recipe.scorer_is_student)
        if needs:
            self._check_scorer(needs[0], is_student)
        self._check_report_scorer(is_student)
        self._check_place()
        captioners = args.to_roles()
        check_roles(self.steps, captioners)
        check_samples(self.steps, captioners)
        left_out = {
            "--classes": args.classes,
            "--shots": data_args.shots,
            "--representatives": args.representatives,
        }
        for flag, typed in left_out.items():
            if typed:
                raise UserError(
                    f"{flag}: expected the whole training split to be refined, found {typed}. Leave {flag} out."
                )
        self.data, self.train, self.sets = load_data(replace(data_args, dataset_name=source))
        self._check_split(data_args)
        self.table = CaptionTable(source, self.data[self.train], self.group_column, columns_of(self.steps))
        check_order(self.steps, self.table.scores())
        if args.class_names_file:
            if not any(step.scripts() for step in self.steps):
                raise UserError(
                    "--class_names_file: expected a step that writes in another language, such as translate: {language: de}, found none. "
                    "Leave it out."
                )
            self._translated()
        self.folder = CaptionFolder(args.output_dir)
        self.earlier = self._earlier()
        needed = {role: captioners[role] for step in self.steps for role in step.roles()}
        spent = spent_dollars(self.folder.path / "journal") if needed else 0.0
        self.roles = open_roles(needed, args.concurrency, args.prices, spent, args.max_cost_usd)
        check_features(self.steps, self.roles)
        self.made_from = self._made_from()
        self.run_id = new_run_id()

    @cached_property
    def checker(self) -> CaptionChecker:
        """The checks of texts that steps write."""
        tokens, args = load_counter(self.args.model_name_or_path or COUNTER), self.args
        actions = parse_actions(args.on_check or ())
        names, translated = self.table.part.class_names, self._translated() if args.class_names_file else None
        return CaptionChecker(names, tokens, args.words, args.class_template, actions, translated=translated)

    def _translated(self) -> list[list[str]]:
        """What each class is called in the language of the steps; a set of labels, what its labels are called."""
        if not self.sets:
            return read_class_names(self.args.class_names_file, self.table.part.class_names)
        names = read_class_names(self.args.class_names_file, self.sets.class_names)
        first = [own[0] for own in names]
        return [[joined_class_names(first, own), *chain(*(names[c] for c in own))] for own in self.sets.sets]

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
        if self.roles:
            found |= {"roles": {name: role.captioner.asked_as(role.identity) for name, role in self.roles.items()}}
        return found | {"report_scorer": self.args.report_scorer and public_name(self.args.report_scorer)}

    def judges_itself(self) -> list[str]:
        """The models that wrote captions which they judge themselves."""
        if "judge" not in self.roles:
            return []
        judge = public_name(self.roles["judge"].captioner.model)
        wrote = {public_name(record["model"]) for row in self.table.rows for record in row.records if record["model"]}
        wrote |= {public_name(role.captioner.model) for name, role in self.roles.items() if name != "judge"}
        return [judge] if judge in wrote else []

    def plan(self) -> list[PlannedStep]:
        """What the steps would ask, at most. Asks nothing and writes nothing, but may score captions."""
        return planned(self.table, self.steps, self._scorer(), self.roles)

    def _scorer(self) -> Scorer | None:
        return open_scorer(self.scorer, self.table, is_main()) if self.scorer else None

    def run(self) -> RefineResult:
        """Applies the steps and writes the folder, unless it is there already.

        Raises:
            UserError: a class would lose its last caption; another dataset is in the folder; no further call can succeed.
            PartialResult: the run ended before all was asked. What was answered is kept.
        """
        args = self.args
        self.folder.claim(self.made_from, args.overwrite_output_dir, lambda: pictures_of(self.data))
        with keeping(self._kept), ExitStack() as stack:
            if not self.roles:
                return self._run(None)
            data = PicturesOfDataset(self.table.part.images, self.table.part.hashes)
            limits = Limits(args.concurrency, args.requests_per_minute, args.tokens_per_minute, args.max_reasks)
            asked = (self.roles, data, self.folder.path, self.checker, limits, self.run_id, is_main(), self.steps)
            return self._run(stack.enter_context(Asker(*asked)))

    def _kept(self) -> str | None:
        """What is there if the disk takes no more."""
        found = f"{self.folder.path} has its earlier captions." if self.folder.details() else None
        return "The answers in the journal stay, and will not be asked for again." if self.roles else found

    def _run(self, asker: Asker | None) -> RefineResult:
        scorer = self._scorer()
        identity = scorer.identity() if scorer else None
        fingerprints = self._fingerprints(identity, asker)
        if not self.args.overwrite_output_dir and self.folder.is_current(fingerprints, self.made_from):
            return RefineResult()
        before, name = self.table.rows, self.args.report_scorer
        # A name that is wrong is found before anything is asked.
        report_scorer = name and open_scorer(name, self.table, is_main(), "--report_scorer")
        checker = self.checker if asker else None
        applied = apply_steps(self.table, self.steps, scorer, asker, checker, self.args.allow_empty_classes)
        refined = self.table.dataset()
        splits = {name: completed(name, split) for name, split in self.data.items() if name != self.train}
        splits = {self.train: refined} | splits
        comparison = own_figures(refined)
        self._add_figures(comparison, before, scorer, report_scorer)
        open_ = asker.open if asker else 0
        details = {key: self.earlier[key] for key in KEPT if key in self.earlier} | {
            "made_from": self.made_from,
            "run_id": self.run_id,
            "complete": self.earlier.get("complete", True) and not open_,
            # What the next run asks again, it must not take for done.
            "fingerprints": self._fingerprints(identity, asker) if not open_ else None,
            "steps": [*(self.earlier.get("steps") or ()), *(step.summary() for step in applied)],
            "comparison": comparison,
            "scorer": identity and identity | {"is_student": self.flatters},
            "report_scorer": self.args.report_scorer and public_name(self.args.report_scorer),
        }
        if asker:
            roles = {name: role_summary(role) for name, role in self.roles.items()}
            details |= {"roles": roles, "judges_itself": self.judges_itself()}
        rows = [{"step": a.step.title, **detail} for a in applied for detail in a.told.details]
        statistics = write_folder(self.folder, splits, self.train, details, step_details=rows, sets=self.sets)
        return RefineResult(applied, statistics, asker.outcome if asker else Outcome(), open_)

    def _fingerprints(self, scorer: Mapping | None, asker: Asker | None) -> dict[str, str]:
        """Of each split: they change with everything that the result depends on, the answers in the journal among it."""
        part = self.table.part
        seen = [self.args.report_scorer, self.data[self.train]._fingerprint, part.hashes, self.table.digest]
        seen += [[step.spec() for step in self.steps], scorer, self.group_column, VERSION]
        if asker:
            seen += [asker.digest(), self.checker.spec(), self.args.max_reasks]
        return {n: d._fingerprint for n, d in self.data.items()} | {self.train: Hasher.hash(tuple(seen))}

    def _add_figures(
        self, comparison: dict, before: Sequence[Row], scorer: Scorer | None, report_scorer: Scorer | None
    ) -> None:
        """Adds what needs a model: how different captions are, and what `--report_scorer` says of them."""
        sides = (before, self.table.rows)
        if scorer:
            for side, score in zip(comparison.values(), vendi_of_classes(sides, scorer), strict=True):
                side["vendi"] = score
        if report_scorer:
            name = public_name(report_scorer.name)
            for side, rows in zip(comparison.values(), sides, strict=True):
                for step, score in ((ClipScore(), "clip"), (SelfRetrieval(), "sr_pct")):
                    found = [
                        score_of(r, score)
                        for own in step.apply(rows, report_scorer)
                        for r in own
                        if r["status"] in ACCEPTED
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
    *,
    roles: Mapping[str, Captioner] = MappingProxyType({}),
    run_dir: str | Path | None = None,
    limits: Limits | None = None,
    max_cost_usd: float | None = None,
    prices: str | None = None,
    tokenizer=None,
) -> Dataset:
    """Scores the captions of a dataset, asks models about them, writes new ones and keeps the best, as `mmft-hf caption refine` does.

    Args:
        dataset: training images: columns `image` and `label` (`ClassLabel`), and `captions` or `caption_records`.
        steps: names, or names with their options: `["clip_score", {"select": {"by": "clip", "keep": 2}}]`.
        scorer: Hub id or folder of the dual encoder that scores, for steps that write scores. It should not be the model
            that will be trained, which flatters what it learns from.
        group_column (*optional*): equal for images of the same thing. Default: images with the same captions are taken as one.
        progress: whether bars are shown.
        roles: who answers the questions of steps: `{"judge": Captioner("openai", model="…"), "writer": …}`.
        run_dir: folder of the journal; required if a step asks.
        limits, max_cost_usd, prices: how fast and for how much.
        tokenizer (*optional*): of the model that will be trained; counts the tokens of new texts.

    Returns:
        The dataset with `captions`, `caption_records` and `image_sha256`, images with their original bytes. A caption that was
        dropped stays in `caption_records` with the status `dropped`.

    Raises:
        UserError: an unknown step or option; steps in an order that cannot work; no scorer or role for a step that needs one; no
            `run_dir`; a class would lose its last caption; no further call can succeed.
        PartialResult: the run ended before all was asked. What was answered is kept.
    """
    made = [make_step(*named_step(entry, "steps")) for entry in steps]
    table = CaptionTable("dataset", dataset, group_column, columns_of(made))
    check_order(made, table.scores())
    if scorer is None and (needs := [step.title for step in made if step.needs_scorer()]):
        raise UserError(f"--scorer: expected the model that step {needs[0]} scores captions with, found none.")
    check_roles(made, roles)
    check_samples(made, roles)
    needed = {role: roles[role] for step in made for role in step.roles()}
    embeddings = scorer and open_scorer(scorer, table, progress)
    if not needed:
        apply_steps(table, made, embeddings)
        return table.dataset()
    if run_dir is None:
        raise UserError("run_dir: expected a folder in which answers are kept, found none. Type run_dir='refined'.")
    limits, spent = limits or Limits(), spent_dollars(Path(run_dir) / "journal")
    opened = open_roles(needed, limits.concurrency, prices, spent, max_cost_usd)
    check_features(made, opened)
    checker = CaptionChecker(table.part.class_names, tokenizer)
    data = PicturesOfDataset(table.part.images, table.part.hashes)
    with Asker(opened, data, run_dir, checker, limits, new_run_id(), progress, made) as asker:
        apply_steps(table, made, embeddings, asker, checker)
    return table.dataset()


def columns_of(steps: Sequence[Step]) -> dict[str, str]:
    """The columns of the dataset that steps read, each with the name of the first step that does."""
    return {column: step.title for step in reversed(steps) for column in step.columns()}


def open_scorer(name: str, table: CaptionTable, progress: bool, flag: str = "--scorer") -> Scorer:
    """The scorer of a table's images. Loads torch."""
    from .steps.scorer import Scorer

    return Scorer(name, table.images(), progress, flag)
