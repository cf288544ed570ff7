"""The command line: `mmft-hf VERB --config FILE.yaml --key value …`.

Exit codes: 0 done; 2 the user must change something; 3 done in part, and the message names the command that continues;
1 a bug in this package, with a traceback.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import shlex
import sys
import traceback
from errno import EACCES, EEXIST, EISDIR, ELOOP, ENAMETOOLONG, ENOTDIR, EPERM

from .benchmark.run.processes import work_alone
from .core.console import PlainFormatter, is_main, plain
from .core.errors import PartialResult, UserError, command_line_spelling, nearest
from .core.files import closed_cache, no_room
from .version import __version__

VERBS = {
    "caption": "add captions to a labelled image dataset",
    "finetune": "fine-tune a CLIP model on images and captions, and save a classifier",
    "head": "fit another head to a finished run, without training again",
    "evaluate": "measure a saved classifier and the zero-shot baseline on a labelled split",
    "predict": "classify pictures with a saved classifier",
    "align": "make a dual encoder of an image tower and a text tower",
    "benchmark": "compare methods on one dataset at several shots and seeds",
    "push": "publish a trained model or a captioned dataset on the Hub",
    "env": "print versions and devices, for bug reports",
}
# The system refuses a path: no permission, a file instead of a folder or the reverse, a name that no file can have.
REFUSED = {EACCES, EPERM, EEXIST, ENOTDIR, EISDIR, ENAMETOOLONG, ELOOP}
HELP = (
    "usage: mmft-hf VERB [--config FILE.yaml] [--key value …]\n\n"
    "Multimodal fine-tuning of CLIP with synthetic captions.\n\n"
    + "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    + "\n\nmmft-hf VERB --help lists the settings of a verb. Start with: mmft-hf finetune --captions_column text\n"
)


@command_line_spelling()
def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns its exit code. `argv` excludes the program's name; default: the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    # Show progress bars only for what takes longer than a second. tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DELAY", "1")
    logging.lastResort.setFormatter(PlainFormatter())  # warnings name classes and files, too
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter gets its number
            stream.reconfigure(errors="backslashreplace")
    arguments: tuple = ()
    try:
        if not argv or argv[0] in ("-h", "--help", "--version"):
            print(f"mmft_hf {__version__}" if argv[:1] == ["--version"] else HELP.rstrip("\n"), flush=True)
            return 0 if argv else 2
        if argv[0] not in VERBS:
            raise UserError(f"{argv[0]!r}: expected one of {', '.join(VERBS)}.{nearest(argv[0], VERBS)}")
        if argv[0] == "benchmark":
            work_alone()
        from .commands.parser import parse

        command = importlib.import_module(f".commands.{argv[0]}", __package__)
        if argv[0] not in ("finetune", "caption") and not is_main():
            return 0  # only training and a local captioner use several processes
        arguments = parse(argv[0], command, argv[1:])
        quiet_libraries()
        command.run(*arguments)
        sys.stdout.flush()
        return 0
    except UserError as error:
        said = closed_cache(error)
        return _fail(2, f"{error} {said}" if said else error, debug)
    except PartialResult as error:
        again = f" To continue, type: {_again(_without_retry(argv), arguments)}" if error.again else ""
        return _fail(3, f"{error}{again}", debug)
    except KeyboardInterrupt:
        return _fail(3, f"stopped by you. To continue, type: {_again(argv, arguments)}", debug)
    except BrokenPipeError:  # for example `mmft-hf … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as error:  # after --help
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        _give_up_a_full_output()
        if said := closed_cache(error):
            return _fail(2, said, debug)
        found = no_room(error)
        if found is None and isinstance(error, OSError) and error.errno in REFUSED:
            found = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if found is None:
            return _bug()
        return _fail(2, f"expected a place to write to, found: {found}. Type another path, or make room.", debug)


def _give_up_a_full_output() -> None:
    """Drops what standard output could not take, for example in a file on a full disk: at its end Python would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _without_retry(argv: list[str]) -> list[str]:
    """`caption retry STATUS …` has already reopened its results, so the command that continues is `caption`."""
    if argv[:2] != ["caption", "retry"]:
        return argv
    end = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    return ["caption", *argv[end:]]


def _again(argv: list[str], arguments: tuple) -> str:
    """The command that continues, with any token replaced by a placeholder."""
    argv = [
        re.sub("(?<=^--hub_token=).+", "YOUR_TOKEN", word) if before != "--hub_token" else "YOUR_TOKEN"
        for before, word in zip(["", *argv], argv, strict=False)
    ]
    more = ["--resume_from_checkpoint", "true"] * (argv[0] == "finetune" and "--resume_from_checkpoint" not in argv)
    if argv[0] == "benchmark" and any(getattr(found, "overwrite_output_dir", False) for found in arguments):
        more += ["--overwrite_output_dir", "false"]  # the last value wins, also over a --config file
    if argv[0] in ("caption", "finetune") and os.environ.get("WORLD_SIZE", "1") != "1":
        world = os.environ["WORLD_SIZE"]
        recipe = f"recipes/{argv[0]}.py"
        return shlex.join(["accelerate", "launch", "--multi_gpu", "--num_processes", world, recipe, *argv[1:], *more])
    return shlex.join(["mmft-hf", *argv, *more])


def _bug() -> int:
    print(plain(traceback.format_exc()), file=sys.stderr)
    print("\nmmft-hf: this is a bug in mmft_hf. Please report it with the output above.", file=sys.stderr)
    return 1


def _fail(code: int, error: object, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        print(plain(traceback.format_exc()), file=sys.stderr)
    message = str(error)
    if message.startswith("Caught UserError in DataLoader worker"):  # a traceback comes first, then our message
        message = message.rsplit("UserError: ", 1)[-1].strip()
    print(f"mmft-hf: {plain(message)}", file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """Silences the libraries: no bars while weights load, no advice about special tokens."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
