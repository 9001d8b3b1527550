"""Static methods that print; see `qgisserver/services.py`."""

import os
import sys


class Literal:
    def __init__(self, iface):
        self.canvas = iface.mapCanvas()

    @staticmethod
    def GetCapabilities(project_path, parameters):
        print(f"<ul><li>{os.path.basename(project_path)}</li></ul>")
        return "text/html"

    @staticmethod
    def SayHello(project_path, parameters):
        print("Hello", parameters.get("NAME", "world"))

    @staticmethod
    def Bytes(project_path, parameters):
        sys.stdout.buffer.write(b"\x89\x00\xff")
        return "application/octet-stream"

    @staticmethod
    def Raise(project_path, parameters):
        print("before")
        raise ValueError("secret of a method")

    @staticmethod
    def Unlisted(project_path, parameters):
        print("nobody may call this")
