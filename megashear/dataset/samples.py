"""Samples of a domain, and their order within an epoch.

Sample k of a stream is its S+1 consecutive tokens from k*S: S predictions, and the last token is the next sample's
first. The order of an epoch is a keyed bijection of 0..n-1: a balanced Feistel network on the smallest even number of
bits that holds n, with cycle walking. It has no table and no state, and is the same on every machine.
"""

import hashlib

import numpy as np

ROUNDS = 6
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def sample_count(tokens: int, sequence_length: int) -> int:
    """Samples of `sequence_length` + 1 tokens in a stream of `tokens`; neighbours share one token."""
    return max(tokens - 1, 0) // sequence_length


def read_sample(stream: np.ndarray, sample: int, sequence_length: int) -> np.ndarray:
    """Tokens [S+1] of one sample, a view of the stream."""
    tokens: np.ndarray = stream[sample * sequence_length : (sample + 1) * sequence_length + 1]
    return tokens


def mix(value: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): uint64 -> uint64, every bit depends on every bit."""
    value = (value ^ (value >> np.uint64(30))) * MIX_1
    value = (value ^ (value >> np.uint64(27))) * MIX_2
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


class Permutation:
    """A bijection of 0..count-1 onto itself that a key chooses."""

    def __init__(self, count: int, *key: int | str) -> None:
        """count: how many numbers; key: what chooses the order, such as (seed, domain, epoch)."""
        assert count > 0
        self.count = count
        parts = [part if isinstance(part, str) else int(part) for part in key]
        digest = hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self._half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)

    def _rounds(self, value_N: np.ndarray) -> np.ndarray:
        left_N, right_N = value_N >> self._half, value_N & self._mask
        for key in self._keys:
            left_N, right_N = right_N, left_N ^ (mix(right_N ^ key) & self._mask)
        return (left_N << self._half) | right_N

    def __call__(self, position_N: np.ndarray) -> np.ndarray:
        """The numbers at these positions: int64 [N] in 0..count-1 -> int64 [N]."""
        value_N = self._rounds(np.asarray(position_N).astype(np.uint64))
        outside_N = np.flatnonzero(value_N >= self.count)
        while outside_N.size:
            value_N[outside_N] = self._rounds(value_N[outside_N])
            outside_N = outside_N[value_N[outside_N] >= self.count]
        return value_N.astype(np.int64)

    def inverse(self, number_N: np.ndarray) -> np.ndarray:
        """The positions of these numbers: int64 [N] in 0..count-1 -> int64 [N]."""
        value_N = self._rounds_back(np.asarray(number_N).astype(np.uint64))
        outside_N = np.flatnonzero(value_N >= self.count)
        while outside_N.size:
            value_N[outside_N] = self._rounds_back(value_N[outside_N])
            outside_N = outside_N[value_N[outside_N] >= self.count]
        return value_N.astype(np.int64)

    def _rounds_back(self, value_N: np.ndarray) -> np.ndarray:
        left_N, right_N = value_N >> self._half, value_N & self._mask
        for key in self._keys[::-1]:
            left_N, right_N = right_N ^ (mix(left_N ^ key) & self._mask), left_N
        return (left_N << self._half) | right_N


def samples_at(cursor_N: np.ndarray, count: int, seed: int, domain: str) -> np.ndarray:
    """Sample numbers at positions of a domain's endless order: epoch after epoch, each in an order of its own.

    cursor_N: int64 [N], ascending, from 0 on; count: samples in the domain. Returns int64 [N] in 0..count-1.
    """
    epoch_N, position_N = np.divmod(np.asarray(cursor_N, dtype=np.int64), count)
    sample_N = np.empty_like(position_N)
    for epoch in np.unique(epoch_N):
        here_N = epoch_N == epoch
        sample_N[here_N] = Permutation(count, seed, domain, int(epoch))(position_N[here_N])
    return sample_N
