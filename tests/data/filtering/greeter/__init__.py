"""A server filter: each answer ends with a comment that names the header X-Qgis-User."""

from qgis.server import QgsServerFilter


class Greeter(QgsServerFilter):
    def responseComplete(self):
        handler = self.serverInterface().requestHandler()
        user = handler.requestHeader("X-Qgis-User")
        handler.appendBody(f"<!-- for {user} -->".encode())


def serverClassFactory(interface):
    greeter = Greeter(interface)
    interface.registerFilter(greeter, 100)
    return greeter
