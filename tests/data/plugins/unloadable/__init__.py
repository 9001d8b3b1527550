"""A plugin that cannot be loaded."""


def serverClassFactory(interface):
    raise ImportError("something is missing")
