//! ZMTP 3.0 by hand: a peer that can say what no worker of ours would.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

/// A DEALER with NULL security.
pub struct Peer(TcpStream);

impl Peer {
    /// Connects and shakes hands.
    pub fn join(gate: SocketAddr) -> Self {
        let mut stream = super::http::connect(gate);
        stream.write_all(&greeting()).unwrap();
        let mut theirs = [0; 64];
        stream.read_exact(&mut theirs).unwrap();
        assert_eq!((theirs[0], theirs[9]), (0xff, 0x7f), "not ZMTP");
        let mut peer = Self(stream);
        let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
        ready.extend(6u32.to_be_bytes());
        ready.extend(b"DEALER");
        peer.frame(0x04, &ready);
        peer.read_frame().expect("the server says READY");
        peer
    }

    /// One multipart message.
    pub fn send(&mut self, frames: &[&[u8]]) {
        for (i, frame) in frames.iter().enumerate() {
            self.frame(u8::from(i + 1 < frames.len()), frame);
        }
    }

    /// Whatever bytes, unchecked; the server may hang up before all is written.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
    }

    fn frame(&mut self, flags: u8, body: &[u8]) {
        let mut bytes = match u8::try_from(body.len()) {
            Ok(size) => vec![flags, size],
            Err(_) => [&[flags | 2][..], &(body.len() as u64).to_be_bytes()].concat(),
        };
        bytes.extend(body);
        self.0.write_all(&bytes).unwrap();
    }

    /// Flags and body of the next frame; None when the server hung up.
    pub fn read_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let flags = self.read_exactly(1)?[0];
        let size = match flags & 2 {
            0 => self.read_exactly(1)?[0] as usize,
            _ => u64::from_be_bytes(self.read_exactly(8)?.try_into().ok()?) as usize,
        };
        Some((flags, self.read_exactly(size)?))
    }

    fn read_exactly(&mut self, n: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; n];
        match self.0.read_exact(&mut bytes) {
            Ok(()) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("the server is silent"),
            Err(_) => None,
        }
    }
}

fn greeting() -> [u8; 64] {
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9..11].copy_from_slice(&[0x7f, 3]);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}
