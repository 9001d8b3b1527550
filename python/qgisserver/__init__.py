"""The Python half of a qgisserver worker: what only PyQGIS can do.

``application`` starts QGIS, ``plugins`` loads server plugins, ``projects``
reads projects, ``exchange`` passes one request to ``QgsServer`` and its answer
back. None of them sees ZeroMQ or HTTP.
"""
