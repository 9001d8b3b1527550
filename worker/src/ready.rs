//! What READY has room for: it tells the first of what is too much, so that a worker with
//! many plugins or many projects is not sent away for it.

use qgisserver::protocol::{NotOpened, Ready};
use serde::Serialize;

use crate::plugins;

/// Of READY, for each list of plugins' names.
const PLUGINS_MAX: usize = 4 << 10;

/// Of READY, for the names of projects that are open already. With the reports about
/// plugins and both lists of names it leaves a few KiB for the rest.
const PROJECTS_MAX: usize = 12 << 10;

/// Of READY, for those that are not, and why.
const NOT_OPENED_MAX: usize = 2 << 10;

/// Characters of a name or a reason there.
const NOT_OPENED_TEXT: usize = 200;

/// READY with as much of its lists as it may have.
pub fn fit(ready: Ready) -> Ready {
    Ready {
        plugins: first(PLUGINS_MAX, ready.plugins),
        plugins_failed: first(PLUGINS_MAX, ready.plugins_failed),
        plugin_reports: plugins::fit(ready.plugin_reports),
        projects: first(PROJECTS_MAX, ready.projects),
        not_opened: first(
            NOT_OPENED_MAX,
            ready.not_opened.into_iter().map(brief).collect(),
        ),
        ..ready
    }
}

/// Short enough that one does not take the place of all others.
fn brief(it: NotOpened) -> NotOpened {
    let cut = |text: String| match text.char_indices().nth(NOT_OPENED_TEXT) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    };
    NotOpened {
        project: cut(it.project),
        why: cut(it.why),
    }
}

/// As many as fit into so many bytes as they are written, each with a comma.
pub fn first<T: Serialize>(bytes: usize, all: Vec<T>) -> Vec<T> {
    let mut left = bytes;
    let fits = |one: &T| {
        let comma = 1;
        let size = serde_json::to_vec(one).map_or(usize::MAX, |text| text.len() + comma);
        let rest = left.checked_sub(size);
        left = rest.unwrap_or(0);
        rest.is_some()
    };
    all.into_iter().take_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qgisserver::protocol::{NotOpened, Plugin, PluginStatus, ProjectRef, READY_MAX, Versions};

    /// The longest name that a client or an operator may give a project.
    const NAME_MAX: usize = 1024;

    fn project(n: usize) -> ProjectRef {
        ProjectRef {
            alias: "postgresql".into(),
            // Twice as long as it is written.
            path: format!("{n}{}", "\"".repeat(NAME_MAX - 4)),
        }
    }

    fn not_opened(n: usize) -> NotOpened {
        NotOpened {
            project: format!("file:{n}"),
            why: "project_unreadable".into(),
        }
    }

    fn report(name: &str) -> Plugin {
        Plugin {
            name: name.into(),
            path: "/p".repeat(500),
            status: PluginStatus::Failed,
            error: Some("\u{1}".repeat(4000)),
            ..Plugin::default()
        }
    }

    #[test]
    fn the_worst_ready_is_one_that_the_server_accepts() {
        let text = || "x".repeat(64);
        let names: Vec<String> = (0..1000).map(|n| format!("{n:0>255}")).collect();
        let ready = fit(Ready {
            pool: "x".repeat(255),
            pool_instance: text(),
            instance: text(),
            host: text(),
            versions: Versions {
                worker: text(),
                qgis: text(),
                python: text(),
                gdal: text(),
                proj: text(),
                geos: text(),
            },
            plugins: names.clone(),
            plugin_reports: names.iter().map(|name| report(name)).collect(),
            plugins_failed: names,
            projects: (0..5000).map(project).collect(),
            not_opened: (0..5000).map(not_opened).collect(),
            ..Ready::default()
        });
        let lists = [
            ready.plugins.len(),
            ready.projects.len(),
            ready.not_opened.len(),
        ];
        assert!(lists.iter().all(|n| *n > 4), "{lists:?}");
        assert!(!ready.plugin_reports.is_empty());
        let size = serde_json::to_vec(&ready).unwrap().len();
        assert!((READY_MAX / 2..=READY_MAX).contains(&size), "{size}");
    }

    #[test]
    fn a_long_reason_keeps_no_other_out() {
        let long = NotOpened {
            project: "é".repeat(5000),
            why: "x".repeat(5000),
        };
        let ready = fit(Ready {
            not_opened: vec![long, not_opened(1)],
            ..Ready::default()
        });
        assert_eq!(ready.not_opened.len(), 2);
        assert!(ready.not_opened[0].why.ends_with("x…"));
    }

    #[test]
    fn what_has_room_is_told_whole() {
        let ready = Ready {
            plugins: vec!["a".into(), "b".into()],
            plugins_failed: vec!["c".into()],
            plugin_reports: vec![report("c")],
            projects: (0..3).map(project).collect(),
            not_opened: (0..3).map(not_opened).collect(),
            ..Ready::default()
        };
        assert_eq!(fit(ready.clone()), ready);
    }
}
