"""Modules against Hugging Face's, bottom-up: norms, rotary tables, attention, experts, merger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from echovlm_jax.bench.torch_model import build  # noqa: E402
from echovlm_jax.config import MoEConfig  # noqa: E402
from echovlm_jax.model.decoder import Attention, Context  # noqa: E402
from echovlm_jax.model.layers import GatedMLP, LayerNorm, RMSNorm  # noqa: E402
from echovlm_jax.model.moe import MoE  # noqa: E402
from echovlm_jax.model.vision import Merger, VisionAttention, VisionMLP  # noqa: E402
from echovlm_jax.ops.activations import quick_gelu  # noqa: E402
from echovlm_jax.ops.moe.dispatch import load_balancing_loss  # noqa: E402
from echovlm_jax.ops.rope import mrope_table, vision_table  # noqa: E402
from tests.parity.cases import CONFIGS  # noqa: E402

ATOL = 1e-5


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(7)


def close(ours, theirs, atol=ATOL):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=atol * max(1, abs(theirs).max()))


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def weights(module, **shapes):
    """A torch module's parameters as our nested dict: {"q.kernel": (torch name, shape)}."""
    state = dict(module.named_parameters())
    tree: dict = {}
    for path, (name, *shape) in shapes.items():
        *parents, leaf = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        value = state[name].detach().numpy()
        node[leaf] = value.reshape(shape[0]) if shape else value
    return {"params": tree}


def test_rms_norm(rng):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    theirs = Qwen2VLRMSNorm(24, eps=1e-6)
    theirs.weight.data = torch.from_numpy(normal(rng, 24))
    x = 3 * normal(rng, 2, 5, 24) + 1
    ours = RMSNorm(24, 1e-6).apply(weights(theirs, scale=["weight"]), x)
    close(ours, theirs(torch.from_numpy(x)))


def test_layer_norm(rng):
    theirs = torch.nn.LayerNorm(24, eps=1e-6)
    theirs.weight.data = torch.from_numpy(normal(rng, 24))
    theirs.bias.data = torch.from_numpy(normal(rng, 24))
    x = 3 * normal(rng, 2, 5, 24) + 1
    ours = LayerNorm(24).apply(weights(theirs, scale=["weight"], bias=["bias"]), x)
    close(ours, theirs(torch.from_numpy(x)))


def test_quick_gelu(rng):
    from transformers.activations import ACT2FN

    x = 4 * normal(rng, 100)
    close(quick_gelu(x), ACT2FN["quick_gelu"](torch.from_numpy(x)))


@pytest.mark.parametrize("name", ["released_shape", "one_expert_tied"])
def test_mrope_table(name, rng):
    config = CONFIGS[name].text
    theirs = build(CONFIGS[name]).model.language_model.rotary_emb
    positions = rng.integers(0, 300, (2, 3, 9))
    x = torch.zeros(2, 9, config.hidden_size)
    cos, sin = theirs(x, torch.from_numpy(positions).transpose(0, 1))
    table = mrope_table(
        jnp.asarray(positions, jnp.int32),
        head_dim=config.head_dim,
        theta=config.rope_theta,
        section=config.mrope_section,
    )
    if cos.ndim == 4:  # three rows, not yet mixed by section
        row = np.repeat(np.arange(3), config.mrope_section)
        half = np.arange(config.head_dim // 2)
        cos, sin = (t[row, ..., half].permute(1, 2, 0) for t in (cos, sin))
    half = config.head_dim // 2
    close(table[0], cos[..., :half])
    close(table[1], sin[..., :half])


@pytest.mark.parametrize("name", ["released_shape", "many_experts_normalised"])
def test_vision_attention_sees_only_its_frame(name, rng):
    """Two frames in one buffer, with padding behind, against one torch call a frame."""
    config = CONFIGS[name].vision
    theirs = build(CONFIGS[name]).visual if hasattr(build(CONFIGS[name]), "visual") else None
    theirs = theirs or build(CONFIGS[name]).model.visual
    block = theirs.blocks[0].attn
    width, heads, dim = config.width, config.num_heads, config.head_dim
    params = weights(
        block,
        qkv__kernel=["qkv.weight", (3, heads, dim, width)],
        qkv__bias=["qkv.bias", (3, heads, dim)],
        proj__kernel=["proj.weight", (width, heads, dim)],
        proj__bias=["proj.bias"],
    )
    x = normal(rng, 1, 14, width)
    segments = np.array([[1] * 4 + [2] * 8 + [0] * 2], np.int32)
    positions = rng.integers(0, 9, (1, 14, 2)).astype(np.int32)
    table = vision_table(jnp.asarray(positions), head_dim=dim)
    ours = VisionAttention(config).apply(params, x, table, segments)
    cos, sin = (torch.from_numpy(np.concatenate([t, t], -1)[0]) for t in map(np.asarray, table))
    for a, b in ((0, 4), (4, 12)):
        expected = block(
            torch.from_numpy(x[0, a:b]),
            cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32),
            position_embeddings=(cos[a:b], sin[a:b]),
        )
        close(ours[0, a:b], expected)


