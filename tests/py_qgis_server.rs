//! What clients of py-qgis-server rely on, route by route: statuses, types and headers.
//!
//! Where it differs on purpose, the test says why: dates are dates of HTTP, a forbidden
//! project looks like an absent one, and no page shows the environment.

mod common;

use common::{Reply, Server, World};

const XML: &str = "text/xml; charset=utf-8";
/// As its own tests start it, but for the addresses.
const SETTINGS: &str = "server.http_proxy = yes\nserver.status_page = yes\n\
    projects.cache.trust_layer_metadata = yes\napi.enabled.landing_page = yes";

fn capabilities(service: &str) -> String {
    format!("/ows/?MAP=world.qgs&SERVICE={service}&request=GetCapabilities")
}

fn ask(server: &Server, path: &str, headers: &[(&str, &str)]) -> Reply {
    server.request("GET", path, headers, b"")
}

fn online_resource(reply: &Reply) -> String {
    let text = reply.text();
    // The first one is the operator's own site.
    let (_, after) = text.split_once("<Get>").expect("an address");
    let (_, after) = after.split_once("xlink:href=\"").expect("an address");
    after.split('"').next().unwrap().to_owned()
}

#[test]
fn every_route_answers_with_its_status_and_type() {
    let server = Server::real(SETTINGS);
    let json = "application/json;charset=utf-8";
    let problem = "application/problem+json";
    for (method, path, status, kind) in [
        ("GET", "/", 200, json),
        ("GET", "/ping", 200, json),
        ("HEAD", "/ping", 200, json),
        ("GET", "/status", 200, json),
        ("GET", "/status/", 200, json),
        // The whole environment and all settings were here.
        ("GET", "/status/env", 404, problem),
        ("GET", "/ows//", 404, problem),
        ("GET", "/OWS/", 404, problem),
        ("GET", "/nowhere", 404, problem),
        ("POST", "/ping", 405, problem),
        ("GET", "/ows/", 400, XML),
        ("GET", "/ows/?SERVICE=WMS&REQUEST=GetCapabilities", 400, XML),
        ("GET", "/ows/?MAP=world&SERVICE=WMS", 400, XML),
        (
            "GET",
            "/ows?MAP=world&SERVICE=WMS&REQUEST=GetCapabilities",
            200,
            XML,
        ),
        (
            "HEAD",
            "/ows/?MAP=world&SERVICE=WFS&REQUEST=GetCapabilities",
            200,
            XML,
        ),
        (
            "PUT",
            "/ows/?MAP=world&SERVICE=WMS&REQUEST=GetCapabilities",
            405,
            XML,
        ),
        ("DELETE", "/ows/?MAP=world", 405, XML),
        ("PATCH", "/ows/?MAP=world", 405, XML),
        ("GET", "/wfs3?MAP=world", 200, "application/json"),
        ("GET", "/wfs3/?MAP=world", 200, "application/json"),
        ("GET", "/wfs3.json?MAP=world", 200, "application/json"),
        ("GET", "/wfs3.html?MAP=world", 200, "text/html"),
        (
            "GET",
            "/wfs3/collections/?MAP=world",
            200,
            "application/json",
        ),
        (
            "GET",
            "/wfs3/collections.json?MAP=world",
            200,
            "application/json",
        ),
        ("GET", "/wfs3/collections.html?MAP=world", 200, "text/html"),
        (
            "GET",
            "/wfs3/collections/places?map=world",
            200,
            "application/json",
        ),
        (
            "GET",
            "/wfs3/collections/places/items?MAP=world",
            200,
            "application/geo+json",
        ),
        (
            "GET",
            "/wfs3/collections/places/items.geojson?MAP=world",
            200,
            "application/geo+json",
        ),
        (
            "GET",
            "/wfs3/collections/places/items/5?MAP=world",
            200,
            "application/geo+json",
        ),
        (
            "GET",
            "/wfs3/conformance?MAP=world",
            200,
            "application/json",
        ),
        (
            "GET",
            "/wfs3/api?MAP=world",
            200,
            "application/vnd.oai.openapi+json;version=3.0",
        ),
        ("GET", "/wfs3/static/style.css?MAP=world", 200, "text/css"),
        ("HEAD", "/wfs3/?MAP=world", 200, "application/json"),
        ("GET", "/wfs3/foobar/?MAP=world", 404, problem),
        // Its test suite of some years ago had them here.
        ("GET", "/ows/wfs3/?MAP=world", 200, "application/json"),
        (
            "GET",
            "/ows/wfs3/collections.html?MAP=world",
            200,
            "text/html",
        ),
        ("GET", "/ows/wfs3/foobar/?MAP=world", 404, problem),
        ("GET", "/catalog/index.json", 200, "application/json"),
        ("GET", "/catalog/index.html", 200, "text/html"),
    ] {
        let reply = server.request(method, path, &[], b"");
        let said = (reply.status, reply.header("content-type"));
        assert_eq!(
            said,
            (status, Some(kind)),
            "{method} {path}: {}",
            reply.text()
        );
    }
    for path in ["/ows/", "/wfs3/?MAP=world", "/ping", "/"] {
        let options = server.request("OPTIONS", path, &[("Origin", "my.home")], b"");
        assert_eq!(options.status, 200, "{path}");
        for name in [
            "allow",
            "access-control-allow-methods",
            "access-control-allow-origin",
        ] {
            assert!(options.header(name).is_some(), "{name} of {path}");
        }
        let headers = options.header("access-control-allow-headers").unwrap();
        assert!(headers.contains("Authorization"), "{headers}");
    }
}

