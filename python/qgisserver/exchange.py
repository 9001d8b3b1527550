"""One request to QgsServer and its answer back.

``serve`` drives ``QgsServer.handleRequest``; ``Response`` hands bytes to the
sink while QGIS still works, which only WFS GetFeature does (it calls ``flush``
once per feature).
"""

import os
import sys
import traceback

from qgis.core import QgsProject
from qgis.server import (
    QgsBufferServerRequest,
    QgsBufferServerResponse,
    QgsServerException,
    QgsServerRequest,
)

METHODS = {
    "GET": QgsServerRequest.GetMethod,
    "HEAD": QgsServerRequest.HeadMethod,
    "POST": QgsServerRequest.PostMethod,
    "PUT": QgsServerRequest.PutMethod,
    "DELETE": QgsServerRequest.DeleteMethod,
}
if hasattr(QgsServerRequest, "PatchMethod"):
    METHODS["PATCH"] = QgsServerRequest.PatchMethod

# These change nothing.
READING = ("GET", "HEAD")

# Newer QGIS (3.36) asks the response whether somebody still waits.
CAN_STOP = hasattr(QgsBufferServerResponse, "feedback")
if CAN_STOP:
    from qgis.core import QgsFeedback

from qgisserver import plugins, services

# What QGIS says when there is no project where MAP leads.
NO_PROJECT = b"""<?xml version="1.0" encoding="UTF-8"?>
<ServerException>Project file error. For OWS services: please provide a SERVICE and a MAP \
parameter pointing to a valid QGIS project file</ServerException>
"""

# What is said of a body that would stop the worker.
TOO_MUCH = b"""<?xml version="1.0" encoding="UTF-8"?>
<ServiceExceptionReport version="1.3.0" xmlns="http://www.opengis.net/ogc">
 <ServiceException code="NoApplicableCode">The body has too many parameters, or elements too \
deep within each other</ServiceException>
</ServiceExceptionReport>
"""

# Qt recurses into a document, and ends the process if that is much deeper than this.
DEPTH_MAX = 1000

# QGIS compares each parameter with all before it.
PARAMETERS_MAX = 1000

# All that QGIS says when a filter raised.
BARE = b"Internal Server Error"


class Recorder:
    """Keeps Python exceptions that C++ callers of plugin code would swallow.

    PyQt calls ``sys.excepthook`` when an override raises and then goes on as if
    nothing had happened, with access control not applied. Without a hook it
    aborts the process. So: record, and let ``serve`` throw the answer away.
    Others like the hook, too: ``watching.watch`` tells us of exceptions as well.
    """

    def __init__(self, log):
        self._log = log
        self._last = None
        self._changing = None
        self.raised = False
        # ``(plugin, traceback)`` of the first one in the request.
        self.told = None
        # What access controls said in this request, see ``watching``.
        self.answers = {}

    def install(self):
        sys.excepthook = self

    def begin(self, request=None):
        """A request begins; ``request`` is given if it may change data."""
        self._last = None
        self._changing = request
        self.raised = False
        self.told = None
        self.answers = {}
        if sys.excepthook is not self:
            self._log("warning", "plugin", f"sys.excepthook was replaced by {sys.excepthook!r}: taken back")
            self.install()

    def end(self):
        """True if no plugin raised, as far as we can know."""
        if sys.excepthook is not self:
            # Whatever raised since then was not told to us.
            self._log("error", "plugin", f"sys.excepthook was replaced by {sys.excepthook!r} in a request: no answer")
            self.raised = True
        self._last = self._changing = None
        return not self.raised

    @property
    def changes_by_api(self):
        """The request may change data, and QGIS gives it to an API."""
        return self._changing is not None and not _service(self._changing)

    def __call__(self, kind, value, trace, asked=None):
        """``asked`` is the object of a plugin that raised, where it is known."""
        self.raised = True
        if value is self._last:
            return
        self._last = value
        text = "".join(traceback.format_exception(kind, value, trace))
        self._log("error", "plugin", text)
        plugin = plugins.author(trace, asked)
        if plugin is not None and self.told is None:
            self.told = plugin, text[-plugins.TRACE_MAX :]


