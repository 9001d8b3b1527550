//! Documents that clients keep: what names their states, and which copy is still good.
//!
//! A document that its project alone determines has a name before it is made, so a
//! client that has it costs QGIS nothing. Any other is made, and its bytes name it: so
//! it is where a plugin had a hand, and where data may change without their project.

use std::collections::BTreeMap;

use bytes::Bytes;
use qgisserver::config;
use qgisserver::protocol::{Document, Head, Held, Validator, Versions};
use sha2::{Digest, Sha256};

/// Bytes of a name; twice as many characters. More than any two documents share.
const TAG_BYTES: usize = 16;

/// What both a document and the news that it is still good say of it (RFC 9110 clause 15.4.5).
const OF_COPIES: [&str; 4] = ["cache-control", "content-location", "expires", "vary"];

/// How documents of one worker are named.
pub struct Documents {
    /// Versions, rules and environment: what changes documents without their projects.
    software: Sha256,
    /// Data do not count.
    by_project: bool,
}

impl Documents {
    pub fn new(rules: &config::Pool, versions: &Versions) -> Self {
        let settings = (
            &rules.bad_layers,
            rules.trust_layer_metadata,
            rules.disable_getprint,
            rules.force_readonly_layers,
            rules.disable_owsurls,
        );
        let environment: BTreeMap<_, _> = std::env::vars_os()
            .filter(|(name, _)| name.to_string_lossy().starts_with("QGIS_"))
            .collect();
        let text = format!("{versions:?}{settings:?}{environment:?}");
        Self {
            software: Sha256::new_with_prefix(text),
            by_project: rules.trust_layer_metadata || rules.force_etag,
        }
    }

    /// What is known of a document before it is made, whose project is in this state.
    pub fn asked<'a>(
        &self,
        document: &'a Document,
        url: &str,
        state: State<'_>,
        has_plugins: bool,
    ) -> Asked<'a> {
        let is_alone = state.is_alone && !has_plugins;
        let is_fixed = document.fixed && self.by_project && is_alone;
        let place = format!("{:x}", state.place);
        let parts = [&document.basis, url, &place, state.version];
        Asked {
            document,
            foreseen: is_fixed.then(|| name(self.software.clone(), &parts)),
            drawn_up: state.modified.filter(|_| document.dated),
            // A right that was lost leaves the project as it was.
            modified: state.dated.filter(|_| document.dated && is_alone),
            has_plugins,
        }
    }
}

/// What a project is, and since when.
#[derive(Debug, Clone, Copy, Default)]
pub struct State<'a> {
    /// Where it is, hashed: one name may come to lead to another project.
    pub place: u64,
    pub version: &'a str,
    /// When it last changed, as far as that is known.
    pub modified: Option<u64>,
    /// The same if no change leaves it as it is.
    pub dated: Option<u64>,
    /// Nothing but QGIS makes documents of it: a plugin's service or cache filter may
    /// change what it says whenever it likes.
    pub is_alone: bool,
}

/// A document that a client asks for.
#[derive(Debug)]
pub struct Asked<'a> {
    document: &'a Document,
    /// Its name, if that is known before it is made.
    foreseen: Option<String>,
    /// What its page says of its time.
    drawn_up: Option<u64>,
    /// The date by which a client may know it.
    modified: Option<u64>,
    /// A server filter or access control may have a hand in it.
    has_plugins: bool,
}

impl Asked<'_> {
    /// That the client has it, if that is known already. A date or a `*` waits until it is
    /// known that there is such a document at all.
    pub fn known(&self) -> Option<Head> {
        let tag = self.foreseen.as_ref()?;
        let held = self.document.held.tags.contains(tag);
        held.then(|| not_modified(self.validator(tag.clone())))
    }

    /// The reply with the document's name, and without its body if the client has it.
    /// `keys`: for whom access control let it be made.
    pub fn settle(&self, keys: &[String], mut head: Head, bytes: Bytes) -> (Head, Bytes) {
        // What a plugin says of its own documents is its own business.
        if head.status != 200 || head.header("etag").is_some() {
            return (head, bytes);
        }
        let bytes = self
            .drawn_up
            .map_or(bytes.clone(), |at| dated(&head, bytes, at));
        let tag = self.foreseen.clone();
        let validator = self.validator(tag.unwrap_or_else(|| name_of(&head, &bytes, keys)));
        if is_held(&self.document.held, &validator) {
            head.headers.retain(|(name, _)| is_of_copies(name));
            let known = Head {
                headers: head.headers,
                ..not_modified(validator)
            };
            return (known, Bytes::new());
        }
        head.validator = Some(validator);
        (head, bytes)
    }

    fn validator(&self, tag: String) -> Validator {
        Validator {
            tag,
            modified: self.modified,
            private: self.has_plugins,
        }
    }
}

