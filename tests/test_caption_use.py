"""`mmft-hf caption` as its users read it: help, numbers, advice, and commands that work when typed."""

from mmft_hf.cli import main


def test_help_names_each_setting_once(capsys):
    assert main(["caption", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: mmft-hf caption [action …] [--config FILE.yaml] [--key value …]\n")
    assert text.count("--base_url") == 1 and "--base-url" not in text
    assert "None" not in text and "(default: outputs/captioned)" in text and "(default: visual shape texture)" in text
    assert "Default: train." in text and "--dry_run [true|false]" in text
