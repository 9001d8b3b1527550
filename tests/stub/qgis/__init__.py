"""A stand-in for PyQGIS that does what a request tells it to.

Only what `python/qgisserver` uses is here. `server.py` says what a request may
ask for; tests and stub talk through files in the folder `control` beside this
package: see `control.py`.
"""
