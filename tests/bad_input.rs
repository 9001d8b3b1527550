//! Whatever a client or a project says, the answer is clear and the worker lives.

mod common;

use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Instant;

use common::http::read_all;
use common::{Reply, SOON, Server, World, capabilities, eventually, source};
use roxmltree::Document;

const MAP: &str = "VERSION=1.3.0&REQUEST=GetMap&STYLES=&CRS=EPSG:4326&BBOX=-90,-180,90,180&WIDTH=60&HEIGHT=30&FORMAT=image/png";

/// The answer is an OGC exception; its text.
fn exception(reply: &Reply) -> String {
    let text = reply.text();
    let document = Document::parse(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let root = document.root_element();
    assert!(root.tag_name().name().contains("Exception"), "{text}");
    root.descendants()
        .filter(|node| node.is_text())
        .filter_map(|node| node.text())
        .collect::<String>()
        .trim()
        .to_owned()
}

/// All that happens in between costs no worker.
fn without_losses(server: &Server, work: impl FnOnce()) {
    let before = server.workers();
    work();
    let good = server.get(&format!("/ows/?MAP=world&SERVICE=WMS&LAYERS=land&{MAP}"));
    assert_eq!(good.status, 200, "{}", good.text());
    assert_eq!(server.workers(), before, "a worker was lost");
}

/// What QGIS answers in a process of its own: status and body of each query.
const ALONE: &str = "
import json, os, sys
os.environ['QT_QPA_PLATFORM'] = 'offscreen'
from qgis.core import QgsApplication
from qgis.server import QgsBufferServerRequest, QgsBufferServerResponse, QgsServer
application = QgsApplication([], False)
server, answers = QgsServer(), []
for query in sys.argv[1:]:
    response = QgsBufferServerResponse()
    server.handleRequest(QgsBufferServerRequest('http://localhost/ows/?' + query), response)
    answers.append((response.statusCode(), bytes(response.body()).decode()))
print(json.dumps(answers))
";

#[test]
fn a_server_that_is_told_to_refuse_like_qgis_does_so_word_for_word() {
    let world = World::real();
    std::fs::write(world.path("projects/prose.qgs"), "This is not a project.").unwrap();
    let server = Server::start(world, "server.qgis_refusals = yes").ready();
    let root = server.world.projects().display().to_string();
    let queries = [
        String::new(),
        "SERVICE=WMS&REQUEST=GetCapabilities".into(),
        format!("MAP={root}/world.qgs"),
        format!("MAP={root}/world.qgs&REQUEST=GetCapabilities"),
        format!("MAP={root}/world.qgs&SERVICE=WMS"),
        format!("MAP={root}/absent.qgs&SERVICE=WMS&REQUEST=GetCapabilities"),
        format!("MAP={root}/prose.qgs&SERVICE=WFS&REQUEST=GetCapabilities"),
        format!("MAP={root}/broken.qgs&SERVICE=WMS&REQUEST=GetCapabilities"),
    ];
    let alone = Command::new("/usr/bin/python3")
        .args(["-c", ALONE])
        .args(&queries)
        // As in workers: the order of attributes depends on it.
        .env("QT_HASH_SEED", "0")
        .output()
        .unwrap();
    let alone: Vec<(u16, String)> = serde_json::from_slice(&alone.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&alone.stderr)));
    assert_eq!(alone.len(), queries.len());
    without_losses(&server, || {
        for (query, expected) in queries.iter().zip(alone) {
            let reply = server.get(&format!("/ows/?{query}"));
            assert_eq!((reply.status, reply.text()), expected, "{query}");
        }
        let api = server.get("/wfs3/collections?MAP=absent");
        assert_eq!(api.status, 404, "an API keeps its own: {}", api.text());
    });
}

#[test]
fn a_project_that_cannot_be_read_is_a_422_and_an_exception() {
    let world = World::real();
    let good = std::fs::read_to_string(world.path("projects/world.qgs")).unwrap();
    let files: [(&str, &[u8]); 6] = [
        ("cut.qgs", &good.as_bytes()[..good.len() / 2]),
        ("noise.qgs", &[0xff, 0xfe, 0, 1, 2, 3, 0x80]),
        ("prose.qgs", b"This is not a project."),
        ("empty.qgs", b""),
        ("noise.qgz", b"This is not a zip."),
        (
            "empty.qgz",
            b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ),
    ];
    for (name, bytes) in files {
        std::fs::write(world.path("projects").join(name), bytes).unwrap();
    }
    let server = Server::start(world, "").ready();
    without_losses(&server, || {
        for (name, _) in files {
            let reply = server.get(&capabilities(name));
            assert_eq!(reply.status, 422, "{name}: {}", reply.text());
            assert!(exception(&reply).contains(name));
            let reply = server.get(&format!("/wfs3/collections?MAP={name}"));
            assert_eq!(reply.status, 422, "{name}: {}", reply.text());
            assert_eq!(reply.json()["status"], 422);
        }
    });
}

