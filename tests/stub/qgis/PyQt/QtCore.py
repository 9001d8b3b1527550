"""qgis.PyQt.QtCore, as far as the worker looks at it."""


def qInstallMessageHandler(handler):
    return None
