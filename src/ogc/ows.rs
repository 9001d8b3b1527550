//! OWS parameters: key-value pairs as OGC services read them.
//!
//! Keys are upper-case and unique: of a repeated key the last value counts, for
//! us as for QGIS. Values stay percent-encoded as the client wrote them, so the
//! URLs that QGIS derives from the query are the client's own.

use std::collections::{HashMap, HashSet};

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};

/// What a query must not contain raw; `%` stays, it is part of an encoding already.
const NOT_QUERY: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'<')
    .add(b'>')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// What a key must not contain either.
const NOT_KEY: &AsciiSet = &NOT_QUERY.add(b'%').add(b'&').add(b'+').add(b'=');

/// The longest operation that is worth a place in logs.
const OPERATION_MAX: usize = 64;

/// More fields are not those of an OWS request.
pub const FIELDS_MAX: usize = 1000;

/// SERVICE and what ends a name are no longer than this, however they are encoded.
const SERVICE_KEY_MAX: usize = 64;

/// How far into a body the root element is looked for.
const PROLOG_MAX: usize = 4096;

/// Parameters in order of their first appearance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kvp(Vec<(String, String)>);

impl Kvp {
    /// The parameters of a query, in upper case.
    pub fn parse(query: &str) -> Self {
        Self::of(query.as_bytes())
    }

    /// Adds the parameters of `form` that are not there yet.
    pub fn merge(&mut self, form: &[u8]) {
        let known: HashSet<String> = self.0.iter().map(|(key, _)| key.clone()).collect();
        let others = Self::of(form).0.into_iter();
        self.0
            .extend(others.filter(|(key, _)| !known.contains(key)));
    }

    fn of(form: &[u8]) -> Self {
        let (mut pairs, mut places) = (Vec::new(), HashMap::new());
        for pair in form
            .split(|byte| *byte == b'&')
            .filter(|pair| !pair.is_empty())
        {
            let mut halves = pair.splitn(2, |byte| *byte == b'=');
            let key = name(&decode(halves.next().unwrap_or_default()));
            let value = tidy(halves.next().unwrap_or_default());
            let place = *places.entry(key.clone()).or_insert(pairs.len());
            match pairs.get_mut(place) {
                Some(known) => *known = (key, value),
                None => pairs.push((key, value)),
            }
        }
        Self(pairs)
    }

    /// The decoded value of `key`; None when it is absent or empty.
    pub fn get(&self, key: &str) -> Option<String> {
        let (_, value) = self.0.iter().find(|(known, _)| known == key)?;
        Some(decode(value.as_bytes())).filter(|value| !value.is_empty())
    }

    /// Keys and decoded values.
    pub fn pairs(&self) -> impl Iterator<Item = (String, String)> {
        let pairs = self.0.iter();
        pairs.map(|(key, value)| (key.clone(), decode(value.as_bytes())))
    }

    /// Gives `key` this value; an empty one takes it away.
    pub fn set(&mut self, key: &str, value: &str) {
        self.0.retain(|(known, _)| known != key);
        if !value.is_empty() {
            let value = percent_encode(value.as_bytes(), NOT_KEY).to_string();
            self.0.push((key.to_owned(), value));
        }
    }

    /// The query again.
    pub fn to_query(&self) -> String {
        let pairs: Vec<String> = self
            .0
            .iter()
            .map(|(key, value)| format!("{}={value}", encode_key(key)))
            .collect();
        pairs.join("&")
    }
}

/// The query of an API: its own business, repeated keys included, but for two
/// keys. QGIS looks for MAP in upper case; and of a request with a SERVICE it
/// makes an OWS request whatever its path, so that key stays behind.
pub fn api_query(query: &str) -> String {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match name(&decode(key.as_bytes())).as_str() {
            "SERVICE" => None,
            "MAP" => Some(format!("MAP={value}")),
            _ => Some(pair.to_owned()),
        }
    };
    let pairs: Vec<String> = query.split('&').filter_map(pair).collect();
    tidy(pairs.join("&").as_bytes())
}

/// All pairs of a query, decoded.
pub fn all_pairs(query: &str) -> impl Iterator<Item = (String, String)> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key), decoded(value))
    })
}

/// The query of an API with another project; an empty name takes it away.
pub fn with_map(query: &str, map: &str) -> String {
    let is_other = |pair: &&str| !is_map(pair.split('=').next().unwrap_or_default());
    let others = query.split('&').filter(|pair| !pair.is_empty());
    let mut pairs: Vec<String> = others.filter(is_other).map(str::to_owned).collect();
    if !map.is_empty() {
        let value = percent_encode(map.as_bytes(), NOT_KEY);
        pairs.push(format!("MAP={value}"));
    }
    pairs.join("&")
}

/// Whether one of the parameters of `form` is a SERVICE. A body may be long, so
/// nothing of it is kept.
pub fn names_service(form: &[u8]) -> bool {
    form.split(|byte| *byte == b'&').any(|pair| {
        let key = pair.split(|byte| *byte == b'=').next().unwrap_or_default();
        key.len() < pair.len() && is_service(&key[..key.len().min(SERVICE_KEY_MAX)])
    })
}