#[test]
fn a_broken_layer_makes_a_project_unavailable_unless_the_operator_is_lenient() {
    let path = format!("/ows/?MAP=broken&SERVICE=WMS&LAYERS=land,countries&{MAP}");
    let strict = Server::real("");
    without_losses(&strict, || {
        let reply = strict.get(&path);
        assert_eq!(reply.status, 422, "{}", reply.text());
        assert!(exception(&reply).contains("layer"));
    });
    strict
        .process
        .log
        .wait_for("the name of the layer", |line| {
            (line.contains("lost") && line.contains("broken")).then_some(())
        });
    let lenient = Server::real("projects.cache.strict_check = no");
    let reply = lenient.get(&path);
    assert_eq!(
        (reply.status, reply.header("content-type")),
        (200, Some("image/png")),
        "{}",
        reply.text()
    );
}

/// QGIS opens by itself what it finds under the name of MAP in a request that comes to it
/// without a project, and it finds that in bodies and by names that are none for others.
#[test]
fn no_spelling_of_a_parameter_and_no_body_opens_a_project_outside_the_root() {
    let secret = std::fs::read_to_string(source("examples/projects/world.qgs")).unwrap();
    let secret = secret
        .replace(">World<", ">Secret<")
        .replace(">Land<", ">Secret<");
    // Where plugins answer, requests come without a project, too.
    let plugins = source("tests/data/points");
    let plugins = format!("server.pluginpath = {}", plugins.display());
    for settings in ["", "server.qgis_refusals = yes", &plugins] {
        let world = World::real();
        std::fs::write(world.path("secret.qgs"), &secret).unwrap();
        symlink(world.path("projects/data"), world.path("data")).unwrap();
        let map = world.path("secret.qgs").display().to_string();
        let server = Server::start(world, settings).ready();
        let untold = |reply: &Reply, what: &str| {
            let text = reply.text().to_lowercase();
            let path = map.to_lowercase();
            let text = text
                .replace(&path, "")
                .replace(&path.replace('/', "%2f"), "");
            assert!(!text.contains("secret"), "{what}: {} {text}", reply.status);
        };
        without_losses(&server, || {
            for name in ["MAP", "map%00", "MAP%00x", "::MAP", "%3a:m%41p", ":MAP"] {
                for path in ["/wfs3/collections?", "/ows/?", "/ows/?MAP=world&"] {
                    let path = format!("{path}SERVICE=WMS&REQUEST=GetCapabilities&{name}={map}");
                    untold(&server.get(&path), &path);
                }
            }
            let bodies = [
                format!("MAP={map}"),
                format!("a=1&%3A%3Am%61p={map}"),
                format!("\u{FEFF}map={map}"),
                format!("<GetCapabilities service='WMS' MAP='{map}'/>"),
                format!("\u{FEFF}<GetCapabilities service='WMS' :::map='{map}'/>"),
                format!("<GetCapabilities service='WMS' MAP='{map}'/>\0"),
                format!("<GetCapabilities service='WMS' x:MAP='{map}'/>"),
                format!("<GetCapabilities service='WMS' xmlnsx:MAP='{map}'/>"),
            ];
            for body in &bodies {
                let paths = [
                    "/wfs3/collections",
                    "/wfs3/collections/places/items",
                    "/ows/?SERVICE=WMS&REQUEST=GetCapabilities",
                    "/ows/",
                ];
                for (path, method) in paths
                    .iter()
                    .flat_map(|path| [(path, "POST"), (path, "PUT")])
                {
                    for kind in ["text/plain", "text/xml", "application/JSON"] {
                        let headers = [("Content-Type", kind)];
                        let reply = server.request(method, path, &headers, body.as_bytes());
                        untold(&reply, &format!("{method} {path} {kind} {body}"));
                    }
                }
            }
            let reply = server.post("/wfs3/collections", "text/plain", b"a=b");
            assert_eq!(reply.status, 200, "other bodies do no harm");
            let [outside, absent] = [&map, "nowhere"].map(|map| {
                let reply = server.get(&capabilities(map));
                (reply.status, reply.text().replace(map, ""))
            });
            assert_eq!(outside, absent, "{settings}");
        });
    }
}

