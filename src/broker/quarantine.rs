//! Requests that end their workers: after some deaths they are not let in any more.
//!
//! Decisions only: events and `now` come in. A request is known by its
//! [`Fingerprint`], so that the same one is recognised whoever sends it.
//!
//! | a request is | event | and becomes |
//! |---|---|---|
//! | unknown | its worker died | suspected |
//! | suspected | it was answered | unknown |
//! | suspected | its worker died once more, `deaths` times in all | quarantined |
//! | quarantined | `period` is over | suspected, and one more death is enough |
//! | suspected | nothing for a `period` | unknown |
//!
//! A death is the end of a worker because of what it holds:
//!
//! - its connection ended, and it had not said that it leaves;
//! - it fell silent, whether its request was cancelled since or not: the process stood
//!   still, and its pool had to kill it. Unless others of its machine did so at the same
//!   time ([`super::silences`]);
//! - it answered that QGIS failed, which includes memory that ran out, and left because it
//!   cannot trust QGIS any more.
//!
//! What follows a CANCEL otherwise is none, for then the worker is meant to end itself. It
//! would be wrong to count it at a deadline: all requests of a project overrun theirs while
//! its source does not answer, and must not be refused when it does again; that is the
//! breaker's. Nor is a worker that the server expels because it broke the protocol, which no
//! request does.
//! An answer clears the request, because a worker can also be killed by others:
//! who is answered in between was only there when it happened.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::Call;

/// Requests that are remembered; of more, those that were quiet longest are forgotten.
const TABLE_MAX: NonZeroUsize = NonZeroUsize::new(1024).expect("it is not zero");

/// Requests in a status.
const LIST_MAX: usize = 100;

/// How much of the beginning and of the end of a body makes it recognisable. To
/// read all of a large one would hold up everybody.
const SAMPLE: usize = 32 << 10;

/// Parameters by which the same request differs from time to time: what keeps
/// caches out, and who asks.
const NOISE: [&str; 22] = [
    "_",
    "_DC",
    "_T",
    "_TS",
    "ACCESS_TOKEN",
    "CACHEBUSTER",
    "JSESSIONID",
    "NOCACHE",
    "NO_CACHE",
    "PHPSESSID",
    "RAND",
    "RANDOM",
    "REQUESTID",
    "REQUEST_ID",
    "SESSION",
    "SESSIONID",
    "SESSION_ID",
    "SID",
    "TOKEN",
    "TS",
    "X-REQUEST-ID",
    "X_REQUEST_ID",
];

/// The settings that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// How long a quarantine is; zero: there is none.
    pub period: Duration,
    pub deaths: u32,
}

/// What makes two requests the same: method, project, path, parameters in any
/// order, body. Differs from one life of the server to the next, so that nobody
/// can make up a request that is taken for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(u64);

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A request that may have ended its worker.
#[derive(Debug, Clone)]
pub struct Accused {
    pub fingerprint: Fingerprint,
    pub request_id: String,
    pub operation: String,
    /// Empty for a request without one.
    pub project: String,
}

/// One request in quarantine, as the status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    pub fingerprint: String,
    pub operation: String,
    /// Empty for a request without one.
    pub project: String,
    /// How long it has lasted.
    pub since: Duration,
    /// How long it will last.
    pub left: Duration,
    pub n_refused: u64,
}

/// All requests that ended a worker lately.
#[derive(Debug)]
pub struct Quarantine {
    rules: Rules,
    hasher: RandomState,
    suspects: LruCache<Fingerprint, Suspect>,
}

#[derive(Debug)]
struct Suspect {
    operation: String,
    project: String,
    n_deaths: u32,
    /// The last time; a quarantine counts from it.
    died: Instant,
    since: Instant,
    /// What these two were before the last death.
    before: (Instant, Instant),
    n_refused: u64,
    quarantined: bool,
}

