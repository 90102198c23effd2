"""An epoch's plan: every sample once, lengths as built, batches whole, the same everywhere."""

import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from echovlm_jax.data import epoch as epoch_module
from echovlm_jax.data import epoch_cache, examples
from echovlm_jax.data.encode import encode
from echovlm_jax.data.epoch import Epoch, Epochs, make_epoch, mend, spread_repeats
from echovlm_jax.data.examples import ALONE, NOTHING, TOO_LONG, NoExample, example, open_source
from echovlm_jax.data.keys import mix
from echovlm_jax.data.packing import Rows
from echovlm_jax.data.record import Medium, Record, Report, Turn
from echovlm_jax.data.tasks import TASKS
from echovlm_jax.errors import InputError
from tests.data import fakes
from tests.data.exams import SETTINGS, MemoryDataset, exam, exams, source


def with_settings(dataset, **changes):
    return source(dataset, dataclasses.replace(SETTINGS, **changes))


def rows_of(epoch):
    return np.split(epoch.samples, epoch.offsets[1:-1])


def same(one, other):
    for name, a, b in zip(Epoch._fields, one, other, strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, name)


def digest(epoch):
    """Of what decides the rows; the other fields tell about them."""
    tells = ("shrunk", "lost_task", "lost_need")
    decides = [getattr(epoch, field) for field in Epoch._fields if field not in tells]
    return hashlib.sha256(b"".join(array.tobytes() for array in decides)).hexdigest()[:16]


@pytest.fixture(scope="module")
def mixed():
    """liver 60 and kidney 6 exams, evened out: each kidney comes up 10 times."""
    made = with_settings(exams(liver=60, kidney=6), mix_temperature=1e9)
    return made, make_epoch(made, 0)


def test_every_sample_is_in_one_row_as_often_as_the_mixture_says(mixed):
    made, epoch = mixed
    assert sorted(epoch.samples) == list(range(len(epoch.record)))
    assert not epoch.dropped
    times = np.bincount(epoch.record, minlength=66)
    kidney = made.dataset.organs == 0
    assert set(times[~kidney]) == {1} and set(times[kidney]) <= {9, 10}
    assert times[kidney].sum() in (59, 60)  # 60, to the last digit of a power
    for exam_number in range(66):
        repeats = epoch.repeat[epoch.record == exam_number]
        assert sorted(repeats) == list(range(len(repeats)))


def test_lengths_are_exactly_those_that_a_worker_builds(mixed):
    made, epoch = mixed
    for i in range(len(epoch.record)):
        built = example(made, int(epoch.record[i]), int(epoch.key[i]))
        encoded = encode(made.tokenizer, made.model, built.turns, built.vision)
        assert len(encoded.tokens) == epoch.tokens[i] == built.tokens
        assert sum(g.patches for g in built.grids) == epoch.patches[i] == built.patches


def test_rows_keep_their_budgets_and_fill_whole_batches(mixed):
    _, epoch = mixed
    rows = rows_of(epoch)
    assert len(rows) % SETTINGS.global_batch_size == 0
    for row in rows:
        assert epoch.tokens[row].sum() <= SETTINGS.seq_len
        assert epoch.patches[row].sum() <= SETTINGS.max_patches
    empty = [not len(row) for row in rows]
    assert sum(empty) < SETTINGS.global_batch_size
    assert all(empty[len(rows) - sum(empty) :])  # at the end


def test_repeats_of_an_exam_differ_and_are_not_in_one_batch(mixed):
    made, epoch = mixed
    assert epoch.clashes == 0
    batch_of = np.empty(len(epoch.record), int)
    for number, row in enumerate(rows_of(epoch)):
        batch_of[row] = number // SETTINGS.global_batch_size
    pairs = Counter(zip(batch_of.tolist(), epoch.record.tolist(), strict=True))
    assert set(pairs.values()) == {1}
    for kidney in np.flatnonzero(made.dataset.organs == 0):
        keys = epoch.key[epoch.record == kidney]
        asked = {example(made, int(kidney), int(key)).turns for key in keys}
        assert len(asked) == len(keys)


