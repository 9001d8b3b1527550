//! What the operator says about projects with invalid layers.

use std::time::Duration;

use crate::protocol::without_suffix;

/// What becomes of such a project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBadLayers {
    /// It is refused.
    Strict,
    /// It is served without them.
    Skip,
    /// The same, and they come back when their sources do.
    Retry,
}

/// The rule and its exceptions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLayers {
    pub rule: OnBadLayers,
    /// Patterns of names; the first that fits counts.
    pub exceptions: Vec<(String, OnBadLayers)>,
    /// Between two tries to get them back.
    pub every: Duration,
}

impl OnBadLayers {
    pub(super) fn parse(word: &str) -> Option<Self> {
        Some(match word.trim() {
            "strict" => Self::Strict,
            "skip" => Self::Skip,
            "retry" => Self::Retry,
            _ => return None,
        })
    }
}

impl BadLayers {
    /// For the project of this name: its path below the root; a suffix does not matter.
    pub fn of(&self, project: &str) -> OnBadLayers {
        let name = without_suffix(project);
        let fits = |(pattern, _): &&(String, OnBadLayers)| {
            is_like(without_suffix(pattern).as_bytes(), name.as_bytes())
        };
        let exception = self.exceptions.iter().find(fits);
        exception.map_or(self.rule, |(_, on)| *on)
    }
}

/// `PATTERN=POLICY`, or what is wrong with it.
pub(super) fn exception(text: &str) -> Result<(String, OnBadLayers), String> {
    let parts = text.rsplit_once('=');
    let parsed = parts.and_then(|(name, word)| Some((name.trim(), OnBadLayers::parse(word)?)));
    match parsed {
        Some((name, on)) if !name.is_empty() => Ok((name.to_owned(), on)),
        _ => Err(format!(
            "expected NAME=strict, NAME=skip or NAME=retry, found {text:?}"
        )),
    }
}

/// `*` stands for any text.
fn is_like(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|at| is_like(rest, &name[at..])),
        Some((byte, rest)) => name
            .split_first()
            .is_some_and(|(first, name)| first == byte && is_like(rest, name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_exception_that_fits_counts() {
        let exceptions = ["drafts/keep*=strict", "drafts/*=skip", "city.qgs=retry"];
        let policy = BadLayers {
            rule: OnBadLayers::Strict,
            exceptions: exceptions.map(|it| exception(it).unwrap()).into(),
            every: Duration::ZERO,
        };
        for (name, on) in [
            ("drafts/a.qgz", OnBadLayers::Skip),
            ("drafts/deep/b", OnBadLayers::Skip),
            ("drafts/keeper.qgs", OnBadLayers::Strict),
            ("city.qgs", OnBadLayers::Retry),
            ("city", OnBadLayers::Retry),
            ("cities", OnBadLayers::Strict),
            ("other/city", OnBadLayers::Strict),
        ] {
            assert_eq!(policy.of(name), on, "{name}");
        }
    }

    #[test]
    fn an_exception_names_a_project_and_a_policy() {
        for wrong in ["city", "=skip", "city=", "city=maybe", "skip"] {
            assert!(exception(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            exception(" a=b = retry"),
            Ok(("a=b".into(), OnBadLayers::Retry))
        );
    }
}
