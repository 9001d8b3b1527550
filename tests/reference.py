#!/usr/bin/python3
"""What QgsServer itself answers, in one process, without any of our servers.

    reference.py PROJECTS

Reads requests from standard input, one JSON object a line:
`{"project": "world.qgs" | null, "method", "url", "headers": {}, "body": bytes}`;
writes the answers the same way: `{"status", "headers": {}, "body": bytes}`.
Bytes are strings, one character each.
Projects are read with the same flags as in a worker and passed to
`handleRequest`; nothing else is shared with the worker.
"""

import os

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
sys.dont_write_bytecode = True

from qgis.core import QgsApplication
from qgis.server import QgsBufferServerRequest, QgsBufferServerResponse, QgsServer, QgsServerRequest

from qgisserver import projects

METHODS = {
    "GET": QgsServerRequest.GetMethod,
    "HEAD": QgsServerRequest.HeadMethod,
    "POST": QgsServerRequest.PostMethod,
}


def main(root):
    # Only answers go to the real standard output, whatever libraries print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    QgsApplication.setPrefixPath("/usr", True)
    application = QgsApplication([], False)  # noqa: F841, lives as long as this
    server = QgsServer()
    loaded = {}
    for line in sys.stdin:
        asked = json.loads(line)
        project = load(loaded, root, asked["project"])
        print(json.dumps(answer(server, project, asked)), file=answers, flush=True)
    # QGIS tidies up at length and in vain.
    os._exit(0)


def load(loaded, root, name):
    if name is not None and name not in loaded:
        loaded[name], _, _ = projects.load(os.path.join(root, name), True, False, False, False)
    return loaded.get(name)


def answer(server, project, asked):
    body = asked["body"].encode("latin-1")
    request = QgsBufferServerRequest(asked["url"], METHODS[asked["method"]], asked["headers"], body)
    response = QgsBufferServerResponse()
    if project is None:
        server.handleRequest(request, response)
    else:
        server.handleRequest(request, response, project)
    return {
        "status": response.statusCode(),
        "headers": response.headers(),
        "body": bytes(response.body()).decode("latin-1"),
    }


if __name__ == "__main__":
    main(sys.argv[1])
