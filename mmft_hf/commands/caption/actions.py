"""The actions of `mmft-hf caption`: one function each, which reads settings, calls the captioning package and prints."""

from __future__ import annotations

import json
import logging
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from ...captioning.arguments import COUNTER, CaptionArguments
from ...captioning.ask.cost import Spending
from ...captioning.ask.journal import Journal
from ...captioning.ask.journal_parquet import export_journal, import_journal
from ...captioning.ask.journal_reader import by_slot, holds_answers, left_out, read_rows, spent_dollars
from ...captioning.ask.journal_table import journal_files
from ...captioning.ask.limits import Limits
from ...captioning.ask.pictures import PicturePolicy
from ...captioning.ask.plan import Plan, pictures_of
from ...captioning.ask.refresh import refresh_prices
from ...captioning.judge.checks import CaptionChecker, parse_actions
from ...captioning.judge.tokens import load_counter
from ...captioning.split import new_run_id
from ...captioning.types import ACCEPTED, OPEN, STATUSES, TERMINAL
from ...captioning.workflow import CaptionWorkflow, load_data, write_folder
from ...captioning.write.chats import prompt_flags, recorded_prompts, write_chats
from ...captioning.write.dataset import without_captions
from ...captioning.write.imports import KEY_RULES, import_captions
from ...captioning.write.merges import merge_captions
from ...captioning.write.output_folder import CaptionFolder
from ...core.arguments import DataArguments
from ...core.console import is_main, many, printable_text, say, table
from ...core.errors import UserError, nearest
from ...core.files import DETAILS_FILE
from ...core.markdown import public_name
from ...core.seals import note_if_changed
from ...data.label_sets import LabelSets
from ...data.splits import load_captioned_dataset
from ...data.texts import LONGEST_NAMES
from . import printing

logger = logging.getLogger(__name__)
RETRIED = ("rejected", "refused", "bad_image")  # what `retry` asks for again if no status is typed


def caption(data_args: DataArguments, args: CaptionArguments) -> None:
    """Captions, or continues to, and writes the folder."""
    _caption(CaptionWorkflow(data_args, args))


def _caption(workflow: CaptionWorkflow) -> None:
    printing.print_heading("Captioning", workflow)
    result = workflow.run(say)
    if result:
        printing.print_result(workflow, result)


def plan(data_args: DataArguments, args: CaptionArguments) -> None:
    """Shows what would be asked and what it would cost. Sends nothing."""
    workflow = CaptionWorkflow(data_args, args)
    printing.print_heading("Plan for", workflow)
    if not workflow.captioner.asks:
        say("\nNo model is asked, so there is nothing to pay for. Leave --dry_run out to write the dataset.")
        return
    left = 0
    for split in workflow.splits:
        run = workflow.open(split)
        planned = run.plan()
        printing.print_plan(workflow, split, run, planned, spent_dollars(run.folder))
        left += planned.open
    try:
        run.backend.check_key()
    except UserError as error:
        say(f"\nBefore the run: {error}")
    how = "--dry_run" if args.dry_run else "`plan`"
    say(f"\nNothing was asked. Leave {how} out to start." if left else "\nNothing is left to ask for.")


