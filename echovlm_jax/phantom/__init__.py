"""Synthetic B-mode exams of the seven regions, with reports and questions that follow from them.

An exam is a few parameters drawn from one whole number (`exam`); organs paint a tissue from them
(`superficial`, `abdominal`, `heart`), `acoustics` makes the tissue into a picture, and `reports`
and `questions` put the same parameters into words. Nothing here is of a patient, and every picture
says so.
"""

from echovlm_jax.phantom.dataset import PhantomDataset
from echovlm_jax.phantom.sheet import contact_sheet
from echovlm_jax.phantom.write import write_exams

__all__ = ["PhantomDataset", "contact_sheet", "write_exams"]
