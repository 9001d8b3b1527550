//! APIs of QGIS and of plugins: mounted by settings, all methods, right links behind a proxy.

mod common;

use std::path::Path;

use common::native::Native;
use common::{Reply, Server, World, md5, source};

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

/// The catalogue lists the projects below the root. With the identifier of one.
fn with_catalogue(world: World, settings: &str) -> (Server, String) {
    let settings = format!("api.enabled.landing_page = yes\n{settings}");
    let server = Server::start(world, &settings).ready();
    let json = server.get("/catalog/index.json").json();
    let projects = json["projects"].as_array().unwrap();
    let world = projects.iter().find(|project| project["title"] == "World");
    let id = world.expect("a project of that title")["id"].as_str();
    (server, id.unwrap().to_owned())
}

/// The page of a project shows a map and its layers, and links to its services.
#[test]
fn what_the_pages_of_the_catalogue_ask_for_is_answered_as_by_qgis_itself() {
    let (server, id) = with_catalogue(World::real(), "");
    let root = server.world.path("projects");
    let native = Native::start(&[
        ("QGIS_SERVER_LANDING_PAGE_PREFIX", Path::new("/catalog")),
        ("QGIS_SERVER_LANDING_PAGE_PROJECTS_DIRECTORIES", &root),
    ]);
    let project = format!("/catalog/project/{id}");
    let map = "VERSION=1.3.0&LAYERS=land,places&STYLES=&CRS=EPSG:4326&BBOX=-90,-180,90,180\
               &WIDTH=200&HEIGHT=100&FORMAT=image/png&TRANSPARENT=true&DPI=96";
    let info = "QUERY_LAYERS=land&I=100&J=30&INFO_FORMAT=text/html";
    for path in [
        "/catalog/index.json".to_owned(),
        "/catalog/index.html".into(),
        "/catalog/js/app.f9f4e567.js".into(),
        format!("/catalog/map/{id}.json"),
        format!("{project}/?SERVICE=WMS&REQUEST=GetCapabilities"),
        format!("{project}/?SERVICE=WFS&REQUEST=GetCapabilities"),
        format!("{project}?SERVICE=WMS&REQUEST=GetMap&{map}"),
        format!("{project}/?SERVICE=WMS&REQUEST=GetMap&{map}"),
        format!("{project}/?SERVICE=WMS&REQUEST=GetFeatureInfo&{map}&{info}"),
        format!(
            "{project}/?SERVICE=WMS&REQUEST=GetLegendGraphics&LAYERS=land&FORMAT=application/json"
        ),
        format!("{project}/wfs3"),
        format!("{project}/wfs3.html"),
        format!("{project}/wfs3/collections"),
        format!("{project}/wfs3/api.openapi3"),
        format!("{project}/wfs3/static/style.css"),
        format!("{project}/wfs3/collections/places/items/5"),
        format!("{project}/wfs3/collections/places/items.json?limit=5&offset=5&sortby=name"),
    ] {
        assert_eq!(native.agrees(&server, &path).status, 200, "{path}");
    }
}

#[test]
fn a_project_of_the_catalogue_has_its_links_behind_the_proxy() {
    let (server, id) = with_catalogue(World::real(), "server.http_proxy = yes");
    let project = format!("/catalog/project/{id}");
    let prefixed = [
        ("X-Forwarded-Prefix", "/pre/fix"),
        ("X-Forwarded-Host", "maps.example.org"),
        ("X-Forwarded-Proto", "https"),
    ];
    for headers in [&[BEHIND][..], &prefixed] {
        for service in ["WMS", "WFS"] {
            let path = format!("{project}/?SERVICE={service}&REQUEST=GetCapabilities");
            let reply = server.request("GET", &path, headers, b"");
            let found = references(&reply.text());
            assert!(!found.is_empty(), "{}", reply.text());
            for link in found {
                assert!(behind(&link).starts_with(&project), "{link}");
                assert!(!link.contains("MAP="), "{link}");
            }
        }
    }
    let mut found = Vec::new();
    links(
        &ask(&server, "GET", &format!("{project}/wfs3"), "").json(),
        &mut found,
    );
    assert!(!found.is_empty());
    for link in found {
        let next = ask(&server, "GET", behind(&link), "");
        assert_eq!(next.status, 200, "{link}: {}", next.text());
    }
    // The page itself refers to what lies beside it, so it needs no prefix.
    let html = ask(&server, "GET", "/catalog/index.html", "");
    assert!(references(&html.text()).is_empty(), "{}", html.text());
}

