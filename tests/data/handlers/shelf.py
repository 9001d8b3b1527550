"""A handler as one writes it for py-qgis-server: the scheme `shelf`, found by entry point."""

import os
from datetime import datetime
from pathlib import Path

from pyqgisservercontrib.core import componentmanager


def register():
    assert componentmanager.get_service("@3liz.org/config-service;1").getboolean("projects.cache", "strict_check")

    @componentmanager.register_factory("@3liz.org/cache/protocol-handler;1?scheme=shelf")
    class Shelf:
        """All boards of the shelf are the folder $SHELF."""

        def get_modified_time(self, url):
            return datetime.fromtimestamp(self._path(url).stat().st_mtime)

        def get_project(self, url, project=None, timestamp=None):
            modified = self.get_modified_time(url)
            if project is None or timestamp < modified:
                manager = componentmanager.get_service("@3liz.org/cache-manager;1")
                project = manager.read_project(str(self._path(url)))
            return project, modified

        @staticmethod
        def _path(url):
            board, _, name = url.path.strip("/").partition("/")
            if board == "away":
                raise ConnectionError("the shelf is being moved")
            path = Path(os.environ["SHELF"], name).with_suffix(".qgs")
            if not path.exists():
                raise FileNotFoundError(url.geturl())
            return path
