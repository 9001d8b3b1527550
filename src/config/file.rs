//! Configuration files: INI as Python's configparser reads it, or TOML.
//!
//! configparser's dialect is read here, because no INI crate knows both its
//! continuation lines and the line numbers of values.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::layers::{Given, Mistake, Origin};

/// What the file at `path` says. The extension `.toml` decides about the language.
pub fn read(path: &Path) -> (Vec<Given>, Vec<Mistake>) {
    let whole = Origin::file(path, 0);
    match std::fs::read(path).map(String::from_utf8) {
        Ok(Ok(text)) if path.extension().is_some_and(|e| e == "toml") => toml(path, &text),
        Ok(Ok(text)) => ini(path, &text),
        Ok(Err(_)) => (vec![], vec![Mistake::new(&whole, "", "is not UTF-8")]),
        Err(error) => (
            vec![],
            vec![Mistake::new(&whole, "", format!("cannot be read: {error}"))],
        ),
    }
}

/// | line | means |
/// |---|---|
/// | first character is `#` or `;` | comment |
/// | `[section]` | a section begins; one may come again |
/// | `key = value` or `key: value` | a value begins |
/// | deeper indented than its key | the value goes on |
fn ini(path: &Path, text: &str) -> (Vec<Given>, Vec<Mistake>) {
    let (mut given, mut mistakes) = (Vec::<Given>::new(), Vec::new());
    let mut section = "";
    // The indentation of the key whose value may go on.
    let mut open: Option<usize> = None;
    for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
        let content = line.trim();
        let indent = line.len() - line.trim_start().len();
        if content.is_empty() || content.starts_with(['#', ';']) {
            continue;
        }
        if let (Some(_), Some(last)) = (open.filter(|key| indent > *key), given.last_mut()) {
            last.text = format!("{}\n{content}", last.text).trim_start().into();
            continue;
        }
        open = None;
        let origin = Origin::file(path, number);
        if let Some(name) = content
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            section = name.trim();
        } else if let Some((key, value)) = content
            .split_once(['=', ':'])
            .filter(|(key, _)| !key.trim().is_empty())
        {
            let name = joined([section, key.trim()]);
            given.push(Given {
                name,
                text: value.trim().into(),
                origin,
            });
            open = Some(indent);
        } else {
            mistakes.push(Mistake::new(
                &origin,
                "",
                format!("expected [section] or key = value, found {content:?}"),
            ));
        }
    }
    (given, mistakes)
}

fn joined(names: [&str; 2]) -> String {
    names
        .into_iter()
        .filter(|name| !name.is_empty())
        .collect::<Vec<_>>()
        .join(".")
}

/// Nested tables join their names with dots: `[projects.cache]` and
/// `["projects.cache"]` are the same section.
fn toml(path: &Path, text: &str) -> (Vec<Given>, Vec<Mistake>) {
    let at = |offset: usize| Origin::file(path, 1 + text[..offset].matches('\n').count());
    match DeTable::parse(text) {
        Ok(table) => {
            let (mut given, mut mistakes) = (Vec::new(), Vec::new());
            flatten(
                "",
                table.get_ref(),
                &mut |name, value: &Spanned<DeValue>| {
                    let origin = at(value.span().start);
                    match plain(value.get_ref()) {
                        Some(text) => given.push(Given { name, text, origin }),
                        None => mistakes.push(Mistake::new(
                            &origin,
                            &name,
                            format!(
                                "expected a value or a list of values, found {}",
                                value.get_ref().type_str()
                            ),
                        )),
                    }
                },
            );
            // Tables are sorted by name; people read files from the top.
            given.sort_by_key(|given: &Given| line(&given.origin));
            (given, mistakes)
        }
        Err(error) => {
            let origin = at(error.span().map_or(0, |span| span.start));
            (
                vec![],
                vec![Mistake::new(
                    &origin,
                    "",
                    error.message().replace('\n', "; "),
                )],
            )
        }
    }
}

fn line(origin: &Origin) -> usize {
    match origin {
        Origin::File { line, .. } => *line,
        _ => 0,
    }
}

fn flatten(prefix: &str, table: &DeTable, found: &mut impl FnMut(String, &Spanned<DeValue>)) {
    for (key, value) in table {
        let name = joined([prefix, key.get_ref()]);
        match value.get_ref() {
            DeValue::Table(inner) => flatten(&name, inner, found),
            _ => found(name, value),
        }
    }
}

