"""A service whose every byte says which request it belongs to.

| parameter | meaning |
|---|---|
| `TAG` | what the answer repeats |
| `STATUS` | its status, 200 otherwise |
| `SIZE` | bytes of the answer, or of each chunk |
| `CHUNKS` | so many chunks, each with its number, flushed one by one |
| `STALL` | seconds before anything is said |
| `PAUSE` | seconds before each chunk |

The body of the request follows the answer. Each request is noted in the folder
`journal` beside the one that plugins are in, one file per process, before it is
answered: a test can tell what ran, and how often.
"""

import os
import time
from pathlib import Path

from qgis.server import QgsService

JOURNAL = Path(__file__).resolve().parent.parent.parent / "journal"


def serverClassFactory(interface):
    service = Echo()
    interface.serviceRegistry().registerService(service)
    return service


def fill(tag, size):
    line = (tag + "\n").encode()
    return (line * (size // len(line) + 1))[:size]


class Echo(QgsService):
    def __init__(self):
        super().__init__()
        self._journal = None

    def name(self):
        return "ECHO"

    def version(self):
        return "1.0"

    def executeRequest(self, request, response, project):
        asked = request.parameters()
        tag, size = asked["TAG"], int(asked.get("SIZE", 0))
        self._note("+", tag)
        response.setStatusCode(int(asked.get("STATUS", 200)))
        response.setHeader("Content-Type", "text/plain")
        time.sleep(float(asked.get("STALL", 0)))
        chunks = int(asked.get("CHUNKS", 0))
        for i in range(chunks):
            time.sleep(float(asked.get("PAUSE", 0)))
            response.write(fill(f"{tag}/{i}of{chunks}", size))
            response.flush()
        if not chunks:
            # PyQt gives us a copy of the request that has lost its body.
            body = bytes(request.data()) or asked.get("REQUEST_BODY", "").encode()
            response.write(fill(tag, size) + body)
        self._note("-", tag)

    def _note(self, what, tag):
        """Begun or ended; a process that is killed notes no end."""
        if self._journal is None:
            # Opened by the worker, not by the process that forks it.
            self._journal = open(JOURNAL / str(os.getpid()), "ab", buffering=0)
        self._journal.write(f"{what}{tag}\n".encode())
