//! The environment that QGIS and its plugins see.
//!
//! Expressions in projects and requests can read environment variables, so a
//! worker inherits what QGIS and its libraries are known to need, and nothing else.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// Names, or prefixes with `*`, that are passed on.
const ALLOWED: [&str; 50] = [
    // For the pool's parent alone; `application.py` takes it away from its children.
    "NOTIFY_SOCKET",
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "PWD",
    "TZ",
    "TZDIR",
    "TMPDIR",
    "DISPLAY",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "XDG_*",
    "LD_LIBRARY_PATH",
    "RUST_BACKTRACE",
    // QGIS, Qt and what they are made of; QGSRV_* is ours and may hold passwords.
    "QGIS_*",
    "QGIS3_*",
    "QT_*",
    "FONTCONFIG_*",
    "OMP_*",
    "OPENBLAS_*",
    "PYTHON*",
    "GDAL_*",
    "OGR_*",
    "OSR_*",
    "CPL_*",
    "VSI_*",
    "PROJ_*",
    "GEOTIFF_*",
    "SPATIALITE_*",
    // PostgreSQL without PGPASSWORD: passwords come from files.
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSYSCONFDIR",
    "PGPASSFILE",
    "PGSSL*",
    "PGHOST",
    "PGPORT",
    "PGUSER",
    "PGDATABASE",
    "PGAPPNAME",
    // The way out of the house, and whom to trust there.
    "http_proxy",
    "HTTP_PROXY",
    "https_proxy",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
];

/// Never passed on, whatever the prefixes say: the server decides which project
/// is the default, and a parent's Python is not ours.
const REFUSED: [&str; 4] = [
    "QGIS_PROJECT_FILE",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PYTHONEXECUTABLE",
];

/// What QGIS needs to run without a screen and without threads before the fork;
/// `false`: only where nobody set it.
const FIXED: [(&str, &str, bool); 6] = [
    ("OPENBLAS_NUM_THREADS", "1", true),
    ("QGIS_NO_OVERRIDE_IMPORT", "1", true),
    ("QGIS_DISABLE_MESSAGE_HOOKS", "1", true),
    ("QGIS_SERVER_PROJECT_CACHE_STRATEGY", "off", true),
    // All workers write a document in the same bytes, as long as its tag is the same.
    ("QT_HASH_SEED", "0", true),
    ("QT_QPA_PLATFORM", "offscreen", false),
];

/// A list to which settings add.
const DISABLED: &str = "QGIS_SERVER_DISABLED_APIS";

/// Makes the process's environment the one for QGIS. Only while there is one thread.
pub fn prepare(set: &BTreeMap<String, String>, allow: &[String]) {
    let names: Vec<String> = std::env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .collect();
    let refused: Vec<_> = names
        .iter()
        .filter(|name| !is_allowed(name, allow))
        .collect();
    refused.iter().for_each(|name| forget(name));
    if !refused.is_empty() {
        let n = refused.len();
        tracing::info!(
            n,
            "environment variables that workers do not inherit (worker.env_allow)"
        );
        tracing::debug!(?refused, "names that workers do not inherit");
    }
    let headless = std::env::var_os("DISPLAY").is_none();
    for (name, value, always) in FIXED {
        let is_other = std::env::var(name).is_ok_and(|was| was != value);
        if always && is_other {
            tracing::warn!("{name} is always {value:?} here, whatever the environment says");
        }
        if always || (headless && std::env::var_os(name).is_none()) {
            // SAFETY: as above.
            unsafe { std::env::set_var(name, value) };
        }
    }
    for (name, value) in set {
        let value = joined(name, std::env::var(name).ok(), value);
        // SAFETY: as above.
        unsafe { std::env::set_var(name, value) };
    }
}

fn joined(name: &str, inherited: Option<String>, value: &str) -> String {
    match inherited.filter(|was| name == DISABLED && !was.is_empty()) {
        Some(was) => format!("{was},{value}"),
        None => value.to_owned(),
    }
}

/// Takes a variable away, and its value out of the memory that `/proc/<pid>/environ`
/// shows to whoever can open files.
fn forget(name: &str) {
    if let Ok(c_name) = CString::new(name) {
        // SAFETY: no other thread reads the environment yet. A value is a string of
        // the process's own, as long as it says, and removed right below.
        unsafe {
            let value = libc::getenv(c_name.as_ptr());
            if !value.is_null() {
                std::ptr::write_bytes(value, 0, libc::strlen(value));
            }
        }
    }
    // SAFETY: as above.
    unsafe { std::env::remove_var(name) };
}

/// From now on temporary files belong into `folder`.
pub fn set_temporary(folder: &Path) {
    // SAFETY: no other thread reads the environment yet.
    unsafe { std::env::set_var("TMPDIR", folder) };
}

/// Where QGIS is installed.
pub fn prefix() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    variable("QGIS_PREFIX_PATH")
        .or_else(|| variable("QGIS3_HOME"))
        .unwrap_or("/usr".into())
        .into()
}

fn is_allowed(name: &str, allow: &[String]) -> bool {
    let matches = |pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    };
    let asked = allow.iter().any(|pattern| matches(pattern));
    asked || (ALLOWED.iter().any(|pattern| matches(pattern)) && !REFUSED.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apis_that_the_environment_disables_stay_so() {
        let of = |name, was: Option<&str>| joined(name, was.map(str::to_owned), "Landing Page");
        assert_eq!(of(DISABLED, Some("OGC")), "OGC,Landing Page");
        assert_eq!(of(DISABLED, Some("")), "Landing Page");
        assert_eq!(of(DISABLED, None), "Landing Page");
        assert_eq!(of("QGIS_SERVER_LOG_FILE", Some("x")), "Landing Page");
    }

    #[test]
    fn qgis_sees_its_own_settings_and_no_secret() {
        for name in [
            "QGIS_SERVER_LOG_LEVEL",
            "GDAL_CACHEMAX",
            "PGSERVICEFILE",
            "LC_ALL",
            "QGIS_SERVER_PARALLEL_RENDERING",
            "https_proxy",
            "NO_PROXY",
            "SSL_CERT_FILE",
            "CURL_CA_BUNDLE",
        ] {
            assert!(is_allowed(name, &[]), "{name}");
        }
        for name in [
            "AWS_SECRET_ACCESS_KEY",
            "PGPASSWORD",
            "QGSRV_X",
            "QGIS_PROJECT_FILE",
        ] {
            assert!(!is_allowed(name, &[]), "{name}");
        }
    }

    #[test]
    fn the_operator_may_pass_more() {
        let allow = ["PGPASSWORD".to_string(), "AWS_*".to_string()];
        assert!(is_allowed("PGPASSWORD", &allow) && is_allowed("AWS_REGION", &allow));
        assert!(!is_allowed("AWSOME", &allow));
    }
}
