"""A Python process with this folder in PYTHONPATH knows the tiny method and the smallest encoder.

For programs that start programs, to which `python tiny_method.py` would not reach.
"""

import importlib.abc
import importlib.machinery
import sys


class _Tables(importlib.abc.MetaPathFinder):
    """Has the tables of methods and encoders, once they are made, complemented."""

    def find_spec(self, name, path, target=None):
        if name not in ("pgpsam_jax.methods.registry", "pgpsam_jax.models.sam.sam"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def complemented(module):
            load(module)
            from tests.support import micro  # noqa: F401

            if name == "pgpsam_jax.models.sam.sam":
                return
            from tests.support import tiny_method

            tiny_method.known().start()
            tiny_method.spread().start()

        spec.loader.exec_module = complemented
        return spec


sys.meta_path.insert(0, _Tables())