fn is_service(key: &[u8]) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric();
    match key.iter().all(is_plain) {
        // Most keys are, and there may be millions of them.
        true => key.eq_ignore_ascii_case(b"SERVICE"),
        false => name(&decode(key)) == "SERVICE",
    }
}

/// The last MAP of a query whose other keys keep their case.
pub fn map_of(query: &str) -> Option<String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let value = pairs
        .rev()
        .find(|(key, _)| is_map(key))
        .map(|(_, value)| decode(value.as_bytes()));
    value.filter(|value| !value.is_empty())
}

/// A path or query without what an URL cannot hold raw.
pub fn tidy(raw: &[u8]) -> String {
    percent_encode(raw, NOT_QUERY).to_string()
}

/// An operation as logs and obituaries show it: short, printable.
pub fn operation(name: &str) -> String {
    let shown = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    name.chars().take(OPERATION_MAX).map(shown).collect()
}

/// Whether `operation` changes nothing, so that it may be asked twice or left
/// half-way. WFS lets a Transaction come by GET.
pub fn is_read_only(operation: &str) -> bool {
    !operation.eq_ignore_ascii_case("Transaction") && !operation.eq_ignore_ascii_case("LockFeature")
}

/// Operations of WMS, WFS, WCS and WMTS that only read, however they are asked
/// for. A plugin's may do anything.
const READS: [&str; 24] = [
    "DescribeCoverage",
    "DescribeFeatureType",
    "DescribeLayer",
    "DescribeStoredQueries",
    "GetCapabilities",
    "GetContext",
    "GetCoverage",
    "GetDxf",
    "GetFeature",
    "GetFeatureInfo",
    "GetGmlObject",
    "GetLegendGraphic",
    "GetLegendGraphics",
    "GetMap",
    "GetPrint",
    "GetPrintAtlas",
    "GetProjectSettings",
    "GetPropertyValue",
    "GetSchemaExtension",
    "GetStyle",
    "GetStyles",
    "GetTile",
    "ListStoredQueries",
    "SchemaExtension",
];

/// Whether `operation` is known to change nothing.
pub fn is_read(operation: &str) -> bool {
    READS
        .iter()
        .any(|read| read.eq_ignore_ascii_case(operation))
}

/// What the root element of an XML body says: the operation of a POST, and
/// whose it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Root {
    pub operation: String,
    pub service: Option<String>,
    pub version: Option<String>,
}

/// The root element of a body, found without parsing the document: QGIS does that.
pub fn root(body: &[u8]) -> Option<Root> {
    let text = String::from_utf8_lossy(&body[..body.len().min(PROLOG_MAX)]);
    root_of(root_tag(text.trim_start_matches('\u{FEFF}').trim_start())?)
}

/// All that follows the `<` of the root element. None without one, and with a document
/// type, which may define what everything else means.
pub fn root_tag(text: &str) -> Option<&str> {
    let mut rest = text;
    loop {
        let inner = rest.strip_prefix('<')?;
        let end = match inner {
            _ if inner.starts_with("!--") => "-->",
            _ if inner.starts_with('?') => "?>",
            _ if inner.starts_with('!') => return None,
            _ => return Some(inner),
        };
        rest = inner.split_once(end)?.1.trim_start();
    }
}

/// `tag` is all that follows `<`.
fn root_of(tag: &str) -> Option<Root> {
    let tag = &tag[..tag.find('>').unwrap_or(tag.len())];
    let name = tag.split(|c: char| c.is_whitespace() || c == '/').next()?;
    let local = name.rsplit(':').next().filter(|local| !local.is_empty())?;
    Some(Root {
        operation: operation(local),
        service: attribute(tag, "service"),
        version: attribute(tag, "version"),
    })
}

fn attribute(tag: &str, name: &str) -> Option<String> {
    let mut rest = tag;
    loop {
        let (before, after) = rest.split_once('=')?;
        let after = after.trim_start();
        let quote = after.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let (value, next) = after[1..].split_once(quote)?;
        if before.split_whitespace().next_back() == Some(name) {
            return Some(operation(value));
        }
        rest = next;
    }
}

fn is_map(key: &str) -> bool {
    name(&decode(key.as_bytes())) == "MAP"
}

fn encode_key(key: &str) -> String {
    percent_encode(key.as_bytes(), NOT_KEY).to_string()
}

/// The parameter that `key` names, as QGIS reads it: as a C string, which ends at a NUL,
/// and as the name of a constant in C++, which `::` may precede. In XML one colon does so.
pub fn name(key: &str) -> String {
    let name = key.split('\0').next().unwrap_or_default();
    name.trim_start_matches(':').to_uppercase()
}

/// What a piece of a query means.
pub fn decoded(piece: &str) -> String {
    decode(piece.as_bytes())
}

