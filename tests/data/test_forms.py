"""The forms that people keep records in: the same record, whichever it is; nothing lost unsaid."""

import json

import pytest

from echovlm_jax.data.build import Options, build, validate
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.forms import conversations_of, file_key, media_paths, unknown_keys
from echovlm_jax.data.json_list import parse_entry, read_entries
from echovlm_jax.data.official import read_record
from echovlm_jax.data.pipeline import make_batches
from echovlm_jax.data.quarantine import Refused
from echovlm_jax.errors import InputError
from tests.data.sources import record, write

ALL = Options(validation=0, test=0)


def read(raw):
    return read_record(raw, id="s/1", organ="liver", source="s", group="")


def asked(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


SYSTEM, Q, A = "Be brief.", "What is it?", "A node."
ANSWER = {"role": "assistant", "content": A}
USER = {"type": "text", "text": Q}
FORMS = {
    "llava": {
        "image": "a.png",
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "human", "value": f"<image>\n{Q}"},
            {"from": "gpt", "value": A},
        ],
    },
    "a system key": {"images": ["a.png"], "messages": asked(f"<image>{Q}", A), "system": SYSTEM},
    "a system key that repeats the turn": {
        "images": "a.png",
        "system": SYSTEM,
        "messages": [{"role": "system", "content": SYSTEM}, *asked(f"<image>{Q}", A)],
    },
    "images as objects": {
        "images": [{"path": "a.png", "bytes": None}],
        "messages": asked(f"<image>{Q}", A),
        "system": SYSTEM,
    },
    "no marks": {"images": ["a.png"], "messages": asked(Q, A), "system": SYSTEM},
    "query": {"images": ["a.png"], "query": f"<image>{Q}", "response": A, "system": SYSTEM},
    "instruction": {
        **{"images": ["a.png"], "instruction": "<image>What", "input": "is it?", "output": A},
        "system_prompt": SYSTEM,
    },
    "pairs": {"image": "a.png", "conversation": [{"user": Q, "assistant": A}], "system": SYSTEM},
    "image_url": {
        "system": SYSTEM,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, USER],
            },
            ANSWER,
        ],
    },
    "image in the content": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [{"type": "image", "image": "file://a.png"}, USER]},
            {"role": "assistant", "content": [{"type": "text", "text": A}]},
        ],
    },
    "image in the content and beside it": {
        "images": ["a.png"],
        "system": SYSTEM,
        "messages": [{"role": "user", "content": [{"image": "a.png"}, USER]}, ANSWER],
    },
    "one conversation by name": {
        **{"image": "a.png", "system": SYSTEM},
        "conversations": {"en": asked(f"<image>{Q}", A)},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form):
    [(ending, raw)] = conversations_of(FORMS[form])
    found = read(raw)
    assert ending == "" and found.images == ("a.png",) == media_paths(raw)
    texts = [(turn.role, " ".join(turn.text.split())) for turn in found.record.turns]
    assert texts == [("system", SYSTEM), ("user", Q), ("assistant", A)]
    assert not list(unknown_keys(raw))


def test_a_history_comes_first_and_videos_by_their_marks():
    raw = {"query": "And?", "response": "C.", "history": [["<image><video>A?", "B."]]}
    found = read(raw | {"images": ["a.png"], "videos": ["b.dcm"]})
    assert [turn.text for turn in found.record.turns] == ["A?", "B.", "And?", "C."]
    assert found.images == ("a.png", "b.dcm")
    turned = raw | {"history": [["<video>A?<image>", "B."]]}
    assert media_paths(turned | {"image": "a.png", "video": "b.dcm"}) == ("b.dcm", "a.png")
    one = {"video": "b.dcm", "messages": asked("<image>A?", "B.")}  # the file tells what it is
    assert media_paths(one) == ("b.dcm",)