def status(data_args: DataArguments, args: CaptionArguments, *folders: str) -> None:
    """Shows what a journal holds: results by aspect or step, checks that fired, failures with their reasons."""
    if len(folders) > 1:
        raise UserError(f"caption status: expected one folder, found {' '.join(folders)}.")
    args = replace(args, output_dir=folders[0]) if folders else args
    folder = CaptionFolder(args.output_dir)
    record = folder.details()
    note_if_changed(record, folder.path / DETAILS_FILE)
    _note_lost_details(folder)
    made_from = record.get("made_from") or {}
    backend = (made_from.get("captioner") or {}).get("backend")  # only of a captioner that asks no model
    journal = _journal(args, f"a dataset of captioner {backend}, which needs none" if backend else "none")
    by_aspect: dict[str, Counter] = {}
    checks, models, spent, errors = Counter(), Counter(), Spending(), {}
    for _, rows in by_slot(journal):
        last = rows[-1]
        state = "not_run" if last["pending"] else last["status"]
        fired = json.loads(last["checks"] or "[]")
        by_aspect.setdefault(last["aspect"] or "", Counter())[state] += 1
        checks.update(fired)
        for row in rows:
            spent.add(row)
        if state not in ACCEPTED:
            errors.setdefault((state, last["error_class"] or ", ".join(fired) or state), []).append(last)
        elif last["model"]:
            models[last["model"]] += 1
    of_steps = holds_answers(journal)
    say(f"{'Answers to the questions of steps' if of_steps else 'Captions'} in {journal}\n")
    total = printing.print_statuses(by_aspect, (made_from.get("prompts") or {}).get("aspects", ()))
    tokens_in, tokens_out = ("unknown" if n is None else f"{n:,}" for n in (spent.tokens_in, spent.tokens_out))
    cost = printing.money(spent.cost) if spent.cost else "cost unknown or none"
    lines = {
        "model": ", ".join(f"{printable_text(m)} ({n:,})" for m, n in models.most_common(3)) or "none answered",
        "spent": f"{tokens_in} tokens in, {tokens_out} out, {cost}",
        "attempts": f"{spent.attempts:,}",
    }
    lines |= printing.left_out_line(left_out(journal))
    if checks:
        lines["checks"] = ", ".join(f"{name} {count:,}" for name, count in checks.most_common())
    if record.get("statuses"):
        state = "complete" if record.get("complete") else "with captions missing"
        lines["dataset"] = f"{state}, of run {printable_text(record.get('run_id', 'unknown'))}"
    table(lines)
    if not errors:
        return
    files = _file_names(folder, {rows[0]["image_sha256"] for rows in errors.values()})
    say("\nNot accepted:")
    for (state, kind), rows in sorted(errors.items(), key=lambda item: -len(item[1])):
        row = rows[0]
        image = files.get(row["image_sha256"]) or f"image {row['image_sha256'][:12]}"
        example = printable_text(f"{row['label'] or ''}, {image}, {row['aspect']}")
        what = state if kind == state else f"{state} ({kind})"
        say(f"  {len(rows):,} {what}, e.g. {example}{': ' + row['error'] if row['error'] else ''}")
    again = sum(total[state] for state in OPEN)
    say(f"\n{again:,} of them are asked again by the next run." if again else "\nA run asks for none of these again.")
    final = [state for state in TERMINAL if total[state] and state not in ACCEPTED]
    if final and of_steps:
        output = shlex.quote(args.output_dir)
        say(
            f"To ask again for the others: mmft-hf caption retry {' '.join(final)} --output_dir {output}, then the command of the run."
        )
    elif final:
        typed = f"the command of the run with `retry {' '.join(final)}` after `mmft-hf caption`"
        say(f"To ask again for the others: {typed}.")


def _note_lost_details(folder: CaptionFolder) -> None:
    if lost := folder.lost_details():
        logger.warning("Note: %s", lost)


def _journal(args: CaptionArguments, found: str = "none") -> Path:
    journal = Path(args.output_dir) / "journal"
    if not journal_files(journal):
        raise UserError(f"--output_dir {args.output_dir}: expected a journal of captions in it, found {found}.")
    return journal


def _file_names(folder: CaptionFolder, wanted: set[str]) -> dict[str, str]:
    """File names of the images with these sha256, from the dataset in the folder, if it is written already."""
    found: dict[str, str] = {}
    for name in folder.details().get("files", ()):
        if (
            name.startswith("data/")
            and name.endswith(".parquet")
            and len(found) < len(wanted)
            and (folder.path / name).is_file()
        ):
            try:
                with pq.ParquetFile(folder.path / name) as file:
                    shard = file.read(["image.path", "image_sha256"])  # no picture is read
                pairs = list(zip(*(shard[c].to_pylist() for c in ("image_sha256", "image")), strict=True))
            except Exception as error:  # pyarrow has a dozen of errors for damaged files
                said = printable_text(" ".join(str(error).split())[:200])
                say(f"Note: {folder.path / name} cannot be read, so images have no names here: {said}")
                continue
            for digest, image in pairs:
                if digest in wanted:
                    found.setdefault(digest, Path(image["path"] or "").name)
    return found


