//! Projects that are found by the operator's names for places, and projects that are
//! kept in PostgreSQL, GeoPackages, S3 and by handlers, with real servers.

mod common;
#[path = "storage/objects.rs"]
mod objects;
#[path = "storage/postgres.rs"]
mod postgres;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use common::process::succeed;
use common::{Pool, Reply, Server, World, eventually, source};
use nix::sys::signal::Signal;
use objects::Objects;
use postgres::Postgres;

fn capabilities(server: &Server, map: &str) -> Reply {
    server.get(&format!(
        "/ows/?MAP={map}&SERVICE=WMS&REQUEST=GetCapabilities"
    ))
}

fn has_title(server: &Server, map: &str, title: &str) {
    let reply = capabilities(server, map);
    assert_eq!(reply.status, 200, "{map}: {}", reply.text());
    let expected = format!("<Title>{title}</Title>");
    assert!(reply.text().contains(&expected), "{map}: {}", reply.text());
}

fn status(server: &Server, map: &str) -> u16 {
    capabilities(server, map).status
}

/// What lies at a point of the layer `places`.
fn feature_at(server: &Server, map: &str, bbox: &str) -> String {
    let reply = server.get(&format!(
        "/ows/?MAP={map}&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetFeatureInfo&LAYERS=places&QUERY_LAYERS=places\
         &CRS=EPSG:4326&BBOX={bbox}&WIDTH=100&HEIGHT=100&I=50&J=50&INFO_FORMAT=application/json"
    ));
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.text()
}

fn nothing_told(server: &Server, secret: &str) {
    let log = server.process.log.text();
    assert!(!log.contains(secret), "{log}");
}

fn with_database(postgres: &Postgres, settings: &str) -> Server {
    // The database writes times in UTC, wherever the server is.
    let world = World::real()
        .with("PGSERVICEFILE", &postgres.service_file())
        .with("TZ", Path::new("Asia/Tokyo"));
    let settings = format!(
        "projects.cache.allow_storage_schemes = file,postgresql
         projects.schemes.pg = postgresql:///?service=maps&dbname=gis&schema=maps
         projects.storage.timeout = 5
         {settings}"
    );
    Server::start(world, &settings).ready()
}

#[test]
fn a_project_in_postgresql_is_served_until_it_is_saved_again_or_deleted() {
    let postgres = Postgres::start();
    postgres.save("city", "First");
    let port = postgres.address.port();
    let password = postgres::PASSWORD;
    let server = with_database(
        &postgres,
        &format!(
            "projects.schemes.direct = postgresql://maps:{password}@127.0.0.1:{port}/?dbname=gis&schema=maps
             projects.search_paths./db/{{schema}} = postgresql:///?service=maps&dbname=gis&schema={{schema}}"
        ),
    );
    for map in [
        "pg:city",
        "pg:?project=city",
        "PG:/city",
        "direct:city",
        "db/maps/city",
    ] {
        has_title(&server, map, "First");
    }
    let here = feature_at(&server, "pg:city", "46,6,48,8");
    assert!(here.contains("\"Here\""), "{here}");

    // One copy for all of these names, and a new one at once.
    postgres.save("city", "Second");
    has_title(&server, "pg:city", "Second");
    has_title(&server, "db/maps/city", "Second");
    postgres.save("city", "Third");
    has_title(&server, "pg:city", "Third");
    let reply = capabilities(&server, "pg:city");
    let date = reply
        .header("last-modified")
        .expect("it was saved just now");
    let age = httpdate::parse_http_date(date).unwrap().elapsed().unwrap();
    assert!(age < Duration::from_secs(600), "{date}");

    let absent = capabilities(&server, "pg:town");
    for map in [
        "postgresql:city",
        "postgresql:?service=maps%26project=city",
        "postgresql://127.0.0.1/?dbname=gis%26project=city",
        "pg:city?host=127.0.0.1",
        "pg:city?schema=public",
        "pg:city'%20OR%20'1'='1",
        "db/public/city",
        "db/no%22schema/city",
        "direct:",
        "service=maps",
    ] {
        let reply = capabilities(&server, map);
        assert_eq!(reply.status, absent.status, "{map}: {}", reply.text());
    }
    assert_eq!(absent.status, 404);
    postgres.sql("gis", "UPDATE maps.qgis_projects SET content = 'nonsense'");
    assert_eq!(status(&server, "direct:city"), 422);
    server.process.log.wait_line("QGIS cannot read it");
    postgres.sql("gis", "DELETE FROM maps.qgis_projects");
    assert_eq!(status(&server, "pg:city"), 404);
    postgres.save("city", "Again");
    has_title(&server, "pg:city", "Again");
    nothing_told(&server, password);
}

