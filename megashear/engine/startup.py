"""Keep torch.compile's compiler out of CPU ranks and decide whether ranks use CUDA.

Importing torch._dynamo and torch._inductor takes 2 CPU-seconds, and a rank compiles nothing. megatron-core decorates
its fused functions with `torch.compile` at import, but none of them is used in training
(`tests/engine/test_startup.py`). torch hides some of its own functions from the compiler and imports it at their first
call; here they are hidden only if the compiler is already imported. GPU hosts are unchanged. Recomputation
(`torch.utils.checkpoint`) still imports the compiler.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Adam, Optimizer

HIDDEN_METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods of torch's optimizers used in training that `torch._disable_dynamo` wraps when torch is imported."""


def uses_cuda() -> bool:
    """Return whether ranks compute on GPUs: one exists and MEGASHEAR_DEVICE is not `cpu`. Does not initialize CUDA."""
    return os.environ.get("MEGASHEAR_DEVICE", "") != "cpu" and torch.cuda.device_count() > 0


def skip_compiler_import() -> None:
    """Import megatron-core with plain fused functions, and let torch import the compiler only for user code."""
    with _plain_decorator(), _no_tensorboard():
        import megatron.core  # noqa: F401
    # Registering a custom op applies this decorator.
    torch._disable_dynamo = _hide_if_loaded(torch._disable_dynamo)  # type: ignore[attr-defined]
    for name in HIDDEN_METHODS:
        hidden = getattr(Optimizer, name)
        if (plain := getattr(hidden, "__wrapped__", None)) is not None:
            setattr(Optimizer, name, _choose(plain, hidden))
    step: Any = Adam.step
    hooked = getattr(step, "hooked", False)  # the constructor of an existing Adam added the step hooks
    with_graph_breaks = step.__wrapped__ if hooked else step
    if (plain := getattr(with_graph_breaks, "__wrapped__", None)) is not None:
        step = _choose(_set_gradient_mode(plain), with_graph_breaks)
        if hooked:
            step = Optimizer.profile_hook_step(step)
            step.hooked = True
        Adam.step = step  # type: ignore[method-assign]


def _choose(plain: Callable[..., Any], hidden: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `hidden` once the compiler is loaded, and `plain` before."""

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (hidden if "torch._dynamo" in sys.modules else plain)(*args, **kwargs)

    return call


def _hide_if_loaded(disable: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch._disable_dynamo` so that its functions do not import the compiler when called."""

    def decorate(function: Callable[..., Any] | None = None, recursive: bool = True) -> Callable[..., Any]:
        if function is None:
            return functools.partial(decorate, recursive=recursive)
        return _choose(function, disable(function, recursive))

    return decorate


def _set_gradient_mode(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer's step in the gradient mode that torch sets for it, without marking graph breaks."""

    @functools.wraps(plain)
    def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return plain(optimizer, *args, **kwargs)

    return step


@contextmanager
def _plain_decorator() -> Iterator[None]:
    """Make `torch.compile` return functions unchanged."""
    original = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


@contextmanager
def _no_tensorboard() -> Iterator[None]:
    """Hide tensorboard from megatron-core's timers, which are not used; its import takes 0.2 s."""
    name = "torch.utils.tensorboard"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # its import raises ImportError
    try:
        yield
    finally:
        del sys.modules[name]
