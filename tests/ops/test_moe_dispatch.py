"""The three dispatches are one function: equal in values and gradients, on every kind of mesh."""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echovlm_jax.errors import InputError
from echovlm_jax.ops.layout import Layout
from echovlm_jax.ops.moe import einsum as moe_einsum
from echovlm_jax.ops.moe.dispatch import DISPATCHES, Experts, Routing, moe, route
from echovlm_jax.ops.product import grouped

AXES = ("data", "fsdp", "expert", "tensor", "sequence")
LAYOUT = Layout(
    (
        ("batch", ("data", "fsdp", "expert")),
        ("length", ("sequence",)),
        ("mlp", ("tensor",)),
        ("expert", ("expert",)),
        ("expert_embed", ("fsdp",)),
        ("expert_mlp", ("tensor",)),
    )
)
# Every axis is split in one that isn't slow, and the experts' with each other one in some.
MESHES = [
    (1, 2, 4, 1, 1),
    (1, 1, 2, 2, 2),
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in [
            (8, 1, 1, 1, 1),
            (1, 8, 1, 1, 1),
            (2, 2, 2, 1, 1),
            (1, 1, 4, 2, 1),
            (1, 2, 1, 2, 2),
            (2, 1, 2, 1, 2),
        ]
    ),
]
# Each use has a stream of its own.
SEEDS = np.random.SeedSequence(20240611).generate_state(64)


def normal(seed, *shape):
    return np.random.default_rng(SEEDS[seed]).normal(size=shape).astype(np.float32)


def make_experts(count, f=8, d=16):
    scale = 1 / math.sqrt(d)
    shapes = ((count, f, d), (count, f, d), (count, d, f))
    return Experts(*(normal(i, *shape) * scale for i, shape in enumerate(shapes)))


def make_routing(kind, b=8, t=12, e=4, k=2):
    """Routings that a form could get wrong. Weights are in no order, so that none can matter."""
    logits = normal(10, b, t, e)
    if kind == "one expert":  # k = 1, or every expert is chosen by somebody
        k, logits[..., 2] = 1, 50.0
    elif kind == "two experts":  # two of four have no token at all
        logits[..., [1, 3]] = 50.0 + normal(11, b, t, 2)
    elif kind == "ties":
        logits[:] = 0.0
    elif kind == "every expert":
        k = e
    elif kind == "first of a shard":
        logits[..., :2] += 50.0
    expert = route(logits, top_k=k, normalize=False).expert
    return Routing(expert, jnp.asarray(np.abs(normal(12, b, t, k)) + 0.1))


KINDS = ("even", "one expert", "two experts", "ties", "every expert", "first of a shard")


@functools.partial(jax.jit, static_argnames=("options",))
def evaluate(x, routing, experts, valid, ct, *, options):
    """Value, dropped, and the gradients of x, the routing weights and the experts."""

    def objective(x, weight, experts):
        y, dropped = moe(x, Routing(routing.expert, weight), experts, valid=valid, **dict(options))
        return jnp.sum(y * ct), (y, dropped)

    gradient = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)
    gradients, (y, dropped) = gradient(x, routing.weight, experts)
    return (y, *gradients), dropped


def run(x, routing, experts, valid, **options):
    ct = normal(20, *x.shape)
    return evaluate(x, routing, experts, valid, ct, options=tuple(options.items()))


def assert_equal(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3))


def by_loop(x, routing, experts, valid, keep=None):
    """Σ over kept choices in float64, token by token."""
    gate, up, down = (np.asarray(w, np.float64) for w in experts)
    expert, weight = np.asarray(routing.expert), np.asarray(routing.weight, np.float64)
    y = np.zeros(x.shape)
    for b, t, k in np.ndindex(*expert.shape):
        if valid[b, t] and (keep is None or keep[b, t, k]):
            e, token = expert[b, t, k], x[b, t].astype(np.float64)
            g = gate[e] @ token
            y[b, t] += weight[b, t, k] * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ token)))
    return y


def some_valid(b=8, t=12):
    valid = np.random.default_rng(SEEDS[30]).random((b, t)) < 0.8
    valid[1] = False  # a row of nothing but padding
    return valid


