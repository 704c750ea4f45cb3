"""The curves where they cannot be written."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from crt.errors import UserError
from crt.live import Live


def test_a_full_disk_is_met_by_the_run_and_not_by_a_thread(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    met_by_threads = []
    monkeypatch.setattr(threading, "excepthook", met_by_threads.append)
    live = Live(tmp_path / "ar.live", 10, 0)
    live.log(1, {"loss": 1.0})
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        for step in range(2, 100):
            live.log(step, {"loss": 1.0})
            time.sleep(0.01)
    assert not met_by_threads


def test_a_folder_that_tensorboard_cannot_name_is_refused_in_one_line(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "ar.live"
    with pytest.raises(UserError, match=r"ar\.live: TensorBoard writes into no folder whose name is not UTF-8"):
        Live(folder, 10, 0)
