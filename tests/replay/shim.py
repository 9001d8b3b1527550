"""Runs test programs of QGIS with each request sent to a server instead of QgsServer.

    shim.py URL|- MODULE.py RESULTS IMAGES

`-` leaves QgsServer as it is. RESULTS gets one line for each test: its name and `ok`,
`skipped` or why not. QGIS compares images with some that were drawn elsewhere, with other
fonts; here those that come over HTTP are compared with those that QgsServer drew, which
the folder IMAGES keeps.
"""

import importlib.util
import json
import os
import sys
import tempfile
import unittest
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
# As in workers: by it QGIS chooses the colours of images that have 256 of them.
os.environ["QT_HASH_SEED"] = "0"

import numpy
from qgis.core import QgsApplication
from qgis.PyQt.QtGui import QImage
from qgis.server import QgsServer, QgsServerInterface, QgsServerRequest

METHODS = {
    QgsServerRequest.GetMethod: "GET",
    QgsServerRequest.HeadMethod: "HEAD",
    QgsServerRequest.PostMethod: "POST",
    QgsServerRequest.PutMethod: "PUT",
    QgsServerRequest.DeleteMethod: "DELETE",
    QgsServerRequest.PatchMethod: "PATCH",
}

# What every server adds, and QGIS alone does not.
OF_SERVERS = {
    "access-control-allow-origin",
    "cache-control",
    "connection",
    "content-length",
    "date",
    "etag",
    "last-modified",
    "server",
    "transfer-encoding",
    "vary",
    "x-content-type-options",
    "x-map-id",
    "x-request-id",
}

# By these a test says itself where the server is.
OF_PROXIES = {"forwarded", "host", "x-forwarded-host", "x-forwarded-proto"}

# The access control of a test, and what that has for switches. The plugin in access/ has
# the same.
FILTERS = "X-Qgis-Replay-Filters"
SWITCHES = ("_active", "active")

# Some tests ask for a URL without a host.
NOWHERE = "http://replay.invalid"


def plain(pair):
    """MAP without `..`, which a server has no use for."""
    name, _, value = pair.partition("=")
    if name.upper() != "MAP" or ".." not in value:
        return pair
    path = os.path.normpath(urllib.parse.unquote(value))
    return f"{name}={urllib.parse.quote(path)}"


