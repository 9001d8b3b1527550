//! The sockets that the server listens on: bound by itself, or passed by systemd or by
//! the server whose place it takes, both as `LISTEN_FDS`.
//!
//! | `LISTEN_FDNAMES` | what |
//! |---|---|
//! | `own-http`, `own-gate`, … | bound by our predecessor; used where the settings still ask for the address |
//! | `gate` | where pools join, whatever `zmq.bindaddr` says |
//! | `management` | the management API, whatever `management.port` says |
//! | `predecessor` | a pipe on which our predecessor waits for [`READY`] |
//! | any other | HTTP, whatever `server.interfaces` and `server.port` say |

use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd};

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::getppid;

use crate::config::Http;

/// What a successor writes once it can serve.
pub const READY: &[u8] = b"READY=1\n";

/// Names the pid of a predecessor. A child's pid is not known before its environment
/// is made, so `LISTEN_PID` cannot be.
pub const PREDECESSOR: &str = "QGISSERVER_PREDECESSOR";

/// What serves another purpose than HTTP.
pub const GATE: &str = "gate";
pub const MANAGEMENT: &str = "management";

const OWN: &str = "own-";
const HTTP: &str = "http";
const PIPE: &str = "predecessor";

/// A listening socket, and the name under which it is passed on.
#[derive(Debug)]
struct Socket {
    name: String,
    listener: TcpListener,
}

/// What was passed to this process.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: Vec<Socket>,
    predecessor: Option<Predecessor>,
}

/// Everything that the server listens on.
#[derive(Debug, Default)]
pub struct Sockets {
    http: Vec<Socket>,
    others: Vec<Socket>,
    /// Passed to us, and nobody has asked for them yet.
    rest: Vec<Socket>,
    predecessor: Option<Predecessor>,
}

/// The server whose place we take.
#[derive(Debug)]
pub struct Predecessor {
    pid: i32,
    pipe: File,
}

impl Predecessor {
    /// It goes on serving until it is told.
    pub fn is_alive(&self) -> bool {
        getppid().as_raw() == self.pid
    }

    /// It may stop accepting connections, because we begin.
    pub fn tell(mut self) {
        if let Err(error) = self.pipe.write_all(READY) {
            tracing::warn!(%error, "our predecessor is gone");
        }
    }
}

impl Inherited {
    /// Takes what the environment names, and the names out of it. Only while there is
    /// one thread.
    pub fn take() -> io::Result<Self> {
        let is_ours = |name, pid: u32| {
            let text = std::env::var(name).ok();
            text.and_then(|text| text.parse().ok()) == Some(pid)
        };
        let parent = u32::try_from(getppid().as_raw()).unwrap_or(0);
        if is_ours(PREDECESSOR, parent) {
            let own = std::process::id().to_string();
            // SAFETY: no other thread reads the environment yet; the caller sees to it.
            unsafe { std::env::set_var("LISTEN_PID", own) };
        }
        let inherited = match is_ours("LISTEN_PID", std::process::id()) {
            true => Self::of(sd_notify::listen_fds_with_names(true)?, parent as i32),
            false => Ok(Self::default()),
        };
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", PREDECESSOR] {
            // SAFETY: as above.
            unsafe { std::env::remove_var(name) };
        }
        inherited
    }

    fn of(all: impl Iterator<Item = (i32, String)>, parent: i32) -> io::Result<Self> {
        let mut inherited = Self::default();
        for (fd, name) in all {
            // SAFETY: it was passed to this process, and nobody else here knows of it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            if name == PIPE {
                let pipe = fd.into();
                inherited.predecessor = Some(Predecessor { pid: parent, pipe });
                continue;
            }
            let is_listening = getsockopt(&fd, sockopt::AcceptConn) == Ok(true);
            let listener = TcpListener::from(fd);
            if !is_listening || listener.local_addr().is_err() {
                let what = format!("{name} in LISTEN_FDS is no TCP socket that listens");
                return Err(io::Error::other(what));
            }
            inherited.sockets.push(Socket { name, listener });
        }
        Ok(inherited)
    }

    fn pick(&mut self, is_wanted: impl Fn(&Socket) -> bool) -> Vec<Socket> {
        self.sockets.extract_if(.., |it| is_wanted(it)).collect()
    }
}

