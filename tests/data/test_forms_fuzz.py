"""Records in every form, changed at random: read whole, or refused with a reason; nothing else."""

import copy
import json
import random

import pytest

from echovlm_jax.data.forms import conversations_of, unknown_keys
from echovlm_jax.data.json_list import parse_entry, read_entries
from echovlm_jax.data.official import group_ids, read_record, record_id
from echovlm_jax.data.quarantine import REASONS, Refused
from echovlm_jax.errors import InputError
from tests.data.test_forms import FORMS

KEYS = [
    *("id", "image", "images", "video", "videos", "messages", "conversations", "conversations_zh"),
    *("conversation", "system", "system_prompt", "query", "response", "history", "instruction"),
    *("input", "output", "question", "answer", "prompt", "completion", "tools", "rejected", "loss"),
    *("weight", "objects", "audios", "label", "tags", "description", "reports", "organ"),
    *("patient_id", "from", "value", "role", "content", "type", "text", "image_url", "url", "path"),
    *("bytes", "human", "gpt", "user", "assistant", "language", "findings", "caption"),
]
WORDS = [
    *("<image>", "<video>", "<|im_end|>", "<|im_<image>end|>", "", " ", "\n", "\ud800", "\0"),
    *("user", "assistant", "system", "human", "gpt", "tool", "text", "image", "zh", "en"),
    *("../x", "/x", "a\\b", "http://x", "data:,", "file:///x", "超声所见：甲。\n超声提示：乙。"),
]
# What is no content: names of roles, kinds and languages, and the marks of images.
NAMES = {"user", "assistant", "system", "human", "gpt", "text", "image", "image_url", "en", "zh"}


class Draw(random.Random):
    """Random records, in which every text of their own is another word."""

    count = 0

    def word(self) -> str:
        self.count += 1
        return f"word{self.count}"

    def value(self, depth=0):
        kind = self.randrange(10 if depth < 4 else 6)
        if kind < 3:
            return self.word()
        if kind == 3:
            return self.choice(WORDS)
        if kind < 6:
            return self.choice([None, True, False, 0, 1, -1, 10**40, 1.5, float("nan"), [], {}])
        if kind < 8:
            return [self.value(depth + 1) for _ in range(self.randrange(4))]
        return {self.choice(KEYS): self.value(depth + 1) for _ in range(self.randrange(4))}

    def changed(self, value, depth=0):
        """`value` with about one place of it changed, added to or taken away."""
        if self.random() < 0.12:
            return self.value(depth)
        if isinstance(value, dict):
            key = self.choice(list(value) or ["id"])
            kind = self.random()
            if kind < 0.1:
                return {k: v for k, v in value.items() if k != key}
            if kind < 0.3:
                return {**value, self.choice(KEYS): self.value(depth + 1)}
            return {**value, key: self.changed(value.get(key), depth + 1)}
        if isinstance(value, list) and value:
            n = self.randrange(len(value))
            some = self.choice([[], [value[n]] * 2, [self.changed(value[n], depth + 1)]])
            return [*value[:n], *some, *value[n + 1 :]]
        if isinstance(value, str) and self.random() < 0.5:
            return value + self.choice([self.word(), self.choice(WORDS)])
        return self.value(depth)


def leaves(value):
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, str):
        yield value


def said_by(official) -> str:
    record = official.record
    texts = [record.organ, *official.images, *(turn.text for turn in record.turns)]
    for report in record.reports:
        texts += [report.findings, report.impression, report.caption, report.diagnosis]
        texts += [part for q in report.questions for part in (q.question, q.answer, *q.options)]
    return "\0".join(texts)


def lost(raw, official) -> list[str]:
    """The words of an entry that a record kept of it neither has nor counts as not read."""
    unknown = set(unknown_keys(raw))
    text, out = said_by(official), []
    for key, value in raw.items():
        if key in unknown or key in ("id", "patient_id", "study_id", "exam_id", "organ"):
            continue
        if key in ("description", "reports") and not official.images:
            continue  # texts about images that are not there
        for leaf in leaves(value):
            word = leaf.replace("<image>", "").replace("<video>", "").strip()
            word = word.removeprefix("file://")
            if word and word not in NAMES and word not in text and leaf not in text:
                out.append(word)
    return out


def fuzz(cases, seed):
    draw, outcomes = Draw(seed), {}
    for _ in range(cases):
        raw = copy.deepcopy(draw.choice(list(FORMS.values())))
        for _ in range(draw.choice([0, 1, 1, 2, 3])):
            raw = draw.changed(raw)
        raw = parse_entry(json.dumps(raw).encode())
        found = conversations_of(raw)
        assert found
        list(unknown_keys(raw))
        for ending, part in found:
            record_id(part, 0)
            group_ids(part)
            try:
                official = read_record(part, id="1", organ="liver", source="s", group="")
            except Refused as refused:
                outcomes[refused.reason] = outcomes.get(refused.reason, 0) + 1
                assert refused.reason in REASONS and "\n" not in refused.detail
                continue
            outcomes["kept"] = outcomes.get("kept", 0) + 1
            texts = "".join(turn.text for turn in official.record.turns)
            assert "<|" not in texts or "|>" not in texts
            if not any("." in key for key in unknown_keys(part)):
                assert not lost(part, official), (raw, ending)
    return outcomes


def fuzz_files(where, cases, seed):
    draw, outcomes = random.Random(seed), set()
    entries = [json.dumps({**form, "id": n}) for n, form in enumerate(FORMS.values())][:4]
    texts = ["\n".join(entries), f"[{','.join(entries)}]", f'{{"data": [{",".join(entries)}]}}']
    path = where / "records"
    for n in range(cases):
        data = bytearray(texts[n % 3].encode())
        for _ in range(draw.randint(0, 3)):
            at, kind = draw.randrange(len(data)), draw.randrange(3)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 30)]
            else:
                data[at:at] = draw.choice([b'"', b"{", b"]", b"\\", b"\xff", b"\n", b'{"data":['])
        path.write_bytes(data)
        try:
            found = list(read_entries(path))
        except InputError as error:
            outcomes.add("refused")
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        outcomes.add(len(found))
        for entry in found:  # what the parts of a build will read again
            again = parse_entry(bytes(data[entry.offset : entry.offset + entry.size]))
            assert json.dumps(again) == json.dumps(entry.value)
        if n % 3 == 1:  # a list: Python's own reader finds as many
            assert len(found) == len(json.loads(data.decode("utf-8-sig", "replace")))
    return outcomes


def test_changed_records_are_read_whole_or_refused():
    outcomes = fuzz(500, seed=1)
    assert outcomes["kept"] > 50 and len(outcomes) > 6


def test_changed_files_are_read_or_refused(tmp_path):
    assert {"refused", 4} <= fuzz_files(tmp_path, 150, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_5000_changed_records(seed):
    assert len(fuzz(1000, seed=10 + seed)) > 8


@pytest.mark.slow
def test_5000_changed_files(tmp_path):
    assert {"refused", 4} <= fuzz_files(tmp_path, 5000, seed=2)
