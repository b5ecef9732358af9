"""Tables: numbers are those of the shapes and sections, columns line up, nothing is shown that is not known."""

import math

import pytest

from megashear.config.model_shape import ModelShape
from megashear.config.schema import CheckpointConfig, ParallelConfig
from megashear.config.training_schema import BatchConfig
from megashear.evaluation.losses import loss_table, with_error
from megashear.phases.summary import outcome_table
from megashear.planning.plan_tables import checkpoint_table, epochs_table, layout_table, phase_table, shape_table
from megashear.planning.text_table import count, table

LLAMA2_7B = ModelShape(4096, 32, 32, 32, 128, 11008, 32000)
SHEARED_2_7B = ModelShape(2560, 32, 20, 20, 128, 6912, 32000)
PHASES = {"prune": BatchConfig(), "pretrain": BatchConfig(steps=48000, global_batch=256, eval_interval=400)}


def cells(text: str, row: str) -> list[str]:
    """The cells of the line that begins with `row`."""
    (line,) = [line for line in text.splitlines() if line.startswith(row + " ")]
    return line[len(row) :].split()


def test_columns_line_up() -> None:
    text = table("Title", ["", "a", "long header"], [["first", "1", "2"], ["b", "12345", "67"]])
    assert text.splitlines() == [
        "Title",
        "           a  long header",
        "-----  -----  -----------",
        "first      1            2",
        "b      12345           67",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (419430400, "419 M"),
        (50331648000, "50.3 B"),
        (999_960, "1.00 M"),
        (2e12, "2.00 T"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


def test_shape_now_and_then() -> None:
    text = shape_table(LLAMA2_7B, SHEARED_2_7B)
    assert cells(text, "parameters") == ["6,738,415,616", "2,701,560,320", "40.1%"]
    assert cells(text, "hidden size") == ["4,096", "2,560", "62.5%"]
    alone = shape_table(LLAMA2_7B, None)
    assert cells(alone, "parameters") == ["6,738,415,616"] and "target" not in alone


def test_phases_count_the_published_tokens() -> None:
    text = phase_table(PHASES, {"prune": 1e-4}, 4096)
    assert cells(text, "prune") == ["3,200", "32", "131", "k", "419", "M", "50", "1.00e-04"]
    assert cells(text, "pretrain") == ["48,000", "256", "1.05", "M", "50.3", "B", "400", "-"]


def test_layout_and_memory() -> None:
    parallel = ParallelConfig(tensor=4, pipeline=2, virtual_pipeline=2, sequence=True)
    text = layout_table(parallel, 16, {"weights": 2 * 2**30, "optimizer": 2**29})
    assert cells(text, "data parallel") == ["2"] and cells(text, "virtual stages") == ["2"]
    assert cells(text, "sequence parallel") == ["yes"]
    assert cells(text, "memory per rank, all") == ["2.50", "GiB"]
    assert "memory" not in layout_table(parallel, 16)


def test_checkpoints_written_and_kept() -> None:
    text = checkpoint_table("runs/a/checkpoints", CheckpointConfig(interval=1500, keep=2), PHASES)
    assert "runs/a/checkpoints" in text
    assert cells(text, "prune") == ["1,500", "3", "2"], "steps 1500, 3000 and the last, 3200"
    assert cells(text, "pretrain") == ["1,500", "32", "2"]


def test_too_many_epochs_are_marked() -> None:
    text = epochs_table({"prune": {"web": 0.1, "code": 1.5}, "pretrain": {"web": 0.5, "code": 3.2, "book": 2}}, 4)
    assert cells(text, "code") == ["1.50", "3.20", "4.70", "!"]
    assert cells(text, "web") == ["0.10", "0.50", "0.60"] and cells(text, "book") == ["-", "2.00", "2.00"]


def test_losses_perplexity_and_their_mean() -> None:
    source, final = {"web": (1.752, 0.004), "code": (0.6216, 0.003)}, {"web": (2.01, 0.0), "code": (math.nan, 0.1)}
    text = loss_table({"source": source, "final": {"web": (2.01, 0.0)}})
    assert cells(text, "web") == ["1.7520", "+-", "0.0040", "5.77", "2.0100", "+-", "0.0000", "7.46"]
    assert cells(text, "code") == ["0.6216", "+-", "0.0030", "1.86", "-", "-"]
    assert "mean" not in text, "one shared domain has no mean of its own"
    both = loss_table({"source": source, "pruned": source})
    assert cells(both, "mean of 2")[:3] == ["1.1868", "+-", "0.0025"]
    assert cells(loss_table({"final": final}), "code") == ["-", "-"]


def test_a_loss_of_a_single_sequence_stands_without_an_error() -> None:
    text = loss_table({"final": {"web": (1.752, math.nan), "code": (0.6216, 0.003)}})
    assert cells(text, "web") == ["1.7520", "5.77"] and cells(text, "mean of 2") == ["1.1868", "3.28"]
    assert cells(text, "code") == ["0.6216", "+-", "0.0030", "1.86"]
    assert with_error(0.5, math.nan, sign="+") == "+0.5000"


def test_outcome() -> None:
    text = outcome_table(
        {"source": 10, "target": 5000}, {"prune": 419430400}, {"prune": 3600, "pretrain": 11220}, {"prune": 180}
    )
    assert cells(text, "parameters, target") == ["5,000"] and cells(text, "tokens, prune") == ["419,430,400"]
    assert cells(text, "time (h:mm), all") == ["4:07"]
    assert cells(text, "of it held-out evaluation, prune") == ["5.0%"] and "evaluation, pretrain" not in text
