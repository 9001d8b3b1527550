from qgis.server import QgsServerFilter


class ParamsFilter(QgsServerFilter):
    """Gives the request another service for a moment."""

    def requestReady(self):
        handler = self.serverInterface().requestHandler()
        service = handler.parameterMap().get("SERVICE", "")
        handler.setParameter("SERVICE", "ParamsFilter")
        assert handler.parameterMap()["SERVICE"] == "ParamsFilter"
        if service:
            handler.setParameter("SERVICE", service)
        else:
            handler.removeParameter("SERVICE")
