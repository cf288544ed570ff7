"""Imports flow one way: no module imports from a layer above its own."""

import ast
import subprocess
import sys
from pathlib import Path

import mmft_hf

PACKAGE = Path(mmft_hf.__file__).parent
LAYERS = [
    {
        "version",
        "errors",
        "arguments",
        "losses",
        "distributed",
        "launch",
        "prompts",
        "sampling",
        "images",
        "console",
        "builtin",
        "encoders",
        "markdown",
    },
    {
        "configuration",
        "data",
        "opening",
        "split_files",
        "joining",
        "cache",
        "views",
        "collator",
        "modeling",
        "embedding",
        "memory",
        "towers",
        "prototypes",
        "features",
        "metrics",
        "evaluation",
        "origins",
    },
    {
        "captioning",
        "baselines",
        "benchmark",
        "trainer",
        "frozen",
        "checkpoints",
        "progress",
        "pipeline",
        "cards",
        "figures",
        "report",
        "run_folder",
        "hub",
        "publish",
        "training_pushes",
        "training_checkpoints",
        "sharding",
        "averaging",
    },
    {"cli", "commands", "__main__"},
]
BELOW = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Top-level names inside the package that a file imports, also inside its functions."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1]
            parts = [*base, *(node.module or "").split(".")] if node.module else list(base)
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_every_module_has_a_layer():
    modules = {p.stem if p.parent == PACKAGE else p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py")}
    assert modules - {"__init__"} == set(BELOW)


def test_imports_flow_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.stem if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0]
        if own == "__init__":
            continue
        wrong += [f"{path.name} imports {name}" for name in imports(path) if BELOW[name] > BELOW[own]]
    assert not wrong


def test_layer_zero_is_free_of_transformers_and_datasets():
    for name in LAYERS[0]:
        source = (PACKAGE / f"{name}.py").read_text()
        roots = {
            (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for alias in node.names
        }
        assert not roots & {"transformers", "datasets", "accelerate", "evaluate", "peft"}, name


def test_files_can_be_read_in_one_sitting():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_captioning_through_a_server_loads_neither_torch_nor_the_trainer():
    code = "import sys, mmft_hf.captioning.jobs, mmft_hf.captioning.backends.openai as _; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'mmft_hf.captioning.jobs'" in loaded
    assert "'torch'" not in loaded and "'transformers.trainer'" not in loaded
