"""Whose DICOM file it is: only to keep one patient's files together, never to be shown or stored.

What is returned must be hashed with a secret at once, and must not get into a message.
"""

from pathlib import Path
from typing import NamedTuple

from pydicom.filereader import read_partial

from echovlm_jax.processing.dicom import quietly
from echovlm_jax.processing.files import open_file, with_preamble

_PATIENT_ID, _STUDY = 0x00100020, 0x0020000D  # what follows is not parsed


class Identity(NamedTuple):
    patient: str  # PatientID; empty where the file has none
    study: str  # StudyInstanceUID; likewise


def dicom_identity(path: Path) -> Identity:
    """The ids in the header of a DICOM file that `read_dicom` has taken; empty where there are none
    or the header can't be parsed."""
    try:
        with quietly(), open_file(path) as file:
            dataset = read_partial(
                with_preamble(file),
                stop_when=lambda tag, vr, length: int(tag) > _STUDY,
                specific_tags=[_PATIENT_ID, _STUDY],
                force=True,
            )
            return Identity(_text(dataset.get("PatientID")), _text(dataset.get("StudyInstanceUID")))
    except Exception:  # parsers raise nearly anything, and may quote what they read
        return Identity("", "")


def _text(value: object) -> str:
    return "" if value is None else str(value).strip("\0 \t\r\n")