/// A `+` is a space, here as in QGIS.
fn decode(raw: &[u8]) -> String {
    let spaced = String::from_utf8_lossy(raw).replace('+', " ");
    percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_upper_cased_and_values_left_alone() {
        let kvp = Kvp::parse("map=a%2Fb&Service=wms&styles=&x+y=1&b=%C3%BC+%26");
        assert_eq!(
            kvp.to_query(),
            "MAP=a%2Fb&SERVICE=wms&STYLES=&X%20Y=1&B=%C3%BC+%26"
        );
        assert_eq!(kvp.get("MAP").as_deref(), Some("a/b"));
        assert_eq!(kvp.get("B").as_deref(), Some("ü &"));
    }

    #[test]
    fn a_name_is_what_qgis_takes_it_for() {
        let kvp = Kvp::parse("SERVICE=WMS&service%00x=WFS&::Map=a&%3A%3Alayers=b");
        assert_eq!(kvp.to_query(), "SERVICE=WFS&MAP=a&LAYERS=b");
        let long = "x".repeat(SERVICE_KEY_MAX);
        for name in ["::service", "Service%00", &format!("%3A:SERVICE%00{long}")] {
            assert!(names_service(format!("a=b&{name}=c").as_bytes()), "{name}");
            assert_eq!(api_query(&format!("{name}=WMS&limit=1")), "limit=1");
        }
        assert!(!names_service(format!("{long}=c").as_bytes()));
        for query in ["MAP=a&::map=b", "MAP=a&Map%00x=b"] {
            assert_eq!(map_of(query).as_deref(), Some("b"), "{query}");
            assert_eq!(api_query(query), "MAP=a&MAP=b");
            assert_eq!(with_map(query, "c"), "MAP=c");
        }
    }

    #[test]
    fn the_last_of_a_repeated_key_wins_for_us_and_for_qgis() {
        let mut kvp = Kvp::parse("MAP=a&map=b&X=1&%6Dap=c");
        kvp.merge(b"Map=d&LAYERS=x&LAYERS=y");
        assert_eq!(kvp.to_query(), "MAP=c&X=1&LAYERS=y");
    }

    #[test]
    fn an_empty_value_is_as_good_as_none() {
        assert_eq!(Kvp::parse("MAP=&SERVICE").get("MAP"), None);
        assert_eq!(Kvp::parse("MAP=&SERVICE").get("SERVICE"), None);
        assert_eq!(map_of("a&map="), None);
    }

    #[test]
    fn a_form_cannot_break_out_of_the_query() {
        let mut kvp = Kvp::default();
        kvp.merge(b"A=1 2#x\r\nHost: y&B=\xff\"");
        assert_eq!(kvp.to_query(), "A=1%202%23x%0D%0AHost:%20y&B=%FF%22");
    }

    #[test]
    fn an_api_keeps_its_query_but_for_the_name_of_map() {
        assert_eq!(api_query("Service=WMS&a=1&%73ervice&b"), "a=1&b");
        assert_eq!(api_query(""), "");
        assert_eq!(api_query("a=1&Map=x%2Fy&a=2&f"), "a=1&MAP=x%2Fy&a=2&f");
        assert_eq!(map_of("a=1&Map=z&MAP=x%2Fy").as_deref(), Some("x/y"));
    }

    #[test]
    fn the_operation_of_a_body_is_its_root_element() {
        for (body, name) in [
            ("<wfs:GetFeature a='b'/>", Some("GetFeature")),
            (
                "\u{FEFF}<?xml version='1.0'?>\n<!-- x > y --><Transaction>",
                Some("Transaction"),
            ),
            ("<!DOCTYPE a [<!ENTITY b 'c'>]><a/>", None),
            ("SERVICE=WMS", None),
            ("<", None),
            ("", None),
        ] {
            let operation = root(body.as_bytes()).map(|root| root.operation);
            assert_eq!(operation.as_deref(), name, "{body}");
        }
    }

    #[test]
    fn a_body_says_whose_it_is() {
        let of = |body: &str| {
            let root = root(body.as_bytes()).expect("a root");
            (root.service, root.version)
        };
        let wfs = (Some("WFS".to_owned()), Some("1.1.0".to_owned()));
        assert_eq!(
            of("<a xmlns:service='x' version = \"1.1.0\"\n service='WFS'>"),
            wfs
        );
        assert_eq!(of("<a b=service='WFS'>"), (None, None));
        assert_eq!(of("<a/><b service='WFS'/>"), (None, None));
    }

    #[test]
    fn an_operation_is_short_and_printable() {
        assert_eq!(operation("Get\nMap é"), "Get?Map??");
        assert_eq!(operation(&"x".repeat(1000)).len(), OPERATION_MAX);
    }

    proptest::proptest! {
        #[test]
        fn a_query_read_again_says_the_same(form: Vec<u8>) {
            let mut kvp = Kvp::default();
            kvp.merge(&form);
            proptest::prop_assert!(kvp.to_query().bytes().all(|byte| byte.is_ascii_graphic()));
            proptest::prop_assert_eq!(Kvp::parse(&kvp.to_query()).to_query(), kvp.to_query());
        }

        #[test]
        fn no_body_panics(body in "<?[ -~é]*", bytes: Vec<u8>) {
            let _ = root(&bytes);
            let body = body.into_bytes();
            let _ = root(&body);
        }
    }
}
