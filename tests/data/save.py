"""save.py TARGET TITLE PROVIDER SOURCE: a project with the layer `places`, kept where TARGET says."""

import os
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from qgis.core import QgsApplication, QgsProject, QgsVectorLayer  # noqa: E402

target, title, provider, source = sys.argv[1:]
QgsApplication.setPrefixPath("/usr", True)
application = QgsApplication([], False)
application.initQgis()
project = QgsProject()
layer = QgsVectorLayer(source, "places", provider)
if not layer.isValid():
    sys.exit(f"no layer: {source}")
project.addMapLayer(layer)
project.setTitle(title)
if not project.write(target):
    sys.exit(f"not written: {project.error()}")
del layer, project
application.exitQgis()
