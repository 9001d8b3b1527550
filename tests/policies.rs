//! Access policies: rules of the settings and filters in Python, and all the ways round
//! them that do not work.

mod common;

use common::{Reply, Server, World, eventually, md5};
use nix::sys::signal::Signal;

const FORM: &str = "application/x-www-form-urlencoded";

fn with_rules(rules: &str) -> Server {
    let rules: String = rules
        .lines()
        .map(|line| format!("policies.{}\n", line.trim()))
        .collect();
    Server::stub(&rules)
}

fn is_refused(reply: &Reply) -> bool {
    let text = reply.text();
    // Refused before any worker had it.
    (reply.status == 403 || reply.status == 400) && !text.contains("\"pid\"")
}

/// GET, HEAD, POST and every other way to ask for `SERVICE=WFS&REQUEST=GetFeature`.
fn all_ways(server: &Server, base: &str) -> Vec<(String, Reply)> {
    let get = |query: &str| {
        (
            query.to_owned(),
            server.get(&format!("{base}?MAP=city&{query}")),
        )
    };
    let post = |kind: &str, query: &str, body: &str| {
        let path = format!("{base}?{query}");
        (
            format!("{kind} {query} {body}"),
            server.post(&path, kind, body.as_bytes()),
        )
    };
    let multipart = "--x\r\nContent-Disposition: form-data; name=\"SERVICE\"\r\n\r\nWFS\r\n\
                     --x\r\nContent-Disposition: form-data; name=\"REQUEST\"\r\n\r\nGetFeature\r\n--x--\r\n";
    vec![
        get("SERVICE=WFS&REQUEST=GetFeature"),
        get("service=wfs&request=getfeature"),
        get("%53ERVICE=%57FS&REQUEST=GetFeature"),
        get("SERVICE=WMS&SERVICE=WFS&REQUEST=GetFeature"),
        get("REQUEST=GetFeature&SERVICE=WMS&Service=WFS"),
        get("&&SERVICE=WFS&&REQUEST=GetFeature&"),
        post(FORM, "", "MAP=city&SERVICE=WFS&REQUEST=GetFeature"),
        post(FORM, "MAP=city", "service=WFS&request=GetFeature"),
        post(
            &format!("{FORM}; charset=UTF-8"),
            "MAP=city&REQUEST=GetFeature",
            "s%65rvice=WFS",
        ),
        post("multipart/form-data; boundary=x", "MAP=city", multipart),
        // QGIS reads any body that is no XML as a form, and goes by it.
        post("text/plain", "MAP=city", "SERVICE=WFS&REQUEST=GetFeature"),
        post(
            "text/plain",
            "MAP=city&SERVICE=WMS&REQUEST=GetMap",
            "SERVICE=WFS&REQUEST=GetFeature",
        ),
        post(
            "text/xml",
            "MAP=city",
            "<GetFeature service='WFS' version='1.1.0'/>",
        ),
        post(
            FORM,
            "MAP=city",
            " <wfs:GetFeature service=\"WFS\"><x/></wfs:GetFeature>",
        ),
        post(
            "text/xml",
            "MAP=city&SERVICE=WMS&REQUEST=GetMap",
            "<GetFeature service='WFS'/>",
        ),
        post(
            "text/xml",
            "MAP=city",
            "<!DOCTYPE x><GetFeature service='WFS'/>",
        ),
        post("text/xml", "MAP=city", "<GetFeature service='W&#70;S'/>"),
        post(
            "text/xml",
            "MAP=city",
            "<a service='WMS'/>&SERVICE=WFS&REQUEST=GetFeature",
        ),
        (
            "X-Qgis-Project".into(),
            server.request(
                "GET",
                &format!("{base}?SERVICE=WFS&REQUEST=GetFeature"),
                &[("X-Qgis-Project", "city")],
                b"",
            ),
        ),
        (
            "HEAD".into(),
            server.request(
                "HEAD",
                &format!("{base}?MAP=city&SERVICE=WFS&REQUEST=GetFeature"),
                &[],
                b"",
            ),
        ),
    ]
}

fn assert_refused_in_all_ways(server: &Server) {
    for base in ["/ows/", "/ows"] {
        for (what, reply) in all_ways(server, base) {
            assert!(
                is_refused(&reply),
                "{base} {what}: {} {}",
                reply.status,
                reply.text()
            );
        }
    }
}

// Rules.

