//! A PostgreSQL of the test's own, with PostGIS and a schema for projects.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use nix::unistd::{Uid, User, chown};
use tempfile::TempDir;

use crate::common::process::succeed;
use crate::common::{eventually, free_address, kill, source};

pub const PASSWORD: &str = "hush-hush";

pub struct Postgres {
    folder: TempDir,
    pub address: SocketAddr,
    server: Option<Child>,
}

impl Postgres {
    /// One point at 7° E, 47° N in the table `places` of the schema `maps`.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut postgres = Self {
            folder,
            address: free_address(),
            server: None,
        };
        postgres.create();
        postgres.resume();
        postgres.sql("postgres", "CREATE DATABASE gis");
        postgres.sql(
            "gis",
            "CREATE EXTENSION postgis; CREATE SCHEMA maps;
             CREATE TABLE maps.places (id serial PRIMARY KEY, name text, geom geometry(Point, 4326));
             INSERT INTO maps.places (name, geom) VALUES ('Here', ST_SetSRID(ST_MakePoint(7, 47), 4326))",
        );
        postgres
    }

    fn create(&self) {
        use std::os::unix::fs::PermissionsExt;
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(self.folder.path(), open).unwrap();
        let password = self.path("password");
        std::fs::write(&password, PASSWORD).unwrap();
        if let Some(user) = stranger() {
            for path in [self.folder.path(), &password] {
                chown(path, Some(user.uid), Some(user.gid)).unwrap();
            }
        }
        let mut command = self.command("initdb");
        command.args([
            "-U",
            "maps",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "-N",
        ]);
        succeed(command.arg("--pwfile").arg(password).arg(self.path("data")));
        let service = format!(
            "[maps]\nhost=127.0.0.1\nport={}\nuser=maps\npassword={PASSWORD}\ndbname=gis\n",
            self.address.port()
        );
        std::fs::write(self.service_file(), service).unwrap();
    }

    /// Starts it, after a pause too.
    pub fn resume(&mut self) {
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(self.path("data"))
            .arg("-k")
            .arg(self.folder.path());
        command.args([
            "-h",
            "127.0.0.1",
            "-F",
            "-p",
            &self.address.port().to_string(),
        ]);
        self.server = Some(
            command
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        eventually("PostgreSQL answers", || {
            self.try_sql("postgres", "SELECT 1").then_some(())
        });
    }

    /// Ends it, and every connection to it.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            self.signal_to(&server, Signal::SIGCONT);
            self.signal_to(&server, Signal::SIGQUIT);
            server.wait().unwrap();
        }
    }

    /// It accepts no connection any more, and refuses none.
    pub fn freeze(&self) {
        self.signal_to(self.server.as_ref().unwrap(), Signal::SIGSTOP);
    }

    fn signal_to(&self, server: &Child, signal: Signal) {
        kill(server.id() as i32, signal);
    }

    pub fn sql(&self, database: &str, text: &str) {
        assert!(self.try_sql(database, text), "{text}");
    }

    fn try_sql(&self, database: &str, text: &str) -> bool {
        let mut command = self.command("psql");
        command.args([
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            "127.0.0.1",
            "-U",
            "maps",
        ]);
        command.args([
            "-p",
            &self.address.port().to_string(),
            "-d",
            database,
            "-c",
            text,
        ]);
        command
            .env("PGPASSWORD", PASSWORD)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().unwrap().success()
    }

    /// Saves a project as QGIS Desktop does, with the table as its layer.
    pub fn save(&self, name: &str, title: &str) {
        let target = format!("postgresql://?service=maps&dbname=gis&schema=maps&project={name}");
        let layer = r#"service='maps' key='id' srid=4326 type=Point table="maps"."places" (geom)"#;
        let mut command = Command::new("/usr/bin/python3");
        command
            .arg(source("tests/data/save.py"))
            .args([&target, title, "postgres", layer]);
        succeed(command.env("PGSERVICEFILE", self.service_file()));
    }

    /// The operator's connection, as libpq reads it.
    pub fn service_file(&self) -> PathBuf {
        self.path("pg_service.conf")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// PostgreSQL does not run as root.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(programs().join(name));
        command.current_dir("/").env("LC_ALL", "C.UTF-8");
        if let Some(user) = stranger() {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The user that Debian's package makes, if we are root.
fn stranger() -> Option<User> {
    let user = || {
        User::from_name("postgres")
            .unwrap()
            .expect("the package makes a user")
    };
    Uid::effective().is_root().then(user)
}

/// Debian has a folder for each version.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL is installed: make test does that");
    let folders = versions.flatten().map(|entry| entry.path().join("bin"));
    let found = folders
        .filter(|folder| Path::exists(&folder.join("postgres")))
        .max();
    found.expect("PostgreSQL is installed: make test does that")
}