/// A value as it would stand in an INI file; the parts of a list on a line each.
fn plain(value: &DeValue) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(n) => i64::from_str_radix(n.as_str(), n.radix())
            .ok()
            .map(|n| n.to_string()),
        DeValue::Float(x) => Some(x.as_str().into()),
        DeValue::Boolean(b) => Some(b.to_string()),
        DeValue::Array(items) => {
            let items: Option<Vec<_>> = items.iter().map(|item| plain(item.get_ref())).collect();
            items.map(|items| items.join("\n"))
        }
        DeValue::Datetime(_) | DeValue::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(given: &[Given]) -> Vec<(&str, &str, usize)> {
        given
            .iter()
            .map(|g| (g.name.as_str(), g.text.as_str(), line(&g.origin)))
            .collect()
    }

    #[test]
    fn ini_is_read_as_configparser_does() {
        let text = "\u{feff}# comment\n\
                    [server]\n\
                    port=8081\n\
                    ; comment\n\
                    proxy_url : http://a:80/b=c ; no comment\n\
                    \n\
                    allow_headers = X-A-,\n    # comment inside\n    X-B-,\n\n    X-C-\n\
                    empty =\n\
                    [ projects.cache ]\n\
                    \tsize = 3\n\
                    \trootdir = /data\n\
                    [server]\n\
                    workers = 2\n";
        let (given, mistakes) = ini(Path::new("q.conf"), text);
        assert_eq!(mistakes, []);
        assert_eq!(
            lines(&given),
            [
                ("server.port", "8081", 3),
                ("server.proxy_url", "http://a:80/b=c ; no comment", 5),
                ("server.allow_headers", "X-A-,\nX-B-,\nX-C-", 7),
                ("server.empty", "", 12),
                ("projects.cache.size", "3", 14),
                ("projects.cache.rootdir", "/data", 15),
                ("server.workers", "2", 17),
            ]
        );
    }

    #[test]
    fn every_line_that_is_not_ini_is_a_mistake() {
        let (given, mistakes) = ini(Path::new("q.conf"), "port = 1\n[server\nnonsense\n= 3\n");
        assert_eq!(lines(&given), [("port", "1", 1)]);
        let found: Vec<_> = mistakes.iter().map(Mistake::to_string).collect();
        assert_eq!(
            found,
            [
                "q.conf:2: expected [section] or key = value, found \"[server\"",
                "q.conf:3: expected [section] or key = value, found \"nonsense\"",
                "q.conf:4: expected [section] or key = value, found \"= 3\"",
            ]
        );
    }

    #[test]
    fn toml_gives_the_same_settings_with_their_lines() {
        let text = "zmq.maxqueue = 0x10\n\
                    [server]\n\
                    workers = 4\nssl = true\ntimeout = 1.5\n\
                    interfaces = [\n  \"127.0.0.1\",\n  \"::1\",\n]\n\
                    [projects.cache]\nsize = \"3\"\n\
                    [\"api:landing_page\"]\nKEY = 'x'\n\
                    [cache.\"observers:ban\"]\nserver_address = 's'\n";
        let (given, mistakes) = toml(Path::new("q.toml"), text);
        assert_eq!(mistakes, []);
        assert_eq!(
            lines(&given),
            [
                ("zmq.maxqueue", "16", 1),
                ("server.workers", "4", 3),
                ("server.ssl", "true", 4),
                ("server.timeout", "1.5", 5),
                ("server.interfaces", "127.0.0.1\n::1", 6),
                ("projects.cache.size", "3", 11),
                ("api:landing_page.KEY", "x", 13),
                ("cache.observers:ban.server_address", "s", 15),
            ]
        );
    }

    #[test]
    fn toml_mistakes_have_lines_too() {
        let (_, mistakes) = toml(Path::new("q.toml"), "[server]\nport = \n");
        assert!(
            mistakes[0].to_string().starts_with("q.toml:2: "),
            "{}",
            mistakes[0]
        );
        let (_, mistakes) = toml(Path::new("q.toml"), "[server]\n\nport = 1979-05-27\n");
        let expected =
            "q.toml:3: server.port: expected a value or a list of values, found datetime";
        assert_eq!(mistakes[0].to_string(), expected);
    }

    #[test]
    fn a_file_that_is_not_there_or_not_text_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.conf");
        let message = |path: &Path| read(path).1[0].to_string();
        assert!(message(&path).starts_with(&format!("{}: cannot be read: ", path.display())));
        std::fs::write(&path, b"\xff\xfe").unwrap();
        assert_eq!(message(&path), format!("{}: is not UTF-8", path.display()));
    }
}
