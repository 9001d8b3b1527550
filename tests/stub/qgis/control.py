"""Files by which tests and workers tell each other what happened."""

import os
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "control"


def exists(name):
    return (FOLDER / name).exists()


def note(name):
    """One more line in `name`: this process was here."""
    with open(FOLDER / name, "ab", buffering=0) as file:
        file.write(b"%d\n" % os.getpid())


def first(name):
    """True for one process only, whoever asks first."""
    try:
        os.close(os.open(FOLDER / name, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def wait_for(name, seconds=60.0):
    """Until a test creates `name`."""
    end = time.monotonic() + seconds
    while not exists(name):
        if time.monotonic() > end:
            raise RuntimeError(f"no test created {name}")
        # A file appears without a word, so it is looked for.
        time.sleep(0.005)
