import time

import pytest

from linvideo.evaluation.latency import attention_latency, time_call, time_call_and_host


def test_time_call_measures_milliseconds():
    timing = time_call(lambda: time.sleep(0.02), "cpu", seconds=0.1)
    assert 20 <= timing.p20 <= timing.median <= timing.p80


def test_one_warm_up_is_not_counted_and_what_comes_before_neither():
    calls, before = [], []

    def call(number: int):
        calls.append(number)
        time.sleep(0.3 if number == 1 else 0.01)

    def prepare() -> int:
        time.sleep(0.05)
        before.append(len(before) + 1)
        return before[-1]

    timing, host = time_call_and_host(call, "cpu", seconds=0.06, before=prepare)
    assert calls == before and len(calls) >= 4
    assert 10 <= timing.p20 < 50 and timing.p80 < 300 and host == timing.median


def test_attention_latency_rows():
    rows = attention_latency("cpu", [32, 64], heads=2, head_dim=16)
    assert [row["tokens"] for row in rows] == [32, 64]
    assert all(0 < value for row in rows for key in ("softmax", "linear") for value in row[key])


def test_unknown_device_is_refused():
    with pytest.raises(RuntimeError):
        attention_latency("nowhere", [32])
