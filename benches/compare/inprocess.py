"""QGIS alone: answers each line `COUNT QUERY` of standard input with the time
that each of COUNT calls of handleRequest took, in microseconds, and the size
of the last body.

The project is the first argument, the plugin folder the second.
"""

import sys
import time

from qgis.core import QgsApplication, QgsProject
from qgis.server import QgsBufferServerRequest, QgsBufferServerResponse, QgsServer

QgsApplication.setPrefixPath("/usr", True)
application = QgsApplication([], False)
server = QgsServer()

sys.path.insert(0, sys.argv[2])
import nothing  # noqa: E402

plugin = nothing.serverClassFactory(server.serverInterface())

project = QgsProject()
assert project.read(sys.argv[1]), project.error()


def once(url):
    before = time.perf_counter_ns()
    request = QgsBufferServerRequest(url)
    response = QgsBufferServerResponse()
    server.handleRequest(request, response, project)
    body = response.body()
    took = time.perf_counter_ns() - before
    assert response.statusCode() == 200, bytes(body)
    return took // 1000, body.size()


print("ready", flush=True)
for line in sys.stdin:
    count, query = line.strip().split(" ", 1)
    taken = [once("http://localhost/ows/?" + query) for _ in range(int(count))]
    print(taken[-1][1], *(took for took, _ in taken), flush=True)
