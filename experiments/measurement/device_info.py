"""Device and library versions of a row."""

import platform

import flax
import jax
import optax

from pgpsam_jax.profiling import accelerators


def device_info(device: jax.Device) -> dict:
    """Returns name and platform of a device, and the versions of Python and the libraries."""
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "known_chip": accelerators.find_chip(device.device_kind) is not None,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "backend": device.client.platform_version.splitlines()[0],
        },
    }
