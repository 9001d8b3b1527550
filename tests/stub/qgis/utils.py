"""qgis.utils, as far as the worker looks at it."""

serverIface = None
