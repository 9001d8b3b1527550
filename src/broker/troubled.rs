//! Projects with invalid layers, for those who can mend them.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::protocol::{Failure, Final, ProjectRef};

/// Projects that are remembered, the last asked for.
const MAX: NonZeroUsize = NonZeroUsize::new(100).expect("it is not zero");

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLayers {
    pub project: String,
    pub layers: Vec<String>,
    /// Or served without them.
    pub is_refused: bool,
    /// Since they were found so.
    pub since: Duration,
}

#[derive(Debug)]
pub struct Troubled(LruCache<ProjectRef, Known>);

#[derive(Debug)]
struct Known {
    layers: Vec<String>,
    is_refused: bool,
    since: Instant,
}

impl Default for Troubled {
    fn default() -> Self {
        Self(LruCache::new(MAX))
    }
}

impl Troubled {
    /// A worker answered for the project, or says why it did not.
    pub fn heard(&mut self, project: &ProjectRef, last: &Final, now: Instant) {
        let is_refused = last.failure == Some(Failure::BadLayers);
        let layers = &last.bad_layers;
        if layers.is_empty() {
            // A worker that remembers that it refused has forgotten for what.
            if !is_refused
                && (last.found.is_some() || last.failure == Some(Failure::ProjectNotFound))
            {
                self.0.pop(project);
            }
            return;
        }
        match self.0.get_mut(project) {
            Some(known) if known.layers == *layers => known.is_refused = is_refused,
            _ => {
                let known = Known {
                    layers: layers.clone(),
                    is_refused,
                    since: now,
                };
                self.0.put(project.clone(), known);
            }
        }
    }

    pub fn list(&self, now: Instant) -> Vec<BadLayers> {
        let told = |(project, known): (&ProjectRef, &Known)| BadLayers {
            project: project.to_string(),
            layers: known.layers.clone(),
            is_refused: known.is_refused,
            since: now.saturating_duration_since(known.since),
        };
        self.0.iter().map(told).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Found;

    #[test]
    fn a_project_is_listed_until_its_layers_are_back() {
        let mut troubled = Troubled::default();
        let city = ProjectRef {
            alias: "file".into(),
            path: "city".into(),
        };
        let start = Instant::now();
        let refused = |names: &[&str]| Final {
            failure: Some(Failure::BadLayers),
            bad_layers: names.iter().map(|name| name.to_string()).collect(),
            ..Final::default()
        };
        troubled.heard(&city, &refused(&["roads"]), start);
        let later = start + Duration::from_secs(5);
        troubled.heard(&city, &refused(&[]), later);
        troubled.heard(&city, &refused(&["roads"]), later);
        let expected = BadLayers {
            project: "file:city".into(),
            layers: vec!["roads".into()],
            is_refused: true,
            since: Duration::from_secs(5),
        };
        assert_eq!(troubled.list(later), [expected]);
        let served = Final {
            found: Some(Found::Cached),
            ..Final::default()
        };
        troubled.heard(&city, &served, later);
        assert_eq!(troubled.list(later), []);
    }
}
