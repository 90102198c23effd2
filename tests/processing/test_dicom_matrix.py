"""Thousands of DICOM files, right and lying: what is read is what pydicom reads, or it is refused.

Grey is compared as shown: pydicom's stored values through its modality and VOI functions, then
scaled to 0 to 255 (see `dicom_files.by_pydicom`). Palettes are compared with what was put into
them: there pydicom is wrong in ways that `dicom_display` names.
"""

import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from echovlm_jax.errors import InputError
from echovlm_jax.processing import dicom_frames
from echovlm_jax.processing.dicom import read_dicom
from tests.processing import dicom_files
from tests.processing.dicom_files import CannotEncode, Case

KINDS = ("plain", "palette", "display", "compressed")


@pytest.fixture
def decode_here(monkeypatch):
    """Decodes in this process what runs in one of its own, whose start takes a second."""

    def decode(self, data):
        array, properties = get_decoder(self._header.syntax).as_array(
            encapsulate([data], has_bot=False),
            index=0,
            decoding_plugin=self._plugin,
            **self._options,
        )
        return array, properties.get("photometric_interpretation")

    monkeypatch.setattr(dicom_frames.FrameDecoder, "_in_child", decode)


def must_be_read(case: Case) -> bool:
    """Whether nothing in the file disagrees, and the form is one that is supported."""
    height, width = case.size
    return (
        case.length in ("right", "zeros", "odd")
        and case.states_frames in ("true", "absent", "0", "empty")
        and (case.states_frames == "true" or case.frames == 1)
        and case.high == case.stored - 1
        and not (case.photometric == "YBR_FULL_422" and (width % 2 or not case.native))
        and not (case.photometric == "YBR_FULL_422" and case.planar)
        and not (case.length == "odd" and height * width * case.frames * case.allocated % 16 == 0)
        and (case.native or case.syntax == uid.RLELossless)
        # Words of 16 bits that are an odd number of bytes: pydicom can't read them either.
        and not (
            case.length == "odd" and case.syntax == uid.ExplicitVRBigEndian and case.vr == "OW"
        )
    )


def outcome(case: Case, path: Path, seed: int) -> str:
    """One word for what became of a case; fails where it is a silent difference."""
    stored = dicom_files.write(case, path, np.random.default_rng(seed))
    try:
        ours = read_dicom(path, num_frames=100)
    except InputError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 400
        assert not must_be_read(case), (case, message)
        return "refused"
    if case.palette:
        np.testing.assert_array_equal(ours, dicom_files.palette_colours(case, stored), str(case))
        return "equal"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = dicom_files.by_pydicom(path)  # and it may not refuse what is read here
    # Halves may round either way, as a window is worked out in another order.
    most = 1 if case.voi in ("window", "LINEAR_EXACT", "SIGMOID") else 0
    np.testing.assert_allclose(ours.astype(int), theirs, rtol=0, atol=most, err_msg=str(case))
    return "equal"


def run(cases: list[Case], tmp_path: Path) -> Counter:
    counts: Counter[str] = Counter()
    for seed, case in enumerate(cases):
        try:
            counts[outcome(case, tmp_path / "a.dcm", seed)] += 1
        except CannotEncode:
            counts["no encoder"] += 1
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_the_matrix(kind, tmp_path, decode_here):
    cases = list(getattr(dicom_files, f"{kind}_cases")())
    counts = run(random.Random(0).sample(cases, 150), tmp_path)
    assert counts["equal"] >= 4, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_matrix(kind, tmp_path, decode_here):
    least = {"plain": 3000, "palette": 500, "display": 600, "compressed": 600}
    cases = list(getattr(dicom_files, f"{kind}_cases")())
    counts = run(cases, tmp_path)
    print(kind, dict(counts))
    assert counts["equal"] + counts["refused"] >= least[kind], counts


def test_every_file_that_pydicom_ships(decode_here):
    """Equal or refused; those without pixels, of 32 bits or of 12-bit JPEG are refused."""
    root, counts = Path(pydicom.__file__).parent / "data", Counter()
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.suffix in (".py", ".pyc", ".json"):
            continue
        try:
            ours = read_dicom(path, num_frames=1000)
        except InputError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = dicom_files.by_pydicom(path)
        np.testing.assert_array_equal(ours, theirs, path.name)
        counts["equal"] += 1
    assert counts["equal"] >= 80, counts
