//! Workers that fell silent: each by itself, or all of a machine at once.
//!
//! Decisions only. Workers beat at times of their own, so those of a machine that stood
//! still, or was cut off, are missed one after the other within a heartbeat. That is no
//! request's doing, unless all of them had the same one. Whoever was missed first is
//! accused until then.

use std::time::{Duration, Instant};

use super::quarantine::Fingerprint;

/// The workers that were missed lately.
#[derive(Debug, Default)]
pub struct Silences(Vec<Silence>);

#[derive(Debug)]
struct Silence {
    host: String,
    at: Instant,
    /// None: it was idle.
    held: Option<Fingerprint>,
    accused: bool,
}

/// What one more silence says.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    /// It was the worker's own.
    pub is_own: bool,
    /// These were accused of others, and did not do it.
    pub cleared: Vec<Fingerprint>,
}

impl Silences {
    /// A worker of `host` is missed; those of one machine are `within` this time.
    pub fn missed(
        &mut self,
        host: &str,
        held: Option<Fingerprint>,
        within: Duration,
        now: Instant,
    ) -> Verdict {
        self.0
            .retain(|it| now.saturating_duration_since(it.at) < within);
        let (mut is_own, mut cleared) = (true, Vec::new());
        let others = self.0.iter_mut();
        for other in others.filter(|it| it.host == host && it.held != held) {
            is_own = false;
            let accused = std::mem::take(&mut other.accused);
            cleared.extend(other.held.filter(|_| accused));
        }
        self.0.push(Silence {
            host: host.to_owned(),
            at: now,
            held,
            accused: is_own,
        });
        Verdict { is_own, cleared }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::super::quarantine::{Quarantine, Rules};
    use super::super::tests::get;
    use super::*;

    fn fingerprint(operation: &str) -> Option<Fingerprint> {
        static QUARANTINE: LazyLock<Quarantine> = LazyLock::new(|| {
            Quarantine::new(Rules {
                period: Duration::from_secs(1),
                deaths: 2,
            })
        });
        let mut call = get(operation);
        call.url = format!("http://host/ows/?{operation}");
        Some(QUARANTINE.fingerprint(&call))
    }

    #[test]
    fn workers_of_one_machine_that_are_missed_together_clear_each_other() {
        let (mut silences, start) = (Silences::default(), Instant::now());
        let [one, two] = ["A=1", "A=2"].map(fingerprint);
        let mut missed = |host, held, ms| {
            let now = start + Duration::from_millis(ms);
            let Verdict { is_own, cleared } =
                silences.missed(host, held, Duration::from_millis(1500), now);
            (is_own, cleared)
        };
        let own = (true, vec![]);
        let cleared = |one: Option<Fingerprint>| (false, Vec::from_iter(one));
        assert_eq!(missed("here", one, 0), own);
        assert_eq!(missed("there", two, 500), own);
        assert_eq!(missed("here", two, 1000), cleared(one));
        assert_eq!(
            missed("here", None, 1400),
            cleared(None),
            "they are cleared"
        );
        assert_eq!(missed("here", one, 4000), own);
        assert_eq!(missed("here", one, 4500), own, "it does that to all");
        assert_eq!(missed("elsewhere", None, 9000), own);
        assert_eq!(
            missed("elsewhere", one, 9100),
            cleared(None),
            "one was idle"
        );
        assert_eq!(silences.0.len(), 2);
    }
}
