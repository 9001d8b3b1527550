//! Server plugins: found, listed, kept apart, replaced; and each of their extension points
//! works as in QGIS itself.

mod common;

use std::path::{Path, PathBuf};

use common::native::Native;
use common::process::install_script;
use common::{Reply, Server, World, eventually, http, source};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const MAP: &str = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=land&STYLES=&CRS=EPSG:4326\
                   &BBOX=-90,-180,90,180&HEIGHT=20&FORMAT=image/png";

const MANAGED: &str = "management.enabled = yes\nmanagement.port = 0";

/// Answers SERVICE=<name> with a text.
fn plugin_text(service: &str, says: &str) -> String {
    format!(
        "from qgis.server import QgsService\n\
         class Service(QgsService):\n\
         \x20   def name(self):\n        return '{service}'\n\
         \x20   def version(self):\n        return '1'\n\
         \x20   def executeRequest(self, request, response, project):\n        response.write('{says}')\n\
         def serverClassFactory(interface):\n\
         \x20   service = Service()\n\
         \x20   interface.serviceRegistry().registerService(service)\n\
         \x20   return service\n"
    )
}

fn write_plugin(folder: &Path, metadata: &str, text: &str) {
    std::fs::create_dir_all(folder).unwrap();
    let metadata = format!("[general]\n{metadata}\n");
    std::fs::write(folder.join("metadata.txt"), metadata).unwrap();
    std::fs::write(folder.join("__init__.py"), text).unwrap();
}

fn management(server: &Server, path: &str) -> Reply {
    let base = server.process.log.wait_for("management at ", |line| {
        let rest = line.split("management at ").nth(1)?;
        Some(rest.split("/ ").next()?.trim_end_matches('/').to_owned())
    });
    http::ask("GET", &format!("{base}{path}"), &[], b"").unwrap()
}

fn page(server: &Server, path: &str) -> Value {
    let reply = management(server, path);
    assert_eq!(reply.status, 200, "{path}: {}", reply.text());
    reply.json()
}

/// Names and statuses, as `/plugins` has them.
fn statuses(server: &Server) -> Vec<(String, String)> {
    let page = page(server, "/plugins");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let plugins = page["plugins"].as_array().unwrap().iter();
    plugins
        .map(|plugin| (text(&plugin["name"]), text(&plugin["status"])))
        .collect()
}

fn pair(name: &str, status: &str) -> (String, String) {
    (name.to_owned(), status.to_owned())
}

fn ask(server: &Server, service: &str) -> String {
    server
        .get(&format!("/ows/?MAP=city&SERVICE={service}&REQUEST=x"))
        .text()
}

// Found and listed.

/// Two paths, and in them: one that both have, one that another folder calls the same,
/// one that does not load, one that shadows a module of Python, one that is none.
fn two_paths() -> (World, String) {
    let world = World::stub();
    let (one, two) = (world.path("one"), world.path("two"));
    write_plugin(
        &one.join("both"),
        "name=Both\nversion=1.5\nserver=True",
        &plugin_text("BOTH", "of one"),
    );
    write_plugin(
        &two.join("both"),
        "name=Both\nversion=2\nserver=True",
        &plugin_text("BOTH", "of two"),
    );
    write_plugin(
        &two.join("both_old"),
        "name=Both\nserver=True",
        &plugin_text("OLD", "old"),
    );
    write_plugin(
        &two.join("broken"),
        "name=Broken one\nserver=True",
        "import nothing_of_this_name\n",
    );
    write_plugin(
        &two.join("json"),
        "name=Shadow\nserver=True",
        "raise SystemExit(3)\n",
    );
    write_plugin(
        &two.join("zeal"),
        "name=Zeal\nserver=True",
        &plugin_text("ZEAL", "zeal"),
    );
    write_plugin(
        &two.join("desktop"),
        "name=Desktop",
        "raise SystemExit(3)\n",
    );
    let paths = format!("{}:{}", one.display(), two.display());
    (world, paths)
}