/// QGIS looks for projects in the folder where it is started.
#[test]
fn a_project_where_the_server_is_started_is_not_that_of_requests_that_name_none() {
    let world = World::real();
    let folder = world.projects();
    let world = world.with("PWD", &folder);
    let server = Server::start(world, "server.qgis_refusals = yes").ready();
    let api = server.get("/wfs3/collections");
    assert_eq!(api.json()["collections"], serde_json::json!([]));
    let refused = server.get("/ows/?SERVICE=WMS&REQUEST=GetCapabilities");
    assert_eq!(refused.status, 500);
    assert!(refused.text().contains("Project file error"));
    assert_eq!(server.get(&capabilities("world")).status, 200);
}

/// QGIS parses them before it knows what is asked for.
#[test]
fn a_small_body_that_would_stop_a_worker_is_refused() {
    let server = Server::real("server.timeout = 20");
    let query = "/ows/?MAP=world&SERVICE=WMS&REQUEST=GetCapabilities";
    let nested = |n| "<a>".repeat(n) + &"</a>".repeat(n);
    let pairs = |n| (0..n).map(|i| format!("a{i}=&")).collect::<String>();
    let quoted = format!(
        "<GetCapabilities>{}</GetCapabilities>",
        "&amp;".repeat(5000)
    );
    without_losses(&server, || {
        for (body, is_refused) in [
            (nested(60_000), true),
            ("<a>".repeat(60_000), true),
            (nested(500), false),
            (pairs(20_000), true),
            (format!("<a>&{}", pairs(20_000)), true),
            (pairs(900), false),
            (quoted, false),
        ] {
            for kind in ["text/xml", "text/plain"] {
                let reply = server.post(query, kind, body.as_bytes());
                let start = &body[..20];
                assert_eq!(reply.status == 413, is_refused, "{start} {}", reply.status);
                assert!(is_refused || reply.status < 502, "{start} {}", reply.status);
            }
        }
        let reply = server.post(query, "text/xml", nested(60_000).as_bytes());
        assert!(exception(&reply).contains("too deep"));
    });
}

/// Nobody learns from an answer whether a file exists that is not served.
#[test]
fn a_map_outside_the_root_gets_the_answer_of_an_absent_one() {
    let world = World::real();
    // Outside the root, there are real projects.
    for name in ["world.qgs", "atlas.qgz"] {
        std::fs::copy(world.path("projects").join(name), world.path(name)).unwrap();
    }
    symlink(world.path("world.qgs"), world.path("projects/link.qgs")).unwrap();
    symlink(world.path(""), world.path("projects/folder")).unwrap();
    std::fs::create_dir(world.path("projects/directory.qgs")).unwrap();
    let outside = world.path("world").to_str().unwrap().to_owned();
    let server = Server::start(world, "").ready();
    without_losses(&server, || {
        let absent = server.get(&capabilities("nowhere"));
        assert_eq!(absent.status, 404, "{}", absent.text());
        let said = exception(&absent);
        assert!(said.contains("nowhere"), "{said}");
        let maps = [
            "../world",
            "../world.qgs",
            "../projects/../world.qgs",
            "data/../../world",
            "..%2fworld.qgs",
            "%2e%2e/world",
            "....//world.qgs",
            "..\\world.qgs",
            &outside,
            &format!("{outside}.qgs"),
            &format!("file:{outside}.qgs"),
            &format!("file://{outside}.qgs"),
            "/etc/passwd",
            "file:///etc/passwd",
            "link",
            "link.qgs",
            "folder/world",
            "folder/world.qgs",
            "directory",
            "directory.qgs",
            "data/places.gpkg",
            "geopackage:data/places.gpkg?projectName=x",
            "postgresql://127.0.0.1:9/x?project=y",
            "http://127.0.0.1:9/world.qgs",
            "/vsicurl/http://127.0.0.1:9/world.qgs",
            ".",
            "..",
            "/",
            "world.qgs%00.qgz",
            "wo%0arld",
        ];
        for map in maps {
            let reply = server.get(&capabilities(map));
            assert_eq!(reply.status, 404, "{map}: {}", reply.text());
            let text = exception(&reply);
            let (before, after) = said.split_once("nowhere").unwrap();
            assert!(
                text.starts_with(before) && text.ends_with(after),
                "{map}: {text}"
            );
            let about = |reply: &Reply| -> Vec<(String, String)> {
                let differ = ["date", "x-request-id", "content-length", "x-map-id"];
                let mut headers = reply.headers.clone();
                headers.retain(|(name, _)| !differ.contains(&name.to_ascii_lowercase().as_str()));
                headers
            };
            assert_eq!(about(&reply), about(&absent), "{map}");
        }
    });
}

