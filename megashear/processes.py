"""Child processes: what is started for a run ends with it.

Nothing but the standard library is imported here: a child that needs no torch does not load it.
"""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """Have this child process end when its parent has ended, however that came: a killed run leaves none behind.

    For an initializer of a process that `multiprocessing` spawns; raises AssertionError in any other process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
