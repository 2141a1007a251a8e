"""Peak performance of accelerators by JAX's `device_kind`, the reference for utilization.

Per device as JAX counts them (a chip, even with two cores). Sources: Google Cloud's TPU pages and
the scaling book (TPU), NVIDIA's data sheets (GPU). NVIDIA's headline numbers for sparse products
are twice the dense ones here.
"""

import math
from typing import NamedTuple


class Chip(NamedTuple):
    """Dense bfloat16 FLOP/s, memory bytes and bytes/s, bytes/s of a link in one direction (TPU)."""

    bf16_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float = math.nan


_V5E = Chip(197e12, 16e9, 0.82e12, 4.5e10)
_V5P = Chip(459e12, 95e9, 2.77e12, 9e10)
_V6E = Chip(918e12, 32e9, 1.6e12, 9e10)
CHIPS = {
    "TPU v4": Chip(275e12, 32e9, 1.2e12, 4.5e10),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1.56e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2.04e12),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2.0e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3.35e12),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
}


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`, or None if unknown."""
    return CHIPS.get(device_kind)


def utilization(flops_per_second: float, device_kind: str, dtype: str) -> float | None:
    """Returns the share of the chip's dense bfloat16 peak (MFU).

    Args:
      flops_per_second: of one device.
      device_kind: as in JAX; None is returned for unknown chips.
      dtype: compute type; None is returned for all but bfloat16.
    """
    chip = find_chip(device_kind)
    return flops_per_second / chip.bf16_flops if chip and dtype == "bfloat16" else None