class Response(QgsBufferServerResponse):
    """A response whose bytes leave while QGIS still makes them."""

    def __init__(self, server, sink, recorder, eager):
        """``sink.part(status, headers, data)`` takes the parts, blocks while the client
        is slow, and raises when nobody wants more; ``sink.wanted`` is how many bytes
        it likes to get at once; ``sink.on_cancel(stop)`` learns how to end the work.

        ``eager``: hand over at every flush, since server filters read ``data()``
        in ``sendResponse`` and must find what was flushed, no more.
        """
        QgsBufferServerResponse.__init__(self)
        self._server = server
        self._sink = sink
        self._recorder = recorder
        self._eager = eager
        if CAN_STOP:
            self._feedback = QgsFeedback()
            sink.on_cancel(self._feedback.cancel)

    # Of an answer that is never flushed, which most are.
    _device = None
    _wanted = 0
    _feedback = None
    _sent_status = None
    _broken = False
    keys = ()

    @property
    def started(self):
        """The head has left with the first part."""
        return self._sent_status is not None

    @property
    def broken(self):
        """What the sink got is not the beginning of what the answer has become."""
        sent = self._sent_status
        return self._broken or (sent is not None and self.statusCode() != sent)

    def feedback(self):
        """QGIS looks here while it draws, and stops when it is cancelled."""
        return self._feedback

    def flush(self):
        if self._device is None:
            self._device = self.io()
            if not self._eager:
                self._wanted = self._sink.wanted
        if self._device.pos() < self._wanted or self._broken:
            return
        status = self.statusCode() if self._sent_status is None else self._sent_status
        try:
            if self._recorder.raised:
                # Fail closed: what comes now was made without the plugin's consent.
                raise RuntimeError("a plugin raised while the request ran")
            self._sink.part(status, self.headers(), self.data())
        except BaseException:
            # QGIS stops its work at once when flush raises.
            self._broken = True
            raise
        finally:
            super().truncate()
        self._sent_status = status
        if not self._eager:
            self._wanted = self._sink.wanted

    def finish(self):
        """Called by QGIS at the end; the rest leaves with FINAL."""

    def headersSent(self):
        # QGIS itself asks this before it replaces the answer by an exception report,
        # and then says no more. Services and filters may ask for the fun of it.
        if sys._getframe(1).f_code is serve.__code__:
            self._break()
        return self.started

    def clear(self):
        self._break()
        QgsBufferServerResponse.clear(self)

    def sendError(self, code, message):
        self._break()
        # QGIS says this of a filter that raised before there was a service, and would
        # call the service all the same if there were no exception.
        handler = self._server.serverInterface().requestHandler()
        if handler is not None:
            handler.setServiceException(QgsServerException(message, code))
        super().sendError(code, message)

    def truncate(self):
        # With filters everything that was flushed has left: they may replace the rest.
        if not self._eager:
            self._break()
        super().truncate()

    def _break(self):
        """What has left cannot be replaced, so the stream must not look complete."""
        if self._sent_status is not None:
            self._broken = True


class Document(Response):
    """A response that plugins may let be kept for others."""

    def __init__(self, server, sink, recorder, eager, hands):
        """``hands.keys()`` says for whom the document was made; it is asked while the
        plugins still know the request.
        """
        super().__init__(server, sink, recorder, eager)
        self._hands = hands

    def finish(self):
        self.keys = self._hands.keys()


# Where the landing page is. QGIS looks here at each request, and nowhere else.
LANDING_PAGE = "QGIS_SERVER_LANDING_PAGE_PREFIX"
_landing_page = None


def mount(prefix):
    """A proxy may have the landing page elsewhere: below ``prefix``."""
    global _landing_page
    if _landing_page is None:
        _landing_page = os.environ.get(LANDING_PAGE, "")
    if _landing_page:
        # QGIS has a project of the catalogue there while it answers for it, and would take
        # it for that of a request without one if it was interrupted.
        os.unsetenv("QGIS_PROJECT_FILE")
    path = prefix + _landing_page
    if _landing_page and os.environ[LANDING_PAGE] != path:
        os.environ[LANDING_PAGE] = path


def _at_home(url, prefix):
    """``url`` without the ``prefix`` that a proxy is said to have, where an API of a plugin
    would take it for its own because of that: the path that was asked for was looked at by
    the server, which knows what is enabled.
    """
    if not prefix or not plugins.apis:
        return url
    start = url.find("/", url.find("://") + 3)
    if not url.startswith(prefix, start):
        return url
    from qgis.PyQt.QtCore import QUrl

    home = url[:start] + url[start + len(prefix) :]
    there, here = QUrl(url), QUrl(home)
    is_stray = any(_accepts(api, there) and not _accepts(api, here) for api in plugins.apis)
    return home if is_stray else url


def _accepts(api, url):
    try:
        return api.accept(url)
    except Exception:
        # QGIS asks it, too, and then it counts.
        return False


