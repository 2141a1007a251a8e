"""Validated augmentation settings, and those of the authors' release."""

import dataclasses
from typing import NoReturn

from pgpsam_jax.errors import UserError

# A cubic B-spline displacement in the plane is one-to-one while it stays below this fraction of
# the control spacing (Choi and Lee, "Injectivity conditions of 2D and 3D uniform cubic B-spline
# functions", Graphical Models 62, 2000).
_NO_FOLD = 0.48
ELASTIC = ("spline", "gaussian")
LABEL_WARPS = ("nearest", "linear")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How often and how strongly training slices are augmented; hashable, for static arguments.

    The paper names elastic deformation, rotation and scaling without numbers; frequencies and the
    rotation range are the release's (docs/release_code.md#augmentation), whose settings are
    `RELEASE`. With `exclusive=True` at most one of the three is applied per sample, as in the
    release; with `False` they are sampled independently and combine. Probabilities of 0 leave
    samples bit-identical.

    Attributes:
      rotate_probability, rotate_degrees: angle uniform in +-`rotate_degrees`.
      whole_degrees: round the angle down to a whole number of degrees.
      scale_probability, scale_range: zoom factor about the center (> 1 enlarges), log-uniform.
      random_window: crop a window anywhere in the image instead; its side, 1 / zoom of the
        image's, is then uniform.
      elastic_probability, elastic: "spline" or "gaussian".
      elastic_amplitude, elastic_grid: of "spline", a cubic B-spline over `elastic_grid`^2 random
        control points; no pixel moves further than `elastic_amplitude` (a fraction of the side)
        along either axis; a third of that is typical. "gaussian" uses the release's settings: a
        random affine map, then a smooth displacement of 0.8 % of the side (standard deviation).
      label_warp: "linear" interpolates the class *ids* of elastic samples and rounds them, a bug
        of the release that invents classes along boundaries; "nearest" takes the nearest pixel.
      exclusive: at most one of rotation, scaling and elastic deformation per sample.
      noise_probability, noise_sigma: additive Gaussian noise for images in [0, 1], clipped to
        that range.
      poisson_probability: Poisson noise with counts scaled by the number of gray levels.
      salt_pepper_probability, salt_pepper_fraction: fraction of pixels set, half of them to 0 and
        half to 1. At most one of the three kinds of noise is applied per sample.
      seeded: `False` takes the augmentation seed from the operating system, as the release's
        elastic deformation does, so no two runs are equal.
    """

    rotate_probability: float = 0.3
    rotate_degrees: float = 20.0
    whole_degrees: bool = False
    scale_probability: float = 0.2
    scale_range: tuple[float, float] = (0.8, 1.25)
    random_window: bool = False
    elastic_probability: float = 0.3
    elastic: str = "spline"
    elastic_amplitude: float = 0.05
    elastic_grid: int = 8
    label_warp: str = "nearest"
    exclusive: bool = True
    noise_probability: float = 0.0
    noise_sigma: float = 10 / 255
    poisson_probability: float = 0.0
    salt_pepper_probability: float = 0.0
    salt_pepper_fraction: float = 0.3
    seeded: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_range", tuple(self.scale_range))
        for name in ("rotate", "scale", "elastic", "noise", "poisson", "salt_pepper"):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                _refuse(f"{name}_probability is {probability}; give a number from 0 to 1")
        if self.exclusive and sum(self.geometric) > 1 + 1e-9:
            _refuse(
                f"rotate, elastic and scale probabilities {self.geometric} add up to more than 1; "
                "lower them or set exclusive=False"
            )
        if sum(self.noises) > 1 + 1e-9:
            _refuse(
                f"noise, poisson and salt_pepper probabilities {self.noises} add up to more than "
                "1; lower them"
            )
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            _refuse(f"scale_range is {self.scale_range}; give two zoom factors 0 < low <= high")
        for name, known in (("elastic", ELASTIC), ("label_warp", LABEL_WARPS)):
            if getattr(self, name) not in known:
                _refuse(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if self.elastic_grid < 4:
            _refuse(f"elastic_grid is {self.elastic_grid}; a cubic spline needs at least 4")
        limit = _NO_FOLD / (self.elastic_grid - 3)
        if not 0 <= self.elastic_amplitude <= limit:
            _refuse(
                f"elastic_amplitude is {self.elastic_amplitude}; with elastic_grid="
                f"{self.elastic_grid} keep it from 0 to {limit:.3f}, beyond which anatomy folds"
            )
        if not self.noise_sigma >= 0:
            _refuse(f"noise_sigma is {self.noise_sigma}; give a standard deviation of 0 or more")
        if not 0 < self.salt_pepper_fraction < 1:
            _refuse(
                f"salt_pepper_fraction is {self.salt_pepper_fraction}; give a fraction of the "
                "pixels between 0 and 1"
            )

    @property
    def geometric(self) -> tuple[float, float, float]:
        """Probabilities of (rotation, elastic, scale)."""
        return self.rotate_probability, self.elastic_probability, self.scale_probability

    @property
    def noises(self) -> tuple[float, float, float]:
        """Probabilities of (Gaussian, Poisson, salt and pepper)."""
        return self.noise_probability, self.poisson_probability, self.salt_pepper_probability


# Frequencies and ranges of the authors' release. Remaining differences: samples are interpolated
# once, images linearly (release: rotations to the nearest pixel, elastic samples linearly twice,
# windows by cubic splines) and labels to the nearest pixel; noise follows the warp (the release
# adds it to a window before enlarging it); values are not rounded to 8 bits again.
RELEASE = AugmentConfig(
    whole_degrees=True,
    scale_range=(1 / 0.9, 1 / 0.4),
    random_window=True,
    elastic="gaussian",
    noise_probability=0.3,
    poisson_probability=0.2,
    salt_pepper_probability=0.1,
)


def _refuse(problem: str) -> NoReturn:
    raise UserError(f"augmentation settings: {problem}.")
