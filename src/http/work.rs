//! How much work a request asks for, as far as its parameters say.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::broker::Work;
use crate::ogc::ows::Kvp;

/// What names the things that a request is about, in all services.
const SUBJECTS: [&str; 6] = [
    "LAYERS",
    "LAYER",
    "TYPENAME",
    "TYPENAMES",
    "COVERAGE",
    "TEMPLATE",
];

/// Each of them limits the features of a reply.
const LIMITS: [&str; 8] = [
    "BBOX",
    "COUNT",
    "EXP_FILTER",
    "FEATUREID",
    "FILTER",
    "MAXFEATURES",
    "RESOURCEID",
    "STOREDQUERY_ID",
];

/// Of an A4 page, which is what a print has unless its template says otherwise.
const SQUARE_INCHES: f64 = 8.27 * 11.69;
const DPI: f64 = 300.0;

/// The picture of a tile; requests do not say how large it is.
const TILE: u64 = 256 * 256;

pub fn of(kvp: &Kvp, operation: &str) -> Work {
    let is = |name: &str| operation.eq_ignore_ascii_case(name);
    let number = |key: &str| kvp.get(key)?.trim().parse::<f64>().ok();
    let pixels = match (number("WIDTH"), number("HEIGHT")) {
        (Some(width), Some(height)) => (width * height) as u64,
        _ if is("GetPrint") || is("GetPrintAtlas") => {
            let dpi = number("DPI").unwrap_or(DPI);
            (SQUARE_INCHES * dpi * dpi) as u64
        }
        _ if is("GetTile") => TILE,
        _ => 0,
    };
    let subjects = SUBJECTS.iter().filter_map(|key| kvp.get(key));
    let subjects: Vec<String> = subjects.chain(kvp.get("MAP0:LAYERS")).collect();
    let layers = subjects.iter().map(|subject| subject.split(',').count());
    Work {
        pixels,
        layers: layers.max().unwrap_or(0).try_into().unwrap_or(u32::MAX),
        subject: hash(&subjects),
        is_endless: is("GetFeature") && LIMITS.iter().all(|key| kvp.get(key).is_none()),
    }
}

fn hash(subjects: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    subjects.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(query: &str) -> Work {
        let kvp = Kvp::parse(query);
        of(&kvp, &kvp.get("REQUEST").unwrap_or_default())
    }

    #[test]
    fn a_map_says_how_large_it_is_and_how_many_layers_it_has() {
        let map = work("REQUEST=GetMap&WIDTH=800&height=600&LAYERS=a,b,c");
        assert_eq!(
            (map.pixels, map.layers, map.is_endless),
            (480_000, 3, false)
        );
        let other = work("REQUEST=GetMap&WIDTH=800&HEIGHT=600&LAYERS=a,b");
        assert_ne!(map.subject, other.subject);
    }

    #[test]
    fn a_print_is_a_page_of_its_resolution() {
        assert_eq!(work("REQUEST=GetPrint&TEMPLATE=A4&DPI=100").pixels, 966_762);
        assert!(work("REQUEST=getprint&TEMPLATE=A4").pixels > 8_000_000);
        assert_eq!(
            work("REQUEST=GetPrint&TEMPLATE=A4&MAP0:LAYERS=a,b").layers,
            2
        );
    }

    #[test]
    fn features_without_any_limit_are_endless() {
        assert!(work("REQUEST=GetFeature&TYPENAME=roads").is_endless);
        assert!(!work("REQUEST=GetFeature&TYPENAME=roads&MAXFEATURES=10").is_endless);
        assert!(!work("REQUEST=GetMap").is_endless);
    }

    #[test]
    fn nonsense_is_no_work_at_all() {
        for query in [
            "WIDTH=-5&HEIGHT=5",
            "WIDTH=NaN&HEIGHT=1",
            "WIDTH=x&HEIGHT=",
            "",
        ] {
            assert_eq!(work(query).pixels, 0, "{query}");
        }
        assert_eq!(work("WIDTH=1e300&HEIGHT=1e300").pixels, u64::MAX);
    }
}
