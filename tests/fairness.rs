//! Who waits for whom, seen from outside: clients, lanes, limits.

mod common;

use std::thread::JoinHandle;
use std::time::Duration;

use common::{Reply, Server, eventually, http, path_of};

type Asking = JoinHandle<Result<Reply, String>>;

/// A GetMap of `client` that makes the stub do `what`.
fn map(server: &Server, client: &str, what: &str) -> Asking {
    ask(server, client, &path_of(what))
}

fn print(server: &Server, client: &str, what: &str) -> Asking {
    let path = path_of(what).replace("GetMap", "GetPrint");
    ask(server, client, &path)
}

/// In the background, as a proxy would hand it on.
fn ask(server: &Server, client: &str, path: &str) -> Asking {
    let (url, client) = (server.url(path), client.to_owned());
    std::thread::spawn(move || http::ask("GET", &url, &[("X-Forwarded-For", &client)], b""))
}

fn status(asking: Asking) -> u16 {
    let reply = asking.join().expect("no panic");
    reply.expect("an answer").status
}

/// When so many wait in the lane.
fn wait_lane(server: &Server, lane: &str, waiting: u64, running: u64) {
    eventually(
        &format!("{waiting} wait and {running} run in {lane}"),
        || {
            let of = &server.status()["lanes"][lane];
            (of["waiting"] == waiting && of["running"] == running).then_some(())
        },
    );
}

#[test]
fn small_maps_flow_while_prints_and_slow_maps_fill_their_lane() {
    let server = Server::stub(
        "server.http_proxy = yes\nserver.timeout = 300\nzmq.timeout = 300000\n\
         lanes.slow_ms = 500\nlanes.reserved_seconds = 1000",
    );
    let small = || map(&server, "192.0.2.9", "WIDTH=256&HEIGHT=256&LAYERS=small");
    assert_eq!(status(small()), 200);
    let lesson = map(
        &server,
        "192.0.2.1",
        "DO=wait&FOR=taught&LAYERS=slow&MARK=lesson",
    );
    server.world.wait_count("lesson", 1);
    // That it takes longer than `lanes.slow_ms` is the lesson.
    std::thread::sleep(Duration::from_millis(600));
    server.world.tell("taught");
    assert_eq!(status(lesson), 200);

    let print = |n| print(&server, &format!("192.0.2.{n}"), "DO=wait&FOR=go&MARK=long");
    let slow = |n| {
        map(
            &server,
            &format!("192.0.2.{n}"),
            "DO=wait&FOR=go&LAYERS=slow&MARK=long",
        )
    };
    let first = print(1);
    server.world.wait_count("long", 1);
    let long: Vec<Asking> = (1..=8).flat_map(|n| [print(n), slow(n)]).collect();
    wait_lane(&server, "held", 8, 1);
    wait_lane(&server, "slow", 8, 0);
    for _ in 0..30 {
        assert_eq!(status(small()), 200);
    }
    // All this time one worker was kept free of them.
    assert_eq!(server.world.count("long"), 1);
    wait_lane(&server, "held", 8, 1);
    server.world.tell("go");
    assert_eq!(status(first), 200);
    for asking in long {
        assert_eq!(status(asking), 200);
    }
}

