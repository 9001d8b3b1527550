//! In which line a request waits, and which line may send next.
//!
//! | line | who waits there | may have |
//! |---|---|---|
//! | `Own` | requests of our own workers for a layer that we serve | any worker, before all others |
//! | `Maps` | maps, tiles, features: what people look at | any worker |
//! | `Papers` | capabilities, legends, other descriptions | any worker |
//! | `Slow` | what is estimated above `lanes.slow_ms` | the long lane |
//! | `Held` | prints, and requests to projects that ask this server for layers | the long lane |
//!
//! The long lane has all workers but the reserved ones ([`Rules::long_max`]), so
//! small maps keep flowing. While no small request came for
//! `lanes.reserved_seconds`,
//! `Slow` may have the reserved ones, too: where every map is slow, none is kept
//! waiting for small ones that nobody asks for. `Held` never may: the first small
//! request after it would wait for a whole print; and a worker that is left when
//! all those wait which may ask for our own layers is what serves those layers.
//!
//! A project that may be waiting for a source that does not answer has no more workers
//! than the long lane, whatever is asked of it ([`super::standings`]).
//!
//! Maps go first. But whoever has been passed over [`PATIENCE`] times goes before
//! them, so none of the lines starves.

use std::time::Duration;

/// So often others may go first.
pub const PATIENCE: u32 = 4;

/// One of the lines, in the order in which they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Line {
    Own,
    Maps,
    Papers,
    Slow,
    Held,
}

impl Line {
    pub const ALL: [Self; 5] = [Self::Own, Self::Maps, Self::Papers, Self::Slow, Self::Held];

    pub fn is_long(self) -> bool {
        matches!(self, Self::Slow | Self::Held)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Maps => "maps",
            Self::Papers => "papers",
            Self::Slow => "slow",
            Self::Held => "held",
        }
    }
}

/// What an operation is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sort {
    #[default]
    Map,
    Paper,
    Print,
}

impl Sort {
    pub fn of(operation: &str) -> Self {
        let is = |names: &[&str]| {
            names
                .iter()
                .any(|name| name.eq_ignore_ascii_case(operation))
        };
        if is(&["GetPrint", "GetPrintAtlas"]) {
            Self::Print
        } else if is(&PAPERS) {
            Self::Paper
        } else {
            Self::Map
        }
    }
}

/// What describes a map but is none.
const PAPERS: [&str; 12] = [
    "DescribeCoverage",
    "DescribeFeatureType",
    "DescribeLayer",
    "GetCapabilities",
    "GetContext",
    "GetLegendGraphic",
    "GetLegendGraphics",
    "GetProjectSettings",
    "GetSchemaExtension",
    "GetStyle",
    "GetStyles",
    "SchemaExtension",
];

/// The settings of the lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Workers that long requests leave alone; None: a quarter, or as far as half goes, two.
    pub reserved: Option<usize>,
    /// What is estimated above takes the long lane.
    pub slow: Duration,
    /// For how long workers stay reserved after the last small request.
    pub reserve: Duration,
}

impl Rules {
    /// The line of a request that does not come from a worker of ours. `asks_us`:
    /// its project asks this server for layers.
    pub fn line(&self, sort: Sort, asks_us: bool, cost: u32) -> Line {
        match sort {
            _ if asks_us => Line::Held,
            Sort::Print => Line::Held,
            _ if Duration::from_millis(cost.into()) > self.slow => Line::Slow,
            Sort::Paper => Line::Papers,
            Sort::Map => Line::Maps,
        }
    }

    /// How many of `n` workers may do long work at the same time; the only one always may.
    pub fn long_max(&self, n: usize) -> usize {
        let reserved = self.reserved.unwrap_or(n.div_ceil(4).max(2.min(n / 2)));
        n.saturating_sub(reserved).max(n.min(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(reserved: Option<usize>) -> Rules {
        Rules {
            reserved,
            slow: Duration::from_millis(1500),
            reserve: Duration::from_secs(10),
        }
    }

    #[test]
    fn long_requests_leave_workers_alone_where_there_is_more_than_one() {
        let long_max = |n| rules(None).long_max(n);
        let of = [0, 1, 2, 3, 4, 8, 16, 64].map(|n| (n, long_max(n)));
        assert_eq!(
            of,
            [
                (0, 0),
                (1, 1),
                (2, 1),
                (3, 2),
                (4, 2),
                (8, 6),
                (16, 12),
                (64, 48)
            ]
        );
    }

    #[test]
    fn the_operator_may_reserve_others_but_never_all() {
        assert_eq!(rules(Some(0)).long_max(4), 4);
        assert_eq!(rules(Some(3)).long_max(4), 1);
        assert_eq!(rules(Some(9)).long_max(4), 1);
    }

    #[test]
    fn a_line_follows_from_operation_project_and_estimate() {
        let line = |operation, asks_us, cost| rules(None).line(Sort::of(operation), asks_us, cost);
        assert_eq!(line("getmap", false, 100), Line::Maps);
        assert_eq!(line("GetTile", false, 1500), Line::Maps);
        assert_eq!(line("GetMap", false, 1501), Line::Slow);
        assert_eq!(line("GetLegendGraphic", false, 100), Line::Papers);
        assert_eq!(line("GetCapabilities", false, 5000), Line::Slow);
        assert_eq!(line("GetPrint", false, 1), Line::Held);
        assert_eq!(line("GetMap", true, 1), Line::Held);
        assert_eq!(line("/wfs3/collections", false, 1), Line::Maps);
    }
}