/// A catalogue of a folder, in which are `city`, a link to a project elsewhere, and what
/// no catalogue lists.
fn with_folder(settings: &str) -> Server {
    let world = World::stub();
    let (shown, outside) = (world.path("shown"), world.path("outside"));
    std::fs::create_dir_all(shown.join("below")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    for file in [
        "shown/city.qgs",
        "shown/UPPER.QGS",
        "shown/.hidden.qgs",
        "shown/below/deep.qgs",
    ] {
        std::fs::write(world.path(file), "<qgis/>").unwrap();
    }
    std::fs::write(outside.join("secret.qgs"), "<qgis/>").unwrap();
    std::os::unix::fs::symlink(outside.join("secret.qgs"), shown.join("link.qgs")).unwrap();
    let variable = "api:landing_page.QGIS_SERVER_LANDING_PAGE_PROJECTS_DIRECTORIES";
    let settings = format!(
        "api.enabled.landing_page = yes\n{variable} = /nowhere||{}\n{settings}",
        shown.display()
    );
    Server::start(world, &settings).ready()
}

fn listed(server: &Server, file: &str) -> String {
    format!("/catalog/project/{}", md5(&server.world.path(file)))
}

const CAPABILITIES: &str = "SERVICE=WMS&REQUEST=GetCapabilities";

#[test]
fn the_catalogue_leads_to_nothing_that_it_does_not_list() {
    let server = with_folder("");
    let status = |path: &str| server.get(path).status;
    let of = |file: &str| status(&format!("{}/?{CAPABILITIES}", listed(&server, file)));
    assert_eq!((of("shown/city.qgs"), of("shown/UPPER.QGS")), (200, 200));
    for file in [
        "shown/link.qgs",
        "shown/.hidden.qgs",
        "shown/below/deep.qgs",
        "shown/nothing.qgs",
        "outside/secret.qgs",
        "projects/city.qgs",
    ] {
        assert_eq!(of(file), 404, "{file}");
    }
    let city = listed(&server, "shown/city.qgs");
    let id = city.rsplit('/').next().unwrap();
    // The path has the last word, and is the only one that has this name for it.
    for map in ["MAP=corrupt", "map=nothing", "MAP=&MAP=/etc/passwd"] {
        assert_eq!(
            status(&format!("{city}/?{CAPABILITIES}&{map}")),
            200,
            "{map}"
        );
        assert_eq!(status(&format!("{city}/wfs3?{map}")), 200, "{map}");
    }
    let header = [("X-Qgis-Project", "nothing")];
    let reply = server.request("GET", &format!("{city}/?{CAPABILITIES}"), &header, b"");
    assert_eq!(reply.status, 200);
    for map in [
        format!("catalog/project:{id}"),
        format!("catalog:{id}"),
        id.to_owned(),
    ] {
        assert_eq!(
            status(&format!("/ows/?{CAPABILITIES}&MAP={map}")),
            404,
            "{map}"
        );
    }
    for path in [
        format!("{city}/nothing"),
        format!("{city}/../{id}"),
        format!("{city}0"),
    ] {
        assert_eq!(status(&format!("{path}?{CAPABILITIES}")), 404, "{path}");
    }
    std::fs::remove_file(server.world.path("shown/city.qgs")).unwrap();
    assert_eq!(of("shown/city.qgs"), 404);
}

#[test]
fn without_the_catalogue_no_project_has_a_path_in_it() {
    let server = with_folder("");
    let path = format!("{}/?{CAPABILITIES}", listed(&server, "shown/city.qgs"));
    assert_eq!(server.get(&path).status, 200);
    let off = Server::start(World::stub(), "").ready();
    assert_eq!(off.get(&path).status, 404);
    let closed = with_folder("projects.cache.allow_storage_schemes = s3");
    let path = format!("{}/?{CAPABILITIES}", listed(&closed, "shown/city.qgs"));
    assert_eq!(closed.get(&path).status, 404);
}

/// No rule can tell which project it is, so rules about projects are on the safe side.
#[test]
fn a_project_of_the_catalogue_does_not_get_round_rules() {
    let form = "application/x-www-form-urlencoded";
    for (rule, ows, features) in [
        ("deny if MAP=secret", 403, 403),
        ("deny if MAP!=city", 403, 403),
        ("deny if path=/catalog/.*", 403, 403),
        ("deny if path=/ows/", 403, 200),
        ("deny if path=/wfs3.*", 200, 403),
        ("deny if SERVICE=WMS", 403, 200),
        ("deny if LAYERS=nothing", 200, 200),
        // Another project, or none, by the operator's word.
        ("rewrite MAP=nothing", 404, 404),
        ("rewrite MAP=", 400, 400),
    ] {
        let server = with_folder(&format!("policies.a = {rule}"));
        let city = listed(&server, "shown/city.qgs");
        let get = |path: &str| server.get(&format!("{city}{path}")).status;
        assert_eq!(get(&format!("/?{CAPABILITIES}")), ows, "{rule}");
        let posted = server.post(&format!("{city}/"), form, CAPABILITIES.as_bytes());
        assert_eq!(posted.status, ows, "{rule}");
        assert_eq!(get("/wfs3/collections"), features, "{rule}");
        assert_eq!(get("/%77fs3/collections"), features, "{rule}");
    }
}

fn with_echo(settings: &str) -> Server {
    let plugins = source("tests/data/apis");
    let own = format!("server.pluginpath = {}\n{settings}", plugins.display());
    Server::start(World::real(), &own).ready()
}

/// QGIS has all APIs, and finds them by their names anywhere in a path.
#[test]
fn no_forwarded_header_leads_to_an_api_that_is_off() {
    let server = with_echo("server.http_proxy = yes\napi.enabled.wfs3 = no");
    let page = format!("/map/{:032}", 0);
    let folders = [
        "/echo/said",
        "/%65cho/said",
        "/index.json",
        page.as_str(),
        "/wfs3",
    ];
    let ask = |(method, path, body): (&str, &str, &str), header: &str| {
        let (name, value) = header.split_once(": ").unwrap_or(("X-None", ""));
        let headers = [("Content-Type", "text/xml"), (name, value)];
        let reply = server.request(method, path, &headers, body.as_bytes());
        (reply.status, reply.text())
    };
    let asked = [
        ("POST", "/ows/?MAP=world", "<a/>"),
        ("POST", "/ows/", "<a/>"),
        ("POST", "/ows/?MAP=world&SERVICE=WMS", "<a service=\"\"/>"),
        ("GET", "/ows/?MAP=world&REQUEST=GetCapabilities", ""),
    ];
    for asked in asked {
        let expected = ask(asked, "");
        assert_ne!(expected.0, 200, "{asked:?}");
        for folder in folders {
            for header in [
                format!("X-Forwarded-Prefix: {folder}"),
                format!("X-Forwarded-Url: http://localhost{folder}"),
                format!("X-Qgis-Forwarded-Url: http://localhost{folder}"),
                format!("X-Qgis-Forwarded-Url: http://localhost{folder}/ows/"),
            ] {
                let found = ask(asked, &header);
                assert_eq!(found, expected, "{asked:?} with {header}");
            }
        }
    }
}

/// The same names may stand before the paths of a site.
#[test]
fn a_folder_with_the_name_of_an_api_of_a_plugin_is_no_way_to_it_and_services_keep_it() {
    let server = with_echo("server.http_proxy = yes");
    let folder = [("X-Forwarded-Prefix", "/echo/said")];
    let features = server.request("GET", "/wfs3/collections?MAP=world", &folder, b"");
    assert_eq!(features.status, 200, "{}", features.text());
    let path = "/ows/?MAP=world&SERVICE=WMS&REQUEST=GetCapabilities";
    let capabilities = server.request("GET", path, &folder, b"").text();
    assert!(
        capabilities.contains("/echo/said/ows/?MAP=world"),
        "{capabilities}"
    );
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
