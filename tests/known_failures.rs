//! How other servers of QGIS projects fail under faults and load, and the test
//! that shows that this one does not. Those without a test elsewhere are here.
//!
//! | what was seen in py-qgis-server | test |
//! |---|---|
//! | a worker is killed: its client waits the whole timeout, no retry | `faults::a_get_survives_the_death_of_its_worker`, `faults::a_post_whose_worker_dies_is_a_502_at_once_and_is_never_sent_twice` |
//! | requests whose clients left are executed all the same | `faults::a_queued_request_whose_client_left_is_never_run` |
//! | requests that were answered 504 are executed all the same | `overload::of_500_requests_at_once_each_is_served_or_refused_in_time_and_none_runs_for_nobody` |
//! | a full queue is a 500 with a traceback per request | `faults::a_full_queue_is_a_503_with_retry_after_at_once` |
//! | a request that waited too long gets no answer until a worker is free | `faults::a_request_that_waits_too_long_for_a_worker_is_a_504_and_is_never_run` |
//! | a READY that crosses a request makes a busy worker look free: two requests at once | `broker::queue` (unit tests), `history` |
//! | the time of a stream counts from its beginning, however it moves: it is killed at its timeout | [`a_stream_that_moves_may_last_longer_than_the_timeout`] |
//! | a stream that fails ends properly: silent truncation with 200 | `faults::a_stream_that_fails_half_way_aborts_the_connection`, `history` |
//! | clients that read slowly grow the server without bound | `faults::a_slow_client_slows_its_own_stream_and_memory_stays_flat`, `overload::a_thousand_clients_that_hardly_read_disturb_nobody` |
//! | heads and bodies may take for ever | `overload::a_thousand_clients_that_never_end_their_heads_disturb_nobody`, `…_bodies_…` |
//! | HEAD of a missing project, or OPTIONS of an API, ends a worker | [`no_method_costs_a_worker`] |
//! | a remote worker that is killed costs the whole timeout | [`a_remote_worker_that_is_killed_costs_no_timeout`] |
//! | the request for a remote worker that vanished is lost | [`a_remote_worker_that_vanished_costs_no_request`] |
//! | a remote worker that is stuck is never killed | `faults::a_stuck_worker_of_another_pool_is_replaced_as_a_local_one` |
//! | the broker is killed: 502 for ever, and `/ping` says 200 | there is no other process that could be; of the pool: `faults::when_the_parent_of_the_pool_is_killed_a_new_pool_serves` |
//! | a worker that crashes in the first seconds ends the server | `faults::workers_that_die_at_start_are_replaced_with_back_off_and_the_server_lives` |
//! | SIGTERM is a 500 for running requests, or never ends | `faults::sigterm_lets_running_requests_end_and_refuses_new_ones`, `faults::sigterm_waits_no_longer_than_the_drain_timeout` |
//! | a killed server leaves workers and sockets | `faults::a_killed_server_leaves_no_process_and_no_file` |
//! | all workers restart at the same time | `faults::sighup_restarts_the_workers_one_after_the_other_and_no_request_fails` |
//! | whoever reaches the ZeroMQ port executes code and receives requests | `faults::nonsense_on_the_zeromq_port_harms_nobody`, `broker::gate::only_loopback_is_possible` |
//! | a project with an older date than the loaded one is not read | `projects::a_change_in_either_direction_reloads` (worker) |
//!
//! | what was seen in QJazz | test |
//! |---|---|
//! | DELETE kills a worker, two of them the server | [`no_method_costs_a_worker`] |
//! | a project that changed is loaded again by every request | `projects::a_change_in_either_direction_reloads` (worker) |
//! | requests that time out or leave while they wait keep their place in the queue for ever | [`whoever_gave_up_waiting_leaves_no_place_taken`] |
//! | a worker that dies in a stream: no end for the client, a core burns, no new worker | `faults::a_stream_that_fails_half_way_aborts_the_connection`, [`a_worker_that_dies_in_a_stream_burns_no_core`] |
//! | what is left of a cancelled answer is parsed as the next one | [`what_is_left_of_a_cancelled_stream_reaches_nobody`] |
//! | the death of a worker is a 200 that says `IO error` | `faults::a_request_that_kills_two_workers_is_a_502_and_both_are_replaced` |
//! | a client that leaves is not noticed | `faults::a_running_request_whose_client_left_is_ended_at_its_deadline_if_qgis_does_not_stop` |
//! | clients that read a little and pause hold every worker | [`whoever_hardly_reads_a_map_holds_no_worker`] |
//! | 40 ms more for each answer on a kept connection | [`a_kept_connection_has_no_pauses`] |
//! | overload is a 500, a timeout a 503 | `faults::a_full_queue_is_a_503_with_retry_after_at_once`, `faults::a_stuck_request_is_a_504_at_its_deadline_and_its_worker_is_replaced` |
//! | `X-Forwarded-Host` of anybody is believed | `http::the_advertised_url_follows_the_proxy_only_when_it_is_trusted` |
//! | a worker killed while it starts blocks all later starts | [`a_worker_killed_while_it_starts_is_in_nobody_s_way`] |

