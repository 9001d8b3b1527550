//! How fast the same requests are answered, by one client and by many.
//!
//! Each round asks one after the other, so that whatever else the machine does
//! hits all alike; what is compared is the median of the rounds' ratios.

use std::time::{Duration, Instant};

use crate::client::Client;
use crate::memory;
use crate::peers::{FastCgi, InProcess, Peer, Place, Server};
use crate::stats::{Demands, median, ms, percentile};

const WORKERS: usize = 2;
const CLIENTS: usize = 16;
const ROUNDS: usize = 15;
const CROWD_ROUNDS: usize = 5;
const CROWD_TIME: Duration = Duration::from_secs(2);

/// A request without MAP.
struct Operation {
    name: &'static str,
    query: &'static str,
    /// Calls in each round of one client.
    count: usize,
    /// Asked by many clients, too.
    crowd: bool,
}

const OPERATIONS: [Operation; 6] = [
    Operation {
        name: "does nothing",
        query: "SERVICE=NOTHING&REQUEST=Nothing",
        count: 200,
        crowd: true,
    },
    Operation {
        name: "GetCapabilities",
        query: "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities",
        count: 50,
        crowd: true,
    },
    Operation {
        name: "GetMap 256x256",
        query: "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=countries&STYLES=&CRS=EPSG:4326\
                &BBOX=35,0,55,20&WIDTH=256&HEIGHT=256&FORMAT=image/png",
        count: 10,
        crowd: true,
    },
    Operation {
        name: "GetMap 2000x1000",
        query: "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=countries&STYLES=&CRS=EPSG:4326\
                &BBOX=-90,-180,90,180&WIDTH=2000&HEIGHT=1000&FORMAT=image/png",
        count: 1,
        crowd: false,
    },
    Operation {
        name: "GetFeature GML",
        query: "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=countries",
        count: 3,
        crowd: false,
    },
    Operation {
        name: "GetFeature GeoJSON",
        query: "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=countries&OUTPUTFORMAT=GeoJSON",
        count: 5,
        crowd: true,
    },
];

pub fn compare(place: &Place, single: bool, crowd: bool, demands: &mut Demands) {
    if single {
        // One process each: a second one that takes turns has colder caches.
        let mut alone = InProcess::start(place, "world");
        with_both(place, 1, |theirs, ours| {
            one_client(&mut alone, theirs, ours, demands);
        });
    }
    if crowd {
        with_both(place, WORKERS, |theirs, ours| {
            many_clients(theirs, ours, demands)
        });
    }
}

fn with_both(place: &Place, workers: usize, measure: impl FnOnce(&Peer, &Peer)) {
    let fastcgi = FastCgi::start(place, workers);
    let server = Server::start(place, workers);
    let (theirs, ours) = (fastcgi.serving(place, "world"), server.serving("world"));
    warm(&theirs);
    warm(&ours);
    measure(&theirs, &ours);
}

/// Every process has served every operation before anything counts.
fn warm(peer: &Peer) {
    for operation in &OPERATIONS {
        std::thread::scope(|scope| {
            for _ in 0..2 * WORKERS {
                scope.spawn(|| series(&mut peer.connect(), &peer.target(operation.query), 3));
            }
        });
    }
}

fn one_client(alone: &mut InProcess, theirs: &Peer, ours: &Peer, demands: &mut Demands) {
    println!(
        "\nOne keep-alive client, 1 process each, {ROUNDS} rounds, milliseconds (median / 95th percentile)\n"
    );
    println!(
        "| operation | bytes | in-process | nginx + FastCGI | qgisserver | ours − in-process | ours : in-process | ours : FastCGI |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let (mut their_client, mut our_client) = (theirs.connect(), ours.connect());
    for Operation {
        name, query, count, ..
    } in &OPERATIONS
    {
        let (bytes, _) = alone.calls(*count, query);
        let rounds: Vec<Round> = (0..ROUNDS)
            .map(|_| {
                Round([
                    alone.calls(*count, query).1,
                    series(&mut their_client, &theirs.target(query), *count),
                    series(&mut our_client, &ours.target(query), *count),
                ])
            })
            .collect();
        let [inside, fastcgi, served] = [0, 1, 2].map(|who| summary(&rounds, who));
        let over = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure).collect());
        let added = over(|round| round.median(2) - round.median(0));
        let (slower, faster) = (
            over(|round| round.median(2) / round.median(0)),
            over(|round| round.median(2) / round.median(1)),
        );
        println!(
            "| {name} | {bytes} | {inside} | {fastcgi} | {served} | {added:+.3} | {slower:.3} | {faster:.3} |"
        );
        if name.starts_with("GetMap") || name.starts_with("GetFeature") {
            demands.at_most(&format!("{name}, ours : in-process"), 1.05, slower);
        }
        if *name == "does nothing" {
            demands.at_most("does nothing, ours − in-process, ms", 0.3, added);
        }
    }
}

