//! Who is asked about projects that are no files: S3 by this program, the rest by Python.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use qgisserver::config;

use crate::places::{Stamp, Uri};
use crate::qgis::Asker;
use crate::s3::Objects;

/// Why it is not known in which state a project is.
#[derive(Debug)]
pub enum Trouble {
    /// The storage does not answer, whatever it is asked.
    Away(String),
    /// A handler of the operator's failed at this one.
    Raised(String),
}

/// What `Places` needs of storages.
pub trait Storages {
    /// The state of a project; None if it is not there.
    fn look(&mut self, uri: &Uri) -> Result<Option<Stamp>, Trouble>;

    /// A copy of the project on this machine; None where QGIS itself reads it.
    fn fetch(&mut self, uri: &Uri) -> Result<Option<PathBuf>, Trouble>;
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

    fn fetch(&mut self, uri: &Uri) -> Result<Option<PathBuf>, Trouble> {
        match uri.scheme() {
            "s3" => self.objects.fetch(&uri.0).map(Some),
            _ => Ok(None),
        }
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

/// Where copies of projects are put.
pub fn copies(tmpdir: &Path) -> PathBuf {
    tmpdir.join("copies")
}
