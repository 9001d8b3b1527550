"""The modules that filters written for py-qgis-server import.

They are ours, with those names: a filter finds decorators, its settings and the class of
exceptions that it raises, whether or not the package that it was written for is installed.
"""

import collections.abc
import configparser
import http.client
import importlib.metadata
import os
import re
import sys
import time
import types

CONFIG = "@3liz.org/config-service;1"


class PolicyFilter:
    """A function that looks at requests whose path begins with ``match``, and puts ``repl`` there."""

    def __init__(self, function, match=None, repl=None, pri=0, takes_handler=False):
        self.fn = function
        self.pri = pri
        # As py-qgis-server does: a profile has one policy, whichever case a client writes it in.
        self._pattern = re.compile(match, re.IGNORECASE) if isinstance(match, str) else match
        self._repl = repl
        self._takes_handler = takes_handler

    def __repr__(self):
        pattern = self._pattern.pattern if self._pattern else "everything"
        return f"{getattr(self.fn, '__name__', self.fn)} for {pattern}"

    def match(self, path):
        """``(match, path)``: None if it is not about this path, and the path as it is from now on."""
        if self._pattern is None:
            return True, path
        found = self._pattern.match(path)
        if found and self._repl:
            path = found.expand(self._repl) + path[found.end() :]
        return found, path

    def apply(self, request, found):
        """Raises if the request is refused."""
        if self._takes_handler:
            outcome = self.fn(Handler(request))
        else:
            groups, named = _groups(found)
            outcome = self.fn(request, *groups, **named)
        if isinstance(outcome, collections.abc.Coroutine):
            # It takes 40 ms to import, which few handlers are worth.
            import asyncio

            asyncio.run(outcome)


def _groups(found):
    """The groups of a match as arguments: those that have names, or all if none has one."""
    if not isinstance(found, re.Match):
        return (), {}
    return ((), found.groupdict()) if found.re.groupindex else (found.groups(), {})


class Handler:
    """What older filters get instead of a request."""

    def __init__(self, request):
        self.request = request
        self.path_kwargs = {}

    def get_arguments(self, name, strip=True):
        values = [value.decode("utf-8", "replace") for value in self.request.arguments.get(name, [])]
        return [value.strip() for value in values] if strip else values

    def get_argument(self, name, default=None, strip=True):
        values = self.get_arguments(name, strip)
        return values[-1] if values else default

    get_query_argument = get_argument

    def send_error(self, status_code=500, reason=None, **_):
        raise HTTPError(status_code, reason=reason)


def policy_filter(match=None, repl=None, **_):
    return lambda function: PolicyFilter(function, match, repl)


def blockingfilter(pri=0, uri=""):
    match = re.escape(uri) if uri else None
    return lambda function: PolicyFilter(function, match, None, pri, takes_handler=True)


class HTTPError(Exception):
    """A refusal with a status."""

    def __init__(self, status_code=500, log_message=None, *args, reason=None, **_):
        super().__init__(log_message or reason or status_code)
        self.status_code = status_code
        self.log_message = log_message
        self.args = args
        self.reason = reason

    def __str__(self):
        return f"HTTP {self.status_code}: {self.reason or http.client.responses.get(self.status_code, 'Unknown')}"


class Config(configparser.ConfigParser):
    """Settings by section, as filters read them."""

    def __init__(self, sections):
        super().__init__(interpolation=None)
        self.optionxform = str
        self.read_dict(sections)

    def add_section(self, section):
        if not self.has_section(section):
            super().add_section(section)

    # The fallback may be the third argument.
    def get(self, section, option, *fallback, **named):
        return super().get(section, option, **_with_fallback(fallback, named))

    def getboolean(self, section, option, *fallback, **named):
        return super().getboolean(section, option, **_with_fallback(fallback, named))

    def getint(self, section, option, *fallback, **named):
        return super().getint(section, option, **_with_fallback(fallback, named))


def _with_fallback(fallback, named):
    return {**named, "fallback": fallback[0]} if fallback else named


