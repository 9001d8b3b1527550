#!/usr/bin/python3
"""QGIS's own tests of its server, over HTTP.

    tests/replay/replay.py [--source FOLDER] [--server PROGRAM] [MODULE...]

Runs each test program twice, with QgsServer in its own process and with each request
sent to a `qgisserver` (see `shim.py`). What passes in the process and fails over HTTP
has to stand in `differences.txt`, and nothing else may stand there. FOLDER is QGIS's
source; without it, apt fetches that of the installed package, 110 MB, and keeps it in
`target/replay`. MODULEs are some of the tests, such as `wfs` and `wms_getmap`.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "target" / "replay"
PYTHON = "/usr/bin/python3"

# Register plugins in the process of the tests: tests/http_caching.rs, apis.rs and others
# do so in workers.
WITH_PLUGINS = ("accesscontrol", "cachemanager", "plugins")

# Test Python bindings and send no request.
WITHOUT_REQUESTS = (
    "apicontext",
    "logger",
    "modules",
    "projectutils",
    "request",
    "response",
    "services",
    "settings",
)

# Need a PostgreSQL with QGIS's data.
WITH_DATABASE = ("postgres",)

LEFT_OUT = WITH_PLUGINS + WITHOUT_REQUESTS + WITH_DATABASE

# QGIS itself places some labels now here, now there.
TRIES = 3

# The exit status for want of them.
NO_SOURCE = 75

# Longer than the longest of them takes.
BOUND = 600

KEEP = ("*/tests/src/python/*", "*/tests/testdata/*")

SETTINGS = {
    "server.interfaces": "127.0.0.1",
    "server.workers": "1",
    "server.timeout": "60",
    # The tests say under which address they ask.
    "server.http_proxy": "yes",
    # They make projects wherever they like, and some layers are missing.
    "projects.cache.rootdir": "/",
    "projects.cache.strict_check": "no",
    "projects.cache.force_readonly_layers": "no",
    "server.pluginpath": str(HERE / "plugin"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="QGIS's source, unpacked")
    parser.add_argument("--server", type=Path, default=ROOT / "target/debug/qgisserver")
    parser.add_argument("modules", nargs="*", help="such as wfs; all without any")
    asked = parser.parse_args()
    try:
        source = asked.source or fetched()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"QGIS's source cannot be fetched: {error}", file=sys.stderr)
        sys.exit(NO_SOURCE)
    tests = source / "tests/src/python"
    programs = sorted(tests.glob("test_qgsserver*.py"))
    chosen = [it for it in programs if is_chosen(it.stem, asked.modules)]
    if not chosen:
        sys.exit(f"no tests in {tests}")
    with tempfile.TemporaryDirectory(prefix="replay") as tmp:
        with Server(asked.server, tmp) as url:
            outcomes = [replay(program, url, Path(tmp)) for program in chosen]
    sys.exit(judge(outcomes))


def is_chosen(stem, modules):
    name = stem.removeprefix("test_qgsserver").lstrip("_")
    if modules:
        return name in modules
    return not any(word in name.split("_") for word in LEFT_OUT)


def fetched():
    """The source of the installed QGIS, fetched without a change to apt's own lists."""
    found = sorted(CACHE.glob("qgis-*"))
    if found:
        return found[-1]
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "lists/partial").mkdir(parents=True, exist_ok=True)
    release = os_release()
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    line = f"deb-src [signed-by={key}] http://deb.debian.org/debian {release} main\n"
    (CACHE / "sources.list").write_text(line)
    own = {
        "Dir::Etc::sourcelist": CACHE / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": CACHE / "lists",
        "Dir::Cache::srcpkgcache": CACHE / "sources.bin",
        "Dir::Cache::pkgcache": CACHE / "packages.bin",
    }
    options = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
    run = lambda *words: subprocess.run(words, cwd=CACHE, check=True, timeout=1800)
    run("apt-get", "-qq", *options, "update")
    run("apt-get", "-qq", *options, "source", "--download-only", "--tar-only", "qgis")
    (archive,) = CACHE.glob("qgis_*.orig.tar.*")
    run("tar", "-xf", archive.name, "--wildcards", *KEEP)
    return sorted(CACHE.glob("qgis-*"))[-1]


def os_release():
    lines = Path("/etc/os-release").read_text().splitlines()
    pairs = dict(line.partition("=")[::2] for line in lines)
    return pairs["VERSION_CODENAME"].strip('"')


class Server:
    """A `qgisserver` on a free port, stopped in the end."""

    def __init__(self, program, tmp):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        settings = {**SETTINGS, "server.port": str(port)}
        flags = [word for pair in settings.items() for word in ("--set", "=".join(pair))]
        self._log = open(Path(tmp) / "server.log", "w+")
        environment = {**os.environ, "TMPDIR": tmp, "LANG": "C.UTF-8"}
        self._process = subprocess.Popen(
            [program, *flags], stdout=self._log, stderr=self._log, env=environment
        )

    def __enter__(self):
        end = time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            try:
                urllib.request.urlopen(self._url + "/ready", timeout=2).close()
                return self._url
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        self._log.seek(0)
        sys.exit(f"the server is not ready:\n{self._log.read()}")

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(60)


def replay(program, url, tmp):
    """The module, and what each of its tests came to, in the process and over HTTP."""
    module = program.stem.removeprefix("test_qgsserver").lstrip("_") or "server"
    inside = run(program, "-", tmp / module)
    passed = [name for name, said in inside.items() if said == "ok"]
    failed = dict.fromkeys(passed, "it did not end")
    known = differences()
    for _ in range(TRIES):
        for name, said in run(program, url, tmp / module).items():
            if said == "ok":
                failed.pop(name, None)
            elif name in failed:
                failed[name] = said
        if all(f"{module}.{name}" in known for name in failed):
            break
    print(f"{module}: {len(passed)} of {len(inside)} pass, {len(passed) - len(failed)} over HTTP", flush=True)
    return module, passed, failed


def run(program, server, results):
    environment = {**os.environ, "LANG": "C.UTF-8", "QT_QPA_PLATFORM": "offscreen"}
    command = [PYTHON, HERE / "shim.py", server, program, results, f"{results}.images"]
    with open(f"{results}.log", "w") as log:
        try:
            subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=BOUND)
        except subprocess.TimeoutExpired:
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
    known = differences()
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


def differences():
    lines = (HERE / "differences.txt").read_text().splitlines()
    lines = (line.partition("#")[0].strip() for line in lines)
    return {line for line in lines if line}


if __name__ == "__main__":
    main()
