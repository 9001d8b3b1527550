from qgis.PyQt.QtCore import QBuffer, QByteArray, QIODevice, QRect
from qgis.PyQt.QtGui import QColor, QImage, QPainter
from qgis.server import QgsServerFilter


class WatermarkFilter(QgsServerFilter):
    """Paints over maps. Fails where no service is asked for."""

    def responseComplete(self):
        handler = self.serverInterface().requestHandler()
        asked = handler.parameterMap()
        is_map = asked.get("SERVICE").upper() == "WMS" and asked.get("REQUEST").upper() == "GETMAP"
        if not is_map or handler.exceptionRaised():
            return
        image = QImage()
        image.loadFromData(handler.body())
        painter = QPainter(image)
        painter.fillRect(QRect(20, 20, 40, 40), QColor("red"))
        painter.end()
        data = QByteArray()
        buffer = QBuffer(data)
        buffer.open(QIODevice.WriteOnly)
        image.save(buffer, "PNG")
        handler.clearBody()
        handler.appendBody(data)
