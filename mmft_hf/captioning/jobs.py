"""`mmft-hf caption`: from the settings to a folder, with what is printed on the way."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from datasets import Dataset

from ..core.arguments import DataArguments
from ..core.console import is_main, say, table
from ..core.errors import PartialResult, UserError, nearest
from ..core.markdown import public_name
from ..data.splits import is_text, labels_of, load_captioned_dataset, load_splits, text_columns
from ..data.texts import ASPECTS
from .arguments import CaptionArguments
from .ask.captioner import Captioner
from .ask.cost import Spending, estimate_tokens, price_of
from .ask.dispatch import Outcome
from .ask.journal import spent_dollars
from .ask.limits import Limits
from .ask.plan import Plan
from .ask.processes import Processes
from .judge.checks import CaptionChecker, parse_actions
from .judge.tokens import load_counter
from .runs import CaptionRun, caption_with_texts, new_run_id
from .summary import calls_line, many, money, next_line, print_folder, print_prompts, rate
from .types import ACCEPTED, TERMINAL
from .write.card import CLASS_MARK
from .write.dataset import without_captions
from .write.folder import CaptionFolder
from .write.report import caption_card, caption_report
from .write.statistics import CaptionTally


class CaptionJob:
    """One command: its data, its captioner, its folder.

    Raises:
        UserError: a setting, a column, a class or a folder that is not what it should be. Before any call.
    """

    def __init__(self, data_args: DataArguments, args: CaptionArguments):
        self.data_args, self.args = data_args, args
        options = {k: v for k, v in vars(data_args).items() if k not in ("dataset_name", "dataset_config_name")}
        self.data = load_captioned_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
        self.train = data_args.train_split or ("train" if "train" in self.data else next(iter(self.data)))
        self.splits = args.split or [self.train]
        for split in self.splits:
            if split not in self.data:
                raise UserError(f"--split: expected one of {', '.join(self.data)}, found {split!r}.")
        self.names: list[str] = self.data[self.train].features["label"].names
        self.captioner: Captioner = args.captioner_object(self._text_columns())
        self.actions = parse_actions(args.on_check or ())
        self.limits = Limits(args.concurrency, args.requests_per_minute, args.tokens_per_minute, args.max_reasks)
        self.folder = CaptionFolder(args.output_dir)
        self.run_id = new_run_id()
        self.rows = {split: self._rows(split) for split in self.splits}
        self.made_from = self._made_from()

    @cached_property
    def checker(self) -> CaptionChecker:
        return CaptionChecker(
            self.names,
            load_counter(self.args.model_name_or_path),
            words=self.args.words,
            template=self.args.class_template,
            actions=self.actions,
            clean=self.captioner.asks,
        )

    # -- what the settings mean ---------------------------------------------------------------------------------------
    def _text_columns(self) -> list[str]:
        """The columns of `--captioner columns`: those typed, or the only one there is."""
        if self.args.captioner != "columns":
            return []
        columns, features = self.args.text_columns, self.data[self.train].features
        if not columns:
            columns = text_columns(self.data[self.train])
            columns = [name for name in columns if name != "captions"] or columns
            if len(columns) != 1:
                found = ", ".join(columns) or f"none among {', '.join(features)}"
                raise UserError(
                    f"--text_columns: expected one column of lists of texts, found {found}. Type --text_columns NAME, or "
                    "--captioner openai (or another) to have captions written."
                )
        for column in columns:
            if column in features and not is_text(features[column]):
                raise UserError(
                    f"--text_columns: expected columns of text or of lists of texts, found {column} of {features[column]}."
                )
        return columns

    def _rows(self, split: str) -> set[int] | None:
        """The rows that `--shots` and `--classes` leave; None: all of them."""
        rows = None
        if self.data_args.shots and split == self.train:
            # Those that `finetune` draws with the same --shots and --shots_seed.
            rows = set(load_splits(self.data_args).train["source_row"])
        if self.args.classes:
            for name in self.args.classes:
                if name not in self.names:
                    raise UserError(
                        f"--classes: expected names among {', '.join(self.names[:8])}{', …' * (len(self.names) > 8)}, found "
                        f"{name!r}.{nearest(name, self.names)}"
                    )
            wanted = {self.names.index(name) for name in self.args.classes}
            of_class = {i for i, label in enumerate(labels_of(self.data[split])) if label in wanted}
            rows = of_class if rows is None else rows & of_class
        return rows

    def _made_from(self) -> dict:
        """What tells this data set from another in the same folder."""
        name = self.data_args.dataset_name
        model = self.captioner.model and public_name(self.captioner.model)
        spec = self.captioner.spec({"backend": self.captioner.backend, "model": model})
        found = {"dataset_name": public_name(name), "split": self.splits}
        if self.data_args.dataset_config_name:
            found["dataset_config_name"] = self.data_args.dataset_config_name
        found["captioner"] = {k: v for k, v in spec.items() if k not in ("prompts", "sampling", "pictures")}
        return found | {k: spec[k] for k in ("prompts", "sampling", "pictures") if k in spec}

    def open(self, split: str, processes: Processes | None = None, limits: Limits | None = None) -> CaptionRun:
        """The run of one split."""
        rank, world = (processes.rank, processes.world) if processes else (0, 1)
        args = self.args
        return CaptionRun(
            self.captioner,
            self.data[split],
            args.output_dir,
            self.checker,
            limits or self.limits,
            args.max_cost_usd,
            args.prices,
            self.run_id,
            self.rows[split],
            rank,
            world,
            progress=is_main(),
        )

    # -- the verbs ----------------------------------------------------------------------------------------------------
    def plan(self) -> None:
        """`--dry_run`: what would be asked, and what it would cost. Asks nobody."""
        self._headline("Plan for")
        if not self.captioner.asks:
            say(
                "\nNothing is asked of a model, so there is nothing to pay for. Leave --dry_run out to write the data set."
            )
            return
        left = 0
        for split in self.splits:
            run = self.open(split)
            plan, spent = run.plan(), spent_dollars(run.folder)  # without the lock: a run may be at work
            self._print_plan(split, run, plan, spent)
            left += plan.open
        try:
            run.backend.check_key()
        except UserError as error:
            say(f"\nBefore the run: {error}")
        how = "--dry_run" if self.args.dry_run else "`plan`"
        say(f"\nNothing was asked. Leave {how} out to start." if left else "\nNothing is left to ask for.")

    def _print_plan(self, split: str, run: CaptionRun, plan: Plan, spent: float) -> None:
        aspects = len(self.captioner.prompts.aspects) if self.captioner.joint else 1
        calls = -(-plan.open // aspects)
        looked_at = plan.items[:: max(1, len(plan.items) // 32)]
        pictures = [estimate_tokens(*size, run.price) for size in run.sizes(looked_at)]
        prompts = [len(slot.prompt) / 3.5 for job in looked_at for slot in job.slots]
        tokens_in = calls * (sum(pictures) / max(len(pictures), 1) + sum(prompts) / max(len(prompts), 1))
        tokens_out = plan.open * min(self.args.words * 1.4, self.args.max_tokens)
        repeated = f", {plan.repeated:,} of them repeat another" if plan.repeated else ""
        rows = {f"split {split}": many(plan.rows, "image") + repeated}
        if plan.unreadable:
            rows["unreadable"] = f"{many(len(plan.unreadable), 'image')}: {next(iter(plan.unreadable.values()))}"
        rows["captions"] = (
            f"{len(plan.slots):,} wanted, {len(plan.slots) - plan.open:,} in the journal, {plan.open:,} to ask for"
        )
        if plan.items:
            rows["calls"] = f"{calls:,}, not counting what has to be asked again"
            rows["tokens"] = (
                f"about {tokens_in:,.0f} in and {tokens_out:,.0f} out, estimated from {many(len(pictures), 'picture')}"
            )
            rows["cost"] = self._cost(run, tokens_in, tokens_out, spent)
        if spent:
            rows["spent so far"] = money(spent)
        if self.limits.requests_per_minute and plan.items:
            rows["time"] = f"{calls / self.limits.requests_per_minute:,.0f} minutes or more, at the limit per minute"
        say()
        table(rows)
        if plan.items:
            print_prompts(plan.items, self.captioner.joint)

    def _cost(self, run: CaptionRun, tokens_in: float, tokens_out: float, spent: float) -> str:
        if self.captioner.backend == "transformers":
            return "none but this machine's time"
        price, limit = run.price, self.args.max_cost_usd
        if price is None:
            return f"unknown: {self.captioner.model} is in no price table. Type --prices FILE.yaml to name one."
        dollars = (tokens_in * price.input + tokens_out * price.output) / 1e6
        date = f", prices of {price.date}" if price.date else ""
        over = f"; --max_cost_usd {limit:g} will stop it" if limit is not None and spent + dollars > limit else ""
        return (
            f"about {money(dollars)} ({rate(price.input)} in, {rate(price.output)} out per million tokens{date}){over}"
        )

    def run(self) -> None:
        """Captions, or goes on with it, and writes the folder.

        Raises:
            PartialResult: some captions are missing; what there is is written.
            UserError: no further call can succeed.
        """
        self.folder.claim(self.made_from, self.args.overwrite_output_dir)
        if not self.captioner.asks:
            self._headline("Captioning")
            captioned = {s: self._with_texts(s) for s in self.splits}
            self._write(
                captioned, {split: data._fingerprint for split, data in captioned.items()}, Counter(), Outcome()
            )
            return
        processes = Processes(shared=self.captioner.backend == "transformers")
        self._headline("Captioning")
        captioned, fingerprints, sources, totals = {}, {}, {}, Counter()
        outcome, spent = Outcome(), Spending()
        for split in self.splits:
            with self.open(split, processes) as run:
                for note in run.journal.notes:
                    say(f"  {note}")
                plan = run.plan()
                say(f"\n{self._progress_line(split, run, plan, processes)}")
                try:
                    outcome += run.fill(plan)
                finally:
                    processes.done(run.folder, split)
                if not is_main():
                    continue
                processes.wait(run.folder, split)
                results = run.results(plan)
                totals.update(results.statuses)
                spent += results.spent
                totals["unreadable"] += len(plan.unreadable)
                kept = f"{sum(results.statuses.values()) - results.open:,} of {len(plan.slots):,} captions are in {run.folder}"
                if outcome.stopped == "user":
                    raise PartialResult(f"stopped by you; {kept}.", again=True)
                if outcome.stopped == "fatal":
                    raise UserError(f"{outcome.why.rstrip('.')}. {kept}; the same command goes on.")
                fingerprints[split] = run.fingerprint(results)
                if outcome.calls == 0 and len(self.splits) == 1 and not self.args.overwrite_output_dir:
                    if self.folder.is_current(self._all_fingerprints(fingerprints)):
                        self._finish(
                            totals,
                            outcome,
                            self._nothing_to_do(totals, len(plan.slots)),
                        )
                        return
                captioned[split] = run.read(plan, results)
                sources.setdefault(split, run.source(plan, results))
        if is_main():
            self._write(captioned, fingerprints, totals, outcome, sources[self.splits[0]], spent)

    def _progress_line(self, split: str, run: CaptionRun, plan: Plan, processes: Processes) -> str:
        line = f"Split {split}: {many(plan.open, 'caption')} to ask for, {len(plan.slots):,} wanted in all"
        if processes.world > 1:
            line = f"Split {split}: {len(plan.slots):,} captions wanted, shared by {processes.world} processes"
        if plan.unreadable:
            line += f"; {many(len(plan.unreadable), 'image')} cannot be read"
        return line + (f"; prices of {run.price.date}" if run.price and run.price.date and plan.open else "") + "."

    def _with_texts(self, split: str) -> Dataset:
        return caption_with_texts(
            self.data[split], self.captioner, self.checker, self.run_id, progress=True, rows=self.rows[split]
        )

    def _headline(self, verb: str) -> None:
        say(f"{verb} {self.data_args.dataset_name}\n")
        others = [f"{name} {len(split):,}" for name, split in self.data.items() if name not in self.splits]
        images = []
        for split in self.splits:
            rows = self.rows[split]
            part = f"{len(rows):,} of " if rows is not None else ""
            images.append(f"{part}{len(self.data[split]):,} of split {split}")
        what = {"columns": ", ".join(self.captioner.columns), "template": self.args.class_template}
        lines = {
            "classes": len(self.names),
            "images": ", ".join(images) + (f"; other splits get no captions: {', '.join(others)}" if others else ""),
            "captioner": f"{self.captioner.backend} ({what.get(self.captioner.backend, self.captioner.model)})",
        }
        if self.captioner.asks:
            prompts = self.captioner.prompts
            own = [
                f" (your own{nearest(a, ASPECTS).replace('.', '')})" if a not in ASPECTS else ""
                for a in prompts.aspects
            ]
            aspects = ", ".join(map("".join, zip(prompts.aspects, own, strict=True)))
            lines["aspects"] = f"{aspects}; about {prompts.words} words each; domain: {prompts.domain}"
        table(lines | {"output": self.args.output_dir})

    # -- the folder ---------------------------------------------------------------------------------------------------
    def _all_fingerprints(self, fingerprints: dict[str, str]) -> dict[str, str]:
        return fingerprints | {n: d._fingerprint for n, d in self.data.items() if n not in self.splits}

    def _write(
        self, captioned: dict, fingerprints: dict, totals: Counter, outcome: Outcome, source=None, spent=None
    ) -> None:
        splits = {n: captioned.get(n) or without_captions(d, progress=False) for n, d in self.data.items()}
        prompts = self.captioner.prompts
        details = {
            "made_from": self.made_from,
            "model": self.captioner.model and public_name(self.captioner.model),
            "run_id": self.run_id,
            "checks": self.checker.spec(),
            "statuses": dict(totals),
            "complete": not self._missing(totals),
            "fingerprints": self._all_fingerprints(fingerprints),
        }
        if self.captioner.asks:
            details["prompt_texts"] = {aspect: prompts.prompt(aspect, CLASS_MARK) for aspect in prompts.aspects}
            details["spent"] = spent.summary()
            details["last_run"] = outcome.summary()
        statistics = write_folder(self.folder, splits, self.splits[0], details, source)
        if outcome.attempts:
            price = price_of(self.captioner.model, self.args.prices)
            say(f"\n{calls_line(outcome, price, self.captioner.backend == 'transformers')}")
        self._finish(totals, outcome, next_line(self.args.output_dir, statistics))

    def _nothing_to_do(self, totals: Counter, wanted: int) -> str:
        kept = sum(totals[status] for status in ACCEPTED)
        if kept == wanted:
            return f"Nothing to do: {self.args.output_dir} has all {wanted:,} captions."
        others = ", ".join(f"{totals[status]:,} {status}" for status in TERMINAL[len(ACCEPTED) :] if totals[status])
        return (
            f"Nothing to do: {self.args.output_dir} has {kept:,} of {wanted:,} captions, and a run asks for no more "
            f"({others}). Why: mmft-hf caption status --output_dir {self.args.output_dir}"
        )

    @staticmethod
    def _missing(totals: Counter) -> int:
        return sum(totals[status] for status in ("failed", "empty", "truncated", "not_run"))

    def _finish(self, totals: Counter, outcome: Outcome, line: str) -> None:
        missing = self._missing(totals)
        if not missing:
            say(f"\n{line}")
            return
        wanted = sum(totals.values()) - totals["unreadable"]
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in outcome.failures.most_common(4))
        why = f" {outcome.why.rstrip('.')}." if outcome.why else ""
        if outcome.stopped == "cost":
            why = f" The next call could pass --max_cost_usd {self.args.max_cost_usd:g}: type a larger one to go on."
        if totals["truncated"] + totals["empty"] > missing / 2:
            why += (
                f" Most were cut by the token budget or empty: type a larger --max_tokens than {self.args.max_tokens}, "
                "and those alone are asked for again."
            )
        raise PartialResult(
            f"{missing:,} of {wanted:,} captions are missing.{why}{f' Failures: {kinds}.' if kinds else ''} "
            f"{self.args.output_dir} has what there is.",
            again=outcome.stopped != "cost",
        )


def write_folder(folder: CaptionFolder, splits: dict, captioned: str, details: dict, source=None) -> dict:
    """Writes a captioned data set with its report and card, prints what is in it, and returns its statistics.

    Args:
        splits: all of them, with the contract's columns.
        captioned: the split that the report and the card speak of.
        details: of `captions.json`.
        source (*optional*): a `JournalSource`, from which the report takes answers that were not accepted.
    """
    dataset = splits[captioned]
    tally = CaptionTally(dataset)
    statistics = tally.statistics()

    lean = dataset.select_columns(["label", "image_sha256"])

    def unaccepted(row: int, place: int) -> str | None:
        found = lean[row]
        texts = source.raw_texts(found, found["image_sha256"]) if source and found["image_sha256"] else []
        return texts[place] if place < len(texts) else None

    def extras(path) -> None:
        caption_report(dataset, path, details, unaccepted)
        caption_card(dataset, path, details, statistics)

    folder.write(splits, {**details, "statistics": statistics}, extras)
    if source:
        source.reader.close()
    print_folder(folder.path, dataset, tally, statistics, details, source is not None)
    return statistics
