"""Records in files by number, so that more of them than memory holds can be put in another order: each bucket is read
back as a whole, one at a time.

Key properties: memory is what waits to be written and one bucket; no file stays open. Read next: `duplicates.py`
(buckets of hashes), `order.py` (buckets of places).
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

RECORDS = 1 << 19  # a bucket should have, about
WAITING = 1 << 17  # records that are written together


class Buckets:
    """Records of one dtype in the buckets 0, 1, ... of a folder, which the caller makes and removes.

    OSErrors of the disk pass through.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, bucket_N: np.ndarray, record_N: np.ndarray) -> None:
        """Append records to their buckets, in the order given. bucket_N: of any integer dtype, [records]."""
        self._waiting.append((bucket_N, record_N))
        if sum(len(record_N) for _, record_N in self._waiting) >= WAITING:
            self._write()

    def _write(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        bucket_N, record_N = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        order_N = np.argsort(bucket_N, kind="stable")
        bucket_N, record_N = bucket_N[order_N], record_N[order_N]
        for low, high in pairwise([0, *(np.flatnonzero(np.diff(bucket_N)) + 1).tolist(), len(bucket_N)]):
            if low < high:
                with open(self._path(int(bucket_N[low])), "ab") as file:
                    file.write(record_N[low:high].data)

    def read(self, bucket: int) -> np.ndarray:
        """The records of a bucket in the order in which they were added; none where none was."""
        self._write()
        path = self._path(bucket)
        return np.fromfile(path, self.dtype) if path.exists() else np.empty(0, self.dtype)

    def _path(self, bucket: int) -> Path:
        return self.folder / str(bucket)
