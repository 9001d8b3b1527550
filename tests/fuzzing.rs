//! Whatever strangers send: the parsers of frames, messages, queries and
//! forwarded headers neither panic nor let through what they are to keep out.
//!
//! What must hold is in `src/fuzzing.rs`. Here it is tried with pieces of what
//! the parsers look for, in any order, and with noise between them; the same
//! functions are targets of cargo-fuzz in `tests/fuzz` (`make soak`).

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use qgisserver::fuzzing;
use qgisserver::protocol::{
    Cancel, Credit, Disconnect, Edition, Failure, Final, Head, Message, Partial, ProjectRef, Ready,
    Reason, Request,
};

/// Pieces and noise in any order.
fn made_of(pieces: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<u8>> {
    let piece = proptest::sample::select(pieces).prop_map(<[u8]>::to_vec);
    let noise = vec(any::<u8>(), 0..6);
    vec(prop_oneof![4 => piece, 1 => noise], 0..24).prop_map(|parts| parts.concat())
}

const ZMTP: &[&[u8]] = &[
    b"\xff\0\0\0\0\0\0\0\x01\x7f",
    b"\x03\0NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    &[0; 32],
    b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER",
    b"\x04\x19\x05READY",
    b"\x08Identity\0\0\0\x01x",
    b"\0\0",
    b"\x01\0",
    b"\0\x01x",
    b"\x01\x03abc",
    b"\x02\0\0\0\0\0\0\0\x02ab",
    b"\x02\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x03\0\0\0\0\0\x80\0\0",
    b"\x06",
    b"\x04",
];

/// One of each word, as `fuzzing::message` takes its frames.
fn messages() -> Vec<Vec<u8>> {
    let head = Some(Head {
        status: 200,
        headers: vec![("A".into(), "ü\"".into())],
        length: Some(7),
        ..Head::default()
    });
    let body = || Bytes::from_static(b"body");
    let request = Request {
        id: 1,
        url: "http://localhost/?a=b".into(),
        project: Some(ProjectRef {
            alias: "file".into(),
            path: "city".into(),
        }),
        ..Request::default()
    };
    let last = Final {
        id: 1,
        failure: Some(Failure::BadLayers),
        edition: Some(Edition {
            version: "v".into(),
            ..Edition::default()
        }),
        ..Final::default()
    };
    let all = [
        Message::Ready(Ready::default()),
        Message::Request(request, body()),
        Message::Partial(
            Partial {
                id: 1,
                head,
                ..Partial::default()
            },
            body(),
        ),
        Message::Final(last, body()),
        Message::Credit(Credit { id: 1, n: 2 }),
        Message::Cancel(Cancel { id: 1, grace_ms: 2 }),
        Message::Heartbeat,
        Message::Disconnect(Disconnect {
            reason: Reason::Leaving,
        }),
    ];
    let with_length = |frame: Bytes| [&(frame.len() as u16).to_be_bytes()[..], &frame].concat();
    let encoded = all.map(|message| {
        message
            .encode()
            .into_iter()
            .map(with_length)
            .collect::<Vec<_>>()
    });
    encoded.map(|frames| frames.concat()).into()
}

/// A message of which some bytes are others, and the end may be missing.
fn almost_a_message() -> impl Strategy<Value = Vec<u8>> {
    let changes = vec((any::<Index>(), any::<u8>()), 0..4);
    let cut = proptest::option::weighted(0.2, any::<Index>());
    let message = proptest::sample::select(messages());
    (message, changes, cut).prop_map(|(mut message, changes, cut)| {
        for (at, byte) in changes {
            let at = at.index(message.len());
            message[at] = byte;
        }
        let end = cut.map_or(message.len(), |cut| cut.index(message.len()));
        message.truncate(end);
        message
    })
}

const KVP: &[&[u8]] = &[
    b"MAP=city",
    b"map=..%2F..%2Fetc",
    b"%4dap=file:/a//./b",
    b"SERVICE",
    b"service=WMS",
    b"%53erv%69ce=",
    b"&",
    b"&&",
    b"=",
    b"+",
    b"%",
    b"%2",
    b"%00",
    b"%FF",
    b"%26",
    b"%3D",
    b"?",
    b"#",
    b"<a:GetMap service='WMS' version=\"1\">",
    b"<!-- -->",
    b"<?xml?>",
    b"\xef\xbb\xbf",
    "ß".as_bytes(),
    "ŉ=ﬃ".as_bytes(),
    b"\\",
    b"..",
    b"/",
];

const FORWARDED: &[&[u8]] = &[
    b"\n\x00", // Each of these begins another header.
    b"\n\x01",
    b"\n\x02",
    b"\n\x03",
    b"\n\x04",
    b"\n\x05",
    b"\n\x06",
    b"\n\x07",
    b"\n\x08",
    b"example.org",
    b":8080",
    b":99999",
    b":",
    b"[::1]",
    b"[",
    b"user@",
    b"for=",
    b"host=",
    b"proto=https",
    b"\"",
    b"\\",
    b",",
    b";",
    b" ",
    b"http://",
    b"HTTPS://",
    b"/a/b",
    b"//evil",
    b"/..",
    b"?q",
    b"#f",
    b"%0d%0a",
    b"<script>",
    "ü".as_bytes(),
    b"443",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn frames_are_judged_alike_however_they_are_cut(size: u8, bytes in made_of(ZMTP)) {
        fuzzing::zmtp(&[&[size][..], &bytes].concat());
    }

    #[test]
    fn messages_are_understood_as_they_are_said(bytes in almost_a_message()) {
        fuzzing::message(&bytes);
    }

    #[test]
    fn queries_mean_the_same_when_they_have_passed(bytes in made_of(KVP)) {
        fuzzing::kvp(&bytes);
    }

    #[test]
    fn no_header_makes_a_url_that_is_none(bytes in made_of(FORWARDED)) {
        // Most have a Host, or there is no base to speak of.
        fuzzing::forwarded(&bytes);
        fuzzing::forwarded(&[b"\0localhost", &bytes[..]].concat());
    }
}