def drawn_tasks(made, epochs=1):
    """Each sample's task as its first key draws it, whatever room a row has."""
    roomy = made._replace(settings=dataclasses.replace(made.settings, seq_len=10**6))
    return Counter(TASKS[t] for e in range(epochs) for t in make_epoch(roomy, e).task)


def test_repeats_try_for_other_words_of_the_same_task():
    """A conversation given leaves no choice, a caption does."""
    rare = dataclasses.replace(
        exam(0, "heart"), turns=(Turn("user", "What is it?"), Turn("assistant", "A heart."))
    )
    dataset = MemoryDataset([rare, *(exam(i, "liver") for i in range(1, 21))])
    made = with_settings(dataset, mix_temperature=1e9)
    made = made._replace(tasks={"conversation": 1.0, "caption": 1.0})
    epoch = make_epoch(made, 0)
    keys = epoch.key[epoch.record == 0]
    assert len(keys) in (19, 20)
    built = [example(made, 0, int(key)) for key in keys]
    captions = [one.turns for one in built if one.task == "caption"]
    assert len(set(captions)) == len(captions) >= 5
    first = mix(made.settings.seed, 3, 0, epoch.record, epoch.repeat)[epoch.record == 0]
    assert [one.task for one in built] == [example(made, 0, int(key)).task for key in first]


def test_epochs_and_seeds_differ_and_nothing_else_does(mixed):
    made, epoch = mixed
    same(epoch, make_epoch(made, 0))
    later = make_epoch(made, 1)
    other = make_epoch(made._replace(settings=dataclasses.replace(made.settings, seed=1)), 0)
    for them in (later, other):
        assert not np.array_equal(epoch.record, them.record)
        assert not np.array_equal(np.sort(epoch.key), np.sort(them.key))


def golden_epoch():
    """Of conversations, which no wording of ours is in, and of made-up sizes."""
    records = []
    for i in range(400):
        turns = (Turn("user", "?" * (i % 50 + 1)), Turn("assistant", "!" * (i * 37 % 300 + 1)))
        media = tuple(Medium(0, 60 + i * 13 % 240, 60 + j * 40) for j in range(i % 4))
        records.append(Record(f"{i}", ("liver", "heart")[i % 9 == 0], media, turns))
    made = with_settings(MemoryDataset(records), mix_temperature=2.0, seq_len=512, max_patches=1024)
    return make_epoch(made, 3)


def test_a_plan_never_changes():
    """A run that goes on after an upgrade must find the rows it left. To make the digest anew,
    print digest(golden_epoch()); but then every run in progress loses its place."""
    epoch = golden_epoch()
    assert len(epoch.record) > 400 and epoch.clashes == 0
    assert digest(epoch) == "11ed3ec662841794"


def test_samples_that_fit_no_row_are_counted_with_their_reason():
    records = [exam(i) for i in range(12)]
    records[3] = dataclasses.replace(exam(3), reports=(Report("en", caption="echo " * 300),))
    records[7] = Record("exam-7", "liver", (Medium(0, 60, 60),))
    records[8] = exam(8, media=[Medium(0, 60, 60)] * 200)
    records[9] = exam(9, media=[Medium(0, 10, 4000)])
    made = source(MemoryDataset(records))
    epoch = make_epoch(made, 0)
    assert epoch.dropped == {TOO_LONG: 2, NOTHING: 1, "image sizes": 1}
    assert sorted(epoch.lost_record) == [3, 7, 8, 9]
    assert sorted(epoch.record) == [0, 1, 2, 4, 5, 6, 10, 11]
    with pytest.raises(NoExample, match="record exam-3: too long: its text takes"):
        example(made, 3, 0)


WITHOUT_CHOICES = tuple((task, 0) for task in ("choice", "choice_restate", "judge"))


