//! What those who run the server see of it: pages, counters, log lines.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use common::process::is_log_full;
use common::{MANAGED, SOON, Server, World, eventually, http, kill, path_of, poll};
use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::Value;

/// A server, and what its management listener says of it.
struct Managed(Server);

impl Managed {
    fn start(settings: &str) -> Self {
        Self(Server::stub(&format!("{MANAGED}\n{settings}")))
    }

    fn get(&self, path: &str) -> http::Reply {
        self.0.managed(path)
    }

    fn scrape(&self) -> Exposition {
        let reply = self.get("/metrics");
        assert_eq!(reply.status, 200);
        Exposition::parse(&reply.text())
    }

    fn status(&self) -> Value {
        self.get("/status").json()
    }

    /// The page on which samples have these values. A reply is counted when its client has
    /// it already.
    fn scrape_with(&self, expected: &[(&str, f64)]) -> Exposition {
        let mut missing = Vec::new();
        let page = poll(SOON, || {
            let page = self.scrape();
            let differs = |(name, value): &&(&str, f64)| page.value(name) != *value;
            missing = expected.iter().filter(differs).copied().collect();
            missing.is_empty().then_some(page)
        });
        page.unwrap_or_else(|| panic!("not within {SOON:?}: {missing:?}"))
    }

    /// Waits until a sample has this value.
    fn until(&self, sample: &str, value: f64) {
        self.scrape_with(&[(sample, value)]);
    }
}

/// A page in the text format of Prometheus, read strictly.
struct Exposition {
    samples: BTreeMap<String, f64>,
    kinds: BTreeMap<String, String>,
}

impl Exposition {
    fn parse(text: &str) -> Self {
        let mut page = Self {
            samples: BTreeMap::new(),
            kinds: BTreeMap::new(),
        };
        assert!(text.ends_with('\n'));
        let mut helped = BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a help text");
                assert!(helped.insert(name.to_owned()), "{name} is helped twice");
                assert!(!help.is_empty());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                let before = page.kinds.insert(name.to_owned(), kind.to_owned());
                assert_eq!(before, None, "{name} is typed twice");
            } else {
                page.sample(line);
            }
        }
        page.check_histograms();
        page
    }

    fn sample(&mut self, line: &str) {
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let value: f64 = value.parse().expect("a number");
        let name = series.split('{').next().expect("a name");
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|family| {
                self.kinds
                    .get(*family)
                    .is_some_and(|kind| kind == "histogram")
            })
            .unwrap_or(name);
        let kind = self.kinds.get(family);
        let kind = kind.unwrap_or_else(|| panic!("{name} comes before its type"));
        assert!(name.starts_with("qgisserver_"), "{name}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        let before = self.samples.insert(series.to_owned(), value);
        assert_eq!(before, None, "{series} twice");
    }

    /// Buckets grow, and the last has everything.
    fn check_histograms(&self) {
        let histograms = self.kinds.iter().filter(|(_, kind)| *kind == "histogram");
        for (name, _) in histograms {
            let counts: Vec<_> = self.of(&format!("{name}_count")).collect();
            for (series, count) in counts {
                let labels = series.trim_start_matches(&format!("{name}_count"));
                let labels = labels.trim_start_matches('{').trim_end_matches('}');
                let bucket = format!("{name}_bucket{{{labels},le=\"");
                let mut buckets: Vec<f64> = self.of(&bucket).map(|(_, n)| n).collect::<Vec<_>>();
                buckets.sort_by(f64::total_cmp);
                assert_eq!(buckets.last(), Some(&count), "{series}");
                assert_eq!(self.value(&format!("{bucket}+Inf\"}}")), count);
            }
        }
    }

    fn of(&self, prefix: &str) -> impl Iterator<Item = (&str, f64)> {
        let from = self.samples.range(prefix.to_owned()..);
        from.take_while(move |(series, _)| series.starts_with(prefix))
            .map(|(series, value)| (series.as_str(), *value))
    }

    /// A series that is not there yet has counted nothing.
    fn value(&self, series: &str) -> f64 {
        self.samples.get(series).copied().unwrap_or_default()
    }
}

