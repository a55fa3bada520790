//! What came out of repeated transfers.

use super::super::median;

/// One transfer.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Run {
    /// Payload, bytes.
    pub bytes: f64,
    /// How long.
    pub seconds: f64,
    /// CPU seconds of both ends; none where it was not measured.
    pub cpu_s: Option<f64>,
}

/// Repeated transfers, the warm-up left out.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    /// GB/s.
    pub gbps: Vec<f64>,
    /// CPU seconds per GB.
    pub cpu_s_per_gb: Vec<f64>,
}

impl Runs {
    /// Calls `run` once to warm up, and `repeats` times.
    pub fn measure(repeats: usize, mut run: impl FnMut() -> anyhow::Result<Run>) -> anyhow::Result<Self> {
        run()?;
        let mut runs = Self::default();
        for _ in 0..repeats {
            runs.add(run()?);
        }
        Ok(runs)
    }

    /// One more.
    pub fn add(&mut self, run: Run) {
        let gb = run.bytes / 1e9;
        self.gbps.push(gb / run.seconds);
        self.cpu_s_per_gb.extend(run.cpu_s.map(|cpu_s| cpu_s / gb));
    }

    /// Median GB/s.
    pub fn rate(&self) -> f64 {
        median(self.gbps.clone())
    }

    /// Median CPU seconds per GB.
    pub fn cpu(&self) -> Option<f64> {
        (!self.cpu_s_per_gb.is_empty()).then(|| median(self.cpu_s_per_gb.clone()))
    }

    /// Prints them.
    pub fn show(&self, who: &str) {
        let (least, most) = (fold(&self.gbps, f64::min), fold(&self.gbps, f64::max));
        let cpu = self.cpu().map_or("–".to_owned(), |cpu| format!("{cpu:.3}"));
        println!(
            "  {:>7.3} GB/s [{least:.3}–{most:.3}], {cpu} CPU s/GB  {who}",
            self.rate()
        );
    }
}

fn fold(values: &[f64], with: fn(f64, f64) -> f64) -> f64 {
    values.iter().copied().reduce(with).unwrap_or(f64::NAN)
}