def test_windows_paths_are_passed_on_as_they_are():
    assert media_paths({"image": ".\\a\\b.png"}) == (".\\a\\b.png",)
    assert media_paths({"image": "C:\\a.png"}) == ("C:\\a.png",)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("not understood", {"tools": "[{}]"}),
        ("not understood", {"rejected_response": "B."}),
        ("not understood", {"chosen": ["x"]}),
        ("not understood", {"weight": 0.5}),
        ("not understood", {"weight": 0}),
        ("not understood", {"audios": ["a.wav"]}),
        ("not understood", {"objects": {"bbox": [[1, 2, 3, 4]]}}),
        ("not understood", {"messages": [asked(Q)[0], {**ANSWER, "loss": False}]}),
        ("not understood", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
        ("not understood", {"images": ["https://a.b/c.png"]}),
        ("not understood", {"images": ["data:image/png;base64,AA"]}),
        ("not understood", {"images": [{"path": None, "bytes": "AA"}]}),
        ("not understood", {"messages": [asked(Q)[0], {**ANSWER, "train": False}]}),
        ("not understood", {"images": None, "image_path": "a.PNG"}),
        ("not understood", {"images": [], "imgs": ["cases/a.nii.gz"]}),
        ("not understood", {"messages": None, "question": Q, "answer": "A", "options": ["x", "y"]}),
        ("wrong type", {"messages": None, "question": Q, "answer": ["a cyst", "cyst"]}),
        ("wrong type", {"images": [{"path": None, "bytes": None}]}),
        ("wrong type", {"system": ["a"]}),
        ("wrong type", {"image": "b.png"}),
        (
            "wrong type",
            {"messages": None, "query": "a", "response": "b", "instruction": "c", "output": "d"},
        ),
        ("wrong type", {"conversations": asked(Q, A)}),
        ("turns", {"system": "a", "messages": [{"role": "system", "content": "b"}, *asked(Q, A)]}),
        ("turns", {"messages": [*asked(Q, A), {"role": "tool", "content": "1"}]}),
        ("turns", {"messages": [{"content": "x"}]}),
        ("image marks", {"images": ["a.png", "b.png"], "messages": asked(f"<image>{Q}", A)}),
        ("image marks", {"images": [], "messages": asked(f"<image>{Q}", A)}),
        *(
            ("image marks", {"messages": asked(f"{mark}{Q}", A)})
            for mark in ("<Image>", "<image 1>", "<image_1>", "<ImageHere>", "<img>a.png</img>")
        ),
        *(
            ("image marks", {"messages": asked(f"{mark}{Q}", A)})
            for mark in ("<image/>", "< image >", "＜image＞", "&lt;image&gt;", "<VIDEO>")
        ),
    ],
)
def test_what_would_change_the_meaning_is_refused(reason, changes):
    raw = {"images": ["a.png"], "messages": asked(Q, A)}
    with pytest.raises(Refused) as refused:
        read(raw | changes)
    assert refused.value.reason == reason and "\n" not in refused.value.detail


@pytest.mark.parametrize("key", ["tools", "rejected", "objects", "loss", "weight"])
def test_what_says_nothing_changes_nothing(key):
    empty = 1 if key in ("loss", "weight") else None
    assert read({"images": ["a.png"], "messages": asked(Q, A), key: empty}).images == ("a.png",)


def test_a_false_value_is_counted():
    assert list(unknown_keys({"usable": False, "note": None, "messages": asked(Q, A)})) == [
        "usable"
    ]
    assert file_key({"images": ["a.png"], "question": "See a.png", "answer": "b.png"}) is None


def test_conversations_by_name_are_records_of_their_own(tmp_path):
    entry = record(0) | {"conversations_zh": asked("<image>何物？", "结节。")}
    named = {**record(1), "conversations": {"a": asked("x", "y"), "b": asked("z", "w")}}
    listed = {**record(2), "messages": [asked("x", "y"), asked("z", "w")]}
    del listed["conversations"]
    sources, images = write(tmp_path, [entry, named, listed, record(3)])
    report = build(sources, images, tmp_path / "out", ALL)
    assert report["records"] == report["kept"] == 7
    dataset = open_dataset(tmp_path / "out", "train")
    found = {dataset.record(n).id: dataset.record(n) for n in range(7)}
    assert set(found) == {
        *("liver/exam0/conversations", "liver/exam0/conversations_zh", "liver/exam3"),
        *("liver/exam1/conversations/a", "liver/exam1/conversations/b"),
        *("liver/exam2/messages/1", "liver/exam2/messages/2"),
    }
    assert found["liver/exam0/conversations_zh"].turns[1].text == "结节。"
    groups = {name: each.group for name, each in found.items()}  # one picture, one split
    assert groups["liver/exam1/conversations/a"] == groups["liver/exam1/conversations/b"] != ""