#[test]
fn of_two_plugins_with_one_name_the_first_is_loaded_and_all_are_listed() {
    let (world, paths) = two_paths();
    let two = world.path("two");
    let server = Server::start(world, &format!("server.pluginpath = {paths}\n{MANAGED}")).ready();
    assert_eq!(ask(&server, "BOTH"), "of one");
    assert_eq!(ask(&server, "ZEAL"), "zeal");
    assert_eq!(
        statuses(&server),
        [
            pair("both", "loaded"),
            pair("both_old", "conflict"),
            pair("broken", "failed"),
            pair("json", "failed"),
            pair("zeal", "loaded"),
        ]
    );
    let both = page(&server, "/plugins/both");
    assert_eq!(both["left_out"], json!([two.join("both")]));
    assert_eq!(both["metadata"]["version"], "1.5");
    assert_eq!(both["error_log"], Value::Null);
    // By the name in its metadata.
    let broken = page(&server, "/plugins/Broken%20one");
    let trace = broken["error_log"].as_str().unwrap();
    assert!(
        trace.contains("Traceback") && trace.contains("nothing_of_this_name"),
        "{trace}"
    );
    let workers = broken["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    assert_eq!(workers[0]["status"], "failed");
    let shadow = page(&server, "/plugins/json");
    assert!(
        shadow["error_log"]
            .as_str()
            .unwrap()
            .contains("another module has the name json")
    );
    assert_eq!(management(&server, "/plugins/nobody").status, 404);
    assert_eq!(management(&server, "/pluginsx").status, 404);
    let log = &server.process.log;
    log.wait_line("plugin broken does not load");
    let line = log.wait_line("plugin both of");
    assert!(
        line.contains("is left out") && line.contains("comes first"),
        "{line}"
    );
}

#[test]
fn a_list_of_plugins_keeps_all_others_out_and_misses_what_is_not_there() {
    let (world, paths) = two_paths();
    // Commas are as good as colons.
    let paths = paths.replace(':', ", ");
    let wanted = "plugins.install = Zeal, both, Missing";
    let settings = format!("server.pluginpath = {paths}\n{wanted}\n{MANAGED}");
    let server = Server::start(world, &settings).ready();
    assert_eq!(
        statuses(&server),
        [
            pair("Missing", "failed"),
            pair("both", "loaded"),
            pair("zeal", "loaded")
        ]
    );
    assert_eq!(ask(&server, "ZEAL"), "zeal");
    server.process.log.wait_line("plugin Missing does not load");
}

#[test]
fn with_strict_a_plugin_that_does_not_load_keeps_workers_from_serving() {
    let (world, paths) = two_paths();
    let settings =
        format!("server.pluginpath = {paths}\nplugins.strict = yes\nworker.backoff_max = 1");
    let server = Server::start(world, &settings);
    let line = server.process.log.wait_line("plugins.strict");
    assert!(line.contains("the plugin broken does not load"), "{line}");
    assert_eq!(server.get("/ready").status, 503);
    // Mended, workers come by themselves.
    for name in ["broken", "json"] {
        std::fs::remove_dir_all(server.world.path("two").join(name)).unwrap();
    }
    server.wait_ready();
    assert_eq!(ask(&server, "BOTH"), "of one");
}

// Replaced.

#[test]
fn a_plugin_that_changed_is_there_after_a_rolling_restart() {
    let world = World::stub();
    let folder = world.path("plugins/news");
    write_plugin(
        &folder,
        "name=News\nversion=1\nserver=True",
        &plugin_text("NEWS", "old"),
    );
    let touched = world.path("restart");
    std::fs::write(&touched, "").unwrap();
    let settings = format!(
        "server.pluginpath = {}\nserver.restartmon = {}\nserver.restartmon_check_time = 20\n{MANAGED}",
        world.path("plugins").display(),
        touched.display()
    );
    let server = Server::start(world, &settings).ready();
    assert_eq!(ask(&server, "NEWS"), "old");
    let replaced = |version: &str, says: &str, how: &dyn Fn()| {
        write_plugin(
            &folder,
            &format!("name=News\nversion={version}\nserver=True"),
            &plugin_text("NEWS", says),
        );
        how();
        // No request fails meanwhile, whoever serves it.
        eventually(says, || {
            let reply = server.get("/ows/?MAP=city&SERVICE=NEWS&REQUEST=x");
            assert_eq!(reply.status, 200, "{}", reply.text());
            let page = page(&server, "/plugins/news");
            let workers = page["workers"].as_array().unwrap();
            let all_new = workers.iter().all(|worker| worker["version"] == version);
            (reply.text() == says && all_new).then_some(())
        });
    };
    replaced("2", "after SIGHUP", &|| server.signal(Signal::SIGHUP));
    replaced("3", "after a file was touched", &|| {
        std::fs::write(&touched, "now").unwrap()
    });
}

/// A program that does what qgis-plugin-manager does, as far as we use it.
fn manager(world: &World, script: &str) -> PathBuf {
    let path = world.path("manager");
    install_script(script, &path);
    path
}

fn with_manager(world: World, script: &str, more: &str) -> Server {
    let program = manager(&world, script);
    let folder = world.path("plugins");
    std::fs::create_dir(&folder).unwrap();
    let settings = format!(
        "server.pluginpath = {}\nplugins.install = Fresh One\nplugins.install_mode = auto\n\
         plugins.plugin_manager = {}\n{MANAGED}\n{more}",
        folder.display(),
        program.display()
    );
    Server::start(world, &settings)
}

#[test]
fn plugins_are_installed_before_workers_start() {
    let world = World::stub();
    write_plugin(
        &world.path("fresh"),
        "name=Fresh One\nserver=True",
        &plugin_text("FRESH", "installed"),
    );
    // As the real one it works in the folder of the plugins, and says so.
    let script = "echo \"$*\" >> ../asked\n[ \"$QGIS_PLUGINPATH\" = \"$PWD\" ] || exit 1\n\
                  [ \"$1\" != install ] || cp -r ../fresh \"$PWD/fresh\"";
    let server = with_manager(world, script, "").ready();
    assert_eq!(ask(&server, "FRESH"), "installed");
    let asked = std::fs::read_to_string(server.world.path("asked")).unwrap();
    assert_eq!(asked, "init\nupdate\ninstall Fresh One\n");
    server.process.log.wait_line("step=\"install Fresh One\"");
}

#[test]
fn a_manager_that_hangs_or_fails_is_ended_and_named_and_workers_serve_without_it() {
    for (script, says) in [
        (
            "sleep 600 & echo $! > ../child; wait",
            "plugins.install_timeout",
        ),
        ("exit 7", "the plugin manager failed"),
    ] {
        let server = with_manager(World::stub(), script, "plugins.install_timeout = 2").ready();
        server.process.log.wait_line(says);
        assert_eq!(statuses(&server), [pair("Fresh One", "failed")]);
        if let Ok(child) = std::fs::read_to_string(server.world.path("child")) {
            let child = child.trim().parse().unwrap();
            eventually("what it started is ended, too", || {
                (!common::process::is_alive(child)).then_some(())
            });
        }
    }
}

#[test]
fn with_strict_a_pool_does_not_start_without_what_could_not_be_installed() {
    let server = with_manager(World::stub(), "exit 7", "plugins.strict = yes");
    server
        .process
        .log
        .wait_line("not without all plugins (plugins.strict)");
    assert_eq!(server.get("/ready").status, 503);
}

// Extension points, on QGIS.

#[test]
fn each_extension_point_of_qgis_works() {
    let world = World::real();
    let settings = format!(
        "server.pluginpath = {}\napi.enabled.points = yes\napi.endpoints.points = /points\n{MANAGED}",
        source("tests/data/points").display()
    );
    let server = Server::start(world, &settings).ready();
    let before = server.workers();

    // Filters, by priority; what one sets the service sees.
    let map = server.get(&format!("/ows/?MAP=world&{MAP}&WIDTH=twenty"));
    assert_eq!(map.status, 200, "{}", map.text());
    assert_eq!(map.body[16..20], [0, 0, 0, 20], "the width of a PNG");
    let seen = "first.ready second.ready first.complete second.complete";
    assert_eq!(map.header("x-seen"), Some(seen));
    let stopped = server.get(&format!("/ows/?MAP=world&{MAP}&WIDTH=20&STOP=1"));
    let can_stop = stopped.header("x-seen") == Some("first.ready second.ready first.complete");
    assert!(
        can_stop || stopped.header("x-seen") == Some(seen),
        "3.24 and later can stop"
    );

    // Each flush of a stream.
    let features =
        "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=places&OUTPUTFORMAT=GeoJSON";
    let reply = server.get(&format!("/ows/?MAP=world&{features}"));
    assert_eq!(reply.header("transfer-encoding"), Some("chunked"));
    let n = reply.json()["features"].as_array().unwrap().len();
    let line = server.process.log.wait_for("flushes", |line| {
        let n: usize = line
            .split("second: ")
            .nth(1)?
            .split(' ')
            .next()?
            .parse()
            .ok()?;
        (n > 1).then_some(n)
    });
    assert!(line >= n, "{line} flushes for {n} features");

    // The cache.
    let capabilities = "/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities&X=1";
    let first = server.get(capabilities).text();
    assert!(first.contains("<Title>World</Title>"), "{first}");
    let second = server.get(capabilities).text();
    assert!(second.contains("From the cache"), "{second}");

    for what in ["raises", "lies"] {
        let reply = server.get(&format!("{capabilities}&CACHE={what}"));
        assert_eq!(reply.status, 500, "{what}: {}", reply.text());
    }

    // A service, whose name has a case.
    let reply = server.get("/ows/?MAP=world&SERVICE=Points&REQUEST=Count");
    assert_eq!(reply.header("content-type"), Some("application/x-points"));
    assert!(reply.text().starts_with("Count of "), "{}", reply.text());
    let reply = server.get("/ows/?MAP=world&SERVICE=POINTS&REQUEST=Count");
    assert_eq!(reply.status, 400, "{}", reply.text());

    // An API.
    let reply = server.get("/points/items?MAP=world&Key=a&Key=b");
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["query"], "MAP=world&Key=a&Key=b");
    let reply = server.get("/points/items?MAP=world&raise");
    assert_eq!(reply.status, 500, "{}", reply.text());
    assert!(!reply.text().contains("secret"), "{}", reply.text());
    server.process.log.wait_line("secret of the API");
    let told = page(&server, "/plugins/points");
    let last = told["last_exception"]["traceback"].as_str().unwrap();
    assert!(last.contains("secret of the API"), "{told}");
    let before_that = told["raised_in_requests"].as_u64().unwrap();
    assert!(before_that > 0, "{told}");
    let reply = server.get("/points/items?MAP=world&wrong");
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(
        reply.text().contains("what the client did wrong"),
        "{}",
        reply.text()
    );

    let told = page(&server, "/plugins/points");
    assert_eq!(
        told["raised_in_requests"], before_that,
        "that is no failure"
    );

    literal_service(&server);
    let told = page(&server, "/plugins/literal");
    let last = told["last_exception"]["traceback"].as_str().unwrap();
    assert!(last.contains("secret of a method"), "{told}");
    assert_eq!(page(&server, "/plugins/All%20points")["status"], "loaded");
    assert_eq!(server.workers(), before);
}

