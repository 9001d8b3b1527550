"""A handler as one writes it for QJazz, named in the settings."""

from pathlib import Path
from typing import Optional

from qjazz_cache.common import ProjectMetadata, ProtocolHandler
from qjazz_cache.storage import load_project_from_uri
from qjazz_contrib.core import logger
from qjazz_contrib.core.config import ConfigBase, ConfigSettings


class DrawerConfig(ConfigBase):
    folder: Path
    suffix: str = ".qgs"
    depth: Optional[int] = None
    locked: bool = True


class Drawer(ProtocolHandler):
    Config = DrawerConfig

    def __init__(self, conf: DrawerConfig):
        if conf.locked or conf.depth != 1:
            raise ValueError("as the settings of the test say")
        self._folder, self._suffix = conf.folder, conf.suffix

    def project_metadata(self, url):
        if isinstance(url, ProjectMetadata):
            return url
        if url.path == "raise":
            raise ValueError("as the test wished")
        path = self._folder.joinpath(url.path).with_suffix(self._suffix)
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


class Lenient(ConfigSettings):
    folder: str = "/nowhere"


class Plain(ProtocolHandler):
    """One that has nothing to set."""

    def project_metadata(self, url):
        assert Lenient.model_validate({"other": "x"}).folder == "/nowhere"
        raise FileNotFoundError(str(url))
