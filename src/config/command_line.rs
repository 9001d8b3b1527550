//! The command lines of both programs, made from the table of settings.

use std::ffi::OsString;
use std::path::{Path, PathBuf, absolute};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::{Deserialize, Serialize};

use super::check::{self, Moment};
use super::keys::{Flag, Program, SETTINGS, Setting, Takes};
use super::kind::Kind;
use super::layers::{Environment, Given, Merged, Mistake, Origin, Settings, merge};
use super::{Config, file, print};

/// The command line is wrong (`EX_USAGE`).
const USAGE: i32 = 64;
/// The configuration is wrong (`EX_CONFIG`).
const CONFIGURATION: i32 = 78;

/// What the user asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Run with these settings, after these warnings.
    Run(Box<Config>, Vec<String>),
    /// Print the versions.
    Version,
    /// Print this; `--print-config`.
    PrintConfig(String),
    /// Print this; `--check-config` found no mistake in what these settings say.
    CheckConfig(Box<Config>, String),
    /// Print this; `--help`.
    Help(String),
}

/// Why the program ends before it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    /// One mistake a line, each with the name of its setting or flag.
    pub message: String,
}

/// What the user asks for, and the settings that it was understood from.
pub(super) fn command_line(
    program: Program,
    args: impl Iterator<Item = OsString>,
    env: &Environment,
    moment: Moment,
) -> Result<(Action, Settings), Exit> {
    let nothing = || Settings(Default::default());
    let (parsed, unknown) = parse(program, args.collect());
    let matches = match parsed {
        Ok(matches) => matches,
        Err(help) if help.kind() == ErrorKind::DisplayHelp => {
            return Ok((Action::Help(help.to_string()), nothing()));
        }
        Err(error) => {
            let lines = unknown.iter().map(Mistake::to_string);
            let lines: Vec<_> = lines.chain([error.to_string().trim_end().into()]).collect();
            return Err(Exit {
                code: USAGE,
                message: lines.join("\n"),
            });
        }
    };
    if matches.get_flag("version") && unknown.is_empty() {
        return Ok((Action::Version, nothing()));
    }
    let is_understood = unknown.is_empty();
    let understood = settings_of(program, &matches, unknown, env, moment);
    understood.map_err(|exit| match is_understood {
        true => exit,
        false => Exit {
            code: USAGE,
            ..exit
        },
    })
}

/// What clap makes of `args` without the flags that it does not know, and those. It stops at
/// the first, and behind it may be more that is wrong.
fn parse(
    program: Program,
    mut args: Vec<OsString>,
) -> (Result<ArgMatches, clap::Error>, Vec<Mistake>) {
    let mut unknown = Vec::new();
    loop {
        let parsed = command(program).try_get_matches_from(&args);
        let Some(flag) = parsed
            .as_ref()
            .err()
            .and_then(|error| take_unknown(&mut args, error))
        else {
            return (parsed, unknown);
        };
        let what = "there is no such flag; --help lists those that there are";
        unknown.push(Mistake::new(&Origin::Flag(flag), "", what));
    }
}

/// The flag that `error` is about, which is not in `args` any more, nor what follows it and
/// can only be its value.
fn take_unknown(args: &mut Vec<OsString>, error: &clap::Error) -> Option<String> {
    let context = error.get(ContextKind::InvalidArg);
    let (ErrorKind::UnknownArgument, Some(ContextValue::String(flag))) = (error.kind(), context)
    else {
        return None;
    };
    let is_it = |arg: &OsString| {
        let arg = arg.to_string_lossy();
        *arg == **flag
            || arg
                .strip_prefix(&**flag)
                .is_some_and(|it| it.starts_with('='))
    };
    let at = args.iter().skip(1).position(is_it)? + 1;
    let taken = args.remove(at);
    let is_value = |arg: &OsString| !arg.to_string_lossy().starts_with('-');
    if flag.starts_with('-') && *taken == **flag && args.get(at).is_some_and(is_value) {
        args.remove(at);
    }
    Some(flag.clone())
}