def test_a_task_that_does_not_fit_is_lost_and_no_other_takes_its_place():
    """Findings and report are too long for a row, caption and label are not."""
    report = dataclasses.replace(
        exam(0).reports[0], findings="echo " * 300, impression="wall " * 300
    )
    records = [dataclasses.replace(exam(i, media=[]), reports=(report,)) for i in range(40)]
    made = with_settings(MemoryDataset(records), task_weights=WITHOUT_CHOICES)
    epoch = make_epoch(made, 0)
    trained = Counter(TASKS[t] for t in epoch.task)
    lost = Counter(TASKS[t] for t in epoch.lost_task)
    assert trained + lost == drawn_tasks(made)
    assert set(trained) <= {"caption", "diagnosis"} and {"report", "findings"} <= set(lost)
    assert not set(trained) & set(lost) and epoch.dropped[TOO_LONG] >= 20


def test_a_choice_without_other_texts_is_lost_and_counted():
    """All exams are alike: nothing differs that a choice could be made of."""
    records = [dataclasses.replace(exam(0, media=[]), id=str(i)) for i in range(60)]
    made = with_settings(MemoryDataset(records))
    epoch = make_epoch(made, 0)
    lost = {TASKS[t] for t in epoch.lost_task}
    assert epoch.dropped == {ALONE: len(epoch.lost_task)} and lost == {
        "choice", "choice_restate", "judge"
    }  # fmt: skip
    assert {TASKS[t] for t in epoch.task}.isdisjoint(lost)


def test_an_organs_only_exam_has_no_choices_to_lose():
    made = with_settings(MemoryDataset([exam(0, "heart"), exam(1, "liver"), exam(2, "breast")]))
    made = made._replace(tasks={"choice": 10.0, "judge": 10.0, "caption": 0.1})
    epoch = make_epoch(made, 0)
    assert not epoch.dropped and {TASKS[t] for t in epoch.task} == {"caption"}


def long_ones(count=30, media=2):
    """Exams of which every third has long findings, and of which all have large images."""
    return [
        dataclasses.replace(
            exam(i, media=[Medium(0, 224, 224)] * media),
            reports=(
                Report(
                    "en", findings=f"{i} echo" * (150 if i % 3 == 0 else 9), caption=f"flow {i}"
                ),
            ),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_len": 300},
        {"seq_len": 700, "max_patches": 0},
        {"max_patches": 8},
        {"seq_len": 60, "max_patches": 4},
    ],
)
def test_the_advised_budgets_lose_and_shrink_nothing(changes):
    made = with_settings(MemoryDataset(long_ones()), **changes)
    try:
        needs = make_epoch(made, 0).lost_need
    except InputError as error:  # not one sample fits
        advice = str(error)
        assert "none of its 30 samples can be used" in advice
    else:
        advice = mend(made.settings, needs)
    advised = {k: int(v) for k, v in re.findall(r"--config\.(\w+)=(\d+)", advice)}
    assert advised and all(getattr(made.settings, key) < value for key, value in advised.items())
    wider = {**changes, **advised}
    after = make_epoch(with_settings(MemoryDataset(long_ones()), **wider), 0)
    assert not after.dropped and len(after.record) == 30
    if set(changes) == set(advised):
        assert not after.shrunk.any()


def test_images_made_smaller_for_a_row_are_counted():
    media = [Medium(0, 224, 224), Medium(0, 56, 56), Medium(8, 112, 112)]  # 256, 16, 4 × 64
    made = with_settings(MemoryDataset([exam(i, media=media) for i in range(8)]), max_patches=400)
    assert set(make_epoch(made, 0).shrunk) == {1}  # the loop's frames are fewer, and that is enough
    tight = with_settings(made.dataset, max_patches=100)
    assert set(make_epoch(tight, 0).shrunk) == {2}
    assert not make_epoch(with_settings(made.dataset, max_patches=528), 0).shrunk.any()


def test_data_of_which_nothing_fits_is_refused():
    made = with_settings(exams(liver=3), seq_len=8)
    with pytest.raises(InputError, match=r"none of its 3 samples can be used \(too long: 3\)"):
        make_epoch(made, 0)


