"""Groups of tests: tests/kernels (Triton's interpreter, or a GPU), tests/aot (Triton's compiler), others (plain CPU).

The first group needs TRITON_INTERPRET=1 before triton is imported and the second must not have it, so each runs in its
own process. Tests marked `full` cover whole products of axes; without them (`-m "not full"`) each axis alone and a
pairwise sample remain.
"""

import os
import signal
import uuid

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as in linvideo/commands

import pytest  # noqa: E402
import torch  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
torch.set_num_threads(1)  # tests run in parallel under pytest-xdist


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    """Set the umask during the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Give each test its own cache, separate from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))