/// What in-process QGIS, FastCGI and qgisserver took in one round.
struct Round([Vec<Duration>; 3]);

impl Round {
    fn median(&self, who: usize) -> f64 {
        ms(percentile(&self.0[who], 50))
    }
}

fn summary(rounds: &[Round], who: usize) -> String {
    let all: Vec<Duration> = rounds
        .iter()
        .flat_map(|round| round.0[who].iter().copied())
        .collect();
    format!(
        "{:.3} / {:.3}",
        ms(percentile(&all, 50)),
        ms(percentile(&all, 95))
    )
}

fn series(client: &mut Client, target: &str, count: usize) -> Vec<Duration> {
    (0..count).map(|_| client.expect(target).total).collect()
}

fn many_clients(theirs: &Peer, ours: &Peer, demands: &mut Demands) {
    println!(
        "\n{CLIENTS} keep-alive clients, {WORKERS} processes, {CROWD_ROUNDS} rounds of {CROWD_TIME:?}\n"
    );
    println!(
        "| operation | nginx + FastCGI /s | qgisserver /s | ours : FastCGI | p95 ms | ours | CPU ms per reply | ours |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for Operation { name, query, .. } in OPERATIONS.iter().filter(|operation| operation.crowd) {
        let rounds: Vec<_> = (0..CROWD_ROUNDS)
            .map(|_| (crowd(theirs, query), crowd(ours, query)))
            .collect();
        let over = |figure: fn(&(Load, Load)) -> f64| median(rounds.iter().map(figure).collect());
        let ratio = over(|(theirs, ours)| ours.rate / theirs.rate);
        println!(
            "| {name} | {:.0} | {:.0} | {ratio:.2} | {:.2} | {:.2} | {:.3} | {:.3} |",
            over(|(theirs, _)| theirs.rate),
            over(|(_, ours)| ours.rate),
            over(|(theirs, _)| theirs.p95),
            over(|(_, ours)| ours.p95),
            over(|(theirs, _)| theirs.cpu),
            over(|(_, ours)| ours.cpu),
        );
        demands.at_least(
            &format!("{name}, {CLIENTS} clients, rate ours : FastCGI"),
            1.0,
            ratio,
        );
    }
}

struct Load {
    rate: f64,
    p95: f64,
    /// Milliseconds of processor per reply: what the rate depends on when others
    /// use the machine, too.
    cpu: f64,
}

fn crowd(peer: &Peer, query: &str) -> Load {
    let target = peer.target(query);
    let spent = memory::cpu(&peer.pids);
    let began = Instant::now();
    let taken: Vec<Duration> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| scope.spawn(|| busy(peer, &target, began)))
            .collect();
        clients
            .into_iter()
            .flat_map(|client| client.join().expect("every reply is a 200"))
            .collect()
    });
    Load {
        rate: taken.len() as f64 / began.elapsed().as_secs_f64(),
        p95: ms(percentile(&taken, 95)),
        cpu: ms(memory::cpu(&peer.pids) - spent) / taken.len() as f64,
    }
}

fn busy(peer: &Peer, target: &str, began: Instant) -> Vec<Duration> {
    let mut client = peer.connect();
    let mut taken = Vec::new();
    while began.elapsed() < CROWD_TIME {
        taken.push(client.expect(target).total);
    }
    taken
}