#[test]
fn a_database_that_is_away_is_a_503_in_time_and_a_project_is_back_with_it() {
    let mut postgres = Postgres::start();
    postgres.save("city", "City");
    let server = with_database(&postgres, "projects.cache.broken_seconds = 0.1");
    has_title(&server, "pg:city", "City");
    postgres.stop();
    let reply = capabilities(&server, "pg:city");
    assert_eq!(reply.status, 503, "{}", reply.text());
    assert!(reply.header("retry-after").is_some());
    server.process.log.wait_line("does not answer");
    // Others have nothing to do with it.
    assert_eq!(status(&server, "world"), 200);
    postgres.resume();
    eventually("the project is back", || {
        (status(&server, "pg:city") == 200).then_some(())
    });
    // Its connection was cut behind its back.
    postgres.stop();
    postgres.resume();
    has_title(&server, "pg:city", "City");

    // Silent, and not gone: a new connection would wait for ever.
    postgres.stop();
    assert_eq!(status(&server, "pg:city"), 503);
    postgres.resume();
    postgres.freeze();
    eventually("a silent database is found out", || {
        let start = Instant::now();
        assert_eq!(status(&server, "pg:city"), 503);
        let waited = start.elapsed();
        assert!(waited < Duration::from_secs(30), "{waited:?}");
        (server.process.log.count("no answer within 5 s") > 0).then_some(())
    });
    nothing_told(&server, postgres::PASSWORD);
}

/// What the catalogue of QGIS shows of a database it leads to, and to nothing else there.
#[test]
fn the_catalogue_leads_to_projects_in_postgresql() {
    let mut postgres = Postgres::start();
    postgres.save("city", "City");
    let variable = "QGIS_SERVER_LANDING_PAGE_PROJECTS";
    let catalogue = format!(
        "api.enabled.landing_page = yes
         api:landing_page.{variable}_DIRECTORIES = /nowhere
         api:landing_page.{variable}_PG_CONNECTIONS = postgresql://?service=maps&dbname=gis&schema=maps"
    );
    let server = with_database(&postgres, &catalogue);
    let index = server.get("/catalog/index.json").json();
    let id = index["projects"][0]["id"].as_str().expect("a project");
    let status = |server: &Server, id: &str| {
        let path = format!("/catalog/project/{id}/?SERVICE=WMS&REQUEST=GetCapabilities");
        server.get(&path).status
    };
    assert_eq!(
        (index["projects_count"].as_u64(), status(&server, id)),
        (Some(1), 200)
    );
    assert_eq!(status(&server, &"0".repeat(32)), 404);
    let without = format!("{catalogue}\nprojects.cache.allow_storage_schemes = file");
    let without = with_database(&postgres, &without);
    assert_eq!(status(&without, id), 404);
    postgres.sql("gis", "DELETE FROM maps.qgis_projects");
    eventually("the project is gone", || {
        (status(&server, id) == 404).then_some(())
    });
    postgres.stop();
    assert_eq!(status(&server, &"0".repeat(32)), 503);
    nothing_told(&server, postgres::PASSWORD);
}

