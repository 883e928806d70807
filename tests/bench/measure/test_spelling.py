import pytest

import triton_sparsity as ts
from triton_sparsity.bench.measure.spelling import parse_pattern, spell_pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", ts.Unstructured()),
        ("block:16x16", ts.Block(16, 16)),
        ("block:64", ts.Block(64, 64)),
        ("block:1x256", ts.Block(1, 256)),
        ("nm:1:3", ts.NM(1, 3)),
        ("nm:16:32", ts.NM(16, 32)),
        ("nm:2:4:transposable", ts.NM(2, 4, transposable=True)),
    ],
)
def test_patterns_are_parsed_and_spelled_in_one_way(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(spell_pattern(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *("", "block", "block:", "block:x16", "block:16x", "block:16x16x16", "block:-16"),
        *("block:1.5", "blocks:16", "unstructured:4", "Block:16", "16x16"),
        *("nm", "nm:2", "nm:2:", "nm:2x4", "2:4", "nm:-2:4", "nm:2:4:", "nm:2:4:both"),
    ],
)
def test_a_pattern_that_is_none_is_shown(text):
    with pytest.raises(ValueError, match=r"pattern must be 'unstructured'") as caught:
        parse_pattern(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["block:17", "block:0", "block:512", "block:16x24"])
def test_sides_that_are_no_powers_of_two_are_refused(text):
    with pytest.raises(ValueError, match="power of two"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["nm:4:4", "nm:0:4", "nm:2:33", "nm:1:4:transposable"])
def test_numbers_that_are_no_n_m_are_refused(text):
    with pytest.raises(ValueError, match=r"^pattern nm:.*: NM: (n|m|transposable) must be"):
        parse_pattern(text)
