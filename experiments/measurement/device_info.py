"""Device and library versions of a row."""

import platform

import flax
import jax
import optax


def device_info(device: jax.Device) -> dict[str, str]:
    """Returns name and platform of a device, and the versions of Python and the libraries."""
    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "backend": device.client.platform_version.splitlines()[0],
    }
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "versions": ", ".join(map(" ".join, versions.items())),
    }
