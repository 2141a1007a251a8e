"""Phantom abdominal organs, placed by priority: earlier organs displace later ones.

Label ids are those of BTCV. Sizes and HU follow a portal-venous abdominal CT.
"""

import numpy as np

from pgpsam_jax.data.phantom.body import Patient
from pgpsam_jax.data.phantom.bowel import draw_bowel, draw_stomach
from pgpsam_jax.data.phantom.shapes import FAR, Scene, relative, smooth_max

SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, GALLBLADDER, ESOPHAGUS, LIVER, STOMACH = range(1, 8)
AORTA, VENA_CAVA, PORTAL_SPLENIC, PANCREAS, RIGHT_ADRENAL, LEFT_ADRENAL = range(8, 14)


class Painter:
    """Shared state of the organs: scene, patient, random generator and textures."""

    def __init__(self, scene: Scene, patient: Patient, rng):
        self.scene, self.patient, self.rng = scene, patient, rng
        self.blood = rng.uniform(166, 182) * patient.phase
        self.fine, self.coarse, self.bump = scene.fine, scene.coarse, scene.bump

    def jitter(self, points, spread=3.0):
        """Moves each point by about `spread` mm."""
        points = np.asarray(points, float)
        return points + self.rng.normal(0, spread, points.shape).clip(-2 * spread, 2 * spread)

    def size(self, low=0.93, high=1.1):
        """Samples a scale factor."""
        return self.rng.uniform(low, high)

    def tissue(self, box, hu, texture=4.0):
        """Adds parenchymal texture to a HU value."""
        return hu + texture * (self.fine[box] + 0.7 * self.coarse[box]) * np.float32(0.8)


def draw_organs(scene: Scene, patient: Patient, rng):
    """Places all organs; every BTCV label is present afterwards."""
    painter = Painter(scene, patient, rng)
    _great_vessels(painter)
    _kidneys(painter)
    _adrenals(painter)
    _portal_vessels(painter)
    _gallbladder_and_liver(painter)
    _spleen(painter)
    _pancreas(painter)
    draw_stomach(painter, STOMACH)
    draw_bowel(painter)


def _great_vessels(p):
    """Places aorta (left of the midline), vena cava (right, up to the heart) and esophagus."""
    low, high = p.scene.axes[0][0] - 25, p.scene.axes[0][-1] + 25
    z = np.linspace(low, high, 10)
    sx, sy = p.patient.spine(z)
    up = np.clip((z + 100) / 220, 0, 1)  # 0 at the bifurcation, 1 in the chest
    path = p.jitter(np.stack([sx + 9 + 10 * up**3, sy - 32 + 14 * up**3, z], 1), 1.0)
    radius = p.size(0.95, 1.12) * (9.8 + 2.2 * up)
    box, aorta = p.scene.tube(path, radius)
    p.scene.place(box, aorta, p.tissue(box, p.blood, 1.5), label=AORTA, gap=None)
    path = np.stack([sx - 18 - 8 * up**2, sy - 28 - 8 * up**2, z], 1)
    box, cava = p.scene.tube(p.jitter(path, 1.0), p.size() * (10.5 + 2.0 * up))
    cava = np.maximum(cava, p.scene.z[box] - np.float32(p.patient.dome_right + 8))  # the heart
    hu = p.tissue(box, p.blood - p.rng.uniform(8, 28), 2)
    p.scene.place(box, cava, hu, label=VENA_CAVA, gap=0.5, rim=1.7)
    esophagus = [(14, -8, 125), (16, -16, 95), (22, -20, 74), (36, -14, 62)]
    box, tube = p.scene.tube(p.jitter(esophagus, 1.5), p.size() * np.array([8, 8, 8, 9]))
    p.scene.place(box, tube, p.tissue(box, 68), label=ESOPHAGUS, gap=None)


