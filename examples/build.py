#!/usr/bin/python3
"""Builds the example projects from Natural Earth data.

    examples/build.py [WORLD_ATLAS]

WORLD_ATLAS is the unpacked npm package `world-atlas`; without it, `npm pack`
fetches it. The results are committed; run this again only to change them.
Ids, dates and the order of attributes are fixed, so that a second run changes
nothing that matters.
"""

import os

# Before Qt is loaded: it orders XML attributes by a random hash otherwise.
os.environ.setdefault("QT_HASH_SEED", "0")
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

import numpy
from osgeo import gdal, ogr, osr
from qgis.core import (
    QgsApplication,
    QgsColorRampShader,
    QgsCoordinateReferenceSystem,
    QgsFillSymbol,
    QgsLayoutItemLabel,
    QgsLayoutItemLegend,
    QgsLayoutItemMap,
    QgsLayoutPoint,
    QgsLayoutSize,
    QgsMarkerSymbol,
    QgsPalLayerSettings,
    QgsPrintLayout,
    QgsProject,
    QgsProperty,
    QgsPropertyCollection,
    QgsRasterLayer,
    QgsRasterShader,
    QgsRectangle,
    QgsSettings,
    QgsSingleBandPseudoColorRenderer,
    QgsTextBufferSettings,
    QgsTextFormat,
    QgsUnitTypes,
    QgsVectorLayer,
    QgsVectorLayerSimpleLabeling,
)
from qgis.PyQt.QtGui import QColor, QFont

HERE = Path(__file__).resolve().parent
PROJECTS = HERE / "projects"
DATA = PROJECTS / "data"
EARTH_RADIUS_KM = 6371.0
WORLD = QgsRectangle(-180, -90, 180, 90)
FONT = "DejaVu Sans"

gdal.UseExceptions()


def main(args):
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["HOME"] = tmp
        atlas = Path(args[0]) if args else fetch(Path(tmp))
        shutil.rmtree(PROJECTS, ignore_errors=True)
        DATA.mkdir(parents=True)
        write_data(atlas)
        app = start_qgis()
        world_project().write_to("world.qgs")
        atlas_project().write_to("atlas.qgz")
        broken_project().write_to("broken.qgs")
        app.exitQgis()


def fetch(tmp):
    subprocess.run(["npm", "pack", "--silent", "world-atlas@2.0.2"], cwd=tmp, check=True)
    shutil.unpack_archive(next(tmp.glob("world-atlas-*.tgz")), tmp)
    return tmp / "package"


# --- data --------------------------------------------------------------------


def write_data(atlas):
    """FlatGeobuf and GeoTIFF for what is only read: one file each, never
    written to, so that a read-only mount is enough. A GeoPackage only for what
    clients may edit."""
    countries = read_polygons(atlas / "countries-50m.json", "countries")
    write_countries(countries)
    land = read_polygons(atlas / "land-50m.json", "land")
    write_land(land)
    write_places(read_polygons(atlas / "countries-110m.json", "countries"))
    write_coast_distance(atlas / "land-110m.json")


def read_polygons(path, layer_name):
    """The features as (ISO number, name, valid multipolygon)."""
    source = ogr.Open(str(path))
    found = []
    for feature in source.GetLayerByName(layer_name):
        geometry = cut_at_180(feature.GetGeometryRef())
        name = feature["name"] if layer_name == "countries" else None
        found.append((feature["id"], name, geometry))
    return found


def cut_at_180(geometry):
    """World Atlas joins what Natural Earth cut at 180° and at the south pole;
    a flat map needs the cuts back."""
    found = ogr.Geometry(ogr.wkbMultiPolygon)
    for polygon in polygons_of(geometry):
        unrolled = ogr.Geometry(ogr.wkbPolygon)
        for ring in polygon:
            unrolled.AddGeometry(unroll(ring.GetPoints()))
        unrolled = unrolled.MakeValid()
        for turn in (-360, 0, 360):
            window = ogr.CreateGeometryFromWkt(f"POLYGON (({-180 - turn} -90,{180 - turn} -90,{180 - turn} 90,{-180 - turn} 90,{-180 - turn} -90))")
            for part in polygons_of(unrolled.Intersection(window)):
                found.AddGeometry(shifted(part, turn))
    return polygons_of(found.UnionCascaded().MakeValid())


