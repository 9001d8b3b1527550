//! QGIS through Python: the only file that knows pyo3.
//!
//! [`Python`] is what the pool's parent holds: an interpreter with PyQGIS
//! imported and nothing started. After the fork [`Qgis`] is what a worker
//! holds: one QgsServer. One request at a time, on the main thread; the GIL is
//! free while QGIS works.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use nix::unistd::ForkResult;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyException, PyMemoryError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use qgisserver::config::{self, OnBadLayers};
use qgisserver::protocol::{
    CATALOG, Failure, Head, Plugin, PluginStatus, Raised, Request, Seen, Versions,
};

use crate::documents::Asked;
use crate::gdal;
use crate::link::{Outlet, Unwanted};
use crate::memory;
use crate::places::{Source, Stamp};
use crate::storages::{self, Trouble};

/// Why Python or QGIS did not start.
#[derive(Debug)]
pub enum Error {
    /// The interpreter itself.
    Interpreter(String),
    /// An exception, with its traceback.
    Python(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Interpreter(why) => write!(f, "Python does not start: {why}"),
            Self::Python(trace) => write!(f, "QGIS does not start: {trace}"),
        }
    }
}

impl From<PyErr> for Error {
    fn from(error: PyErr) -> Self {
        Python::attach(|py| Self::Python(trace(py, &error)))
    }
}

/// The Python half, compiled in: the worker is one file that cannot miss a part.
const MODULES: [(&CStr, &CStr, &str); 14] = [
    (
        c"qgisserver",
        c"qgisserver/__init__.py",
        include_str!("../../python/qgisserver/__init__.py"),
    ),
    (
        c"qgisserver.application",
        c"qgisserver/application.py",
        include_str!("../../python/qgisserver/application.py"),
    ),
    (
        c"qgisserver.projects",
        c"qgisserver/projects.py",
        include_str!("../../python/qgisserver/projects.py"),
    ),
    (
        c"qgisserver.models",
        c"qgisserver/models.py",
        include_str!("../../python/qgisserver/models.py"),
    ),
    (
        c"qgisserver.components",
        c"qgisserver/components.py",
        include_str!("../../python/qgisserver/components.py"),
    ),
    (
        c"qgisserver.storages",
        c"qgisserver/storages.py",
        include_str!("../../python/qgisserver/storages.py"),
    ),
    (
        c"qgisserver.catalog",
        c"qgisserver/catalog.py",
        include_str!("../../python/qgisserver/catalog.py"),
    ),
    (
        c"qgisserver.services",
        c"qgisserver/services.py",
        include_str!("../../python/qgisserver/services.py"),
    ),
    (
        c"qgisserver.contrib",
        c"qgisserver/contrib.py",
        include_str!("../../python/qgisserver/contrib.py"),
    ),
    (
        c"qgisserver.policies",
        c"qgisserver/policies.py",
        include_str!("../../python/qgisserver/policies.py"),
    ),
    (
        c"qgisserver.watching",
        c"qgisserver/watching.py",
        include_str!("../../python/qgisserver/watching.py"),
    ),
    (
        c"qgisserver.plugins",
        c"qgisserver/plugins.py",
        include_str!("../../python/qgisserver/plugins.py"),
    ),
    (
        c"qgisserver.hands",
        c"qgisserver/hands.py",
        include_str!("../../python/qgisserver/hands.py"),
    ),
    (
        c"qgisserver.exchange",
        c"qgisserver/exchange.py",
        include_str!("../../python/qgisserver/exchange.py"),
    ),
];

/// An interpreter with PyQGIS imported, ready to be forked.
pub struct Zygote {
    prefix: PathBuf,
}

impl Zygote {
    /// Starts Python as `program` would, whatever `python3` is first on PATH.
    pub fn start(program: &Path, prefix: &Path) -> Result<Self, Error> {
        initialize(program)?;
        Python::attach(|py| -> PyResult<()> {
            // Rust handles signals; Python's SIGINT handler would raise in the middle of a map.
            py.import("signal")?.call_method1(
                "signal",
                (nix::libc::SIGINT, py.import("signal")?.getattr("SIG_DFL")?),
            )?;
            let [
                (name, file, source),
                (app_name, app_file, app_source),
                rest @ ..,
            ] = MODULES;
            module(py, name, file, source)?;
            let application = module(py, app_name, app_file, app_source)?;
            application.call_method0("preload")?;
            for (name, file, source) in rest {
                module(py, name, file, source)?;
            }
            application.call_method0("freeze")?;
            Ok(())
        })?;
        let zygote = Self {
            prefix: prefix.to_owned(),
        };
        zygote.load_libraries();
        Ok(zygote)
    }

    /// What answers, as each library reports it.
    pub fn versions(&self) -> Versions {
        let found = Python::attach(|py| -> PyResult<Versions> {
            let found = py
                .import("qgisserver.application")?
                .call_method0("versions")?;
            let text = |key: &str| found.get_item(key)?.extract::<String>();
            Ok(Versions {
                worker: env!("CARGO_PKG_VERSION").into(),
                qgis: text("qgis")?,
                python: text("python")?,
                gdal: text("gdal")?,
                proj: text("proj")?,
                geos: text("geos")?,
            })
        });
        found.unwrap_or_else(|error| {
            tracing::warn!(%error, "the versions of QGIS are unknown");
            Versions {
                worker: env!("CARGO_PKG_VERSION").into(),
                ..Versions::default()
            }
        })
    }

    /// Forks with Python's consent. Sound only while the process has one thread
    /// and no Qt application.
    pub fn fork(&self) -> nix::Result<ForkResult> {
        Python::attach(|_| {
            // SAFETY: attached, and CPython asks for exactly these calls around a fork.
            // The process has one thread, so the child's memory is consistent.
            unsafe {
                pyo3::ffi::PyOS_BeforeFork();
                let result = nix::unistd::fork();
                match result {
                    Ok(ForkResult::Child) => pyo3::ffi::PyOS_AfterFork_Child(),
                    _ => pyo3::ffi::PyOS_AfterFork_Parent(),
                }
                result
            }
        })
    }

