"""Handlers of projects that operators bring: classes written for py-qgis-server or QJazz.

Such a class is found by its contract id, ``@3liz.org/cache/protocol-handler;1?scheme=…``,
in a registry that it imports by the name of its server's package. Where that package is
installed it is used; otherwise modules of the same names with what handlers need stand in.
"""

import importlib
import logging
import sys
import time
import types
from configparser import ConfigParser
from dataclasses import dataclass
from datetime import datetime, timezone
from urllib.parse import SplitResult, unquote, urlparse, urlsplit

from . import models, projects

CONTRACT = "@3liz.org/cache/protocol-handler;1?scheme="
ENTRY_POINTS = "qgssrv_contrib_protocol_handler"
decoded = unquote

_BUILT_IN = {"file", "postgresql", "geopackage", "s3"}
_REGISTRIES = ("pyqgisservercontrib.core.componentmanager", "qjazz_contrib.core.componentmanager")
_log = None
_handlers = {}

# How the project that a handler reads just now is to be loaded, and what
# ``projects.load`` said of it besides; a handler that reads by itself says nothing.
_NOTHING = ([], [])
_flags = (True, False, False, True)
_said = _NOTHING


def log(level, tag, text):
    if _log:
        _log(level, tag, text)


def setup(handlers, schemes, options, flags, sink):
    """See ``storages.setup``. What does not load is reported, and its scheme has no handler."""
    global _log, _flags
    _log, _flags = sink, flags
    wanted = set(schemes) - _BUILT_IN
    if not wanted and not handlers:
        return
    service = _config(options)
    _install(service)
    logging.getLogger("SRVLOG").addHandler(_Relay())
    _register("@3liz.org/config-service;1", service)
    _register("@3liz.org/cache-manager;1", _CacheManager())
    for scheme, (name, config) in handlers.items():
        try:
            _handlers[scheme] = _adapted(_made(name, config))
        except Exception as error:  # noqa: BLE001
            log("error", "Handlers", f"{name} for {scheme} does not load: {error!r}")
    _load_entry_points()


def handler(scheme):
    """What looks for and reads projects of ``scheme``, or None."""
    scheme = scheme.replace("-", "_")
    if scheme not in _handlers and scheme not in _BUILT_IN:
        found = _registered(scheme)
        if found is None:
            return None
        _handlers[scheme] = _adapted(found)
    return _handlers.get(scheme)


def _made(name, config):
    module, _, name = name.replace(":", ".").rpartition(".")
    return models.made(getattr(importlib.import_module(module), name), config)


def _load_entry_points():
    from importlib import metadata

    for point in metadata.entry_points().select(group=ENTRY_POINTS):
        try:
            point.load()()
        except Exception as error:  # noqa: BLE001
            log("error", "Handlers", f"entry point {point.name} does not load: {error!r}")


def _registered(scheme):
    for name in _REGISTRIES:
        registry = sys.modules.get(name)
        if registry is None:
            continue
        # The settings have no dashes, and handlers may.
        for spelling in (scheme, scheme.replace("_", "-")):
            try:
                return registry.get_service(CONTRACT + spelling)
            except Exception as error:  # noqa: BLE001
                if type(error).__name__ != "FactoryNotFoundError":
                    raise
    return None


def _adapted(found):
    return (_FromQjazz if hasattr(found, "project_metadata") else _FromPyQgisServer)(found)


def _load(uri, flags):
    global _said
    project, *_said = projects.load(str(uri), *flags)
    return project


def _taken(flags, read):
    """What ``read`` returns, in the words of ``projects.load``."""
    global _flags, _said
    _flags, _said = flags, _NOTHING
    project = read()
    return (project, *_said)


class _FromPyQgisServer:
    """``get_modified_time(url)`` and ``get_project(url)``, which may raise FileNotFoundError."""

    def __init__(self, handler):
        self._handler = handler

    def look(self, uri):
        try:
            modified = self._handler.get_modified_time(urlparse(uri))
        except FileNotFoundError:
            return None
        except (ConnectionError, TimeoutError) as error:
            raise _away(error) from None
        return modified.isoformat(), _seconds(modified)

    def read(self, uri, flags):
        try:
            return _taken(flags, lambda: self._handler.get_project(urlparse(uri))[0])
        except FileNotFoundError:
            raise _missing() from None
        except (ConnectionError, TimeoutError) as error:
            raise _away(error) from None
        except _CacheManager.UnreadableResourceError as error:
            raise projects.Unreadable(str(error)) from None


