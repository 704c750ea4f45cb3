"""HTML pages for people, with everything in them: they open offline."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Path(__file__).with_name("templates")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template of `crt/templates/`."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    path.write_text(environment.get_template(template).render(values), encoding="utf-8")


def data_url(path: Path) -> str:
    """A PNG file as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
