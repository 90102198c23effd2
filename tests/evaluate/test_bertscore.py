"""BERTScore with a tiny random model, against its definition."""

import numpy as np
import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.evaluate.bertscore import bertscore

pytestmark = pytest.mark.slow  # importing transformers takes longer than all else here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"肝肾囊肿结石回声"]
    (path / "vocab.txt").write_text("\n".join(words), "utf-8")
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    return path


def test_it_is_what_is_defined(folder):
    import torch
    import transformers

    a, b = "肝囊肿", "肾结石回声"
    found, signed = bertscore([a, a, a, ""], [b, a, "", ""], folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = [
            model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            .hidden_states[2][0]
            .numpy()
            for text in (a, b)
        ]
    x, y = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in states)
    similar = x @ y.T
    recall, precision = similar.max(1)[1:-1].mean(), similar.max(0)[1:-1].mean()
    assert found[0] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-5) and found[2:] == [0, 0]
    assert "layer 2 of 3" in signed["bertscore"]
    assert 0 < bertscore([a * 50], [b], folder)[0][0] < 1  # cut to what the model takes


def test_what_is_no_such_folder(folder, tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        bertscore(["a"], ["a"], tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2, "model_type": "bert"}')
    with pytest.raises(InputError, match="can't load it"):
        bertscore(["a"], ["a"], tmp_path)
