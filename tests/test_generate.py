"""Decoding with a cache against plain forward passes, buckets, sampling, and files of prompts."""

import errno
import functools
import itertools
import json
import os
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echovlm_jax.cli.frame import explain
from echovlm_jax.config import ModelConfig, MoEConfig, TextConfig, VisionConfig
from echovlm_jax.errors import InputError
from echovlm_jax.generate import SamplingOptions, engine, generate_file, offline
from echovlm_jax.generate.prompts import split_rows
from echovlm_jax.model import EchoVLM, abstract_params
from echovlm_jax.processing.batch import PATCH_BUCKETS, SEQUENCE_BUCKETS, make_batch, pad_batch
from echovlm_jax.storage.lock import Lock

CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, mlp_dim=32, mrope_section=(1, 1, 2), max_position_embeddings=600,
    ),
    vision=VisionConfig(depth=1, width=16, out_width=32, num_heads=2, mlp_dim=32),
    moe=MoEConfig(num_experts=3, top_k=2, expert_mlp_dim=16, shared_mlp_dim=24),
    bos_token_id=0, eos_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
    vision_pad_token_id=5, image_token_id=6, video_token_id=7,
)  # fmt: skip
SMALL = CONFIG.replace(moe=None, text={"num_layers": 1, "max_position_embeddings": 4096})
STEPS = 24


