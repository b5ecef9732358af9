"""Bindings refuse null, misaligned and impossible arguments with ValueError instead of crashing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megashear.ops.kernels.library import compiled_for, launching

BATCH, HEADS, GROUPS, TOKENS, HEAD_DIM = 1, 2, 1, 3, 8
WIDTH = 16
THREADS = 1

Arguments = dict[str, Any]


MEMORY = torch.zeros(4096)
ADDRESS = MEMORY.data_ptr()
MATRIX = (ADDRESS, WIDTH)
HEAD_ROWS = (ADDRESS, HEADS * HEAD_DIM, HEADS * HEAD_DIM, HEAD_DIM)
ATTENTION_SIZES = (BATCH, HEADS, GROUPS, TOKENS, HEAD_DIM)
ROPE_SIZES = (TOKENS, BATCH, GROUPS, HEADS, HEAD_DIM // 2)

TOKEN_SIZES = {"tokens": TOKENS, "width": WIDTH, "columns": WIDTH, "first": 0}
NOISE = {"seed": 0, "step": 0, "micro_batch": 0, "granularity": 0}
END = {"dtype": 0, "executor": THREADS}


def _addresses(*names: str) -> Arguments:
    return dict.fromkeys(names, ADDRESS)


CALLS: dict[str, Arguments] = {
    "cross_entropy_forward": _addresses("logits", "labels", "log_sum", "label_logit") | TOKEN_SIZES | END,
    "cross_entropy_backward": _addresses("logits", "labels", "log_sum", "dlog_sum", "dlabel_logit") | TOKEN_SIZES | END,
    "hard_concrete_noise": NOISE | {"uniform": ADDRESS, "units": 4, "executor": THREADS},
    "hard_concrete_sample": {"log_alpha": ADDRESS, "uniform": 0}
    | NOISE
    | {"z": ADDRESS, "slope": ADDRESS, "units": 4, "executor": THREADS},
    "live_weight_gather": {"weight": ADDRESS, "rows": 0, "columns": 0, "live": ADDRESS}
    | {"row_count": TOKENS, "column_count": WIDTH, "stride": WIDTH, "bytes": 4, "executor": THREADS},
    "live_weight_add": {"dlive": ADDRESS, "rows": 0, "columns": 0, "total": ADDRESS}
    | {"row_count": TOKENS, "column_count": WIDTH, "stride": WIDTH}
    | END,
    "masked_swiglu_forward": {"gate_up": MATRIX, "mask": ADDRESS, "out": ADDRESS}
    | {"tokens": TOKENS, "features": WIDTH // 2}
    | END,
    "masked_swiglu_backward": {"dout": MATRIX, "gate_up": MATRIX}
    | _addresses("mask", "dgate_up", "dmask", "partial")
    | {"tokens": TOKENS, "features": WIDTH // 2}
    | END,
    "masked_rms_norm_forward": {"x": MATRIX, "branch": MATRIX}
    | _addresses("branch_mask", "weight", "mask", "sum", "out", "r")
    | {"eps": 1e-5, "tokens": TOKENS, "hidden": WIDTH}
    | END,
    "masked_rms_norm_backward": dict.fromkeys(("dout", "dsum", "x", "branch"), MATRIX)
    | _addresses("branch_mask", "weight", "mask", "r", "dx", "dbranch", "dweight", "dmask", "dbranch_mask", "partial")
    | {"tokens": TOKENS, "hidden": WIDTH}
    | END,
    "rope_qkv_forward": {"fused": HEAD_ROWS}
    | _addresses("cos", "sin")
    | dict.fromkeys(("q", "k", "v"), HEAD_ROWS)
    | {"sizes": ROPE_SIZES}
    | END,
    "rope_qkv_backward": dict.fromkeys(("dq", "dk", "dv"), HEAD_ROWS)
    | _addresses("cos", "sin")
    | {"dfused": HEAD_ROWS, "sizes": ROPE_SIZES}
    | END,
    "masked_attention_forward": dict.fromkeys(("q", "k", "v"), HEAD_ROWS)
    | {"mask": 0, "first": 0, "out": HEAD_ROWS, "lse": ADDRESS, "sizes": ATTENTION_SIZES}
    | {"dtype": 0, "tiles": "", "executor": THREADS},
    "masked_attention_backward": dict.fromkeys(("dout", "q", "k", "v"), HEAD_ROWS)
    | {"mask": ADDRESS, "first": 0, "out": HEAD_ROWS, "lse": ADDRESS}
    | dict.fromkeys(("dq", "dk", "dv"), HEAD_ROWS)
    | {"dmask": ADDRESS, "scratch": ADDRESS, "sizes": ATTENTION_SIZES}
    | {"dtype": 0, "tiles": "", "executor": THREADS},
}
"""A valid call of every binding, its arguments in order. All tensors share one buffer of zeros."""

NULLABLE = {"mask", "branch_mask", "branch", "dsum", "uniform", "rows", "columns", "first"}
SIZES = {"tokens", "width", "units", "row_count", "column_count", "features", "hidden"}


def _call(op: str, **changed: Any) -> None:
    MEMORY.zero_()
    with launching(MEMORY) as (library, _):
        binding: Callable[..., None] = getattr(library, op)
        binding(*(CALLS[op] | changed).values())


def _tensors(op: str) -> dict[str, Any]:
    """The arguments of a call that are addresses, or addresses with strides."""
    return {
        name: value
        for name, value in CALLS[op].items()
        if value == ADDRESS or (isinstance(value, tuple) and value[0] == ADDRESS)
    }


def _moved(value: Any, address: int) -> Any:
    return (address, *value[1:]) if isinstance(value, tuple) else address


OPS = pytest.mark.parametrize("op", CALLS)


@pytest.fixture(autouse=True)
def _built() -> None:
    if not compiled_for(MEMORY.device):
        pytest.skip("the CPU kernels are not built")


def test_every_binding_is_listed():
    with launching(MEMORY) as (library, _):
        bound = {name for name in dir(library) if name.endswith(("_forward", "_backward", "_gather", "_add"))}
    assert bound | {"hard_concrete_noise", "hard_concrete_sample"} == set(CALLS)


@OPS
def test_valid_arguments_are_accepted(op):
    _call(op)


@OPS
def test_null_tensor_is_refused(op):
    for name, value in _tensors(op).items():
        if name not in NULLABLE:
            with pytest.raises(ValueError, match=f"^{op}: {name} is null"):
                _call(op, **{name: _moved(value, 0)})


@OPS
def test_misaligned_tensor_is_refused(op):
    for name, value in _tensors(op).items():
        with pytest.raises(ValueError, match=f"^{op}: {name} must be aligned to"):
            _call(op, **{name: _moved(value, ADDRESS + 1)})


@OPS
def test_impossible_address_is_refused(op):
    for name, value in _tensors(op).items():
        with pytest.raises(ValueError, match=f"^{op}: {name} is not a valid address: 64"):
            _call(op, **{name: _moved(value, 64)})


@OPS
def test_negative_size_is_refused(op):
    for name in SIZES & CALLS[op].keys():
        with pytest.raises(ValueError, match=f"^{op}: {name} must be at least 0, got -1"):
            _call(op, **{name: -1})


@OPS
def test_empty_tensors_may_be_null(op):
    changed: Arguments = {name: _moved(value, 0) for name, value in _tensors(op).items()}
    changed |= dict.fromkeys(SIZES & CALLS[op].keys(), 0)
    if "columns" in CALLS[op] and op.startswith("cross_entropy"):
        changed["columns"] = 0
    if "sizes" in CALLS[op]:
        changed["sizes"] = (0,) * 5
    _call(op, **changed)


@OPS
def test_zero_threads_are_refused(op):
    with pytest.raises(ValueError, match=f"^{op}: executor must be at least 1, got 0"):
        _call(op, executor=0)


@pytest.mark.parametrize("op", [op for op, arguments in CALLS.items() if "dtype" in arguments])
@pytest.mark.parametrize("dtype", [-1, 3])
def test_unknown_dtype_is_refused(op, dtype):
    with pytest.raises(ValueError, match=f"^{op}: dtype must be FLOAT32, BFLOAT16 or FLOAT16, got {dtype}"):
        _call(op, dtype=dtype)


@pytest.mark.parametrize("op", ["rope_qkv_forward", "masked_attention_forward"])
@pytest.mark.parametrize("index", range(5))
def test_negative_size_of_heads_is_refused(op, index):
    sizes = list(CALLS[op]["sizes"])
    sizes[index] = -1
    with pytest.raises(ValueError, match=f"^{op}: .* must be at least 0, got -1|{op}: heads must be a multiple"):
        _call(op, sizes=tuple(sizes))


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("cross_entropy_forward", {"columns": WIDTH + 1}, "columns must be at most width"),
        ("live_weight_gather", {"column_count": WIDTH + 1}, "column_count must be at most stride"),
        ("live_weight_gather", {"bytes": 8}, "bytes must be 2 or 4, got 8"),
        ("masked_swiglu_forward", {"gate_up": (ADDRESS, -1)}, "the row stride of gate_up must be at least 0"),
        ("masked_swiglu_forward", {"tokens": 2**40, "features": 2**40}, "features is too large"),
        ("rope_qkv_forward", {"q": (ADDRESS, 0, -8, 0)}, "stride 1 of q must be at least 0"),
        ("masked_attention_forward", {"sizes": (1, 3, 2, 3, 8)}, "heads must be a multiple of groups"),
        ("masked_attention_forward", {"dtype": 2}, "dtype must be FLOAT32 or BFLOAT16 on the CPU"),
    ],
    ids=["columns", "live columns", "bytes", "row stride", "overflow", "head stride", "groups", "fp16"],
)
def test_sizes_that_do_not_fit_are_refused(op, changed, message):
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        _call(op, **changed)


def test_wrong_type_is_refused():
    with pytest.raises(TypeError):
        _call("masked_swiglu_forward", gate_up=None)


RULES: Arguments = {
    "texts": ["<unk>", "a", "b", "ab"],
    "ranks": [],
    "merges": np.array([[1, 2, 0, 3]], dtype=np.int32),
    "wholes": [],
    "bytes": [],
    "unknown": 0,
    "prefix": False,
}


def test_tokenizer_accepts_valid_rules():
    with launching(MEMORY) as (library, _):
        assert library.BpeEncoder(*RULES.values()).encode("abb").tolist() == [3, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": [0]}, "ranks must be empty or one per text, got 1"),
        ({"merges": np.zeros((1, 3), dtype=np.int32)}, r"merges must have the shape \[n, 4\]"),
        ({"merges": np.array([[1, 2, 0, 4]], dtype=np.int32)}, "merges has id 4, outside of 4 texts"),
        ({"wholes": [-1]}, "wholes has id -1, outside of 4 texts"),
        ({"bytes": [0] * 255}, "bytes must be empty or 256 ids, got 255"),
    ],
    ids=["ranks", "merge columns", "merged id", "whole id", "bytes"],
)
def test_tokenizer_refuses_rules_that_do_not_fit(changed, message):
    with launching(MEMORY) as (library, _), pytest.raises(ValueError, match=f"^BpeEncoder: {message}"):
        library.BpeEncoder(*(RULES | changed).values())