def inputs(kind):
    """x, routing, experts, valid."""
    return normal(3, 8, 12, 16), make_routing(kind), make_experts(4), some_valid()


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_form_equals_a_loop_and_the_dense_gradients(dispatch, kind):
    x, routing, experts, valid = inputs(kind)
    ours, dropped = run(x, routing, experts, valid, dispatch=dispatch, group_size=7)
    assert_equal(ours[0], by_loop(x, routing, experts, valid))
    assert_equal(ours, run(x, routing, experts, valid)[0])
    assert dropped == 0
    assert not np.any(np.asarray(ours[0])[~valid])


@pytest.mark.parametrize(("b", "t", "e", "k"), [(1, 1, 4, 2), (2, 1, 5, 2), (1, 3, 8, 2)])
def test_few_tokens_read_their_own_experts_alone(b, t, e, k):
    x, experts = normal(20, b, t, 16), make_experts(e)
    routing = make_routing("even", b, t, e, k)
    valid = np.ones((b, t), bool)
    valid[-1, -1] = b * t == 1
    found, _ = moe(jnp.asarray(x), routing, experts, valid=jnp.asarray(valid))
    text = jax.jit(lambda *a: moe(*a)[0]).lower(x, routing, experts).as_text()
    assert f"tensor<{b}x{t}x{e}x8xf32>" not in text  # what all experts would make of them
    np.testing.assert_allclose(found, by_loop(x, routing, experts, valid), atol=1e-5)


@pytest.mark.parametrize("dispatch", ["ragged", "einsum"])
@pytest.mark.parametrize(("count", "top_k"), [(3, 2), (5, 1), (1, 1)])
def test_any_number_of_experts_and_choices(dispatch, count, top_k):
    x, experts = normal(4, 2, 9, 16), make_experts(count)
    routing = make_routing("even", 2, 9, count, top_k)
    everyone = np.ones((2, 9), bool)
    ours, _ = run(x, routing, experts, everyone, dispatch=dispatch, group_size=4)
    assert_equal(ours, run(x, routing, experts, everyone)[0])


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_an_expert_without_tokens_has_no_gradient(dispatch):
    routing, valid = make_routing("two experts"), some_valid()
    ours, _ = run(normal(3, 8, 12, 16), routing, make_experts(4), valid, dispatch=dispatch)
    for gradient in ours[3]:
        assert not np.any(np.asarray(gradient)[[0, 2]])
        assert np.all(np.any(np.asarray(gradient)[[1, 3]], axis=(1, 2)))


def keep_by_queue(expert, valid, group_size, places, count):
    """Which choices find a place, one by one: all first choices of a group before its second."""
    flat, counted = expert.reshape(-1, expert.shape[-1]), valid.reshape(-1)
    keep = np.zeros(flat.shape, bool)
    for start in range(0, len(flat), group_size):
        taken = [0] * count
        for k in range(flat.shape[1]):
            for i in range(start, min(start + group_size, len(flat))):
                if counted[i] and taken[flat[i, k]] < places:
                    keep[i, k] = True
                    taken[flat[i, k]] += 1
    return keep.reshape(expert.shape)


@pytest.mark.parametrize("kind", ["even", "two experts", "ties", "one expert"])
@pytest.mark.parametrize("factor", [0.3, 1.25])
def test_capacity_drops_the_last_choices(kind, factor):
    x, routing, experts, valid = inputs(kind)
    top_k = routing.expert.shape[-1]
    places = moe_einsum.capacity(10, 4, top_k, factor)
    assert places == min(10, math.ceil(factor * top_k * 10 / 4))
    keep = keep_by_queue(np.asarray(routing.expert), valid, 10, places, 4)
    options = {"dispatch": "einsum", "group_size": 10, "capacity_factor": factor}
    (y, *_), dropped = run(x, routing, experts, valid, **options)
    assert_equal(y, by_loop(x, routing, experts, valid, keep))
    assert dropped == np.sum(valid[..., None] & ~keep)


