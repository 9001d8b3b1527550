//! TLS: certificates from PEM files, HTTP/2 or HTTP/1.1 by ALPN.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::config::Tls;

/// Why the certificate or its key cannot be used.
#[derive(Debug)]
pub struct Error {
    /// The one that names the file.
    pub setting: String,
    path: PathBuf,
    why: String,
}

impl Error {
    /// Without the name of the setting.
    pub fn what(&self) -> String {
        format!("{}: {}", self.path.display(), self.why)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.what())
    }
}

impl std::error::Error for Error {}

/// What a look at the files brought; None where there is no TLS.
pub type Loaded = Result<Option<TlsAcceptor>, Error>;

/// [`acceptor`], if `section` wants TLS at all.
pub fn load(section: &str, files: Option<&Tls>) -> Loaded {
    files.map(|files| acceptor(section, files)).transpose()
}

/// TLS 1.2 and 1.3 with the certificate chain and key of `files`, which the settings of
/// `section` name.
fn acceptor(section: &str, files: &Tls) -> Result<TlsAcceptor, Error> {
    let refused = |key: &str, path: &Path, why: String| Error {
        setting: format!("{section}.{key}"),
        path: path.to_owned(),
        why,
    };
    let chain = chain(&files.cert).map_err(|why| refused("ssl_cert", &files.cert, why))?;
    let no_key = |why: String| refused("ssl_key", &files.key, why);
    let key =
        PrivateKeyDer::from_pem_file(&files.key).map_err(|error| no_key(error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| no_key(error.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|error| error.to_string())?
        .collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err("no certificate in it".into()),
        Ok(chain) => Ok(chain),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_certificate_names_the_setting_and_the_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let files = Tls {
            cert: cert.clone(),
            key: key.clone(),
        };
        let error_in = |section| load(section, Some(&files)).err().expect("an error");
        let error = || error_in("server").to_string();
        assert!(error().starts_with(&format!("server.ssl_cert: {}: ", cert.display())));
        assert_eq!(error_in("management").setting, "management.ssl_cert");
        std::fs::write(&cert, "no PEM").expect("written");
        assert!(error().ends_with("no certificate in it"), "{}", error());
        let made = rcgen::generate_simple_self_signed(["localhost".into()]).expect("a certificate");
        std::fs::write(&cert, made.cert.pem()).expect("written");
        assert!(error().starts_with(&format!("server.ssl_key: {}: ", key.display())));
        let other =
            rcgen::generate_simple_self_signed(["localhost".into()]).expect("a certificate");
        std::fs::write(&key, other.signing_key.serialize_pem()).expect("written");
        assert!(
            error().starts_with("server.ssl_key: "),
            "a key of another certificate: {}",
            error()
        );
        std::fs::write(&key, made.signing_key.serialize_pem()).expect("written");
        assert!(load("server", Some(&files)).is_ok_and(|it| it.is_some()));
        assert!(load("server", None).is_ok_and(|it| it.is_none()));
    }
}
