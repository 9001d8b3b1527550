"""A handler as one writes it for QJazz, named in the settings."""

from pathlib import Path

from qjazz_cache.common import ProjectMetadata, ProtocolHandler
from qjazz_cache.storage import load_project_from_uri
from qjazz_contrib.core import logger


class Drawer(ProtocolHandler):
    def __init__(self, folder):
        self._folder = Path(folder)

    def project_metadata(self, url):
        if isinstance(url, ProjectMetadata):
            return url
        if url.path == "raise":
            raise ValueError("as the test wished")
        path = self._folder.joinpath(url.path).with_suffix(".qgs")
        logger.debug("looking for %s", path)
        if not path.exists():
            raise FileNotFoundError(str(path))
        return ProjectMetadata(
            uri=str(path), name=path.stem, scheme="drawer", storage="drawer", last_modified=path.stat().st_mtime
        )

    def project(self, md, config):
        # As if somebody saved it in the moment since it was looked for.
        later = Path(md.uri).with_suffix(".later")
        if later.exists():
            later.replace(md.uri)
        return load_project_from_uri(md.uri, config)
