//! A bad network between workers and the gate: connections that are cut, also in
//! the middle of a frame, that are slow, and that are silent for a while.
//!
//! It loses no byte of a connection that it does not cut, as TCP does not.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Pool, Server, World};

/// A server, and its pool behind a network that may fail.
pub fn far_away(world: World, settings: &str) -> (Server, Relay, Pool) {
    let server = Server::proxy(world, settings);
    let relay = Relay::before(server.gate.expect("a proxy has one"));
    let pool = Pool::start(&server.world, relay.address, settings);
    (server.ready(), relay, pool)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Towards {
    Server = 1,
    Worker = 2,
}

/// Nothing passes until a moment, which may be put off or brought forward.
struct Hold {
    until: Mutex<Instant>,
    changed: Condvar,
}

impl Hold {
    fn none() -> Self {
        Self {
            until: Mutex::new(Instant::now()),
            changed: Condvar::new(),
        }
    }

    fn set(&self, time: Duration) {
        *self.until.lock().unwrap() = Instant::now() + time;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut until = self.until.lock().unwrap();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            until = self.changed.wait_timeout(until, left).unwrap().0;
        }
    }
}

/// One connection of a worker.
pub struct Link {
    /// As the worker says in its READY; 0 before.
    pid: AtomicI32,
    /// The next bytes in this direction are torn apart; 0: in none.
    torn: AtomicU8,
    hold: Hold,
    /// All links have it in common.
    network: Arc<Hold>,
    ended: AtomicBool,
    ends: [TcpStream; 2],
}

impl Link {
    pub fn pid(&self) -> i32 {
        self.pid.load(Ordering::Relaxed)
    }

    pub fn cut(&self) {
        self.ended.store(true, Ordering::Relaxed);
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
        self.hold.set(Duration::ZERO);
    }

    /// Half of what comes next in this direction gets through, and nothing after it.
    pub fn tear(&self, towards: Towards) {
        self.torn.store(towards as u8, Ordering::Relaxed);
    }

    /// Nothing passes for so long; then all of it does.
    pub fn hold(&self, time: Duration) {
        self.hold.set(time);
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, towards: Towards) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let bytes = &buffer[..n];
            if towards == Towards::Server && self.pid() == 0 {
                self.pid
                    .store(pid_in(bytes).unwrap_or(0), Ordering::Relaxed);
            }
            self.hold.wait();
            self.network.wait();
            if n > 1 && self.torn.load(Ordering::Relaxed) == towards as u8 {
                let _ = to.write_all(&bytes[..n / 2]);
                break;
            }
            if to.write_all(bytes).is_err() {
                break;
            }
        }
        self.cut();
    }
}

/// What READY says.
fn pid_in(bytes: &[u8]) -> Option<i32> {
    let text = String::from_utf8_lossy(bytes);
    let (_, rest) = text.split_once("\"pid\":")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

pub struct Relay {
    pub address: SocketAddr,
    network: Arc<Hold>,
    links: Arc<Mutex<Vec<Arc<Link>>>>,
    stopped: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

impl Relay {
    pub fn before(gate: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let network = Arc::new(Hold::none());
        let links = Arc::new(Mutex::new(Vec::new()));
        let stopped = Arc::new(AtomicBool::new(false));
        let listening = std::thread::spawn({
            let (network, links, stopped) = (network.clone(), links.clone(), stopped.clone());
            move || {
                while let Ok((worker, _)) = listener.accept() {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    // Without a gate the worker is hung up on, and tries again.
                    if let Ok(server) = TcpStream::connect(gate) {
                        let mut links = links.lock().unwrap();
                        links.retain(|link: &Arc<Link>| !link.ended.load(Ordering::Relaxed));
                        links.push(join(worker, server, network.clone()));
                    }
                }
            }
        });
        Self {
            address,
            network,
            links,
            stopped,
            listening: Some(listening),
        }
    }

    /// Every connection ends; there may be new ones.
    pub fn cut(&self) {
        let links = self.links.lock().unwrap();
        links.iter().for_each(|link| link.cut());
    }

    /// Nothing passes on any connection, a new one included, for so long; then all of it does.
    pub fn hold(&self, time: Duration) {
        self.network.set(time);
    }

    /// The connections of workers that have said READY.
    pub fn links(&self) -> Vec<Arc<Link>> {
        let links = self.links.lock().unwrap();
        let living = links
            .iter()
            .filter(|link| !link.ended.load(Ordering::Relaxed) && link.pid() != 0);
        living.cloned().collect()
    }
}

fn join(worker: TcpStream, server: TcpStream, network: Arc<Hold>) -> Arc<Link> {
    for end in [&worker, &server] {
        let _ = end.set_nodelay(true);
    }
    let clone = |end: &TcpStream| end.try_clone().expect("there are descriptors");
    let link = Arc::new(Link {
        pid: AtomicI32::new(0),
        torn: AtomicU8::new(0),
        hold: Hold::none(),
        network,
        ended: AtomicBool::new(false),
        ends: [clone(&worker), clone(&server)],
    });
    let up = (link.clone(), clone(&worker), clone(&server));
    std::thread::spawn(move || up.0.pump(up.1, up.2, Towards::Server));
    let down = link.clone();
    std::thread::spawn(move || down.pump(server, worker, Towards::Worker));
    link
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
        self.cut();
        self.hold(Duration::ZERO);
    }
}