#[path = "history/client.rs"]
mod client;
mod common;
#[path = "history/relay.rs"]
mod relay;

use std::io::Read;
use std::time::{Duration, Instant};

use client::{Came, Client};
use common::http::send_get;
use common::process::cpu_time;
use common::{Pool, SOON, Server, World, eventually, kill, path_of};
use nix::sys::signal::Signal;
use relay::Relay;

/// Clearly less than any time-out in these tests, and bearable for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(3);

fn echo(tag: &str, more: &str) -> String {
    format!("/ows/?SERVICE=ECHO&REQUEST=Echo&MAP=city&TAG={tag}{more}")
}

#[test]
fn a_stream_that_moves_may_last_longer_than_the_timeout() {
    let world = World::stub().with_echo();
    let server = Server::start(world, "server.timeout = 1\nworker.chunk_bytes = 1K").ready();
    let start = Instant::now();
    let reply = server.get(&echo("t", "&CHUNKS=8&SIZE=3000&PAUSE=0.3"));
    assert_eq!((reply.status, reply.body.len()), (200, 24_000));
    assert!(start.elapsed() > Duration::from_secs(2));
}

#[test]
fn no_method_costs_a_worker() {
    let server = Server::stub("");
    let before = server.workers();
    for method in ["HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "BREW"] {
        for path in [
            "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=city",
            "/ows/?MAP=nope",
            "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=corrupt",
            "/wfs3/collections?MAP=city",
            "/wfs3/collections?MAP=nope",
        ] {
            let reply = server.request(method, path, &[], b"");
            assert!(reply.status < 500, "{method} {path}: {}", reply.status);
        }
    }
    assert_eq!(server.workers(), before);
    assert_eq!(server.act("DO=echo").status, 200);
}

fn remote(settings: &str) -> (Server, Relay, Pool) {
    let server = Server::proxy(World::stub(), settings);
    let relay = Relay::before(server.gate.unwrap());
    let pool = Pool::start(&server.world, relay.address, settings);
    server.wait_workers(2);
    (server, relay, pool)
}

#[test]
fn a_remote_worker_that_is_killed_costs_no_timeout() {
    let (server, _relay, _pool) = remote("server.timeout = 20");
    let start = Instant::now();
    let reply = server.act("DO=signal&N=9&ONCE=victim&MARK=tries");
    assert_eq!((reply.status, server.world.count("tries")), (200, 2));
    let post = server.post(&path_of("DO=signal&N=9"), "text/xml", b"<x/>");
    assert_eq!(post.status, 502);
    assert!(start.elapsed() < AT_ONCE * 2, "{:?}", start.elapsed());
}

/// The machine is gone, and nobody said so.
#[test]
fn a_remote_worker_that_vanished_costs_no_request() {
    let (server, relay, _pool) = remote("server.timeout = 20\nzmq.heartbeat = 0.2");
    let (gone, limit) = (relay.links(), Duration::from_secs(10));
    gone[0].hold(SOON);
    let start = Instant::now();
    for _ in 0..4 {
        assert_eq!(server.act("DO=echo").status, 200);
    }
    assert!(start.elapsed() < limit, "{:?}", start.elapsed());
    // Let go, so that the pool can be stopped.
    gone[0].cut();
}