/// After these `mistakes`.
fn settings_of(
    program: Program,
    matches: &ArgMatches,
    mut mistakes: Vec<Mistake>,
    env: &Environment,
    moment: Moment,
) -> Result<(Action, Settings), Exit> {
    let (flags, path, wrong) = understand(program, matches);
    mistakes.extend(wrong);
    let (in_file, wrong) = path.as_deref().map(file::read).unwrap_or_default();
    mistakes.extend(wrong);
    let forwarded = forwarded(path.as_deref(), &flags);
    let Merged {
        settings,
        mistakes: wrong,
        mut warnings,
    } = merge(env, in_file, flags);
    mistakes.extend(wrong);
    if matches.get_flag("print-config") {
        let text = print::effective(&settings);
        return fail_or(mistakes, || (Action::PrintConfig(text), settings));
    }
    let config = Config {
        forwarded,
        ..Config::read(&settings)
    };
    mistakes.extend(check::mistakes(&config, &settings, program, moment));
    warnings.extend(check::warnings(&config));
    if is_local_pool(program, matches) {
        // The server that started it said the same.
        warnings.clear();
    }
    let is_check = matches.get_flag("check-config");
    let action = match is_check {
        true => Action::CheckConfig(Box::new(config), verdict(&warnings)),
        false => Action::Run(Box::new(config), warnings),
    };
    fail_or(mistakes, || (action, settings))
}

fn is_local_pool(program: Program, matches: &ArgMatches) -> bool {
    program == Program::Worker && matches.contains_id("connect")
}

pub(super) fn fail_or<T>(mistakes: Vec<Mistake>, good: impl FnOnce() -> T) -> Result<T, Exit> {
    if mistakes.is_empty() {
        return Ok(good());
    }
    let code = if mistakes.iter().all(Mistake::is_usage) {
        USAGE
    } else {
        CONFIGURATION
    };
    let lines: Vec<_> = mistakes.iter().map(Mistake::to_string).collect();
    Err(Exit {
        code,
        message: lines.join("\n"),
    })
}

fn verdict(warnings: &[String]) -> String {
    let warnings = warnings
        .iter()
        .map(|warning| format!("warning: {warning}\n"));
    warnings
        .chain(["The configuration is good.\n".into()])
        .collect()
}

/// The flags of a program, as clap knows them.
fn command(program: Program) -> Command {
    let (name, about) = match program {
        Program::Server => ("qgisserver", "Serves QGIS projects as OGC web services"),
        Program::Worker => (
            "qgisserver-worker",
            "Runs a pool of QGIS processes that join a qgisserver",
        ),
    };
    let switch = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .action(ArgAction::SetTrue)
            .help(help)
    };
    Command::new(name)
        .bin_name(name)
        .about(about)
        .disable_version_flag(true)
        .args_override_self(true)
        .arg(
            Arg::new("config")
                .short('c')
                .long("config")
                .num_args(0..=1)
                .value_name("PATH")
                .help("read settings from this file, INI or *.toml"),
        )
        .args(flags(program).map(|(row, flag)| argument(row, flag)))
        .arg(
            Arg::new("set")
                .long("set")
                .action(ArgAction::Append)
                .value_name("SECTION.KEY=VALUE")
                .help("set any setting; may be repeated"),
        )
        .arg(switch(
            "check-config",
            "look for mistakes in the configuration, and exit",
        ))
        .arg(switch(
            "print-config",
            "print every setting with its value and origin, and exit",
        ))
        .arg(switch(
            "version",
            "print the versions of everything, and exit",
        ))
}

fn flags(program: Program) -> impl Iterator<Item = (&'static Setting, &'static Flag)> {
    let all = SETTINGS
        .iter()
        .flat_map(|row| row.flags.iter().map(move |flag| (row, flag)));
    all.filter(move |(_, flag)| flag.programs.contains(&program))
}

fn argument(row: &'static Setting, flag: &'static Flag) -> Arg {
    let arg = Arg::new(flag.long).long(flag.long).hide(flag.hidden);
    let arg = match flag.takes {
        Takes::Value(name) => arg.value_name(name).help(help(row)),
        Takes::Nothing { means } => arg
            .action(ArgAction::SetTrue)
            .help(help_of_switch(row, means)),
    };
    let arg = flag.short.into_iter().fold(arg, Arg::short);
    flag.alias.into_iter().fold(arg, Arg::visible_alias)
}

fn help(row: &Setting) -> String {
    let default = if row.default.is_empty() {
        "none"
    } else {
        row.default
    };
    format!("{} [{}, default {default}]", row.help, row.name)
}

fn help_of_switch(row: &Setting, means: &str) -> String {
    let same = format!("same as --set {}={means}", row.name);
    match row.kind {
        Kind::Bool => format!("{} [{same}]", row.help),
        _ => same,
    }
}

