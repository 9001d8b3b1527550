//! qgisserver turns an HTTP request into a call on a QGIS project inside a
//! disposable process, and the answer back into HTTP.

mod broker;
pub mod config;
mod http;
pub mod log;
mod ogc;
pub mod protocol;
