"""Label tables: the published remap, files, and what is refused."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.data.layouts.label_table import SYNAPSE8, LabelTable, load_label_table
from pgpsam_jax.errors import UserError
from tests.support.label_tables import PAIR, TOTAL_TABLE


def test_synapse_table_is_the_published_remap():
    remap = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 0, 6: 5, 7: 6, 8: 7, 9: 0, 10: 0, 11: 8, 12: 0, 13: 0}
    ids = np.arange(14, dtype=np.int32)
    assert SYNAPSE8.remap(ids, "x").tolist() == [remap[i] for i in ids]
    assert SYNAPSE8.num_classes == 9 and SYNAPSE8.names[8] == "pancreas"


@given(st.permutations(range(1, 9)), st.booleans())
def test_remap_is_not_in_place_chaining(order, other):
    """Tables that swap ids, where key-by-key assignment maps some voxels twice."""
    names = ("background", *(f"c{k}" for k in range(1, 9)))
    table = LabelTable(
        names, {s: k for k, s in enumerate(order, 1)}, ("error", "background")[other]
    )
    ids = np.array([0, *order, *order[::-1]], np.int32).reshape(1, -1)
    before = ids.copy()
    result = table.remap(ids, "x")
    assert result.dtype == np.uint8 and result.tolist() == [[0, *range(1, 9), *range(8, 0, -1)]]
    np.testing.assert_array_equal(ids, before)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_remap_is_the_table_voxel_by_voxel(data):
    classes = data.draw(st.integers(1, 6))
    ids = st.integers(1, 40) | st.integers(1, 65535)
    sources = data.draw(st.dictionaries(ids, st.integers(0, classes), max_size=12))
    free = (i for i in itertools.count(100) if i not in sources)
    sources |= {next(free): k for k in range(1, classes + 1)}
    other = data.draw(st.sampled_from(["error", "background"]))
    names = ("background", *(f"c{k}" for k in range(1, classes + 1)))
    table = LabelTable(names, sources, other)
    inside = st.sampled_from([0, *sources])
    voxels = data.draw(st.lists(inside | st.integers(-(2**31), 2**31 - 1), max_size=20))
    array = np.array(voxels, np.int32).reshape(-1, 1)
    unknown = {v for v in voxels if v not in sources and v != 0}
    if unknown and other == "error":
        with pytest.raises(UserError, match="outside the label table"):
            table.remap(array, "x")
    else:
        wanted = [[sources.get(v, 0)] for v in voxels]
        assert table.remap(array, "x").tolist() == wanted


def test_unknown_values():
    ids = np.array([[0, 1, 3], [-4, 70000, 5]], np.int32)
    with pytest.raises(
        UserError, match=r"seg\.nii .*: -4 \(1 voxel\), 3 \(1 voxel\), 70000 .*other"
    ):
        PAIR.remap(ids, "seg.nii")
    lenient = LabelTable(PAIR.names, PAIR.source_to_class, "background")
    assert lenient.remap(ids, "x").tolist() == [[0, 1, 0], [0, 0, 2]]
    assert lenient.remap(ids[:0], "x").shape == (0, 3)


def test_table_json_round_trip(tmp_path):
    path = tmp_path / "labels.json"
    for table in (SYNAPSE8, PAIR, TOTAL_TABLE):
        path.write_text(json.dumps(table.to_json()))
        assert load_label_table(path) == table
    assert TOTAL_TABLE.to_json()["classes"][7] == {"name": "pancreas", "source": [10]}


def one(**entry):
    return {"classes": [{"name": "a", "source": [1]}, entry]}


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "expected an object"),
        ({"classes": {}}, "'classes' must be a list"),
        ({"classes": []}, "1 to 254 named classes"),
        ({"labels": []}, "unknown key 'labels'"),
        (one(name="a", source=[2]), "names must differ"),
        (one(name="b", source=[1]), "source id 1 of class 'b'"),
        (one(name="b", source=[2, 2]), "source id 2 of class 'b'"),
        (one(name="b", source=[0]), "source id 0 of class 'b'"),
        (one(name="b", source=["two"]), "source id 'two' of class 'b'"),
        (one(name="b", source=[True]), "source id True of class 'b'"),
        (one(name="b", source=[2.5]), "source id 2.5 of class 'b'"),
        (["a", "b"], 'starts with "background"'),
        ({"0": "liver"}, "id 0 is always"),
        ({"liver": [1, 2], "tumor": [2]}, "source id 2 of class 'tumor'"),
        ({"1": "2"}, "unknown key"),
        ({"liver": 1, "ignore": 255}, "ignore label"),
        (one(name="b", source=[-1]), "must be integers in 0..65535"),
        (one(name="b", source=[]), "no source id for b"),
        (one(name="", source=[2]), "every class needs a name"),
        (one(name="b", source=[2], color="red"), "unknown key 'color'"),
        (one(name="b", source=[2]) | {"other": "ignore"}, '"other" must be'),
        (one(name="b", source=[2]) | {"background": [2]}, "source id 2 of class 'b'"),
    ],
)
def test_bad_tables(tmp_path, value, message):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as caught:
        load_label_table(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"0": "background", "1": "liver", "3": "spleen"},
        {"1": "liver", "3": "spleen"},
        {"background": 0, "liver": "1", "spleen": [3.0]},
        {"labels": {"background": "0", "liver": 1, "spleen": 3}, "file_ending": ".nii.gz"},
        {"classes": [{"name": "liver", "source": "1"}, {"name": "spleen", "source": [3.0]}]},
        {
            "classes": [
                {"name": "liver", "source": 1},
                {"name": "background", "source": [0]},
                {"name": "spleen", "source": 3},
            ]
        },
    ],
)
def test_tables_as_others_write_them(value):
    assert LabelTable.from_json(value) == LabelTable(
        ("background", "liver", "spleen"), {1: 1, 3: 2}
    )


def test_a_background_class_maps_its_ids_to_background():
    value = {"classes": [{"name": "a", "source": [2]}, {"name": "background", "source": [0, 7]}]}
    assert LabelTable.from_json(value) == LabelTable(("background", "a"), {2: 1, 7: 0})
    assert LabelTable.from_json(["background", "a", "b"]).source_to_class == {0: 0, 1: 1, 2: 2}


def test_table_file_problems(tmp_path):
    with pytest.raises(UserError, match="not found"):
        load_label_table(tmp_path / "none.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_label_table(tmp_path / "t.json")
