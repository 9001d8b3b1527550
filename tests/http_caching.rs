//! What clients keep of documents, and what they are told when they ask again.

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use common::{Reply, Server, World, eventually, source};

const WMS: &str = "/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities";
/// When the project was last changed, if a test sets it.
const THEN: u64 = 784_111_777;
const THEN_TEXT: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

fn tag(reply: &Reply) -> String {
    let tag = reply.header("etag").expect("a tag").to_owned();
    assert!(tag.starts_with('"') && tag.len() > 10, "strong: {tag}");
    tag
}

fn second() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs()
}

fn ask(server: &Server, path: &str, headers: &[(&str, &str)]) -> Reply {
    server.request("GET", path, headers, b"")
}

fn status(server: &Server, path: &str, headers: &[(&str, &str)]) -> u16 {
    ask(server, path, headers).status
}

/// As if `name` had been written then.
fn age(world: &World, name: &str, seconds: u64) {
    let file = std::fs::File::options()
        .write(true)
        .open(world.projects().join(name))
        .unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
        .unwrap();
}

fn aged() -> World {
    let world = World::real();
    age(&world, "world.qgs", THEN);
    world
}

/// Whether a 304 took no time in QGIS.
fn is_free(server: &Server, path: &str, headers: &[(&str, &str)]) -> bool {
    let reply = ask(server, path, headers);
    assert_eq!(reply.status, 304, "{path}");
    let timing = reply.header("server-timing").expect("it is on");
    timing.split(", ").any(|part| part == "render;dur=0")
}

#[test]
fn capabilities_of_every_service_are_asked_for_again_and_not_sent_again() {
    let server = Server::start(aged(), "").ready();
    for query in [
        "SERVICE=WMS",
        "SERVICE=WMS&VERSION=1.1.1",
        "SERVICE=WFS&VERSION=1.1.0",
        "SERVICE=WCS",
        "SERVICE=WMTS",
    ] {
        let path = format!("/ows/?MAP=world&{query}&REQUEST=GetCapabilities");
        let whole = server.get(&path);
        let tag = tag(&whole);
        assert_eq!(whole.status, 200, "{}", whole.text());
        assert_eq!(whole.header("last-modified"), Some(THEN_TEXT), "{query}");
        assert_eq!(whole.header("cache-control"), Some("no-cache"));
        let head = server.request("HEAD", &path, &[], b"");
        for name in ["etag", "last-modified", "content-length", "content-type"] {
            assert_eq!(head.header(name), whole.header(name), "{name} of {query}");
        }
        let weak = format!("W/{tag}");
        let list = format!("\"x\", {weak}, \"y\"");
        for tags in [&*tag, &*weak, &*list, "*"] {
            for method in ["GET", "HEAD"] {
                let kept = server.request(method, &path, &[("If-None-Match", tags)], b"");
                assert_eq!((kept.status, kept.body.len()), (304, 0), "{tags}");
                assert_eq!(kept.header("etag"), Some(&*tag));
                assert_eq!(kept.header("cache-control"), Some("no-cache"));
                assert_eq!(kept.header("x-map-id"), Some("world"));
                assert_eq!(kept.header("content-type"), None);
            }
        }
        assert_eq!(status(&server, &path, &[("If-None-Match", "\"x\"")]), 200);
    }
}

#[test]
fn a_date_is_good_for_clients_that_have_no_tag() {
    let server = Server::start(aged(), "").ready();
    for (date, expected) in [
        (THEN_TEXT, 304),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 304),
        // What the client has may be younger than the backup that was put back since.
        ("Mon, 07 Nov 1994 08:49:37 GMT", 200),
        ("Sun, 06 Nov 1994 08:49:36 GMT", 200),
        ("1994-11-06T08:49:37Z", 200),
    ] {
        let since = ("If-Modified-Since", date);
        assert_eq!(status(&server, WMS, &[since]), expected, "{date}");
        let other = ("If-None-Match", "\"x\"");
        assert_eq!(status(&server, WMS, &[since, other]), 200, "{date}");
    }
}