def _kidneys(p):
    """Places the kidneys along the psoas, hilum medial and anterior; the right one lower."""
    places = ((-1, RIGHT_KIDNEY, (-66, 25, -30)), (1, LEFT_KIDNEY, (64, 25, -12)))
    for sign, label, center in places:
        center = p.jitter(center)
        radii = np.array([28, 26, 53]) * p.size(0.92, 1.08) * p.rng.uniform(0.96, 1.04, 3)
        turn = (sign * p.rng.uniform(20, 40), sign * p.rng.uniform(8, 16))
        box, kidney = p.scene.ellipsoid(center, radii, power=2.3, turn_deg=turn)
        inward = np.array([-sign * 0.82, -0.57, 0.0])
        sinus, pelvis = (
            _move_to(box, *p.scene.ellipsoid(center + off * inward, radii, turn_deg=turn))
            for off, radii in ((14, (12, 7, 20)), (15, (8, 4.5, 9)))
        )
        kidney = smooth_max(kidney + 0.8 * p.bump[box], 1.0 - sinus, 4)
        column = p.fine[box] + 1.4 * p.coarse[box] > 0.9
        cortex, medulla = p.patient.phase * p.rng.uniform(180, 200), p.rng.uniform(140, 155)
        kidney = p.scene.place(box, kidney, p.tissue(box, cortex, 4), label=label, gap=2.0)
        p.scene.paint(box, kidney + 7, np.where(column, np.float32(cortex), np.float32(medulla)))
        p.scene.paint(box, np.maximum(pelvis, 0.5 - kidney), p.rng.uniform(10, 30))
        p.scene.reserve(box, sinus)
        vein = [center + 18 * inward, center * [0.35, 0, 1] + [0, -16, 3]]
        p.scene.place(*p.scene.tube(vein, (4.5, 5)), p.blood - 8, gap=0.5)


def _move_to(box, other, shape):
    """Crops a shape from the box `other` to `box`, filled with `FAR` where they do not overlap."""
    whole = np.full([s.stop - s.start for s in box], FAR, np.float32)
    pairs = zip(box, other, strict=True)
    meet = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs]
    if all(s.start < s.stop for s in meet):
        whole[relative(meet, box)] = shape[relative(meet, other)]
    return whole


class _LiverEdge:
    """Visceral surface of the liver x = edge(y, z): right lobe, and tapering left lobe."""

    heights = (-85, -60, -30, 0, 20, 50, 80, 110)
    right = (-132, -110, -82, -56, -40, -24, -14, -10)
    left = (0, 0, 4, 34, 62, 84, 80, 60)

    def __init__(self, p):
        self.shift = p.rng.uniform(-7, 9)
        self.reach = p.rng.uniform(0.8, 1.12)
        self.drop = p.rng.uniform(-10, 10)

    def __call__(self, y, z):
        """Returns the edge and the gradient norm of x - edge."""
        z = z - self.drop
        base = np.interp(z, self.heights, self.right) + self.shift
        lobe = np.interp(z, self.heights, self.left) * self.reach
        bend = np.tanh((-44 - y) / 22)
        slope = lobe * 0.5 * (1 - bend * bend) / 22
        return (base + lobe * 0.5 * (1 + bend)).astype(np.float32), np.sqrt(1.7 + slope * slope)


def _gallbladder_and_liver(p):
    """Places the gallbladder along the lower liver edge, half embedded, and the liver."""
    edge, s = _LiverEdge(p), p.scene
    bile = p.jitter([(0, -24, 10), (0, -46, -9), (0, -60, -26)], 2.5)
    bile[:, 0] = edge(bile[:, 1], bile[:, 2])[0] + [2, 5, 7]
    box, gall = s.tube(bile, p.size(0.92, 1.15) * np.array([5, 12.5, 14.5]))
    gall = s.place(box, gall, 45, label=GALLBLADDER, gap=2.0, rim=1.5)
    s.paint(box, gall + 1.8, p.tissue(box, p.rng.uniform(4, 16), 1.5))
    box = s.box((-170, -110, -110), (110, 100, 115))
    x, y, z = s.at(box)
    surface, steep = edge(y, z)
    liver = ((x - surface) / steep).astype(np.float32) + 2.0 * p.bump[box]
    fissure = np.hypot((x - 8) / 3.5, (y + 78) / 22) * 3.5 - 3.5  # ligamentum teres
    liver = smooth_max(liver, 3 - fissure, 5)
    liver = smooth_max(liver, 0.6 - s.wall[box], 6)
    hu = p.patient.phase * p.rng.uniform(100, 114)
    liver = s.place(box, liver, p.tissue(box, hu, 4), label=LIVER, gap=0.8)
    outside = np.where(s.label[box] == LIVER, liver + 2, FAR)
    for points, radii in _liver_veins(p):
        part, vein = s.tube(points, radii)
        vein = np.where(_move_to(part, box, outside) > 0, FAR, vein)
        s.paint(part, vein, p.blood - 12)


