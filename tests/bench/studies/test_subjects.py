from functools import partial

import pytest
import torch
from torch import nn

from triton_sparsity.bench.peers import nncf, thresholds, torch_prune
from triton_sparsity.bench.studies import subjects
from triton_sparsity.bench.studies.setup import (
    BLOCK,
    LEVEL,
    TRIAL,
    check_blocks,
    check_close,
    check_count,
    check_order,
    linears,
)
from triton_sparsity.controller.masks.guard import Guard
from triton_sparsity.kernels.pattern import Unstructured

PATTERNS = pytest.mark.parametrize("pattern", [Unstructured(), BLOCK], ids=str)


def refused(make, what):
    """See that a subject is not handed out to be timed."""
    with pytest.raises(AssertionError, match=f"^result is wrong: .*{what}"):
        make()


def after(function, spoil):
    """Return ``function``, what it returns spoilt."""

    def broken(*args, **kwargs):
        found = function(*args, **kwargs)
        return spoil(found) or found

    return broken


def shift_first_bias(model):
    with torch.no_grad():
        model[0].bias += 1


def scale_gradient(tensor):
    tensor.register_hook(lambda gradient: 1.1 * gradient)


def test_what_prunes_too_few_or_the_wrong_ones_is_refused():
    model = linears(TRIAL, 2)
    sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in model])
    limit = sizes.kthvalue(round(LEVEL * sizes.numel())).values
    masks = [layer.weight.detach().abs() > limit for layer in model]
    check_count(masks)
    check_order(model, masks)
    refused(lambda: check_order(model, [masks[1], masks[0]]), "larger than a kept one")
    kept = masks[0].nonzero()[0]
    fewer = masks[0].clone()
    fewer[tuple(kept)] = False
    # one more or less is what rounding does
    check_count([fewer, masks[1]])
    fewer[masks[0].nonzero()[1:3].unbind(1)] = False
    refused(lambda: check_count([fewer, masks[1]]), "of 32768 weights are pruned")
    refused(lambda: check_order(model, [torch.ones_like(m) for m in masks]), "are pruned")


def test_blocks_that_are_not_whole_or_not_the_smallest_are_refused():
    sizes = torch.rand(64, 160)
    grid = sizes.view(2, 32, 5, 32).mean((1, 3))
    keep = grid >= grid.flatten().sort().values[8]
    mask = keep.repeat_interleave(32, 0).repeat_interleave(32, 1)
    check_blocks(sizes, mask)
    refused(lambda: check_blocks(sizes.neg(), mask), "larger than a kept one")
    partly = mask.clone()
    partly[0, 0].logical_not_()
    refused(lambda: check_blocks(sizes, partly), "in part")
    refused(lambda: check_blocks(sizes, torch.ones_like(mask)), "0 of 10240")


def test_what_is_further_off_than_rounding_is_refused():
    exact = torch.ones(3, dtype=torch.float64)
    check_close(exact.float(), exact.float(), exact)
    for wrong in (1.001, float("nan")):
        refused(
            lambda wrong=wrong: check_close(wrong * exact.float(), exact.float(), exact), "off"
        )


def forget(controller):
    controller.set_sparsity_level = lambda level: None


@pytest.mark.parametrize("subject", ["our_global_update", "our_block_update"])
def test_an_update_of_ours_that_does_nothing_is_refused(monkeypatch, subject):
    monkeypatch.setattr(subjects, "sparse", after(subjects.sparse, forget))
    refused(partial(getattr(subjects, subject), TRIAL), "weights are pruned")


def test_an_update_of_torchs_that_does_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(
        torch_prune, "compress", after(torch_prune.compress, lambda update: lambda: None)
    )
    refused(partial(subjects.torch_global_update, TRIAL), "weights are pruned")


def test_an_update_of_weight_norm_that_does_nothing_is_refused(monkeypatch):
    peer = subjects.weight_norm_peer
    update = after(peer.mask_update, lambda update: lambda: None)
    monkeypatch.setattr(peer, "mask_update", update)
    refused(partial(subjects.weight_norm_update, TRIAL), "weights are pruned")


def test_a_threshold_of_ours_that_is_another_is_refused(monkeypatch):
    def raise_it(threshold):
        return threshold._replace(value=threshold.value + 1)

    monkeypatch.setattr(subjects, "select", after(subjects.select, raise_it))
    refused(partial(subjects.our_threshold, TRIAL), "k-th smallest")


def test_a_threshold_of_theirs_that_is_another_is_refused():
    def next_one(values, k):
        return thresholds.by_sort(values, k + 1)

    refused(partial(subjects.their_threshold, TRIAL, next_one), "k-th smallest")


def half_as_many(*arguments):
    return real_sparse(*arguments, LEVEL / 2)


real_sparse = subjects.sparse


@PATTERNS
@pytest.mark.parametrize("subject", ["our_step", "our_evaluation"])
def test_a_model_that_is_pruned_half_as_much_is_refused(monkeypatch, subject, pattern):
    monkeypatch.setattr(subjects, "sparse", half_as_many)
    refused(partial(getattr(subjects, subject), TRIAL, pattern, 8), "weights are pruned")


@PATTERNS
def test_a_step_of_ours_with_a_wrong_gradient_is_refused(monkeypatch, pattern):
    model = linears(TRIAL, subjects.LAYERS)
    scale_gradient(model[1].weight)
    models = iter([model])
    monkeypatch.setattr(subjects, "linears", lambda *_: next(models))
    refused(partial(subjects.our_step, TRIAL, pattern, 8), "off by")