def _needs_a_model(verb: str, args: CaptionArguments) -> None:
    if args.captioner in ("columns", "template"):
        raise UserError(
            f"caption {verb}: expected the settings of a run that asks a model, found --captioner {args.captioner}. Type the "
            f"command of the run, with `{verb}` after `mmft-hf caption`."
        )


def retry(data_args: DataArguments, args: CaptionArguments, *statuses: str) -> None:
    """Opens the results with these statuses among those that the command asks for, then runs.

    Of a folder of `caption refine`, it opens answers, of some steps if they are typed too, and does not run.
    """
    journal = Path(args.output_dir) / "journal"
    if journal_files(journal) and holds_answers(journal):
        _retry_answers(journal, statuses)
        return
    statuses = statuses or RETRIED
    for status in statuses:
        if status not in STATUSES:
            found = f"{status!r}.{nearest(status, STATUSES)}"
            raise UserError(f"retry: expected statuses among {', '.join(STATUSES)}, found {found}")
    _needs_a_model("retry", args)
    _journal(args, "none. Leave `retry` out to start")
    workflow = CaptionWorkflow(data_args, args)
    count = 0
    # In the main process alone, before any process asks: `run` begins only when all of them are there.
    for split in workflow.splits if is_main() else ():
        with workflow.open(split) as run:
            count += run.journal.reopen(statuses, run.plan().slots)
    say(f"{many(count, 'result')} ({', '.join(statuses)}) {'is' if count == 1 else 'are'} asked for again.\n")
    _caption(workflow)


def _retry_answers(journal: Path, words: tuple[str, ...]) -> None:
    steps = {row["slot"]: row["aspect"] for row in read_rows(journal, ("slot", "aspect"))}
    known = set(steps.values())
    for word in words:
        if word not in STATUSES and word not in known:
            names = [*sorted(known), *STATUSES]
            raise UserError(
                f"retry: expected steps and statuses among {', '.join(names)}, found {word!r}.{nearest(word, names)}"
            )
    statuses = [word for word in words if word in STATUSES] or RETRIED
    chosen = {word for word in words if word in known} or known
    with Journal(journal) as opened:
        count = opened.reopen(statuses, {slot for slot, step in steps.items() if step in chosen})
    say(
        f"{many(count, 'answer')} ({', '.join(statuses)}) of {', '.join(sorted(chosen))} {'is' if count == 1 else 'are'} asked for again by "
        "the next run. Type the command of the run to start it."
    )


def bench(data_args: DataArguments, args: CaptionArguments) -> None:
    """Times a few calls at growing concurrency. Their captions go to the journal, so nothing is lost."""
    _needs_a_model("bench", args)
    workflow = CaptionWorkflow(data_args, args)
    local = args.captioner == "transformers"  # one batch at a time: only --captioner_batch_size can be varied
    widths = [1] if local else [n for n in (1, 4, 16, 64, 256) if n < args.concurrency] + [args.concurrency]
    say("concurrency  captions/s  seconds a call (median)  tokens out/s  dollars per 1,000 captions")
    for width in widths:
        limits = Limits(width, args.requests_per_minute, args.tokens_per_minute, args.max_reasks)
        with workflow.open(workflow.splits[0], limits=limits, progress=False) as run:
            found = run.plan()
            count = 4 * args.captioner_batch_size if local else max(8, 3 * width)
            outcome = run.fill(Plan(found.items[:count], found.slots, rows=found.rows))
        if outcome.stopped:
            raise UserError(f"caption bench: {outcome.why}")
        if not outcome.calls:
            first = width == widths[0]
            say("every caption is in the journal already." if first else "(no more captions to ask for)")
            return
        captions = sum(outcome.results[state] for state in ACCEPTED)
        cost = f"{1000 * outcome.cost / max(captions, 1):.4f}" if run.price else "unknown"
        say(
            f"{width:>11}  {captions / outcome.seconds:>10.2f}  {median(outcome.latencies_s):>23.2f}  "
            f"{outcome.tokens_out / outcome.seconds:>12.1f}  {cost:>26}"
        )


