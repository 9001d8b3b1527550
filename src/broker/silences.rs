//! Workers that fell silent: each by itself, or all of a machine at once.
//!
//! Decisions only. Workers beat at times of their own, so those of a machine that stood
//! still, or was cut off, are missed one after the other within a heartbeat, and when the
//! first is missed the others are late. That is no request's doing, unless all of them have
//! the same one.

use std::time::{Duration, Instant};

use super::quarantine::Fingerprint;

/// The workers that were missed lately, by host, and what they had.
#[derive(Debug, Default)]
pub struct Silences(Vec<(Instant, String, Held)>);

/// None: it was idle.
type Held = Option<Fingerprint>;

impl Silences {
    /// A worker of `host` is missed. True if no other was less than `within` before, and none
    /// is `late`; but for those that had the same request.
    pub fn is_alone(
        &mut self,
        host: &str,
        held: Held,
        late: &[Held],
        within: Duration,
        now: Instant,
    ) -> bool {
        let is_recent = |at: Instant| now.saturating_duration_since(at) < within;
        self.0.retain(|(at, ..)| is_recent(*at));
        let of_host = self.0.iter().filter(|(_, other, _)| other == host);
        let mut others = of_host.map(|(.., other)| other).chain(late);
        let is_alone = others.all(|other| *other == held);
        self.0.push((now, host.to_owned(), held));
        is_alone
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::super::quarantine::{Quarantine, Rules};
    use super::super::tests::get;
    use super::*;

    fn fingerprint(operation: &str) -> Held {
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
    fn workers_of_one_machine_that_are_missed_together_are_not_alone() {
        let (mut silences, start) = (Silences::default(), Instant::now());
        let [one, two] = ["A=1", "A=2"].map(fingerprint);
        let mut is_alone = |host, held, late: &[Held], ms| {
            let now = start + Duration::from_millis(ms);
            silences.is_alone(host, held, late, Duration::from_millis(1500), now)
        };
        assert!(is_alone("here", one, &[], 0));
        assert!(is_alone("there", two, &[], 500));
        assert!(!is_alone("here", two, &[], 1000));
        assert!(!is_alone("here", None, &[], 2400));
        assert!(is_alone("here", one, &[], 4000));
        assert!(is_alone("here", one, &[one], 4500), "it does that to all");
        assert!(
            !is_alone("elsewhere", one, &[None], 4000),
            "an idle one is late"
        );
        assert!(!is_alone("elsewhere", one, &[two], 9000));
        assert_eq!(silences.0.len(), 1);
    }
}
