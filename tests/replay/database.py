"""A PostgreSQL with the data that QGIS's tests look for."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Of QGIS's data, what the tests of its server need, in its order.
TABLES = ("testdata_pg.sql", "testdata_pg_json.sql")

# Seconds for each step.
BOUND = 60

# Children end when we are ended.
WITH_US = ("setpriv", "--pdeathsig", "TERM")


class Database:
    """This process and its children find it by the names that the tests have for it, and
    nobody else does: it listens in a folder of its own."""

    def __init__(self, source):
        self._source = source
        self._process = None

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="replay")
        # It does not run as root.
        self._owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        folder = Path(self._folder.name)
        if self._owner:
            shutil.chown(folder, self._owner["user"], self._owner["group"])
        how = ["-U", "qgis", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"]
        run([program("initdb"), *how, "-D", folder / "data"], cwd="/", **self._owner)
        # Some projects name the port, here a part of a file's name.
        command = [*WITH_US, program("postgres"), "-D", folder / "data", "-k", folder, "-h", "", "-p", "5432", "-F"]
        self._process = subprocess.Popen(
            command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._owner
        )
        services = folder / "services"
        services.write_text(f"[qgis_test]\nhost={folder}\nport=5432\ndbname=qgis_test\nuser=qgis\n")
        os.environ.update(PGSERVICEFILE=str(services), PGHOST=str(folder), PGUSER="qgis", PGSSLMODE="disable")
        self._wait()
        psql("postgres", "-c", "CREATE DATABASE qgis_test")
        for table in TABLES:
            psql("qgis_test", "-f", self._source / "tests/testdata/provider" / table)

    def _wait(self):
        end = time.monotonic() + BOUND
        command = [program("pg_isready"), "-q"]
        while subprocess.run(command, timeout=BOUND).returncode:
            if self._process.poll() is not None or time.monotonic() > end:
                sys.exit("PostgreSQL does not start")
            time.sleep(0.1)

    def __exit__(self, *_):
        if self._process:
            # At once, whoever is connected: nothing of it is kept.
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(BOUND)
        self._folder.cleanup()


def psql(database, *words):
    options = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database]
    run([program("psql"), *options, *words])


def run(command, **more):
    done = subprocess.run(
        command, timeout=BOUND, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **more
    )
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr}")


def program(name):
    """Debian has a folder for each version."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return found[-1] if found else sys.exit("PostgreSQL is not installed: make replay does that")
