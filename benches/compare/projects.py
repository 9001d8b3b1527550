"""Writes into the folder argv[1]: `many.qgs` with one WFS layer of 100,000
points, `empty.qgs` with nothing."""

import sys
from pathlib import Path

from qgis.core import (
    QgsApplication,
    QgsFeature,
    QgsGeometry,
    QgsPointXY,
    QgsProject,
    QgsVectorFileWriter,
    QgsVectorLayer,
)

QgsApplication.setPrefixPath("/usr", True)
application = QgsApplication([], False)
QgsApplication.initQgis()

fields = "&".join(f"field=text{i}:string(40)&field=value{i}:double" for i in range(8))
draft = QgsVectorLayer(f"Point?crs=EPSG:4326&{fields}", "many", "memory")


def feature(n):
    result = QgsFeature(draft.fields())
    result.setGeometry(QgsGeometry.fromPointXY(QgsPointXY(n % 360 - 180, n // 360 % 180 - 90)))
    result.setAttributes([value for i in range(8) for value in (f"text {i} of feature {n}", n / (i + 1))])
    return result


draft.dataProvider().addFeatures(feature(n) for n in range(100_000))
folder = Path(sys.argv[1])
path = folder / "many.gpkg"
options = QgsVectorFileWriter.SaveVectorOptions()
options.layerName = "many"
written = QgsVectorFileWriter.writeAsVectorFormatV3(
    draft, str(path), QgsProject.instance().transformContext(), options
)
assert written[0] == QgsVectorFileWriter.NoError, written

project = QgsProject()
layer = QgsVectorLayer(f"{path}|layername=many", "many", "ogr")
assert layer.isValid() and layer.featureCount() == 100_000
project.addMapLayer(layer)
project.writeEntry("WFSLayers", "/", [layer.id()])
assert project.write(str(folder / "many.qgs")), project.error()
assert QgsProject().write(str(folder / "empty.qgs"))