/// The form of the first proposal, with and without a project.
fn literal_service(server: &Server) {
    let get = |query: &str| server.get(&format!("/ows/?SERVICE=LITERAL&{query}"));
    for (query, kind, body) in [
        (
            "MAP=world&REQUEST=GetCapabilities",
            "text/html",
            &b"<ul><li>world.qgs</li></ul>\n"[..],
        ),
        (
            "REQUEST=GetCapabilities",
            "text/html",
            b"<ul><li></li></ul>\n",
        ),
        ("REQUEST=SayHello", "text/plain", b"Hello world\n"),
        (
            "MAP=world&REQUEST=SayHello&Name=%C3%BCs",
            "text/plain",
            "Hello üs\n".as_bytes(),
        ),
        ("REQUEST=Bytes", "application/octet-stream", b"\x89\x00\xff"),
    ] {
        let reply = get(query);
        assert_eq!(
            (reply.status, reply.body.as_slice()),
            (200, body),
            "{query}"
        );
        let found = reply.header("content-type").unwrap_or_default();
        assert!(found.starts_with(kind), "{query}: {found}");
    }
    for query in [
        "REQUEST=Unlisted",
        "MAP=world&REQUEST=Unlisted",
        "REQUEST=__init__",
        "REQUEST=sayhello",
        "REQUEST=%3Ca%3E",
        "REQUEST=",
    ] {
        let reply = get(query);
        assert_eq!(reply.status, 501, "{query}: {}", reply.text());
        let text = reply.text();
        assert!(
            text.contains("OperationNotSupported") && !text.contains("<a>"),
            "{text}"
        );
    }
    let reply = get("REQUEST=Raise");
    assert_eq!(reply.status, 500, "{}", reply.text());
    assert!(!reply.text().contains("before") && !reply.text().contains("secret"));
    server.process.log.wait_line("secret of a method");
    // All others still need one.
    let reply = server.get("/ows/?SERVICE=WMS&REQUEST=GetCapabilities");
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(
        reply.text().contains("No project defined"),
        "{}",
        reply.text()
    );
}

