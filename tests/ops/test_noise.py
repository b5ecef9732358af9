"""The reference noise against the published vectors of Philox, the hard concrete sample against published values."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megashear.ops import reference

PUBLISHED = Path(__file__).parent / "fixtures" / "published_ops.npz"
# counter, key, output: philox4x32 with 10 rounds in the known-answer file of Random123 (Salmon et al. 2011)
KNOWN_ANSWERS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    assert reference.philox(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0].tolist() == words


def test_noise_reads_the_documented_counter_key_and_word():
    counter, key, _ = KNOWN_ANSWERS[2]
    block, granularity, micro_batch, step = 3, counter[1], counter[2], counter[3]
    seed = key[0] | key[1] << 32
    noise = reference.mask_noise(seed, step, micro_batch, granularity, 4 * block + 4)
    drawn = reference.philox(np.array([block, granularity, micro_batch, step], dtype=np.uint64)[:, None], key)[:, 0]
    expected = [min(max(2 * (int(word) >> 9) + 1, 17), 2**24 - 17) / 2**24 for word in drawn]
    assert noise[-4:].tolist() == expected


def test_noise_is_uniform_and_inside_its_bounds():
    noise = reference.mask_noise(7, 0, 0, 0, 400_003).double()
    assert noise.min() > 1e-6 and noise.max() < 1 - 1e-6
    assert abs(noise.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(noise))
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded once in a thousand samples
    steps = torch.arange(len(noise), dtype=torch.float64) / len(noise)
    assert (noise.sort().values - steps).abs().max() < 1.95 / math.sqrt(len(noise))


def test_extreme_words_stay_inside_the_bounds_and_exact(monkeypatch):
    words = np.array([[0], [8 << 9], [0xFFFFFFFF], [1 << 31]], dtype=np.uint64)
    monkeypatch.setattr(reference, "philox", lambda counter, key: words)
    low, next_low, high, middle = reference.mask_noise(0, 0, 0, 0, 4).double().tolist()
    assert low > 1e-6 and high < 1 - 1e-6 and 1 - high == low == next_low == 17 / 2**24
    assert middle == 0.5 + 2.0**-24


indices = st.integers(0, 2**32 - 1)


@given(st.integers(-(2**63), 2**64 - 1), indices, indices, indices, st.integers(0, 40))
def test_noise_depends_on_indices_not_unit_count(seed, step, micro_batch, granularity, units):
    noise = reference.mask_noise(seed, step, micro_batch, granularity, 40)
    assert torch.equal(noise[:units], reference.mask_noise(seed, step, micro_batch, granularity, units))
    for i in range(4):
        other = [seed, step, micro_batch, granularity]
        other[i] ^= 1
        assert not torch.equal(noise, reference.mask_noise(*other, 40))


@pytest.mark.parametrize("bad", [(-1, 0, 0), (0, 2**32, 0), (0, 0, -3)])
def test_indices_beyond_a_word_are_refused(bad):
    with pytest.raises(ValueError, match="outside"):
        reference.mask_noise(0, *bad, 4)


def test_sample_is_the_published_one():
    with np.load(PUBLISHED) as arrays:
        log_alpha, noise, z = (torch.from_numpy(arrays[f"A/{name}"]) for name in ("loga_grid", "eps_grid", "z_hard"))
    ours = reference.hard_concrete(log_alpha.double(), noise.double())
    torch.testing.assert_close(ours, z.double(), rtol=0, atol=1e-12)
    assert torch.equal(ours == 0, z == 0) and torch.equal(ours == 1, z == 1)


def test_gradient_is_zero_outside_bounds():
    log_alpha = torch.linspace(-6, 6, 401, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(401, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)
    z = reference.hard_concrete(log_alpha, noise)
    z.sum().backward()
    s = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha.detach()) * 1.5)
    inside = (z > 0) & (z < 1)
    expected = torch.where(inside, 1.2 * s * (1 - s) * 1.5, 0.0)
    torch.testing.assert_close(log_alpha.grad, expected, rtol=1e-12, atol=1e-15)
    assert (log_alpha.grad[~inside] == 0).all() and 20 < (~inside).sum() < 380


def test_fused_sample_is_noise_then_sample():
    log_alpha = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    noise = reference.mask_noise(5, 4, 3, 2, 42).view(6, 7)
    assert torch.equal(reference.sample_hard_concrete(log_alpha, 5, 4, 3, 2), reference.hard_concrete(log_alpha, noise))
