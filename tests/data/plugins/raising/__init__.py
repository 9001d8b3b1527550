"""A plugin that raises where the parameter RAISE says so, and takes Python's hook on TAKE=hook."""

import sys

from qgis.core import Qgis, QgsMessageLog
from qgis.server import QgsAccessControlFilter, QgsServerFilter, QgsService


def serverClassFactory(interface):
    return Raising(interface)


class Raising:
    def __init__(self, interface):
        self.kept = [Service(interface), Stream(), Filter(interface), Control(interface)]
        service, stream, server_filter, control = self.kept
        interface.serviceRegistry().registerService(service)
        interface.serviceRegistry().registerService(stream)
        interface.registerFilter(server_filter, 100)
        interface.registerAccessControl(control, 100)


def raise_if(interface, where):
    handler = interface.requestHandler()
    if handler is not None and handler.parameterMap().get("RAISE") == where:
        raise ValueError(f"secret of {where}")


class Service(QgsService):
    def __init__(self, interface):
        super().__init__()
        self.interface = interface

    def name(self):
        return "RAISING"

    def version(self):
        return "1.0"

    def executeRequest(self, request, response, project):
        response.setStatusCode(200)
        response.write("before")
        raise_if(self.interface, "service")
        response.write(" and after")


class Stream(QgsService):
    """Sends two parts; between them it does what the parameter REQUEST says."""

    def name(self):
        return "STREAM"

    def version(self):
        return "1.0"

    def executeRequest(self, request, response, project):
        response.write("a" * 20_000)
        response.flush()
        what = request.parameters()["REQUEST"]
        if what == "ask":
            assert response.headersSent()
        elif what == "status":
            response.setStatusCode(500)
        elif what == "clear":
            response.clear()
        elif what == "error":
            response.sendError(500, "too late")
        response.write("b" * 20_000)


class Filter(QgsServerFilter):
    def requestReady(self):
        asked = self.serverInterface().requestHandler().parameterMap()
        QgsMessageLog.logMessage(f"asked for {asked.get('LAYERS')}", "raising", Qgis.Warning)
        if asked.get("TAKE") == "hook":
            sys.excepthook = lambda *_: None
        raise_if(self.serverInterface(), "requestReady")

    def sendResponse(self):
        raise_if(self.serverInterface(), "sendResponse")

    def responseComplete(self):
        raise_if(self.serverInterface(), "responseComplete")


class Control(QgsAccessControlFilter):
    """Nobody may see the layer `places`, and nobody may see more because of an exception."""

    def __init__(self, interface):
        super().__init__(interface)
        self.interface = interface

    def layerPermissions(self, layer):
        raise_if(self.interface, "layerPermissions")
        rights = super().layerPermissions(layer)
        rights.canRead = layer.name() != "places"
        return rights

    def layerFilterExpression(self, layer):
        raise_if(self.interface, "layerFilterExpression")
        return super().layerFilterExpression(layer)

    def authorizedLayerAttributes(self, layer, attributes):
        raise_if(self.interface, "authorizedLayerAttributes")
        return super().authorizedLayerAttributes(layer, attributes)

    def cacheKey(self):
        return "raising"
