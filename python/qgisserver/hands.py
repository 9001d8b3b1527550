"""Who has a hand in answers besides QGIS: access control of plugins, and the operator."""

import qgis.server
from qgis.server import QgsServerFilter


class Hands:
    """Knows the access controls that plugins register, which QGIS itself does not tell."""

    def __init__(self, interface):
        self._controls = []
        register = getattr(interface, "registerAccessControl", None)
        if register is None:
            return

        def note(control, *priority):
            self._controls.append(control)
            register(control, *priority)

        # Plugins get this very object.
        interface.registerAccessControl = note

    @property
    def restrict(self):
        """Answers may differ from client to client.

        Plugins have more than one way to register what they wrote, so that they wrote it
        is enough.
        """
        kind = getattr(qgis.server, "QgsAccessControlFilter", None)
        return bool(self._controls) or kind is not None and bool(kind.__subclasses__())

    def keys(self):
        """For whom the present request is answered, in the words of each access control.

        Empty if one of them has no words for it.
        """
        keys = [control.cacheKey() for control in self._controls]
        return keys if all(keys) else []


# QGIS calls filters in this order, so that this one sees what others made of a request.
LAST = 2**31 - 1

_limit = None


def limit_features(interface, limit):
    """From now on no GetFeature gets more than ``limit`` features, however it asks."""
    global _limit
    _limit = FeatureLimit(interface, limit)
    interface.registerFilter(_limit, LAST)


class FeatureLimit(QgsServerFilter):
    """QGIS has read the request by then, query, form or XML, and made parameters of it."""

    def __init__(self, interface, limit):
        super().__init__(interface)
        self._limit = limit

    def requestReady(self):
        handler = self.serverInterface().requestHandler()
        asked = {name.upper(): text for name, text in handler.parameterMap().items()}
        operation = asked.get("REQUEST", "").rpartition(":")[2]
        if asked.get("SERVICE", "").upper() == "WFS" and operation.upper() == "GETFEATURE":
            allowed = str(self._allowed(asked))
            handler.setParameter("MAXFEATURES", allowed)
            if asked.get("VERSION", "").startswith("2"):
                # So it is called there; QGIS knows no such version yet.
                handler.setParameter("COUNT", allowed)

    def _allowed(self, asked):
        wanted = (_count(asked.get(name, "")) for name in ("COUNT", "MAXFEATURES"))
        return min([self._limit, *(number for number in wanted if number is not None)])


def _count(text):
    """None for what is no count: QGIS takes some of that for any number."""
    text = text.strip()
    return int(text) if text.isdecimal() and text.isascii() else None
