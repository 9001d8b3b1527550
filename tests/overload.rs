//! More than the server can do, or can be given: clients are refused at once or
//! served in time, nobody else notices, and memory stays flat.

mod common;

use std::collections::HashSet;
use std::net::TcpStream;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::client::{Came, Client};
use common::{MANAGED, Server, World, eventually, http, path_of, timed};
use nix::sys::socket::{setsockopt, sockopt::RcvBuf};

/// For a busy machine: answers are due at once, or at their deadline.
const PATIENCE: Duration = Duration::from_secs(5);

fn echo(tag: &str, more: &str) -> Vec<u8> {
    let query = format!("SERVICE=ECHO&REQUEST=Echo&MAP=city&TAG={tag}&SIZE=100{more}");
    format!("GET /ows/?{query} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {tag}\r\n\r\n")
        .into_bytes()
}

fn status(came: &Came) -> u16 {
    match came {
        Came::Whole { status, .. } => *status,
        other => panic!("{other:?}"),
    }
}

/// What ran, and what ran to its end.
fn ran(world: &World) -> (HashSet<String>, HashSet<String>) {
    let journal = world.journal();
    let with = |sign: char| {
        let lines = journal.iter().filter_map(|line| line.strip_prefix(sign));
        lines.map(str::to_owned).collect()
    };
    (with('+'), with('-'))
}

#[test]
fn of_500_requests_at_once_each_is_served_or_refused_in_time_and_none_runs_for_nobody() {
    let _alone = common::alone();
    const LIMIT: Duration = Duration::from_secs(6);
    let n_workers = 2;
    let server = Server::start(
        World::stub().with_echo(),
        "server.timeout = 6\nzmq.timeout = 6000\nzmq.maxqueue = 300\nzmq.cancel_grace = 0.1",
    )
    .ready();
    let at_once = Barrier::new(500);
    let ask = &|i: usize| {
        let tag = format!("t{i}x");
        at_once.wait();
        let start = Instant::now();
        let came = Client::new(server.address).ask(&echo(&tag, "&STALL=0.8"));
        (tag, status(&came), start.elapsed())
    };
    let answers: Vec<(String, u16, Duration)> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..500).map(|i| scope.spawn(move || ask(i))).collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    });
    let of = |wanted: u16| {
        answers
            .iter()
            .filter(move |(_, status, _)| *status == wanted)
    };
    let (n_served, n_refused, n_late) = (of(200).count(), of(503).count(), of(504).count());
    println!("{n_served} served, {n_refused} refused, {n_late} too late");
    assert_eq!(n_served + n_refused + n_late, 500);
    assert!(n_served >= 6 && n_refused >= 50 && n_late >= 150);
    for (tag, status, took) in &answers {
        let bound = match status {
            503 => PATIENCE,
            _ => LIMIT + PATIENCE,
        };
        assert!(*took < bound, "{tag} is a {status} after {took:?}");
        assert!(
            *status != 504 || *took >= LIMIT,
            "{tag} is a 504 after {took:?}"
        );
    }

    eventually("nothing runs", || {
        let now = server.status();
        (now["running"] == 0 && now["waiting"] == 0).then_some(())
    });
    // Whatever was queued before it has run when this has.
    server.wait_workers(n_workers);
    assert_eq!(server.act("DO=echo").status, 200);
    let (begun, ended) = ran(&server.world);
    let none_of = |status: u16, tags: &HashSet<String>| {
        of(status).filter(|(tag, ..)| tags.contains(tag)).count()
    };
    assert_eq!(none_of(503, &begun), 0, "refused, and run all the same");
    assert_eq!(none_of(504, &ended), 0, "run to the end for nobody");
    // They ran when their deadline came, and those that took their place had little left.
    assert!(none_of(504, &begun) * 10 < n_late, "begun for nobody");
    assert_eq!(none_of(200, &ended), n_served);
}

/// What `quantile` of them are below.
fn quantile(times: &mut [Duration], quantile: f64) -> Duration {
    times.sort();
    times[((times.len() - 1) as f64 * quantile) as usize]
}

/// How long 100 clients waited that together ask ten times as often as two workers can
/// answer: those who were served, and those who were refused.
fn overload(server: &Server, time: Duration) -> (Vec<Duration>, Vec<Duration>) {
    const N_CLIENTS: u32 = 100;
    // Two workers serve 40 a second, and those who are not in the queue ask 400 times.
    let pause = Duration::from_millis(190);
    let end = Instant::now() + time;
    let client = |i: u32| {
        let mut client = Client::new(server.address);
        let mut answers = Vec::new();
        // They come one after the other, and keep to their rate: that is the overload.
        std::thread::sleep(pause * i / N_CLIENTS);
        while Instant::now() < end {
            let asked = Instant::now();
            let came = client.ask(&echo("t", "&STALL=0.05"));
            answers.push((status(&came), asked.elapsed()));
            std::thread::sleep(pause.saturating_sub(asked.elapsed()));
        }
        answers
    };
    let client = &client;
    let answers: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..N_CLIENTS)
            .map(|i| scope.spawn(move || client(i)))
            .collect();
        clients
            .into_iter()
            .flat_map(|client| client.join().unwrap())
            .collect()
    });
    let of = |wanted: u16| -> Vec<Duration> {
        let answers = answers.iter().filter(|(status, _)| *status == wanted);
        answers.map(|(_, took)| *took).collect()
    };
    let (served, refused) = (of(200), of(503));
    assert_eq!(served.len() + refused.len(), answers.len());
    (served, refused)
}

