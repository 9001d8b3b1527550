//! A thread with a runtime of its own.

use std::future::Future;
use std::io;
use std::sync::mpsc;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// It lives until its future is over.
#[derive(Debug)]
pub struct Thread {
    /// What is spawned here runs there.
    pub runtime: Handle,
    ended: oneshot::Receiver<()>,
}

impl Thread {
    /// Runs what `main` makes on a new thread called `name`.
    pub fn start<F>(name: &str, main: impl FnOnce() -> F + Send + 'static) -> io::Result<Self>
    where
        F: Future<Output = ()>,
    {
        let (tell, told) = mpsc::channel();
        let (end, ended) = oneshot::channel();
        let body = move || {
            // Made here, because a runtime must not be dropped inside of another one.
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(tell.send(Err(error))),
            };
            let _ = tell.send(Ok(runtime.handle().clone()));
            runtime.block_on(main());
            drop(runtime);
            let _ = end.send(());
        };
        std::thread::Builder::new().name(name.into()).spawn(body)?;
        let runtime = told.recv().map_err(io::Error::other)??;
        Ok(Self { runtime, ended })
    }

    /// Resolves when nothing of it runs any more.
    pub async fn ended(&mut self) {
        if !self.ended.is_terminated() {
            let _ = (&mut self.ended).await;
        }
    }
}
