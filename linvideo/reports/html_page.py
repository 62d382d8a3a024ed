"""Pieces of an HTML page that needs no other file: text, tables, commands and labelled pictures."""

import base64
import html
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.7em; margin-bottom: .2em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .88em } th { background: #f4f4f4 }
th, td { padding: .3em .6em; border: 1px solid #ddd; text-align: right }
td { white-space: nowrap } td:first-child { white-space: normal }
th:first-child, td:first-child { text-align: left } p.note { color: #555; font-size: .92em }
p.verdict { font-size: 1.15em; background: #f2f7f2; border-left: 4px solid #2ca02c; padding: .7em 1em }
p.warning { background: #fff4e5; border-left: 4px solid #ff7f0e; padding: .7em 1em }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em; font-size: .92em }
dt { font-weight: 600 } dd { margin: 0 }
pre { background: #f6f6f6; padding: .6em .8em; font-size: .88em; white-space: pre-wrap; user-select: all }
figure { margin: 1.2em 0 } figcaption { font-weight: 600; margin-bottom: .3em }
.films { display: flex; flex-wrap: wrap; gap: 12px } .films > div { flex: 1 1 0; min-width: 120px; max-width: 340px }
.films img { width: 100%; display: block; background: #000 } .films span { font-size: .88em; color: #444 }
.pixels { image-rendering: pixelated } .wide { width: 100% } img { max-width: 100% }
"""


def page(title: str, summary: str, sections: list[tuple[str, str]], verdict: str = "") -> str:
    """Return a whole HTML document.

    Args:
        title: The heading, as text.
        summary: A paragraph of text about what was made and where.
        sections: (heading as text, body as HTML) of each section.
        verdict: The outcome in a sentence, which is shown first.
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    first = paragraph(verdict, "verdict") if verdict else ""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{first}\n{note(summary)}\n{body}"
        "</body></html>\n"
    )


def paragraph(text: str, kind: str) -> str:
    return f"<p class='{kind}'>{html.escape(text)}</p>"


def note(text: str) -> str:
    return paragraph(text, "note")


def table(columns: list[str], rows: list[list]) -> str:
    """Return a table, with numbers of four significant digits."""

    def cell(value) -> str:
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def definitions(meanings: dict[str, str]) -> str:
    """Return a list of terms and what they mean."""
    items = (f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}</dd>" for term, meaning in meanings.items())
    return f"<dl>{''.join(items)}</dl>"


def commands(steps: list[tuple[str, str]]) -> str:
    """Return (what for, command line) of each step; a click selects a whole command line."""
    return "".join(f"{note(what)}<pre>{html.escape(line)}</pre>" for what, line in steps)


def image_tag(data: bytes, kind: str = "png", style: str = "", alt: str = "") -> str:
    """Return a picture inside the page; kind: "png", "webp" or "svg+xml"; style: names of the style sheet's classes."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f"<img class='{style}' alt='{html.escape(alt)}' src='{source}'>"


def film_row(caption: str, films: dict[str, str]) -> str:
    """Return labelled videos next to each other under their caption; films: label -> HTML of a picture."""
    cells = "".join(f"<div>{film}<span>{html.escape(name)}</span></div>" for name, film in films.items())
    return f"<figure><figcaption>{html.escape(caption)}</figcaption><div class='films'>{cells}</div></figure>"


@contextmanager
def if_possible() -> Iterator[None]:
    """Write a report inside: whatever fails is a warning, because the work that it describes is saved already."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"everything else is complete, but report.html was not written: {error}", stacklevel=3)