    /// Loads the providers and services that QGIS will load anyway, once for all children.
    fn load_libraries(&self) {
        let folders = ["plugins", "server"].map(|name| self.prefix.join("lib/qgis").join(name));
        let files = folders
            .iter()
            .filter_map(|folder| std::fs::read_dir(folder).ok())
            .flatten();
        let files = files.flatten().map(|entry| entry.path());
        for file in files.filter(|file| is_for_all(file)) {
            let before = open_files();
            load_library(&file);
            let opened: Vec<_> = open_files().difference(&before).cloned().collect();
            if !opened.is_empty() {
                tracing::warn!(file = %file.display(), ?opened, "a library opened files that all workers share");
            }
        }
    }
}

/// These open proj.db while they load, and an open database must not be shared by
/// processes: whichever comes first reads at the offset where another one was.
const OPENS_FILES: [&str; 3] = ["libwfs.so", "libwfs3.so", "libwmts.so"];

fn is_for_all(file: &Path) -> bool {
    file.extension().is_some_and(|suffix| suffix == "so")
        && !OPENS_FILES.iter().any(|name| file.ends_with(name))
}

fn load_library(file: &Path) {
    let Ok(name) = CString::new(file.as_os_str().as_encoded_bytes()) else {
        return;
    };
    // SAFETY: QGIS loads the same files; their initialisers run here instead of there.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
    if handle.is_null() {
        tracing::debug!(file = %file.display(), "not loaded before the fork");
    }
}

/// The regular files that this process holds open.
fn open_files() -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    targets.filter(|target| target.is_file()).collect()
}

fn initialize(program: &Path) -> Result<(), Error> {
    use pyo3::ffi::*;
    let text = CString::new(program.as_os_str().as_encoded_bytes())
        .map_err(|error| Error::Interpreter(error.to_string()))?;
    // SAFETY: the documented order of CPython's initialisation; the configuration
    // is cleared on every way out, and the GIL is released as pyo3 expects it.
    unsafe {
        let mut config = std::mem::MaybeUninit::<PyConfig>::zeroed();
        PyConfig_InitPythonConfig(config.as_mut_ptr());
        let config = config.assume_init_mut();
        config.install_signal_handlers = 0;
        let program_name = &raw mut config.program_name;
        let mut status = PyConfig_SetBytesString(config, program_name, text.as_ptr());
        if PyStatus_Exception(status) == 0 {
            status = Py_InitializeFromConfig(config);
        }
        PyConfig_Clear(config);
        if PyStatus_Exception(status) != 0 {
            let why = match status.err_msg.is_null() {
                true => "unknown reason".into(),
                false => CStr::from_ptr(status.err_msg)
                    .to_string_lossy()
                    .into_owned(),
            };
            return Err(Error::Interpreter(why));
        }
        PyEval_SaveThread();
    }
    Ok(())
}

fn module<'py>(
    py: Python<'py>,
    name: &CStr,
    file: &CStr,
    source: &str,
) -> PyResult<Bound<'py, PyModule>> {
    let source = CString::new(source).expect("our sources have no NUL");
    let module = PyModule::from_code(py, &source, file, name)?;
    let name = name.to_str().expect("our names are ASCII");
    match name.rsplit_once('.') {
        Some((package, short)) => py.import(package)?.setattr(short, &module)?,
        None => module.setattr("__path__", Vec::<String>::new())?,
    }
    Ok(module)
}

/// A loaded project. Dropped on the main thread.
pub struct Project {
    object: Py<PyAny>,
}

/// A project as QGIS read it.
pub struct Read {
    pub project: Project,
    /// Invalid layers that it publishes.
    pub bad_layers: Vec<String>,
    /// The files of projects that it takes layers from.
    pub embedded: Vec<PathBuf>,
}

/// Why QGIS did not read one.
pub struct Unread {
    pub failure: Failure,
    /// With [`Failure::BadLayers`].
    pub bad_layers: Vec<String>,
}

/// What Python says of one request.
struct Answer {
    whole: (Head, Bytes),
    /// For whom access control let a document be made.
    keys: Vec<String>,
}

/// What one request came to.
pub struct Served {
    /// Head and bytes that the outlet did not get yet, or why there are none.
    pub answer: Result<(Option<Head>, Bytes), Failure>,
    /// See [`Answer::keys`].
    pub keys: Vec<String>,
    /// The first plugin that raised.
    pub raised: Option<Raised>,
    pub render: Duration,
}

impl Served {
    /// What needed no QGIS.
    pub fn without_qgis(head: Head) -> Self {
        Self {
            answer: Ok((Some(head), Bytes::new())),
            keys: Vec::new(),
            raised: None,
            render: Duration::ZERO,
        }
    }

    /// The same as a document. A stream whose head has left is none.
    pub fn settled(self, document: &Asked<'_>) -> Self {
        let answer = match self.answer {
            Ok((Some(head), bytes)) => {
                let (head, bytes) = document.settle(&self.keys, head, bytes);
                Ok((Some(head), bytes))
            }
            other => other,
        };
        Self { answer, ..self }
    }
}

/// The one QgsServer of a worker process.
pub struct Qgis {
    application: Py<PyAny>,
    server: Py<PyAny>,
    recorder: Py<PyAny>,
    serve: Py<PyAny>,
    load: Py<PyAny>,
    /// Of the access policies, where they are enabled.
    judge: Option<Py<PyAny>>,
    log: Py<Log>,
    /// What plugins have to do with answers.
    hands: Py<PyAny>,
    /// A server filter is loaded: it must see every flush.
    eager: bool,
    chunk_bytes: usize,
    rules: config::Pool,
    /// Who is served, for log lines that QGIS writes.
    current: Arc<Mutex<Option<Current>>>,
    /// QGIS said of it that it lacks memory.
    starved: Arc<AtomicBool>,
    /// By which the last request called the server.
    host: String,
    pub plugins: Vec<Plugin>,
    /// A request without project or service may have an answer.
    pub plugins_answer: bool,
    /// No filter and no access control: the answer depends on the request alone.
    pub may_cache: bool,
}

