#!/usr/bin/python3
"""Makes a project with many small layers, to be copied as often as a test likes.

    make_many.py EXAMPLES DIR N_LAYERS

DIR/many.qgs has N_LAYERS layers; each is a file of its own with the first countries of
the example data. Its title is `Many`.
"""

import os

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import shutil
import sys
from pathlib import Path

from osgeo import gdal
from qgis.core import QgsApplication, QgsProject, QgsVectorLayer

gdal.UseExceptions()


def main(examples, target, n_layers):
    data = Path(target) / "many"
    data.mkdir(parents=True)
    small = data / "0.fgb"
    source = str(Path(examples) / "data" / "countries.fgb")
    gdal.VectorTranslate(str(small), source, format="FlatGeobuf", limit=3, layerCreationOptions=["SPATIAL_INDEX=NO"])
    files = [small, *(data / f"{n}.fgb" for n in range(1, int(n_layers)))]
    for file in files[1:]:
        shutil.copy(small, file)
    write_project(Path(target) / "many.qgs", files)


def write_project(path, files):
    QgsApplication.setPrefixPath("/usr", True)
    app = QgsApplication([], False)
    app.initQgis()
    describe(path, files)
    app.exitQgis()


def describe(path, files):
    project = QgsProject()
    project.setTitle("Many")
    project.writeEntryBool("WMSServiceCapabilities", "/", True)
    project.writeEntry("WMSServiceTitle", "/", "Many")
    for file in files:
        layer = QgsVectorLayer(str(file), f"layer{file.stem}", "ogr")
        assert layer.isValid(), file
        project.addMapLayer(layer)
    assert project.write(str(path)), project.error()


if __name__ == "__main__":
    main(*sys.argv[1:])