// Fail closed.

/// A request that changes the layer `places`.
struct Write {
    name: &'static str,
    method: &'static str,
    path: &'static str,
    body: String,
    status: u16,
}

impl Write {
    fn transaction(name: &'static str, action: &str) -> Self {
        let body = format!(
            "<Transaction xmlns=\"http://www.opengis.net/wfs\" \
             xmlns:ogc=\"http://www.opengis.net/ogc\" \
             service=\"WFS\" version=\"1.1.0\">{action}</Transaction>"
        );
        Self {
            name,
            method: "POST",
            path: "/ows/?MAP=world&SERVICE=WFS&VERSION=1.1.0",
            body,
            status: 200,
        }
    }

    fn api(method: &'static str, path: &'static str, body: &str, status: u16) -> Self {
        Self {
            name: method,
            method,
            path,
            body: body.into(),
            status,
        }
    }

    fn is_of_api(&self) -> bool {
        self.name == self.method
    }

    /// What plugins are asked before data changes.
    fn asks(&self, place: &str) -> bool {
        match place {
            "layerFilterExpression" => !["Insert", "POST"].contains(&self.name),
            "authorizedLayerAttributes" => self.is_of_api(),
            "allowToEdit" => !self.is_of_api(),
            _ => true,
        }
    }

    fn send(&self, server: &Server, more: &str) -> Reply {
        let kind = match self.is_of_api() {
            true => "application/geo+json",
            false => "text/xml",
        };
        let path = format!("{}{more}", self.path);
        server.request(
            self.method,
            &path,
            &[("Content-Type", kind)],
            self.body.as_bytes(),
        )
    }
}

