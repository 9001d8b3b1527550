//! Projects that are open: kept, renewed when they change, opened ahead, and served though
//! a part of them is missing.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::process::succeed;
use common::{MANAGED, Reply, Server, World, capabilities, eventually, http, kill, source};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A server, and what its management listener says of it.
struct Managed(Server);

impl Managed {
    fn start(world: World, settings: &str) -> Self {
        Self(Server::start(world, &format!("{MANAGED}\n{settings}")).ready())
    }

    /// How many projects were `cached`, `loaded` or `reloaded`.
    fn count(&self, found: &str) -> u64 {
        let page = self.0.managed("/metrics").text();
        let name = format!("qgisserver_projects_total{{found=\"{found}\"}} ");
        let value = page.lines().find_map(|line| line.strip_prefix(&name));
        value
            .unwrap_or_else(|| panic!("{name} in {page}"))
            .parse()
            .unwrap()
    }

    fn bad_layers(&self) -> Value {
        self.0.managed("/status").json()["bad_layers"].take()
    }
}

/// What the stub had read of the project when it answered.
fn text(server: &Server, project: &str) -> String {
    let path = format!("/ows/?MAP={project}&SERVICE=WMS&REQUEST=GetMap");
    let reply = server.get(&path);
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["text"].as_str().unwrap().to_owned()
}

fn write(server: &Server, name: &str, text: &str) {
    std::fs::write(server.world.path("projects").join(name), text).unwrap();
}

// Versions.

/// The old one had been compared a moment ago, and that would do for an hour.
#[test]
fn no_worker_answers_with_an_older_project_than_another_did_before() {
    let server = Server::stub("projects.cache.check_interval = 3600\nworker.young = 0");
    write(&server, "city.qgs", "one");
    // Each of the two has it, and knows that nothing new went out since.
    let both = |text_of: &str| {
        let held = server.act_later("DO=wait&FOR=go");
        eventually("a worker is busy", || {
            (server.status()["running"] == 1).then_some(())
        });
        assert_eq!(text(&server, "city"), text_of);
        server.world.tell("go");
        let reply = held.join().unwrap().unwrap();
        server.world.untell("go");
        assert_eq!(reply.json()["text"], text_of);
        reply.json()["pid"].as_i64().unwrap() as i32
    };
    for _ in 0..3 {
        both("one");
    }
    let pid = both("one");
    write(&server, "city.qgs", "two");
    both("one");
    // One that never had the old one answers with the new one, and then all do.
    kill(pid, Signal::SIGKILL);
    server.wait_replaced(&[pid], 2);
    eventually("the new one", || {
        let held = server.act_later("DO=wait&FOR=go");
        eventually("a worker is busy", || {
            (server.status()["running"] == 1).then_some(())
        });
        let here = text(&server, "city");
        server.world.tell("go");
        held.join().unwrap().unwrap();
        server.world.untell("go");
        (here == "two").then_some(())
    });
    for _ in 0..4 {
        both("two");
    }
}

/// Two workers have the old one. While one of them loads the new one the other answers,
/// and when both have it no answer is old.
#[test]
fn the_old_project_answers_while_workers_load_the_new_one_and_then_all_have_it() {
    let server = Server::stub("projects.cache.stale_seconds = 60");
    write(&server, "city.qgs", "one");
    for _ in 0..4 {
        let held = server.act_later("DO=wait&FOR=both");
        eventually("a worker is busy", || {
            (server.status()["running"] == 1).then_some(())
        });
        assert_eq!(text(&server, "city"), "one");
        server.world.tell("both");
        held.join().unwrap().unwrap();
        server.world.untell("both");
    }
    let n_read = server.world.count("read");
    write(&server, "city.qgs", "wait for go two");
    for _ in 0..20 {
        assert_eq!(text(&server, "city"), "one", "nobody waits for the new one");
    }
    server.world.wait_count("read", n_read + 1);
    assert_eq!(server.world.count("read"), n_read + 1, "one at a time");
    server.world.tell("go");
    eventually("the new one", || {
        let text = text(&server, "city");
        (text != "one").then_some(())
    });
    for _ in 0..20 {
        assert_eq!(text(&server, "city"), "wait for go two");
    }
    // Whoever has not answered yet loads it, too.
    server.world.wait_count("read", n_read + 2);
    assert_eq!(server.world.count("read"), n_read + 2, "each once");
}

