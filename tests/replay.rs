//! Where QGIS's own tests come from: apt, which may have nothing, be away or bring rubbish.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A folder for `tests/replay/replay.py` to keep sources in, and an apt that obeys.
struct Shop {
    folder: TempDir,
}

impl Shop {
    /// With the source of QGIS 1:3.1+x-1 on the shelf, and that version installed.
    fn open() -> Self {
        let shop = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir_all(shop.path("bin")).unwrap();
        std::fs::create_dir_all(shop.path("qgis-3.1/tests/src/python")).unwrap();
        std::fs::create_dir_all(shop.path("qgis-3.1/tests/testdata")).unwrap();
        std::fs::write(shop.path("qgis-3.1/tests/src/python/x.py"), "").unwrap();
        std::fs::write(shop.path("qgis-3.1/tests/testdata/x"), "").unwrap();
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(shop.folder.path()).arg("-cf");
        let made = tar.arg(shop.archive()).arg("qgis-3.1").status().unwrap();
        assert!(made.success());
        shop.does("dpkg-query", "printf 1:3.1+x-1");
        shop.does(
            "apt-cache",
            "printf 'Package: qgis\\nVersion: 1:3.1+x-1\\n\\n'",
        );
        let archive = shop.archive().display().to_string();
        shop.does(
            "apt-get",
            &format!(
                "case \"$*\" in *Acquire::http::Timeout=20*Acquire::Retries=1*) ;; *) exit 9;; esac
                 case \"$*\" in *' source '*qgis=1:3.1+x-1) cp '{archive}' .;; esac"
            ),
        );
        shop
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn archive(&self) -> PathBuf {
        self.path("qgis_3.1+x.orig.tar.xz")
    }

    fn does(&self, program: &str, what: &str) {
        let (path, text) = (self.path("bin").join(program), self.path("text"));
        std::fs::write(&text, format!("#!/bin/sh\nset -e\n{what}\n")).unwrap();
        std::fs::set_permissions(&text, PermissionsExt::from_mode(0o755)).unwrap();
        // Written here, it could not be run as long as a child of another test has it open.
        let copied = Command::new("cp").args([text, path]).status();
        assert!(copied.unwrap().success());
    }

    /// Asks for a module that no QGIS has.
    fn replay(&self, within: &str) -> Output {
        let path = std::env::var("PATH").unwrap();
        Command::new(Path::new(ROOT).join("tests/replay/replay.py"))
            .args(["no_such_module", "--within", within, "--cache"])
            .arg(self.path("cache"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .output()
            .unwrap()
    }

    fn ends(&self, status: i32, why: &str) {
        self.ends_within("600", status, why);
    }

    fn ends_within(&self, seconds: &str, status: i32, why: &str) {
        let output = self.replay(seconds);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.contains(why), "{said}");
    }

    fn folders(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("cache")).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names
            .filter(|name| name.starts_with("qgis-") || name.starts_with("unpacking"))
            .collect();
        names.sort();
        names
    }
}

/// Which has all that a version of Debian may have.
#[test]
fn the_source_of_the_installed_version_is_unpacked_once() {
    let shop = Shop::open();
    shop.ends(1, "qgis-1-3.1-x-1/tests/src/python");
    assert_eq!(shop.folders(), ["qgis-1-3.1-x-1"]);
    shop.does("apt-get", "exit 1");
    shop.ends(1, "qgis-1-3.1-x-1/tests/src/python");
}

#[test]
fn an_apt_that_has_no_source_is_no_failed_test() {
    let shop = Shop::open();
    shop.does("apt-cache", "printf 'Package: qgis\\nVersion: 3.2-1\\n\\n'");
    shop.ends(75, "apt does not have that of QGIS 1:3.1+x-1");
    shop.does("apt-get", "exit 100");
    shop.ends(75, "update: status 100");
    shop.does("dpkg-query", "exit 1");
    shop.ends(75, "which QGIS is installed?");
}

/// Half a minute of it is for the server to end.
#[test]
fn an_apt_that_hangs_is_not_waited_for() {
    let shop = Shop::open();
    shop.does("apt-get", "exec sleep 100");
    let start = Instant::now();
    shop.ends_within("31", 75, "update: it did not end in time");
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_damaged_archive_is_an_error_and_the_next_one_may_be_whole() {
    let shop = Shop::open();
    let whole = std::fs::read(shop.archive()).unwrap();
    std::fs::write(shop.archive(), &whole[..whole.len() / 3]).unwrap();
    shop.ends(1, "cannot be unpacked");
    assert_eq!(shop.folders(), Vec::<String>::new());
    std::fs::write(shop.archive(), &whole).unwrap();
    shop.ends(1, "qgis-1-3.1-x-1/tests/src/python");
}

#[test]
fn what_is_left_of_an_interrupted_run_is_not_taken_for_a_source() {
    let shop = Shop::open();
    std::fs::create_dir_all(shop.path("cache/unpackingx/qgis-3.1")).unwrap();
    std::fs::create_dir_all(shop.path("cache/qgis-3.1")).unwrap();
    shop.ends(1, "qgis-1-3.1-x-1/tests/src/python");
    assert!(
        shop.path("cache/qgis-1-3.1-x-1/tests/src/python/x.py")
            .exists()
    );
    assert!(!shop.path("cache/unpackingx").exists());
}

#[test]
fn two_archives_are_an_error() {
    let shop = Shop::open();
    std::fs::create_dir_all(shop.path("cache")).unwrap();
    std::fs::write(shop.path("cache/qgis_3.1+x.orig.tar.bz2"), "").unwrap();
    shop.ends(1, "not one archive");
}
