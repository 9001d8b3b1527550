//! One log line per death that an operator can act on.

use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use qgisserver::protocol::Because;

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
    /// Why it was told to leave.
    pub dismissed: Option<Because>,
    /// Kilobytes that it had allocated when it crashed.
    pub crashed_with: u64,
    /// Kilobytes that it might have.
    pub limit: u64,
    /// The kernel killed somebody for want of memory since the last look.
    pub kernel_killed: bool,
}

impl Obituary {
    pub fn log(&self) {
        let (text, request_id) = (self.text(), self.request_id());
        match self.is_expected() {
            true => tracing::info!(request_id, worker = self.number, "{text}"),
            false => tracing::error!(request_id, worker = self.number, "{text}"),
        }
    }

    /// What its successor says.
    pub fn because(&self) -> Because {
        match (self.verdict, self.farewell, self.status) {
            (Some(Verdict::Frozen), ..) => Because::Frozen,
            (_, Farewell::Stuck, _) => Because::Stuck,
            (_, Farewell::Doubt, _) => Because::QgisFailed,
            (_, Farewell::Panicked, _) => Because::Panicked,
            (..) if self.was_starved() => Because::OutOfMemory,
            (.., WaitStatus::Signaled(..)) => Because::Killed,
            _ => Because::Exited,
        }
    }

    /// It died for want of memory, as far as can be known.
    fn was_starved(&self) -> bool {
        match self.status {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => {
                self.verdict.is_none() && self.kernel_killed
            }
            WaitStatus::Signaled(..) => self.crashed_with > self.limit / 4 * 3,
            _ => false,
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
            (None, Farewell::Told, _) => self.told().into(),
            (None, _, WaitStatus::Signaled(_, Signal::SIGKILL, _)) if self.kernel_killed => {
                "killed by the kernel for want of memory (worker.memory_limit, server.memory_high_water_mark and server.workers say how much is taken)".into()
            }
            (None, _, WaitStatus::Signaled(_, signal, _)) if self.was_starved() => {
                let (had, limit) = (megabytes(self.crashed_with), megabytes(self.limit));
                format!("killed by {signal}, out of memory: it had {had} of the {limit} that worker.memory_limit allows")
            }
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

    fn told(&self) -> &'static str {
        match self.dismissed {
            Some(Because::Restart) => "left for a newer one: the pool was told to restart",
            Some(Because::RecycledRequests) => {
                "left for a new one: it had served enough (worker.recycle_requests)"
            }
            Some(Because::RecycledAge) => {
                "left for a new one: it was old enough (worker.recycle_seconds)"
            }
            Some(Because::RecycledMemory) => {
                "left for a new one: it had grown too large (worker.recycle_memory)"
            }
            Some(Because::HighWaterMark) => {
                "left for a new one: all workers together took too much memory, and it the most (server.memory_high_water_mark)"
            }
            _ => "left as told",
        }
    }
}

pub fn megabytes(kilobytes: u64) -> String {
    format!("{}M", kilobytes >> 10)
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

    fn obituary(signal: Signal) -> Obituary {
        let pid = Pid::from_raw(4242);
        Obituary {
            number: 3,
            pid,
            status: WaitStatus::Signaled(pid, signal, false),
            age: Duration::from_secs(2 * 3600 + 14 * 60),
            n_served: 5120,
            was_warm: true,
            verdict: None,
            farewell: Farewell::None,
            serving: Some("GetMap of file:city (r-1)".into()),
            dismissed: None,
            crashed_with: 500 << 10,
            limit: 1 << 20,
            kernel_killed: false,
        }
    }

    #[test]
    fn a_crash_is_told_with_all_that_an_operator_needs() {
        let obituary = obituary(Signal::SIGSEGV);
        assert_eq!(
            obituary.text(),
            "worker 3 (pid 4242) killed by SIGSEGV after 2h 14m and 5120 requests, while serving GetMap of file:city (r-1)"
        );
        assert_eq!(obituary.request_id(), Some("r-1"));
        assert!(!obituary.is_expected());
        assert_eq!(obituary.because(), Because::Killed);
    }

    #[test]
    fn want_of_memory_is_told_where_it_can_be_known() {
        let by_kernel = Obituary {
            kernel_killed: true,
            ..obituary(Signal::SIGKILL)
        };
        let at_its_limit = Obituary {
            crashed_with: 1000 << 10,
            ..obituary(Signal::SIGABRT)
        };
        for (obituary, words) in [
            (by_kernel, "killed by the kernel for want of memory"),
            (
                at_its_limit,
                "out of memory: it had 1000M of the 1024M that worker.memory_limit allows",
            ),
        ] {
            assert!(obituary.text().contains(words), "{}", obituary.text());
            assert_eq!(obituary.because(), Because::OutOfMemory);
        }
        let ours = Obituary {
            verdict: Some(Verdict::Frozen),
            kernel_killed: true,
            ..obituary(Signal::SIGKILL)
        };
        assert_eq!(ours.because(), Because::Frozen);
        assert_eq!(obituary(Signal::SIGKILL).because(), Because::Killed);
    }

    #[test]
    fn a_worker_that_is_recycled_says_by_which_setting() {
        let pid = Pid::from_raw(1);
        for (dismissed, setting) in [
            (Because::RecycledRequests, "worker.recycle_requests"),
            (Because::RecycledAge, "worker.recycle_seconds"),
            (Because::RecycledMemory, "worker.recycle_memory"),
            (Because::HighWaterMark, "server.memory_high_water_mark"),
        ] {
            let obituary = Obituary {
                status: WaitStatus::Exited(pid, 0),
                farewell: Farewell::Told,
                dismissed: Some(dismissed),
                ..obituary(Signal::SIGTERM)
            };
            assert!(obituary.is_expected() && obituary.text().contains(setting));
        }
    }
}