/// The exact time of a refusal is for the bench; here it is far from any timeout.
#[test]
fn ten_times_more_than_can_be_served_is_refused_at_once_and_memory_stays_flat() {
    let _alone = common::alone();
    let server = Server::start(World::stub().with_echo(), "zmq.maxqueue = 20").ready();
    overload(&server, Duration::from_secs(1));
    let before = server.process.memory_kb();
    // Others who use the machine make it slower, never faster: the best of three counts.
    let rounds = (0..3).map(|_| {
        let (served, mut refused) = overload(&server, Duration::from_secs(3));
        let times = [0.5, 0.95].map(|share| quantile(&mut refused, share));
        println!(
            "{} served, {} refused, half and 95 % of them in {times:?}",
            served.len(),
            refused.len()
        );
        assert!(!served.is_empty(), "overload ends all work");
        (refused.len() > served.len() * 5, times)
    });
    let bound = [50, 100].map(Duration::from_millis);
    let is_fast = |(is_overload, times): &(bool, [Duration; 2])| {
        *is_overload && times[0] < bound[0] && times[1] < bound[1]
    };
    let rounds: Vec<_> = rounds.collect();
    assert!(rounds.iter().any(is_fast), "{rounds:?}");
    let grown = server.process.memory_kb().saturating_sub(before);
    assert!(grown < 8 << 10, "{grown} kB more");
}

/// A client as others are, all the time: how long its requests took.
fn probe(server: &Server, done: &AtomicBool) -> (Vec<Duration>, u64) {
    let mut times = Vec::new();
    let mut memory = 0;
    while !done.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let reply = server.act("DO=echo");
        assert_eq!(reply.status, 200, "{}", reply.text());
        times.push(asked.elapsed());
        memory = memory.max(server.process.memory_kb());
        // Some requests a second are a client, and no load of its own.
        std::thread::sleep(Duration::from_millis(100));
    }
    (times, memory)
}

/// A thousand connections of slowhttptest in one of its modes, for some seconds.
fn assert_available(mode: &[&str], path: &str) {
    let _alone = common::alone();
    // The first of them are still open when the last one comes.
    let patience = "server.header_timeout = 60\nserver.body_timeout = 60";
    let server = Server::start(World::stub().with_echo(), patience).ready();
    // Each worker has served before.
    (0..20).for_each(|_| assert_eq!(server.act("DO=echo").status, 200));
    let idle = server.process.memory_kb();
    // On a busy machine it takes them longer to be a thousand.
    let n_open = |seconds| attack(&server, idle, mode, path, seconds);
    let mut all = [8, 40].into_iter().map(n_open);
    assert!(all.any(|n| n > 900), "too few slow connections were open");
}

/// How many of them were open at the same time; all others were served meanwhile.
fn attack(server: &Server, idle: u64, mode: &[&str], path: &str, seconds: usize) -> i64 {
    let report = server.world.path("report");
    let done = AtomicBool::new(false);
    let (said, (mut times, memory)) = std::thread::scope(|scope| {
        let probing = scope.spawn(|| probe(server, &done));
        let said = Command::new("slowhttptest")
            .args(["-c", "1000", "-r", "500", "-p", "3"])
            .args(["-l", &seconds.to_string(), "-g", "-o"])
            .arg(&report)
            .args(mode)
            .args(["-u", &server.url(path)])
            .output()
            .expect("slowhttptest is installed (Debian package slowhttptest)");
        done.store(true, Ordering::Relaxed);
        (said, probing.join().unwrap())
    });
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let report = std::fs::read_to_string(report.with_extension("csv")).expect("a report");
    // Seconds, closed, pending, connected, and how many of them when it is available.
    let rows: Vec<Vec<i64>> = report
        .lines()
        .skip(1)
        .map(|line| {
            line.split(',')
                .map(|cell| cell.trim().parse().expect("a number"))
                .collect()
        })
        .collect();
    let n_open = rows.iter().map(|row| row[3]).max().unwrap_or(0);
    let (n_probes, slowest) = (times.len(), quantile(&mut times, 1.0));
    let grown = memory.saturating_sub(idle);
    println!(
        "{mode:?}: {n_open} open, {n_probes} probes, the slowest took {slowest:?}, {grown} kB more\n{said}"
    );
    let n_unavailable = rows.iter().filter(|row| row[4] == 0).count();
    assert_eq!(n_unavailable, 0, "it was not available\n{report}");
    // Two a second at the least: whoever asks one thing after the other gets on.
    assert!(n_probes >= 2 * seconds, "only {n_probes} in {seconds} s");
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    assert!(grown < 64 << 10, "{grown} kB more");
    n_open
}

