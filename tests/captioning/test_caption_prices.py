"""Prices from maintained packages; the tests run where these are installed."""

import os

import pytest
import yaml

from mmft_hf.captioning.ask.cost import BUILTIN, price_of, read_prices
from mmft_hf.cli import main


def test_the_command_names_the_extra(tmp_path, capsys):
    try:
        import genai_prices  # noqa: F401
    except ImportError:
        assert main(["caption", "prices", str(tmp_path / "prices.yaml")]) == 2
        assert "mmft_hf[prices]" in capsys.readouterr().err
    for words in (["prices"], ["prices", "table.txt"], ["prices", "a.yaml", "b.yaml"]):
        assert main(["caption", *words]) == 2 and "FILE.yaml" in capsys.readouterr().err


def test_a_file_of_todays_prices(tmp_path, capsys):
    package = pytest.importorskip("genai_prices")
    file = tmp_path / "my prices.yaml"
    file.write_text("models: {mine: {input: 1, output: 2}, gpt-6-luna: {input: 9, output: 9, image: {base: 7}}}")
    assert main(["caption", "prices", str(file)]) == 0
    assert f"--prices '{file}'" in capsys.readouterr().out
    assert (price_of("mine", file).input, price_of("mine", file).output) == (1, 2)
    for model in ("gpt-6-luna", "gemini-3.8-flash", "claude-haiku-5-5", "claude-opus-4-6"):
        known = package.calc_price(package.Usage(input_tokens=10**6 // 10, output_tokens=10**6 // 10), model)
        ours = price_of(model, file)
        assert 0.1 * ours.input == pytest.approx(float(known.input_price))
        assert 0.1 * ours.output == pytest.approx(float(known.output_price))
        assert "genai-prices" in ours.date
    assert price_of("gpt-6-luna", file).image == {"base": 7}  # of the older file
    assert price_of("claude-haiku-5-5", file).image == price_of("claude-haiku-5-5").image  # of the built-in table
    before = file.read_text()
    assert main(["caption", "prices", str(file)]) == 0 and file.read_text() == before
    file.write_text("something: else")
    assert main(["caption", "prices", str(file)]) == 2 and file.read_text() == "something: else"


def test_the_built_in_table_agrees_with_genai_prices():
    package = pytest.importorskip("genai_prices")
    for model, price in read_prices(BUILTIN).items():
        known = package.calc_price(package.Usage(input_tokens=1000, output_tokens=1000), model)
        assert (price.input, price.output) == (float(1000 * known.input_price), float(1000 * known.output_price)), model


def test_the_built_in_table_agrees_with_litellm(monkeypatch):
    monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no network
    litellm = pytest.importorskip("litellm")
    for model, price in read_prices(BUILTIN).items():
        row = litellm.model_cost.get(f"gemini/{model}") or litellm.model_cost[model]
        rates = [round(1e6 * row[f"{name}_cost_per_token"], 6) for name in ("input", "output")]
        assert [price.input, price.output] == rates and row["supports_vision"], model


def test_the_built_in_table_has_the_models_of_recipes(request):
    recipes = request.config.rootpath / "recipes"
    for file in recipes.rglob("caption.yaml"):
        settings = yaml.safe_load(file.read_text())
        if settings["captioner"] in ("openai", "gemini", "anthropic") and "base_url" not in settings:
            assert price_of(settings["captioner_model"]), file
