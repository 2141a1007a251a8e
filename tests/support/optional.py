"""Packages of the `test` extra that an installation may lack: their first use skips the test."""

import pytest


class OptionalModule:
    """Stands for a module; an attribute of a missing one skips the test that asks for it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("_"):  # pytest looks for marks
            raise AttributeError(attribute)
        package = self._name.split(".")[0]
        reason = f"{package} is missing: pip install -e '.[test]'"
        return getattr(pytest.importorskip(self._name, reason=reason), attribute)


torch = OptionalModule("torch")
F = OptionalModule("torch.nn.functional")
transformers = OptionalModule("transformers")
