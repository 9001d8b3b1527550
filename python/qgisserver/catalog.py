"""Projects in the catalogue of QGIS, by what it calls them.

QGIS lists the projects of some folders and schemas of PostgreSQL, and calls each by the MD5
sum of its name there. It would open one by itself, and keep it past its changes; so the
worker finds out which one it is, and opens it like any other.
"""

import hashlib
import os
from urllib.parse import quote

from . import storages

FOLDERS = "QGIS_SERVER_LANDING_PAGE_PROJECTS_DIRECTORIES"
CONNECTIONS = "QGIS_SERVER_LANDING_PAGE_PROJECTS_PG_CONNECTIONS"


def find(identifier):
    """The path or the URI of the project, or None if it is not listed."""
    for path in _files():
        if _digest(path) == identifier:
            return path
    away = None
    for connection in _parts(CONNECTIONS):
        try:
            for name in storages.names(connection):
                if _digest(f"{connection}&project={name}") == identifier:
                    return f"{connection}&project={quote(name, safe='')}"
        except storages.Away as error:
            # Another one may have it.
            away = error
    if away:
        raise away
    return None


def _parts(variable):
    return [part for part in os.environ.get(variable, "").split("||") if part]


def _files():
    for folder in _parts(FOLDERS):
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            if name.lower().endswith((".qgs", ".qgz")) and not name.startswith("."):
                yield f"{folder}/{name}"


def _digest(name):
    return hashlib.md5(name.encode(errors="surrogateescape"), usedforsecurity=False).hexdigest()