#[test]
fn a_denied_operation_is_denied_however_it_is_written() {
    let server = with_rules("a = deny if SERVICE=WFS");
    assert_refused_in_all_ways(&server);
    // Its sibling among the APIs.
    for path in [
        "/wfs3/collections?MAP=city",
        "/wfs3.json?MAP=city",
        "/wfs3/%63ollections/x/items?MAP=city",
        "/ogcapi?MAP=city",
    ] {
        assert_eq!(server.get(path).status, 403, "{path}");
    }
    // No profile that somebody made up leads round it.
    assert_eq!(
        server
            .get("/ows/p/x/?MAP=city&SERVICE=WFS&REQUEST=GetFeature")
            .status,
        404
    );
    // What is asked about the server itself is told, and no worker hears of it.
    let reply = server.request(
        "OPTIONS",
        "/ows/?MAP=city&SERVICE=WFS&REQUEST=GetFeature&MARK=seen",
        &[],
        b"",
    );
    assert_eq!((reply.status, reply.body.len()), (200, 0));
    assert_eq!(server.world.count("seen"), 0);
    // All else is as before.
    assert_eq!(server.act("DO=echo").status, 200);
    let xml = server.post(
        "/ows/?MAP=city&SERVICE=WMS",
        "text/xml",
        b"<GetMap service='WMS'/>",
    );
    assert_eq!(xml.status, 200, "{}", xml.text());
    server.process.log.wait_line("refused by an access policy");
}

#[test]
fn an_api_is_denied_at_all_its_paths_and_wherever_the_settings_put_it() {
    let server = with_rules("a = deny if path=/wfs3.*");
    for path in ["/wfs3", "/ows/wfs3/collections", "/ogcapi.json"] {
        let reply = server.get(&format!("{path}?MAP=city"));
        assert_eq!(reply.status, 403, "{path}: {}", reply.text());
    }
    let server = Server::stub(
        "api.endpoints.wfs3 = /features\n\
         policies.a = deny if SERVICE=WFS\n\
         policies.b = allow if profile=guests",
    );
    for path in ["/features", "/features/api", "/ows/p/guests/features/api"] {
        let reply = server.get(&format!("{path}?MAP=city"));
        assert_eq!(reply.status, 403, "{path}: {}", reply.text());
    }
}

#[test]
fn a_profile_does_not_open_an_api_that_is_off() {
    let server = Server::stub(
        "api.enabled.wfs3 = no\n\
         policies.a = allow if profile=guests",
    );
    for path in ["/wfs3", "/ows/p/guests/wfs3", "/ows/p/guests/ogcapi/api"] {
        let reply = server.get(&format!("{path}?MAP=city"));
        assert_eq!(reply.status, 404, "{path}: {}", reply.text());
    }
}

/// QGIS takes these two operations for those of WMS.
#[test]
fn a_service_that_qgis_guesses_is_denied_as_if_it_were_named() {
    let server = with_rules("a = deny if SERVICE=WMS");
    for request in ["GetMap", "GetFeatureInfo"] {
        let path = format!("/ows/?MAP=city&REQUEST={request}");
        for (kind, body) in [("text/plain", "x=1"), ("application/json", "{}")] {
            let reply = server.post(&path, kind, body.as_bytes());
            assert_eq!(reply.status, 403, "{kind} {path}: {}", reply.text());
        }
        let named = format!("REQUEST={request}");
        let reply = server.post("/ows/?MAP=city", "text/plain", named.as_bytes());
        assert_eq!(reply.status, 403, "{path}: {}", reply.text());
        // What nobody would serve is refused as ever.
        assert_eq!(server.get(&path).status, 400);
    }
}

/// Whoever may send anything would otherwise keep everybody waiting while it is sorted.
#[test]
fn a_body_of_very_many_parameters_is_refused_before_they_are_kept() {
    let server = with_rules("a = deny if SERVICE=WFS");
    let body: String = (0..200_000).map(|n| format!("a{n}=&")).collect();
    let reply = server.post("/ows/?MAP=city&SERVICE=WMS", "text/plain", body.as_bytes());
    assert_eq!(reply.status, 400, "{}", reply.text());
}

#[test]
fn what_is_not_on_the_list_of_what_is_allowed_is_denied() {
    let server = with_rules("a = allow if SERVICE=WMS MAP=city LAYERS=public\nz = deny");
    let get = |query: &str| {
        server
            .get(&format!("/ows/?SERVICE=WMS&REQUEST=GetMap&{query}"))
            .status
    };
    assert_eq!(get("MAP=city&LAYERS=public"), 200);
    assert_eq!(get("MAP=./city.qgs&LAYERS=public,public"), 200);
    for query in [
        "MAP=city&LAYERS=public,secret",
        "MAP=city&LAYERS=",
        "MAP=city",
        "MAP=corrupt&LAYERS=public",
        "LAYERS=public",
    ] {
        assert_eq!(get(query), 403, "{query}");
    }
    // Nobody learns which projects there are.
    assert_eq!(get("MAP=nowhere&LAYERS=public"), 403);
    assert_eq!(server.get("/wfs3/?MAP=city").status, 403);
}

