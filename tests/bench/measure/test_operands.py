import pytest
import torch

from triton_sparsity.bench.measure.operands import random_mask


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["random", "skewed"])
def test_masks_prune_exactly_as_many_groups_as_asked(level, kind):
    mask = random_mask((16, 25), level, kind)
    assert int((~mask).sum()) == round(level * 400)
    assert torch.equal(mask, random_mask((16, 25), level, kind))
    if kind == "skewed" and level >= 0.5:
        heavy = mask.sum(1).sort(descending=True).values[:8].sum()
        assert heavy == round(0.9 * int(mask.sum()))


def test_large_masks_are_drawn_by_chance():
    mask = random_mask((2048, 1024), 0.8, "random")
    assert mask.float().mean().item() == pytest.approx(0.2, abs=0.002)
