//! One log line per request, written when its reply is over.

use std::net::IpAddr;
use std::time::Instant;

use hyper::{Method, Uri};

use crate::protocol::Timings;

/// Longer targets are cut in the log.
const TARGET_MAX: usize = 2048;

/// 499 is what nginx calls a client that left before the answer.
const CLIENT_LEFT: u16 = 499;

/// The line; dropping it writes it.
#[derive(Debug)]
pub struct Line {
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
        Self {
            request_id,
            client,
            method,
            target: target(uri),
            status: CLIENT_LEFT,
            bytes: 0,
            end: End::ClientLeft,
            timings: None,
            since: Instant::now(),
        }
    }
}

fn target(uri: &Uri) -> String {
    let target = uri.path_and_query().map_or("", |target| target.as_str());
    target.chars().take(TARGET_MAX).collect()
}

impl Drop for Line {
    fn drop(&mut self) {
        let ms = self.since.elapsed().as_secs_f64() * 1e3;
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
