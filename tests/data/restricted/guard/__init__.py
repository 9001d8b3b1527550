"""Access control by the header X-Qgis-User: `ada` sees every layer, others no `countries`.

Without a user the control has no key, so that nobody may keep what it made.
"""

from qgis.server import QgsAccessControlFilter


class Guard(QgsAccessControlFilter):
    def _user(self):
        return self.serverInterface().requestHandler().requestHeader("X-Qgis-User")

    def layerPermissions(self, layer):
        rights = QgsAccessControlFilter.LayerPermissions()
        rights.canRead = self._user() == "ada" or layer.name() != "countries"
        return rights

    def cacheKey(self):
        return self._user()


def serverClassFactory(interface):
    guard = Guard(interface)
    interface.registerAccessControl(guard, 100)
    return guard
