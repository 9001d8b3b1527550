//! However a worker, its pool or a data source ends, it is found out at once or
//! within two heartbeats, and costs others nothing.

mod common;

use std::time::{Duration, Instant};

use common::http::{read_all, send_get};
use common::load::{Load, Manner};
use common::process::is_alive;
use common::relay::far_away;
use common::{SOON, Server, World, eventually, kill, path_of, poll, timed};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Clearly less than any time-out in these tests, [`SLOW_BEAT`] among them, and bearable
/// for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(4);

/// Whoever waits for a heartbeat to be missed waits for longer than [`AT_ONCE`].
const SLOW_BEAT: &str = "zmq.heartbeat = 4";

/// So slow that a busy machine does not miss one.
const BEAT: &str = "zmq.heartbeat = 3";

/// Two of [`BEAT`] without a sign of life, and the time until that is looked at.
const TWO_HEARTBEATS: Duration = Duration::from_secs(9);

/// The path of a request of another project than `path_of`.
fn lake(what: &str) -> String {
    format!("/ows/?MAP=lake&SERVICE=WMS&REQUEST=GetMap&{what}")
}

fn two_projects(settings: &str) -> Server {
    let world = World::stub();
    std::fs::write(world.path("projects/lake.qgs"), "<qgis/>").unwrap();
    Server::start(world, settings).ready()
}

/// In which ways workers went so far, and how many in each.
fn departures(server: &Server) -> Value {
    let mut all = server.status()["departures"].take();
    let counts = all.as_object_mut().expect("the status counts them");
    counts.retain(|_, n| *n != 0);
    all
}

/// A worker that leaves is counted when its connection ends, which may be after the answer
/// that told of it.
fn assert_departed(server: &Server, expected: &Value) {
    let mut last = Value::Null;
    let counted = poll(SOON, || {
        last = departures(server);
        (last == *expected).then_some(())
    });
    assert!(counted.is_some(), "{last} instead of {expected}");
}

/// Stuck workers count until they are gone.
fn replaced(server: &Server, n_stuck: u64) {
    eventually("stuck workers are replaced", || {
        (departures(server)["stuck"] == n_stuck).then_some(())
    });
    server.wait_workers(2);
}

/// Somebody who asks for `path` again and again.
fn asking(server: &Server, path: &str) -> Load {
    Load::start(server.address, path, &[Manner::Anew]).served()
}

/// Each answer was a 200, and none waited for as long as a request may.
fn assert_undisturbed(other: Load) {
    let slowest = other.assert_served();
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
}

// Quarantine.

#[test]
fn a_request_that_kills_two_workers_is_a_502_at_once_the_third_time() {
    let server = two_projects("");
    let before = server.workers();
    let other = asking(&server, &lake("DO=echo"));
    let poison = "DO=segfault&MARK=tries";
    assert_eq!(server.act(poison).status, 502);
    assert_eq!(server.world.count("tries"), 2, "once more, elsewhere");
    let (again, took) = timed(|| server.act(&format!("{poison}&_=1234")));
    assert_eq!(again.status, 502);
    assert!(again.text().contains("refused for"), "{}", again.text());
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(server.world.count("tries"), 2, "no third worker");
    assert_eq!(server.act("DO=echo").status, 200, "the project is served");
    // The second one may have been the spare that took the place of the first.
    eventually("both are replaced", || {
        let now = server.workers();
        (now.len() == 2 && now != before).then_some(())
    });
    assert_undisturbed(other);
    let status = server.status();
    let listed = &status["quarantined"][0];
    assert_eq!(listed["operation"], "GetMap");
    assert_eq!(listed["project"], "file:city");
    assert_eq!(listed["refused"], 1);
    assert_eq!(status["retried"], 1);
    assert_departed(&server, &json!({"serving": 2}));
    let line = server.process.log.wait_line("quarantined for 300.0 s");
    assert!(line.contains("WARN") && line.contains("GetMap"), "{line}");
    server.process.log.assert_count("quarantined for", 1);
}