fn not_modified(validator: Validator) -> Head {
    Head {
        status: 304,
        length: Some(0),
        validator: Some(validator),
        ..Head::default()
    }
}

fn is_held(held: &Held, validator: &Validator) -> bool {
    // An older one may come back from a backup, so a later date says nothing.
    let is_the_date = |(modified, since): (u64, u64)| modified == since;
    held.any
        || held.tags.contains(&validator.tag)
        || validator.modified.zip(held.since).is_some_and(is_the_date)
}

fn name_of(head: &Head, bytes: &[u8], keys: &[String]) -> String {
    let kind = head.header("content-type").unwrap_or_default();
    let keys = keys.iter().map(String::as_bytes);
    let parts: Vec<&[u8]> = [kind.as_bytes(), bytes].into_iter().chain(keys).collect();
    name(Sha256::new(), &parts)
}

/// Each part with its length, so that no two lists of parts look alike.
fn name(mut hash: Sha256, parts: &[impl AsRef<[u8]>]) -> String {
    for part in parts {
        hash.update((part.as_ref().len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digits = hash.finalize();
    let digits = digits[..TAG_BYTES].iter();
    digits.map(|byte| format!("{byte:02x}")).collect()
}

/// QGIS writes into its pages when they were drawn up, and no two would be the same. A
/// page is what it is since its project is.
fn dated(head: &Head, bytes: Bytes, at: u64) -> Bytes {
    const STAMP: &[u8] = b"\"timeStamp\":\"";
    let is_json = head
        .header("content-type")
        .is_some_and(|kind| kind.contains("json"));
    let start = is_json.then(|| bytes.windows(STAMP.len()).position(|part| part == STAMP));
    let Some(start) = start.flatten().map(|start| start + STAMP.len()) else {
        return bytes;
    };
    let length = bytes[start..].iter().position(|byte| *byte == b'"');
    let end = start + length.unwrap_or_default();
    [&bytes[..start], iso(at).as_bytes(), &bytes[end..]]
        .concat()
        .into()
}

/// ISO 8601, as QGIS writes it.
fn iso(seconds: u64) -> String {
    let seconds = libc::time_t::try_from(seconds).unwrap_or_default();
    // SAFETY: all fields of `tm` are numbers or a pointer, and may be zero.
    let mut tm = unsafe { std::mem::zeroed::<libc::tm>() };
    // SAFETY: both are ours, and of the type that it says.
    unsafe { libc::gmtime_r(&seconds, &mut tm) };
    let (year, month) = (tm.tm_year + 1900, tm.tm_mon + 1);
    let (day, hour, minute, second) = (tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

fn is_of_copies(name: &str) -> bool {
    OF_COPIES
        .iter()
        .any(|known| known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Option<u64> = Some(10);

    fn state(version: &str) -> State<'_> {
        State {
            place: 7,
            version,
            modified: NOW,
            dated: NOW,
            is_alone: true,
        }
    }

    fn documents(change: impl FnOnce(&mut config::Pool)) -> Documents {
        let mut rules = config::Config::default().pool;
        rules.force_etag = true;
        change(&mut rules);
        Documents::new(&rules, &Versions::default())
    }

    fn capabilities(held: Held) -> Document {
        Document {
            dated: true,
            fixed: true,
            basis: "b".into(),
            held,
        }
    }

    fn tags(tags: &[&str]) -> Held {
        Held {
            tags: tags.iter().map(|tag| tag.to_string()).collect(),
            ..Held::default()
        }
    }

    fn since(since: u64) -> Held {
        Held {
            since: Some(since),
            ..Held::default()
        }
    }

    fn any() -> Held {
        Held {
            any: true,
            ..Held::default()
        }
    }

    fn reply(text: &str) -> (Head, Bytes) {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let head = Head {
            status: 200,
            headers: vec![header("Content-Type", "text/xml"), header("Vary", "X")],
            ..Head::default()
        };
        (head, Bytes::copy_from_slice(text.as_bytes()))
    }

    /// The status and the name of a document for a client that has `held`.
    fn told(held: Held, has_plugins: bool, keys: &[&str], text: &str) -> (u16, String) {
        let documents = documents(|rules| rules.force_etag = false);
        let document = capabilities(held);
        let asked = documents.asked(&document, "u", state("s"), has_plugins);
        assert_eq!(asked.known(), None);
        let keys: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
        let (head, bytes) = reply(text);
        let (head, bytes) = asked.settle(&keys, head, bytes);
        assert_eq!(bytes.is_empty(), head.status == 304);
        (head.status, head.validator.expect("it is a document").tag)
    }

    #[test]
    fn a_name_changes_with_all_that_a_document_depends_on() {
        let one = documents(|_| ());
        let foreseen = |documents: &Documents, basis: &str, url, version| {
            let document = Document {
                basis: basis.into(),
                ..capabilities(Held::default())
            };
            let asked = documents.asked(&document, url, state(version), false);
            asked.foreseen.expect("its project determines it")
        };
        let name = foreseen(&one, "1", "http://a/", "s");
        assert_eq!(foreseen(&one, "1", "http://a/", "s"), name);
        assert_eq!(name.len(), 2 * TAG_BYTES);
        for (basis, url, version) in [
            ("2", "http://a/", "s"),
            ("1", "http://b/", "s"),
            ("1", "http://a/?", "s"),
            ("1", "http://a/", "t"),
            ("1h", "ttp://a/", "s"),
        ] {
            assert_ne!(
                foreseen(&one, basis, url, version),
                name,
                "{basis} {url} {version}"
            );
        }
        let elsewhere = State {
            place: 8,
            ..state("s")
        };
        let document = Document {
            basis: "1".into(),
            ..capabilities(Held::default())
        };
        let asked = one.asked(&document, "http://a/", elsewhere, false);
        assert_ne!(asked.foreseen.expect("it is fixed"), name);
        let blank = documents(|rules| rules.disable_owsurls = true);
        assert_ne!(foreseen(&blank, "1", "http://a/", "s"), name);
        let rules = config::Pool {
            force_etag: true,
            ..config::Config::default().pool
        };
        let versions = Versions {
            qgis: "4".into(),
            ..Versions::default()
        };
        let newer = Documents::new(&rules, &versions);
        assert_ne!(foreseen(&newer, "1", "http://a/", "s"), name);
    }

    #[test]
    fn only_what_its_project_determines_is_named_before_it_is_made() {
        let is_foreseen = |documents: &Documents, document: &Document, has_plugins| {
            let asked = documents.asked(document, "u", state("s"), has_plugins);
            asked.foreseen.is_some()
        };
        let document = capabilities(Held::default());
        let forced = documents(|_| ());
        assert!(is_foreseen(&forced, &document, false));
        assert!(!is_foreseen(&forced, &document, true));
        assert!(!is_foreseen(&forced, &Document::default(), false));
        let by_data = documents(|rules| rules.force_etag = false);
        assert!(!is_foreseen(&by_data, &document, false));
        let trusting = documents(|rules| {
            (rules.force_etag, rules.trust_layer_metadata) = (false, true);
        });
        assert!(is_foreseen(&trusting, &document, false));
    }

    #[test]
    fn who_has_what_will_be_made_is_told_so_before() {
        let documents = documents(|_| ());
        let known = |held: Held| {
            let document = capabilities(held);
            documents.asked(&document, "u", state("s"), false).known()
        };
        let none = capabilities(Held::default());
        let tag = documents.asked(&none, "u", state("s"), false).foreseen;
        let tag = tag.expect("it is fixed");
        let head = known(tags(&["x", &tag])).expect("it is known");
        let validator = head.validator.expect("a name");
        assert_eq!(
            (head.status, validator.tag, validator.modified),
            (304, tag, NOW)
        );
        // Whether there is such a document at all is not known yet.
        for held in [tags(&["x"]), any(), since(99)] {
            assert_eq!(known(held), None);
        }
    }

    #[test]
    fn who_has_a_document_is_told_so_without_it() {
        let (status, tag) = told(Held::default(), false, &[], "one");
        assert_eq!(status, 200);
        for (held, status) in [
            (tags(&[&tag]), 304),
            (tags(&["x", &tag]), 304),
            (tags(&["x"]), 200),
            (any(), 304),
            (since(9), 200),
            (since(10), 304),
            (since(11), 200),
        ] {
            let expected = (status, tag.clone());
            assert_eq!(told(held.clone(), false, &[], "one"), expected, "{held:?}");
        }
        assert_eq!(told(tags(&[&tag]), false, &[], "two").0, 200);
    }

    #[test]
    fn what_may_change_without_its_date_has_none() {
        let (documents, document) = (documents(|_| ()), capabilities(since(10)));
        let undated = State {
            dated: None,
            ..state("s")
        };
        let asked = documents.asked(&document, "u", undated, false);
        let (head, bytes) = reply("one");
        let (head, _) = asked.settle(&[], head, bytes);
        let validator = head.validator.expect("a name");
        assert_eq!((head.status, validator.modified), (200, None));
    }

    #[test]
    fn where_plugins_may_answer_only_its_bytes_name_a_document_and_all_may_keep_it() {
        let (documents, document) = (documents(|_| ()), capabilities(since(10)));
        let served = State {
            is_alone: false,
            ..state("s")
        };
        let asked = documents.asked(&document, "u", served, false);
        assert_eq!(asked.foreseen, None);
        let (head, bytes) = reply("one");
        let (head, _) = asked.settle(&[], head, bytes);
        let validator = head.validator.expect("a name");
        assert_eq!((head.status, validator.modified), (200, None));
        assert!(!validator.private);
    }

    #[test]
    fn what_plugins_had_a_hand_in_is_for_one_client_and_not_dated() {
        let (status, ada) = told(since(99), true, &["ada"], "one");
        assert_eq!(status, 200, "a right may be gone since");
        assert_eq!(told(tags(&[&ada]), true, &["ada"], "one").0, 304);
        assert_eq!(told(tags(&[&ada]), true, &["ben"], "one").0, 200);
        let documents = documents(|_| ());
        let document = capabilities(Held::default());
        let asked = documents.asked(&document, "u", state("s"), true);
        let (head, bytes) = reply("one");
        let validator = asked.settle(&[], head, bytes).0.validator.expect("a name");
        assert!(validator.private && validator.modified.is_none());
    }

    #[test]
    fn a_copy_that_is_still_good_keeps_what_was_said_of_copies() {
        let (documents, document) = (documents(|_| ()), capabilities(any()));
        let asked = documents.asked(&document, "u", state("s"), false);
        let (head, bytes) = reply("one");
        let (head, _) = asked.settle(&[], head, bytes);
        assert_eq!(head.headers, [("Vary".to_owned(), "X".to_owned())]);
        assert_eq!((head.status, head.length), (304, Some(0)));
    }

    #[test]
    fn a_page_bears_the_date_of_its_project_and_not_of_its_making() {
        // Whether that date is enough for clients to know it by is another question.
        let of_1994 = State {
            modified: Some(784_111_777),
            dated: None,
            ..state("s")
        };
        let (documents, document) = (documents(|_| ()), capabilities(Held::default()));
        let asked = documents.asked(&document, "u", of_1994, true);
        let page = |kind: &str, second: u32| {
            let head = Head {
                status: 200,
                headers: vec![("Content-Type".into(), kind.into())],
                ..Head::default()
            };
            let text = format!("{{\"a\":1,\"timeStamp\":\"2026-01-01T00:00:0{second}Z\"}}");
            let (head, bytes) = asked.settle(&[], head, Bytes::from(text));
            (head.validator.expect("a name").tag, bytes)
        };
        let (tag, bytes) = page("application/json", 1);
        assert_eq!(bytes, r#"{"a":1,"timeStamp":"1994-11-06T08:49:37Z"}"#);
        assert_eq!(page("application/json", 2), (tag, bytes));
        assert_ne!(page("text/html", 1), page("text/html", 2));
    }

    #[test]
    fn mistakes_and_what_plugins_name_themselves_are_left_alone() {
        let (documents, document) = (documents(|_| ()), capabilities(any()));
        let asked = documents.asked(&document, "u", state("s"), false);
        let (mut head, bytes) = reply("x");
        head.status = 400;
        let refused = (head.clone(), bytes.clone());
        assert_eq!(asked.settle(&[], head.clone(), bytes.clone()), refused);
        head.status = 200;
        head.headers.push(("ETag".into(), "\"own\"".into()));
        let own = (head.clone(), bytes.clone());
        assert_eq!(asked.settle(&[], head, bytes), own);
    }
}
