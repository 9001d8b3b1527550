"""Watch what plugins wrote: nobody gets more because it raised.

QGIS goes on when an override raises, with rights that nobody gave, and changes data
before anyone could throw its answer away. So an access control that raised denies, and
from then on all of them do, until the request ends.
"""

import functools
import inspect
import sys
import threading

# What QGIS calls in classes of plugins, and goes on when it raises.
WATCHED = {
    "QgsServerFilter": (
        "requestReady",
        "sendResponse",
        "responseComplete",
        "onRequestReady",
        "onProjectReady",
        "onSendResponse",
        "onResponseComplete",
    ),
    "QgsAccessControlFilter": (
        "layerPermissions",
        "layerFilterExpression",
        "layerFilterSubsetString",
        "authorizedLayerAttributes",
        "allowToEdit",
        "cacheKey",
    ),
    "QgsServerCacheFilter": (
        "getCachedDocument",
        "setCachedDocument",
        "deleteCachedDocument",
        "deleteCachedDocuments",
        "getCachedImage",
        "setCachedImage",
        "deleteCachedImage",
        "deleteCachedImages",
    ),
    "QgsService": ("executeRequest",),
    "QgsServerApi": ("accept", "executeRequest"),
    "QgsServerOgcApiHandler": ("handleRequest",),
}


def _rights():
    from qgis.server import QgsAccessControlFilter

    return QgsAccessControlFilter.LayerPermissions


def _no_rights():
    rights = _rights()()
    rights.canRead = rights.canInsert = rights.canUpdate = rights.canDelete = False
    return rights


# What QGIS gets where something raised.
CLOSED = {
    "layerPermissions": _no_rights,
    "layerFilterExpression": lambda: "FALSE",
    # SQL has no FALSE everywhere, and some providers take expressions of QGIS.
    "layerFilterSubsetString": lambda: "1 = 0",
    "authorizedLayerAttributes": lambda: [],
    "allowToEdit": lambda: False,
    # A cache keeps nothing that was made so.
    "setCachedDocument": lambda: False,
    "setCachedImage": lambda: False,
}

# Of those, what QGIS asks the base class where a plugin has none of its own.
RIGHTS = [name for name in WATCHED["QgsAccessControlFilter"] if name in CLOSED]

# Where these return something else, QGIS takes it for no restriction.
TEXTS = ("layerFilterExpression", "layerFilterSubsetString")


def watch(recorder):
    """Tell ``recorder`` when what a plugin wrote raises, whatever hook Python has by then.

    PyQt looks for overrides in the classes, so that is where we stand, too.
    """
    import qgis.server

    running = set()
    for base, names in WATCHED.items():
        for kind in _subclasses(getattr(qgis.server, base, None)):
            for name in names:
                method = _method(kind, name)
                if method is not None and not hasattr(method, "_is_watched"):
                    setattr(kind, name, _watched(method, name, recorder, running))


def _subclasses(kind):
    for below in kind.__subclasses__() if kind else ():
        yield below
        yield from _subclasses(below)


def _method(kind, name):
    """What is to be watched; None if QGIS would never come to Python for it.

    Rights are, written or not: QGIS asks for them after it asked what may have raised.
    """
    method = _override(kind, name)
    if inspect.isfunction(method):
        return method
    return getattr(kind, name, None) if name in RIGHTS and is_python(kind) else None


def _override(kind, name):
    """What a plugin wrote for ``name``, be it in a class that QGIS does not know."""
    for owner in kind.__mro__:
        if name in vars(owner):
            return vars(owner)[name] if is_python(owner) else None
    return None


def is_python(kind):
    """Whether a class is not one of QGIS or PyQt."""
    name = kind.__module__
    return name not in ("sip", "PyQt5.sip", "PyQt6.sip", "builtins") and not name.startswith("qgis._")


def _watched(method, name, recorder, running):
    closed = CLOSED.get(name)

    @functools.wraps(method)
    def call(self, *args, **named):
        # An override may call the one that it overrides, and catch what that raises.
        key = id(self), name, threading.get_ident()
        if key in running:
            return method(self, *args, **named)
        if closed is not None and recorder.raised:
            return closed()
        running.add(key)
        try:
            return _ask(method, name, recorder, self, *args, **named)
        except BaseException as error:
            if not _is_an_answer(self, error):
                recorder(*sys.exc_info(), self)
            if closed is None:
                raise
            return closed()
        finally:
            running.discard(key)

    call._is_watched = True
    return call


def _ask(method, name, recorder, self, *args, **named):
    if name in RIGHTS and recorder.changes_by_api:
        return _ask_before(method, name, recorder, self, *args, **named)
    return _checked(name, method(self, *args, **named))


def _ask_before(method, name, recorder, control, layer, *args):
    """An API asks for rights, then for a filter and for attributes, and then it changes
    the layer whatever they are. So who has no answer to them gives no right, and who
    had one gives it again.
    """
    if name == "layerPermissions" and hasattr(layer, "fields"):
        control.layerFilterSubsetString(layer)
        control.authorizedLayerAttributes(layer, layer.fields().names())
        if recorder.raised:
            return _no_rights()
    if name not in ("layerFilterSubsetString", "authorizedLayerAttributes"):
        return _checked(name, method(control, layer, *args))
    key = id(control), name, layer.id(), *map(tuple, args)
    if key not in recorder.answers:
        recorder.answers[key] = _checked(name, method(control, layer, *args))
    return recorder.answers[key]


def _checked(name, answer):
    if name in TEXTS and not isinstance(answer, (str, type(None))):
        raise TypeError(f"{name} returned {type(answer).__name__}, which is no text")
    if name == "layerPermissions" and not isinstance(answer, _rights()):
        raise TypeError(f"{name} returned {type(answer).__name__}, which are no rights")
    return answer


def _is_an_answer(asked, error):
    """APIs say so that the client asked for something wrong."""
    import qgis.server as known

    if type(error).__name__ != "QgsServerApiBadRequestException":
        return False
    return isinstance(asked, (known.QgsServerApi, known.QgsServerOgcApiHandler))
