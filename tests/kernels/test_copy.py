import pytest
import torch

from triton_sparsity.kernels import copy as module
from triton_sparsity.kernels.copy import copy_all_
from triton_sparsity.kernels.launch import INTERPRET

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["auto"] if INTERPRET else ["auto", "torch"]  # plain torch has a stage of its own


def masks(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 1), (7, 13), (0, 4), (64, 64), (40, 100)]
    found = [(torch.rand(s, generator=generator) < 0.5).to(DEVICE) for s in shapes]
    memory = torch.zeros(1 + 91, dtype=torch.bool, device=DEVICE)
    return [*found, memory[1:].view(7, 13).copy_(found[1])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_is_copied_in_place(backend, monkeypatch):
    monkeypatch.setattr(module, "BYTES", 64)
    targets, sources = masks(0), masks(1)
    addresses, versions = [t.data_ptr() for t in targets], [t._version for t in targets]
    copy_all_(targets, sources, backend=backend)
    assert all(map(torch.equal, targets, sources))
    assert [t.data_ptr() for t in targets] == addresses
    assert all(t._version > v for t, v in zip(targets, versions, strict=True) if t.numel())
    copy_all_(targets, targets, backend=backend)
    copy_all_([], [])


@pytest.mark.skipif(not INTERPRET, reason="counts launches in the interpreter")
def test_a_list_is_one_launch(monkeypatch):
    kernel, launches = module._copy_kernel, []
    noted = type("Noted", (), {"__getitem__": lambda _, g: launches.append(g) or kernel[g]})
    monkeypatch.setattr(module, "_copy_kernel", noted())
    copy_all_(masks(0), masks(1))
    assert len(launches) == 1


def test_what_does_not_fit_is_named():
    mask = torch.ones(4, 4, dtype=torch.bool)
    for source in (mask[:3], mask.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"^copy_all_: source must be .*got"):
            copy_all_([mask], [source])
    with pytest.raises(ValueError, match=r"^copy_all_: masks must be contiguous, got"):
        copy_all_([mask], [mask.T])