def unroll(points):
    """Longitudes without jumps; a ring that does not come back goes round the
    south pole."""
    lon = numpy.degrees(numpy.unwrap(numpy.radians([p[0] for p in points]))).round(7)
    points = [(float(x), p[1]) for x, p in zip(lon, points)]
    (first, lat), (last, _) = points[0], points[-1]
    if abs(last - first) > 1:
        points += [(last, -90.0), (first, -90.0), (first, lat)]
    ring = ogr.Geometry(ogr.wkbLinearRing)
    for x, y in points:
        ring.AddPoint_2D(x, y)
    ring.CloseRings()
    return ring


def shifted(polygon, turn):
    copy = ogr.Geometry(ogr.wkbPolygon)
    for ring in polygon:
        moved = ogr.Geometry(ogr.wkbLinearRing)
        for point in ring.GetPoints():
            moved.AddPoint_2D(point[0] + turn, point[1])
        copy.AddGeometry(moved)
    return copy


def polygons_of(geometry):
    """What making a polygon valid leaves besides lines and points."""
    found = ogr.Geometry(ogr.wkbMultiPolygon)
    if geometry.GetGeometryName() == "POLYGON":
        found.AddGeometry(geometry)
    elif geometry.GetGeometryName() in ("MULTIPOLYGON", "GEOMETRYCOLLECTION"):
        for part in geometry:
            for polygon in polygons_of(part):
                found.AddGeometry(polygon)
    return found


def lon_lat():
    crs = osr.SpatialReference()
    crs.ImportFromEPSG(4326)
    crs.SetAxisMappingStrategy(osr.OAMS_TRADITIONAL_GIS_ORDER)
    return crs


def create_layer(driver, name, geometry_type, fields, options=()):
    suffix = {"FlatGeobuf": "fgb", "GPKG": "gpkg"}[driver]
    target = ogr.GetDriverByName(driver).CreateDataSource(str(DATA / f"{name}.{suffix}"))
    layer = target.CreateLayer(name, lon_lat(), geometry_type, list(options))
    for field, kind in fields:
        layer.CreateField(ogr.FieldDefn(field, kind))
    return target, layer


def add_feature(layer, geometry, **values):
    feature = ogr.Feature(layer.GetLayerDefn())
    for field, value in values.items():
        if value is not None:
            feature[field] = value
    feature.SetGeometry(geometry)
    layer.CreateFeature(feature)


def area_km2(geometry):
    """On the sphere, by the cylindrical equal-area projection."""
    area = 0.0
    for polygon in geometry:
        for i, ring in enumerate(polygon):
            points = numpy.radians(numpy.array(ring.GetPoints())[:, :2])
            x, y = points[:, 0], numpy.sin(points[:, 1])
            part = abs(numpy.dot(x[:-1], y[1:]) - numpy.dot(x[1:], y[:-1])) / 2
            area += part if i == 0 else -part
    return round(area * EARTH_RADIUS_KM**2)


def write_countries(countries):
    fields = [("iso_n3", ogr.OFTString), ("name", ogr.OFTString), ("area_km2", ogr.OFTInteger64), ("colour", ogr.OFTInteger)]
    target, layer = create_layer("FlatGeobuf", "countries", ogr.wkbMultiPolygon, fields)
    for i, (iso, name, geometry) in enumerate(countries):
        add_feature(layer, geometry, iso_n3=iso, name=name, area_km2=area_km2(geometry), colour=i % 5)
    del layer, target


def write_land(land):
    target, layer = create_layer("FlatGeobuf", "land", ogr.wkbPolygon, [("area_km2", ogr.OFTInteger64)])
    for _, _, geometry in land:
        for polygon in geometry:
            add_feature(layer, polygon, area_km2=area_km2(ogr.ForceToMultiPolygon(polygon.Clone())))
    del layer, target


def write_places(countries):
    """A point inside each country, for clients to edit."""
    os.environ["OGR_CURRENT_DATE"] = "2020-01-01T00:00:00.000Z"
    fields = [("name", ogr.OFTString), ("iso_n3", ogr.OFTString), ("rank", ogr.OFTInteger), ("note", ogr.OFTString), ("visited", ogr.OFTDate)]
    target, layer = create_layer("GPKG", "places", ogr.wkbPoint, fields)
    by_area = sorted(countries, key=lambda country: (-area_km2(country[2]), country[1]))
    target.StartTransaction()
    for rank, (iso, name, geometry) in enumerate(by_area, 1):
        add_feature(layer, geometry.PointOnSurface(), name=name, iso_n3=iso, rank=rank, visited="2020-%02d-%02d" % (rank % 12 + 1, rank % 28 + 1))
    target.CommitTransaction()
    del layer, target


