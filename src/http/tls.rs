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
pub enum Error {
    Cert { path: PathBuf, why: String },
    Key { path: PathBuf, why: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cert { path, why } => write!(f, "server.ssl_cert: {}: {why}", path.display()),
            Self::Key { path, why } => write!(f, "server.ssl_key: {}: {why}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

/// TLS 1.2 and 1.3 with the certificate chain and key of `files`.
pub fn acceptor(files: &Tls) -> Result<TlsAcceptor, Error> {
    let chain = chain(&files.cert)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| Error::Key {
        path: files.key.clone(),
        why: error.to_string(),
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| Error::Key {
            path: files.key.clone(),
            why: error.to_string(),
        })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let refused = |why: String| Error::Cert {
        path: path.to_owned(),
        why,
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|error| refused(error.to_string()))?
        .collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err(refused("no certificate in it".into())),
        Ok(chain) => Ok(chain),
        Err(error) => Err(refused(error.to_string())),
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
        let error = || acceptor(&files).err().expect("an error").to_string();
        assert!(error().starts_with(&format!("server.ssl_cert: {}: ", cert.display())));
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
        assert!(acceptor(&files).is_ok());
    }
}