@PATTERNS
def test_a_step_of_ours_that_trains_pruned_weights_is_refused(monkeypatch, pattern):
    monkeypatch.setattr(Guard, "after_accumulation", lambda *_: None)
    refused(partial(subjects.our_step, TRIAL, pattern, 8), "pruned weights have a gradient")


@PATTERNS
def test_an_evaluation_of_ours_with_another_result_is_refused(monkeypatch, pattern):
    model = linears(TRIAL, subjects.LAYERS)
    shift_first_bias(model)
    models = iter([model])
    monkeypatch.setattr(subjects, "linears", lambda *_: next(models))
    refused(partial(subjects.our_evaluation, TRIAL, pattern, 8), "off by")


def test_a_step_of_torchs_with_another_result_is_refused(monkeypatch):
    def spoil(model, level):
        update = compress(model, level)
        shift_first_bias(model)
        return update

    compress = torch_prune.compress
    monkeypatch.setattr(torch_prune, "compress", spoil)
    refused(partial(subjects.torch_step, TRIAL, 8), "off by")


def whole(model):
    """The dense model, as if nothing had been pruned."""
    return linears(TRIAL, len(model))


def empty(model):
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()


def unbiased(model):
    with torch.no_grad():
        model[-1].bias.zero_()


def wrapped(model):
    class Other(nn.Linear):
        pass

    model[0].__class__ = Other


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (whole, "weights are not the masked ones"),
        (empty, "weights are not the masked ones"),
        (unbiased, "biases have changed"),
        (wrapped, "Other is not the original class"),
    ],
)
def test_a_strip_of_ours_with_another_result_is_refused(monkeypatch, spoil, what):
    def spoil_strip(controller):
        controller.strip = after(controller.strip, spoil)

    monkeypatch.setattr(subjects, "sparse", after(subjects.sparse, spoil_strip))
    refused(partial(subjects.our_strip, TRIAL), what)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [(nncf.RB, "weight"), (nncf.MOVEMENT, "weight"), (nncf.MOVEMENT, "weight_scores")],
)
@PATTERNS
def test_a_learning_step_of_ours_with_a_wrong_gradient_is_refused(
    monkeypatch, algorithm, name, pattern
):
    create = subjects.create_controller

    def spoil(model, config):
        controller = create(model, config)
        scale_gradient(dict(model[0].named_parameters())[name])
        return controller

    monkeypatch.setattr(subjects, "create_controller", spoil)
    refused(partial(subjects.our_learning_step, TRIAL, algorithm, pattern, 8), "off by")


@pytest.mark.parametrize("algorithm", [nncf.RB, nncf.MOVEMENT])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda y: 2 * y, "off by"),
        # a column of the weight is an output of the unit matrix
        (lambda y: y.index_fill(0, torch.arange(64), 0), "off by|of the groups are kept"),
    ],
)
def test_a_layer_that_shows_other_weights_is_refused(algorithm, spoil, what):
    layer = nn.Linear(128, 128)
    if algorithm == nncf.RB:
        with torch.no_grad():
            layer.weight[
                torch.rand(128, 128, generator=torch.Generator().manual_seed(0)) > 0.99
            ] = 0
    subjects.shown_mask(layer, algorithm, Unstructured())
    layer.register_forward_hook(lambda module, inputs, y: spoil(y))
    refused(partial(subjects.shown_mask, layer, algorithm, Unstructured()), what)


def test_a_layer_that_shows_too_few_weights_is_refused():
    layer = nn.Linear(128, 128)
    with torch.no_grad():
        layer.weight[:64] = 0
    for algorithm in (nncf.RB, nncf.MOVEMENT):
        refused(
            partial(subjects.shown_mask, layer, algorithm, Unstructured()),
            "0.5 of the groups are kept",
        )


@pytest.fixture
def with_nncf():
    if (reason := nncf.available()) is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("with_nncf")
@pytest.mark.filterwarnings("ignore")
def test_layers_of_nncf_are_in_the_order_of_the_model():
    # its graph has layer 9 after layer 0
    subjects.nncf_global_update(TRIAL._replace(layers=12))


@pytest.mark.usefixtures("with_nncf")
@pytest.mark.filterwarnings("ignore")
def test_what_nncf_gets_wrong_is_refused(monkeypatch):
    compress = nncf.compress

    def spoilt(spoil):
        def broken(*arguments):
            controller, model = compress(*arguments)
            spoil(controller, model)
            return controller, model

        monkeypatch.setattr(nncf, "compress", broken)

    def shift(controller, model):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("bias")).add_(1)

    spoilt(lambda controller, model: forget(controller))
    refused(partial(subjects.nncf_global_update, TRIAL), "weights are pruned")
    spoilt(shift)
    refused(partial(subjects.nncf_step, TRIAL, 8), "off by")
    refused(partial(subjects.nncf_strip, TRIAL), "off by")
    for algorithm in (nncf.RB, nncf.MOVEMENT):
        spoilt(
            lambda controller, _: controller.sparsified_module_info[
                0
            ].module.register_forward_hook(lambda module, inputs, y: 2 * y)
        )
        refused(partial(subjects.nncf_learning_step, TRIAL, algorithm, 8), "off by")
