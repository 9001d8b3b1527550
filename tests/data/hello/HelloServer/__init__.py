"""Server filters like those of qgis-helloserver, the example that QGIS's own documentation follows.

One file in `filters` is one filter, registered at 100, 200, … in whichever order the file
system has them. One file has a class of another name and is left out.
"""

import importlib
from pathlib import Path

from qgis.core import QgsMessageLog


def serverClassFactory(interface):
    return Hello(interface)


class Hello:
    def __init__(self, interface):
        self.interface = interface
        priority = 100
        for file in sorted((Path(__file__).parent / "filters").glob("*Filter.py")):
            module = importlib.import_module(f"HelloServer.filters.{file.stem}")
            try:
                interface.registerFilter(getattr(module, file.stem)(interface), priority)
                priority += 100
            except AttributeError as error:
                QgsMessageLog.logMessage(f"left out: {error}")
