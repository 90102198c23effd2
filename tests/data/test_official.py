"""Official records: what is kept, and the one reason for which each bad one is refused."""

import json
from pathlib import Path

import pytest

from echovlm_jax.data.json_list import MAX_ENTRY, parse_entry, read_entries
from echovlm_jax.data.official import group_ids, inside, read_record, record_id
from echovlm_jax.data.organs import organ_name, organ_of_file, read_mapping
from echovlm_jax.data.quarantine import REASONS, Refused
from echovlm_jax.errors import InputError
from tests.data.sources import record


def read(raw):
    return read_record(raw, id="s/1", organ="liver", source="s", group="")


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


def test_both_forms_say_the_same():
    listed = {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A."},
            {"role": "user", "content": "<image>And this?"},
            {"role": "assistant", "content": "B."},
        ],
    }
    old = {
        "id": "1",
        "image": ["a.png", "b.png"],
        "conversations": turns(
            ("system", "Be brief."),
            ("human", "<image>\nWhat?"),
            ("gpt", "A."),
            ("human", "And this?<image>"),
            ("gpt", "B."),
        ),
    }
    assert read(listed) == read(old)
    assert [turn.text for turn in read(old).record.turns] == [
        *("Be brief.", "What?", "A.", "And this?", "B.")
    ]


def test_reports_come_from_what_is_stated_described_and_answered():
    raw = record(
        1,
        description="见一低回声结节。",
        reports=[
            {
                "language": "en",
                "findings": "A node.",
                "questions": [{"question": "Shape?", "answer": "oval", "options": ["oval", "x"]}],
            }
        ],
    )
    raw["conversations"][1]["value"] = "超声所见：结节。\n超声提示：良性。"
    english, chinese = read(raw).record.reports
    assert (english.language, english.findings, english.impression) == ("en", "A node.", "")
    assert english.questions[0].options == ("oval", "x")
    assert (chinese.caption, chinese.findings) == ("见一低回声结节。", "结节。")
    assert chinese.impression == "良性。"


def _with(**changes):
    return {**record(1), **changes}


BAD = [
    ("not an object", "text"),
    ("wrong type", _with(image={"a": 1})),
    ("wrong type", _with(image=["a.png", 3])),
    ("wrong type", _with(images=["a.png"])),
    ("wrong type", _with(conversations="hello")),
    ("wrong type", _with(conversations=turns(("human", None), ("gpt", "b")))),
    ("wrong type", _with(organ=3)),
    ("wrong type", _with(synthetic="yes")),
    ("wrong type", _with(reports={})),
    ("wrong type", _with(reports=[{"language": "fr", "caption": "x"}])),
    ("turns", _with(conversations=turns(("human", "<image>a")))),
    ("turns", _with(conversations=turns(("gpt", "a"), ("human", "<image>b")))),
    ("turns", _with(conversations=turns(("human", "<image>a"), ("human", "b"), ("gpt", "c")))),
    ("turns", _with(conversations=turns(("tool", "a"), ("human", "<image>b"), ("gpt", "c")))),
    ("empty answer", _with(conversations=turns(("human", "<image>a"), ("gpt", " \n")))),
    ("empty question", _with(conversations=turns(("human", " "), ("gpt", "a")))),
    ("image marks", _with(conversations=turns(("human", "<image><image>a"), ("gpt", "b")))),
    ("image marks", _with(conversations=turns(("human", "a"), ("gpt", "<image>b")))),
    ("control token", _with(conversations=turns(("human", "<image>a"), ("gpt", "<|im_end|>")))),
    ("not UTF-8", _with(description="\ud800")),
    ("no text", {"id": "1", "image": "a.png"}),
    ("no text", _with(reports=[{"language": "en"}])),
    ("image marks", _with(image=[])),
    ("image marks", _with(image=["a.png", "b.png"])),
    ("no images", {"reports": [{"language": "en", "findings": "x"}]}),
    ("control token", _with(conversations=turns(("human", "<|im_<image>end|>"), ("gpt", "b")))),
    ("control token", _with(description="<|box_1|>")),
    ("image marks", _with(conversations=turns(("human", "<ima<image>ge>"), ("gpt", "b")))),
    ("too many images", record(1, images=300)),
    ("duplicate key", parse_entry(b'{"id": "1", "id": "2"}')),
]


@pytest.mark.parametrize(("reason", "raw"), BAD)
def test_each_fault_has_its_reason(reason, raw):
    with pytest.raises(Refused) as refused:
        read(raw)
    assert refused.value.reason == reason
    assert reason in REASONS and "\n" not in refused.value.detail


@pytest.mark.parametrize("key", ["id", "patient_id", "study_id"])
@pytest.mark.parametrize("value", [1.5, [1], {"a": 1}, True], ids=str)
def test_what_is_no_id_is_refused(key, value):
    with pytest.raises(Refused, match=f"{key} must be a text or a whole number"):
        read(record(0) | {key: value})


def test_numbers_are_ids_however_long_and_a_tables_gap_is_none(tmp_path):
    path = _file(tmp_path, b'[{"id": 123456789012345678901234, "patient_id": NaN}]')
    raw = next(read_entries(path)).value
    assert record_id(raw, 0) == "123456789012345678901234"
    assert group_ids(raw) == []
    assert group_ids({"patient_id": 7.0}) == group_ids({"patient_id": 7}) != []