def test_steps_are_located_over_epochs_of_different_lengths():
    made = with_settings(exams(liver=33), stage="instruction")
    epochs = Epochs(made)
    lengths = [(len(make_epoch(made, e).offsets) - 1) // 4 for e in range(3)]
    expected = [(e, b) for e, n in enumerate(lengths) for b in range(n)]
    assert [epochs.locate(step) for step in range(len(expected))] == expected
    assert Epochs(made).locate(len(expected) - 1) == expected[-1]  # from nothing


def test_rows_of_steps_hold_an_epoch_after_another():
    made = source(exams(liver=33))
    epochs = Epochs(made)
    steps = (len(epochs.epoch(0).offsets) - 1) // 4
    seen = [s for step in range(steps) for row in range(4) for s in epochs.row(step, row)]
    assert sorted(s.record for s in seen) == list(range(33))
    for s in seen:
        built = example(made, s.record, s.key)
        assert (built.tokens, built.patches) == (s.tokens, s.patches)
    following = [s for row in range(4) for s in epochs.row(steps, row)]
    assert {s.key for s in following}.isdisjoint(s.key for s in seen)


def test_chunks_do_not_matter(mixed, monkeypatch):
    made, epoch = mixed
    monkeypatch.setattr(epoch_module, "_CHUNK", 7)
    same(epoch, make_epoch(made, 0))


def _fill_of_fakes(*args):
    examples.open_dataset = fakes.open_dataset
    _fill(*args)


_fill = epoch_module._fill


def test_worker_processes_measure_the_same(monkeypatch):
    monkeypatch.setattr(examples, "open_dataset", fakes.open_dataset)
    monkeypatch.setattr(epoch_module, "_fill", _fill_of_fakes)
    monkeypatch.setattr(epoch_module, "_CHUNK", 16)
    settings = dataclasses.replace(SETTINGS, data="fake:150", mix_temperature=3.0)
    alone = make_epoch(open_source(settings), 0)
    called = []
    monkeypatch.setattr(epoch_module, "_measure_chunk", called.append)  # of this process
    together = make_epoch(open_source(dataclasses.replace(settings, workers=2)), 0)
    same(alone, together)
    assert not called


def test_what_is_refused_is_not_cached(tmp_path):
    made = with_settings(exams(liver=9), cache=tmp_path / "plans")

    def refuse(epoch):
        assert len(epoch.record) == 9
        raise InputError("no")

    for _ in range(2):
        with pytest.raises(InputError, match="no"):
            make_epoch(made, 0, refuse)
    assert not (tmp_path / "plans").exists()
    make_epoch(made, 0)
    with pytest.raises(InputError, match="no"):  # one that was cached is checked too
        make_epoch(made, 0, refuse)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "older"])
def test_a_cached_plan_is_read_and_a_damaged_one_made_again(tmp_path, monkeypatch, damage):
    made = with_settings(exams(liver=9), cache=tmp_path / "plans")
    first = make_epoch(made, 0)
    (file,) = (tmp_path / "plans").iterdir()
    good = file.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(epoch_module, "_plan", None)  # can't be called
        same(first, make_epoch(made, 0))
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    epoch_cache.write(tmp_path, "older", make_epoch(source(exams(liver=5)), 0)._asdict())
    damaged = {
        "cut": good[:-9],
        "flip": bytes(bad),
        "empty": b"",
        "other": b"\x80\x04N.",  # a pickle
        "older": good[:32] + (tmp_path / "older.plan").read_bytes()[32:],
    }
    file.write_bytes(damaged[damage])
    same(first, make_epoch(made, 0))
    assert file.read_bytes()[32:] == good[32:]
    assert [file.name] == [path.name for path in file.parent.iterdir()]


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    import io

    body = io.BytesIO()
    np.savez(body, record=np.array([print], object))
    data = body.getvalue()
    (tmp_path / "x.plan").write_bytes(hashlib.blake2b(data, digest_size=32).digest() + data)
    assert epoch_cache.read(tmp_path, "x", ["record"]) is None


