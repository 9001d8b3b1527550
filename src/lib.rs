//! qgisserver turns an HTTP request into a call on a QGIS project inside a
//! disposable process, and the answer back into HTTP.

pub mod broker;
pub mod config;
pub mod http;
mod ogc;
pub mod protocol;
