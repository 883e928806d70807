import json
import random
from dataclasses import asdict

import pytest
import torch

from spoil import spoilt, spoilt_bytes
from triton_sparsity.bench.measure.drift import drift, load_profile
from triton_sparsity.bench.measure.record import Row, dump, environment
from triton_sparsity.bench.measure.tables import show_drift


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


def test_a_spoilt_record_is_refused_by_name_or_compared(tmp_path, capsys):
    times = {"median_s": 2.0, "low_s": 1.0, "high_s": 3.0}
    times |= {"dense_s": 2.0, "dense_low_s": 1.0, "dense_high_s": 3.0}
    row = Row("apply", "1x1x1", "float32", "unstructured", 0.5, "random", "ok", **times)
    record = environment(torch.device("cpu"), "torch") | {"rows": [asdict(row), asdict(row)]}
    path, draw = tmp_path / "profile.json", random.Random(0)
    compared = 0
    for i in range(250):
        if i % 2:
            content = json.dumps(spoilt(draw, record)).encode()
        else:
            _, content = spoilt_bytes(draw, dump(record))
        path.write_bytes(content)
        try:
            earlier = load_profile(path)
        except ValueError as error:
            named = str(error).startswith(str(path))
        else:
            show_drift(drift(record, earlier), earlier)
            named, compared = True, compared + 1
        assert named, content
    assert 25 < compared < 225
