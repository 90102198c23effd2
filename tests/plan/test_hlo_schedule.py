"""The compiler's order in seconds, against sums by hand and against what `hlo` counts."""

import math
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from echovlm_jax.plan import hlo
from echovlm_jax.plan.hlo_schedule import Rates, scheduled_seconds
from echovlm_jax.plan.hlo_text import Text, parse

MODULES = sorted((Path(__file__).parent / "hlo").glob("*.txt"))
NOTHING = Rates(math.inf)
# A product of [1000, 1000] by itself is 2 s; its three arrays are 12 s of memory. To gather an
# eighth of such an array is 7/2 s.
RATES = Rates(1e9, 1e6, 1e6)
PRODUCT = "f32[1000,1000]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
GATHER = "(f32[125,1000]{1,0}, f32[1000,1000]{1,0}) all-gather-start(%b), replica_groups=[1,8]<=[8]"
WAITED = "f32[1000,1000]{1,0} all-gather(%b), replica_groups=[1,8]<=[8]"
ARRAYS = "%a = f32[1000,1000]{1,0} parameter(0)\n%b = f32[125,1000]{1,0} parameter(1)\n"


def entry(*lines: str, rest: str = "") -> Text:
    body = textwrap.indent(ARRAYS + "\n".join(lines), "  ")
    return parse(
        f"HloModule m, is_scheduled=true, num_partitions=8\n{textwrap.dedent(rest)}\n"
        f"ENTRY %main () -> () {{\n{body}\n}}\n"
    )


def of(module: Text, **rates: float) -> float:
    return scheduled_seconds(module, NOTHING._replace(**rates))


NETWORK = {"flops": 1e9, "links": 1e6}


def test_a_collective_runs_beside_what_stands_between_its_start_and_its_done():
    start, done = f"%s = {GATHER}", "%d = f32[1000,1000]{1,0} all-gather-done(%s)"
    one, two, three = (f"%p{n} = {PRODUCT}" for n in range(3))
    assert of(entry(start, one, done), **NETWORK) == 3.5
    assert of(entry(start, one, two, done, three), **NETWORK) == 6.0
    assert of(entry(start, done, one, two), **NETWORK) == 3.5 + 4.0
    assert of(entry(f"%g = {WAITED}", one, two), **NETWORK) == 3.5 + 4.0
    # Who is never waited for is waited for at the end.
    assert of(entry(one, start), **NETWORK) == 2.0 + 3.5


def test_what_slices_exchange_runs_beside_what_stands_between_too():
    said = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    lines = (
        "%t = token[] after-all()",
        f"%r = (f32[500,1000]{{1,0}}, u32[], token[]) recv(%t), frontend_attributes={{{said}}}",
        f"%p = {PRODUCT}",
        "%d = (f32[500,1000]{1,0}, token[]) recv-done(%r)",
    )
    assert of(entry(*lines), flops=1e9, network=1e6) == 2.0
    assert of(entry(*lines), flops=1e9, network=0.5e6) == 4.0
    assert of(entry(*lines, f"%q = {PRODUCT}"), flops=1e9, network=0.5e6) == 6.0


def test_collectives_follow_one_another():
    lines = (
        f"%s = {GATHER}", f"%t = {GATHER}", f"%p = {PRODUCT}",
        "%d = f32[1000,1000]{1,0} all-gather-done(%s)",
        f"%q = {PRODUCT}",
        "%e = f32[1000,1000]{1,0} all-gather-done(%t)",
    )  # fmt: skip
    assert of(entry(*lines), **NETWORK) == 7.0