fn writes() -> Vec<Write> {
    let that = "<ogc:Filter><ogc:FeatureId fid=\"places.7\"/></ogc:Filter>";
    let items = "/wfs3/collections/places/items?MAP=world";
    let item = "/wfs3/collections/places/items/5?MAP=world";
    let feature = |properties: &str| {
        format!(
            "{{\"type\":\"Feature\",\"properties\":{{{properties}}},\
             \"geometry\":{{\"type\":\"Point\",\"coordinates\":[-30.5,35.25]}}}}"
        )
    };
    let named = feature("\"name\":\"Mu\"");
    let nameless = feature("");
    vec![
        Write::transaction(
            "Insert",
            "<Insert><places><name>Atlantis</name></places></Insert>",
        ),
        Write::transaction(
            "Update",
            &format!(
                "<Update typeName=\"places\"><Property><Name>name</Name>\
                 <Value>Lemuria</Value></Property>{that}</Update>"
            ),
        ),
        Write::transaction(
            "Delete",
            &format!("<Delete typeName=\"places\">{that}</Delete>"),
        ),
        Write::api("POST", items, &named, 201),
        // Of no attribute anybody could be unauthorised to write.
        Write::api("POST", items, &nameless, 201),
        Write::api("PUT", item, &named, 200),
        Write::api("PATCH", item, "{\"modify\":{\"name\":\"Lemuria\"}}", 200),
        Write::api("DELETE", item, "", 200),
    ]
}

fn places(server: &Server) -> Value {
    let query = "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=places";
    let reply = server.get(&format!("/ows/?MAP=world&{query}&OUTPUTFORMAT=GeoJSON"));
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["features"].clone()
}

