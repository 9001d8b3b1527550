//! Where a program's settings come from, so that they can be read again while it runs.
//!
//! File, environment and command line are understood as at the start. What the
//! table calls live replaces what was there, everything else waits for the next
//! start: its old value stays in force and is named.

use std::ffi::OsString;

use serde::{Deserialize, Serialize};

use super::Config;
use super::check::{self, Moment};
use super::command_line::{Action, Exit, command_line, fail_or};
use super::keys::{self, Program};
use super::kind::Value;
use super::layers::{Entry, Environment, Mistake, Origin, Settings, shown};

/// The command line and the environment of a program, and the settings in force.
#[derive(Debug, Clone)]
pub struct Sources {
    program: Program,
    args: Vec<OsString>,
    env: Environment,
    settings: Settings,
}

/// What reading the settings again brought.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// In force from now on.
    pub config: Config,
    pub warnings: Vec<String>,
    /// A line for each setting whose new value is in force.
    pub applied: Vec<String>,
    /// A line for each setting whose new value waits for a restart.
    pub waiting: Vec<String>,
}

/// What one process read for another: [`Changed`], and the settings that it was made of.
#[derive(Serialize, Deserialize)]
struct Told {
    /// Name, text and origin.
    settings: Vec<(String, String, Origin)>,
    forwarded: Vec<OsString>,
    warnings: Vec<String>,
    applied: Vec<String>,
    waiting: Vec<String>,
}

impl Changed {
    pub fn log(&self) {
        for line in &self.warnings {
            tracing::warn!("{line}");
        }
        for line in &self.applied {
            tracing::info!("changed {line}");
        }
        for line in &self.waiting {
            tracing::warn!("not before a restart: {line}");
        }
    }
}

/// Says why the settings stay as they are.
pub fn log_mistakes(exit: &Exit) {
    for line in exit.message.lines() {
        tracing::error!("{line}");
    }
    tracing::error!("the settings have mistakes: nothing changes");
}

impl Sources {
    /// Of `qgisserver ARGS`; `args` begins with the name of the program.
    pub fn of_server(args: impl Iterator<Item = OsString>, env: Environment) -> Self {
        Self::of(Program::Server, args, env)
    }

    /// Of `qgisserver-worker ARGS`; `args` begins with the name of the program.
    pub fn of_worker(args: impl Iterator<Item = OsString>, env: Environment) -> Self {
        Self::of(Program::Worker, args, env)
    }

    fn of(program: Program, args: impl Iterator<Item = OsString>, env: Environment) -> Self {
        let settings = Settings(Default::default());
        Self {
            program,
            args: args.collect(),
            // The rest is none of ours, and need not lie about for as long as we run.
            env: env
                .into_iter()
                .filter(|(name, _)| keys::is_variable(name))
                .collect(),
            settings,
        }
    }

    /// What the user asks for, at the start.
    pub fn read(&mut self) -> Result<Action, Exit> {
        let (action, settings) = self.understand()?;
        self.settings = settings;
        Ok(action)
    }

    /// What they say now. With any mistake nothing changes.
    pub fn read_again(&mut self) -> Result<Changed, Exit> {
        let (Action::Run(now, warnings), settings) = self.understand()? else {
            unreachable!("the same arguments let it run before");
        };
        let (mut merged, mut applied, mut waiting) = (settings.clone(), Vec::new(), Vec::new());
        for name in names(&self.settings, &settings) {
            let (old, new) = (self.settings.0.get(name), settings.0.get(name));
            let text = |entry: Option<&Entry>| {
                shown(name, entry.map_or("", |entry| &entry.text)).replace('\n', " ")
            };
            let line = format!("{name}: {:?}, was {:?}", text(new), text(old));
            if old.map(|entry| &entry.value) == new.map(|entry| &entry.value) {
                continue;
            }
            if keys::is_live(name) {
                applied.push(line);
                continue;
            }
            waiting.push(line);
            match old {
                Some(old) => drop(merged.0.insert(name.clone(), old.clone())),
                None => drop(merged.0.remove(name)),
            }
        }
        let config = Config {
            forwarded: now.forwarded,
            ..Config::read(&merged)
        };
        // New values may not go together with old ones that have to stay.
        let mistakes = match waiting.is_empty() {
            true => Vec::new(),
            false => check::mistakes(&config, &merged, self.program, Moment::Running),
        };
        fail_or(mistakes, || ())?;
        self.settings = merged;
        Ok(Changed {
            config,
            warnings,
            applied,
            waiting,
        })
    }

    /// What [`read_again`](Self::read_again) says, for another process that has the same
    /// settings in force and cannot wait for files: see [`hear`](Self::hear).
    pub fn tell(&self) -> Vec<u8> {
        let mut sources = self.clone();
        let read = sources.read_again();
        let told = read.map(|changed| Told {
            settings: sources.settings.texts().collect(),
            forwarded: changed.config.forwarded,
            warnings: changed.warnings,
            applied: changed.applied,
            waiting: changed.waiting,
        });
        serde_json::to_vec(&told).unwrap_or_default()
    }

