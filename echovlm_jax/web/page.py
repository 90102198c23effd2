"""The page itself: what is where, and what follows what."""

import contextlib
import time
from collections.abc import Callable, Container, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echovlm_jax.data.record import ORGANS
from echovlm_jax.web import shown
from echovlm_jax.web.exam import MAX_FILES, Crop, read_exam
from echovlm_jax.web.session import ANY_ORGAN, LANGUAGES, Session
from echovlm_jax.web.uploads import taken

_MAX_SESSIONS = 16  # that are kept; the oldest is forgotten for another
_EMPTY = "Drop the files of an exam to begin."
# What is said of an event until its turn comes. Each is a queue: one at a time, the others wait.
_WAITING = {
    "model": "Waiting for its turn: the model answers one at a time.",
    "files": "Waiting for its turn: the files of one exam are read at a time.",
    "screen": "",
}
_BUSY = "The model is at work."
_ANEW = "Done. Organ or language is another: the conversation began anew."
Explain = Callable[[Exception], str]
Updates = Generator[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Attributes:
    crop: as of `load_media`.
    max_new_tokens: of a report or reply.
    uploads: the folder that uploaded files come into.
    explain: one line for an exception.
    """

    crop: Crop
    max_new_tokens: int
    uploads: Path
    explain: Explain


class Visitors:
    """The sessions of those whose page is open, by the name that gradio gives each."""

    def __init__(self, model: Any, settings: Settings, sent: Container[str] | None = None) -> None:
        """
        Args:
          model: what `load_model` gives.
          settings: how exams are read and answered.
          sent: as of `taken`.
        """
        self.model, self._settings, self._sent = model, settings, sent
        self._sessions: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        """The visitor's; a new one where there is none yet."""
        if name not in self._sessions:
            self.begin(name)
        return self._sessions[name]

    def begin(self, name: str, paths: Sequence[str] = ()) -> Session:
        """A new session in place of the visitor's, with an exam of these files; they are deleted,
        whether they can be used or not.

        Raises:
          InputError: as `read_exam`; then the exam is empty.
        """
        self.forget(name)
        while len(self._sessions) >= _MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        session = Session(self.model, self._settings.max_new_tokens)
        self._sessions[name] = session
        if paths:
            with taken(self._settings.uploads, paths, self._sent) as own:
                frames = self.model.processor.num_frames
                session.exam = read_exam(own, num_frames=frames, crop=self._settings.crop)
        return session

    def forget(self, name: str) -> None:
        """A visitor has left."""
        self._sessions.pop(name, None)

    def has(self, name: str, session: Session) -> bool:
        """Whether a session is still the visitor's."""
        return self._sessions.get(name) is session

    def while_it_lasts(self, name: str, updates: Updates) -> Updates:
        """The updates until the visitor's session is forgotten or another: what is still said of an
        exam that is gone would stand under the next one."""
        session = self.session(name)
        with contextlib.closing(updates):
            try:
                for update in updates:
                    if not self.has(name, session):
                        return
                    yield update
            except Exception:
                if self.has(name, session):
                    raise


def make_page(model: Any, settings: Settings) -> Any:
    """The page, as gradio's Blocks.

    Args:
      model: what `load_model` gives.
      settings: how exams are read and answered.
    """
    import gradio as gr

    # analytics_enabled: no message to gradio's makers.
    with gr.Blocks(title="EchoVLM", analytics_enabled=False) as page:
        visitors = Visitors(model, settings, page.upload_file_set)
        gr.HTML(shown.NOTICE)
        gr.Markdown("# EchoVLM\nIt reads an ultrasound exam, and can be wrong in every word.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                parts = _exam_part()
            with gr.Column(scale=3, min_width=280):
                parts |= _answer_part()
        with gr.Accordion("Inside the model", open=False):
            parts |= _inside_part(model)
        _connect(page, visitors, parts, settings.explain)
    page.queue(default_concurrency_limit=1, max_size=32)
    return page


def _exam_part() -> dict[str, Any]:
    import gradio as gr

    parts = {
        "files": gr.File(
            label=f"Files of one exam, at most {MAX_FILES}",
            file_count="multiple",
            height=170,
            elem_id="files",
        ),
        "refused": gr.HTML('<p id="refused" role="alert"></p>'),  # page.js writes there
        "exam": gr.HTML(elem_id="exam"),
        "organ": gr.Dropdown([ANY_ORGAN, *ORGANS], value=ANY_ORGAN, label="Organ"),
        "language": gr.Radio(list(LANGUAGES), value="English", label="Language of the answers"),
        "go": gr.Button("Read the exam", variant="primary", elem_id="go"),
    }
    with gr.Row():
        parts["stop"] = gr.Button("Stop", min_width=100, elem_id="stop")
        parts["clear"] = gr.Button("Forget the exam", min_width=100, elem_id="clear")
    return parts


def _answer_part() -> dict[str, Any]:
    import gradio as gr

    return {
        "status": gr.HTML(shown.status(_EMPTY), elem_id="status"),
        "report": gr.Textbox(
            label="Report", lines=6, max_lines=24, interactive=False, elem_id="report"
        ),
        "diagnosis": gr.HTML(
            label="Diagnosis, with alternatives",
            show_label=True,
            container=True,
            min_height=70,
            elem_id="diagnosis",
        ),
        # Plain text: an answer can hold no picture or link that a browser would fetch.
        "chat": gr.Chatbot(
            label="Questions about this exam",
            height=240,
            placeholder="What is said here is asked with the exam and the turns before.",
            render_markdown=False,
            buttons=["copy"],
            feedback_options=None,
            elem_id="chat",
        ),
        "question": gr.Textbox(
            label="Your question", lines=1, max_lines=4, submit_btn="Ask", elem_id="question"
        ),
    }


def _inside_part(model: Any) -> dict[str, Any]:
    import gradio as gr

    kinds = ["report", "diagnosis", "reply"]
    mixed = model.config.moe is not None
    with gr.Row():
        parts = {
            "kind": gr.Radio(kinds, value="diagnosis", label="Of which answer"),
            "layer": gr.Dropdown(shown.layers_of(model), label="Layer", visible=mixed),
        }
    with gr.Row():
        parts["experts"] = gr.Button("Which experts answered", visible=mixed, elem_id="experts")
        parts["look"] = gr.Button("Where it looked", elem_id="look")
    return parts | {"inside": gr.HTML(elem_id="inside")}


def _connect(page: Any, visitors: Visitors, parts: dict[str, Any], explain: Explain) -> None:
    """What happens when."""
    import gradio as gr

    asked = [parts["organ"], parts["language"]]
    outputs = [
        parts[name] for name in parts if name not in ("organ", "language", "kind", "refused")
    ]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def event(part: str, does: Any, inputs: Sequence[Any], queue: str = "model") -> Any:
        def handler(request: gr.Request, *values: Any) -> Generator[dict[Any, Any]]:
            name = request.session_hash or ""
            try:
                updates = does(visitors, name, *values)
                if queue == "model":
                    updates = visitors.while_it_lasts(name, updates)
                for update in updates:
                    yield {parts[name]: value for name, value in update.items()}
            except Exception as error:
                yield {parts["status"]: shown.status(explain(error), alert=True)}

        component, trigger = part.split(".")
        listen = getattr(parts[component], trigger)
        if _WAITING[queue]:  # first, past the queue, that it is in the queue
            line = shown.status(_WAITING[queue])
            listen = listen(lambda: line, None, parts["status"], queue=False, **private).then
        return listen(handler, inputs, outputs, concurrency_id=queue, **private)

    running = [
        event("go.click", _read, asked),
        (reply := event("question.submit", _ask, [parts["question"], *asked])),
        event("experts.click", _experts, [parts["kind"], parts["layer"]]),
        event("look.click", _look, [parts["kind"]]),
    ]
    for trigger, ended in (
        (parts["files"].upload, running),
        (parts["clear"].click, running),
        (parts["chat"].clear, [reply]),
    ):
        trigger(None, None, None, cancels=ended, queue=False, **private)
    event("files.upload", _take, [parts["files"]], "files")
    event("clear.click", _clear, [], "screen")
    event("chat.clear", _restart, [], "screen")
    event("layer.change", _routing, [parts["layer"]], "screen")
    line = shown.status("Stopped.")
    parts["stop"].click(
        lambda: line, None, parts["status"], cancels=running, queue=False, **private
    )

    def left(request: gr.Request) -> None:
        visitors.forget(request.session_hash or "")

    page.unload(left)


_NOTHING = {"report": "", "diagnosis": "", "chat": [], "inside": "", "question": ""}


def _take(visitors: Visitors, name: str, files: Sequence[str]) -> Updates:
    visitors.forget(name)  # first: what is still said of the exam before comes to nothing
    yield {"files": None, "exam": "", "status": shown.status("The files are read."), **_NOTHING}
    session = visitors.begin(name, files)
    if not visitors.has(name, session):  # it was forgotten while it was read
        return
    exam = session.exam
    ready = (
        f"Ready: an exam of {len(exam.pictures)}. The files are deleted, their pixels kept here."
    )
    yield {"exam": shown.exam_html(exam), "status": shown.status(ready)}


def _clear(visitors: Visitors, name: str) -> Updates:
    visitors.forget(name)
    yield {"files": None, "exam": "", "status": shown.status(_EMPTY), **_NOTHING}


def _read(visitors: Visitors, name: str, organ: str, language: str) -> Updates:
    session = visitors.session(name)
    began = time.monotonic()
    yield {"report": "", "diagnosis": "", "inside": "", "status": shown.status(_BUSY)}
    for text in session.report(organ, language):
        yield {"report": text}
    found = session.diagnoses(organ, language)
    done = shown.status(f"Done in {time.monotonic() - began:.0f} s.")
    yield {"diagnosis": shown.diagnoses_html(found), "status": done}


def _ask(visitors: Visitors, name: str, question: str, organ: str, language: str) -> Updates:
    session = visitors.session(name)
    turn = {"role": "user", "content": question}
    yield {"status": shown.status(_BUSY)}
    had, texts = session.turns, session.reply(question, organ, language)
    before = session.turns
    done = _ANEW if had and not before else "Done."
    for text in texts:
        reply = {"role": "assistant", "content": text}
        yield {"chat": [*before, turn, reply], "question": ""}
    yield {"chat": session.turns, "status": shown.status(done)}


def _restart(visitors: Visitors, name: str) -> Updates:
    visitors.session(name).chat = None
    yield {"chat": [], "status": shown.status("The conversation is forgotten.")}


def _experts(visitors: Visitors, name: str, kind: str, layer: str) -> Updates:
    yield {"status": shown.status(_BUSY)}
    visitors.session(name).inside(kind)
    yield from _routing(visitors, name, layer)


def _routing(visitors: Visitors, name: str, layer: str) -> Updates:
    model, read = visitors.model, visitors.session(name).read
    if read is not None:
        table = shown.routing_html(
            read, model.processor.tokenizer, model.config.moe.num_experts, layer
        )
        yield {"inside": table}
    yield {"status": shown.status("Done.")}


def _look(visitors: Visitors, name: str, kind: str) -> Updates:
    yield {"status": shown.status(_BUSY)}
    pictures = visitors.session(name).looked(kind)
    yield {"inside": shown.pictures_html(pictures), "status": shown.status("Done.")}
