from qgis.server import QgsServerException, QgsServerFilter


class ExceptionFilter(QgsServerFilter):
    """Makes an exception report of SERVICE=EXCEPTION."""

    def responseComplete(self):
        handler = self.serverInterface().requestHandler()
        if handler.parameterMap().get("SERVICE", "").upper() == "EXCEPTION":
            handler.setServiceException(QgsServerException("as the request wished"))
