"""Why a record is left out. Every record of a source is kept or has one of these reasons."""

REASONS = {
    "not an object": "an entry of the list is no JSON object",
    "duplicate key": "an object has a key twice",
    "wrong type": "a key is missing or of another type than it has to be",
    "not UTF-8": "a text holds bytes or escapes that are no UTF-8",
    "duplicate id": "an earlier record of the same file has the id",
    "turns": "not user and assistant by turns, after at most one system turn",
    "empty question": "a user's turn has neither a text nor an image mark",
    "empty answer": "an assistant's turn or a question's answer is empty",
    "control token": "a text holds a token that only the chat template may set, as <|im_end|>",
    "image marks": "not as many <image> marks as images, or one outside a user's turn",
    "no text": "neither conversation nor report: nothing to teach",
    "not understood": "a key, or a kind of content, that means something else for training than is"
    " made of it here (tools, rejected answers, weights, audio)",
    "no images": "reports, but no image that they are about",
    "too many images": "more images, or frames, than one exam may have",
    "path outside the folder": "an image's path, or a link on it, leads out of the image folder",
    "missing image": "an image is not there",
    "unreadable image": "an image is damaged, or of a kind that is not read",
    "extra not installed": "an image is of a kind that an extra of this project reads",
    "image too large": "an image claims or takes more than the limits let in",
    "not cropped": "--crop=require, and an image is no DICOM file whose regions all can be used",
    "burned-in text": "--burned-in=refuse or mask, and an image may name the patient in its pixels",
    "unusable shape": "an image has sides that the image processor refuses",
}


class Refused(Exception):
    """A record that is left out.

    Attributes:
      reason: a key of REASONS.
      detail: one line for whoever mends the record.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(detail.split())