def export(data_args: DataArguments, args: CaptionArguments, *files: str) -> None:
    """Writes the journal as one parquet file."""
    if len(files) != 1 or not files[0].endswith(".parquet"):
        raise UserError("caption export: expected the name of one file. Type mmft-hf caption export FILE.parquet.")
    count = export_journal(_journal(args), files[0])
    _note_lost_details(CaptionFolder(args.output_dir))
    say(f"{count:,} results of {args.output_dir} are in {files[0]}.")


def import_(data_args: DataArguments, args: CaptionArguments, *files: str) -> None:
    """Adds an exported parquet file to the journal, or makes a captioned dataset from JSON files of captions."""
    kinds = {Path(name).suffix.lower() for name in files}
    for name in files:
        _check_file(name, args.output_dir)
    if kinds == {".parquet"}:
        with Journal(Path(args.output_dir) / "journal") as journal:
            for name in files:
                say(f"{import_journal(journal, name):,} results of {name} are new in {args.output_dir}.")
        return
    if kinds != {".json"}:
        raise UserError(
            f"caption import: expected a .parquet file of `export`, or .json files of captions, found "
            f"{', '.join(files) or 'none'}. Type mmft-hf caption import FILE …"
        )
    if args.key_rule not in KEY_RULES:
        raise UserError(
            f"--key_rule: expected one of {', '.join(KEY_RULES)}, which says how the keys of {files[0]} name images, "
            f"found {args.key_rule or 'none'}."
        )
    data, train, sets = load_data(data_args)
    captioner = {"backend": "import", "key_rule": args.key_rule}
    folder, made_from = _claim(args, public_name(data_args.dataset_name), captioner, lambda: pictures_of(data))
    tokenizer = load_counter(args.model_name_or_path or COUNTER)
    # A model wrote them, but they are not ours to change: refusals are dropped, everything else is only flagged.
    actions = {"refusal": "reject"} | parse_actions(args.on_check or ())
    names = data[train].features["label"].names
    checker = CaptionChecker(names, tokenizer, template=args.class_template, actions=actions, clean=False)
    captioned, report = import_captions(data[train], files, args.key_rule, args.captioner_model, tokenizer, checker)
    names, model = [Path(name).name for name in files], args.captioner_model
    _write(folder, data, train, captioned, report, made_from, names, model, sets)


def _check_file(name: str, output_dir: str) -> None:
    """Raises `UserError` unless `caption import` is given a file; the message says what it may have meant."""
    path = Path(name)
    if path.is_file():
        return
    say_how, quoted = "Type mmft-hf caption import FILE …", shlex.quote(name)
    if path.is_dir():
        if journal_files(path / "journal"):
            say_how = (
                f"For its journal, type mmft-hf caption export JOURNAL.parquet --output_dir {quoted}, then mmft-hf caption "
                f"import JOURNAL.parquet --output_dir {shlex.quote(output_dir)}. To join its captions with others, type mmft-hf "
                f"caption merge {quoted} FOLDER …"
            )
        elif (path / DETAILS_FILE).is_file():
            say_how = f"To join its captions with others, type mmft-hf caption merge {quoted} FOLDER …"
        raise UserError(f"caption import: expected files, found the folder {name}. {say_how}")
    raise UserError(f"caption import: expected files, found no {name}. {say_how}")


