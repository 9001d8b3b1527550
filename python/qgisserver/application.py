"""Start QGIS: imports before the fork, QgsApplication and QgsServer after it."""

import contextlib
import gc
import os
import socket
import sys
import tempfile


def preload():
    """Import PyQGIS. Runs in the pool's parent: no Qt object, thread or socket may come of it."""
    # The package pulls in qgis.gui and QtWidgets, which cost 22 MB and which a server
    # never shows. Plugins that import qgis.gui still get the real one.
    sys.modules.setdefault("qgis.gui", None)
    import qgis.core
    import qgis.server  # noqa: F401

    if sys.modules.get("qgis.gui") is None:
        sys.modules.pop("qgis.gui", None)


def freeze():
    """What the pool's parent holds is never garbage; frozen, its pages stay shared."""
    gc.collect()
    gc.freeze()


def versions():
    """``{"qgis": …, "python": …, "gdal": …, "proj": …, "geos": …}`` as the libraries report them."""
    from qgis.core import Qgis

    found = {
        "qgis": Qgis.version(),
        "python": sys.version.split()[0],
        "geos": _text(Qgis, "geosVersion"),
        "gdal": "",
        "proj": "",
    }
    try:
        from osgeo import gdal, osr

        found["gdal"] = gdal.VersionInfo("RELEASE_NAME")
        found["proj"] = ".".join(
            str(part())
            for part in (
                osr.GetPROJVersionMajor,
                osr.GetPROJVersionMinor,
                osr.GetPROJVersionMicro,
            )
        )
    except ImportError:
        from qgis.core import QgsProjUtils

        found["proj"] = f"{QgsProjUtils.projVersionMajor()}.{QgsProjUtils.projVersionMinor()}"
    return found


def _text(owner, name):
    return getattr(owner, name)() if hasattr(owner, name) else ""


@contextlib.contextmanager
def _without_default(tmpdir):
    """Out of the present folder if there are projects, which may lie anywhere: QgsServer
    would serve one of them to all who name none. Otherwise paths in variables that begin
    here lead where they should.
    """
    defaults = (".qgs", ".qgz", "admin.sld")
    try:
        names = os.listdir()
    except OSError:
        # Then QGIS finds nothing there, either.
        names = ()
    if not any(name.lower().endswith(defaults) for name in names):
        yield
        return
    here = os.open(".", os.O_RDONLY)
    try:
        with tempfile.TemporaryDirectory(dir=tmpdir) as empty:
            os.chdir(empty)
            try:
                yield
            finally:
                os.fchdir(here)
    finally:
        os.close(here)


class Application:
    """The one QgsApplication and QgsServer of a worker process."""

    def __init__(self, prefix, tmpdir, variables, log):
        """``prefix``: where QGIS is installed; ``tmpdir``: the worker's own folder for
        temporary files; ``variables``: the environment as far as the parent's own differs,
        None for what is not set; ``log(level, tag, text)`` receives every message."""
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.environ["TMPDIR"] = tmpdir
        # What systemd hears is the parent's to say.
        os.environ.pop("NOTIFY_SOCKET", None)
        from qgis.core import Qgis, QgsApplication
        from qgis.PyQt.QtCore import qInstallMessageHandler
        from qgis.server import QgsServer

        self._log = log
        self._local_hosts = frozenset({"localhost", "127.0.0.1", "::1", socket.gethostname().lower()})
        self._own_hosts = self._local_hosts
        self._levels = {Qgis.Info: "info", Qgis.Warning: "warning", Qgis.Critical: "error"}
        # Qt's and QGIS's own lines go where ours go, with the request id beside them.
        qInstallMessageHandler(self._qt_message)
        # Without the prefix no service module is found, and every request fails.
        QgsApplication.setPrefixPath(prefix, True)
        self.qgis = QgsApplication([b"qgisserver-worker"], False)
        QgsApplication.messageLog().messageReceived.connect(self._qgis_message)
        with _without_default(tmpdir):
            self.server = QgsServer()
        self.interface = self.server.serverInterface()

    def introduce(self, instance):
        """From now on requests for layers that this same server serves say which worker asks.

        Then the server knows that this worker waits for them, and lets them go first.
        Others are told nothing: they have no use for it.
        """
        from qgis.core import QgsNetworkAccessManager

        if not hasattr(QgsNetworkAccessManager, "setRequestPreprocessor"):
            return
        # Called in whichever thread asks, so it reads one attribute and nothing else.
        name = instance.encode()

        def sign(request):
            if request.url().host() in self._own_hosts:
                request.setRawHeader(b"X-Qgisserver-Worker", name)

        QgsNetworkAccessManager.setRequestPreprocessor(sign)

    def addressed(self, host):
        """The present request came to ``host``: projects call this server by that name, too."""
        self._own_hosts = self._local_hosts | {host}

    def _qt_message(self, kind, context, text):
        self._log("debug", "Qt", text or "")

    def _qgis_message(self, text, tag="", level=None):
        # The signal has a second form with one bool, which says nothing.
        if isinstance(text, str):
            self._log(self._levels.get(level, "info"), tag or "QGIS", text)