#[test]
fn the_old_project_answers_no_longer_than_the_operator_says() {
    let server = Server::stub("server.workers = 1\nprojects.cache.stale_seconds = 1");
    write(&server, "city.qgs", "one");
    (0..3).for_each(|_| assert_eq!(text(&server, "city"), "one"));
    // It cannot be loaded ahead, and nobody can see that it changed before it did.
    let start = Instant::now();
    write(&server, "city.qgs", "corrupt");
    assert_eq!(text(&server, "city"), "one");
    eventually("it is refused", || {
        (server.act("DO=echo").status == 422).then_some(())
    });
    assert!(start.elapsed() >= Duration::from_secs(1));
    write(&server, "city.qgs", "two");
    eventually("the new one", || {
        (server.act("DO=echo").status == 200).then_some(())
    });
    assert_eq!(text(&server, "city"), "two");
}

#[test]
fn a_half_written_project_is_no_error_that_a_client_sees() {
    let server = Server::stub("projects.cache.settle_seconds = 20\nserver.timeout = 30");
    write(&server, "city.qgs", "one");
    for _ in 0..4 {
        assert_eq!(text(&server, "city"), "one");
    }
    write(&server, "city.qgs", "corrupt half");
    for _ in 0..4 {
        assert_eq!(text(&server, "city"), "one");
    }
    write(&server, "city.qgs", "two");
    assert_eq!(text(&server, "city"), "two");
    // Without an old one the request waits for the rest.
    write(&server, "town.qgs", "corrupt half");
    let n_read = server.world.count("read");
    let url = server.url("/ows/?MAP=town&SERVICE=WMS&REQUEST=GetMap");
    let waiting = std::thread::spawn(move || http::ask("GET", &url, &[], b""));
    server.world.wait_count("read", n_read + 1);
    write(&server, "town.qgs", "whole");
    assert_eq!(waiting.join().unwrap().unwrap().json()["text"], "whole");
}

#[test]
fn a_broken_project_is_read_once_until_it_changes() {
    let settings = "server.workers = 1\nprojects.cache.broken_seconds = 3600\nprojects.cache.settle_seconds = 0";
    let server = Server::stub(settings);
    let ask = || {
        server
            .get("/ows/?MAP=corrupt&SERVICE=WMS&REQUEST=GetMap")
            .status
    };
    for _ in 0..5 {
        assert_eq!(ask(), 422);
    }
    assert_eq!(server.world.count("read"), 1);
    write(&server, "corrupt.qgs", "mended");
    assert_eq!((ask(), server.world.count("read")), (200, 2));
}

#[test]
fn a_project_that_is_deleted_is_not_found_at_once() {
    let server = Server::stub("projects.cache.check_interval = 3600");
    let path = server.world.path("projects/city.qgs");
    (0..4).for_each(|_| drop(text(&server, "city")));
    std::fs::remove_file(&path).unwrap();
    for _ in 0..4 {
        assert_eq!(server.act("DO=echo").status, 404);
    }
    write(&server, "city.qgs", "another");
    assert_eq!(text(&server, "city"), "another");
}

#[test]
fn a_project_that_is_deleted_keeps_no_other_from_being_read_again() {
    let server = Server::stub("server.workers = 1\nprojects.cache.check_interval = 0.1");
    for name in ["gone.qgs", "town.qgs"] {
        write(&server, name, "one");
        assert_eq!(text(&server, name), "one");
    }
    std::fs::remove_file(server.world.path("projects/gone.qgs")).unwrap();
    write(&server, "town.qgs", "another");
    eventually("the other one", || {
        (text(&server, "town") == "another").then_some(())
    });
}

#[test]
fn a_dot_in_the_name_of_a_project_begins_no_suffix() {
    let server = Server::stub("");
    write(&server, "town.v2.qgs", "second");
    write(&server, "town.qgs", "first");
    for (name, expected) in [
        ("town", "first"),
        ("town.v2", "second"),
        ("town.v2.qgs", "second"),
    ] {
        assert_eq!(text(&server, name), expected, "{name}");
    }
}

