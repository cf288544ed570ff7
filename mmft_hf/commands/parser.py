"""Settings of a verb: read from `--config FILE.yaml` and the command line, and printed in groups by `--help`.

The dataclasses in a command's `ARGUMENTS` hold the settings. A dataclass may name the groups of its settings in `GROUPS`,
as `{title: "setting another *"}`, where `*` stands for all settings of the dataclass that no group names. Inherited
settings of `transformers.TrainingArguments` that no group names are stock settings: only `--help all` prints them.
`STOCK_HELP` replaces the help texts of inherited settings. A recipe with settings of its own says in `PROGRAM` what is typed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import fields

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..core.errors import UserError, nearest
from ..core.reading import read_yaml

STOCK = "stock settings of transformers.TrainingArguments"
WIDTH = 100
MANY_CHOICES = 60  # characters; a longer list of choices goes into the help text


class HelpFormatter(argparse.HelpFormatter):
    """Each setting under one spelling, with its choices and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(WIDTH, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = {str: "TEXT", int: "N", float: "NUMBER", string_to_bool: "true|false"}.get(action.type, "VALUE")
        return f"--{action.dest} {self._format_args(action, value)}".rstrip()

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action):
        text = action.help or ""
        if _has_many_choices(action):
            text += f" One of {', '.join(map(str, action.choices))}."
        default = default_text(action)
        if not action.option_strings or not default or "Default:" in text or "%(default)" in text:
            return text
        return f"{text} (default: {default.replace('%', '%%')})"


def _has_many_choices(action: argparse.Action) -> bool:
    return action.choices is not None and len(",".join(map(str, action.choices))) > MANY_CHOICES


def default_text(action: argparse.Action) -> str:
    """The default of a setting as it would be typed; empty if there is none."""
    default = action.default
    if default in (None, "", argparse.SUPPRESS):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return (
        " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(getattr(default, "value", default))
    )


class VerbParser(HfArgumentParser):
    """The parser of one verb.

    Attributes:
        groups: the settings to print, by title; the stock settings come last, under `STOCK`.
    """

    def __init__(self, verb: str, command):
        self.verb, self.command = verb, command
        self.positional, about = getattr(command, "POSITIONAL", (None, None))
        words = f"[{self.positional} …] " if self.positional else ""
        super().__init__(
            command.ARGUMENTS,
            prog=getattr(command, "PROGRAM", f"mmft-hf {verb}"),
            usage=f"%(prog)s {words}[--config FILE.yaml] [--key value …]",
            description=command.__doc__,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of settings; the command line wins.")
        self.add_argument("--help", nargs="?", metavar="all", help="Print this text; all: with the stock settings.")
        if self.positional:
            self.add_argument(self.positional, nargs="*", help=about)
        # A setting that is true by default has a second spelling, --no_NAME. The first one takes true and false.
        settings = {action.dest: action for action in reversed(self._actions)}
        for action in filter(_has_many_choices, self._actions):
            action.metavar = "NAME"
        for kind in command.ARGUMENTS:
            for name, text in getattr(kind, "STOCK_HELP", {}).items():
                settings[name].help = text
        self.groups = {"arguments": [settings[name] for name in (self.positional, "config", "help") if name]}
        for title, names in _groups(command.ARGUMENTS).items():
            self.groups[title] = [settings[name] for name in names]

    def error(self, message):
        raise UserError(f"{self.verb}: {message}. `{self.prog} --help` lists the settings.")

    def format_help(self, everything: bool = False) -> str:
        """The help text. The stock settings are one line unless `everything` is true."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, ())
        formatter.add_text(self.description)
        for title, actions in self.groups.items():
            formatter.start_section(title)
            if title == STOCK and not everything:
                formatter.add_text(f"{len(actions)} more; {self.prog} --help all prints them.")
            else:
                formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def _groups(dataclasses: Iterable[type]) -> dict[str, list[str]]:
    """The names of all settings by the title of their group, stock settings last."""
    groups, stock = {}, []
    for kind in dataclasses:
        named = {title: names.split() for title, names in getattr(kind, "GROUPS", {"settings": "*"}).items()}
        taken = {name for names in named.values() for name in names}
        others = [field.name for field in fields(kind) if field.init and field.name not in taken]
        inherited = [name for name in others if _module_of(kind, name).startswith("transformers.")]
        own = [name for name in others if name not in inherited]
        for title, names in named.items():
            groups.setdefault(title, []).extend(n for name in names for n in (own if name == "*" else [name]))
        stock += inherited
    return groups | ({STOCK: stock} if stock else {})


def _module_of(kind: type, name: str) -> str:
    """The module of the class that declares a setting last."""
    return next(base.__module__ for base in kind.__mro__ if name in inspect.get_annotations(base))


def build_parser(verb: str) -> VerbParser:
    """The parser of a verb, for pages and tools: `build_parser("finetune").groups` lists its settings by group."""
    return VerbParser(verb, importlib.import_module(f".{verb}", __package__))


def parse(verb: str, command, argv: list[str]) -> tuple:
    """Fills the dataclasses of `command.ARGUMENTS` from `--config` and the command line.

    Returns:
        The dataclasses, and the positional arguments if the command has any.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of the wrong type, a missing file.
        SystemExit: `--help` or `--help all` was printed.
    """
    parser = VerbParser(verb, command)
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            print(parser.format_help(everything=argv[i + 1 : i + 2] == ["all"]), end="")
            sys.exit(0)
    known = {action.dest for action in parser._actions} - {"config", "help"}
    config, argv = _take_config(argv)
    settings = _read_yaml(config, known) if config else []
    for word in settings + argv:
        if "\0" in word:
            raise UserError(
                f"{verb}: expected texts without the character \\0, which no path can have, found {word!r}."
            )
    try:
        *filled, rest = parser.parse_args_into_dataclasses(
            settings + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except (
        ValueError,
        ImportError,
        OSError,
        TypeError,
        RecursionError,
    ) as error:  # how TrainingArguments refuses a setting
        parser.error(" ".join(str(error).split()).rstrip("."))
    extra = filled.pop() if len(filled) > len(command.ARGUMENTS) else None
    for word in rest:
        if word.startswith("--"):
            key = word[2:].split("=")[0]
            raise UserError(f"{verb}: unknown setting --{key}.{nearest(key, known)} See `{parser.prog} --help`.")
        raise UserError(f"{verb}: unexpected word {word!r}. Settings are written --key value.")
    return (*filled, getattr(extra, parser.positional)) if parser.positional else tuple(filled)


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--config FILE` or `--config=FILE` out of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    found, rest = parser.parse_known_args(argv)
    if found.config == "":
        raise UserError("--config: expected the name of a YAML file after it.")
    return found.config, rest


def _read_yaml(path: str, known: set[str]) -> list[str]:
    """A YAML file as command-line words, so that both are checked and converted alike (`1e-5` is text in YAML)."""
    try:
        settings = read_yaml(path) or {}
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: expected a YAML file, but {error.strerror.lower()}.") from error
    except UserError as error:
        raise UserError(f"--config {error}") from error
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
