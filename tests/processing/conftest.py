"""The checkpoint folders that several files test with, made once."""

import pytest

from tests.processing.checkpoints import write_small_checkpoint


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A tiny model's folder with a SentencePiece tokenizer."""
    return write_small_checkpoint(tmp_path_factory.mktemp("small"))
