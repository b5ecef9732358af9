"""Peak FLOP/s of accelerators, for the model FLOPs utilisation (MFU) of the progress line.

Key properties: bf16 products with fp32 accumulation, dense (data sheets print twice that, "with sparsity"); a device
that is not in the table has no MFU, rather than a wrong one. Read next: `progress.py`.
"""

import re

# (words that all stand in the device's name, FLOP/s); the first row that fits is taken, so variants stand before the
# plain name. Sources: NVIDIA's data sheet of each product; GeForce and RTX: white papers of GA102, AD102, GB202.
PEAK_BF16: tuple[tuple[tuple[str, ...], float], ...] = (
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H800", "PCIe"), 756e12),
    (("H800",), 989e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("H20",), 148e12),
    (("B200",), 2250e12),
    (("GB200",), 2500e12),
    (("B300",), 2250e12),
    (("GB300",), 2500e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("A40",), 149.7e12),
    (("A30",), 165e12),
    (("A10",), 125e12),
    (("A6000",), 154.8e12),
    (("3090",), 71e12),
    (("4090",), 165.2e12),
    (("5090",), 209.5e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device by the name its driver gives; None where it is unknown or a slice (MIG)."""
    words = {word.casefold() for word in re.split(r"[^0-9A-Za-z]+", device_name)}
    if "mig" in words:
        return None
    for names, flops in PEAK_BF16:
        if all(name.casefold() in words for name in names):
            return flops
    return None


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, device_name: str, devices: int
) -> float | None:
    """Share of the devices' peak that the model's own FLOPs use (PaLM, appendix B; recomputation does not count).

    tokens_per_second: over all devices; flops_per_token: `ModelShape.flops_per_token`. None where the peak is unknown.
    """
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * devices)
