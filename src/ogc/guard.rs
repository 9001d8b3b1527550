//! What a client may ask: which names of projects and which paths reach a worker.
//!
//! A refusal is not an answer of its own. What is forbidden looks exactly like
//! what does not exist, so nobody learns from us what lies outside the root.

use super::ows;
use crate::protocol::{FILE, ProjectRef, alias};

/// Longer names of projects exist on no file system that we serve from.
const NAME_MAX: usize = 1024;

/// The schemes by which clients may name projects.
#[derive(Debug, Clone, Copy)]
pub struct Schemes<'a> {
    /// Of a name that has none.
    pub default: &'a str,
    /// None where only the pools know them.
    pub known: Option<&'a [String]>,
}

/// The project that `map` names, if a client may name it so.
///
/// `file:` before a path is the same as no scheme. An absolute path stays
/// absolute: only the worker knows the root, and says whether it contains it.
/// What a scheme stands for is the operator's to say, so it never comes with a host.
pub fn project(map: &str, schemes: Schemes) -> Option<ProjectRef> {
    if map.len() > NAME_MAX || map.chars().any(is_odd) {
        return None;
    }
    let (alias, rest) = match map.split_once(':') {
        Some((scheme, rest)) => (alias(scheme), without_host(rest)?),
        None => (schemes.default.to_owned(), map),
    };
    let is_known = |known: &[String]| known.contains(&alias);
    if !is_scheme(&alias) || alias != FILE && !schemes.known.is_none_or(is_known) {
        return None;
    }
    // A file may have a question mark in its name; elsewhere a query follows.
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) if alias != FILE => (path, query),
        _ => (rest, ""),
    };
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !matches!(*part, "" | "."))
        .collect();
    if parts.is_empty() && query.is_empty()
        || path.contains(':')
        || parts.contains(&"..")
        || parts.first().is_some_and(|part| part.starts_with("vsi")) && path.starts_with('/')
    {
        return None;
    }
    let root = if path.starts_with('/') { "/" } else { "" };
    let query = match query {
        "" => String::new(),
        query => format!("?{query}"),
    };
    Some(ProjectRef {
        alias,
        path: format!("{root}{}{query}", parts.join("/")),
    })
}

/// Whether a URL path may reach a worker: what it decodes to has no odd characters,
/// climbs nowhere and has nothing that QGIS would take out of it.
pub fn is_plain_path(path: &str) -> bool {
    let Ok(path) = percent_encoding::percent_decode_str(path).decode_utf8() else {
        return false;
    };
    !path.contains("//")
        && !path.chars().any(is_odd)
        && !path.split('/').any(|part| matches!(part, "." | ".."))
}

/// Whether a body may reach an API. QGIS reads what does not call itself JSON as
/// XML or a form, and a `service` in there makes an OWS request of it.
pub fn is_api_body(content_type: &str, body: &[u8]) -> bool {
    let text = body
        .strip_prefix("\u{FEFF}".as_bytes())
        .unwrap_or(body)
        .trim_ascii_start();
    content_type.contains("json") || !(text.starts_with(b"<") || ows::names_service(text))
}

/// Control characters end up in logs and C strings, a backslash is a separator
/// elsewhere, and U+FFFD says that the client did not send UTF-8.
fn is_odd(c: char) -> bool {
    c.is_control() || matches!(c, '\\' | '\u{FFFD}')
}

/// None for `//host/…`.
fn without_host(rest: &str) -> Option<&str> {
    match rest.strip_prefix("//") {
        Some(path) => (path.starts_with(['/', '?'])).then_some(path),
        None => Some(rest),
    }
}

