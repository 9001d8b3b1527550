//! In-process QGIS, nginx + FastCGI and qgisserver, side by side in one run.
//!
//! Each round asks all of them the same, one after the other, so that whatever
//! else the machine does hits all alike; medians of rounds are compared. Runs
//! on loopback, ends by itself, leaves nothing behind.
//!
//! `cargo bench --bench compare -- [part]...` with parts out of `single`,
//! `crowd`, `start`, `stream` and `death`; without, all.

mod client;
mod memory;
mod peers;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use client::{Client, Reply};
use peers::{FastCgi, InProcess, Place, Server};

const WORKERS: usize = 2;
const CLIENTS: usize = 16;
const ROUNDS: usize = 15;

/// Name, calls in each round, query without MAP.
const OPERATIONS: [(&str, usize, &str); 6] = [
    ("does nothing", 200, "SERVICE=NOTHING&REQUEST=Nothing"),
    (
        "GetCapabilities",
        50,
        "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities",
    ),
    ("GetMap 256x256", 10, GETMAP),
    (
        "GetMap 2000x1000",
        1,
        "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=land,countries&STYLES=&CRS=EPSG:4326\
         &BBOX=-90,-180,90,180&WIDTH=2000&HEIGHT=1000&FORMAT=image/png",
    ),
    (
        "GetFeature GML",
        5,
        "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=countries&MAXFEATURES=20",
    ),
    (
        "GetFeature GeoJSON",
        5,
        "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=countries&MAXFEATURES=20&OUTPUTFORMAT=GeoJSON",
    ),
];

const GETMAP: &str = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=countries&STYLES=&CRS=EPSG:4326\
                      &BBOX=35,0,55,20&WIDTH=256&HEIGHT=256&FORMAT=image/png";

const MANY: &str =
    "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=many&OUTPUTFORMAT=GeoJSON";

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|name| name == part);
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let place = prepare(scratch.path());
    if wants("single") || wants("crowd") {
        side_by_side(&place, wants("single"), wants("crowd"));
    }
    if wants("start") {
        start(&place);
    }
    if wants("stream") {
        stream(&place);
    }
    if wants("death") {
        death(&place);
    }
}

/// The example projects and one with many features.
fn prepare(scratch: &Path) -> Place {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = Place {
        scratch: scratch.to_owned(),
        projects: scratch.join("projects"),
        plugins: source.join("benches/compare/plugins"),
    };
    copy(&source.join("examples/projects"), &place.projects);
    let written = place
        .command(peers::PYTHON)
        .arg(source.join("benches/compare/many.py"))
        .arg(place.project("many"))
        .stderr(std::process::Stdio::null())
        .status();
    assert!(
        written.expect("python3 is installed").success(),
        "QGIS writes a project"
    );
    place
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("scratch is writable");
    for entry in fs::read_dir(from)
        .expect("the examples are there")
        .flatten()
    {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("scratch is writable")),
        }
    }
}

fn side_by_side(place: &Place, single: bool, crowd: bool) {
    let mut alone = InProcess::start(place, "world");
    let fastcgi = FastCgi::start(place, WORKERS);
    let server = Server::start(place, WORKERS);
    let ours = Peer {
        address: server.address,
        path: "/ows/",
        map: "world".into(),
    };
    let theirs = Peer {
        address: fastcgi.address,
        path: "/",
        map: place.project("world").display().to_string(),
    };
    warm(&ours);
    warm(&theirs);
    if single {
        one_client(&mut alone, &theirs, &ours);
    }
    if crowd {
        many_clients(&theirs, &ours);
    }
}

/// Where a server is, and how it calls the project.
struct Peer {
    address: SocketAddr,
    path: &'static str,
    map: String,
}

impl Peer {
    fn target(&self, query: &str) -> String {
        format!("{}?MAP={}&{query}", self.path, self.map)
    }

    fn connect(&self) -> Client {
        Client::connect(self.address).expect("the server listens")
    }
}

fn get(client: &mut Client, target: &str) -> Reply {
    let reply = client.get(target).expect("the server answers");
    assert_eq!(
        reply.status,
        200,
        "{target}: {}",
        String::from_utf8_lossy(&reply.start)
    );
    reply
}

