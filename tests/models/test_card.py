"""The model card says only what is known, however a model is saved or pushed. Folders stand for the Hub."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import WanPipeline
from diffusers.models import modeling_utils
from diffusers.pipelines import pipeline_utils
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny import generate, tiny_image_pipeline, tiny_pipeline, tiny_transformer

import linvideo
from linvideo.models import FewStepScheduler, Training, convert, hub, load_pipeline, mixin, save_pipeline
from linvideo.models.card import MARK, card

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
UNTRAINED = Training("conversion (linear)")
ROW = {"step": 12, "stage": "finetune", "stage_step": 10, "psnr": 24.123456, "ssim": 0.91, "flicker": 0.047}
TRANSFER = Training(
    "selective transfer", {"warm-up": 2, "selection": 0, "fine-tuning": 10}, {"seed": 0, "expert": None}
)


def converted(**arguments):
    return convert(tiny_pipeline(**arguments), layers=[0, 2], mode="linear")


def read(folder) -> ModelCard:
    return ModelCard((Path(folder) / "README.md").read_text())


def test_the_card_of_a_conversion_says_that_it_is_untrained_and_has_no_figures(tmp_path):
    save_pipeline(converted(), tmp_path / "a", training=UNTRAINED)
    data, text = read(tmp_path / "a").data, read(tmp_path / "a").text
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-video") and "linvideo" in data.tags
    assert data.base_model is None and data.license is None
    assert "**untrained**" in text and "linear  (2): 0, 2" in text and "feature map: hedgehog" in text
    assert "arxiv.org/abs/2510.08318" in text and "import linvideo" in text
    assert "## Metrics" not in text and "PSNR" not in text and str(tmp_path) not in text


def test_the_card_says_what_is_not_known(tmp_path):
    save_pipeline(converted(), tmp_path / "a")
    assert "not recorded" in read(tmp_path / "a").text
    save_pipeline(tiny_pipeline(), tmp_path / "stock")
    assert not (tmp_path / "stock" / "README.md").exists()


def test_kinds_of_pipelines(tmp_path):
    two = card(converted(transformer_2=tiny_transformer(seed=1), boundary_ratio=0.9))
    assert "transformer: LinVideoWan" in two and "transformer_2: LinVideoWan" in two
    images = ModelCard(card(convert(tiny_image_pipeline(), layers=[0])))
    assert (
        images.data.pipeline_tag == "image-to-video"
        and "mixed   (1): 0" in images.text
        and "r: 0: 0.800" in images.text
    )
    windows = card(convert(tiny_pipeline(), mode="window", window={"chunk": 2}))
    assert (
        "window  (3): 0-2; chunks of 2 latent frames, overlap 1" in windows and "In window layers, a token" in windows
    )
    assert "window" not in two
    few = tiny_pipeline()
    few.scheduler = FewStepScheduler([1000.0, 500.0])
    save_pipeline(few, tmp_path / "few")
    assert "num_inference_steps=2, guidance_scale=1.0" in read(tmp_path / "few").text


@pytest.mark.parametrize("path, expected", [("{}/snapshots/1f/transformer", WAN), ("{}", None), ("a/b", None)])
def test_the_base_model_is_what_was_downloaded(path, expected):
    pipeline = converted()
    path = path.format(f"/cache/models--{WAN.replace('/', '--')}")
    pipeline.transformer.register_to_config(_name_or_path=path)
    text = card(pipeline)
    assert ModelCard(text).data.base_model == expected and path not in text
    assert (f"huggingface.co/{WAN}" in text) == (expected is not None)


def test_history_and_base_model_are_carried_on(tmp_path):
    first = converted()
    first.transformer.register_to_config(_name_or_path=f"/models--{WAN.replace('/', '--')}/snapshots/1/transformer")
    validated = Training(TRANSFER.method, TRANSFER.steps, TRANSFER.settings, validation=ROW)
    save_pipeline(first, tmp_path / "run", training=validated)
    text = read(tmp_path / "run").text
    assert "- selective transfer: optimizer steps: warm-up 2, fine-tuning 10; seed 0\n" in text and "expert" not in text
    assert "| PSNR, dB | 24.12 |" in text and "after step 10 of finetune" in text

    again = load_pipeline(tmp_path / "run")
    save_pipeline(again, tmp_path / "copy")
    copied = read(tmp_path / "copy")
    assert copied.data.base_model == WAN and copied.text.count("- selective transfer") == 1
    assert "## Metrics" not in copied.text and "not recorded" not in copied.text  # the weights may have changed since
    save_pipeline(convert(again, layers=[1], mode="linear"), tmp_path / "more", training=UNTRAINED)
    lines = read(tmp_path / "more").text.split("## Training")[1].splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("- ")] == [
        "- selective transfer",
        "- conversion (linear)",
    ]
    distilled = Training("distillation", {"DMD": 5}, earlier=tmp_path / "run")
    assert card(tiny_pipeline(), distilled).count("\n- ") == 4  # two tags and two of training


def test_lines_from_others_are_plain_text(tmp_path):
    save_pipeline(converted(), tmp_path / "a", training=Training("a <b>method</b>", settings={"seed": "![](http://x)"}))
    hostile = [
        "<script>alert(1)</script>",
        r"![pixel](http://evil/1.png) \[link](javascript:alert(1)) \\[link](x)",
        "# heading `code` ~~~ | a",
        "\x1b[31mred\u202e",
    ]
    path = tmp_path / "a" / "README.md"
    path.write_text(
        path.read_text().replace("## Training\n", "## Training\n" + "".join(f"- {x}\n" for x in hostile), 1)
    )
    save_pipeline(load_pipeline(tmp_path / "a"), tmp_path / "b", training=UNTRAINED)
    save_pipeline(load_pipeline(tmp_path / "b"), tmp_path / "c")
    first, second = (read(tmp_path / name).text.split("## Training")[1].split("## Use")[0] for name in "bc")
    assert first == second  # not escaped twice
    assert not re.search(r"(?<!\\)(\\\\)*[<>\[\]`#|~]|[\x1b\u202e]", first) and "**untrained**" in first
    assert r"\<script\>alert(1)\</script\>" in first and r"a \<b\>method\</b\>" in first


def test_overwriting_keeps_the_users_own_card(tmp_path):
    target = tmp_path / "a"
    save_pipeline(converted(), target, training=UNTRAINED)
    save_pipeline(load_pipeline(target), target, overwrite=True, training=TRANSFER)
    assert read(target).text.count("\n- ") == 2
    own = (target / "README.md").read_text().replace(MARK, "mine")
    (target / "README.md").write_text(own)
    save_pipeline(load_pipeline(target), target, overwrite=True, training=TRANSFER)
    assert (target / "README.md").read_text() == own
    shutil.rmtree(target)
    target.mkdir()
    (target / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="refusing"):
        save_pipeline(converted(), target, overwrite=True)


def test_damaged_cards_do_no_harm(tmp_path):
    save_pipeline(converted(), tmp_path / "a", training=UNTRAINED)
    for damage in (f"---\n: [\n---\n{MARK}", f"{MARK}\n## Training", f"---\nbase_model: 3\ntags: 4\n---\n{MARK}", ""):
        (tmp_path / "a" / "README.md").write_text(damage)
        assert "## Layers" in card(load_pipeline(tmp_path / "a"))
    (tmp_path / "a" / "README.md").write_bytes(b"\xff\xfe")
    assert "## Layers" in card(load_pipeline(tmp_path / "a"))


def test_saved_again_through_diffusers(tmp_path):
    save_pipeline(converted(), tmp_path / "a", training=UNTRAINED)
    before = (tmp_path / "a" / "README.md").read_text()
    pipeline = WanPipeline.from_pretrained(tmp_path / "a")
    expected = generate(pipeline)
    pipeline.save_pretrained(tmp_path / "a")
    pipeline.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "README.md").read_text() == before and not (tmp_path / "b" / "README.md").exists()
    for name in ("a", "b"):
        np.testing.assert_allclose(generate(load_pipeline(tmp_path / name)), expected, atol=1e-6)


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """Replace the Hub by a folder for each repository."""
    root = tmp_path / "hub"

    def create_repo(repo_id, **_):
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(*, repo_id, folder_path, path_in_repo=None, **_):
        shutil.copytree(folder_path, root / repo_id / (path_in_repo or ""), dirs_exist_ok=True)

    def file_exists(repo_id, name, **_):
        return (root / repo_id / name).exists()

    def load(repo_id, **_):
        if not file_exists(repo_id, "README.md"):
            raise EntryNotFoundError("no card")
        return read(root / repo_id)

    for module in (hub_utils, modeling_utils, pipeline_utils, hub, mixin):
        for fake in (create_repo, upload_folder, file_exists):
            monkeypatch.setattr(module, fake.__name__, fake, raising=False)
    monkeypatch.setattr(ModelCard, "load", staticmethod(load))
    return root


def test_a_transformer_pushes_with_its_card(repositories, tmp_path):
    transformer = convert(tiny_transformer(), layers=[1], mode="linear")
    transformer.push_to_hub("me/one")
    transformer.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/two")
    for name in ("me/one", "me/two"):
        files = sorted(path.name for path in (repositories / name).iterdir())
        assert files == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
        text = read(repositories / name).text
        assert "linear  (1): 1" in text and 'LinVideoWanTransformer3DModel.from_pretrained("' in text
        assert "automatically generated" not in text
        loaded = linvideo.LinVideoWanTransformer3DModel.from_pretrained(repositories / name)
        assert loaded.config.attention_types == ["softmax", "linear", "softmax"]


def test_a_pipeline_pushes_with_its_card(repositories):
    hub.push_to_hub(converted(), "me/pipeline")
    assert "linear  (2): 0, 2" in read(repositories / "me/pipeline").text
    assert type(load_pipeline(repositories / "me/pipeline").transformer) is linvideo.LinVideoWanTransformer3DModel
    converted().push_to_hub("me/pipeline")  # diffusers' own method keeps an existing card
    assert "linear  (2): 0, 2" in read(repositories / "me/pipeline").text
    converted().push_to_hub("me/other")  # and works with a new repository, too
    assert load_pipeline(repositories / "me/other").transformer.config.attention_types[0] == "linear"


@pytest.mark.parametrize("push", [hub.push_to_hub, lambda pipeline, name: pipeline.transformer.push_to_hub(name)])
def test_a_card_on_the_hub_is_kept(repositories, push):
    (repositories / "me/mine").mkdir(parents=True)
    (repositories / "me/mine" / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    push(converted(), "me/mine")
    assert read(repositories / "me/mine").data.license == "mit" and "mine" in read(repositories / "me/mine").text


FROM_THE_HUB = """
import sys
import {first}
from diffusers import AutoModel, WanPipeline
from diffusers.pipelines import pipeline_utils
from types import SimpleNamespace
import {second}
pipeline = WanPipeline.from_pretrained("me/tiny")
assert type(pipeline.transformer).__name__ == "LinVideoWanTransformer3DModel"
# as with a network: given the list of files, diffusers looks for the code of unknown libraries
files = [SimpleNamespace(rfilename=name) for name in sys.argv[1:]]
pipeline_utils.model_info = lambda *args, **kwargs: SimpleNamespace(siblings=files)
assert type(WanPipeline.from_pretrained("me/tiny").transformer) is type(pipeline.transformer)
assert type(linvideo.load_pipeline("me/tiny").transformer) is type(pipeline.transformer)
assert type(AutoModel.from_pretrained("me/tiny", subfolder="transformer")) is type(pipeline.transformer)
from linvideo.models.card import card
assert "base_model: me/tiny" in card(pipeline)
"""


@pytest.mark.parametrize("first, second", [("linvideo", "diffusers"), ("diffusers", "linvideo")])
def test_loading_from_the_hub(tmp_path, first, second):
    """Load from the Hub's cache, in the state in which a download leaves it."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("0" * 40)
    save_pipeline(converted(), snapshot)
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("0" * 40)
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FROM_THE_HUB.format(first=first, second=second), *files]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
