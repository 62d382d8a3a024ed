import subprocess
import sys
from types import SimpleNamespace

import pytest

from linvideo import progress


def test_a_log_file_gets_lines(capsys):
    assert list(progress.bar(range(1000), desc="steps")) == list(range(1000))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("steps:   0%") and lines[1].startswith("steps: 100%")


def test_nested_bars_and_descriptions_write_no_control_characters(capsys):
    for part in (outer := progress.bar(range(2), desc="parts", leave=False)):
        outer.set_description(f"part {part}")
        list(progress.bar(range(2), desc="inner"))
    written = capsys.readouterr().err
    assert "part 1" in written and written.count("inner: 100%") == 2
    assert not {"\r", "\x1b"} & set(written)


def test_a_bar_can_be_off(capsys):
    assert list(progress.bar(range(2), show=False)) == [0, 1]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(progress.bar(range(2), desc="steps"))
    assert "\rsteps: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_the_steps_of_a_short_video_are_for_terminals(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    given = {}
    progress.show_steps(SimpleNamespace(set_progress_bar_config=given.update), desc="video 1 of 2")
    list(progress.tqdm(range(2), **given))
    assert ("video 1 of 2: 100%" in capsys.readouterr().err) == terminal


def test_other_packages_bars_are_off_in_a_log_file():
    code = "import linvideo.commands; from tqdm.auto import tqdm; list(tqdm(range(3)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""