def write_coast_distance(path):
    """Kilometres to the nearest coast; negative on land."""
    width, height = 720, 360
    step = 360 / width
    land = gdal.GetDriverByName("MEM").Create("", width, height, 1, gdal.GDT_Byte)
    land.SetGeoTransform((-180, step, 0, 90, 0, -step))
    land.SetProjection(lon_lat().ExportToWkt())
    polygons = ogr.GetDriverByName("Memory").CreateDataSource("")
    layer = polygons.CreateLayer("land", lon_lat())
    for _, _, geometry in read_polygons(path, "land"):
        add_feature(layer, geometry)
    gdal.RasterizeLayer(land, [1], layer, burn_values=[1])
    is_land = land.ReadAsArray().astype(bool)

    lon = numpy.radians(-180 + step * (numpy.arange(width) + 0.5))
    lat = numpy.radians(90 - step * (numpy.arange(height) + 0.5))
    lat, lon = numpy.meshgrid(lat, lon, indexing="ij")
    on_sphere = numpy.stack([numpy.cos(lat) * numpy.cos(lon), numpy.cos(lat) * numpy.sin(lon), numpy.sin(lat)], axis=-1)
    on_sphere = on_sphere.astype(numpy.float32)
    differs = (is_land != numpy.roll(is_land, 1, axis=1)) | (is_land != numpy.roll(is_land, -1, axis=1))
    differs[1:] |= is_land[1:] != is_land[:-1]
    differs[:-1] |= is_land[:-1] != is_land[1:]
    coast = on_sphere[differs]
    cosine = numpy.concatenate([(row @ coast.T).max(axis=1) for row in on_sphere])
    distance = EARTH_RADIUS_KM * numpy.arccos(numpy.clip(cosine, -1, 1)).reshape(height, width)
    distance = numpy.where(is_land, -distance, distance)

    options = ["COMPRESS=DEFLATE", "PREDICTOR=2", "TILED=YES"]
    target = gdal.GetDriverByName("GTiff").Create(str(DATA / "coast_distance.tif"), width, height, 1, gdal.GDT_Int16, options)
    target.SetGeoTransform(land.GetGeoTransform())
    target.SetProjection(land.GetProjection())
    target.GetRasterBand(1).WriteArray(numpy.round(distance).astype(numpy.int16))
    # Kept inside, or the first reader writes them beside the file.
    target.GetRasterBand(1).ComputeStatistics(False)
    del target


# --- projects ----------------------------------------------------------------


def start_qgis():
    QgsApplication.setPrefixPath("/usr", True)
    app = QgsApplication([], False)
    app.initQgis()
    # Without this the file names the user who ran the script.
    QgsSettings().setValue("core/projects/anonymize_saved_projects", True)
    return app


def world_project():
    draft = Draft(
        "World",
        "Countries of the world, the distance to the coast, and places that anyone may edit. Made with Natural Earth.",
        crs="EPSG:4326",
    )
    distance = draft.add_raster("coast_distance", "Distance to the coast (km)")
    land = draft.add_vector("land", "fgb", "Land")
    countries = draft.add_vector("countries", "fgb", "Countries")
    places = draft.add_vector("places", "gpkg", "Places")
    style_distance(distance)
    style_land(land)
    style_countries(countries)
    style_places(places)
    draft.group("background", "Background", [land, distance])
    draft.publish_wms()
    draft.publish_wfs([land, countries, places], editable=[places])
    draft.publish_wcs([distance])
    draft.publish_wmts([countries, land, distance])
    add_layout(draft.project, "World")
    return draft


def atlas_project():
    draft = Draft("Atlas", "The same countries in Web Mercator, and a print layout with a page for each.", crs="EPSG:3857")
    countries = draft.add_vector("countries", "fgb", "Countries")
    style_countries(countries)
    draft.publish_wms()
    draft.publish_wfs([countries])
    draft.publish_wmts([countries])
    layout = add_layout(draft.project, "[% \"name\" %]")
    layout.atlas().setCoverageLayer(countries)
    layout.atlas().setEnabled(True)
    layout.itemById("map").setAtlasDriven(True)
    return draft


def broken_project():
    draft = Draft("Broken", "Two good layers and one whose file is missing.", crs="EPSG:4326")
    land = draft.add_vector("land", "fgb", "Land")
    countries = draft.add_vector("countries", "fgb", "Countries")
    style_land(land)
    style_countries(countries)
    lost = draft.add_vector("lost", "fgb", "Lost", missing=True)
    draft.publish_wms()
    draft.publish_wfs([land, countries, lost])
    return draft