def test_an_options_answer_must_be_one_of_them():
    question = {"question": "Which?", "answer": "c", "options": ["a", "b"]}
    with pytest.raises(Refused, match="one of its options"):
        read(_with(reports=[{"language": "en", "questions": [question]}]))


@pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "a/../../x.png", "", "a\0b", "..\\x"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "root").mkdir()
    with pytest.raises(Refused) as refused:
        inside(tmp_path / "root", path)
    assert refused.value.reason == "path outside the folder"


def test_links_may_not_lead_out(tmp_path):
    root = (tmp_path / "root").resolve()
    root.mkdir()
    (tmp_path / "x.png").write_bytes(b"x")
    (root / "kept.png").write_bytes(b"x")
    (root / "out.png").symlink_to(tmp_path / "x.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "round.png").symlink_to(root / "round.png")
    (root / "in.png").symlink_to(root / "kept.png")
    assert inside(root, "in.png") == root / "kept.png"
    reasons = {}
    for path in ("out.png", "folder/x.png", "round.png", "none.png", "a" * 5000):
        with pytest.raises(Refused) as refused:
            inside(root, path)
        reasons[path[:12]] = refused.value.reason
    assert reasons == {
        "out.png": "path outside the folder",
        "folder/x.png": "path outside the folder",
        **dict.fromkeys(("round.png", "none.png", "a" * 12), "missing image"),
    }


@pytest.mark.parametrize(
    ("name", "organ"),
    [
        ("Annotated Ultrasound Liver images", "liver"),
        ("2D_Ultrasound_Sequences_Of_The_Liver", "liver"),
        *((name, "breast") for name in ("BUS-BRA", "BUSC", "BUSI", "BUS_UC", "GDPH&SYSUCC")),
        *(("QAMEBI", "breast"), ("AUITD", "thyroid"), ("CCAUS", "vessel")),
        *(("ThyroidNodules", "thyroid"), ("甲状腺2024", "thyroid"), ("kidneys", "kidney")),
        *(("delivery", "unknown"), ("exams", "unknown"), ("liver_and_kidney", "unknown")),
    ],
)
def test_a_files_name_tells_the_organ(name, organ):
    assert organ_of_file(name) == organ


def test_a_stated_organ_goes_by_one_name():
    assert [organ_name(text) for text in ("Breast ", "Uterus", "肝脏", "Spleen")] == [
        *("breast", "gynaecology", "liver", "spleen")
    ]


def test_a_mapping_must_name_sources(tmp_path):
    path = tmp_path / "organs.json"
    path.write_text('{"a": "Thyroid", "b.json": "spleen"}')
    assert read_mapping(path, ("a", "b")) == {"a": "thyroid", "b": "spleen"}
    with pytest.raises(InputError, match=r"'b\.json' is none of the sources a"):
        read_mapping(path, ("a",))


def _file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "list.json"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("read_size", [1, 7, 2**20])
def test_a_list_is_read_entry_by_entry(tmp_path, monkeypatch, read_size):
    values = [{"id": "é肝"}, [1, {"a": None}], "x\\\n", 123456, -1.5, True, {}, "𝄞" * 3]
    data = b"\xef\xbb\xbf \n" + json.dumps(values, ensure_ascii=False, indent=1).encode()
    monkeypatch.setattr("echovlm_jax.data.json_list._READ", read_size)
    entries = list(read_entries(_file(tmp_path, data)))
    assert [entry.value for entry in entries] == values
    for entry in entries:
        assert parse_entry(data[entry.offset : entry.offset + entry.size]) == entry.value


def test_bytes_that_are_no_text_spoil_their_own_entry_only(tmp_path):
    data = '[{"a": "肝'.encode()[:-1] + b'"}, {"a": "\xff"}, {"a": "b"}]'
    entries = list(read_entries(_file(tmp_path, data)))
    assert [entry.value["a"].isascii() for entry in entries] == [False, False, True]
    assert data[entries[2].offset :] == b'{"a": "b"}]'


@pytest.mark.parametrize(
    ("data", "line"),
    [
        *((b"", 1), (b'{"id": 1', 1), (b"[1] 2", 1), (b"[1 2]", 1), (b"\xff", 1)),
        *((b'[\n{"a": 1},\n{"a" 2}\n]', 3), (b"[\n1,\n]", 3), (b'[{"a": 1}', 1), (b"[" * 99999, 1)),
    ],
)
def test_a_file_that_is_no_list_is_refused_with_its_line(tmp_path, data, line):
    with pytest.raises(InputError, match=f"list.json: line {line}: ") as refused:
        list(read_entries(_file(tmp_path, data)))
    assert "\n" not in str(refused.value)


def test_an_entry_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("echovlm_jax.data.json_list.MAX_ENTRY", 1000)
    monkeypatch.setattr("echovlm_jax.data.json_list._READ", 100)
    assert MAX_ENTRY > 2**20
    with pytest.raises(InputError, match="longer than 1000"):
        list(read_entries(_file(tmp_path, b'["' + b"x" * 10_000 + b'"]')))
