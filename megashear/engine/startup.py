"""Keep torch.compile's compiler out of CPU ranks: importing torch._dynamo and torch._inductor takes 2 CPU-seconds.

A rank compiles nothing, but two libraries import the compiler. megatron-core decorates its fused functions with
`torch.compile` at import; none of them is on the training path (`tests/engine/test_startup.py`). torch hides some of
its own functions from the compiler and imports it at their first call to do so. GPU hosts keep both as they are, and
recomputation (`torch.utils.checkpoint`) still imports it.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Adam, Optimizer

HIDDEN_FROM_COMPILER = [
    Optimizer.add_param_group,
    Optimizer.load_state_dict,
    Optimizer.state_dict,
    Optimizer.zero_grad,
]
"""Functions that training calls and that `torch._disable_dynamo` wrapped when torch was imported."""


def leave_out_compiler() -> None:
    """Import megatron-core with plain fused functions, and stop torch from importing the compiler at run time."""
    with _plain_decorator(), _no_tensorboard():
        import megatron.core  # noqa: F401
    torch._disable_dynamo = _unchanged  # type: ignore[assignment,attr-defined]  # custom ops ask for it when registered
    for function in HIDDEN_FROM_COMPILER:
        plain = function.__wrapped__  # type: ignore[attr-defined]
        # The wrapper calls this attribute if it is set, and imports torch._dynamo to set it if it is not.
        plain.__dynamo_disable = plain
    Adam.step = _step_without_graph_breaks(inspect.unwrap(Adam.step))  # type: ignore[method-assign]


def _unchanged(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Return the decorated function itself; works with and without options."""
    return _unchanged if function is None else function


def _step_without_graph_breaks(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Set the gradient mode of an optimizer's step as torch does, without marking graph breaks for the compiler."""

    @functools.wraps(plain)
    def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return plain(optimizer, *args, **kwargs)

    return step


@contextmanager
def _plain_decorator() -> Iterator[None]:
    """Let `torch.compile` return functions as they are."""
    original = torch.compile
    torch.compile = _unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


@contextmanager
def _no_tensorboard() -> Iterator[None]:
    """Hide tensorboard from megatron-core's timers, which are not used; with it come 0.2 s of protocol buffers."""
    name = "torch.utils.tensorboard"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # makes its import raise ImportError
    try:
        yield
    finally:
        del sys.modules[name]
