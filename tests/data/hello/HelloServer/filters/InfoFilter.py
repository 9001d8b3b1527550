from qgis.server import QgsServerFilter


class AnotherName(QgsServerFilter):
    """Is not registered."""
