//! Who runs the link: the main thread while it waits for a job, a second thread
//! while QGIS works.
//!
//! The link is a task on a runtime of one thread at a time. To wake a sleeping
//! thread costs more than a small request, so a request that is answered soon
//! passes through one thread only; the second one steps in when QGIS takes longer,
//! and keeps beating, granting and cancelling until the answer is out.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::link::{Job, Last};

/// How long a request may take before the second thread steps in.
const SOON: Duration = Duration::from_millis(2);

/// How often the second thread looks whether it should have.
const LOOK: Duration = Duration::from_millis(50);

/// So long without a job, a worker rests.
const REST_AFTER: Duration = Duration::from_secs(5);

/// What the main thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It runs the link, and waits for a job.
    Idle,
    /// It runs QGIS, since then.
    Busy(Instant),
    /// It runs QGIS, and the link must go on at once: parts of an answer leave.
    Streaming,
}

pub struct Drive {
    runtime: Runtime,
    phase: Mutex<Phase>,
    changed: Condvar,
    /// The link has a request without its end.
    running: watch::Sender<bool>,
}

impl Drive {
    pub fn new() -> std::io::Result<Arc<Self>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Arc::new(Self {
            runtime,
            phase: Mutex::new(Phase::Idle),
            changed: Condvar::new(),
            running: watch::Sender::new(false),
        }))
    }

    /// Begins to run `link`, whose words about its request go to [`Drive::running`].
    pub fn start(self: &Arc<Self>, link: impl Future<Output = ()> + Send + 'static) {
        drop(self.runtime.spawn(link));
        let drive = self.clone();
        std::thread::Builder::new()
            .name("link".into())
            .spawn(move || drive.assist())
            .expect("a worker may have two threads");
    }

    /// Told by the link: a request began, or its end is out.
    pub fn running(&self, running: bool) {
        self.running.send_replace(running);
    }

    /// Lets the `last` answer end, and gives the next job. Runs the link meanwhile, and
    /// `rest` once there was none for a while.
    pub fn next_job(
        &self,
        jobs: &mut mpsc::UnboundedReceiver<Job>,
        last: Option<Last>,
        rest: impl FnOnce(),
    ) -> Option<Job> {
        self.enter(Phase::Idle);
        let job = self.runtime.block_on(async {
            // From inside of the runtime, which has to wake nobody then.
            if let Some(last) = last {
                last.outlet.end(last.report, last.bytes);
            }
            if let Ok(job) = timeout(REST_AFTER, jobs.recv()).await {
                return job;
            }
            rest();
            jobs.recv().await
        });
        self.enter(Phase::Busy(Instant::now()));
        job
    }

    /// The link has something to do while QGIS works.
    pub fn step_in(&self) {
        let mut phase = self.phase.lock().expect("nobody panics while holding it");
        if *phase != Phase::Streaming {
            *phase = Phase::Streaming;
            self.changed.notify_one();
        }
    }

    fn enter(&self, phase: Phase) {
        *self.phase.lock().expect("nobody panics while holding it") = phase;
    }

    /// Steps in whenever QGIS takes long, and runs the link until the answer is out.
    fn assist(&self) {
        let mut running = self.running.subscribe();
        loop {
            let mut phase = self.phase.lock().expect("nobody panics while holding it");
            // Without a request there is nothing to hurry for, whatever QGIS does.
            while !phase.is_due() || !*running.borrow() {
                let waited = self.changed.wait_timeout(phase, LOOK);
                phase = waited.expect("nobody panics while holding it").0;
            }
            drop(phase);
            // A runtime of one thread is run by whoever came first; the other waits.
            let ended = running.wait_for(|running| !running);
            let _ = self.runtime.block_on(ended);
        }
    }
}

impl Phase {
    fn is_due(self) -> bool {
        match self {
            Self::Idle => false,
            Self::Busy(since) => since.elapsed() > SOON,
            Self::Streaming => true,
        }
    }
}
