"""Find and load QGIS server plugins. A plugin that does not load is reported and left out."""

import configparser
import functools
import importlib
import inspect
import os
import sys
import threading
import traceback


# What QGIS calls in classes of plugins, and goes on when it raises.
WATCHED = {
    "QgsServerFilter": (
        "requestReady",
        "sendResponse",
        "responseComplete",
        "onRequestReady",
        "onProjectReady",
        "onSendResponse",
        "onResponseComplete",
    ),
    "QgsAccessControlFilter": (
        "layerPermissions",
        "layerFilterExpression",
        "layerFilterSubsetString",
        "authorizedLayerAttributes",
        "allowToEdit",
        "cacheKey",
    ),
    "QgsService": ("executeRequest",),
}


def count_filters(interface):
    """How many server filters plugins registered; QGIS has some of its own."""
    return sum(_is_python(type(found)) for found in _filters(interface))


def _filters(interface):
    for found in interface.filters().values():
        yield from found if isinstance(found, list) else [found]


def watch(recorder):
    """Tell ``recorder`` when what a plugin wrote raises, whatever hook Python has by then.

    PyQt looks for overrides in the classes, so that is where we stand, too.
    """
    import qgis.server

    running = set()
    for base, names in WATCHED.items():
        for kind in _subclasses(getattr(qgis.server, base, None)):
            for name in names:
                method = _override(kind, name)
                if inspect.isfunction(method) and not hasattr(method, "_is_watched"):
                    setattr(kind, name, _watched(method, name, recorder, running))


def _subclasses(kind):
    for below in kind.__subclasses__() if kind else ():
        yield below
        yield from _subclasses(below)


def _override(kind, name):
    """What a plugin wrote for ``name``, be it in a class that QGIS does not know."""
    for owner in kind.__mro__:
        if name in vars(owner):
            return vars(owner)[name] if _is_python(owner) else None
    return None


def _is_python(kind):
    name = kind.__module__
    return name not in ("sip", "PyQt5.sip", "PyQt6.sip", "builtins") and not name.startswith("qgis._")


def _watched(method, name, recorder, running):
    @functools.wraps(method)
    def call(self, *args, **named):
        # An override may call the one that it overrides, and catch what that raises.
        key = id(self), name, threading.get_ident()
        if key in running:
            return method(self, *args, **named)
        running.add(key)
        try:
            return method(self, *args, **named)
        except BaseException:
            recorder(*sys.exc_info())
            raise
        finally:
            running.discard(key)

    call._is_watched = True
    return call


# What serverClassFactory of each plugin returned. Many plugins keep their filters
# there and nowhere else, and QGIS does not own what it was given.
started = {}


def load(paths, interface, log):
    """Load every server plugin below ``paths``.

    Returns ``(loaded, failed)``: names, and names with their tracebacks.
    """
    failed = {}
    for path in paths:
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            log("warning", "plugins", f"no plugins from {path}: {error.strerror}")
            continue
        if path not in sys.path:
            sys.path.append(path)
        for name in names:
            if name in started or name in failed:
                continue
            try:
                metadata = _metadata(os.path.join(path, name))
                if metadata is not None:
                    _check_version(metadata)
                    started[name] = _start(name, interface)
            except BaseException:  # a plugin may even call sys.exit()
                failed[name] = traceback.format_exc()
                log("error", "plugins", f"plugin {name} does not load\n{failed[name]}")
    return list(started), failed


def _metadata(folder):
    """The ``[general]`` section of a server plugin's metadata.txt; None if it is not one."""
    path = os.path.join(folder, "metadata.txt")
    if not os.path.isfile(path) or not os.path.isfile(os.path.join(folder, "__init__.py")):
        return None
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    with open(path, encoding="utf-8") as file:
        parser.read_file(file)
    is_server = parser.getboolean("general", "server", fallback=False)
    return parser["general"] if is_server else None


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


def _start(name, interface):
    package = importlib.import_module(name)
    # Plugins written for py-qgis-server look for this mark.
    package._is_py_qgis_server = True
    _tell_utils(interface)
    plugin = package.serverClassFactory(interface)
    _tell_utils(interface)
    return plugin


def _tell_utils(interface):
    """Plugins may look for the interface in ``qgis.utils``, which costs 25 MB: only where one imports it."""
    utils = sys.modules.get("qgis.utils")
    if utils is not None:
        utils.serverIface = interface
