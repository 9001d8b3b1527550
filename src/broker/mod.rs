//! The broker: takes requests from the front and gives them to workers.
//!
//! [`Handle`] is what the front sees. Behind it one OS thread (`router.rs`)
//! holds the only ROUTER and drives the pure decisions of `queue.rs`.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;

use crate::protocol::{Failure, Head, ProjectRef, Ready, Reason, Timings};

/// A request as the front hands it over.
#[derive(Debug, Clone)]
pub struct Call {
    pub request_id: String,
    pub method: String,
    /// Public URL with query.
    pub url: String,
    /// Title-Case names.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    pub project: Option<ProjectRef>,
    pub operation: String,
    /// May be sent to a second worker when the first died before the first byte.
    pub retry: bool,
    /// Cancelled when the client leaves; otherwise it runs to its end.
    pub cancel: bool,
    pub timeout: Duration,
}

/// The answer: its head at once, its body as it comes.
#[derive(Debug)]
pub struct Reply {
    pub head: Head,
    pub body: Body,
}

/// What FINAL says about the request, for headers and logs.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub timings: Timings,
    pub project_version: Option<String>,
    pub project_modified: Option<u64>,
}

/// Chunks of a reply. Taking one sends the worker a credit; dropping the body
/// before its end cancels the request.
#[derive(Debug)]
pub struct Body {}

impl Body {
    /// The next chunk; `None` after the last. An error means that the reply
    /// is cut off and must not be ended normally.
    pub fn poll_next(&mut self, _cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        todo!()
    }

    /// Present once FINAL arrived; for a reply that was not streamed, from the start.
    pub fn outcome(&self) -> Option<&Outcome> {
        todo!()
    }

    /// The whole body is here: (chunks left, bytes left) when no more will come from the worker.
    pub fn is_complete(&self) -> bool {
        todo!()
    }

    /// A body that is already here; for tests of the front.
    pub fn full(_bytes: Bytes) -> Self {
        todo!()
    }
}

/// Why there is no answer from a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    QueueFull { limit: usize },
    /// Waited too long for a worker.
    QueueTimedOut { after: Duration },
    TimedOut { after: Duration },
    WorkerDied,
    /// The server is stopping.
    Stopping,
    /// The worker answered, and there is nothing from QGIS in it.
    Failed(Failure),
}

impl std::fmt::Display for Error {
    /// Safe to show to a client.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::QueueFull { limit } => write!(f, "{limit} requests are waiting already"),
            Self::QueueTimedOut { after } => {
                write!(f, "no worker was free within {:.1} s", after.as_secs_f64())
            }
            Self::TimedOut { after } => write!(f, "no answer within {:.1} s", after.as_secs_f64()),
            Self::WorkerDied => write!(f, "the worker died"),
            Self::Stopping => write!(f, "the server is stopping"),
            Self::Failed(failure) => write!(f, "{failure:?}"),
        }
    }
}

impl std::error::Error for Error {}

/// A snapshot for `/ready` and `/status`.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub n_waiting: usize,
    pub n_running: usize,
    pub workers: Vec<Worker>,
}

#[derive(Debug, Clone)]
pub struct Worker {
    pub ready: Ready,
    /// `idle`, or the operation it is busy with.
    pub serving: Option<String>,
    pub n_served: u64,
    pub connected_for: Duration,
    pub memory_kb: u64,
}

/// The broker, as the front and `run` see it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {}

impl Handle {
    /// The reply to `call`, or why there is none. Dropping the future withdraws
    /// the call: out of the queue, or cancelled if `call.cancel`.
    pub async fn call(&self, _call: Call) -> Result<Reply, Error> {
        todo!()
    }

    /// At least one worker is connected, and the server is not stopping.
    pub fn is_ready(&self) -> bool {
        todo!()
    }

    pub async fn status(&self) -> Status {
        todo!()
    }

    /// One worker of each pool is told `reason` (`Reason::Restart`): its pool renews itself.
    pub fn tell_pools(&self, _reason: Reason) {
        todo!()
    }
}
