"""One of everything that a server plugin can extend: filters, a cache, a service, an API.

What filters see is told in headers `X-Seen` and, of a stream, in the log.
"""

import json

from qgis.core import Qgis, QgsMessageLog
from qgis.PyQt.QtCore import QByteArray, QRegularExpression
from qgis.server import (
    QgsServerApiBadRequestException,
    QgsServerCacheFilter,
    QgsServerFilter,
    QgsServerOgcApi,
    QgsServerOgcApiHandler,
    QgsService,
)

# Newer QGIS has these, and asks whether to go on.
CAN_STOP = hasattr(QgsServerFilter, "onRequestReady")


def serverClassFactory(interface):
    return Points(interface)


class Points:
    def __init__(self, interface):
        self.second, self.first = Filter(interface, "second"), Filter(interface, "first")
        # The lower number comes first, whoever is registered first.
        interface.registerFilter(self.second, 20)
        interface.registerFilter(self.first, 10)
        self.stop = Stop(interface)
        interface.registerFilter(self.stop, 15)
        self.cache = Cache(interface)
        interface.registerServerCache(self.cache, 10)
        self.service = Service()
        interface.serviceRegistry().registerService(self.service)
        self.api = QgsServerOgcApi(interface, "/points", "Points", "An API of a plugin", "1.0")
        self.handler = Handler()
        self.api.registerHandler(self.handler)
        interface.serviceRegistry().registerApi(self.api)


class Filter(QgsServerFilter):
    def __init__(self, interface, name):
        super().__init__(interface)
        self.label = name
        self.n_flushes = 0

    def see(self, what):
        handler = self.serverInterface().requestHandler()
        before = handler.responseHeader("X-Seen")
        handler.setResponseHeader("X-Seen", f"{before} {self.label}.{what}".strip())

    def requestReady(self):
        self.n_flushes = 0
        self.see("ready")
        handler = self.serverInterface().requestHandler()
        if self.label == "first" and handler.parameter("WIDTH") == "twenty":
            handler.setParameter("WIDTH", "20")

    def sendResponse(self):
        self.n_flushes += 1

    def responseComplete(self):
        self.see("complete")
        QgsMessageLog.logMessage(f"{self.label}: {self.n_flushes} flushes", "points", Qgis.Warning)


class Stop(QgsServerFilter):
    """Lets nobody after it see the end, where QGIS asks."""

    def onResponseComplete(self):
        return self.serverInterface().requestHandler().parameter("STOP") == ""


class Cache(QgsServerCacheFilter):
    def __init__(self, interface):
        super().__init__(interface)
        self.documents = {}

    def _key(self, project, request, key):
        # Of a request that a cache is asked about only the parameters count.
        asked = sorted(request.parameters().items())
        return json.dumps([project.fileName(), asked, key])

    def getCachedDocument(self, project, request, key):
        if request.parameters().get("CACHE") == "raises":
            raise ValueError("secret of a cache")
        if request.parameters().get("CACHE") == "lies":
            return "no bytes"
        return self.documents.get(self._key(project, request, key), QByteArray())

    def setCachedDocument(self, document, project, request, key):
        text = document.toString().replace("<Title>World</Title>", "<Title>From the cache</Title>")
        self.documents[self._key(project, request, key)] = QByteArray(text.encode())
        return True


class Service(QgsService):
    def name(self):
        return "Points"

    def version(self):
        return "1.0"

    def executeRequest(self, request, response, project):
        response.setHeader("Content-Type", "application/x-points")
        response.write(f"{request.parameters()['REQUEST']} of {len(project.mapLayers())} layers")


class Handler(QgsServerOgcApiHandler):
    def path(self):
        return QRegularExpression("/items")

    def operationId(self):
        return "points"

    def summary(self):
        return "Items"

    def description(self):
        return "Items of a plugin"

    def linkTitle(self):
        return "Items"

    def linkType(self):
        return QgsServerOgcApi.data

    def handleRequest(self, context):
        query = context.request().url().query()
        if "wrong" in query:
            raise QgsServerApiBadRequestException("what the client did wrong")
        if "raise" in query:
            raise ValueError("secret of the API")
        context.response().setHeader("Content-Type", "application/json")
        context.response().write(json.dumps({"query": query}))
