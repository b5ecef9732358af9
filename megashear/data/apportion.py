"""Rounding domain shares to whole sequences so that the realised mix keeps up with the weights.

Largest remainder with the remainder carried forward, as in elections; where fewer seats are left than domains have
fractions, the seats go in the order of deadlines, as in Tijdeman's solution of the chairman assignment problem
(Discrete Mathematics 32, 1980): a domain whose backlog would soonest pass the bound comes first. Taking the largest
fraction first, as is common, lets the backlog of small domains pass one sequence at constant weights (1.18 at the
published weights and batches of one). Read next: `blend.py`.

Legend: K domain.
"""

import numpy as np

# Deadlines are counted to this backlog rather than to 1: room for weights that rise before the next batch.
BACKLOG = 0.8


def apportion(weight_K: np.ndarray, remainder_K: np.ndarray, seats: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole seats for shares, and what is carried on.

    weight_K: float64 [K], sum 1; remainder_K: float64 [K], sum 0, seats owed from before (negative: given in advance).
    Returns seats int64 [K] with sum `seats`, and the new remainders float64 [K], within 1 of zero while the weights
    hold still.
    """
    due_K = weight_K * seats + remainder_K
    seat_K = np.maximum(np.floor(due_K), 0.0)
    fraction_K = due_K - seat_K
    missing = seats - int(seat_K.sum())
    if missing > 0:
        chosen = np.argsort(deadline_key(fraction_K, weight_K), kind="stable")[:missing]
        seat_K[chosen] += 1.0
    elif missing < 0:
        held = np.where(seat_K > 0, fraction_K, np.inf)
        seat_K[np.argsort(held, kind="stable")[:-missing]] -= 1.0
    return seat_K.astype(np.int64), due_K - seat_K


def deadline_key(fraction_K: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """Order in which domains get one more seat, float64 [K], smallest first.

    Domains with a fraction of at least 1/(2K-2) come first, by the time that their weight takes to raise the fraction
    to the bound; those past it by how far; the others follow, largest fraction first.
    """
    domains = len(fraction_K)
    least = 1.0 / (2 * domains - 2) if domains > 1 else 0.0
    bound = min(1.0 - least, BACKLOG)
    late_K = fraction_K > bound
    time_K = (bound - fraction_K) / np.maximum(weight_K, 1e-12)
    key_K = np.where(late_K, (bound - fraction_K) * 1e15, time_K)
    # 1e-9: a fraction such as 1/12 that rounding made a little smaller is still eligible.
    return np.where(fraction_K >= least - 1e-9, key_K, 1e20 - fraction_K * 1e19)
