"""Filters and access controls that let everything pass, but raise where the parameter RAISE
says so, and return what nobody can use where LIE says so.

What restricts features and what gives rights is written by two that do not know each other.
"""

from qgis.server import QgsAccessControlFilter, QgsServerFilter


def serverClassFactory(interface):
    return Denying(interface)


class Denying:
    def __init__(self, interface):
        self.filter, self.late = Filter(interface), QgsServerFilter(interface)
        # QGIS finds it here, too, though no class has it.
        self.late.requestReady = lambda: step(interface, "late")
        interface.registerFilter(self.filter, 10)
        interface.registerFilter(self.late, 20)
        self.features, self.rights = Features(interface), Rights(interface)
        interface.registerAccessControl(self.features, 10)
        interface.registerAccessControl(self.rights, 20)


def step(interface, where, answer=None):
    handler = interface.requestHandler()
    asked = handler.parameterMap() if handler is not None else {}
    if asked.get("RAISE") == where:
        raise ValueError(f"secret of {where}")
    return 5 if asked.get("LIE") == where else answer


class Filter(QgsServerFilter):
    def requestReady(self):
        step(self.serverInterface(), "requestReady")


class Features(QgsAccessControlFilter):
    def __init__(self, interface):
        super().__init__(interface)
        self.interface = interface

    def layerFilterExpression(self, layer):
        return step(self.interface, "layerFilterExpression")

    def layerFilterSubsetString(self, layer):
        return step(self.interface, "layerFilterSubsetString", "")


class Rights(QgsAccessControlFilter):
    def __init__(self, interface):
        super().__init__(interface)
        self.interface = interface

    def layerPermissions(self, layer):
        return step(self.interface, "layerPermissions", super().layerPermissions(layer))

    def authorizedLayerAttributes(self, layer, attributes):
        return step(self.interface, "authorizedLayerAttributes", attributes)

    def allowToEdit(self, layer, feature):
        return bool(step(self.interface, "allowToEdit", True))