fn is_scheme(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+._".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(map: &str) -> Option<ProjectRef> {
        let known = ["file".into(), "pg".into(), "my_maps".into()];
        let schemes = Schemes {
            default: "file",
            known: Some(&known),
        };
        project(map, schemes)
    }

    fn path(map: &str) -> Option<String> {
        let named = named(map)?;
        (named.alias == "file").then_some(named.path)
    }

    #[test]
    fn a_scheme_of_the_operator_takes_a_path_and_a_query() {
        let shown = |map: &str| named(map).map(|project| project.to_string());
        for (map, expected) in [
            ("pg:city", "pg:city"),
            ("PG:./a//city", "pg:a/city"),
            ("pg:?project=city", "pg:?project=city"),
            ("pg://?project=a/../b", "pg:?project=a/../b"),
            ("pg:///a?b=c", "pg:/a?b=c"),
            ("my-maps:city", "my_maps:city"),
            ("file:city?", "file:city?"),
        ] {
            assert_eq!(shown(map).as_deref(), Some(expected), "{map}");
        }
        for map in [
            "pg:",
            "pg://",
            "pg://host/city",
            "pg://user@/city",
            "pg:a/../b",
            "pg:a:b",
            "pg:/vsicurl/x",
            "other:city",
            ":city",
            "1:city",
        ] {
            assert_eq!(shown(map), None, "{map}");
        }
    }

    #[test]
    fn a_name_without_a_scheme_has_the_default_one() {
        let known = ["pg".into()];
        let pg = Schemes {
            default: "pg",
            known: Some(&known),
        };
        let shown = |map, schemes| project(map, schemes).map(|project| project.to_string());
        assert_eq!(shown("city", pg).as_deref(), Some("pg:city"));
        assert_eq!(shown("file:city", pg).as_deref(), Some("file:city"));
        let any = Schemes { known: None, ..pg };
        assert_eq!(shown("own:city", any).as_deref(), Some("own:city"));
    }

    #[test]
    fn a_relative_path_is_one_project_however_it_is_written() {
        for map in [
            "a/b", "./a/b", "a//b", "file:a/b", "FILE:a/b", "a/./b", "a/b/",
        ] {
            assert_eq!(path(map).as_deref(), Some("a/b"), "{map}");
        }
        assert_eq!(path("city.qgs").as_deref(), Some("city.qgs"));
        assert_eq!(path("Zürich ~ 2").as_deref(), Some("Zürich ~ 2"));
    }

    #[test]
    fn an_absolute_path_is_left_to_the_worker() {
        assert_eq!(path("/srv/a.qgs").as_deref(), Some("/srv/a.qgs"));
        assert_eq!(path("file:///srv/a.qgs").as_deref(), Some("/srv/a.qgs"));
    }

    #[test]
    fn what_could_leave_the_root_or_the_host_names_nothing() {
        for map in [
            "",
            ".",
            "/",
            "file:",
            "file:///",
            "..",
            "../a",
            "a/../b",
            "a/..",
            "/srv/../etc",
            "a\0b",
            "a\nb",
            "a\\..\\b",
            "C:\\a",
            "postgresql:?dbname=x",
            "geopackage:/a.gpkg",
            "file:a:b",
            "http://host/a.qgs",
            "file://host/a.qgs",
            "/vsicurl/http/a.qgs",
            "//vsimem/a",
            "a\u{FFFD}",
        ] {
            assert_eq!(path(map), None, "{map:?}");
        }
        assert_eq!(path(&"a".repeat(NAME_MAX + 1)), None);
    }

    #[test]
    fn a_path_that_climbs_or_could_be_shorter_is_not_plain() {
        for path in [
            "/static/../x",
            "/static/%2e%2e/x",
            "/static/..%2fx",
            "/wfs3/collections/./x",
            "/wfs3/collections/%2e/x",
            "/wfs3/.",
            "/wfs3//collections",
            "/wfs3/%2fcollections",
            "/wfs3/collections//",
            "/static/%00",
            "/a%5cb",
            "/%ff",
        ] {
            assert!(!is_plain_path(path), "{path}");
        }
        for path in [
            "/wfs3/collections/a..b/items/{1}",
            "/wfs3/collections/Z%C3%BCrich",
            "/",
        ] {
            assert!(is_plain_path(path), "{path}");
        }
    }

    #[test]
    fn a_body_cannot_make_another_request_of_an_api_request() {
        for body in [
            "SERVICE=WMS",
            "a=b&s%65rvice=WMS",
            " <a service='WFS'/>",
            "\u{FEFF}<a/>",
            "{&SERVICE=x}",
        ] {
            assert!(!is_api_body("", body.as_bytes()), "{body}");
        }
        assert!(is_api_body(
            "application/geo+json",
            b"{\"url\": \"x?a&SERVICE=WMS\"}"
        ));
        assert!(
            is_api_body("", b"{}") && is_api_body("", b"") && is_api_body("text/plain", b"a=b")
        );
    }

    proptest::proptest! {
        #[test]
        fn no_name_climbs(map in ".*") {
            let any = Schemes { default: "file", known: None };
            if let Some(project) = project(&map, any) {
                let path = match project.alias.as_str() {
                    FILE => &project.path,
                    _ => project.path.split('?').next().unwrap(),
                };
                proptest::prop_assert!(path.split('/').all(|part| part != ".."));
                proptest::prop_assert!(!path.contains(':'));
                proptest::prop_assert!(!project.path.contains(['\0', '\\']));
            }
        }
    }
}
