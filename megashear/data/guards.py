"""Guard rails of the mixture: a floor, a cap and a largest change per update, held at once.

The weights are scaled by one factor and clipped to their bounds, the factor found so that they sum to 1: domains
between their bounds keep their proportions. All rails are off at floor 0, cap 1, change 1. Read next: `mixture.py`.

Legend: K domain.
"""

import numpy as np


def guarded(weight_K: np.ndarray, before_K: np.ndarray, floor: float, cap: float, max_change: float) -> np.ndarray:
    """Weights within the rails.

    weight_K: float64 [K], sum 1, what the rule wants; before_K: weights before the update. Returns float64 [K], sum 1,
    each in [floor, cap] and within `max_change` of before. Where both cannot hold (weights before were outside of floor
    and cap, and the way back is longer than the change), floor and cap win. Needs floor * K <= 1 <= cap * K.
    """
    if floor <= 0.0 and cap >= 1.0 and max_change >= 1.0:
        return weight_K
    low_K = np.clip(before_K - max_change, floor, cap)
    high_K = np.clip(before_K + max_change, floor, cap)
    if low_K.sum() > 1.0 or high_K.sum() < 1.0:
        low_K, high_K = np.full_like(weight_K, floor), np.full_like(weight_K, cap)
    return scaled_into(np.maximum(weight_K, np.finfo(np.float64).tiny), low_K, high_K)


def scaled_into(weight_K: np.ndarray, low_K: np.ndarray, high_K: np.ndarray) -> np.ndarray:
    """clip(f * weight_K, low_K, high_K) with the factor f for which it sums to 1 (bisection on the logarithm of f).

    weight_K: positive; the sums of low_K and high_K enclose 1.
    """
    low, high = -1500.0, 1500.0
    log_K = np.log(weight_K)

    def clipped(shift: float) -> np.ndarray:
        clipped_K: np.ndarray = np.clip(np.exp(np.minimum(log_K + shift, 1.0)), low_K, high_K)
        return clipped_K

    for _ in range(200):
        middle = 0.5 * (low + high)
        if clipped(middle).sum() < 1.0:
            low = middle
        else:
            high = middle
    result_K = clipped(high)
    # What rounding leaves, at most some 1e-16, goes to the domain with the most room.
    missing = 1.0 - result_K.sum()
    room_K = high_K - result_K if missing > 0 else result_K - low_K
    result_K[int(np.argmax(room_K))] += missing
    return result_K