/// What the flags set, weakest first, and the file they name.
fn understand(
    program: Program,
    matches: &ArgMatches,
) -> (Vec<Given>, Option<PathBuf>, Vec<Mistake>) {
    let mut mistakes = Vec::new();
    let mut given = Vec::new();
    for text in matches.get_many::<String>("set").into_iter().flatten() {
        match text.split_once('=') {
            Some((name, text)) => given.push(from_flag(&format!("--set {name}"), name, text)),
            None => {
                let origin = Origin::Flag("--set".into());
                mistakes.push(Mistake::new(&origin, text, "expected SECTION.KEY=VALUE"));
            }
        }
    }
    given.extend(flags(program).filter_map(|(row, flag)| {
        let text = text_of(flag, matches)?;
        let text = if flag.long == "rootdir" {
            from_here(&text)
        } else {
            text
        };
        Some(from_flag(&format!("--{}", flag.long), row.name, &text))
    }));
    let path = matches.get_one::<String>("config").map(PathBuf::from);
    (given, path, mistakes)
}

fn from_flag(flag: &str, name: &str, text: &str) -> Given {
    Given {
        name: name.into(),
        text: text.into(),
        origin: Origin::Flag(flag.into()),
    }
}

fn text_of(flag: &Flag, matches: &ArgMatches) -> Option<String> {
    match flag.takes {
        Takes::Value(_) => matches.get_one::<String>(flag.long).cloned(),
        Takes::Nothing { means } => matches.get_flag(flag.long).then(|| means.into()),
    }
}

/// On the command line, and only there, a path is relative to where the user stands.
fn from_here(path: &str) -> String {
    let whole = absolute(path)
        .ok()
        .and_then(|path| path.into_os_string().into_string().ok());
    whole.unwrap_or_else(|| path.into())
}

