"""Test groups: tests/kernels (Triton's interpreter, or a GPU), tests/aot (Triton's compiler), the rest (plain CPU).

The first needs TRITON_INTERPRET=1 before triton is imported and the second must not have it, so each is a process of
its own. Tests marked `full` are whole products of axes; without them (`-m "not full"`) each axis alone and a pairwise
sample remain.
"""

import os
import signal
import uuid

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as in linvideo/commands

import pytest  # noqa: E402
import torch  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
torch.set_num_threads(1)  # tests run side by side under pytest-xdist


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    """The umask is this one during the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What commands keep for later ones is kept apart for every test, and from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))
