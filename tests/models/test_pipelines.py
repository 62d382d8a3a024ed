import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file
from tiny import generate, tiny_image_pipeline, tiny_pipeline, tiny_transformer

from linvideo.commands.main import main
from linvideo.models import LinVideoWanTransformer3DModel, convert, finalize, load_pipeline, save_pipeline


@pytest.fixture(scope="module")
def converted():
    return convert(tiny_pipeline(), layers=[0, 2], mode="linear")


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "converted"
    save_pipeline(converted, folder)
    return folder


def test_saved_pipeline_generates_the_same_video(converted, folder):
    expected = generate(converted)
    assert expected.shape == (5, 32, 32, 3) and np.isfinite(expected).all()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["linvideo", "LinVideoWanTransformer3DModel"]
    for load in (load_pipeline, WanPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        pipeline = load(folder)
        assert type(pipeline) is WanPipeline and type(pipeline.transformer) is LinVideoWanTransformer3DModel
        np.testing.assert_allclose(generate(pipeline), expected, atol=1e-6)


def test_conversion_matters_in_the_pipeline(converted):
    stock = tiny_pipeline()
    assert np.abs(generate(stock) - generate(converted)).max() > 1e-4
    np.testing.assert_array_equal(generate(convert(stock, r_init=1.0)), generate(stock))


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_stock_folder_loads_and_kwargs_pass(tmp_path, name):
    tiny_pipeline().save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path, **{name: torch.bfloat16})
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel"
    assert pipeline.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="expected dtype or torch_dtype, .* got both"):
        load_pipeline(tmp_path, dtype=torch.bfloat16, torch_dtype=torch.bfloat16)


def test_two_transformers_round_trip(tmp_path):
    pipeline = convert(tiny_pipeline(transformer_2=tiny_transformer(seed=1), boundary_ratio=0.9))
    finalize(pipeline.transformer, linear_layers=[0])
    finalize(pipeline.transformer_2, linear_layers=[1, 2])
    save_pipeline(pipeline, tmp_path / "wan22")
    loaded = load_pipeline(tmp_path / "wan22")
    assert loaded.transformer.config.attention_types == ["linear", "softmax", "softmax"]
    assert loaded.transformer_2.config.attention_types == ["softmax", "linear", "linear"]
    assert loaded.config.boundary_ratio == 0.9
    np.testing.assert_allclose(generate(loaded), generate(pipeline), atol=1e-6)


