import pytest
import torch

from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.bench.measure.steps import model_cases
from triton_sparsity.kernels.pattern import Block, Unstructured

CPU = torch.device("cpu")


def test_counts_of_a_model_agree_with_counting_by_hand():
    shapes = (Shape(10, 64, 32), Shape(10, 32, 64))
    update, step = model_cases(
        shapes, Block(32, 32), 0.5, torch.float32, CPU, "torch", ["mask update", "training step"]
    )
    # each weight has two blocks: a grid of 1 x 2 or 2 x 1; both have one bundle a line of their
    # shorter side
    lists = {(1, 2): 3 + 2 + 6 + 2 + 6 + 1, (2, 1): 6 + 2 + 3 + 2 + 6 + 1}
    assert update.bytes == sum(4 * 2048 + 2 + 2 * 2 + 4 * n for n in lists.values())
    assert update.flops == 0
    assert step.flops == 2 * 3 * 2 * 10 * 1024
    products = (640 + 320 + 1024) * 2 + (640 + 320 + 2048)
    assert step.bytes == 2 * 4 * (products + 7 * 2048)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(32, 32)], ids=str)
def test_updates_and_steps_of_a_model_pass_their_checks(pattern):
    shapes = (Shape(24, 64, 128), Shape(24, 128, 64))
    for case in model_cases(
        shapes, pattern, 0.5, torch.float32, CPU, "torch", ["mask update", "training step"]
    ):
        built = case.build()
        assert built.check() is None, case.operation
        built.run()
        # the optimiser takes no step
        assert built.check() is None
