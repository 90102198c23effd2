"""What the reader of compiled modules finds, against numbers worked out by hand.

The modules in tests/plan/hlo/ come from the TPU compiler (make_hlo.py beside them made them), so
that its ways of writing are tested where it isn't installed.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from echovlm_jax.plan import hlo, hlo_collectives
from echovlm_jax.plan.hlo_text import Instruction, shapes

MODULES = Path(__file__).parent / "hlo"


def tpu(name: str) -> hlo.Module:
    return hlo.read((MODULES / f"{name}.txt").read_text())


def written(
    body: str, rest: str = "", header: str = "num_partitions=8", granules: Sequence[int] = ()
) -> hlo.Module:
    """A module whose entry computation has these lines."""
    entry = textwrap.indent(textwrap.dedent(body).strip(), "  ")
    return hlo.read(
        f"HloModule m, {header}\n\n{textwrap.dedent(rest)}\nENTRY %main () -> () {{\n{entry}\n}}\n",
        granules=granules,
    )


# --- Real modules of the TPU compiler -------------------------------------------------------------


def test_matmuls_written_as_convolutions_in_a_loop():
    # One row of 256 tokens a device, width 512, 4 heads of 128, 3 layers.
    module = tpu("fsdp_v5e")
    weights, scores = 2 * 256 * 512 * 512, 2 * 4 * 256 * 256 * 128
    assert sorted((m.flops, m.count) for m in module.matmuls) == [
        (scores, 3), (scores, 3), (weights, 3), (weights, 3)
    ]  # fmt: skip
    assert module.matmul_flops == 3 * (2 * weights + 2 * scores)
    assert module.unknown_loops == ()
    assert {m.op_name.split("/")[-2] for m in module.matmuls} == {
        "BTD,NHD->BTNH", "BTNH,BSNH->BNTS", "BNTS,BSNH->BTNH", "BTNH,DNH->BTD"
    }  # fmt: skip


def test_a_gather_spread_over_several_fusions_counts_once():
    # Two weights of 512 x 512 in bfloat16, gathered from 16 devices, in each of 3 layers.
    module = tpu("fsdp_v5e")
    assert (MODULES / "fsdp_v5e.txt").read_text().count(" all-gather(") == 5
    assert [(c.kind, c.group_size, c.count) for c in module.collectives] == [
        ("all-gather", 16, 3)
    ] * 2
    assert module.collective_bytes == {"all-gather": 3 * 2 * 2 * 512 * 512 * 15 / 16}
    assert all(c.result_bytes == 2 * 512 * 512 for c in module.collectives)


def test_every_collective_in_nested_loops():
    # [1024, 512] in float32 on each of 4 x 4 devices; 7 turns, and 5 in each of them.
    size = 4 * 1024 * 512
    assert tpu("collectives_v5e").collective_bytes == {
        "reduce-scatter": 7 * size * 3 / 4,
        "all-gather": 7 * size * 3 / 4,
        "all-to-all": 7 * size * 3 / 4,
        "collective-permute": 7 * size,
        "all-reduce": 35 * 2 * size * 15 / 16,
    }
    by_dtype = tpu("collectives_v5e").collective_dtypes
    assert {kind: set(found) for kind, found in by_dtype.items()} == {
        kind: {"f32"} for kind in by_dtype
    }
    assert {kind: sum(found.values()) for kind, found in by_dtype.items()} == tpu(
        "collectives_v5e"
    ).collective_bytes
    kinds = {c.kind: c for c in tpu("collectives_v5e").collectives}
    assert kinds["collective-permute"].group_size == 12  # 3 of each 4 receive something
    assert kinds["all-reduce"].count == 35


def test_products_that_overlap_their_collective_take_two_steps_a_turn():
    # Two layers; a device has 2048 tokens and half of 8192 hidden channels, 256 of 2048 inputs.
    module = tpu("windowed_v5p")
    assert sorted((loop.trips, loop.count) for loop in module.loops) == [(2, 1), (2, 2)]
    assert module.matmul_flops == 2 * 2 * (2 * 2048 * 2048 * 4096)
    shard = 2 * 4096 * 256
    assert module.collective_bytes == {
        # 4 in each of 2 turns, and one before the loop.
        "collective-permute": 2 * 9 * shard,
        "all-gather": 2 * 8 * shard * 7 / 8,
        "all-reduce": 2 * 2 * (2 * 2048 * 2048) * 1 / 2,
    }


def test_kernels_are_listed_with_their_arrays():
    calls = {call.name: call for call in tpu("kernels_v5p").custom_calls}
    splash, grouped = calls["splash_mha_fwd_no_residuals"], calls["ragged-dot-none"]
    assert (splash.target, splash.count, splash.flops) == ("tpu_custom_call", 3, 0)
    assert str(splash.results[-1]) == "bf16[2,4,1024,128]"
    assert [str(shape) for shape in splash.operands].count("bf16[2,4,1024,128]") == 3
    # Its author says what it costs: each of 1024 rows meets one matrix of 512 x 256.
    assert (grouped.count, grouped.flops) == (1, 2 * 1024 * 512 * 256)
    assert tpu("kernels_v5p").matmul_flops == 0


# --- Compiled here --------------------------------------------------------------------------------


def test_a_program_compiled_here():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))

    def layer(x, w):
        return jax.lax.psum(jnp.tanh(x) @ w, "y"), None

    def program(w, x):
        return jax.lax.scan(layer, x, w)[0]

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(P(None, "y"), P("x")), out_specs=P("x"), check_vma=False
    )
    w = jax.ShapeDtypeStruct((5, 128, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    module = hlo.read(jax.jit(mapped).lower(w, x).compile().as_text())
    assert module.devices == 8
    assert [(loop.trips, loop.count) for loop in module.loops] == [(5, 1)]
    (matmul,) = module.matmuls
    assert (matmul.flops, matmul.count) == (2 * 8 * 64 * 64, 5)
    # The result, 8 rows of 64 in float32, goes around a ring of two; the weight is already there.
    inside = [c for c in module.collectives if c.count == 5]
    assert [(c.kind, c.group_size, c.wire_bytes) for c in inside] == [("all-reduce", 2, 4 * 8 * 64)]


@pytest.mark.parametrize("seed", range(8))
def test_convolutions_as_xla_counts_them(seed):
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    groups = pick(1, 2)
    grouped = pick("feature_group_count", "batch_group_count")
    batches, inputs, outputs = 4 * rng.integers(1, 3), 4 * rng.integers(1, 3), 4
    kernel = (int(rng.integers(1, 5)), int(rng.integers(1, 4)))
    depth = inputs // groups if grouped == "feature_group_count" else inputs
    lhs = jax.ShapeDtypeStruct((int(batches), int(inputs), 9, 7), jnp.float32)
    rhs = jax.ShapeDtypeStruct((outputs, int(depth), *kernel), jnp.float32)
    lowered = jax.jit(
        lambda a, b: jax.lax.conv_general_dilated(
            a,
            b,
            window_strides=(pick(1, 2), pick(1, 3)),
            padding=((int(rng.integers(0, 4)), 2), (1, int(rng.integers(0, 3)))),
            lhs_dilation=(pick(1, 3), pick(1, 2)),
            rhs_dilation=(pick(1, 2), pick(1, 2)),
            **{grouped: groups},
        )
    ).lower(lhs, rhs)
    expected = lowered.cost_analysis()["flops"]
    assert expected > 0
    text = lowered.compiler_ir("hlo").as_hlo_module().to_string()
    assert hlo.read(text).matmul_flops == expected


# --- The grammar ----------------------------------------------------------------------------------


def test_types():
    tiled, scalar, chip = shapes(
        "(bf16[3,80,130]{2,1,0:T(8,128)(2,1)}, /*index=5*/pred[], s4[16]{0:T(128)S(1)})"
    )
    assert (tiled.dims, tiled.bytes, tiled.padded_bytes) == ((3, 80, 130), 62400, 3 * 80 * 256 * 2)
    assert (scalar.bytes, scalar.space) == (1, 0)
    assert (chip.bytes, chip.padded_bytes, chip.space) == (8, 64, 1)
    (columns,) = shapes("f32[100,3]{0,1:T(4,128)}")  # the first dimension is the minor one
    assert columns.padded_bytes == 128 * 4 * 4


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a', 'b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_group_sizes(groups, n):
    module = written(
        f"""
        %p = f32[128]{{0}} parameter(0)
        ROOT %g = f32[{128 * n}]{{0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}
        """
    )
    (gather,) = module.collectives
    assert (gather.group_size, gather.wire_bytes) == (n, 512 * (n - 1))


def test_async_pairs_count_once_and_tuples_sum():
    module = written(
        """
        %p = f32[128]{0} parameter(0)
        %q = bf16[64]{0} parameter(1)
        %s = (f32[128]{0}, f32[1024]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
        %d = f32[1024]{0} all-gather-done(%s)
        %r = (f32[128]{0}, bf16[64]{0}) all-reduce(%p, %q), replica_groups=[1,8]<=[8], to_apply=%add
        %t = ((f32[1024]{0}), f32[128]{0}) async-start(%d), calls=%scatter
        ROOT %e = f32[128]{0} async-done(%t)
        """,
        rest="""
        %scatter (x: f32[1024]) -> f32[128] {
          %x = f32[1024]{0} parameter(0)
          ROOT %y = f32[128]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}
        }
        """,
    )
    assert module.collective_bytes == {
        "all-gather": 7 * 512,
        "all-reduce": 2 * (512 + 128) * 7 / 8,
        "reduce-scatter": 7 * 512,
    }


def test_a_fused_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    module = written(
        """
        %p = f32[1024]{0} parameter(0)
        ROOT %f = f32[128]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
        """,
        rest="""
        %all-reduce-scatter (x: f32[1024]) -> f32[128] {
          %x = f32[1024]{0} parameter(0)
          %i = u32[] partition-id()
          %r = f32[1024]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
          ROOT %y = f32[128]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={128}
        }
        """,
    )
    assert module.collective_bytes == {"reduce-scatter": 4096 * 7 / 8}


LOOP = """
%body (p: (s32[], s32[])) -> (s32[], s32[]) {{
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant({step})
  %j = s32[] add(%i, %one)
  %a = f32[8,16]{{1,0}} constant({{...}})
  %m = f32[8,8]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
  ROOT %t = (s32[], s32[]) tuple(%j, %n)
}}

%condition (p: (s32[], s32[])) -> pred[] {{
  %q = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %limit = s32[] get-tuple-element(%q), index=1
  ROOT %c = pred[] compare({compared}), direction={direction}
}}
"""


@pytest.mark.parametrize(
    ("start", "limit", "step", "direction", "trips"),
    [
        ("constant(0)", "constant(10)", 1, "LT", 10),
        ("constant(0)", "constant(10)", 3, "LT", 4),
        ("constant(2)", "constant(10)", 1, "LE", 9),
        ("constant(2)", "constant(10)", 1, "GT", 8),
        ("constant(0)", "constant(10)", 1, "NE", None),
        ("constant(0)", "custom-call(), custom_call_target=\"x\"", 1, "LT", None),
    ],
)  # fmt: skip
def test_turns_of_a_loop(start, limit, step, direction, trips):
    compared = "%limit, %k" if direction == "GT" else "%k, %limit"
    module = written(
        f"""
        %start = s32[] {start}
        %end = s32[] {limit}
        %copy = s32[] copy(%end)
        %state = (s32[], s32[]) tuple(%start, %copy)
        ROOT %w = (s32[], s32[]) while(%state), condition=%condition, body=%body
        """,
        rest=LOOP.format(step=step, compared=compared, direction=direction),
    )
    assert [loop.trips for loop in module.loops] == [trips]
    assert module.unknown_loops == (("w",) if trips is None else ())
    assert module.matmul_flops == (trips or 1) * 2 * 8 * 8 * 16


# --- Memory ---------------------------------------------------------------------------------------


def test_memory_traffic_counts_slices_and_what_is_on_chip():
    module = written(
        """
        %p = f32[64,1024]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %a = f32[1,1024]{1,0} fusion(%p, %i), kind=kLoop, calls=%slice
        %v = f32[1,1024]{1,0:S(1)} fusion(%p, %i), kind=kLoop, calls=%slice
        %b = f32[1,1024]{1,0} add(%a, %v)
        ROOT %u = f32[64,1024]{1,0} fusion(%p, %b, %i), kind=kLoop, calls=%update
        """,
        rest="""
        %slice (x: f32[64,1024], i: s32[]) -> f32[1,1024] {
          %x = f32[64,1024]{1,0} parameter(0)
          %j = s32[] parameter(1)
          ROOT %s = f32[1,1024]{1,0} dynamic-slice(%x, %j, %j), dynamic_slice_sizes={1,1024}
        }

        %update (x: f32[64,1024], y: f32[1,1024], i: s32[]) -> f32[64,1024] {
          %x = f32[64,1024]{1,0} parameter(0)
          %y = f32[1,1024]{1,0} parameter(1)
          %j = s32[] parameter(2)
          ROOT %s = f32[64,1024]{1,0} dynamic-update-slice(%x, %y, %j, %j)
        }
        """,
    )
    row = 4 * 1024
    index = 3 * 4  # read by three fusions
    # slice: in, out; slice into the chip: in; add: in, out; update: in, out.
    assert module.hbm_bytes == 7 * row + index
    assert module.hbm_read == 4 * row + index
    assert [(t.opcode, t.shape, t.read, t.written, t.count) for t in module.transfers] == [
        ("fusion", "f32[64,1024]", row + 4, row, 2),
        ("fusion", "f32[64,1024]", row + 4, 0, 1),
        ("add", "f32[1,1024]", row, row, 1),
    ]  # fmt: skip


def test_memory_traffic_of_what_is_reordered_inside_a_fusion():
    """A slice of a weight in another layout is read, as XLA:TPU writes it; the whole one where the
    copy is all that the fusion does."""
    module = written(
        """
        %p = s8[64,1024]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %a = s8[1,1024]{1,0:S(1)} fusion(%p, %i), kind=kLoop, calls=%slice
        ROOT %c = s8[64,1024]{1,0} fusion(%p), kind=kLoop, calls=%order
        """,
        rest="""
        %order (x: s8[64,1024]) -> s8[64,1024] {
          %x = s8[64,1024]{1,0} parameter(0)
          ROOT %y = s8[64,1024]{1,0} copy(%x)
        }

        %view (x: s8[64,1024]) -> s8[64,1024] {
          %x = s8[64,1024]{1,0} parameter(0)
          %f = s8[64,1024]{1,0} fusion(%x), kind=kLoop, calls=%order
          ROOT %y = s8[64,1024]{1,0} bitcast(%f)
        }

        %slice (x: s8[64,1024], i: s32[]) -> s8[1,1024] {
          %x = s8[64,1024]{1,0} parameter(0)
          %v = s8[64,1024]{1,0} fusion(%x), kind=kLoop, calls=%view
          %j = s32[] parameter(1)
          ROOT %s = s8[1,1024]{1,0} dynamic-slice(%v, %j, %j), dynamic_slice_sizes={1,1024}
        }
        """,
    )
    reads = {t.read for t in module.transfers}
    assert reads == {64 * 1024, 1024 + 4}


def test_memory_traffic_of_copies_between_chip_and_memory():
    module = written(
        """
        %p = f32[64]{0} parameter(0)
        %in = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%p)
        %there = f32[64]{0:S(1)} copy-done(%in)
        %out = (f32[64]{0}, f32[64]{0:S(1)}, u32[]{:S(2)}) copy-start(%there)
        ROOT %back = f32[64]{0} copy-done(%out)
        """
    )
    assert module.hbm_read == 256 and module.hbm_bytes == 512


def test_the_largest_buffers_come_first():
    module = written(
        """
        %p = f32[64]{0} parameter(0)
        %a = f32[64,64]{1,0} broadcast(%p), dimensions={0}, metadata={op_name="jit(f)/wide"}
        %b = f32[64,64]{1,0} broadcast(%p), dimensions={1}, metadata={op_name="jit(f)/wide"}
        %c = f32[128,128]{1,0:S(1)} broadcast(%p), dimensions={}
        ROOT %t = (f32[64,64]{1,0}, f32[64,64]{1,0}) tuple(%a, %b)
        """
    )
    first, second = module.buffers
    assert (str(first.shape), first.opcode, first.op_name, first.count) == (
        "f32[64,64]", "broadcast", "jit(f)/wide", 2
    )  # fmt: skip
    assert (str(second.shape), second.opcode) == ("f32[64]", "parameter")


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.read("module @jit_f attributes {}\n")


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,4},{1,5}}", [(0, 4), (1, 5)]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        # Rows of this mesh are (0, 4), (1, 5), (2, 6), (3, 7).
        (
            "replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}",
            [(0, 1, 2, 3), (4, 5, 6, 7)],
        ),
        (
            "replica_groups=mesh['w'=1,'x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}",
            [(0, 4), (1, 5), (2, 6), (3, 7)],
        ),
        (
            "replica_groups=mesh['x'=2,'y'=4], device_ids=([8]) {'x'}",
            [(0, 4), (1, 5), (2, 6), (3, 7)],
        ),
        ("replica_groups={}", [tuple(range(8))]),
    ],
)
def test_who_is_in_a_group(groups, members):
    made = Instruction("g", "all-gather", "", (), f"all-gather(%p), {groups}, dimensions={{0}}")
    assert hlo_collectives.groups(made, 8) == members


@pytest.mark.parametrize(
    "form",
    [
        "replica_groups=mesh['x'=2,'y'=4], device_ids=(7,6,5) {'x'}",
        "replica_groups=V4<2,4>",
        "source_target_pairs=[4,2]<=[8]",
    ],
)
def test_a_group_in_an_unknown_form_is_refused(form):
    made = Instruction("g", "all-gather", "", (), f"all-gather(%p), {form}, a=0")
    with pytest.raises(ValueError, match="g is written in an unknown form: "):
        hlo_collectives.groups(made, 8)


@pytest.mark.parametrize(
    ("granules", "groups", "n", "network"),
    [
        ([0] * 8, "[1,8]<=[8]", 8, 0),
        ([0] * 4 + [1] * 4, "[2,4]<=[8]", 4, 0),  # each group in one
        # Of 4,096 bytes half come from the other host; each of its 4 devices fetches a quarter.
        ([0] * 4 + [1] * 4, "[1,8]<=[8]", 8, 4096 / 2 / 4),
        ([0, 0, 1, 1, 2, 2, 3, 3], "[1,8]<=[8]", 8, 4096 * 3 / 4 / 2),
        ([0] * 4 + [1] * 4, "[4,2]<=[2,4]T(1,0)", 2, 4096 / 2),  # nothing to share
    ],
)
def test_what_comes_from_other_hosts(granules, groups, n, network):
    body = f"""
        %p = f32[{1024 // n}]{{0}} parameter(0)
        ROOT %g = f32[1024]{{0}} all-gather(%p), replica_groups={groups}, dimensions={{0}}
        """
    assert written(body, granules=granules).network_bytes == network


@pytest.mark.parametrize(
    ("kind", "target", "network"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', 4096),
        ("ALL_REDUCE", '"{1:4}x{0:3}"', 2 * 4096 * 3 / 4),
        ("ALL_REDUCE", "{{100000,300000},{200000,400000}}", 4096),
        ("ALL_GATHER", '"{1,2}x{0:3}"', 4096 / 2),
        ("REDUCE_SCATTER", '"{1,2}x{0:3}"', 4096),  # what is received is the sum's half
        ("ALL_TO_ALL", "{{100000,200000},{100001,200001}}", 4096 / 2),
        ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", 4096),
    ],
)
def test_what_slices_exchange_by_way_of_their_hosts(kind, target, network):
    said = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"'
    said = f'is_host_transfer=true, frontend_attributes={{a="b",{said},c="d"}}'
    body = f"""
        %p = f32[8,128]{{1,0}} parameter(0)
        %t = token[] after-all()
        %s = (f32[8,128]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=2, {said}
        %e = token[] send-done(%s), channel_id=2, is_host_transfer=true
        %r = (f32[8,128]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {said}
        ROOT %d = (f32[8,128]{{1,0}}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true
        """
    module = written(body, granules=[0] * 4 + [1] * 4)
    assert module.network_bytes == network and not sum(module.collective_bytes.values())


@pytest.mark.parametrize(
    "said",
    ['target="all",TYPE="ALL_REDUCE"', 'target="{1}x{0}",TYPE="SOME"', 'target="{1,2}x{0}"'],
)
def test_an_exchange_in_an_unknown_form_is_refused(said):
    said = "_xla_megascale_" + said.replace("TYPE", "_xla_megascale_transfer_type")
    body = f"%r = (f32[8]{{0}}, u32[], token[]) recv(%t), frontend_attributes={{{said}}}"
    with pytest.raises(ValueError, match="r is written in an unknown form: "):
        written(body)


# --- Conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"],
)
def test_a_branch_runs_as_often_as_it_is_said_to_be_taken(branches):
    """Of a condition false one time in four; each branch every time where nothing is said."""
    text = f"""HloModule m

%small (a: f32[2,3]) -> f32[2,2] {{
  %a = f32[2,3]{{1,0}} parameter(0)
  ROOT %d = f32[2,2]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
}}

%large (b: f32[8,3]) -> f32[2,2] {{
  %b = f32[8,3]{{1,0}} parameter(0)
  ROOT %e = f32[8,8]{{1,0}} dot(%b, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
}}

ENTRY %main (p: pred[], a: f32[2,3], b: f32[8,3]) -> f32[2,2] {{
  %p = pred[] parameter(0)
  %a = f32[2,3]{{1,0}} parameter(1)
  %b = f32[8,3]{{1,0}} parameter(2)
  ROOT %c = f32[2,2]{{1,0}} conditional(%p, %a, %b), {branches}, metadata={{op_name="x/which/cond"}}
}}
"""
    small, large = 2 * 2 * 2 * 3, 2 * 8 * 8 * 3
    assert hlo.read(text).matmul_flops == small + large
    assert hlo.read(text, branches={"other": (0, 0)}).matmul_flops == small + large
    told = hlo.read(text, branches={"which/": (0.25, 0.75)})
    assert told.matmul_flops == 0.25 * small + 0.75 * large