class _FromQjazz:
    """``project_metadata(url)`` and ``project(metadata, config)``."""

    def __init__(self, handler):
        self._handler = handler

    def look(self, uri):
        found = self._metadata(uri)
        return found and (repr(found.last_modified), max(0, int(found.last_modified or 0)))

    def read(self, uri, flags):
        found = self._metadata(uri)
        if found is None:
            raise _missing()
        return _taken(flags, lambda: self._handler.project(found, LoaderConfig(flags)))

    def _metadata(self, uri):
        try:
            return self._handler.project_metadata(urlsplit(uri))
        except FileNotFoundError:
            return None
        except (ConnectionError, TimeoutError) as error:
            raise _away(error) from None


def _away(error):
    from .storages import Away

    return Away(str(error) or type(error).__name__)


def _missing():
    from .storages import Missing

    return Missing("its handler does not find it any more")


def _seconds(modified):
    if modified.tzinfo is None:
        return max(0, int(time.mktime(modified.timetuple())))
    return max(0, int(modified.astimezone(timezone.utc).timestamp()))


# What handlers find under the names of their servers' packages.


class StrictCheckingError(projects.BadLayers):
    pass


class PathNotAllowedError(FileNotFoundError):
    pass


class UnreadableResourceError(projects.Unreadable):
    pass


class _CacheManager:
    """What handlers ask to read a project for them."""

    StrictCheckingError = StrictCheckingError
    PathNotAllowedError = PathNotAllowedError
    UnreadableResourceError = UnreadableResourceError

    def read_project(self, uri, strict=None):
        return _load(uri, _flags if strict is None else (strict, *_flags[1:]))

    @property
    def strict_mode_on(self):
        return _flags[0]

    @property
    def trust_mode_on(self):
        return _flags[1]


class LoaderConfig:
    """How QJazz wants to hear the rules for reading a project."""

    def __init__(self, flags):
        strict, trust, no_layouts, read_only = flags[:4]
        self.ignore_bad_layers = not strict
        self.trust_layer_metadata = trust
        self.disable_getprint = no_layouts
        self.force_readonly_layers = read_only
        self.dont_resolve_layers = False
        self.disable_advertised_urls = False


def load_project_from_uri(uri, config):
    """As QJazz calls it."""
    flags = (
        not config.ignore_bad_layers,
        config.trust_layer_metadata,
        config.disable_getprint,
        config.force_readonly_layers,
    )
    return _load(uri, (*flags, *_flags[4:]))


@dataclass(frozen=True)
class ProjectMetadata:
    uri: str
    name: str
    scheme: str
    storage: str
    last_modified: float


class ProtocolHandler:
    """A base for handlers; says nothing of its own."""

    def validate_rooturl(self, rooturl, config=None, is_dynamic=False):
        pass

    def resolve_uri(self, url):
        return url.geturl()

    def public_path(self, url, location, rooturl):
        return str(url)

    def projects(self, url):
        return iter(())


class ComponentManagerError(Exception):
    pass


class FactoryNotFoundError(ComponentManagerError):
    pass


class NoRegisteredFactoryError(ComponentManagerError):
    pass


class EntryPointNotFoundError(ComponentManagerError):
    pass


class ComponentManager:
    """Objects by the id of the contract that they keep."""

    def __init__(self):
        self._made = {}
        self._factories = {}

    def register_factory(self, contract, factory):
        if not callable(factory):
            raise ValueError("a factory is callable")
        self._made.pop(contract, None)
        self._factories[contract] = factory

    def register_service(self, contract, service):
        self._made[contract] = service

    def create_instance(self, contract):
        if contract in self._factories:
            return self._factories[contract]()
        raise (NoRegisteredFactoryError if contract in self._made else FactoryNotFoundError)(contract)

    def get_service(self, contract):
        if contract not in self._made:
            self._made[contract] = self.create_instance(contract)
        return self._made[contract]

    def register_entrypoints(self, group, *args, **kwargs):
        from importlib import metadata

        for point in metadata.entry_points().select(group=group):
            point.load()(*args, **kwargs)

    def load_entrypoint(self, group, name):
        from importlib import metadata

        for point in metadata.entry_points().select(group=group, name=name):
            return point.load()
        raise EntryPointNotFoundError(name)


