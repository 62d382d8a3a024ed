"""The tables in kernels/README.md match the code."""

import pytest

triton = pytest.importorskip("triton", reason="tests/aot needs triton")

from benchmarks import gate_tables, static_gates  # noqa: E402


@pytest.mark.skipif(triton.__version__ != gate_tables.TRITON, reason="the figures are those of another Triton release")
def test_the_readme_matches_the_code():
    readme = gate_tables.README.read_text()
    new = gate_tables.replaced(readme, gate_tables.text())
    assert readme == new, "run python -m benchmarks.static_gates --readme"


def test_text_outside_the_markers_is_kept():
    old = f"before\n{gate_tables.BEGIN}\nold\n{gate_tables.END}\nafter\n"
    assert gate_tables.replaced(old, "\nnew\n") == old.replace("old", "new")
    with pytest.raises(ValueError, match="expected the lines"):
        gate_tables.replaced("no markers", "new")


def test_command_writes_the_readme_or_says_why_not(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{gate_tables.BEGIN}\nold\n{gate_tables.END}\nb\n")
    monkeypatch.setattr(gate_tables, "README", readme)
    monkeypatch.setattr(gate_tables, "text", lambda: "\nnew\n")
    monkeypatch.setattr(gate_tables, "TRITON", triton.__version__)
    monkeypatch.setattr("sys.argv", ["static_gates", "--readme"])
    static_gates.main()
    assert "\nnew\n" in readme.read_text() and [path.name for path in tmp_path.iterdir()] == ["README.md"]
    monkeypatch.setattr(gate_tables, "TRITON", "0.0")
    with pytest.raises(SystemExit) as end:
        static_gates.main()
    assert end.value.code == 2 and "figures of Triton 0.0" in capsys.readouterr().err
