"""The `linvideo` command in tests."""

from linvideo.commands.main import main


def refused(capsys, *argv: object) -> str:
    """The one line of a refusal."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as stop:  # argparse's own refusals
        status = stop.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
