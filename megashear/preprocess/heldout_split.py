"""Select held-out documents: those whose text's hash is below a threshold of their domain.

Independent of the order of shards and documents. Equal texts are in the same split, in all domains. A domain with too
little held-out text gets a larger fraction, up to a limit.
"""

from dataclasses import dataclass

import numpy as np

BIN_BITS = 12  # of the hash, the highest: how finely tokens are counted to bound the threshold


@dataclass(frozen=True)
class HeldOutRule:
    """How much is held out.

    fraction: share of the documents; sequences of sequence_length + 1 tokens: the least that a domain should hold out;
    limit: the largest share of a domain's tokens that may go to reach that least.
    """

    fraction: float = 0.005
    sequences: int = 500
    sequence_length: int = 4096
    limit: float = 0.2

    @property
    def below(self) -> int:
        """The largest hash that the fraction holds out."""
        return int(min(self.fraction, 1.0) * (2**64 - 2**11))

    @property
    def wanted(self) -> int:
        """The least tokens that a domain should hold out."""
        return self.sequences * (self.sequence_length + 1)


class TokensByHash:
    """Tokens of a domain's documents by the first bits of their hash, counted some documents at a time."""

    def __init__(self) -> None:
        self.token_B = np.zeros(1 << BIN_BITS, np.int64)

    def add(self, hash_N: np.ndarray, length_N: np.ndarray) -> None:
        """Count documents: uint64 [documents], and tokens of each."""
        bin_N = (hash_N >> np.uint64(64 - BIN_BITS)).astype(np.int64)
        self.token_B += np.bincount(bin_N, weights=length_N, minlength=len(self.token_B)).astype(np.int64)

    def bound(self, rule: HeldOutRule) -> int:
        """A hash that no held-out document of the domain exceeds."""
        total_B = np.cumsum(self.token_B)
        enough_B = (total_B >= max(rule.wanted, 1)) | (total_B > rule.limit * float(total_B[-1]))
        enough_B[: max(rule.below, 0) >> (64 - BIN_BITS)] = False
        last = int(enough_B.argmax()) if enough_B.any() else len(enough_B) - 1
        return ((last + 1) << (64 - BIN_BITS)) - 1


def heldout_hashes(
    hash_N: np.ndarray, length_N: np.ndarray, rule: HeldOutRule, domain_tokens: int | None = None
) -> np.ndarray:
    """Hashes of a domain's held-out documents.

    hash_N: uint64 [documents]; length_N: tokens per document, 1 or more; domain_tokens: of the whole domain where these
    are only its documents up to `TokensByHash.bound`. Returns sorted unique uint64; at least one text stays for
    training.
    """
    unique_U, inverse_N = np.unique(hash_N, return_inverse=True)
    token_U = np.bincount(inverse_N, weights=length_N, minlength=len(unique_U)).astype(np.int64)
    tokens = int(token_U.sum())
    total = tokens if domain_tokens is None else domain_tokens
    below = int(np.searchsorted(unique_U, np.uint64(rule.below), side="right")) if rule.fraction > 0 else 0
    total_U = np.cumsum(token_U)
    if rule.fraction > 0 and (below == 0 or total_U[below - 1] < rule.wanted):
        enough = int(np.searchsorted(total_U, rule.wanted, side="left")) + 1
        allowed = int(np.searchsorted(total_U, rule.limit * float(total), side="right"))
        below = max(below, min(enough, allowed))
    return unique_U[: min(below, max(len(unique_U) - (tokens == total), 0))]
