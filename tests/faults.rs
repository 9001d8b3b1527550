//! Whatever workers, clients and operators do, each request gets one answer in
//! time and nothing is left behind.

mod common;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use common::http::{read_all, send_get};
use common::load::Load;
use common::process::{is_alive, is_log_full};
use common::wire::Peer;
use common::{Pool, SOON, Server, World, eventually, free_address, kill, path_of, timed};
use nix::sys::signal::Signal;

/// Clearly less than any time-out in these tests, [`SLOW_BEAT`] among them, and bearable
/// for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Whoever waits for a heartbeat to be missed waits for longer than [`AT_ONCE`].
const SLOW_BEAT: &str = "zmq.heartbeat = 6";

// Deaths.

#[test]
fn a_get_survives_the_death_of_its_worker() {
    let server = Server::stub("");
    let before = server.workers();
    let reply = server.act("DO=signal&N=9&ONCE=victim&MARK=tries&ID=7");
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["id"], "7");
    assert_eq!(server.world.count("tries"), 2);
    server.wait_workers(2);
    assert_ne!(server.workers(), before, "the dead worker was replaced");
    server.process.log.wait_line("SIGKILL");
}

#[test]
fn a_post_whose_worker_dies_is_a_502_at_once_and_is_never_sent_twice() {
    let server = Server::stub(SLOW_BEAT);
    let (reply, took) = timed(|| server.act_once("DO=signal&N=9&MARK=tries"));
    assert_eq!(reply.status, 502, "{}", reply.text());
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(server.world.count("tries"), 1);
    assert_eq!(server.act("DO=echo").status, 200);
}

/// Retried once, killed again: the client loses one picture, the pool loses nothing.
#[test]
fn a_request_that_kills_two_workers_is_a_502_and_both_are_replaced() {
    let server = Server::stub(SLOW_BEAT);
    let (reply, took) = timed(|| server.act("DO=signal&N=9&MARK=tries"));
    assert_eq!(reply.status, 502, "{}", reply.text());
    assert!(took < AT_ONCE + AT_ONCE, "{took:?}");
    assert_eq!(server.world.count("tries"), 2);
    assert_eq!(server.act("DO=echo").status, 200);
    server.wait_workers(2);
}

#[test]
fn every_death_has_an_obituary_that_says_why() {
    let server = Server::stub("");
    for (what, why) in [
        ("segfault", "SIGSEGV"),
        ("signal&N=6", "SIGABRT"),
        ("exit&N=3", "code 3"),
    ] {
        server.act_once(&format!("DO={what}"));
        server.wait_ready();
        server.process.log.wait_for(why, |line| {
            (line.contains(why) && line.contains("GetMap") && line.contains("city")).then_some(())
        });
    }
}

#[test]
fn an_idle_worker_that_is_killed_is_replaced_and_no_request_notices() {
    let server = Server::stub("");
    let before = server.workers();
    kill(before[0], Signal::SIGKILL);
    for _ in 0..10 {
        assert_eq!(server.act("DO=echo").status, 200);
    }
    server.wait_replaced(&before[..1], 2);
}

#[test]
fn a_python_exception_is_a_500_and_the_worker_lives() {
    let server = Server::stub("server.workers = 1");
    let before = server.workers();
    let reply = server.act("DO=raise");
    assert_eq!(reply.status, 500, "{}", reply.text());
    assert!(
        !reply.text().contains("as the request wished"),
        "the cause is for the log: {}",
        reply.text()
    );
    assert_eq!(server.act("DO=echo").status, 200);
    server.process.log.wait_line("as the request wished");
    assert_eq!(server.workers(), before);
}

/// PyQt makes these two of a C++ exception: QGIS was left in the middle of something.
#[test]
fn a_cpp_exception_in_a_load_is_a_500_that_costs_the_worker_and_is_not_remembered() {
    let server = Server::stub("server.workers = 1");
    for text in ["memory", "unknown"] {
        let before = server.workers();
        std::fs::write(server.world.path("projects/odd.qgs"), text).unwrap();
        let reply = server.get("/ows/?MAP=odd&SERVICE=WMS&REQUEST=GetMap");
        assert_eq!(reply.status, 500, "{text}: {}", reply.text());
        server.wait_replaced(&before, 1);
    }
}