#[test]
fn after_its_quarantine_a_request_that_kills_again_costs_one_worker_only() {
    let server = Server::stub("zmq.quarantine_seconds = 1");
    let poison = "DO=signal&N=9&MARK=tries";
    assert_eq!(server.act(poison).status, 502);
    eventually("it is tried again", || {
        assert_eq!(server.act(poison).status, 502);
        (server.world.count("tries") > 2).then_some(())
    });
    assert_eq!(server.world.count("tries"), 3);
    server.wait_workers(2);
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_request_that_freezes_two_workers_is_refused_the_third_time() {
    let server = Server::stub(&format!("server.timeout = 60\n{BEAT}"));
    let poison = "DO=signal&N=19&MARK=frozen";
    assert_eq!(server.act(poison).status, 502, "once more, elsewhere");
    let (refused, took) = timed(|| server.act(poison));
    assert!(refused.text().contains("refused for"), "{}", refused.text());
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(server.world.count("frozen"), 2);
    assert_departed(&server, &json!({"silent": 2}));
    server.wait_workers(2);
    assert_eq!(server.act("DO=echo").status, 200, "the project is served");
}

/// The client has its 504 before anybody knows what has become of the worker.
#[test]
fn a_request_that_freezes_two_workers_is_refused_though_its_deadline_came_first() {
    let server = Server::stub(&format!("server.timeout = 3\n{BEAT}"));
    let poison = "DO=signal&N=19&MARK=frozen";
    for n in 1..=2 {
        assert_eq!(server.act(poison).status, 504);
        assert_departed(&server, &json!({"silent": n}));
        server.wait_workers(2);
    }
    let refused = server.act(poison);
    assert!(refused.text().contains("refused for"), "{}", refused.text());
    assert_eq!(server.world.count("frozen"), 2);
}

#[test]
fn a_request_that_runs_out_of_memory_twice_costs_no_third_worker() {
    let server = Server::stub("");
    let poison = "DO=memory&MARK=tries";
    for status in [500, 500, 502] {
        assert_eq!(server.act(poison).status, status);
        server.wait_workers(2);
    }
    assert_eq!(server.world.count("tries"), 2);
    assert_departed(&server, &json!({"doubt": 2}));
    assert_eq!(server.status()["quarantined"][0]["operation"], "GetMap");
}

#[test]
fn without_quarantine_each_time_costs_its_workers() {
    let server = Server::stub("zmq.quarantine_seconds = 0");
    for n in [2, 4] {
        assert_eq!(server.act("DO=signal&N=9&MARK=tries").status, 502);
        assert_eq!(server.world.count("tries"), n);
        server.wait_workers(2);
    }
}

// Deaths at each step.

#[test]
fn a_get_survives_a_crash_of_its_worker() {
    let server = Server::stub(SLOW_BEAT);
    for (n, end) in ["segfault", "signal&N=6", "signal&N=9", "exit&N=3"]
        .iter()
        .enumerate()
    {
        let what = format!("DO={end}&ONCE=victim{n}&MARK=tries{n}&ID={n}");
        let (reply, took) = timed(|| server.act(&what));
        assert_eq!(reply.status, 200, "{end}: {}", reply.text());
        assert!(took < AT_ONCE, "{end}: {took:?}");
        assert_eq!(server.world.count(&format!("tries{n}")), 2);
        server.wait_workers(2);
        assert_departed(&server, &json!({"serving": n + 1}));
    }
}

/// A frozen worker is not counted again when its pool ends it, which says why.
fn assert_gone_once(server: &Server) {
    server.process.log.wait_line("without a sign of life");
    server.process.log.wait_line("because=Frozen");
    server.wait_workers(2);
    assert_departed(server, &json!({"silent": 1}));
}

#[test]
fn a_get_whose_worker_freezes_is_answered_by_another_within_two_heartbeats() {
    let server = Server::stub(&format!("server.timeout = 60\n{BEAT}"));
    let (reply, took) = timed(|| server.act("DO=signal&N=19&ONCE=frozen&MARK=tries"));
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(took < TWO_HEARTBEATS, "{took:?}");
    assert_eq!(server.world.count("tries"), 2);
    server.process.log.wait_line("no sign of life for 6.0 s");
    assert_gone_once(&server);
}

#[test]
fn a_post_whose_worker_freezes_is_a_502_within_two_heartbeats() {
    let server = Server::stub(&format!("server.timeout = 60\n{BEAT}"));
    let (reply, took) = timed(|| server.act_once("DO=signal&N=19&MARK=tries"));
    assert_eq!(reply.status, 502, "{}", reply.text());
    assert!(took < TWO_HEARTBEATS, "{took:?}");
    assert_eq!(server.world.count("tries"), 1);
    assert_gone_once(&server);
}

#[test]
fn an_idle_worker_that_freezes_is_found_out_within_two_heartbeats() {
    let server = Server::stub(BEAT);
    let frozen = server.workers()[0];
    kill(frozen, Signal::SIGSTOP);
    let ((), took) = timed(|| {
        eventually("it is dropped", || {
            (!server.workers().contains(&frozen)).then_some(())
        })
    });
    assert!(took < TWO_HEARTBEATS, "{took:?}");
    eventually("its pool ends it", || (!is_alive(frozen)).then_some(()));
    assert_gone_once(&server);
}

#[test]
fn a_worker_that_freezes_half_way_through_a_stream_cuts_it_within_two_heartbeats() {
    let server = Server::stub(&format!("server.timeout = 60\n{BEAT}"));
    let mut client = server.connect();
    let stream = "DO=stream&N=100&SIZE=100000&THEN=signal&THEN_N=19&MARK=running";
    send_get(&mut client, &path_of(stream));
    server.world.wait_count("running", 1);
    let ((all, _), took) = timed(|| read_all(&mut client));
    assert!(all.starts_with(b"HTTP/1.1 200 ") && !all.ends_with(b"0\r\n\r\n"));
    assert!(took < TWO_HEARTBEATS, "{took:?}");
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_worker_that_freezes_before_it_is_ready_is_replaced() {
    let world = World::stub();
    world.tell("freeze-at-start");
    let settings = "worker.start_timeout = 4\nworker.backoff_max = 1";
    let server = Server::start(world, settings);
    server.world.wait_count("started", 3);
    assert_eq!(server.get("/ready").status, 503);
    server.world.untell("freeze-at-start");
    server.wait_ready();
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_worker_that_dies_right_after_its_answer_costs_nobody_anything() {
    let server = Server::stub("");
    for i in 0..10 {
        let reply = server.act(&format!("DO=echo&ID={i}"));
        assert_eq!(reply.status, 200, "{}", reply.text());
        let pid = reply.json()["pid"].as_i64().unwrap() as i32;
        kill(pid, Signal::SIGKILL);
        // May be on its way to the dead one before anybody knows.
        let next = server.act(&format!("DO=echo&ID=next{i}"));
        assert_eq!(next.status, 200, "{}", next.text());
        server.wait_replaced(&[pid], 2);
    }
    assert_eq!(server.status()["quarantined"], serde_json::json!([]));
}

#[test]
fn a_request_that_runs_out_of_memory_is_a_500_and_its_worker_is_replaced() {
    let server = Server::stub("server.workers = 1");
    let before = server.workers();
    let reply = server.act("DO=memory");
    assert_eq!(reply.status, 500, "{}", reply.text());
    server.wait_replaced(&before, 1);
    assert_departed(&server, &json!({"doubt": 1}));
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_worker_that_is_cut_off_loses_its_request_at_once_and_joins_again() {
    let (server, relay, _pool) =
        far_away(World::stub(), &format!("server.timeout = 60\n{SLOW_BEAT}"));
    let before = server.workers();
    let post = server.act_once_later("DO=wait&FOR=go&MARK=running");
    let get = server.act_later("DO=wait&FOR=go&MARK=running&ID=get");
    server.world.wait_count("running", 2);
    let (reply, took) = timed(|| {
        relay.cut();
        post.join().unwrap().unwrap()
    });
    assert_eq!(reply.status, 502, "{}", reply.text());
    assert!(took < AT_ONCE, "{took:?}");
    server.world.tell("go");
    assert_eq!(get.join().unwrap().unwrap().status, 200);
    server.wait_workers(2);
    assert_eq!(server.workers(), before, "the same, on new connections");
    assert_departed(&server, &json!({"serving": 2}));
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_worker_whose_network_is_dead_is_found_out_within_two_heartbeats() {
    let (server, relay, _pool) = far_away(World::stub(), &format!("server.timeout = 60\n{BEAT}"));
    let post = server.act_once_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    let (reply, took) = timed(|| {
        relay.hold(SOON);
        post.join().unwrap().unwrap()
    });
    assert_eq!(reply.status, 502, "{}", reply.text());
    assert!(took < TWO_HEARTBEATS, "{took:?}");
    assert_departed(&server, &json!({"silent": 2}));
    server.world.tell("go");
    relay.hold(Duration::ZERO);
    server.wait_workers(2);
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn when_the_parent_of_the_pool_dies_requests_wait_for_the_next_pool() {
    let server = Server::stub("");
    let running = [1, 2].map(|i| {
        let what = format!("DO=wait&FOR=go&ONCE=victim{i}&MARK=running&ID={i}");
        server.act_later(&what)
    });
    server.world.wait_count("running", 2);
    let waiting = [3, 4].map(|i| server.act_later(&format!("DO=echo&ID={i}")));
    eventually("two wait", || {
        (server.status()["waiting"] == 2).then_some(())
    });
    let parent = common::process::parent(server.workers()[0]);
    kill(parent, Signal::SIGKILL);
    for (reply, id) in running.into_iter().chain(waiting).zip(1..) {
        let reply = reply.join().unwrap().unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.json()["id"], id.to_string());
    }
    server.wait_workers(2);
    assert_eq!(server.status()["storm"], false, "it was one death");
    assert_eq!(server.get("/ready").status, 200);
}

// Storms.

#[test]
fn a_crash_storm_turns_readiness_off_until_it_is_over_and_the_server_serves_on() {
    let server =
        Server::stub("zmq.storm_deaths = 3\nzmq.storm_seconds = 4\nworker.backoff_max = 1");
    let (mut n, mut asked) = (0, Instant::now());
    eventually("it is not ready", || {
        n += 1;
        asked = Instant::now();
        let body = format!("<Transaction n='{n}'/>");
        server.post(&path_of("DO=segfault"), "text/xml", body.as_bytes());
        (server.get("/ready").status == 503 && server.status()["storm"] == true).then_some(())
    });
    assert_eq!(server.act("DO=echo").status, 200, "what it can");
    assert_eq!(server.get("/ping").status, 200);
    server.wait_ready();
    // The last one died after that.
    let calm = asked.elapsed();
    assert!(
        calm > Duration::from_secs(4),
        "not as soon as there is a worker: {calm:?}"
    );
    assert_eq!(server.status()["storm"], false);
    let log = &server.process.log;
    log.assert_count("die faster than they answer", 1);
    log.wait_line("no worker died for a while");
}

#[test]
fn workers_that_are_killed_between_two_answers_are_no_storm() {
    let server = Server::stub("zmq.storm_deaths = 3");
    let other = asking(&server, &path_of("DO=echo"));
    for _ in 0..5 {
        let victim = server.workers()[0];
        kill(victim, Signal::SIGKILL);
        server.wait_replaced(&[victim], 2);
        assert_eq!(server.get("/ready").status, 200);
        assert_eq!(server.act("DO=echo").status, 200, "the answer in between");
    }
    assert_undisturbed(other);
    assert_eq!(server.status()["quarantined"], serde_json::json!([]));
}

// Sources that stall.

#[test]
fn a_project_that_hangs_opens_its_breaker_while_another_one_answers_and_a_probe_closes_it() {
    let server = two_projects(
        "server.timeout = 4\nzmq.breaker_timeouts = 2\nzmq.breaker_pause = 6\nzmq.cancel_grace = 0.2",
    );
    let other = asking(&server, &lake("DO=echo"));
    assert_eq!(server.act("DO=hang&MARK=tries").status, 504);
    // Until then it has its share of the workers.
    replaced(&server, 1);
    assert_eq!(server.act("DO=hang&MARK=tries").status, 504);
    // Before the pause is over.
    let (refused, took) = timed(|| server.act("DO=hang&MARK=tries"));
    assert_eq!(refused.status, 503);
    assert!(took < AT_ONCE, "{took:?}");
    assert!(
        refused.text().contains("does not answer in time"),
        "{}",
        refused.text()
    );
    let retry: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=6).contains(&retry), "{retry}");
    assert_eq!(server.status()["breakers"][0]["project"], "file:city");
    replaced(&server, 2);
    // Whatever the request: the project is tried by one only, and not before its time.
    eventually("the probe is let in", || {
        (server.act("DO=echo&MARK=probe").status == 200).then_some(())
    });
    assert_eq!(server.world.count("probe"), 1);
    assert_eq!(server.world.count("tries"), 2);
    assert_eq!(server.status()["breakers"], serde_json::json!([]));
    assert_eq!(server.act("DO=echo").status, 200);
    assert_undisturbed(other);
    for part in [
        "its breaker is open",
        "tries whether",
        "its breaker is closed",
    ] {
        server.process.log.assert_count(part, 1);
    }
}

#[test]
fn a_project_that_hangs_holds_no_more_than_its_share_of_the_workers() {
    let server = two_projects("server.timeout = 4\nzmq.cancel_grace = 0.2");
    assert_eq!(server.get(&lake("DO=echo")).status, 200);
    assert_eq!(server.act("DO=hang").status, 504);
    replaced(&server, 1);
    let other = asking(&server, &lake("DO=echo"));
    let asked = [1, 2, 3, 4].map(|i| server.act_later(&format!("DO=hang&MARK=running&ID={i}")));
    let mut statuses = asked.map(|asked| asked.join().unwrap().unwrap().status);
    statuses.sort();
    assert_eq!(statuses, [503, 503, 503, 504]);
    assert_eq!(server.world.count("running"), 1);
    assert_undisturbed(other);
}

/// Nobody ever saw it be slow, and its time-out is far.
#[test]
fn a_project_that_hangs_from_its_first_request_on_gets_one_of_two_workers() {
    let server = two_projects("server.timeout = 60\nzmq.timeout = 60000");
    assert_eq!(server.get(&lake("DO=echo")).status, 200);
    let hanging: Vec<_> = (0..8)
        .map(|i| server.act_later(&format!("DO=wait&FOR=go&MARK=running&ID={i}")))
        .collect();
    server.world.wait_count("running", 1);
    eventually("the others wait", || {
        (server.status()["waiting"] == 7).then_some(())
    });
    for _ in 0..20 {
        let (reply, took) = timed(|| server.get(&lake("DO=echo")));
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(took < AT_ONCE, "{took:?}");
    }
    assert_eq!(server.world.count("running"), 1);
    server.world.tell("go");
    for reply in hanging {
        assert_eq!(reply.join().unwrap().unwrap().status, 200);
    }
}

#[test]
fn a_project_that_begins_to_hang_gives_a_worker_back_long_before_its_time_out() {
    const STALLED: Duration = Duration::from_secs(1);
    let server = two_projects(
        "server.timeout = 60\nzmq.timeout = 60000\nlanes.stalled_seconds = 1\nzmq.cancel_grace = 0.2",
    );
    assert_eq!(server.get(&lake("DO=echo")).status, 200);
    assert_eq!(server.act("DO=echo").status, 200);
    let asked = Instant::now();
    let hanging: Vec<_> = (0..8)
        .map(|i| server.act_later(&format!("DO=wait&FOR=go&MARK=running&ID={i}")))
        .collect();
    server.world.wait_count("running", 2);
    let is_stalled = server.status()["stalled"] != json!([]);
    assert!(!is_stalled || asked.elapsed() >= STALLED, "not before");
    let (reply, took) = timed(|| server.get(&lake("DO=echo")));
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(took < SOON, "{took:?}");
    for _ in 0..20 {
        let (reply, took) = timed(|| server.get(&lake("DO=echo")));
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(took < AT_ONCE, "{took:?}");
    }
    assert_eq!(server.world.count("running"), 2);
    assert_eq!(server.status()["stalled"], json!(["file:city"]));
    server.world.tell("go");
    for reply in hanging {
        assert_eq!(reply.join().unwrap().unwrap().status, 200);
    }
    assert_eq!(server.status()["stalled"], json!([]));
    assert_eq!(server.world.count("running"), 9, "one of them twice");
    server
        .process
        .log
        .assert_count("has not answered for 1.0 s", 1);
    server.process.log.assert_count("and others waited", 1);
}

#[test]
fn a_project_that_hangs_opens_its_breaker_though_its_clients_leave_earlier() {
    let server =
        two_projects("server.timeout = 2\nzmq.breaker_timeouts = 2\nzmq.cancel_grace = 0.2");
    for n in 1..=2 {
        let mut leaver = server.connect();
        send_get(&mut leaver, &path_of("DO=hang&MARK=running"));
        server.world.wait_count("running", n);
    }
    replaced(&server, 2);
    assert_eq!(server.act("DO=echo").status, 503);
}