/// Each request ends when it is told to, so that order is all that counts.
#[test]
fn a_flood_delays_another_client_by_one_request_at_most() {
    let settings = "server.workers = 1\nserver.timeout = 300\nzmq.timeout = 300000";
    let server = Server::stub(&format!("server.http_proxy = yes\n{settings}"));
    let flood = |n: usize| {
        let what = format!("DO=wait&FOR=end{n}&MARK=flood{n}");
        map(&server, "192.0.2.1", &what)
    };
    let mut flooding = vec![flood(0)];
    server.world.wait_count("flood0", 1);
    flooding.extend((1..50).map(flood));
    wait_lane(&server, "maps", 49, 1);
    let other = map(&server, "192.0.2.2", "DO=wait&FOR=end&MARK=other");
    wait_lane(&server, "maps", 50, 1);
    let world = &server.world;
    // Which of the flood has begun, besides those that were told to end.
    let begun = |ended: &[usize]| {
        let mut all = (0..50).filter(|n| !ended.contains(n));
        all.find(|n| world.count(&format!("flood{n}")) > 0)
    };
    let mut ended = vec![0];
    world.tell("end0");
    let next = eventually("somebody is next", || {
        let is_other = world.count("other") > 0;
        is_other.then_some(None).or(begun(&ended).map(Some))
    });
    if let Some(n) = next {
        ended.push(n);
        world.tell(&format!("end{n}"));
    }
    world.wait_count("other", 1);
    assert_eq!(begun(&ended), None);
    world.tell("end");
    assert_eq!(status(other), 200);
    (0..50).for_each(|n| world.tell(&format!("end{n}")));
    for asking in flooding {
        assert_eq!(status(asking), 200);
    }
}

#[test]
fn a_client_and_a_project_beyond_their_limits_are_refused_at_once() {
    let server = Server::stub(
        "server.http_proxy = yes\nlimits.client_requests = 1\nlimits.project_requests = 2",
    );
    let refused = |client: &str, code: u16| {
        let path = path_of("MARK=refused");
        let reply = server.request("GET", &path, &[("X-Forwarded-For", client)], b"");
        assert_eq!(
            (reply.status, reply.header("retry-after")),
            (code, Some("1"))
        );
        assert!(
            reply.text().contains("ServiceException"),
            "{}",
            reply.text()
        );
    };
    let held = map(&server, "192.0.2.1", "DO=wait&FOR=go&MARK=held");
    server.world.wait_count("held", 1);
    refused("192.0.2.1", 429);
    let other = map(&server, "192.0.2.2", "DO=wait&FOR=go&MARK=held");
    server.world.wait_count("held", 2);
    refused("192.0.2.3", 503);
    server.world.tell("go");
    assert_eq!((status(held), status(other)), (200, 200));
    assert_eq!(server.world.count("refused"), 0);
    assert_eq!(status(map(&server, "192.0.2.1", "")), 200);
}

#[test]
fn a_client_that_asks_too_often_waits_and_others_do_not() {
    let server = Server::stub("server.http_proxy = yes\nlimits.client_rate = 1");
    let ask = |client: &str| {
        let path = path_of("DO=echo");
        server.request("GET", &path, &[("X-Forwarded-For", client)], b"")
    };
    let replies: Vec<_> = (0..40).map(|_| ask("192.0.2.1")).collect();
    let (served, refused): (Vec<_>, Vec<_>) = replies.iter().partition(|it| it.status == 200);
    assert!(
        served.len() >= 10 && !refused.is_empty(),
        "{}",
        served.len()
    );
    for reply in refused {
        assert_eq!(
            (reply.status, reply.header("retry-after")),
            (429, Some("1"))
        );
        assert!(
            reply.text().contains("ServiceException"),
            "{}",
            reply.text()
        );
    }
    assert_eq!(ask("192.0.2.2").status, 200);
}

/// Its deadline is far, and QGIS cannot stop.
#[test]
fn a_worker_that_nobody_waits_for_makes_way_for_those_who_wait() {
    let server = Server::stub(
        "server.workers = 1\nserver.timeout = 600\nzmq.timeout = 600000\nzmq.cancel_grace = 0.2",
    );
    let mut leaving = server.connect();
    http::send_get(&mut leaving, &path_of("DO=hang&MARK=hanging"));
    server.world.wait_count("hanging", 1);
    drop(leaving);
    eventually("the request is withdrawn", || {
        (server.status()["running"] == 0).then_some(())
    });
    // Nobody waits: the worker has its projects open and time to end.
    assert_eq!(server.workers().len(), 1);
    let hanging = server.workers();
    assert_eq!(status(map(&server, "192.0.2.1", "")), 200);
    assert_ne!(server.workers(), hanging);
}