impl Qgis {
    /// Starts QGIS in a freshly forked process, without plugins.
    pub fn start(
        zygote: &Zygote,
        pool: &config::Pool,
        tmpdir: &Path,
        variables: &BTreeMap<String, Option<String>>,
        qgis_info: bool,
    ) -> Result<Self, Error> {
        let current = Arc::new(Mutex::new(None));
        let starved = Arc::new(AtomicBool::new(false));
        Python::attach(|py| {
            let log = || Log {
                current: current.clone(),
                starved: starved.clone(),
                qgis_info,
            };
            // Before QGIS starts: that alone is worth a word of GDAL's.
            listen_to_gdal(py, log());
            let log = Py::new(py, log())?;
            let package = |name: &str| py.import(format!("qgisserver.{name}"));
            let prefix = zygote.prefix.to_string_lossy();
            let application = package("application")?.call_method1(
                "Application",
                (&prefix, tmpdir.to_string_lossy(), variables, &log),
            )?;
            let recorder = package("exchange")?.call_method1("Recorder", (&log,))?;
            recorder.call_method0("install")?;
            let interface = application.getattr("interface")?;
            let hands = package("hands")?.call_method1("Hands", (interface,))?;
            Ok(Self {
                server: application.getattr("server")?.unbind(),
                hands: hands.unbind(),
                application: application.unbind(),
                recorder: recorder.unbind(),
                serve: package("exchange")?.getattr("serve")?.unbind(),
                load: package("projects")?.getattr("load")?.unbind(),
                judge: None,
                eager: false,
                log,
                chunk_bytes: pool.chunk_bytes,
                rules: pool.clone(),
                current: current.clone(),
                starved: starved.clone(),
                host: String::new(),
                plugins: Vec::new(),
                plugins_answer: false,
                may_cache: true,
            })
        })
        .map_err(|error: PyErr| error.into())
    }

    /// Requests of this worker for layers of its own server say from whom they are.
    pub fn introduce(&self, instance: &str) -> Result<(), Error> {
        let told = Python::attach(|py| {
            self.application
                .call_method1(py, "introduce", (instance,))
                .map(drop)
        });
        told.map_err(|error: PyErr| error.into())
    }

    /// What the present request calls the server, its projects may, too.
    fn addressed(&mut self, url: &str) {
        let host = host(url);
        // What the server itself wants of a worker comes from nowhere.
        if host.is_empty() || host == self.host {
            return;
        }
        self.host = host.to_owned();
        Python::attach(|py| {
            let told = self.application.call_method1(py, "addressed", (host,));
            if let Err(error) = told {
                tracing::warn!(%error, host, "requests to this host are not known as our own");
            }
        });
    }

    /// Loads the server plugins. They see every request from now on.
    pub fn load_plugins(&mut self) -> Result<(), Error> {
        Python::attach(|py| -> PyResult<()> {
            let package = py.import("qgisserver.plugins")?;
            let interface = self.application.getattr(py, "interface")?;
            let paths = self.rules.plugin_paths.iter();
            let paths: Vec<_> = paths.map(|path| path.to_string_lossy()).collect();
            let wanted = &self.rules.plugins;
            let found = package.call_method1("load", (paths, wanted, &interface, &self.log))?;
            let reports: Vec<Bound<'_, PyDict>> = found.extract()?;
            self.plugins = reports.iter().map(report).collect::<PyResult<_>>()?;
            let failed = |it: &&Plugin| it.status == PluginStatus::Failed;
            if let Some(plugin) = self
                .plugins
                .iter()
                .find(failed)
                .filter(|_| self.rules.plugins_strict)
            {
                let why = format!("the plugin {} does not load (plugins.strict)", plugin.name);
                return Err(PyRuntimeError::new_err(why));
            }
            // A plugin may have replaced the hook, as QGIS itself does.
            self.recorder.call_method0(py, "install")?;
            py.import("qgisserver.watching")?
                .call_method1("watch", (&self.recorder,))?;
            let n_filters: usize = package
                .call_method1("count_filters", (&interface,))?
                .extract()?;
            self.eager = n_filters > 0;
            let services = py.import("qgisserver.services")?.getattr("offered")?;
            self.plugins_answer = n_filters > 0 || services.len()? > 0;
            let loaded = |it: &Plugin| it.status == PluginStatus::Loaded;
            self.may_cache = n_filters == 0 && !self.plugins.iter().any(loaded);
            if let Some(limit) = self.rules.feature_limit {
                py.import("qgisserver.hands")?
                    .call_method1("limit_features", (&interface, limit))?;
            }
            Ok(())
        })
        .map_err(Error::from)
    }

    /// Registers the access policies, if they are enabled. Without one that does not
    /// load nothing is served.
    pub fn load_policies(&mut self) -> Result<(), Error> {
        if !self.rules.filters {
            return Ok(());
        }
        // Their answers depend on who asks.
        self.may_cache = false;
        Python::attach(|py| -> PyResult<()> {
            let package = py.import("qgisserver.policies")?;
            let settings = &self.rules.filter_settings;
            let loaded: Vec<String> = package
                .call_method1("load", (settings, &self.log))?
                .extract()?;
            if !loaded.is_empty() {
                tracing::info!(?loaded, "access policies");
            }
            self.judge = Some(package.getattr("judge")?.unbind());
            Ok(())
        })
        .map_err(Error::from)
    }

