//! APIs of QGIS and of plugins: mounted by settings, all methods, right links behind a proxy.

mod common;

use common::{Reply, Server, World, source};

const PUBLIC: &str = "https://maps.example.org/pre/fix";
const BEHIND: (&str, &str) = ("X-Forwarded-Url", PUBLIC);

fn ask(server: &Server, method: &str, path: &str, body: &str) -> Reply {
    let headers = [("Content-Type", "application/geo+json"), BEHIND];
    server.request(method, path, &headers, body.as_bytes())
}

/// Every value of a member `href` below `json`.
fn links(json: &serde_json::Value, found: &mut Vec<String>) {
    use serde_json::Value::{Array, Object, String};
    match json {
        Array(items) => items.iter().for_each(|item| links(item, found)),
        Object(members) => {
            for (name, value) in members {
                match value {
                    String(text) if name == "href" => found.push(text.clone()),
                    other => links(other, found),
                }
            }
        }
        _ => {}
    }
}

/// What a page refers to, without what other sites have.
fn references(html: &str) -> Vec<String> {
    let parts = html.split(['"', '\'']).zip(html.split(['"', '\'']).skip(1));
    let is_reference = |before: &str| before.ends_with("href=") || before.ends_with("src=");
    let all = parts.filter(|(before, _)| is_reference(before));
    let all = all.map(|(_, reference)| reference.replace("&amp;", "&"));
    let ours = |it: &String| it.starts_with('/') || it.starts_with(PUBLIC);
    all.filter(ours).collect()
}

/// The path that a proxy would pass on.
fn behind(link: &str) -> &str {
    let path = link
        .strip_prefix("https://maps.example.org")
        .unwrap_or(link);
    path.strip_prefix("/pre/fix")
        .unwrap_or_else(|| panic!("{link} leads past the proxy"))
}

#[test]
fn links_lead_through_the_proxy_and_to_pages_that_exist() {
    let server = Server::real("server.http_proxy = yes");
    for page in [
        "/wfs3",
        "/wfs3/",
        "/wfs3/collections",
        "/wfs3/collections/places",
        "/wfs3/collections/places/items?limit=2",
        "/wfs3/collections/places/items/5",
        "/wfs3/conformance",
        "/ows/wfs3/collections",
    ] {
        let joint = if page.contains('?') { '&' } else { '?' };
        let reply = ask(&server, "GET", &format!("{page}{joint}MAP=world"), "");
        assert_eq!(reply.status, 200, "{page}: {}", reply.text());
        let mut found = Vec::new();
        links(&reply.json(), &mut found);
        assert!(!found.is_empty(), "{page}");
        for link in found {
            if link.contains("DescribeFeatureType") {
                // QGIS's own mistake: a query behind a query, of no service's path.
                assert!(link.starts_with(PUBLIC), "{link}");
                continue;
            }
            let root = page.split("wfs3").next().unwrap();
            assert!(
                link.starts_with(&format!("{PUBLIC}{root}wfs3")),
                "{page}: {link}"
            );
            let next = ask(&server, "GET", behind(&link), "");
            assert_eq!(next.status, 200, "{link} of {page}: {}", next.text());
        }
    }
    for page in ["/wfs3.html", "/wfs3/collections.html", "/wfs3/api.html"] {
        let reply = ask(&server, "GET", &format!("{page}?MAP=world"), "");
        let kind = reply.header("content-type").unwrap_or_default();
        assert!(kind.starts_with("text/html"), "{page}: {kind}");
        let found = references(&reply.text());
        assert!(found.iter().any(|it| it.contains("/static/")), "{found:?}");
        for reference in found {
            let next = ask(&server, "GET", behind(&reference), "");
            assert_eq!(next.status, 200, "{reference} of {page}");
        }
    }
}

