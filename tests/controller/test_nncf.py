import re

import pytest

from triton_sparsity.controller.nncf import from_nncf


@pytest.mark.parametrize("algorithm", ["movement_sparsity", "const_sparsity", "set", "rigl"])
def test_an_initial_level_that_nothing_would_read_is_refused(algorithm):
    with pytest.raises(ValueError, match=r"sparsity_init must be left out; .*, got 0\.3"):
        from_nncf({"algorithm": algorithm, "sparsity_init": 0.3})


@pytest.mark.parametrize("algorithm", ["magnitude_sparsity", "const_sparsity"])
def test_structures_are_movements_alone(algorithm):
    with pytest.raises(ValueError, match="unknown key 'sparse_structure_by_scopes'"):
        from_nncf({"algorithm": algorithm, "sparse_structure_by_scopes": []})


def test_params_that_are_no_dictionary_are_named_as_such():
    with pytest.raises(ValueError, match="params must be a dictionary, got 3"):
        from_nncf({"algorithm": "movement_sparsity", "params": 3})


@pytest.mark.parametrize("part", ["params", "initializer", None])
@pytest.mark.parametrize("key", [3, None, b"schedule", ("schedule",)])
def test_a_key_that_is_no_string_is_named(part, key):
    compression = {"algorithm": "magnitude_sparsity"}
    compression |= {key: {}} if part is None else {part: {key: {}}}
    with pytest.raises(ValueError, match=rf"unknown key {re.escape(repr(key))}"):
        from_nncf(compression)