def merge(data_args: DataArguments, args: CaptionArguments, *names: str) -> None:
    """Joins several captioned datasets of the same images."""
    if len(names) < 2:
        raise UserError(
            "caption merge: expected two or more captioned datasets. Type mmft-hf caption merge FOLDER FOLDER …"
        )
    sources = [public_name(name) for name in names]
    folder, made_from = _claim(args, "merged", {"backend": "merge", "data_sets": sources})
    loaded = {name: load_captioned_dataset(name) for name in names}
    first = loaded[names[0]]
    train = data_args.train_split or ("train" if "train" in first else next(iter(first)))
    for name, data in loaded.items():
        if train not in data:
            raise UserError(f"{name}: expected split {train!r}, found {', '.join(data)}. Type --train_split NAME.")
    merged, report = merge_captions({name: data[train] for name, data in loaded.items()})
    _write(folder, first, train, merged, report, made_from, sources, None)


def chats(data_args: DataArguments, args: CaptionArguments, *operands: str) -> None:
    """Writes the training captions of a captioned folder as conversations, to tune a captioner of one's own."""
    if len(operands) != 1:
        raise UserError(
            f"caption chats: expected one captioned folder, found {' '.join(operands) or 'none'}. Type mmft-hf caption chats FOLDER "
            "--output_dir OUT"
        )
    (source,) = operands
    details = CaptionFolder(source).details()
    if not details:
        raise UserError(f"caption chats: expected a captioned folder, found no {DETAILS_FILE} in {source}.")
    data, train, sets = load_data(replace(data_args, dataset_name=source))
    recorded = prompts = recorded_prompts(details.get("made_from") or {})
    if recorded is None:
        typed = args.to_prompts()
        prompts = replace(typed, longest_name=LONGEST_NAMES) if sets else typed, PicturePolicy(args.max_side)
        say(
            f"Note: {source} does not say with which prompts its captions were asked for. Those of the settings are taken."
        )
    sealed = pictures_of({name: split for name, split in data.items() if name != train})
    out = Path(args.output_dir)
    found = write_chats(out, data[train], *prompts, sealed, details, args.overwrite_output_dir, recorded is not None)
    say(f"{many(found.chats, 'caption')} of {many(found.images, 'picture')} are in {out}.")
    if found.sealed:
        say(
            f"Left out: {many(found.sealed, 'picture')} that {'is' if found.sealed == 1 else 'are'} also in another split."
        )
    for aspect, count in found.unprompted.items():
        say(f"Left out: {many(count, 'caption')} of the aspect {printable_text(aspect)}, which no prompt asks for.")
    flags = prompt_flags(*prompts)
    say(
        "\nNext: tune a model of images and text on it, for example with TRL's SFTTrainer, then mmft-hf caption --captioner transformers "
        f"--captioner_model TUNED{' ' * bool(flags)}{flags}"
    )


def prices(data_args: DataArguments, args: CaptionArguments, *files: str) -> None:
    """Writes a file of today's prices, from a maintained package."""
    if len(files) != 1 or not files[0].endswith((".yaml", ".yml")):
        raise UserError("caption prices: expected the name of one file. Type mmft-hf caption prices FILE.yaml.")
    count, source = refresh_prices(files[0])
    say(f"{many(count, 'price')} of {source}, are in {files[0]}. Use them with --prices {shlex.quote(files[0])}")


def _claim(
    args: CaptionArguments, name: str, captioner: dict, pictures: Callable[[], set[str]] | None = None
) -> tuple[CaptionFolder, dict]:
    folder, made_from = CaptionFolder(args.output_dir), {"dataset_name": name, "captioner": captioner}
    folder.claim(made_from, args.overwrite_output_dir, pictures)
    return folder, made_from


def _write(
    folder: CaptionFolder,
    data,
    train: str,
    captioned,
    report,
    made_from: dict,
    sources: list[str],
    model: str | None,
    sets: LabelSets | None = None,
) -> None:
    for line in report.lines():
        say(line)
    others = {name: without_captions(split, progress=False) for name, split in data.items() if name != train}
    details = {**made_from, "made_from": made_from, "sources": sources, "model": model, "complete": True}
    details |= {"run_id": new_run_id(), "fingerprints": None}
    statistics = write_folder(folder, {train: captioned, **others}, train, details, sets=sets)
    printing.print_folder(str(folder.path), statistics)
    say(f"\n{printing.next_line(str(folder.path), statistics)}")
