"""An exam's sheet, and the ultrasound region of a DICOM file."""

import numpy as np
import pydicom
import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.phantom import write_exams
from echovlm_jax.phantom.render import HEADER, RULER
from echovlm_jax.processing.dicom import read_loop, read_region
from echovlm_jax.processing.sheet import GAP, exam_sheet

YELLOW = (255, 200, 0)


@pytest.fixture(scope="module")
def exams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exams") / "e"
    write_exams(folder, 2, 0, balanced=("heart", "liver"), cine=1.0, views=1, language="en")
    return folder


def test_the_region_is_what_a_crop_leaves(exams):
    [loop] = (exams / "images").glob("*.dcm")
    header = pydicom.dcmread(loop, stop_before_pixels=True)
    region = read_region(loop)
    assert region == (HEADER, header.Rows, 0, header.Columns - RULER)
    cropped = read_loop(loop, crop="require")
    assert cropped.frames.shape[1:3] == (header.Rows - HEADER, header.Columns - RULER)
    del header.SequenceOfUltrasoundRegions
    whole = pydicom.dcmread(loop)
    del whole.SequenceOfUltrasoundRegions
    whole.save_as(exams / "plain.dcm")
    assert read_region(exams / "plain.dcm") is None
    (exams / "text.dcm").write_text("no image")
    with pytest.raises(InputError, match=r"text\.dcm"):
        read_region(exams / "text.dcm")


def test_a_dicom_has_its_region_outlined_and_a_png_has_not(exams):
    [still], [loop] = (exams / "images").glob("*.png"), (exams / "images").glob("*.dcm")

    def outlined(sheet):
        return (np.asarray(sheet) == YELLOW).all(-1).any()

    one, four = exam_sheet([still], height=80), exam_sheet([loop], height=80, frames=4)
    assert one.height == four.height == 80
    assert not outlined(one) and outlined(four)
    assert (four.width + GAP) % 4 == 0
    assert exam_sheet([still, loop], height=80).width == one.width + GAP + four.width
    array = np.zeros((3, 20, 30, 3), np.uint8)
    assert exam_sheet([array], height=20, frames=2).width == 2 * 30 + GAP