#[test]
fn missing_and_unknown_parameters_get_an_ogc_exception() {
    let server = Server::real("");
    without_losses(&server, || {
        for (query, statuses) in [
            ("", 400..=400),
            ("MAP=", 400..=400),
            ("SERVICE=WMS&REQUEST=GetCapabilities", 400..=400),
            ("MAP=&SERVICE=WMS&REQUEST=GetCapabilities", 400..=400),
            ("MAP=world", 400..=501),
            ("MAP=world&REQUEST=GetCapabilities", 400..=501),
            ("MAP=world&SERVICE=&REQUEST=GetCapabilities", 400..=501),
            ("MAP=world&SERVICE=XYZ&REQUEST=GetCapabilities", 400..=501),
            ("MAP=world&SERVICE=WMS", 400..=501),
            ("MAP=world&SERVICE=WFS&VERSION=1.1.0", 400..=501),
            ("MAP=world&SERVICE=WMS&REQUEST=", 400..=501),
            ("MAP=world&SERVICE=WMS&REQUEST=GetNothing", 400..=501),
            (
                "MAP=world&SERVICE=WFS&VERSION=1.1.0&REQUEST=GetNothing",
                400..=501,
            ),
            ("MAP=world&SERVICE=WCS&REQUEST=GetNothing", 400..=501),
            ("MAP=world&SERVICE=WMTS&REQUEST=GetNothing", 400..=501),
            (
                "MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap",
                400..=400,
            ),
            (
                "MAP=world&SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature",
                400..=400,
            ),
        ] {
            let reply = server.get(&format!("/ows/?{query}"));
            assert!(
                statuses.contains(&reply.status),
                "{query}: {}: {}",
                reply.status,
                reply.text()
            );
            assert!(!exception(&reply).is_empty(), "{query}: {}", reply.text());
        }
    });
}

#[test]
fn bodies_of_nonsense_get_an_exception() {
    let server = Server::real("");
    without_losses(&server, || {
        let bodies: [&[u8]; 5] = [
            b"<wfs:Transaction",
            b"\xff\xfe\x00",
            b"<nonsense/>",
            b"<!DOCTYPE a [<!ENTITY x SYSTEM \"file:///etc/passwd\">]><a>&x;</a>",
            &[b'<'; 100_000],
        ];
        for body in bodies {
            let reply = server.post("/ows/?MAP=world&SERVICE=WFS", "text/xml", body);
            assert!(
                (400..=501).contains(&reply.status),
                "{}: {}",
                reply.status,
                reply.text()
            );
            exception(&reply);
            assert!(!reply.text().contains("root:"), "{}", reply.text());
        }
    });
}

#[test]
fn garbage_on_the_http_port_is_refused_and_harms_nobody() {
    let server = Server::real("server.header_timeout = 1\nserver.body_timeout = 1");
    without_losses(&server, || {
        let garbage: [&[u8]; 10] = [
            b"\0\0\0\0\r\n\r\n",
            &[0xff; 4096],
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: x\r\n\r\n",
            b"POST /ows/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            b"POST /ows/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /ows/ HTTP/1.1\r\nHost",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense nonsense nonsense",
        ];
        for bytes in garbage {
            let mut client = server.connect();
            let _ = client.write_all(bytes);
            let start = Instant::now();
            let (reply, _) = read_all(&mut client);
            let text = String::from_utf8_lossy(&reply).into_owned();
            let refused =
                reply.is_empty() || text.starts_with("HTTP/1.1 4") || !text.starts_with("HTTP/1.1");
            assert!(refused, "{:?}: {text}", String::from_utf8_lossy(bytes));
            assert!(
                start.elapsed() < SOON,
                "{:?}",
                String::from_utf8_lossy(bytes)
            );
        }
    });
}

