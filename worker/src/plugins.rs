//! Plugins from outside: what READY says of them, and the program that installs them.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, killpg, sigprocmask};
use nix::unistd::Pid;
use qgisserver::config;
use qgisserver::protocol::{Plugin, PluginStatus};

use crate::ready;

/// Of READY, for reports about plugins.
const REPORTS_MAX: usize = 38 << 10;

/// Of a traceback when there are many.
const SHORT: usize = 400;

/// How often the manager is asked whether it is done.
const LOOK: Duration = Duration::from_millis(20);

/// The names of the plugins that have this status.
pub fn names(plugins: &[Plugin], status: PluginStatus) -> Vec<String> {
    let those = plugins.iter().filter(|plugin| plugin.status == status);
    those.map(|plugin| plugin.name.clone()).collect()
}

/// The reports that READY has room for: all, or shorter ones, or the first.
pub fn fit(mut plugins: Vec<Plugin>) -> Vec<Plugin> {
    if size(&plugins) <= REPORTS_MAX {
        return plugins;
    }
    for plugin in &mut plugins {
        plugin
            .metadata
            .retain(|key, _| matches!(key.as_str(), "name" | "version"));
        if let Some(error) = &mut plugin.error {
            *error = last(SHORT, error).to_owned();
        }
    }
    let brackets = 1;
    ready::first(REPORTS_MAX - brackets, plugins)
}

fn size(plugins: &[Plugin]) -> usize {
    serde_json::to_vec(plugins).map_or(usize::MAX, |text| text.len())
}

/// The end of `text`, no longer than `max` bytes.
fn last(max: usize, text: &str) -> &str {
    let start = text.len().saturating_sub(max);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at));
    &text[start.unwrap_or(text.len())..]
}

/// Lets the plugin manager put the wanted plugins into the first path. While it works
/// nothing else happens here, so it has a bound. True if all went well.
pub fn install(pool: &config::Pool) -> bool {
    let (Some(program), Some(folder)) = (&pool.plugin_manager, pool.plugin_paths.first()) else {
        return true;
    };
    let end = Instant::now() + pool.plugin_timeout;
    let mut steps = Vec::new();
    if !folder.join("sources.list").exists() {
        steps.push(vec!["init"]);
    }
    steps.push(vec!["update"]);
    steps.extend(
        pool.plugins
            .iter()
            .map(|name| vec!["install", name.as_str()]),
    );
    // After a step that failed the next may still succeed: what it needs may be there.
    let in_time = |_: &&Vec<&str>| Instant::now() < end;
    let done = steps.iter().take_while(in_time);
    let n_done = done.filter(|step| run(program, step, folder, end)).count();
    n_done == steps.len()
}

/// One step, in the folder of the plugins, as the manager wants it.
fn run(program: &str, step: &[&str], folder: &Path, end: Instant) -> bool {
    let step_name = step.join(" ");
    let started = command(program, step, folder).spawn();
    let outcome = started.and_then(|mut child| wait(&mut child, end));
    match outcome {
        Ok(Some(status)) if status.success() => {
            tracing::info!(program, step = step_name, "plugin manager");
            true
        }
        Ok(Some(status)) => {
            tracing::error!(program, step = step_name, %status, "the plugin manager failed");
            false
        }
        Ok(None) => {
            tracing::error!(
                program,
                step = step_name,
                "the plugin manager took too long (plugins.install_timeout)"
            );
            false
        }
        Err(error) => {
            tracing::error!(program, step = step_name, %error, "no plugin manager (plugins.plugin_manager)");
            false
        }
    }
}

fn command(program: &str, step: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(step)
        .current_dir(folder)
        .env("QGIS_PLUGINPATH", folder)
        .stdin(Stdio::null())
        // Our standard error is the log; what the manager says belongs there.
        .stdout(stderr())
        .process_group(0);
    // SAFETY: both are async-signal-safe. The pool holds its signals; the manager should
    // not, and it ends with us.
    unsafe {
        command.pre_exec(|| {
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
        });
    }
    command
}

fn stderr() -> Stdio {
    use std::os::fd::AsFd;
    let copy = std::io::stderr().as_fd().try_clone_to_owned();
    copy.map_or_else(|_| Stdio::null(), Stdio::from)
}

/// None when the time was over and it was ended.
fn wait(child: &mut Child, end: Instant) -> std::io::Result<Option<ExitStatus>> {
    while Instant::now() < end {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(LOOK);
    }
    // With all that it started.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    child.wait()?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qgisserver::protocol::{READY_MAX, Ready};

    fn plugin(name: &str, text: usize) -> Plugin {
        Plugin {
            name: name.into(),
            status: PluginStatus::Failed,
            metadata: [("name", 10), ("version", 10), ("description", 500)]
                .map(|(key, n)| (key.to_owned(), "\u{1}".repeat(n)))
                .into(),
            error: Some("é".repeat(text)),
            ..Plugin::default()
        }
    }

    #[test]
    fn ready_has_room_for_the_reports_of_many_broken_plugins() {
        let few = vec![plugin("a", 10), plugin("b", 10)];
        assert_eq!(fit(few.clone()), few);
        for n in [10, 50, 1000] {
            let many = fit((0..n).map(|_| plugin("x", 4000)).collect());
            assert!(many.len() == n || n == 1000, "{n}");
            let ready = Ready {
                plugin_reports: many,
                ..Ready::default()
            };
            let text = serde_json::to_vec(&ready).unwrap();
            assert!(text.len() <= READY_MAX, "{n}: {}", text.len());
        }
    }

    #[test]
    fn the_end_of_a_text_has_whole_characters() {
        assert_eq!(last(3, "aéé"), "é");
        assert_eq!(last(9, "aéé"), "aéé");
        assert_eq!(last(0, "é"), "");
    }
}
