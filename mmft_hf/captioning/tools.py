"""`mmft-hf caption status | retry | bench | export | import | merge`."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from ..core.arguments import DataArguments
from ..core.console import is_main, printable_text, say, table
from ..core.errors import UserError, nearest
from ..core.markdown import public_name
from ..data.splits import load_captioned_dataset
from .arguments import CaptionArguments
from .ask.journal import Journal, by_slot, journal_files
from .ask.journal_parquet import export_journal, import_journal
from .ask.limits import Limits
from .ask.plan import Plan
from .jobs import CaptionJob, write_folder
from .judge.checks import CaptionChecker, parse_actions
from .judge.tokens import load_counter
from .summary import many, money, next_line
from .types import ACCEPTED, OPEN, STATUSES, TERMINAL
from .write.dataset import without_captions
from .write.folder import CaptionFolder

RETRIED = ("rejected", "refused", "bad_image")  # what `retry` asks for again where no status is typed


def status(operands: list[str], data_args: DataArguments, args: CaptionArguments) -> None:
    """What a journal holds: results by aspect, checks that fired, failures with their reasons."""
    journal = Path(args.output_dir) / "journal"
    record = CaptionFolder(args.output_dir).record()
    if not journal_files(journal):
        what = (
            f"a data set of captioner {record['made_from']['captioner']['backend']}, which needs none"
            if record
            else "none"
        )
        raise UserError(f"--output_dir {args.output_dir}: expected a journal of captions in it, found {what}.")
    by_aspect: dict[str, Counter] = {}
    checks, spent, errors, asked = Counter(), Counter(), {}, Counter()
    columns = (
        "key",
        "slot",
        "aspect",
        "status",
        "pending",
        "reask",
        "updated_at",
        "checks",
        "error_class",
        "error",
        "label",
    )
    columns += ("model", "cost", "tokens_in", "tokens_out", "attempts", "image_sha256", "call_id")
    for _, rows in by_slot(journal, columns):
        last = rows[-1]
        state = "not_run" if last["pending"] else last["status"]
        by_aspect.setdefault(last["aspect"], Counter())[state] += 1
        checks.update(json.loads(last["checks"] or "[]"))
        for name in ("cost", "tokens_in", "tokens_out"):
            spent[name] += sum(row[name] or 0 for row in rows)
        # A call for all aspects counts with its first one.
        spent["attempts"] += sum(row["attempts"] or 0 for row in rows if row["call_id"] in (None, row["key"]))
        if state not in ACCEPTED:
            kind = last["error_class"] or ", ".join(json.loads(last["checks"] or "[]")) or state
            errors.setdefault((state, kind), []).append(last)
        elif last["model"]:
            asked[last["model"]] += 1
    total = sum(by_aspect.values(), Counter())
    say(f"Captions in {journal}\n")
    states = [state for state in STATUSES if total[state]]
    width = max(len(aspect) for aspect in (*by_aspect, "all"))
    asked_for = ((record.get("made_from") or {}).get("prompts") or {}).get("aspects") or sorted(by_aspect)
    by_aspect = {a: by_aspect[a] for a in (*asked_for, *sorted(by_aspect)) if a in by_aspect}
    say("  " + " " * width + "".join(f"{state:>12}" for state in states))
    for aspect, counts in (*by_aspect.items(), ("all", total)):
        say(f"  {aspect:<{width}}" + "".join(f"{counts[state]:>12,}" for state in states))
    say()
    lines = {"model": ", ".join(f"{printable_text(m)} ({n:,})" for m, n in asked.most_common(3)) or "none answered"}
    lines["spent"] = f"{spent['tokens_in']:,} tokens in, {spent['tokens_out']:,} out, " + (
        money(spent["cost"]) if spent["cost"] else "cost unknown or none"
    )
    lines["attempts"] = f"{spent['attempts']:,}"
    if checks:
        lines["checks"] = ", ".join(f"{name} {count:,}" for name, count in checks.most_common())
    if record.get("statuses"):
        lines["data set"] = (
            f"{'complete' if record['complete'] else 'with captions missing'}, of run {record['run_id']}"
        )
    table(lines)
    if errors:
        files = _file_names(CaptionFolder(args.output_dir), {rows[0]["image_sha256"] for rows in errors.values()})
        say("\nNot accepted:")
        for (state, kind), rows in sorted(errors.items(), key=lambda item: -len(item[1])):
            row = rows[0]
            image = files.get(row["image_sha256"]) or f"image {row['image_sha256'][:12]}"
            example = printable_text(f"{row['label'] or ''}, {image}, {row['aspect']}")
            what = state if kind == state else f"{state} ({kind})"
            say(f"  {len(rows):,} {what}, e.g. {example}{': ' + row['error'] if row['error'] else ''}")
        again = sum(total[state] for state in OPEN)
        say(
            f"\n{again:,} of them are asked again by the next run."
            if again
            else "\nA run asks for none of these again."
        )
        final = [state for state in TERMINAL if total[state] and state not in ACCEPTED]
        if final:
            say(
                f"To ask again for the others: the command of the run with `retry {' '.join(final)}` after `mmft-hf caption`."
            )


def _file_names(folder: CaptionFolder, wanted: set[str]) -> dict[str, str]:
    """Names of the files of these images, from the data set in the folder; fewer where it has not been written."""
    found: dict[str, str] = {}
    for name in folder.record().get("files", ()):
        if name.endswith(".parquet") and len(found) < len(wanted) and (folder.path / name).is_file():
            with pq.ParquetFile(folder.path / name) as file:
                shard = file.read(["image.path", "image_sha256"])  # no picture is read
            for digest, image in zip(*(shard[c].to_pylist() for c in ("image_sha256", "image")), strict=True):
                if digest in wanted:
                    found.setdefault(digest, Path(image["path"] or "").name)
    return found


def _needs_a_model(verb: str, args: CaptionArguments) -> None:
    if args.captioner in ("columns", "template"):
        raise UserError(
            f"caption {verb}: expected the settings of a run that asks a model, found --captioner {args.captioner}. Type the "
            f"command of the run, with `{verb}` after `mmft-hf caption`."
        )


def retry(operands: list[str], data_args: DataArguments, args: CaptionArguments) -> None:
    """Opens results of some statuses among those that the command asks for, then runs."""
    statuses = operands or list(RETRIED)
    for status in statuses:
        if status not in STATUSES:
            found = f"{status!r}.{nearest(status, STATUSES)}"
            raise UserError(f"retry: expected statuses among {', '.join(STATUSES)}, found {found}")
    _needs_a_model("retry", args)
    if not journal_files(Path(args.output_dir) / "journal"):
        raise UserError(
            f"--output_dir {args.output_dir}: expected a journal of captions in it, found none. Leave `retry` out to start."
        )
    job = CaptionJob(data_args, args)
    count = 0
    # By one process, before any asks: in `run` they meet before they begin.
    for split in job.splits if is_main() else ():
        with job.open(split) as run:
            count += run.journal.reopen(statuses, run.plan().slots)
    say(f"{many(count, 'result')} ({', '.join(statuses)}) {'is' if count == 1 else 'are'} asked for again.\n")
    job.run()


def bench(operands: list[str], data_args: DataArguments, args: CaptionArguments) -> None:
    """Times a few calls at growing concurrency. Their captions go to the journal, so nothing is lost."""
    _needs_a_model("bench", args)
    job = CaptionJob(data_args, args)
    widths = [n for n in (1, 4, 16, 64, 256) if n < args.concurrency] + [args.concurrency]
    if job.captioner.backend == "transformers":
        widths = [1]  # one batch at a time: --captioner_batch_size is what to vary
    split, first = job.splits[0], True
    say("concurrency  captions/s  seconds a call (median)  tokens out/s  dollars per 1,000 captions")
    for width in widths:
        limits = Limits(width, args.requests_per_minute, args.tokens_per_minute, args.max_reasks)
        with job.open(split, limits=limits) as run:
            run.progress = False
            plan = run.plan()
            count = max(8, 3 * width) if job.captioner.backend != "transformers" else 4 * args.captioner_batch_size
            outcome = run.fill(Plan(plan.items[:count], plan.slots, rows=plan.rows))
        if outcome.stopped:
            raise UserError(f"caption bench: {outcome.why}")
        if not outcome.calls:
            say("every caption is in the journal already." if first else "(no more captions to ask for)")
            return
        first = False
        captions = sum(outcome.results[state] for state in ACCEPTED)
        cost = f"{1000 * outcome.cost / max(captions, 1):.4f}" if run.price else "unknown"
        say(
            f"{width:>11}  {captions / outcome.seconds:>10.2f}  {median(outcome.latencies_s):>23.2f}  "
            f"{outcome.tokens_out / outcome.seconds:>12.1f}  {cost:>26}"
        )


def export(operands: list[str], data_args: DataArguments, args: CaptionArguments) -> None:
    """Writes the journal as one parquet file."""
    if len(operands) != 1 or not operands[0].endswith(".parquet"):
        raise UserError("caption export: expected the name of one file. Type mmft-hf caption export FILE.parquet.")
    if not journal_files(Path(args.output_dir) / "journal"):
        raise UserError(f"--output_dir {args.output_dir}: expected a journal of captions in it, found none.")
    count = export_journal(Path(args.output_dir) / "journal", operands[0])
    say(f"{count:,} results of {args.output_dir} are in {operands[0]}.")


def import_(operands: list[str], data_args: DataArguments, args: CaptionArguments) -> None:
    """A parquet file of `export` goes to the journal; JSON files of captions become a captioned data set."""
    kinds = {Path(name).suffix.lower() for name in operands}
    missing = [name for name in operands if not Path(name).is_file()]
    if missing:
        raise UserError(f"caption import: expected files, found no {missing[0]}.")
    if kinds == {".parquet"}:
        with Journal(Path(args.output_dir) / "journal") as journal:
            for name in operands:
                say(f"{import_journal(journal, name):,} results of {name} are new in {args.output_dir}.")
        return
    if kinds != {".json"}:
        found = ", ".join(operands) or "none"
        raise UserError(
            f"caption import: expected a .parquet file of `export`, or .json files of captions, found {found}. Type "
            "mmft-hf caption import FILE …"
        )
    from .write.imports import KEY_RULES, import_captions

    if args.key_rule not in KEY_RULES:
        raise UserError(
            f"--key_rule: expected one of {', '.join(KEY_RULES)}, which says how the keys of {operands[0]} name images, "
            f"found {args.key_rule or 'none'}."
        )
    options = {k: v for k, v in vars(data_args).items() if k not in ("dataset_name", "dataset_config_name")}
    data = load_captioned_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    train = data_args.train_split or ("train" if "train" in data else next(iter(data)))
    made_from = {
        "dataset_name": public_name(data_args.dataset_name),
        "captioner": {"backend": "import", "key_rule": args.key_rule},
    }
    folder = CaptionFolder(args.output_dir)
    folder.claim(made_from, args.overwrite_output_dir)
    tokenizer = load_counter(args.model_name_or_path)
    # A model wrote them, but they are not ours to change: refusals are dropped, everything else is flagged.
    actions = {"refusal": "reject"} | parse_actions(args.on_check or ())
    names = data[train].features["label"].names
    checker = CaptionChecker(names, tokenizer, template=args.class_template, actions=actions, clean=False)
    captioned, report = import_captions(data[train], operands, args.key_rule, args.captioner_model, tokenizer, checker)
    for line in report.lines():
        say(line)
    others = {name: without_captions(split, progress=False) for name, split in data.items() if name != train}
    _write(
        folder, {train: captioned, **others}, made_from, [Path(name).name for name in operands], args.captioner_model
    )


def merge(operands: list[str], data_args: DataArguments, args: CaptionArguments) -> None:
    """Several captioned data sets of the same images become one."""
    from .write.merges import merge_captions

    if len(operands) < 2:
        raise UserError(
            "caption merge: expected two or more captioned data sets. Type mmft-hf caption merge FOLDER FOLDER …"
        )
    made_from = {
        "dataset_name": "merged",
        "captioner": {"backend": "merge", "data_sets": [public_name(name) for name in operands]},
    }
    folder = CaptionFolder(args.output_dir)
    folder.claim(made_from, args.overwrite_output_dir)
    loaded = {name: load_captioned_dataset(name) for name in operands}
    first = loaded[operands[0]]
    train = data_args.train_split or ("train" if "train" in first else next(iter(first)))
    for name, data in loaded.items():
        if train not in data:
            raise UserError(f"{name}: expected split {train!r}, found {', '.join(data)}. Type --train_split NAME.")
    merged, report = merge_captions({name: data[train] for name, data in loaded.items()})
    for line in report.lines():
        say(line)
    others = {name: without_captions(split, progress=False) for name, split in first.items() if name != train}
    _write(folder, {train: merged, **others}, made_from, [public_name(name) for name in operands], None)


def _write(folder: CaptionFolder, splits: dict, made_from: dict, sources: list[str], model: str | None) -> None:
    details = {**made_from, "made_from": made_from, "sources": sources, "model": model, "complete": True}
    details |= {"run_id": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), "fingerprints": None}
    statistics = write_folder(folder, splits, next(iter(splits)), details)
    say(f"\n{next_line(folder.path, statistics)}")