def test_keys_that_nobody_reads_are_counted_by_name(tmp_path):
    entries = [record(0, tags=["x"], score=1), record(1, score=2, empty=None), record(2, input="")]
    entries[2]["conversations"][0]["mood"] = "good"
    entries[2] |= {"question": "a", "answer": "b"}  # beside a conversation
    sources, images = write(tmp_path, entries)
    expected = {"answer": 1, "question": 1, "score": 2, "tags": 1, "turn.mood": 1}
    assert validate(sources, images, ALL)["ignored_keys"] == expected
    report = build(sources, images, tmp_path / "out", ALL)
    assert report["ignored_keys"] == expected


def test_conversations_without_images_are_kept_and_trained(tmp_path):
    alone = {"id": "t", "image": [], "conversations": record(0)["conversations"][1:]}
    alone["conversations"] = asked("超声所见是什么？", "超声所见：结节。\n超声提示：良性。")
    sources, images = write(tmp_path, [record(0), alone, {**record(1, images=2)}])
    report = build(sources, images, tmp_path / "out", ALL)
    assert report["kept"] == 3
    dataset = open_dataset(tmp_path / "out", "train")
    found = {dataset.record(n).id: n for n in range(3)}
    number = found["liver/t"]
    assert dataset.record(number).media == () and dataset.media(number) == []
    assert dataset.record(number).reports == ()  # a report without images would be made up
    config = {
        **{"data": str(tmp_path / "out"), "model": "tiny", "stage": "instruction", "seq_len": 512},
        **{"max_patches": 1024, "max_image_patches": 64, "global_batch_size": 1, "seed": 0},
        **{"mix_temperature": 1.0, "data_workers": 0},
    }
    batch = next(iter(make_batches(config)))
    assert len(set(batch["segment_ids"][0].tolist()) - {0}) == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('{"id": 1}\n{"id": 2}\n\n{"id": 3}', 3),
        ('\ufeff{"id": 1}\r\n{"id": 2}\r\n', 2),
        ('{"id": 1}', 1),
        ('{\n "id": 1\n}\n{\n "id": 2\n}\n', 2),
        ('{"data": [{"id": 1}, {"id": 2}]}', 2),
        ('{"version": {"a": [1]}, "n": 2, "records": [{"id": 1}], "more": null}', 1),
        ('{"data": []}', 0),
        ('{"id": 1}\n[2]\n3', 3),
    ],
)
@pytest.mark.parametrize("read_size", [3, 2**20])
def test_a_record_a_line_and_a_list_under_a_name(tmp_path, monkeypatch, text, count, read_size):
    monkeypatch.setattr("echovlm_jax.data.json_list._READ", read_size)
    path = tmp_path / "records.jsonl"
    path.write_text(text, "utf-8", newline="")
    entries, data = list(read_entries(path)), path.read_bytes()
    assert len(entries) == count
    for entry in entries:
        assert parse_entry(data[entry.offset : entry.offset + entry.size]) == entry.value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": 1}\n{"id": 2', "line 2: is not valid JSON"),
        ('{"id": 1},\n{"id": 2}', "line 1: is not valid JSON"),
        ('{"data": [{"id": 1}], "test": [{"id": 2}]}', "has a list under 'test'"),
        ('{"data": [{"id": 1}]}\n{"id": 2}', "something follows"),
        ('{"data": [{"id": 1}', "line 1: "),
        ('{"data": [1] "a": 2}', "',' or '}' is missing"),
        ('{"train": [{"messages": []}], "test": []}', "has a list under 'train'"),
        ('"text"', "must hold a JSON list"),
    ],
)
def test_other_files_are_refused_with_the_line(tmp_path, text, said):
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said.replace("'", ".")) as refused:
        list(read_entries(path))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_jsonl_builds_as_the_list_does(tmp_path):
    entries = [record(n) for n in range(3)]
    sources, images = write(tmp_path, entries)
    lines = tmp_path / "lines" / "liver.jsonl"
    lines.parent.mkdir()
    lines.write_text("\n".join(map(json.dumps, entries)))
    one = build(sources, images, tmp_path / "one", ALL)
    two = build([lines], images, tmp_path / "two", ALL)
    assert {**one, "out": ""} == {**two, "out": ""} and one["kept"] == 3
    name = "train.records.jsonl"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "records.json"
    path.write_text('[{"id": "1"}]', encoding=encoding)
    with pytest.raises(InputError, match=r"records\.json: is UTF-16 or UTF-32; save it as UTF-8"):
        list(read_entries(path))
