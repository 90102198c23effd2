"""The engine's promises: rows don't see each other, the cache is never copied, meshes, int8."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from echovlm_jax.generate import SamplingOptions, engine, offline
from echovlm_jax.generate.prompts import split_rows
from echovlm_jax.mesh import activation_layout, make_mesh, param_shardings, topology_devices
from echovlm_jax.model import EchoVLM, abstract_params, extend_cache, init_cache, logical_axes
from echovlm_jax.model.cache import Cache
from echovlm_jax.model.compute import Compute
from echovlm_jax.ops.attention.cached import Stored, pack
from echovlm_jax.plan import hlo
from echovlm_jax.processing.batch import PATCH_BUCKETS, SEQUENCE_BUCKETS, make_batch, pad_batch
from tests.distributed.test_sharded import MODEL
from tests.test_generate import CONFIG, SMALL, prompt, random_params

FLOAT32 = jnp.dtype(jnp.float32)
# What a row may ask for: each branch of the sampler, and a penalty.
SETTINGS = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_k": 5, "seed": 2},
    {"temperature": 1.0, "top_p": 0.8, "seed": 3},
]


@pytest.fixture(scope="module")
def small():
    return random_params(SMALL)


def asked(inputs, number, new=6, **settings):
    """A prompt and its request. Token 9 ends a row, so that rows end at different steps."""
    [row] = split_rows(SMALL, inputs)
    return row, engine.request(SamplingOptions(**settings), (9,), new, number)


def answers(params, many, rows, compute=Compute(), config=SMALL, new=6):
    run = offline.Run(config, params, FLOAT32, compute)
    return {n: tokens.tolist() for n, tokens in run.answer(iter(many), rows=rows, new=new)}


def random_batches(params, pool, count):
    """`count` random batches, most of them of more prompts than there are rows: each has the
    answer that it has alone."""
    alone = [answers(params, [one], rows=3)[0] for one in pool]
    assert len({tuple(tokens) for tokens in alone}) > len(pool) // 2
    assert len({len(tokens) for tokens in alone}) > 1
    rng = np.random.default_rng(0)
    for _ in range(count):
        chosen = rng.integers(0, len(pool), rng.integers(1, 7)).tolist()
        found = answers(params, [pool[n] for n in chosen], rows=3)
        assert [found[i] for i in range(len(chosen))] == [alone[n] for n in chosen]


def test_a_row_does_not_depend_on_who_shares_the_batch(small):
    prompts = [prompt(n, seed=n, config=SMALL) for n in (1, 5, 9, 40)]
    prompts += [prompt(3, (1, 4, 2 * w), 2, seed=w, config=SMALL) for w in (2, 5)]
    pool = [
        asked(one, number=7 * i + j, **settings)
        for i, one in enumerate(prompts)
        for j, settings in enumerate(SETTINGS)
    ]
    random_batches(small, pool, 200)


@pytest.mark.slow
def test_rows_of_all_buckets_share_batches(small):
    """Every bucket of text and of patches up to 4,096 columns of the cache."""
    sizes = [n for n in SEQUENCE_BUCKETS if n <= 3072]
    prompts = [prompt(n - 3, seed=n, config=SMALL) for n in sizes]
    prompts += [prompt(3, (1, 4, n // 4), seed=n, config=SMALL) for n in PATCH_BUCKETS if n <= 8192]
    pool = [
        asked(one, number=i, **SETTINGS[(i + j) % len(SETTINGS)])
        for i, one in enumerate(prompts)
        for j in (0, 1)
    ]
    random_batches(small, pool, 200)


def test_a_prompt_without_room_waits_for_a_larger_cache(small):
    pool = [asked(prompt(n, seed=n, config=SMALL), n) for n in (5, 600, 8)]
    found = answers(small, pool, rows=2)
    for number, one in enumerate(pool):
        assert found[number] == answers(small, [one], rows=2)[0]


def test_a_long_prompt_is_read_in_pieces():
    """Images are embedded once; pieces end where they like, inside an image too."""
    params = random_params(CONFIG)
    [row] = split_rows(CONFIG, prompt(90, (1, 16, 16), 80, seed=1))
    static, n = {"config": CONFIG, "dtype": FLOAT32}, int(row.length[0])
    whole = engine.prefill(params, row, **static)
    pieces = engine.prefill(params, row, **static, compute=Compute(chunk=100))
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=2e-3)
    for ours, theirs in zip(pieces.cache.stored[:2], whole.cache.stored[:2], strict=True):
        np.testing.assert_allclose(ours[:, :, :, :n], theirs[:, :, :, :n], atol=2e-3)
    assert np.flatnonzero(pieces.cache.segments[0]).tolist() == list(range(n))
    np.testing.assert_array_equal(pieces.seen, whole.seen)


# --- The cache in int8 ---


def test_int8_rounds_to_half_a_step():
    x = np.random.default_rng(0).normal(0, 3, (2, 3, 5, 16)).astype(np.float32)
    x[0, 0, 0] = 0
    like = Stored(*[jnp.zeros(1, jnp.int8)] * 2, *[jnp.zeros(1)] * 2)
    held = pack(x, -x, like)
    assert held.key.dtype == jnp.int8 and held.key_scale.shape == x.shape[:-1]
    error = np.abs(held.key * held.key_scale[..., None] - x)
    assert (error <= np.abs(x).max(-1, keepdims=True) / 254 * 1.0001).all()
    np.testing.assert_array_equal(held.value, -held.key)


def test_an_int8_cache_changes_logits_little_and_few_tokens():
    """Each step of the float cache's own answer, taken again over what int8 holds of it."""
    params = jax.tree.map(lambda x: 0.5 * x, random_params(CONFIG))
    model, text = EchoVLM(CONFIG), CONFIG.text
    rng = np.random.default_rng(0)
    inputs = {"input_ids": rng.integers(8, 60, (8, 40)), "attention_mask": np.ones((8, 40), int)}
    batch = make_batch(CONFIG, inputs)
    kv = model.apply({"params": params}, batch).kv

    @functools.partial(jax.jit, static_argnames="dtype")
    def logits(count, dtype):
        """Of token number `count`, with those before it in the cache."""
        cache = extend_cache(init_cache(text, 8, 64, dtype), kv, jnp.ones((8, 40), jnp.int32))
        seen = jnp.broadcast_to(jnp.arange(64) < count, (8, 64))
        cache = Cache(cache.stored, seen.astype(jnp.int32), cache.length)
        one = {
            name: jax.lax.dynamic_slice_in_dim(jnp.asarray(batch[name]), count, 1, axis)
            for name, axis in (("tokens", 1), ("positions", 2), ("segment_ids", 1))
        }
        hidden = model.apply({"params": params}, one, cache).hidden
        return model.apply({"params": params}, hidden, method="logits")[:, 0]

    whole = model.apply({"params": params}, batch, method="forward")
    errors, agree = [], []
    for count in range(1, 40, 3):
        exact, rounded = logits(count, jnp.float32), logits(count, jnp.int8)
        np.testing.assert_allclose(exact, whole[:, count], atol=1e-3)
        errors.append(np.abs(rounded - exact).max() / np.abs(exact).max())
        agree += (rounded.argmax(-1) == exact.argmax(-1)).tolist()
    assert 0 < max(errors) < 0.02
    assert np.mean(agree) >= 0.97


