"""Build a self-contained HTML page: tables, plots, sections. Text is escaped here, once.

No script and no external link, enforced by a Content-Security-Policy. Functions take text and return `Html`, so content
of a run's files cannot become markup.
"""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import NewType

from matplotlib.figure import Figure

Html = NewType("Html", str)
DPI = 130

STYLE = """
body { font: 16px/1.5 Georgia, "Times New Roman", serif; color: #1a1a1a; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1, h2, table, figcaption { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; border-bottom: 1px solid #ccc; padding-bottom: 0.2rem; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { padding: 0.22rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 1px solid #777; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; }
figcaption, caption { color: #555; font-size: 0.86rem; }
caption { caption-side: bottom; text-align: left; padding-top: 0.4rem; }
@media print { body { font-size: 11px; margin: 0; max-width: none; } tr { break-inside: avoid; } }
"""


def paragraph(text: str) -> Html:
    """Paragraph of plain text."""
    return Html(f"<p>{escape(text)}</p>")


def bullets(lines: Sequence[str]) -> Html:
    """List of plain texts; empty without any."""
    return Html("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Html:
    """Table with the first column aligned left; `caption` is a sentence below it."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(row("td", cells) for cells in rows)
    return Html(f"<table>{below}<thead>{row('th', header)}</thead><tbody>{body}</tbody></table>")


def picture(figure: Figure, caption: str) -> Html:
    """Figure as an embedded PNG, with a caption."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
    text = escape(caption)
    return Html(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')


def section(title: str, parts: Sequence[Html]) -> Html:
    """Heading and content."""
    return Html(f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>")


def page(title: str, parts: Sequence[Html]) -> str:
    """Complete HTML file."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    body = "\n".join(parts)
    content = f"<h1>{escape(title)}</h1>\n{body}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{content}\n</body></html>\n'
