"""Collectives from HLO text: forms of groups, of types and of calls, against hand-made programs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.scaling.hlo_collectives import collectives
from experiments.scaling.hlo_traffic import memory_traffic

HEAD = "HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions={}\n\n"
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""


def program(*lines: str, before: str = "", devices: int = 8) -> str:
    body = "".join(f"  {line}\n" for line in lines)
    entry = (
        f"ENTRY %main (p: f32[256]) -> f32[256] {{\n  %p = f32[256]{{0}} parameter(0)\n{body}}}\n"
    )
    return HEAD.format(devices) + ADD + before + entry


def sizes(*lines: str, **more) -> list[tuple]:
    return [(one.kind, one.size, one.times) for one in collectives(program(*lines, **more))]


TO = "replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add"
# (instruction, kind, bytes received of 256 float32, 1024 bytes, in groups of 4)
WHOLE = [
    (f"%r = f32[256]{{0:T(256)}} all-reduce(%p), channel_id=1, {TO}", "all-reduce", 1536),
    (f"%r = f32[256]{{0}} all-gather(%q), dimensions={{0}}, {TO}", "all-gather", 768),
    (f"%r = f32[64]{{0}} reduce-scatter(%p), dimensions={{0}}, {TO}", "reduce-scatter", 768),
    (f"%r = f32[256]{{0}} all-to-all(%p), dimensions={{0}}, {TO}", "all-to-all", 768),
    (f"%r = (f32[128]{{0}}, /*index=1*/bf16[2,128]{{1,0:T(8,128)(2,1)}}) all-reduce(%p, %q), {TO}",
     "all-reduce", 1536),
    ("%r = f32[256]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
     "collective-permute", 1024),
]  # fmt: skip
# Started: types hold operands and contexts besides the result.
STARTED = [
    (f"%s = f32[256]{{0}} all-reduce-start(%p), {TO}", "all-reduce", 1536),
    (f"%s = (f32[128]{{0}}, f32[128]{{0}}) all-reduce-start(%p, %q), {TO}", "all-reduce", 1536),
    (f"%s = ((f32[256]{{0}}), f32[256]{{0}}, u32[]) all-reduce-start(%p), {TO}",
     "all-reduce", 1536),
    (f"%s = (f32[64]{{0}}, f32[256]{{0:T(256)S(1)}}) all-gather-start(%q), {TO}",
     "all-gather", 768),
    (f"%s = ((f32[32], f32[32]), (f32[128], f32[128])) all-gather-start(%a, %b), {TO}",
     "all-gather", 768),
    (f"%s = ((f32[256]{{0}}), f32[64]{{0}}, u32[]) reduce-scatter-start(%p), {TO}, calls=%again",
     "reduce-scatter", 768),
    ("%s = (f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%p), "
     "source_target_pairs={{3,2},{2,3}}", "collective-permute", 1024),
]  # fmt: skip


@pytest.mark.parametrize(("line", "kind", "size"), WHOLE)
def test_whole(line, kind, size):
    assert sizes(line) == [(kind, size, 1)]


@pytest.mark.parametrize(("line", "kind", "size"), STARTED)
def test_started_and_done_is_one(line, kind, size):
    done = f"%d = f32[256]{{0}} {kind}-done(%s)"
    again = (
        "%again (p: f32[256]) -> f32[64] {\n  %p = f32[256]{0} parameter(0)\n"
        f"  ROOT %r = f32[64]{{0}} reduce-scatter(%p), {TO}\n}}\n\n"
    )
    assert sizes(line, done, before=again) == [(kind, size, 1)]


def test_generic_start():
    """Its computation is called by start, update and done."""
    wrapped = f"""%wrapped (q: f32[64]) -> f32[256] {{
  %q = f32[64]{{0}} parameter(0)
  ROOT %g = f32[256]{{0}} all-gather(%q), dimensions={{0}}, {TO}
}}

"""
    lines = (
        "%s = ((f32[64]{0}), f32[256]{0}, u32[]) async-start(%q), calls=%wrapped",
        "%u = ((f32[64]{0}), f32[256]{0}, u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[256]{0} async-done(%u), calls=%wrapped",
    )
    assert sizes(*lines, before=wrapped) == [("all-gather", 768, 1)]


def loop(trips: str) -> str:
    """Computations of a loop with an all-reduce in a fusion, called by its body."""
    return f"""%fused (x: f32[256]) -> f32[256] {{
  %x = f32[256]{{0}} parameter(0)
  ROOT %r = f32[256]{{0}} all-reduce(%x), {TO}
}}