def _liver_veins(p):
    """Yields (points, radii) of hepatic veins, which join the vena cava, and portal branches."""
    root, hilum = np.array([-26, -14, 76]), np.array([-38, -12, 24])
    ends = [(-100, 20, 40), (-62, -45, 40), (15, -55, 58)]
    for end in ends:
        middle = (root + end) / 2 + [0, 0, 10]
        yield p.jitter([root, middle, end], 2.0), (4.8, 3.8, 2.0)
    for end in [(-105, 5, 5), (-95, 30, 45), (-80, -40, 10), (10, -60, 45)]:
        middle = (hilum + end) / 2 + [-4, 0, 6]
        yield p.jitter([hilum, middle, end], 2.0), (5.2, 3.8, 1.8)


def _spleen(p):
    """Places the spleen, a lens along the left posterior wall, thinner toward its rim."""
    s = p.scene
    box = s.box((20, -45, -40), (160, 100, 110))
    x, y, z = s.at(box)
    scale = p.size(0.9, 1.12)
    angle = np.arctan2(y - 5, x - 20) - np.radians(p.rng.uniform(16, 26))
    height = z - p.rng.uniform(36, 44) + 22 * angle
    rim = (angle / (0.70 * scale)) ** 2 + (height / (50 * scale)) ** 2
    thick = 42 * scale * (1 - rim) + 2.0 * p.bump[box]
    depth = s.wall[box]  # inward from the abdominal wall or the diaphragm
    spleen = (depth - thick) * np.float32(0.75)
    spleen = np.maximum(spleen, 1.0 - depth)
    hu = p.patient.phase * p.rng.uniform(124, 138)
    s.place(box, spleen, p.tissue(box, hu, 3), label=SPLEEN, gap=1.0)


def _portal_vessels(p):
    """Places portal and splenic vein, superior mesenteric vein and artery."""
    s, hu = p.scene, p.blood + p.rng.uniform(-4, 10)
    join = p.jitter((-4, -27, 2), 2.0)
    porta = [join, (-22, -22, 14), (-40, -14, 24)]
    splenic = [join, (30, -15, 12), (62, 6, 26), (84, 22, 32)]
    for points, radii in ((porta, (6.5, 6.5, 6)), (splenic, (5, 4.5, 4.2, 3.5))):
        box, vein = s.tube(points, radii)
        s.place(box, vein, hu, label=PORTAL_SPLENIC, gap=0.5, rim=1.5)
    x, y = p.patient.spine(-60.0)
    s.place(*s.tube([join, (0, y - 58, -40), (2, y - 60, -85)], (5.5, 5, 4)), hu, gap=0.5)
    ax, ay = p.patient.spine(5.0)
    artery = [(ax + 9, ay - 38, 8), (ax + 10, ay - 48, -10)]  # superior mesenteric
    artery += [(x + 12, y - 56, -45), (x + 10, y - 58, -90)]
    s.place(*s.tube(artery, (4, 3.8, 3.5, 3)), p.blood, gap=0.5)


def _pancreas(p):
    """Places the pancreas: head with uncinate process, neck, body, and tail toward the spleen."""
    s = p.scene
    head, body = [(-30, -30, -26), (-22, -37, -10)], [(2, -40, 4), (32, -30, 13)]
    path = p.jitter([*head, *body, (58, -10, 22), (82, 10, 30)], 2.0)
    radii = p.size(0.97, 1.12) * np.array([14, 13.5, 11, 11.5, 11.5, 10.5])
    box, gland = s.tube(path, radii, flat=1.15)
    hook = _move_to(box, *s.tube([path[0], path[0] + [15, 6, -6]], (12, 8)))
    gland = np.minimum(gland, hook) + 1.3 * p.fine[box] + 0.6 * p.coarse[box]
    hu = p.patient.phase * p.rng.uniform(98, 110)
    s.place(box, gland, p.tissue(box, hu, 9), label=PANCREAS, gap=0.8)


def _adrenals(p):
    """Places the adrenal glands, two limbs each, above and anterior to the kidneys."""
    for sign, label, top in ((-1, RIGHT_ADRENAL, (-34, 14, 34)), (1, LEFT_ADRENAL, (36, 12, 38))):
        top = p.jitter(top, 1.5)
        for leg in ((sign * 10, 12, -14), (sign * 2, 14, -16)):
            box, limb = p.scene.tube([top, top + leg], (4.8, 3.8))
            p.scene.place(box, limb, p.tissue(box, 80), label=label, gap=0.3)
