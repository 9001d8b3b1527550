//! One log line per death that an operator can act on.

use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::state::Verdict;
use crate::board::Farewell;

/// What is known of a dead worker.
pub struct Obituary {
    pub number: u32,
    pub pid: Pid,
    pub status: WaitStatus,
    pub age: Duration,
    pub n_served: u64,
    pub was_warm: bool,
    pub verdict: Option<Verdict>,
    pub farewell: Farewell,
    pub serving: Option<String>,
}

impl Obituary {
    pub fn log(&self) {
        let (text, request_id) = (self.text(), self.request_id());
        match self.is_expected() {
            true => tracing::info!(request_id, worker = self.number, "{text}"),
            false => tracing::error!(request_id, worker = self.number, "{text}"),
        }
    }

    /// The link puts it in brackets at the end of what is served; ids have no blanks.
    fn request_id(&self) -> Option<&str> {
        let (_, id) = self.serving.as_deref()?.rsplit_once(" (")?;
        id.strip_suffix(')')
    }

    fn is_expected(&self) -> bool {
        matches!(self.verdict, Some(Verdict::Replaced | Verdict::Stopping))
            || (self.farewell == Farewell::Told && self.verdict.is_none())
    }

    fn text(&self) -> String {
        let Self {
            number,
            pid,
            n_served,
            ..
        } = self;
        let (cause, age) = (self.cause(), humane(self.age));
        let requests = if *n_served == 1 {
            "request"
        } else {
            "requests"
        };
        let serving = match &self.serving {
            Some(what) => format!(", while serving {what}"),
            None if !self.was_warm => ", before it was ready".into(),
            None => String::new(),
        };
        format!(
            "worker {number} (pid {pid}) {cause} after {age} and {n_served} {requests}{serving}"
        )
    }

    fn cause(&self) -> String {
        match (self.verdict, self.farewell, self.status) {
            (Some(Verdict::StartTimedOut), ..) => "killed: it was not ready in time (worker.start_timeout)".into(),
            (Some(Verdict::DrainTimedOut), ..) => "killed: it did not leave in time (worker.drain_timeout)".into(),
            (Some(Verdict::Frozen), ..) => "killed: it was frozen, without a sign of life".into(),
            (Some(Verdict::Replaced), ..) => "replaced by a newer one".into(),
            (Some(Verdict::Stopping), ..) => "ended with the pool".into(),
            (None, Farewell::Stuck, _) => "left: its request was overdue or cancelled and QGIS did not stop".into(),
            (None, Farewell::Doubt, _) => "left: a C++ exception left QGIS in doubt, perhaps out of memory".into(),
            (None, Farewell::NoStart, _) => "left: QGIS did not start".into(),
            (None, Farewell::Panicked, _) => "left: it panicked, which is a mistake of qgisserver".into(),
            (None, Farewell::Told, _) => "left as told".into(),
            (None, _, WaitStatus::Signaled(_, Signal::SIGKILL, _)) => {
                "killed by SIGKILL, which was not ours: somebody's, or the kernel's for want of memory".into()
            }
            (None, _, WaitStatus::Signaled(_, signal, core)) => {
                format!("killed by {signal}{}", if core { " (core dumped)" } else { "" })
            }
            (None, _, WaitStatus::Exited(_, code)) => format!("exited with code {code}"),
            (None, _, status) => format!("ended: {status:?}"),
        }
    }
}

/// `2h 14m`, `3m 20s`, `4.2s`.
fn humane(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        3600.. => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        60.. => format!("{}m {}s", seconds / 60, seconds % 60),
        _ => format!("{:.1}s", duration.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_is_told_with_all_that_an_operator_needs() {
        let pid = Pid::from_raw(4242);
        let obituary = Obituary {
            number: 3,
            pid,
            status: WaitStatus::Signaled(pid, Signal::SIGSEGV, false),
            age: Duration::from_secs(2 * 3600 + 14 * 60),
            n_served: 5120,
            was_warm: true,
            verdict: None,
            farewell: Farewell::None,
            serving: Some("GetMap of file:city (r-1)".into()),
        };
        assert_eq!(
            obituary.text(),
            "worker 3 (pid 4242) killed by SIGSEGV after 2h 14m and 5120 requests, while serving GetMap of file:city (r-1)"
        );
        assert_eq!(obituary.request_id(), Some("r-1"));
        assert!(!obituary.is_expected());
    }
}
