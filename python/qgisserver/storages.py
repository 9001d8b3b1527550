"""Projects that are no files: in which state a storage has them, and how they are read.

A storage that does not answer is not one that lacks a project, so each look either
returns, raises ``Away`` with the reason, or raises what a handler of the operator's raised.
"""

import hashlib
import json
import os
import re
import select
import time
from datetime import datetime, timezone
from urllib.parse import parse_qsl, urlsplit

from . import components, projects


class Away(Exception):
    """The storage does not answer; the text says why."""


class Missing(Exception):
    """The storage has no such project."""


_timeout = 5.0


def setup(timeout, handlers, schemes, options, flags, s3, passwords, log):
    """``timeout``: seconds for one look; ``handlers``: ``{scheme: (import string, config)}``;
    ``schemes``: those that a project may come from; ``options``: what py-qgis-server calls
    ``projects.cache``; ``flags``: for ``projects.load``; ``s3``: options of GDAL by prefix;
    ``passwords``: lines for libpq."""
    global _timeout
    _timeout = timeout
    components.setup(handlers, schemes, options, flags, log)
    for prefix, pairs in s3.items():
        _tell_gdal(prefix, pairs)
    if passwords:
        _tell_libpq(passwords)


def look(uri):
    """``(version, seconds since 1970)`` of the project, or None if there is none."""
    scheme = uri.partition(":")[0]
    if scheme == "postgresql":
        return _postgresql(uri)
    if scheme == "geopackage":
        return _geopackage(uri)
    handler = components.handler(scheme)
    return handler.look(uri) if handler else _qgis(scheme, uri)


def read(uri, local, flags):
    """The project and its bad layers, as from ``projects.load``. ``local``: a copy of it."""
    if local:
        return _read_copy(uri, local, flags)
    handler = components.handler(uri.partition(":")[0])
    if handler:
        return handler.read(uri, flags)
    try:
        return projects.load(uri, *flags)
    except projects.Unreadable:
        # QGIS does not say why. A storage that went away since is no broken project.
        if look(uri) is None:
            raise Missing("it was there a moment ago") from None
        raise


# PostgreSQL: QGIS keeps projects in the table qgis_projects of a schema.

_CONNECTIONS_MAX = 8
_connections = {}


def _postgresql(uri):
    url = urlsplit(uri)
    wanted = dict(parse_qsl(url.query, keep_blank_values=True))
    name = wanted.pop("project")
    # Every save is a new xmin, however close to the one before.
    text = """SELECT coalesce(metadata->>'last_modified_time', ''), xmin::text
              FROM {}.qgis_projects WHERE name = %s"""
    rows = _rows(url, wanted, text, (name,))
    # QGIS lets the database write the time, in UTC and without saying so.
    return (" ".join(rows[0]), _seconds(rows[0][0], timezone.utc)) if rows else None


def names(uri):
    """The projects that a schema of PostgreSQL has."""
    url = urlsplit(uri)
    wanted = dict(parse_qsl(url.query, keep_blank_values=True))
    wanted.pop("project", None)
    rows = _rows(url, wanted, "SELECT name FROM {}.qgis_projects ORDER BY name", ())
    return [name for (name,) in rows]


def _rows(url, wanted, text, values):
    """What the table of projects says, nothing if there is none."""
    import psycopg2
    from psycopg2 import sql

    query = sql.SQL(text).format(sql.Identifier(wanted.pop("schema", "public")))
    end = time.monotonic() + _timeout
    key = (url.netloc, tuple(sorted(wanted.items())))
    kept = _connections.pop(key, None)
    try:
        try:
            rows = kept and _fetched(kept, query, values, end)
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            # The server may have ended it since.
            kept = None
        if kept is None:
            kept = _connect(url, wanted, end)
            rows = _fetched(kept, query, values, end)
    except (psycopg2.errors.UndefinedTable, psycopg2.errors.InvalidSchemaName):
        rows = []
    except psycopg2.errors.InsufficientPrivilege as error:
        components.log("warning", "PostgreSQL", str(error).strip())
        rows = []
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise Away(str(error).strip() or type(error).__name__) from None
    _connections[key] = kept
    if len(_connections) > _CONNECTIONS_MAX:
        _connections.pop(next(iter(_connections))).close()
    return rows


def _tell_libpq(passwords):
    """In a file of this process, beside what the operator's own password file says."""
    known = os.environ.get("PGPASSFILE") or os.path.expanduser("~/.pgpass")
    lines = list(passwords)
    try:
        with open(known) as file:
            lines += file.read().splitlines()
    except OSError:
        pass
    path = os.path.join(os.environ["TMPDIR"], "pgpass")
    # The folder is new. Who put something there before us would read what we write.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    os.environ["PGPASSFILE"] = path


def _connect(url, wanted, end):
    import psycopg2

    options = {key: value for key, value in wanted.items() if key != "authcfg"}
    own = {"host": url.hostname, "port": url.port, "user": url.username, "password": url.password}
    for key, value in own.items():
        if value:
            options.setdefault(key, components.decoded(str(value)))
    options.setdefault("application_name", "qgisserver")
    # Asynchronous, because libpq itself would wait for a silent server for ever.
    connection = psycopg2.connect(_authentication(wanted), async_=True, **options)
    _wait(connection, end)
    return connection


