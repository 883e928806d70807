import pytest

from triton_sparsity.bench.measure.drift import drift, load_profile


def test_times_agree_if_their_ranges_meet():
    row = {"operation": "apply", "shape": "1x1x1", "status": "ok"}
    row |= {"dtype": "", "pattern": "", "level": 0.5, "mask": ""}

    def record(median, low, high):
        return {"rows": [row | {"median_s": median, "low_s": low, "high_s": high}]}

    assert drift(record(3, 2, 4), record(5, 4, 6)) == ([], 1, None)
    ((found,), compared, _) = drift(record(3, 2, 4), record(6, 5, 7))
    assert (found.ratio, found.dense, compared) == (0.5, False, 1)
    ((found,), *_) = drift(record(6, 5, 7), record(3, 2, 4))
    assert found.ratio == 2
    other = record(9, 9, 9)
    other["rows"][0]["level"] = 0.9
    assert drift(record(3, 2, 4), other) == ([], 0, None)


def test_a_record_that_tells_no_place_is_no_profile(tmp_path):
    (tmp_path / "other.json").write_text('{"schema": 1, "rows": []}')
    with pytest.raises(ValueError, match="which says where it was measured"):
        load_profile(tmp_path / "other.json")