    /// Takes up what another process told, without opening a file. None if it did not
    /// end its sentence.
    pub fn hear(&mut self, told: &[u8]) -> Option<Result<Changed, Exit>> {
        let told = match serde_json::from_slice::<Result<Told, Exit>>(told).ok()? {
            Ok(told) => told,
            Err(exit) => return Some(Err(exit)),
        };
        let entries = told.settings.into_iter().map(|(name, text, origin)| {
            let entry = Entry::understood(&name, text, origin)?;
            Some((name, entry))
        });
        let settings = Settings(entries.collect::<Option<_>>()?);
        let config = Config {
            forwarded: told.forwarded,
            ..Config::read(&settings)
        };
        self.settings = settings;
        Some(Ok(Changed {
            config,
            warnings: told.warnings,
            applied: told.applied,
            waiting: told.waiting,
        }))
    }

    /// Says of `setting` what is wrong with it, and where it was set.
    pub fn mistake(&self, setting: &str, what: &str) -> String {
        let origin = &self.settings.entry(setting).origin;
        Mistake::new(origin, setting, what).to_string()
    }

    fn understand(&self) -> Result<(Action, Settings), Exit> {
        let moment = match self.settings.0.is_empty() {
            true => Moment::Start,
            false => Moment::Running,
        };
        command_line(self.program, self.args.iter().cloned(), &self.env, moment)
    }

    /// Overwrites what the environment said: a forked child may not find it.
    pub fn wipe(&mut self) {
        let settings = self.settings.0.values_mut();
        let texts = settings.flat_map(|entry| {
            let value = match &mut entry.value {
                Value::Text(text) => Some(text),
                _ => None,
            };
            value.into_iter().chain([&mut entry.text])
        });
        for text in texts.chain(self.env.values_mut()) {
            // SAFETY: zeros are valid UTF-8.
            unsafe { text.as_bytes_mut() }.fill(0);
        }
    }
}

