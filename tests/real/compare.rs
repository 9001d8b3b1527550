//! Whether two answers say the same: byte for byte, but for what may differ.
//!
//! URLs (the server advertises its own), the order of XML attributes (Qt's is
//! random), the time stamps of the OGC API and the dates inside a PDF.

use roxmltree::{Document, Node, ParsingOptions};

use crate::common::Reply;

/// Panics where `ours` and `theirs` differ.
pub fn assert_same(what: &str, ours: &Reply, theirs: &Reply) {
    assert_eq!(ours.status, theirs.status, "{what}: {}", ours.text());
    for (name, value) in &theirs.headers {
        // A length counts the letters of URLs; the client has checked ours.
        if !name.eq_ignore_ascii_case("content-length") {
            assert_eq!(ours.header(name), Some(value.as_str()), "{what}: {name}");
        }
    }
    let kind = theirs.header("content-type").unwrap_or_default();
    let (ours, theirs) = (comparable(kind, &ours.body), comparable(kind, &theirs.body));
    if let Some(at) = first_difference(&ours, &theirs) {
        panic!(
            "{what}: at byte {at}:\nours:   {}\ntheirs: {}",
            around(&ours, at),
            around(&theirs, at)
        );
    }
}

fn comparable(kind: &str, body: &[u8]) -> Vec<u8> {
    let text = || without_time_stamps(&without_urls(&String::from_utf8_lossy(body)));
    match kind {
        _ if kind.contains("xml") || kind.contains("gml") => canonical(&text()).into_bytes(),
        _ if kind.contains("json") || kind.starts_with("text/") => text().into_bytes(),
        _ if kind.contains("pdf") => without_dates(body),
        _ => body.to_vec(),
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    (same < a.len().max(b.len())).then_some(same)
}

fn around(text: &[u8], at: usize) -> String {
    let part = &text[at.saturating_sub(80).min(text.len())..(at + 120).min(text.len())];
    format!("{:?}", String::from_utf8_lossy(part))
}

/// Each URL of the server under test becomes `URL`.
fn without_urls(text: &str) -> String {
    let mut parts = text.split("http://127.0.0.1:");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part
            .find(['"', '\'', '<', '>', ' ', '\n', ','])
            .unwrap_or(part.len());
        plain.push_str("URL");
        plain.push_str(&part[end..]);
    }
    plain
}

/// `"timeStamp":"2020-01-01T00:00:00Z"` loses its time.
fn without_time_stamps(text: &str) -> String {
    let mut parts = text.split("\"timeStamp\":\"");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str("\"timeStamp\":\"");
        plain.push_str(&part[part.find('"').unwrap_or(0)..]);
    }
    plain
}

/// The tree with namespaces written out and attributes in order.
pub fn canonical(text: &str) -> String {
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(text, options)
        .unwrap_or_else(|error| panic!("{error}: {text:.2000}"));
    let mut out = String::new();
    for node in document.root().children() {
        write(node, &mut out);
    }
    out
}

fn write(node: Node, out: &mut String) {
    if !node.is_element() {
        let text = node.text().unwrap_or_default();
        return out.push_str(&if node.is_comment() {
            format!("<!--{text}-->")
        } else {
            text.to_owned()
        });
    }
    let name = node.tag_name();
    let mut attributes: Vec<_> = node
        .attributes()
        .map(|it| {
            format!(
                " {{{}}}{}={:?}",
                it.namespace().unwrap_or_default(),
                it.name(),
                it.value()
            )
        })
        .collect();
    attributes.sort();
    let name = format!(
        "{{{}}}{}",
        name.namespace().unwrap_or_default(),
        name.name()
    );
    out.push_str(&format!("<{name}{}>", attributes.concat()));
    node.children().for_each(|child| write(child, out));
    out.push_str(&format!("</{name}>"));
}

/// Qt writes the date in two places; its length is the same in all documents.
fn without_dates(pdf: &[u8]) -> Vec<u8> {
    let mut plain = pdf.to_vec();
    for mark in [
        &b"/CreationDate ("[..],
        b"/ModDate (",
        b"<xmp:CreateDate>",
        b"<xmp:ModifyDate>",
        b"<xmp:MetadataDate>",
        b"uuid:",
    ] {
        for at in
            (0..plain.len().saturating_sub(mark.len())).filter(|&at| pdf[at..].starts_with(mark))
        {
            let rest = &mut plain[at + mark.len()..];
            rest.iter_mut()
                .take_while(|byte| !b")<\"'".contains(byte))
                .for_each(|byte| *byte = b'0');
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_may_come_in_any_order_and_nothing_else() {
        assert_eq!(
            canonical("<a c='1' b='2'/>"),
            canonical("<a b='2' c='1'></a>")
        );
        assert_ne!(canonical("<a><b/><c/></a>"), canonical("<a><c/><b/></a>"));
        assert_ne!(canonical("<a> <b/></a>"), canonical("<a><b/></a>"));
        assert_eq!(
            canonical("<p:a xmlns:p='u'/>"),
            canonical("<q:a xmlns:q='u'/>")
        );
    }

    #[test]
    fn only_urls_of_the_server_are_set_aside() {
        let text = r#"<a href="http://127.0.0.1:80/ows/?MAP=a&amp;"/> http://www.opengis.net/"#;
        assert_eq!(
            without_urls(text),
            r#"<a href="URL"/> http://www.opengis.net/"#
        );
    }

    #[test]
    fn dates_of_a_pdf_are_set_aside() {
        let pdf = |date: &str| format!("%PDF /CreationDate (D:{date}) <x>{date}").into_bytes();
        assert_eq!(
            &without_dates(&pdf("2020"))[..26],
            &without_dates(&pdf("2021"))[..26]
        );
        assert_ne!(without_dates(&pdf("2020")), without_dates(&pdf("2021")));
    }
}