    /// Asks the access policies about a request. Where only one side has them enabled
    /// nothing is served.
    pub fn judge(&mut self, request: &Request, body: &[u8]) -> Judgement {
        let (judge, visitor) = match (&self.judge, &request.visitor) {
            (Some(judge), Some(visitor)) => (judge, visitor),
            (None, None) => return Judgement::Unchanged,
            _ => {
                tracing::error!(
                    "either the server or this pool has no server.enable_filters: no answer"
                );
                return Judgement::Failed(Failure::PolicyRaised);
            }
        };
        let judged = Python::attach(|py| {
            let arguments = (
                &self.log,
                &request.method,
                &request.url,
                &visitor.headers,
                PyBytes::new(py, body),
                &visitor.said,
                &visitor.address,
                &visitor.path,
                visitor.is_known,
            );
            let said = judge.bind(py).call1(arguments)?;
            judgement(request, &said, &self.rules.finding)
        });
        judged.unwrap_or_else(|error: PyErr| {
            tracing::error!(%error, "the access policies could not be asked");
            Judgement::Failed(Failure::PolicyRaised)
        })
    }

    /// A server filter, access control of a plugin or an access policy may have a hand in answers.
    pub fn has_hands(&self) -> bool {
        let restrict =
            || Python::attach(|py| self.hands.getattr(py, "restrict")?.extract::<bool>(py));
        // Who does not know has to think that there is one.
        self.eager || self.judge.is_some() || restrict().unwrap_or(true)
    }

    /// Renders one map of nothing: fonts and symbols are loaded before the first client
    /// waits, and before there are plugins that would take it for a client's.
    pub fn warm(&mut self) {
        let outcome = Python::attach(|py| -> PyResult<Project> {
            let object = py
                .import("qgisserver.projects")?
                .call_method0("warm")?
                .unbind();
            Ok(Project { object })
        });
        let request = Request {
            method: "GET".into(),
            url: "http://localhost/?SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=warm&STYLES=\
                  &WIDTH=64&HEIGHT=64&CRS=EPSG:4326&BBOX=-1,-1,1,1&FORMAT=image/png"
                .into(),
            ..Request::default()
        };
        match outcome {
            Ok(project) => {
                drop(self.serve(&request, &[], Some(&project), Arc::new(Outlet::nowhere())))
            }
            Err(error) => tracing::warn!(%error, "the first map will be slow"),
        }
    }

    /// Reads a project, of one in a storage its copy if there is one. `strict`: not if it
    /// publishes invalid layers. `Err` has been logged.
    pub fn load(
        &mut self,
        source: &Source,
        copy: Option<&Path>,
        strict: bool,
    ) -> Result<Read, Unread> {
        let (_, trust, no_layouts, read_only) = flags(&self.rules);
        let read = Python::attach(|py| {
            let read = match source {
                Source::File(path) => {
                    let path = path.to_string_lossy();
                    self.load
                        .call1(py, (path, strict, trust, no_layouts, read_only))
                }
                Source::Stored(uri) => py
                    .import("qgisserver.storages")
                    .and_then(|storages| {
                        let copy = copy.map(Path::to_string_lossy);
                        let flags = (strict, trust, no_layouts, read_only);
                        storages.call_method1("read", (&uri.0, copy, flags))
                    })
                    .map(Bound::unbind),
            };
            let read = read.and_then(|read| read.extract(py));
            let (object, bad_layers, embedded): (Py<PyAny>, _, _) =
                read.map_err(|error: PyErr| unread(py, source, &error))?;
            if self.rules.disable_owsurls {
                py.import("qgisserver.projects")
                    .and_then(|projects| projects.call_method1("forget_addresses", (&object,)))
                    .map_err(|error| unread(py, source, &error))?;
            }
            Ok(Read {
                project: Project { object },
                bad_layers,
                embedded,
            })
        });
        // What the XML document took is free again, and the allocator keeps it for a while.
        memory::give_back();
        read
    }

    /// Ends what was dropped without Python since it was last used, which happens later
    /// otherwise.
    pub fn bury(&self) {
        Python::attach(|_| {});
    }

    /// Forgets what QGIS itself derived from the project before: its capabilities documents.
    pub fn forget(&self, project: &Project) {
        Python::attach(|py| {
            let forgotten = self.application.getattr(py, "interface").and_then(|it| {
                let name = project.object.call_method0(py, "fileName")?;
                it.call_method1(py, "removeConfigCacheEntry", (name,))
            });
            if let Err(error) = forgotten {
                tracing::warn!(%error, "QGIS may answer with old capabilities");
            }
        });
    }

    /// Prepares the storages that the settings name. After the plugins: handlers of
    /// projects may be found in their folders.
    pub fn asker(&self) -> Asker {
        let rules = &self.rules;
        let finding = &rules.finding;
        let prepared = Python::attach(|py| {
            let handlers = finding.handlers.iter();
            let handlers: BTreeMap<_, _> = handlers
                .map(|(scheme, handler)| (scheme, (&handler.import, &handler.config)))
                .collect();
            let known = finding.schemes.values().map(|base| &base.scheme);
            let schemes: BTreeSet<_> = known.chain(&finding.allowed).collect();
            py.import("qgisserver.storages")?
                .call_method1(
                    "setup",
                    (
                        finding.timeout.as_secs_f64(),
                        handlers,
                        schemes,
                        options(rules),
                        flags(rules),
                        storages::for_gdal(finding),
                        storages::passwords(finding),
                        &self.log,
                    ),
                )
                .map(drop)
        });
        if let Err(error) = prepared {
            tracing::error!(%error, "projects are found in files and in S3 alone");
        }
        Asker
    }