def test_an_operation_waits_for_its_memory_where_that_takes_longer():
    assert of(entry(f"%p = {PRODUCT}"), flops=1e9, memory=1e6) == 12.0
    assert of(entry(f"%p = {PRODUCT}"), flops=1e8, memory=1e6) == 20.0
    # A copy to the chip takes its time beside a product, and from the next one's.
    copy = "%c = (f32[1000,1000]{1,0:S(1)}, f32[1000,1000]{1,0}, u32[]) copy-start(%a)"
    done = "%d = f32[1000,1000]{1,0:S(1)} copy-done(%c)"
    on_chip = "%p = f32[1000,1000]{1,0:S(1)} dot(%d, %d), lhs_contracting_dims={1}"
    assert of(entry(copy, done), memory=1e6) == 4.0
    slow = f"%q = {PRODUCT}"
    assert of(entry(copy, done, on_chip), flops=1e9, memory=1e6) == 6.0
    assert of(entry(copy, slow, done, on_chip), flops=1e9, memory=1e6) == 4.0 + 12.0
    # What touches memory for a moment does not wait for the copy.
    moment = "%m = f32[2]{0} add(%n, %n)"
    others = "%n = f32[2]{0} parameter(2)\n%e = f32[1000,1000]{1,0:S(1)} parameter(3)"
    late = "%p = f32[1000,1000]{1,0:S(1)} dot(%e, %e), lhs_contracting_dims={1}"
    found = of(entry(others, copy, moment, late, done), flops=5e8, memory=1e6)
    assert found == pytest.approx(4.0, rel=1e-4)


def test_a_loop_takes_its_turns_and_each_ends_what_it_began():
    rest = f"""
    %body (s: s32[]) -> s32[] {{
      %s = (s32[], f32[1000,1000]{{1,0}}, f32[125,1000]{{1,0}}) parameter(0)
      %a = f32[1000,1000]{{1,0}} get-tuple-element(%s), index=1
      %b = f32[125,1000]{{1,0}} get-tuple-element(%s), index=2
      %i.0 = s32[] get-tuple-element(%s), index=0
      %g = {GATHER}
      %p = {PRODUCT}
      %h = f32[1000,1000]{{1,0}} all-gather-done(%g)
      ROOT %t = (s32[], f32[1000,1000]{{1,0}}, f32[125,1000]{{1,0}}) tuple(%i.0, %a, %b)
    }}

    %condition (s: s32[]) -> pred[] {{
      %s.1 = (s32[], f32[1000,1000]{{1,0}}, f32[125,1000]{{1,0}}) parameter(0)
      ROOT %yes = pred[] constant(true)
    }}
    """
    loop = (
        "%zero = s32[] constant(0)",
        "%start = (s32[], f32[1000,1000]{1,0}, f32[125,1000]{1,0}) tuple(%zero, %a, %b)",
        "ROOT %w = (s32[], f32[1000,1000]{1,0}, f32[125,1000]{1,0}) while(%start),"
        " condition=%condition, body=%body,"
        ' backend_config={"known_trip_count":{"n":"10"}}',
    )
    assert of(entry(f"%x = {PRODUCT}", *loop, rest=rest), **NETWORK) == 2.0 + 10 * 3.5


def test_what_is_wrapped_for_another_stream_is_what_it_wraps():
    rest = """
    %async (a: f32[1000,1000]) -> f32[125,1000] {
      %x = f32[1000,1000]{1,0} parameter(0)
      ROOT %r = f32[125,1000]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}
    }
    """
    lines = (
        "%s = ((f32[1000,1000]{1,0}), f32[125,1000]{1,0}) async-start(%a), calls=%async",
        f"%p = {PRODUCT}",
        "%d = f32[125,1000]{1,0} async-done(%s)",
        f"%q = {PRODUCT}",
    )
    assert of(entry(*lines, rest=rest), **NETWORK) == 3.5 + 2.0
    assert of(entry(lines[0], lines[2], rest=rest), memory=1e6) == 4.5