#[test]
fn the_metrics_count_what_was_done() {
    let settings = "server.timeout = 4\nzmq.cancel_grace = 0.2\nworker.young = 0";
    let managed = Managed::start(settings);
    let server = &managed.0;
    let before = managed.scrape();
    assert_eq!(before.value("qgisserver_workers{state=\"idle\"}"), 2.0);
    assert_eq!(before.value("qgisserver_ready"), 1.0);

    let mut sent = 0;
    for _ in 0..6 {
        let reply = server.act("DO=echo");
        assert_eq!(reply.status, 200);
        sent += reply.body.len();
    }
    let get_map = ["request", "load", "render"].map(|name| {
        let labels = "operation=\"GetMap\",service=\"WMS\"";
        format!("qgisserver_{name}_seconds_count{{{labels}}}")
    });
    let [request, load, render] = get_map.each_ref().map(|name| (name.as_str(), 6.0));
    let now = managed.scrape_with(&[
        request,
        load,
        render,
        ("qgisserver_queue_seconds_count{lane=\"maps\"}", 6.0),
        (
            "qgisserver_replies_total{service=\"WMS\",status=\"200\"}",
            6.0,
        ),
        ("qgisserver_retries_total", 0.0),
    ]);
    let found = |what: &str| now.value(&format!("qgisserver_projects_total{{found=\"{what}\"}}"));
    assert_eq!(found("loaded") + found("cached"), 6.0);
    assert!(found("loaded") >= 1.0 && found("cached") >= 4.0);
    let bytes = |page: &Exposition| page.value("qgisserver_sent_bytes_total");
    eventually("all bytes are counted", || {
        (bytes(&managed.scrape()) - bytes(&before) >= sent as f64).then_some(())
    });

    // A death, a time-out, an absent project, a body.
    assert_eq!(server.act("DO=signal&ONCE=died").status, 200);
    managed.until("qgisserver_retries_total", 1.0);
    managed.until("qgisserver_workers_gone_total{reason=\"serving\"}", 1.0);
    server.wait_workers(2);
    assert_eq!(server.act("DO=hang").status, 504);
    managed.until("qgisserver_failures_total{reason=\"timeout\"}", 1.0);
    managed.until("qgisserver_cancellations_total{stage=\"running\"}", 1.0);
    managed.until("qgisserver_workers_gone_total{reason=\"stuck\"}", 1.0);
    assert_eq!(managed.status()["workers_gone"]["stuck"], 1);
    let absent = server.get("/ows/?MAP=absent&SERVICE=WMS&REQUEST=GetMap");
    assert_eq!(absent.status, 404);
    managed.until(
        "qgisserver_failures_total{reason=\"project_not_found\"}",
        1.0,
    );
    managed.until(
        "qgisserver_replies_total{service=\"WMS\",status=\"404\"}",
        1.0,
    );
    managed.until(
        "qgisserver_replies_total{service=\"WMS\",status=\"504\"}",
        1.0,
    );
    let received = managed.scrape().value("qgisserver_received_bytes_total");
    server.post(
        "/wfs3/collections?MAP=city",
        "application/json",
        b"{\"a\": 1}",
    );
    managed.until("qgisserver_received_bytes_total", received + 8.0);
}

/// By which a signal, an exit and a recycling differ.
#[test]
fn restarts_are_counted_by_what_became_of_the_worker_before() {
    let managed = Managed::start("server.workers = 2\nworker.recycle_requests = 5");
    let series =
        |because: &str| format!("qgisserver_worker_restarts_total{{because=\"{because}\"}}");
    let all = |page: &Exposition| page.of(&series("")[..33]).map(|(_, n)| n).sum::<f64>();
    let before = managed.scrape();
    assert_eq!(all(&before), 0.0, "the first of a place restart nothing");
    let is_there = |because: &&str| before.samples.contains_key(&series(because));
    assert!(["killed", "out_of_memory", "restart"].iter().all(is_there));
    assert!(!["start", "reconnected"].iter().any(is_there));

    kill(managed.0.workers()[0], Signal::SIGKILL);
    managed.until(&series("killed"), 1.0);
    managed.0.wait_workers(2);
    assert_eq!(all(&managed.scrape()), 1.0);

    for _ in 0..12 {
        assert_eq!(managed.0.act("DO=echo").status, 200);
    }
    eventually("a recycled worker is counted", || {
        let n = managed.scrape().value(&series("recycled_requests"));
        (n >= 1.0).then_some(())
    });
    let restarts = &managed.status()["worker_restarts"];
    assert_eq!(restarts["killed"], 1);
    assert!(restarts["recycled_requests"].as_u64() >= Some(1));
    assert_eq!(restarts["frozen"], 0);
}