    /// A request is about to be served, before its project is loaded, which may ask the
    /// server, too. From now on all that QGIS says is about it.
    pub fn begin(&mut self, request: &Request) {
        self.set_current(Some(Current {
            request_id: request.request_id.clone(),
            trace_id: request.trace.as_ref().map(|trace| trace.id().to_owned()),
        }));
        self.addressed(&request.url);
    }

    /// And now it is not any more.
    pub fn end(&self) {
        self.set_current(None);
    }

    fn set_current(&self, current: Option<Current>) {
        *self.current.lock().expect("nobody panics while holding it") = current;
    }

    /// Passes one request to QGIS. Parts of a stream go to `outlet` while QGIS works.
    pub fn serve(
        &mut self,
        request: &Request,
        body: &[u8],
        project: Option<&Project>,
        outlet: Arc<Outlet>,
    ) -> Served {
        let start = Instant::now();
        let (mut keys, mut raised) = (Vec::new(), None);
        let answer = Python::attach(|py| {
            let sink = Bound::new(py, Sink::new(outlet, self.chunk_bytes))
                .map_err(|_| Failure::QgisFailed)?;
            self.starved.store(false, Ordering::Relaxed);
            let outcome = self.call(py, request, body, project, &sink);
            sink.borrow().outlet.forget_stop();
            raised = self.raised(py);
            match outcome {
                // What QGIS made after it was asked to stop is not whole.
                Ok(Some(_)) if sink.borrow().was_stopped() => Err(Failure::Cancelled),
                Ok(Some(answer)) => {
                    keys = answer.keys;
                    let (head, bytes) = finish(&sink.borrow(), answer.whole)?;
                    let speaks = !body.is_empty() || names_service(&request.url);
                    let lack = head.as_ref();
                    let lack = lack.and_then(|head| self.lack(head, &bytes, speaks));
                    lack.map_or(Ok((head, bytes)), Err)
                }
                Ok(None) if sink.borrow().is_unwanted() => Err(Failure::Cancelled),
                Ok(None) => Err(Failure::PluginRaised),
                Err(error) => Err(escaped(py, &error, sink.borrow().is_unwanted())),
            }
        });
        Served {
            answer,
            keys,
            raised,
            render: start.elapsed(),
        }
    }

    /// Which plugin raised in the present request, as far as it can be told.
    fn raised(&self, py: Python<'_>) -> Option<Raised> {
        let told = self.recorder.getattr(py, "told").ok()?;
        let (plugin, trace) = told.extract(py).ok()?;
        Some(Raised { plugin, trace })
    }

    /// Why this answer is none. When QGIS has no memory it says so in the log alone,
    /// or sends half of an image, or nothing at all, with status 200.
    /// Who `speaks` a language of the OGC gets more than these two words.
    fn lack(&self, head: &Head, bytes: &[u8], speaks: bool) -> Option<Failure> {
        match head.status {
            200 if is_cut_off(head, bytes) => {
                tracing::error!(
                    "QGIS made no whole image: out of memory (worker.memory_limit), or too large for its format"
                );
                Some(Failure::TooLarge)
            }
            500 if bytes == BARE && speaks => Some(match self.starved.load(Ordering::Relaxed) {
                true => Failure::TooLarge,
                false => Failure::GaveUp,
            }),
            _ => None,
        }
    }

    /// The whole answer or the rest of a stream, and for whom a document was made; None if
    /// it is not to be trusted.
    fn call(
        &self,
        py: Python<'_>,
        request: &Request,
        body: &[u8],
        project: Option<&Project>,
        sink: &Bound<'_, Sink>,
    ) -> PyResult<Option<Answer>> {
        let headers = PyDict::new(py);
        for (name, value) in &request.headers {
            headers.set_item(name, value)?;
        }
        let answer = self.serve.call1(
            py,
            (
                &self.server,
                &self.recorder,
                sink,
                self.eager,
                &request.method,
                &request.url,
                headers,
                PyBytes::new(py, body),
                project.map(|project| &project.object),
                request.document.is_some().then_some(&self.hands),
            ),
        )?;
        if answer.is_none(py) {
            return Ok(None);
        }
        let (status, headers, data, keys): (u16, Bound<'_, PyDict>, Bound<'_, PyAny>, _) =
            answer.extract(py)?;
        let (mut head, bytes) = (head(status, &headers)?, bytes(&data)?);
        if status == 200 && !self.rules.qgis_refusals && is_unknown_service(&bytes) {
            head.status = 400;
        }
        Ok(Some(Answer {
            whole: (head, bytes),
            keys,
        }))
    }
}

/// Asks storages of projects that Python knows.
pub struct Asker;

impl Asker {
    /// The state of a project; None if it is not there.
    pub fn look(&self, uri: &str) -> Result<Option<Stamp>, Trouble> {
        let seen = asked("storages", "look", uri, |said| {
            said.extract::<Option<(String, u64)>>()
        })?;
        Ok(seen.map(|(version, modified)| Stamp::stored(&version, modified)))
    }

    /// The file or the URI of a project in the catalogue of QGIS.
    pub fn listed(&self, id: &str) -> Result<Option<String>, Trouble> {
        asked("catalog", "find", id, |said| said.extract())
    }
}

