"""The `linvideo` command in tests."""

from linvideo.commands.main import main


def refused(capsys, *argv: object) -> str:
    """Run the command, assert that it refuses with one line and status 2, and return that line."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as stop:  # argparse's own refusals
        status = stop.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
