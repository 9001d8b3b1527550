#!/usr/bin/python3
"""QGIS's own tests of its server, over HTTP.

    tests/replay/replay.py [--source FOLDER] [--server PROGRAM] [--tries N] [--within SECONDS]
                           [--jobs N] [MODULE...]

Runs each test program twice, with QgsServer in its own process and with each request
sent to a `qgisserver` (see `shim.py`). What passes in the process and fails over HTTP
has to stand in `differences.txt`, and nothing else may stand there. FOLDER is QGIS's
source; without it, apt fetches that of the installed package, 110 MB, and keeps it in
`target/replay`. Where apt cannot, the exit status is 75; all else that goes wrong is 1.
MODULEs are some of the tests, such as `wfs` and `wms_getmap`; without any it is all that
do not stand in `left_out.txt`.
"""

import argparse
import concurrent.futures
import contextlib
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from database import WITH_US, Database

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "target" / "replay"
PYTHON = "/usr/bin/python3"

# These have an access control of their own, which a server has to have, too.
RESTRICTED = "accesscontrol"

# These look for tables in a database.
WITH_DATABASE = "postgres"

# QGIS itself places some labels now here, now there.
TRIES = 3

# The exit status for want of them.
NO_SOURCE = 75

# Longer than the longest of them takes.
BOUND = 600

# For the lists and the archive together, and then for the archive.
FETCH_SECONDS = 240
UNPACK_SECONDS = 60

# A server without projects is ready sooner, and gone.
SERVER_SECONDS = 30

KEEP = ("*/tests/src/python/*", "*/tests/testdata/*")

SETTINGS = {
    "server.interfaces": "127.0.0.1",
    "server.workers": "1",
    "server.timeout": "60",
    # The tests say under which address they ask.
    "server.http_proxy": "yes",
    # The first of two, even.
    "server.http_proxies": "2",
    # They make projects wherever they like, and some layers are missing.
    "projects.cache.rootdir": "/",
    "projects.cache.strict_check": "no",
    # They look for the words of QGIS where nothing can be served.
    "server.qgis_refusals": "yes",
    "projects.cache.force_readonly_layers": "no",
    "server.pluginpath": str(HERE / "plugin"),
}

# What a module has for all of its tests.
OF_MODULES = {
    # One of them is about missing layers.
    "wms_getmap": {"projects.cache.bad_layers_of": "*/test_project_wms_invalid_layers.qgs=strict"},
}

# Access control in view changes what may be kept, so the others do without.
WITH_ACCESS_CONTROL = {"server.pluginpath": f"{HERE / 'plugin'}:{HERE / 'access'}"}

# What a module sets for all of its tests, before QGIS reads it.
ENVIRONMENTS = {
    "wms_getmap_size_server": {"QGIS_SERVER_WMS_MAX_WIDTH": "3000", "QGIS_SERVER_WMS_MAX_HEIGHT": "3000"},
}


