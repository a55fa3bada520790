//! What the machine allows.

use super::{
    aes::{self, Cipher},
    copy,
    raw_tcp::RawTcp,
    runs::Runs,
};

/// GB/s.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sockets: the better of one and two streams.
    pub tcp: f64,
    /// From one process's memory into another's.
    pub copy: f64,
    /// AES-128-GCM on one core.
    pub aes: f64,
}

impl Limits {
    /// Measures them with runs of `bytes`, and prints them.
    pub fn measure(bytes: usize, repeats: usize) -> anyhow::Result<Self> {
        let mut tcp = 0.0_f64;
        for streams in [1, 2] {
            let mut ends = RawTcp::start(streams)?;
            let runs = Runs::measure(repeats, || ends.run(bytes))?;
            runs.show(&format!("raw TCP, {streams} streams, unchecked"));
            tcp = tcp.max(runs.rate());
        }
        let mut copy = 0.0_f64;
        for (kib, sums) in [(64, false), (64, true), (256, false), (256, true)] {
            let runs = copy::one_copy(bytes, kib << 10, sums, repeats)?;
            let summed = if sums { ", then summed where it lies" } else { "" };
            runs.show(&format!("one copy, {kib} KiB{summed}"));
            copy = copy.max(runs.rate());
        }
        let aes = aes::gbps(Cipher::Aes128)?;
        println!("  {aes:>7.3} GB/s  AES-128-GCM of one core, which TLS takes here");
        println!("  {:>7.3} GB/s  AES-256-GCM of one core", aes::gbps(Cipher::Aes256)?);
        Ok(Self { tcp, copy, aes })
    }
}