class FactoryNotFoundError(LookupError):
    """Nobody registered what is asked for."""


class EntryPointNotFoundError(LookupError):
    """No package has it."""


class Components:
    """Objects and what makes them, by the names that others know them by."""

    def __init__(self):
        self._factories, self._services = {}, {}

    def register_entrypoints(self, category, *args, **kwargs):
        for point in entry_points(category):
            point.load()(*args, **kwargs)

    def load_entrypoint(self, category, name):
        for point in entry_points(category):
            if point.name == name:
                return point.load()
        raise EntryPointNotFoundError(name)

    def register_service(self, contract, service=None):
        return _register(self._services, contract, service)

    def register_factory(self, contract, factory=None):
        return _register(self._factories, contract, factory)

    def create_instance(self, contract):
        if contract not in self._factories:
            raise FactoryNotFoundError(contract)
        return self._factories[contract]()

    def get_service(self, contract):
        if contract not in self._services:
            self._services[contract] = self.create_instance(contract)
        return self._services[contract]


def _register(where, contract, thing):
    """At once, or as a decorator."""

    def register(thing):
        where[contract] = thing
        return thing

    return register if thing is None else register(thing)


def entry_points(category):
    return sorted(importlib.metadata.entry_points().select(group=category), key=lambda point: point.name)


class Watched:
    """Files, and what to call when one changes. They are looked at between requests."""

    def __init__(self, files, callback, check_time=3000):
        self._files, self._callback, self._every = list(files), callback, check_time / 1000
        self._running, self._next, self._seen = False, 0.0, {}

    def start(self):
        self._running, self._seen = True, self._stamps()
        if self not in watched:
            watched.append(self)

    def stop(self):
        self._running = False

    def is_running(self):
        return self._running

    def look(self):
        if not self._running or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every
        now = self._stamps()
        changed = [path for path in self._files if now.get(path) != self._seen.get(path)]
        self._seen = now
        if changed:
            self._callback(changed)

    def _stamps(self):
        return {path: _stamp(path) for path in self._files}


watched = []


def _stamp(path):
    """What tells one state of a file from another; None when it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def install(sections):
    """Make the modules importable; ``sections`` are the settings that they hand out."""
    components = Components()
    components.register_service(CONFIG, Config(sections))
    filters = {
        "policy_filter": policy_filter,
        "blockingfilter": blockingfilter,
        "asyncfilter": blockingfilter,
        "_FilterBase": PolicyFilter,
        "ServerFilter": PolicyFilter,
    }
    manager = {
        "gComponentManager": components,
        "FactoryNotFoundError": FactoryNotFoundError,
        "EntryPointNotFoundError": EntryPointNotFoundError,
    }
    for name in dir(components):
        if not name.startswith("_"):
            manager[name] = getattr(components, name)
    _package("pyqgisservercontrib")
    _package("pyqgisservercontrib.core")
    _module("pyqgisservercontrib.core.filters", filters)
    _module("pyqgisservercontrib.core.watchfiles", {"watchfiles": Watched})
    _extend("pyqgisservercontrib.core.componentmanager", manager)
    try:
        import tornado.httputil  # noqa: F401
        import tornado.web  # noqa: F401
    except ImportError:
        _package("tornado")
        _module("tornado.web", {"HTTPError": HTTPError, "RequestHandler": Handler})
        _module("tornado.httputil", {"HTTPServerRequest": object})


def _package(name):
    """One that has nothing but modules that are here already."""
    if name not in sys.modules:
        _module(name, {"__path__": []})


def _module(name, contents):
    """A module of that name, in place of any other."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    _put(name, module)


def _extend(name, contents):
    """The module of that name; one that is here already learns where the settings are."""
    if name in sys.modules:
        sys.modules[name].register_service(CONFIG)(contents["get_service"](CONFIG))
    else:
        _module(name, contents)


def _put(name, module):
    sys.modules[name] = module
    package, _, short = name.rpartition(".")
    if package:
        setattr(sys.modules[package], short, module)