/// As scripts for py-qgis-server look after workers.
#[test]
fn a_post_replaces_the_workers_and_pages_tell_what_they_have_open() {
    let managed = Managed::start("");
    let server = &managed.0;
    assert_eq!(server.act("DO=echo").status, 200);
    let open = eventually("one has the project open", || {
        let page = managed.get("/cache").json();
        let cached = page["cached"].as_array()?.first()?.clone();
        Some(cached)
    });
    assert_eq!(
        (&open["name"], &open["workers"]),
        (&"file:city".into(), &1.into())
    );
    let page = managed.get("/pool/").json();
    let workers = page["workers"].as_array().expect("workers");
    assert_eq!(page["num_workers"], 2);
    let with_it = workers
        .iter()
        .filter(|it| it["cache"][0]["key"] == "file:city");
    assert_eq!(with_it.count(), 1);

    let before = server.workers();
    let url = format!("{}/pool/restart", server.management());
    let reply = http::ask("POST", &url, &[], b"").unwrap();
    assert_eq!(
        (reply.status, reply.json()["status"].as_str()),
        (200, Some("ok"))
    );
    server.process.log.wait_line("POST /pool/restart");
    server.wait_replaced(&before, 2);
}

#[test]
fn the_queue_is_seen_while_it_waits_and_a_client_that_leaves_it_is_counted() {
    let managed = Managed::start("server.workers = 1\nworker.spares = 0");
    let server = &managed.0;
    let busy = server.act_later("DO=wait&FOR=go&MARK=began");
    server.world.wait_count("began", 1);
    let mut waiting: Vec<_> = (0..5).map(|_| server.connect()).collect();
    for stream in &mut waiting {
        http::send_get(stream, &path_of("DO=echo"));
    }
    managed.until("qgisserver_waiting{lane=\"maps\"}", 5.0);
    let status = managed.status();
    let queue = &status["queue"];
    assert_eq!(
        (&queue["waiting"], &queue["running"]),
        (&5.into(), &1.into())
    );
    assert_eq!(queue["lanes"]["maps"]["waiting"], 5);
    assert_eq!(status["pools"][0]["busy"], 1);
    let worker = &status["workers"][0];
    assert_eq!(worker["request"]["operation"], "GetMap");
    assert_eq!(worker["request"]["project"], "file:city");
    assert!(
        worker["versions"]["qgis"]
            .as_str()
            .unwrap()
            .contains("stub")
    );
    assert!(worker["memory_kb"].is_u64() && worker["plugins"].is_array());
    drop(waiting);
    managed.until("qgisserver_cancellations_total{stage=\"waiting\"}", 5.0);
    managed.until("qgisserver_waiting{lane=\"maps\"}", 0.0);
    server.world.tell("go");
    assert_eq!(busy.join().unwrap().unwrap().status, 200);
    managed.until("qgisserver_workers{state=\"idle\"}", 1.0);
}

#[test]
fn each_port_serves_its_own_pages_only() {
    let managed = Managed::start("server.status_page = yes");
    assert_eq!(managed.0.get("/metrics").status, 404);
    let public = managed.0.get("/status").json();
    assert_eq!(public["pools"], Value::Null);
    assert_eq!(public["workers"][0]["request"], Value::Null);
    assert_eq!(managed.get(&path_of("DO=echo")).status, 404);
    let links = managed.get("/").json();
    assert!(links["links"].is_array(), "not the page of the public port");
    assert_eq!(managed.get("/ping").status, 200);
}

#[test]
fn nobody_listens_for_management_unless_it_is_enabled() {
    let server = Server::stub("management.port = 0");
    assert_eq!(server.process.log.count("management"), 0);
    assert_eq!(server.get("/metrics").status, 404);
}