#[test]
fn what_is_too_long_says_what_is_too_long() {
    let server =
        Server::real("server.body_max = 10000\nserver.uri_max = 2000\nserver.header_max = 9000");
    without_losses(&server, || {
        let long = |n| "x".repeat(n);
        assert_eq!(
            server
                .get(&format!("{}&X={}", capabilities("world"), long(3000)))
                .status,
            414
        );
        assert_eq!(
            server
                .request(
                    "GET",
                    &capabilities("world"),
                    &[("X-Long", &long(20_000))],
                    b""
                )
                .status,
            431
        );
        let body = long(20_000);
        assert_eq!(
            server
                .post("/ows/?MAP=world&SERVICE=WFS", "text/xml", body.as_bytes())
                .status,
            413
        );
    });
}

fn with_plugins() -> Server {
    let plugins = source("tests/data/plugins");
    Server::real(&format!("server.pluginpath = {}", plugins.display()))
}

#[test]
fn a_plugin_that_raises_is_a_500_that_tells_nothing_and_shows_nothing() {
    let server = with_plugins();
    let map = format!("/ows/?MAP=world&SERVICE=WMS&LAYERS=countries&{MAP}");
    let features =
        "/ows/?MAP=world&SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=land&MAXFEATURES=3";
    without_losses(&server, || {
        let service = "/ows/?MAP=world&SERVICE=RAISING&REQUEST=x";
        assert_eq!(server.get(service).text(), "before and after");
        assert_eq!(server.get(&map).status, 200);
        assert_eq!(server.get(features).status, 200);
        for (path, place) in [
            (service, "service"),
            (&map, "requestReady"),
            (&map, "responseComplete"),
            (&map, "layerPermissions"),
            (&map, "layerFilterExpression"),
            (features, "requestReady"),
            (features, "sendResponse"),
            (features, "layerPermissions"),
            (features, "layerFilterExpression"),
            (features, "authorizedLayerAttributes"),
        ] {
            let reply = server.get(&format!("{path}&RAISE={place}"));
            assert_eq!(reply.status, 500, "{place}: {}", reply.text());
            let text = reply.text();
            // What a filter says while QGIS streams, QGIS itself repeats to the client.
            let repeated = place == "sendResponse";
            assert!(repeated || !text.contains("secret"), "{place}: {text}");
            assert!(
                !text.contains("before") && !text.contains("<gml:"),
                "{place}: {text}"
            );
            server.process.log.wait_line(&format!("secret of {place}"));
        }
    });
}

/// What has left cannot be taken back; a client must not take it for the whole.
#[test]
fn a_stream_that_becomes_an_error_is_cut_off_and_one_that_only_asks_is_not() {
    let server = with_plugins();
    without_losses(&server, || {
        let stream =
            |what: &str| server.try_get(&format!("/ows/?MAP=world&SERVICE=STREAM&REQUEST={what}"));
        for what in ["nothing", "ask"] {
            let reply = stream(what).unwrap();
            assert_eq!((reply.status, reply.body.len()), (200, 40_000), "{what}");
        }
        for what in ["status", "clear", "error"] {
            assert!(stream(what).is_err(), "{what}");
        }
        // QGIS refuses the second layer after the features of the first have left.
        let features = "/ows/?MAP=world&SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=";
        let whole = server.get(&format!("{features}countries"));
        assert!(whole.body.len() > 50_000, "{}", whole.body.len());
        let cut = server.try_get(&format!("{features}countries,places"));
        assert!(cut.is_err(), "{:?}", cut.map(|reply| reply.status));
    });
}

/// A library may report exceptions to somebody else; what was told to it alone is not lost.
#[test]
fn a_plugin_that_takes_the_hook_of_python_does_not_switch_access_control_off() {
    let server = with_plugins();
    let map = format!("/ows/?MAP=world&SERVICE=WMS&LAYERS=countries&{MAP}");
    let status = |more: &str| server.get(&format!("{map}{more}")).status;
    without_losses(&server, || {
        assert_eq!(status("&TAKE=hook"), 500);
        server
            .process
            .log
            .wait_line("sys.excepthook was replaced by");
        assert_eq!(status(""), 200, "the hook is ours again");
        assert_eq!(status("&TAKE=hook&RAISE=layerPermissions"), 500);
        server.process.log.wait_line("secret of layerPermissions");
        assert_eq!(status("&RAISE=layerFilterExpression"), 500);
        assert_eq!(status(""), 200);
    });
}

#[test]
fn plugins_see_the_requests_of_clients_and_no_others() {
    let server = with_plugins();
    let land = server.get(&format!("/ows/?MAP=world&SERVICE=WMS&LAYERS=land&{MAP}"));
    assert_eq!(land.status, 200);
    server.process.log.wait_line("asked for land");
    assert_eq!(server.process.log.count("asked for"), 1);
}