/// What a function of Python knows of something.
fn asked<T>(
    module: &str,
    function: &str,
    of: &str,
    read: impl FnOnce(Bound<'_, PyAny>) -> PyResult<T>,
) -> Result<T, Trouble> {
    Python::attach(|py| {
        let said = py
            .import(format!("qgisserver.{module}"))
            .and_then(|module| module.call_method1(function, (of,)))
            .and_then(read);
        said.map_err(|error: PyErr| match is_called(py, &error, "Away") {
            true => Trouble::Away(error.value(py).to_string()),
            false => Trouble::Raised(trace(py, &error)),
        })
    })
}

/// strict, trust_metadata, no_layouts, read_only: for `projects.load`.
fn flags(rules: &config::Pool) -> (bool, bool, bool, bool) {
    (
        rules.bad_layers.rule == OnBadLayers::Strict,
        rules.trust_layer_metadata,
        rules.disable_getprint,
        rules.force_readonly_layers,
    )
}

/// What handlers that were written for py-qgis-server may read of their settings.
fn options(rules: &config::Pool) -> BTreeMap<&'static str, String> {
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    BTreeMap::from([
        ("rootdir", rules.rootdir.to_string_lossy().into_owned()),
        ("size", rules.cache_size.to_string()),
        ("strict_check", yes(flags(rules).0)),
        ("trust_layer_metadata", yes(rules.trust_layer_metadata)),
        ("disable_getprint", yes(rules.disable_getprint)),
        ("force_readonly_layers", yes(rules.force_readonly_layers)),
        ("default_handler", rules.finding.default_scheme.clone()),
        ("allow_storage_schemes", rules.finding.allowed.join(",")),
        ("insecure", yes(false)),
    ])
}

/// What the access policies make of a request.
pub enum Judgement {
    Unchanged,
    Changed(Box<Request>),
    Refused(Head, Bytes),
    /// One raised, or named a project that nobody may name.
    Failed(Failure),
}

/// See `policies.py` for what it says.
fn judgement(
    request: &Request,
    said: &Bound<'_, PyAny>,
    finding: &config::Finding,
) -> PyResult<Judgement> {
    if said.is_none() {
        return Ok(Judgement::Unchanged);
    }
    let word: String = said.get_item(0)?.extract()?;
    match word.as_str() {
        "refused" => {
            let (_, status, headers, body): (String, u16, Bound<'_, PyDict>, Bound<'_, PyBytes>) =
                said.extract()?;
            let body = Bytes::copy_from_slice(body.as_bytes());
            Ok(Judgement::Refused(head(status, &headers)?, body))
        }
        "changed" => {
            type Fields = BTreeMap<String, Option<String>>;
            let (_, query, map, fields): (String, Option<String>, Option<String>, Fields) =
                said.extract()?;
            let mut changed = request.clone();
            let mut projects = request.project.iter();
            let is_listed = projects.any(|project| project.alias == CATALOG);
            if let Some(query) = query {
                let path = request.url.split('?').next().unwrap_or_default();
                changed.url = format!("{path}?{query}");
            }
            if map.is_some() {
                // What clients saw of the other project says nothing of this one.
                changed.seen = Seen::default();
            }
            match map.as_deref() {
                None => {}
                // QGIS itself would take it from the path.
                Some("") if is_listed => {
                    return Ok(Judgement::Failed(Failure::ProjectNotFound));
                }
                Some("") => changed.project = None,
                Some(map) => match qgisserver::project(map, finding) {
                    Some(project) => changed.project = Some(project),
                    None => return Ok(Judgement::Failed(Failure::ProjectNotFound)),
                },
            }
            for (name, value) in fields {
                changed
                    .headers
                    .retain(|(known, _)| !known.eq_ignore_ascii_case(&name));
                changed.headers.extend(value.map(|value| (name, value)));
            }
            Ok(Judgement::Changed(Box::new(changed)))
        }
        _ => Ok(Judgement::Failed(Failure::PolicyRaised)),
    }
}

/// A plugin as `plugins.py` reports it.
fn report(found: &Bound<'_, PyDict>) -> PyResult<Plugin> {
    let item = |key: &str| found.as_any().get_item(key);
    let status: String = item("status")?.extract()?;
    Ok(Plugin {
        name: item("name")?.extract()?,
        path: item("path")?.extract()?,
        status: match status.as_str() {
            "loaded" => PluginStatus::Loaded,
            "conflict" => PluginStatus::Conflict,
            _ => PluginStatus::Failed,
        },
        metadata: item("metadata")?.extract()?,
        error: item("error")?.extract()?,
    })
}

/// Joins what the sink still holds with the rest, so that a reply that was never
/// streamed leaves in one piece and with its length.
fn finish(sink: &Sink, (head, rest): (Head, Bytes)) -> Result<(Option<Head>, Bytes), Failure> {
    let mut state = sink.state();
    let mut pending = std::mem::take(&mut state.pending);
    let bytes = match pending.is_empty() {
        true => rest,
        false => {
            pending.extend_from_slice(&rest);
            pending.freeze()
        }
    };
    // A stream's head has left with its first part.
    Ok((state.head.take().or((!state.sent).then_some(head)), bytes))
}

/// What QGIS answers when one of its own exceptions ended the request.
const BARE: &[u8] = b"Internal Server Error";

/// QGIS reports a SERVICE that nobody registered with status 200, early in its report.
fn is_unknown_service(bytes: &[u8]) -> bool {
    const CODE: &[u8] = b"code=\"Service configuration error\"";
    let start = &bytes[..bytes.len().min(400)];
    start.starts_with(b"<") && start.windows(CODE.len()).any(|it| it == CODE)
}

/// An image without its end. A plugin may have made one in another format than the head says.
fn is_cut_off(head: &Head, bytes: &[u8]) -> bool {
    let kind = head.header("content-type").unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let made = match bytes {
        [0x89, b'P', b'N', b'G', ..] => "image/png",
        [0xff, 0xd8, 0xff, ..] => "image/jpeg",
        _ => kind,
    };
    match made {
        _ if !kind.starts_with("image/") => false,
        "image/png" => !bytes.ends_with(b"IEND\xaeB`\x82"),
        "image/jpeg" => !bytes.ends_with(b"\xff\xd9"),
        _ => kind.starts_with("image/") && bytes.is_empty(),
    }
}

fn head(status: u16, headers: &Bound<'_, PyDict>) -> PyResult<Head> {
    let headers = headers
        .iter()
        .map(|(name, value)| Ok((name.extract()?, value.extract()?)))
        .collect::<PyResult<_>>()?;
    Ok(Head {
        status,
        headers,
        ..Head::default()
    })
}

