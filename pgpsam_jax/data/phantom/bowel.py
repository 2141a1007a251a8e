"""Phantom stomach and bowel: walls, contents, and gas above a fluid level (patient supine).

Functions take the `Painter` of `organs`.
"""

import numpy as np

from pgpsam_jax.data.phantom.shapes import smooth_max

STOMACH_PATH = (
    (58, 12, 80), (66, -8, 62), (70, -34, 36), (58, -52, 10), (28, -57, -8), (-4, -50, -4),
)  # fmt: skip
DUODENUM = (
    (-10, -50, -4), (-44, -40, -6), (-52, -22, -30), (-42, -18, -58), (0, -26, -64), (36, -30, -52),
)  # fmt: skip
ASCENDING = ((-88, -22, -52), (-98, 2, -70), (-98, 10, -130))
TRANSVERSE = (
    (-88, -30, -56), (-45, -66, -60), (5, -70, -58), (55, -66, -40), (92, -34, -4), (100, 4, 8),
)  # fmt: skip
DESCENDING = ((102, 10, 2), (108, 24, -30), (110, 24, -80), (106, 18, -130))
COLON = ((ASCENDING, 23), (TRANSVERSE, 18), (DESCENDING, 15))
SMALL_BOWEL_LOOPS = 34


def draw_stomach(p, label):
    """Draws fundus (posterior, under the left dome), body and antrum, with anterior gas."""
    s, size = p.scene, p.size(0.85, 1.1)
    path = p.jitter(STOMACH_PATH)
    box, bag = s.tube(path, size * np.array([30, 36, 33, 28, 20, 12]))
    bag = smooth_max(bag + 1.5 * p.bump[box], 1.5 - s.clearance[box], 6)
    bag = s.place(box, bag, p.tissue(box, p.rng.uniform(78, 95), 5), label=label, gap=1.5)
    lumen = bag + 4.0 + 1.2 * p.fine[box]
    s.paint(box, lumen, p.tissue(box, p.rng.uniform(18, 38), 7))
    gas = _above_fluid(s, box, p.rng.uniform(0.15, 0.32), lumen)
    s.paint(box, np.maximum(lumen + 0.5, gas), -930)


def draw_bowel(p):
    """Draws duodenum, colon with gas and stool, and small-bowel loops in the remaining space."""
    rng, s = p.rng, p.scene
    _loop(p, p.jitter(DUODENUM, 2), np.full(len(DUODENUM), 12.0), fluid=25)
    for path, radius in COLON:
        radii = rng.uniform(0.85, 1.15, len(path)) * radius
        _loop(p, p.jitter(path), radii, fluid=20, gas=rng.uniform(0.3, 0.6), stool=True)
    for _ in range(SMALL_BOWEL_LOOPS):
        room = s.clearance[::2, ::4, ::4] * (s.z[::2, ::4, ::4] < -22) * (s.y[::2, ::4, ::4] < 22)
        spots = np.argwhere(room > 10)
        if not len(spots):
            break
        d, h, w = spots[rng.integers(len(spots))] * (2, 4, 4)
        at = np.array([s.x[d, h, w], s.y[d, h, w], s.z[d, h, w]])
        way = rng.normal(size=(2, 3)) * [16, 12, 9]
        gas = rng.uniform(0.2, 0.5) if rng.random() < 0.35 else 0.0
        bend, radii = [at - way[0], at, at + way[1]], rng.uniform(9, 12.5, 3)
        _loop(p, bend, radii, fluid=rng.uniform(5, 35), gas=gas)


def _loop(p, path, radii, *, fluid, gas=0.0, stool=False):
    """Draws a bowel segment: wall, fluid of `fluid` HU or stool, and a fraction `gas` of gas."""
    s = p.scene
    box, gut = s.tube(path, radii)
    gut = s.place(box, gut + 0.8 * p.bump[box], p.tissue(box, 80, 5), gap=1.8)
    lumen = gut + 2.8
    content = p.tissue(box, fluid, 4)
    if stool:
        content = np.where(p.fine[box] > 0.5, np.float32(-250), content + 25)
    s.paint(box, lumen, content)
    if gas:
        s.paint(box, np.maximum(lumen + 0.3, _above_fluid(p.scene, box, gas, lumen)), -930)


def _above_fluid(scene, box, fraction, lumen):
    """Shape of the gas that fills the anterior `fraction` of a lumen."""
    height = np.broadcast_to(scene.axes[1][box[1]][None, :, None], lumen.shape)
    within = height[lumen < 0]
    return height - np.float32(np.quantile(within, fraction) if within.size else 0.0)
