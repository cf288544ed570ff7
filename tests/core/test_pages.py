"""Pages from templates: values are escaped, missing names are errors, the filters are ours."""

import jinja2
import pytest

from mmft_hf.core.pages import render_page


def rendered(folder, text, **values):
    (folder / "page.html.j2").write_text(text)
    return render_page(folder / "page.html.j2", **values)


def test_values_never_become_markup(tmp_path):
    (tmp_path / "macros.j2").write_text("{% macro bold(text) %}<b>{{ text }}</b>{% endmacro %}")
    found = rendered(
        tmp_path, '{% from "macros.j2" import bold %}<i title="{{ x }}">{{ bold(x) }}</i>', x="<script>\"'\x1b[31m"
    )
    escaped = "&lt;script&gt;&#34;&#39; [31m"
    assert found == f'<i title="{escaped}"><b>{escaped}</b></i>'


def test_filters_and_missing_values(tmp_path):
    assert rendered(tmp_path, "{{ n | thousands }} {{ x | percent }} {{ b | base64 }}", n=1234, x=0.3149, b=b"ab") == (
        "1,234 31.5 % YWI="
    )
    assert rendered(
        tmp_path, "{{ long | one_line(4) }}|{{ nothing }}|{{ lines }}", long="a\nbcde", nothing=None, lines="a\nb"
    ) == ("a b…||a\nb")
    assert rendered(tmp_path, "{{ 2 | twice }}", filters={"twice": lambda x: 2 * x}) == "4"
    with pytest.raises(jinja2.UndefinedError, match="missing"):
        rendered(tmp_path, "{{ missing }}")