#[test]
fn what_is_not_allowed_is_not_asked() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    listener.set_nonblocking(true).unwrap();
    let server = Server::real(&format!(
        "projects.schemes.pg = postgresql://127.0.0.1:{port}/?dbname=gis
         projects.schemes.s3 = s3://maps/
         projects.s3.endpoint = http://127.0.0.1:{port}"
    ));
    server
        .process
        .log
        .wait_line("projects.schemes.pg leads to postgresql");
    for map in [
        "pg:city".to_owned(),
        "s3:city".to_owned(),
        format!("postgresql://127.0.0.1:{port}/?dbname=gis%26project=city"),
        format!("http://127.0.0.1:{port}/city.qgs"),
    ] {
        assert_eq!(status(&server, &map), 404, "{map}");
    }
    assert!(listener.accept().is_err(), "somebody was asked");
}

/// What the example projects show.
const DATA: &[&str] = &[
    "data/coast_distance.tif",
    "data/countries.fgb",
    "data/land.fgb",
    "data/places.gpkg",
];

fn in_s3(objects: &Objects, secret: &str) -> String {
    format!(
        "projects.cache.allow_storage_schemes = file,s3
         projects.schemes.s3 = s3://maps/public/
         projects.s3.endpoint = http://{}
         projects.s3.access_key_id = {}
         projects.s3.secret_access_key = {secret}
         projects.storage.timeout = 5
         projects.cache.broken_seconds = 0.1",
        objects.address,
        objects::KEY
    )
}

fn picture(server: &Server, map: &str, layers: &str) -> Vec<u8> {
    let reply = server.get(&format!(
        "/ows/?MAP={map}&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS={layers}&STYLES=\
         &CRS=EPSG:4326&BBOX=-90,-180,90,180&WIDTH=300&HEIGHT=150&FORMAT=image/png"
    ));
    assert_eq!(reply.status, 200, "{map}: {}", reply.text());
    reply.body
}

#[test]
fn a_project_in_s3_is_served_with_the_data_beside_it() {
    let mut objects = Objects::start();
    let examples = source("examples/projects");
    for name in ["world.qgs", "atlas.qgz"].iter().chain(DATA) {
        objects.put(&format!("public/{name}"), &examples.join(name));
    }
    let server = Server::real(&in_s3(&objects, objects::SECRET));
    for map in ["s3:world", "s3:world.qgs"] {
        has_title(&server, map, "World");
    }
    assert_eq!(status(&server, "s3:atlas"), 200);
    assert_eq!(status(&server, "s3:absent"), 404);
    assert_eq!(copies_below(server.process.tmp()), Vec::<PathBuf>::new());
    assert!(
        picture(&server, "s3:world", "world") == picture(&server, "world", "world"),
        "the same project draws another map"
    );

    let text = std::fs::read_to_string(examples.join("world.qgs")).unwrap();
    let changed = text.replace(">World<", ">Orbis terrarum<");
    std::fs::write(objects.path("public/world.qgs"), changed).unwrap();
    has_title(&server, "s3:world", "Orbis terrarum");
    std::fs::remove_file(objects.path("public/world.qgs")).unwrap();
    assert_eq!(status(&server, "s3:world"), 404);
    objects.put("public/world.qgs", &examples.join("world.qgs"));
    has_title(&server, "s3:world", "World");

    let stranger = Server::real(&in_s3(&objects, "wrong"));
    assert_eq!(status(&stranger, "s3:world"), 404);
    stranger.process.log.wait_line("S3 refuses");

    objects.stop();
    let reply = capabilities(&server, "s3:world");
    assert_eq!(reply.status, 503, "{}", reply.text());
    server.process.log.wait_line("does not answer");
    objects.resume();
    eventually("the project is back", || {
        (status(&server, "s3:world") == 200).then_some(())
    });
    nothing_told(&server, objects::SECRET);
    nothing_told(&server, "X-Amz-Signature");
}

