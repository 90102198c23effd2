"""The HTML report: what it shows, what it survives, and what a browser makes of it."""

import base64
import html.parser
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echovlm_jax.data.dataset import open_dataset
from echovlm_jax.data.record import ORGANS
from echovlm_jax.errors import InputError
from echovlm_jax.evaluate import cases, figures, results
from echovlm_jax.evaluate.report import write_report
from echovlm_jax.evaluate.runs import read_run
from echovlm_jax.evaluate.summary import summarise
from tests.evaluate.browser import browser, find_browser

EVIL = "<script>fail()</script></style></title><img src=x onerror=fail()> \" ' & {{ 7*7 }} --> ]]>"
SHOWN = ("gynaecology", "heart", "kidney")
VOID = {"meta", "link", "img", "br", "path"}


class Outline(html.parser.HTMLParser):
    """What a page's tags are; raises where one is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def line(record: int, kind: str = "report", organ: str = "heart", **values: Any) -> dict[str, Any]:
    task = {"vqa": "choice"}.get(kind, kind)
    return {
        "id": f"exam-{record}/{task}",
        "record": record,
        "organ": organ,
        "task": task,
        "kind": kind,
        "language": "en",
        "question": f"Question {record} of {kind}?",
        "reference": f"The wall of exam {record} is smooth and thin.",
        "prediction": f"The wall of exam {record} is rough and thin.",
        "answer": None if kind == "report" else "right answer",
        "extracted": None,
        "correct": None if kind == "report" else record % 2 == 0,
    } | values


def row(n: int, **values: float | None) -> dict[str, Any]:
    names = (*results.NAMES,)
    found = {name: values.get(name) for name in names}
    ends = {name: [v - 3.5, v + 2.5] for name, v in values.items() if v is not None}
    return {**found, "n": n, "intervals": ends}


def evaluation(out: Path, lines: list[dict[str, Any]], **overall: float | None) -> Path:
    out.mkdir(parents=True)
    table = row(len(lines), **overall)
    metrics = {
        "n": len(lines),
        "overall": table,
        "by_organ": {name: table for name in {one["organ"] for one in lines}},
        "by_task": {name: table for name in {one["task"] for one in lines}},
        "signature": {"bleu": "sacrebleu 1.2.3"},
        "settings": {"model": "/home/anna/runs/tiny", "data": "phantom", "split": "test"},
        "reasons": {"bertscore": "no model folder was given"},
    }
    (out / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    (out / "settings.json").write_text(json.dumps(metrics["settings"]), "utf-8")
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (out / "predictions.jsonl").write_text(text, "utf-8")
    return out


def phantom_lines() -> list[dict[str, Any]]:
    """The first exams of SHOWN, with true references and worse and worse predictions."""
    data = open_dataset("phantom", "test")
    out = []
    for organ in SHOWN:
        for n, i in enumerate(np.flatnonzero(data.organs == ORGANS.index(organ))[:3].tolist()):
            report = data.record(i).reports[n % 2]
            words = {"organ": organ, "language": report.language}
            worse = report.findings[: len(report.findings) // (n + 1)]
            out.append(line(i, reference=report.findings, prediction=worse, **words))
            out.append(line(i, "diagnosis", reference=report.diagnosis, **words))
            out.append(line(i, "vqa", **words))
    return out


def make_run(folder: Path, stage: str, steps: int, experts: int = 4, layers: int = 2) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"stage": stage}))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 4 / step + 1, "lr": 1e-4, "skipped": 0.0})
    lines.insert(3, {"step": 3, "eval_loss": 2.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    shares = np.full((layers, experts), 0.5 / (experts - 1))
    shares[:, 1] = 0.5
    load = {"heart": {"image": shares.tolist(), "text": np.zeros((layers, experts)).tolist()}}
    with open(folder / "routing.jsonl", "w") as file:
        file.write(json.dumps({"step": 1, "expert_load": {}}) + "\n")
        file.write(json.dumps({"step": steps, "expert_load": load}) + "\n")
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it."""
    root = tmp_path_factory.mktemp("report")
    lines = phantom_lines()
    scores = {"bleu1": 71.25, "rougeL": 66.6, "diagnosis_accuracy": 58.1, "vqa_accuracy": 62.0}
    out = evaluation(root / "out", lines, **scores)
    worse = [{**one, "prediction": one["prediction"][:20]} for one in lines]
    blind = evaluation(root / "blind", worse, **{name: v / 2 for name, v in scores.items()})
    loop = np.random.default_rng(0).integers(0, 256, (5, 400, 600, 3), dtype=np.uint8)
    extra = cases.Case("A real loop", [loop], "What is seen?", "A heart.", "Never learned from.")
    return write_report(
        out,
        title="A small model",
        runs=[make_run(root / "a", "alignment", 60), make_run(root / "b", "instruction", 90)],
        compared={"blind": blind},
        extra_cases=[extra],
    )


