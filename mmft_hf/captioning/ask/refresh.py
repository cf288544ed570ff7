"""A price file with today's prices, from genai-prices (MIT), a maintained package that the extra `prices` installs.

Source: https://github.com/pydantic/genai-prices
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import yaml

from ...core.errors import UserError
from ...core.files import atomic_write
from .cost import price_of, read_prices

PROVIDERS = {"openai": "", "anthropic": "", "google": "gem"}  # with the beginning of the names to keep
# Models that neither read a picture nor write a text, by their names.
_OTHERS = re.compile(
    r"audio|realtime|live|tts|whisper|transcribe|embedding|moderation|image|banana|omni|search|codex|computer|robotics|cyber"
    r"|^(?:ada|babbage|curie|davinci|text-|gpt-3|gpt-4$|gpt-4-32k|o1-mini|claude-v1|claude-2|ft:)|\.ft-|:"
)


def refresh_prices(file: str | Path) -> tuple[int, str]:
    """Writes a price file for `--prices`. Rows of an older file that the package does not know are kept.

    Returns:
        The number of models, and where their prices are from.

    Raises:
        UserError: genai-prices is not installed, or the file holds something else than prices.
    """
    try:
        from genai_prices.data_snapshot import get_snapshot
    except ImportError:
        raise UserError(
            "caption prices: expected the package genai-prices, found none. Type pip install -U 'mmft_hf[prices]' (it needs "
            "Python 3.11)."
        ) from None
    now, file = datetime.now(timezone.utc), Path(file)
    old = read_prices(file) if file.exists() else {}
    models = {name: (price.input, price.output, price.image) for name, price in old.items()}
    found = 0
    for provider in get_snapshot().providers:
        for model in provider.models if provider.id in PROVIDERS else ():
            if not model.id.startswith(PROVIDERS[provider.id]) or _OTHERS.search(model.id) or model.deprecated:
                continue
            prices = model.get_prices(now)
            rates = prices.input_mtok, prices.output_mtok
            if None in rates:
                continue
            known = price_of(model.id, file if old else None)
            # Of prices in tiers the first: no caption needs a long context.
            models[model.id] = (*(float(getattr(rate, "base", rate)) for rate in rates), known.image if known else {})
            found += 1
    source = f"genai-prices {version('genai-prices')}, {now:%Y-%m-%d}"
    with atomic_write(file) as temporary:
        Path(temporary).write_text(_table(models, source), encoding="utf-8")
    return found, source


def _table(models: dict[str, tuple], source: str) -> str:
    rows = {
        name: {"input": input, "output": output, **({"image": dict(image)} if image else {})}
        for name, (input, output, image) in sorted(models.items())
    }
    lines = [f"  {_flow(name)}: {_flow(row)}" for name, row in rows.items()]
    about = (
        "# USD per million tokens, for --prices. `mmft-hf caption prices` writes it anew and keeps rows of your own."
    )
    return "\n".join([about, f"date: {_flow(source)}", "models:", *lines, ""])


def _flow(value) -> str:
    """One line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()
