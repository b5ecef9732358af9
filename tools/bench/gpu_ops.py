"""The ops' cases for `gpu.py`: masked SwiGLU (G1), masked RMSNorm with residual (G2), masked attention (G3).

A case is one size; its contenders compute the same from the same inputs, or less: peers have no masks. Results are
compared with the plain meaning in fp32 before anything is timed.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_clock import Clock, distance
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megashear import ops
from megashear.ops import reference
from megashear.ops.kernels.attention import masked_attention

LIMIT = 2e-2
"""Largest relative distance of a bf16 result from the fp32 one: roundings are 2e-3 to 4e-3 each."""
EPS = 1e-5
Form = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op at one size: who computes it, from which leaves, the bytes and FLOPs that forward and backward need."""

    row: str
    name: str
    leaves: list[Tensor]
    ours: Form
    meaning: Form
    peers: dict[str, tuple[Form, int]]
    """By name: the form, and how many of the leaves it takes, from the first."""
    bytes: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    facts: dict[str, Any] = field(default_factory=dict)


def optional(module: str, name: str) -> Any:
    """An attribute of a library that may not be there, or None."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return None


def normal(*sizes: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random leaves."""
    return torch.randn(*sizes, device=device).to(dtype).requires_grad_()


def some_mask(size: int, device: torch.device) -> Tensor:
    """A mask in (0, 1], all alive."""
    return torch.rand(size, device=device).clamp(min=0.05).requires_grad_()


def swiglu_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """G1: tokens x intermediate sizes of 7B and 13B."""
    liger = optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    megatron = optional("megatron.core.fusions.fused_bias_swiglu", "SwiGLUFunction")
    compiled = torch.compile(reference.swiglu)
    for tokens in (64,) if small else (4096, 8192, 16384):
        for width in (96,) if small else (11008, 13824):
            peers: dict[str, tuple[Form, int]] = {"eager": (reference.swiglu, 2)}
            if not small:
                peers["torch.compile"] = (compiled, 2)
            if liger is not None and device.type == "cuda":
                peers["Liger, no mask"] = (lambda x: liger.apply(*x.chunk(2, -1)), 1)
            if megatron is not None and device.type == "cuda":
                peers["megatron-core, no mask"] = (lambda x: megatron.apply(x, False, False), 1)
            element = 2 * tokens * width
            yield Case(
                "G1",
                f"swiglu {tokens} x {width}",
                [normal(tokens, 2 * width, device=device), some_mask(width, device)],
                ops.swiglu,
                reference.swiglu,
                peers,
                bytes=(3 * element, 5 * element),
            )