def without_map(query):
    return "&".join(pair for pair in query.split("&") if not pair.upper().startswith("MAP="))


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class Replay:
    """Stands for QgsServer.handleRequest."""

    def __init__(self, server):
        self._server = server
        self.filters = []
        self._open = urllib.request.build_opener(NoRedirects, urllib.request.ProxyHandler({})).open
        self._written = []

    def __call__(self, request, response, project=None):
        asked = urllib.parse.urlsplit(request.url().toString(request.url().FullyEncoded))
        base = f"{asked.scheme}://{asked.netloc}" if asked.netloc else NOWHERE
        before, api, after = asked.path.partition("/wfs3")
        # Where a proxy would have us.
        public = base + before.rstrip("/")
        headers = dict(request.headers())
        project = self._project(asked.query, project)
        query = "&".join(map(plain, asked.query.split("&")))
        if request.originalUrl() != request.url():
            # Of a server in front, which names the project as it likes and keeps it to itself.
            headers["X-Qgis-Forwarded-Url"] = request.originalUrl().toString()
            project = project or dict(urllib.parse.parse_qsl(asked.query)).get("MAP")
            query = without_map(query)
        elif not OF_PROXIES.intersection(map(str.lower, headers)):
            headers["X-Forwarded-Url"] = public
        if project:
            headers["X-Qgis-Project"] = project
        if self.filters:
            headers[FILTERS] = json.dumps(self._switched())
        path = (api + after or "/ows/") + (f"?{query}" if query else "")
        self._send(request, response, path, headers)
        if not api:
            # QGIS's tests have web services at any path.
            here = asked.path if base == NOWHERE else base + asked.path
            self._body = self._body.replace(f"{public}/ows/".encode(), here.encode())

    def _switched(self):
        """The access control of the test, by module and class, and what of it is on."""
        return {
            f"{type(it).__module__}.{type(it).__name__}": {
                name: getattr(it, name) for name in SWITCHES if hasattr(it, name)
            }
            for it in self.filters
        }

    def _project(self, query, project):
        """The project as a file that the server can read, unless the query names it."""
        named = {name.upper() for name, _ in urllib.parse.parse_qsl(query, keep_blank_values=True)}
        if project is not None:
            return self._file(project)
        return None if "MAP" in named else os.environ.get("QGIS_PROJECT_FILE")

    def _file(self, project):
        name = project.fileName()
        if name and not project.isDirty():
            return name
        folder = os.path.dirname(name) if name else tempfile.gettempdir()
        path = os.path.join(folder, f"replay-{os.getpid()}-{len(self._written)}.qgs")
        project.write(path)
        project.setFileName(name)
        self._written += [path, *put_on_disk(project, path)]
        return path

    def tidy(self):
        for path in self._written:
            # Some are in a folder that the test has removed.
            Path(path).unlink(missing_ok=True)

    def _send(self, request, response, path, headers):
        method = METHODS[request.method()]
        data = bytes(request.data() or b"") or None
        question = urllib.request.Request(self._server + path, data, headers, method=method)
        if data is not None and "Content-Type" not in headers:
            kind = "text/xml" if data.lstrip()[:1] == b"<" else "application/x-www-form-urlencoded"
            question.add_header("Content-Type", kind)
        try:
            answer = self._open(question, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        self._body = answer.read()
        response.clear()
        response.setStatusCode(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in OF_SERVERS:
                # Python takes headers for Latin-1.
                response.setHeader(name.title(), value.encode("latin-1").decode())

    def finish(self, request, response):
        response.write(self._body)
        asked = request.url().query() + bytes(request.data() or b"").decode("latin-1")
        is_stream = "GetFeature" in asked and "GetFeatureInfo" not in asked
        if is_stream and response.statusCode() == 200:
            # QGIS does not know how long it will be, and names no length.
            response.flush()
        response.finish()


def put_on_disk(project, path):
    """What layers have in the memory of the test, as files that others can read: which."""
    layers = [it for it in project.mapLayers().values() if it.providerType() == "memory"]
    files = {it.id(): geojson(it, path) for it in layers if it.featureCount()}
    if not files:
        return []
    tree = ElementTree.parse(path)
    for layer in tree.iter("maplayer"):
        file = files.get(layer.findtext("id"))
        if file:
            layer.find("datasource").text = file
            layer.find("provider").text = "ogr"
    tree.write(path, encoding="utf-8", xml_declaration=True)
    return list(files.values())


def geojson(layer, project):
    path = f"{project}-{layer.id()}.geojson"
    names = layer.fields().names()
    features = [
        {
            "type": "Feature",
            "id": it.id(),
            "properties": dict(zip(names, it.attributes())),
            "geometry": json.loads(it.geometry().asJson(17)),
        }
        for it in layer.getFeatures()
    ]
    authority, _, code = layer.crs().authid().partition(":")
    crs = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:{authority}::{code}"}}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"type": "FeatureCollection", "crs": crs, "features": features}, file)
    return path


def replace(server):
    replay = Replay(server)

    def handle(self, request, response, project=None):
        replay(request, response, project)
        replay.finish(request, response)

    QgsServer.handleRequest = handle
    QgsServerInterface.registerAccessControl = lambda _, it, __=0: replay.filters.append(it)
    # Otherwise Python does not see it.
    QgsServer.putenv = staticmethod(os.environ.__setitem__)
    return replay


class OneApplication:
    """Stands for QgsApplication, of which one test makes another: that crashes now and then."""

    def __call__(self, *_):
        return QgsApplication.instance()

    def __getattr__(self, name):
        return getattr(QgsApplication, name)


class Images:
    """Stands for the comparison of the tests."""

    def __init__(self, folder, keep):
        os.makedirs(folder, exist_ok=True)
        self._folder, self._keep = folder, keep
        self._test, self._n = None, 0

    def check(self, test, image, name, max_diff, *_, outputFormat="PNG", **__):
        """As the tests want it: whether no more than ``max_diff`` pixels are others, and a report."""
        if test.id() != self._test:
            self._test, self._n = test.id(), 0
        self._n += 1
        path = os.path.join(self._folder, f"{self._test}-{self._n}")
        # They look for it there.
        file = f"{name}_result.{outputFormat.lower()}"
        with open(os.path.join(tempfile.gettempdir(), file), "wb") as result:
            result.write(image)
        if self._keep:
            with open(path, "wb") as file:
                file.write(image)
            return QImage.fromData(image).width() > 0, "no image"
        one, other = pixels(QImage(path)), pixels(QImage.fromData(image))
        if one.size == 0 or one.shape != other.shape:
            return False, f"another size than {path}"
        n = numpy.count_nonzero(one != other)
        return n <= max_diff, f"{n} pixels are others than in {path}"


# The classes whose tests compare images.
WITH_IMAGES = {
    "test_qgsserver": "QgsServerTestBase",
    "test_qgsserver_accesscontrol": "TestQgsServerAccessControl",
}


def pixels(image):
    image = image.convertToFormat(QImage.Format_ARGB32)
    data = image.constBits().asstring(image.sizeInBytes()) if image.width() else b""
    return numpy.frombuffer(data, numpy.uint32).reshape(image.height(), image.width())


class Lines(unittest.TestResult):
    def __init__(self, file):
        super().__init__()
        self._file = file

    def _line(self, test, text):
        name = test.id().partition(".")[2] or test.id()
        print(name, " ".join(text.split())[-600:], file=self._file, flush=True)

    def addSuccess(self, test):
        self._line(test, "ok")

    addExpectedFailure = lambda self, test, error: self._line(test, "ok")
    addSkip = lambda self, test, reason: self._line(test, "skipped")

    def addError(self, test, error):
        self._line(test, "error " + self._exc_info_to_string(error, test))

    addFailure = addError


def main(server, module, results, images):
    replay = None if server == "-" else replace(server)
    folder, name = os.path.split(os.path.abspath(module))
    sys.path.insert(0, folder)
    name = name.removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, module)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    loaded.QgsApplication = OneApplication()
    pictures = Images(images, server == "-")
    for module, base in WITH_IMAGES.items():
        base = getattr(sys.modules.get(module), base, None)
        if base is not None:
            base._img_diff = lambda test, *words, **named: pictures.check(test, *words, **named)
    tests = unittest.defaultTestLoader.loadTestsFromModule(loaded)
    with open(results, "w", encoding="utf-8") as file:
        tests.run(Lines(file))
        print("end", file=file, flush=True)
    if replay:
        replay.tidy()
    # QGIS tidies up at length and in vain.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
