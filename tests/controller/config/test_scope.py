import pytest

from triton_sparsity.controller.config.scope import check_scope, check_scopes, matches

NAMES = ["encoder.layers.0.fc1", "encoder.layers.0.fc2", "encoder.layers.10.fc1", "head"]


@pytest.mark.parametrize(
    ("scope", "taken"),
    [
        ("head", ["head"]),
        ("encoder", NAMES[:3]),
        ("encoder.layers.0", NAMES[:2]),
        ("encoder.layers.1", []),
        ("layers", []),
        ("Head", []),
        ("*", NAMES),
        ("*.fc1", [NAMES[0], NAMES[2]]),
        ("encoder.*.fc?", NAMES[:3]),
        ("encoder.layers.?", NAMES[:2]),
        ("encoder.layers.[1-9]*", [NAMES[2]]),
        ("encoder.layers.?.fc1", [NAMES[0]]),
        ("{re}fc1", [NAMES[0], NAMES[2]]),
        ("{re}^encoder$", []),
        ("{re}^encoder", NAMES[:3]),
        (r"{re}layers\.\d+\.fc2", [NAMES[1]]),
        ("head{re}", []),
    ],
)
def test_scope_takes_in(scope, taken):
    assert [name for name in NAMES if matches(scope, name)] == taken


def test_the_model_itself_has_the_empty_path():
    assert matches("*", "")
    assert matches("{re}^$", "")
    assert not matches("head", "")


def test_a_path_is_no_regular_expression():
    assert not matches("head.", "heads")
    assert not matches("h.ad", "head")


def test_a_scope_that_matches_nothing_is_named_with_its_neighbours():
    check_scopes(["encoder", "h*", "{re}fc2$"], NAMES)
    check_scopes([], NAMES)
    with pytest.raises(
        ValueError,
        match=r"^ignored_scopes must match a module each, got 'haed' \(did you mean 'head'\?\)$",
    ):
        check_scopes(["encoder", "haed"], NAMES, "ignored_scopes")
    with pytest.raises(ValueError, match=r"^scopes .* got 'decoder' \(.*'encoder'.*\); '{re}fc3'"):
        check_scopes(["decoder", "{re}fc3"], NAMES)


def test_nncf_node_names_are_told_apart():
    with pytest.raises(ValueError, match=r"'LeNet/Conv2d\[conv1\]' \(scopes are module paths"):
        check_scopes(["LeNet/Conv2d[conv1]"], NAMES)


@pytest.mark.parametrize(
    "call", [check_scope, lambda s: matches(s, "a"), lambda s: check_scopes([s], ["a"])]
)
def test_an_invalid_regular_expression_is_named(call):
    with pytest.raises(ValueError, match=r"'{re}fc\(' is no valid regular expression: .*position"):
        call("{re}fc(")


@pytest.mark.parametrize("bad", ["", "{re}", None, 3])
def test_what_can_be_no_scope_is_refused(bad):
    with pytest.raises(ValueError, match="must be a module path, a glob or"):
        check_scope(bad)
