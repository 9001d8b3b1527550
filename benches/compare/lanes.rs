//! What small maps notice of others' slow requests and prints.
//!
//! The long ones only wait, so that no processor is missed; all come from one
//! address, as if behind a proxy, so lanes are all that helps.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::client::Client;
use crate::peers::{self, Peer, Place, Server};
use crate::stats::{Demands, median, ms, percentile};

const WORKERS: usize = 2;
const ROUNDS: usize = 3;
const MAPS: usize = 300;
const SLOW: usize = 8;
const PRINTS: usize = 2;
/// Of the long requests, so many are served at the least while maps are measured.
const LONG: usize = 3;

const SMALL: &str = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=countries&STYLES=\
                     &CRS=EPSG:4326&BBOX=35,0,55,20&WIDTH=256&HEIGHT=256&FORMAT=image/png";
const SLOW_QUERY: &str = "SERVICE=NOTHING&REQUEST=Nothing&LAYERS=slow&SECONDS=2";
const PRINT: &str = "SERVICE=NOTHING&REQUEST=GetPrint&SECONDS=2";

pub fn compare(place: &Place, demands: &mut Demands) {
    let rounds: Vec<Round> = (0..ROUNDS).map(|_| round(place)).collect();
    let over = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure).collect());
    println!(
        "\n{MAPS} GetMap 256x256 or more of one client, {WORKERS} workers of which 1 is reserved, {ROUNDS} rounds\n"
    );
    println!(
        "| meanwhile | 95th percentile, ms | maps | slow requests and prints served | refused |"
    );
    println!("|---|---|---|---|---|");
    println!("| nothing | {:.2} | {MAPS} | | |", over(|it| it.alone));
    println!(
        "| {SLOW} clients with requests of 2 s, {PRINTS} with prints | {:.2} | {:.0} | {:.0} | {:.0} |",
        over(|it| it.beside),
        over(|it| it.maps as f64),
        over(|it| it.served as f64),
        over(|it| it.refused as f64),
    );
    demands.at_most(
        "small maps beside slow ones and prints, p95 loaded : unloaded",
        1.5,
        over(|it| it.beside / it.alone),
    );
}

/// The 95th percentiles of maps, and what ran beside them.
struct Round {
    alone: f64,
    beside: f64,
    maps: usize,
    served: usize,
    refused: usize,
}

fn round(place: &Place) -> Round {
    let server = Server::start(place, WORKERS);
    let peer = server.serving("world");
    thread::scope(|scope| {
        // Every worker has the project, and what is slow is known to be.
        for query in [SMALL, SMALL, SLOW_QUERY, SLOW_QUERY] {
            scope.spawn(|| peer.connect().expect(&peer.target(query)));
        }
    });
    let mut client = peer.connect();
    let alone = maps(&mut client, &peer, || true);
    let long = Long::start(&peer);
    // Their lane is full: one has run while the others waited.
    peers::until("a long request is served", || {
        (long.n_served() > 0).then_some(())
    });
    let (before, refused) = (long.n_served(), long.n_refused());
    let beside = maps(&mut client, &peer, || long.n_served() >= before + LONG);
    let round = Round {
        alone: ms(percentile(&alone, 95)),
        beside: ms(percentile(&beside, 95)),
        maps: beside.len(),
        served: long.n_served() - before,
        refused: long.n_refused() - refused,
    };
    drop(server);
    long.end();
    round
}

/// What each of the maps took that were asked for one after the other: enough of
/// them, and until it `is_enough`.
fn maps(client: &mut Client, peer: &Peer, is_enough: impl Fn() -> bool) -> Vec<Duration> {
    let target = peer.target(SMALL);
    let mut taken = Vec::new();
    while taken.len() < MAPS || !is_enough() {
        taken.push(client.expect(&target).total);
        assert!(taken.len() < 50 * MAPS, "maps starve what takes long");
    }
    taken
}

/// Clients that ask for what takes long, again and again until the server is gone.
struct Long {
    /// Replies: 200, and any other.
    counts: Arc<[AtomicUsize; 2]>,
    clients: Vec<JoinHandle<()>>,
}

impl Long {
    fn start(peer: &Peer) -> Self {
        let counts = Arc::<[AtomicUsize; 2]>::default();
        let slow = [SLOW_QUERY].repeat(SLOW).into_iter();
        let queries = slow.chain([PRINT].repeat(PRINTS));
        let clients = queries.map(|query| {
            let (mut client, target) = (peer.connect(), peer.target(query));
            let counts = counts.clone();
            thread::spawn(move || {
                while let Ok(reply) = client.get(&target) {
                    counts[usize::from(reply.status != 200)].fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        let clients = clients.collect();
        Self { counts, clients }
    }

    fn n_served(&self) -> usize {
        self.counts[0].load(Ordering::Relaxed)
    }

    fn n_refused(&self) -> usize {
        self.counts[1].load(Ordering::Relaxed)
    }

    fn end(self) {
        self.clients.into_iter().for_each(|it| drop(it.join()));
    }
}
