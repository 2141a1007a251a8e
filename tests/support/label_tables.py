"""Label tables that several tests read volumes with."""

from pgpsam_jax.data.layouts.label_table import LabelTable

TOTAL = {  # class -> (id in seg104, voxels) of the recorded CT
    "spleen": (1, 9677),
    "right_kidney": (2, 6993),
    "left_kidney": (3, 5144),
    "gallbladder": (4, 1300),
    "liver": (5, 41602),
    "stomach": (6, 4977),
    "aorta": (7, 1786),
    "pancreas": (10, 818),
}
TOTAL_TABLE = LabelTable.from_json(
    {
        "classes": [{"name": name, "source": [i]} for name, (i, _) in TOTAL.items()],
        "other": "background",
    }
)
PAIR = LabelTable(("background", "a", "b"), {1: 1, 2: 1, 5: 2})