def _registry():
    manager = ComponentManager()

    def decorator(register):
        def of(contract):
            def keep(thing):
                register(contract, thing)
                return thing

            return keep

        return of

    return {
        "gComponentManager": manager,
        "ComponentManager": ComponentManager,
        "ComponentManagerError": ComponentManagerError,
        "FactoryNotFoundError": FactoryNotFoundError,
        "NoRegisteredFactoryError": NoRegisteredFactoryError,
        "EntryPointNotFoundError": EntryPointNotFoundError,
        "get_service": manager.get_service,
        "create_instance": manager.create_instance,
        "register_entrypoints": manager.register_entrypoints,
        "load_entrypoint": manager.load_entrypoint,
        "register_factory": decorator(manager.register_factory),
        "register_service": decorator(manager.register_service),
    }


def _logger():
    def say(level):
        return lambda text, *args: log(level, "Handlers", str(text) % args if args else str(text))

    same = {name: say(name) for name in ("debug", "info", "warning", "error")}
    return {**same, "trace": say("debug"), "notice": say("info"), "critical": say("error")}


class _Relay(logging.Handler):
    """py-qgis-server's handlers write to the logger SRVLOG."""

    def emit(self, record):
        levels = ((logging.ERROR, "error"), (logging.WARNING, "warning"), (logging.NOTSET, "debug"))
        level = next(name for number, name in levels if record.levelno >= number)
        log(level, "Handlers", record.getMessage())


def _config(options):
    parser = ConfigParser(interpolation=None)
    parser.read_dict({"projects.cache": options})
    return parser


def _register(contract, service):
    """Where nobody did so before."""
    for name in _REGISTRIES:
        registry = sys.modules[name]
        try:
            registry.get_service(contract)
        except Exception:  # noqa: BLE001
            registry.gComponentManager.register_service(contract, service)


def _install(config):
    registry = _registry()
    exceptions = {
        "StrictCheckingError": StrictCheckingError,
        "PathNotAllowedError": PathNotAllowedError,
        "UnreadableResourceError": UnreadableResourceError,
    }
    errors = {
        "InvalidCacheRootUrl": type("InvalidCacheRootUrl", (Exception,), {}),
        "ResourceNotAllowed": PathNotAllowedError,
        "StrictCheckingFailure": StrictCheckingError,
        "UnreadableResource": UnreadableResourceError,
    }
    common = {"ProjectMetadata": ProjectMetadata, "ProtocolHandler": ProtocolHandler, "Url": SplitResult}
    storage = {"load_project_from_uri": load_project_from_uri, "ProjectLoaderConfig": LoaderConfig}
    modules = {
        "pyqgisservercontrib.core.componentmanager": registry,
        "pyqgisserver.config": {"confservice": config},
        "pyqgisserver.qgscache.cachemanager": exceptions,
        "pyqgisserver.qgscache.handlers.proto": {"ProtocolHandler": ProtocolHandler},
        "qjazz_contrib.core.componentmanager": registry,
        "qjazz_contrib.core.logger": _logger(),
        "qjazz_contrib.core.config": models.offered(),
        "qjazz_cache.common": common,
        "qjazz_cache.errors": errors,
        "qjazz_cache.storage": storage,
        "qjazz_cache.prelude": {**common, **storage, "ProjectsConfig": LoaderConfig},
    }
    for name, names in modules.items():
        try:
            importlib.import_module(name)
        except ImportError:
            _stand_in(name, names)


def _stand_in(name, names):
    package, _, short = name.rpartition(".")
    if package and package not in sys.modules:
        _stand_in(package, {"__path__": []})
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    if package:
        setattr(sys.modules[package], short, module)
