"""SERVICE=NOTHING answers with the pid of its process, and does nothing else.

With SECONDS it takes that long about it.
"""

import os
import time

from qgis.server import QgsService


class Nothing(QgsService):
    def name(self):
        return "NOTHING"

    def version(self):
        return "1.0"

    def executeRequest(self, request, response, project):
        time.sleep(float(request.parameters().get("SECONDS", 0)))
        response.setHeader("Content-Type", "text/plain")
        response.write(str(os.getpid()))


class Plugin:
    def __init__(self, server_iface):
        # The registry does not own Python objects: this reference keeps it alive.
        self.service = Nothing()
        server_iface.serviceRegistry().registerService(self.service)


def serverClassFactory(server_iface):
    return Plugin(server_iface)
