"""qgis.server: one that obeys. The parameters of a request say what happens.

| parameter | meaning |
|---|---|
| `MARK=name` | first of all a line is added to the file `name` in the control folder |
| `ONCE=name` | `DO` is done by one process only; others answer as if it were `echo` |
| `DO=echo` | the default: JSON that says who answers what |
| `DO=wait&FOR=name` | answer when the test creates the file `name` |
| `DO=hang` | never answer; other threads of the process go on |
| `DO=draw&STOPPED=name` | never answer, but stop as QGIS 3.36 does, and note it in `name` |
| `DO=grow&MB=100` | answer, and never free so much memory |
| `DO=take&MB=100` | abort if there is not so much memory |
| `DO=blank` | an image of no bytes, as QGIS answers when it had no memory |
| `DO=give_up` | a status and no explanation, as QGIS answers its own exceptions |
| `DO=wedge` | never answer and never release the interpreter |
| `DO=signal&N=9` | die of this signal |
| `DO=segfault` | read where nothing is |
| `DO=exit&N=3` | exit with this status |
| `DO=raise` | a Python exception that nobody catches |
| `DO=memory` | as if memory had run out |
| `DO=log` | say something at levels Info and Warning, then echo |
| `DO=stream&N=4&SIZE=1000` | N flushed chunks of SIZE bytes, then `THEN` |
| `TICK=name` | a line for each of these chunks |
| `THEN=signal`, `exit`, `raise`, `hang`, `wait` | instead of the end of the stream |

A service that a plugin registered carries out its own requests.
"""

import ctypes
import io
import json
import os
import re
import signal
import threading
import time
from urllib.parse import parse_qsl, urlsplit

from . import control
from .core import Qgis, QgsApplication

_kept = []
CHUNK = b"0123456789abcdefghijklmnopqrstuvwxyz"


class QgsServerRequest:
    HeadMethod, PutMethod, GetMethod, PostMethod, DeleteMethod, PatchMethod = range(6)


class QgsBufferServerRequest(QgsServerRequest):
    def __init__(self, url, method=QgsServerRequest.GetMethod, headers=None, data=None):
        self._url, self._method = url, method
        self._headers, self._data = dict(headers or {}), bytes(data or b"")

    def url(self):
        return self._url

    def method(self):
        return self._method

    def headers(self):
        return self._headers

    def data(self):
        return self._data

    def parameters(self):
        return dict(parse_qsl(urlsplit(self._url).query, keep_blank_values=True))


class _Device(io.BytesIO):
    def pos(self):
        return self.tell()


class QgsBufferServerResponse:
    def __init__(self):
        self._buffer = _Device()
        self._status, self._headers = 200, {}

    def io(self):
        return self._buffer

    def write(self, data):
        self._buffer.write(data.encode() if isinstance(data, str) else data)

    def data(self):
        return self._buffer.getvalue()

    body = data

    def truncate(self):
        self._buffer.seek(0)
        self._buffer.truncate()

    def clear(self):
        self._headers.clear()
        self.truncate()

    def statusCode(self):
        return self._status

    def setStatusCode(self, status):
        self._status = status

    def headers(self):
        return self._headers

    def setHeader(self, name, value):
        self._headers[name] = value

    def headersSent(self):
        return False

    def feedback(self):
        return None

    def flush(self):
        pass

    def finish(self):
        pass


class QgsServerException(Exception):
    pass


class QgsServerProjectUtils:
    @staticmethod
    def wmsRestrictedLayers(project):
        return []


class QgsService:
    """What a plugin may bring."""


class QgsServerFilter:
    """Nobody calls it here."""

    def __init__(self, interface):
        self._interface = interface

    def serverInterface(self):
        return self._interface


class _Registry:
    def __init__(self):
        self.services = {}

    def registerService(self, service):
        self.services[service.name()] = service