def test_fusions_that_begin_and_end_collectives():
    """As XLA:TPU writes them: one may end a collective and begin the next, beside a product."""

    def fusion(name: str, *marks: str) -> str:
        gather = "f32[1000,1000]{1,0} all-gather(%y), replica_groups=[1,8]<=[8]"
        config = 'backend_config={"async_collective_fusion_config":{}}'
        lines = [
            f"%{name}.g{n} = {gather}, channel_id={mark[1:]}, {config}\n"
            f"  %{name}.c{n} = (f32[8]{{0}}) custom-call(%{name}.g{n}),"
            f' custom_call_target="AsyncCollective{"Start" if mark[0] == "s" else "Done"}"'
            for n, mark in enumerate(marks)
        ]
        product = f"  ROOT %{name}.p = {PRODUCT.replace('%a', '%x')}"
        return "\n".join(
            [
                f"%{name} (x: f32[1000,1000]) -> f32[1000,1000] {{",
                "  %x = f32[1000,1000]{1,0} parameter(0)",
                "  %y = f32[125,1000]{1,0} parameter(1)",
                *(f"  {line}" for line in lines),
                f"{product}\n}}\n",
            ]
        )

    rest = "\n".join([fusion("one", "s7"), fusion("two", "d7", "s8"), fusion("three", "d8")])
    call = "%{0}.f = f32[1000,1000]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%{0}"
    one, two, three = (call.format(name) for name in ("one", "two", "three"))
    between = [f"%p{n} = {PRODUCT}" for n in range(2)]
    # 3.5 s for the first, beside 2 s of products; then 2 and 4 s beside the second; then 2.
    lines = entry(one, two, *between, three, rest=rest)
    assert of(lines, **NETWORK) == 3.5 + 2.0 + 4.0 + 2.0
    assert of(entry(one, two, three, rest=rest), **NETWORK) == 3.5 + 3.5 + 2.0


def test_what_spans_a_loop_runs_beside_it_unless_it_has_collectives():
    body = """
    %%body (s: s32[]) -> s32[] {
      %%s = (s32[], f32[1000,1000]{1,0}, f32[125,1000]{1,0}) parameter(0)
      %%a.1 = f32[1000,1000]{1,0} get-tuple-element(%%s), index=1
      %%b.1 = f32[125,1000]{1,0} get-tuple-element(%%s), index=2
      %%i.0 = s32[] get-tuple-element(%%s), index=0
      %%x = %s
      ROOT %%t = (s32[], f32[1000,1000]{1,0}, f32[125,1000]{1,0}) tuple(%%i.0, %%a.1, %%b.1)
    }

    %%condition (s: s32[]) -> pred[] {
      %%s.1 = (s32[], f32[1000,1000]{1,0}, f32[125,1000]{1,0}) parameter(0)
      ROOT %%yes = pred[] constant(true)
    }
    """
    lines = (
        f"%g = {GATHER}",
        "%zero = s32[] constant(0)",
        "%start = (s32[], f32[1000,1000]{1,0}, f32[125,1000]{1,0}) tuple(%zero, %a, %b)",
        "%w = (s32[], f32[1000,1000]{1,0}, f32[125,1000]{1,0}) while(%start),"
        ' condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"N"}}',
        "%d = f32[1000,1000]{1,0} all-gather-done(%g)",
    )

    def takes(turns: int, inside: str) -> float:
        text = [line.replace('"N"', f'"{turns}"') for line in lines]
        return of(entry(*text, rest=body % inside), **NETWORK)

    product, gather = PRODUCT.replace("%a", "%a.1"), WAITED.replace("%b", "%b.1")
    assert takes(10, product) == 20.0
    assert takes(10, gather) == 3.5 + 35.0
    assert takes(0, product) == 3.5  # what never runs, loops within it too


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_alone_each_resource_takes_what_it_has_to_do(path):
    """Written by the TPU compiler, which spreads collectives over fusions."""
    module, found = parse(path.read_text()), hlo.read(path.read_text())
    wire = sum(found.collective_bytes.values())
    declared = sum(call.flops * call.count for call in found.custom_calls)
    assert of(module, flops=1.0) == pytest.approx(found.matmul_flops + declared)
    assert of(module, links=1.0) == pytest.approx(wire)
    assert of(module, memory=1.0) == pytest.approx(found.hbm_bytes)
    products, links = of(module, flops=1e12), of(module, links=1e9)
    both = of(module, flops=1e12, links=1e9)
    assert max(products, links) <= both * (1 + 1e-9)
    assert both <= (products + links) * (1 + 1e-9)
    if path.stem == "fsdp_v5e":  # its gathers are begun before the products that hide them
        assert both < 0.95 * (products + links)


def test_a_program_compiled_here():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = (
        jax.ShapeDtypeStruct((64, 64), "float32"),
        jax.ShapeDtypeStruct((5, 64, 64), "float32"),
    )
    module = parse(jax.jit(f).lower(*shapes).compile().as_text() or "")
    assert of(module, flops=1.0) == 5 * 2 * 64**3
    assert of(module) == 0.0
    assert of(module, memory=1.0) >= 5 * 64 * 64 * 4