def generate(config, params, inputs, *, max_new_tokens, **more):
    own = {name: more.pop(name) for name in ("eos_token_ids", "rows", "on_tokens") if name in more}
    options = SamplingOptions(**more)
    return offline.generate(config, params, inputs, options, max_new_tokens=max_new_tokens, **own)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.6, leaf.shape), leaf.dtype),
        abstract_params(config),
    )


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def prompt(*parts, seed=0, config=CONFIG):
    """HF-style inputs of one row: a number is that many words, a grid an image or a video."""
    rng = np.random.default_rng(seed)
    ids, made = [], {}
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(8, config.text.vocab_size, part).tolist()
            continue
        video, count = part[0] > 1, int(np.prod(part))
        token = config.video_token_id if video else config.image_token_id
        ids += [config.vision_start_token_id, *[token] * (count // 4), config.vision_end_token_id]
        grid, pixels = (
            ("video_grid_thw", "pixel_values_videos")
            if video
            else ("image_grid_thw", "pixel_values")
        )
        values = rng.standard_normal((count, config.vision.patch_dim)).astype(np.float32)
        made[pixels] = np.concatenate([made[pixels], values]) if pixels in made else values
        made[grid] = np.array([*made.get(grid, []), part], np.int64)
    ids = np.array([ids], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **made}


ROWS = [prompt(5, (1, 4, 6), 4), prompt(7, seed=1), prompt(2, (1, 2, 2), 1, (2, 2, 4), 3, seed=2)]
BATCH = pad_batch(ROWS, 0)


@functools.partial(jax.jit, static_argnames="config")
def column_logits(params, batch, column, *, config):
    model = EchoVLM(config)
    hidden = model.apply({"params": params}, batch).hidden[:, column][:, None]
    return model.apply({"params": params}, hidden, method="logits")[0, 0]


def without_cache(config, params, row, steps):
    """Greedy tokens of one row: every step runs the whole row anew, padded behind."""
    length = row["input_ids"].shape[1]
    ids = np.zeros((1, 64), np.int64)
    mask = np.zeros_like(ids)
    ids[:, :length], mask[:, :length] = row["input_ids"], row["attention_mask"]
    out = []
    for column in range(length, length + steps):
        inputs = {**row, "input_ids": ids, "attention_mask": mask}
        batch = make_batch(config, inputs, max_patches=24)
        token = int(column_logits(params, batch, column - 1, config=config).argmax())
        ids[0, column], mask[0, column] = token, 1
        out.append(token)
    return out


@pytest.fixture(scope="module")
def greedy(params):
    return generate(CONFIG, params, BATCH, max_new_tokens=STEPS)


def test_unequal_prompts_in_a_batch_equal_full_forward_passes_one_by_one(params, greedy):
    for row, tokens in zip(ROWS, greedy.tokens, strict=True):
        assert tokens.tolist() == without_cache(CONFIG, params, row, STEPS)
    assert greedy.lengths.tolist() == [STEPS] * 3
    assert greedy.prompt_lengths.tolist() == [row["input_ids"].size for row in ROWS]


def test_text_alone(params, greedy):
    """No patches at all is another program than a text row beside images."""
    alone = generate(CONFIG, params, ROWS[1], max_new_tokens=STEPS)
    np.testing.assert_array_equal(alone.tokens[0], greedy.tokens[1])


def test_padding_and_bucket_do_not_matter(params, greedy):
    wide = {**ROWS[1]}
    for key in ("input_ids", "attention_mask"):
        wide[key] = np.pad(wide[key], ((0, 0), (SEQUENCE_BUCKETS[0], 0)))
    padded = generate(CONFIG, params, wide, max_new_tokens=STEPS)
    np.testing.assert_array_equal(padded.tokens[0], greedy.tokens[1])


def test_right_padding_continues_behind_the_last_column(params):
    batch = pad_batch(ROWS, 1, "right")
    made = generate(CONFIG, params, batch, max_new_tokens=STEPS)
    for b in range(3):
        row = {**ROWS[b], **{k: batch[k][b : b + 1] for k in ("input_ids", "attention_mask")}}
        assert made.tokens[b].tolist() == without_cache(CONFIG, params, row, STEPS)


def test_a_row_ends_with_its_stop_token(params, greedy):
    """The rows end at different steps, and the loop with the last of them."""
    stops = [int(greedy.tokens[0, 7]), int(greedy.tokens[1, 9]), int(greedy.tokens[2, 2])]
    ends = [1 + min(row.tolist().index(s) for s in stops if s in row) for row in greedy.tokens]
    assert len(set(ends)) == 3
    made = generate(CONFIG, params, BATCH, max_new_tokens=STEPS, eos_token_ids=stops)
    assert made.lengths.tolist() == ends
    assert made.tokens.shape == (3, max(ends)) and max(ends) < STEPS
    for tokens, full, end in zip(made.tokens, greedy.tokens, ends, strict=True):
        np.testing.assert_array_equal(tokens[:end], full[:end])
        assert not tokens[end:].any()


def test_one_new_token(params, greedy):
    made = generate(CONFIG, params, BATCH, max_new_tokens=1)
    np.testing.assert_array_equal(made.tokens, greedy.tokens[:, :1])


def test_a_listener_sees_every_token_and_changes_none(params, greedy):
    heard = []
    made = generate(
        CONFIG, params, BATCH, max_new_tokens=STEPS, on_tokens=lambda t, n: heard.append((t, n))
    )
    np.testing.assert_array_equal(made.tokens, greedy.tokens)
    assert len(heard) == 1 + -(-(STEPS - 1) // offline.STREAM_CHUNK)
    for tokens, lengths in heard:
        np.testing.assert_array_equal(tokens, greedy.tokens[:, : tokens.shape[1]])
        assert lengths.tolist() == [tokens.shape[1]] * 3


def programs():
    """How many there are: of prefill, insert and decode."""
    return tuple(f._cache_size() for f in (engine.prefill, engine.insert, engine.decode))


def test_fifty_image_sizes_need_one_program_for_each_bucket():
    params = random_params(SMALL)
    sizes = [(1, 2 * h, 2 * w) for h in range(1, 11) for w in range(2, 20, 4)]
    assert len(set(sizes)) == 50
    used = {next(b for b in PATCH_BUCKETS if np.prod(size) <= b) for size in sizes}
    assert len(used) == 4
    before = programs()
    for size in sizes:
        generate(SMALL, params, prompt(9, size, config=SMALL), max_new_tokens=2)
    made = [a - b for a, b in zip(programs(), before, strict=True)]
    # All have room in one cache. Tests before this one may have made some.
    assert 0 < made[0] <= len(used) and made[1] <= len(used) and made[2] <= 1


WORDS = [prompt(n, seed=n, config=SMALL) for n in (9, 3, 6)]


def test_sampling_settings_compile_nothing_and_a_seed_decides():
    params, batch = random_params(SMALL), pad_batch(WORDS, 0)
    settings = {"temperature": 1.5, "top_p": 0.95, "max_new_tokens": STEPS}
    first = generate(SMALL, params, batch, seed=3, **settings)
    before = programs()
    again = generate(SMALL, params, batch, seed=3, **settings)
    other = generate(SMALL, params, batch, seed=4, **settings)
    cold = generate(SMALL, params, batch, temperature=0.1, top_k=1, max_new_tokens=9)
    likeliest = generate(SMALL, params, batch, max_new_tokens=9)
    moved = pad_batch([WORDS[2], WORDS[0], WORDS[1]], 0)
    moved = generate(SMALL, params, moved, seed=3, rows=[2, 0, 1], **settings)
    assert programs() == before
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    # A row's draws don't depend on the other rows, nor on its place among them.
    np.testing.assert_array_equal(moved.tokens, first.tokens[[2, 0, 1]])
    np.testing.assert_array_equal(cold.tokens, likeliest.tokens)


def test_the_penalty_counts_prompt_and_new_tokens_but_no_padding(params, greedy):
    """A huge penalty leaves no token twice while others are left; padding is token 0 here."""
    made = generate(CONFIG, params, BATCH, max_new_tokens=STEPS, repetition_penalty=1e6)
    for row, tokens in zip(ROWS, made.tokens, strict=True):
        assert len(set(tokens.tolist())) == STEPS
        assert not set(tokens.tolist()) & set(row["input_ids"][0].tolist())
    static = {"config": CONFIG, "dtype": jnp.dtype(jnp.float32)}
    state = engine.init_state(rows=3, columns=256, new=8, stops=8, **static)
    for b, read in enumerate(split_rows(CONFIG, BATCH)):
        own = engine.request(SamplingOptions(), (), 2, b)
        read = engine.prefill(params, read, **static)
        token = engine.first_token(read.logits, read.seen, own)
        state = engine.insert(state, read, token, np.int32(b), own, config=CONFIG)
    for b, row in enumerate(ROWS):
        wanted = {*row["input_ids"][0].tolist(), int(greedy.tokens[b, 0])}
        assert set(np.flatnonzero(state.seen[b]).tolist()) == wanted


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 99999999999}, "below this model's max_position_embeddings 600"),
        ({"temperature": "a"}, "temperature must be a number"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"max_new_tokens": 590}, "17 tokens.*max_position_embeddings 600.*max_new_tokens 590"),
    ],
)
def test_bad_settings_are_refused_by_name(params, setting, named):
    with pytest.raises(InputError, match=named):
        generate(CONFIG, params, BATCH, **{"max_new_tokens": 4, **setting})


