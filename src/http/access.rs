//! One log line per request, written when its reply is over.

use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

use hyper::{Method, Uri};
use tokio::runtime::Handle;

use crate::protocol::Timings;

/// Longer targets are cut in the log.
const TARGET_MAX: usize = 2048;

/// 499 is what nginx calls a client that left before the answer.
const CLIENT_LEFT: u16 = 499;

/// The line; dropping it leads to its being written, after the connection had its
/// turn to write the end of the reply: a client need not wait for our log.
#[derive(Debug)]
pub struct Line(Option<Entry>);

/// What it says; dropping it writes it.
#[derive(Debug)]
pub struct Entry {
    pub request_id: String,
    pub client: IpAddr,
    pub method: Method,
    target: String,
    pub status: u16,
    pub bytes: u64,
    pub end: End,
    /// What the worker took, once it has said so.
    pub timings: Option<Timings>,
    since: Instant,
    taken: Duration,
}

/// How a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Whole,
    /// Nobody fetched the rest.
    ClientLeft,
    /// We had no rest.
    CutOff,
}

impl Line {
    /// A request without a reply so far.
    pub fn new(request_id: String, client: IpAddr, method: Method, uri: &Uri) -> Self {
        Self(Some(Entry {
            request_id,
            client,
            method,
            target: target(uri),
            status: CLIENT_LEFT,
            bytes: 0,
            end: End::ClientLeft,
            timings: None,
            since: Instant::now(),
            taken: Duration::ZERO,
        }))
    }
}

const THERE: &str = "only dropping takes it away";

impl Deref for Line {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        self.0.as_ref().expect(THERE)
    }
}

impl DerefMut for Line {
    fn deref_mut(&mut self) -> &mut Entry {
        self.0.as_mut().expect(THERE)
    }
}

fn target(uri: &Uri) -> String {
    let target = uri.path_and_query().map_or("", |target| target.as_str());
    target.chars().take(TARGET_MAX).collect()
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut entry = self.0.take().expect(THERE);
        entry.taken = entry.since.elapsed();
        // The task of a connection writes what it has before another task runs.
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn(async { drop(entry) }));
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let ms = self.taken.as_secs_f64() * 1e3;
        let worker_ms = |part: fn(&Timings) -> u64| {
            self.timings
                .as_ref()
                .map(|timings| part(timings) as f64 / 1e3)
        };
        let end = match self.end {
            End::Whole => "whole",
            End::ClientLeft => "client left",
            End::CutOff => "cut off",
        };
        tracing::info!(
            target: "access",
            request_id = self.request_id,
            client = %self.client,
            method = %self.method,
            uri = self.target,
            status = self.status,
            bytes = self.bytes,
            ms = format_args!("{ms:.1}"),
            load_ms = worker_ms(|timings| timings.load_us),
            render_ms = worker_ms(|timings| timings.render_us),
            end,
        );
    }
}