// Opened ahead.

/// A worker is not ready before.
#[test]
fn what_is_listed_is_open_before_the_first_client_comes_and_after_a_death() {
    let world = World::stub();
    std::fs::write(world.path("projects/town.qgs"), "town").unwrap();
    let list = "# ours\ncity\nnowhere\ncorrupt\n../secret\n\nfile:town.qgs\n";
    std::fs::write(world.path("list"), list).unwrap();
    let settings = format!(
        "projects.cache.preload_config = {}\nprojects.cache.size = 1\nworker.young = 0",
        world.path("list").display()
    );
    let managed = Managed::start(world, &settings);
    let server = &managed.0;
    let line = server.process.log.wait_line("projects opened ahead");
    assert!(line.contains("n_projects=2"), "{line}");
    let log = &server.process.log;
    for reason in ["project_not_found", "project_unreadable"] {
        log.wait_line(&format!("reason={reason}"));
    }
    log.wait_line("no project can have this name");
    // All of this can be seen without the log, too.
    let missing = server.managed("/status").json()["not_opened_ahead"].take();
    let missing = missing.as_array().unwrap().iter();
    let missing: Vec<_> = missing
        .map(|it| {
            let text = |name: &str| it[name].as_str().unwrap().to_owned();
            (text("project"), text("why"), it["workers"].as_u64())
        })
        .collect();
    let of_both = |project: &str, why: &str| (project.to_owned(), why.to_owned(), Some(2));
    let expected = [
        of_both("../secret", "no project can have this name"),
        of_both("file:corrupt", "project_unreadable"),
        of_both("file:nowhere", "project_not_found"),
    ];
    assert_eq!(missing, expected);
    let each_is_open = || {
        // More than fit besides, and none of these goes.
        for project in ["city", "town", "city", "town"] {
            text(server, project);
        }
    };
    each_is_open();
    assert_eq!((managed.count("cached"), managed.count("loaded")), (4, 0));
    let pids = server.workers();
    for pid in &pids {
        kill(*pid, Signal::SIGKILL);
    }
    server.wait_replaced(&pids, 2);
    each_is_open();
    assert_eq!((managed.count("cached"), managed.count("loaded")), (8, 0));
    // It stays, and is renewed.
    write(server, "city.qgs", "renewed");
    assert_eq!(text(server, "city"), "renewed");
}

#[test]
fn a_list_can_be_spread_over_the_workers() {
    let world = World::stub();
    for name in ["a", "b", "c", "d"] {
        std::fs::write(world.path(&format!("projects/{name}.qgs")), name).unwrap();
    }
    let settings = "projects.cache.restore_projects = a,b,c,d\nprojects.cache.preload_spread = yes\nworker.spares = 0";
    let managed = Managed::start(world, settings);
    let server = &managed.0;
    assert_eq!(server.world.count("read"), 4, "each once");
    let pid = |name: &str| {
        let path = format!("/ows/?MAP={name}&SERVICE=WMS&REQUEST=GetMap");
        server.get(&path).json()["pid"].as_i64().unwrap()
    };
    // Requests go where the project is.
    let pids = ["a", "b", "c", "d"].map(pid);
    assert_eq!((pids[0], pids[1]), (pids[2], pids[3]));
    assert_ne!(pids[0], pids[1]);
    assert_eq!((managed.count("cached"), managed.count("loaded")), (4, 0));
}

/// One ends its worker, one never opens; the pool starts all the same.
#[test]
fn a_project_that_cannot_be_opened_ahead_does_not_keep_the_server_from_starting() {
    for fatal in ["die", "memory", "wait for never"] {
        let world = World::stub();
        std::fs::write(world.path("projects/fatal.qgs"), fatal).unwrap();
        let settings = "server.workers = 1\nworker.spares = 0\nworker.start_timeout = 6\nworker.young = 0\n\
                        projects.cache.preload_seconds = 3\nprojects.cache.restore_projects = fatal,city";
        let managed = Managed::start(world, settings);
        let log = &managed.0.process.log;
        log.wait_line("not opened ahead any more");
        eventually("the operator sees why", || {
            let missing = managed.0.managed("/status").json()["not_opened_ahead"].take();
            let ended = "a worker ended while it opened this project";
            (missing[0]["project"] == "file:fatal" && missing[0]["why"] == ended).then_some(())
        });
        log.wait_line("while serving the opening of file:fatal ahead");
        text(&managed.0, "city");
        assert_eq!(
            (managed.count("cached"), managed.count("loaded")),
            (1, 0),
            "{fatal}"
        );
    }
}

