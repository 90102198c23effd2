import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.bench import moe as bench_moe
from echovlm_jax.errors import InputError


def test_products_are_counted_by_hand():
    weight = jnp.ones((3, 5, 7))

    def f(x, sizes):
        def body(x, _):
            return x @ np.ones((7, 7), np.float32), None

        x = jax.lax.scan(body, x, None, length=4)[0]
        return jax.checkpoint(
            jax.jit(lambda x: jax.lax.ragged_dot(x, weight.swapaxes(1, 2), sizes))
        )(x)

    x, sizes = jnp.ones((6, 7)), jnp.array([2, 0, 4])
    forward = 4 * 2 * 6 * 7 * 7 + 2 * 6 * 7 * 5
    assert bench_moe.dot_flops(jax.make_jaxpr(f)(x, sizes).jaxpr) == forward

    def ragged(w):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    gradient = jax.make_jaxpr(jax.grad(ragged))(weight.swapaxes(1, 2)).jaxpr
    assert bench_moe.dot_flops(gradient) == 2 * (2 * 6 * 7 * 5)


def test_the_default_adds_little_at_full_size(monkeypatch):
    monkeypatch.setattr(bench_moe, "_times", lambda *_: [1.0] * len(bench_moe.FORMS))
    report = bench_moe.bench_moe()
    rows = {(r["name"], r["capacity_factor"], r["group_size"]): r for r in report["dispatch"]}
    assert rows[report["default"], None, None]["extra_with_tiles"] <= 0.03
    # Two more experts of 3 · 3584 · 1408, of about 324 M parameters, and some attention.
    assert 0.085 < rows["dense", None, None]["extra"] < 0.0935
    # Dispatch and combine: 2 · (forward) products of 3584 · places; and a quarter more rows.
    assert rows["einsum", 1.25, 128]["extra"] < rows["einsum", 1.25, 256]["extra"]
    assert rows["einsum", 1.25, 128]["extra"] > 0.25 * 0.0855
    assert rows["ragged", None, None]["extra"] < 0.001
    billions = 2 * 2048 * (203.7 + 60.6 + 29.4 + 30.3) / 1e3 + 2 * 2048**2 * 3584 / 1e9
    assert report["layer_flops"] / 1e9 == pytest.approx(3 * billions, rel=1e-3)


@pytest.mark.slow
def test_it_times_every_form():
    report = bench_moe.bench_moe(size="tiny", tokens=512, timed_tokens=128, rounds=1)
    assert report["ratio"] == report["ours"] / report["theirs"]
    assert all(row["seconds"] > 0 for row in report["dispatch"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": "qwen2_vl_7b"}, "no experts"), ({"rounds": 0}, "rounds"), ({"tokens": 0}, "tokens")],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        bench_moe.bench_moe(**options)
