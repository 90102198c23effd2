"""A compressed video's frames, by FFmpeg through PyAV (the extra `video`)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_jax.errors import InputError

MAX_FRAMES = 2**17  # more than half an hour at 60 frames a second
MAX_FRAME_PIXELS = 2**24


def decode_video(data: bytes | Path, *, num_frames: int = 16) -> tuple[np.ndarray, int]:
    """Samples a video evenly, from its first frame on.

    It is decoded twice, to count its frames and to take some: none but those are kept.

    Args:
      data: the content or the path of an .mp4 or .avi file, or a bare stream of MPEG-2, H.264 or
        HEVC.
      num_frames: a longer video is sampled to so many frames.

    Returns:
      uint8 [T, H, W, 3] RGB, and the number of frames that it has.

    Raises:
      InputError: what is wrong, without a file's name.
    """
    count = sum(1 for _ in _frames(data))
    if not count:
        raise InputError("holds no video frame that decodes")
    picks = {i * count // num_frames for i in range(num_frames)} if count > num_frames else None
    taken = [
        frame.to_ndarray(format="rgb24")
        for n, frame in enumerate(_frames(data))
        if picks is None or n in picks
    ]
    if len({frame.shape for frame in taken}) > 1:
        raise InputError("its video frames differ in size")
    return np.stack(taken), count


def _frames(data: bytes | Path) -> Iterator[Any]:
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise InputError("is a video; install echovlm-jax[video], which brings PyAV") from None
    source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
    try:
        with av.open(source, "r", options={"max_pixels": str(MAX_FRAME_PIXELS)}) as container:
            if not container.streams.video:
                raise InputError("holds no video")
            stream = container.streams.video[0]
            stream.codec_context.options = {
                "max_pixels": str(MAX_FRAME_PIXELS),
                "err_detect": "explode",
            }
            for count, frame in enumerate(container.decode(stream)):
                if count >= MAX_FRAMES or frame.width * frame.height > MAX_FRAME_PIXELS:
                    raise InputError(
                        f"its video has more than {MAX_FRAMES} frames or {MAX_FRAME_PIXELS} pixels"
                        " a frame"
                    )
                yield frame
    except (FFmpegError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("its video is damaged, it doesn't decode") from None