impl Quarantine {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            hasher: RandomState::new(),
            suspects: LruCache::new(TABLE_MAX),
        }
    }

    /// Other rules from now on; what is known stays.
    pub fn configure(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Nobody is suspected, so that no request needs to be looked at.
    pub fn is_empty(&self) -> bool {
        self.suspects.is_empty()
    }

    pub fn is_enabled(&self) -> bool {
        !self.rules.period.is_zero()
    }

    pub fn fingerprint(&self, call: &Call) -> Fingerprint {
        let mut hasher = self.hasher.build_hasher();
        (&call.method, &call.project).hash(&mut hasher);
        hash_url(&call.url, &mut hasher);
        hash_body(&call.body, &mut hasher);
        Fingerprint(hasher.finish())
    }

    /// How long the request will still be refused; `None` lets it in.
    pub fn refuses(&mut self, request: Fingerprint, now: Instant) -> Option<Duration> {
        let period = self.rules.period;
        let suspect = self.suspects.get_mut(&request)?;
        let left = suspect.left(period, now)?;
        suspect.n_refused += 1;
        Some(left)
    }

    /// Its worker died. True if a quarantine begins with that.
    pub fn died(&mut self, request: &Accused, now: Instant) -> bool {
        let Rules { period, deaths } = self.rules;
        if period.is_zero() {
            return false;
        }
        let suspect = self
            .suspects
            .get_or_insert_mut(request.fingerprint, || Suspect::new(request, now));
        let was_in = suspect.left(period, now).is_some();
        if suspect.is_forgotten(period, now) {
            *suspect = Suspect::new(request, now);
        }
        suspect.n_deaths = suspect.n_deaths.saturating_add(1);
        suspect.quarantined = suspect.n_deaths >= deaths;
        suspect.before = (suspect.died, suspect.since);
        suspect.died = now;
        let begins = suspect.quarantined && !was_in;
        if begins {
            (suspect.since, suspect.n_refused) = (now, 0);
        }
        begins
    }

    /// It did not end that worker.
    pub fn take_back(&mut self, request: Fingerprint) {
        let Some(suspect) = self.suspects.get_mut(&request) else {
            return;
        };
        suspect.n_deaths = suspect.n_deaths.saturating_sub(1);
        suspect.quarantined = suspect.n_deaths >= self.rules.deaths;
        (suspect.died, suspect.since) = suspect.before;
        if suspect.n_deaths == 0 {
            self.suspects.pop(&request);
        }
    }

    /// It was answered: whatever its workers died of, it was not the request.
    pub fn answered(&mut self, request: Fingerprint) {
        self.suspects.pop(&request);
    }

    /// Forgets who was quiet for long enough. To be called now and then.
    pub fn tick(&mut self, now: Instant) {
        let period = self.rules.period;
        let forgotten: Vec<Fingerprint> = self
            .suspects
            .iter()
            .filter(|(_, suspect)| suspect.is_forgotten(period, now))
            .map(|(request, _)| *request)
            .collect();
        for request in forgotten {
            self.suspects.pop(&request);
        }
    }

    /// Those in quarantine, the latest first.
    pub fn list(&self, now: Instant) -> Vec<Quarantined> {
        let mut list: Vec<Quarantined> = self
            .suspects
            .iter()
            .filter_map(|(request, suspect)| {
                let left = suspect.left(self.rules.period, now)?;
                Some(Quarantined {
                    fingerprint: request.to_string(),
                    operation: suspect.operation.clone(),
                    project: suspect.project.clone(),
                    since: now.saturating_duration_since(suspect.since),
                    left,
                    n_refused: suspect.n_refused,
                })
            })
            .collect();
        list.sort_by_key(|quarantined| quarantined.since);
        list.truncate(LIST_MAX);
        list
    }
}

impl Suspect {
    fn new(request: &Accused, now: Instant) -> Self {
        Self {
            operation: request.operation.clone(),
            project: request.project.clone(),
            n_deaths: 0,
            died: now,
            since: now,
            before: (now, now),
            n_refused: 0,
            quarantined: false,
        }
    }

    /// Of its quarantine.
    fn left(&self, period: Duration, now: Instant) -> Option<Duration> {
        let left = (self.died + period).saturating_duration_since(now);
        (self.quarantined && !left.is_zero()).then_some(left)
    }

    fn is_forgotten(&self, period: Duration, now: Instant) -> bool {
        let memory = if self.quarantined { period * 2 } else { period };
        now.saturating_duration_since(self.died) >= memory
    }
}

/// Whatever the host is called, and in whatever order parameters come.
fn hash_url(url: &str, hasher: &mut impl Hasher) {
    let local = url.split_once("://").map_or(url, |(_, rest)| rest);
    let local = local.find('/').map_or("", |at| &local[at..]);
    let (path, query) = local.split_once('?').unwrap_or((local, ""));
    let mut pairs: Vec<(String, _)> = form_urlencoded::parse(query.as_bytes())
        .map(|(key, value)| (key.to_uppercase(), value))
        .filter(|(key, _)| !NOISE.contains(&key.as_str()))
        .collect();
    // Stable: of a repeated key the first counts.
    pairs.sort_by(|(one, _), (other, _)| one.cmp(other));
    (path, pairs).hash(hasher);
}