def test_token_outside_the_vocabulary_is_refused(params):
    row = {"input_ids": np.array([[9, 60]]), "attention_mask": np.ones((1, 2), np.int64)}
    with pytest.raises(InputError, match="vocab_size 60"):
        generate(CONFIG, params, row, max_new_tokens=1)


class Echo:
    """A model that answers with its prompt, and counts. It answers the last one of its slots first,
    and is asked the next before."""

    processor, config, fingerprint = None, CONFIG, "echo"

    def __init__(self, stop_after=10**9):
        self.asked, self.slots, self.left = [], None, stop_after

    def prepare(self, images, prompt, *, system=None, max_new_tokens):
        for image in images:
            if not image.is_file():
                raise InputError(f"{image}: can't be read")
        if len(prompt) > max_new_tokens:
            raise InputError("the prompt\nis too long")
        return {"prompt": prompt, "images": [image.name for image in images], "system": system}

    def answer_each(self, asked, *, slots, max_new_tokens, **sampling):
        self.slots, held, asked = slots, [], iter(asked)
        while True:
            held += itertools.islice(asked, slots + 1 - len(held))
            if not held:
                return
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            row, one = held.pop(min(slots, len(held)) - 1)
            self.asked.append(row)
            text = f"{one['prompt']}|{'+'.join(one['images'])}|{row}"
            yield row, {"text": text, "prompt_tokens": 1, "new_tokens": 2}


def write_records(folder, count=7):
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(b"")
    lines = [
        {"id": f"病例{i}", "images": ["images/a.png"] * (i % 2), "prompt": f"描述{i}"}
        for i in range(count)
    ]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def read_answers(path):
    return {a["id"]: a for a in map(json.loads, path.read_text("utf-8").splitlines())}