#[test]
fn a_project_is_denied_whatever_it_is_called() {
    let server = with_rules("a = deny if MAP=city");
    let whole = server.world.path("projects/city.qgs");
    let whole = whole.display();
    for map in [
        "city",
        "city.qgs",
        "./city",
        ".//city",
        "file:city",
        "%63ity",
        &whole.to_string(),
        &format!("/{whole}"),
        &format!("file://{whole}"),
    ] {
        for path in [
            format!("/ows/?MAP={map}&SERVICE=WMS&REQUEST=GetMap"),
            format!("/wfs3/?map={map}"),
        ] {
            let reply = server.get(&path);
            assert_eq!(reply.status, 403, "{path}: {}", reply.text());
        }
    }
    let header = [("X-Qgis-Project", "city.qgs")];
    assert_eq!(
        server
            .request("GET", "/ows/?SERVICE=WMS&REQUEST=GetMap", &header, b"")
            .status,
        403
    );
    assert_eq!(
        server
            .get("/ows/?MAP=corrupt&SERVICE=WMS&REQUEST=GetMap")
            .status,
        422
    );
}

/// A search path may lead what begins with the root elsewhere.
#[test]
fn with_search_paths_an_absolute_path_is_no_name_that_rules_know() {
    let server = with_rules("a = deny if MAP=other");
    let whole = server.world.path("projects/city.qgs");
    let path = |whole: &std::path::Path| {
        format!("/ows/?MAP={}&SERVICE=WMS&REQUEST=GetMap", whole.display())
    };
    assert_eq!(server.get(&path(&whole)).status, 200);
    let server = Server::stub(
        "projects.search_paths./public = /nowhere\n\
         policies.a = deny if MAP=other",
    );
    let whole = server.world.path("projects/city.qgs");
    assert_eq!(server.get(&path(&whole)).status, 403);
    let line = server
        .process
        .log
        .wait_line("rules about MAP go by the name");
    assert!(line.contains("projects.search_paths"), "{line}");
}

#[test]
fn rules_set_parameters_and_headers_by_profile() {
    let server = with_rules(
        "a = deny if profile=guests SERVICE!=WMS\n\
         b = rewrite MAP=city DPI=96 if profile=guests\n\
         c = request-header X-Role=guest if profile=guests\n\
         d = response-header Cache-Control=\"private, no-store\" if profile=guests",
    );
    let reply = server.get("/ows/p/guests/?SERVICE=WMS&REQUEST=GetMap&map=corrupt&dpi=300");
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("cache-control"), Some("private, no-store"));
    let said = reply.json();
    assert_eq!(said["project"], "city.qgs");
    let url = said["url"].as_str().unwrap();
    assert!(
        url.ends_with("/ows/p/guests?SERVICE=WMS&REQUEST=GetMap&MAP=city&DPI=96"),
        "{url}"
    );
    assert_eq!(said["headers"]["X-Role"], "guest");
    for path in [
        "/ows/p/guests?SERVICE=WFS&REQUEST=GetFeature",
        "/ows/p/%67uests/?SERVICE=WFS&REQUEST=GetFeature",
        "/ows/p/guests/wfs3/collections",
    ] {
        assert_eq!(server.get(path).status, 403, "{path}");
    }
    for path in [
        "/ows/p/others/?SERVICE=WMS&REQUEST=GetMap",
        "/ows/p/?SERVICE=WMS",
        "/ows/p/guests/catalog",
        "/ows/p//guests//?SERVICE=WFS&REQUEST=GetFeature",
    ] {
        assert_eq!(server.get(path).status, 404, "{path}");
    }
    // A client cannot say so itself.
    let reply = server.request(
        "GET",
        "/ows/p/guests?SERVICE=WMS&REQUEST=GetMap",
        &[("X-Role", "admin")],
        b"",
    );
    assert_eq!(reply.json()["headers"]["X-Role"], "guest");
    // A body could undo what was set.
    let reply = server.post(
        "/ows/p/guests/?REQUEST=GetMap",
        "text/xml",
        b"<GetMap service='WMS' dpi='300'/>",
    );
    assert_eq!(reply.status, 400, "{}", reply.text());
}

