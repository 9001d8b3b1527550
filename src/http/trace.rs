//! W3C Trace Context: the headers by which callers say which trace a request belongs to.
//!
//! <https://www.w3.org/TR/trace-context/>, clauses 3.2 and 3.3. What is malformed
//! is as if it were not there.

use hyper::header::HeaderMap;

use crate::protocol::Trace;

/// Clause 3.3.1.5 asks for 512 at least; callers behind a proxy share it.
const STATE_MAX: usize = 1024;

/// The trace of a request, if its caller names one.
pub fn of(headers: &HeaderMap) -> Option<Trace> {
    let mut parents = headers.get_all("traceparent").iter();
    let parent = parents.next()?.to_str().ok()?.trim();
    (parents.next().is_none() && is_parent(parent)).then(|| Trace {
        parent: parent.to_owned(),
        state: state(headers),
    })
}

/// `version-traceid-parentid-flags`; a later version may go on after another dash.
fn is_parent(text: &str) -> bool {
    let mut fields = text.splitn(5, '-');
    let mut hex = |length: usize| {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        fields
            .next()
            .filter(|field| field.len() == length && field.bytes().all(is_digit))
    };
    let is_some_id = |id: &str| id.bytes().any(|byte| byte != b'0');
    let (Some(version), Some(trace), Some(span), Some(_)) = (hex(2), hex(32), hex(16), hex(2))
    else {
        return false;
    };
    let may_go_on = version != "00" && text.len() <= 2 * STATE_MAX;
    version != "ff"
        && is_some_id(trace)
        && is_some_id(span)
        && (fields.next().is_none() || may_go_on && text.is_ascii())
}

/// All members as one; None when they are no text or too long.
fn state(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all("tracestate").iter();
    let values: Option<Vec<&str>> = values.map(|value| value.to_str().ok()).collect();
    let state = values?.join(",");
    (1..=STATE_MAX).contains(&state.len()).then_some(state)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            let name = hyper::header::HeaderName::from_static(name);
            (name, HeaderValue::from_str(value).expect("a value"))
        };
        // Not collected, because that would keep the last of several.
        let mut map = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            map.append(name, value);
        }
        map
    }

    #[test]
    fn a_trace_is_carried_on_as_it_came() {
        let trace = of(&headers(&[
            ("traceparent", PARENT),
            ("tracestate", "a=1"),
            ("tracestate", "b=2"),
        ]))
        .expect("a trace");
        assert_eq!(trace.parent, PARENT);
        assert_eq!(trace.state.as_deref(), Some("a=1,b=2"));
        assert_eq!(trace.id(), "4bf92f3577b34da6a3ce929d0e0e4736");
    }

    #[test]
    fn what_is_malformed_is_no_trace() {
        for wrong in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\t x",
        ] {
            assert_eq!(of(&headers(&[("traceparent", wrong)])), None, "{wrong:?}");
        }
        assert!(
            of(&headers(&[
                ("traceparent", PARENT),
                ("traceparent", PARENT)
            ]))
            .is_none()
        );
    }

    #[test]
    fn a_later_version_is_understood_as_far_as_this_one_goes() {
        let later = PARENT.replacen("00", "01", 1) + "-what-comes-then";
        assert!(of(&headers(&[("traceparent", &later)])).is_some());
    }

    #[test]
    fn a_state_alone_or_too_long_is_dropped() {
        assert!(of(&headers(&[("tracestate", "a=1")])).is_none());
        let long = format!("a={}", "x".repeat(STATE_MAX));
        let trace = of(&headers(&[("traceparent", PARENT), ("tracestate", &long)]));
        assert_eq!(trace.expect("a trace").state, None);
    }
}
