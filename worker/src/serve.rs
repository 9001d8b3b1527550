//! The life of one worker process, from the fork to its end.
//!
//! QGIS lives on the main thread, which serves one request at a time; the link
//! never waits for QGIS (see `drive.rs`).

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use qgisserver::config;
use qgisserver::log;
use qgisserver::protocol::{
    Born, CATALOG, Edition, Failure, Final, Found, Head, NotOpened, PluginStatus, ProjectRef,
    Ready, Request, Seen, Timings, Trace, Versions, without_suffix,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::board::{Board, Farewell};
use crate::documents::{Asked, Documents, State};
use crate::drive::Drive;
use crate::link::{self, Job, Last, Outlet, Told};
use crate::loading::{Loading, first};
use crate::memory::{self, Resident};
use crate::places::{Place, Places};
use crate::plugins;
use crate::projects::{Copy, Hit, Projects, Rules};
use crate::qgis::{self, Judgement, Project, Qgis, Served, Zygote};
use crate::ready;
use crate::s3::Objects;
use crate::storages::{self, Everywhere};

/// What a worker says to its parent when it is warm.
pub const READY: u8 = b'R';

/// What a new worker inherits.
pub struct Birth<'a> {
    pub number: u32,
    pub pool: &'a config::Pool,
    pub log: &'a config::Log,
    /// What its environment has that the parent's has not; None takes a variable away.
    pub variables: &'a BTreeMap<String, Option<String>>,
    pub zygote: &'a Zygote,
    pub versions: &'a Versions,
    pub name: &'a str,
    pub pool_instance: &'a str,
    pub board: Arc<Board>,
    pub control: UnixStream,
    /// Its own folder for temporary files; the parent removes it.
    pub tmpdir: PathBuf,
    /// What it opens before it is ready, by its place in the whole list.
    pub preload: Vec<(usize, ProjectRef)>,
    /// What nobody opens.
    pub not_opened: Vec<NotOpened>,
}

/// What came of opening projects ahead.
struct Ahead {
    opened: Vec<ProjectRef>,
    not_opened: Vec<NotOpened>,
}

/// Starts QGIS, says READY to the parent and serves until the process ends.
pub fn run(birth: Birth<'_>) -> ! {
    die_of_panics(birth.board.clone());
    memory::tell_of_crashes(birth.board.clone());
    let instance = uuid::Uuid::new_v4().simple().to_string();
    let qgis = match start_qgis(&birth, &instance) {
        Ok(qgis) => qgis,
        Err(error) => {
            tracing::error!("{error}");
            birth.board.say_farewell(Farewell::NoStart);
            // SAFETY: ends the process; nothing was promised to anybody yet.
            unsafe { libc::_exit(1) }
        }
    };
    let places = places(&birth, &qgis);
    let mut server = Server::new(qgis, places, birth.pool, birth.versions);
    let ahead = server.preload(&birth);
    let (drive, mut jobs) = start_link(&birth, &server.qgis, instance, ahead);
    server.run(&drive, &mut jobs)
}

fn start_qgis(birth: &Birth<'_>, instance: &str) -> Result<Qgis, qgis::Error> {
    let mut qgis = Qgis::start(
        birth.zygote,
        birth.pool,
        &birth.tmpdir,
        birth.variables,
        birth.log.qgis_info,
    )?;
    qgis.warm();
    qgis.introduce(instance)?;
    qgis.load_plugins()?;
    qgis.load_policies()?;
    Ok(qgis)
}

/// Where clients may find projects, and who is asked there.
fn places(birth: &Birth<'_>, qgis: &Qgis) -> Places {
    let pool = birth.pool;
    let finding = &pool.finding;
    let copies = storages::copies(&birth.tmpdir);
    let everywhere = Everywhere {
        objects: Objects::new(&finding.s3, finding.timeout, copies),
        asker: qgis.asker(),
    };
    // With those besides the ones that come and go.
    let n_projects = NonZeroUsize::new(pool.cache_size + birth.preload.len());
    let n_projects = n_projects.unwrap_or(NonZeroUsize::MIN);
    Places::new(pool, n_projects, Box::new(everywhere))
}

