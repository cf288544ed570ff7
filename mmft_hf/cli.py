"""`mmft-hf VERB --config FILE.yaml --key value …`: YAML and overrides for every verb; an unknown key is an error.

Exit codes: 0 done; 2 the user must change something; 3 done in part, and the message names the command that continues;
1 a defect of ours, with a traceback.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import re
import shlex
import sys
import traceback

from .benchmark.run.processes import work_alone
from .core.console import is_main
from .core.errors import PartialResult, UserError, nearest
from .version import __version__

VERBS = {
    "caption": "add captions to a labelled image data set",
    "finetune": "fine-tune a CLIP model on images and captions, and save a classifier",
    "evaluate": "measure a saved classifier on a labelled split, zero-shot beside it",
    "predict": "classify pictures with a saved classifier",
    "benchmark": "compare methods on one data set: shots, seeds, a sealed test",
    "push": "publish a trained model or a captioned data set on the Hub",
    "env": "print versions and devices, for bug reports",
}
# How a system refuses to write: no permission, a file where a folder should be or the reverse, a full or read-only disk.
REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
}
HELP = (
    "usage: mmft-hf VERB [--config FILE.yaml] [--key value …]\n\n"
    "Multimodal fine-tuning of CLIP with synthetic captions.\n\n"
    + "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    + "\n\nmmft-hf VERB --help lists the settings of a verb. Start with: mmft-hf finetune "
    "--captions_column text\n"
)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns its exit code. `argv` is without the program's name; default: the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mmft_hf {__version__}")
        return 0
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    # Bars for what takes longer than a second, none for the rest. tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DELAY", "1")
    arguments: tuple = ()
    try:
        if argv[0] not in VERBS:
            raise UserError(f"{argv[0]!r}: expected one of {', '.join(VERBS)}.{nearest(argv[0], VERBS)}")
        if argv[0] == "benchmark":
            work_alone()
        command = importlib.import_module(f".commands.{argv[0]}", __package__)
        if argv[0] not in ("finetune", "caption") and not is_main():
            return 0  # only training and a captioner in this process use several; the first one does the rest
        arguments = parse(argv[0], command, argv[1:])
        quiet_libraries()
        command.run(*arguments)
        return 0
    except UserError as error:
        return _fail(2, error, debug)
    except PartialResult as error:
        return _fail(
            3, f"{error} To go on, type: {_again(_without_retry(argv), arguments)}" if error.again else error, debug
        )
    except KeyboardInterrupt:
        return _fail(3, f"stopped by you. To go on, type: {_again(argv, arguments)}", debug)
    except BrokenPipeError:  # `mmft-hf … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in REFUSED:
            return _defect()
        place = f"{error.filename}: " if error.filename else ""
        return _fail(
            2, f"{place}expected a place to write to, found: {error.strerror}. Type another path, or make room.", debug
        )
    except SystemExit as error:  # argparse ends so after --help
        return error.code if isinstance(error.code, int) else 1
    except Exception:
        return _defect()


def _without_retry(argv: list[str]) -> list[str]:
    """`caption retry STATUS … --key value` has opened its results: to go on with them is to run."""
    if argv[:2] != ["caption", "retry"]:
        return argv
    end = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    return ["caption", *argv[end:]]


def _again(argv: list[str], arguments: tuple) -> str:
    """The command that continues, without a token that was typed."""
    argv = [
        re.sub("(?<=^--hub_token=).+", "YOUR_TOKEN", word) if before != "--hub_token" else "YOUR_TOKEN"
        for before, word in zip(["", *argv], argv, strict=False)
    ]
    more = ["--resume_from_checkpoint", "true"] * (argv[0] == "finetune" and "--resume_from_checkpoint" not in argv)
    if argv[0] == "benchmark" and any(getattr(found, "overwrite_output_dir", False) for found in arguments):
        more += ["--overwrite_output_dir", "false"]  # the last one counts, also against a --config file
    if argv[0] in ("caption", "finetune") and os.environ.get("WORLD_SIZE", "1") != "1":
        world = os.environ["WORLD_SIZE"]
        recipe = f"recipes/{argv[0]}.py"
        return shlex.join(["accelerate", "launch", "--multi_gpu", "--num_processes", world, recipe, *argv[1:], *more])
    return shlex.join(["mmft-hf", *argv, *more])


def _defect() -> int:
    traceback.print_exc()
    print("\nmmft-hf: this is a defect of mmft_hf. Please report it with the output above.", file=sys.stderr)
    return 1


def _fail(code: int, error: object, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    message = str(error)
    if message.startswith("Caught UserError in DataLoader worker"):  # followed by a traceback, then by what we said
        message = message.rsplit("UserError: ", 1)[-1].strip()
    print(f"mmft-hf: {message}", file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """Leaves the terminal to our own lines: no bars for loading weights, no advice about special tokens."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class HelpFormatter(argparse.HelpFormatter):
    """One spelling of each setting, and its default where it has one that the help does not name itself."""

    def _format_action_invocation(self, action):
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        value = "TEXT" if action.type is str else "true|false" if action.nargs == "?" else "VALUE"
        return f"{action.option_strings[0]} {self._format_args(action, action.metavar or value)}".rstrip()

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        named = default in (None, "", argparse.SUPPRESS) or "Default:" in text or "%(default)" in text
        if not action.option_strings or named:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        shown = shown.lower() if isinstance(default, bool) else getattr(default, "value", shown)
        return f"{text} (default: {str(shown).replace('%', '%%')})"


