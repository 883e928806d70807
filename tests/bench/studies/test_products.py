from functools import partial

import pytest

from triton_sparsity.bench.peers import dense, semi_structured, torch_bsr
from triton_sparsity.bench.studies import products
from triton_sparsity.bench.studies.setup import TRIAL
from triton_sparsity.kernels.pattern import Block

BLOCK = Block(32, 32)


def refused(make):
    """See that a subject is not handed out to be timed."""
    with pytest.raises(AssertionError, match=r"^result is wrong: off by"):
        make()


def test_a_product_of_ours_that_is_wrong_is_refused(monkeypatch):
    right = products.block_sparse_linear
    monkeypatch.setattr(products, "block_sparse_linear", lambda *a, **k: 1.01 * right(*a, **k))
    refused(partial(products.our_product, TRIAL, BLOCK))


@pytest.mark.parametrize("which", ["x", "weight"])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_layer_of_ours_with_a_wrong_gradient_is_refused(monkeypatch, level, which):
    """By what it multiplies with: the value stays, the derivative does not."""
    right = products.layer_product

    def wrong(sparse):
        product = right(sparse)

        def scaled(x, weight):
            if which == "x":
                x = x + 0.1 * (x - x.detach())
            else:
                weight = weight + 0.1 * (weight - weight.detach())
            return product(x, weight)

        return scaled

    products.our_layer(TRIAL, BLOCK, level, True)
    monkeypatch.setattr(products, "layer_product", wrong)
    refused(partial(products.our_layer, TRIAL, BLOCK, level, True))


@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_of_ours_that_is_wrong_is_refused(monkeypatch, backward):
    right = products.layer_product

    def wrong(sparse):
        product = right(sparse)
        return lambda x, weight: 1.01 * product(x, weight)

    monkeypatch.setattr(products, "layer_product", wrong)
    refused(partial(products.our_layer, TRIAL, BLOCK, 0.5, backward))


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize(
    ("name", "peer", "function"),
    [
        ("dense", dense, "linear"),
        ("dense, compiled", dense, "compiled_linear"),
        ("torch BSR", torch_bsr, "linear"),
        ("2:4 by cuSPARSELt", semi_structured, "linear"),
        ("STK", products.stk, "linear"),
        ("blksprs", products.blksprs, "linear"),
    ],
)
def test_a_product_of_theirs_that_is_wrong_is_refused(monkeypatch, name, peer, function):
    def wrong(x, weight, *_):
        def product():
            return 1.01 * (x @ weight.T)

        return (product, lambda y: y) if name == "blksprs" else product

    monkeypatch.setattr(peer, function, wrong)
    refused(partial(products.peer_product, TRIAL, BLOCK, name))
