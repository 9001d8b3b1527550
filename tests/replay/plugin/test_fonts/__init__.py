"""The fonts with which QGIS's tests draw, since workers draw for them."""

from qgis.core import QgsFontUtils


def serverClassFactory(interface):
    QgsFontUtils.loadStandardTestFonts(["All"])
    return None
