"""Phantom shape primitives: a warped coordinate system, implicit shapes and soft painting.

Body frame, in mm: x to the patient's left, y to posterior, z to superior, origin on the midline at
about the first lumbar vertebra. Arrays are (D, H, W) in display orientation, so that they run
along +z, +y, +x. A *shape* is a float32 array of signed distances (mm, approximate, negative
inside) over a *box*, a tuple of three slices of the voxel grid.
"""

import math

import numpy as np

FAR = np.float32(60.0)


def _basis(points: int, coefficients: int):
    """Uniform cubic B-spline basis, (points, coefficients)."""
    at = np.linspace(0.0, coefficients - 3, points)
    first = np.minimum(at.astype(int), coefficients - 4)
    t = at - first
    weights = np.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    )
    matrix = np.zeros((points, coefficients), np.float32)
    for offset, weight in enumerate(weights / 6):
        matrix[np.arange(points), first + offset] = weight
    return matrix


def smooth_field(rng, shape, cells):
    """Smooth random field of mean 0 and SD about 1, with `cells` B-spline knots per axis."""
    field = rng.standard_normal([c + 3 for c in cells], dtype=np.float32) * np.float32(3.0)
    # einsum, not matmul: the rounding of BLAS may depend on the number of threads.
    for axis, size in reversed(list(enumerate(shape))):
        field = np.einsum(
            "ij,j...->i...", _basis(size, field.shape[axis]), np.moveaxis(field, axis, 0)
        )
        field = np.ascontiguousarray(np.moveaxis(field, 0, axis))
    return field


def smooth_max(a, b, radius):
    """Intersection of two shapes with edges rounded to about `radius` mm."""
    h = np.maximum(radius - np.abs(a - b), 0) / np.float32(radius)
    return np.maximum(a, b) + h * h * np.float32(radius / 4)


def relative(part, box):
    """Returns the slices of the box `part` within an array over the box `box`."""
    return tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, box, strict=True))


