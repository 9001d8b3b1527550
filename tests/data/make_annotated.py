#!/usr/bin/python3
"""Saves a project with what QGIS keeps beside a `.qgs`: labels that are hidden by hand
(`.qgd`), and a picture that is attached (`_attachments.zip`):

    make_annotated.py WORLD.qgs FILE.qgs
"""

import os

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import sys

from qgis.core import (
    QgsApplication,
    QgsAuxiliaryLayer,
    QgsMarkerSymbol,
    QgsPalLayerSettings,
    QgsProject,
    QgsSingleSymbolRenderer,
    QgsSvgMarkerSymbolLayer,
)

PICTURE = '<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9" fill="#d02090"/></svg>'


def main(source, target):
    QgsApplication.setPrefixPath("/usr", True)
    app = QgsApplication([], False)
    app.initQgis()
    project = QgsProject()
    assert project.read(source), project.error()
    mark_with_picture(project)
    hide_labels(project)
    assert project.write(target), project.error()
    # QGIS 3.40 crashes on what outlives it.
    del project
    app.exitQgis()


def mark_with_picture(project):
    (places,) = project.mapLayersByName("places")
    path = project.createAttachedFile("mark.svg")
    with open(path, "w") as file:
        file.write(PICTURE)
    symbol = QgsMarkerSymbol()
    symbol.changeSymbolLayer(0, QgsSvgMarkerSymbolLayer(path, 6))
    places.setRenderer(QgsSingleSymbolRenderer(symbol))


def hide_labels(project):
    (countries,) = project.mapLayersByName("countries")
    fields = countries.fields()
    storage = project.auxiliaryStorage()
    by_name = storage.createAuxiliaryLayer(fields[fields.indexOf("name")], countries)
    countries.setAuxiliaryLayer(by_name)
    shown = QgsAuxiliaryLayer.createProperty(QgsPalLayerSettings.Show, countries)
    assert countries.startEditing()
    for feature in countries.getFeatures():
        countries.changeAttributeValue(feature.id(), shown, 0)
    assert countries.commitChanges(), countries.commitErrors()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