/// An answer of so many bytes may not find room.
const LARGE: usize = 4 << 20;

/// The bytes of a QByteArray or of bytes, copied once.
fn bytes(data: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let buffer = PyBuffer::<u8>::get(data)?;
    if buffer.len_bytes() > LARGE {
        // Without room for the copy Rust would abort; an exception has an answer.
        let room = Vec::<u8>::new().try_reserve_exact(buffer.len_bytes());
        room.map_err(|_| PyMemoryError::new_err("no memory for a copy of the answer"))?;
    }
    Ok(buffer.to_vec(data.py())?.into())
}

fn is_called(py: Python<'_>, error: &PyErr, name: &str) -> bool {
    error.get_type(py).name().is_ok_and(|found| found == name)
}

fn unread(py: Python<'_>, source: &Source, error: &PyErr) -> Unread {
    let layers = error.value(py).getattr("args");
    let layers = layers.and_then(|args| args.get_item(0)?.extract());
    let failure = unloaded(py, source, error);
    Unread {
        bad_layers: match failure {
            Failure::BadLayers => layers.unwrap_or_default(),
            _ => Vec::new(),
        },
        failure,
    }
}

fn unloaded(py: Python<'_>, source: &Source, error: &PyErr) -> Failure {
    let kind = error
        .get_type(py)
        .name()
        .map(|name| name.to_string())
        .unwrap_or_default();
    match kind.as_str() {
        "Away" => {
            tracing::error!(%source, why = %error.value(py), "project not served: its storage does not answer");
            Failure::StorageAway
        }
        "Missing" => Failure::ProjectNotFound,
        "BadLayers" | "StrictCheckingError" => {
            let layers = error.value(py).to_string();
            tracing::error!(path = %source, %layers, "project not served: invalid layers, and the check is strict");
            Failure::BadLayers
        }
        "Unreadable" | "UnreadableResourceError" => {
            let why = config::without_secrets(&error.value(py).to_string());
            tracing::error!(path = %source, why, "project not served: QGIS cannot read it");
            Failure::ProjectUnreadable
        }
        _ => {
            tracing::error!(path = %source, trace = trace(py, error), "project not served");
            raised(py, error)
        }
    }
}

/// An exception that left `handleRequest`. That nobody waits any more is no
/// excuse for one of C++, after which QGIS holds a stale request.
fn escaped(py: Python<'_>, error: &PyErr, unwanted: bool) -> Failure {
    match raised(py, error) {
        Failure::PluginRaised if unwanted => Failure::Cancelled,
        failure => {
            tracing::error!(trace = trace(py, error), "the request raised");
            failure
        }
    }
}

/// Whose exception it is: of C++ when it is a MemoryError or a bare Exception.
fn raised(py: Python<'_>, error: &PyErr) -> Failure {
    let is_bare = error.get_type(py).is(py.get_type::<PyException>());
    match error.is_instance_of::<PyMemoryError>(py) || is_bare {
        true => Failure::QgisFailed,
        false => Failure::PluginRaised,
    }
}

fn trace(py: Python<'_>, error: &PyErr) -> String {
    let trace = error.traceback(py).and_then(|trace| trace.format().ok());
    format!("{}{error}", trace.unwrap_or_default())
}

/// Where Python leaves the parts of a stream. It collects them to chunks of a
/// size that suits the wire, the first one small so that the client sees progress.
#[pyclass(frozen)]
struct Sink {
    outlet: Arc<Outlet>,
    chunk_bytes: usize,
    state: Mutex<Parts>,
}

#[derive(Default)]
struct Parts {
    head: Option<Head>,
    pending: BytesMut,
    sent: bool,
    /// QGIS can be asked to stop.
    can_stop: bool,
}

const FIRST_CHUNK: usize = 16 << 10;

impl Sink {
    fn new(outlet: Arc<Outlet>, chunk_bytes: usize) -> Self {
        Self {
            outlet,
            chunk_bytes,
            state: Mutex::default(),
        }
    }

    fn is_unwanted(&self) -> bool {
        self.outlet.is_cancelled()
    }

    /// QGIS knew that nobody waits.
    fn was_stopped(&self) -> bool {
        self.is_unwanted() && self.state().can_stop
    }

    /// Never held while anything waits.
    fn state(&self) -> MutexGuard<'_, Parts> {
        self.state.lock().expect("nobody panics while holding it")
    }

    fn wants_head(&self) -> bool {
        let state = self.state();
        !state.sent && state.head.is_none()
    }

    fn collect(&self, py: Python<'_>, data: &PyBuffer<u8>) -> PyResult<()> {
        let mut state = self.state();
        let start = state.pending.len();
        state.pending.resize(start + data.len_bytes(), 0);
        data.copy_to_slice(py, &mut state.pending[start..])
    }

    /// The next chunk when there is enough for one.
    fn take(&self, wanted: usize) -> Option<(Option<Head>, Bytes)> {
        let mut state = self.state();
        let size = state.pending.len().min(self.chunk_bytes);
        (state.pending.len() >= wanted)
            .then(|| (state.head.take(), state.pending.split_to(size).freeze()))
    }
}

#[pymethods]
impl Sink {
    /// How many bytes the sink likes to get at once.
    #[getter]
    fn wanted(&self) -> usize {
        match self.state().sent {
            true => self.chunk_bytes,
            false => FIRST_CHUNK.min(self.chunk_bytes),
        }
    }

    /// `stop()` asks QGIS to stop. It is called from another thread, at most once.
    fn on_cancel(&self, stop: Py<PyAny>) {
        self.state().can_stop = true;
        self.outlet.on_cancel(Box::new(move || {
            Python::attach(|py| {
                if let Err(error) = stop.call0(py) {
                    tracing::warn!(%error, "QGIS could not be asked to stop");
                }
            });
        }));
    }