#[test]
fn opening_ahead_has_a_bound_in_time() {
    let world = World::stub();
    std::fs::write(world.path("projects/slow.qgs"), "wait for go").unwrap();
    let settings = "server.workers = 1\nprojects.cache.preload_seconds = 0.2\nprojects.cache.restore_projects = slow,city";
    let own = Server::start(world, settings);
    own.world.wait_count("read", 1);
    // So long at least does the first one take.
    std::thread::sleep(Duration::from_millis(300));
    own.world.tell("go");
    let server = own.ready();
    server.process.log.wait_line("there was no time");
    assert_eq!(server.act("DO=echo").status, 200);
}

// With QGIS.

fn title(reply: &Reply) -> String {
    let text = reply.text();
    assert_eq!(reply.status, 200, "{text}");
    let service = text.split("<Title>").nth(1).expect("a title");
    service.split("</Title>").next().unwrap().to_owned()
}

/// A template of so many layers below `projects`, and its text.
fn many_layers(world: &World, n: usize) -> String {
    succeed(
        Command::new(source("tests/data/make_many.py"))
            .args([source("examples/projects"), world.projects()])
            .arg(n.to_string())
            .env("HOME", world.path("home")),
    );
    std::fs::read_to_string(world.path("projects/many.qgs")).unwrap()
}

#[test]
fn two_hundred_projects_of_25_layers_are_loaded_once() {
    const N: usize = 200;
    let world = World::real();
    let template = many_layers(&world, 25);
    for n in 0..N {
        let text = template.replace(">Many<", &format!(">Project {n}<"));
        std::fs::write(world.path(&format!("projects/p{n}.qgs")), text).unwrap();
    }
    let settings = format!("server.workers = 2\nprojects.cache.size = {N}\nserver.timeout = 120");
    let managed = Managed::start(world, &settings);
    for pass in [0, N as u64] {
        for n in 0..N {
            let reply = managed.0.get(&capabilities(&format!("p{n}")));
            assert_eq!(title(&reply), format!("Project {n}"));
            assert_eq!(
                reply.text().matches("<Name>layer").count(),
                25,
                "its layers"
            );
        }
        let counts = ["loaded", "cached", "reloaded"].map(|found| managed.count(found));
        assert_eq!(counts, [N as u64, pass, 0]);
    }
    // Both had their share.
    let status = managed.0.managed("/status").json();
    let served: Vec<_> = status["workers"].as_array().unwrap().iter().collect();
    assert!(
        served.iter().all(|it| it["served"].as_u64() > Some(100)),
        "{status}"
    );
}

#[test]
fn what_is_open_takes_no_more_memory_than_it_may() {
    for (memory, expected) in [("100M", [2, 4]), ("1M", [6, 0])] {
        let settings = format!("projects.cache.memory = {memory}");
        let managed = Managed::start(World::real(), &settings);
        for project in ["world", "atlas", "world", "atlas", "world", "atlas"] {
            assert_eq!(managed.0.get(&capabilities(project)).status, 200);
        }
        let counts = [
            managed.count("loaded"),
            managed.count("cached") + managed.count("reloaded"),
        ];
        assert_eq!(counts, expected, "{memory}");
    }
}

/// How a file becomes another one.
#[derive(Debug, Clone, Copy)]
enum By {
    Renaming,
    Writing,
    /// With half of it there for a while.
    WritingSlowly,
}

fn rewrite(path: &Path, text: &str, by: By) {
    use std::io::Write;
    match by {
        By::Renaming => {
            let other = path.with_extension("new");
            std::fs::write(&other, text).unwrap();
            std::fs::rename(&other, path).unwrap();
        }
        By::Writing => std::fs::write(path, text).unwrap(),
        By::WritingSlowly => {
            let mut file = std::fs::File::create(path).unwrap();
            let (first, rest) = text.as_bytes().split_at(text.len() / 2);
            file.write_all(first).unwrap();
            file.flush().unwrap();
            // It is long for a file, and not waited for.
            std::thread::sleep(Duration::from_millis(20));
            file.write_all(rest).unwrap();
        }
    }
}