fn hash_body(body: &[u8], hasher: &mut impl Hasher) {
    let tail = body
        .len()
        .saturating_sub(SAMPLE)
        .max(SAMPLE.min(body.len()));
    (body.len(), &body[..SAMPLE.min(body.len())], &body[tail..]).hash(hasher);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::get;
    use super::*;
    use crate::protocol::ProjectRef;

    const S: Duration = Duration::from_secs(1);

    fn quarantine() -> Quarantine {
        Quarantine::new(Rules {
            period: 10 * S,
            deaths: 2,
        })
    }

    fn of(query: &str) -> Call {
        Call {
            url: format!("http://host/ows/?{query}"),
            ..get("GetMap")
        }
    }

    fn accused(fingerprint: Fingerprint, call: &Call) -> Accused {
        Accused {
            fingerprint,
            request_id: call.request_id.clone(),
            operation: call.operation.clone(),
            project: call.project_name(),
        }
    }

    #[test]
    fn a_request_that_ended_two_workers_is_refused_for_its_time() {
        let (mut quarantine, now, call) = (quarantine(), Instant::now(), of("A=1"));
        let it = quarantine.fingerprint(&call);
        assert!(!quarantine.died(&accused(it, &call), now));
        assert_eq!(quarantine.refuses(it, now), None);
        assert!(quarantine.died(&accused(it, &call), now + S));
        assert_eq!(quarantine.refuses(it, now + S), Some(10 * S));
        assert_eq!(quarantine.refuses(it, now + 10 * S), Some(S));
        let [listed] = &quarantine.list(now + 3 * S)[..] else {
            panic!("one is in quarantine");
        };
        assert_eq!((listed.since, listed.left), (2 * S, 8 * S));
        assert_eq!((&*listed.operation, listed.n_refused), ("GetMap", 2));
        assert_eq!(listed.fingerprint, it.to_string());
        assert_eq!(quarantine.refuses(it, now + 11 * S), None);
        assert_eq!(quarantine.list(now + 11 * S), []);
    }

    #[test]
    fn a_death_that_was_taken_back_does_not_count() {
        let (mut quarantine, now, call) = (quarantine(), Instant::now(), of("A=1"));
        let it = quarantine.fingerprint(&call);
        quarantine.died(&accused(it, &call), now);
        assert!(quarantine.died(&accused(it, &call), now));
        quarantine.take_back(it);
        assert_eq!(quarantine.refuses(it, now), None);
        assert!(quarantine.died(&accused(it, &call), now));
        quarantine.take_back(it);
        quarantine.take_back(it);
        assert!(quarantine.is_empty());
    }

    #[test]
    fn after_a_quarantine_one_more_death_is_enough() {
        let (mut quarantine, now, call) = (quarantine(), Instant::now(), of("A=1"));
        let it = quarantine.fingerprint(&call);
        quarantine.died(&accused(it, &call), now);
        quarantine.died(&accused(it, &call), now);
        assert!(quarantine.died(&accused(it, &call), now + 15 * S));
        assert!(quarantine.refuses(it, now + 16 * S).is_some());
    }

    #[test]
    fn a_death_that_is_taken_back_begins_no_quarantine_anew() {
        let (mut quarantine, now, call) = (quarantine(), Instant::now(), of("A=1"));
        let it = quarantine.fingerprint(&call);
        quarantine.died(&accused(it, &call), now);
        quarantine.died(&accused(it, &call), now);
        quarantine.died(&accused(it, &call), now + 15 * S);
        quarantine.take_back(it);
        assert_eq!(quarantine.refuses(it, now + 15 * S), None);
    }

    #[test]
    fn whoever_is_quiet_for_long_enough_is_forgotten() {
        let (mut quarantine, now, call) = (quarantine(), Instant::now(), of("A=1"));
        let it = quarantine.fingerprint(&call);
        quarantine.died(&accused(it, &call), now);
        assert!(
            !quarantine.died(&accused(it, &call), now + 10 * S),
            "the first again"
        );
        assert!(quarantine.died(&accused(it, &call), now + 11 * S));
        quarantine.tick(now + 30 * S);
        assert!(!quarantine.is_empty());
        quarantine.tick(now + 31 * S);
        assert!(quarantine.is_empty());
    }

    #[test]
    fn a_request_that_is_answered_between_two_deaths_is_innocent() {
        let (mut quarantine, now, call) = (quarantine(), Instant::now(), of("A=1"));
        let it = quarantine.fingerprint(&call);
        for _ in 0..5 {
            assert!(!quarantine.died(&accused(it, &call), now));
            quarantine.answered(it);
        }
        assert!(quarantine.is_empty());
    }

    #[test]
    fn without_a_period_nobody_is_quarantined() {
        let mut quarantine = Quarantine::new(Rules {
            period: Duration::ZERO,
            deaths: 2,
        });
        let (now, call) = (Instant::now(), of("A=1"));
        let it = quarantine.fingerprint(&call);
        assert!(!(0..5).any(|_| quarantine.died(&accused(it, &call), now)));
        assert!(quarantine.is_empty());
    }

    #[test]
    fn a_request_is_known_again_by_what_it_asks() {
        let quarantine = quarantine();
        let print = |call: &Call| quarantine.fingerprint(call);
        let known = print(&of("MAP=a&BBOX=1,2"));
        let same = [
            of("BBOX=1%2C2&MAP=a"),
            of("map=a&BBOX=1,2&_=1700000000&SessionId=x"),
            Call {
                url: "https://other:8080/ows/?MAP=a&BBOX=1,2".into(),
                request_id: "r-2".into(),
                headers: vec![("Cookie".into(), "x".into())],
                ..get("GetMap")
            },
        ];
        for call in same {
            assert_eq!(print(&call), known, "{}", call.url);
        }
        let project = |path: &str| {
            Some(ProjectRef {
                alias: "file".into(),
                path: path.into(),
            })
        };
        let others = [
            of("MAP=a&BBOX=1,3"),
            of("MAP=a&BBOX=1,2&TIME=2020"),
            Call {
                url: "http://host/wfs3/?MAP=a&BBOX=1,2".into(),
                ..get("GetMap")
            },
            Call {
                method: "POST".into(),
                ..of("MAP=a&BBOX=1,2")
            },
            Call {
                body: "<x/>".into(),
                ..of("MAP=a&BBOX=1,2")
            },
            Call {
                project: project("a"),
                ..of("MAP=a&BBOX=1,2")
            },
        ];
        for call in others {
            assert_ne!(print(&call), known, "{} {}", call.method, call.url);
        }
    }

    #[test]
    fn large_bodies_differ_by_length_beginning_or_end() {
        let quarantine = quarantine();
        let print = |body: Vec<u8>| {
            quarantine.fingerprint(&Call {
                body: body.into(),
                ..of("")
            })
        };
        let known = print(vec![0; 3 * SAMPLE]);
        assert_eq!(print(vec![0; 3 * SAMPLE]), known);
        assert_ne!(print(vec![0; 3 * SAMPLE + 1]), known);
        for at in [0, 3 * SAMPLE - 1] {
            let mut body = vec![0; 3 * SAMPLE];
            body[at] = 1;
            assert_ne!(print(body), known, "{at}");
        }
    }

    #[test]
    fn the_table_and_the_list_are_bounded() {
        let (mut quarantine, now) = (quarantine(), Instant::now());
        for n in 0..3000 {
            let call = of(&format!("N={n}"));
            let it = quarantine.fingerprint(&call);
            quarantine.died(&accused(it, &call), now);
            quarantine.died(&accused(it, &call), now);
        }
        assert_eq!(quarantine.suspects.len(), TABLE_MAX.get());
        assert_eq!(quarantine.list(now).len(), LIST_MAX);
    }

    proptest! {
        /// Refused is exactly who was in as many deaths in a row, none of them long ago.
        #[test]
        fn only_deaths_in_a_row_lead_to_a_quarantine_and_time_ends_it(
            events in prop::collection::vec((0u8..3, 0usize..3, 0u64..8), 1..100),
        ) {
            let mut quarantine = quarantine();
            let calls = [of("A=1"), of("A=2"), of("A=3")];
            let mut now = Instant::now();
            // Deaths in a row, and when the last one was.
            let mut model = [(0u32, now); 3];
            for (event, at, seconds) in events {
                now += Duration::from_secs(seconds);
                let it = quarantine.fingerprint(&calls[at]);
                let (n, last) = &mut model[at];
                let memory = if *n >= 2 { 20 * S } else { 10 * S };
                if now - *last >= memory {
                    *n = 0;
                }
                match event {
                    0 => {
                        let was_in = *n >= 2 && now - *last < 10 * S;
                        (*n, *last) = (*n + 1, now);
                        prop_assert_eq!(quarantine.died(&accused(it, &calls[at]), now), *n >= 2 && !was_in);
                    }
                    1 => {
                        *n = 0;
                        quarantine.answered(it);
                    }
                    _ => quarantine.tick(now),
                }
                for (call, (n, last)) in calls.iter().zip(&model) {
                    let expected = *n >= 2 && now - *last < 10 * S;
                    let it = quarantine.fingerprint(call);
                    prop_assert_eq!(quarantine.refuses(it, now).is_some(), expected);
                }
                let listed = quarantine.list(now).len();
                let expected = model.iter().filter(|(n, last)| *n >= 2 && now - *last < 10 * S);
                prop_assert_eq!(listed, expected.count());
            }
        }
    }
}