    /// Takes a part of the answer. Blocks while the client is slow; raises when
    /// nobody waits for the answer any more.
    fn part(
        &self,
        py: Python<'_>,
        status: u16,
        headers: &Bound<'_, PyDict>,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let wanted = self.wanted();
        if self.wants_head() {
            let head = head(status, headers)?;
            self.state().head = Some(head);
        }
        self.collect(py, &PyBuffer::get(data)?)?;
        while let Some((head, chunk)) = self.take(wanted) {
            // Other threads may need Python or our state while the client is slow.
            let sent = py.detach(|| self.outlet.part(head, chunk));
            self.state().sent = true;
            if sent == Err(Unwanted) {
                return Err(PyRuntimeError::new_err("the request was cancelled"));
            }
        }
        Ok(())
    }
}

/// In what QGIS logs when it has no memory for an image.
const STARVED: &str = "out of memory";

/// `log(level, tag, text)`: what QGIS, Qt and plugins say, as our log lines.
#[pyclass(frozen)]
struct Log {
    current: Arc<Mutex<Option<Current>>>,
    /// QGIS said that it lacks memory.
    starved: Arc<AtomicBool>,
    qgis_info: bool,
}

/// Which request is served.
#[derive(Debug, Clone)]
struct Current {
    request_id: String,
    trace_id: Option<String>,
}

/// QGIS may speak on threads of its own, which are in no span; so the line has no
/// span at all, and says itself what it belongs to.
macro_rules! said {
    ($level:ident, $current:expr, $tag:expr, $text:expr) => {
        tracing::$level!(
            target: "qgisserver::qgis",
            parent: None,
            request_id = $current.as_ref().map(|it| it.request_id.as_str()),
            trace_id = $current.as_ref().and_then(|it| it.trace_id.as_deref()),
            tag = $tag,
            "{}",
            $text
        )
    };
}

#[pymethods]
impl Log {
    fn __call__(&self, level: &str, tag: &str, text: &str) {
        if level == "error" && text.contains(STARVED) {
            self.starved.store(true, Ordering::Relaxed);
        }
        let current = self.current.lock().map_or(None, |current| current.clone());
        match level {
            "error" => said!(error, current, tag, text),
            "warning" => said!(warn, current, tag, text),
            "info" if self.qgis_info => said!(info, current, tag, text),
            _ => said!(debug, current, tag, text),
        }
    }
}

/// Without GDAL, as in a test, nobody speaks.
fn listen_to_gdal(py: Python<'_>, log: Log) {
    let core = py.import("qgis._core");
    let file = core.and_then(|core| core.getattr("__file__")?.extract::<PathBuf>());
    let say = move |level: &str, text: &str| log.__call__(level, "GDAL", text);
    if !file.is_ok_and(|file| gdal::listen(&file, Box::new(say))) {
        tracing::debug!("GDAL was not found: what it says goes to standard error");
    }
}

/// Whether an URL has a SERVICE.
fn names_service(url: &str) -> bool {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let mut keys = query.split('&').filter_map(|pair| pair.split('=').next());
    keys.any(|key| key.eq_ignore_ascii_case("SERVICE"))
}

/// The host of an URL without its port and brackets.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pyo3::exceptions::PyValueError;

    #[test]
    fn an_image_without_its_end_is_no_image() {
        let cut_off = |kind: &str, bytes: &[u8]| {
            let headers = vec![("Content-Type".into(), kind.into())];
            let head = Head {
                status: 200,
                headers,
                ..Head::default()
            };
            is_cut_off(&head, bytes)
        };
        for (kind, whole) in [
            ("image/png", &b"..IEND\xaeB`\x82"[..]),
            ("image/png; mode=8bit", b"..IEND\xaeB`\x82"),
            ("image/jpeg", b"..\xff\xd9"),
            ("image/svg+xml", b"."),
        ] {
            assert!(!cut_off(kind, whole), "{kind}");
            assert!(cut_off(kind, b""), "{kind}");
        }
        assert!(cut_off("image/png", b"\x89PNG..."));
        let (png, jpeg) = (b"\x89PNG..IEND\xaeB`\x82", b"\xff\xd8\xff..\xff\xd9");
        for kind in ["image/png", "image/jpeg", "image/webp"] {
            assert!(!cut_off(kind, png) && !cut_off(kind, jpeg), "{kind}");
            assert!(
                cut_off(kind, &png[..9]) && cut_off(kind, &jpeg[..5]),
                "{kind}"
            );
        }
        assert!(!cut_off("application/x-mixed", &png[..9]));
        assert!(!cut_off("text/xml", b""));
    }

    #[test]
    fn the_host_of_an_url_has_no_port() {
        assert_eq!(host("http://example.org:8080/ows/?MAP=a:b"), "example.org");
        assert_eq!(host("https://[2001:db8::1]:8080/"), "2001:db8::1");
        assert_eq!(host("http://localhost?SERVICE=WMS"), "localhost");
        assert_eq!(host(""), "");
    }

    #[test]
    fn an_exception_of_c_plus_plus_is_one_whoever_waits_and_whatever_ran() {
        pyo3::Python::initialize();
        Python::attach(|py| {
            let memory = PyMemoryError::new_err(());
            let bare = PyException::new_err("unknown");
            let plain = PyValueError::new_err("a plugin's");
            let source = Source::File("x".into());
            for error in [&memory, &bare] {
                assert_eq!(escaped(py, error, false), Failure::QgisFailed);
                assert_eq!(escaped(py, error, true), Failure::QgisFailed);
                assert_eq!(unloaded(py, &source, error), Failure::QgisFailed);
            }
            assert_eq!(escaped(py, &plain, false), Failure::PluginRaised);
            assert_eq!(escaped(py, &plain, true), Failure::Cancelled);
            assert_eq!(unloaded(py, &source, &plain), Failure::PluginRaised);
        });
    }
}
