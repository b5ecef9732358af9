"""Describe a dataset by domain: documents, tokens, bytes, lengths, duplicates. Reads tables of the parts only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class DomainReport:
    """One domain: what it holds, training and held-out together, and the duplicates that were found.

    documents_L, tokens_L: int64 [lengths], of the documents with 2^i to 2^(i+1) - 1 tokens, their end included.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    duplicates: int
    documents_L: np.ndarray
    tokens_L: np.ndarray

    def __add__(self, other: "DomainReport") -> "DomainReport":
        """Both together; the name is the first's."""
        bins = max(len(self.documents_L), len(other.documents_L))
        documents_L, tokens_L = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        for one in (self, other):
            documents_L[: len(one.documents_L)] += one.documents_L
            tokens_L[: len(one.tokens_L)] += one.tokens_L
        return DomainReport(
            self.name,
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.duplicates + other.duplicates,
            documents_L,
            tokens_L,
        )


def describe(name: str, length_N: np.ndarray, byte_N: np.ndarray, duplicates: int) -> DomainReport:
    """Count the documents of a domain. length_N: tokens of each, 1 or more; byte_N: bytes of its text."""
    _, exponent_N = np.frexp(length_N.astype(np.float64))
    bins = int(exponent_N.max(initial=1))
    documents_L = np.bincount(exponent_N - 1, minlength=bins)
    tokens_L = np.bincount(exponent_N - 1, weights=length_N, minlength=bins).astype(np.int64)
    tokens, size = int(length_N.sum(dtype=np.int64)), int(byte_N.sum(dtype=np.int64))
    return DomainReport(name, len(length_N), tokens, size, duplicates, documents_L, tokens_L)


def report_text(reports: Sequence[DomainReport], dropped: bool) -> str:
    """The report as text. dropped: whether duplicates were left out of the dataset."""
    rows: list[tuple[str, ...]] = [
        ("domain", "documents", "tokens", "bytes of text", "tokens/byte", "median", "longest", "duplicates")
    ]
    for report in reports:
        rows.append(
            (
                report.name,
                *(f"{number:,}" for number in (report.documents, report.tokens, report.bytes)),
                f"{report.tokens / report.bytes:.4f}" if report.bytes else "not known",
                span(median_bin(report.documents_L)),
                span(len(report.documents_L) - 1),
                f"{report.duplicates:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    what = "dropped" if dropped else "kept; --drop-duplicates leaves them out"
    lines += ["", f"Lengths are in tokens, the end included. Duplicates (texts that stood earlier) were {what}."]
    return "\n".join(line for part in (lines, *map(histogram, reports)) for line in part) + "\n"


def histogram(report: DomainReport) -> list[str]:
    """Lines of a domain's lengths: how many documents, and the share of tokens in them."""
    lines = ["", report.name]
    width, most = len(span(len(report.documents_L) - 1)), int(report.documents_L.max(initial=1))
    for i, (documents, tokens) in enumerate(zip(report.documents_L, report.tokens_L, strict=True)):
        bar = "#" * -(-BAR * int(documents) // max(most, 1))
        share = tokens / max(report.tokens, 1)
        lines.append(f"  {span(i):>{width}}  {bar:{BAR}}  {documents:>13,}  {share:6.1%} of tokens")
    return lines


def span(power: int) -> str:
    """The lengths of a bin: `64-127`."""
    return f"{1 << power}-{(2 << power) - 1}" if power else "1"


def median_bin(documents_L: np.ndarray) -> int:
    """The bin that holds the document of median length."""
    return int(np.searchsorted(np.cumsum(documents_L), (documents_L.sum() + 1) // 2))
