import pytest
import torch

from triton_sparsity.controller.algorithms.loss import CompressionLoss, ZeroCompressionLoss
from triton_sparsity.controller.api import CompressionStage, StripFormat

UNCOMPRESSED, PARTIALLY, FULLY = CompressionStage


def test_zero_loss_adds_nothing_on_its_device():
    loss = ZeroCompressionLoss(torch.device("meta"))
    assert loss().device.type == "meta"
    value = ZeroCompressionLoss("cpu")()
    assert value.shape == ()
    assert value.item() == 0


def test_adding_to_one_loss_leaves_the_next_alone():
    loss = ZeroCompressionLoss("cpu")
    term = loss()
    term += 1
    assert loss().item() == 0


def test_zero_loss_joins_a_backward_pass():
    weight = torch.ones(3, requires_grad=True)
    (weight.sum() + ZeroCompressionLoss("cpu")()).backward()
    assert torch.equal(weight.grad, torch.ones(3))


def test_calling_a_loss_calculates_it():
    class Two(CompressionLoss):
        def calculate(self):
            return torch.tensor(2.0)

    assert Two()().item() == 2
    with pytest.raises(NotImplementedError, match="CompressionLoss must override calculate"):
        CompressionLoss()()


def test_a_loss_without_state_refuses_one():
    loss = ZeroCompressionLoss("cpu")
    loss.load_state(loss.get_state())
    with pytest.raises(
        ValueError, match="load_state: state must have no more than nothing, got also \\['p'\\]"
    ):
        loss.load_state({"p": 0.05})


def test_stages_of_two_algorithms_add_up_to_partial_unless_they_agree():
    assert [int(stage) for stage in CompressionStage] == [0, 1, 2]
    for a in CompressionStage:
        for b in CompressionStage:
            assert a + b is (a if a is b else PARTIALLY)


def test_strip_formats_have_the_values_of_nncf():
    assert [StripFormat.NATIVE, StripFormat.DQ, StripFormat.IN_PLACE] == [
        "native",
        "dequantize",
        "in_place",
    ]
    assert StripFormat("in_place") is StripFormat.IN_PLACE