/// A panic of either thread ends the process at once: half a worker would keep
/// beating, and its request would wait for its deadline.
fn die_of_panics(board: Arc<Board>) {
    std::panic::set_hook(Box::new(move |panic| {
        board.say_farewell(Farewell::Panicked);
        log::panicked(panic, "the worker panicked");
        // SAFETY: ends the process, without destructors that may trust what is broken.
        unsafe { libc::_exit(1) }
    }));
}

fn start_link(
    birth: &Birth<'_>,
    qgis: &Qgis,
    instance: String,
    ahead: Ahead,
) -> (Arc<Drive>, UnboundedReceiver<Job>) {
    let pool = birth.pool;
    let settings = link::Settings {
        server: pool.server.clone(),
        heartbeat: pool.heartbeat,
        heartbeat_misses: pool.heartbeat_misses,
        cancel_grace: pool.cancel_grace,
    };
    let ready = ready::fit(Ready {
        pool: birth.name.into(),
        pool_instance: birth.pool_instance.into(),
        instance,
        number: birth.number,
        host: crate::host(),
        pid: std::process::id(),
        versions: birth.versions.clone(),
        plugins: plugins::names(&qgis.plugins, PluginStatus::Loaded),
        plugins_failed: plugins::names(&qgis.plugins, PluginStatus::Failed),
        plugin_reports: qgis.plugins.clone(),
        plugins_answer: qgis.plugins_answer,
        may_cache: qgis.may_cache,
        born: Born::default(),
        projects: ahead.opened,
        not_opened: ahead.not_opened,
    });
    let mut control = birth
        .control
        .try_clone()
        .expect("a descriptor for the link");
    let (board, own) = (
        birth.board.clone(),
        birth.control.try_clone().expect("another one"),
    );
    let (sender, jobs) = unbounded_channel();
    let drive = Drive::new().expect("a runtime needs two descriptors");
    drive.start(link::run(
        settings,
        ready,
        board,
        own,
        sender,
        drive.clone(),
    ));
    // If the parent is gone the link notices, too.
    let _ = control.write_all(&[READY]);
    (drive, jobs)
}

struct Server {
    qgis: Qgis,
    places: Places,
    projects: Projects<Project>,
    loading: Loading,
    documents: Documents,
    memory: Resident,
    chunk_bytes: usize,
}

impl Server {
    fn new(qgis: Qgis, places: Places, pool: &config::Pool, versions: &Versions) -> Self {
        Self {
            qgis,
            places,
            projects: Projects::new(rules(pool)),
            loading: Loading::new(pool),
            documents: Documents::new(pool, versions),
            memory: Resident::default(),
            chunk_bytes: pool.chunk_bytes,
        }
    }

    /// Opens what shall be open before the first client comes, as far as there is time
    /// and memory. What does not open is left to its first client, who hears why.
    fn preload(&mut self, birth: &Birth<'_>) -> Ahead {
        let start = Instant::now();
        let within = birth.pool.preload_timeout;
        let mut opened = Vec::new();
        let mut not_opened = birth.not_opened.clone();
        let mut leave_out = |name: &ProjectRef, why: String| {
            let project = name.to_string();
            not_opened.push(NotOpened { project, why });
        };
        for (n_done, (at, name)) in birth.preload.iter().enumerate() {
            if start.elapsed() > within || self.projects.is_full() {
                let n_left = birth.preload.len() - n_done;
                tracing::warn!(
                    n_left,
                    "there was no time (projects.cache.preload_seconds) or no room \
                     (projects.cache.memory) to open all projects ahead"
                );
                for (_, name) in &birth.preload[n_done..] {
                    leave_out(name, "no time or no room".into());
                }
                break;
            }
            birth.board.preloading(Some((*at, &name.to_string())));
            let opened_it = self.open(name);
            // They are of this project, and not of the first that a client asks for.
            let bad_layers = self.loading.take_bad_layers();
            match opened_it {
                Ok(()) => opened.push(name.clone()),
                Err(Failure::QgisFailed) => {
                    birth.board.say_farewell(Farewell::Doubt);
                    // SAFETY: ends the process; nothing was promised to anybody yet.
                    unsafe { libc::_exit(1) }
                }
                Err(failure) => {
                    let reason = failure.reason();
                    tracing::warn!(
                        project = %name, reason, ?bad_layers,
                        "not opened ahead (projects.cache.preload_config)"
                    );
                    let why = [&[reason.to_owned()][..], &bad_layers].concat();
                    leave_out(name, why.join(", "));
                }
            }
        }
        birth.board.preloading(None);
        if !birth.preload.is_empty() {
            let ms = start.elapsed().as_millis();
            tracing::info!(n_projects = opened.len(), ms, "projects opened ahead");
        }
        Ahead { opened, not_opened }
    }

