//! Numbers into medians, medians into demands that are met or missed.

use std::time::Duration;

pub fn percentile(series: &[Duration], percent: usize) -> Duration {
    let mut sorted = series.to_vec();
    sorted.sort();
    sorted[(sorted.len() - 1) * percent / 100]
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// What was asked of qgisserver, and what came out.
#[derive(Default)]
pub struct Demands {
    rows: Vec<String>,
}

impl Demands {
    pub fn at_most(&mut self, what: &str, limit: f64, measured: f64) {
        self.row(what, "≤", limit, measured, measured <= limit);
    }

    pub fn at_least(&mut self, what: &str, limit: f64, measured: f64) {
        self.row(what, "≥", limit, measured, measured >= limit);
    }

    fn row(&mut self, what: &str, sign: &str, limit: f64, measured: f64, met: bool) {
        let verdict = if met { "met" } else { "MISSED" };
        self.rows.push(format!(
            "| {what} | {sign} {limit} | {measured:.3} | {verdict} |"
        ));
    }

    pub fn print(&self) {
        println!("\nDemands\n\n| what | demanded | measured | |\n|---|---|---|---|");
        self.rows.iter().for_each(|row| println!("{row}"));
    }
}
