"""A converted folder loads with its linear layers or not at all, whichever library is imported first."""

import os
import subprocess
import sys

import pytest
from tiny import tiny_pipeline

from linvideo.models import convert, save_pipeline

LOAD_EVERY_WAY = """
from diffusers import AutoModel, WanPipeline
root = sys.argv[1]
name = "LinVideoWanTransformer3DModel"
assert type(WanPipeline.from_pretrained(root).transformer).__name__ == name
assert type(AutoModel.from_pretrained(root, subfolder="transformer")).__name__ == name
assert type(linvideo.load_pipeline(root).transformer).__name__ == name
try:
    AutoModel.from_pretrained(root + "/transformer")  # without model_index.json it only looks in diffusers
except ValueError as error:
    assert name in str(error), error
else:
    raise AssertionError("loaded without knowing the library")
"""

LINVIDEO_FIRST = """
import sys
import linvideo
assert not {"torch", "diffusers", "triton"} & set(sys.modules), "import linvideo must not import these"
finders = len(sys.meta_path)
linvideo._diffusers_hook.install()
assert len(sys.meta_path) == finders
"""

DIFFUSERS_FIRST = """
import sys
from diffusers import WanPipeline
import diffusers.pipelines.pipeline_loading_utils
assert "linvideo" not in sys.modules
import linvideo
"""

DIFFUSERS_ROOT_FIRST = """
import sys
import diffusers
assert "diffusers.pipelines.pipeline_loading_utils" not in sys.modules
import linvideo
"""

WITHOUT_LINVIDEO = """
import sys
from diffusers import AutoModel, WanPipeline
root = sys.argv[1]
for load in (
    lambda: WanPipeline.from_pretrained(root),
    lambda: AutoModel.from_pretrained(root, subfolder="transformer"),
    lambda: AutoModel.from_pretrained(root + "/transformer"),
):
    try:
        load()
    except (ValueError, ImportError) as error:
        print(error)
    else:
        raise AssertionError("a converted folder loaded without linvideo")
assert "linvideo" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "converted"
    save_pipeline(convert(tiny_pipeline(), layers=[1], mode="linear"), folder)
    return folder


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(LINVIDEO_FIRST + LOAD_EVERY_WAY, id="linvideo first"),
        pytest.param(DIFFUSERS_FIRST + LOAD_EVERY_WAY, id="diffusers first"),
        pytest.param(DIFFUSERS_ROOT_FIRST + LOAD_EVERY_WAY, id="diffusers root first"),
        pytest.param(WITHOUT_LINVIDEO, id="without linvideo"),
    ],
)
def test_fresh_process(script, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