def test_a_file_of_prompts(tmp_path):
    model, out = Echo(), tmp_path / "out.jsonl"
    counts = generate_file(model, write_records(tmp_path), out, batch_size=3)
    assert counts == {"done": 7, "failed": 0}
    assert model.slots == 3 and sorted(model.asked) == list(range(7))
    assert model.asked != sorted(model.asked)  # each line says whose answer it is
    answers = read_answers(out)
    assert len(answers["病例3"].pop("fingerprint")) == 32
    assert answers["病例3"] == {
        "id": "病例3", "text": "描述3|a.png|3", "prompt_tokens": 1, "new_tokens": 2,
    }  # fmt: skip
    assert len(answers) == 7
    again = Echo()
    assert generate_file(again, tmp_path / "in.jsonl", out) == {"done": 7, "failed": 0}
    assert again.asked == []


def test_answers_to_something_else_are_refused(tmp_path):
    """Another model, prompt, image, setting; and, where something is drawn, another place."""
    records, out = write_records(tmp_path, count=3), tmp_path / "out.jsonl"
    generate_file(Echo(), records, out)
    whole, text = out.read_bytes(), records.read_text("utf-8")
    other = Echo()
    other.fingerprint = "other"
    refused = r"jsonl: the line of '病例\d' is the answer of another model, or to another"
    with pytest.raises(InputError, match=refused):
        generate_file(other, records, out)
    with pytest.raises(InputError, match=refused):
        generate_file(Echo(), records, out, repetition_penalty=1.5)
    assert generate_file(Echo(), records, out, temperature=0.0, seed=3)["done"] == 3  # no draw
    records.write_text(text.replace("描述1", "描述9"), "utf-8")
    with pytest.raises(InputError, match=refused):
        generate_file(Echo(), records, out)
    records.write_text(text, "utf-8")
    (tmp_path / "images" / "a.png").write_bytes(b"another picture")
    with pytest.raises(InputError, match=refused):
        generate_file(Echo(), records, out)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"can't be compared.*a.png: no such file"):
        generate_file(Echo(), records, out)
    assert out.read_bytes() == whole
    (tmp_path / "images" / "a.png").write_bytes(b"")
    old = [json.dumps({"id": f"病例{i}", "text": "?"}) + "\n" for i in range(3)]
    out.write_text("".join(old))
    with pytest.raises(InputError, match="has no fingerprint"):
        generate_file(Echo(), records, out)
    drawn = tmp_path / "drawn.jsonl"
    generate_file(Echo(), records, drawn, temperature=1.0)
    records.write_text("".join(reversed(text.splitlines(keepends=True))), "utf-8")
    with pytest.raises(InputError, match=refused):
        generate_file(Echo(), records, drawn, temperature=1.0)


def test_two_processes_never_write_one_file(tmp_path):
    records, out = write_records(tmp_path, count=2), tmp_path / "out.jsonl"
    out.touch()
    with Lock(out), pytest.raises(InputError, match=r"out\.jsonl: another process is writing"):
        generate_file(Echo(), records, out)
    assert out.read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 2, 9, 30])