%body (t: (s32[], f32[256])) -> (s32[], f32[256]) {{
  %t = (s32[], f32[256]{{0}}) parameter(0)
  ROOT %f = f32[256]{{0}} fusion(%t), kind=kCustom, calls=%fused
}}

%test (t: (s32[], f32[256])) -> pred[] {{
  %t = (s32[], f32[256]{{0}}) parameter(0)
  ROOT %c = pred[] constant(true)
}}

%outer (t: (s32[], f32[256])) -> (s32[], f32[256]) {{
  %t = (s32[], f32[256]{{0}}) parameter(0)
  ROOT %w = (s32[], f32[256]{{0}}) while(%t), condition=%test, body=%body{trips}
}}

"""


def test_loops_multiply():
    inner = ', backend_config={"known_trip_count":{"n":"3"}}'
    outer = '%w = (s32[], f32[256]{0}) while(%t), condition=%test, body=%outer, backend_config={"known_trip_count":{"n":"5"},"other":{"n":"9"}}'  # noqa: E501
    (one,) = collectives(program(outer, before=loop(inner)))
    assert (one.times, one.bounded) == (15, True)
    (one,) = collectives(program(outer, before=loop("")))
    assert (one.times, one.bounded) == (5, False)


def test_branches_and_calls():
    branch = "%c = f32[256]{0} conditional(%i, %p, %p), branch_computations={%fused, %add}"
    call = "%k = f32[256]{0} call(%p), to_apply=%fused"
    assert [size for _, size, _ in sizes(branch, call, before=loop(""))] == [1536, 1536]


def test_names_are_no_operations():
    """A fusion that is called like a collective, metadata that names one, reducers."""
    line = '%all-reduce-fusion = f32[256]{0} fusion(%p), kind=kLoop, calls=%add, metadata={op_name="all-gather(x)"}'  # noqa: E501
    assert sizes(line) == []


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("[4,2]<=[2,2,2]T(1,2,0)", (0, 4)),
        ("{}", tuple(range(8))),
        ("[8,1]<=[8]", (0,)),
        ("mesh['axis_0'=8] {'axis_0'}", tuple(range(8))),
        ("mesh['data'=4,'tensor'=2] {'data'}", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
    ],
)
def test_groups(groups, expected):
    text = program(f"%r = f32[256]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
    (one,) = collectives(text)
    assert one.group == expected
    assert one.size == 2048 * (len(expected) - 1) / len(expected)


def test_groups_of_a_mesh_whose_devices_are_numbered_otherwise():
    groups = "replica_groups=mesh['a'=8,'b'=2], device_ids=([4,4]T(1,0)) {'b'}"
    [one] = collectives(program(f"%r = f32[256]{{0}} all-reduce(%p), {groups}, to_apply=%add"))
    assert one.group == (0, 4)


def test_one_that_is_spread_over_fusions_counts_once():
    """All its parts have its channel; two channels are two."""
    lines = [
        f"%g{i} = f32[256]{{0}} all-gather(%p), channel_id={channel}, replica_groups=[1,4]<=[4]"
        for i, channel in enumerate((7, 7, 8, 7))
    ]
    assert len(collectives(program(*lines))) == 2


def test_groups_of_another_form_are_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        collectives(program("%r = f32[256]{0} all-reduce(%p), replica_groups=@mesh, to_apply=%add"))
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("module @jit_step {}")


@given(
    st.lists(st.integers(1, 9), max_size=3),
    st.sampled_from([("pred", 1), ("bf16", 2), ("f8e4m3fn", 1), ("s4", 0.5), ("f32", 4)]),
    st.integers(1, 8),
)
def test_bytes_by_a_ring(shape, dtype, members):
    """Gathering what was reduced and scattered is an all-reduce."""
    whole = dtype[1] * np.prod(shape) * members
    groups = f"replica_groups=[1,{members}]<=[{members}], to_apply=%add"
    full, part = (f"{dtype[0]}[{','.join(map(str, dims))}]" for dims in ([members, *shape], shape))
    found = [
        one.size
        for one in collectives(
            program(
                f"%a = {full} all-reduce(%p), {groups}",
                f"%s = {part} reduce-scatter(%p), {groups}",
                f"%g = {full} all-gather(%s), {groups}",
            )
        )
    ]
    assert found[0] == pytest.approx(found[1] + found[2])
    assert found[2] == pytest.approx(whole * (members - 1) / members)


# (instructions, bytes that touch main memory); an array is 1024 bytes, 256 a quarter of it
FAST = "f32[256]{0:T(256)S(1)}"
MOVES = [
    ((f"%a = {FAST} fusion(%p), kind=kLoop, calls=%add", f"%b = {FAST} negate(%a)"), 1024),
    (("%a = f32[256]{0:T(256)} add(%p, %p)",), 2048),
    ((f"%s = ({FAST}, f32[256]{{0}}, u32[]) copy-start(%p)", f"%d = {FAST} copy-done(%s)"), 1024),
    (("%s = f32[64]{0} slice(%p), slice={[0:64]}",), 512),
    (
        ("%s = ((f32[256]{0}), f32[64]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%p)",),
        256,
    ),
    (("%t = (f32[256]{0}) tuple(%p)", "%g = f32[256]{0} get-tuple-element(%t), index=0"), 0),
]


@pytest.mark.parametrize(("lines", "expected"), MOVES)
def test_traffic(lines, expected):
    assert memory_traffic(program(*lines)) == expected


def test_traffic_of_a_loop():
    """What a fusion has inside stays on the chip; a loop's body counts as often as it runs."""
    trips = ', backend_config={"known_trip_count":{"n":"3"}}'
    call = "%k = f32[256]{0} call(%p), to_apply=%outer"
    body = 1024 + 1028  # the fusion's result, and the loop's state that it takes
    assert memory_traffic(program(call, before=loop(trips))) == 3 * body


