//! Settings for people to read: `--print-config` and the sample file.

use std::fmt::Write;

use super::keys::{self, FAMILIES, Family, SETTINGS, Setting, State};
use super::layers::{Settings, shown};

const PREFACE: &str = "\
# Settings of qgisserver and qgisserver-worker, all with their defaults.
#
# A value comes from the default, the environment, this file or the command
# line; the later one wins, and --print-config tells which did. An empty variable
# is one that is not set. A value may refer to others: ${key} of its own section,
# ${section:key} of another; $$ is a dollar. It may go on in an indented line.
# A file named *.toml holds the same sections and keys as TOML.
#
# SIGHUP lets both programs read all of this again and replaces the workers; with a
# mistake in it nothing changes. What says (restart) waits for the next start, or for
# SIGUSR2, by which the server starts anew without losing a connection.
";

/// Every setting with its value and origin, in the order of the table.
pub fn effective(settings: &Settings) -> String {
    let rows = SETTINGS.iter().map(|row| row.name);
    let is_member = |name: &&str| SETTINGS.iter().all(|row| row.name != *name);
    let members = settings.0.keys().map(String::as_str).filter(is_member);
    let lines: Vec<_> = rows
        .chain(members)
        .map(|name| line(name, settings))
        .collect();
    let width = lines
        .iter()
        .map(|(text, _)| text.chars().count())
        .filter(|n| *n < 60)
        .max()
        .unwrap_or(0);
    lines
        .iter()
        .map(|(text, origin)| format!("{text:width$}  # {origin}\n"))
        .collect()
}

fn line(name: &str, settings: &Settings) -> (String, String) {
    let entry = settings.entry(name);
    let text = shown(name, &entry.text).replace('\n', " ");
    (
        format!("{name} = {text}").trim_end().to_owned(),
        entry.origin.to_string(),
    )
}

/// `etc/qgisserver.conf`: every key commented out with its default.
pub fn sample() -> String {
    let mut out = String::from(PREFACE);
    let mut section = "";
    for row in SETTINGS {
        if row.section() != section {
            section = row.section();
            write!(out, "\n[{section}]\n").expect("a String takes everything");
        }
        out += &setting(row);
    }
    out += "\n# Sections whose keys are yours to choose:\n";
    FAMILIES
        .iter()
        .for_each(|family| out += &open_section(family));
    out
}

fn setting(row: &Setting) -> String {
    let flags = row
        .flags
        .iter()
        .filter(|flag| !flag.hidden)
        .map(|flag| format!("--{}", flag.long));
    let ways: Vec<_> = row
        .variables()
        .chain(flags)
        .fold(Vec::new(), |mut ways, way| {
            if !ways.contains(&way) {
                ways.push(way);
            }
            ways
        });
    let assignment = format!("#{} = {}", row.key(), row.default);
    let restart = match row.state == State::Ready && !keys::is_live(row.name) {
        true => " (restart)",
        false => "",
    };
    let (help, remark, ways) = (row.help, remark(row.state), ways.join(", "));
    format!(
        "\n# {help}{restart}{remark}\n# {ways}\n{}\n",
        assignment.trim_end()
    )
}

fn remark(state: State) -> String {
    match state {
        State::Ready => String::new(),
        State::Later => " (not implemented yet)".into(),
        State::Moot(why) => format!(" (no effect: {why})"),
    }
}

fn open_section(family: &Family) -> String {
    let name = format!("{}{}", family.prefix, family.pattern);
    let (section, key) = name
        .rsplit_once('.')
        .expect("the name of a setting has a section");
    let remark = remark(family.state);
    format!("\n# {}{remark}\n# [{section}]\n# {key} = …\n", family.help)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::layers::{Given, Origin, merge};
    use super::*;

    #[test]
    fn the_effective_settings_name_their_origin_and_hide_passwords() {
        let given = |name: &str, text: &str| Given {
            name: name.into(),
            text: text.into(),
            origin: Origin::file("q.conf", 7),
        };
        let file = vec![
            given("server.port", "81"),
            given("monitor:x.password", "hush"),
            given("server.allow_headers", "X-A\nX-B"),
        ];
        let text = effective(&merge(&BTreeMap::new(), file, vec![]).settings);
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        assert!(line("server.port = 81 ").ends_with("# q.conf:7"));
        assert!(line("server.workers = 2 ").ends_with("# default"));
        assert!(line("monitor:x.password = *** ").ends_with("# q.conf:7"));
        assert!(line("server.allow_headers = X-A X-B ").ends_with("# q.conf:7"));
        assert!(!text.contains("hush"));
    }
}