def test_a_stopped_run_goes_on(tmp_path, cut):
    """Killed while a line was on its way to the disk: that line is dropped, and no other."""
    records, out = write_records(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_file(Echo(stop_after=4), records, out, batch_size=2)
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    model = Echo()
    assert generate_file(model, records, out, batch_size=2) == {"done": 7, "failed": 0}
    assert (
        out.read_bytes()[: whole[:-cut].rfind(b"\n") + 1] == whole[: whole[:-cut].rfind(b"\n") + 1]
    )
    assert sorted(model.asked) == [0, 4, 5, 6]
    answers = read_answers(out)
    assert len(out.read_text("utf-8").splitlines()) == len(answers) == 7
    assert all(answers[f"病例{i}"]["text"].endswith(f"|{i}") for i in range(7))


@pytest.mark.parametrize("room", [0, 150])
def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path, room):
    """The limit of a file's size takes a part of a write, as a full disk does."""
    records, out = write_records(tmp_path), tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        with pytest.raises(OSError, match=r"too large: .*out\.jsonl"):
            generate_file(Echo(), records, out, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if room:
        assert out.read_bytes().endswith(b"}\n") and list(read_answers(out)) == ["病例0"]
    else:
        assert not out.exists()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
    assert re.fullmatch(
        rf"error: {out}: no space left on the disk \(.* free\); make room and .*", explain(full)[0]
    )
    assert generate_file(Echo(), records, out) == {"done": 7, "failed": 0}


def test_bad_records_fail_alone(tmp_path):
    records, out = write_records(tmp_path, count=2), tmp_path / "out.jsonl"
    secret = tmp_path.parent / "secret.png"
    secret.write_bytes(b"")
    (tmp_path / "images" / "link.png").symlink_to(secret)
    bad = [
        ({"id": "gone", "images": ["images/b.png"], "prompt": "?"}, "b.png: no such file"),
        ({"id": "up", "images": ["../secret.png"], "prompt": "?"}, "leads out of the folder"),
        ({"id": "away", "images": [str(secret)], "prompt": "?"}, "lies outside the folder"),
        ({"id": "link", "images": ["images/link.png"], "prompt": "?"}, "--allow-links ROOT"),
        ({"id": "nul", "images": ["a\0b"], "prompt": "?"}, "is not a path"),
        ({"id": "none", "prompt": "?"}, '"images" must be a list'),
        ({"id": "number", "images": [], "prompt": 3}, '"prompt" must be a text'),
        ({"id": "long", "images": [], "prompt": "x" * 600}, "the prompt is too long"),
        ({"images": [], "prompt": "?"}, "not a JSON object"),
    ]
    inside = {"id": "in", "images": [str(tmp_path / "images" / "a.png")], "prompt": "?"}
    half = {"id": "\ud83d", "images": [], "prompt": "?"}
    with open(records, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record, _ in bad)
        file.write("{half a line\n\n")
        file.writelines(json.dumps(record) + "\n" for record in (inside, half))
    counts = generate_file(Echo(), records, out, batch_size=2)
    assert counts == {"done": 4, "failed": len(bad) + 1}
    answers = read_answers(out)
    for record, reason in bad:
        answer = answers[record.get("id", "line 11")]
        assert reason in answer["error"] and "\n" not in answer["error"] and "text" not in answer
    assert "error" in answers["line 12"]
    assert answers["in"]["text"].startswith("?|a.png") and "\ud83d" in answers
    again = Echo()
    assert generate_file(again, records, out) == counts and again.asked == []


def test_files_that_cannot_be_used(tmp_path):
    records, out = write_records(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="another file"):
        generate_file(Echo(), records, records)
    with pytest.raises(InputError, match=r"gone\.jsonl: can't be read"):
        generate_file(Echo(), tmp_path / "gone.jsonl", out)
    for content in ("notes of somebody else", '{"id": 1}\nnotes\n', '["id"]\n', '{"a": 1}\n'):
        out.write_text(content)
        with pytest.raises(InputError, match="holds no answers"):
            generate_file(Echo(), records, out)
        assert out.read_text() == content
    out.unlink()
    with open(records, "a") as file:
        file.write('{"id": "病例2", "images": [], "prompt": "?"}\n')
    with pytest.raises(InputError, match="line 8: id '病例2' is there twice"):
        generate_file(Echo(), records, out)
    assert not out.exists()
    # `score` pairs 1 with "1": a file that has both would be refused there.
    lines = [{"id": one, "images": [], "prompt": "?"} for one in (1, "1")]
    records.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="line 2: id '1' is there twice"):
        generate_file(Echo(), records, out)
    assert not out.exists()


def test_a_wrong_setting_stops_a_file_before_anything_is_written(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "images": [], "prompt": "a"}\n')
    for setting in ({"max_new_tokens": 5000}, {"temperature": -1}):
        with pytest.raises(InputError, match=next(iter(setting))):
            generate_file(Echo(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", **setting)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_tiny_temperature_takes_the_likeliest(params):
    likeliest = generate(CONFIG, params, BATCH, max_new_tokens=2)
    drawn = generate(CONFIG, params, BATCH, max_new_tokens=2, temperature=1e-40)
    assert np.array_equal(likeliest.tokens, drawn.tokens)
