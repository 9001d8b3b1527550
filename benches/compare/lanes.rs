//! What small maps notice of others' slow requests and prints.
//!
//! The long ones only wait, so that no processor is missed; all come from one
//! address, as if behind a proxy, so lanes are all that helps.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::client::Client;
use crate::peers::{Peer, Place, Server};
use crate::stats::{Demands, median, ms, percentile};

const WORKERS: usize = 2;
const ROUNDS: usize = 3;
const MAPS: usize = 300;
const SLOW: usize = 8;
const PRINTS: usize = 2;

const SMALL: &str = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=countries&STYLES=\
                     &CRS=EPSG:4326&BBOX=35,0,55,20&WIDTH=256&HEIGHT=256&FORMAT=image/png";
const SLOW_QUERY: &str = "SERVICE=NOTHING&REQUEST=Nothing&LAYERS=slow&SECONDS=2";
const PRINT: &str = "SERVICE=NOTHING&REQUEST=GetPrint&SECONDS=2";

pub fn compare(place: &Place, demands: &mut Demands) {
    let rounds: Vec<[f64; 2]> = (0..ROUNDS).map(|_| round(place)).collect();
    let over = |figure: fn(&[f64; 2]) -> f64| median(rounds.iter().map(figure).collect());
    println!(
        "\n{MAPS} GetMap 256x256 of one client, {WORKERS} workers of which 1 is reserved, {ROUNDS} rounds\n"
    );
    println!("| meanwhile | 95th percentile, ms |\n|---|---|");
    println!("| nothing | {:.2} |", over(|[alone, _]| *alone));
    println!(
        "| {SLOW} clients with requests of 2 s, {PRINTS} with prints | {:.2} |",
        over(|[_, beside]| *beside)
    );
    demands.at_most(
        "small maps beside slow ones and prints, p95 loaded : unloaded",
        1.5,
        over(|[alone, beside]| beside / alone),
    );
}

fn round(place: &Place) -> [f64; 2] {
    let server = Server::start(place, WORKERS);
    let peer = server.serving("world");
    thread::scope(|scope| {
        // Every worker has the project, and what is slow is known to be.
        for query in [SMALL, SMALL, SLOW_QUERY, SLOW_QUERY] {
            scope.spawn(|| peer.connect().expect(&peer.target(query)));
        }
    });
    let mut client = peer.connect();
    let alone = p95(&mut client, &peer);
    let long: Vec<JoinHandle<()>> = [SLOW_QUERY]
        .repeat(SLOW)
        .into_iter()
        .chain([PRINT].repeat(PRINTS))
        .map(|query| hold(&peer, query))
        .collect();
    thread::sleep(Duration::from_millis(500));
    let beside = p95(&mut client, &peer);
    drop(server);
    long.into_iter().for_each(|it| drop(it.join()));
    [alone, beside]
}

fn p95(client: &mut Client, peer: &Peer) -> f64 {
    let target = peer.target(SMALL);
    let taken: Vec<Duration> = (0..MAPS).map(|_| client.expect(&target).total).collect();
    ms(percentile(&taken, 95))
}

/// A client that asks again and again until the server is gone.
fn hold(peer: &Peer, query: &str) -> JoinHandle<()> {
    let (mut client, target) = (peer.connect(), peer.target(query));
    thread::spawn(move || while client.get(&target).is_ok() {})
}
