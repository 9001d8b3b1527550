//! Who is asked about projects that are no files: S3 by this program, the rest by Python.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;
use qgisserver::config;

use crate::places::{Stamp, Uri};
use crate::qgis::Asker;
use crate::s3::Objects;

/// Why it is not known in which state a project is.
#[derive(Debug)]
pub enum Trouble {
    /// The storage does not answer, whatever it is asked.
    Away(String),
    /// It was there a moment ago.
    Gone,
    /// No project has so many bytes.
    TooBig { limit: u64 },
    /// A handler of the operator's failed at this one.
    Raised(String),
}

/// What `Places` needs of storages.
pub trait Storages {
    /// The state of a project; None if it is not there.
    fn look(&mut self, uri: &Uri) -> Result<Option<Stamp>, Trouble>;

    /// A copy of the project on this machine; None where QGIS itself reads it.
    fn fetch(&mut self, uri: &Uri) -> Result<Option<Fetched>, Trouble>;

    /// The file or the URI of a project in the catalogue of QGIS; None if it does not
    /// list it.
    fn listed(&mut self, id: &str) -> Result<Option<String>, Trouble>;
}

/// A copy of a project, in a folder of its own with what belongs to it. That is there as
/// long as this value: once QGIS has read it, nobody needs it.
#[derive(Debug, PartialEq)]
pub struct Fetched(pub PathBuf);

impl Drop for Fetched {
    fn drop(&mut self) {
        if let Some(folder) = self.0.parent() {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// The real ones.
pub struct Everywhere {
    pub objects: Objects,
    pub asker: Asker,
}

impl Storages for Everywhere {
    fn look(&mut self, uri: &Uri) -> Result<Option<Stamp>, Trouble> {
        match uri.scheme() {
            "s3" => self.objects.look(&uri.0),
            _ => self.asker.look(&uri.0),
        }
    }

    fn fetch(&mut self, uri: &Uri) -> Result<Option<Fetched>, Trouble> {
        match uri.scheme() {
            "s3" => self.objects.fetch(&uri.0).map(Some),
            _ => Ok(None),
        }
    }

    fn listed(&mut self, id: &str) -> Result<Option<String>, Trouble> {
        self.asker.listed(id)
    }
}

/// What GDAL must know to read data beside a project in S3, by the prefixes of its paths.
pub fn for_gdal(finding: &config::Finding) -> BTreeMap<String, BTreeMap<&'static str, String>> {
    let bases = finding.schemes.values();
    let bases = bases.chain(finding.search_paths.iter().map(|(_, base)| base));
    let buckets = bases.filter(|base| base.scheme == "s3" && finding.allows("s3"));
    let prefix = |base: &config::Base| format!("/vsis3/{}/", base.authority);
    buckets
        .map(|base| (prefix(base), options(finding)))
        .collect()
}

fn options(finding: &config::Finding) -> BTreeMap<&'static str, String> {
    let s3 = &finding.s3;
    let yes = |yes: bool| if yes { "YES" } else { "NO" }.to_owned();
    let mut options = BTreeMap::from([
        ("AWS_REGION", s3.region.clone()),
        ("AWS_VIRTUAL_HOSTING", yes(!s3.path_style)),
        (
            "GDAL_HTTP_CONNECTTIMEOUT",
            finding.timeout.as_secs().max(1).to_string(),
        ),
    ]);
    if let Some((scheme, host)) = s3.endpoint.as_ref().and_then(|url| url.split_once("://")) {
        options.insert("AWS_HTTPS", yes(scheme == "https"));
        options.insert("AWS_S3_ENDPOINT", host.trim_end_matches('/').into());
    }
    match (&s3.access_key_id, &s3.secret_access_key) {
        (Some(id), Some(config::Secret(secret))) => {
            options.insert("AWS_ACCESS_KEY_ID", id.clone());
            options.insert("AWS_SECRET_ACCESS_KEY", secret.clone());
        }
        _ => drop(options.insert("AWS_NO_SIGN_REQUEST", yes(true))),
    }
    options
}

/// The passwords of databases, as lines of a password file of libpq.
pub fn passwords(finding: &config::Finding) -> Vec<String> {
    let bases = finding.schemes.values();
    let bases = bases.chain(finding.search_paths.iter().map(|(_, base)| base));
    let databases = bases.filter(|base| base.scheme == "postgresql");
    databases.filter_map(password).collect()
}

fn password(base: &config::Base) -> Option<String> {
    let (user, password) = base.credentials();
    let (host, port) = match base.host().rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (base.host(), "*"),
    };
    let host = host.trim_matches(['[', ']']);
    let field = |text: &str| {
        let text = percent_decode_str(text).decode_utf8_lossy();
        text.replace('\\', "\\\\").replace(':', "\\:")
    };
    let host = if host.is_empty() {
        "*".into()
    } else {
        field(host)
    };
    let user = if user.is_empty() {
        "*".into()
    } else {
        field(user)
    };
    Some(format!("{host}:{port}:*:{user}:{}", field(password?)))
}

/// Where copies of projects are put.
pub fn copies(tmpdir: &Path) -> PathBuf {
    tmpdir.join("copies")
}

#[cfg(test)]
mod tests {
    use super::*;
    use qgisserver::config::{Base, Finding};

    #[test]
    fn passwords_are_for_their_user_at_their_host() {
        let bases = [
            "postgresql://me:a%3Ab\\c@db:5433/gis",
            "postgresql://me:hush@[::1]/gis",
            "postgresql://me@db/gis",
            "postgresql:///?service=gis",
            "own://me:hush@db/",
        ];
        let schemes = bases
            .iter()
            .map(|text| (text.to_string(), Base::parse(text).unwrap()));
        let finding = Finding {
            schemes: schemes.collect(),
            ..Finding::default()
        };
        let expected = [r"db:5433:*:me:a\:b\\c", r"\:\:1:*:*:me:hush"];
        assert_eq!(passwords(&finding), expected);
    }

    #[test]
    fn gdal_hears_of_the_buckets_that_the_operator_names() {
        let finding = Finding {
            allowed: vec!["s3".into()],
            schemes: [("s3".into(), Base::parse("s3://maps/public/").unwrap())].into(),
            s3: config::S3 {
                endpoint: Some("http://127.0.0.1:9000/".into()),
                ..Finding::default().s3
            },
            ..Finding::default()
        };
        let options = &for_gdal(&finding)["/vsis3/maps/"];
        assert_eq!(options["AWS_S3_ENDPOINT"], "127.0.0.1:9000");
        assert_eq!(
            (
                options["AWS_HTTPS"].as_str(),
                options["AWS_NO_SIGN_REQUEST"].as_str()
            ),
            ("NO", "YES")
        );
        let forbidden = Finding {
            allowed: Vec::new(),
            ..finding
        };
        assert!(for_gdal(&forbidden).is_empty());
    }
}
