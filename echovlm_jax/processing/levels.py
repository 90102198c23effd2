"""Values beyond eight bits, as files of 16 bits or of floats hold them, to grey levels."""

from collections.abc import Callable

import numpy as np

from echovlm_jax.errors import InputError

MAX_FRAME_PIXELS = 2**24  # of a loop: 4096 x 4096, several times any ultrasound frame
MAX_SAMPLED_PIXELS = 2**26  # all sampled frames of one loop together: 200 MB as RGB
MAX_LOOP_PIXELS = 2**32  # all frames that are decoded to find the sampled ones: time, not memory
MAX_FRAMES = 2**17  # more than half an hour at 60 frames a second
_FEW_LEVELS = 32  # fewer than these, of many values: something else than the picture set the range
_BLOCK = 2**20  # values at a time: the floats between take eight times the room of the levels

Say = Callable[[str], object]


def silent(line: str) -> None:
    """Hears what is said about a file, and keeps it."""


def to_levels(values: np.ndarray, say: Say = silent, *, colour: bool = False) -> np.ndarray:
    """Values as uint8 grey levels, by what they hold.

    Whole values from 0 to 255 stay as they are, whatever the type that holds them. Of others the
    smallest becomes 0 and the largest 255, in equal steps; of colours 0 stays 0, so that the hue
    does. Frames of a loop come together and share one range, so that it doesn't flicker.

    Args:
      values: whole numbers or floats, of any shape.
      say: callback for one line with the range, if values are scaled.
      colour: whether values of one pixel are its colours.

    Raises:
      InputError: a value is no finite number, or the range leaves few levels to most values.
    """
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())  # of what is no number: neither
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("holds values that are no finite numbers; replace them and save it again")
    flat, levels = values.reshape(-1), np.empty(values.size, np.uint8)
    blocks = [slice(start, start + _BLOCK) for start in range(0, values.size, _BLOCK)]
    if low >= 0 and high <= 255 and all(_are_whole(flat[block]) for block in blocks):
        return values.astype(np.uint8)
    bottom = min(low, 0.0) if colour else low
    for block in blocks:
        shifted = flat[block].astype(np.float64) - bottom
        levels[block] = np.rint(shifted / ((high - bottom) or 1) * 255)
    used = int(np.count_nonzero(np.bincount(levels, minlength=256)))
    if used < _FEW_LEVELS and np.unique(flat[:: -(-flat.size // _BLOCK)]).size > 4 * used:
        raise InputError(
            f"its values {low:g} to {high:g} would leave {used} of their many levels: a few of them"
            " lie far from the rest; save it as 8 bits"
        )
    say(f"its values {low:g} to {high:g} are scaled to 0 to 255")
    return levels.reshape(values.shape)


def _are_whole(values: np.ndarray) -> bool:
    return values.dtype.kind in "iub" or bool((values == np.floor(values)).all())


def picks(frames: int, num_frames: int) -> list[int]:
    """Which of a loop's frames are taken: `num_frames` at most, evenly from the first on."""
    count = min(frames, num_frames)
    return [i * frames // count for i in range(count)]


def check_loop(
    frames: int, height: int, width: int, num_frames: int, *, sequential: bool = True
) -> None:
    """Raises InputError where a loop is over a limit, before anything of its size is made.

    Args:
      frames, height, width: the file's claims.
      num_frames: frames to sample.
      sequential: whether a frame is reached through those before it.
    """
    if frames < 1 or height < 1 or width < 1:
        raise InputError(f"claims {frames} frames of {height} x {width} pixels")
    if height * width > MAX_FRAME_PIXELS:
        raise InputError(
            f"{height} x {width} pixels a frame is over the limit of {MAX_FRAME_PIXELS} pixels"
        )
    if frames > MAX_FRAMES:
        raise InputError(f"{frames} frames is over the limit of {MAX_FRAMES}")
    if sequential and frames * height * width > MAX_LOOP_PIXELS:
        raise InputError(
            f"{frames} frames of {height} x {width} pixels is over the limit of {MAX_LOOP_PIXELS}"
            " pixels; cut the loop shorter"
        )
    if min(frames, num_frames) * height * width > MAX_SAMPLED_PIXELS:
        raise InputError(
            f"{min(frames, num_frames)} frames of {height} x {width} pixels is over the limit of"
            f" {MAX_SAMPLED_PIXELS} pixels; sample fewer frames"
        )
