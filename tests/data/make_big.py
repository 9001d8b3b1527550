#!/usr/bin/python3
"""Makes a project that is too big to commit: DIR/big.qgs publishes 100,000
points with ten attributes through WFS, about 55 MB of GeoJSON.

    make_big.py DIR [N_FEATURES]
"""

import os

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import random
import sys
from pathlib import Path

from osgeo import ogr, osr
from qgis.core import QgsApplication, QgsProject, QgsVectorLayer

FIELDS = {
    "code": ogr.OFTString,
    "name": ogr.OFTString,
    "street": ogr.OFTString,
    "city": ogr.OFTString,
    "remark": ogr.OFTString,
    "height_m": ogr.OFTReal,
    "area_m2": ogr.OFTReal,
    "built": ogr.OFTInteger,
    "floors": ogr.OFTInteger,
    "inspected": ogr.OFTDate,
}
SYLLABLES = "ba be bo da de di fa fo ga ge ki ko la le li lo ma me mo na ne ni no pa pe ra re ro sa se so ta te to va ve".split()


def main(target, n_features=100_000):
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    write_points(target / "points.fgb", int(n_features))
    write_project(target / "big.qgs", target / "points.fgb")


def write_points(path, n_features):
    crs = osr.SpatialReference()
    crs.ImportFromEPSG(4326)
    crs.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
    # Without an index the features keep their order, and reading is sequential.
    source = ogr.GetDriverByName("FlatGeobuf").CreateDataSource(str(path))
    layer = source.CreateLayer("points", crs, ogr.wkbPoint, ["SPATIAL_INDEX=NO"])
    for name, kind in FIELDS.items():
        layer.CreateField(ogr.FieldDefn(name, kind))
    chance = random.Random(1)
    vocabulary = some_words(chance)
    definition = layer.GetLayerDefn()
    for i in range(n_features):
        layer.CreateFeature(feature(definition, chance, vocabulary, i))


def some_words(chance):
    return ["".join(chance.choices(SYLLABLES, k=4)).capitalize() for _ in range(5000)]


def feature(definition, chance, vocabulary, i):
    def words(n):
        return " ".join(chance.choices(vocabulary, k=n))

    found = ogr.Feature(definition)
    found["code"] = f"{i:08d}"
    found["name"] = words(3)
    found["street"] = words(4)
    found["city"] = words(2)
    found["remark"] = words(21)
    found["height_m"] = round(chance.uniform(2, 90), 2)
    found["area_m2"] = round(chance.uniform(20, 9000), 1)
    found["built"] = chance.randint(1400, 2020)
    found["floors"] = chance.randint(1, 30)
    found["inspected"] = f"20{chance.randint(10, 20)}-{chance.randint(1, 12):02d}-{chance.randint(1, 28):02d}"
    point = ogr.Geometry(ogr.wkbPoint)
    point.AddPoint_2D(round(chance.uniform(-180, 180), 6), round(chance.uniform(-85, 85), 6))
    found.SetGeometry(point)
    return found


def write_project(path, data):
    QgsApplication.setPrefixPath("/usr", True)
    app = QgsApplication([], False)
    app.initQgis()
    project = QgsProject()
    project.setTitle("Big")
    layer = QgsVectorLayer(str(data), "points", "ogr")
    assert layer.isValid(), data
    project.addMapLayer(layer)
    project.writeEntryBool("WMSServiceCapabilities", "/", True)
    project.writeEntry("WFSLayers", "/", [layer.id()])
    project.writeEntry("WFSLayersPrecision", f"/{layer.id()}", 6)
    assert project.write(str(path)), project.error()
    # QGIS 3.40 crashes on what outlives it.
    del layer, project
    app.exitQgis()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
