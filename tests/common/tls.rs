//! HTTPS: a certificate in files, as an operator has it, and clients that trust it.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use tokio_rustls::rustls;

use super::World;

/// Of `localhost`, signed by itself.
pub struct Certificate {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// What clients trust: each that the files ever had.
    roots: rustls::RootCertStore,
}

impl Certificate {
    pub fn of(world: &World) -> Self {
        let mut certificate = Self {
            cert: world.path("cert.pem"),
            key: world.path("key.pem"),
            roots: rustls::RootCertStore::empty(),
        };
        certificate.renew();
        certificate
    }

    /// Another one in the same files.
    pub fn renew(&mut self) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
        std::fs::write(&self.cert, made.cert.pem()).unwrap();
        std::fs::write(&self.key, made.signing_key.serialize_pem()).unwrap();
        self.roots.add(made.cert.der().clone()).unwrap();
        made.cert.der().clone()
    }

    /// For the listener of that section.
    pub fn settings(&self, section: &str) -> String {
        let (cert, key) = (self.cert.display(), self.key.display());
        format!("{section}.ssl = yes\n{section}.ssl_cert = {cert}\n{section}.ssl_key = {key}\n")
    }

    /// A client that speaks `protocol`, as ALPN calls it.
    pub fn client(&self, protocol: &str) -> rustls::ClientConnection {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.into()];
        let name = "localhost".try_into().unwrap();
        rustls::ClientConnection::new(Arc::new(config), name).unwrap()
    }
}
