"""Criteria: hand-worked values, where their evidence comes from, and what is missing."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.selection import criteria
from triton_sparsity.controller.selection.criteria import Evidence

ONE_SHOT = ts.PolynomialSchedule(target_level=0.5, target_epoch=0, freeze_epoch=0)
EVIDENCE = Evidence(
    name="fc",
    weight=torch.tensor([[3.0, -4.0], [0.0, 1.0]]),
    grid=(2, 2),
    gradient=torch.tensor([[-1.0, 0.5], [9.0, 0.0]]),
    momentum=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    input_norm=torch.tensor([10.0, 1.0]),
)


def one_shot(model, importance, **options):
    config = ts.MagnitudeSparsityConfig(weight_importance=importance, schedule=ONE_SHOT, **options)
    return ts.create_controller(model, config)


def masks(controller):
    return [info.operand.binary_mask for info in controller.sparsified_module_info]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("abs", [[3, 4], [0, 1]]),
        ("normed_abs", [[3 / 26**0.5, 4 / 26**0.5], [0, 1 / 26**0.5]]),
        ("snip", [[3, 2], [0, 0]]),
        ("snip_momentum", [[1, 2], [3, 4]]),
        ("wanda", [[30, 4], [0, 1]]),
        # |w g| of each element, which are groups; the sum that was gathered
        ("taylor", [[3, 2], [0, 0]]),
        ("fisher", [[1, 2], [3, 4]]),
    ],
)
def test_hand_worked_values(name, expected):
    values, normed, per_group = criteria.criterion(name)(EVIDENCE)
    importance = values.abs() / (values.norm() if normed else 1)
    torch.testing.assert_close(importance, torch.tensor(expected, dtype=torch.float32))
    assert per_group == (name in ("taylor", "fisher"))


def test_the_norm_of_zeros_makes_importance_zero_not_nan():
    found = criteria.normed_magnitude(Evidence("fc", torch.zeros(2, 2), (2, 2)))
    weight = SimpleNamespace(shard=None, packed=True, backend="auto")
    (values,), scales = criteria.scores_by_group([weight], [found])
    assert (values * scales == 0).all()


@pytest.mark.parametrize(
    ("name", "missing"),
    [("snip", "no gradient"), ("snip_momentum", "no gradient"), ("wanda", "calibration")],
)
def test_missing_evidence_is_named_and_leaves_the_masks(name, missing):
    controller = one_shot(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), name)
    with pytest.raises(RuntimeError, match=rf"^{name}: .*'0'.*{missing}"):
        controller.set_sparsity_level(0.5)
    assert all(mask.all() for mask in masks(controller))
    # the level at which nothing is pruned needs no evidence
    controller.set_sparsity_level(0.0)


@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(2, 4)], ids=str)
def test_snip_reads_the_gradient_of_the_last_backward_pass(pattern):
    torch.manual_seed(0)
    model = nn.Linear(8, 6, bias=False)
    controller = one_shot(model, "snip", pattern=pattern)
    model(torch.randn(5, 8)).square().sum().backward()
    weight = model.weight.detach().clone()
    score = (weight * model.weight.grad).abs()
    controller.scheduler.epoch_step()
    score = score.unfold(0, pattern.rows, pattern.rows).unfold(1, pattern.cols, pattern.cols)
    score = score.mean((2, 3)).repeat_interleave(pattern.rows, 0)
    score = score.repeat_interleave(pattern.cols, 1)
    (mask,) = masks(controller)
    assert (~mask).sum() == 24
    assert score[~mask].max() < score[mask].min()
    assert not torch.equal(mask, weight.abs() > weight.abs().median())


def test_snip_momentum_sums_with_decay_over_the_steps():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0]]))
    controller = one_shot(model, "snip_momentum")
    for x in ([1.0, 0.0], [0.0, 1.5], [0.0, 0.0]):
        controller.scheduler.step()
        model.zero_grad()
        model(torch.tensor([x])).sum().backward()
    controller.scheduler.step()
    # |w g|: 2 and 0, then 0 and 1.5, then nothing; 2 * 0.81 = 1.62 against 1.5 * 0.9 = 1.35
    state = controller.get_state()["magnitude_sparsity"]["algorithm_state"]
    torch.testing.assert_close(state["momenta"]["weight"], torch.tensor([[1.62, 1.35]]))
    controller.scheduler.epoch_step()
    assert masks(controller)[0].tolist() == [[True, False]]


def test_snip_momentum_leaves_out_a_step_whose_gradients_overflowed():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    controller = one_shot(model, "snip_momentum")

    def step(value):
        model[0].weight.grad = torch.full_like(model[0].weight, value)
        # finite in every step, but not a step that the optimiser takes
        model[1].weight.grad = torch.ones_like(model[1].weight)
        controller.scheduler.step()

    step(math.inf)
    with pytest.raises(RuntimeError, match=r"snip_momentum: \|w g\| is 0 throughout .* finite"):
        controller.set_sparsity_level(0.5)
    step(2.0)
    step(math.nan)
    momenta = controller.get_state()["magnitude_sparsity"]["algorithm_state"]["momenta"]
    assert torch.equal(momenta["0"], 2 * model[0].weight.abs())
    assert torch.equal(momenta["1"], model[1].weight.abs())
    controller.set_sparsity_level(0.5)
    assert controller.compression_rate == 0.5


@pytest.mark.parametrize("importance", ["snip", "snip_momentum"])
def test_gradients_that_are_all_zero_are_refused_and_leave_the_masks(importance):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    controller = one_shot(model, importance)
    model(torch.randn(3, 6)).sum().backward()
    model.zero_grad(set_to_none=False)
    controller.scheduler.step()
    with pytest.raises(RuntimeError, match=rf"^{importance}: .* of '0', 2 weights .*zero_grad"):
        controller.set_sparsity_level(0.5)
    assert all(mask.all() for mask in masks(controller))
    # a level at which nothing is pruned needs none
    controller.set_sparsity_level(0.0)
    # one gradient in the pool is enough
    model[1].weight.grad[0, 0] = 1
    controller.scheduler.step()
    controller.set_sparsity_level(0.5)
    assert controller.compression_rate == 0.5


def test_wanda_measures_the_inputs_of_a_linear_layer_over_all_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    controller = one_shot(model, "wanda", ignored_scopes=("2",), pool="weight")
    batches = [torch.randn(3, 7, 6), torch.randn(2, 7, 6) * 3]
    with controller.calibration():
        for x in batches:
            model(x)
    norm = torch.cat([x.reshape(-1, 6) for x in batches]).square().mean(0).sqrt()
    score = (model[0].weight * norm).abs().detach()
    controller.scheduler.epoch_step()
    (mask,) = masks(controller)
    assert (~mask).sum() == 15
    assert score[~mask].max() < score[mask].min()
    # only while the context is open
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1, dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, groups=2, padding=(0, 1)),
    ],
    ids=["strided", "grouped"],
)
def test_wanda_measures_what_each_kernel_element_of_a_convolution_meets(conv):
    x = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    controller = one_shot(nn.Sequential(conv), "wanda")
    with controller.calibration():
        controller.model(x)
    settings = {k: getattr(conv, k) for k in ("dilation", "padding", "stride")}
    columns = F.unfold(x, conv.kernel_size, **settings)  # (2, channels * kernel, positions)
    norm = columns.square().mean((0, 2)).sqrt().view(conv.groups, -1)
    norm = norm.repeat_interleave(6 // conv.groups, 0)
    state = controller.get_state()["magnitude_sparsity"]["algorithm_state"]
    measured = state["input_norms"]["0"].expand_as(norm)
    torch.testing.assert_close(measured, norm)


@pytest.mark.parametrize(
    ("layer", "importance", "message"),
    [
        (nn.Linear(4, 4), "abs", "weight_importance must be 'wanda', .* got 'abs'"),
        (
            nn.Embedding(4, 4),
            "wanda",
            "the inputs of 'weight', a Embedding, cannot be measured",
        ),
        (nn.Conv1d(4, 4, 3, padding="same"), "wanda", ".* a Conv1d, cannot be measured"),
    ],
    ids=["criterion", "embedding", "padding"],
)
def test_what_cannot_be_calibrated_is_refused(layer, importance, message):
    controller = one_shot(layer, importance)
    with pytest.raises(ValueError, match=rf"^calibration: {message}"), controller.calibration():
        pass
    assert not layer._forward_hooks


@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 4)], ids=str)
def test_random_masks_follow_from_the_seed_alone(pattern):
    def pruned(seed, weights):
        torch.manual_seed(weights)
        model = nn.Sequential(nn.Linear(50, 30), nn.Linear(30, 50))
        controller = one_shot(model, "random", pattern=pattern, seed=seed)
        controller.set_sparsity_level(0.5)
        return controller, masks(controller)

    controller, first = pruned(0, weights=1)
    _, again = pruned(0, weights=2)
    _, other = pruned(3, weights=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1].T)
    groups = sum(info.operand.groups for info in controller.sparsified_module_info)
    assert sum(i.operand.pruned_groups() for i in controller.sparsified_module_info) == groups // 2
    # a higher level prunes more groups, not others
    controller.set_sparsity_level(0.75)
    assert not (masks(controller)[0] & ~first[0]).any()


def test_random_is_uniform_over_whole_and_edge_blocks():
    controller = one_shot(nn.Linear(16 * 40 + 1, 16 * 40), "random", pattern=ts.Block(16, 16))
    controller.set_sparsity_level(0.5)
    edge = controller.sparsified_module_info[0].operand.mask[:, -1].float().mean().item()
    assert abs(edge - 0.5) < 3 * 0.5 / math.sqrt(40)


@pytest.mark.parametrize("importance", ["snip", "snip_momentum", "wanda"])
def test_what_was_gathered_comes_back_with_the_state(importance):
    def start():
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        return model, one_shot(model, importance)

    model, controller = start()
    x = torch.randn(4, 8)
    if importance == "wanda":
        with controller.calibration():
            model(x)
    else:
        for _ in range(2):
            controller.scheduler.step()
            model(x).square().sum().backward()
    _, resumed = start()
    resumed.load_state(controller.get_state())
    for c in (controller, resumed):
        c.scheduler.step()
        c.scheduler.epoch_step()
    assert torch.equal(masks(controller)[0], masks(resumed)[0])
    assert resumed.mask_level() == 0.5
    wrong = controller.get_state()
    gathered = wrong["magnitude_sparsity"]["algorithm_state"]
    gathered[next(iter(gathered))]["weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"must be .* of shape"):
        resumed.load_state(wrong)


@pytest.mark.parametrize("importance", ["snip", "snip_momentum"])
def test_going_back_to_a_state_in_memory_goes_back_to_its_gradients(importance):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    controller = one_shot(model, importance)

    def step():
        controller.scheduler.step()
        model.zero_grad(set_to_none=False)
        model(torch.randn(4, 8)).square().sum().backward()

    untouched = controller.get_state()
    step()
    gradient = model.weight.grad.clone()
    state = controller.get_state()
    for _ in range(5):
        step()
    controller.load_state(state)
    assert torch.equal(model.weight.grad, gradient)
    controller.scheduler.step()
    controller.set_sparsity_level(0.5)
    score = (model.weight * gradient).abs()
    (mask,) = masks(controller)
    assert score[~mask].max() < score[mask].min()
    controller.load_state(untouched)
    assert model.weight.grad is None


def test_an_infinite_importance_is_not_blamed_on_the_weight():
    model = nn.Linear(4, 4)
    controller = one_shot(model, "snip")
    model.weight.grad = torch.full_like(model.weight, math.inf)
    with pytest.raises(ValueError, match="the importance of 'weight' holds NaN or Inf"):
        controller.set_sparsity_level(0.5)


def block_evidence(**more):
    # w g in blocks of 1 x 2: -3 and -2, 5 and -5; 0 and 4, 1 and 1
    weight = torch.tensor([[3.0, -4.0, 5.0, 1.0], [0.0, 2.0, 1.0, -1.0]])
    gradient = torch.tensor([[-1.0, 0.5, 1.0, -5.0], [9.0, 2.0, 1.0, -1.0]])
    return Evidence("fc", weight, (2, 2), gradient=gradient, pattern=ts.Block(1, 2), **more)


def test_taylor_adds_up_before_it_takes_the_magnitude():
    found = criteria.taylor(block_evidence())
    assert found.values.tolist() == [[-5, 0], [4, 2]]
    assert found.per_group
    # another moment's product stands for weight and gradient
    product = torch.tensor([[1.0, 2.0, 0.0, 0.0], [-3.0, 1.0, 0.0, 7.0]])
    assert criteria.taylor(block_evidence(product=product)).values.tolist() == [[3, 0], [-2, 7]]


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@pytest.mark.parametrize(
    ("reduction", "expected"),
    # 3 x 5 in blocks of 2 x 2, of which the edge ones have 2, 2 and 1 elements
    [
        ("mean", [[2.5, 1, 3], [3.5, 4, 5]]),
        ("sum", [[10, 4, 6], [7, 8, 5]]),
        ("max", [[4, 1, 6], [4, 8, 5]]),
        ("l2", [[30**0.5, 2, 6], [5, 8, 5]]),
    ],
)
def test_a_block_is_reduced_as_told(reduction, expected):
    model = nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1, -2, 1, 1, 6.0], [3, 4, -1, 1, 0], [-3, 4, 0, 8, 5]]))
    options = {"pattern": ts.Block(2, 2), "block_reduction": reduction}
    for importance, factor in (("abs", 1), ("normed_abs", model.weight.norm().item())):
        controller = one_shot(model, importance, **options)
        (scores,), scales = controller.group_scores(controller._weights)
        scores = scores if scales is None else scores * scales * factor
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))
        controller.strip(do_copy=False)


def test_fisher_sums_squares_of_a_groups_steps():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0, 1.0, 3.0]]))
    controller = one_shot(model, "fisher", pattern=ts.Block(1, 2))
    for x in ([1.0, -1.0, 1.0, 1.0], [0.0, 3.0, 1.0, 0.0], [0.0] * 4):
        controller.scheduler.step()
        model.zero_grad()
        model(torch.tensor([x])).sum().backward()
    controller.scheduler.step()
    # (2 - 1)^2 and (1 + 3)^2, then 3^2 and 1^2, then nothing
    momenta = controller.get_state()["magnitude_sparsity"]["algorithm_state"]["momenta"]
    torch.testing.assert_close(momenta["weight"], torch.tensor([[0.81 + 8.1, 12.96 + 0.9]]))
    controller.scheduler.epoch_step()
    assert masks(controller)[0].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("to_none", [True, False])
def test_snip_takes_gradient_and_weight_of_one_moment(to_none):
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    controller = one_shot(model, "snip")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(7, 6)).square().sum().backward()
    product = (model.weight * model.weight.grad).detach().clone()
    optimizer.step()  # moves the weights far
    if to_none:
        optimizer.zero_grad()
    else:
        assert not torch.allclose(product, model.weight * model.weight.grad)
    (scores,), _ = controller.group_scores(controller._weights)
    torch.testing.assert_close(scores.abs(), product.abs())
    # a later pass is of the weights of today
    model.zero_grad()
    model(torch.randn(7, 6)).square().sum().backward()
    (scores,), _ = controller.group_scores(controller._weights)
    torch.testing.assert_close(scores.abs(), (model.weight * model.weight.grad).abs())


def test_snip_momentum_sums_what_each_step_was_of():
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    controller = one_shot(model, "snip_momentum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want = torch.zeros(5, 6)
    for _ in range(3):
        controller.scheduler.step()
        optimizer.zero_grad()
        model(torch.randn(7, 6)).square().sum().backward()
        want = 0.9 * want + (model.weight * model.weight.grad).abs().detach()
        optimizer.step()
    optimizer.zero_grad()  # too early for nobody now
    controller.scheduler.step()
    momenta = controller.get_state()["magnitude_sparsity"]["algorithm_state"]["momenta"]
    torch.testing.assert_close(momenta["weight"], want)


@pytest.mark.parametrize("importance", ["snip", "taylor", "snip_momentum", "fisher"])
def test_a_resumed_run_prunes_by_the_step_before_it(importance):
    def start():
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        return model, one_shot(model, importance), torch.optim.SGD(model.parameters(), lr=0.5)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()

    model, controller, optimizer = start()
    controller.scheduler.step()
    step(model, optimizer)
    other, resumed, _ = start()
    other.load_state_dict(model.state_dict())
    resumed.load_state(controller.get_state())
    for one in (controller, resumed):
        one.scheduler.step()
        one.scheduler.epoch_step()
    assert torch.equal(masks(controller)[0], masks(resumed)[0])
    assert controller.compression_rate == 0.5


@pytest.mark.parametrize("importance", ["snip", "taylor", "snip_momentum", "fisher"])
def test_an_unused_weight_is_said_to_be_unused(importance):
    model = nn.ModuleDict({"used": nn.Linear(6, 5), "spare": nn.Linear(6, 5)})
    controller = one_shot(model, importance)
    controller.scheduler.step()
    model["used"](torch.randn(3, 6)).square().sum().backward()
    controller.scheduler.step()
    with pytest.raises(RuntimeError, match=r"\['spare'\] have no gradient while others have"):
        controller.set_sparsity_level(0.5)


@pytest.mark.parametrize("importance", ["snip", "taylor", "snip_momentum", "fisher"])
def test_gradients_at_rounding_level_are_refused(importance):
    model = nn.Linear(6, 5)
    controller = one_shot(model, importance)
    controller.scheduler.step()
    (1e-9 * model(torch.ones(3, 6)).mean()).backward()
    controller.scheduler.step()
    with pytest.raises(RuntimeError, match=rf"^{importance}: \|w g\| adds up to .*e-\d+ over"):
        controller.set_sparsity_level(0.5)
    assert all(mask.all() for mask in masks(controller))


def by_row_norm(evidence):
    return evidence.weight.norm(dim=1, keepdim=True).expand_as(evidence.weight)


class TestFunctions:
    def test_a_function_stands_wherever_a_name_does(self):
        for config in (
            ts.MagnitudeSparsityConfig(weight_importance=by_row_norm),
            ts.SETConfig(level=0.5, t_end=0, weight_importance=by_row_norm),
            ts.RigLConfig(level=0.5, t_end=0, weight_importance=by_row_norm),
        ):
            assert config.weight_importance is by_row_norm
            dumped = config.model_dump(mode="json")["weight_importance"]
            assert dumped == f"{__name__}.by_row_norm"

    def test_it_is_of_elements_whose_blocks_are_reduced(self):
        torch.manual_seed(0)
        model = nn.Linear(8, 4, bias=False)
        controller = one_shot(model, by_row_norm, pattern=ts.Block(1, 4))
        norms = model.weight.norm(dim=1)
        controller.scheduler.epoch_step()
        (mask,) = masks(controller)
        assert mask.all(1).equal(norms >= norms.sort().values[2])

    def test_it_is_of_groups(self):
        seen = []

        def mine(evidence):
            seen.append((evidence.name, evidence.grid, evidence.pattern))
            return torch.arange(6.0).view(evidence.grid)

        controller = one_shot(nn.Linear(6, 8), mine, pattern=ts.Block(4, 2))
        controller.scheduler.epoch_step()
        assert seen == [("weight", (2, 3), ts.Block(4, 2))]
        assert controller._weights[0].mask.tolist() == [[False] * 3, [True] * 3]

    def test_it_sees_inputs_and_says_that_it_needs_them(self):
        def mine(evidence):
            return evidence.weight.abs() + evidence.input_norm

        mine.needs = ("inputs",)
        model = nn.Linear(6, 8)
        controller = one_shot(model, mine)
        assert controller.needs_calibration
        assert not controller.needs_gradients
        with controller.calibration():
            model(torch.randn(5, 6))
        controller.scheduler.epoch_step()
        assert controller.compression_rate == 0.5

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (torch.ones(3), r"shape \(8, 6\) or of its groups' \(2, 3\) for 'weight', got \(3,\)"),
            (1.0, r"a tensor .* got float"),
            (torch.ones(8, 6), "tell groups of 'weight' apart, got 1 throughout"),
            (torch.full((2, 3), math.nan), "finite values for 'weight', got NaN or Inf"),
        ],
    )
    def test_what_it_must_not_return(self, returned, message):
        def mine(evidence):
            return returned

        controller = one_shot(nn.Linear(6, 8), mine, pattern=ts.Block(4, 2))
        with pytest.raises(ValueError, match=f"^weight_importance: .*mine must return.*{message}"):
            controller.scheduler.epoch_step()
        assert all(mask.all() for mask in masks(controller))

    def test_another_name_is_refused_with_all_that_there_are(self):
        with pytest.raises(ValueError, match=r"must be 'abs', .* or a function of Evidence.*'l1'"):
            ts.MagnitudeSparsityConfig(weight_importance="l1")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x, attention_mask=None, flat=False):
        h = self.fc(input=x.flatten(0, 1) if flat else x)
        return self.head(h.view(*x.shape[:2], -1)[:, 0])


@pytest.mark.parametrize("flat", [False, True])
def test_padding_is_left_out_of_a_calibration(flat):
    torch.manual_seed(0)
    model = Masked()
    controller = one_shot(model, "wanda")
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    batches = [torch.randn(3, 4, 6), torch.randn(3, 4, 6)]
    heads = []
    model.head.register_forward_pre_hook(lambda _, args: heads.append(args[0].detach()))
    with controller.calibration(attention_mask="attention_mask"):
        for x in batches:
            model(x, attention_mask=mask, flat=flat)
    norms = controller.get_state()["magnitude_sparsity"]["algorithm_state"]["input_norms"]
    real = torch.cat([x[mask.bool()] for x in batches])
    assert len(real) == 14
    torch.testing.assert_close(norms["fc"], real.square().mean(0).sqrt())
    # what is of no token is measured as a whole
    torch.testing.assert_close(norms["head"], torch.cat(heads).square().mean(0).sqrt())
    assert not model._forward_pre_hooks or len(model._forward_pre_hooks) == 1  # the guard's


@pytest.mark.parametrize(
    ("given", "got"), [({}, "NoneType"), ({"attention_mask": torch.ones(4)}, r"\(4,\)")]
)
def test_a_mask_that_is_not_given_is_missed(given, got):
    model = Masked()
    controller = one_shot(model, "wanda")
    with (
        pytest.raises(ValueError, match=rf"attention_mask must name .* Masked .* got {got} by"),
        controller.calibration(attention_mask="attention_mask"),
    ):
        model(torch.randn(3, 4, 6), **given)


def test_a_calibration_without_data_is_refused():
    controller = one_shot(nn.Linear(4, 4), "wanda")
    with (
        pytest.raises(ValueError, match=r"calibration: the model must be run on data .* got no"),
        controller.calibration(),
    ):
        pass


def weight_of(values):
    model = nn.Linear(values.shape[1], values.shape[0], bias=False)
    model.weight.data = values.clone()
    return model


@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.NM(2, 4)], ids=str)
@pytest.mark.parametrize("spoil", ["one of 2e19", "all below 1e-23", "one beyond a norm"])
def test_normed_magnitudes_rank_right_where_squares_do_not_fit_float32(spoil, pattern):
    torch.manual_seed(0)
    weights = [torch.randn(8, 16), torch.randn(12, 16)]
    if spoil == "one of 2e19":
        weights[0][3, 5] = 2e19
    else:
        weights[0] *= 1e-25 if spoil == "all below 1e-23" else 8e37
    model = nn.Sequential(*map(weight_of, weights))
    config = ts.MagnitudeSparsityConfig(
        weight_importance="normed_abs", schedule=ONE_SHOT, pool="global", pattern=pattern
    )
    controller = ts.create_controller(model, config)
    controller.set_sparsity_level(0.25)
    keys = [(w.double() / w.double().norm()).float() for w in weights]
    exact = ts.create_controller(
        nn.Sequential(*map(weight_of, keys)),
        config.model_copy(update={"weight_importance": "abs"}),
    )
    exact.set_sparsity_level(0.25)
    assert all(map(torch.equal, masks(controller), masks(exact)))


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
def test_a_norm_too_small_to_divide_by_is_refused_by_name():
    model = nn.Sequential(weight_of(torch.full((4, 4), 1e-40)), weight_of(torch.ones(4, 4)))
    controller = one_shot(model, "normed_abs")
    with pytest.raises(ValueError, match="the importance of '0' holds NaN or Inf"):
        controller.set_sparsity_level(0.5)
    assert all(mask.all() for mask in masks(controller))


@pytest.mark.parametrize("factor", [1e-25, 1.0, 3e36])
def test_the_euclidean_norm_of_a_block_neither_overflows_nor_vanishes(factor):
    torch.manual_seed(0)
    blocks = torch.randn(6, 4, 4) * torch.logspace(-9, 1, 6)[:, None, None] * factor
    model = weight_of(torch.cat([*blocks], 1))
    controller = one_shot(model, "abs", pattern=ts.Block(4, 4), block_reduction="l2")
    controller.set_sparsity_level(0.5)
    (mask,) = masks(controller)
    assert mask[:, 12:].all()
    assert not mask[:, :12].any()


@pytest.mark.parametrize(
    ("pattern", "reduction"),
    [(ts.Block(4, 4), "mean"), (ts.Block(4, 4), "sum"), (ts.NM(1, 4), "mean")],
    ids=str,
)
def test_a_sum_beyond_float32_is_refused_by_name(pattern, reduction):
    model = nn.Sequential(weight_of(torch.ones(8, 8)), weight_of(torch.full((8, 8), 3e38)))
    controller = one_shot(model, "abs", pattern=pattern, block_reduction=reduction, pool="global")
    with pytest.raises(ValueError, match="the importance of '1' holds NaN or Inf"):
        controller.set_sparsity_level(0.25)
    assert all(mask.all() for mask in masks(controller))


def test_a_tile_beyond_float32_is_refused_by_name():
    model = nn.Sequential(weight_of(torch.ones(8, 8)), weight_of(torch.full((8, 8), 3e38)))
    pattern = ts.NM(2, 4, transposable=True)
    controller = one_shot(model, "abs", pattern=pattern, pool="global")
    for level in (0.25, 0.5):
        with pytest.raises(ValueError, match="the importance of '1' holds NaN or Inf"):
            controller.set_sparsity_level(level)