/// Labels that were moved by hand, and pictures that the project brings along.
#[test]
fn what_qgis_keeps_beside_a_project_counts_in_s3_as_in_a_folder() {
    let objects = Objects::start();
    let server = Server::real(&in_s3(&objects, objects::SECRET));
    let folder = server.world.projects();
    let files = ["world.qgs", "annotated.qgs"].map(|name| folder.join(name));
    succeed(Command::new(source("tests/data/make_annotated.py")).args(files));
    let put = |name: &str| objects.put(&format!("public/{name}"), &folder.join(name));
    DATA.iter().for_each(|name| put(name));
    put("annotated.qgs");
    let drawn = |map: &str| picture(&server, map, "countries,places");
    let dated = || {
        let reply = server.get("/wfs3/collections?MAP=s3:annotated");
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.header("last-modified").is_some()
    };

    let whole = drawn("annotated");
    let companions = ["annotated.qgd", "annotated_attachments.zip"];
    let mut before = drawn("s3:annotated");
    assert!(dated());
    for name in companions {
        put(name);
        let now = drawn("s3:annotated");
        assert!(now != before, "{name} shows");
        before = now;
        assert!(!dated(), "of several objects an older one may come back");
    }
    assert!(before == whole, "the same project draws another map");
    for name in companions {
        std::fs::remove_file(objects.path(&format!("public/{name}"))).unwrap();
        std::fs::remove_file(folder.join(name)).unwrap();
        let now = drawn("s3:annotated");
        assert!(now != before && now == drawn("annotated"), "{name} is gone");
        before = now;
    }
    assert_eq!(copies_below(server.process.tmp()), Vec::<PathBuf>::new());
}

/// Files in the folders for copies of projects.
fn copies_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .flat_map(|path| match path.is_dir() && !path.is_symlink() {
            true => copies_below(&path),
            false => vec![path],
        })
        .filter(|path| path.components().any(|part| part.as_os_str() == "copies"))
        .collect()
}

#[test]
fn times_are_read_as_each_storage_writes_them() {
    let script = "
from datetime import timezone
from qgisserver.storages import _seconds
for text in ('2024-03-01 12:00:00', '2024-03-01 12:00:00.1', '2024-03-01T12:00:00.98765',
             '2024-03-01 12:00:00.1234567', '2024-03-01 14:00:00+02:00'):
    assert _seconds(text, timezone.utc) == 1709294400, text
assert _seconds('2024-03-01T21:00:00') == 1709294400, 'QGIS writes local time into a GeoPackage'
assert _seconds('') == _seconds('yesterday') == 0
";
    let done = Command::new("/usr/bin/python3")
        .args(["-c", script])
        .env("PYTHONPATH", source("python"))
        .env("TZ", "Asia/Tokyo")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{told}");
}

fn save(target: &str, title: &str, places: &Path) {
    let layer = format!("{}|layername=places", places.display());
    let mut command = Command::new("/usr/bin/python3");
    command
        .arg(source("tests/data/save.py"))
        .args([target, title, "ogr", &layer]);
    succeed(&mut command);
}

#[test]
fn a_project_in_a_geopackage_is_served_from_below_the_root_alone() {
    let world = World::real();
    let package = world.projects().join("data/places.gpkg");
    let target = format!("geopackage:{}?projectName=city", package.display());
    save(&target, "First", &package);
    let outside = world.path("outside.gpkg");
    std::fs::copy(&package, &outside).unwrap();
    let settings = format!(
        "projects.cache.allow_storage_schemes = file,geopackage
         projects.schemes.maps = geopackage://{}?projectName={{path}}",
        package.display()
    );
    let server = Server::start(world, &settings).ready();
    let name = "geopackage:data/places.gpkg?projectName=city";
    has_title(&server, name, "First");
    has_title(&server, "maps:city", "First");
    for map in [
        "geopackage:data/places.gpkg?projectName=town".to_owned(),
        "geopackage:data/places.gpkg".to_owned(),
        "geopackage:../outside.gpkg?projectName=city".to_owned(),
        format!("geopackage:{}?projectName=city", outside.display()),
        "maps:town".to_owned(),
    ] {
        assert_eq!(status(&server, &map), 404, "{map}");
    }
    save(&target, "Second", &package);
    has_title(&server, "maps:city", "Second");
}