/// The same bytes and the same tag, whichever worker answers, whenever it was started.
#[test]
fn a_tag_is_the_same_in_every_worker_and_after_a_restart() {
    for rule in ["no", "yes"] {
        let settings = format!(
            "server.workers = 2\nserver.http_proxy = yes\nprojects.cache.force_etag = {rule}"
        );
        let (mut world, mut seen) = (aged(), BTreeSet::new());
        for _ in 0..2 {
            let server = Server::start(world, &settings).ready();
            let public = [("X-Forwarded-Url", "https://maps.example.org")];
            for _ in 0..4 {
                let reply = ask(&server, WMS, &public);
                seen.insert((tag(&reply), reply.body));
            }
            // The process ends here; its projects stay.
            world = server.world;
        }
        assert_eq!(seen.len(), 1, "force_etag = {rule}");
    }
}

#[test]
fn a_tag_changes_with_the_project_the_address_and_the_query() {
    for rule in ["no", "yes"] {
        let settings = format!("server.http_proxy = yes\nprojects.cache.force_etag = {rule}");
        let server = Server::start(aged(), &settings).ready();
        let first = tag(&server.get(WMS));
        let elsewhere = [("X-Forwarded-Url", "https://maps.example.org/a")];
        assert_ne!(tag(&ask(&server, WMS, &elsewhere)), first);
        assert_ne!(tag(&server.get(&WMS.replace("1.3.0", "1.1.1"))), first);
        let path = server.world.path("projects/world.qgs");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace(">World<", ">Earth<")).unwrap();
        // Older than before, as if from a backup.
        age(&server.world, "world.qgs", THEN - 1000);
        let held = [("If-None-Match", &*first)];
        let changed = ask(&server, WMS, &held);
        assert_eq!(changed.status, 200, "force_etag = {rule}");
        assert!(changed.text().contains("Earth"));
        assert_ne!(tag(&changed), first);
    }
}

#[test]
fn with_force_etag_or_trusted_metadata_no_document_is_made_for_who_has_it() {
    for (rule, is_foreseen) in [
        ("projects.cache.force_etag = yes", true),
        ("projects.cache.trust_layer_metadata = yes", true),
        ("", false),
    ] {
        let settings = format!("server.server_timing = yes\n{rule}");
        let server = Server::start(aged(), &settings).ready();
        let tag = tag(&server.get(WMS));
        let held = [("If-None-Match", &*tag)];
        assert_eq!(is_free(&server, WMS, &held), is_foreseen, "{rule}");
    }
}

#[test]
fn mistakes_maps_features_and_forms_are_not_kept() {
    let server = Server::start(aged(), "projects.cache.force_etag = yes").ready();
    let any = [("If-None-Match", "*")];
    let unknown = "/ows/?MAP=world&SERVICE=NONE&REQUEST=GetCapabilities";
    let reply = ask(&server, unknown, &any);
    assert_eq!((reply.status, reply.header("etag")), (400, None));
    let absent = ask(&server, &WMS.replace("world", "nowhere"), &any);
    assert_eq!((absent.status, absent.header("etag")), (404, None));
    for path in [
        "/ows/?MAP=world&SERVICE=WFS&REQUEST=DescribeFeatureType",
        "/wfs3/collections/places/items?MAP=world&limit=1",
        "/wfs3/collections/places/items/5?MAP=world",
    ] {
        let reply = ask(&server, path, &any);
        assert_eq!((reply.status, reply.header("etag")), (200, None), "{path}");
    }
    let form = [
        ("Content-Type", "application/x-www-form-urlencoded"),
        any[0],
    ];
    let body = b"MAP=world&SERVICE=WMS&REQUEST=GetCapabilities";
    let posted = server.request("POST", "/ows/", &form, body);
    assert_eq!((posted.status, posted.header("etag")), (200, None));
}

/// They leave in parts, their head with the first.
#[test]
fn long_documents_have_tags_too() {
    let server = Server::start(aged(), "worker.chunk_bytes = 1K").ready();
    let whole = server.get(WMS);
    assert!(whole.body.len() > 4 << 10, "several parts");
    let held = tag(&whole);
    assert_eq!(status(&server, WMS, &[("If-None-Match", &held)]), 304);
}