#[test]
fn the_pages_of_the_server_say_what_they_said() {
    let server = Server::real(SETTINGS);
    let ping = server.get("/ping");
    assert_eq!(ping.json(), serde_json::json!({"status": "ok"}));
    assert_eq!(ping.header("cache-control"), Some("no-store"));
    assert_eq!(ping.header("x-server-status"), Some("ok"));
    let root = server.get("/").json();
    assert_eq!(root["servers"][0]["url"], server.url("/"));
    assert_eq!(root["paths"], serde_json::json!({}));
    assert!(root["info"]["version"].is_string() && root["info"]["x-qgis-version"].is_string());
    let absent = server.get("/nowhere").json();
    assert_eq!(absent["httpcode"], 404);
    assert_eq!(absent["error"]["message"], "Invalid resource path");
}

#[test]
fn failures_have_the_statuses_that_they_had() {
    let world = World::real();
    std::fs::write(world.path("projects/corrupt.qgs"), "no project").unwrap();
    let server = Server::start(world, SETTINGS).ready();
    let of = |map: &str| format!("/ows/?MAP={map}&SERVICE=WFS&REQUEST=GetCapabilities");
    for (path, status) in [
        (of("i_do_not_exist.qgs"), 404),
        (of("fail:world.qgs"), 404),
        // 403 there, which tells strangers what is on the disk.
        (of("../../etc/passwd"), 404),
        (of("/etc/passwd"), 404),
        (of("broken"), 422),
        // A worker died of it there, with 500.
        (of("corrupt"), 422),
        (
            of("world").replace("GetCapabilities", "GetCapabilitiesAtlas"),
            501,
        ),
        (
            format!(
                "{}&TYPENAME=nowhere",
                of("world").replace("GetCapabilities", "GetFeature")
            ),
            400,
        ),
    ] {
        for method in ["GET", "HEAD"] {
            let reply = server.request(method, &path, &[], b"");
            let said = (reply.status, reply.header("content-type"));
            assert_eq!(
                said,
                (status, Some(XML)),
                "{method} {path}: {}",
                reply.text()
            );
        }
    }
    assert_eq!(server.workers().len(), 1, "and every one is alive");
}

