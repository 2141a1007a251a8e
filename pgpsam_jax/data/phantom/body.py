"""Phantom body: skin, fat, muscle, spine, ribs, lungs, heart and couch.

The body leaves the abdominal cavity free in `Scene.clearance`; `organs` fills it.
"""

import numpy as np

from pgpsam_jax.data.phantom.shapes import Scene, smooth_max

VERTEBRA_MM = 36.0  # one vertebral body and its disc
FIRST_RIB, LAST_RIB = 5, 12
# Path (mm lateral and posterior to the vertebral body, height z), radii, HU.
PSOAS = [(24, 10, 20), (30, 8, -20), (38, 4, -60), (44, -2, -110), (46, -4, -130)]
PARASPINAL = (
    (PSOAS, (3, 9, 15, 20, 21), 60),
    ([(52, 34, 15), (60, 40, -50), (62, 38, -130)], (4, 8.5, 10), 56),  # quadratus lumborum
    ([(16, -34, 85), (15, -24, 50), (17, -18, 20), (20, -12, -15)], (3, 4, 5, 2), 60),  # crus
)


class Patient:
    """Random body measures in mm: half axes of the muscle wall, fat thickness, domes, spine."""

    def __init__(self, rng):
        self.half_width = rng.uniform(136, 148)
        self.half_depth = rng.uniform(95, 107)
        self.fat = rng.uniform(8, 24)
        self.dome_right = rng.uniform(88, 98)
        self.dome_left = rng.uniform(80, 90)
        self.sway = rng.uniform(-5, 5)
        self.lordosis = rng.uniform(4, 9)
        self.phase = rng.uniform(0.94, 1.06)  # strength of the contrast enhancement
        self.couch = rng.uniform(2, 6)  # gap between back and couch top

    def spine(self, z):
        """Returns the center line (x, y) of the vertebral bodies at height z."""
        bend = np.cos((z + 40) * np.float32(np.pi / 150))
        x = np.float32(self.sway) * np.sin(z / np.float32(60))
        return x, 19 - np.float32(self.lordosis) * bend

    def wall(self, angle, z):
        """Returns (x, y) of the wall's outer face at `angle` from posterior, left positive."""
        s, c = np.sin(angle), np.cos(angle)
        wide, deep = self.half_axes(z)
        f = _oval(s / wide, c / deep)
        return s / f, c / f

    def half_axes(self, z):
        """Returns half width and half depth of the muscle wall at height z; the chest is wider."""
        chest = np.tanh((z - 15) / 45)
        return self.half_width * (1 + 0.03 * chest), self.half_depth * (1 + 0.02 * chest)


def _oval(u, v):
    """Norm of exponent 2.5 (body cross-section); square roots are faster than powers."""
    u, v = np.abs(u), np.abs(v)
    return (u * u * np.sqrt(u) + v * v * np.sqrt(v)) ** np.float32(0.4)


def draw_body(scene: Scene, patient: Patient, rng):
    """Draws everything except the abdominal organs; sets `scene.wall` and `scene.clearance`."""
    everywhere = (slice(None),) * 3
    x, y, z = scene.x, scene.y, scene.z
    wide, deep = patient.half_axes(z)
    f = np.maximum(_oval(x / wide, y / deep), np.float32(1e-3))
    r = np.sqrt(x * x + y * y) + np.float32(1e-3)
    side, back = np.abs(x) / r, y / r
    groove = 7 * np.exp(-((x / 17) ** 2)) * (back > 0)
    outer = r * (1 - 1 / f) + groove  # distance to the outer face of the muscle wall
    fat = patient.fat * (1 + 0.35 * back + 0.15 * side)
    rectus = np.exp(-np.square(((np.abs(x) - 28) / 17) ** 2)) * (back < -0.3)
    midline = np.exp(-((x / 5) ** 2)) * (back < -0.5)  # linea alba
    cavity = outer + 8 + 5 * np.square(side * side) + 4 * rectus - 4 * midline
    texture = scene.fine
    striae = 10 * np.cos(cavity * np.float32(2 * np.pi / 4.5)) * (side > 0.75)
    _couch(scene, patient)
    scene.paint(everywhere, outer - fat, 40)
    scene.paint(everywhere, outer - fat + 3, -104 + 5 * texture)
    scene.paint(everywhere, outer, 58 + 6 * texture - striae)
    scene.paint(everywhere, cavity, -100 + 6 * texture)
    dome = _dome(patient, x, y)
    _chest(scene, patient, rng, cavity, z - dome, everywhere)
    scene.wall = -np.maximum(cavity, z - dome)
    scene.clearance = scene.wall.copy()
    _muscles(scene, patient, outer)
    _spine(scene, patient, rng)
    _ribs(scene, patient)


def _dome(patient, x, y):
    """Height of the diaphragm: two domes that fall toward the wall, most steeply posterior."""
    fall = np.where(y > 0, np.float32(78), np.float32(38)) * ((y + 8) / 82) ** 2
    right = patient.dome_right - fall - 55 * ((x + 62) / 75) ** 2
    left = patient.dome_left - fall - 55 * ((x - 66) / 70) ** 2
    return smooth_max(right, left, 20)


