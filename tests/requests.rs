//! What a client asks is what QGIS is asked, and what it is not told it does not see.

mod common;

use common::{Reply, Server, World};

const GET_MAP: &str = "SERVICE=WMS&REQUEST=GetMap";

/// The parameters of the URL that QGIS saw.
fn parameters(reply: &Reply) -> Vec<String> {
    let url = reply.json()["url"].as_str().unwrap().to_owned();
    let mut parameters: Vec<_> = url
        .split_once('?')
        .unwrap()
        .1
        .split('&')
        .map(str::to_owned)
        .collect();
    parameters.sort();
    parameters
}

#[test]
fn a_project_is_named_by_map_by_header_or_by_default() {
    let world = World::stub();
    std::fs::create_dir(world.path("projects/deep")).unwrap();
    for name in [
        "town.qgs",
        "village.qgz",
        "deep/ocean.qgs",
        "Šumava město.qgs",
    ] {
        std::fs::write(world.path("projects").join(name), "<qgis/>").unwrap();
    }
    let server = Server::start(world, "server.default_project = city").ready();
    let project = |path: &str, headers: &[(&str, &str)]| {
        let reply = server.request("GET", path, headers, b"");
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        reply.json()["project"].as_str().unwrap().to_owned()
    };
    for (map, file) in [
        ("town", "town.qgs"),
        ("town.qgs", "town.qgs"),
        ("village", "village.qgz"),
        ("village.qgz", "village.qgz"),
        ("deep/ocean", "ocean.qgs"),
        ("deep%2Focean.qgs", "ocean.qgs"),
        ("file:town", "town.qgs"),
        ("%C5%A0umava%20m%C4%9Bsto", "Šumava město.qgs"),
        ("%C5%A0umava+m%C4%9Bsto.qgs", "Šumava město.qgs"),
    ] {
        assert_eq!(
            project(&format!("/ows/?MAP={map}&{GET_MAP}"), &[]),
            file,
            "{map}"
        );
        assert_eq!(
            project(&format!("/wfs3/collections?MAP={map}"), &[]),
            file,
            "{map}"
        );
    }
    let header = [("X-Qgis-Project", "town")];
    assert_eq!(
        project(&format!("/ows/?map=village&{GET_MAP}"), &[]),
        "village.qgz",
        "in any case"
    );
    assert_eq!(project(&format!("/ows/?{GET_MAP}"), &header), "town.qgs");
    assert_eq!(
        project(&format!("/ows/?MAP=village&{GET_MAP}"), &header),
        "village.qgz",
        "MAP is stronger"
    );
    assert_eq!(
        project(&format!("/ows?{GET_MAP}"), &[]),
        "city.qgs",
        "the default is weaker"
    );
}

#[test]
fn a_form_is_a_get_and_xml_stays_a_post() {
    let server = Server::stub("");
    let form = "application/x-www-form-urlencoded";
    let reply = server.post(
        "/ows/?MAP=city",
        form,
        b"SERVICE=WMS&request=GetMap&LAYERS=a%20b",
    );
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(
        (&reply.json()["method"], &reply.json()["body"]),
        (&2.into(), &"".into()),
        "GET"
    );
    let seen = parameters(&reply);
    assert!(
        seen.contains(&"SERVICE=WMS".to_owned()) && seen.contains(&"REQUEST=GetMap".to_owned()),
        "{seen:?}"
    );

    let xml = "<wfs:GetFeature xmlns:wfs=\"x\"/>";
    let reply = server.post("/ows/?MAP=city&SERVICE=WFS", "text/xml", xml.as_bytes());
    assert_eq!(
        (&reply.json()["method"], &reply.json()["body"]),
        (&3.into(), &xml.into()),
        "POST"
    );
}

#[test]
fn head_and_options_answer_without_a_body() {
    let server = Server::stub("");
    let path = format!("/ows/?MAP=city&{GET_MAP}");
    let got = server.get(&path);
    let head = server.request("HEAD", &path, &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.header("content-type"), got.header("content-type"));
    for path in [&path, "/wfs3/collections?MAP=city"] {
        let headers = [
            ("Origin", "https://example.org"),
            ("Access-Control-Request-Method", "GET"),
        ];
        let options = server.request("OPTIONS", path, &headers, b"");
        assert!([200, 204].contains(&options.status), "{}", options.status);
        assert!(
            options.header("access-control-allow-origin").is_some(),
            "{:?}",
            options.headers
        );
        assert!(
            options
                .header("access-control-allow-methods")
                .is_some_and(|it| it.contains("GET"))
        );
    }
    for method in ["PATCH", "BREW"] {
        assert_eq!(
            server.request(method, &path, &[], b"").status,
            405,
            "{method}"
        );
    }
}