#[test]
fn rules_change_with_sighup_and_a_mistake_in_one_changes_nothing() {
    let world = World::stub();
    let file = world.path("q.conf");
    let write = |rules: &str| std::fs::write(&file, format!("[policies]\n{rules}\n")).unwrap();
    write("a = deny if SERVICE=WFS");
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_qgisserver"));
    let server = Server::start_from(world, program, &file, "").ready();
    let status = || server.get("/ows/?MAP=city&SERVICE=WFS&REQUEST=x").status;
    assert_eq!(status(), 403);
    write("a = deny if SERVICE=(WFS");
    server.signal(Signal::SIGHUP);
    let line = server.process.log.wait_line("no regular expression");
    assert!(line.contains("q.conf:2: policies.a: "), "{line}");
    assert_eq!(status(), 403);
    write("a = deny if SERVICE=WCS");
    server.signal(Signal::SIGHUP);
    eventually("the new rule is in force", || {
        (status() == 200).then_some(())
    });
}

// Filters in Python.

/// What a package brings that registers filters.
const FILTERS: &str = r#"
from pyqgisservercontrib.core import componentmanager
from pyqgisservercontrib.core.filters import blockingfilter, policy_filter
from tornado.web import HTTPError

def value(request, name):
    return request.arguments.get(name, [b""])[-1].decode()

def register(service, *args, **kwargs):
    config = componentmanager.get_service("@3liz.org/config-service;1")
    config.add_section("contrib:test")
    refused = config.get("contrib:test", "refused", fallback="WFS")

    @policy_filter()
    def by_default(request):
        if value(request, "service").upper() == refused:
            raise HTTPError(403, reason="Not this service")
        if request.path.startswith("/wfs3"):
            raise HTTPError(403, reason="Not this API")
        if value(request, "MAP") == "secret":
            raise HTTPError(403, reason="Not this project")
        if value(request, "DO") == "fail":
            raise ValueError("secret of a filter")
        if value(request, "DO") == "leave":
            raise SystemExit(1)

    @policy_filter(match=r"/ows/p/(?P<profile>[^/]+)/?(?P<endpoint>/.*)?", repl=r"/ows\2")
    def by_profile(request, profile, endpoint):
        if profile != "town":
            raise HTTPError(403, reason=f"Unknown profile {profile}")
        by_default.fn(request)
        request.arguments.update({"MAP": [b"city"]})
        request.headers["X-Qgis-Role"] = "guest"

    @blockingfilter(pri=10, uri="/ows/")
    def by_referer(handler):
        if "evil" in handler.request.headers.get("Referer", ""):
            raise HTTPError(451)
        if handler.get_argument("LEFT", "") == handler.request.remote_ip:
            raise HTTPError(402)

    service.add_filters([by_profile, by_default], pri=100)
    service.add_filters([by_referer], pri=10)
"#;

/// A package that is installed where workers look.
fn install(world: &World, filters: &str) {
    let site = world.path("stub");
    std::fs::write(site.join("some_policy.py"), filters).unwrap();
    let info = site.join("some_policy-1.0.dist-info");
    std::fs::create_dir_all(&info).unwrap();
    std::fs::write(
        info.join("METADATA"),
        "Metadata-Version: 2.1\nName: some-policy\nVersion: 1.0\n",
    )
    .unwrap();
    let entry = "[py_qgis_server.access_policy]\nsome = some_policy:register\n";
    std::fs::write(info.join("entry_points.txt"), entry).unwrap();
}

fn filtered(settings: &str) -> Server {
    let world = World::stub();
    install(&world, FILTERS);
    Server::start(world, &format!("server.enable_filters = yes\n{settings}")).ready()
}

/// For OWS there are headers of QGIS, for its APIs there are none.
#[test]
fn rules_say_at_which_address_a_profile_is_found() {
    let server = with_rules(
        "a = rewrite MAP=city if profile=guests\n\
         b = request-header X-Forwarded-Url=https://maps.example/guests if profile=guests",
    );
    for (path, expected) in [
        (
            "/ows/p/guests?SERVICE=WMS&REQUEST=GetMap",
            "https://maps.example/guests/ows/p/guests?",
        ),
        (
            "/ows/p/guests/wfs3/collections",
            "https://maps.example/guests/ows/p/guests/wfs3/collections?",
        ),
        (
            "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=city",
            &server.url("/ows/?"),
        ),
    ] {
        // That of a client counts for nothing.
        let of_client = [("X-Forwarded-Url", "https://evil.example/")];
        let said = server.request("GET", path, &of_client, b"").json();
        let url = said["url"].as_str().unwrap();
        assert!(url.starts_with(expected), "{url}");
    }
}

