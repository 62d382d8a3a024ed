import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_tokenizer

from linvideo.trajectories.prompts import PromptConfig, PromptEmbeddings, encode_prompts, read_prompts, some_of, spread

PROMPTS = ["a fox", "two boats race across a lake", "rain"]


def test_the_built_in_captions_are_many_distinct_and_plain():
    captions = read_prompts()
    assert len(captions) >= 300
    assert len({caption.lower() for caption in captions}) == len(captions)
    assert all(caption.isascii() and 20 <= len(caption) <= 200 for caption in captions)


def test_read_prompts_skips_comments_and_empty_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\n  a fox  \ntwo boats\n")
    assert read_prompts(path) == ["a fox", "two boats"]


def test_lines_end_where_editors_end_lines(tmp_path):
    for name, written in (("p.txt", "{}"), ("p.jsonl", '{{"caption": "{}"}}'), ("p.JSONL", '{{"caption": "{}"}}')):
        captions = ["# a fox" if name != "p.txt" else "a fox", "two\u2028boats", "rain\x0b\x85 and sun"]
        for end, mark in (("\n", ""), ("\r\n", "\ufeff"), ("\r", "")):
            lines = (written.format(caption) for caption in captions if name == "p.txt" or "\x0b" not in caption)
            (tmp_path / name).write_bytes((mark + end.join(lines)).encode())
            assert read_prompts(tmp_path / name) == captions[: 3 if name == "p.txt" else 2]
    (tmp_path / "p.txt").write_bytes("\ufeff# a comment\na fox".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a fox"]


@pytest.mark.parametrize("line", ['{"caption": "\\ud800"}', "[" * 100000, '{"caption": ' + "1" * 5000 + "}"])
def test_lines_that_are_no_captions_are_refused(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match="p.jsonl, line 1: expected .*caption"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    (tmp_path / "p.txt").write_bytes("a fox".encode(encoding))
    with pytest.raises(ValueError, match="cannot read the prompts file .*p.txt: expected UTF-8, got UTF-16"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe\x00"])
def test_read_prompts_refuses_files_without_a_caption(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="prompts.txt"):
        read_prompts(path)


def test_some_captions_are_spread_over_a_sorted_list():
    captions = [(colour, shape, way) for colour in range(4) for shape in range(4) for way in range(4)]
    chosen = some_of(captions, 4)
    assert sorted(set(chosen)) == chosen and len(chosen) == 4
    assert [colour for colour, _, _ in chosen] == [0, 1, 2, 3]  # the list is sorted by colour
    assert all(len({caption[word] for caption in chosen}) > 1 for word in (1, 2))  # these repeat in every part
    for length in (1, 5, 7):
        for count in range(1, length + 1):
            indices = spread(length, count)
            assert sorted(set(indices)) == indices and len(indices) == count and indices[-1] < length
    assert spread(2, 5) == [0, 1, 0, 1, 0]
    assert some_of(captions, None) == some_of(captions, 99) == captions


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def test_embeddings_equal_those_of_the_pipeline(pipeline):
    embeddings = encode_prompts(pipeline, PROMPTS, PromptConfig(max_sequence_length=64, encode_batch_size=2))
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=64)
        _, negative = pipeline.encode_prompt(PROMPTS[:1], negative_prompt="", max_sequence_length=64)
    taken = embeddings.take(torch.tensor([2, 0, 1]), torch.tensor([False, False, True]))
    assert taken.shape == (3, 64, 32)
    assert torch.allclose(taken, torch.stack([expected[2], expected[0], negative[0]]), atol=1e-5)
    assert embeddings.table.shape[1] < 64  # padding is not stored


def test_default_length_is_the_tokenizers_limit_up_to_512(pipeline):
    assert encode_prompts(pipeline, PROMPTS).take(torch.tensor([0])).shape[1] == 512
    with pytest.raises(ValueError, match="at most the tokenizer's 512, got 513"):
        encode_prompts(pipeline, PROMPTS, PromptConfig(max_sequence_length=513))


def test_cache_is_used_only_for_the_same_request(pipeline, tmp_path, monkeypatch, capsys):
    cache, config = tmp_path / "embeds.safetensors", PromptConfig(max_sequence_length=32)
    first = encode_prompts(pipeline, PROMPTS, config, cache)
    calls = []
    original = pipeline.encode_prompt
    monkeypatch.setattr(pipeline, "encode_prompt", lambda **kw: (calls.append(kw["prompt"]), original(**kw))[1])
    again = encode_prompts(pipeline, PROMPTS, config, cache)
    assert not calls and torch.equal(first.table, again.table) and again.length == 32
    assert first.digest() == again.digest()

    for prompts, changed in (
        (PROMPTS[:2], config),
        (PROMPTS, PromptConfig(max_sequence_length=40)),
        (PROMPTS, PromptConfig(max_sequence_length=32, negative_prompt="blurry")),
    ):
        calls.clear()
        encode_prompts(pipeline, prompts, changed, cache)
        assert calls
    content = bytearray(cache.read_bytes())
    content[-3] ^= 1  # in a tensor, where no file format would notice
    cache.write_bytes(content)
    assert torch.equal(encode_prompts(pipeline, PROMPTS, config, cache).table, first.table)
    assert re.search(f"{cache} is damaged: .*; it is created again", capsys.readouterr().err)
    cache.write_bytes(b"damaged")
    assert torch.equal(encode_prompts(pipeline, PROMPTS, config, cache).table, first.table)
    assert "table" in load_file(cache)


def test_the_tokenizer_stays_as_it_was(pipeline):
    """Otherwise a run that finds its embeddings in the cache would export a different tokenizer."""
    backend = pipeline.tokenizer.backend_tokenizer
    for change in (lambda: None, lambda: (backend.enable_padding(length=7), backend.enable_truncation(7))):
        change()
        before = backend.to_str()
        encode_prompts(pipeline, PROMPTS)
        assert backend.to_str() == before


def test_embeddings_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[P, L, E\]"):
        PromptEmbeddings(torch.zeros(3, 4, 5), torch.zeros(2, 4, 5))


def test_words_that_the_model_does_not_know_are_named(recwarn):
    from linvideo.demo import teacher
    from linvideo.demo.world import WORLDS
    from linvideo.trajectories.prompts import warn_of_unknown_words

    caption = WORLDS["small"].training_captions()[0]
    tokenizer = teacher.build_tokenizer(WORLDS["small"])
    warn_of_unknown_words(tokenizer, [caption, ""])
    warn_of_unknown_words(tiny_tokenizer(), ["any word \u4e2d"])
    assert not recwarn
    with pytest.warns(UserWarning, match="does not know these words of the captions: 'zebra', 'flies'$"):
        warn_of_unknown_words(tokenizer, [f"{caption} zebra", "zebra flies"])
