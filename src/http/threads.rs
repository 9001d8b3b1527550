//! The threads that connections live on, each connection on one for its life.
//!
//! The first is the caller's own, which is the broker's: what passes between a
//! connection there and the broker wakes no other thread, and to wake one costs
//! more than a small request. So the others are for crowds, which keep all awake: a
//! new connection goes to the first thread as long as that has few, then to the one
//! that has the fewest.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::thread::Thread;

/// So many more connections than the others our own thread has before they get one.
const AHEAD: usize = 32;

/// Where connections can go.
pub struct Threads {
    own: Arc<AtomicUsize>,
    others: Vec<Other>,
}

struct Other {
    n_connections: Arc<AtomicUsize>,
    runtime: tokio::runtime::Handle,
}

/// Keeps the threads that are not the caller's.
pub struct Keeper(Vec<(oneshot::Sender<()>, Thread)>);

impl Keeper {
    /// Ends the threads: what is left of their connections, access log lines
    /// among it, is over when this returns.
    pub async fn end(self) {
        for (running, mut thread) in self.0 {
            drop(running);
            thread.ended().await;
        }
    }
}

/// Counts a connection as long as it lives.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(n_connections: &Arc<AtomicUsize>) -> Self {
        n_connections.fetch_add(1, Ordering::Relaxed);
        Self(n_connections.clone())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Threads {
    /// `n` threads, of which `n - 1` are new.
    pub fn start(n: usize) -> io::Result<(Self, Keeper)> {
        let (mut others, mut kept) = (Vec::new(), Vec::new());
        for number in 1..n {
            let (running, ended) = oneshot::channel::<()>();
            let thread = Thread::start(&format!("http-{number}"), move || async {
                let _ = ended.await;
            })?;
            others.push(Other {
                n_connections: Arc::default(),
                runtime: thread.runtime.clone(),
            });
            kept.push((running, thread));
        }
        let own = Arc::default();
        Ok((Self { own, others }, Keeper(kept)))
    }

    /// Lets `serve` run with `tcp` on the thread whose turn it is.
    pub fn spawn<F>(&self, tcp: TcpStream, serve: impl FnOnce(TcpStream) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(other) = self.emptier() else {
            let seat = Seat::take(&self.own);
            tokio::spawn(async move {
                serve(tcp).await;
                drop(seat);
            });
            return;
        };
        let seat = Seat::take(&other.n_connections);
        // A stream belongs to the runtime in which it was made. If it cannot move, its
        // client sees it closed.
        let Ok(tcp) = tcp.into_std() else { return };
        other.runtime.spawn(async move {
            if let Ok(tcp) = TcpStream::from_std(tcp) {
                serve(tcp).await;
            }
            drop(seat);
        });
    }

    /// Another thread, if our own has more than enough connections.
    fn emptier(&self) -> Option<&Other> {
        let n = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let other = self.others.iter().min_by_key(|it| n(&it.n_connections))?;
        (n(&other.n_connections) + AHEAD < n(&self.own)).then_some(other)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_crowd_spreads_over_the_threads_and_the_first_connections_are_ours() {
        let (threads, keeper) = Threads::start(2).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, mut told) = mpsc::unbounded_channel();
        let ours = std::thread::current().id();
        let mut clients = Vec::new();
        let few = std::iter::repeat_n(true, AHEAD + 1);
        for expected in few.chain([false, true, false]) {
            clients.push(TcpStream::connect(address).await.unwrap());
            let (tcp, _) = listener.accept().await.unwrap();
            let tell = tell.clone();
            threads.spawn(tcp, move |mut tcp| async move {
                let _ = tell.send(std::thread::current().id());
                // Until the client hangs up.
                let _ = tcp.read_u8().await;
            });
            assert_eq!(told.recv().await == Some(ours), expected);
        }
        let other = &threads.others[0].n_connections;
        drop(clients);
        while other.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        keeper.end().await;
    }
}