#[test]
fn a_filter_refuses_with_its_status_however_a_request_is_written() {
    let server = filtered("");
    let reply = server.get("/ows/?MAP=city&SERVICE=WFS&REQUEST=GetFeature");
    assert_eq!(reply.status, 403);
    let said = reply.json();
    assert_eq!(said["error"]["message"], "Not this service");
    assert_eq!(
        (&said["httpcode"], &said["status"]),
        (&403.into(), &"error".into())
    );
    assert_refused_in_all_ways(&server);
    for path in [
        "/wfs3/?MAP=city",
        "/ows/wfs3/?MAP=city",
        "/ogcapi/collections?MAP=city",
        "/wfs3/%63ollections?MAP=city",
        "/%77fs3/collections?MAP=city",
    ] {
        let reply = server.get(path);
        assert_eq!(reply.status, 403, "{path}: {}", reply.text());
    }
    // The project has one spelling, wherever it is named.
    for map in [
        "secret",
        "./secret",
        "file:secret",
        "%73ecret",
        ".//secret/",
    ] {
        let reply = server.get(&format!("/ows/?MAP={map}&SERVICE=WMS&REQUEST=GetMap"));
        assert_eq!(reply.status, 403, "{map}: {}", reply.text());
    }
    let named = [("X-Qgis-Project", "secret")];
    let reply = server.request("GET", "/ows/?SERVICE=WMS&REQUEST=GetMap", &named, b"");
    assert_eq!(reply.status, 403, "{}", reply.text());
    // The project is not even looked for.
    let reply = server.get("/ows/?MAP=nowhere&SERVICE=WFS&REQUEST=GetFeature");
    assert_eq!(reply.status, 403, "{}", reply.text());
    let reply = server.act("DO=echo");
    assert_eq!(reply.status, 200);
    // For this client, and no cache gives it to another.
    assert_eq!(reply.header("cache-control"), Some("private"));
    let evil = [("Referer", "https://evil.example/")];
    assert_eq!(
        server
            .request("GET", "/ows/?MAP=city&SERVICE=WMS&REQUEST=x", &evil, b"")
            .status,
        451
    );
    assert_eq!(server.act("DO=echo&LEFT=127.0.0.1").status, 402);
}

/// There a project has another name, and the path has the last word over MAP.
#[test]
fn a_filter_knows_a_project_of_the_catalogue_by_its_own_name() {
    let world = World::stub();
    install(&world, FILTERS);
    std::fs::write(world.path("projects/secret.qgs"), "<qgis/>").unwrap();
    let settings = "server.enable_filters = yes\napi.enabled.landing_page = yes";
    let server = Server::start(world, settings).ready();
    let of = |project: &str, more: &str| {
        let id = md5(&server.world.path(&format!("projects/{project}.qgs")));
        server.get(&format!(
            "/catalog/project/{id}/?SERVICE=WMS&REQUEST=GetMap{more}"
        ))
    };
    for more in ["", "&MAP=city", "&map=city"] {
        assert_eq!(of("secret", more).status, 403, "{more}");
        assert_eq!(of("city", more).status, 200, "{more}");
    }
    assert_eq!(of("nothing", "").status, 404);
    assert_eq!(of("city", "&DO=fail").status, 500);
}