def test_everything_is_on_the_page(full: Path) -> None:
    page = Outline(full.read_text("utf-8"))
    for words in (
        *("A small model", "tiny", "phantom", "Synthetic data.", "Not a medical device."),
        *("71.2", "95 % interval 67.8–73.8", "BERTScore is missing: no model folder was given"),
        *("Against blind", "alignment", "instruction", "Image tokens", "Text tokens"),
        *("sacrebleu 1.2.3", "A real loop", "Never learned from.", "loop of 5 frames"),
        *SHOWN,
    ):
        assert words in page.text, words
    assert page.count("article") == 4 + 3 * len(SHOWN) + 1  # headline, cases, the loop
    assert {"ins", "del"} <= {tag for tag, _ in page.tags}
    assert full.stat().st_size < 3e6


def test_nothing_comes_from_elsewhere(full: Path) -> None:
    text = full.read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    for tag, attributes in Outline(text).tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)


def test_no_path_of_the_machine_is_shown(full: Path) -> None:
    assert "anna" not in full.read_text("utf-8")
    assert str(full.parent) not in full.read_text("utf-8")


def test_same_folder_same_page(tmp_path: Path) -> None:
    lines = [line(i, organ=ORGANS[i % 3]) for i in range(4)]
    out = evaluation(tmp_path / "out", lines, bleu1=12.5)
    os.utime(out / "predictions.jsonl", (86_400, 86_400))  # the page's date
    first = write_report(out, title="A small model").read_bytes()
    os.utime(out / "metrics.json")
    assert first == write_report(out, title="A small model").read_bytes()
    assert b"1970-01-02" in first
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_texts_are_only_texts(tmp_path: Path) -> None:
    words = {name: f"{name} {EVIL}" for name in ("question", "reference", "prediction", "organ")}
    lines = [line(0, **words), line(1, "vqa", task=EVIL, answer=EVIL, **words)]
    lines[0]["id"], lines[1]["id"] = EVIL, f"{EVIL}/{EVIL}"
    out = evaluation(tmp_path / "out", lines, bleu1=50.0)
    other = evaluation(tmp_path / "other", lines, bleu1=40.0)
    run = make_run(tmp_path / "run", EVIL, 5)
    image = np.full((8, 9, 3), 7, np.uint8)
    path = write_report(
        out,
        title=EVIL,
        runs=[run],
        compared={EVIL: other},
        extra_cases=[cases.Case(EVIL, [image], EVIL, EVIL, EVIL, EVIL)],
    )
    page = Outline(path.read_text("utf-8"))
    assert page.count("script") == page.count("style") == page.count("title") == 1
    assert all(a.get("src", "").startswith("data:image/jpeg") for t, a in page.tags if t == "img")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    said = re.sub(r"\s", "", page.text)
    for name in ("question", "organ"):
        assert re.sub(r"\s", "", words[name]) in said
    assert "{{7*7}}" in said


def test_odd_characters_are_made_harmless(tmp_path: Path) -> None:
    odd = "a\x00b\x1bc\ud800d\uffff \u202eright to left 😀\r\n"
    out = evaluation(tmp_path / "out", [line(0, prediction=odd, question=odd)], bleu1=1.0)
    text = write_report(out, title="t").read_text("utf-8")
    assert "😀" in text and not re.search(r"[\x00\x1b\ufffe\uffff]", text)


