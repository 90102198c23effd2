"""`echovlm web`: the page."""

import argparse
import contextlib
import importlib.util
import os
import sys
from typing import Any

from echovlm_jax.cli.frame import (
    MODEL,
    PLACE,
    Result,
    add_command,
    add_crop,
    add_quantize,
    explain,
)
from echovlm_jax.errors import InputError


def add_web(commands: Any) -> None:
    command = add_command(
        commands,
        "web",
        _run,
        "a page in the browser; drop an exam, read its report and diagnosis, ask questions. It "
        "runs until Ctrl-C, which is its good end: exit code 0, and --json prints the address "
        "then. Not a medical device",
        "echovlm web echovlm-orbax/ --quantize int8\n  echovlm web demo_out/model --port 8080",
        keeps_programs=True,
    )
    command.add_argument("model", type=PLACE, metavar="MODEL", help=MODEL)
    command.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="the address to listen at; default: %(default)s, this machine alone. Another one "
        "opens the page, without a password, to whoever reaches it",
    )
    command.add_argument(
        "--port", type=int, default=7860, metavar="N", help="0: a free one; default: %(default)s"
    )
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="of a report or reply; default: %(default)s",
    )
    command.add_argument(
        "--max-pixels", type=int, metavar="N", help="shrink larger images to N pixels"
    )
    command.add_argument(
        "--num-frames", type=int, metavar="N", help="frames to take of a cine loop"
    )
    command.add_argument(
        "--dtype", metavar="D", help="compute in float32, bfloat16 or float16; default: as stored"
    )
    add_crop(command, "refuses a picture that can't be")
    add_quantize(command)


def _run(args: argparse.Namespace) -> Result:
    if importlib.util.find_spec("gradio") is None:
        raise InputError("gradio is not installed; pip install 'echovlm-jax[web]' to have the page")
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port must be from 0 to 65535, found {args.port}")
    from echovlm_jax.convert.folder import open_model
    from echovlm_jax.generate.prompts import check_new_tokens
    from echovlm_jax.load import load_model
    from echovlm_jax.processing.processor import MAX_FRAMES
    from echovlm_jax.web.server import LOOPBACK, listen, serve, upload_folder

    if args.num_frames is not None and not 1 <= args.num_frames <= MAX_FRAMES:
        raise InputError(f"--num-frames must be from 1 to {MAX_FRAMES}, found {args.num_frames}")
    at = listen(args.host, args.port)  # before minutes of loading
    check_new_tokens(open_model(args.model, quantized=True).config, args.max_new_tokens)
    names = ("dtype", "quantize", "num_frames", "max_pixels")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model = load_model(args.model, **given)
    _ = model.processor  # a folder without a tokenizer is refused now
    with upload_folder() as folder:
        _own_gradio(str(folder))
        from echovlm_jax.web.page import Settings

        settings = Settings(
            crop=args.crop or False,
            max_new_tokens=args.max_new_tokens,
            uploads=folder,
            explain=lambda error: explain(error)[0].removeprefix("error: "),
        )
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{at.getsockname()[1]}"
        print(f"echovlm: {url} (Ctrl-C ends it). Not a medical device.", file=sys.stderr)
        if args.host not in LOOPBACK:
            print("echovlm: whoever reaches this address can use the page", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            serve(model, settings, at, debug=args.debug)
    return {"url": url}


def _own_gradio(folder: str) -> None:
    """Gradio reads its settings from the environment, and these alone are ours."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