#[test]
fn a_filter_that_fails_refuses_and_costs_no_worker() {
    let server = filtered("");
    let before = server.workers();
    for what in ["fail", "leave"] {
        let reply = server.act(&format!("DO={what}&MARK=served"));
        assert_eq!(reply.status, 500, "{what}: {}", reply.text());
        assert!(
            reply.text().contains("An access policy failed"),
            "{}",
            reply.text()
        );
        assert!(!reply.text().contains("secret"), "{}", reply.text());
    }
    assert_eq!(server.world.count("served"), 0);
    server.process.log.wait_line("secret of a filter");
    assert_eq!(server.workers(), before);
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_filter_serves_profiles_and_changes_what_is_asked() {
    let server = filtered("");
    for path in [
        "/ows/p/town/?SERVICE=WMS&REQUEST=GetMap&X=%C3%BC+%26",
        "/ows/p/town?MAP=corrupt&SERVICE=WMS&REQUEST=GetMap",
        "/ows/p/%74own?SERVICE=WMS&REQUEST=GetMap",
    ] {
        let reply = server.get(path);
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        let said = reply.json();
        assert_eq!(said["project"], "city.qgs", "{path}");
        assert_eq!(said["headers"]["X-Qgis-Role"], "guest", "{path}");
        let url = said["url"].as_str().unwrap();
        assert!(url.contains("own?") || url.contains("own/?"), "{url}");
        assert!(url.contains("MAP=city"), "{url}");
    }
    for (status, path) in [
        (403, "/ows/p/village/?SERVICE=WMS&REQUEST=GetMap&MAP=city"),
        (403, "/ows/p/town/?SERVICE=WFS&REQUEST=GetMap"),
        (400, "/ows/p/town/?REQUEST=GetTile"),
        (404, "/ows/p/?SERVICE=WMS&REQUEST=GetMap"),
    ] {
        let reply = server.get(path);
        assert_eq!(reply.status, status, "{path}: {}", reply.text());
    }
    // Those below see what the first one made of the path.
    let evil = [("Referer", "https://evil.example/")];
    let path = "/ows/p/town?SERVICE=WMS&REQUEST=GetMap";
    assert_eq!(server.request("GET", path, &evil, b"").status, 451);
    // What a body says is not for filters to change.
    let body = b"<GetMap service='WMS' map='corrupt'/>";
    let reply = server.post("/ows/p/town/?REQUEST=GetMap", "text/xml", body);
    assert_eq!(reply.status, 403, "{}", reply.text());
}

/// One profile is closed, all others are open.
const BY_PATH: &str = r#"
from pyqgisservercontrib.core.filters import policy_filter
from tornado.web import HTTPError

def register(service, *args, **kwargs):
    @policy_filter(match=r"/ows/p/admin")
    def closed(request):
        raise HTTPError(403)

    @policy_filter(match=r"/ows/p/(?P<profile>[^/]+)/?", repl="/ows/")
    def by_name(request, profile):
        request.headers["X-Qgis-Role"] = profile

    service.add_filters([closed, by_name])
"#;

fn filtered_by(filters: &str) -> Server {
    let world = World::stub();
    install(&world, filters);
    Server::start(world, "server.enable_filters = yes").ready()
}

#[test]
fn a_filter_is_about_its_paths_in_any_case_that_a_client_writes() {
    let server = filtered_by(BY_PATH);
    let query = "SERVICE=WMS&REQUEST=GetMap&MAP=city";
    for profile in ["admin", "ADMIN", "Admin", "%41dmin", "aDMIN"] {
        let reply = server.get(&format!("/ows/p/{profile}/?{query}"));
        assert_eq!(reply.status, 403, "{profile}: {}", reply.text());
    }
    let reply = server.get(&format!("/ows/p/Town/?{query}"));
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["headers"]["X-Qgis-Role"], "Town");
}

const BY_PLACE: &str = r#"
import re
from pyqgisservercontrib.core.filters import policy_filter

def register(service, *args, **kwargs):
    @policy_filter(match=re.compile(r"/ows/p/([^/]+)/?"), repl="/ows/")
    def by_place(request, profile):
        request.headers["X-Qgis-Role"] = profile

    @policy_filter(match=r"/ows/", repl="")
    def keeps_the_path(request):
        request.headers["X-Qgis-Path"] = request.path

    service.add_filters([by_place], pri=2)
    service.add_filters([keeps_the_path], pri=1)
"#;

#[test]
fn groups_without_names_are_arguments_and_an_empty_replacement_is_none() {
    let server = filtered_by(BY_PLACE);
    let reply = server.get("/ows/p/town/?SERVICE=WMS&REQUEST=GetMap&MAP=city");
    assert_eq!(reply.status, 200, "{}", reply.text());
    let said = reply.json();
    assert_eq!(said["headers"]["X-Qgis-Role"], "town");
    assert_eq!(said["headers"]["X-Qgis-Path"], "/ows/");
}

#[test]
fn filters_read_their_settings() {
    let server = filtered("contrib:test.refused = WCS");
    assert_eq!(
        server.get("/ows/?MAP=city&SERVICE=WCS&REQUEST=x").status,
        403
    );
    assert_eq!(
        server.get("/ows/?MAP=city&SERVICE=WFS&REQUEST=x").status,
        200
    );
}

#[test]
fn without_enable_filters_there_are_neither_filters_nor_profiles() {
    let world = World::stub();
    install(&world, FILTERS);
    let server = Server::start(world, "").ready();
    assert_eq!(
        server.get("/ows/?MAP=city&SERVICE=WFS&REQUEST=x").status,
        200
    );
    assert_eq!(server.get("/ows/p/town/?SERVICE=WMS&REQUEST=x").status, 404);
}

