"""`data build`: everything is kept or has a reason, the same each time, whatever happens to it."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from echovlm_jax.cli import main
from echovlm_jax.data import build as building
from echovlm_jax.data import folder, parts
from echovlm_jax.data.build import Options, build, validate
from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.groups import SPLITS, group
from echovlm_jax.data.official import group_ids
from echovlm_jax.data.quarantine import REASONS
from echovlm_jax.data.sources import read_sources
from echovlm_jax.errors import InputError
from tests.data.sources import encoded, record, write

ALL = Options(validation=0, test=0)


def everything(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_counts_add_up_and_each_loss_has_its_reason(tmp_path):
    bad = [
        record(0),  # a second one
        "text",
        {**record(7), "image": ["../liver.json"]},
        {**record(8), "image": ["gone.png"]},
        {**record(9), "image": ["damaged.jpg"]},
    ]
    sources, images = write(tmp_path, [record(n, n % 3 + 1) for n in range(6)] + bad)
    (images / "gone.png").unlink()
    (images / "damaged.jpg").write_bytes(encoded(1, "JPEG")[:300])
    report = build(sources, images, tmp_path / "out", ALL)
    assert report["records"] == 11 and report["kept"] == 6
    reasons = ["duplicate id", "missing image", "not an object", "path outside the folder"]
    assert report["quarantined"] == dict.fromkeys([*reasons, "unreadable image"], 1)
    assert report["organs"] == {"liver": 6} and report["splits"] == {"train": 6}
    lines = (tmp_path / "out" / folder.QUARANTINE).read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert str(tmp_path) not in "".join(lines)  # files go by the names that the records have
    assert {line["number"]: line["reason"] for line in listed} == {
        **{6: "duplicate id", 7: "not an object", 8: "path outside the folder"},
        **{9: "missing image", 10: "unreadable image"},
    }
    checked = validate(sources, images, ALL)
    assert not checked["ok"] and checked["examples"] == listed
    assert {k: checked[k] for k in ("records", "kept", "quarantined")} == {
        k: report[k] for k in ("records", "kept", "quarantined")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "liver.json", "out"]


def test_tfds_reads_it_without_tensorflow(tmp_path):
    sources, images = write(tmp_path, [record(n, 2, organ="Thyroid") for n in range(3)])
    build(sources, images, tmp_path / "out", ALL)
    source = tfds.builder_from_directory(tmp_path / "out").as_data_source(split="train")
    assert "tensorflow" not in sys.modules and len(source) == 3
    dataset = open_dataset(tmp_path / "out")
    for n, item in enumerate(source):
        assert item["id"].decode() == dataset.record(n).id == f"liver/exam{n}"
        assert item["organ"] == b"thyroid"
        assert list(item["images"]) == [
            (images / f"{n}_{view}.png").read_bytes() for view in range(2)
        ]
        assert list(item["heights"]) == [20, 20] and list(item["frames"]) == [0, 0]
        # 20 × 30 pixels grow to 56 × 84 to hold the least that Qwen2-VL takes.
        assert list(item["patches"]) == [4 * 6, 4 * 6] and list(item["image_tokens"]) == [6, 6]
        assert item["text_bytes"] == len(f"What is seen?Finding {n}.")
        assert [text.decode() for text in item["conversations"]["text"]] == [
            turn.text for turn in dataset.record(n).turns
        ]


def test_no_group_is_in_two_splits(tmp_path):
    ids = [{"patient_id": f"p{n // 3}"} if n % 2 else {"exam_id": n // 4} for n in range(600)]
    records = [record(n, **ids[n]) for n in range(600)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    found = read_sources([path])
    split = dict(enumerate(group(found.keys, found.ties, validation=0.2, test=0.2).split.tolist()))
    for kind in ("patient_id", "exam_id"):
        of: dict[str, set[int]] = {}
        for n, entry in enumerate(records):
            if kind in entry:
                of.setdefault(str(entry[kind]), set()).add(split[n])
        assert all(len(splits) == 1 for splits in of.values())
    shares = Counter(split.values())
    assert all(shares[n] > 50 for n in range(3))
    # Which records come in which order changes nothing.
    path.write_text(json.dumps(records[::-1]))
    other = read_sources([path])
    turned = group(other.keys, other.ties, validation=0.2, test=0.2).split[::-1]
    assert turned.tolist() == list(split.values())


@pytest.mark.parametrize(
    "number", [10**24, 3.0, "p"], ids=["many digits", "a table's float", "text"]
)
def test_a_patient_is_one_however_the_number_is_written(number):
    (same,) = {tuple(group_ids({"patient_id": n})) for n in (number, number)}
    assert same and same != tuple(group_ids({"patient_id": number * 2}))


def test_alone_records_have_no_group_and_ids_stay_out_of_it(tmp_path):
    records = [record(0, patient_id="MRN1"), record(1, patient_id="MRN1"), record(2)]
    sources, images = write(tmp_path, records)
    build(sources, images, tmp_path / "out", ALL)
    dataset = open_dataset(tmp_path / "out")
    groups = [dataset.record(n).group for n in range(3)]
    assert groups[0] == groups[1] != "" and groups[2] == ""
    assert all(b"MRN1" not in data for data in everything(tmp_path / "out").values())


def test_it_is_the_same_each_time_and_in_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_RECORDS", 4)
    sources, images = write(tmp_path, [record(n) for n in range(11)])
    options = Options(validation=0.2, test=0.2)
    made = []
    for workers in (1, 2):
        build(sources, images, tmp_path / "out", options, workers=workers)
        made.append(everything(tmp_path / "out"))
        (tmp_path / "out").rename(tmp_path / f"out{workers}")
    assert made[0] == made[1]
    assert sum(name.startswith("echovlm-train") for name in made[0]) > 1


class _Killed(BaseException):
    pass


def test_a_killed_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_RECORDS", 2)
    bad = {**record(1), "image": ["gone.png"]}
    sources, images = write(tmp_path, [record(0), bad, *(record(n) for n in range(2, 9))])
    (images / "gone.png").unlink()
    build(sources, images, tmp_path / "whole", ALL)
    real, made = parts._write, []

    def write_two(work, plan, part):
        if len(made) == 2:
            raise _Killed
        made.append(part.number)
        real(work, plan, part)

    monkeypatch.setattr(parts, "_write", write_two)
    with pytest.raises(_Killed):
        build(sources, images, tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()
    # What a kill in the middle of a part leaves.
    (tmp_path / "out.partial" / "part-00004.array_record.0.tmp").write_bytes(b"half")
    made.clear()
    monkeypatch.setattr(parts, "_write", lambda *job: (made.append(job[2].number), real(*job)))
    build(sources, images, tmp_path / "out", ALL)
    assert made == [0, 2, 3, 4]  # 1 was complete; 0 had left a record out
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_kill_while_it_clears_up_blocks_nothing(left, tmp_path, monkeypatch):
    """What is left of the work is still known as ours, when OUT is wanted once more."""
    sources, images = write(tmp_path, [record(n) for n in range(3)])
    out, unlink, deleted = tmp_path / "out", os.unlink, []

    def killed(path, **options):
        if out.exists():
            if len(deleted) == left:
                raise KeyboardInterrupt
            deleted.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed)
        build(sources, images, out, ALL)
    out.rename(tmp_path / "first")
    build(sources, images, out, ALL)
    assert everything(out) == everything(tmp_path / "first")
    assert not (tmp_path / "out.partial").exists()


def test_another_build_does_not_take_up_the_parts(tmp_path, monkeypatch):
    sources, images = write(tmp_path, [record(n) for n in range(3)])
    real = building._finish

    def fail(*_):
        raise _Killed

    monkeypatch.setattr(building, "_finish", fail)
    with pytest.raises(_Killed):
        build(sources, images, tmp_path / "out", ALL)
    monkeypatch.setattr(building, "_finish", real)
    sources[0].write_text(json.dumps([record(2)]))
    assert build(sources, images, tmp_path / "out", ALL)["records"] == 1


def test_strangers_folders_are_left_alone(tmp_path):
    sources, images = write(tmp_path, [record(0)])
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="no unfinished work of ours"):
        build(sources, images, tmp_path / "out", ALL)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists; choose another"):
        build(sources, images, tmp_path / "there", ALL)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


def _broken(path: Path) -> None:
    path.write_text(json.dumps([record(0), record(1)], indent=1)[:-40])


def test_bad_usage_is_one_line_and_leaves_nothing(tmp_path, capsys):
    sources, images = write(tmp_path, [record(0), record(1)])
    other = tmp_path / "other" / "liver.json"
    other.parent.mkdir()
    other.write_text("[]")
    broken = tmp_path / "broken.json"
    _broken(broken)
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    nothing = tmp_path / "nothing.json"
    nothing.write_text('["a", "b"]')
    good, root = str(sources[0]), str(images)
    cases = {
        "line ": ["--source", str(broken), "--images", root],
        "rename one": ["--source", good, str(other), "--images", root],
        "no record in them": ["--source", str(empty), "--images", root],
        "2 not an object": ["--source", str(nothing), "--images", root],
        "No such file": ["--source", str(tmp_path / "none.json"), "--images", root],
        "no such folder": ["--source", good, "--images", str(tmp_path / "none")],
        "together below 1": ["--source", good, "--images", root, "--test", "1.5"],
        "num_frames": ["--source", good, "--images", root, "--num-frames", "0"],
        "not a regular file": ["--source", root, "--images", root],
    }
    before = sorted(tmp_path.iterdir())
    for sign, words in cases.items():
        code = main(["data", "build", *words, "--out", str(tmp_path / "out"), "--workers", "1"])
        printed = capsys.readouterr()
        assert code == 2 and sign in printed.err, (sign, printed.err)
        assert printed.err.count("\n") == 1 and not printed.out
        assert sorted(tmp_path.iterdir()) == before


def test_commands_print_the_promised_keys(tmp_path, capsys):
    sources, images = write(tmp_path, [record(0), record(1), "x"], "exams.json")
    mapping = tmp_path / "organs.json"
    mapping.write_text('{"exams": "spleen"}')
    words = ["--source", str(sources[0]), "--images", str(images), "--json", "--workers", "1"]
    assert main(["data", "validate", *words]) == 1
    assert json.loads(capsys.readouterr().out)["quarantined"] == {"not an object": 1}
    words += ["--out", str(tmp_path / "out"), "--organs", str(mapping)]
    assert main(["data", "build", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["records"], printed["kept"]) == (3, 2)
    assert printed["quarantined"] == {"not an object": 1} and printed["organs"] == {"spleen": 2}


def test_a_dead_process_is_an_error(tmp_path):
    with pytest.raises(InputError, match="a process died"):
        list(building.in_processes(_die, str(tmp_path), [0, 1, 2, 3], workers=2))


def _die(work, number):
    import os

    os._exit(0)


@pytest.mark.slow
def test_memory_is_flat_over_a_long_list(tmp_path):
    """80 MB of records beside 8 MB: the second look at a file costs no more than the first."""
    peaks = []
    for count in (20_000, 200_000):
        path = tmp_path / f"{count}.json"
        with open(path, "w") as file:
            file.write("[\n")
            for n in range(count):
                entry = record(n, description="x" * 200)
                file.write(json.dumps(entry) + (",\n" if n < count - 1 else "\n]"))
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from echovlm_jax.data.sources import read_sources\n"
            "assert len(read_sources([Path(sys.argv[1])]).rows) == int(sys.argv[2])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        words = [sys.executable, "-c", code, str(path), str(count)]
        peaks.append(int(subprocess.run(words, check=True, capture_output=True).stdout))
    assert peaks[1] - peaks[0] < 80 * 1024  # kB: 180,000 rows of about 200 bytes while sorting


@pytest.mark.slow
def test_beam_makes_the_same_dataset(tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
    from echovlm_jax.data.beam import beam_runner

    monkeypatch.setattr(building, "SHARD_RECORDS", 4)
    sources, images = write(tmp_path, [record(n) for n in range(11)] + ["bad"])
    build(sources, images, tmp_path / "plain", ALL)
    build(sources, images, tmp_path / "beam", ALL, runner=beam_runner(["--runner=DirectRunner"]))
    assert everything(tmp_path / "plain") == everything(tmp_path / "beam")


@pytest.mark.slow
def test_every_real_record_is_kept_or_named(tmp_path, public_data):
    """The 9,513 public records, with pictures made for them, some of them spoilt; and no patient of
    the sets whose names tell is in two splits."""
    sources = sorted((public_data / "echovlm_public").glob("*.json"))
    images, spoilt, n = tmp_path / "images", Counter[str](), 0
    for source in sources:
        for entry in json.loads(source.read_text("utf-8")):
            for name in entry["image"]:
                path, n = images / name, n + 1
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
                data = encoded(n, kind)
                if n % 97 == 0:
                    spoilt["missing image"] += 1
                elif n % 101 == 0:
                    spoilt["unreadable image"] += 1
                    path.write_bytes(data[: len(data) // 2])
                else:
                    path.write_bytes(data)
    pattern = r"(bus_\d+|tiroides\d+|volunteer\d+|sample_\d+|^\d{18})"
    options = Options(group_pattern=pattern)
    report = build(sources, images, tmp_path / "out", options, workers=2)
    assert report["groups"] == {"pattern": 1064 + 363 + 7 + 55 + 38}
    assert report["ungrouped"] == 5586 and report["largest_group"] == 149
    assert report["records"] == 9513 == report["kept"] + sum(report["quarantined"].values())
    assert report["quarantined"] == dict(spoilt) and spoilt.keys() <= REASONS.keys()
    assert set(report["organs"]) == {"breast", "liver", "thyroid", "vessel"}
    lines = (tmp_path / "out" / folder.QUARANTINE).read_text().splitlines()
    seen = {(line["source"], line["id"]) for line in map(json.loads, lines)}
    datasets = [open_dataset(tmp_path / "out", split) for split in SPLITS]
    ids = [d.record(i).id for d in datasets for i in range(len(d))]
    assert len(seen) == len(lines) and len(set(ids)) == len(ids) == report["kept"]
    splits: dict[str, set[int]] = {}
    for n, dataset in enumerate(datasets):
        for i in range(len(dataset)):
            if found := re.search(pattern, dataset.record(i).id.split("/", 1)[1]):
                splits.setdefault(found[1], set()).add(n)
    assert len(splits) > 1500 and all(len(of) == 1 for of in splits.values())
    assert all(sum(n in of for of in splits.values()) > 50 for n in range(3))


@pytest.mark.slow
def test_sigkill_leaves_no_process_and_costs_no_record(tmp_path):
    """Killed again and again as parts are done, then let run: the same as never killed."""
    sources, images = write(tmp_path, [record(n, 2) for n in range(3000)])
    build(sources, images, tmp_path / "whole", ALL)
    code = (
        "import sys; from echovlm_jax.data.build import Options, build\n"
        "if __name__ == '__main__':\n"
        "    build([sys.argv[1]], sys.argv[2], sys.argv[3], Options(0, 0), workers=2)\n"
    )
    (tmp_path / "run.py").write_text(code)
    words = [str(path) for path in (tmp_path / "run.py", sources[0], images, tmp_path / "out")]
    work = tmp_path / "out.partial"
    for parts_done in (1, 3, 5):
        process = subprocess.Popen([sys.executable, *words])
        while process.poll() is None and len(list(work.glob("part-*.json"))) < parts_done:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        process.kill()
        process.wait()
        for _ in range(100):  # its own processes follow
            if not any(Path("/proc", child).exists() for child in children):
                break
            time.sleep(0.1)
        assert not any(Path("/proc", child).exists() for child in children)
        assert not (tmp_path / "out").exists()
    subprocess.run([sys.executable, *words], check=True)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
