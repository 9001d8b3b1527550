//! An S3 server of the test's own, which knows one key and checks its signatures.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::common::free_address;

pub const KEY: &str = "maps-reader";
pub const SECRET: &str = "hush-hush";

pub struct Objects {
    folder: TempDir,
    pub address: SocketAddr,
    /// Gone while the server is away.
    runtime: Option<Runtime>,
}

impl Objects {
    /// With the bucket `maps`.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("maps")).unwrap();
        let mut objects = Self {
            folder,
            address: free_address(),
            runtime: None,
        };
        objects.resume();
        objects
    }

    /// Where the objects of the bucket are files.
    pub fn path(&self, key: &str) -> PathBuf {
        self.folder.path().join("maps").join(key)
    }

    pub fn put(&self, key: &str, from: &Path) {
        let path = self.path(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::copy(from, path).unwrap();
    }

    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
        }
    }

    pub fn resume(&mut self) {
        let files = s3s_fs::FileSystem::new(self.folder.path()).unwrap();
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = builder.build().into_shared();
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind(self.address)).unwrap();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = Builder::new(TokioExecutor::new());
                    drop(server.serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        self.runtime = Some(runtime);
    }
}
