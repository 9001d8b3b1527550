def classFactory(iface):
    raise RuntimeError("this is for the desktop")
