"""Answers each request with the SERVICE and the REQUEST that QGIS read in it."""

from qgis.server import QgsServerFilter


def serverClassFactory(interface):
    seen = Seen(interface)
    interface.registerFilter(seen, 100)
    return seen


class Seen(QgsServerFilter):
    def responseComplete(self):
        handler = self.serverInterface().requestHandler()
        read = handler.parameterMap()
        handler.clear()
        handler.setResponseHeader("Content-Type", "text/plain")
        handler.appendBody("\n".join(f"{read.get(name, '')!r}" for name in ("SERVICE", "REQUEST")).encode())