@pytest.mark.parametrize("lines", [[], [line(0)], [line(3, "vqa")], [line(10**6)]])
def test_little_is_a_clean_page(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    out = evaluation(tmp_path / "out", lines)
    (tmp_path / "empty").mkdir()
    page = Outline(write_report(out, title="t", runs=[tmp_path / "empty"]).read_text("utf-8"))
    assert ("no predictions" in page.text) == (not lines)
    assert page.count("svg") == 0 and "nan" not in page.text.lower().split()
    for word in ("None", "Training", "Experts", "Comparisons", "Undefined"):
        assert word not in page.text


def test_facts_have_a_table_by_attribute(tmp_path: Path) -> None:
    lines = [line(0, reference="The ducts are dilated.", prediction="The ducts are not dilated.")]
    out = evaluation(tmp_path / "out", lines, facts_f1=41.5, hallucinated_per_report=2.25)
    stored = json.loads((out / "metrics.json").read_text("utf-8"))
    stored["facts_by_attribute"] = summarise(lines, 0, {})["facts_by_attribute"]
    (out / "metrics.json").write_text(json.dumps(stored), "utf-8")
    page = Outline(write_report(out, title="t").read_text("utf-8"))
    for words in ("Facts F1", "41.5", "Attribute", "structure", "Statements a report that are not"):
        assert words in page.text, words
    assert ("section", {"id": "facts"}) in page.tags
    assert [row["name"] for table in results.attributes(stored) for row in table["rows"]] == [
        "structure"
    ]


def test_no_dataset_no_images(tmp_path: Path) -> None:
    out = evaluation(tmp_path / "out", [line(0)], bleu1=9.0)
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["settings"]["data"] = str(tmp_path / "gone")
    (out / "metrics.json").write_text(json.dumps(metrics))
    page = Outline(write_report(out, title="t").read_text("utf-8"))
    assert page.count("img") == 0 and "There are no images" in page.text
    assert "Synthetic" not in page.text


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    out = evaluation(tmp_path / "out", [line(0), line(1)], bleu1=9.0)
    with pytest.raises(InputError, match="gone"):
        write_report(out, title="t", runs=[tmp_path / "gone"])
    with pytest.raises(InputError, match=r"metrics\.json"):
        write_report(out, title="t", compared={"gone": tmp_path})
    good = (out / "predictions.jsonl").read_text()
    (out / "predictions.jsonl").write_text(good + '{"id": "torn')
    write_report(out, title="t")
    (out / "predictions.jsonl").write_text('{"id"\n' + good)
    with pytest.raises(InputError, match="line 1"):
        write_report(out, title="t")
    (out / "predictions.jsonl").write_text(good.replace('"organ": "heart"', '"organ": 3'))
    with pytest.raises(InputError, match="organ"):
        write_report(out, title="t")
    run = make_run(tmp_path / "run", "full", 5)
    (run / "routing.jsonl").write_text('{"step": 1, "expert_load": {"a": {"image": [1, [2]]}}}\n')
    with pytest.raises(InputError, match=r"routing\.jsonl"):
        read_run(run)


def test_marked_pieces_are_the_texts_and_the_rest_is_the_same() -> None:
    a = "  The left lobe is 5.2 mm wide,\nsmooth; 甲状腺左叶大小正常。 End "
    b = "The right lobe is 5.3 mm wide, smooth;  甲状腺右叶正常！"
    left, right = cases.marked(a, b)
    assert "".join(piece.text for piece in left) == a
    assert "".join(piece.text for piece in right) == b
    kept = [
        [t for piece in pieces if not piece.marked for t in cases.tokens(piece.text.lower())]
        for pieces in (left, right)
    ]
    assert kept[0] == kept[1]
    assert [p.text for p in left if p.marked] == ["left", "5.2", "左", "大小", "。 End"]
    assert [p.text for p in right if p.marked] == ["right", "5.3", "右", "！"]
    assert not any(piece.marked for pieces in cases.marked(a, a) for piece in pieces)


def test_long_texts_are_marked_in_time() -> None:
    left, right = cases.marked("一二三四五六七八九十" * 3000, "三一" * 10_000)
    assert "".join(piece.text for piece in left) == "一二三四五六七八九十" * 3000
    assert right[-1].marked is False


def test_token_f1() -> None:
    assert cases.token_f1("", "") == 1
    assert cases.token_f1("左叶", "") == 0
    assert cases.token_f1("左叶大", "左叶小") == pytest.approx(2 / 3)
    assert cases.token_f1("a Smooth wall", "smooth wall") == pytest.approx(4 / 5)


def test_best_median_and_worst_are_chosen() -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lines = [line(i, reference=" ".join(words), prediction=" ".join(words[:i])) for i in range(7)]
    lines += [line(50, "vqa", "liver"), line(51, "vqa", "liver")]
    chosen = cases.choose(lines)
    assert [(c.organ, c.rank, c.record) for c in chosen] == [
        ("heart", "best", 6),
        ("heart", "median", 3),
        ("heart", "worst", 0),
        ("liver", "best", 50),
        ("liver", "worst", 51),
    ]
    many = [line(100 * o + i, organ=f"organ {o:03}") for o in range(200) for i in range(4)]
    assert len(cases.choose(many)) == cases.MOST_CASES


def test_thumbnails_are_small_and_of_the_middle_frame() -> None:
    loop = np.zeros((9, 500, 1000, 3), np.uint8)
    loop[4] = 200
    colour = np.zeros((30, 20, 3), np.uint8)
    colour[..., 0] = 250
    first, second = cases.thumbnails([loop, colour])
    assert (first["width"], first["height"], first["frames"]) == (320, 160, 9)
    assert (second["width"], second["height"], second["frames"]) == (20, 30, 0)
    for found, mean in ((first, [200]), (second, [250, 0, 0])):
        data = base64.b64decode(found["src"].removeprefix("data:image/jpeg;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(data))).reshape(-1, len(mean))
        np.testing.assert_allclose(pixels.mean(0), mean, atol=4)
    assert len(cases.thumbnails([colour] * 9)) == cases.VIEWS


def test_chance_is_over_the_organs_diagnoses() -> None:
    data = open_dataset("phantom", "test")
    organs = {organ: int(np.flatnonzero(data.organs == i)[0]) for i, organ in enumerate(ORGANS)}
    lines = [
        line(i, "diagnosis", organ, answer=data.record(i).reports[1].diagnosis)
        for organ, i in organs.items()
    ]
    # Every organ of the phantoms has five; a few of them may be in no exam of a small split.
    assert results.chance(lines, data)[None] == pytest.approx(20, abs=3)
    two = [line(i, "diagnosis", answer="ab"[i % 2]) for i in range(6)]
    three = [line(i, "diagnosis", "liver", answer="abc"[i % 3]) for i in range(3)]
    assert results.chance(two + three, None) == pytest.approx(
        {"heart": 50, "liver": 100 / 3, None: (6 * 50 + 3 * 100 / 3) / 9}
    )
    assert results.chance([line(0, "diagnosis")], None) == {}


def test_differences_are_ours_minus_theirs(tmp_path: Path) -> None:
    ours = [line(i, prediction="a b c d", reference="a b c d") for i in range(8)]
    theirs = [{**one, "prediction": "a b x y"} for one in reversed(ours)]
    folders = [evaluation(tmp_path / name, of) for name, of in (("a", ours), ("b", theirs))]
    (found,) = results.differences(folders[0], {"blind": folders[1]})
    bleu = next(one for one in found["rows"] if one["name"] == "BLEU-1")
    assert (bleu["ours"], bleu["theirs"]) == pytest.approx((100, 50))
    assert bleu["difference"] == pytest.approx(50) and bleu["clear"]
    with pytest.raises(InputError, match="sample"):
        results.differences(folders[0], {"x": evaluation(tmp_path / "c", [line(99)])})


def test_runs_follow_each_other_on_one_axis(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / str(n), f"stage_{n}", n)) for n in (40, 120)]
    loss, rate = figures.training(runs)
    assert [(b["left"], b["width"], b["name"]) for b in loss["bands"]] == [
        (0, 25, "stage 40"),
        (25, 75, "stage 120"),
    ]
    training, held_out = loss["lines"]
    assert training["main"].count("M") == 2  # the runs are not joined
    # The second run's evaluation is at step 40 + 3 of 160, at 2.25 of 5 · 1.05.
    assert held_out["main"].split("M")[2].startswith(f"{1000 * 43 / 160:.1f} {1000 * 3 / 5.25:.1f}")
    assert held_out["at"] - training["at"] >= 8.99  # names that don't lie on each other
    assert [line["key"] for line in rate["lines"]] == ["lr"]


def test_heatmap_colours_by_doublings(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", "full", 5, experts=4, layers=3))
    image, text = figures.heatmaps(run)
    cells = image["strips"][0]["rows"][0]["cells"]
    assert len(cells) == 12 and image["numbers"]
    assert (cells[1]["side"], cells[1]["depth"], cells[1]["text"]) == ("more", 1.0, "50")
    assert cells[0]["side"] == "less" and cells[0]["depth"] == pytest.approx(np.log2(1.5), abs=0.01)
    assert {cell["side"] for cell in text["strips"][0]["rows"][0]["cells"]} == {"none"}
    large = read_run(make_run(tmp_path / "large", "full", 5, experts=8, layers=28))
    strips = figures.heatmaps(large)[0]["strips"]
    assert [layer for strip in strips for layer in strip["layers"]] == list(range(28))
    assert sum(len(strip["rows"][0]["cells"]) for strip in strips) == 28 * 8


def test_ticks_are_round_and_inside() -> None:
    assert figures.ticks(0, 7.5) == [0, 2, 4, 6]
    assert figures.ticks(0, 1e-4, 2) == [0, 5e-5, 1e-4]
    assert [figures.short(v) for v in (0, 2000, 5e-5, 0.25)] == ["0", "2,000", "5·10⁻⁵", "0.25"]


def test_a_browser_shows_it(full: Path, tmp_path: Path) -> None:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with browser(program, tmp_path / "profile") as page:
        for width, dark in ((390, True), (1280, False)):
            page.open(full, width=width, dark=dark)
            assert not page.errors
            assert [url for url in page.requests if not url.startswith("data:")] == [full.as_uri()]
            assert page.value("document.documentElement.scrollWidth") <= width
            # Nothing but what scrolls by itself sticks out of the window.
            out = page.value(
                "[...document.querySelectorAll('main *, header *')].filter(e =>"
                " !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)"
                ".map(e => e.outerHTML.slice(0, 80))"
            )
            assert out == []
            assert page.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            shades = page.value("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", shades)[:3])) < 200) == dark
            page.screenshot(tmp_path / f"{width}.png")
            shot = np.asarray(Image.open(tmp_path / f"{width}.png").convert("L"))
            assert shot.shape[1] == width and shot.std() > 10
        shown = "[...document.querySelectorAll('.case[data-organ]')].filter(e => !e.hidden).length"
        assert page.value(shown) == 3 * len(SHOWN)
        page.value("document.querySelector('[data-value=kidney]').click()")
        page.value("document.querySelector('[data-value=worst]').click()")
        assert page.value(shown) == 1
        page.value("[...document.querySelectorAll('[data-value=\"\"]')].forEach(b => b.click())")
        assert page.value(shown) == 3 * len(SHOWN)


def test_the_pages_parts_are_in_the_wheel() -> None:
    import echovlm_jax.evaluate.report as report

    names = {path.name for path in report.PAGE.iterdir()}
    assert {"report.html", "figures.html", "style.css", "script.js"} <= names
    assert report.PAGE.is_relative_to(Path(report.__file__).parent)