@pytest.mark.parametrize("constant", ["s32[] constant(3)", "s32[]{:T(128)} constant(3)"])
def test_a_loop_that_counts_below_a_constant(constant):
    """As JAX's loops do; the TPU's compiler writes no count beside them."""
    text = program(
        "%w = f32[256]{0} while(%p), condition=%test, body=%body",
        before=(
            "%test (s: f32[256]) -> pred[] {\n"
            f"  %n = {constant}\n"
            "  %i = s32[] get-tuple-element(%s), index=0\n"
            "  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={}\n"
            "}\n\n"
            "%body (s: f32[256]) -> f32[256] {\n"
            "  %s = f32[256]{0} parameter(0)\n"
            "  ROOT %r = f32[256]{0} all-reduce(%s), replica_groups={{0,1}}, to_apply=%add\n"
            "}\n"
        ),
    )
    [found] = collectives(text)
    assert (found.times, found.bounded) == (3, True)
    assert memory_traffic(text) == 3 * 2048


SLICED = """%taking (a: f32[256], i: s32[]) -> f32[64] {
  %a = f32[256]{0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[256]{0} bitcast(%a)
  ROOT %t = f32[64]{0} dynamic-slice(%v, %i), dynamic_slice_sizes={64}
}

%putting (a: f32[256], u: f32[64], i: s32[]) -> f32[256] {
  %b = f32[256]{0} parameter(0)
  %u = f32[64]{0} parameter(1)
  %j = s32[] parameter(2)
  %x = f32[64]{0} negate(%u)
  ROOT %d = f32[256]{0} dynamic-update-slice(%b, %x, %j)
}
"""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("%f = f32[64]{0} fusion(%p, %k), kind=kLoop, calls=%taking",), 512),
        (
            (
                "%s = f32[64]{0:S(1)} slice(%p), slice={[0:64]}",
                "%f = f32[256]{0} fusion(%p, %s, %k), kind=kLoop, calls=%putting",
            ),
            256 + 256,
        ),
        (("%f = f32[256]{0:S(1)} fusion(%p, %k), kind=kLoop, calls=%add",), 1024),
    ],
    ids=["taken", "put", "whole"],
)
def test_traffic_of_parts_within_fusions(lines, expected):
    assert memory_traffic(program(*lines, before=SLICED)) == expected