def _chest(scene, patient, rng, cavity, above, everywhere):
    """Draws diaphragm, lungs, mediastinum and heart; `above`: height over the dome in mm."""
    scene.paint(everywhere, smooth_max(cavity, -above - 3, 4), 60)
    scene.paint(everywhere, smooth_max(cavity, -above, 4), -95)
    lungs = np.maximum(cavity + 2, 3 - above)
    mediastinum = 26 - np.abs(scene.x - np.float32(6) * (scene.y < 0)) + 0.25 * np.abs(scene.y - 10)
    air = -860 + 25 * scene.coarse
    vessels = scene.fine[::-1] > 2.1
    lungs = smooth_max(lungs, mediastinum, 8)
    scene.paint(everywhere, lungs, np.where(vessels, np.float32(-300), air))
    box, heart = scene.ellipsoid((22, -34, patient.dome_left + 36), (66, 46, 42))
    heart = np.maximum(heart, 3 - above[box])
    scene.paint(box, heart - 4, -80)
    scene.paint(box, heart, 105)
    scene.paint(box, heart + 11, 150 * patient.phase)


def _couch(scene, patient):
    """Draws the couch top, a thin curved shell under the back."""
    _, y, x = scene.axes
    top = patient.half_depth + 1.3 * patient.fat + patient.couch + 6
    shell = np.abs(top - 30 * (x / 190) ** 2 - y[:, None]) - 1.5
    scene.paint((slice(None),) * 3, np.broadcast_to(shell, scene.shape), 40)


def _muscles(scene, patient, outer):
    """Draws psoas, quadratus lumborum, erector spinae and crura, on both sides."""
    box = scene.box((-80, 20, -400), (80, 140, 400))
    x, y, z = scene.at(box)
    sx, sy = patient.spine(z)
    x, y = np.abs(x - sx), y - sy
    erector = smooth_max(x - 62, 26 + 0.012 * (x - 20) ** 2 - y, 24)
    erector = np.maximum(erector, outer[box] + 1)
    scene.place(box, erector, 55, gap=None)
    septum = np.maximum(np.abs(x - 33 - 0.2 * (y - 45)) - 0.7, np.abs(y - 46) - 14)
    scene.paint(box, np.minimum(septum, np.maximum(x - 1, 62 - y)), -40)
    for sign in (-1, 1):
        for points, radii, hu in PARASPINAL:
            path = [_beside_spine(patient, sign, *point) for point in points]
            scene.place(*scene.tube(path, radii), hu, gap=None)


def _beside_spine(patient, sign, lateral, posterior, z):
    """Point at `lateral` and `posterior` mm from the vertebral body at height z."""
    x, y = patient.spine(z)
    return x + sign * lateral, y + posterior, z


def _spine(scene, patient, rng):
    """Draws vertebral bodies, discs, canal, pedicles, laminae and processes."""
    box = scene.box((-65, -25, -400), (65, 105, 400))
    x, y, z = scene.at(box)
    sx, sy = patient.spine(z)
    x, y = x - sx, y - sy
    level = np.mod(z + np.float32(rng.uniform(0, VERTEBRA_MM)), VERTEBRA_MM) - VERTEBRA_MM / 2
    column = (np.sqrt((x / 24) ** 2 + (y / 18) ** 2) - 1) * 20
    column = np.maximum(column, y - 15)
    waist = 2.5 * np.cos(level * np.float32(2 * np.pi / VERTEBRA_MM))
    body = smooth_max(column + waist, np.abs(level) - 13.5, 3)
    center = np.hypot(x, y - 25)
    arch = np.maximum(np.abs(center - 15) - 3.5, np.abs(level - 1) - 11)
    arch = np.maximum(arch, 10 - y)
    spinous = np.maximum(np.abs(x) - 3.5, np.maximum(38 - y, y - 64))
    spinous = np.maximum(spinous, np.abs(level + 4 + 0.15 * (y - 40)) - 9)
    wing = np.maximum(np.hypot(y - 27 - 0.12 * np.abs(x), level - 3) - 5, np.abs(x) - 40)
    wing = np.maximum(wing, 14 - np.abs(x))
    processes = np.minimum(np.minimum(arch, spinous), wing)
    marrow = 160 + 22 * scene.fine[box]
    scene.place(box, column + 1, 88, gap=None)
    scene.place(box, processes, 330, gap=None)
    scene.paint(box, processes + 3, marrow + 40)
    scene.paint(box, center - 11, 28)
    scene.place(box, body, 380, gap=None)
    scene.paint(box, body + 2.2, marrow)


def _ribs(scene, patient):
    """Draws ribs around the wall, sloping down anteriorly, and rising costal cartilage."""
    for sign in (-1, 1):
        for rib in range(FIRST_RIB, LAST_RIB + 1):
            start = 25 + (LAST_RIB - rib) * 27
            end = {12: 1.25, 11: 1.75}.get(rib, 2.3)  # floating ribs are short
            angles = np.linspace(0.74, end, 9)
            heights = start - 112 * np.sin(np.clip((angles - 0.2) * 0.75, 0, np.pi / 2))
            inner = [
                _beside_spine(patient, sign, 24, 22, start + 2),
                _beside_spine(patient, sign, 52, 36, start - 2),
            ]
            path = np.concatenate([inner, _along_wall(patient, sign * angles, heights)])
            box, bone = scene.tube(path, np.full(len(path), 4.7), flat=1.25)
            scene.place(box, bone, 400, gap=None)
            scene.paint(box, bone + 2.6, 190)
            if rib <= 10:
                rise = heights[-1] + np.array([0, 4, 14, 28])
                path = _along_wall(patient, sign * np.linspace(end, end + 0.55, 4), rise)
                scene.place(*scene.tube(path, np.full(4, 5.0), flat=1.4), 105, gap=None)


def _along_wall(patient, angles, heights):
    """Points in the muscle wall at `angles` from posterior."""
    points = [(*patient.wall(a, z), z) for a, z in zip(angles, heights, strict=True)]
    return np.array(points) * (0.953, 0.948, 1)