/// Eight clients, each of which must never see a title that is older than the last one,
/// while the project is written anew a hundred times.
fn rewritten_a_hundred_times(settings: &str) {
    const CLIENTS: usize = 8;
    let server = Server::real(&format!(
        "server.workers = 3\nserver.timeout = 60\n{settings}"
    ));
    let before = server.workers();
    let path = server.world.path("projects/world.qgs");
    let whole = std::fs::read_to_string(&path).unwrap();
    let version = |n: usize| whole.replace(">World<", &format!(">Version {n:03}<"));
    rewrite(&path, &version(0), By::Renaming);
    let (newest, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let seen = std::thread::scope(|scope| {
        let client = || {
            let (mut last, mut seen) = (0, BTreeSet::new());
            while !done.load(Ordering::Relaxed) {
                let title = title(&server.get(&capabilities("world")));
                let n: usize = title.strip_prefix("Version ").unwrap().parse().unwrap();
                assert!(n >= last, "{n} after {last}");
                last = n;
                seen.insert(n);
                newest.fetch_max(n, Ordering::Relaxed);
            }
            seen
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        for n in 1..=100 {
            let by = [By::Renaming, By::Writing, By::WritingSlowly][n % 3];
            rewrite(&path, &version(n), by);
            // Every fourth one is there until somebody has seen it.
            if n % 4 == 0 && clients.iter().all(|it| !it.is_finished()) {
                eventually("the new version", || {
                    let is_there = newest.load(Ordering::Relaxed) >= n;
                    let failed = clients.iter().any(|it| it.is_finished());
                    (is_there || failed).then_some(())
                });
            }
        }
        done.store(true, Ordering::Relaxed);
        let seen = clients
            .into_iter()
            .map(|it| it.join().expect("no client failed"));
        seen.collect::<Vec<_>>()
    });
    let all: BTreeSet<usize> = seen.into_iter().flatten().collect();
    assert!(all.len() >= 25 && all.contains(&100), "{all:?}");
    assert_eq!(server.workers(), before, "none died");
}

#[test]
fn a_project_that_is_rewritten_under_load_is_never_an_error_nor_older_than_before() {
    rewritten_a_hundred_times("");
}

#[test]
fn nor_when_workers_look_for_changes_at_different_times() {
    rewritten_a_hundred_times("projects.cache.check_interval = 0.2");
}

#[test]
fn nor_when_the_old_one_answers_while_the_new_one_loads() {
    rewritten_a_hundred_times("projects.cache.stale_seconds = 5");
}

#[test]
fn invalid_layers_are_named_to_the_operator_and_not_to_the_client() {
    let managed = Managed::start(World::real(), "");
    let reply = managed.0.get(&capabilities("broken"));
    assert_eq!(reply.status, 422, "{}", reply.text());
    assert!(!reply.text().contains("lost"), "{}", reply.text());
    let listed = managed.bad_layers();
    assert_eq!(listed[0]["project"], "file:broken");
    assert_eq!(listed[0]["layers"], serde_json::json!(["lost"]));
    assert_eq!(listed[0]["refused"], true);
    managed.0.process.log.wait_line("lost");
    let public = managed.0.status();
    assert!(!public.to_string().contains("lost"), "{public}");
}

/// What WMS does not show need not be there.
#[test]
fn a_strict_project_may_have_invalid_layers_that_are_excluded_from_wms() {
    let world = World::real();
    let file = world.projects().join("broken.qgs");
    let text = std::fs::read_to_string(&file).unwrap();
    let layers =
        "<WMSRestrictedLayers type=\"QStringList\"><value>lost</value></WMSRestrictedLayers>";
    let restricted = text.replacen("<properties>", &format!("<properties>{layers}"), 1);
    assert_ne!(restricted, text);
    std::fs::write(world.projects().join("spared.qgs"), restricted).unwrap();
    let server = Server::start(world, "").ready();
    assert_eq!(server.get(&capabilities("broken")).status, 422);
    let reply = server.get(&capabilities("spared"));
    assert_eq!(reply.status, 200, "{}", reply.text());
}

#[test]
fn a_project_may_be_served_without_its_invalid_layers_and_says_so() {
    let settings = "projects.cache.bad_layers_of = broken=skip";
    let managed = Managed::start(World::real(), settings);
    let map = "/ows/?MAP=broken&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&CRS=EPSG:4326\
               &BBOX=-90,-180,90,180&WIDTH=60&HEIGHT=30&STYLES=&FORMAT=image/png&LAYERS=land,countries";
    let streamed = "/ows/?MAP=broken&SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=countries&OUTPUTFORMAT=GeoJSON";
    let with_lost = map.replace("land,countries", "land,lost");
    for path in [&capabilities("broken"), map, &with_lost, streamed] {
        let reply = managed.0.get(path);
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.header("x-qgisserver-bad-layers"), Some("1"), "{path}");
    }
    assert_eq!(managed.bad_layers()[0]["refused"], false);
    let whole = managed.0.get(&capabilities("world"));
    assert_eq!(whole.header("x-qgisserver-bad-layers"), None);
    assert_eq!(managed.bad_layers().as_array().unwrap().len(), 1);
}

#[test]
fn a_layer_comes_back_when_its_source_does() {
    let settings = "projects.cache.bad_layers = retry\nprojects.cache.bad_layers_seconds = 0.1\nserver.workers = 2";
    let managed = Managed::start(World::real(), settings);
    let get = || managed.0.get(&capabilities("broken"));
    assert_eq!(get().header("x-qgisserver-bad-layers"), Some("1"));
    let query = "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=lost&MAXFEATURES=1";
    let features = || managed.0.get(&format!("/ows/?MAP=broken&{query}"));
    assert!(!features().text().contains("<gml:featureMember>"));
    let data = managed.0.world.path("projects/data");
    std::fs::copy(data.join("land.fgb"), data.join("lost.fgb")).unwrap();
    eventually("the layer", || {
        let reply = get();
        reply
            .header("x-qgisserver-bad-layers")
            .is_none()
            .then_some(())
    });
    let text = features().text();
    assert!(text.contains("<gml:featureMember>"), "{text}");
    assert_eq!(managed.bad_layers().as_array().unwrap().len(), 0);
    for _ in 0..10 {
        assert!(get().header("x-qgisserver-bad-layers").is_none());
    }
}

#[test]
fn layouts_are_not_loaded_where_the_operator_says_so() {
    let print = "/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetPrint&TEMPLATE=A4&CRS=EPSG:4326\
                 &map0:EXTENT=-90,-180,90,180&map0:LAYERS=land&FORMAT=png&DPI=30";
    let settings = "/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetProjectSettings";
    let server = Server::real("");
    assert_eq!(server.get(print).status, 200);
    assert!(server.get(settings).text().contains("<ComposerTemplate "));
    let server = Server::real("projects.cache.disable_getprint = yes");
    let reply = server.get(print);
    assert!(reply.status >= 400, "{}", reply.status);
    assert!(!server.get(settings).text().contains("<ComposerTemplate "));
}

/// The project says of a layer that it covers less than its data does.
#[test]
fn extents_in_the_project_are_believed_where_the_operator_says_so() {
    for (trust, west) in [("no", "-180"), ("yes", "-7")] {
        let world = World::real();
        let path = world.path("projects/world.qgs");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, with_extent_of(&text, "countries", -7.0)).unwrap();
        let settings = format!("projects.cache.trust_layer_metadata = {trust}");
        let server = Server::start(world, &settings).ready();
        let text = server.get(&capabilities("world")).text();
        let (_, layer) = text
            .split_once("<Name>countries</Name>")
            .expect("the layer");
        let (_, bound) = layer.split_once("<westBoundLongitude>").unwrap();
        let (bound, _) = bound.split_once('<').unwrap();
        assert!(bound.starts_with(west), "{trust}: {bound}");
    }
}