def test_generation_with_an_int8_cache(small):
    pool = [asked(prompt(n, seed=n, config=SMALL), n) for n in (5, 30)]
    exact, rounded = (answers(small, pool, 2, Compute(cache=cache)) for cache in ("", "int8"))
    assert exact == rounded
    state = offline.Run(SMALL, small, FLOAT32, Compute(cache="int8"))._init(2, 512, 6, pool[0][1])
    assert state.cache.stored.key.dtype == jnp.int8


# --- What is read and written ---


def decode_text(compute, place=None, dtype=FLOAT32):
    """The compiled decoding step, whose largest arrays by far are the cache's two, and their
    size."""
    config = CONFIG.replace(
        text={"num_kv_heads": 4, "num_heads": 8, "head_dim": 128, "mrope_section": (16, 24, 24)}
    )
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), abstract_params(config)
    )
    sizes = {"rows": 3, "slots": 512, "dtype": dtype, "compute": compute}
    program = engine.lower_decode(config, shapes, **sizes).compile()
    return program.as_text(), config.text.num_layers * 3 * 4 * 512 * 128


def check_no_copy(text, size):
    """The cache comes in, and slices of it are updated where they are; nothing else makes an array
    of its size. Returns what makes an array as large as one layer's part."""
    buffers = [(b, math.prod(b.shape.dims)) for b in hlo.read(text, buffers=10**6).buffers]
    made = [b for b, count in buffers if count >= size]
    assert sum(b.opcode == "parameter" for b in made) == 2
    for buffer in made:
        assert buffer.opcode == "parameter" or "dynamic_update_slice" in buffer.op_name, buffer
    layers = CONFIG.text.num_layers
    return [b for b, count in buffers if size > count >= size / layers]