impl Sockets {
    /// The HTTP sockets that `http` asks for, if nobody else has decided. An error names
    /// the address that cannot be had.
    pub fn open(http: &Http, mut inherited: Inherited) -> Result<Self, (SocketAddr, io::Error)> {
        let mut found = inherited
            .pick(|it| !it.name.starts_with(OWN) && ![GATE, MANAGEMENT].contains(&&*it.name));
        if found.is_empty() {
            let mut passed = inherited.pick(|it| it.name == own(HTTP));
            for ip in &http.interfaces {
                let address = SocketAddr::new(*ip, http.port);
                let socket = Socket::at(address, &mut passed, HTTP);
                found.push(socket.map_err(|error| (address, error))?);
            }
        }
        Ok(Self {
            http: found,
            others: Vec::new(),
            rest: inherited.sockets,
            predecessor: inherited.predecessor,
        })
    }

    /// Another handle of each HTTP socket.
    pub fn http(&self) -> io::Result<Vec<TcpListener>> {
        let all = self.http.iter();
        all.map(|socket| socket.listener.try_clone()).collect()
    }

    /// All that is called `name`, such as [`MANAGEMENT`]: passed by whoever started us, or
    /// else at `addresses`. A successor gets it, too. An error names the address that
    /// cannot be had.
    pub fn open_others(
        &mut self,
        name: &str,
        addresses: impl Iterator<Item = SocketAddr>,
    ) -> Result<(), (SocketAddr, io::Error)> {
        let passed: Vec<_> = self.rest.extract_if(.., |it| it.name == name).collect();
        if !passed.is_empty() {
            self.others.extend(passed);
            return Ok(());
        }
        for address in addresses {
            let socket = Socket::at(address, &mut self.rest, name);
            self.others.push(socket.map_err(|error| (address, error))?);
        }
        Ok(())
    }

    /// Another handle of each that was opened as `name`.
    pub fn others(&self, name: &str) -> io::Result<Vec<TcpListener>> {
        let own = own(name);
        let all = self.others.iter();
        all.filter(|it| it.name == name || it.name == own)
            .map(|it| it.listener.try_clone())
            .collect()
    }

    /// Closes what the settings do not ask for any more.
    pub fn close_rest(&mut self) {
        self.rest.clear();
    }

    pub fn take_predecessor(&mut self) -> Option<Predecessor> {
        self.predecessor.take()
    }

    /// What a successor gets: names and descriptors. `pipe`: on which it says [`READY`].
    pub fn to_pass_on(&self, pipe: OwnedFd) -> io::Result<(Vec<&str>, Vec<OwnedFd>)> {
        let mut names = Vec::new();
        let mut descriptors = Vec::new();
        for socket in self.http.iter().chain(&self.others) {
            names.push(socket.name.as_str());
            descriptors.push(socket.listener.try_clone()?.into());
        }
        names.push(PIPE);
        descriptors.push(pipe);
        Ok((names, descriptors))
    }
}

/// What we bind for a purpose is passed on under this name.
fn own(purpose: &str) -> String {
    format!("{OWN}{purpose}")
}

