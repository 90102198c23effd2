"""Video files (AVI, MP4, MOV, MKV, MPEG, WMV) to RGB frames, by PyAV, within bounds.

The container is the one that the file's content tells, and is never guessed by FFmpeg: some of the
forms that it knows are lists of other files to open. A loop is gone through once to count its
pictures and once to decode them, one at a time; only the sampled ones are kept.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from echovlm_jax.errors import InputError
from echovlm_jax.processing.files import ExtraMissing, reading, shown
from echovlm_jax.processing.levels import (
    MAX_FRAME_PIXELS,
    MAX_FRAMES,
    Say,
    check_loop,
    picks,
    silent,
    to_levels,
)
from echovlm_jax.processing.media import Media, sampled, stated_seconds

_BARE = ("h264", "hevc")  # streams without a container: FFmpeg makes up a rate for them

_OPTIONS = {
    "protocol_whitelist": "none",  # opens nothing else
    "err_detect": "explode",  # damage is an error, not a picture made up from its neighbours
    "max_pixels": str(MAX_FRAME_PIXELS),
}


class Decoded(NamedTuple):
    """A video's frames, those that were taken, and its own number and pace."""

    pixels: np.ndarray  # uint8 RGB [T, H, W, 3]
    frames: int  # of the video
    seconds: float | None  # from one of those to the next; None where it doesn't say


def read_video(path: str | Path, container: str, *, num_frames: int, say: Say = silent) -> Media:
    """The sampled frames of a video file; see `decode_video`."""
    said: Say = lambda line: say(f"{shown(path)}: {line}")  # noqa: E731
    with reading(path, "is a damaged or truncated video", (OSError, ValueError)) as file:
        pixels, frames, seconds = decode_video(file, container, num_frames=num_frames, say=said)
        return Media(pixels, sampled(seconds, frames, len(pixels)))


def decode_video(
    file: BinaryIO,
    container: str,
    *,
    num_frames: int,
    stated: int | None = None,
    say: Say = silent,
) -> Decoded:
    """The frames of a video, sampled evenly from the first on.

    Args:
      file: open at the video's beginning, and seekable.
      container: FFmpeg's name of the container: one of `files.VIDEOS`, or a bare stream's, as
        h264 or hevc.
      num_frames: a longer video is sampled to this many frames.
      stated: number of frames that a header states.
      say: see `images.load_media`.

    Raises:
      ExtraMissing: PyAV is not installed.
      InputError: one line without the file's name: it is damaged, or over a limit.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise ExtraMissing("is a video", "video") from None
    try:
        frames, seconds = _packets(av, file, container)
        pictures, found = _sampled(av, file, container, frames, num_frames)
        if found != frames:  # not every packet is a picture, nor is every picture one packet
            pictures, again = _sampled(av, file, container, found, num_frames)
            if again != found:
                raise InputError("its frames can't be counted; save it again as MP4 or AVI")
        if stated not in (None, found):
            raise InputError(f"its video has {found} frames where its header says {stated}")
    except FFmpegError:
        raise InputError("is a damaged or truncated video") from None
    except MemoryError:
        raise InputError("a frame is too large to decode") from None
    stacked = np.stack(pictures)
    if stacked.dtype != np.uint8:
        stacked = np.repeat(to_levels(stacked, say)[..., None], 3, axis=-1)
    return Decoded(stacked, found, seconds)


def _open(av: Any, file: BinaryIO, container: str) -> Any:
    av.logging.set_level(None)
    file.seek(0)
    # PyAV 18, the newest for Python 3.11, refuses metadata that is not UTF-8.
    # until: av 19
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(file, format=container, options=_OPTIONS, **lenient)


def _stream(opened: Any) -> Any:
    if not opened.streams.video:
        raise InputError("holds no video stream")
    stream = opened.streams.video[0]
    if stream.codec_context is None:
        raise InputError("is coded in a way that is not read; save it as H.264, H.265 or MJPEG")
    stream.codec_context.thread_count = 1  # the files of a dataset are what is read in parallel
    return stream


def _packets(av: Any, file: BinaryIO, container: str) -> tuple[int, float | None]:
    """How many pictures a video holds, by its packets, and the seconds between them; none is
    decoded. Refuses one cut short, as far as its header tells."""
    with _open(av, file, container) as opened:
        stream = _stream(opened)
        rate = float(stream.average_rate or 0) if container not in _BARE else 0.0
        count, end = 0, 0.0
        for packet in opened.demux():  # of sound as well, which may be longer
            if packet.is_corrupt:
                raise InputError("is a damaged or truncated video")
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            count += packet.stream_index == stream.index and packet.size > 0
            if count > MAX_FRAMES:
                raise InputError(f"more than {MAX_FRAMES} frames is over the limit")
        if stream.frames > count:
            raise InputError(
                f"claims {stream.frames} frames and holds {count}: it is truncated; copy it again"
            )
        # The only header here that states a length, but no count.
        stated = (opened.duration or 0) / 1e6 if container == "matroska" else 0
        if end < stated * 0.98 - 0.5:
            raise InputError(
                f"claims {stated:.1f} seconds and holds {end:.1f}: it is truncated; copy it again"
            )
        return count, stated_seconds(1 / rate if rate > 0 else None)


def _sampled(
    av: Any, file: BinaryIO, container: str, frames: int, num_frames: int
) -> tuple[list[np.ndarray], int]:
    """The pictures to take of so many frames, and how many frames there were."""
    wanted, count = set(picks(frames, num_frames)), 0
    pictures: list[np.ndarray] = []
    with _open(av, file, container) as opened:
        stream = _stream(opened)
        size = None
        for frame in _decoded(opened, stream):
            if size is None:
                size = frame.width, frame.height
                check_loop(frames, frame.height, frame.width, num_frames)
            if size != (frame.width, frame.height):
                raise InputError("its frames differ in size")
            if count in wanted:
                pictures.append(_picture(frame))
            count += 1
            check_loop(count, frame.height, frame.width, 1)
    if not count:
        raise InputError("holds no frame that decodes")
    return pictures, count


def _decoded(opened: Any, stream: Any) -> Iterator[Any]:
    for frame in opened.decode(stream):
        if frame.is_corrupt:
            raise InputError("is a damaged or truncated video")
        yield frame


def _picture(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], or what 16 bits of grey hold [H, W]; turned as the file says."""
    if frame.format.name.startswith("gray16"):
        array = frame.to_ndarray().astype(np.uint16)
    else:
        array = frame.to_ndarray(format="rgb24")
    turns, rest = divmod(frame.rotation, 90)
    if rest:
        raise InputError(f"is turned by {frame.rotation} degrees; save it upright")
    return np.ascontiguousarray(np.rot90(array, turns))