/// Every process has served every operation before anything counts.
fn warm(peer: &Peer) {
    for (_, _, query) in OPERATIONS {
        std::thread::scope(|scope| {
            for _ in 0..2 * WORKERS {
                scope.spawn(|| {
                    let mut client = peer.connect();
                    (0..3).for_each(|_| drop(get(&mut client, &peer.target(query))));
                });
            }
        });
    }
}

fn one_client(alone: &mut InProcess, theirs: &Peer, ours: &Peer) {
    println!("\nOne keep-alive client, {ROUNDS} rounds, milliseconds (median / 95th percentile)\n");
    println!(
        "| operation | bytes | in-process | nginx + FastCGI | qgisserver | ours − in-process | ours : in-process | ours : FastCGI |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let (mut a_client, mut b_client) = (theirs.connect(), ours.connect());
    for (name, count, query) in OPERATIONS {
        alone.calls(count, query);
        let mut all = [const { Vec::<Duration>::new() }; 3];
        let mut medians = Vec::new();
        let mut bytes = 0;
        for _ in 0..ROUNDS {
            let (size, inside) = alone.calls(count, query);
            bytes = size;
            let round = [
                inside,
                series(&mut a_client, theirs, count, query),
                series(&mut b_client, ours, count, query),
            ];
            medians.push(round.each_ref().map(|series| ms(percentile(series, 50))));
            all.iter_mut()
                .zip(round)
                .for_each(|(all, round)| all.extend(round));
        }
        let [inside, fastcgi, served] = all.each_ref().map(|series| {
            format!(
                "{:.3} / {:.3}",
                ms(percentile(series, 50)),
                ms(percentile(series, 95))
            )
        });
        let over = |pick: fn(&[f64; 3]) -> f64| median(medians.iter().map(pick).collect());
        println!(
            "| {name} | {bytes} | {inside} | {fastcgi} | {served} | {:+.3} | {:.3} | {:.3} |",
            over(|m| m[2] - m[0]),
            over(|m| m[2] / m[0]),
            over(|m| m[2] / m[1]),
        );
    }
}

fn series(client: &mut Client, peer: &Peer, count: usize, query: &str) -> Vec<Duration> {
    let target = peer.target(query);
    (0..count).map(|_| get(client, &target).total).collect()
}

fn many_clients(theirs: &Peer, ours: &Peer) {
    println!(
        "\n{CLIENTS} keep-alive clients, {WORKERS} processes, 5 rounds of 2 s, replies per second\n"
    );
    println!(
        "| operation | nginx + FastCGI | qgisserver | ours : FastCGI | p95 ms FastCGI | p95 ms ours |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, _, query) in [OPERATIONS[0], OPERATIONS[1], OPERATIONS[2], OPERATIONS[5]] {
        let rounds: Vec<_> = (0..5)
            .map(|_| (crowd(theirs, query), crowd(ours, query)))
            .collect();
        let of = |pick: fn(&(Load, Load)) -> f64| median(rounds.iter().map(pick).collect());
        println!(
            "| {name} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} |",
            of(|r| r.0.rate),
            of(|r| r.1.rate),
            of(|r| r.1.rate / r.0.rate),
            of(|r| r.0.p95),
            of(|r| r.1.p95),
        );
    }
}

struct Load {
    rate: f64,
    p95: f64,
}

fn crowd(peer: &Peer, query: &str) -> Load {
    let target = peer.target(query);
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
    }
}

fn busy(peer: &Peer, target: &str, began: Instant) -> Vec<Duration> {
    let mut client = peer.connect();
    let mut taken = Vec::new();
    while began.elapsed() < Duration::from_secs(2) {
        taken.push(get(&mut client, target).total);
    }
    taken
}

fn start(place: &Place) {
    println!(
        "\nStart: from exec to the first GetCapabilities answered, {WORKERS} workers, 7 times\n"
    );
    let mut taken = Vec::new();
    let mut idle = Vec::new();
    for _ in 0..7 {
        let server = Server::start(place, WORKERS);
        let peer = Peer {
            address: server.address,
            path: "/ows/",
            map: "world".into(),
        };
        let target = peer.target(OPERATIONS[1].2);
        peers::until("a first answer", || {
            let reply = Client::connect(peer.address).ok()?.get(&target).ok()?;
            (reply.status == 200).then_some(())
        });
        taken.push(ms(server.started.elapsed()));
        idle.push(memory::resident(server.pid()) as f64 / 1024.0);
    }
    println!(
        "- first GetCapabilities: median {:.0} ms, worst {:.0} ms",
        median(taken.clone()),
        worst(&taken)
    );
    println!(
        "- the server process is resident with {:.1} MB (worst {:.1})",
        median(idle.clone()),
        worst(&idle)
    );
}

