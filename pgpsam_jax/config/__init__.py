"""The configuration of a run: fields and defaults, config files, flags, storage."""

from pgpsam_jax.config.defaults import (
    default_config,
    use_lite_medsam,
    use_release_recipe,
    use_small_encoder,
)
from pgpsam_jax.config.serialization import from_json, load_config, to_json

__all__ = [
    "default_config",
    "from_json",
    "load_config",
    "to_json",
    "use_lite_medsam",
    "use_release_recipe",
    "use_small_encoder",
]
