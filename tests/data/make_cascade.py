#!/usr/bin/python3
"""Makes a project whose only layer is served by somebody else, or by us:

    make_cascade.py FILE.qgs OWS_URL LAYER
"""

import os

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import sys
from urllib.parse import quote

from qgis.core import QgsApplication, QgsProject, QgsRasterLayer


def main(target, url, layer):
    QgsApplication.setPrefixPath("/usr", True)
    app = QgsApplication([], False)
    app.initQgis()
    source = f"crs=EPSG:4326&format=image/png&layers={layer}&styles=&url={quote(url, safe=':/')}"
    project = QgsProject()
    project.setTitle("Cascade")
    cascaded = QgsRasterLayer(source, "cascaded", "wms")
    assert cascaded.isValid(), source
    project.addMapLayer(cascaded)
    # Whoever reads the project finds all of it or nothing.
    assert project.write(target + ".new.qgs"), project.error()
    os.rename(target + ".new.qgs", target)
    # QGIS 3.40 crashes on what outlives it.
    del cascaded, project
    app.exitQgis()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