/// Both of them: in the layer's own coordinates, and in degrees.
fn with_extent_of(project: &str, layer: &str, west: f64) -> String {
    let (start, end) = layer_in(project, layer);
    let mut parts = project[start..end].split("<xmin>");
    let mut changed = parts.next().unwrap().to_owned();
    for part in parts {
        let (_, rest) = part.split_once('<').unwrap();
        changed.push_str(&format!("<xmin>{west}<{rest}"));
    }
    [&project[..start], &changed, &project[end..]].concat()
}

/// Where the project describes the layer.
fn layer_in(project: &str, layer: &str) -> (usize, usize) {
    let name = project.find(&format!("<layername>{layer}</layername>"));
    let name = name.expect("the layer");
    let start = project[..name].rfind("<maplayer").unwrap();
    (start, name + project[name..].find("</maplayer>").unwrap())
}

/// QGIS knows it since 3.28.
#[test]
fn layers_are_read_only_where_the_operator_says_so() {
    let insert = "<wfs:Transaction service=\"WFS\" version=\"1.1.0\" xmlns:wfs=\"http://www.opengis.net/wfs\" \
                  xmlns:gml=\"http://www.opengis.net/gml\"><wfs:Insert><places><name>Atlantis</name><geometry>\
                  <gml:Point srsName=\"EPSG:4326\"><gml:coordinates>-30.5,35.25</gml:coordinates></gml:Point>\
                  </geometry></places></wfs:Insert></wfs:Transaction>";
    for read_only in [false, true] {
        let word = if read_only { "yes" } else { "no" };
        let server = Server::real(&format!("projects.cache.force_readonly_layers = {word}"));
        let version = server.status()["workers"][0]["versions"]["qgis"].to_string();
        let minor: u32 = version.split('.').nth(1).unwrap().parse().unwrap();
        let is_refused = read_only && (minor >= 28 || version.starts_with("\"4"));
        let reply = server.post("/ows/?MAP=world&SERVICE=WFS", "text/xml", insert.as_bytes());
        let is_inserted = reply.text().contains("<totalInserted>1<");
        assert_eq!(is_inserted, !is_refused, "{version}: {}", reply.text());
    }
}