impl Socket {
    /// At `address`: what a predecessor bound there for the same purpose, or a new one.
    fn at(address: SocketAddr, passed: &mut Vec<Socket>, purpose: &str) -> io::Result<Self> {
        let name = own(purpose);
        let fits = |it: &Socket| {
            it.name == name
                && it.listener.local_addr().is_ok_and(|at| {
                    at.ip() == address.ip() && (address.port() == 0 || at.port() == address.port())
                })
        };
        if let Some(index) = passed.iter().position(fits) {
            return Ok(passed.remove(index));
        }
        Ok(Self {
            name,
            listener: TcpListener::bind(address)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;
    use crate::config::Config;

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    fn inherited(passed: Vec<(&str, OwnedFd)>) -> io::Result<Inherited> {
        let passed = passed.into_iter();
        Inherited::of(passed.map(|(name, fd)| (fd.into_raw_fd(), name.into())), 1)
    }

    fn http(port: u16) -> Http {
        Http {
            interfaces: vec![[127, 0, 0, 1].into()],
            port,
            ..Config::default().http
        }
    }

    fn addresses(sockets: &Sockets) -> Vec<SocketAddr> {
        let all = sockets.http.iter();
        all.map(|it| it.listener.local_addr().unwrap()).collect()
    }

    #[test]
    fn what_systemd_passes_is_used_whatever_the_settings_say() {
        let ((one, at_one), (two, at_two)) = (listener(), listener());
        let passed = vec![("qgisserver.socket", one.into()), ("unknown", two.into())];
        let sockets = Sockets::open(&http(1), inherited(passed).unwrap()).unwrap();
        assert_eq!(addresses(&sockets), [at_one, at_two]);
        let (_, pipe) = io::pipe().unwrap();
        let (names, _) = sockets.to_pass_on(pipe.into()).unwrap();
        assert_eq!(names, ["qgisserver.socket", "unknown", "predecessor"]);
    }

    #[test]
    fn what_a_predecessor_bound_is_used_where_the_settings_still_ask_for_it() {
        for (same_port, any_port) in [(true, false), (false, true), (false, false)] {
            let (one, address) = listener();
            let (gate, gate_address) = listener();
            let passed = vec![("own-http", one.into()), ("own-gate", gate.into())];
            let (free, other) = listener();
            drop(free);
            let port = match (same_port, any_port) {
                (true, _) => address.port(),
                (_, true) => 0,
                _ => other.port(),
            };
            let mut sockets = Sockets::open(&http(port), inherited(passed).unwrap()).unwrap();
            let expected = if same_port || any_port {
                address
            } else {
                other
            };
            assert_eq!(addresses(&sockets), [expected]);
            let wanted = [gate_address].into_iter();
            sockets.open_others(GATE, wanted).unwrap();
            let gate = sockets.others(GATE).unwrap();
            assert_eq!(gate[0].local_addr().unwrap(), gate_address);
        }
    }

    #[test]
    fn what_systemd_passes_for_the_management_is_all_of_it_however_many_interfaces_it_has() {
        for n_passed in 0..3 {
            let listeners: Vec<_> = (0..n_passed).map(|_| listener()).collect();
            let passed_at: Vec<_> = listeners.iter().map(|(_, at)| *at).collect();
            let passed = listeners.into_iter();
            let passed = passed.map(|(it, _)| (MANAGEMENT, it.into())).collect();
            let mut sockets = Sockets::open(&http(0), inherited(passed).unwrap()).unwrap();
            let wanted = [[127, 0, 0, 1], [127, 0, 0, 2]].map(|ip| (ip, 0).into());
            sockets.open_others(MANAGEMENT, wanted.into_iter()).unwrap();
            let open = sockets.others(MANAGEMENT).unwrap();
            let at: Vec<_> = open.iter().map(|it| it.local_addr().unwrap()).collect();
            match n_passed {
                0 => assert!(
                    at.iter()
                        .map(|it| it.ip())
                        .eq(wanted.iter().map(|it| it.ip()))
                ),
                _ => assert_eq!(at, passed_at),
            }
        }
    }

    #[test]
    fn what_is_no_listening_socket_is_refused_by_its_name() {
        let (reader, _writer) = io::pipe().unwrap();
        let error = inherited(vec![("odd", reader.into())]).unwrap_err();
        assert!(error.to_string().starts_with("odd in LISTEN_FDS"));
    }
}