#[test]
fn a_management_port_that_is_taken_is_a_wrong_configuration() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut args: Vec<String> = vec!["-b".into(), "127.0.0.1".into(), "-p".into(), "0".into()];
    args.extend(["--rootdir".into(), "/".into()]);
    for setting in ["management.enabled=yes", &format!("management.port={port}")] {
        args.extend(["--set".into(), setting.into()]);
    }
    let program = env!("CARGO_BIN_EXE_qgisserver");
    let output = std::process::Command::new(program).args(args).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("management.port"), "{text}");
}

#[test]
fn a_server_that_stops_is_not_ready_and_says_so_until_its_last_request_ended() {
    let managed = Managed::start("");
    let server = &managed.0;
    assert_eq!(managed.get("/ready").status, 200);
    let last = server.act_later("DO=wait&FOR=go&MARK=began");
    server.world.wait_count("began", 1);
    server.signal(Signal::SIGTERM);
    eventually("not ready", || {
        (managed.get("/ready").status == 503).then_some(())
    });
    assert_eq!(managed.get("/ping").status, 200);
    assert_eq!(managed.status()["ready"], false);
    server.world.tell("go");
    assert_eq!(last.join().unwrap().unwrap().status, 200);
}

/// As when the collector of a log hangs.
#[test]
fn nobody_reads_the_log_and_all_is_served_and_what_was_lost_is_told_later() {
    let managed = Managed::start("logging.slow_seconds = 0.000001\nworker.young = 0");
    let (server, log) = (&managed.0, &managed.0.process.log);
    let stalled = log.stall();
    let long = "x".repeat(30_000);
    let lost = "qgisserver_log_lines_lost_total";
    // How much fits in the pipe and in memory depends on how fast its thread is.
    let is_lost = poll(3 * SOON, || {
        for _ in 0..20 {
            assert_eq!(server.act(&format!("DO=echo&X={long}")).status, 200);
        }
        (managed.scrape().value(lost) > 0.0).then_some(())
    });
    assert!(is_lost.is_some(), "all of it fits");
    // The pool and its workers log, too.
    let all_log = || {
        for _ in 0..5 {
            assert_eq!(server.act("DO=log").status, 200);
        }
    };
    all_log();
    assert_eq!(server.act("DO=segfault&ONCE=died").status, 200);
    server.wait_workers(2);
    all_log();
    let workers = server.workers();
    drop(stalled);
    let told = "log lines were lost: nobody read standard error";
    log.wait_for(told, |line| line.contains(told).then_some(()));
    eventually("a worker says so, too", || {
        assert_eq!(server.act("DO=log").status, 200);
        let said = pids_of(&log.text(), told);
        workers.iter().any(|pid| said.contains(pid)).then_some(())
    });
}

/// Which processes said `what`.
fn pids_of(text: &str, what: &str) -> BTreeSet<i32> {
    let lines = text.lines().filter(|line| line.contains(what));
    let pids = lines.filter_map(|line| line.split(['[', ']']).nth(1)?.parse().ok());
    pids.collect()
}

/// Its log is a pipe that is full, and stays so.
#[test]
fn a_server_stops_though_nobody_reads_its_last_lines() {
    let mut server = Server::stub("logging.slow_seconds = 0.000001");
    let log = server.process.log.clone();
    let stalled = log.stall();
    let long = "x".repeat(30_000);
    for _ in 0..10 {
        assert_eq!(server.act(&format!("DO=echo&X={long}")).status, 200);
    }
    let pid = server.process.pid();
    eventually("its log is full", || is_log_full(pid).then_some(()));
    assert!(server.process.stop().success());
    drop(stalled);
}

/// The lines of a log in JSON.
fn objects(server: &Server) -> Vec<Value> {
    let text = server.process.log.text();
    let lines = text.lines().filter(|line| !line.is_empty());
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn with_id<'a>(lines: &'a [Value], id: &str) -> Vec<&'a Value> {
    lines
        .iter()
        .filter(|line| line["request_id"] == id)
        .collect()
}

