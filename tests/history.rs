//! Thousands of requests whose right answer is known, while all that is below
//! them breaks: each gets exactly one answer, its own, in time.
//!
//! Workers are killed, stopped, frozen; their connections are cut, torn in the
//! middle of a frame, slow and silent (`common/relay.rs`, `history/chaos.rs`).
//! Clients keep their connections and ask one question after the other
//! (`history/question.rs`, `common/client.rs`): GETs, which a second worker may
//! answer, POSTs, which only one may see, streams whose every chunk names its
//! request, requests that never end, and some whose client leaves. What they
//! saw, what the workers noted and what the server lost is the history, and
//! `history/check.rs` is its judge.
//!
//! The programs are the real ones; the workers run the plugin `tests/data/echo`
//! in the stub or in QGIS.
//!
//! | variable | meaning |
//! |---|---|
//! | `HISTORY_REQUESTS` | how many, instead of what fits in a minute: `make soak` asks a million |
//! | `HISTORY_SEED` | repeats questions and faults of an earlier run, though not their timing |
//! | `HISTORY_SECONDS` | how long a worker is killed every second |

#[path = "history/chaos.rs"]
mod chaos;
#[path = "history/check.rs"]
mod check;
mod common;
#[path = "history/dice.rs"]
mod dice;
#[path = "history/question.rs"]
mod question;

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chaos::{Faults, Plan, Targets};
use check::{End, Evidence, Judge, Record, tally};
use common::client::Client;
use common::process::Process;
use common::relay::{Relay, far_away};
use common::{Server, World, http};
use dice::Dice;
use nix::sys::signal::Signal;
use question::{CHUNK, Kind, Question};

/// A request is late after this, and its worker is ended a second later.
const TIMEOUT: Duration = Duration::from_secs(8);

/// Answers are due at the deadline; this is for a machine that does other things, too.
const PATIENCE: Duration = Duration::from_secs(2);

const SILENCE: Duration = Duration::from_secs(1);

/// However few requests are wanted, clients go on until so much was broken,
const N_FAULTS: usize = 12;

/// or for so long.
const LONGEST: Duration = Duration::from_secs(60);

/// More clients than workers, so that requests wait.
const N_CLIENTS: usize = 16;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

fn seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = variable("HISTORY_SEED").unwrap_or(now.as_nanos() as u64);
    println!("HISTORY_SEED={seed}");
    seed
}

/// What server and pool are told: short silences, no pause before a replacement. While
/// the last question is stuck, only idle workers are left to be killed: a crash storm.
fn settings() -> String {
    format!(
        "server.timeout = {}\nzmq.timeout = 60000\nzmq.heartbeat = 0.2\nzmq.heartbeat_misses = 5\nzmq.storm_seconds = 2\n\
         worker.young = 0\nworker.chunk_bytes = {CHUNK}\nzmq.window = 4\n\
         projects.cache.check_interval = 60\n",
        TIMEOUT.as_secs(),
    )
}

/// What a history is made on, and how.
struct Stage<'a> {
    server: &'a Server,
    pool: &'a Process,
    relay: Option<&'a Relay>,
    project: &'a str,
    plan: Plan,
    /// At the least.
    n: u64,
}

