"""How many threads torch may have: as many as the machine starts."""

from __future__ import annotations

import os
import threading

import torch

MOST = 1024


def set_threads(count: int) -> None:
    """Let torch use ``count`` threads.

    Raises:
        ValueError: the machine does not start so many, of which OpenMP would end the process.
    """
    usual = os.cpu_count() or 1
    if count > usual and (count > MOST or not _starts(count)):
        raise ValueError(
            f"threads must be what this machine starts, got {count}: it has {usual} processors; "
            "leave the option out for torch's own choice"
        )
    torch.set_num_threads(count)


def _starts(count: int) -> bool:
    """Tell whether ``count`` threads can live at a time, by starting them."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    except (RuntimeError, MemoryError):
        return False
    finally:
        end.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return True