def test_fingerprints_follow_what_plans_follow():
    dataset = exams(liver=3)
    changes = [
        {},
        {"seed": 1},
        {"seq_len": 1000},
        {"max_patches": 2044},
        {"max_image_patches": 100},
        {"global_batch_size": 8},
        {"mix_temperature": 2.0},
        {"stage": "alignment"},
        {"task_weights": (("caption", 9.0),)},
    ]
    found = {epoch_cache.fingerprint(with_settings(dataset, **change)) for change in changes}
    assert len(found) == len(changes)
    assert epoch_cache.fingerprint(source(MemoryDataset(dataset.records, "01"))) not in found
    moved = with_settings(dataset, workers=9, cache="elsewhere", data="elsewhere")
    assert epoch_cache.fingerprint(moved) == epoch_cache.fingerprint(source(dataset))


def test_fingerprints_follow_the_code_of_plans_alone(tmp_path):
    package = Path(epoch_cache.__file__).parents[1]
    command = "import sys, echovlm_jax.data.epoch; print(*(m.__file__ for n, m in"
    command += f" sys.modules.items() if n.startswith({package.name!r})))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    loaded = {path for path in map(Path, done.stdout.split()) if path.name != "__init__.py"}
    # Loaded by processing/__init__.py, for others.
    loaded -= {package / "processing" / f"{name}.py" for name in ("batch", "positions")}
    assert len(loaded) > 20 and loaded <= epoch_cache.plan_code(package).keys()

    copy = tmp_path / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = list(epoch_cache.plan_code(copy).values())
    no_change = {
        "data/tasks.py": "# more\n",
        "data/build.py": "x = 1\n",
        "phantom/exam.py": "x = 1\n",
    }
    for name, more in no_change.items():
        (copy / name).write_text((copy / name).read_text() + more)
    assert list(epoch_cache.plan_code(copy).values()) == before
    for name in (
        "data/epoch.py",
        "data/wordings.json",
        "processing/tokenizer.py",
        "config/__init__.py",
    ):
        text = (copy / name).read_text()
        (copy / name).write_text(text + ("x = 1\n" if name.endswith(".py") else " "))
        assert list(epoch_cache.plan_code(copy).values()) != before, name
        (copy / name).write_text(text)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    made = with_settings(exams(liver=3), cache=tmp_path / "file")
    with pytest.raises(InputError, match=r"data_cache .*file: cannot be written to"):
        make_epoch(made, 0)


@hypothesis_settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True), max_size=24),
    st.integers(1, 5),
)
def test_spreading_repeats_moves_whole_rows_and_counts_what_is_left(rows, size):
    record = np.array([exam for row in rows for exam in row], np.int64)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    samples = np.arange(len(record), dtype=np.int32)
    spread, clashes = spread_repeats(Rows(samples, offsets), record, size)
    assert (len(spread.offsets) - 1) % size == 0 and len(spread.offsets) - 1 - len(rows) < size
    made = [tuple(row) for row in np.split(spread.samples, spread.offsets[1:-1]) if len(row)]
    assert sorted(made) == sorted(
        tuple(row) for row in np.split(samples, offsets[1:-1]) if len(row)
    )

    def count(of):
        bounds = of.offsets[::size]
        batches = [of.samples[a:b] for a, b in pairwise(bounds)]
        held = [Counter(record[batch].tolist()) for batch in batches]
        return sum(n - 1 for batch in held for n in batch.values())

    padded = np.append(offsets, np.repeat(offsets[-1:], -len(rows) % size))
    assert clashes == count(spread) <= count(Rows(samples, padded))


def test_what_cannot_be_spread_is_counted():
    """Three rows of one exam in two batches of two: one batch has it twice."""
    rows = Rows(np.arange(3, dtype=np.int32), np.arange(4))
    spread, clashes = spread_repeats(rows, np.zeros(3, int), 2)
    assert clashes == 1 and sorted(spread.samples) == [0, 1, 2]
