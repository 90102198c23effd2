"""The page's server: on this machine alone, and with no trace left on its disk."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from echovlm_jax.web.exam import MAX_BYTES, MAX_FILES
from echovlm_jax.web.page import Settings, make_page
from echovlm_jax.web.uploads import swept

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The browser itself refuses what would come from another host or go there. Gradio's page makes code
# of texts of its own.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:;"
    " connect-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
}
Message = dict[str, Any]


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder that nobody else can read, gone when this process ends, however that ends: another
    process waits for it. Uploads that came to nothing are deleted meanwhile."""
    folder = mkdtemp(prefix="echovlm-web-")
    program = str(Path(__file__).with_name("sweep.py"))
    # A session of its own: Ctrl-C and a killed group end this process, not that one.
    sweeper = subprocess.Popen(
        [sys.executable, "-S", "-P", program],
        stdin=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    assert sweeper.stdin is not None
    sweeper.stdin.write(os.fsencode(folder))
    try:
        with swept(Path(folder)):
            yield Path(folder)
    finally:
        sweeper.stdin.close()
        sweeper.wait()


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0 takes a free one. Raises OSError: it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except OSError as error:
        found.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return found


def serve(model: Any, settings: Settings, at: socket.socket, *, debug: bool = False) -> None:
    """Serves the page until it is interrupted.

    Args:
      model: what `load_model` gives.
      settings: of the page.
      at: where it listens.
      debug: whether libraries log; they may name files.
    """
    import uvicorn

    if not debug:
        logging.disable(logging.CRITICAL)
    config = uvicorn.Config(
        make_app(model, settings, *at.getsockname()[:2]),
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[at])


def make_app(model: Any, settings: Settings, host: str, port: int) -> "Guard":
    """The page as an ASGI application, for a server at that address."""
    import gradio as gr
    from fastapi import FastAPI
    from gradio.themes import Default

    here = Path(__file__).parent
    limits = f"const MAX_BYTES = {MAX_BYTES}, MAX_FILES = {MAX_FILES};\n"
    script = limits + (here / "page.js").read_text("utf-8")
    # Fonts that are there: none is fetched.
    theme = Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page = make_page(model, settings)
    # Until it is told that it has launched, gradio copies any path or URL that a client names to
    # its uploads; mounting does not tell it.
    # until: gradio 7
    page.has_launched = True
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=host,
        server_port=port,
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,  # which would keep what was asked in the browser
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme,
        css_paths=here / "page.css",
        head=f"<script>{script}</script>",
    )
    return Guard(app, host)


class Guard:
    """An ASGI application behind headers that keep the browser here. Under a loopback address it
    answers to that name alone: a page from elsewhere, whose name was made to mean this machine,
    can't ask."""

    def __init__(self, app: Any, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(
        self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = asked.rsplit(":", 1)[0].strip("[]")
        if self._host in LOOPBACK and name not in LOOPBACK:
            await send({"type": "http.response.start", "status": 421, "headers": []})
            return await send({"type": "http.response.body", "body": b"not this host\n"})

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0].decode() not in _HEADERS]
                added = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message = {**message, "headers": [*kept, *added]}
            await send(message)

        await self._app(scope, receive, guarded)
