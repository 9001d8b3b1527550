//! The projects that workers open before they are ready.
//!
//! One that ended a worker while it was opened is left out from then on, so that it
//! cannot keep the pool from starting; clients may still ask for it. What is not opened
//! is told to the operator, with its reason.

use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use qgisserver::config;
use qgisserver::protocol::{NotOpened, ProjectRef};

/// The list, and who has which part of it.
#[derive(Debug, Default)]
pub struct Preload {
    projects: Rc<[ProjectRef]>,
    /// So many parts, of which each worker gets one.
    n_parts: usize,
    left_out: HashSet<ProjectRef>,
    /// What names nothing.
    skipped: Vec<NotOpened>,
    /// What each living worker got, by its number.
    given: BTreeMap<u32, Given>,
}

/// A part, and the list that it is of, which may be an older one.
#[derive(Debug)]
struct Given {
    part: usize,
    of: Rc<[ProjectRef]>,
}

impl Preload {
    /// What the settings name. What names nothing is logged and skipped.
    pub fn read(pool: &config::Pool) -> Self {
        let text = pool.preload_file.as_ref().map(std::fs::read_to_string);
        let text = text.unwrap_or_else(|| Ok(String::new()));
        let mut skipped = Vec::new();
        let text = text.unwrap_or_else(|error| {
            tracing::error!(%error, "nothing is opened ahead (projects.cache.preload_config)");
            skipped.push(not_opened(
                "projects.cache.preload_config",
                &error.to_string(),
            ));
            String::new()
        });
        let listed = lines(&text).chain(pool.restore_projects.iter().map(String::as_str));
        let mut projects = Vec::new();
        for name in listed {
            match qgisserver::project(name, &pool.finding) {
                Some(project) if projects.contains(&project) => {}
                Some(project) => projects.push(project),
                None => {
                    tracing::warn!(name, "no project can have this name: not opened ahead");
                    skipped.push(not_opened(name, "no project can have this name"));
                }
            }
        }
        let n_parts = if pool.preload_spread { pool.workers } else { 1 };
        Self {
            projects: projects.into(),
            n_parts: n_parts.max(1),
            skipped,
            ..Self::default()
        }
    }

    /// The new list of new settings. Who lives has what the old one gave it.
    pub fn reread(&mut self, pool: &config::Pool) {
        let given = std::mem::take(&mut self.given);
        *self = Self {
            given,
            ..Self::read(pool)
        };
    }

    pub fn is_empty(&self) -> bool {
        self.projects.is_empty()
    }

    /// What a new worker opens: the part that the fewest of the living have.
    pub fn part(&mut self, number: u32) -> Vec<(usize, ProjectRef)> {
        let is_of_now = |it: &&Given| Rc::ptr_eq(&it.of, &self.projects);
        let given: Vec<usize> = self
            .given
            .values()
            .filter(is_of_now)
            .map(|it| it.part)
            .collect();
        let n_have = |part: &usize| given.iter().filter(|it| *it == part).count();
        let part = (0..self.n_parts).min_by_key(n_have).unwrap_or(0);
        let of = self.projects.clone();
        self.given.insert(number, Given { part, of });
        let all = self.projects.iter().enumerate();
        let own = all.filter(|(at, it)| at % self.n_parts == part && !self.left_out.contains(it));
        own.map(|(at, project)| (at, project.clone())).collect()
    }

    /// What no worker opens. Each of them knows what it could not open itself.
    pub fn not_opened(&self) -> Vec<NotOpened> {
        let ended = "a worker ended while it opened this project";
        let is_left_out = |it: &&ProjectRef| self.left_out.contains(*it);
        let left_out = self.projects.iter().filter(is_left_out);
        let left_out = left_out.map(|project| not_opened(&project.to_string(), ended));
        self.skipped.iter().cloned().chain(left_out).collect()
    }

    /// A worker is gone; `opening`: the place in its list of the project that it was
    /// opening then.
    pub fn gone(&mut self, number: u32, opening: Option<usize>) {
        let given = self.given.remove(&number);
        let Some((given, at)) = given.zip(opening) else {
            return;
        };
        if let Some(project) = given.of.get(at)
            && self.left_out.insert(project.clone())
        {
            tracing::error!(%project, worker = number, "the worker ended while it opened this project: not opened ahead any more");
        }
    }
}

fn not_opened(project: &str, why: &str) -> NotOpened {
    NotOpened {
        project: project.into(),
        why: why.into(),
    }
}

/// One name per line; `#` begins a comment, behind a name, too.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let names = text.lines().map(|line| match line.split_once('#') {
        Some((name, _)) => name.trim(),
        None => line.trim(),
    });
    names.filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preload(text: &str, spread: bool) -> Preload {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("preload");
        std::fs::write(&file, text).unwrap();
        let pool = config::Pool {
            preload_file: Some(file),
            restore_projects: vec!["city".into(), "sub/last".into()],
            preload_spread: spread,
            workers: 2,
            ..config::Config::default().pool
        };
        Preload::read(&pool)
    }

    fn paths(part: Vec<(usize, ProjectRef)>) -> Vec<String> {
        part.into_iter().map(|(_, project)| project.path).collect()
    }

    fn names(of: Vec<NotOpened>) -> Vec<String> {
        of.into_iter().map(|it| it.project).collect()
    }

    const LIST: &str =
        "# ours\n\nfile:city # the old one\n  town.qgs  \n../secret\n #old\nriver#\n";

    #[test]
    fn a_list_has_a_name_per_line_and_what_names_nothing_is_skipped() {
        let mut preload = preload(LIST, false);
        let all = ["city", "town.qgs", "river", "sub/last"];
        assert_eq!(paths(preload.part(1)), all);
        assert_eq!(paths(preload.part(2)), all);
        assert_eq!(names(preload.not_opened()), ["../secret"]);
    }

    #[test]
    fn a_spread_list_is_in_the_pool_once_and_a_new_worker_takes_what_is_missing() {
        let mut preload = preload(LIST, true);
        assert_eq!(paths(preload.part(1)), ["city", "river"]);
        assert_eq!(paths(preload.part(2)), ["town.qgs", "sub/last"]);
        assert_eq!(paths(preload.part(3)), ["city", "river"]);
        preload.gone(2, None);
        assert_eq!(paths(preload.part(4)), ["town.qgs", "sub/last"]);
    }

    #[test]
    fn what_ended_a_worker_is_left_out() {
        let mut preload = preload(LIST, false);
        preload.part(1);
        preload.gone(1, Some(1));
        assert_eq!(paths(preload.part(2)), ["city", "river", "sub/last"]);
        let missing = names(preload.not_opened());
        assert_eq!(missing, ["../secret", "file:town.qgs"]);
    }

    /// A worker that began with the old list may end after the new one came.
    #[test]
    fn what_ended_a_worker_is_left_out_of_the_next_list_too() {
        let mut preload = preload(LIST, true);
        assert_eq!(paths(preload.part(1)), ["city", "river"]);
        let pool = config::Pool {
            restore_projects: vec!["first".into(), "river".into(), "city".into()],
            ..config::Config::default().pool
        };
        preload.reread(&pool);
        preload.gone(1, Some(2));
        assert_eq!(paths(preload.part(2)), ["first", "city"]);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_none() {
        let pool = config::Pool {
            preload_file: Some("/nowhere/at/all".into()),
            ..config::Config::default().pool
        };
        let preload = Preload::read(&pool);
        assert!(preload.is_empty());
        let missing = names(preload.not_opened());
        assert_eq!(missing, ["projects.cache.preload_config"]);
    }
}