impl Stage<'_> {
    /// Asks, breaks, and judges.
    fn play(&self) {
        let (done, n_faults) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (start, next) = (Instant::now(), AtomicU64::new(0));
        let is_enough = || {
            let is_broken = n_faults.load(Ordering::Relaxed) >= N_FAULTS;
            next.load(Ordering::Relaxed) >= self.n && (is_broken || start.elapsed() > LONGEST)
        };
        let (history, faults) = std::thread::scope(|scope| {
            let chaos = scope.spawn(|| {
                let targets = Targets {
                    server: self.server,
                    pool: self.pool,
                    relay: self.relay,
                };
                chaos::run(&self.plan, targets, &done, &n_faults)
            });
            let clients: Vec<_> = (0..N_CLIENTS)
                .map(|_| scope.spawn(|| self.ask(&next, is_enough)))
                .collect();
            let asked: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
            done.store(true, Ordering::Relaxed);
            let faults = chaos.join();
            let history: Vec<Record> = asked.into_iter().flat_map(Result::unwrap).collect();
            (history, faults.unwrap())
        });
        self.judge(next.into_inner(), &history, &faults, start.elapsed());
    }

    /// One client.
    fn ask(&self, next: &AtomicU64, is_enough: impl Fn() -> bool) -> Vec<Record> {
        let mut client = Client::new(self.server.address);
        let mut records = Vec::new();
        while !is_enough() {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let question = Question::new(self.plan.seed, index);
            let bytes = question.bytes(self.project);
            let start = Instant::now();
            let end = match question.kind {
                Kind::Left => {
                    client.ask_and_leave(&bytes);
                    End::Left
                }
                _ => End::of(&question, client.ask(&bytes)),
            };
            let took = start.elapsed();
            records.push(Record { index, end, took });
        }
        records
    }

    fn judge(&self, n: u64, history: &[Record], faults: &Faults, took: Duration) {
        // What was lost at last is in the log before the status says that all is well.
        self.server.wait_ready();
        let log = self.server.process.log.text();
        let evidence = Evidence::gather(&self.server.world.journal(), &log);
        let judge = Judge {
            seed: self.plan.seed,
            n,
            timeout: TIMEOUT,
            bound: TIMEOUT + PATIENCE,
            evidence: &evidence,
            faults,
        };
        let complaints = judge.complaints(history);
        let twice = evidence
            .runs
            .values()
            .filter(|(begun, _)| *begun > 1)
            .count();
        let slowest = history
            .iter()
            .map(|record| record.took)
            .max()
            .unwrap_or_default();
        println!(
            "{} requests in {took:.1?}, the slowest took {slowest:.1?}",
            history.len()
        );
        println!("faults: {:?}", faults.by_kind);
        println!("ends: {:#?}", tally(self.plan.seed, history));
        let n_hit = evidence.n_hit_by(faults);
        println!("{n_hit} requests lost a worker to a fault, {twice} ran twice");
        assert!(
            complaints.is_empty(),
            "{} complaints, seed {}:\n{}",
            complaints.len(),
            self.plan.seed,
            complaints[..complaints.len().min(20)].join("\n")
        );
        assert!(n_hit > 0, "no fault hit a request, so nothing was shown");
    }
}

fn plan(pause: u64) -> Plan {
    Plan {
        seed: seed(),
        pause: Duration::from_millis(pause),
        silence: SILENCE,
        parents: false,
    }
}

/// Over a bad network, as from another machine.
#[test]
fn each_request_has_its_own_answer_while_workers_die_and_connections_break() {
    let _alone = common::alone();
    let settings = format!("{}server.workers = 4\nworker.spares = 2", settings());
    let (server, relay, pool) = far_away(World::stub().with_echo(), &settings);
    let stage = Stage {
        server: &server,
        pool: &pool.process,
        relay: Some(&relay),
        project: "city",
        plan: plan(variable("HISTORY_PAUSE").unwrap_or(250)),
        n: variable("HISTORY_REQUESTS").unwrap_or(100_000),
    };
    stage.play();
}

/// One pool on the machine of the server; the process that forks workers dies, too.
#[test]
fn each_request_has_its_own_answer_while_the_local_pool_dies() {
    let _alone = common::alone();
    let settings = format!("{}server.workers = 3\nworker.spares = 1", settings());
    let server = Server::start(World::stub().with_echo(), &settings).ready();
    let stage = Stage {
        server: &server,
        pool: &server.process,
        relay: None,
        project: "city",
        plan: Plan {
            parents: true,
            ..plan(200)
        },
        n: variable("HISTORY_REQUESTS").map_or(10_000, |n| n / 10),
    };
    stage.play();
}

/// QGIS is slower to start and to answer, and no other while it is killed.
#[test]
fn each_request_has_its_own_answer_while_qgis_dies() {
    let _alone = common::alone();
    let settings = format!("{}server.workers = 2\nworker.spares = 1", settings());
    let (server, relay, pool) = far_away(World::real().with_echo(), &settings);
    let stage = Stage {
        server: &server,
        pool: &pool.process,
        relay: Some(&relay),
        project: "world",
        plan: plan(1000),
        n: variable("HISTORY_REQUESTS").map_or(3_000, |n| n / 30),
    };
    stage.play();
}

