"""Plain-text tables, and short forms of large numbers and durations."""

from collections.abc import Sequence


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table: title, header (omitted if all cells are empty), rule and rows, columns two spaces apart."""
    widths = [max(len(cells[column]) for cells in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    head = [line(header)] if any(header) else []
    return "\n".join([title, *head, "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def count(number: float) -> str:
    """Short form of a number with three digits: 6.74 B, 420 M, 1.05 T; unchanged below a thousand."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as h:mm, rounded to the minute: 11 220 is 3:07."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}"
