//! The last exception of each plugin while it served, for those who can mend it.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::protocol::Raised;

/// Plugins that are remembered, the last that raised.
const MAX: NonZeroUsize = NonZeroUsize::new(100).expect("it is not zero");

/// Of a traceback. Its end says what happened.
const TRACE_MAX: usize = 4000;

/// What a plugin raised in requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceptions {
    pub plugin: String,
    pub last: String,
    pub n_requests: u64,
    /// Since the last one.
    pub ago: Duration,
}

#[derive(Debug)]
pub struct Exceptional(LruCache<String, Known>);

#[derive(Debug)]
struct Known {
    last: String,
    n_requests: u64,
    at: Instant,
}

impl Default for Exceptional {
    fn default() -> Self {
        Self(LruCache::new(MAX))
    }
}

impl Exceptional {
    /// A request ended in which a plugin raised.
    pub fn heard(&mut self, raised: &Raised, now: Instant) {
        let before = self.0.get(&raised.plugin).map_or(0, |it| it.n_requests);
        let known = Known {
            last: end(&raised.trace).to_owned(),
            n_requests: before + 1,
            at: now,
        };
        self.0.put(raised.plugin.clone(), known);
    }

    pub fn list(&self, now: Instant) -> Vec<Exceptions> {
        let told = |(plugin, known): (&String, &Known)| Exceptions {
            plugin: plugin.clone(),
            last: known.last.clone(),
            n_requests: known.n_requests,
            ago: now.saturating_duration_since(known.at),
        };
        self.0.iter().map(told).collect()
    }
}

fn end(trace: &str) -> &str {
    let start = trace.len().saturating_sub(TRACE_MAX);
    let start = (start..=trace.len()).find(|at| trace.is_char_boundary(*at));
    &trace[start.unwrap_or_default()..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_known_for_its_last_exception_and_how_many_there_were() {
        let mut exceptional = Exceptional::default();
        let start = Instant::now();
        let long = format!("{}ü the end", "ä".repeat(TRACE_MAX));
        for (trace, after) in [("first", 0), (&long, 5)] {
            let raised = Raised {
                plugin: "guard".into(),
                trace: trace.into(),
            };
            exceptional.heard(&raised, start + Duration::from_secs(after));
        }
        let list = exceptional.list(start + Duration::from_secs(7));
        let [it] = &list[..] else {
            panic!("{list:?}");
        };
        assert_eq!((&*it.plugin, it.n_requests), ("guard", 2));
        assert_eq!(it.ago, Duration::from_secs(2));
        assert!(it.last.ends_with("ü the end") && it.last.len() <= TRACE_MAX);
    }

    #[test]
    fn only_so_many_are_remembered() {
        let mut exceptional = Exceptional::default();
        for n in 0..2 * MAX.get() {
            let raised = Raised {
                plugin: n.to_string(),
                trace: String::new(),
            };
            exceptional.heard(&raised, Instant::now());
        }
        assert_eq!(exceptional.list(Instant::now()).len(), MAX.get());
    }
}