#[test]
fn access_control_is_applied_and_a_plugin_that_does_not_load_is_named() {
    let server = with_plugins();
    without_losses(&server, || {
        assert!(
            !server
                .get(&capabilities("world"))
                .text()
                .contains("<Name>places</Name>")
        );
        let hidden = server.get(&format!("/ows/?MAP=world&SERVICE=WMS&LAYERS=places&{MAP}"));
        assert_eq!(hidden.status, 403, "{}", hidden.text());
        let status = server.status();
        assert_eq!(
            status["workers"][0]["plugins"],
            serde_json::json!(["raising"]),
            "{status}"
        );
        assert_eq!(
            status["workers"][0]["plugins_failed"],
            serde_json::json!(["unloadable"]),
            "{status}"
        );
    });
    server.process.log.wait_line("something is missing");
}

/// Its name begins like that of PyQt's own module, and nobody but us keeps its object.
const FORGETFUL: &str = r#"
import weakref
from qgis.server import QgsServerFilter

class Filter(QgsServerFilter):
    def requestReady(self):
        assert self.plugin() is not None, "the plugin is gone"
        if self.serverInterface().requestHandler().parameter("RAISE"):
            raise ValueError("secret of sipping")

class Plugin:
    def __init__(self, interface):
        server_filter = Filter(interface)
        server_filter.plugin = weakref.ref(self)
        interface.registerFilter(server_filter, 1)

def serverClassFactory(interface):
    return Plugin(interface)
"#;

#[test]
fn plugins_are_kept_and_watched_whatever_their_name_and_bad_metadata_is_reported() {
    let world = World::real();
    let plugin = |name: &str, metadata: &str| {
        let folder = world.path("plugins").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("metadata.txt"), metadata).unwrap();
        std::fs::write(folder.join("__init__.py"), FORGETFUL).unwrap();
    };
    plugin("sipping", "[general]\nserver=True\n");
    plugin("prose", "This is not a list of settings.");
    plugin("desktop", "[general]\n");
    std::fs::write(world.path("plugins/file"), "").unwrap();
    let paths = world.path("plugins");
    let server = Server::start(world, &format!("server.pluginpath = {}", paths.display())).ready();
    without_losses(&server, || {
        let map = format!("/ows/?MAP=world&SERVICE=WMS&LAYERS=land&{MAP}");
        assert_eq!(server.get(&format!("{map}&RAISE=1")).status, 500);
        let worker = &server.status()["workers"][0];
        assert_eq!(worker["plugins"], serde_json::json!(["sipping"]));
        assert_eq!(worker["plugins_failed"], serde_json::json!(["prose"]));
    });
}

/// QGIS gives layers with short ids others, and then follows a null pointer.
#[test]
fn a_project_that_crashes_qgis_is_a_502_and_the_others_are_served() {
    let world = World::real();
    let path = world.path("projects/world.qgs");
    let poison = std::fs::read_to_string(&path)
        .unwrap()
        .replace("example_", "");
    std::fs::write(world.path("projects/poison.qgs"), poison).unwrap();
    let server = Server::start(world, "").ready();
    let reply = server.get(&format!("/ows/?MAP=poison&SERVICE=WMS&LAYERS=world&{MAP}"));
    assert_eq!(reply.status, 502, "{}", reply.text());
    exception(&reply);
    let line = server.process.log.wait_line("SIGSEGV");
    assert!(line.contains("poison") && line.contains("GetMap"), "{line}");
    let good = server.get(&format!("/ows/?MAP=world&SERVICE=WMS&LAYERS=world&{MAP}"));
    assert_eq!(good.status, 200, "{}", good.text());
}

/// On QGIS 3.22 this legend never ends; newer versions draw it.
#[test]
fn a_request_on_which_qgis_hangs_is_a_504_and_the_others_are_served() {
    let server = Server::real("server.timeout = 8");
    let before = server.workers();
    let version = server.status()["workers"][0]["versions"]["qgis"].take();
    let start = Instant::now();
    let legend = "/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetLegendGraphic&FORMAT=image/png&SHOWFEATURECOUNT=TRUE";
    let reply = server.get(&format!("{legend}&LAYER=countries,countries"));
    if version.as_str().expect("it is said").starts_with("3.22") {
        assert_eq!(reply.status, 504, "{}", reply.text());
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        eventually("the worker is replaced", || {
            let now = server.workers();
            (now.len() == 1 && now != before).then_some(())
        });
    } else {
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    assert_eq!(server.get(&format!("{legend}&LAYER=countries")).status, 200);
}