def _authentication(wanted):
    """What QGIS keeps under the id ``authcfg``, in libpq's words."""
    if "authcfg" not in wanted:
        return ""
    from qgis.core import QgsDataSourceUri

    source = QgsDataSourceUri()
    source.setAuthConfigId(wanted["authcfg"])
    return source.connectionInfo(True)


def _fetched(connection, query, values, end):
    cursor = connection.cursor()
    cursor.execute(query, values)
    _wait(connection, end)
    return cursor.fetchall()


def _wait(connection, end):
    import psycopg2
    from psycopg2.extensions import POLL_OK, POLL_READ

    while (state := connection.poll()) != POLL_OK:
        ready = select.poll()
        ready.register(connection.fileno(), select.POLLIN if state == POLL_READ else select.POLLOUT)
        if not ready.poll(max(end - time.monotonic(), 0) * 1000):
            connection.close()
            raise psycopg2.OperationalError(f"no answer within {_timeout:g} s")


# GeoPackage: the same table in a file.

_packages = {}


def _geopackage(uri):
    """Edits of the data change the file, and not the project."""
    import sqlite3

    url = urlsplit(uri)
    path = components.decoded(url.path)
    name = dict(parse_qsl(url.query)).get("projectName", "")
    try:
        files = [path + suffix for suffix in ("", "-wal") if os.path.exists(path + suffix)]
        states = [os.stat(file) for file in files]
        state = [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in states]
        known, seen = _packages.get((path, name), (None, None))
        if state and known == state:
            return seen
        file = sqlite3.connect(f"file:{url.path}?mode=ro", uri=True, timeout=_timeout)
        try:
            query = "SELECT metadata, content FROM qgis_projects WHERE name = ?"
            row = file.execute(query, (name,)).fetchone()
        finally:
            file.close()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error) or not os.path.exists(path):
            return None
        raise Away(str(error)) from None
    except (sqlite3.DatabaseError, OSError) as error:
        components.log("warning", "GeoPackage", f"{path}: {error}")
        return None
    seen = row and (hashlib.sha1(repr(row).encode()).hexdigest(), _seconds(_modified(row[0])))
    if len(_packages) > 1000:
        _packages.clear()
    _packages[(path, name)] = (state, seen)
    return seen


def _modified(metadata):
    try:
        return json.loads(metadata)["last_modified_time"]
    except (KeyError, TypeError, ValueError):
        return ""


def _seconds(text, zone=None):
    """``zone``: where it is when the text does not say so, here by default. 0: no time."""
    # PostgreSQL leaves out zeros at the end, which Python wants.
    text = re.sub(r"\.(\d+)", lambda match: "." + match[1][:6].ljust(6, "0"), text.strip())
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return 0
    if time.tzinfo is None:
        time = time.replace(tzinfo=zone)
    return max(0, int(time.timestamp()))


# What QGIS itself, or a plugin, registers as a storage of projects.


def _qgis(scheme, uri):
    from qgis.core import QgsApplication

    storage = QgsApplication.projectStorageRegistry().projectStorageFromType(scheme)
    if not storage:
        components.log("debug", "Storage", f"nothing handles the scheme {scheme}")
        return None
    found, metadata = storage.readProjectStorageMetadata(uri)
    if not found:
        return None
    modified = metadata.lastModified.toMSecsSinceEpoch()
    return str(modified), max(0, modified // 1000)


# S3: the worker brings the project, GDAL the data beside it.

_origin = None
_preprocessor = None


def _read_copy(uri, local, flags):
    """Relative paths of the copy lead to where the original is."""
    global _origin, _preprocessor
    from qgis.core import QgsPathResolver

    _origin = "/vsis3/" + uri.partition("://")[2].rpartition("/")[0]
    _forget_gdal(_origin)
    if _preprocessor is None:
        _preprocessor = QgsPathResolver.setPathPreprocessor(_at_origin)
    try:
        return projects.load(local, *flags)
    finally:
        _origin = None


def _at_origin(path):
    if _origin is None or not path.startswith(("./", "../")):
        return path
    name, bar, rest = path.partition("|")
    there = os.path.normpath(f"{_origin}/{name}")
    # Above the bucket are the buckets of others.
    bucket = "/".join(_origin.split("/")[:3]) + "/"
    return there + bar + rest if there.startswith(bucket) else path


def _tell_gdal(prefix, pairs):
    try:
        from osgeo import gdal
    except ImportError:
        components.log("warning", "S3", "without osgeo.gdal no data is read from S3")
        return
    for key, value in pairs.items():
        if hasattr(gdal, "SetPathSpecificOption"):
            gdal.SetPathSpecificOption(prefix, key, value)
        else:
            gdal.SetConfigOption(key, value)


def _forget_gdal(prefix):
    try:
        from osgeo import gdal
    except ImportError:
        return
    gdal.VSICurlPartialClearCache(prefix)
