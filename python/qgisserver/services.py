"""Services as the first proposal for server plugins had them.

Such a plugin says in its metadata.txt which SERVICE it is and which REQUESTs it answers,
and has a class with a static method for each of them::

    [general]
    service=HELLO
    methods=GetCapabilities,SayHello

    class Hello:
        @staticmethod
        def SayHello(project_path, parameters):
            print("Hello")
            return "text/plain"

What a method prints is the body, what it returns the content type. It can be called
without a project, and nothing that is not listed can be called at all.
"""

import contextlib
import importlib
import inspect
import io
import pkgutil

from qgis.server import QgsService

# Services of QGIS itself, which no plugin takes away.
TAKEN = {"WMS", "WFS", "WCS", "WMTS"}

UNSUPPORTED = """<?xml version="1.0" encoding="UTF-8"?>
<ServiceExceptionReport version="1.3.0" xmlns="http://www.opengis.net/ogc">
 <ServiceException code="OperationNotSupported">Request {request} is not supported by {service}</ServiceException>
</ServiceExceptionReport>
"""

# By name.
offered = {}


def is_offered(metadata):
    """Whether a plugin is one of these; with a ``server=True`` it is one of QGIS."""
    is_server = metadata.get("server", "no").strip().lower() in ("yes", "true", "on", "1")
    return not is_server and bool(metadata.get("service", "").strip())


def adapt(package, metadata, interface):
    """Register the service of ``package``; what is returned must be kept."""
    name = metadata["service"].strip()
    methods = [method.strip() for method in metadata.get("methods", "").split(",") if method.strip()]
    if not methods:
        raise RuntimeError("metadata.txt lists no methods")
    if name.upper() in TAKEN or name in offered:
        raise RuntimeError(f"there is a service {name} already")
    service = Service(name, _functions(package, methods))
    interface.serviceRegistry().registerService(service)
    offered[name] = service
    return service


def _functions(package, methods):
    """The static methods of the first class that has them all."""
    for kind in _classes(package):
        found = {method: inspect.getattr_static(kind, method, None) for method in methods}
        if all(isinstance(it, staticmethod) for it in found.values()):
            return {method: it.__func__ for method, it in found.items()}
    raise RuntimeError(f"no class has the static methods {', '.join(methods)}")


def _classes(package):
    """Classes of the package itself, then of the module that has its name, then of others."""
    own = package.__name__
    yield from _classes_of(package, own)
    modules = [it.name for it in pkgutil.iter_modules(package.__path__) if not it.ispkg]
    modules.sort(key=lambda name: name.lower() != own.lower())
    for name in modules:
        yield from _classes_of(importlib.import_module(f"{own}.{name}"), own)


def _classes_of(module, own):
    for kind in vars(module).values():
        if inspect.isclass(kind) and kind.__module__.split(".")[0] == own:
            yield kind


class Service(QgsService):
    """One of them, as QGIS calls it."""

    def __init__(self, name, functions):
        super().__init__()
        self._name = name
        self._functions = functions

    def name(self):
        return self._name

    def version(self):
        return "1.0"

    def executeRequest(self, request, response, project):
        parameters = dict(request.parameters())
        function = self._functions.get(parameters.get("REQUEST", ""))
        if function is None:
            return self._refuse(parameters.get("REQUEST", ""), response)
        said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        with contextlib.redirect_stdout(said):
            kind = function(project.fileName() if project else "", parameters)
        response.setHeader("Content-Type", kind or "text/plain")
        response.write(said.buffer.getvalue())

    def _refuse(self, request, response):
        shown = "".join(c for c in request[:64] if c.isalnum() or c in "_-.")
        response.setStatusCode(501)
        response.setHeader("Content-Type", "text/xml; charset=utf-8")
        response.write(UNSUPPORTED.format(request=shown, service=self._name))