fn wait_line(server: &Server, id: &str, has: impl Fn(&Value) -> bool) -> Value {
    eventually(&format!("a line of {id}"), || {
        let lines = objects(server);
        with_id(&lines, id)
            .into_iter()
            .find(|line| has(line))
            .cloned()
    })
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

#[test]
fn every_line_of_a_request_has_its_id_in_both_programs() {
    let world = World::stub();
    let settings = "logging.json = yes\nlogging.level = debug\nlogging.qgis_info = yes\n\
                    server.workers = 1\nworker.spares = 0";
    let server = Server::start(world, settings).ready();
    eventually("both have said that they are ready", || {
        let lines = objects(&server);
        let says = |target: &str, text: &str| {
            let is_it = |line: &&Value| line["target"] == target && line["message"] == text;
            lines.iter().find(is_it).map(drop)
        };
        says("qgisserver", "ready")?;
        says("qgisserver_worker::pool", "the pool is ready")
    });
    let n_before = objects(&server).len();
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let headers = [
        ("X-Request-Id", "life"),
        ("Traceparent", parent.as_str()),
        ("Tracestate", "a=1"),
    ];
    let reply = server.request("GET", &path_of("DO=log"), &headers, b"");
    // Plugins see the trace, too.
    assert_eq!(reply.json()["headers"]["Traceparent"], parent);
    assert_eq!(reply.json()["headers"]["Tracestate"], "a=1");
    wait_line(&server, "life", |line| line["message"] == "served");
    let access = wait_line(&server, "life", |line| line["target"] == "access");
    assert_eq!(access["trace_id"], TRACE);
    for part in ["ms", "queue_ms", "load_ms", "render_ms", "stream_ms"] {
        assert!(
            access[part].as_f64().is_some_and(|ms| ms >= 0.0),
            "{part}: {access}"
        );
    }

    let lines = objects(&server);
    for line in &lines[n_before..] {
        assert!(line["request_id"].is_string(), "whose is it? {line}");
    }
    let life = with_id(&lines, "life");
    let says = |text: &str| {
        let found = life.iter().find(|line| line["message"] == text);
        found.unwrap_or_else(|| panic!("{text}: {life:#?}"))
    };
    says("assigned");
    for text in [
        "project loaded",
        "served",
        "a warning of QGIS",
        "said aside",
    ] {
        assert_eq!(says(text)["trace_id"], TRACE, "{text}");
    }
    let pids: BTreeSet<_> = life.iter().map(|line| line["pid"].as_u64()).collect();
    assert_eq!(pids.len(), 2, "server and worker: {life:#?}");
}

#[test]
fn a_death_is_told_with_the_id_by_everybody_who_notices() {
    let settings = "logging.json = yes\nlogging.level = debug\nworker.young = 0";
    let server = Server::start(World::stub(), settings).ready();
    let headers = [("X-Request-Id", "fatal")];
    let fatal = path_of("DO=segfault&ONCE=died");
    assert_eq!(server.request("GET", &fatal, &headers, b"").status, 200);
    for text in ["gone while serving", "is sent once more, to another worker"] {
        wait_line(&server, "fatal", |line| line["message"] == text);
    }
    wait_line(&server, "fatal", |line| {
        let message = line["message"].as_str();
        message.is_some_and(|text| text.contains("killed by SIGSEGV"))
    });
    let raised = [("X-Request-Id", "raised")];
    let reply = server.request("GET", &path_of("DO=raise"), &raised, b"");
    assert_eq!(reply.status, 500);
    wait_line(&server, "raised", |line| line["trace"].is_string());
    let access = wait_line(&server, "raised", |line| line["target"] == "access");
    assert_eq!(access["failure"], "plugin_raised");
}

#[test]
fn the_line_of_a_failure_says_where_its_time_went() {
    let settings = "logging.json = yes\nserver.workers = 1\nworker.spares = 0\n\
                    server.timeout = 4\nserver.server_timing = yes\nzmq.cancel_grace = 0.2";
    let server = Server::stub(settings);
    let ask = |id: &str, path: &str| server.request("GET", path, &[("X-Request-Id", id)], b"");
    let line = |id: &str| wait_line(&server, id, |line| line["target"] == "access");
    let ms = |line: &Value, part: &str| line[part].as_f64();

    let absent = ask("absent", "/ows/?MAP=absent&SERVICE=WMS&REQUEST=GetMap");
    assert_eq!(absent.status, 404);
    let timing = absent
        .header("server-timing")
        .expect("it is said")
        .to_owned();
    assert!(
        timing.contains("queue;dur=") && timing.contains("load;dur="),
        "{timing}"
    );
    let absent = line("absent");
    assert!(ms(&absent, "queue_ms").is_some(), "{absent}");
    assert!(
        ms(&absent, "load_ms").is_some_and(|ms| ms > 0.0),
        "{absent}"
    );
    assert_eq!(absent["render_ms"], Value::Null, "QGIS was not asked");

    assert_eq!(ask("raised", &path_of("DO=raise")).status, 500);
    let raised = line("raised");
    assert!(
        ms(&raised, "render_ms").is_some_and(|ms| ms > 0.0),
        "{raised}"
    );

    let waiting = std::thread::scope(|scope| {
        let busy = scope.spawn(|| ask("hung", &path_of("DO=hang&MARK=began")));
        server.world.wait_count("began", 1);
        let waiting = ask("waiting", &path_of("DO=echo"));
        assert_eq!(busy.join().unwrap().status, 504);
        waiting
    });
    let hung = line("hung");
    let queued = ms(&hung, "queue_ms");
    assert!(queued.is_some_and(|ms| ms < 3500.0), "{hung}");
    assert_eq!(hung["load_ms"], Value::Null, "nobody knows: {hung}");
    // It gets a worker or its own time-out, and waited for most of that either way.
    assert!(matches!(waiting.status, 200 | 504), "{}", waiting.status);
    assert!(ms(&line("waiting"), "queue_ms").is_some_and(|ms| ms > 300.0));
}

/// A GET with an id, whose reply the caller may read.
fn send(server: &Server, id: &str, what: &str) -> TcpStream {
    let mut stream = server.connect();
    let path = path_of(what);
    let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {id}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

#[test]
fn the_line_of_a_stream_that_breaks_says_where_its_time_went() {
    let server = Server::stub("logging.json = yes\nworker.young = 0\nserver.workers = 1");
    let broken = [
        ("died", "cut off", "worker_died".into()),
        ("left", "client left", Value::Null),
    ];
    for (id, end, failure) in broken {
        let mut client = send(&server, id, "DO=stream&SIZE=100000&N=3&THEN=hang");
        client.read_exact(&mut [0; 1000]).unwrap();
        if id == "died" {
            kill(server.workers()[0], Signal::SIGKILL);
            http::read_all(&mut client);
        }
        drop(client);
        let line = wait_line(&server, id, |line| line["target"] == "access");
        assert_eq!((&line["end"], &line["failure"]), (&end.into(), &failure));
        for part in ["queue_ms", "load_ms", "stream_ms"] {
            assert!(line[part].is_number(), "{part}: {line}");
        }
        assert_eq!(line["render_ms"], Value::Null, "nobody said so: {line}");
    }
}

#[test]
fn the_line_of_a_client_that_left_says_how_long_it_waited_for_a_worker() {
    let server = Server::stub("logging.json = yes\nserver.workers = 1\nworker.spares = 0");
    let running = send(&server, "running", "DO=wait&FOR=go&MARK=began");
    server.world.wait_count("began", 1);
    let waiting = send(&server, "waiting", "DO=echo");
    eventually("one waits", || {
        (server.status()["waiting"] == 1).then_some(())
    });
    drop(waiting);
    let line = |id: &str| {
        let line = wait_line(&server, id, |line| line["target"] == "access");
        assert_eq!(line["status"], 499, "{line}");
        let part = |name: &str| line[name].as_f64().unwrap_or_else(|| panic!("{line}"));
        (part("queue_ms"), part("ms"))
    };
    let (queued, taken) = line("waiting");
    assert!(queued > 0.0 && queued <= taken, "{queued} of {taken}");
    drop(running);
    let (queued, taken) = line("running");
    assert!(queued < taken / 2.0, "it had a worker: {queued} of {taken}");
}

#[test]
fn a_slow_request_is_logged_with_its_full_query_and_no_secret() {
    let server = Server::stub("logging.json = yes\nlogging.slow_seconds = 0.05");
    let long = "x".repeat(5000);
    let slow = format!("DO=wait&FOR=go&MARK=began&LAYERS={long}&PASSWORD=hush");
    let url = server.url(&path_of(&slow));
    let asked = std::thread::spawn(move || {
        http::ask("GET", &url, &[("X-Request-Id", "slow")], b"").unwrap()
    });
    server.world.wait_count("began", 1);
    // Longer than `logging.slow_seconds`.
    std::thread::sleep(std::time::Duration::from_millis(60));
    server.world.tell("go");
    assert_eq!(asked.join().unwrap().status, 200);
    let line = wait_line(&server, "slow", |line| line["target"] == "slow");
    assert_eq!(line["level"], "WARN");
    let uri = line["uri"].as_str().unwrap();
    assert!(uri.contains(&long) && uri.contains("PASSWORD=***"), "{uri}");
    assert!(line["render_ms"].as_f64().unwrap() > 50.0, "{line}");
    assert!(!server.process.log.text().contains("hush"));
}

#[test]
fn xml_that_is_slow_is_logged_with_what_it_asked_and_no_secret() {
    let settings = "logging.json = yes\nlogging.slow_seconds = 0.000001";
    let server = Server::stub(settings);
    let ask = |id: &str, body: &str| {
        let headers = [("X-Request-Id", id), ("Content-Type", "text/xml")];
        let reply = server.request("POST", "/ows/?MAP=city", &headers, body.as_bytes());
        assert_eq!(reply.status, 200, "{}", reply.text());
        wait_line(&server, id, |line| line["target"] == "slow")
    };
    let query = "<GetFeature service=\"WFS\" version=\"1.1.0\">\n  <Query typeName=\"roads\"/>";
    let plain = format!("{query}\n</GetFeature>");
    assert_eq!(ask("plain", &plain)["xml"], plain);
    let secret = format!("{query}<Name>token</Name><Literal>hush</Literal></GetFeature>");
    assert_eq!(
        ask("secret", &secret)["xml"],
        format!("{query}<Name>token***")
    );
    let long = format!("{query}{}</GetFeature>", "<a/>".repeat(10_000));
    let xml = ask("long", &long)["xml"].as_str().unwrap().len();
    assert!((4000..=4096).contains(&xml), "{xml}");
    assert!(!server.process.log.text().contains("hush"));
}

#[test]
fn json_that_is_slow_is_logged_with_what_it_asked_and_no_secret() {
    let settings = "logging.json = yes\nlogging.slow_seconds = 0.000001";
    let server = Server::stub(settings);
    let ask = |id: &str, kind: &str, body: &str| {
        let headers = [("X-Request-Id", id), ("Content-Type", kind)];
        let path = "/wfs3/collections/roads/items?MAP=city";
        let reply = server.request("POST", path, &headers, body.as_bytes());
        assert_eq!(reply.status, 200, "{}", reply.text());
        wait_line(&server, id, |line| line["target"] == "slow")["json"].clone()
    };
    let feature = r#"{"type": "Feature", "properties": {"name": "Rue de l\u00e9glise""#;
    let plain = format!("{feature}}}}}");
    assert_eq!(ask("plain", "application/geo+json", &plain), plain);
    let kind = "application/json; charset=utf-8";
    let secret = format!(r#"{feature}, "token": "hush"}}}}"#);
    let shown = format!(r#"{feature}, "token***"#);
    assert_eq!(ask("secret", kind, &secret), shown);
    let long = format!("{feature}{}}}}}", r#","a":"b""#.repeat(10_000));
    let json = ask("long", kind, &long).as_str().unwrap().len();
    assert!((4000..=4096).contains(&json), "{json}");
    assert_eq!(ask("text", "text/plain", "hush"), Value::Null);
    assert!(!server.process.log.text().contains("hush"));
}

#[test]
fn a_form_that_is_slow_is_logged_with_what_it_asked() {
    let settings = "logging.json = yes\nlogging.slow_seconds = 0.000001";
    let server = Server::stub(settings);
    let headers = [
        ("X-Request-Id", "form"),
        ("Content-Type", "application/x-www-form-urlencoded"),
    ];
    let body = b"SERVICE=WMS&REQUEST=GetMap&MAP=city&LAYERS=roads&token=hush";
    let reply = server.request("POST", "/ows/", &headers, body);
    assert_eq!(reply.status, 200);
    let line = wait_line(&server, "form", |line| line["target"] == "slow");
    let form = line["form"].as_str().unwrap();
    assert!(form.contains("LAYERS=roads"), "{form}");
    assert!(!server.process.log.text().contains("hush"));
}

#[test]
fn server_timing_is_said_when_the_operator_wants_it() {
    let server = Server::stub("server.server_timing = yes");
    let reply = server.act("DO=echo");
    let timing = reply.header("server-timing").expect("Server-Timing");
    let names: Vec<_> = timing
        .split(", ")
        .map(|part| part.split_once(";dur=").expect("a duration"))
        .map(|(name, ms)| (name, ms.parse::<f64>().expect("a number")))
        .collect();
    assert_eq!(
        names.iter().map(|it| it.0).collect::<Vec<_>>(),
        ["queue", "load", "render"]
    );
    assert_eq!(reply.header("timing-allow-origin"), Some("*"));
    // Of a stream only what is known at its head.
    let stream = server.act("DO=stream&N=3&SIZE=300000");
    let timing = stream.header("server-timing").expect("Server-Timing");
    assert!(
        timing.starts_with("queue;dur=") && !timing.contains("render"),
        "{timing}"
    );
    assert_eq!(
        Server::stub("").act("DO=echo").header("server-timing"),
        None
    );
}

/// Takes requests as a collector of OpenTelemetry does; gives the spans of all that were
/// answered.
fn collector() -> (String, impl Fn() -> Vec<Span>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    let spans = Arc::new(Mutex::new(Vec::new()));
    let taken = spans.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut from = BufReader::new(stream.unwrap());
            let body = take_post(&mut from);
            let batch = ExportTraceServiceRequest::decode(&body[..]).expect("protobuf");
            let scopes = batch.resource_spans.into_iter();
            let scopes = scopes.flat_map(|it| it.scope_spans);
            let new = scopes.flat_map(|scope| scope.spans);
            taken.lock().unwrap().extend(new);
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            from.get_mut().write_all(answer).unwrap();
        }
    });
    (url, move || spans.lock().unwrap().clone())
}

/// The body of one request.
fn take_post(from: &mut BufReader<TcpStream>) -> Vec<u8> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).unwrap();
    body
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_collector_gets_the_spans_of_a_request_and_the_worker_their_parent() {
    let (url, spans) = collector();
    let settings = format!("logging.json = yes\nlogging.otlp_endpoint = {url}");
    let mut server = Server::stub(&settings);
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let headers = [("X-Request-Id", "traced"), ("Traceparent", parent.as_str())];
    let reply = server.request("GET", &path_of("DO=echo"), &headers, b"");
    let told = reply.json()["headers"]["Traceparent"]
        .as_str()
        .unwrap()
        .to_owned();
    let access = wait_line(&server, "traced", |line| line["target"] == "access");
    assert_eq!(access["trace_id"], TRACE);
    // What was not sent yet leaves before the server does.
    server.process.stop();
    let spans = spans();
    let of_trace: Vec<&Span> = spans
        .iter()
        .filter(|span| hex(&span.trace_id) == TRACE)
        .collect();
    let span = |name: &str| {
        let found = of_trace.iter().find(|span| span.name == name);
        *found.unwrap_or_else(|| panic!("{name} in {of_trace:#?}"))
    };
    let http = span("WMS GetMap");
    assert_eq!(hex(&http.parent_span_id), "00f067aa0ba902b7");
    assert_eq!(told, format!("00-{TRACE}-{}-01", hex(&http.span_id)));
    let mut at = http.start_time_unix_nano;
    for part in ["queue", "load", "render"].map(span) {
        assert_eq!(part.parent_span_id, http.span_id);
        assert!(part.start_time_unix_nano >= at && part.end_time_unix_nano >= at);
        at = part.end_time_unix_nano;
    }
}

#[test]
fn a_collector_that_does_not_answer_costs_a_log_line_and_nothing_else() {
    let nobody = common::free_address();
    let settings = format!("logging.otlp_endpoint = http://{nobody}/v1/traces");
    let mut server = Server::stub(&settings);
    assert_eq!(server.act("DO=echo").status, 200);
    assert!(server.process.stop().success());
    server.process.log.assert_count("traces are lost", 1);
}