#[test]
fn features_are_made_changed_and_deleted() {
    let settings = "server.http_proxy = yes\nprojects.cache.force_readonly_layers = no";
    let server = Server::real(settings);
    let items = "/wfs3/collections/places/items";
    let feature = |name: &str| {
        format!(
            "{{\"type\":\"Feature\",\"geometry\":{{\"type\":\"Point\",\"coordinates\":[-30.5,35.25]}},\
             \"properties\":{{\"name\":\"{name}\",\"rank\":999}}}}"
        )
    };
    let made = ask(
        &server,
        "POST",
        &format!("{items}?MAP=world"),
        &feature("Atlantis"),
    );
    assert_eq!(made.status, 201, "{}", made.text());
    let place = made.header("location").expect("where it is").to_owned();
    let place = behind(&place);
    assert_eq!(place, format!("{items}/178?MAP=world"));
    let name = || {
        let reply = server.get(place);
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["properties"]["name"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(name(), "Atlantis");
    let put = ask(&server, "PUT", place, &feature("Lemuria"));
    assert_eq!(
        (put.status, name()),
        (200, "Lemuria".into()),
        "{}",
        put.text()
    );
    let patch = r#"{"modify": {"name": "Mu"}}"#;
    let patched = ask(&server, "PATCH", place, patch);
    assert_eq!(
        (patched.status, name()),
        (200, "Mu".into()),
        "{}",
        patched.text()
    );
    let head = ask(&server, "HEAD", place, "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    let deleted = ask(&server, "DELETE", place, "");
    assert_eq!(deleted.status, 200, "{}", deleted.text());
    assert_ne!(server.get(place).status, 200);
    let options = ask(&server, "OPTIONS", place, "");
    let allowed = options.header("allow").unwrap();
    for method in ["GET", "POST", "HEAD", "PUT", "PATCH", "DELETE"] {
        assert!(allowed.contains(method), "{allowed}");
    }
}

/// QGIS answers them with its landing page.
#[test]
fn paths_that_no_page_has_are_not_found() {
    let server = Server::real("");
    for path in [
        "/wfs3/foobar",
        "/wfs3/foobar/",
        "/wfs3x",
        "/wfs3/collections/nowhere",
        "/wfs3/static/nothing.css",
        "/ogcapi/collections",
        "/catalog/",
        "/lizmap/",
    ] {
        let reply = server.get(&format!("{path}?MAP=world"));
        assert_eq!(reply.status, 404, "{path}: {}", reply.text());
        let kind = reply.header("content-type").unwrap_or_default();
        assert!(kind.contains("json"), "{path}: {kind}");
    }
}

#[test]
fn ogc_api_features_is_where_the_settings_put_it() {
    let moved = Server::real("api.endpoints.wfs3 = /maps/wfs3");
    let reply = moved.get("/maps/wfs3/collections?MAP=world");
    assert_eq!(reply.status, 200, "{}", reply.text());
    let mut found = Vec::new();
    links(&reply.json(), &mut found);
    for link in found {
        assert!(link.starts_with(&moved.url("/maps/wfs3")), "{link}");
    }
    assert_eq!(moved.get("/wfs3/collections?MAP=world").status, 404);
    let off = Server::real("api.enabled.wfs3 = no");
    assert_eq!(off.get("/wfs3/collections?MAP=world").status, 404);
}

#[test]
fn the_catalogue_follows_its_settings_and_the_proxy() {
    let server = Server::real(
        "server.http_proxy = yes\napi.enabled.landing_page = yes\napi.endpoints.landing_page = /ows/catalog",
    );
    let front = ask(&server, "GET", "/ows/catalog/", "");
    assert_eq!(front.status, 302, "{}", front.text());
    let index = front.header("location").unwrap().to_owned();
    assert_eq!(index, format!("{PUBLIC}/ows/catalog/index.json"));
    let json = ask(&server, "GET", behind(&index), "").json();
    let mut found = Vec::new();
    links(&json["links"], &mut found);
    assert!(found.len() > 1, "{json}");
    for link in found {
        assert!(
            link.starts_with(&format!("{PUBLIC}/ows/catalog/")),
            "{link}"
        );
        assert_eq!(ask(&server, "GET", behind(&link), "").status, 200, "{link}");
    }
    let id = json["projects"][0]["id"].as_str().unwrap();
    let map = format!("/ows/catalog/map/{id}");
    assert_eq!(ask(&server, "GET", &map, "").status, 200);
    // Without the proxy it is where it was.
    let direct = server.get("/ows/catalog/");
    let expected = server.url("/ows/catalog/index.json");
    assert_eq!(direct.header("location"), Some(&*expected));
    assert_eq!(server.get("/catalog/index.json").status, 404);
}

fn with_echo(settings: &str) -> Server {
    let plugins = source("tests/data/apis");
    let own = format!("server.pluginpath = {}\n{settings}", plugins.display());
    Server::start(World::real(), &own).ready()
}

#[test]
fn an_api_of_a_plugin_is_there_where_it_is_enabled() {
    assert_eq!(with_echo("").get("/echo/said").status, 404);
    let server = with_echo(
        "api.enabled.echo = yes\napi.endpoints.echo = /echo\napi:echo.ECHO_VARIABLE = it is\n\
         server.http_proxy = yes",
    );
    // No project, or one: both reach it.
    let said = server.get("/echo/said").json();
    assert_eq!(said["variable"], "it is");
    assert_eq!(said["url"], server.url("/echo/said"));
    let query = "a=1&A=2&a=3&list=x&list=y&empty=&flag&f=%2B%26";
    let said = server.get(&format!("/echo/said?map=world&{query}")).json();
    assert_eq!(
        said["url"],
        server.url(&format!("/echo/said?MAP=world&{query}"))
    );
    let through = ask(&server, "GET", "/echo/said?a=1", "").json();
    assert_eq!(through["url"], format!("{PUBLIC}/echo/said?a=1"));
    let here = through["here"].as_str().unwrap();
    assert!(here.starts_with(&format!("{PUBLIC}/echo/said")), "{here}");
    let methods = ["GET", "PUT", "POST", "PATCH", "DELETE"];
    let mut seen = std::collections::BTreeSet::new();
    for method in methods {
        let body = if method == "GET" { "" } else { r#"{"a": 1}"# };
        let reply = ask(&server, method, "/echo/said", body);
        assert_eq!(reply.status, 200, "{method}: {}", reply.text());
        let said = reply.json();
        seen.insert(said["method"].as_i64().unwrap());
        assert_eq!(said["body"], body, "{method}");
    }
    assert_eq!(seen.len(), methods.len(), "each is another one for QGIS");
    assert_eq!(
        server.get("/echo/other").status,
        400,
        "the plugin knows its paths"
    );
}
