//! How many files and connections a process of ours may have open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Takes all that the hard limit allows: the usual soft one is 1024, and each connection,
/// and each layer of an open project, is a descriptor.
pub fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}