#[test]
fn replies_have_the_headers_that_they_had() {
    let server = Server::real(SETTINGS);
    let id = [("X-Request-Id", "my-id")];
    for service in ["WMS", "WFS", "WCS"] {
        let path = capabilities(service);
        let reply = ask(&server, &path, &id);
        assert_eq!(
            (reply.status, reply.header("content-type")),
            (200, Some(XML))
        );
        assert_eq!(reply.header("x-map-id"), Some("world.qgs"));
        assert_eq!(reply.header("x-request-id"), Some("my-id"));
        let length = reply.body.len().to_string();
        assert_eq!(reply.header("content-length"), Some(&*length));
        let date = reply.header("last-modified").expect("a date");
        assert!(date.ends_with(" GMT"), "of HTTP, not of ISO 8601: {date}");
        let tag = reply.header("etag").expect("a tag");
        let head = server.request("HEAD", &path, &[], b"");
        assert_eq!(head.header("etag"), Some(tag));
        assert_eq!(ask(&server, &path, &[("If-None-Match", tag)]).status, 304);
    }
    for path in ["/wfs3/?MAP=world.qgs", "/wfs3/collections?map=world.qgs"] {
        let reply = ask(&server, path, &id);
        assert_eq!(reply.header("x-map-id"), Some("world.qgs"), "{path}");
    }
    let shared = ask(&server, &capabilities("WMS"), &[("Origin", "my.home")]);
    assert_eq!(shared.header("access-control-allow-origin"), Some("*"));
    let echoing = Server::real("server.cross_origin = no");
    let reply = ask(&echoing, &capabilities("WMS"), &[("Origin", "my.home")]);
    assert_eq!(reply.header("access-control-allow-origin"), Some("my.home"));
    assert!(reply.header("vary").unwrap().contains("Origin"));
}

#[test]
fn keys_have_any_case_and_a_form_is_a_query() {
    let server = Server::real(SETTINGS);
    let map = "bbox=-90,-180,90,180&crs=EPSG:4326&dpi=96&exceptions=application/vnd.ogc.se_inimage\
               &format=image/png&height=100&layers=land&map=world.qgs&request=GetMap&service=WMS\
               &styles=default&transparent=TRUE&version=1.3.0&width=200";
    let got = server.get(&format!("/ows/?{map}"));
    let form = "application/x-www-form-urlencoded";
    let posted = server.post("/ows/", form, map.as_bytes());
    for reply in [&got, &posted] {
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.header("content-type"), Some("image/png"));
        assert_eq!(reply.header("x-map-id"), Some("world.qgs"));
    }
    assert_eq!(got.body, posted.body);
    let header = [("X-Qgis-Project", "world")];
    let path = "/ows/?SERVICE=WMS&REQUEST=GetCapabilities";
    assert_eq!(ask(&server, path, &header).status, 200);
}

/// The path of the request follows what the proxy says; QGIS's own headers are taken whole.
#[test]
fn capabilities_have_the_address_that_the_proxy_says() {
    let server = Server::real(SETTINGS);
    let path = capabilities("WMS");
    let proxy = "https://my.proxy.loc:9999/anywhere";
    let below = format!("{proxy}/ows/?MAP=world.qgs");
    for (headers, address) in [
        (&[][..], server.url("/ows/?MAP=world.qgs")),
        (&[("X-Forwarded-Url", proxy)], below),
        (
            &[("X-Qgis-Forwarded-Url", proxy)],
            format!("{proxy}?MAP=world.qgs"),
        ),
        (
            &[
                ("X-Forwarded-Host", "h.org"),
                ("X-Forwarded-Proto", "https"),
            ],
            "https://h.org/ows/?MAP=world.qgs".into(),
        ),
        (
            &[("Forwarded", "host=\"h:8443\";proto=https")],
            "https://h:8443/ows/?MAP=world.qgs".into(),
        ),
        (&[("X-Qgis-Service-Url", proxy)], proxy.into()),
        (&[("X-Qgis-Wms-Service-Url", proxy)], proxy.into()),
    ] {
        let reply = ask(&server, &path, headers);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let resource = online_resource(&reply);
        assert!(resource.starts_with(&address), "{headers:?}: {resource}");
    }
    // That of web services, said to all requests. There, no API knew itself any more.
    let web = [("X-Qgis-Forwarded-Url", "https://my.proxy.loc/maps/ows/")];
    let links = ask(&server, "/wfs3/collections.json?MAP=world", &web).text();
    assert!(
        links.contains("\"https://my.proxy.loc/maps/wfs3/collections"),
        "{links}"
    );
}

/// A copy of the example project that says where it is.
fn with_addresses() -> World {
    let world = World::real();
    let path = world.path("projects/world.qgs");
    let text = std::fs::read_to_string(&path).unwrap();
    let addresses: Vec<String> = ["WMS", "WFS", "WCS", "WMTS"]
        .map(|service| {
            format!("<{service}Url type=\"QString\">http://test.proxy.loc/{service}</{service}Url>")
        })
        .into();
    let (before, after) = text.split_once("</properties>").expect("properties");
    let parts = [before, &addresses.concat(), "</properties>", after];
    std::fs::write(path, parts.concat()).unwrap();
    world
}