def parse(verb: str, command, argv: list[str]) -> tuple:
    """The dataclasses `command.ARGUMENTS` filled from `--config` and the command line, and the positional arguments.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of the wrong type, no such file.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            raise UserError(f"{verb}: {message}. `mmft-hf {verb} --help` lists all settings.")

    positional = getattr(command, "POSITIONAL", None)
    words = f"[{positional[0]} …] " if positional else ""
    parser = Parser(
        command.ARGUMENTS,
        prog=f"mmft-hf {verb}",
        usage=f"mmft-hf {verb} {words}[--config FILE.yaml] [--key value …]",
        description=command.__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=True,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of settings; the command line wins.")
    if positional:
        parser.add_argument(positional[0], nargs="*", help=positional[1])
    known = {action.dest for action in parser._actions}

    config, argv = _take_config(argv)
    settings = _read_yaml(config, known - {"config", "help"}) if config else []
    try:
        *filled, rest = parser.parse_args_into_dataclasses(
            settings + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # how TrainingArguments refuses a setting
        text = " ".join(str(error).split())
        raise UserError(f"{verb}: {text} `mmft-hf {verb} --help` lists all settings.") from error
    extra = filled.pop() if len(filled) > len(command.ARGUMENTS) else None
    for word in rest:
        if word.startswith("--"):
            key = word[2:].split("=")[0]
            raise UserError(f"{verb}: unknown setting --{key}.{nearest(key, known)} See `mmft-hf {verb} --help`.")
        raise UserError(f"{verb}: unexpected word {word!r}. Settings are written --key value.")
    return (*filled, getattr(extra, positional[0])) if positional else tuple(filled)


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--config FILE` or `--config=FILE` out of the command line."""
    rest, config = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            config = next(words, None)
            if config is None:
                raise UserError("--config: expected the name of a YAML file after it.")
        elif word.startswith("--config="):
            config = word.removeprefix("--config=")
        else:
            rest.append(word)
    return config, rest


def _read_yaml(path: str, known: set[str]) -> list[str]:
    """A YAML file as command-line words, so that both are checked and converted alike (`1e-5` is text in YAML)."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file) or {}
    except OSError as error:
        raise UserError(f"--config {path}: expected a YAML file, but {error.strerror.lower()}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: expected YAML, found {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: expected lines `key: value`, found a {type(settings).__name__}.")
    words = []
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"--config {path}: unknown key {key!r}.{nearest(str(key), known)}")
        if value is None:
            continue
        if isinstance(value, dict):
            words += [f"--{key}", json.dumps(value)]
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={value}")
    return words


if __name__ == "__main__":
    sys.exit(main())