/// See [`Config::pool_args`].
fn forwarded(path: Option<&Path>, flags: &[Given]) -> Vec<OsString> {
    let file = path.map(|path| absolute(path).unwrap_or_else(|_| path.into()));
    let file = file
        .into_iter()
        .flat_map(|path| ["-c".into(), path.into_os_string()]);
    let overrides = flags.iter().flat_map(|flag| {
        [
            "--set".into(),
            format!("{}={}", flag.name, flag.text).into(),
        ]
    });
    file.chain(overrides).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> impl Iterator<Item = OsString> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        words.into_iter()
    }

    fn understood(
        program: Program,
        args: impl Iterator<Item = OsString>,
        env: &Environment,
    ) -> Result<Action, Exit> {
        command_line(program, args, env, Moment::Start).map(|(action, _)| action)
    }

    fn server(line: &str) -> Result<Action, Exit> {
        server_with(line, &Environment::new())
    }

    fn server_with(line: &str, env: &Environment) -> Result<Action, Exit> {
        understood(Program::Server, args(&format!("qgisserver {line}")), env)
    }

    fn worker(line: &str) -> Result<Action, Exit> {
        let line = format!("qgisserver-worker {line}");
        understood(Program::Worker, args(&line), &Environment::new())
    }

    fn config(action: Result<Action, Exit>) -> Config {
        match action {
            Ok(Action::Run(config, _)) => *config,
            other => panic!("{other:?}"),
        }
    }

    fn exit(action: Result<Action, Exit>) -> (i32, String) {
        let exit = action.expect_err("the command line is wrong");
        (exit.code, exit.message)
    }

    #[test]
    fn help_mentions_every_flag_of_the_table() {
        for (program, help) in [
            (Program::Server, server("-h")),
            (Program::Worker, worker("--help")),
        ] {
            let Ok(Action::Help(help)) = help else {
                panic!("{help:?}")
            };
            for (_, flag) in flags(program).filter(|(_, flag)| !flag.hidden) {
                assert!(
                    help.contains(&format!("--{}", flag.long)),
                    "--{} in {help}",
                    flag.long
                );
                let short = flag.short.map(|short| format!("-{short}, --{}", flag.long));
                assert!(help.contains(&short.unwrap_or_default()), "{help}");
            }
            for flag in [
                "--set",
                "--check-config",
                "--print-config",
                "--version",
                "-c, --config",
            ] {
                assert!(help.contains(flag), "{flag} in {help}");
            }
            assert!(!help.contains("--connect"));
        }
    }

    #[test]
    fn the_flags_of_the_server_set_what_they_always_set() {
        let here = env!("CARGO_MANIFEST_DIR");
        let line = format!(
            "-p 8081 -b 127.0.0.1 -w 3 -j 4 -u www-data --rootdir {here} --timeout 2.5 --logging warning -c"
        );
        let config = config(server(&line));
        assert_eq!(
            (config.http.port, config.pool.workers, config.http.threads),
            (8081, 3, 4)
        );
        assert_eq!(
            config.http.interfaces,
            ["127.0.0.1".parse::<std::net::IpAddr>().unwrap()]
        );
        assert_eq!(config.setuid.as_deref(), Some("www-data"));
        assert_eq!(config.pool.rootdir, Path::new(here));
        assert_eq!(config.http.request_timeout.as_millis(), 2500);
        assert_eq!(config.log.level, tracing::Level::WARN);
    }

    #[test]
    fn debug_is_stronger_than_logging_and_a_repeated_flag_counts_last() {
        let config = config(server(
            "--proxy -d --logging error -p 1 -p 2 --set server.port=3",
        ));
        assert_eq!(config.log.level, tracing::Level::DEBUG);
        assert_eq!(config.http.port, 2);
    }

    #[test]
    fn a_pool_names_its_server_in_several_ways() {
        for (line, address) in [
            ("--host localhost", "tcp://127.0.0.1:18080"),
            ("--proxy-host=127.0.0.1:7000", "tcp://127.0.0.1:7000"),
            (
                "--connect ipc:///run/q/pool --host localhost",
                "ipc:///run/q/pool",
            ),
            ("", "tcp://127.0.0.1:18080"),
        ] {
            assert_eq!(
                config(worker(&format!("--rootdir . {line}"))).pool.server,
                address,
                "{line}"
            );
        }
    }

    #[test]
    fn other_machines_wait_for_encryption() {
        let (_, message) = exit(worker("--rootdir . --host 10.0.0.1"));
        assert!(
            message.starts_with("--host: worker.server: tcp://10.0.0.1:18080 is refused"),
            "{message}"
        );
        let environment = Environment::from([("QGSRV_ZMQ_HOSTADDR".into(), "*".into())]);
        let action = server_with("--proxy", &environment);
        let (code, message) = exit(action);
        assert_eq!(code, CONFIGURATION);
        assert!(
            message.starts_with("zmq.bindaddr: tcp://*:18080 is refused"),
            "{message}"
        );
        // Without --proxy nothing listens there.
        let action = server_with("--rootdir .", &environment);
        assert!(action.is_ok(), "{action:?}");
    }

    #[test]
    fn wrong_use_is_64_and_wrong_configuration_is_78() {
        let (code, message) = exit(server("--proxy --port many --set nope --set server.prot=1"));
        assert_eq!(code, USAGE);
        assert_eq!(
            message,
            "--set: nope: expected SECTION.KEY=VALUE\n\
             --set server.prot: server.prot: unknown setting; did you mean server.port?\n\
             --port: server.port: expected a port, 0 to 65535, found \"many\""
        );
        let (code, message) = exit(server("--proxy --nonsense 3 --port many --oddity=x y"));
        let lines: Vec<_> = message.lines().collect();
        assert_eq!((code, lines.len()), (USAGE, 4), "{message}");
        for (line, start) in lines
            .iter()
            .zip(["--nonsense: ", "--oddity: ", "y: ", "--port: "])
        {
            assert!(line.starts_with(start), "{line}");
        }
        let (code, message) = exit(server("--nonsense --version"));
        assert_eq!(code, USAGE);
        assert!(message.starts_with("--nonsense: "), "{message}");
        assert!(message.contains("projects.cache.rootdir: is required"));
        let (_, message) = exit(server("-x --port"));
        assert!(message.starts_with("-x: ") && message.contains("'--port <PORT>'"));
        let (code, message) = exit(server(""));
        assert_eq!(code, CONFIGURATION);
        assert!(
            message.starts_with("projects.cache.rootdir: is required"),
            "{message}"
        );
        let (code, message) = exit(server("--proxy -c /nowhere/q.conf"));
        assert_eq!(code, CONFIGURATION);
        assert!(
            message.starts_with("/nowhere/q.conf: cannot be read"),
            "{message}"
        );
    }

    #[test]
    fn https_needs_a_certificate_and_a_key_that_can_be_read() {
        let (code, message) = exit(server(
            "--proxy --set server.ssl=yes --set server.ssl_key=/nowhere/key",
        ));
        let lines: Vec<_> = message.lines().collect();
        assert_eq!(
            lines[0],
            "server.ssl_cert: is required with server.ssl: a PEM file"
        );
        assert!(
            lines[1].starts_with("--set server.ssl_key: server.ssl_key: cannot read /nowhere/key")
        );
        assert_eq!((code, lines.len()), (CONFIGURATION, 2));
        // A local pool runs as another user, who may not read the key and need not.
        assert!(worker("--rootdir . --set server.ssl=yes").is_ok());
    }

    #[test]
    fn apis_need_a_path() {
        let (_, message) = exit(server(
            "--proxy --set api.enabled.own=yes --set api.enabled.landing_page=yes --set api.endpoints.landing_page=x",
        ));
        assert_eq!(
            message,
            "--set api.endpoints.landing_page: api.endpoints.landing_page: expected a path such as /catalog, found \"x\"\n\
             --set api.enabled.own: api.enabled.own: needs its path: api.endpoints.own = /…"
        );
    }

    #[test]
    fn a_local_pool_gets_the_same_settings() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.conf");
        std::fs::write(&path, "[server]\nworkers = 5\n[logging]\njson = yes\n").unwrap();
        let first = config(server(&format!(
            "-c {} --rootdir . -w 3 -d --set zmq.window=4",
            path.display()
        )));
        let mut line: Vec<OsString> = vec!["qgisserver-worker".into()];
        line.extend(first.pool_args());
        line.extend(["--connect".into(), "ipc:///run/q".into()]);
        let second = config(understood(
            Program::Worker,
            line.into_iter(),
            &Environment::new(),
        ));
        assert_eq!(
            second.pool,
            super::super::Pool {
                server: "ipc:///run/q".into(),
                ..first.pool
            }
        );
        assert_eq!((second.log, second.broker), (first.log, first.broker));
        assert_eq!(second.pool.workers, 3);
    }

    #[test]
    fn a_local_pool_does_not_repeat_the_warnings_of_its_server() {
        let warnings = |line: &str| match worker(line) {
            Ok(Action::Run(_, warnings)) => warnings.len(),
            other => panic!("{other:?}"),
        };
        let line = "--rootdir . --set server.monitor=amqp --set server.pluginpath=/nowhere";
        assert_eq!(warnings(line), 2);
        assert_eq!(warnings(&format!("{line} --connect ipc:///run/q")), 0);
    }

    #[test]
    fn what_filters_are_not_asked_about_is_said_at_start() {
        let warnings = |line: &str| match worker(line) {
            Ok(Action::Run(_, warnings)) => warnings.join(" "),
            other => panic!("{other:?}"),
        };
        let filters = "--rootdir . --set server.enable_filters=yes";
        assert_eq!(warnings(filters), "");
        let both = warnings(&format!("{filters} --set server.status_page=yes"));
        assert!(
            both.contains("filters are not asked about /status"),
            "{both}"
        );
    }

    #[test]
    fn a_default_project_that_nobody_can_be_served_is_said_at_start() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().display();
        let warnings = |line: &str| match server(&format!("--rootdir {folder} {line}")) {
            Ok(Action::Run(_, warnings)) => warnings.join(" "),
            other => panic!("{other:?}"),
        };
        let project = "--set server.default_project";
        for fine in [
            "city",
            &format!("{folder}/city.qgs"),
            &format!("{folder}/a/b"),
        ] {
            assert_eq!(warnings(&format!("{project}={fine}")), "", "{fine}");
        }
        assert_eq!(
            warnings(&format!("{project}=/srv/city.qgs"))
                .matches("404")
                .count(),
            1
        );
        let way = "--set projects.schemes.maps=file:///srv/";
        assert_eq!(warnings(&format!("{project}=/srv/city.qgs {way}")), "");
    }

    #[test]
    fn questions_are_answered_without_running() {
        assert_eq!(server("--version"), Ok(Action::Version));
        assert!(
            matches!(server("--print-config"), Ok(Action::PrintConfig(text)) if text.contains("server.port = 8080"))
        );
        let Ok(Action::CheckConfig(_, text)) =
            server("--proxy --check-config --set server.monitor=amqp")
        else {
            panic!("the configuration is good")
        };
        assert_eq!(
            text,
            "warning: server.monitor (--set server.monitor) is accepted but not implemented yet\n\
             The configuration is good.\n"
        );
    }
}