#[test]
fn pages_of_the_ogc_api_are_kept_like_capabilities() {
    let server = Server::start(aged(), "").ready();
    let paths = [
        "/wfs3/?MAP=world",
        "/wfs3/collections?MAP=world",
        "/wfs3/collections.html?MAP=world",
        "/wfs3/collections/places?MAP=world",
        "/wfs3/conformance?MAP=world",
        "/wfs3/api?MAP=world",
    ];
    let pages = paths.map(|path| server.get(path));
    // QGIS writes the second into them.
    let second = second();
    eventually("the next second", || {
        (self::second() > second).then_some(())
    });
    for (path, whole) in paths.into_iter().zip(pages) {
        assert_eq!(server.get(path).body, whole.body, "{path}");
        let head = server.request("HEAD", path, &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
        for name in ["etag", "last-modified", "content-length", "content-type"] {
            assert_eq!(head.header(name), whole.header(name), "{name} of {path}");
        }
        assert_eq!(whole.header("last-modified"), Some(THEN_TEXT), "{path}");
        assert_eq!(whole.header("vary"), Some("Accept"));
        let kept = ask(&server, path, &[("If-None-Match", &tag(&whole))]);
        assert_eq!((kept.status, kept.header("vary")), (304, Some("Accept")));
        assert_eq!(
            status(&server, path, &[("If-Modified-Since", THEN_TEXT)]),
            304
        );
    }
    let style = "/wfs3/static/style.css?MAP=world";
    let whole = server.get(style);
    assert_eq!(
        whole.header("last-modified"),
        None,
        "it is not the project's"
    );
    assert_eq!(
        status(&server, style, &[("If-None-Match", &tag(&whole))]),
        304
    );
    let page = "/wfs3/collections?MAP=world";
    let of = |accept| tag(&ask(&server, page, &[("Accept", accept)]));
    assert_ne!(of("application/json"), of("text/html"));
}

#[test]
fn with_access_control_nobody_gets_what_was_made_for_another() {
    for rule in ["no", "yes"] {
        let plugins = source("tests/data/restricted");
        let settings = format!(
            "server.pluginpath = {}\nprojects.cache.force_etag = {rule}",
            plugins.display()
        );
        let server = Server::start(aged(), &settings).ready();
        let wfs = "/ows/?MAP=world&SERVICE=WFS&REQUEST=GetCapabilities";
        for path in [WMS, wfs] {
            let as_user = |user, tag: &str| {
                let headers = [("X-Qgis-User", user), ("If-None-Match", tag)];
                ask(&server, path, &headers)
            };
            let (ada, ben) = (as_user("ada", ""), as_user("ben", ""));
            assert!(ada.text().contains("countries"), "{}", ada.text());
            assert!(!ben.text().contains("countries"), "{}", ben.text());
            for reply in [&ada, &ben] {
                let keep = reply.header("cache-control");
                assert_eq!(keep, Some("private, no-cache"));
                assert_eq!(reply.header("last-modified"), None);
            }
            let (of_ada, of_ben) = (tag(&ada), tag(&ben));
            assert_eq!(as_user("ada", &of_ada).status, 304);
            assert_eq!(as_user("ben", &of_ben).status, 304);
            let mixed_up = as_user("ben", &of_ada);
            assert_eq!((mixed_up.status, mixed_up.body), (200, ben.body.clone()));
            // The same bytes for another key have another tag.
            let (eve, none) = (as_user("eve", &of_ben), as_user("", &of_ben));
            assert_eq!((eve.status, eve.body), (200, ben.body.clone()));
            assert_eq!((none.status, none.body), (200, ben.body.clone()));
            let since = [("X-Qgis-User", "ben"), ("If-Modified-Since", THEN_TEXT)];
            assert_eq!(status(&server, path, &since), 200, "a right may be gone");
        }
    }
}

#[test]
fn what_a_server_filter_had_a_hand_in_is_for_one_client() {
    let plugins = source("tests/data/filtering");
    let settings = format!(
        "server.pluginpath = {}\nprojects.cache.force_etag = yes",
        plugins.display()
    );
    let server = Server::start(aged(), &settings).ready();
    let as_user = |user, tag: &str| {
        let headers = [("X-Qgis-User", user), ("If-None-Match", tag)];
        ask(&server, WMS, &headers)
    };
    let ada = as_user("ada", "");
    assert!(ada.text().ends_with("<!-- for ada -->"), "{}", ada.text());
    assert_eq!(ada.header("cache-control"), Some("private, no-cache"));
    assert_eq!(ada.header("last-modified"), None);
    let of_ada = tag(&ada);
    assert_eq!(as_user("ada", &of_ada).status, 304);
    let ben = as_user("ben", &of_ada);
    assert_eq!(ben.status, 200);
    assert!(ben.text().ends_with("<!-- for ben -->"));
    assert_ne!(tag(&ben), of_ada);
}
