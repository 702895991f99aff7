"""Render report.html and report.md with Jinja; texts from data sets are escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.evaluation.records import Report
from pipeline.evaluation.report.figures import Picture
from pipeline.evaluation.report.sections import sections, unit

#: Characters that Markdown interprets as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]#|~!$])")


def make_page(report: Report, pictures: Sequence[Picture]) -> str:
    """Render one self-contained HTML file.

    Figures are data URIs. There is no script; a content security policy forbids scripts and
    requests.
    """
    return _render("report.html.j2", report, pictures, autoescape=True)


def make_markdown(report: Report, pictures: Sequence[Picture]) -> str:
    """Render the same content as Markdown, which refers to the figures as files."""
    return _render("report.md.j2", report, pictures, autoescape=False)


def _render(template: str, report: Report, pictures: Sequence[Picture], *, autoescape: bool) -> str:
    environment = Environment(
        loader=PackageLoader("pipeline.evaluation.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["markdown"] = escape_markdown
    named: dict[str, Any] = {picture.name: picture for picture in pictures}
    text: str = environment.get_template(template).render(
        report=report, sections=sections(report), unit=unit(report), pictures=named
    )
    return text


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown shows it unchanged on one line, without markup or HTML."""
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"