/// A moved label is kept beside the project; what belongs to it is part of its state.
#[test]
fn a_change_beside_the_project_is_a_change_of_it() {
    let managed = Managed::start(World::real(), "");
    let get = || managed.0.get(&capabilities("world")).status;
    assert_eq!((get(), get()), (200, 200));
    let beside = managed.0.world.path("projects/world_attachments.zip");
    std::fs::write(&beside, "PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0").unwrap();
    assert_eq!((get(), get()), (200, 200));
    std::fs::remove_file(&beside).unwrap();
    assert_eq!((get(), get()), (200, 200));
    let counts = ["loaded", "cached", "reloaded"].map(|found| managed.count(found));
    assert_eq!(counts, [1, 3, 2]);
}

#[test]
fn a_layer_that_is_embedded_changes_with_its_own_project() {
    let world = World::real();
    let projects = world.projects();
    let text = std::fs::read_to_string(projects.join("world.qgs")).unwrap();
    let (start, end) = layer_in(&text, "land");
    let (_, id) = text[start..end].split_once("<id>").unwrap();
    let (id, _) = id.split_once('<').unwrap();
    let (before, rest) = text.split_once("<projectlayers>").unwrap();
    let (_, after) = rest.split_once("</projectlayers>").unwrap();
    let layer = format!("<maplayer embedded=\"1\" project=\"./world.qgs\" id=\"{id}\"/>");
    let embedding = format!("{before}<projectlayers>{layer}</projectlayers>{after}");
    std::fs::write(projects.join("embedding.qgs"), embedding).unwrap();
    let managed = Managed::start(world, "");
    let get = || assert_eq!(managed.0.get(&capabilities("embedding")).status, 200);
    get();
    get();
    let text = std::fs::read_to_string(projects.join("world.qgs")).unwrap();
    std::fs::write(
        projects.join("world.qgs"),
        text.replace(">World<", ">Other<"),
    )
    .unwrap();
    get();
    get();
    let counts = ["loaded", "cached", "reloaded"].map(|found| managed.count(found));
    assert_eq!(counts, [1, 2, 1]);
}