def serve(server, recorder, sink, eager, method, url, headers, body, project, hands=None):
    """Pass one request to QGIS.

    Returns ``(status, headers, data, keys)`` with all that the sink did not get: the whole
    answer, or the rest of a stream; and, if there are ``hands``, for whom it was made.
    Returns ``None`` when the answer is not to be trusted: a plugin raised or the stream broke.
    """
    verb = METHODS.get(method)
    if verb is None:
        return 405, {"Allow": ", ".join(METHODS)}, b"", ()
    prefix = headers.get("X-Forwarded-Prefix", "")
    mount(prefix)
    request = QgsBufferServerRequest(url, verb, headers, body)
    if body or not _service(request):
        # QGIS may look for an API.
        request = QgsBufferServerRequest(_at_home(url, prefix), verb, headers, body)
    if hands is None:
        response = Response(server, sink, recorder, eager)
    else:
        response = Document(server, sink, recorder, eager, hands)
    if _is_parsed(method, headers, body) and _is_too_much(body):
        return 413, {"Content-Type": "text/xml; charset=utf-8"}, TOO_MUCH, ()
    if project is None and _names_project(method, request, headers, body):
        return 500, {"Content-Type": "text/xml; charset=utf-8"}, NO_PROJECT, ()
    recorder.begin(None if method in READING else request)
    if project is None and services.offered and _service(request) in services.offered:
        # QGIS asks no service without one.
        project = QgsProject()
    if project is None:
        server.handleRequest(request, response)
    else:
        server.handleRequest(request, response, project)
    consented = recorder.end()
    is_good = consented and not response.broken
    if not consented and project is not None:
        # QGIS may have kept a document that was made so.
        server.serverInterface().removeConfigCacheEntry(project.fileName())
    status, data = response.statusCode(), response.data()
    if not is_good and (body or _service(request) is not None or not _is_bare(response, status, data)):
        return None
    return status, response.headers(), data, response.keys


def _is_parsed(method, headers, body):
    """Whether QGIS looks for parameters in the body."""
    return body and method not in READING and "json" not in headers.get("Content-Type", "")


def _is_too_much(body):
    """As a document, or as ``name=value&…`` if it is none."""
    if body.count(b"<") > DEPTH_MAX and _depth(body) > DEPTH_MAX:
        return True
    if body.count(b"&") < PARAMETERS_MAX:
        return False
    _, is_one = _document(_text(body))
    return not is_one


def _depth(body):
    """Of the elements in each other, up to where the body is no document any more."""
    from xml.parsers import expat

    depth = deepest = 0

    def begin(*_):
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)

    def end(_):
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    try:
        parser.Parse(body, True)
    except expat.ExpatError:
        # Qt stops there, too.
        pass
    return deepest


def _names_project(method, request, headers, body):
    """QGIS reads MAP in the body, too, of what does not call itself JSON, and would open any
    file or database that is named there. Where projects may be was looked at before, and if
    that led to none, none is opened.
    """
    if request.parameters().get("MAP"):
        return True
    if not _is_parsed(method, headers, body):
        return False
    from qgis.server import QgsServerParameters

    said = QgsServerParameters()
    for name in _names(body):
        said.add(name, "1")
    return bool(said.map())


def _names(body):
    """Of the parameters that QGIS may read in a body: the attributes of a document, or else
    ``name=value&…``.
    """
    from qgis.PyQt.QtCore import QUrlQuery

    text = _text(body)
    document, _ = _document(text)
    attributes = document.documentElement().attributes()
    # Without its prefix, as QGIS looks for it.
    names = {attributes.item(n).toAttr().name() for n in range(attributes.count())}
    return names | {name for name, _ in QUrlQuery(text).queryItems()}


def _document(text):
    """As QGIS reads it, and whether it is one to its end."""
    from qgis.PyQt.QtXml import QDomDocument

    document = QDomDocument()
    # Before Qt 6 what follows a NUL is no part of a text.
    is_one, *_ = document.setContent(text.split("\0")[0], True)
    return document, is_one


def _text(body):
    """Qt takes no mark of its encoding for a part of a text."""
    return body.decode("utf-8-sig", "replace")


def _service(request):
    return request.parameters().get("SERVICE")


def _is_bare(response, status, data):
    """A filter raised and QGIS tells nothing of it, nor anything else.

    Who asks for no service speaks no language of the OGC, so these words will do.
    """
    return not response.started and status == 500 and bytes(data[: len(BARE) + 1]) == BARE