#[test]
fn a_project_says_where_its_services_are_unless_the_operator_disagrees() {
    let proxy = [("X-Forwarded-Url", "https://my.proxy.loc:9999/anywhere")];
    for rule in ["no", "yes"] {
        let settings = format!("{SETTINGS}\nprojects.cache.disable_owsurls = {rule}");
        let server = Server::start(with_addresses(), &settings).ready();
        for service in ["WMS", "WFS", "WCS", "WMTS"] {
            let text = ask(&server, &capabilities(service), &proxy).text();
            let own = text.contains(&format!("http://test.proxy.loc/{service}"));
            let ours = text.contains("https://my.proxy.loc:9999/anywhere/ows/");
            assert_eq!(
                (own, ours),
                (rule == "no", rule == "yes"),
                "{service}: {text}"
            );
        }
    }
}

#[test]
fn no_way_of_asking_for_features_gets_more_than_the_limit() {
    let server = Server::real("server.getfeaturelimit = 2");
    let n = |reply: Reply| {
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.text().matches("<gml:featureMember>").count()
    };
    let query = "SERVICE=WFS&VERSION=1.0.0&REQUEST=GetFeature&TYPENAME=places";
    for (asked, expected) in [
        ("", 2),
        ("&MAXFEATURES=1", 1),
        ("&MAXFEATURES=3", 2),
        ("&maxFeatures=3", 2),
        ("&MAXFEATURES=0", 0),
        ("&MAXFEATURES=-1", 2),
        ("&MAXFEATURES=-7", 2),
        ("&MAXFEATURES=%2B9", 2),
        ("&MAXFEATURES=many", 2),
        ("&COUNT=1", 1),
        ("&COUNT=9&MAXFEATURES=9", 2),
        ("&STARTINDEX=5", 2),
    ] {
        let whole = format!("{query}{asked}");
        assert_eq!(
            n(server.get(&format!("/ows/?MAP=world&{whole}"))),
            expected,
            "{asked}"
        );
        for kind in ["application/x-www-form-urlencoded", "text/plain"] {
            let posted = server.post("/ows/?MAP=world", kind, whole.as_bytes());
            assert_eq!(n(posted), expected, "{asked} as {kind}");
        }
    }
    let xml = |prolog: &str, asked: &str| {
        format!(
            "{prolog}<wfs:GetFeature service=\"WFS\" version=\"1.0.0\" {asked} \
             xmlns:wfs=\"http://www.opengis.net/wfs\"><wfs:Query typeName=\"places\"/></wfs:GetFeature>"
        )
    };
    let comment = format!("<!--{}-->", "x".repeat(10_000));
    for (body, expected) in [
        (xml("", ""), 2),
        (xml("", "maxFeatures=\"1\""), 1),
        (xml("", "maxFeatures=\"50\""), 2),
        (xml("", "count=\"1\""), 1),
        (
            xml("<?xml version=\"1.0\"?><!DOCTYPE a>", "maxFeatures=\"50\""),
            2,
        ),
        (xml(&comment, "maxFeatures=\"50\""), 2),
        (
            xml("", "xmlns:a=\"u\" a:maxFeatures=\"50\" maxFeatures=\"50\""),
            2,
        ),
    ] {
        for path in [
            "/ows/?MAP=world",
            "/ows/?MAP=world&SERVICE=WFS&MAXFEATURES=90",
        ] {
            let reply = server.post(path, "text/xml", body.as_bytes());
            assert_eq!(n(reply), expected, "{path}: {body:.200}");
        }
    }
    let utf16: Vec<u8> = xml(
        "<?xml version=\"1.0\" encoding=\"UTF-16\"?>",
        "maxFeatures=\"50\"",
    )
    .encode_utf16()
    .flat_map(u16::to_le_bytes)
    .collect();
    let body = [&b"\xff\xfe"[..], &utf16].concat();
    assert_eq!(
        n(server.post(&format!("/ows/?MAP=world&{query}"), "text/xml", &body)),
        2
    );
    let json = server
        .get(&format!("/ows/?MAP=world&{query}&OUTPUTFORMAT=GeoJSON"))
        .json();
    assert_eq!(json["features"].as_array().unwrap().len(), 2);
    let all = Server::real("");
    assert_eq!(n(all.get(&format!("/ows/?MAP=world&{query}"))), 177);
}