def norm_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """G2: the residual sum with its branch mask, and the masked norm, at the hidden sizes of 7B and 13B."""

    def ours(x: Tensor, branch: Tensor, weight: Tensor, branch_mask: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return ops.add_rms_norm(x, branch, branch_mask, weight, EPS, mask)

    def meaning(x: Tensor, branch: Tensor, weight: Tensor, branch_mask: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return reference.add_rms_norm(x, branch, branch_mask, weight, EPS, mask)

    def plain(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x + branch
        return total, F.rms_norm(total, weight.shape, weight.to(total.dtype), EPS)

    for width in (96,) if small else (4096, 5120):
        tokens = 64 if small else 8192
        element = 2 * tokens * width
        peers: dict[str, tuple[Form, int]] = {"eager": (meaning, 5), "torch rms_norm, no masks": (plain, 3)}
        if not small:
            peers["torch.compile"] = (torch.compile(meaning), 5)
        yield Case(
            "G2",
            f"add_rms_norm {tokens} x {width}",
            [
                normal(tokens, width, device=device),
                normal(tokens, width, device=device),
                normal(width, device=device, dtype=torch.float32),
                some_mask(width, device),
                some_mask(width, device),
            ],
            ours,
            meaning,
            peers,
            bytes=(4 * element, 6 * element),
        )


def attention_peers(device: torch.device, grouped: bool, small: bool) -> dict[str, tuple[Form, int]]:
    """torch's forms of causal attention without masks."""

    def within(backend: SDPBackend) -> Form:
        def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        return form

    if device.type != "cuda":
        return {"SDPA": (within(SDPBackend.MATH), 3)}
    peers: dict[str, tuple[Form, int]] = {
        "SDPA flash": (within(SDPBackend.FLASH_ATTENTION), 3),
        "SDPA cuDNN": (within(SDPBackend.CUDNN_ATTENTION), 3),
    }
    flex = optional("torch.nn.attention.flex_attention", "flex_attention")
    blocks = optional("torch.nn.attention.flex_attention", "create_block_mask")
    if flex is not None and not small:
        compiled: Callable[..., Tensor] = torch.compile(flex)
        made: dict[int, Any] = {}

        def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            size = q.shape[2]
            if size not in made:
                made[size] = blocks(lambda b, h, i, j: i >= j, None, None, size, size, device=device)
            return compiled(q, k, v, block_mask=made[size], enable_gqa=grouped)

        peers["FlexAttention"] = (flexible, 3)
    return peers


def attention_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """G3: 8192 tokens in sequences of 2k, 4k and 8k, 32 heads of 128, all groups or 8, 0, 12 or 24 heads dead."""
    heads, width = (4, 16) if small else (32, 128)
    for length in (64,) if small else (2048, 4096, 8192):
        batch = 2 if small else 8192 // length
        for groups in (heads, heads // 4):
            for dead in (0,) if small or (groups != heads and length != 4096) else (0, 12, 24):
                leaves = [
                    normal(length, batch, number, width, device=device).detach().permute(1, 2, 0, 3).requires_grad_()
                    for number in (heads, groups, groups)
                ]
                mask = some_mask(heads, device).detach()
                mask[torch.randperm(heads, device=device)[:dead]] = 0
                forward = 2 * batch * heads * length * length * width
                yield Case(
                    "G3",
                    f"attention {batch} x {length}, {groups} groups, {dead} dead",
                    [*leaves, mask.requires_grad_()],
                    lambda *inputs: masked_attention(*inputs, None)[0],
                    reference.attention,
                    attention_peers(device, groups != heads, small) if dead == 0 else {},
                    flops=(forward, 5 * forward // 2),
                    facts={"group": f"{length}, {groups} groups", "dead": dead},
                )


def measure(case: Case, clock: Clock) -> dict[str, Any]:
    """Compare results, then time forward and backward of everyone. Raises SystemExit where ours is wrong."""
    error = compare(case)
    forms = {"megashear": (case.ours, len(case.leaves)), **case.peers}
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    failed = {}
    for name, (form, count) in forms.items():
        leaves = case.leaves[:count]
        try:
            outputs = as_tuple(form(*leaves))
            upstream = [torch.randn_like(out) for out in outputs]
            torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        except (RuntimeError, NotImplementedError, TypeError) as problem:
            if name == "megashear":
                raise
            failed[name] = str(problem).splitlines()[0]  # a peer that does not serve this size is named, not timed
            continue
        forward[name] = partial(without_gradients, form, leaves)
        backward[name] = partial(torch.autograd.grad, outputs, leaves, upstream, retain_graph=True)
    times = {"forward": clock.race(forward), "backward": clock.race(backward)}
    return {"row": case.row, "case": case.name, "error": error, "times": times, "failed": failed, **case.facts}


def without_gradients(form: Form, leaves: list[Tensor]) -> object:
    """A forward pass alone."""
    with torch.no_grad():
        return form(*leaves)


def compare(case: Case) -> float:
    """The largest distance of our results and gradients from the meaning in fp32."""
    wide = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    upstream = [torch.randn_like(out) for out in as_tuple(case.meaning(*wide))]
    results = []
    for form, leaves in ((case.ours, case.leaves), (case.meaning, wide)):
        outputs = as_tuple(form(*leaves))
        given = [one.to(out.dtype) for one, out in zip(upstream, outputs, strict=True)]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, given)])
    error = max(distance(ours.detach(), right.detach()) for ours, right in zip(*results, strict=True))
    if not error <= LIMIT:
        raise SystemExit(f"{case.name}: results differ from the reference by {error:.1e}, beyond {LIMIT:.0e}")
    return error


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
