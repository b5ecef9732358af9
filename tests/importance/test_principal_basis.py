"""The covariance of what norms read, by hooks on transformers' model; its principal directions."""

from pathlib import Path

import torch

from helpers.tiny import Tiny
from importance.oracle import llama
from megashear.importance.principal_basis import massive_units, principal_basis, share_kept, turned_norm, unlike_units
from parallel.importance_case import BATCHES, drawn_shape, open_loader, residual_moments


def expected(data: Path, shape_name: str, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over tokens and norms of outer products of x / rms(x), and largest sizes, one sequence after another."""
    shape = drawn_shape(shape_name)
    model, loader = llama(shape), open_loader(data)
    found: list[torch.Tensor] = []
    peaks: list[torch.Tensor] = []

    def note(norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        x = inputs[0][0].double()
        unit = x / (x.square().mean(1, keepdim=True) + shape.norm_eps).sqrt()
        found.append(unit.T @ unit / len(unit))
        peaks.append(unit.abs().amax(0))

    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(note)
    with torch.no_grad():
        for _ in range(BATCHES):
            samples, _ = loader.read(loader.stream.next_batch(sequences), slice(None))
            for sample in samples.long():
                model(sample[None, :-1], use_cache=False)
    assert len(found) == BATCHES * sequences * (2 * shape.num_layers + 1)
    return torch.stack(found).mean(0), torch.stack(peaks).amax(0)


def test_covariance_is_that_of_transformers_activations(layout, tiny: Tiny) -> None:
    moments = residual_moments(str(tiny.data), "grouped untied", {})
    found, (wanted, peak) = moments["covariance_DD"], expected(tiny.data, "grouped untied", 4)
    assert (moments["peak_D"] - peak).abs().max() <= 1e-6 * peak.max()
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert abs(float(found.trace()) / len(found) - 1.0) < 1e-4  # x / rms(x) has a mean square of 1, but for eps


def test_directions_are_orthonormal_ordered_and_of_a_fixed_sign() -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator).double()).Q
    variance = torch.linspace(3.0, 0.1, 12, dtype=torch.float64)
    found, directions = principal_basis(basis * variance @ basis.T)
    torch.testing.assert_close(found, variance)
    torch.testing.assert_close(directions.T @ directions, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close((directions.T @ basis).abs(), torch.eye(12, dtype=torch.float64), atol=1e-12, rtol=0)
    assert bool((directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all())
    assert share_kept(found, 12) == 1.0
    assert abs(share_kept(found.flip(0), 1) - 3.0 / float(variance.sum())) < 1e-12


def test_units_of_an_unlike_norm_stay_their_own_directions() -> None:
    norm = torch.tensor([1.0, 1.05, 2.0, 0.97, -1.0, 1.01], dtype=torch.float64)
    axes = unlike_units(norm)
    assert axes.tolist() == [False, False, True, False, True, False]
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(6, 6, generator=generator).double()
    variance, basis = principal_basis(factor @ factor.T, axes)
    assert torch.equal(variance, variance.sort(descending=True).values)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    for unit in (2, 4):
        column = basis[unit].abs().argmax()
        assert torch.equal(basis[:, column].abs(), torch.eye(6, dtype=torch.float64)[unit])
        assert turned_norm(norm, axes, basis)[column] == norm[unit]
    inner = (factor @ factor.T)[~axes][:, ~axes]
    turned = basis[~axes]
    turned = turned[:, turned.abs().amax(0) > 0]
    off = turned.T @ inner @ turned
    assert (off - off.diag().diag()).abs().max() < 1e-12 * off.diag().max()
    mean = norm[~axes].mean()
    assert int(((turned_norm(norm, axes, basis) - mean).abs() < 1e-12).sum()) == 4


def test_units_of_massive_activations_are_told_by_their_peaks() -> None:
    peak = torch.full((16,), 3.0, dtype=torch.float64)
    peak[3], peak[5] = 10.1, 9.9
    assert massive_units(peak).nonzero().flatten().tolist() == [3]