#[test]
fn a_thousand_clients_that_never_end_their_heads_disturb_nobody() {
    assert_available(&["-H", "-i", "2"], &path_of("DO=echo"));
}

#[test]
fn a_thousand_clients_that_never_end_their_bodies_disturb_nobody() {
    assert_available(
        &["-B", "-i", "2", "-s", "100000", "-t", "POST"],
        &path_of("DO=echo"),
    );
}

/// Each asks for a large answer and takes nothing of it, for now.
#[test]
fn large_answers_that_nobody_takes_have_a_bound_and_others_are_served() {
    const N: usize = 80;
    let _alone = common::alone();
    let server = Server::start(World::stub().with_echo(), "server.reply_memory = 16M").ready();
    (0..20).for_each(|_| assert_eq!(server.act("DO=echo").status, 200));
    let idle = server.process.memory_kb();
    let clients: Vec<TcpStream> = (0..N).map(|i| ask_and_wait(&server, i)).collect();
    eventually("all are made", || {
        let ended = ran(&server.world).1;
        (0..N)
            .all(|i| ended.contains(&format!("t{i}x")))
            .then_some(())
    });
    assert_eq!(server.act("DO=echo").status, 200);
    let grown = server.process.memory_kb().saturating_sub(idle);
    println!("{grown} kB more");
    // Each connection has a part of its own besides.
    assert!(grown < (16 << 10) + 1000 * N as u64, "{grown} kB more");
    drop(clients);
}

/// Two of them together have more than there is room for, one alone has not.
#[test]
fn of_clients_that_take_nothing_the_one_that_began_it_is_cut_off_and_the_others_go_on() {
    // The kernels take some of it.
    const N: usize = 1000;
    let settings = "server.reply_memory = 5M\nserver.timeout = 60";
    let server = Server::stub(&format!("{settings}\n{MANAGED}"));
    let ask = |name: &str| {
        let mut client = http::connect(server.address);
        let stream = format!("DO=stream&N={N}&SIZE=50000&TICK={name}");
        http::send_get(&mut client, &path_of(&stream));
        client
    };
    let mut first = ask("first");
    stands_still(&server, "first");
    let mut second = ask("second");
    let line = server.process.log.wait_line("server.reply_memory");
    assert!(
        line.contains("WARN") && line.contains("request_id"),
        "{line}"
    );
    stands_still(&server, "second");
    let (_, took) = timed(|| assert_eq!(server.act("DO=echo").status, 200));
    assert!(took < PATIENCE, "the worker of the first is free: {took:?}");
    let metrics = server.managed("/metrics").text();
    let counted = "qgisserver_failures_total{reason=\"reader_too_slow\"} 1";
    assert!(metrics.contains(counted), "{metrics}");

    let (all, was_reset) = http::read_all(&mut second);
    assert!(!was_reset && all.ends_with(b"\r\n0\r\n\r\n") && all.len() > N * 50_000);
    let (part, _) = http::read_all(&mut first);
    assert!(part.starts_with(b"HTTP/1.1 200 ") && part.len() < all.len());
    assert!(!part.ends_with(b"\r\n0\r\n\r\n"), "it looks complete");
    server.process.log.wait_line("reply cut off");
}

/// The worker has to wait for its client.
fn stands_still(server: &Server, name: &str) {
    let (mut sent, mut since) = (0, Instant::now());
    eventually("a worker has to wait", || {
        let now = server.world.count(name);
        if now != sent {
            (sent, since) = (now, Instant::now());
        }
        (sent > 0 && since.elapsed() > Duration::from_millis(500)).then_some(())
    });
}

const LARGE: usize = 4_000_000;

/// The kernels take little of the answer.
fn ask_and_wait(server: &Server, i: usize) -> TcpStream {
    let mut client = http::connect(server.address);
    setsockopt(&client, RcvBuf, &4096).unwrap();
    let query = format!("SERVICE=ECHO&REQUEST=Echo&MAP=city&TAG=t{i}x&SIZE={LARGE}");
    http::send_get(&mut client, &format!("/ows/?{query}"));
    client
}

/// Each asks for a map and hardly takes it.
#[test]
fn a_thousand_clients_that_hardly_read_disturb_nobody() {
    let map = "/ows/?SERVICE=ECHO&REQUEST=Echo&MAP=city&TAG=t&SIZE=60000";
    assert_available(
        &[
            "-X", "-w", "10", "-y", "20", "-n", "2", "-z", "5", "-k", "1",
        ],
        map,
    );
}