    fn open(&mut self, name: &ProjectRef) -> Result<(), Failure> {
        let now = Instant::now();
        let seen = Seen::default();
        let place = self.places.find(name, &seen)?;
        let load = || {
            self.loading
                .load(&mut self.qgis, &mut self.places, name, &place)
        };
        self.projects.get(name, &place, &seen, now, load)?;
        self.projects.pin(name);
        Ok(())
    }

    fn run(mut self, drive: &Drive, jobs: &mut UnboundedReceiver<Job>) -> ! {
        // Waiting does not hold the GIL: it is taken for each request alone.
        let mut last = None;
        loop {
            let rest = || {
                self.projects.sweep();
                memory::give_back();
            };
            let Some(job) = drive.next_job(jobs, last.take(), rest) else {
                break;
            };
            last = Some(self.serve(job));
        }
        // SAFETY: the link ended, which only the end of the process does.
        unsafe { libc::_exit(1) }
    }

    fn serve(
        &mut self,
        Job {
            request,
            body,
            outlet,
        }: Job,
    ) -> Last {
        // Whatever is said until the answer is out is about this request. The span is of
        // the highest level, so that it is there whatever `logging.level` says.
        let trace_id = request.trace.as_ref().map(Trace::id);
        let span = tracing::error_span!("request", request_id = request.request_id, trace_id);
        let _inside = span.enter();
        self.qgis.begin(&request);
        let (report, bytes) = match request.prepare {
            true => (self.prepare(&request), Bytes::new()),
            false => self.answer(&request, &body, &outlet),
        };
        self.qgis.end();
        Last {
            outlet,
            report,
            bytes,
        }
    }

