"""The access control of QGIS's own tests, in workers.

The tests register it in their own process and switch it on and off there; the shim says
with each request whose it is and what is on.
"""

import ast
import json
import os
from pathlib import Path

from qgis.server import QgsAccessControlFilter

# As in shim.py.
HEADER = "X-Qgis-Replay-Filters"
SWITCHES = ("_active", "active")

# What such a filter is asked.
QUESTIONS = (
    "allowToEdit",
    "authorizedLayerAttributes",
    "cacheKey",
    "layerFilterExpression",
    "layerFilterSubsetString",
    "layerPermissions",
)


def serverClassFactory(interface):
    tests = Path(os.environ["QGIS_REPLAY_TESTS"])
    for path in sorted(tests.glob("test_qgsserver_accesscontrol*.py")):
        for made in filters(path, interface):
            told = as_told(made, f"{path.stem}.{made.__name__}")
            interface.registerAccessControl(told(interface), 100)
    return None


def filters(path, interface):
    """Those that the tests define. The tests themselves would start another QGIS."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and "QgsAccessControlFilter" in map(ast.unparse, node.bases):
            # What one of them has from the function that it stands in.
            known = {"QgsAccessControlFilter": QgsAccessControlFilter, "iface": interface}
            exec(compile(ast.Module([node], []), path, "exec"), known)
            yield known[node.name]


def as_told(made, key):
    """The filter, which has no say but in requests of its own test, and its switches as
    that has them."""

    def said(self):
        request = self.serverInterface().requestHandler()
        header = request and request.requestHeader(HEADER)
        return json.loads(header or "{}").get(key)

    def switch(name):
        return property(lambda self: (said(self) or {}).get(name, getattr(made, name)))

    def answer(name):
        def to(self, *question):
            asked = QgsAccessControlFilter if said(self) is None else made
            return getattr(asked, name)(self, *question)

        return to

    own = {name: switch(name) for name in SWITCHES if hasattr(made, name)}
    own.update((name, answer(name)) for name in QUESTIONS if name in vars(made))
    return type(made.__name__, (made,), own)
