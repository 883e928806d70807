"""Strip to PyTorch's semi-structured tensors: what is converted, and what is refused and why."""

import copy

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

import triton_sparsity as ts
from triton_sparsity.kernels import semi_structured
from triton_sparsity.kernels.semi_structured import pack_semi_structured

SEMI_STRUCTURED = ts.StripFormat.SEMI_STRUCTURED


def build(pattern, *, level=0.5, dtype=torch.float16, overrides=(), model=None, device="cpu"):
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    model = model.to(device, dtype)
    config = ts.MagnitudeSparsityConfig(
        pattern=pattern,
        schedule=ts.PolynomialSchedule(initial_level=level, target_level=level),
        overrides=overrides,
    )
    return model, ts.create_controller(model, config)


@pytest.fixture
def any_device(monkeypatch):
    """Let a CPU tensor pass for one on a GPU that can multiply semi-structured tensors."""
    monkeypatch.setattr(semi_structured, "_obstacle", lambda weight: None)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(
        SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", lambda tensor: None
    )


def dense(weight):
    return sparse_semi_structured_to_dense_cutlass(weight.packed, weight.meta)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear_weights_are_packed_and_hold_the_masked_values(dtype, transposable):
    pattern = ts.NM(2, 4, transposable=transposable)
    model, controller = build(pattern, dtype=dtype)
    plain = controller.strip()
    stripped = controller.strip(strip_format="semi_structured")
    for index in (0, 2):
        weight = stripped[index].weight
        assert type(stripped[index]) is nn.Linear
        assert isinstance(weight, nn.Parameter)
        assert isinstance(weight, SparseSemiStructuredTensor)
        assert not weight.requires_grad
        assert torch.equal(dense(weight), plain[index].weight)
        assert not isinstance(model[index].weight, SparseSemiStructuredTensor)
    assert torch.equal(stripped[0].bias, model[0].bias)


@pytest.mark.usefixtures("any_device")
def test_other_patterns_become_plain_zeros_and_tied_weights_stay_tied():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])
    model[1].weight = model[0].weight
    override = ts.Override(scope="2", pattern=ts.Unstructured())
    _, controller = build(ts.NM(2, 4), model=model, overrides=[override])
    stripped = controller.strip(strip_format=SEMI_STRUCTURED)
    assert stripped[0].weight is stripped[1].weight
    assert isinstance(stripped[0].weight, SparseSemiStructuredTensor)
    assert int((stripped[2].weight == 0).sum()) == 2048


def without_gpu():
    return build(ts.NM(2, 4))


def without_2_4():
    return build(ts.NM(1, 4))


def with_a_convolution():
    return build(ts.NM(2, 4), model=nn.Sequential(nn.Conv2d(4, 8, 3)))


def before_the_end_of_the_schedule():
    return build(ts.NM(2, 4), level=0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_gpu, r"'0' cannot become .*must be on a CUDA device, got cpu"),
        (without_2_4, r".* needs a Linear under NM\(2, 4\), got none"),
        (with_a_convolution, r"'0' .*must be a Linear, got Conv2d"),
        (before_the_end_of_the_schedule, r"'.' .*level must be at least 0.5, got 0.[12]"),
    ],
)
def test_what_cannot_be_packed_is_named_and_nothing_changes(make, message, monkeypatch):
    if make is not without_gpu:
        monkeypatch.setattr(semi_structured, "_obstacle", lambda weight: None)
    model, controller = make()
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    for do_copy in (True, False):
        with pytest.raises(ValueError, match=rf"^strip_model: {message}"):
            controller.strip(do_copy=do_copy, strip_format=SEMI_STRUCTURED)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert controller.mask_level() > 0


class Fake:
    """A tensor on a GPU that is not there."""

    is_cuda, device = True, torch.device("meta")

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((7, 5), torch.float16, r"compute capability 8.0 or later, got \(7, 5\)"),
        ((9, 0), torch.float32, r"float16 or bfloat16, got torch.float32"),
    ],
)
def test_old_devices_and_wide_dtypes_are_refused(capability, dtype, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=f"^pack_semi_structured: .*{message}"):
        pack_semi_structured(Fake(dtype))


@pytest.mark.usefixtures("any_device")
def test_what_the_library_refuses_is_told(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("shape is not supported")

    monkeypatch.setattr(
        SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", refuse
    )
    _, controller = build(ts.NM(2, 4))
    with pytest.raises(ValueError, match=r"'0' cannot become .*shape is not supported"):
        controller.strip(strip_format=SEMI_STRUCTURED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_packed_model_computes_what_the_masked_one_does():
    gpu = torch.device("cuda", 0)
    model, controller = build(ts.NM(2, 4), device=gpu)
    stripped = controller.strip(strip_format=SEMI_STRUCTURED)
    x = torch.randn(64, 128, dtype=torch.float16, device=gpu)
    with torch.no_grad():
        torch.testing.assert_close(stripped(x), model(x), rtol=1e-2, atol=1e-2)
