"""The checkpoint folders that several files test with, made once."""

import pytest

from tests.processing.checkpoints import write_qwen_files, write_small_checkpoint


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """The real Qwen vocabulary as vocab.json and merges.txt: seconds to make, a second to load."""
    return write_qwen_files(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A tiny model's folder with a SentencePiece tokenizer."""
    return write_small_checkpoint(tmp_path_factory.mktemp("small"))
