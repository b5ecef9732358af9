import numpy as np
import pytest

from megashear.preprocess.document_order import Buckets

RECORD = np.dtype([("value", "<u4"), ("bucket", "<u2")])


@pytest.mark.parametrize("waiting", [1, 50, 10**6])
def test_every_record_is_in_its_bucket_in_the_order_of_adding(tmp_path, monkeypatch, waiting):
    monkeypatch.setattr("megashear.preprocess.document_order.WAITING", waiting)
    random, buckets = np.random.default_rng(0), Buckets(tmp_path, RECORD)
    added = np.empty(1000, RECORD)
    added["value"], added["bucket"] = np.arange(1000), random.integers(0, 7, 1000)
    for record_N in np.split(added, [0, 1, 90, 400]):
        buckets.add(record_N["bucket"], record_N)
    for bucket in range(8):
        assert np.array_equal(buckets.read(bucket), added[added["bucket"] == bucket])
    assert len(buckets.read(8)) == 0