def damaged_copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def one_line_error(path, match, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        load_pipeline(path, **kwargs)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_pipeline_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    one_line_error(tmp_path / "empty", "model_index.json")
    one_line_error(tmp_path / "file", "model_index.json")
    one_line_error(folder / "transformer", "model_index.json")
    one_line_error(tmp_path / "absent", "expected a pipeline folder or a repository id")
    one_line_error(3, "expected a path or a repository id")
    one_line_error("absent", "expected a pipeline folder or a repository id")
    one_line_error("nobody/nothing", "cannot load a pipeline from nobody/nothing", local_files_only=True)


def test_damaged_pipelines(tmp_path, folder):
    copy = damaged_copy(folder, tmp_path)
    index = copy / "model_index.json"
    good = index.read_text()
    for text in ("{", "{}", "[]", "3", good.replace("WanPipeline", "Nope"), good.replace("AutoencoderKLWan", "Nope")):
        index.write_text(text)
        one_line_error(copy, "cannot load a pipeline")
    index.write_text(good.replace("linvideo", "diffusers").replace("LinVideoWan", "Wan"))
    one_line_error(copy, "has linear attention layers, but model_index.json names WanTransformer3DModel")
    index.write_text(good)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    one_line_error(copy, "cannot load a pipeline")
    weights.unlink()
    one_line_error(copy, "cannot load a pipeline")


@pytest.mark.parametrize(
    "part", ["vae", "transformer", "tokenizer", "scheduler", "text_encoder", "transformer/config.json"]
)
def test_missing_parts(tmp_path, folder, part):
    copy = damaged_copy(folder, tmp_path)
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    one_line_error(copy, "cannot load a pipeline")


@pytest.mark.parametrize("name", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_pickled_weights_are_not_read(tmp_path, folder, name):
    copy = damaged_copy(folder, tmp_path)
    state = load_file(copy / f"{name}.safetensors")
    (copy / f"{name}.safetensors").unlink()
    torch.save(state, copy / f"{name.replace('text_encoder/model', 'text_encoder/pytorch_model')}.bin")
    one_line_error(copy, "cannot load a pipeline")
    one_line_error(copy, "safetensors only", use_safetensors=False)


def test_code_in_the_folder_is_not_run(tmp_path, folder):
    copy = damaged_copy(folder, tmp_path)
    (copy / "transformer" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace('"linvideo"', '"evil"'))
    one_line_error(copy, "cannot load a pipeline")
    assert not (tmp_path / "ran").exists()


def test_save_refuses_and_changes_nothing(converted, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="overwrite"):
            save_pipeline(converted, tmp_path / "notes", overwrite=overwrite)
        with pytest.raises(ValueError, match="the file"):
            save_pipeline(converted, tmp_path / "file", overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "keep.txt", "notes"]


def test_save_overwrites_only_on_request(converted, tmp_path):
    target = tmp_path / "deep" / "pipeline"
    target.mkdir(parents=True)
    save_pipeline(converted, target)  # an empty folder may be written to
    (target / "stale.txt").write_text("old")
    with pytest.raises(ValueError, match="not empty"):
        save_pipeline(converted, target)
    assert (target / "stale.txt").exists()
    save_pipeline(converted, target, overwrite=True)
    assert not (target / "stale.txt").exists() and os.listdir(target.parent) == ["pipeline"]
    assert load_pipeline(target).transformer.config.attention_types == ["linear", "softmax", "linear"]


def test_overwriting_the_folder_a_pipeline_was_loaded_from(folder, tmp_path):
    copy = damaged_copy(folder, tmp_path)
    pipeline = load_pipeline(copy)
    expected = generate(pipeline)
    save_pipeline(pipeline, copy, overwrite=True)
    np.testing.assert_allclose(generate(load_pipeline(copy)), expected, atol=1e-6)


def test_saved_files_have_the_permissions_that_the_umask_allows(converted, tmp_path, umask):
    save_pipeline(converted, tmp_path / "a")
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o666 & ~umask for path in files}


def test_interrupted_save_leaves_the_old_pipeline(folder, tmp_path, monkeypatch):
    copy = damaged_copy(folder, tmp_path)
    pipeline = load_pipeline(copy)
    before = (copy / "model_index.json").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(pipeline.vae, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pipeline(pipeline, copy, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        save_pipeline(pipeline, tmp_path / "new")
    assert os.listdir(tmp_path) == ["copy"] and (copy / "model_index.json").read_bytes() == before
    load_pipeline(copy)


def test_failed_rename_brings_the_old_pipeline_back(converted, folder, tmp_path, monkeypatch):
    copy = damaged_copy(folder, tmp_path)

    def fail(source, target):
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        save_pipeline(converted, copy, overwrite=True)
    assert os.listdir(tmp_path) == ["copy"]
    load_pipeline(copy)


def test_given_parts_take_the_place_of_the_folders(folder, tmp_path):
    models = {name: tiny_transformer(seed=seed) for seed, name in enumerate(("transformer", "transformer_2"))}
    pipeline = load_pipeline(folder, **models)
    assert all(getattr(pipeline, name) is model for name, model in models.items())
    assert load_pipeline(folder, transformer=None).transformer is None
    one_line_error(folder, "no part transfomer", transfomer=models["transformer"])
    images = tiny_image_pipeline()
    save_pipeline(images, tmp_path / "images")
    parts = {name: getattr(images, name) for name in ("transformer", "image_encoder", "image_processor")}
    loaded = load_pipeline(tmp_path / "images", **parts)
    assert all(getattr(loaded, name) is part for name, part in parts.items())


def with_lora(pipeline, component):
    from peft import LoraConfig

    getattr(pipeline, component).add_adapter(LoraConfig(target_modules=["to_q", "q"], init_lora_weights=False))


def fused(pipeline):
    with_lora(pipeline, "transformer")
    pipeline.fuse_lora()


def on_disk(pipeline, kind):
    from accelerate import cpu_offload, disk_offload

    device, folder = torch.device("cpu"), tempfile.mkdtemp()
    if kind == "group":
        options = {"onload_device": device, "offload_device": device, "offload_type": "leaf_level"}
        pipeline.transformer.enable_group_offload(**options, offload_to_disk_path=folder)
    elif kind == "disk":
        disk_offload(pipeline.transformer, folder, execution_device=device)
    else:
        cpu_offload(pipeline.text_encoder, execution_device=device)


def with_nan(pipeline):
    with torch.no_grad():
        pipeline.transformer.blocks[1].attn1.to_k.weight[3, 4] = float("nan")


def with_compiled_block(pipeline):
    pipeline.transformer.blocks[1] = torch.compile(pipeline.transformer.blocks[1], backend="eager")


def with_foreign_part(pipeline):
    pipeline.vae = torch.nn.Linear(2, 2)


SPOILED = {
    "LoRA": (lambda pipeline: with_lora(pipeline, "transformer"), "transformer has LoRA .* fuse and unload them first"),
    "LoRA of the text": (lambda pipeline: with_lora(pipeline, "text_encoder"), "text_encoder has LoRA .* unload them"),
    "fused LoRA": (fused, "transformer has LoRA .* fuse and unload them first"),
    "group offload to disk": (
        lambda pipeline: on_disk(pipeline, "group"),
        "transformer is under group offload",
    ),
    "disk offload": (lambda pipeline: on_disk(pipeline, "disk"), "transformer has weights that are not in memory"),
    "sequential offload": (
        lambda pipeline: on_disk(pipeline, "cpu"),
        "text_encoder has .* not in memory",
    ),
    "NaN": (with_nan, "transformer has values in blocks.1.attn1.to_k.weight that are not finite"),
    "compiled block": (with_compiled_block, "loading expects blocks.1.*the model has none"),
    "foreign part": (with_foreign_part, "has not saved vae, a Linear"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_model_that_could_not_be_loaded_again_is_refused_and_replaces_nothing(name, folder, tmp_path):
    copy, (spoil, message) = damaged_copy(folder, tmp_path), SPOILED[name]
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    pipeline = load_pipeline(copy)
    spoil(pipeline)
    with pytest.raises(ValueError, match=message) as error:
        save_pipeline(pipeline, copy, overwrite=True)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == ["copy"]


def test_fused_and_unloaded_adapters_and_offloading_in_memory_are_saved(folder, tmp_path):
    pipeline = load_pipeline(folder)
    fused(pipeline)
    pipeline.unload_lora_weights()
    device = torch.device("cpu")
    pipeline.transformer.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    save_pipeline(pipeline, tmp_path / "fused")
    loaded = load_pipeline(tmp_path / "fused").transformer
    weight = loaded.blocks[0].attn1.to_q.weight
    assert torch.equal(weight, pipeline.transformer.blocks[0].attn1.to_q.weight)
    assert not torch.equal(weight, load_pipeline(folder).transformer.blocks[0].attn1.to_q.weight)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_damage_while_saving_is_noticed(part, damage, folder, tmp_path, monkeypatch):
    copy = damaged_copy(folder, tmp_path)
    pipeline = load_pipeline(copy)
    model = getattr(pipeline, part)
    save = model.save_pretrained

    def save_and_damage(path, **kwargs):
        save(path, **kwargs)
        damage(next(Path(path).glob("*.safetensors")))

    monkeypatch.setattr(model, "save_pretrained", save_and_damage)
    with pytest.raises((OSError, ValueError)):
        save_pipeline(pipeline, copy, overwrite=True)
    assert os.listdir(tmp_path) == ["copy"]
    load_pipeline(copy)


def test_content_that_appears_in_the_target_meanwhile_is_kept(converted, tmp_path, monkeypatch):
    target, save = tmp_path / "pipeline", converted.vae.save_pretrained

    def another_writes(*args, **kwargs):
        target.mkdir()
        (target / "theirs").write_text("keep")
        save(*args, **kwargs)

    monkeypatch.setattr(converted.vae, "save_pretrained", another_writes)
    with pytest.raises(ValueError, match="written meanwhile"):
        save_pipeline(converted, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["pipeline", "theirs"]


KILLED = """
import os, signal, sys
from linvideo.commands.main import main
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(["convert", sys.argv[1], "--output_dir", sys.argv[1], "--overwrite"])
"""


def test_a_killed_overwrite_is_cleaned_up_by_the_next_call(tmp_path, capsys):
    target = tmp_path / "pipeline"
    save_pipeline(tiny_pipeline(), target)
    for name in (".pipeline.mybackup", ".tmp-mine-pipeline", ".tmp-0123456789abcdef-pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("keep")
    users = {"pipeline", *os.listdir(tmp_path)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not target.exists()
    convert_again = ["convert", str(target), "--output_dir", str(target)]
    assert main(convert_again) == 2  # the old pipeline is back, and is kept without --overwrite
    assert "exists" in capsys.readouterr().err
    assert type(load_pipeline(target).transformer).__name__ == "WanTransformer3DModel"
    assert main([*convert_again, "--overwrite"]) == 0
    assert type(load_pipeline(target).transformer) is LinVideoWanTransformer3DModel
    assert set(os.listdir(tmp_path)) == users
