"""Chat templates: the built-in one, a checkpoint's own, and hostile ones."""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echovlm_jax import child
from echovlm_jax.errors import InputError
from echovlm_jax.processing import chat
from echovlm_jax.processing.chat import (
    check_messages,
    compile_template,
    load_chat_template,
    qwen2_vl_prompt,
)

# The rules of Qwen2-VL's template, written as a template again: the built-in code must agree.
TEMPLATE = """\
{%- macro mark(kind) %}<|vision_start|><|{{ kind }}_pad|><|vision_end|>{% endmacro %}
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for turn in messages %}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' }}
    {%- if turn.content is string %}
        {{- turn.content }}
    {%- else %}
        {%- for part in turn.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- mark('image') }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- mark('video') }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

CONVERSATIONS = [
    [{"role": "user", "content": "描述图像。\n\n  Two lines. "}],
    [{"role": "system", "content": "你是超声医生。"}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? {{ 1 }}"}]}],
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"image_url": "b"},
                {"type": "text", "text": "and"},
                {"type": "video", "video": "c"},
                {"type": "unknown"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Fine."}]},
        {"role": "user", "content": "<b>&amp;</b>"},
    ],
    [{"role": "assistant", "content": ""}],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_built_in_template_equals_its_jinja_form(conversation, prompt):
    rendered = compile_template(TEMPLATE)(conversation, add_generation_prompt=prompt)
    assert qwen2_vl_prompt(conversation, add_generation_prompt=prompt) == rendered


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_sandbox_equals_transformers_rendering(conversation):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for prompt in (True, False):
        expected, _ = utils.render_jinja_template(
            [conversation], chat_template=TEMPLATE, add_generation_prompt=prompt
        )
        ours = compile_template(TEMPLATE)(conversation, add_generation_prompt=prompt)
        assert ours == expected[0]


def test_the_text_itself():
    text = qwen2_vl_prompt(CONVERSATIONS[3])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}{IMAGE}and{VIDEO}<|im_end|>\n"
        "<|im_start|>assistant\nFine.<|im_end|>\n"
        "<|im_start|>user\n<b>&amp;</b><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_where_the_template_comes_from(tmp_path):
    messages = [{"role": "user", "content": "x"}]
    assert load_chat_template(tmp_path) is qwen2_vl_prompt
    config = {"chat_template": "config {{ eos_token }}", "eos_token": {"content": "<e>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path)(messages) == "config <e>"
    named = [{"name": "default", "template": "named"}, {"name": "rag", "template": "no"}]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path)(messages) == "named"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ messages[0].content }}")
    assert load_chat_template(tmp_path)(messages) == "jinja x"


def test_what_templates_rely_on_still_works():
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if loop.last %}{% continue %}{% endif %}{% endfor %}"
        "{{ ns.n }} {{ messages | tojson }} {{ ['a', 'b'] | join('-') }} {{ ' t ' | trim }} "
        "{{ 'aXa'.replace('X', 'y').split('y') | length }} {{ 'b' | replace('b', 'c') }} "
        "{{ '+'.join(['p', 'q']) }} {{ 7 % 4 * 2 }} {{ 'ab'.upper()[::-1] }}"
    )
    text = compile_template(template)([{"role": "user", "content": "é<"}])
    assert text == '1 [{"role": "user", "content": "é<"}] a-b t 2 c p+q 6 BA'


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in %}",
        "{{ messages[0].nothing.more }}",
        "{{ undefined_function() }}",
        "{{ raise_exception('only\ntext') }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 'x' * 10**9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.center(10**4).ljust(9) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x.replace('b', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}",
        "{% set t %}{% for i in range(99999) %}{{ 'abcdefgh' }}{% endfor %}{% endset %}"
        "{% for i in range(99) %}{{ t }}{% endfor %}",
        "{{ 'aaa'.translate({97: 'xyz'}) }}",
        "{{ 'aaa'|attr('translate')({97: 'xyz'}) }}",
        "{{ ''.maketrans({'a': 'xyz'}) }}",
        "{{ 'aaa'.encode().replace('a'.encode(), 'xyz'.encode()) }}",
        "{{ (5).to_bytes(9, 'big') | length }}",
        "{% set big = range(99999)|list %}{{ range(99999)|select('in', big)|list|length }}",
        "{% set big = range(99999)|list %}{% set l = [big"
        + ",big" * 999
        + "] %}"
        + "".join(f"{{% set a{i} = l|map('list')|list %}}" for i in range(4))
        + "x",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=(1, 2)) %}{% for i in range(24) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['ab']) %}{% for i in range(24) %}"
        "{% set ns.x = [ns.x[0] ~ ns.x[0]] %}{% endfor %}",
        "{% set ns = namespace(x=['ab']) %}{% for i in range(24) %}"
        "{% set ns.x = [ns.x[0] + ns.x[0]] %}{% endfor %}",
        "{{ '\"'" + " | tojson" * 24 + " | length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{" + "(" * 500 + "1" + ")" * 500 + "}}",
        "{{ 'a'" + " ~ 'a'" * 600 + " }}",
        "{# " + "x" * 200_000 + " #}",
    ],
)
def test_broken_and_hostile_templates_are_one_line(template, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)  # as real as more, and quicker
    with pytest.raises(InputError) as caught:
        compile_template(template, "chat_template.jinja")([{"role": "user", "content": "hi"}])
    assert str(caught.value).startswith("chat_template.jinja: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_sandbox_goes_on_after_a_failure_and_ends_with_its_template(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)
    made, real = [], child.subprocess.Popen
    monkeypatch.setattr(
        child.subprocess, "Popen", lambda *a, **k: made.append(real(*a, **k)) or made[-1]
    )
    render = compile_template(
        "{% if messages[0].content == 'slow' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ messages[0].content }}{{ 'image' in messages[0] }}"
    )
    say = [{"role": "user", "content": "hi", "image": object()}]
    assert render(say) == render(say) == "hiTrue" and len(made) == 1
    with pytest.raises(InputError, match="takes more than 1 seconds"):
        render([{"role": "user", "content": "slow"}])
    assert made[0].poll() is not None
    assert render(say) == "hiTrue" and len(made) == 2
    made[1].kill()
    made[1].wait()
    assert render(say) == "hiTrue" and len(made) == 3
    del render
    gc.collect()
    assert made[2].poll() is not None


def test_a_sandbox_ends_with_its_parent():
    code = (
        "from echovlm_jax.processing import chat; import os\n"
        "render = chat.compile_template('x')\n"
        "cell = [c.cell_contents for c in render.__closure__]\n"
        "print([c._process.pid for c in cell if isinstance(c, chat.Child)][0], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    path, until = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 30
    while path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("files", [{"chat_template.json": "{}"}, {"chat_template.json": "["}])
def test_files_without_a_template_are_one_line(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"chat_template\.json: [^\n]*$"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "text",
        ["text"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    ],
)
def test_bad_messages_are_one_line(messages):
    with pytest.raises(InputError, match=r"^mess[^\n]*$"):
        check_messages(messages)
