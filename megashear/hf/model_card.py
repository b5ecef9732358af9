"""Write the README.md of an exported folder from the manifest's provenance.

Provenance: {"source": {"path", "shape", "tokens"}, "phases": [{"name", "steps", "tokens", "losses": {domain: nats per
token}}]}; missing keys are omitted from the card.
"""

from typing import Any

from megashear.config.model_shape import ModelShape

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- megashear
---
"""
_USE = """
## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
Before it was written under its name, the folder was loaded by transformers without a missing, unexpected or mis-shaped
tensor, and its logits were compared with those of the model it was exported from.
"""

_SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "num_heads": "query heads",
    "num_query_groups": "key/value heads",
    "head_dim": "head size",
    "intermediate_size": "intermediate size",
    "vocab_size": "vocabulary",
}


def model_card(shape: ModelShape, dtype: str, provenance: dict[str, Any]) -> str:
    """Markdown text of the card; `dtype` as torch names it."""
    source = provenance.get("source") or {}
    phases = provenance.get("phases") or []
    text = f"{_FRONT}# LLaMA of {shape.parameters():,} parameters ({dtype})\n\n"
    if source.get("path") and phases:
        text += f"Made by megashear from `{source['path']}`.\n\n"
    elif source.get("path"):
        text += f"Taken from `{source['path']}` by megashear, without training.\n\n"
    text += _shape_table(shape, source.get("shape") if phases else None)
    for phase in phases:
        text += _phase(phase)
    return text + _USE


def _shape_table(shape: ModelShape, source: dict[str, Any] | None) -> str:
    """Sizes of the model, beside those of its source where they are known."""
    lines = ["## Shape", f"| | this model |{' source |' if source else ''}", f"|---|---|{'---|' if source else ''}"]
    for key, meaning in _SIZES.items():
        before = f" {source.get(key, '')} |" if source else ""
        lines.append(f"| {meaning} | {getattr(shape, key)} |{before}")
    return "\n".join(lines) + "\n"


def _phase(phase: dict[str, Any]) -> str:
    """One phase of training: steps, tokens and the last held-out loss of each domain."""
    text = f"\n## {str(phase.get('name', 'training')).capitalize()}\n"
    counts = [f"{phase[key]:,} {key}" for key in ("steps", "tokens") if key in phase]
    if phase.get("method") == "one_shot":
        criteria = ", ".join(dict.fromkeys((phase.get("criteria") or {}).values()))
        on_text = phase.get("calibration_tokens") or 0
        text += f"Units kept by their scores ({criteria}" + (f"; {on_text:,} tokens of text" if on_text else "")
        text += "), without training.\n"
    else:
        text += f"{', '.join(counts)}.\n" if counts else ""
    if phase.get("principal"):
        text += "Hidden units were chosen among the principal directions of the source's residual stream.\n"
    if phase.get("refit"):
        text += "Output matrices of what was kept were fitted to the source by least squares.\n"
    losses = phase.get("losses") or {}
    if losses:
        text += "\n| domain | held-out loss (nats per token) |\n|---|---|\n"
        text += "".join(f"| {domain} | {loss:.4f} |\n" for domain, loss in losses.items())
    return text