#[test]
fn handlers_that_were_written_for_other_servers_find_and_read_projects() {
    let world = World::real()
        .with("PYTHONPATH", &source("tests/data/handlers"))
        .with("PYTHONDONTWRITEBYTECODE", Path::new("1"));
    let projects = world.projects();
    let server = Server::start(
        world,
        &format!(
            "projects.cache.allow_storage_schemes = *
             projects.schemes.mine = shelf:///second/
             projects.handlers.drawer.handler = qjazz_style.Drawer
             projects.handlers.drawer.config.folder = {0}
             projects.handlers.drawer.config.depth = 1
             projects.handlers.drawer.config.locked = no
             projects.handlers.plain.handler = qjazz_style.Plain
             projects.handlers.typo.handler = qjazz_style.Drawer
             projects.handlers.typo.config.foldre = {0}
             projects.handlers.absent.handler = no_such_module.Handler
             api:x.SHELF = {0}",
            projects.display()
        ),
    )
    .ready();
    server.process.log.wait_line("no_such_module");
    let refused = server.process.log.wait_line("qjazz_style.Drawer for typo");
    assert!(refused.contains("does not load"), "{refused}");
    // By entry point and contract id, as py-qgis-server finds them.
    has_title(&server, "shelf:first/world", "World");
    has_title(&server, "mine:world", "World");
    has_title(&server, "drawer:world", "World");
    for map in [
        "shelf:first/none",
        "drawer:none",
        "shelf:first/world%23x",
        "drawer:wor%0Ald",
        "absent:world",
        "plain:world",
        "typo:world",
        "nobody:world",
    ] {
        assert_eq!(status(&server, map), 404, "{map}");
    }
    assert_eq!(status(&server, "shelf:first/broken"), 422);
    assert_eq!(status(&server, "shelf:away/world"), 503);
    assert_eq!(status(&server, "drawer:raise"), 500);
    has_title(&server, "drawer:world", "World");
    let loaded = |n: usize| {
        server
            .process
            .log
            .assert_count("project=drawer:saved ms=", n)
    };
    let text = std::fs::read_to_string(projects.join("world.qgs")).unwrap();
    std::fs::write(projects.join("saved.qgs"), &text).unwrap();
    let later = std::fs::File::create(projects.join("saved.later")).unwrap();
    (&later)
        .write_all(text.replace(">World<", ">Saved<").as_bytes())
        .unwrap();
    later.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    // What came is not what was looked for: one more, and then it is known what it is.
    has_title(&server, "drawer:saved", "Saved");
    loaded(2);
    has_title(&server, "drawer:saved", "Saved");
    loaded(2);
    std::fs::remove_file(projects.join("world.qgs")).unwrap();
    assert_eq!(status(&server, "drawer:world"), 404);
}

#[test]
fn schemes_and_search_paths_lead_to_folders_and_not_out_of_them() {
    let world = World::stub();
    let home = world.path("home");
    std::fs::create_dir_all(home.join("ann/roads")).unwrap();
    std::fs::create_dir_all(world.path("public/sub")).unwrap();
    std::fs::write(home.join("ann/roads/map.qgs"), "<qgis/>").unwrap();
    std::fs::write(world.path("public/sub/park.qgz"), "<qgis/>").unwrap();
    std::os::unix::fs::symlink(&home, world.path("public/home")).unwrap();
    std::fs::create_dir(world.projects().join("parks")).unwrap();
    std::fs::write(world.projects().join("parks/city.qgs"), "<qgis/>").unwrap();
    let root = world.projects().display().to_string();
    let (home, public) = (
        home.display().to_string(),
        world.path("public").display().to_string(),
    );
    let server = Server::start(
        world,
        &format!(
            "projects.schemes.open = file://{public}/
             projects.schemes.test = {root}/
             projects.schemes.foo = file:parks/
             projects.schemes.theme = {home}/ann/{{path}}/map.qgs
             projects.search_paths./home/{{user}}/{{theme}} = {home}/{{user}}/{{theme}}
             projects.search_paths./p = {public}"
        ),
    )
    .ready();
    let get = |map: &str| server.get(&format!("/ows/?MAP={map}&SERVICE=WMS&REQUEST=GetMap"));
    for map in [
        "open:sub/park",
        "open:/sub/../sub/park",
        "theme:roads",
        "home/ann/roads/map",
        "/home/ann/roads/map.qgs",
        "p/sub/park",
        "city",
        "test:city.qgs",
        "foo:city",
    ] {
        let expected = if map.contains("..") { 404 } else { 200 };
        assert_eq!(get(map).status, expected, "{map}");
    }
    let absent = get("absent");
    assert_eq!(absent.status, 404);
    for map in [
        "open:home/ann/roads/map",
        "p/home/ann/roads/map",
        "p/../home/ann/roads/map",
        "theme:../ann/roads",
        "theme:absent",
        "open:city",
        "unknown:city",
        &format!("{home}/ann/roads/map.qgs"),
    ] {
        let reply = get(map);
        let same = reply.text().replace(map, "absent");
        assert_eq!((reply.status, same), (404, absent.text()), "{map}");
    }
}

