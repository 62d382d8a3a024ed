import time

import pytest

from linvideo.evaluation.latency import attention_latency, time_call


def test_time_call_measures_milliseconds():
    timing = time_call(lambda: time.sleep(0.02), "cpu", seconds=0.1)
    assert 20 <= timing.p20 <= timing.median <= timing.p80


def test_attention_latency_rows():
    rows = attention_latency("cpu", [32, 64], heads=2, head_dim=16)
    assert [row["tokens"] for row in rows] == [32, 64]
    assert all(0 < value for row in rows for key in ("softmax", "linear") for value in row[key])


def test_unknown_device_is_refused():
    with pytest.raises(RuntimeError):
        attention_latency("nowhere", [32])
