"""Access policies in Python: filters that look at each request before QGIS does.

A filter is a function that other packages register under the entry point
``py_qgis_server.access_policy``. It gets the request as QGIS would read it, may change
its parameters and headers, and refuses it by raising ``HTTPError``. Whatever else it
raises refuses the request, too.
"""

import http.client
import http.cookies
import json
import traceback
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from qgisserver import contrib

GROUP = "py_qgis_server.access_policy"
PROFILES = "/ows/p/"


class Policies:
    """All filters, by priority. Without any, everything is allowed."""

    def __init__(self):
        self.groups = []

    def add_filters(self, filters, pri=0):
        """What a package calls that registers its filters."""
        self.groups.append((pri, [it for it in filters if isinstance(it, contrib.PolicyFilter)]))
        # Of the same priority, who came first is asked first.
        self.groups.sort(key=lambda group: -group[0])

    def append(self, one):
        """What older packages do."""
        self.add_filters([one], getattr(one, "pri", 0))


class Headers:
    """Fields of a request, by names in any case."""

    def __init__(self, fields):
        self._fields = {}
        for name, value in fields:
            self.add(name, value)
        self.changed = {}

    def add(self, name, value):
        self._fields.setdefault(name.title(), []).append(value)

    def get(self, name, default=None):
        values = self._fields.get(name.title())
        return ",".join(values) if values else default

    def get_list(self, name):
        return list(self._fields.get(name.title(), []))

    def get_all(self):
        return [(name, value) for name, values in self._fields.items() for value in values]

    items = get_all

    def keys(self):
        return self._fields.keys()

    def __iter__(self):
        return iter(self._fields)

    def __len__(self):
        return len(self._fields)

    def __contains__(self, name):
        return name.title() in self._fields

    def __getitem__(self, name):
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __setitem__(self, name, value):
        self._fields[name.title()] = [str(value)]
        self.changed[name.title()] = str(value)

    def __delitem__(self, name):
        del self._fields[name.title()]
        self.changed[name.title()] = None

    def pop(self, name, *default):
        try:
            value = self[name]
        except KeyError:
            if default:
                return default[0]
            raise
        del self[name]
        return value

    def setdefault(self, name, value):
        if name not in self:
            self[name] = value
        return self[name]


class Arguments(dict):
    """Parameters as lists of bytes. A name is found in any case."""

    def _key(self, name):
        if not isinstance(name, str) or super().__contains__(name):
            return name
        folded = name.upper()
        return next((known for known in self if known.upper() == folded), name)

    def __getitem__(self, name):
        return super().__getitem__(self._key(name))

    def __setitem__(self, name, values):
        super().__setitem__(self._key(name), values)

    def __delitem__(self, name):
        super().__delitem__(self._key(name))

    def __contains__(self, name):
        return super().__contains__(self._key(name))

    def get(self, name, default=None):
        return super().get(self._key(name), default)

    def pop(self, name, *default):
        return super().pop(self._key(name), *default)

    def setdefault(self, name, default=None):
        return super().setdefault(self._key(name), default)

    def update(self, *others, **named):
        for name, values in dict(*others, **named).items():
            self[name] = values


class Request:
    """A request as QGIS will read it, with the names that Tornado gives its parts."""

    def __init__(self, method, url, headers, body, said, address, path):
        parts = urlsplit(url)
        self.method = method
        self.path = path
        self.query = parts.query
        self.uri = f"{path}?{parts.query}" if parts.query else path
        self.version = "HTTP/1.1"
        self.headers = Headers(headers)
        self.body = body
        self.remote_ip = address
        self.protocol = parts.scheme
        self.host = parts.netloc
        self.host_name = parts.hostname or ""
        self.arguments = _arguments(parts.query)
        self.query_arguments = _arguments(parts.query)
        # A form is part of the query, and what else the body says must not go unseen.
        self.body_arguments = Arguments()
        for name, value in said:
            self.body_arguments[name] = [value.encode()]
            self.arguments.setdefault(name, [value.encode()])
        self.files = {}

    @property
    def cookies(self):
        try:
            return http.cookies.SimpleCookie(self.headers.get("Cookie", ""))
        except http.cookies.CookieError:
            return http.cookies.SimpleCookie()

    def full_url(self):
        return f"{self.protocol}://{self.host}{self.uri}"

    def __repr__(self):
        return f"Request({self.method} {self.path})"