/// QGIS looks its headers up in Title-Case.
#[test]
fn qgis_gets_the_headers_that_are_allowed_and_no_others() {
    let server = Server::stub("");
    let sent = [
        ("x-qgis-style", "night"),
        // It would change what others are told, where answers are cached.
        ("X-Qgis-Service-Url", "https://evil.example.org/"),
        ("X-LIZMAP-User", "ada"),
        ("Accept", "text/html"),
        ("Cookie", "secret=1"),
        ("Authorization", "Basic c2VjcmV0"),
        ("X-Other", "1"),
    ];
    let reply = server.request("GET", &format!("/ows/?MAP=city&{GET_MAP}"), &sent, b"");
    let json = reply.json();
    let seen = json["headers"].as_object().unwrap();
    assert_eq!(seen["X-Qgis-Style"], "night");
    assert_eq!(seen["X-Lizmap-User"], "ada");
    assert_eq!(seen["Accept"], "text/html");
    for name in ["Cookie", "Authorization", "X-Other", "X-Qgis-Service-Url"] {
        assert!(
            !seen.keys().any(|key| key.eq_ignore_ascii_case(name)),
            "{name}"
        );
    }
}

#[test]
fn a_request_id_is_echoed_or_made_and_stands_in_the_log() {
    let server = Server::stub("");
    let path = format!("/ows/?MAP=city&{GET_MAP}");
    let reply = server.request("GET", &path, &[("X-Request-Id", "abc-123")], b"");
    assert_eq!(reply.header("x-request-id"), Some("abc-123"));
    server.process.log.wait_line("abc-123");
    let made = server.get(&path).header("x-request-id").unwrap().to_owned();
    assert!(made.len() >= 16, "{made}");
    assert_ne!(
        server.get(&path).header("x-request-id"),
        Some(made.as_str())
    );
}

/// Expressions in a project can read the environment.
#[test]
fn workers_see_no_environment_but_what_qgis_needs() {
    let server = Server::stub("worker.env_allow = ALLOWED_*");
    let json = server.get(&format!("/ows/?MAP=city&{GET_MAP}")).json();
    let seen: Vec<&str> = json["environment"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it.as_str().unwrap())
        .collect();
    assert!(seen.contains(&"ALLOWED_BY_THE_OPERATOR"), "{seen:?}");
    assert!(
        !seen
            .iter()
            .any(|name| name.contains("SECRET") || name.contains("CARGO")),
        "{seen:?}"
    );
    // Neither do those who can open files.
    for pid in server.workers() {
        let memory = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
        let secret = b"MY_SECRET=secret";
        assert!(!memory.windows(secret.len()).any(|part| part == secret));
        let path = b"PATH=/";
        assert!(memory.windows(path.len()).any(|part| part == path));
    }
    // The operator learns that something was held back, and the names only on request.
    let line = server.process.log.wait_line("workers do not inherit");
    assert!(
        line.contains("INFO") && !line.contains("MY_SECRET"),
        "{line}"
    );
}

#[test]
fn the_pages_of_the_server_itself_need_no_project() {
    let server = Server::stub("");
    for (path, status) in [
        ("/", 200),
        ("/ping", 200),
        ("/ready", 200),
        ("/status", 200),
        ("/nowhere", 404),
        ("/OWS/", 404),
    ] {
        let reply = server.get(path);
        assert_eq!(reply.status, status, "{path}: {}", reply.text());
        assert!(
            reply
                .header("content-type")
                .is_some_and(|it| it.contains("json")),
            "{path}"
        );
        reply.json();
    }
    let status = server.status();
    assert_eq!(status["workers"].as_array().unwrap().len(), 2);
    assert_eq!(status["workers"][0]["versions"]["qgis"], "3.22.16-stub");
}