class Draft:
    """A project on its way to a file."""

    def __init__(self, title, abstract, crs):
        self.project = QgsProject()
        self.project.setTitle(title)
        self.project.setCrs(QgsCoordinateReferenceSystem(crs))
        self.abstract = abstract
        self.entry = self.project.writeEntry

    def add_vector(self, name, suffix, title, missing=False):
        path = DATA / f"{name}.{suffix}"
        uri = f"{path}|layername={name}" if suffix == "gpkg" else str(path)
        layer = QgsVectorLayer(uri, name, "ogr")
        assert layer.isValid() or missing, path
        return self._add(layer, title)

    def add_raster(self, name, title):
        layer = QgsRasterLayer(str(DATA / f"{name}.tif"), name, "gdal")
        assert layer.isValid(), name
        return self._add(layer, title)

    def _add(self, layer, title):
        layer.setShortName(layer.name())
        layer.setTitle(title)
        layer.setAbstract(f"{title}, from Natural Earth 4.1 (public domain).")
        layer.setKeywordList("Natural Earth")
        layer.setAttribution("Made with Natural Earth")
        layer.setAttributionUrl("https://www.naturalearthdata.com/")
        self.project.addMapLayer(layer, True)
        return layer

    def group(self, name, title, layers):
        root = self.project.layerTreeRoot()
        group = root.addGroup(name)
        group.setCustomProperty("wmsShortName", name)
        group.setCustomProperty("wmsTitle", title)
        for layer in layers:
            node = root.findLayer(layer.id())
            group.addChildNode(node.clone())
            root.removeChildNode(node)

    def publish_wms(self):
        self.project.writeEntryBool("WMSServiceCapabilities", "/", True)
        self.entry("WMSServiceTitle", "/", self.project.title())
        self.entry("WMSServiceAbstract", "/", self.abstract)
        self.entry("WMSRootName", "/", self.project.title().lower())
        self.entry("WMSKeywordList", "/", ["Natural Earth", "example"])
        self.entry("WMSFees", "/", "conditions unknown")
        self.entry("WMSAccessConstraints", "/", "None")
        self.entry("WMSContactOrganization", "/", "qgisserver examples")
        self.entry("WMSOnlineResource", "/", "https://www.naturalearthdata.com/")
        self.entry("WMSCrsList", "/", ["EPSG:4326", "EPSG:3857"])
        self.project.writeEntryBool("WMSAddWktGeometry", "/", True)
        self.entry("WMSMaxAtlasFeatures", "/", 5)

    def publish_wfs(self, layers, editable=()):
        self.entry("WFSLayers", "/", [layer.id() for layer in layers])
        for layer in layers:
            self.entry("WFSLayersPrecision", f"/{layer.id()}", 6)
        for operation in ("Insert", "Update", "Delete"):
            self.entry("WFSTLayers", f"/{operation}", [layer.id() for layer in editable])

    def publish_wcs(self, layers):
        self.entry("WCSLayers", "/", [layer.id() for layer in layers])

    def publish_wmts(self, layers):
        self.project.writeEntryBool("WMTSLayers", "/Project", True)
        self.project.writeEntryBool("WMTSPngLayers", "/Project", True)
        for kind in ("WMTSLayers", "WMTSPngLayers", "WMTSJpegLayers"):
            self.entry(kind, "/Layer", [layer.id() for layer in layers])

    def write_to(self, name):
        """Writes a .qgs next to the data, so that paths are relative, then
        gives it ids that do not change from run to run."""
        extent = [str(edge) for edge in (WORLD.xMinimum(), WORLD.yMinimum(), WORLD.xMaximum(), WORLD.yMaximum())]
        if self.project.crs().authid() == "EPSG:4326":
            self.entry("WMSExtent", "/", extent)
        else:
            self.entry("WMSExtent", "/", ["-20037508", "-20037508", "20037508", "20037508"])
        draft = PROJECTS / "draft.qgs"
        layers = list(self.project.mapLayers().values())
        assert self.project.write(str(draft)), self.project.error()
        text = with_steady_ids(draft.read_text(), [(layer.id(), layer.name()) for layer in layers], name)
        draft.unlink()
        # An atlas keeps the full name of its coverage layer's source.
        text = text.replace(str(PROJECTS), ".")
        assert str(HERE) not in text, "a path of this machine"
        if name.endswith(".qgs"):
            (PROJECTS / name).write_text(text)
        else:
            write_zip(PROJECTS / name, name.replace(".qgz", ".qgs"), text)


