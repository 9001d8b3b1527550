"""Find and load QGIS server plugins. A plugin that does not load is reported and left out."""

import configparser
import importlib
import os
import sys
import traceback

from qgisserver import services, watching


def count_filters(interface):
    """How many server filters plugins registered; QGIS has some of its own."""
    return sum(watching.is_python(type(found)) for found in _filters(interface))


def _filters(interface):
    for found in interface.filters().values():
        yield from found if isinstance(found, list) else [found]


# What serverClassFactory of each plugin returned. Many plugins keep their filters
# there and nowhere else, and QGIS does not own what it was given.
started = {}

# The APIs that plugins registered, enabled or not: QGIS asks them all.
apis = []

# What is told of a plugin, besides its name and its path.
TOLD = (
    "name",
    "version",
    "description",
    "author",
    "homepage",
    "repository",
    "tracker",
    "qgisMinimumVersion",
    "qgisMaximumVersion",
    "experimental",
    "deprecated",
    "server",
    "service",
    "methods",
)

# Of a text and of a traceback that is told.
TEXT_MAX = 500
TRACE_MAX = 4000


def load(paths, wanted, interface, log):
    """Load the server plugins below ``paths`` that are in ``wanted``, all if that is empty.

    Returns a report for each: ``{"name": …, "path": …, "status": "loaded", "conflict" or
    "failed", "metadata": {…}, "error": None or why not}``.
    """
    reports, names = [], {}
    _notice_apis()
    for path in paths:
        try:
            folders = sorted(os.listdir(path))
        except OSError as error:
            log("warning", "plugins", f"no plugins from {path}: {error.strerror}")
            continue
        if path not in sys.path:
            sys.path.append(path)
        for name in folders:
            report = _try(os.path.join(path, name), name, wanted, names, interface)
            if report is not None:
                reports.append(report)
                _tell(report, log)
    found = {known for report in reports for known in (report["name"], report["metadata"].get("name"))}
    for name in wanted:
        if name not in found:
            report = _report(name, "", "failed", {}, "there is no such plugin in server.pluginpath")
            reports.append(report)
            _tell(report, log)
    return reports


def _notice_apis():
    """From now on ``apis`` has what is registered."""
    import qgis.server

    registry = getattr(qgis.server, "QgsServiceRegistry", None)
    if registry is None:
        return
    register = registry.registerApi

    def registerApi(self, api):
        apis.append(api)
        return register(self, api)

    registry.registerApi = registerApi


def _try(folder, name, wanted, names, interface):
    """What became of the plugin in ``folder``; None if there is none that is wanted.

    ``names`` are those of plugins so far, with their folders.
    """
    metadata = {}
    try:
        metadata = _metadata(folder)
        if metadata is None:
            return None
        title = metadata.get("name", name)
        if wanted and name not in wanted and title not in wanted:
            return None
        first = names.get(name) or names.get(title)
        if first is not None:
            return _report(name, folder, "conflict", metadata, f"{first} has the same name and comes first")
        names[name] = names[title] = folder
        _check_version(metadata)
        started[name] = _start(name, folder, metadata, interface)
        return _report(name, folder, "loaded", metadata, None)
    except BaseException:  # a plugin may even call sys.exit()
        if wanted and not metadata and name not in wanted:
            return None
        return _report(name, folder, "failed", metadata or {}, traceback.format_exc())


def _report(name, folder, status, metadata, error):
    told = {key: metadata[key][:TEXT_MAX] for key in TOLD if metadata.get(key)}
    # The end of a traceback says what happened.
    error = error and error[-TRACE_MAX:]
    return {"name": name, "path": folder, "status": status, "metadata": told, "error": error}


def _tell(report, log):
    name, error = report["name"], report["error"]
    if report["status"] == "conflict":
        log("warning", "plugins", f"plugin {name} of {report['path']} is left out: {error}")
    elif report["status"] == "failed":
        log("error", "plugins", f"plugin {name} does not load\n{error}")


def _metadata(folder):
    """The ``[general]`` section of a server plugin's metadata.txt; None if it is not one."""
    path = os.path.join(folder, "metadata.txt")
    if not os.path.isfile(path) or not os.path.isfile(os.path.join(folder, "__init__.py")):
        return None
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    # Keys as they are written: they are shown.
    parser.optionxform = str
    with open(path, encoding="utf-8-sig") as file:
        parser.read_file(file)
    if not parser.has_section("general"):
        return None
    metadata = parser["general"]
    is_server = parser.getboolean("general", "server", fallback=False)
    return dict(metadata) if is_server or services.is_offered(metadata) else None


def _check_version(metadata):
    from qgis.core import Qgis

    running = Qgis.QGIS_VERSION_INT // 100
    least = _version(metadata.get("qgisMinimumVersion", "3"))
    most = _version(metadata.get("qgisMaximumVersion", "3.99"))
    if not least <= running <= most:
        raise RuntimeError(f"wants QGIS {least / 100:.2f} to {most / 100:.2f}, this is {running / 100:.2f}")


def _version(text):
    """``3.22.1`` → 322; ``3`` → 300."""
    major, _, rest = text.strip().partition(".")
    return int(major) * 100 + min(int(rest.partition(".")[0] or 0), 99)


def _start(name, folder, metadata, interface):
    package = importlib.import_module(name)
    where = os.path.dirname(os.path.realpath(getattr(package, "__file__", None) or ""))
    if where != os.path.realpath(folder):
        raise RuntimeError(f"another module has the name {name}: {where}")
    # Plugins written for other servers look for these marks.
    package._is_py_qgis_server = True
    package._is_qjazz_server = True
    _tell_utils(interface)
    if services.is_offered(metadata):
        plugin = services.adapt(package, metadata, interface)
    else:
        plugin = package.serverClassFactory(interface)
    _tell_utils(interface)
    return plugin


def author(trace, asked=None):
    """The plugin in whose code an exception came up, or whose object was ``asked``."""
    modules = [type(asked).__module__]
    while trace is not None:
        modules.append(trace.tb_frame.f_globals.get("__name__") or "")
        trace = trace.tb_next
    names = (module.partition(".")[0] for module in reversed(modules))
    return next((name for name in names if name in started), None)


def _tell_utils(interface):
    """Plugins may look for the interface in ``qgis.utils``, which costs 25 MB: only where one imports it."""
    utils = sys.modules.get("qgis.utils")
    if utils is not None:
        utils.serverIface = interface
