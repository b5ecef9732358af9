"""Output matrices fitted under every layout equal a single process's; which tensors change at all."""

import pytest
import torch

from helpers.budget import slow
from helpers.models import Drawn
from helpers.tiny import Tiny
from parallel.importance_case import drawn_shape
from parallel.test_importance import close
from parallel.test_step import GQA, MHA, Case

CASES = [
    Case(MHA, tensor=2),
    Case(GQA, pipeline=2, virtual_pipeline=2, layers=5),
    Case(GQA, data=2),
    *slow(
        Case(GQA, tensor=4),  # more ranks than groups
        Case(MHA, pipeline=2, data=2),
        Case(GQA, tensor=2, data=2),
    ),
]
FITTED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def fit(ranks, tiny: Tiny, case: Case) -> dict[str, torch.Tensor]:
    arguments = {"data": str(tiny.data), "shape": case.shape, "layers": case.layers, "sequences": case.micro}
    return ranks(case.world).call("parallel.refit_case:fitted", parallel=case.parallel(), **arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_fits_one_model(ranks, tiny: Tiny, case: Case) -> None:
    """The systems' condition is at most 1 / ridge: fp32 sums agree to 1e-7, their solutions to 1e-4."""
    single = Case(case.shape, layers=case.layers, micro=case.micro)
    found, wanted = fit(ranks, tiny, case), fit(ranks, tiny, single)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close(found[name], value, 1e-4, name)


def test_output_matrices_of_kept_layers_change_and_nothing_else(ranks, tiny: Tiny) -> None:
    drawn = Drawn(drawn_shape(GQA))
    for name, value in fit(ranks, tiny, Case(GQA)).items():
        changed = name.endswith(FITTED) and ".1." not in name  # layer 1 goes
        assert torch.equal(value, drawn.read(name)) != changed, name