#[test]
fn whoever_gave_up_waiting_leaves_no_place_taken() {
    let server = Server::stub("server.workers = 1\nzmq.maxqueue = 10\nzmq.timeout = 300");
    for round in 0..3 {
        let (go, running) = (format!("go{round}"), format!("running{round}"));
        let holder = server.act_later(&format!("DO=wait&FOR={go}&MARK={running}"));
        server.world.wait_count(&running, 1);
        let waiters: Vec<_> = (0..10).map(|_| server.act_later("DO=echo")).collect();
        let statuses = waiters
            .into_iter()
            .map(|it| it.join().unwrap().unwrap().status);
        assert_eq!(statuses.collect::<Vec<_>>(), [504; 10], "round {round}");
        let leavers = (0..10).map(|_| {
            let mut leaver = server.connect();
            send_get(&mut leaver, &path_of("DO=echo"));
            leaver
        });
        drop(leavers.collect::<Vec<_>>());
        eventually("nobody waits", || {
            (server.status()["waiting"] == 0).then_some(())
        });
        server.world.tell(&go);
        assert_eq!(holder.join().unwrap().unwrap().status, 200);
    }
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_worker_that_dies_in_a_stream_burns_no_core() {
    let server = Server::stub("");
    for round in 0..4 {
        // Not one and the same, which would be in quarantine after the second.
        let path = path_of(&format!(
            "DO=stream&N=100&SIZE=100000&THEN=signal&ROUND={round}"
        ));
        assert!(server.try_get(&path).is_err(), "it is cut");
    }
    server.wait_workers(2);
    assert_eq!(server.status()["running"], 0);
    let before = cpu_time(server.process.pid());
    // Time has to pass for this to mean anything.
    std::thread::sleep(Duration::from_secs(2));
    let used = cpu_time(server.process.pid()) - before;
    assert!(
        used < Duration::from_millis(500),
        "{used:?} in 2 s of nothing"
    );
}

#[test]
fn what_is_left_of_a_cancelled_stream_reaches_nobody() {
    let world = World::stub().with_echo();
    let server = Server::start(world, "server.workers = 1\nworker.chunk_bytes = 1K").ready();
    let before = server.workers();
    for i in 0..20 {
        let mut leaver = server.connect();
        send_get(&mut leaver, &echo("left", "&CHUNKS=500&SIZE=5000"));
        leaver.read_exact(&mut [0; 3000]).unwrap();
        drop(leaver);
        let tag = format!("mine{i}");
        let reply = server.get(&echo(&tag, "&CHUNKS=3&SIZE=2000"));
        assert_eq!((reply.status, reply.body.len()), (200, 6000));
        assert!(!reply.text().contains("left"), "{:.100}", reply.text());
    }
    assert_eq!(server.workers(), before);
}

/// A map is whole before it leaves, so it waits in the server and not in a worker.
#[test]
fn whoever_hardly_reads_a_map_holds_no_worker() {
    let world = World::stub().with_echo();
    let server = Server::start(world, "server.timeout = 60").ready();
    let _slow: Vec<_> = (0..6)
        .map(|i| {
            let mut slow = server.connect();
            send_get(&mut slow, &echo(&format!("slow{i}"), "&SIZE=2000000"));
            slow.read_exact(&mut [0; 1000]).unwrap();
            slow
        })
        .collect();
    let start = Instant::now();
    assert_eq!(server.act("DO=echo").status, 200);
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    eventually("no worker is held", || {
        (server.status()["running"] == 0).then_some(())
    });
}

/// Nagle's algorithm and delayed acknowledgements add 40 ms to each answer that is
/// written in two pieces; a busy machine adds to some, but not to all.
#[test]
fn a_kept_connection_has_no_pauses() {
    let server = Server::stub("");
    let mut client = Client::new(server.address);
    for path in [path_of("DO=echo"), path_of("DO=stream&N=3&SIZE=3000")] {
        let question = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let times = (0..30).map(|_| {
            let start = Instant::now();
            let came = client.ask(question.as_bytes());
            assert!(matches!(came, Came::Whole { status: 200, .. }), "{came:?}");
            start.elapsed()
        });
        let fastest = times.min().unwrap();
        assert!(fastest < Duration::from_millis(30), "{path}: {fastest:?}");
    }
}

#[test]
fn a_worker_killed_while_it_starts_is_in_nobody_s_way() {
    let world = World::stub();
    world.tell("hang-at-start");
    let server = Server::start(world, "worker.young = 0\nserver.workers = 2");
    server.world.wait_count("started", 2);
    let starting = std::fs::read_to_string(server.world.path("stub/control/started")).unwrap();
    server.world.untell("hang-at-start");
    for pid in starting.lines() {
        kill(pid.parse().unwrap(), Signal::SIGKILL);
    }
    let server = server.ready();
    assert_eq!(server.act("DO=echo").status, 200);
}
