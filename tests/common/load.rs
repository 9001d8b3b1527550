//! Clients that ask the same again and again while something happens to the server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::client::{Came, Client};
use super::{Server, eventually, path_of, timed};

/// How a client asks.
#[derive(Debug, Clone, Copy)]
pub enum Manner {
    /// On a new connection each time.
    Anew,
    /// On one connection, which is idle for so many milliseconds in between.
    Kept(u64),
}

use Manner::{Anew, Kept};

/// A server that changes meets connections that are new, busy, hardly idle and long idle.
pub const EVERY_MANNER: &[Manner] = &[Anew, Anew, Kept(0), Kept(0), Kept(40), Kept(400)];

/// It has to be ended with [`Load::assert_served`].
pub struct Load {
    stop: Arc<AtomicBool>,
    n_served: Vec<Arc<AtomicUsize>>,
    clients: Vec<JoinHandle<Seen>>,
}

/// What a client saw.
#[derive(Default)]
struct Seen {
    slowest: Duration,
    failures: Vec<String>,
}

impl Load {
    /// Clients of every manner, each of which has been served.
    pub fn on(server: &Server) -> Self {
        Self::start(server.address, &path_of("DO=echo"), EVERY_MANNER).served()
    }

    pub fn start(address: SocketAddr, path: &str, manners: &[Manner]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let n_served: Vec<_> = manners.iter().map(|_| Arc::default()).collect();
        let clients = manners.iter().zip(&n_served).map(|(manner, n_served)| {
            let asking = Asking {
                client: Client::new(address),
                question: format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
                manner: *manner,
                n_served: Arc::clone(n_served),
            };
            let stop = stop.clone();
            std::thread::spawn(move || asking.until(&stop))
        });
        Self {
            clients: clients.collect(),
            n_served,
            stop,
        }
    }

    /// Each of the clients has been served.
    pub fn served(self) -> Self {
        self.wait_more_than(&vec![0; self.n_served.len()]);
        self
    }

    /// Every answer was a 200, and no connection was refused, reset or closed unasked;
    /// how long the slowest answer took.
    pub fn assert_served(mut self) -> Duration {
        // Two more: the next may have been asked for before whatever happened was over.
        let enough: Vec<_> = self.counts().map(|n| n + 1).collect();
        self.wait_more_than(&enough);
        self.stop.store(true, Ordering::Relaxed);
        let ends = std::mem::take(&mut self.clients).into_iter();
        let seen: Vec<Seen> = ends.map(|client| client.join().unwrap()).collect();
        let failures: Vec<_> = seen.iter().flat_map(|seen| &seen.failures).collect();
        assert_eq!(failures, [""; 0]);
        seen.iter().map(|seen| seen.slowest).max().expect("clients")
    }

    fn wait_more_than(&self, counts: &[usize]) {
        eventually("every client is served", || {
            let mut all = self.counts().zip(counts);
            all.all(|(n, before)| n > *before).then_some(())
        });
    }

    fn counts(&self) -> impl Iterator<Item = usize> {
        self.n_served.iter().map(|n| n.load(Ordering::Relaxed))
    }
}

impl Drop for Load {
    /// A test that failed does not go on asking.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One client.
struct Asking {
    client: Client,
    question: String,
    manner: Manner,
    n_served: Arc<AtomicUsize>,
}

impl Asking {
    fn until(mut self, stop: &AtomicBool) -> Seen {
        let mut seen = Seen::default();
        while !stop.load(Ordering::Relaxed) {
            let (came, took) = timed(|| self.client.ask(self.question.as_bytes()));
            seen.slowest = seen.slowest.max(took);
            if matches!(came, Came::Whole { status: 200, .. }) {
                self.n_served.fetch_add(1, Ordering::Relaxed);
            } else {
                seen.failures
                    .push(format!("{:?}: {came:.200?}", self.manner));
            }
            match self.manner {
                Anew => self.client.hang_up(),
                // The pause is what is tried: nobody waits for anything in it.
                Kept(pause) => std::thread::sleep(Duration::from_millis(pause)),
            }
        }
        seen
    }
}
