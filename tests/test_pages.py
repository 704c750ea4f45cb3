"""Pages for people; oracle: what a reader of HTML makes of them."""

from __future__ import annotations

import base64
import html
import re

import pytest
from jinja2 import UndefinedError

from crt import pages
from crt.pages import data_url, write_page


@pytest.fixture
def template(tmp_path, monkeypatch):
    """The name of a template with one place to fill."""
    monkeypatch.setattr(pages, "_TEMPLATES", tmp_path)
    (tmp_path / "page.j2").write_text("<p>{{ text }}</p>")
    return "page.j2"


def test_what_users_write_is_shown_and_not_interpreted(tmp_path, template):
    text = """<img src=x onerror="alert(1)"> & 'größer' 猫"""
    write_page(tmp_path / "page.html", template, text=text)
    (shown,) = re.findall(r"<p>([^<>]*)</p>", (tmp_path / "page.html").read_bytes().decode("utf-8"))
    assert html.unescape(shown) == text


def test_a_page_that_lacks_something_is_not_written(tmp_path, template):
    with pytest.raises(UndefinedError):
        write_page(tmp_path / "page.html", template)
    assert not (tmp_path / "page.html").exists()


def test_pictures_are_inside(tmp_path):
    content = bytes(range(256))
    (tmp_path / "a.png").write_bytes(content)
    kind, _, text = data_url(tmp_path / "a.png").partition(";base64,")
    assert (kind, base64.b64decode(text, validate=True)) == ("data:image/png", content)


def test_what_scrolls_on_narrow_screens_is_not_cut_on_paper():
    """A sheet is narrower than the screens that the rules are for, and what overflows is lost on it."""
    css = (pages._TEMPLATES / "page.css.j2").read_text(encoding="utf-8")
    assert [
        rule for rule in re.findall(r"@media (.*?) {", css) if "max-width" in rule and "screen and" not in rule
    ] == []
    assert "@media print" in css
