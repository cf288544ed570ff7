"""Pages of the documentation that are made from the code: public names, the command line, and files at the top level."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import mmft_hf
from mmft_hf.benchmark.run import methods
from mmft_hf.cli import VERBS
from mmft_hf.commands.parser import STOCK, build_parser, default_text

ROOT = Path(__file__).parent.parent
REPOSITORY_FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
GROUPS = {
    "train": "Training",
    "model": "Models and losses",
    "predict": "Prediction",
    "data": "Data",
    "captioning": "Captions",
    "hub": "The Hub",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {"reference/api.md": api_page(), "reference/cli.md": cli_page(), "reference/methods.md": methods_page()}
    for page, name in REPOSITORY_FILES.items():
        pages[page] = (ROOT / name).read_text(encoding="utf-8")
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links that lead out of `docs/`, to code and recipes, become plain text: the site holds the documentation alone."""
    inside = ROOT / "docs"

    def kept(match: re.Match) -> str:
        text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        # CONTRIBUTING.md and CHANGELOG.md are pages of the site, but their links start at the top level.
        start = ROOT if page.file.src_uri in REPOSITORY_FILES else (inside / page.file.src_uri).parent
        path = (start / target.split("#")[0]).resolve()
        if path.is_relative_to(inside) and not path.is_dir():
            return match.group() if start != ROOT else f"[{text}]({target.removeprefix('docs/')})"
        return text if text.startswith("`") else f"{text} (`{path.relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", kept, markdown)


def api_page() -> str:
    """Every public name, with the docstring of the place where it is defined."""
    lines = ["# Python reference", "", "Everything here is imported from `mmft_hf` itself.", ""]
    for package, title in GROUPS.items():
        names = sorted(n for n, module in mmft_hf._PUBLIC.items() if module.split(".")[0] == package)
        lines += [f"## {title}", ""]
        for name in names:
            home = getattr(mmft_hf, name).__module__
            lines += [f"::: {home}.{name}", "    options: {heading_level: 3}", ""]
    missing = {module.split(".")[0] for module in mmft_hf._PUBLIC.values()} - set(GROUPS)
    assert not missing, f"docs/hooks.py: GROUPS has no title for {missing}"
    return "\n".join(lines)


def cli_page() -> str:
    """Every verb with its settings by group, read from the parsers; stock settings of transformers are folded."""
    lines = [
        "# Command line",
        "",
        "Every verb takes `--config FILE.yaml` and `--key value`; the command line wins over the file. `mmft-hf VERB --help` prints the same.",
        "",
        "Exit codes: 0, done; 2, you have to change something, and the message says what; 3, done in part, and the message says how to "
        "continue; 1, a bug in mmft_hf.",
        "",
    ]
    for verb, summary in VERBS.items():
        parser = build_parser(verb)
        about = " ".join((parser.description or summary).split())
        lines += [f"## mmft-hf {verb}", "", about, ""]
        for title, actions in parser.groups.items():
            table = ["| setting | |", "|---|---|", *(_row(action) for action in actions)]
            if title == STOCK:
                lines += [f'??? note "{len(actions)} {title}"', "", *(f"    {line}" for line in table), ""]
            else:
                lines += [f"### {title.capitalize()} {{ #{verb}-{title.replace(' ', '-')} }}", "", *table, ""]
    return "\n".join(lines)


def methods_page() -> str:
    """Every row of the benchmark's table of methods, by family."""
    lines = ["# Benchmark methods", "", (methods.__doc__ or "").partition("\n\n")[2], ""]
    for family, title in methods.FAMILIES.items():
        lines += [f"## {title}", "", "| method | |", "|---|---|"]
        lines += [
            f"| `{m.name}` | {m.about} |"
            for m in methods.METHODS.values()
            if m.family == family and m.alpha == m.share == 1
        ]
        lines.append("")
    lines.append(
        "`NAME+wise`, for methods that train weights: halfway between the untuned weights and those of `NAME`. `NAME+auto`, `NAME+kernel`: weights and "
        "head of `--head auto`, and the head of `--head kernel`. `NAME+mix`, for methods that train a head: 0.3 times its logits and 0.7 times those of "
        "the untuned model."
    )
    lines += ["", "## Budgets of the authors", "", "What `--budget authors` trains with.", ""]
    lines += ["| methods | few shots | all images | source |", "|---|---|---|---|"]
    recipes: dict = {}
    for m in methods.METHODS.values():
        if m.alpha == 1 and "+" not in m.name and m.training and m.training.recipe:
            recipes.setdefault(m.training.recipe, []).append(f"`{m.name}`")
    for recipe, names in recipes.items():
        lines.append(
            f"| {', '.join(names)} | {recipe.describe(few=True)} | {recipe.describe(few=False)} | {recipe.source} |"
        )
    return "\n".join(lines)


def _row(action) -> str:
    name = f"--{action.dest}" if action.option_strings else action.dest
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    # argparse's escapes; a cell of a table has no line breaks and no bars.
    text = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;") + choices
    default = default_text(action).replace("|", "\\|")
    if default and "Default:" not in text:
        text += f" Default: `{default}`."
    return f"| `{name}` | {text} |"


def on_post_page(output: str, **_) -> str:
    """Types in docstrings are written as code already; mkdocstrings marks them once more."""
    return re.sub(r"<code>`([^`<]+)`</code>", r"<code>\1</code>", output)
