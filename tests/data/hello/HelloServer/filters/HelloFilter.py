from qgis.core import QgsMessageLog
from qgis.server import QgsServerFilter


class HelloFilter(QgsServerFilter):
    """Answers SERVICE=HELLO, which no service does."""

    def requestReady(self):
        QgsMessageLog.logMessage("requestReady")

    def sendResponse(self):
        QgsMessageLog.logMessage("sendResponse")

    def responseComplete(self):
        handler = self.serverInterface().requestHandler()
        if handler.parameterMap().get("SERVICE", "").upper() == "HELLO":
            handler.clear()
            handler.setResponseHeader("Content-type", "text/plain")
            handler.appendBody(b"HelloServer!")
