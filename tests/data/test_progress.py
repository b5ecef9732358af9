import io

from megashear.data import progress
from megashear.data.progress import Progress


def test_lines_carry_share_rate_and_time_left(monkeypatch):
    clock = iter([0.0, 5.0, 20.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    bar = Progress("tokenise", 1000, output)
    bar.update(100, 50)
    bar.update(250, 4000)
    bar.finish(8000)
    assert output.getvalue().splitlines() == [
        "tokenise:  25.0%  4,000 tokens  200 tokens/s  left 0:01:00",
        "tokenise: 100.0%  8,000 tokens  200 tokens/s  left 0:00:00",
    ]
