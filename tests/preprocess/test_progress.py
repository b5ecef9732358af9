import io

from megashear.preprocess import workers as progress
from megashear.preprocess.workers import Progress


def test_lines_carry_share_rate_and_time_left(monkeypatch):
    clock = iter([0.0, 5.0, 20.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    bar = Progress("merge", 1000, output=output)
    bar.update(100, 50)
    bar.update(250, 4000)
    bar.finish(8000)
    assert output.getvalue().splitlines() == [
        "merge:  25.0%  4,000 tokens  200 tokens/s  left 0:01:00",
        "merge: 100.0%  8,000 tokens  200 tokens/s  left 0:00:00",
    ]


def test_shards_and_bytes_are_counted(monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    bar = Progress("tokenise", 40_000_000, 8, output)
    bar.update(20_000_000, 5_000_000, 3)
    bar.finish(10_000_000)
    assert output.getvalue().splitlines() == [
        "tokenise:  50.0%  3 of 8 shards  2.0 MB/s  5,000,000 tokens  500,000 tokens/s  left 0:00:10",
        "tokenise: 100.0%  8 of 8 shards  2.0 MB/s  10,000,000 tokens  500,000 tokens/s  left 0:00:00",
    ]