def test_capacity_exactly_full_drops_nothing_and_one_more_choice_does():
    x, experts, everyone = normal(3, 1, 8, 16), make_experts(4), np.ones((1, 8), bool)
    even = np.stack([np.arange(8) % 4, (np.arange(8) + 1) % 4], -1)[None]  # four each
    weight = np.abs(normal(5, 1, 8, 2))
    options = {"dispatch": "einsum", "group_size": 8, "capacity_factor": 1.0}
    (y, *_), dropped = run(x, Routing(even, weight), experts, everyone, **options)
    assert dropped == 0
    assert_equal(y, by_loop(x, Routing(even, weight), experts, everyone))
    even[0, 7, 1] = 2  # expert 2 has five now; the second choice of the last token comes last
    (y, *_), dropped = run(x, Routing(even, weight), experts, everyone, **options)
    assert dropped == 1
    keep = np.ones((1, 8, 2), bool)
    keep[0, 7, 1] = False
    assert_equal(y, by_loop(x, Routing(even, weight), experts, everyone, keep))


def make_mesh(sizes):
    return Mesh(np.array(jax.devices()).reshape(sizes), AXES)


@functools.cache
def unsharded(kind):
    return run(*inputs(kind))


def placed(mesh, x, routing, experts, valid):
    """The inputs, laid out as a training step has them."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), "sequence"))
    specs = [("expert", "tensor", "fsdp")] * 2 + [("expert", "fsdp", "tensor")]
    x, routing, valid = jax.device_put((x, routing, valid), rows)
    weights = (
        jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*spec)))
        for weight, spec in zip(experts, specs, strict=True)
    )
    return x, routing, Experts(*weights), valid


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sharded_equals_unsharded(sizes, dispatch):
    mesh = make_mesh(sizes)
    # One program a mesh: routings of one shape.
    for kind in ("two experts", "ties", "first of a shard"):
        with jax.set_mesh(mesh):
            args = placed(mesh, *inputs(kind))
            ours, dropped = run(*args, dispatch=dispatch, group_size=7, layout=LAYOUT)
        assert_equal(ours, unsharded(kind)[0])
        assert dropped == 0


@pytest.mark.parametrize("sizes", [(1, 2, 4, 1, 1), (1, 1, 2, 2, 2)], ids=str)
def test_dropped_is_counted_over_all_devices(sizes):
    # A device has one row of 12 tokens, or four halves of rows: its groups of 6 are the same ones.
    options = {"dispatch": "einsum", "group_size": 6, "capacity_factor": 1.0}
    expected, count = run(*inputs("two experts"), **options)
    assert count > 0
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        args = placed(mesh, *inputs("two experts"))
        ours, dropped = run(*args, layout=LAYOUT, **options)
    assert_equal(ours, expected)
    assert dropped == count


def collectives(text):
    """{(kind, device groups)} of compiled HLO, which writes groups in three ways."""
    pattern = r" (all-gather|all-reduce|all-to-all|reduce-scatter)\(.*?replica_groups=(.*?), \w+="
    found = set()
    # "device_ids=" belongs to the groups.
    for kind, groups in re.findall(pattern, text.replace(", device_ids=", " ids")):
        found.add((kind, device_groups(groups)))
    return found


def device_groups(text):
    """{{0,1},{2,3}}, or [2,2]<=[4] with T(…), or mesh['a'=2,'b'=2] ids([2,2]T(1,0)) {'a'}."""

    def numbers(part):
        return [int(n) for n in re.findall(r"\d+", part)]

    def iota(part):
        shape, _, order = part.partition("T")
        ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
        return ids.transpose(numbers(order)) if order else ids

    if text.startswith("{{"):
        groups = [numbers(group) for group in text.split("},{")]
    elif text.startswith("["):
        shape, ids = text.split("<=")
        groups = iota(ids).reshape(numbers(shape)).tolist()
    else:
        sizes = dict(re.findall(r"('\w+')=(\d+)", text))
        ids = re.search(r"ids\((.*?)\) ", text)
        count = math.prod(map(int, sizes.values()))
        devices = iota(ids[1] if ids else f"[{count}]").reshape([int(n) for n in sizes.values()])
        along = [list(sizes).index(axis) for axis in re.findall(r"'\w+'", text.split("{")[1])]
        moved = np.moveaxis(devices, along, range(-len(along), 0))
        groups = moved.reshape(-1, math.prod(moved.shape[-len(along) :])).tolist()
    return frozenset(frozenset(group) for group in groups)


@pytest.mark.parametrize(
    ("dispatch", "kinds"),
    [("einsum", {"all-to-all"}), ("ragged", {"all-gather", "reduce-scatter"})],
)
def test_tokens_travel_along_the_expert_axis(dispatch, kinds):
    mesh = make_mesh((1, 2, 4, 1, 1))
    with jax.set_mesh(mesh):
        text = evaluate.lower(
            *placed(mesh, *inputs("even")),
            normal(20, 8, 12, 16),
            options=(("dispatch", dispatch), ("layout", LAYOUT), ("capacity_factor", 1.0)),
        )
        compiled = text.compile().as_text()
        found = collectives(compiled)
    expert_axis = frozenset({frozenset(range(4)), frozenset(range(4, 8))})
    along = {kind for kind, groups in found if groups == expert_axis}
    assert kinds <= along, found
    # A weight's gradient is summed over fsdp into halves: no device holds the whole sum.
    fsdp_axis = frozenset(frozenset({i, i + 4}) for i in range(4))
    assert ("reduce-scatter", fsdp_axis) in found
    sums = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-reduce\(", compiled)
    assert all(math.prod(map(int, filter(None, dims.split(",")))) < 8 * 16 for dims in sums), sums


@pytest.mark.parametrize(
    "sizes", [[3, 0, 300, 100], [0, 0, 512, 0], [0, 0, 0, 0], [256, 0, 0, 8]], ids=str
)
def test_the_kernels_equal_the_products_of_each_group(sizes):
    """Interpreted; memory that nothing was written to holds not-a-number there, as rows do here."""
    rows, ends = 512, np.cumsum(sizes)
    x, g, w = normal(6, rows, 128), normal(7, rows, 256), normal(8, 4, 256, 128)
    x[ends[-1] :] = g[ends[-1] :] = np.nan
    xs, gs, ws, groups = (jnp.asarray(array) for array in (x, g, w, np.array(sizes, np.int32)))
    y = grouped.kernel(xs, ws, groups, interpret=True)
    dx = grouped.kernel_rows(gs, ws, groups, interpret=True)
    dw = grouped.kernel_weight(gs, xs, groups, interpret=True)
    if not ends[-1]:
        assert np.all(np.isnan(y))
    expected_dw = np.zeros(w.shape)
    expected_y, expected_dx = np.zeros((ends[-1], 256)), np.zeros((ends[-1], 128))
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        expected_y[start:end] = x[start:end] @ w[e].T
        expected_dx[start:end] = g[start:end] @ w[e]
        expected_dw[e] = g[start:end].T @ x[start:end]
    if ends[-1]:
        assert_equal((y[: ends[-1]], dx[: ends[-1]]), (expected_y, expected_dx))
    assert_equal(dw, expected_dw)
    assert not np.any(np.asarray(dw)[np.array(sizes) == 0])


def test_ragged_never_reads_what_the_kernels_leave_unwritten(monkeypatch):
    """Elsewhere XLA writes zeros into rows of no group; the kernels, interpreted, not-a-number."""
    monkeypatch.setattr(
        grouped, "_by_platform", lambda kernel, _, *args: kernel(*args, interpret=True)
    )
    x, routing, experts, valid = inputs("two experts")
    options = (("dispatch", "ragged"),)
    ct = normal(20, *x.shape)
    ours, _ = inspect.unwrap(evaluate)(x, routing, experts, valid, ct, options=options)
    assert_equal(ours, unsharded("two experts")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dispatch": "sparse"}, "moe_dispatch 'sparse'"),
        ({"dispatch": "einsum", "capacity_factor": 0.0}, "capacity_factor"),
        ({"dispatch": "einsum", "capacity_factor": float("nan")}, "capacity_factor"),
        ({"dispatch": "einsum", "group_size": 0}, "group_size"),
    ],
)
def test_wrong_settings_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        moe(normal(3, 8, 12, 16), make_routing("even"), make_experts(4), **options)