#[test]
fn a_policy_that_does_not_load_keeps_workers_from_serving() {
    let world = World::stub();
    install(&world, "raise ValueError('no policy')\n");
    let server = Server::start(world, "server.enable_filters = yes\nworker.backoff_max = 1");
    server
        .process
        .log
        .wait_line("the access policy some does not load");
    assert_eq!(server.get("/ready").status, 503);
    // Mended, workers come by themselves.
    install(&server.world, FILTERS);
    server.wait_ready();
    assert_eq!(
        server.get("/ows/?MAP=city&SERVICE=WFS&REQUEST=x").status,
        403
    );
}

/// Nobody can tell which of the two was meant.
#[test]
fn a_server_with_filters_and_a_pool_without_them_serve_nothing_together() {
    let world = World::stub();
    install(&world, FILTERS);
    let server = Server::proxy(world, "server.enable_filters = yes");
    let _pool = common::Pool::start(&server.world, server.gate.unwrap(), "server.workers = 1");
    server.wait_ready();
    let reply = server.act("DO=echo");
    assert_eq!(reply.status, 500, "{}", reply.text());
}

#[test]
fn a_pool_with_policies_does_not_serve_a_server_without_them() {
    let world = World::stub();
    install(&world, FILTERS);
    let server = Server::proxy(world, "server.workers = 1");
    let _pool = common::Pool::start(
        &server.world,
        server.gate.unwrap(),
        "server.enable_filters = yes\nserver.workers = 1",
    );
    server.wait_ready();
    let reply = server.act("DO=echo");
    assert_eq!(reply.status, 500, "{}", reply.text());
    let reply = server.get("/wfs3/?MAP=city");
    assert_eq!(reply.status, 500, "{}", reply.text());
}

// On QGIS.