const GET_MAP: &str = "/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=places&STYLES=\
                       &CRS=EPSG:4326&BBOX=40,0,60,20&WIDTH=256&HEIGHT=256&FORMAT=image/png";

/// Who kills workers, and whom last.
struct Killer<'a> {
    server: &'a Server,
    dice: Dice,
    last: Option<i32>,
    n_killed: u64,
}

impl Killer<'_> {
    /// Kills one of the workers, if there is one and the last one's death is over. On a
    /// busy machine it may not be: a request that lost two workers would rightly fail.
    fn strike(&mut self, answered: &Mutex<HashSet<String>>) {
        let workers = self.server.workers();
        if !self.last.is_none_or(|last| self.is_over(last, answered)) {
            return;
        }
        if let Some(worker) = self.dice.pick(&workers) {
            common::kill(*worker, Signal::SIGKILL);
            (self.last, self.n_killed) = (Some(*worker), self.n_killed + 1);
        }
    }

    /// The server has missed it, and the request that it had is answered.
    fn is_over(&self, killed: i32, answered: &Mutex<HashSet<String>>) -> bool {
        let (log, name) = (self.server.process.log.text(), format!("(pid {killed} "));
        let mut lines = log.lines();
        let Some(line) = lines.find(|line| line.contains(&name) && line.contains("gone")) else {
            return false;
        };
        let (_, after) = line.split_once("request_id=").unwrap_or_default();
        let id = after.split([' ', '"']).find(|word| !word.is_empty());
        id.is_none_or(|id| answered.lock().unwrap().contains(id))
    }
}

/// Maps are asked for 50 times a second, however long the answers take: on a machine
/// that is busy otherwise they may be late, but they come.
#[test]
fn a_worker_killed_every_second_costs_no_map() {
    const LATE: Duration = Duration::from_secs(600);
    let _alone = common::alone();
    // All come from one address.
    let patience = "server.timeout = 600\nzmq.timeout = 600000\nzmq.maxqueue = 3000\nlimits.client_requests = 0";
    let server = Server::start(World::real(), &format!("server.workers = 2\n{patience}")).ready();
    let n_seconds = variable("HISTORY_SECONDS").unwrap_or(15);
    let mut killer = Killer {
        server: &server,
        dice: Dice::new(seed(), 0),
        last: None,
        n_killed: 0,
    };
    let png = server.get(GET_MAP).body;
    let (start, url) = (Instant::now(), server.url(GET_MAP));
    let answered = Mutex::new(HashSet::new());
    let ask = &|i: u64| {
        let id = format!("map{i}");
        let map = http::ask_within(LATE, "GET", &url, &[("X-Request-Id", &id)], b"");
        answered.lock().unwrap().insert(id);
        map
    };
    let (failures, n_killed) = std::thread::scope(|scope| {
        let mut maps = Vec::new();
        for i in 0..n_seconds * 50 {
            let due = start + Duration::from_millis(i * 20);
            // The rate is what is tried, and nobody waits for answers.
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            maps.push(scope.spawn(move || ask(i)));
            if i % 50 == 25 {
                killer.strike(&answered);
            }
        }
        // Where few could be killed so far there are maps to be made.
        while killer.n_killed * 3 <= n_seconds && maps.iter().any(|map| !map.is_finished()) {
            // One a second, as before.
            std::thread::sleep(Duration::from_secs(1));
            killer.strike(&answered);
        }
        let maps = maps.into_iter().map(|map| map.join().unwrap());
        let failures = maps
            .filter(|map| !matches!(map, Ok(reply) if reply.status == 200 && reply.body == png));
        (failures.collect::<Vec<_>>(), killer.n_killed)
    });
    println!(
        "{} maps, {n_killed} workers killed, {:.1?}",
        n_seconds * 50,
        start.elapsed()
    );
    assert!(
        failures.is_empty(),
        "{} maps lost: {:?}",
        failures.len(),
        failures.first()
    );
    assert!(n_killed * 3 > n_seconds, "only {n_killed} were killed");
}
