//! Figures and promises: printed for people, written for `make bench`.

use serde_json::{Value, json};

use super::Failed;

/// What a figure has to be.
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(limit) => figure >= limit,
            Self::AtMost(limit) => figure <= limit,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::AtLeast(_) => "at least",
            Self::AtMost(_) => "at most",
        }
    }

    fn limit(self) -> f64 {
        match self {
            Self::AtLeast(limit) | Self::AtMost(limit) => limit,
        }
    }
}

/// What a bench has found.
#[derive(Default)]
pub struct Report {
    figures: Vec<Value>,
    promises: Vec<Value>,
    about: serde_json::Map<String, Value>,
}

impl Report {
    /// The median of several rounds.
    pub fn rounds(&mut self, name: impl Into<String>, unit: &str, rounds: &[f64]) -> f64 {
        let middle = median(rounds);
        let shown: Vec<f64> = rounds.iter().copied().map(rounded).collect();
        self.figures.push(json!({
            "name": name.into(), "unit": unit, "value": rounded(middle), "rounds": shown,
        }));
        middle
    }

    /// One figure.
    pub fn figure(&mut self, name: impl Into<String>, unit: &str, value: f64) {
        self.figures
            .push(json!({"name": name.into(), "unit": unit, "value": rounded(value)}));
    }

    /// What was promised about a figure.
    pub fn promise(
        &mut self,
        name: impl Into<String>,
        promise: impl Into<String>,
        unit: &str,
        bound: Bound,
        figure: f64,
    ) {
        self.promises.push(json!({
            "name": name.into(), "promise": promise.into(), "unit": unit, "bound": bound.name(),
            "limit": bound.limit(), "figure": rounded(figure), "met": bound.is_met(figure),
        }));
    }

    /// Something about the surroundings, such as the server's settings.
    pub fn about(&mut self, name: &str, value: Value) {
        self.about.insert(name.to_owned(), value);
    }

    /// Prints the promises, and writes everything where `ARTEL_BENCH_JSON` says.
    pub fn finish(self) -> Result<(), Failed> {
        for figure in &self.figures {
            let text = |key: &str| figure[key].as_str().unwrap_or_default().to_owned();
            println!("{}: {} {}", text("name"), figure["value"], text("unit"));
        }
        for promise in &self.promises {
            let text = |key: &str| promise[key].as_str().unwrap_or_default().to_owned();
            println!(
                "{} {}: {} {unit}, {} {} {unit}",
                if promise["met"] == true {
                    "met    "
                } else {
                    "NOT MET"
                },
                text("promise"),
                promise["figure"],
                text("bound"),
                promise["limit"],
                unit = text("unit"),
            );
        }
        if let Some(path) = std::env::var_os("ARTEL_BENCH_JSON") {
            let mut whole = self.about;
            whole.insert("figures".to_owned(), self.figures.into());
            whole.insert("promises".to_owned(), self.promises.into());
            std::fs::write(path, serde_json::to_vec_pretty(&whole)?)?;
        }
        Ok(())
    }
}

/// The value below which such a share (0 to 1) of the values lies; 0 when there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index, cut to the list"
    )]
    let index = (share * last as f64).ceil() as usize;
    sorted.get(index.min(last)).copied().unwrap_or_default()
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.is_empty() {
        0.0
    } else if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

/// Round by round: what else the machine did in a round, it did to both.
pub fn median_ratio(these: &[f64], those: &[f64]) -> f64 {
    let ratios: Vec<f64> = these.iter().zip(those).map(|(a, b)| a / b).collect();
    median(&ratios)
}

/// Tenths from 10 on, thousandths below.
fn rounded(figure: f64) -> f64 {
    let by = if figure.abs() < 10.0 { 1000.0 } else { 10.0 };
    (figure * by).round() / by
}