#[test]
fn a_reload_brings_new_schemes() {
    let world = World::stub();
    let file = world.path("q.conf");
    std::fs::write(&file, "").unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_qgisserver"));
    let server = Server::start_from(world, program, &file, "").ready();
    let get = || {
        server
            .get("/ows/?MAP=new:city&SERVICE=WMS&REQUEST=GetMap")
            .status
    };
    assert_eq!(get(), 404);
    let projects = server.world.projects();
    let scheme = format!("[projects.schemes]\nnew = file://{}/\n", projects.display());
    std::fs::write(&file, scheme).unwrap();
    server.signal(Signal::SIGHUP);
    eventually("the scheme is known", || (get() == 200).then_some(()));
}

#[test]
fn a_pool_of_another_machine_has_schemes_of_its_own() {
    let world = World::stub();
    let own = format!(
        "projects.schemes.own = file://{}/",
        world.projects().display()
    );
    let server = Server::proxy(world, "");
    let gate = server.gate.unwrap();
    let _pool = Pool::start(&server.world, gate, &format!("server.workers = 1\n{own}"));
    server.wait_workers(1);
    let get = |map: &str| {
        server
            .get(&format!("/ows/?MAP={map}&SERVICE=WMS&REQUEST=GetMap"))
            .status
    };
    assert_eq!((get("own:city"), get("other:city")), (200, 404));
}

/// In the words of Python: a link leads the passwords to a file of whoever made it.
#[test]
fn passwords_go_into_no_file_that_somebody_made_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pgpass");
    let tell = || {
        let mut python = Command::new("/usr/bin/python3");
        let paths = format!(
            "{}:{}",
            source("python").display(),
            source("tests/stub").display()
        );
        python.env("PYTHONPATH", paths).env("TMPDIR", folder.path());
        python.env("PYTHONDONTWRITEBYTECODE", "1");
        python.env("PGPASSFILE", folder.path().join("absent"));
        let code = "from qgisserver import storages; storages._tell_libpq(['db:5432:*:me:hush'])";
        python.args(["-c", code]).output().unwrap()
    };
    let told = tell();
    assert!(
        told.status.success(),
        "{}",
        String::from_utf8_lossy(&told.stderr)
    );
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        "db:5432:*:me:hush\n"
    );
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );

    std::fs::write(&path, "").unwrap();
    assert!(String::from_utf8_lossy(&tell().stderr).contains("FileExistsError"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(folder.path().join("elsewhere"), &path).unwrap();
    assert!(!tell().status.success());
    assert!(!folder.path().join("elsewhere").exists());
}

#[test]
fn passwords_of_storages_are_not_printed() {
    let hush = [
        "projects.schemes.pg=postgresql://me:hush@db/?dbname=gis",
        "projects.search_paths./x=own://db/?dbname=gis&password=hush",
        "projects.s3.access_key_id=me",
        "projects.s3.secret_access_key=hush",
        "projects.handlers.own.config.password=hush",
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_qgisserver"));
    command.args(["--rootdir", "/tmp", "--print-config"]);
    hush.iter().for_each(|set| {
        command.args(["--set", set]);
    });
    let printed = command.output().unwrap();
    let text = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(
        printed.status.success() && text.contains("projects.schemes.pg = postgresql://me:***@db/"),
        "{text}"
    );
    assert!(!text.contains("hush"), "{text}");
}