@pytest.mark.parametrize("cache", ["", "int8"])
def test_no_copy_of_a_cache_on_a_cpu(cache):
    check_no_copy(*decode_text(Compute(cache=cache)))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu: pip install libtpu"
)
@pytest.mark.parametrize("cache", ["", pytest.param("int8", marks=pytest.mark.slow)])
def test_no_copy_of_a_cache_or_of_a_layers_part_on_a_tpu(cache):
    mesh = make_mesh({}, topology_devices("v5e:1x1")[:1])
    place = NamedSharding(mesh, PartitionSpec())
    text, size = decode_text(Compute(cache=cache), place, jnp.dtype(jnp.bfloat16))
    assert check_no_copy(text, size) == []


# --- Meshes ---

MESHED = MODEL.replace(text={"max_position_embeddings": 600})


@pytest.fixture(scope="module")
def meshed():
    """Parameters, a batch of four rows, and what one device makes of it."""
    params = jax.tree.map(lambda x: 0.3 * x, random_params(MESHED))
    parts = [(5, (1, 4, 6), 4), (7, (1, 2, 2)), (2, (1, 2, 2), 1, (2, 2, 4), 3), ((1, 4, 4), 3)]
    rows = [prompt(*own, seed=n, config=MESHED) for n, own in enumerate(parts)]
    batch = pad_batch(rows, 0)
    return params, batch, offline.generate(MESHED, params, batch, max_new_tokens=12).tokens


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [  # into how many pieces the cache of four rows and eight heads is cut
        ({"fsdp": 2, "expert": 2, "tensor": 2}, 8),
        pytest.param({"tensor": 8}, 8, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, 1, marks=pytest.mark.slow),  # four rows don't divide
        pytest.param({"expert": 4, "data": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"expert": 4, "tensor": 2}, 8, marks=pytest.mark.slow),
        pytest.param({"data": 2, "sequence": 4}, 8, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_no_token_and_divides_what_it_holds(meshed, sizes, cut):
    params, batch, expected = meshed
    mesh = make_mesh(sizes)
    axes, shapes = logical_axes(MESHED), abstract_params(MESHED)
    split = jax.device_put(params, param_shardings(axes, shapes, mesh))
    compute = Compute(layout=activation_layout(mesh))
    static = {"config": MESHED, "dtype": FLOAT32, "compute": compute}
    with jax.set_mesh(mesh):
        before = engine.decode._cache_size()
        made = offline.generate(MESHED, split, batch, max_new_tokens=12, compute=compute)
        # Whichever program made a state, the next takes it as it lies.
        assert engine.decode._cache_size() - before == 1
        state = engine.init_state(rows=4, columns=512, new=128, stops=8, **static)
        program = engine.decode_step.lower(split, state, **static).compile()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), split
        )
        room = {"rows": 4, "slots": 512, "dtype": FLOAT32, "compute": compute}
        planned = engine.lower_decode(MESHED, shapes, **room).compile()
    np.testing.assert_array_equal(made.tokens, expected)
    [part] = {shard.data.shape for shard in state.cache.stored.key.addressable_shards}
    assert math.prod(part) * cut == state.cache.stored.key.size
    # No weight travels, but for the experts, that the dense dispatch gathers a layer at a time.
    if "expert" not in sizes:
        weights = 4 * MESHED.text.hidden_size * MESHED.text.mlp_dim
        rest = [c for c in hlo.read(program.as_text()).collectives if c.kind != "all-reduce"]
        assert all(c.result_bytes < weights for c in rest), rest
    arguments = program.memory_analysis().argument_size_in_bytes
    whole = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert arguments < whole
    # What is planned without arrays is the same program, but for its room for new tokens.
    new = 4 * 4 * (engine.NEW_TOKENS - 128)
    assert planned.memory_analysis().argument_size_in_bytes == arguments + new