class Scene:
    """Voxel grid, HU image, label map and `clearance`, the distance to all placed shapes."""

    def __init__(self, rng, shape, spacing, *, tilt_deg, shift, warp_mm):
        """`spacing`: (D, H, W) mm; `tilt_deg`, `shift`: rotation and offset (mm) of the patient."""
        self.shape, self.spacing = shape, spacing
        self.axes = [
            ((np.arange(n) - (n - 1) / 2) * s - o).astype(np.float32)
            for n, s, o in zip(shape, spacing, shift, strict=True)
        ]
        z, y, x = self.axes[0][:, None, None], self.axes[1][None, :, None], self.axes[2]
        self.first = tuple(float(a[0]) for a in self.axes)
        tilt = math.radians(tilt_deg)
        self.turn = cosine, sine = math.cos(tilt), math.sin(tilt)
        warp = [np.float32(warp_mm) * smooth_field(rng, shape, (3, 4, 4)) for _ in range(3)]
        reach = [float(np.abs(w).max()) for w in warp]
        self.margin = (reach[0] / 2 + 4.0, max(reach[1:]) * 1.2 + 4.0, max(reach[1:]) * 1.2 + 4.0)
        self.x = warp[2] + (np.float32(cosine) * x + np.float32(sine) * y)
        self.y = warp[1] + (np.float32(cosine) * y - np.float32(sine) * x)
        self.z = np.float32(0.5) * warp[0] + z
        self.hu = np.full(shape, -1000, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.clearance = np.full(shape, FAR, np.float32)
        self.wall = self.clearance  # the same of the empty abdominal cavity, set by `draw_body`
        self.fine = smooth_field(rng, shape, (20, 60, 60))
        self.coarse = smooth_field(rng, shape, (6, 12, 12))
        self.bump = smooth_field(rng, shape, (6, 9, 9))

    def box(self, low, high):
        """Returns the box of all voxels with body coordinates (x, y, z) in [low, high]."""
        cx, cy, cz = ((a + b) / 2 for a, b in zip(low, high, strict=True))
        hx, hy, hz = ((b - a) / 2 for a, b in zip(low, high, strict=True))
        cosine, sine = self.turn
        centers = (cz, sine * cx + cosine * cy, cosine * cx - sine * cy)
        halves = (hz, abs(sine) * hx + cosine * hy, cosine * hx + abs(sine) * hy)
        slices = []
        for n, first, step, margin, center, half in zip(
            self.shape, self.first, self.spacing, self.margin, centers, halves, strict=True
        ):
            start = math.floor((center - half - margin - first) / step)
            stop = math.ceil((center + half + margin - first) / step) + 1
            start = min(max(start, 0), n - 1)
            slices.append(slice(start, min(max(stop, start + 1), n)))
        return tuple(slices)

    def at(self, box):
        """Returns body coordinates (x, y, z) of a box."""
        return self.x[box], self.y[box], self.z[box]

    def ellipsoid(self, center, radii, *, power=2.0, turn_deg=(0.0, 0.0)):
        """Returns (box, shape) of a superellipsoid, rotated about z, then in the x-z plane."""
        center, radii = np.asarray(center, np.float32), np.asarray(radii, np.float32)
        reach = float(radii.max())
        box = self.box(center - reach, center + reach)
        x, y, z = (c - o for c, o in zip(self.at(box), center, strict=True))
        (c1, c2), (s1, s2) = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
        x, z = np.float32(c2) * x + np.float32(s2) * z, np.float32(c2) * z - np.float32(s2) * x
        x, y = np.float32(c1) * x + np.float32(s1) * y, np.float32(c1) * y - np.float32(s1) * x
        terms = [np.abs(v / r) for v, r in zip((x, y, z), radii, strict=True)]
        if power == 2.0:
            f = np.sqrt(sum(t * t for t in terms))
        else:
            f = sum(t ** np.float32(power) for t in terms) ** np.float32(1 / power)
        # First-order distance: (f - 1) over the gradient norm, about f / mean radius there.
        return box, (f - 1) * np.float32(np.sort(radii)[:2].mean())

    def tube(self, points, radii, *, flat=1.0):
        """Returns (box, shape) of a tube along a spline through `points` (n, 3).

        `radii`: (n,) mm. `flat`: ratio of height to width.
        """
        from scipy.interpolate import CubicHermiteSpline

        points, radii = np.asarray(points, float), np.asarray(radii, float)
        chord = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        fine = np.linspace(0, chord[-1], max(2, int(chord[-1] / 15) + 2))
        path = CubicHermiteSpline(chord, points, np.gradient(points, chord, axis=0))(fine)
        width = np.interp(fine, chord, radii)
        reach = width[:, None] * np.array([1, 1, flat])
        box = self.box((path - reach).min(0), (path + reach).max(0))
        shape = np.full([s.stop - s.start for s in box], FAR, np.float32)
        for i in range(len(path) - 1):
            low = np.minimum(path[i] - reach[i], path[i + 1] - reach[i + 1])
            high = np.maximum(path[i] + reach[i], path[i + 1] + reach[i + 1])
            part = self.box(low, high)
            inner = relative(part, box)
            cone = self._cone(part, path[i : i + 2], width[i : i + 2], flat)
            np.minimum(shape[inner], cone, out=shape[inner])
        return box, shape

    def _cone(self, box, ends, radii, flat):
        scale = np.array([1, 1, 1 / flat])
        a, along = ends[0].astype(np.float32), ((ends[1] - ends[0]) * scale).astype(np.float32)
        x, y, z = (c - o for c, o in zip(self.at(box), a, strict=True))
        if flat != 1.0:
            z = z * np.float32(scale[2])
        h = (x * along[0] + y * along[1] + z * along[2]) / np.float32(along @ along + 1e-6)
        h = np.clip(h, 0, 1)
        x, y, z = x - h * along[0], y - h * along[1], z - h * along[2]
        return np.sqrt(x * x + y * y + z * z) - (
            np.float32(radii[0]) + h * np.float32(radii[1] - radii[0])
        )

    def paint(self, box, shape, hu):
        """Blends in `hu` (number or array over the box) with a soft edge one voxel wide."""
        cover = np.clip(np.float32(0.5) - shape / np.float32(0.75 * self.spacing[2]), 0, 1)
        self.hu[box] += cover * (hu - self.hu[box])

    def place(self, box, shape, hu, *, label=0, gap=1.5, rim=0.0):
        """Paints, labels and reserves a shape; returns the shape as placed.

        Args:
            box, shape: signed distances in mm over a box.
            hu: number or array over the box.
            label: class id, 0 for none.
            gap: distance in mm to earlier shapes; None ignores them.
            rim: mm at its edge left free for later neighbors, so that no fat separates them.
        """
        if gap is not None:
            shape = np.maximum(shape, np.float32(gap) - self.clearance[box])
        self.paint(box, shape, hu)
        if label:
            self.label[box][shape < 0] = label
        self.reserve(box, shape + np.float32(rim))
        return shape

    def reserve(self, box, shape):
        np.minimum(self.clearance[box], shape, out=self.clearance[box])