class NoSource(Exception):
    """apt does not have it, or cannot be asked."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="QGIS's source, unpacked")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where a fetched one is kept")
    parser.add_argument("--server", type=Path, default=ROOT / "target/debug/qgisserver")
    parser.add_argument("--tries", type=int, default=TRIES, help="for a test that fails over HTTP")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds, for everything")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="so many modules at once")
    parser.add_argument("modules", nargs="*", help="such as wfs; all without any")
    asked = parser.parse_args()
    # The server may take its time to end.
    end = time.monotonic() + asked.within - SERVER_SECONDS
    try:
        source = asked.source or fetched(asked.cache.resolve(), end)
    except NoSource as error:
        print(f"QGIS's source cannot be fetched: {error}", file=sys.stderr)
        sys.exit(NO_SOURCE)
    tests = source / "tests/src/python"
    programs = sorted(tests.glob("test_qgsserver*.py"))
    chosen = [it for it in programs if is_chosen(it.stem, asked.modules)]
    if not chosen:
        sys.exit(f"no tests in {tests}")
    # The names of filters are theirs.
    os.environ["QGIS_REPLAY_TESTS"] = str(tests)
    with tempfile.TemporaryDirectory(prefix="replay") as tmp, contextlib.ExitStack() as running:
        if any(WITH_DATABASE in it.stem for it in chosen):
            running.enter_context(Database(source))
        sys.exit(judge(side_by_side(chosen, asked, Path(tmp), end)))


def name_of(stem):
    return stem.removeprefix("test_qgsserver").lstrip("_") or "server"


def is_chosen(stem, modules):
    name = name_of(stem)
    if modules:
        return name in modules
    return name not in listed("left_out.txt")


def fetched(cache, end):
    """The source of the installed QGIS."""
    version = installed()
    # Some tests put the path into an URL as it is, where a + would be a space.
    source = cache / re.sub(r"[^\w.-]", "-", f"qgis-{version}")
    if not source.exists():
        unpack(download(cache, version, end), source)
    return source


def installed():
    command = ["dpkg-query", "-W", "-f=${source:Version}", "python3-qgis"]
    try:
        return subprocess.run(command, check=True, timeout=30, capture_output=True, text=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoSource(f"which QGIS is installed? {error}") from None


def download(cache, version, end):
    """The archive of that version, without a change to apt's own lists."""
    end = min(end, time.monotonic() + FETCH_SECONDS)
    options = settings_of_apt(cache)

    def apt(*words):
        left = max(end - time.monotonic(), 0.1)
        command = [words[0], *options, *words[1:]]
        try:
            done = subprocess.run(command, cwd=cache, check=True, timeout=left, stdout=subprocess.PIPE, text=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise NoSource(f"{' '.join(words)}: {error_of(error)}") from None
        return done.stdout

    apt("apt-get", "-qq", "update")
    if f"\nVersion: {version}\n" not in apt("apt-cache", "showsrc", "qgis"):
        raise NoSource(f"apt does not have that of QGIS {version}")
    apt("apt-get", "-qq", "source", "--download-only", "--tar-only", f"qgis={version}")
    upstream = version.partition(":")[2] or version
    found = sorted(cache.glob(f"qgis_{upstream.rpartition('-')[0]}.orig.tar.*"))
    found = [path for path in found if path.suffix != ".asc"]
    if len(found) != 1:
        sys.exit(f"not one archive of QGIS {version} in {cache}: {[path.name for path in found]}")
    return found[0]


def settings_of_apt(cache):
    (cache / "lists/partial").mkdir(parents=True, exist_ok=True)
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    line = f"deb-src [signed-by={key}] http://deb.debian.org/debian {os_release()} main\n"
    (cache / "sources.list").write_text(line)
    own = {
        "Dir::Etc::sourcelist": cache / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": cache / "lists",
        "Dir::Cache::srcpkgcache": cache / "sources.bin",
        "Dir::Cache::pkgcache": cache / "packages.bin",
        "Acquire::http::Timeout": 20,
        "Acquire::https::Timeout": 20,
        "Acquire::Retries": 1,
        # Otherwise apt goes on with old lists, or none.
        "APT::Update::Error-Mode": "any",
    }
    return [word for name, value in own.items() for word in ("-o", f"{name}={value}")]


def error_of(error):
    if isinstance(error, subprocess.TimeoutExpired):
        return "it did not end in time"
    if isinstance(error, subprocess.CalledProcessError):
        return f"status {error.returncode}"
    return error


def unpack(archive, source):
    """Under its name only when it is whole. A damaged archive is fetched again next time."""
    for left in source.parent.glob("unpacking*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="unpacking", dir=source.parent) as tmp:
        command = ["tar", "-xf", archive, "-C", tmp, "--wildcards", *KEEP]
        try:
            subprocess.run(command, check=True, timeout=UNPACK_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            archive.unlink(missing_ok=True)
            sys.exit(f"{archive} cannot be unpacked: {error}")
        (folder,) = Path(tmp).iterdir()
        folder.rename(source)


def os_release():
    lines = Path("/etc/os-release").read_text().splitlines()
    pairs = dict(line.partition("=")[::2] for line in lines)
    if "VERSION_CODENAME" not in pairs:
        raise NoSource("/etc/os-release has no VERSION_CODENAME")
    return pairs["VERSION_CODENAME"].strip('"')


def side_by_side(programs, asked, tmp, end):
    """What came of all, run in as many lanes as there are processors. Each has a server of
    its own: a test finds what it has written before."""
    waiting = queue.SimpleQueue()
    # The long ones first, so that the lanes end together.
    for program in sorted(programs, key=lambda it: -it.stat().st_size):
        waiting.put(program)

    def lane(number):
        own = tmp / f"lane-{number}"
        own.mkdir()
        outcomes = []
        with contextlib.ExitStack() as running, contextlib.suppress(queue.Empty):
            servers = Servers(asked.server, own, running)
            while True:
                program = waiting.get_nowait()
                outcomes.append(replay(program, servers.url_for(program.stem), own, asked.tries, end))
        return outcomes

    n = min(asked.jobs, len(programs))
    with concurrent.futures.ThreadPoolExecutor(n) as lanes:
        return [outcome for outcomes in lanes.map(lane, range(n)) for outcome in outcomes]


class Servers:
    """One for each set of plugins and variables, started when the first test needs it."""

    def __init__(self, program, tmp, running):
        self._program, self._tmp, self._running = program, tmp, running
        self._urls = {}

    def url_for(self, stem):
        settings = WITH_ACCESS_CONTROL if RESTRICTED in stem else OF_MODULES.get(name_of(stem), {})
        variables = ENVIRONMENTS.get(name_of(stem), {})
        kind = str((settings, variables))
        if kind not in self._urls:
            server = Server(self._program, self._tmp, settings, variables)
            self._urls[kind] = self._running.enter_context(server)
        return self._urls[kind]


class Server:
    """A `qgisserver` on a free port, stopped in the end."""

    def __init__(self, program, tmp, more, variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        settings = {**SETTINGS, **more, "server.port": str(port)}
        flags = [word for pair in settings.items() for word in ("--set", "=".join(pair))]
        self._log = open(Path(tmp) / f"server-{port}.log", "w+")
        environment = {**os.environ, "TMPDIR": str(tmp), "LANG": "C.UTF-8", **variables}
        self._process = subprocess.Popen(
            [*WITH_US, program, *flags], stdout=self._log, stderr=self._log, env=environment
        )

    def __enter__(self):
        end = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                urllib.request.urlopen(self._url + "/ready", timeout=2).close()
                return self._url
            except OSError:
                # It tells nobody when it listens.
                time.sleep(0.1)
        self.__exit__()
        self._log.seek(0)
        sys.exit(f"the server is not ready:\n{self._log.read()}")

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(SERVER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            print(f"the server did not end within {SERVER_SECONDS} s")


def replay(program, url, tmp, tries, end):
    """The module, and what each of its tests came to, in the process and over HTTP."""
    module = name_of(program.stem)
    inside = run(program, "-", tmp / module, end)
    if not inside:
        log = Path(f"{tmp / module}.log").read_text(errors="replace")
        sys.exit(f"{module}: no test of it came to an end in the process:\n{log[-2000:]}")
    passed = [name for name, said in inside.items() if said == "ok"]
    failed = dict.fromkeys(passed, "it did not end")
    known = listed("differences.txt")
    for _ in range(tries):
        for name, said in run(program, url, tmp / module, end).items():
            if said == "ok":
                failed.pop(name, None)
            elif name in failed:
                failed[name] = said
        if all(f"{module}.{name}" in known for name in failed):
            break
    print(f"{module}: {len(passed)} of {len(inside)} pass, {len(passed) - len(failed)} over HTTP", flush=True)
    return module, passed, failed


def run(program, server, results, end):
    own = {"LANG": "C.UTF-8", "QT_QPA_PLATFORM": "offscreen", "TMPDIR": str(results.parent)}
    environment = {**os.environ, **own}
    command = [*WITH_US, PYTHON, HERE / "shim.py", server, program, results, f"{results}.images"]
    bound = min(BOUND, max(end - time.monotonic(), 0.1))
    with open(f"{results}.log", "w") as log:
        try:
            subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=bound)
        except subprocess.TimeoutExpired:
            if bound < BOUND:
                sys.exit(f"{program.stem}: there is no more time (--within)")
            print(f"{program.stem}: not within {BOUND} s")
    try:
        lines = Path(results).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    finally:
        Path(results).unlink(missing_ok=True)
    said = dict(line.partition(" ")[::2] for line in lines)
    said.pop("end", None)
    return said


def judge(outcomes):
    """0 if what fails over HTTP alone is what is known to."""
    known = listed("differences.txt")
    n_wrong = 0
    for module, passed, failed in outcomes:
        for name, why in failed.items():
            if f"{module}.{name}" not in known:
                n_wrong += 1
                print(f"fails over HTTP alone: {module}.{name}: {why[-600:]}")
        for name in passed:
            if name not in failed and f"{module}.{name}" in known:
                n_wrong += 1
                print(f"passes over HTTP and stands in differences.txt: {module}.{name}")
    n_passed = sum(len(passed) for _, passed, _ in outcomes)
    n_failed = sum(len(failed) for _, _, failed in outcomes)
    print(f"{n_passed} tests of QGIS pass in the process, {n_passed - n_failed} of them over HTTP")
    return 1 if n_wrong or not n_passed else 0


def listed(file):
    """One name in a line; `#` begins a comment."""
    lines = (HERE / file).read_text().splitlines()
    lines = (line.partition("#")[0].strip() for line in lines)
    return {line for line in lines if line}


if __name__ == "__main__":
    main()
