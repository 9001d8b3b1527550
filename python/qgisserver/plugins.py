"""Find and load QGIS server plugins. A plugin that does not load is reported and left out."""

import configparser
import functools
import importlib
import os
import sys
import traceback


HOOKS = (
    "requestReady",
    "sendResponse",
    "responseComplete",
    "onRequestReady",
    "onProjectReady",
    "onSendResponse",
    "onResponseComplete",
)


def watch_filters(interface, recorder):
    """Tell ``recorder`` when a filter raises, which QGIS swallows before it goes on.

    Returns how many filters plugins registered; QGIS has some of its own.
    """
    filters = [found for found in _filters(interface) if _is_python(type(found))]
    for server_filter in filters:
        for name in HOOKS:
            # Only what a plugin wrote: PyQt looks for overrides on the instance first.
            if any(name in vars(kind) for kind in type(server_filter).__mro__ if _is_python(kind)):
                watched = _watched(getattr(server_filter, name), recorder)
                setattr(server_filter, name, watched)
    return len(filters)


def _filters(interface):
    for found in interface.filters().values():
        yield from found if isinstance(found, list) else [found]


def _is_python(kind):
    return not kind.__module__.startswith(("qgis._", "sip", "PyQt5.sip", "builtins"))


def _watched(method, recorder):
    @functools.wraps(method)
    def call(*args):
        try:
            return method(*args)
        except BaseException:
            recorder(*sys.exc_info())
            raise

    return call


def load(paths, interface, log):
    """Load every server plugin below ``paths``.

    Returns ``(loaded, failed)``: names, and names with their tracebacks.
    """
    loaded, failed = [], {}
    for path in paths:
        if not os.path.isdir(path):
            log("warning", "plugins", f"{path} is not a folder: no plugins from there")
            continue
        if path not in sys.path:
            sys.path.append(path)
        for name in sorted(os.listdir(path)):
            metadata = _metadata(os.path.join(path, name))
            if metadata is None or name in loaded or name in failed:
                continue
            try:
                _check_version(metadata)
                _start(name, interface)
                loaded.append(name)
            except BaseException:  # a plugin may even call sys.exit()
                failed[name] = traceback.format_exc()
                log("error", "plugins", f"plugin {name} does not load\n{failed[name]}")
    return loaded, failed


def _metadata(folder):
    """The ``[general]`` section of a server plugin's metadata.txt; None if it is not one."""
    path = os.path.join(folder, "metadata.txt")
    if not os.path.isfile(path) or not os.path.isfile(os.path.join(folder, "__init__.py")):
        return None
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
        is_server = parser.getboolean("general", "server", fallback=False)
    except (configparser.Error, ValueError, UnicodeError):
        return None
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
    package.serverClassFactory(interface)