    fn answer(&mut self, request: &Request, body: &[u8], outlet: &Arc<Outlet>) -> (Final, Bytes) {
        let (named, changed);
        let asked = &request.project;
        let request = match self.named(request) {
            Some(other) => {
                named = other;
                &named
            }
            None => request,
        };
        // Before the project is looked for: who may not ask learns nothing of it.
        let request = match self.qgis.judge(request, body) {
            Judgement::Unchanged => request,
            Judgement::Changed(other) => {
                changed = other;
                &*changed
            }
            Judgement::Refused(head, bytes) => {
                let head = Some(head);
                let report = self.report();
                return (Final { head, ..report }, bytes);
            }
            Judgement::Failed(failure) => return (failed(failure, self.report()), Bytes::new()),
        };
        let start = Instant::now();
        let found = self.find(request, outlet);
        let load_us = micros(start.elapsed());
        let found = match found {
            Ok(found) => found,
            Err(failure) => {
                let timings = Timings {
                    load_us,
                    render_us: 0,
                };
                let report = Final {
                    timings,
                    ..self.report()
                };
                return (failed(failure, report), Bytes::new());
            }
        };
        let copy = found.as_ref().map(|(place, _)| self.projects.copy(place));
        // The server counts it for the project that it asked about.
        let is_asked = request.project == *asked;
        let edition = found.as_ref().map(|(_, hit)| hit.edition.clone());
        let edition = edition.filter(|_| is_asked);
        outlet.tell(Told {
            edition: edition.clone(),
            header: copy.and_then(|copy| of_bad_layers(copy.bad_layers())),
            load_us,
        });
        let project = copy.map(Copy::project);
        let place = found.as_ref().map(|(_, hit)| hit.edition.place);
        let document = document(&self.documents, &self.qgis, request, place.zip(copy));
        let served = match document.as_ref().and_then(Asked::known) {
            Some(head) => Served::without_qgis(head),
            None => self.qgis.serve(request, body, project, outlet.clone()),
        };
        if let Err(Failure::TooLarge) = served.answer {
            // Its parts were made; the next request wants to find room.
            memory::give_back();
        }
        let served = match document {
            Some(document) => served.settled(&document),
            None => served,
        };
        let timings = Timings {
            load_us,
            render_us: micros(served.render),
        };
        let bad_layers = copy.map(|copy| first(copy.bad_layers()));
        let report = Final {
            timings,
            found: found.map(|(_, hit)| hit.found),
            edition,
            bad_layers: bad_layers.unwrap_or_default(),
            raised: served.raised.clone(),
            ..self.report()
        };
        tracing::debug!(
            operation = request.operation,
            load_us,
            render_us = timings.render_us,
            "served"
        );
        finish(outlet, served, report, self.chunk_bytes)
    }

    /// The same request for filters in Python, which look at MAP alone: it names a project of
    /// the catalogue as the operator knows it. None if there is nothing to change.
    fn named(&mut self, request: &Request) -> Option<Request> {
        let project = request.project.as_ref()?;
        if project.alias != CATALOG || request.visitor.is_none() {
            return None;
        }
        let place = self.places.find(project, &request.seen).ok()?;
        let name = self.loading.known_as(&place);
        let name = utf8_percent_encode(without_suffix(&name), NON_ALPHANUMERIC);
        let (path, query) = request.url.split_once('?')?;
        let pairs = query.split('&').map(|pair| match pair.starts_with("MAP=") {
            true => format!("MAP={name}"),
            false => pair.to_owned(),
        });
        let query: Vec<String> = pairs.collect();
        Some(Request {
            url: format!("{path}?{}", query.join("&")),
            ..request.clone()
        })
    }

    /// What every FINAL says.
    fn report(&mut self) -> Final {
        Final {
            memory_kb: self.memory.kilobytes(),
            n_projects: self.projects.n_open(),
            bad_layers: self.loading.take_bad_layers(),
            ..Final::default()
        }
    }

