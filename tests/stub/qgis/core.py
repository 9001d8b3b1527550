"""qgis.core, as far as the worker looks at it."""

import os
import signal

from . import control


if control.exists("hang-at-import"):
    control.note("importing")
    control.wait_for("never")


class _AnyClass(type):
    def __getattr__(cls, name):
        return lambda *args, **kwargs: Anything()


class Anything(metaclass=_AnyClass):
    """Accepts every call; stands for the classes that a test map needs."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: Anything()


def __getattr__(name):
    if name.startswith("Qgs"):
        return Anything
    raise AttributeError(name)


class Qgis:
    Info, Warning, Critical = 0, 1, 2
    QGIS_VERSION_INT = 32216

    @staticmethod
    def version():
        return "3.22.16-stub"

    @staticmethod
    def geosVersion():
        return "stub"


class QgsApplication:
    def __init__(self, argv, gui):
        control.note("started")
        if control.exists("crash-at-start"):
            os.kill(os.getpid(), signal.SIGKILL)
        if control.exists("freeze-at-start"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if control.exists("hang-at-start"):
            control.wait_for("never")

    @staticmethod
    def setPrefixPath(path, is_set):
        pass

    @staticmethod
    def messageLog():
        return _log

    @staticmethod
    def instance():
        return None


class QgsFeedback:
    def __init__(self):
        self._cancelled = False

    def cancel(self):
        self._cancelled = True

    def isCanceled(self):
        return self._cancelled


class _Signal:
    def __init__(self):
        self._slots = []

    def connect(self, slot):
        self._slots.append(slot)

    def emit(self, *args):
        for slot in self._slots:
            slot(*args)


class _MessageLog:
    def __init__(self):
        self.messageReceived = _Signal()


_log = _MessageLog()


class QgsProjectBadLayerHandler:
    def __init__(self):
        pass

    def handleBadLayers(self, nodes):
        pass


class QgsProject:
    """Any text is a project, unless it says `corrupt`, `memory`, `unknown` or `die`.

    Each reading is noted in `read`. One that begins with `wait for NAME` is read when the
    test creates the file of that name.
    """

    FlagTrustLayerMetadata, FlagDontLoadLayouts = 1, 2

    @staticmethod
    def ReadFlags():
        return 0

    def __init__(self):
        self._path = ""

    def setBadLayerHandler(self, handler):
        self._handler = handler

    def read(self, path, flags=0):
        self._path = path
        with open(path) as file:
            text = file.read()
        self.text = text
        control.note("read")
        if text.startswith("wait for "):
            control.wait_for(text.split()[2])
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "memory":
            raise MemoryError
        if text == "unknown":
            raise Exception("unknown")
        return "corrupt" not in text

    def addMapLayer(self, layer):
        pass

    def mapLayers(self):
        return {}

    def fileName(self):
        return self._path

    def error(self):
        return "the file says that it is corrupt"
