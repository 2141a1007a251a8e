"""How masks are made of a model's outputs: `InferenceSettings`, of a run or of one command."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import StrPath, write_json
from pgpsam_jax.utils.untrusted_text import read_user_json, sanitize

FILE = "inference.json"  # in a workdir: what `pgpsam tune` chose
# Moves of the image in half tokens, rows and columns; the first `shifts` of them are used.
MOVES = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))
SHIFTS = (1, 5, 9)


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
    """The defaults are one pass and the class of the highest logit.

    Attributes:
      shifts: passes over each slice, whose probabilities are averaged: the image as it is and moved
        by half a token to 4 or 8 sides.
      smooth: SD in mm of a Gaussian over the probabilities along the slice axis; 0 = none.
      components: for each class but the background, the smallest connected component to keep, as a
        share of the voxels of the largest: 0 keeps all, 1 the largest alone. Empty = all 0.
    """

    shifts: int = 1
    smooth: float = 0.0
    components: tuple[float, ...] = ()

    def __post_init__(self):
        if self.shifts not in SHIFTS:
            raise UserError(f"eval.shifts is {self.shifts}; choose from {SHIFTS}")
        if not 0 <= self.smooth < math.inf:
            raise UserError(f"eval.smooth is {self.smooth:g} mm; give 0 (none) or more")
        if wrong := [share for share in self.components if not 0 <= share <= 1]:
            raise UserError(
                f"eval.components is {wrong[0]:g}; give a share of the largest component from 0 "
                "(keep all) to 1 (keep the largest)"
            )

    @property
    def plain(self) -> bool:
        """Whether nothing is changed."""
        return self.shifts == 1 and not self.smooth and not any(self.components)

    def describe(self, names: Sequence[str]) -> str | None:
        """Returns one sentence, or None if they are `plain`; names: K, the background first."""
        parts = [f"averaged over {self.shifts} shifted passes"] * (self.shifts > 1)
        parts += [f"smoothed by {self.smooth:g} mm across slices"] * bool(self.smooth)
        kept = [
            f"{name} {share:.0%}"
            for name, share in zip(names[1:], self.components, strict=False)
            if share
        ]
        parts += [f"without components below {', '.join(kept)} of the largest"] * bool(kept)
        return f"Masks are {', '.join(parts)}." if parts else None

    @classmethod
    def of(cls, evaluation: ConfigDict, workdir: StrPath, names: Sequence[str]):
        """Returns those of `config.eval`; what is unset there is as the workdir's file has it."""
        stored = read(workdir, names)
        given = {
            "shifts": evaluation.shifts,
            "smooth": evaluation.smooth,
            "components": None
            if evaluation.components is None
            else (evaluation.components,) * (len(names) - 1),
        }
        given = {field: value for field, value in given.items() if value is not None}
        return dataclasses.replace(stored, **given)


PLAIN = InferenceSettings()


def read(workdir: StrPath, names: Sequence[str]) -> InferenceSettings:
    """Returns the settings that were chosen for a run; the defaults if none were.

    names: K class names, the background first.
    """
    path = Path(workdir) / FILE
    if not path.exists():
        return PLAIN
    found = read_user_json(path, "choice of inference settings")
    try:
        shares = found["components"]
        return InferenceSettings(
            int(found["shifts"]),
            float(found["smooth_mm"]),
            tuple(float(shares[name]) for name in names[1:]),
        )
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{path} is not what pgpsam tune writes ({sanitize(str(error))}); remove it"
        ) from None


def write(
    settings: InferenceSettings, workdir: StrPath, names: Sequence[str], evidence: dict
) -> None:
    """Writes the settings of a run, and on what evidence they were chosen."""
    shares = settings.components or (0.0,) * (len(names) - 1)
    chosen = {
        "shifts": settings.shifts,
        "smooth_mm": settings.smooth,
        "components": dict(zip(names[1:], shares, strict=True)),
    }
    write_json(Path(workdir) / FILE, chosen | evidence)
