"""benchmarks/host.py runs without a GPU, and refuses a revision that doesn't exist."""

import subprocess

import pytest

pytest.importorskip("triton")
from benchmarks import host  # noqa: E402


def test_measures_a_call_and_counts_its_launches():
    found = host.measure({"this": host.ROOT}, (1, 300, 2, 16), rounds=2, calls=5)["this"]
    launches = {case: row["launches"] for case, row in found.items()}
    assert launches == {"forward": 4, "forward, RoPE": 5, "forward + backward": 12, "forward + backward, RoPE": 14}
    assert all(len(row["microseconds"]) == 10 and min(row["microseconds"]) > 0 for row in found.values())
    text = host.table({"before": found, "after": found})
    assert text.count("1.00 of it") == text.count("14 launches") * 2 == 4


@pytest.mark.skipif(not host.commit_of("HEAD"), reason="needs the git repository")
def test_a_revision_is_checked_out_and_removed():
    with host.checked_out("HEAD") as tree:
        assert (tree / "linvideo").is_dir()
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=host.ROOT, capture_output=True, text=True, check=True)
    assert str(tree) not in listed.stdout


def test_an_unknown_revision_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["host", "--against", "no-such-revision"])
    with pytest.raises(SystemExit) as end:
        host.main()
    assert end.value.code == 2 and "got 'no-such-revision'" in capsys.readouterr().err