fn stream(place: &Place) {
    println!(
        "\nGetFeature, 100,000 features of GeoJSON, 1 worker; memory is server + pool above idle\n"
    );
    println!("| server | reader | first byte ms | total ms | bytes | peak MB above idle |");
    println!("|---|---|---|---|---|---|");
    let fastcgi = FastCgi::start(place, 1);
    let theirs = Peer {
        address: fastcgi.address,
        path: "/",
        map: place.project("many").display().to_string(),
    };
    let server = Server::start(place, 1);
    let ours = Peer {
        address: server.address,
        path: "/ows/",
        map: "many".into(),
    };
    for (reader, rate) in [("fast", usize::MAX), ("10 MB/s", 10 << 20)] {
        let (reply, _) = streamed(&theirs, None, rate);
        println!(
            "| nginx + FastCGI | {reader} | {:.1} | {:.0} | {} | |",
            ms(reply.first_byte),
            ms(reply.total),
            reply.bytes
        );
        let (reply, above) = streamed(&ours, Some(server.pid()), rate);
        println!(
            "| qgisserver | {reader} | {:.1} | {:.0} | {} | {above:.1} |",
            ms(reply.first_byte),
            ms(reply.total),
            reply.bytes
        );
    }
}

/// A few small requests first: the project is loaded and the worker warm.
fn streamed(peer: &Peer, pid: Option<u32>, rate: usize) -> (Reply, f64) {
    let mut client = peer.connect();
    for _ in 0..5 {
        get(&mut client, &peer.target(&format!("{MANY}&MAXFEATURES=10")));
    }
    let idle = pid.map_or(0, memory::of_tree);
    let peak = memory::Peak::watch(pid.unwrap_or_else(std::process::id));
    let reply = client
        .get_slowly(&peer.target(MANY), rate)
        .expect("the server answers");
    let above = peak.stop().saturating_sub(idle) as f64 / 1024.0;
    assert_eq!(
        reply.status,
        200,
        "{}",
        String::from_utf8_lossy(&reply.start)
    );
    (reply, above)
}

/// SIGKILL to the only worker while it is idle; the next request has to be
/// answered by another process.
fn death(place: &Place) {
    println!("\nAn idle worker is killed, 1 worker and its spare, 10 times\n");
    let server = Server::start(place, 1);
    let peer = Peer {
        address: server.address,
        path: "/ows/",
        map: "world".into(),
    };
    let target = peer.target(OPERATIONS[0].2);
    let mut taken = Vec::new();
    for _ in 0..10 {
        let victim = serving(&mut peer.connect(), &target).expect("a warm worker");
        peers::signal(victim, nix::sys::signal::Signal::SIGKILL);
        let killed = Instant::now();
        peers::until("another worker", || {
            serving(&mut peer.connect(), &target).filter(|pid| *pid != victim)
        });
        taken.push(ms(killed.elapsed()));
        settle(server.pid());
    }
    println!(
        "- next request answered after: median {:.1} ms, worst {:.1} ms",
        median(taken.clone()),
        worst(&taken)
    );
}

/// The pid that the service that does nothing answers with.
fn serving(client: &mut Client, target: &str) -> Option<i32> {
    let reply = client
        .get(target)
        .ok()
        .filter(|reply| reply.status == 200)?;
    std::str::from_utf8(&reply.start).ok()?.parse().ok()
}

/// Waits until the next spare is warm: nothing in the pool uses the processor any more.
fn settle(server: u32) {
    let mut before = memory::cpu_of_tree(server);
    peers::until("a new spare", || {
        std::thread::sleep(Duration::from_millis(500));
        let now = memory::cpu_of_tree(server);
        let quiet = now.saturating_sub(before) <= 1;
        before = now;
        quiet.then_some(())
    });
}

fn percentile(series: &[Duration], percent: usize) -> Duration {
    let mut sorted = series.to_vec();
    sorted.sort();
    sorted[(sorted.len() - 1) * percent / 100]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