def with_steady_ids(text, layers, name):
    # QGIS replaces ids of ten characters and less, and crashes on the layer tree then.
    for layer_id, layer_name in layers:
        text = text.replace(layer_id, f"example_{layer_name}")
    seen = {}

    def steady(match):
        number = seen.setdefault(match.group(), len(seen))
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {number}"))

    text = re.sub(r"[0-9a-f]{8}([-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}", steady, text)
    text = re.sub(r'saveDateTime="[^"]*"', 'saveDateTime=""', text)
    text = re.sub(r"<creation>[^<]*</creation>", "<creation></creation>", text)
    return text


def write_zip(path, member, text):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)


# --- styles ------------------------------------------------------------------


def style_land(layer):
    symbol = QgsFillSymbol.createSimple({"color": "#f4efe2", "outline_color": "#8aa0b0", "outline_width": "0.2"})
    layer.renderer().setSymbol(symbol)


def style_countries(layer):
    symbol = QgsFillSymbol.createSimple({"color": "#e5d8b0", "outline_color": "#7d6f55", "outline_width": "0.2"})
    fill = QgsPropertyCollection()
    colours = "array_get(array('#e8d9b5','#cfe0c3','#f2cfc2','#d5d3e8','#f5e6a8'), \"colour\")"
    fill.setProperty(symbol.symbolLayer(0).PropertyFillColor, QgsProperty.fromExpression(colours))
    symbol.symbolLayer(0).setDataDefinedProperties(fill)
    layer.renderer().setSymbol(symbol)
    add_labels(layer, "name", size=7, colour="#40382a")
    layer.setDisplayExpression('"name"')
    layer.setMapTipTemplate("<b>[% \"name\" %]</b>: [% format_number(\"area_km2\", 0) %] km²")


def style_places(layer):
    symbol = QgsMarkerSymbol.createSimple({"name": "circle", "color": "#b03030", "outline_color": "#ffffff", "size": "1.6"})
    layer.renderer().setSymbol(symbol)
    layer.setDisplayExpression('"name"')


def style_distance(layer):
    ramp = QgsColorRampShader(-2500, 3000, None, QgsColorRampShader.Interpolated)
    stops = [(-2500, "#8c5a2b", "2500 km inland"), (-1, "#f4efe2", "on land"), (0, "#cfe6f2", "at the coast"), (3000, "#1d4e7a", "3000 km at sea")]
    ramp.setColorRampItemList([QgsColorRampShader.ColorRampItem(value, QColor(colour), label) for value, colour, label in stops])
    shader = QgsRasterShader()
    shader.setRasterShaderFunction(ramp)
    renderer = QgsSingleBandPseudoColorRenderer(layer.dataProvider(), 1, shader)
    renderer.setClassificationMin(ramp.minimumValue())
    renderer.setClassificationMax(ramp.maximumValue())
    layer.setRenderer(renderer)


def text_format(size, colour):
    buffer = QgsTextBufferSettings()
    buffer.setEnabled(True)
    buffer.setSize(0.6)
    style = QgsTextFormat()
    style.setFont(QFont(FONT))
    style.setSize(size)
    style.setColor(QColor(colour))
    style.setBuffer(buffer)
    return style


def add_labels(layer, field, size, colour):
    settings = QgsPalLayerSettings()
    settings.fieldName = field
    settings.placement = QgsPalLayerSettings.Horizontal
    settings.setFormat(text_format(size, colour))
    layer.setLabeling(QgsVectorLayerSimpleLabeling(settings))
    layer.setLabelsEnabled(True)


def add_layout(project, title):
    layout = QgsPrintLayout(project)
    layout.initializeDefaults()
    layout.setName("A4")
    millimetres = QgsUnitTypes.LayoutMillimeters

    def place(item, name, x, y, width, height):
        item.setId(name)
        item.attemptMove(QgsLayoutPoint(x, y, millimetres))
        item.attemptResize(QgsLayoutSize(width, height, millimetres))
        layout.addLayoutItem(item)

    def label(name, text, size, *where):
        item = QgsLayoutItemLabel(layout)
        item.setText(text)
        item.setFont(QFont(FONT, size))
        place(item, name, *where)

    picture = QgsLayoutItemMap(layout)
    place(picture, "map", 10, 25, 277, 150)
    picture.setFrameEnabled(True)
    extent = WORLD if project.crs().authid() == "EPSG:4326" else QgsRectangle(-2e7, -1.2e7, 2e7, 1.7e7)
    picture.zoomToExtent(extent)
    label("title", title, 20, 10, 8, 277, 14)
    label("source", "Made with Natural Earth", 8, 220, 198, 67, 6)
    legend = QgsLayoutItemLegend(layout)
    legend.setLinkedMap(picture)
    place(legend, "legend", 12, 120, 60, 50)
    project.layoutManager().addLayout(layout)
    return layout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