def _arguments(query):
    found = Arguments()
    for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
        found.setdefault(name, []).append(value.encode())
    return found


policies = Policies()


def load(settings, log):
    """Registers the filters of all packages that have some; their names."""
    contrib.install(settings)
    loaded = []
    for point in contrib.entry_points(GROUP):
        try:
            point.load()(policies)
        except BaseException as error:
            trace = traceback.format_exc()
            raise RuntimeError(f"the access policy {point.name} does not load\n{trace}") from error
        loaded.append(point.name)
    if not loaded:
        log("warning", "policies", f"server.enable_filters: no package has an entry point {GROUP}")
    return loaded


def judge(log, method, url, headers, body, said, address, path, is_known):
    """What the filters make of a request; ``said`` are the parameters that its body sets.

    None: it goes on as it is. ``("raised",)``: a filter failed. ``("refused", status,
    headers, body)``. ``("changed", query, project, headers)``: it goes on with this query
    and this MAP, None if they did not change, and these headers, of which a value of
    None takes one away.
    """
    try:
        for one in contrib.watched:
            one.look()
        request = Request(method, url, headers, body, said, address, path)
        before = {name: list(values) for name, values in request.arguments.items()}
        _ask(request)
    except BaseException as error:
        refusal = _refusal(error)
        if refusal is None:
            log("error", "policies", traceback.format_exc())
        return refusal or ("raised",)
    if request.path.startswith(PROFILES) and not is_known:
        return _reply(404, "Invalid resource path.")
    after = {name: list(values) for name, values in request.arguments.items()}
    if path.startswith(PROFILES) and request.path in ("/ows", "/ows/") and not _names(after, "SERVICE"):
        return _reply(400, "Please provide a SERVICE parameter")
    if before == after and not request.headers.changed:
        return None
    return _changed(request, before, after)


def _names(arguments, name):
    return any(known.upper() == name and any(values) for known, values in arguments.items())


def _ask(request):
    """In each group the first filter that is about the path is asked."""
    for _, filters in policies.groups:
        for one in filters:
            found, path = one.match(request.path)
            if found:
                request.path = _tidy(path)
                one.apply(request, found)
                break


def _tidy(path):
    """A path that a filter made in the spelling in which all others know it."""
    for root in ("/ows/wfs3", "/ows/ogcapi"):
        if path == root or path.startswith((root + "/", root + ".")):
            return path[len("/ows") :]
    return "/ows/" if path == "/ows" else path


def _changed(request, before, after):
    query, project = None, None
    if before != after:
        for name in request.body_arguments:
            if after.get(name) != before.get(name):
                # QGIS would go by the body.
                return _reply(403, f"The body of the request says another {name}")
            if name not in request.query_arguments:
                after.pop(name, None)
        pairs = [(name, _bytes(value)) for name, values in after.items() for value in _list(values)]
        query = urlencode(pairs, quote_via=quote)
        maps = [_bytes(value) for name, value in pairs if name.upper() == "MAP"]
        old = [value for name, values in before.items() if name.upper() == "MAP" for value in values]
        if maps[:1] != old[:1]:
            project = maps[0].decode("utf-8", "replace") if maps else ""
    return "changed", query, project, request.headers.changed


def _list(values):
    return values if isinstance(values, (list, tuple)) else [values]


def _bytes(value):
    return value if isinstance(value, bytes) else str(value).encode()


def _refusal(error):
    """What the client gets if ``error`` is a refusal with a status."""
    status = getattr(error, "status_code", None)
    if not isinstance(error, Exception) or not isinstance(status, int) or not 400 <= status < 600:
        return None
    return _reply(status, getattr(error, "reason", None) or http.client.responses.get(status, "Refused"))


def _reply(status, message):
    said = {"error": {"message": str(message)}, "httpcode": status, "status": "error"}
    return "refused", status, {"Content-Type": "application/json;charset=utf-8"}, json.dumps(said).encode()
