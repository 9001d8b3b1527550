#!/bin/sh
# serve.sh PROGRAM [OPTION...]: serve the example projects until stopped, and say what to try.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
program=$1
shift

# A copy, because clients may edit the layer `places`; newer QGIS refuses that by default.
projects=$(mktemp -d)
trap 'rm -rf "$projects"' EXIT
cp -R "$here/projects/." "$projects"
"$program" -b 127.0.0.1 -p "${PORT:-8080}" --rootdir "$projects" \
    --set projects.cache.force_readonly_layers=no "$@" &
server=$!
trap 'kill -TERM $server 2>/dev/null || true' HUP INT TERM

ready() {
    /usr/bin/python3 - "$1" <<'PYTHON'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=2)
except OSError:
    sys.exit(1)
PYTHON
}

base=http://127.0.0.1:${PORT:-8080}
tries=0
until ready $base/ready; do
    kill -0 $server 2>/dev/null || { status=0; wait $server || status=$?; exit $status; }
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { echo "no worker became ready" >&2; kill $server; wait $server || true; exit 1; }
    sleep 0.2
done

cat <<TEXT

Ready. Try:

  $base/ows/?SERVICE=WMS&REQUEST=GetCapabilities&MAP=world
  $base/ows/?SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&MAP=world&LAYERS=countries&STYLES=&CRS=EPSG:4326&BBOX=-90,-180,90,180&WIDTH=1000&HEIGHT=500&FORMAT=image/png
  $base/ows/?SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&MAP=world&TYPENAME=countries&MAXFEATURES=5&OUTPUTFORMAT=GeoJSON
  $base/ows/?SERVICE=WCS&VERSION=1.0.0&REQUEST=GetCapabilities&MAP=world
  $base/ows/?SERVICE=WMTS&VERSION=1.0.0&REQUEST=GetCapabilities&MAP=world
  $base/wfs3/collections?MAP=world

In QGIS: Layer > Add WMS/WMTS Layer, new connection to $base/ows/?MAP=world
Stop with Ctrl-C.
TEXT

# The trap interrupts the first wait; the server then drains.
status=0
wait $server || status=$?
while kill -0 $server 2>/dev/null; do status=0; wait $server || status=$?; done
exit $status
