//! 100,000 features on their way from QGIS to a client, fast and slow.

mod common;

use std::io::Read;
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use common::http::{read, read_all, send_get};
use common::process::succeed;
use common::{Server, World, eventually, source, timed};

const N_FEATURES: usize = 100_000;
const ALL: &str = "/ows/?MAP=big&SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=points&OUTPUTFORMAT=GeoJSON";

/// What the criterion of the project allows server and worker together.
const MEMORY_KB: u64 = 32 << 10;

fn big(settings: &str) -> Server {
    let world = World::real();
    succeed(
        Command::new("/usr/bin/python3")
            .arg(source("tests/data/make_big.py"))
            .args([world.projects(), N_FEATURES.to_string().into()])
            .env("QT_QPA_PLATFORM", "offscreen"),
    );
    let server = Server::start(world, &format!("server.timeout = 30\n{settings}")).ready();
    // The project is loaded, and the buffers have been used once.
    assert_eq!(server.get(&format!("{ALL}&MAXFEATURES=5000")).status, 200);
    server
}

/// The body without the framing of its chunks.
fn body(reply: &[u8]) -> Vec<u8> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let head = reply
        .windows(4)
        .position(|it| it == b"\r\n\r\n")
        .expect("a head")
        + 4;
    assert!(
        text(&reply[..head])
            .to_lowercase()
            .contains("transfer-encoding: chunked")
    );
    let (mut body, mut rest) = (Vec::new(), &reply[head..]);
    loop {
        let line = rest
            .windows(2)
            .position(|it| it == b"\r\n")
            .expect("a chunk");
        let size = usize::from_str_radix(&text(&rest[..line]), 16).expect("its size");
        rest = &rest[line + 2..];
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

fn assert_complete(reply: &[u8]) {
    let body = body(reply);
    let json: serde_json::Value = serde_json::from_slice(&body).expect("GeoJSON");
    assert_eq!(json["features"].as_array().unwrap().len(), N_FEATURES);
    assert!(body.len() > 50_000_000, "{}", body.len());
}

/// Everything that comes, and the highest memory on the way.
fn read_watching(server: &Server, client: &mut TcpStream) -> (Vec<u8>, u64) {
    let (mut all, mut peak) = (Vec::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    let mut looked = Instant::now();
    loop {
        let n = read(client, &mut buffer).unwrap();
        if n == 0 {
            return (all, peak);
        }
        all.extend_from_slice(&buffer[..n]);
        if looked.elapsed() > Duration::from_millis(50) {
            peak = peak.max(server.process.memory_kb());
            looked = Instant::now();
        }
    }
}

#[test]
fn features_leave_while_qgis_still_makes_them_and_memory_stays_flat() {
    let server = big("");
    let idle = server.process.memory_kb();

    let mut fast = server.connect();
    let start = Instant::now();
    send_get(&mut fast, ALL);
    fast.read_exact(&mut [0; 1]).unwrap();
    let first = start.elapsed();
    let (rest, peak) = read_watching(&server, &mut fast);
    let whole = start.elapsed();
    assert_complete(&[&b"H"[..], &rest].concat());
    assert!(first * 4 < whole, "first byte after {first:?} of {whole:?}");
    assert!(peak < idle + MEMORY_KB, "{idle} kB idle, {peak} kB at most");

    // A client that reads a little and then stops: QGIS has to wait for it.
    let mut slow = server.connect();
    send_get(&mut slow, ALL);
    slow.read_exact(&mut [0; 1]).unwrap();
    let mut seen = (server.process.memory_kb(), Instant::now());
    let mut peak = seen.0;
    eventually("memory grows no more", || {
        let now = server.process.memory_kb();
        peak = peak.max(now);
        if now.abs_diff(seen.0) > 64 {
            seen = (now, Instant::now());
        }
        (seen.1.elapsed() > Duration::from_secs(1)).then_some(())
    });
    assert!(
        peak < idle + MEMORY_KB,
        "{idle} kB idle, {peak} kB while a client does not read"
    );
    let (rest, was_reset) = read_all(&mut slow);
    assert!(!was_reset);
    assert_complete(&[&b"H"[..], &rest].concat());
}

/// QGIS stops at the next feature: the worker need not be killed.
#[test]
fn a_client_that_leaves_ends_its_stream_and_costs_no_worker() {
    // Were it killed instead, that would be seen.
    let server = big("zmq.cancel_grace = 15");
    let (whole, took_whole) = timed(|| server.get(ALL));
    assert_eq!(whole.status, 200);
    let before = server.workers();
    for _ in 0..3 {
        let mut client = server.connect();
        send_get(&mut client, ALL);
        client.read_exact(&mut [0; 100_000]).unwrap();
        drop(client);
        eventually("nothing runs", || {
            (server.status()["running"] == 0).then_some(())
        });
    }
    let (few, took) = timed(|| server.get(&format!("{ALL}&MAXFEATURES=10")));
    assert_eq!(few.status, 200);
    // It did not wait for the rest of the last one, which is nearly all.
    assert!(took * 2 < took_whole, "{took:?} of {took_whole:?}");
    assert_eq!(server.workers(), before);
}
