//! What comes over HTTP is what QgsServer answers in-process: status, headers
//! and body, for every service of the example projects.

mod common;
#[path = "real/compare.rs"]
mod compare;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use common::process::{n_threads, open_files, parent};
use common::{Reply, Server, World, source};
use compare::assert_same;
use serde_json::json;

/// `tests/reference.py`: QgsServer without us.
struct Reference {
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// QGIS leaves folders behind.
    _tmp: tempfile::TempDir,
}

impl Reference {
    fn start(projects: &Path) -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let mut child = Command::new("/usr/bin/python3")
            .arg(source("tests/reference.py"))
            .arg(projects)
            .env("TMPDIR", tmp.path())
            .env("LANG", "C.UTF-8")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let questions = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            questions,
            answers,
            _tmp: tmp,
        }
    }

    fn ask(
        &mut self,
        project: Option<&str>,
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Reply {
        let headers: serde_json::Map<_, _> = headers
            .iter()
            .map(|(name, value)| (name.to_string(), json!(value)))
            .collect();
        let question = json!({"project": project, "method": method, "url": url, "headers": headers, "body": body});
        writeln!(self.questions.as_mut().unwrap(), "{question}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "QGIS itself died of {url}");
        let answer: serde_json::Value = serde_json::from_str(&line).unwrap();
        let headers = answer["headers"].as_object().unwrap().iter();
        Reply {
            status: answer["status"].as_u64().unwrap() as u16,
            headers: headers
                .map(|(name, value)| (name.clone(), value.as_str().unwrap().into()))
                .collect(),
            body: answer["body"]
                .as_str()
                .unwrap()
                .chars()
                .map(|c| c as u8)
                .collect(),
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        drop(self.questions.take());
        let _ = self.child.wait();
    }
}

/// The server and the reference, each with its own copy of the projects.
struct Pair {
    server: Server,
    reference: Reference,
    _world: World,
}

impl Pair {
    fn start() -> Self {
        let world = World::real();
        let reference = Reference::start(&world.projects());
        Self {
            // Newer QGIS would refuse transactions.
            server: Server::real("projects.cache.force_readonly_layers = no"),
            reference,
            _world: world,
        }
    }

    /// Both answer the same, with status 200 and this content type.
    fn same(&mut self, project: &str, content_type: &str, path: &str) -> Reply {
        let reply = self.same_with(project, "GET", path, &[], "");
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        let kind = reply.header("content-type").unwrap_or_default();
        assert!(
            kind.starts_with(content_type),
            "{path}: {kind}: {}",
            reply.text()
        );
        assert!(!reply.body.is_empty(), "{path}");
        reply
    }

    fn same_with(
        &mut self,
        project: &str,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Reply {
        let ours = self.server.request(method, path, headers, body.as_bytes());
        let theirs =
            self.reference
                .ask(Some(project), method, &self.server.url(path), headers, body);
        assert_same(path, &ours, &theirs);
        ours
    }

    fn post_wfs(&mut self, body: &str) -> Reply {
        let path = "/ows/?MAP=world&SERVICE=WFS";
        let headers = [("Content-Type", "text/xml")];
        self.same_with("world.qgs", "POST", path, &headers, body)
    }

    fn world(&mut self, content_type: &str, query: &str) -> Reply {
        self.same(
            "world.qgs",
            content_type,
            &format!("/ows/?MAP=world&{query}"),
        )
    }

    fn atlas(&mut self, content_type: &str, query: &str) -> Reply {
        self.same(
            "atlas.qgz",
            content_type,
            &format!("/ows/?MAP=atlas&{query}"),
        )
    }
}

const XML: &str = "text/xml";
const PNG: &str = "image/png";
const JPEG: &str = "image/jpeg";
const WORLD_1_3: &str = "SERVICE=WMS&VERSION=1.3.0&CRS=EPSG:4326&BBOX=-90,-180,90,180&STYLES=";
const WORLD_1_1: &str = "SERVICE=WMS&VERSION=1.1.1&SRS=EPSG:4326&BBOX=-180,-90,180,90&STYLES=";
const EUROPE: &str =
    "SERVICE=WMS&VERSION=1.3.0&CRS=EPSG:3857&BBOX=-1500000,4000000,4500000,8500000&STYLES=";

#[test]
fn wms_describes_itself_as_in_process() {
    let mut pair = Pair::start();
    for version in ["1.1.1", "1.3.0"] {
        let query = format!("SERVICE=WMS&VERSION={version}&REQUEST=GetCapabilities");
        let first = pair.world(XML, &query).text();
        assert!(first.contains("<Title>World</Title>"), "{first}");
        // The second answer comes from QGIS's cache of capabilities.
        pair.world(XML, &query);
        pair.atlas(XML, &query);
    }
    pair.world(XML, "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetProjectSettings");
    pair.world(XML, "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetContext");
    pair.world(
        XML,
        "SERVICE=WMS&VERSION=1.1.1&REQUEST=GetStyles&LAYERS=countries,places",
    );
    pair.world(
        XML,
        "SERVICE=WMS&VERSION=1.1.1&REQUEST=DescribeLayer&LAYERS=countries,places&SLD_VERSION=1.1.0",
    );
    pair.world(XML, "SERVICE=WMS&REQUEST=GetSchemaExtension");
}

#[test]
fn maps_and_legends_are_drawn_as_in_process() {
    let mut pair = Pair::start();
    let maps = [
        (
            PNG,
            format!("{WORLD_1_3}&LAYERS=world&WIDTH=600&HEIGHT=300&FORMAT=image/png"),
        ),
        (
            PNG,
            format!(
                "{WORLD_1_3}&LAYERS=countries&WIDTH=256&HEIGHT=256&FORMAT=image/png&TRANSPARENT=true"
            ),
        ),
        (
            PNG,
            format!(
                "{WORLD_1_3}&LAYERS=background,places&WIDTH=400&HEIGHT=200&FORMAT=image/png;%20mode=16bit"
            ),
        ),
        (
            JPEG,
            format!("{WORLD_1_1}&LAYERS=world&WIDTH=600&HEIGHT=300&FORMAT=image/jpeg"),
        ),
        (
            PNG,
            format!("{EUROPE}&LAYERS=land,countries&WIDTH=500&HEIGHT=500&FORMAT=image/png&DPI=180"),
        ),
        (
            PNG,
            format!(
                "{EUROPE}&LAYERS=countries&FILTER=countries:%22name%22%20%3D%20%27France%27&WIDTH=300&HEIGHT=300&FORMAT=image/png"
            ),
        ),
        (
            PNG,
            format!(
                "{EUROPE}&LAYERS=countries&SELECTION=countries:10,20,158&WIDTH=300&HEIGHT=300&FORMAT=image/png"
            ),
        ),
        (
            JPEG,
            format!("{EUROPE}&LAYERS=coast_distance&WIDTH=300&HEIGHT=300&FORMAT=image/jpeg"),
        ),
    ];
    for (kind, query) in maps {
        pair.world(kind, &format!("REQUEST=GetMap&{query}"));
    }
    pair.atlas(
        PNG,
        &format!("REQUEST=GetMap&{EUROPE}&LAYERS=atlas&WIDTH=400&HEIGHT=400&FORMAT=image/png"),
    );
    let legend = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetLegendGraphic";
    pair.world(PNG, &format!("{legend}&LAYERS=world&FORMAT=image/png"));
    pair.world(
        JPEG,
        &format!("{legend}&LAYERS=countries&FORMAT=image/jpeg"),
    );
    pair.world(
        PNG,
        &format!(
            "{legend}&LAYER=countries&FORMAT=image/png&SHOWFEATURECOUNT=TRUE&LAYERTITLE=FALSE"
        ),
    );
    pair.world(
        "application/json",
        &format!("{legend}&LAYERS=countries,places&FORMAT=application/json"),
    );
}

#[test]
fn features_are_found_as_in_process() {
    let mut pair = Pair::start();
    let at = format!(
        "REQUEST=GetFeatureInfo&{EUROPE}&WIDTH=300&HEIGHT=225&I=85&J=110&FEATURE_COUNT=5\
         &LAYERS=countries,coast_distance&QUERY_LAYERS=countries,coast_distance"
    );
    let kinds = [
        ("text/plain", "text/plain"),
        ("text/xml", "text/xml"),
        ("text/html", "text/html"),
        ("application/json", "application/json"),
        ("application/vnd.ogc.gml", "application/vnd.ogc.gml"),
        ("application/vnd.ogc.gml/3.1.1", "application/vnd.ogc.gml"),
    ];
    for (format, kind) in kinds {
        let reply = pair.world(
            kind,
            &format!("{at}&INFO_FORMAT={format}&WITH_GEOMETRY=true"),
        );
        assert!(
            reply.text().contains("France"),
            "{format}: {}",
            reply.text()
        );
    }
}

#[test]
fn layouts_are_printed_as_in_process() {
    let mut pair = Pair::start();
    let print = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetPrint&TEMPLATE=A4";
    let whole = "CRS=EPSG:4326&map0:EXTENT=-90,-180,90,180&map0:LAYERS=countries,land&title=Earth";
    pair.world(PNG, &format!("{print}&{whole}&FORMAT=png&DPI=72"));
    pair.world(JPEG, &format!("{print}&{whole}&FORMAT=jpg&DPI=50"));
    pair.world(
        "application/pdf",
        &format!("{print}&{whole}&FORMAT=pdf&DPI=72"),
    );
    pair.world("image/svg", &format!("{print}&{whole}&FORMAT=svg&DPI=72"));
    pair.atlas(
        PNG,
        &format!("{print}&CRS=EPSG:3857&ATLAS_PK=158&FORMAT=png&DPI=50"),
    );
    pair.atlas(
        "application/pdf",
        &format!("{print}&CRS=EPSG:3857&ATLAS_PK=3,158&FORMAT=pdf&DPI=50"),
    );
}

#[test]
fn wfs_answers_as_in_process() {
    let mut pair = Pair::start();
    for version in ["1.0.0", "1.1.0"] {
        let wfs = format!("SERVICE=WFS&VERSION={version}");
        pair.world(XML, &format!("{wfs}&REQUEST=GetCapabilities"));
        pair.world(XML, &format!("{wfs}&REQUEST=DescribeFeatureType"));
        pair.world(
            XML,
            &format!("{wfs}&REQUEST=DescribeFeatureType&TYPENAME=places"),
        );
        pair.world(XML, &format!("{wfs}&REQUEST=GetFeature&TYPENAME=places"));
    }
    let get = "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature";
    let json = "application/vnd.geo+json";
    pair.world(XML, &format!("{get}&TYPENAME=countries&OUTPUTFORMAT=GML2"));
    pair.world(XML, &format!("{get}&TYPENAME=countries&OUTPUTFORMAT=GML3"));
    let all = pair.world(
        json,
        &format!("{get}&TYPENAME=countries&OUTPUTFORMAT=GeoJSON"),
    );
    assert_eq!(all.json()["features"].as_array().unwrap().len(), 241);
    assert_eq!(
        all.header("transfer-encoding"),
        Some("chunked"),
        "2 MB of features are streamed"
    );
    pair.world(json, &format!("{get}&TYPENAME=places&OUTPUTFORMAT=GeoJSON&MAXFEATURES=3&STARTINDEX=2&PROPERTYNAME=name"));
    pair.world(
        json,
        &format!("{get}&TYPENAME=places&OUTPUTFORMAT=GeoJSON&BBOX=-10,35,30,60&SRSNAME=EPSG:3857"),
    );
    pair.world(
        json,
        &format!("{get}&FEATUREID=places.3,places.5&OUTPUTFORMAT=GeoJSON"),
    );
    pair.world(
        json,
        &format!("{get}&TYPENAME=places&OUTPUTFORMAT=GeoJSON&EXP_FILTER=%22rank%22%3C4"),
    );
    let filter = "<ogc:Filter xmlns:ogc=\"http://www.opengis.net/ogc\"><ogc:PropertyIsEqualTo><ogc:PropertyName>name\
                  </ogc:PropertyName><ogc:Literal>France</ogc:Literal></ogc:PropertyIsEqualTo></ogc:Filter>";
    let body = format!(
        "<wfs:GetFeature service=\"WFS\" version=\"1.1.0\" outputFormat=\"GML3\" xmlns:wfs=\"http://www.opengis.net/wfs\">\
         <wfs:Query typeName=\"places\">{filter}</wfs:Query></wfs:GetFeature>"
    );
    let reply = pair.post_wfs(&body);
    assert!(reply.text().contains("France"), "{}", reply.text());
    pair.atlas(XML, "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetCapabilities");
}

/// Both edit their own copy, then both are asked what they have.
#[test]
fn wfs_transactions_change_what_they_change_in_process() {
    let mut pair = Pair::start();
    let transaction = |pair: &mut Pair, action: &str, expected: &str| {
        let body = format!(
            "<wfs:Transaction service=\"WFS\" version=\"1.1.0\" xmlns:wfs=\"http://www.opengis.net/wfs\" \
             xmlns:ogc=\"http://www.opengis.net/ogc\" xmlns:gml=\"http://www.opengis.net/gml\">{action}</wfs:Transaction>"
        );
        let reply = pair.post_wfs(&body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(reply.text().contains(expected), "{}", reply.text());
        let places =
            "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=places&OUTPUTFORMAT=GeoJSON";
        let json = pair.world("application/vnd.geo+json", places).json();
        json["features"].as_array().unwrap().clone()
    };
    let named = |features: &[serde_json::Value], name: &str| {
        features
            .iter()
            .filter(|feature| feature["properties"]["name"] == name)
            .count()
    };
    let filter =
        |fid: &str| format!("<ogc:Filter><ogc:FeatureId fid=\"places.{fid}\"/></ogc:Filter>");

    let insert = "<wfs:Insert><places><name>Atlantis</name><rank>999</rank><geometry>\
                  <gml:Point srsName=\"EPSG:4326\"><gml:coordinates cs=\",\" ts=\" \">-30.5,35.25</gml:coordinates>\
                  </gml:Point></geometry></places></wfs:Insert>";
    let after = transaction(&mut pair, insert, "places.178");
    assert_eq!((after.len(), named(&after, "Atlantis")), (178, 1));

    let update = format!(
        "<wfs:Update typeName=\"places\"><wfs:Property><wfs:Name>name</wfs:Name><wfs:Value>Lemuria</wfs:Value>\
         </wfs:Property>{}</wfs:Update>",
        filter("178")
    );
    let after = transaction(&mut pair, &update, "<totalUpdated>1<");
    assert_eq!(
        (named(&after, "Atlantis"), named(&after, "Lemuria")),
        (0, 1)
    );

    let delete = format!(
        "<wfs:Delete typeName=\"places\">{}</wfs:Delete>",
        filter("178")
    );
    let after = transaction(&mut pair, &delete, "<totalDeleted>1<");
    assert_eq!((after.len(), named(&after, "Lemuria")), (177, 0));
}

#[test]
fn coverages_and_tiles_are_as_in_process() {
    let mut pair = Pair::start();
    let wcs = "SERVICE=WCS&VERSION=1.0.0";
    pair.world(XML, &format!("{wcs}&REQUEST=GetCapabilities"));
    pair.world(
        XML,
        &format!("{wcs}&REQUEST=DescribeCoverage&COVERAGE=coast_distance"),
    );
    for (crs, bbox) in [
        ("EPSG:4326", "-10,40,20,55"),
        ("EPSG:3857", "0,5000000,3000000,8000000"),
    ] {
        let query = format!(
            "{wcs}&REQUEST=GetCoverage&COVERAGE=coast_distance&CRS={crs}&BBOX={bbox}&WIDTH=60&HEIGHT=40&FORMAT=GTiff"
        );
        let reply = pair.world("image/tiff", &query);
        assert_eq!(&reply.body[..2], b"II", "a TIFF");
    }
    let wmts = "SERVICE=WMTS&VERSION=1.0.0";
    pair.world(XML, &format!("{wmts}&REQUEST=GetCapabilities"));
    let tile = format!(
        "{wmts}&REQUEST=GetTile&STYLE=&TILEMATRIXSET=EPSG:3857&TILEMATRIX=2&TILEROW=1&TILECOL=2"
    );
    pair.world(PNG, &format!("{tile}&LAYER=countries&FORMAT=image/png"));
    pair.world(
        JPEG,
        &format!("{tile}&LAYER=coast_distance&FORMAT=image/jpeg"),
    );
    let info = tile.replace("GetTile", "GetFeatureInfo");
    pair.world(
        "text/xml",
        &format!("{info}&LAYER=countries&FORMAT=image/png&INFOFORMAT=text/xml&I=100&J=120"),
    );
    pair.atlas(PNG, &format!("{tile}&LAYER=countries&FORMAT=image/png"));
}

#[test]
fn the_ogc_api_answers_as_in_process() {
    let mut pair = Pair::start();
    let pages = [
        "",
        ".json",
        ".html",
        "/conformance",
        "/conformance.json",
        "/conformance.html",
        "/collections",
        "/collections.json",
        "/collections.html",
        "/collections/places",
        "/collections/places.html",
        "/api",
        "/api.json",
        "/api.html",
        "/collections/places/items.json?limit=3",
        "/collections/places/items.html?limit=3&offset=10",
        "/collections/countries/items/158.json",
        "/collections/places/items/5.html",
        "/collections/places/items?bbox=-10,35,30,60&limit=50",
        "/collections/places/items?name=France",
        "/static/style.css",
    ];
    for page in pages {
        let joint = if page.contains('?') { '&' } else { '?' };
        let kind = match page {
            _ if page.contains(".html") => "text/html",
            "/static/style.css" => "text/css",
            "/api" | "/api.json" => "application/vnd.oai.openapi+json",
            _ if page.contains("/items") => "application/geo+json",
            _ => "application/json",
        };
        pair.same("world.qgs", kind, &format!("/wfs3{page}{joint}MAP=world"));
    }
    let missing = pair.same_with(
        "world.qgs",
        "GET",
        "/wfs3/collections/nothing?MAP=world",
        &[],
        "",
    );
    assert_eq!(missing.status, 404, "{}", missing.text());
}

/// `q=0.9` for HTML, as browsers ask.
#[test]
fn the_ogc_api_honours_accept() {
    let mut pair = Pair::start();
    for (accept, kind) in [
        ("text/html", "text/html"),
        ("application/json", "application/json"),
    ] {
        let path = "/wfs3/collections?MAP=world";
        let reply = pair.same_with("world.qgs", "GET", path, &[("Accept", accept)], "");
        assert_eq!(reply.header("content-type"), Some(kind));
    }
}

#[test]
fn the_catalogue_lists_the_projects_where_the_operator_enables_it() {
    assert_eq!(Server::real("").get("/catalog/index.json").status, 404);
    let server = Server::real("api.enabled.landing_page = yes");
    let front = server.get("/catalog/");
    assert_eq!(front.status, 302, "{}", front.text());
    let reply = server.get("/catalog/index.json");
    assert_eq!(reply.status, 200, "{}", reply.text());
    let json = reply.json();
    let projects = json["projects"].as_array().unwrap().iter();
    let mut titles: Vec<_> = projects
        .map(|project| project["title"].as_str().unwrap())
        .collect();
    titles.sort();
    assert_eq!(
        titles,
        ["Atlas", "World"],
        "QGIS leaves out what has a broken layer"
    );
}

/// Written in place, replaced by another file, and replaced by an older one.
#[test]
fn a_project_that_changed_is_served_as_it_is_now() {
    let server = Server::real("");
    let path = server.world.path("projects/world.qgs");
    let text = std::fs::read_to_string(&path).unwrap();
    let title = || {
        let capabilities = server
            .get("/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities")
            .text();
        let service = capabilities.split("<Title>").nth(1).unwrap().to_owned();
        service.split("</Title>").next().unwrap().to_owned()
    };
    let named = |name: &str| text.replace(">World<", &format!(">{name}<"));
    assert_eq!(title(), "World");
    std::fs::write(&path, named("Written")).unwrap();
    assert_eq!(title(), "Written");
    let other = path.with_extension("new");
    for (name, age) in [("Replaced", 0), ("Older", 3600 * 24)] {
        std::fs::write(&other, named(name)).unwrap();
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
        std::fs::File::options()
            .write(true)
            .open(&other)
            .unwrap()
            .set_modified(then)
            .unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(title(), name);
    }
    std::fs::remove_file(&path).unwrap();
    let gone = server.get("/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities");
    assert_eq!(gone.status, 404, "{}", gone.text());
}

/// What QGIS refuses, it refuses in the same words over HTTP.
#[test]
fn mistakes_are_explained_as_in_process() {
    let mut pair = Pair::start();
    for (status, query) in [
        (501, "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetNothing"),
        (
            400,
            "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=nowhere&STYLES=&CRS=EPSG:4326&BBOX=-90,-180,90,180&WIDTH=10&HEIGHT=10",
        ),
        (
            400,
            "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=land&STYLES=&CRS=EPSG:4326&BBOX=1,2&WIDTH=10&HEIGHT=10",
        ),
        (
            400,
            "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=nowhere",
        ),
        (
            400,
            "SERVICE=WCS&VERSION=1.0.0&REQUEST=GetCoverage&COVERAGE=nowhere",
        ),
    ] {
        let reply = pair.same_with(
            "world.qgs",
            "GET",
            &format!("/ows/?MAP=world&{query}"),
            &[],
            "",
        );
        assert_eq!(reply.status, status, "{query}: {}", reply.text());
    }
}

/// Workers are forks of one process: a thread would be lost on the way, and the
/// position in a file would be the same for all.
#[test]
fn workers_share_neither_a_thread_nor_an_open_file() {
    let server = Server::real("");
    let pool = parent(server.workers()[0]);
    assert_eq!(n_threads(pool), 1);
    let mut files = open_files(pool);
    // A lock says that its directory is in use; nobody reads it.
    files.retain(|file| !file.ends_with("lock"));
    assert_eq!(files, Vec::<std::path::PathBuf>::new());
}

/// QGIS keeps capabilities for longer than a worker keeps projects.
#[test]
fn a_project_that_changed_while_it_was_not_loaded_has_new_capabilities() {
    let world = World::real();
    let old = std::fs::read_to_string(world.path("projects/world.qgs")).unwrap();
    let path = world.path("projects/title.qgs");
    std::fs::write(&path, &old).unwrap();
    let server = Server::start(world, "projects.cache.size = 1").ready();
    let capabilities = |map: &str| {
        let query = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities";
        server.get(&format!("/ows/?MAP={map}&{query}")).text()
    };
    let title = |name: &str| format!("<WMSServiceTitle type=\"QString\">{name}</WMSServiceTitle>");
    let (before, _) = old.split_once("<WMSServiceTitle").expect("a title");
    let (_, after) = old.split_once("</WMSServiceTitle>").unwrap();
    assert!(!capabilities("title").contains("Another"));
    assert!(!capabilities("world").contains("Another"));
    std::fs::write(&path, [before, &title("Another"), after].concat()).unwrap();
    assert!(capabilities("title").contains("<Title>Another</Title>"));
}

/// QGIS itself refuses what no image could hold; the limit of the worker the rest.
#[test]
fn an_image_that_takes_too_much_memory_is_an_ogc_exception_and_costs_no_worker() {
    let server = Server::real("worker.memory_limit = 400M\nserver.timeout = 60");
    let before = server.workers();
    let map = |size: u32| {
        let query = format!("{WORLD_1_3}&LAYERS=countries&REQUEST=GetMap&FORMAT=image/png");
        server.get(&format!(
            "/ows/?MAP=world&{query}&WIDTH={size}&HEIGHT={size}"
        ))
    };
    // Beyond any image; without room; with room for one copy and not for the next.
    for (size, status) in [(30_000, 400), (20_000, 500), (6000, 500)] {
        let reply = map(size);
        let text = reply.text();
        assert_eq!(reply.status, status, "{size}: {text}");
        assert!(text.contains("<ServiceException "), "{size}: {text}");
    }
    // What was freed makes room again.
    for size in [2000, 3000, 100] {
        let reply = map(size);
        assert_eq!(reply.status, 200, "{size}: {}", reply.text());
    }
    assert_eq!(server.workers(), before);
}

/// Of a raster without its end, GDAL complains in the threads that draw.
#[test]
fn what_gdal_says_is_in_the_log_with_the_id_of_the_request() {
    let world = World::real();
    let raster = world.path("projects/data/coast_distance.tif");
    let whole = std::fs::read(&raster).unwrap();
    std::fs::write(&raster, &whole[..whole.len() / 3 * 2]).unwrap();
    let variable = Path::new("1");
    let world = world.with("QGIS_SERVER_PARALLEL_RENDERING", variable);
    let server = Server::start(world, "logging.json = yes").ready();
    let query = format!("{WORLD_1_3}&REQUEST=GetMap&FORMAT=image/png&WIDTH=800&HEIGHT=400");
    let path = format!("/ows/?MAP=world&{query}&LAYERS=coast_distance,countries,coast_distance");
    for _ in 0..3 {
        server.request("GET", &path, &[("X-Request-Id", "cut-off")], b"");
    }
    let said = server.process.log.wait_for("a line of GDAL's", |line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        (line["tag"] == "GDAL" && line["request_id"] == "cut-off").then_some(line)
    });
    assert_eq!(said["level"], "ERROR");
    let text = server.process.log.text();
    for line in text.lines().filter(|line| !line.is_empty()) {
        assert!(line.starts_with("{\"") && line.ends_with('}'), "{line}");
    }
}
