//! What OGC standards say about a request, decided without any I/O.

pub mod exception;
pub mod guard;
pub mod ows;
pub mod policy;
