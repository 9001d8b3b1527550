"""Read QGIS projects the way a server must: with flags, and told about bad layers.

QGIS's own configuration cache is never used: it frees a project that changed on
disk while a request still works with it.
"""

from qgis.core import QgsProject, QgsProjectBadLayerHandler
from qgis.server import QgsServerProjectUtils


class Unreadable(Exception):
    """QGIS cannot read the file; the text says why."""


class BadLayers(Exception):
    """Some layers are invalid; ``args[0]`` has their names."""


class _Collector(QgsProjectBadLayerHandler):
    """Remembers the names of the layers that do not load."""

    def __init__(self):
        super().__init__()
        self.names = []

    def handleBadLayers(self, nodes):
        super().handleBadLayers(nodes)
        for node in nodes:
            name = node.namedItem("layername").toElement().text()
            self.names.append(name or node.toElement().attribute("id"))


def load(path, strict, trust_metadata, no_layouts, read_only):
    """Read the project file ``path``.

    Returns ``(project, bad, embedded)``: the names of invalid layers that the project
    publishes, none if ``strict``, and the files of projects that it takes layers from.
    """
    project = QgsProject()
    collector = _Collector()
    project.setBadLayerHandler(collector)
    if not project.read(path, _flags(trust_metadata, no_layouts, read_only)):
        raise Unreadable(project.error() or "not a QGIS project")
    bad = sorted(set(collector.names) - set(QgsServerProjectUtils.wmsRestrictedLayers(project)))
    if strict and bad:
        raise BadLayers(bad)
    embedded = {project.layerIsEmbedded(layer) for layer in project.mapLayers()}
    return project, bad, sorted(embedded - {""})


def _flags(trust_metadata, no_layouts, read_only):
    """Read flags by name: newer QGIS moved them, and each version has its own set."""
    wanted = {
        "TrustLayerMetadata": trust_metadata,
        "DontLoadLayouts": no_layouts,
        "ForceReadOnlyLayers": read_only,
    }
    try:
        from qgis.core import Qgis

        source, prefix, flags = Qgis.ProjectReadFlag, "", Qgis.ProjectReadFlags()
    except AttributeError:
        source, prefix, flags = QgsProject, "Flag", QgsProject.ReadFlags()
    for name, on in wanted.items():
        if on and hasattr(source, prefix + name):
            flags |= getattr(source, prefix + name)
    return flags


def forget_addresses(project):
    """What a project says of where its services are."""
    for address in ("WMSUrl", "WFSUrl", "WCSUrl", "WMTSUrl"):
        project.writeEntry(address, "/", "")


def warm():
    """A project without files for the first map of a worker's life, which loads fonts and symbols."""
    from qgis.core import (
        QgsFeature,
        QgsGeometry,
        QgsPalLayerSettings,
        QgsPointXY,
        QgsVectorLayer,
        QgsVectorLayerSimpleLabeling,
    )

    project = QgsProject()
    layer = QgsVectorLayer("Point?crs=EPSG:4326&field=name:string", "warm", "memory")
    feature = QgsFeature(layer.fields())
    feature.setGeometry(QgsGeometry.fromPointXY(QgsPointXY(0, 0)))
    feature.setAttribute(0, "warm")
    layer.dataProvider().addFeatures([feature])
    settings = QgsPalLayerSettings()
    settings.fieldName = "name"
    layer.setLabeling(QgsVectorLayerSimpleLabeling(settings))
    layer.setLabelsEnabled(True)
    project.addMapLayer(layer)
    return project
