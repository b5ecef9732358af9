"""Which documents are held out: those whose text's hash is below a threshold of their domain.

Key properties: independent of the order of shards and documents; equal texts stand on one side, also across domains; a
domain with too little held out at the wanted fraction gets a larger one, up to a limit. Read next: `merge.py`.
"""

from dataclasses import dataclass

import numpy as np


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


def heldout_hashes(hash_N: np.ndarray, length_N: np.ndarray, rule: HeldOutRule) -> np.ndarray:
    """Hashes of a domain's held-out documents.

    hash_N: uint64 [documents]; length_N: tokens per document. Returns sorted unique uint64; at least one text stays for
    training.
    """
    unique_U, inverse_N = np.unique(hash_N, return_inverse=True)
    token_U = np.bincount(inverse_N, weights=length_N, minlength=len(unique_U)).astype(np.int64)
    below = int(np.searchsorted(unique_U, np.uint64(min(rule.fraction, 1.0) * (2**64 - 2**11)), side="right"))
    total_U = np.cumsum(token_U)
    wanted = rule.sequences * (rule.sequence_length + 1)
    if below == 0 or total_U[below - 1] < wanted:
        enough = int(np.searchsorted(total_U, wanted, side="left")) + 1
        allowed = int(np.searchsorted(total_U, rule.limit * float(token_U.sum()), side="right"))
        below = max(below, min(enough, allowed))
    if rule.fraction <= 0:
        below = 0
    return unique_U[: min(below, max(len(unique_U) - 1, 0))]