/// Links lead back into the profile, for web services and for the API.
#[test]
fn what_a_profile_answers_links_to_the_profile() {
    let server = Server::real("policies.a = rewrite MAP=world if profile=all");
    let reply = server.get("/ows/p/all/?SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities");
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(reply.text().contains("/ows/p/all?"), "{}", reply.text());
    let reply = server.get("/ows/p/all/wfs3/collections.json");
    assert_eq!(reply.status, 200, "{}", reply.text());
    let links = reply.json()["links"].to_string();
    assert!(links.contains("/ows/p/all/wfs3/collections"), "{links}");
    let reply = server.get("/ows/p/all/wfs3/collections/places/items/5.json");
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// All of them would get the features of `places`.
const HIDDEN: [&str; 10] = [
    "/wfs3/collections/lines/collections/places/items",
    "/wfs3/collections/lines%2Fcollections/places/items",
    "/wfs3/api/collections/places/items",
    "/wfs3/static/collections/places/items",
    "/wfs3.json/collections/places/items",
    "/wfs3/collections/./places/items",
    "/wfs3/collections/%2e/places/items",
    "/wfs3/collections//places/items",
    "/ows/wfs3/collections/places/items",
    "/wfs3/%63ollections/places/items",
];

#[test]
fn a_collection_is_denied_wherever_in_a_path_it_stands() {
    let server = Server::real("policies.a = deny if TYPENAME=places");
    for path in HIDDEN {
        let reply = server.get(&format!("{path}?MAP=world"));
        let is_refused = matches!(reply.status, 403 | 404);
        assert!(is_refused, "{path}: {} {}", reply.status, reply.text());
        assert!(!reply.text().contains("FeatureCollection"), "{path}");
    }
}

#[test]
fn a_feature_type_is_denied_by_whatever_names_it() {
    let xml = b"<GetFeature service='WFS' version='1.1.0'><Query typeName='places'/></GetFeature>";
    let posted = "/ows/?MAP=world&SERVICE=WFS&REQUEST=GetFeature&TYPENAME=lines";
    let by_id = "/ows/?MAP=world&SERVICE=WFS&REQUEST=GetFeature&VERSION=1.1.0&FEATUREID=places.5";
    let ask = |server: &Server| [server.post(posted, "text/xml", xml), server.get(by_id)];
    let open = Server::real("");
    for reply in ask(&open) {
        let is_of_places = reply.text().contains("gml:id=\"places.");
        assert!(is_of_places, "{} {}", reply.status, reply.text());
    }
    drop(open);
    for rules in [
        "policies.a = deny if TYPENAME=places",
        "policies.a = allow if TYPENAME=lines\npolicies.b = deny",
    ] {
        let server = Server::real(rules);
        for reply in ask(&server) {
            assert_eq!(reply.status, 403, "{rules}: {}", reply.text());
        }
    }
}

/// QGIS itself goes by a body whatever its type; so do the rules.
#[test]
fn what_qgis_would_do_for_a_body_is_what_rules_refuse() {
    let query = "/ows/?MAP=world&SERVICE=WMS&REQUEST=GetCapabilities";
    let bodies = [
        (
            "text/plain",
            "SERVICE=WFS&REQUEST=GetFeature&VERSION=1.1.0&TYPENAME=places",
        ),
        (
            "text/xml",
            "<GetFeature service='WFS' version='1.1.0'><Query typeName='places'/></GetFeature>",
        ),
    ];
    let open = Server::real("");
    let is_features = |reply: &Reply| reply.text().contains("FeatureCollection");
    let n = bodies
        .iter()
        .filter(|(kind, body)| is_features(&open.post(query, kind, body.as_bytes())))
        .count();
    assert!(n > 0, "if QGIS never did, there would be nothing to refuse");
    drop(open);
    let server = Server::real("policies.a = deny if SERVICE=WFS");
    for (kind, body) in bodies {
        let reply = server.post(query, kind, body.as_bytes());
        assert_eq!(reply.status, 400, "{kind}: {}", reply.text());
    }
}

/// Pieces of bodies that mean something to somebody.
const PIECES: [&str; 26] = [
    "<GetFeature service='WFS'/>",
    "<GetFeature service=\"WFS\">",
    "<a:GetFeature xmlns:a='x' SERVICE = 'WFS'>",
    "</GetFeature>",
    // No XML as a whole, so QGIS reads it as a form.
    "<a service='WMS'/>&SERVICE=WFS",
    "<a service='WMS'>&REQUEST=GetFeature",
    "<a",
    " service='WMS'",
    " service='WFS'",
    " service='W&#70;S'",
    "/>",
    ">",
    "<?xml version='1.0' encoding='utf-16'?>",
    "<!-- <a> -->",
    "<!DOCTYPE a [<!ENTITY b 'WFS'>]>",
    "<![CDATA[&SERVICE=WFS]]>",
    "&",
    "SERVICE=WFS",
    "s%45rvice=WFS",
    "SERVICE=WMS",
    "REQUEST=GetFeature",
    "=",
    "\u{FEFF}",
    " \n",
    "\u{1}",
    "é",
];

/// Numbers that look random and are the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// QGIS says what it read, and the rules what they saw. What they may not have seen as
/// QGIS did is refused.
#[test]
fn whatever_a_body_is_rules_see_the_service_that_qgis_sees() {
    let server = Server::real(&format!(
        "server.pluginpath = {}\n\
         policies.a = response-header X-Wfs=seen if SERVICE=WFS\n\
         policies.b = response-header X-Features=seen if REQUEST=GetFeature",
        common::source("tests/data/seen").display()
    ));
    let kinds = ["text/xml", "text/plain", FORM, "application/json"];
    let queries = [
        "",
        "&SERVICE=WMS",
        "&SERVICE=WFS&REQUEST=GetFeature",
        "&service=wms&SERVICE=WFS",
    ];
    let mut dice = Dice(1);
    let (mut n_seen, mut n_refused) = (0, 0);
    for n in 0..600 {
        // Each piece for itself with each query, then some together.
        let alone = PIECES.get(n / queries.len());
        let query = queries[n % queries.len()];
        let pieces = (0..1 + dice.below(5)).map(|_| PIECES[dice.below(PIECES.len())]);
        let body = alone.map_or_else(|| pieces.collect(), |piece| piece.to_string());
        let kind = kinds[dice.below(kinds.len())];
        let reply = server.post(&format!("/ows/?MAP=world{query}"), kind, body.as_bytes());
        if reply.status == 400 && reply.text().contains("does not say clearly") {
            n_refused += 1;
            continue;
        }
        let text = reply.text();
        let mut lines = text.lines();
        let mut read = || {
            lines
                .next()
                .unwrap_or_default()
                .trim_matches('\'')
                .to_uppercase()
        };
        let what = format!("{kind} {query} {body:?}: {text}");
        let (service, request) = (read(), read());
        if service == "WFS" {
            assert_eq!(reply.header("x-wfs"), Some("seen"), "{what}");
            n_seen += 1;
        }
        if request.rsplit(':').next() == Some("GETFEATURE") {
            assert_eq!(reply.header("x-features"), Some("seen"), "{what}");
        }
    }
    assert!(
        n_seen > 50 && n_refused > 50,
        "{n_seen} seen, {n_refused} refused"
    );
}