def test_vision_mlp_and_merger(rng):
    config = CONFIGS["released_shape"].vision
    visual = build(CONFIGS["released_shape"]).model.visual
    x = normal(rng, 1, 8, config.width)
    names = dict(
        fc1__kernel=["fc1.weight"], fc1__bias=["fc1.bias"],
        fc2__kernel=["fc2.weight"], fc2__bias=["fc2.bias"],
    )  # fmt: skip
    mlp = visual.blocks[0].mlp
    close(VisionMLP(config).apply(weights(mlp, **names), x), mlp(torch.from_numpy(x)))
    params = weights(
        visual.merger,
        ln_q__scale=["ln_q.weight"], ln_q__bias=["ln_q.bias"],
        fc1__kernel=["mlp.0.weight"], fc1__bias=["mlp.0.bias"],
        fc2__kernel=["mlp.2.weight"], fc2__bias=["mlp.2.bias"],
    )  # fmt: skip
    expected = visual.merger(torch.from_numpy(x[0]))
    close(Merger(config).apply(params, x)[0], expected)


@pytest.mark.parametrize("name", ["released_shape", "many_experts_normalised", "dense"])
def test_decoder_attention(name, rng):
    config = CONFIGS[name].text
    layer = build(CONFIGS[name]).model.language_model.layers[0].self_attn
    heads, kv, dim, width = (
        config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size,
    )  # fmt: skip
    params = weights(
        layer,
        q__kernel=["q_proj.weight", (heads, dim, width)], q__bias=["q_proj.bias", (heads, dim)],
        k__kernel=["k_proj.weight", (kv, dim, width)], k__bias=["k_proj.bias", (kv, dim)],
        v__kernel=["v_proj.weight", (kv, dim, width)], v__bias=["v_proj.bias", (kv, dim)],
        o__kernel=["o_proj.weight", (width, heads, dim)],
    )  # fmt: skip
    x = normal(rng, 2, 9, width)
    positions = rng.integers(0, 40, (2, 3, 9)).astype(np.int32)
    table = mrope_table(
        jnp.asarray(positions), head_dim=dim, theta=1e6, section=config.mrope_section
    )
    segments = np.ones((2, 9), np.int32)
    ours, _ = Attention(config).apply(params, x, None, Context(table, segments, segments))
    cos, sin = (torch.from_numpy(np.concatenate([t, t], -1)) for t in map(np.asarray, table))
    mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = layer(torch.from_numpy(x), attention_mask=mask, position_embeddings=(cos, sin))[0]
    close(ours, expected)


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.moe is not None])
def test_moe_block(name, rng):
    config, moe = CONFIGS[name].text, CONFIGS[name].moe
    assert isinstance(moe, MoEConfig)
    block = build(CONFIGS[name]).model.language_model.layers[0].mlp.moe
    inner = moe.expert_mlp_dim
    params = weights(
        block,
        router__kernel=["gate.weight"],
        shared_gate__kernel=["shared_expert_gate.weight"],
        shared__gate__kernel=["shared_expert.gate_proj.weight"],
        shared__up__kernel=["shared_expert.up_proj.weight"],
        shared__down__kernel=["shared_expert.down_proj.weight"],
        experts__down__kernel=["experts.down_proj"],
        experts__gate__kernel=["experts.gate_up_proj"],
    )
    both = params["params"]["experts"]["gate"]["kernel"]
    params["params"]["experts"]["gate"] = {"kernel": both[:, :inner]}
    params["params"]["experts"]["up"] = {"kernel": both[:, inner:]}
    x = normal(rng, 2, 21, config.hidden_size)
    ours, logits, _ = MoE(moe, config.hidden_size).apply(params, x)
    close(ours, block(torch.from_numpy(x)))
    expected, _, choice = block.gate(torch.from_numpy(x).reshape(-1, config.hidden_size))
    close(np.asarray(logits).reshape(expected.shape), expected)
    _, chosen = jax.lax.top_k(logits, moe.top_k)
    assert np.array_equal(np.asarray(chosen).reshape(choice.shape), choice.numpy())


def test_gated_mlp(rng):
    config = CONFIGS["dense"].text
    mlp = build(CONFIGS["dense"]).model.language_model.layers[1].mlp
    params = weights(
        mlp,
        gate__kernel=["gate_proj.weight"],
        up__kernel=["up_proj.weight"],
        down__kernel=["down_proj.weight"],
    )
    x = normal(rng, 2, 5, config.hidden_size)
    close(GatedMLP(config.hidden_size, config.mlp_dim).apply(params, x), mlp(torch.from_numpy(x)))


def test_load_balancing_loss_is_transformers(rng):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    logits = 2 * normal(rng, 3, 2, 11, 5)
    mask = (rng.random((2, 11)) < 0.7).astype(np.int64)
    flat = tuple(torch.from_numpy(layer.reshape(-1, 5)) for layer in logits)
    expected = load_balancing_loss_func(flat, 5, 3, torch.from_numpy(mask))
    close(load_balancing_loss(logits, mask == 1, top_k=3), expected, atol=1e-6)