/// Of both, each once.
fn names<'a>(old: &'a Settings, new: &'a Settings) -> impl Iterator<Item = &'a String> {
    let gone = old.0.keys().filter(|name| !new.0.contains_key(*name));
    new.0.keys().chain(gone)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::config::keys::{SETTINGS, State};

    fn server(file: &Path, more: &[&str]) -> Sources {
        let own = [
            "qgisserver".into(),
            "--rootdir=/".into(),
            "-c".into(),
            file.into(),
        ];
        let args = own.into_iter().chain(more.iter().map(OsString::from));
        let env = Environment::from([
            ("QGSRV_ZMQ_MAXQUEUE".into(), "7".into()),
            ("SECRET".into(), "x".into()),
        ]);
        Sources::of_server(args, env)
    }

    #[test]
    fn what_is_live_changes_and_the_rest_is_named_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.conf");
        fs::write(&file, "[server]\nport = 81\nbody_max = 1M\nworkers = 2\n").unwrap();
        let mut sources = server(&file, &["-w", "3"]);
        assert!(matches!(sources.read(), Ok(Action::Run(..))));
        assert!(!sources.env.contains_key("SECRET"));
        let text = "[server]\nport = 82\nbody_max = 2M\nworkers = 4\n[metadata]\nmotto = m\n";
        fs::write(&file, text).unwrap();
        let changed = sources.read_again().unwrap();
        assert_eq!(changed.config.http.body_max, 2 << 20);
        assert_eq!(changed.config.http.port, 81);
        assert_eq!(changed.config.pool.workers, 3, "the command line wins");
        assert_eq!(changed.config.broker.queue_max, 7, "the environment, too");
        let applied = [
            "metadata.motto: \"m\", was \"\"",
            "server.body_max: \"2M\", was \"1M\"",
        ];
        assert_eq!(changed.applied, applied);
        assert_eq!(changed.waiting, ["server.port: \"82\", was \"81\""]);
        // It waits as long as it is not what is in force.
        assert_eq!(sources.read_again().unwrap().waiting.len(), 1);
        fs::write(&file, "[server]\nport = 81\n").unwrap();
        let changed = sources.read_again().unwrap();
        assert_eq!(changed.waiting, [""; 0]);
        assert_eq!(changed.applied.len(), 2, "{:?}", changed.applied);
    }

    /// One that is started again after the file changed, before the server is.
    #[test]
    fn a_later_pool_beats_as_its_server_does() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.conf");
        let zmq = |values: [&str; 3]| {
            let names = ["heartbeat", "heartbeat_misses", "window"];
            let lines = names.iter().zip(values);
            let lines: String = lines.map(|(name, it)| format!("{name} = {it}\n")).collect();
            fs::write(&file, format!("[zmq]\n{lines}")).unwrap();
        };
        zmq(["0.35", "3", "4"]);
        let mut sources = server(&file, &[]);
        sources.read().unwrap();
        zmq(["20", "30", "40"]);
        let in_force = sources.read_again().unwrap().config;
        let name = ["qgisserver-worker".into()].into_iter();
        let env = Environment::new();
        let mut pool = Sources::of_worker(name.chain(in_force.pool_args()), env);
        let Ok(Action::Run(config, _)) = pool.read() else {
            panic!("the settings are good");
        };
        assert_eq!(config.pool.heartbeat, in_force.broker.heartbeat);
        assert_eq!(config.pool.heartbeat.as_millis(), 350);
        assert_eq!(config.pool.heartbeat_misses, 3);
        assert_eq!(config.broker.window, 4);
    }

    #[test]
    fn with_a_mistake_nothing_changes_and_each_has_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.conf");
        fs::write(&file, "[server]\nbody_max = 1M\n").unwrap();
        let mut sources = server(&file, &[]);
        sources.read().unwrap();
        fs::write(&file, "[server]\nbody_max = lots\nprot = 1\n").unwrap();
        let exit = sources.read_again().unwrap_err();
        let lines: Vec<_> = exit.message.lines().collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines
                .iter()
                .any(|line| line.contains("q.conf:2: server.body_max"))
        );
        assert!(
            lines
                .iter()
                .any(|line| line.contains("q.conf:3: server.prot"))
        );
        fs::remove_file(&file).unwrap();
        assert!(sources.read_again().is_err(), "no file is no empty file");
        fs::write(&file, "[server]\nbody_max = 1M\n").unwrap();
        let changed = sources.read_again().unwrap();
        assert_eq!((changed.applied, changed.waiting), (vec![], vec![]));
    }

    #[test]
    fn passwords_are_not_shown_when_they_change() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.conf");
        fs::write(&file, "").unwrap();
        let mut sources = server(&file, &[]);
        sources.read().unwrap();
        fs::write(&file, "[monitor:x]\npassword = hush\n").unwrap();
        let changed = format!("{:?}", sources.read_again().unwrap());
        assert!(changed.contains("monitor:x.password") && !changed.contains("hush"));
    }

    #[test]
    fn what_one_process_reads_for_another_is_what_that_would_have_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.conf");
        fs::write(&file, "[server]\nport = 81\n").unwrap();
        let mut sources = server(&file, &["--set=zmq.window=4"]);
        sources.read().unwrap();
        let changes = [
            "[server]\nport = 82\nbody_max = 1M\nuri_max = ${body_max}\n[api:own]\nKEY = é\n[metadata]\ntitle = A b\n",
            "[server]\nbody_max = lots\n",
            "[worker]\nrecycle_requests = 7\n[zmq]\nbindaddr = localhost\n",
            "",
        ];
        for change in changes {
            fs::write(&file, change).unwrap();
            let told = sources.tell();
            let mut other = sources.clone();
            // Nobody may look for it now.
            fs::remove_file(&file).unwrap();
            let heard = other.hear(&told).unwrap();
            fs::write(&file, change).unwrap();
            assert_eq!(heard, sources.read_again(), "{change}");
            assert_eq!(other.settings, sources.settings, "{change}");
        }
        let told = sources.tell();
        assert_eq!(sources.hear(&told[..told.len() - 1]), None);
        assert_eq!(sources.hear(b""), None);
    }

    /// Whatever a row says, the settings in force follow it: changed alone, a live one
    /// is in force, and any other is not.
    #[test]
    fn each_row_of_the_table_is_either_live_or_named_as_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.conf");
        for row in SETTINGS.iter().filter(|row| row.state == State::Ready) {
            let candidates = [
                "yes",
                "no",
                "7",
                "70000",
                "/",
                "debug",
                "127.0.0.2",
                "tcp://127.0.0.1:7",
                "/a,b",
                "http://h/",
                "900M",
                "1K",
                "0.75",
                "auto",
                "skip",
                "a=skip",
            ];
            let read = |text: &str| {
                fs::write(&file, "").unwrap();
                let mut sources = server(&file, &[]);
                let Ok(Action::Run(before, _)) = sources.read() else {
                    panic!("the defaults are good");
                };
                let line = format!("[{}]\n{} = {text}\n", row.section(), row.key());
                fs::write(&file, line).unwrap();
                let changed = sources.read_again().ok()?;
                (changed.applied.len() + changed.waiting.len() > 0).then_some((before, changed))
            };
            let overruled = row.name == "projects.cache.rootdir";
            let Some((before, changed)) = candidates.into_iter().find_map(read) else {
                assert!(overruled, "no value for {}", row.name);
                continue;
            };
            let lines = |all: &[String]| all.iter().any(|line| line.starts_with(row.name));
            assert_eq!(
                lines(&changed.applied),
                keys::is_live(row.name),
                "{}",
                row.name
            );
            assert_eq!(
                lines(&changed.waiting),
                !keys::is_live(row.name),
                "{}",
                row.name
            );
            if !keys::is_live(row.name) {
                assert_eq!(*before, changed.config, "{}", row.name);
            }
        }
    }
}
