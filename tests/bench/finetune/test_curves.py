import pytest

from triton_sparsity.bench.finetune.curves import curves


def history(steps, epochs):
    return {
        "loss": [1.0 / (i + 1) for i in range(steps)],
        "level": [0.0] * steps,
        "metric": [[i + 1, 0.5] for i in range(epochs)],
        "seconds": [0.1] * steps,
    }


@pytest.mark.parametrize("dense_steps", [0, 5], ids=["from a checkpoint", "trained"])
@pytest.mark.parametrize("labels", [[""], ["a", "b"]], ids=["one run", "two runs"])
def test_curves_are_a_png_with_or_without_dense_training(dense_steps, labels):
    report = {
        "task": "digits",
        "metric": "accuracy",
        "history": {"dense": history(dense_steps, dense_steps // 5), "sparse": history(6, 2)},
        "results": {"dense": {"metric": 0.9}, "stripped": {"metric": 0.8}},
    }
    png = curves(dict.fromkeys(labels, report))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