    /// The copy that answers the request, loaded; None if it needs none.
    fn find(
        &mut self,
        request: &Request,
        outlet: &Outlet,
    ) -> Result<Option<(Place, Hit)>, Failure> {
        let Some(name) = &request.project else {
            return Ok(None);
        };
        let start = Instant::now();
        loop {
            let now = Instant::now();
            let place = self
                .places
                .find(name, &request.seen)
                .inspect_err(|failure| {
                    if *failure == Failure::ProjectNotFound {
                        self.projects.gone(name);
                    }
                })?;
            let load = || {
                self.loading
                    .load(&mut self.qgis, &mut self.places, name, &place)
            };
            match self.projects.get(name, &place, &request.seen, now, load) {
                Ok(hit) => {
                    if hit.is_new {
                        // QGIS keeps its capabilities for longer than we keep projects.
                        self.qgis.forget(self.projects.copy(&place).project());
                    }
                    return Ok(Some((place, hit)));
                }
                Err(_) if outlet.is_cancelled() => return Err(Failure::Cancelled),
                Err(Failure::ProjectUnreadable)
                    if self.loading.may_settle(&place, start.elapsed()) => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Loads what the project is now, though the old copy answers for a while yet.
    fn prepare(&mut self, request: &Request) -> Final {
        let start = Instant::now();
        let prepared = self.make_ready(request, start);
        let timings = Timings {
            load_us: micros(start.elapsed()),
            render_us: 0,
        };
        let report = Final {
            timings,
            ..self.report()
        };
        match prepared {
            Ok((edition, found)) => Final {
                head: Some(Head {
                    status: 204,
                    length: Some(0),
                    ..Head::default()
                }),
                edition: Some(edition),
                found: Some(found),
                ..report
            },
            Err(failure) => failed(failure, report),
        }
    }

    fn make_ready(&mut self, request: &Request, now: Instant) -> Result<(Edition, Found), Failure> {
        let name = request.project.as_ref().ok_or(Failure::ProjectNotFound)?;
        let place = self.places.find(name, &Seen::default())?;
        let load = || {
            self.loading
                .load(&mut self.qgis, &mut self.places, name, &place)
        };
        self.projects.prepare(name, &place, now, load)
    }
}

fn rules(pool: &config::Pool) -> Rules {
    let bytes = match pool.cache_memory {
        0 => memory::allowed() / 2,
        bytes => bytes,
    };
    Rules {
        size: pool.cache_size,
        bytes,
        check_interval: pool.check_interval,
        broken_for: pool.broken_for,
        settle: pool.settle,
        retry: pool.bad_layers.every,
    }
}

/// So that a client can tell a map that lacks something.
fn of_bad_layers(names: &[String]) -> Option<(String, String)> {
    let header = || (BAD_LAYERS.to_owned(), names.len().to_string());
    (!names.is_empty()).then(header)
}

const BAD_LAYERS: &str = "X-Qgisserver-Bad-Layers";

/// What is known of the document that the request is for; None if it is for none.
fn document<'a>(
    documents: &Documents,
    qgis: &Qgis,
    request: &'a Request,
    copy: Option<(u64, &Copy<Project>)>,
) -> Option<Asked<'a>> {
    let document = request.document.as_ref()?;
    let is_alone = qgis.may_cache;
    let none = State {
        is_alone,
        ..State::default()
    };
    let state = copy.map_or(none, |(place, copy)| State {
        place,
        version: copy.version(),
        modified: copy.modified(),
        dated: copy.dated(),
        is_alone,
    });
    let has_plugins = qgis.has_hands();
    Some(documents.asked(document, &request.url, state, has_plugins))
}

/// There is no answer. After one failure there will be no more from this process.
fn failed(failure: Failure, report: Final) -> Final {
    Final {
        failure: Some(failure),
        leaving: failure == Failure::QgisFailed,
        ..report
    }
}

/// What is left for FINAL; of much that is left, all but the last chunk is sent here.
fn finish(outlet: &Outlet, served: Served, report: Final, chunk_bytes: usize) -> (Final, Bytes) {
    let (mut head, mut bytes) = match served.answer {
        Ok(answer) => answer,
        Err(failure) => return (failed(failure, report), Bytes::new()),
    };
    if let Some(head) = &mut head {
        head.length = Some(bytes.len() as u64);
    }
    while bytes.len() > chunk_bytes {
        let part = bytes.split_to(chunk_bytes);
        if outlet.part(head.take(), part).is_err() {
            return (failed(Failure::Cancelled, report), Bytes::new());
        }
    }
    let head = head.map(|head| outlet.dress(head));
    (Final { head, ..report }, bytes)
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::WaitStatus;
    use nix::unistd::ForkResult;

    /// In a process of its own: the hook and the end are the process's.
    #[test]
    fn a_panic_ends_the_worker_at_once_and_its_parent_knows_why() {
        let board = Arc::new(Board::new().unwrap());
        // SAFETY: the child touches nothing that another thread of the test may hold.
        match unsafe { nix::unistd::fork() }.unwrap() {
            ForkResult::Child => {
                die_of_panics(board);
                let _ = std::thread::spawn(|| panic!("as the test wished")).join();
                // SAFETY: as in the hook.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, WaitStatus::Exited(child, 1));
                assert_eq!(board.farewell(), Farewell::Panicked);
            }
        }
    }
}
