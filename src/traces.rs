//! Traces for OpenTelemetry: where the time of a request went, told to a collector.
//!
//! The span of a request begins with its head and is closed when its reply is over;
//! only then its parts are made, from times that are known anyway. The spans leave
//! in batches on a thread of the exporter's own, as protobuf over HTTP.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use hyper::{Request, Response};
use opentelemetry::trace::{
    SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use crate::metrics::Kind;
use crate::protocol::Trace;

/// For one batch to reach the collector, and for the last one to leave at the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// A collector has nothing to say that is longer.
const ANSWER_MAX: u64 = 64 << 10;

/// Dropping it sends what is left.
pub struct Traces {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Traces")
    }
}

/// The span of a request without an end so far.
#[derive(Debug)]
pub struct Open(Context);

/// What its end brings to light.
#[derive(Debug)]
pub struct Facts<'a> {
    pub request_id: &'a str,
    pub method: &'a str,
    pub path: &'a str,
    pub kind: Kind,
    pub status: u16,
    /// When the broker was asked.
    pub called: Option<Instant>,
    pub queued: Option<Duration>,
    pub load: Option<Duration>,
    pub render: Option<Duration>,
}

impl Traces {
    /// Will tell the collector at `endpoint`, the whole URL for traces.
    pub fn start(endpoint: &str) -> Result<Self, String> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Client::new())
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(endpoint)
            .with_timeout(PATIENCE)
            .build()
            .map_err(|error| error.to_string())?;
        let resource = Resource::builder()
            .with_service_name("qgisserver")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        let tracer = provider.tracer("qgisserver");
        Ok(Self { tracer, provider })
    }

    /// A request begins, perhaps on behalf of `caller`, whose wish not to be recorded counts.
    pub fn begin(&self, caller: Option<&Trace>) -> Open {
        let parent = match caller.and_then(remote) {
            Some(remote) => Context::new().with_remote_span_context(remote),
            None => Context::new(),
        };
        let builder = SpanBuilder::from_name("request").with_kind(SpanKind::Server);
        let span = self.tracer.build_with_context(builder, &parent);
        Open(parent.with_span(span))
    }

    /// The request is over.
    pub fn close(&self, open: &Open, facts: &Facts<'_>) {
        let span = open.0.span();
        let (service, operation) = (facts.kind.service(), facts.kind.operation());
        span.update_name(format!("{service} {operation}"));
        span.set_attributes([
            KeyValue::new("http.request.method", facts.method.to_owned()),
            KeyValue::new("http.response.status_code", i64::from(facts.status)),
            KeyValue::new("url.path", facts.path.to_owned()),
            KeyValue::new("qgisserver.request_id", facts.request_id.to_owned()),
            KeyValue::new("qgisserver.service", service),
            KeyValue::new("qgisserver.operation", operation),
        ]);
        if facts.status >= 500 {
            span.set_status(Status::error(""));
        }
        self.parts(open, facts);
        span.end();
    }

    /// One after the other since the broker was asked.
    fn parts(&self, open: &Open, facts: &Facts<'_>) {
        let Some(called) = facts.called else { return };
        let mut at = SystemTime::now() - called.elapsed();
        let parts = [
            ("queue", facts.queued),
            ("load", facts.load),
            ("render", facts.render),
        ];
        for (name, duration) in parts {
            let Some(duration) = duration else { return };
            let builder = SpanBuilder::from_name(name).with_start_time(at);
            let span = self.tracer.build_with_context(builder, &open.0);
            at += duration;
            Context::new().with_span(span).span().end_with_timestamp(at);
        }
    }
}

impl Open {
    /// As the worker is told: the caller's trace, and we as its parent.
    pub fn trace(&self, caller: Option<Trace>) -> Trace {
        let span = self.0.span();
        let context = span.span_context();
        let flags = context.trace_flags().to_u8();
        Trace {
            parent: format!(
                "00-{}-{}-{flags:02x}",
                context.trace_id(),
                context.span_id()
            ),
            state: caller.and_then(|caller| caller.state),
        }
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(PATIENCE) {
            tracing::debug!(%error, "the last spans did not leave");
        }
    }
}

/// The caller's span.
fn remote(caller: &Trace) -> Option<SpanContext> {
    let mut fields = caller.parent.split('-').skip(1);
    let trace = TraceId::from_hex(fields.next()?).ok()?;
    let span = SpanId::from_hex(fields.next()?).ok()?;
    let flags = u8::from_str_radix(fields.next()?, 16).ok()?;
    let (flags, state) = (TraceFlags::new(flags), TraceState::default());
    Some(SpanContext::new(trace, span, flags, true, state))
}

/// How batches travel. It blocks, which on the exporter's thread hurts nobody.
#[derive(Debug)]
struct Client {
    agent: ureq::Agent,
    /// The last batch was lost, and that is in the log.
    failing: AtomicBool,
}

impl Client {
    fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            // A proxy that QGIS needs is none of the collector's.
            .proxy(None)
            .http_status_as_error(false)
            .max_redirects(0);
        Self {
            agent: ureq::Agent::new_with_config(config.build()),
            failing: AtomicBool::new(false),
        }
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let answer = self.agent.run(Request::from_parts(parts, &body[..]))?;
        let (parts, mut body) = answer.into_parts();
        let text = body.with_config().limit(ANSWER_MAX).read_to_vec()?;
        Ok(Response::from_parts(parts, text.into()))
    }

    /// Once when it begins and once when it is over.
    fn note(&self, why: Option<String>) {
        let is_failing = why.is_some();
        if self.failing.swap(is_failing, Ordering::Relaxed) == is_failing {
            return;
        }
        match why {
            Some(why) => tracing::warn!(why, "traces are lost (logging.otlp_endpoint)"),
            None => tracing::info!("traces reach their collector again"),
        }
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let result = self.send(request);
        self.note(match &result {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("it answered {}", response.status())),
            Err(error) => Some(error.to_string()),
        });
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is sent before the drop, and then nobody listens.
    fn traces() -> Traces {
        Traces::start("http://127.0.0.1:1/v1/traces").expect("an endpoint")
    }

    #[test]
    fn a_request_goes_on_with_its_callers_trace() {
        let caller = Trace {
            parent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into(),
            state: Some("a=1".into()),
        };
        let open = traces().begin(Some(&caller));
        let told = open.trace(Some(caller.clone()));
        assert_eq!(told.id(), caller.id());
        assert_eq!(told.state, caller.state);
        assert_ne!(told.parent, caller.parent, "the parent is our span");
        assert!(told.parent.ends_with("-01"));
    }

    #[test]
    fn what_the_caller_does_not_record_is_not_recorded_here() {
        let caller = Trace {
            parent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00".into(),
            state: None,
        };
        let traces = traces();
        let open = traces.begin(Some(&caller));
        assert!(open.trace(None).parent.ends_with("-00"));
        assert!(!open.0.span().is_recording());
        assert!(traces.begin(None).0.span().is_recording());
    }
}