class _Interface:
    def __init__(self):
        self._filters = {}
        self._registry = _Registry()

    def serviceRegistry(self):
        return self._registry

    def filters(self):
        return self._filters

    def registerFilter(self, plugin, priority=0):
        self._filters.setdefault(priority, []).append(plugin)

    def removeConfigCacheEntry(self, path):
        pass


class QgsServer:
    def __init__(self):
        self._interface = _Interface()

    def serverInterface(self):
        return self._interface

    def handleRequest(self, request, response, project=None):
        response.clear()
        asked = request.parameters()
        service = self._interface.serviceRegistry().services.get(asked.get("SERVICE"))
        if service is not None:
            service.executeRequest(request, response, project)
            return response.finish()
        if "MARK" in asked:
            control.note(asked["MARK"])
        do = asked.get("DO", "echo")
        if "ONCE" in asked and not control.first(asked["ONCE"]):
            do = "echo"
        _act(do, asked, request, response, project)
        response.finish()


def _act(do, asked, request, response, project):
    if do == "wait":
        control.wait_for(asked["FOR"])
        _echo(asked, request, response, project)
    elif do == "hang":
        while True:
            time.sleep(1)
    elif do == "draw":
        feedback = response.feedback()
        while not feedback.isCanceled():
            time.sleep(0.005)
        control.note(asked["STOPPED"])
        _echo(asked, request, response, project)
    elif do == "grow":
        _kept.append(b"x" * (int(asked["MB"]) << 20))
        _echo(asked, request, response, project)
    elif do == "take":
        try:
            bytes(int(asked["MB"]) << 20)
        except MemoryError:
            os.abort()
        _echo(asked, request, response, project)
    elif do == "blank":
        response.setHeader("Content-Type", "image/png")
    elif do == "give_up":
        response.setStatusCode(500)
        response.setHeader("Content-Type", "text/plain; charset=utf-8")
        response.write("Internal Server Error")
    elif do == "wedge":
        # Exponential time in one C call that keeps the interpreter to itself.
        re.match(r"(a|a)*b", "a" * 64)
    elif do == "signal":
        os.kill(os.getpid(), int(asked.get("N", signal.SIGKILL)))
        # A process that was only stopped may be told to go on, and then does nothing more.
        time.sleep(60)
    elif do == "segfault":
        ctypes.string_at(0)
    elif do == "exit":
        os._exit(int(asked.get("N", 1)))
    elif do == "raise":
        raise RuntimeError("as the request wished")
    elif do == "memory":
        raise MemoryError
    elif do == "log":
        say = QgsApplication.messageLog().messageReceived.emit
        say("a warning of QGIS", "Server", Qgis.Warning)
        # QGIS speaks on threads of its own, too.
        aside = threading.Thread(target=say, args=("said aside", "Server", Qgis.Info))
        aside.start()
        aside.join()
        _echo(asked, request, response, project)
    elif do == "stream":
        _stream(asked, request, response, project)
    else:
        _echo(asked, request, response, project)


def _echo(asked, request, response, project):
    response.setHeader("Content-Type", "application/json")
    said = {
        "id": asked.get("ID"),
        "pid": os.getpid(),
        "url": request.url(),
        "method": request.method(),
        "headers": request.headers(),
        "project": project and os.path.basename(project.fileName()),
        "text": project and getattr(project, "text", None),
        "environment": sorted(os.environ),
        "body": request.data().decode("latin-1"),
    }
    response.write(json.dumps(said))


def _stream(asked, request, response, project):
    response.setHeader("Content-Type", "application/octet-stream")
    size = int(asked.get("SIZE", 1000))
    chunk = (CHUNK * (size // len(CHUNK) + 1))[:size]
    for _ in range(int(asked.get("N", 4))):
        response.write(chunk)
        response.flush()
        if "TICK" in asked:
            control.note(asked["TICK"])
    then = asked.get("THEN")
    if then:
        _act(then, {**asked, "N": asked.get("THEN_N", "9")}, request, response, project)