/// QGIS acts on what it was told before anybody could throw its answer away.
#[test]
fn a_plugin_that_raises_lets_nobody_change_data() {
    let plugins = source("tests/data/denying");
    let settings = format!(
        "server.pluginpath = {}\nprojects.cache.force_readonly_layers = no",
        plugins.display()
    );
    let server = Server::real(&settings);
    let workers = server.workers();
    let before = places(&server);
    let refused = |write: &Write, more: &str| {
        let reply = write.send(&server, more);
        let text = reply.text();
        assert_eq!(reply.status, 500, "{} {more}: {text}", write.name);
        assert!(!text.contains("secret"), "{} {more}: {text}", write.name);
        assert_eq!(places(&server), before, "{} {more}", write.name);
    };
    for write in &writes() {
        for place in [
            "requestReady",
            "late",
            "layerPermissions",
            "layerFilterExpression",
            "layerFilterSubsetString",
            "authorizedLayerAttributes",
            "allowToEdit",
        ] {
            if write.asks(place) {
                refused(write, &format!("&RAISE={place}"));
            }
        }
        for place in [
            "layerPermissions",
            "layerFilterExpression",
            "layerFilterSubsetString",
        ] {
            if write.asks(place) {
                refused(write, &format!("&LIE={place}"));
            }
        }
    }
    // They are what changes data when nothing raises.
    let mut seen = before;
    for write in &writes() {
        let reply = write.send(&server, "");
        assert_eq!(
            reply.status,
            write.status,
            "{}: {}",
            write.name,
            reply.text()
        );
        let now = places(&server);
        assert_ne!(now, seen, "{}: {}", write.name, reply.text());
        seen = now;
    }
    assert_eq!(server.workers(), workers);
}

/// A document made without a plugin's consent is nobody's, neither what shows too much
/// nor what shows too little.
#[test]
fn what_was_made_while_a_plugin_raised_is_not_kept_for_others() {
    let plugins = source("tests/data/denying");
    let server = Server::real(&format!("server.pluginpath = {}", plugins.display()));
    for service in ["WMS&VERSION=1.3.0", "WFS&VERSION=1.1.0"] {
        let path = format!("/ows/?MAP=world&SERVICE={service}&REQUEST=GetCapabilities");
        for place in ["requestReady", "layerPermissions"] {
            let reply = server.get(&format!("{path}&RAISE={place}"));
            assert_eq!(reply.status, 500, "{}", reply.text());
        }
        let reply = server.get(&path);
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(reply.text().contains("<Name>places<"), "{}", reply.text());
    }
}

/// With `HELLOSERVER` naming a folder that has another plugin of that name, such as the
/// original, that one.
#[test]
fn helloserver_answers_as_in_qgis_itself() {
    let plugins = match std::env::var_os("HELLOSERVER") {
        Some(folder) => PathBuf::from(folder),
        None => source("tests/data/hello"),
    };
    let world = World::real();
    let project = world.path("projects/world.qgs");
    let settings = format!("server.pluginpath = {}\n{MANAGED}", plugins.display());
    let server = Server::start(world, &settings).ready();
    assert_eq!(statuses(&server), [pair("HelloServer", "loaded")]);
    let before = server.workers();
    let native = Native::start(&[("QGIS_PLUGINPATH", plugins.as_path())]);
    let whole = format!("MAP={}", project.display());
    let info = "REQUEST=GetFeatureInfo&QUERY_LAYERS=land&I=100&J=10&INFO_FORMAT=text/html";
    let info = MAP.replace("REQUEST=GetMap", info);
    let features = "VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=places&OUTPUTFORMAT=GeoJSON";
    for (status, path) in [
        (200, format!("/ows/?{whole}&SERVICE=HELLO")),
        (200, format!("/ows/?{whole}&service=hello&REQUEST=GetMap")),
        (500, "/ows/?SERVICE=HELLO".into()),
        (500, format!("/ows/?{whole}&SERVICE=EXCEPTION")),
        (500, "/ows/?SERVICE=EXCEPTION".into()),
        (200, format!("/ows/?{whole}&{MAP}&WIDTH=200")),
        (
            200,
            format!("/ows/?{whole}&{MAP}&WIDTH=200&FORMAT=image/jpeg"),
        ),
        // Of what is no map it makes no map, and of an exception neither.
        (400, format!("/ows/?{whole}&{MAP}&WIDTH=200&LAYERS=nothing")),
        (200, format!("/ows/?{whole}&{info}&WIDTH=200")),
        (
            200,
            format!("/ows/?{whole}&SERVICE=WMS&REQUEST=GetCapabilities"),
        ),
        (200, format!("/ows/?{whole}&SERVICE=WFS&{features}")),
        (500, format!("/ows/?{whole}")),
        (500, format!("/wfs3/?{whole}")),
    ] {
        assert_eq!(native.agrees(&server, &path).status, status, "{path}");
    }
    assert_eq!(server.workers(), before);
}