#[test]
fn when_the_parent_of_the_pool_is_killed_a_new_pool_serves() {
    let server = Server::stub("");
    let before = server.workers();
    let parent = pool_of(&server);
    kill(parent, Signal::SIGKILL);
    eventually("the old workers are gone", || {
        before.iter().all(|&pid| !is_alive(pid)).then_some(())
    });
    // The server may hear of the dead a moment later than we do.
    server.wait_replaced(&before, 2);
    assert_eq!(server.act("DO=echo").status, 200);
}

/// The next pool would remove them, and there is none any more.
#[test]
fn the_files_of_a_killed_pool_are_gone_though_the_server_stops_at_once() {
    let mut server = Server::stub("");
    kill(pool_of(&server), Signal::SIGKILL);
    server.process.log.wait_line("starting another");
    // And nothing is left.
    assert!(server.process.stop().success());
}

/// The process that forks the workers.
fn pool_of(server: &Server) -> i32 {
    server.process.log.wait_for("pool started", |line| {
        let rest = line.split("pid=").nth(1)?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

// Deadlines and overload.

#[test]
fn a_stuck_request_is_a_504_at_its_deadline_and_its_worker_is_replaced() {
    // `wedge` never lets go of the interpreter: only the link thread can end it.
    for what in ["hang", "wedge"] {
        let settings = "server.timeout = 3\nzmq.cancel_grace = 3\nserver.workers = 1";
        let server = Server::stub(settings);
        let before = server.workers();
        let (reply, took) = timed(|| server.act(&format!("DO={what}")));
        assert_eq!(reply.status, 504, "{}", reply.text());
        // And not when its worker is ended.
        assert!(
            took >= Duration::from_secs(3) && took < Duration::from_secs(6),
            "{what}: {took:?}"
        );
        server.wait_replaced(&before, 1);
        // A connection may end before its process does.
        eventually("it is gone", || (!is_alive(before[0])).then_some(()));
        assert_eq!(server.act("DO=echo").status, 200);
    }
}

/// A stopped process answers no CANCEL, and its silence is not noticed before.
#[test]
fn a_frozen_worker_does_not_hold_its_request_beyond_the_deadline() {
    let server = Server::stub("server.timeout = 2\nzmq.heartbeat = 3");
    let (reply, took) = timed(|| server.act("DO=signal&N=19&MARK=frozen"));
    assert_eq!(reply.status, 504, "{}", reply.text());
    assert!(took >= Duration::from_secs(2) && took < AT_ONCE, "{took:?}");
    let pid = std::fs::read_to_string(server.world.path("stub/control/frozen")).unwrap();
    let frozen: i32 = pid.trim().parse().expect("it ran once");
    server.wait_replaced(&[frozen], 2);
    assert_eq!(server.act("DO=echo").status, 200);
    eventually("its pool ends it", || (!is_alive(frozen)).then_some(()));
}

#[test]
fn a_full_queue_is_a_503_with_retry_after_at_once() {
    let server = Server::stub("server.workers = 1\nzmq.maxqueue = 2");
    let running = server.act_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    let queued = [1, 2].map(|i| server.act_later(&format!("DO=echo&ID={i}")));
    eventually("two wait", || {
        (server.status()["waiting"] == 2).then_some(())
    });
    let (refused, took) = timed(|| server.act("DO=echo"));
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(
        refused.header("retry-after").is_some(),
        "{:?}",
        refused.headers
    );
    assert!(
        refused.text().contains("Exception"),
        "OGC exception XML: {}",
        refused.text()
    );
    assert!(took < AT_ONCE, "{took:?}");
    server.world.tell("go");
    assert_eq!(running.join().unwrap().unwrap().status, 200);
    for reply in queued {
        assert_eq!(reply.join().unwrap().unwrap().status, 200);
    }
}

#[test]
fn a_request_that_waits_too_long_for_a_worker_is_a_504_and_is_never_run() {
    let server = Server::stub("server.workers = 1\nzmq.timeout = 400");
    let running = server.act_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    let (late, took) = timed(|| server.act("DO=echo&MARK=late"));
    assert_eq!(late.status, 504, "{}", late.text());
    assert!(
        took >= Duration::from_millis(400) && took < AT_ONCE,
        "{took:?}"
    );
    server.world.tell("go");
    assert_eq!(running.join().unwrap().unwrap().status, 200);
    assert_eq!(server.act("DO=echo").status, 200);
    assert_eq!(server.world.count("late"), 0);
}

// Clients that leave.

#[test]
fn a_queued_request_whose_client_left_is_never_run() {
    let server = Server::stub("server.workers = 1");
    let running = server.act_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    let mut leaver = server.connect();
    send_get(&mut leaver, &path_of("DO=echo&MARK=ghost"));
    eventually("it waits", || {
        (server.status()["waiting"] == 1).then_some(())
    });
    drop(leaver);
    eventually("it is withdrawn", || {
        (server.status()["waiting"] == 0).then_some(())
    });
    server.world.tell("go");
    assert_eq!(running.join().unwrap().unwrap().status, 200);
    assert_eq!(server.act("DO=echo").status, 200);
    assert_eq!(server.world.count("ghost"), 0);
}

#[test]
fn a_running_request_whose_client_left_is_ended_at_its_deadline_if_qgis_does_not_stop() {
    let server = Server::stub("server.workers = 1\nserver.timeout = 2\nzmq.cancel_grace = 0.2");
    let before = server.workers();
    let mut leaver = server.connect();
    send_get(&mut leaver, &path_of("DO=hang&MARK=running"));
    server.world.wait_count("running", 1);
    drop(leaver);
    server.wait_replaced(&before, 1);
    assert_eq!(server.act("DO=echo").status, 200);
}

/// A transaction must not be left half done because somebody closed a browser.
#[test]
fn a_transaction_whose_client_left_runs_on_after_the_deadline_of_those_who_wait() {
    let server = Server::stub("server.workers = 1\nserver.timeout = 3\nzmq.cancel_grace = 0.2");
    let before = server.workers();
    server.leave_behind("DO=wait&FOR=go&MARK=running");
    let late = server.act("DO=echo");
    assert_eq!(late.status, 504, "its deadline is over: {}", late.text());
    server.world.tell("go");
    assert_eq!(server.act("DO=echo").json()["pid"], before[0]);
}

#[test]
fn a_transaction_whose_client_left_ends_when_it_has_run_on_for_too_long() {
    let server = Server::stub(
        "server.workers = 1\nserver.timeout = 0.5\nserver.run_on_timeout = 2\nzmq.cancel_grace = 0.2",
    );
    let before = server.workers();
    let (_, took) = timed(|| {
        server.leave_behind("DO=hang&MARK=running");
        server.wait_replaced(&before, 1)
    });
    assert!(took >= Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_transaction_that_hangs_is_a_504_at_the_deadline_of_its_client_who_waits() {
    let server = Server::stub("server.workers = 1\nserver.timeout = 1\nzmq.cancel_grace = 0.2");
    let before = server.workers();
    let (reply, took) = timed(|| server.act_once("DO=hang"));
    assert_eq!(reply.status, 504, "{}", reply.text());
    assert!(took < SOON, "{took:?}");
    server.wait_replaced(&before, 1);
}

#[test]
fn a_cancelled_map_is_stopped_where_qgis_can_be_and_costs_no_worker() {
    let server = Server::stub("server.timeout = 3\nzmq.cancel_grace = 15\nserver.workers = 1");
    let before = server.workers();
    let reply = server.act("DO=draw&STOPPED=stopped");
    assert_eq!(reply.status, 504, "{}", reply.text());
    server.world.wait_count("stopped", 1);
    let reply = server.act("DO=echo");
    assert_eq!(reply.json()["pid"], before[0]);
}

/// A worker whose stream is cancelled stops by itself and stays.
#[test]
fn a_cancelled_stream_does_not_cost_its_worker() {
    let server = Server::stub("server.workers = 1\nserver.timeout = 60\nzmq.cancel_grace = 10");
    let before = server.workers();
    let mut leaver = server.connect();
    send_get(&mut leaver, &path_of("DO=stream&N=100000&SIZE=100000"));
    leaver.read_exact(&mut [0; 1000]).unwrap();
    drop(leaver);
    assert_eq!(server.act("DO=echo").status, 200);
    assert_eq!(server.workers(), before);
}

// Streams.

#[test]
fn a_stream_arrives_whole_and_in_order() {
    let server = Server::stub("");
    let reply = server.act("DO=stream&N=100&SIZE=123456");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("transfer-encoding"), Some("chunked"));
    let letters = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let chunk: Vec<u8> = letters.iter().copied().cycle().take(123_456).collect();
    assert!(
        reply.body == chunk.repeat(100),
        "{} bytes",
        reply.body.len()
    );
}

#[test]
fn a_slow_client_slows_its_own_stream_and_memory_stays_flat() {
    let server = Server::stub("server.timeout = 60");
    // Both workers have streamed before.
    for _ in 0..2 {
        server.act("DO=stream&N=100&SIZE=100000");
    }
    let idle = server.process.memory_kb();
    let mut slow = server.connect();
    send_get(
        &mut slow,
        &path_of("DO=stream&N=2000&SIZE=100000&TICK=sent"),
    );
    slow.read_exact(&mut [0; 10_000]).unwrap();
    let mut sent = 0;
    let mut since = Instant::now();
    eventually("the worker has to wait", || {
        let now = server.world.count("sent");
        if now != sent {
            (sent, since) = (now, Instant::now());
        }
        (since.elapsed() > Duration::from_millis(500)).then_some(())
    });
    assert!(
        sent < 1000,
        "{sent} of 2000 chunks were sent to a client that does not read"
    );
    let grown = server.process.memory_kb().saturating_sub(idle);
    assert!(grown < 32 << 10, "{grown} kB more for a slow client");
    let (reply, took) = timed(|| server.act("DO=echo"));
    assert_eq!(reply.status, 200);
    assert!(took < AT_ONCE, "the other worker is free: {took:?}");
    let (rest, was_reset) = read_all(&mut slow);
    assert!(
        !was_reset && rest.ends_with(b"\r\n0\r\n\r\n"),
        "it goes on where it stopped"
    );
    assert!(rest.len() > 199_000_000, "{}", rest.len());
}

#[test]
fn a_client_that_takes_nothing_is_cut_off_and_its_worker_is_free_again() {
    let server = Server::stub("server.workers = 1\nserver.write_timeout = 1\nserver.timeout = 60");
    let mut stuck = server.connect();
    send_get(
        &mut stuck,
        &path_of("DO=stream&N=100000&SIZE=100000&MARK=running"),
    );
    server.world.wait_count("running", 1);
    assert_eq!(
        server.act("DO=echo").status,
        200,
        "once the other is cut off"
    );
    let (rest, _) = read_all(&mut stuck);
    assert!(!rest.ends_with(b"\r\n0\r\n\r\n"));
}

#[test]
fn a_stream_that_fails_half_way_aborts_the_connection() {
    let server = Server::stub("server.timeout = 4");
    // More than the window, so that the client has seen some of it.
    for end in ["signal", "exit", "raise", "hang"] {
        let path = path_of(&format!("DO=stream&N=100&SIZE=100000&THEN={end}"));
        let mut client = server.connect();
        send_get(&mut client, &path);
        let (all, _) = read_all(&mut client);
        let text = String::from_utf8_lossy(&all);
        assert!(text.starts_with("HTTP/1.1 200 "), "{end}: {text:.200}");
        assert!(!all.ends_with(b"0\r\n\r\n"), "{end}: it looks complete");
        assert!(server.try_get(&path).is_err(), "{end}: a client can tell");
        server.wait_workers(2);
    }
    assert_eq!(server.act("DO=echo").status, 200);
}

// Answers belong to their requests.

#[test]
fn no_answer_reaches_another_client_while_workers_die() {
    let server = Arc::new(Server::stub("server.workers = 3"));
    let clients: Vec<_> = (0..8)
        .map(|client| {
            let server = server.clone();
            std::thread::spawn(move || {
                for i in 0..30 {
                    let id = format!("{client}-{i}");
                    let end = if i % 10 == 9 {
                        "DO=signal&ONCE=death-"
                    } else {
                        "DO=echo&UNUSED="
                    };
                    let reply = server.act(&format!("{end}{id}&ID={id}"));
                    assert!([200, 502].contains(&reply.status), "{}", reply.text());
                    if reply.status == 200 {
                        assert_eq!(reply.json()["id"], id.as_str());
                    }
                }
            })
        })
        .collect();
    clients
        .into_iter()
        .for_each(|client| client.join().unwrap());
}

// The end.

#[test]
fn sigterm_lets_running_requests_end_and_refuses_new_ones() {
    let mut server = Server::stub("");
    let running = server.act_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    server.signal(Signal::SIGTERM);
    eventually("new requests are refused", || {
        match server.try_get("/ows/?MAP=city&SERVICE=WMS&REQUEST=GetMap") {
            Ok(reply) => (reply.status == 503).then_some(()),
            Err(_) => Some(()),
        }
    });
    server.world.tell("go");
    assert_eq!(running.join().unwrap().unwrap().status, 200);
    assert!(server.process.wait(SOON).success());
}

#[test]
fn sigterm_waits_no_longer_than_the_drain_timeout() {
    let mut server =
        Server::stub("server.drain_timeout = 1\nworker.drain_timeout = 1\nserver.timeout = 60");
    let stuck = server.act_later("DO=hang&MARK=running");
    server.world.wait_count("running", 1);
    server.signal(Signal::SIGTERM);
    // It would have a minute.
    server.process.wait(SOON);
    let reply = stuck.join().unwrap();
    assert!(reply.is_err() || reply.is_ok_and(|reply| reply.status >= 500));
}

/// At every moment of the start: before, while and after the pool and its workers begin.
#[test]
fn sigterm_during_the_start_ends_everything() {
    for milliseconds in [0, 30, 100, 200, 300, 500] {
        let server = Server::start(World::stub(), "");
        // The moment of the signal is what is tried; nothing is waited for.
        std::thread::sleep(Duration::from_millis(milliseconds));
        drop(server);
    }
    let world = World::stub();
    world.tell("hang-at-start");
    let server = Server::start(world, "");
    server.world.wait_count("started", 1);
    drop(server);
}

/// As a terminal sends it: to all processes of the group.
#[test]
fn an_interrupt_lets_running_requests_end_and_a_second_one_does_not() {
    for patient in [true, false] {
        let mut server = Server::stub("server.timeout = 60");
        let running = server.act_later("DO=wait&FOR=go&MARK=running");
        server.world.wait_count("running", 1);
        kill(-server.process.pid(), Signal::SIGINT);
        server.process.log.wait_line("stopping");
        if patient {
            server.world.tell("go");
            assert_eq!(running.join().unwrap().unwrap().status, 200);
            assert!(server.process.wait(SOON).success());
        } else {
            // Two in the same moment are one wish.
            eventually("a later one ends it", || {
                kill(-server.process.pid(), Signal::SIGINT);
                std::thread::sleep(Duration::from_millis(100));
                server.process.try_wait()
            });
            assert!(running.join().unwrap().is_err());
            // It had no time to tidy; what it left behind does so.
            eventually("no orphan", || {
                server.process.family().is_empty().then_some(())
            });
            eventually("no temporary file", || {
                server.process.files().is_empty().then_some(())
            });
        }
    }
}

#[test]
fn a_killed_server_leaves_no_process_and_no_file() {
    let mut server = Server::stub("server.timeout = 60");
    let stuck = server.act_later("DO=hang&MARK=running");
    server.world.wait_count("running", 1);
    assert!(
        server.process.family().len() >= 3,
        "a pool and its workers: {:?}",
        server.process.family()
    );
    server.process.kill();
    assert!(stuck.join().unwrap().is_err());
    eventually("no orphan", || {
        server.process.family().is_empty().then_some(())
    });
    eventually("no temporary file", || {
        server.process.files().is_empty().then_some(())
    });
}

// Restarts.

/// All workers are replaced, one after the other, and no client notices.
fn assert_rolling(server: &Server, restart: impl FnOnce()) {
    let before = server.workers();
    let load = Load::on(server);
    restart();
    let fewest = server.wait_replaced(&before, before.len());
    load.assert_served();
    assert!(
        fewest >= before.len() - 1,
        "only {fewest} workers at a time"
    );
}

#[test]
fn sighup_restarts_the_workers_one_after_the_other_and_no_request_fails() {
    let server = Server::stub("");
    assert_rolling(&server, || server.signal(Signal::SIGHUP));
}

#[test]
fn a_restart_waits_for_a_running_request() {
    let server = Server::stub("server.workers = 1\nserver.timeout = 60");
    let before = server.workers();
    let running = server.act_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    for _ in 0..3 {
        server.signal(Signal::SIGHUP);
    }
    eventually("its successor is there", || {
        let now = server.workers();
        now.iter().any(|pid| !before.contains(pid)).then_some(())
    });
    assert_eq!(server.act("DO=echo").status, 200);
    server.world.tell("go");
    let reply = running.join().unwrap().unwrap();
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["pid"], before[0], "{}", reply.text());
    eventually("it left", || (!is_alive(before[0])).then_some(()));
    server.wait_workers(1);
}

#[test]
fn a_change_of_the_restartmon_file_restarts_the_workers_and_no_request_fails() {
    let world = World::stub();
    let file = world.path("restartmon");
    std::fs::write(&file, "").unwrap();
    let settings = format!(
        "server.restartmon = {}\nserver.restartmon_check_time = 100",
        file.display()
    );
    let server = Server::start(world, &settings).ready();
    server.wait_workers(2);
    // Seen at least once as it was.
    assert_rolling(&server, || {
        let touched = std::fs::File::options().write(true).open(&file).unwrap();
        touched
            .set_modified(SystemTime::now() + Duration::from_secs(5))
            .unwrap();
    });
    // One that is made after it went away has changed, too.
    std::fs::remove_file(&file).unwrap();
    assert_rolling(&server, || std::fs::write(&file, "").unwrap());
}

#[test]
fn a_restartmon_file_that_is_made_restarts_the_workers() {
    let world = World::stub();
    let file = world.path("restartmon");
    let settings = format!(
        "server.restartmon = {}\nserver.restartmon_check_time = 100",
        file.display()
    );
    let server = Server::start(world, &settings).ready();
    server.wait_workers(2);
    // Looked for at least once.
    assert_rolling(&server, || std::fs::write(&file, "").unwrap());
}

#[test]
fn workers_that_die_at_start_are_replaced_with_back_off_and_the_server_lives() {
    let world = World::stub();
    world.tell("crash-at-start");
    let server = Server::start(world, "worker.backoff_max = 2");
    // Said when a pause is longer than a second.
    server.process.log.wait_line("die young");
    let (start, before) = (Instant::now(), server.world.count("started"));
    server.world.wait_count("started", before + 3);
    let took = start.elapsed();
    assert!(
        took > Duration::from_millis(300),
        "three more lives in {took:?}"
    );
    assert_eq!(server.get("/ping").status, 200);
    assert_eq!(server.get("/ready").status, 503);
    server.world.untell("crash-at-start");
    server.wait_ready();
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_worker_that_does_not_become_ready_is_replaced() {
    let world = World::stub();
    world.tell("hang-at-start");
    let server = Server::start(
        world,
        "worker.start_timeout = 4\nworker.backoff_max = 1\nserver.workers = 1\nworker.spares = 0",
    );
    server.world.wait_count("started", 2);
    server.world.untell("hang-at-start");
    server.wait_ready();
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_pool_whose_imports_hang_is_ended_and_started_again() {
    let world = World::stub();
    world.tell("hang-at-import");
    let server = Server::start(world, "worker.start_timeout = 3\nworker.backoff_max = 1");
    server.process.log.wait_line("were not imported within 6s");
    server.world.wait_count("importing", 2);
    assert_eq!(server.get("/ready").status, 503);
    server.world.untell("hang-at-import");
    server.wait_ready();
    assert_eq!(server.act("DO=echo").status, 200);
}

/// Its last words would wait for a reader.
#[test]
fn a_pool_whose_imports_hang_is_started_again_though_nobody_reads_its_log() {
    let world = World::stub();
    world.tell("hang-at-import");
    let settings =
        "worker.start_timeout = 3\nworker.backoff_max = 1\nlogging.slow_seconds = 0.000001";
    let server = Server::start(world, settings);
    let log = server.process.log.clone();
    let stalled = log.stall();
    let long = format!("/ows/?MAP=city&X={}", "x".repeat(30_000));
    eventually("its log is full", || {
        assert_eq!(server.get(&long).status, 400);
        is_log_full(server.process.pid()).then_some(())
    });
    // One may have hung before the log was full, the next one has not.
    let n = server.world.count("importing");
    server.world.wait_count("importing", n + 2);
    drop(stalled);
    server.world.untell("hang-at-import");
    server.wait_ready();
}

// Proxy mode.

#[test]
fn a_pool_joins_a_server_that_starts_after_it_and_one_that_comes_back() {
    let (http, gate) = (free_address(), free_address());
    let world = World::stub();
    let pool = Pool::start(&world, gate, "");
    world.wait_count("started", 2);
    let mut server = Server::proxy_at(world, http, gate, "");
    server.wait_workers(2);
    assert_eq!(server.act("DO=echo").status, 200);
    let before = server.workers();

    let tmp = server.process.kill();
    let Server { process, world, .. } = server;
    let server = Server::proxy_in(tmp, world, http, gate, "");
    server.wait_workers(2);
    assert_eq!(server.workers(), before, "the same workers");
    assert_eq!(server.act("DO=echo").status, 200);
    drop(pool);
    drop(process);
}

#[test]
fn pools_come_and_go() {
    let server = Server::proxy(World::stub(), "");
    let gate = server.gate.unwrap();
    assert_eq!(server.get("/ready").status, 503);
    let first = Pool::start(&server.world, gate, "server.workers = 1");
    server.wait_workers(1);
    let mut second = Pool::start(
        &server.world,
        gate,
        "server.workers = 2\nworker.identity = second",
    );
    server.wait_workers(3);
    assert!(server.status().to_string().contains("\"second\""));

    let load = Load::on(&server);
    drop(first);
    server.wait_workers(2);
    load.assert_served();

    let tmp = second.process.kill();
    server.wait_workers(0);
    assert_eq!(server.get("/ready").status, 503);
    let _third = Pool::start_in(tmp, &server.world, gate, "server.workers = 1");
    server.wait_ready();
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_restart_of_a_proxy_reaches_all_pools_and_no_request_fails() {
    let server = Server::proxy(World::stub(), "");
    let gate = server.gate.unwrap();
    let _pools = [1, 2].map(|_| Pool::start(&server.world, gate, ""));
    server.wait_workers(4);
    let before = server.workers();
    let load = Load::on(&server);
    server.signal(Signal::SIGHUP);
    server.wait_replaced(&before, 4);
    load.assert_served();
}

#[test]
fn a_stuck_worker_of_another_pool_is_replaced_as_a_local_one() {
    let server = Server::proxy(World::stub(), "server.timeout = 3");
    let _pool = Pool::start(&server.world, server.gate.unwrap(), "server.workers = 1");
    server.wait_ready();
    let before = server.workers();
    assert_eq!(server.act("DO=hang").status, 504);
    server.wait_replaced(&before, 1);
    assert_eq!(server.act("DO=echo").status, 200);
}

// The ZeroMQ port.

#[test]
fn a_frame_of_an_unknown_version_is_refused_with_a_log_line() {
    let server = Server::proxy(World::stub(), "");
    let gate = server.gate.unwrap();
    let _pool = Pool::start(&server.world, gate, "server.workers = 1");
    server.wait_ready();
    let mut stranger = Peer::join(gate);
    stranger.send(&[b"qgisserver/9", b"READY", b"{}"]);
    let line = server.process.log.wait_line("qgisserver/9");
    assert!(line.contains("refused"), "{line}");
    assert_eq!(server.workers().len(), 1);
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn nonsense_on_the_zeromq_port_harms_nobody() {
    let server = Server::proxy(World::stub(), "");
    let gate = server.gate.unwrap();
    let _pool = Pool::start(&server.world, gate, "server.workers = 1");
    server.wait_ready();
    let before = server.process.memory_kb();

    for nonsense in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[0; 200],
        &[0xff; 5000],
        b"\xff",
    ] {
        let mut stranger = common::http::connect(gate);
        // The server may hang up before all is written.
        let _ = stranger.write_all(nonsense);
    }
    let messages: [&[&[u8]]; 7] = [
        &[b""],
        &[b"qgisserver/1"],
        &[b"qgisserver/1", b"DANCE"],
        &[b"qgisserver/1", b"READY", b"not JSON"],
        &[b"qgisserver/1", b"FINAL", b"{\"id\":1}", b"", b"", b""],
        &[
            b"qgisserver/1",
            b"PARTIAL",
            b"{\"id\":1,\"head\":null}",
            b"body",
        ],
        &[b"qgisserver/1", b"REQUEST", b"{}", b""],
    ];
    for message in messages {
        Peer::join(gate).send(message);
    }
    // A frame that says it has a terabyte.
    let mut stranger = Peer::join(gate);
    stranger.send_raw(&[&[2][..], &(1u64 << 40).to_be_bytes(), &[0; 1000]].concat());

    assert_eq!(server.act("DO=echo").status, 200);
    assert_eq!(server.workers().len(), 1, "nobody became a worker");
    let grown = server.process.memory_kb().saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} kB more");
}
