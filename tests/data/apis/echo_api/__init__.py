"""An OGC API at /echo/said that says what it was asked, and two variables of its environment."""

import json
import os

from qgis.PyQt.QtCore import QRegularExpression
from qgis.server import QgsServerOgcApi, QgsServerOgcApiHandler


class Echo(QgsServerOgcApiHandler):
    def path(self):
        # Web services below it, too, should anybody get here with them.
        return QRegularExpression("/said(/ows)?/?$")

    def operationId(self):
        return "echo"

    def summary(self):
        return "Echo"

    def description(self):
        return "Says what it was asked"

    def linkTitle(self):
        return "Echo"

    def linkType(self):
        return QgsServerOgcApi.data

    def parameters(self, context):
        return []

    def handleRequest(self, context):
        request = context.request()
        said = {
            "url": request.url().toString(),
            "method": request.method(),
            "body": bytes(request.data()).decode(),
            "here": self.href(context),
            "variable": os.environ.get("ECHO_VARIABLE"),
        }
        context.response().setHeader("Content-Type", "application/json")
        context.response().write(json.dumps(said))


def serverClassFactory(interface):
    api = QgsServerOgcApi(interface, "/echo", "echo", "says what it was asked", "1.0")
    handler = Echo()
    api.registerHandler(handler)
    interface.serviceRegistry().registerApi(api)
    return api, handler
